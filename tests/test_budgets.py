"""What is to be audited: how much code there is, where the trust core lies, how it is laid out."""

from __future__ import annotations

import ast
import re
import unittest

from lab import OFFSYNC, offsync, read

# What is to be audited, at most: expression nodes in all and of the trust core, statements,
# expression nodes a statement. No layout changes these.
EXPRESSIONS, CORE, STATEMENTS, DENSITY = 23_350, 9_400, 3_780, 6.25


class Audit(unittest.TestCase):
    def test_the_trust_core_is_where_the_docstring_says(self) -> None:
        lines = read(OFFSYNC).split("\n")
        begin = next(
            number for number, line in enumerate(lines, 1) if line.startswith("# === Trust core")
        )
        end = (
            next(
                number
                for number, line in enumerate(lines, 1)
                if line.startswith("# === The trust core ends")
            )
            - 1
        )
        while not lines[end - 1]:
            end -= 1
        named = re.search(r"trust core first: lines (\d+) to (\d+)", offsync.__doc__)
        self.assertEqual((int(named[1]), int(named[2])), (begin, end))
        sections = [
            line.split(": ")[1].split(" -")[0].split(" =")[0]
            for line in lines[begin - 1 : end]
            if line.startswith(("# --- Trust core", "# === Trust core"))
        ]
        self.assertEqual(
            sections,
            [
                "running programs",
                "names",
                "failures",
                "the source",
                "the connection",
                "proofs",
                "what rsync prints",
                "the plan",
                "approval",
                "delivery",
                "record, status and lock",
            ],
        )

    def test_budgets(self) -> None:
        """So much is to be audited at most; what is new is to be paid for by what goes."""
        nodes = list(ast.walk(ast.parse(read(OFFSYNC))))
        statements = sum(isinstance(node, ast.stmt) for node in nodes)
        lines = [node.lineno for node in nodes if isinstance(node, ast.expr)]
        named = re.search(r"trust core first: lines (\d+) to (\d+)", offsync.__doc__)
        core = sum(int(named[1]) <= line <= int(named[2]) for line in lines)
        self.assertLessEqual(len(lines), EXPRESSIONS)
        self.assertLessEqual(core, CORE)
        self.assertLessEqual(statements, STATEMENTS)
        self.assertLessEqual(len(lines) / statements, DENSITY)

    def test_what_apply_reaches_outside_the_core(self) -> None:
        """Printed for the auditor: by the names that a function uses, so rather too much."""
        text = read(OFFSYNC)
        named = re.search(r"trust core first: lines (\d+) to (\d+)", offsync.__doc__)
        begin, end = int(named[1]), int(named[2])
        found: dict = {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(node)
        reached, pending = set(), ["cmd_apply"]
        while pending:
            name = pending.pop()
            if name in found and name not in reached:
                reached.add(name)
                for node in found[name]:
                    pending += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
                    pending += [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
        outside = {
            name: sum(node.end_lineno - node.lineno + 1 for node in found[name])
            for name in reached
            if not all(begin <= node.lineno <= end for node in found[name])
        }
        print(
            "apply reaches %d lines outside the core: %s"
            % (sum(outside.values()), ", ".join(sorted(outside)))
        )
        self.assertIn("validate_config", outside)
        for name in (
            "check_refusal",
            "prove_path",
            "parse_itemized",
            "approve",
            "take_lock",
            "run_program",
        ):
            self.assertIn(name, reached - set(outside))

    def test_width(self) -> None:
        self.assertEqual([line for line in read(OFFSYNC).split("\n") if len(line) > 100], [])

    def test_programs_are_started_in_one_place(self) -> None:
        text = read(OFFSYNC)
        self.assertEqual(
            len(re.findall(r"subprocess\.(?:Popen|run|call|check_output|check_call)\(", text)), 1
        )
        self.assertNotIn("shell=True", text)
        self.assertNotIn("os.system", text)
        self.assertEqual(text.count(".sleep("), 1)  # in what waits for a signal, too


if __name__ == "__main__":
    unittest.main()
