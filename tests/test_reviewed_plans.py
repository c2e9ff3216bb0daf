"""One approval for many steps: a reviewed plan, and what it is not the reviewed plan."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import unittest

from lab import OFFSYNC, ThreeTargetsCase, descendants, read, read_plan, snapshot, write


class Approval(ThreeTargetsCase):
    def test_one_host_first_then_the_rest_then_again(self) -> None:
        write(self.source + "/f", "x")
        reviewed = self.review()
        self.lab.offsync("apply", self.targets[0].login, "--plan", reviewed, check=0)
        self.assertEqual(
            [os.path.exists(t.path + "/f") for t in self.targets], [True, False, False]
        )
        self.targets[2].stop()
        done = self.lab.offsync(
            "apply --plan", reviewed, check=1
        )  # one cannot be reached: it fails alone
        self.assertIn("3 targets: 2 ok, 1 failed", done.out)
        self.targets[2].start()
        self.lab.offsync("apply --plan", reviewed, check=0)
        self.assertEqual([snapshot(t.path) for t in self.targets], [snapshot(self.source)] * 3)
        plan = read_plan(open(reviewed, "rb").read())["plan"]
        self.assertEqual({record["plan"] for record in self.lab.records()[-7:]}, {plan})

    def test_what_a_review_does_not_approve(self) -> None:
        write(self.source + "/f", "x")
        write(self.source + "/g", "g")
        reviewed = self.review()
        lines = read(reviewed).splitlines(True)
        write(self.targets[0].path + "/extra", "x")
        self.refused(
            reviewed,
            "the policy is not that of the reviewed plan",
            args=["--delete", "--source", self.source],
        )
        self.refused(reviewed, "is not the reviewed plan", "extra now exists only on the target")
        os.unlink(self.targets[0].path + "/extra")
        with open(self.source + "/g", "a") as stream:
            stream.write("more")
        self.refused(reviewed, "g would be added, which was not reviewed")
        write(self.source + "/g", "g")
        os.chmod(self.source + "/g", 0o600)
        self.refused(reviewed, "g would be added, which was not reviewed")
        os.chmod(self.source + "/g", 0o644)
        for name, kept in (
            (
                "an entry less",
                [
                    line
                    for line in lines
                    if '"path": "g"' not in line or self.targets[1].login not in line
                ],
            ),
            ("no target", lines[:1]),
        ):
            with self.subTest(name=name):
                write(self.lab.base + "/edited", "".join(kept))
                self.refused(self.lab.base + "/edited")
        for name, kept in (("no policy", lines[1:]), ("two policies", [*lines[:1], *lines])):
            with self.subTest(name=name):
                write(self.lab.base + "/edited", "".join(kept))
                done = self.lab.offsync("apply --plan", self.lab.base + "/edited")
                self.assert_refused(done, 2, "not a line of a plan")
                self.assertEqual([snapshot(target.path) for target in self.targets], [{}] * 3)
        for old, new in (
            ('"delete": false', '"delete": 0'),
            ('"overwrite": true', '"overwrite": 1.0'),
            ('"version": ', '"version": 0.0e1'),
            ('"delete": false', '"delete": true, "delete": false'),
            ('{"delete"', '{ "delete"'),
            ('{"delete"', '{"comment": "all is well", "delete"'),
        ):
            with self.subTest(new=new):
                self.assertIn(old, lines[0])
                write(self.lab.base + "/edited", lines[0].replace(old, new) + "".join(lines[1:]))
                done = self.lab.offsync("apply --plan", self.lab.base + "/edited")
                self.assertIn(done.returncode, (1, 2))
                self.assertEqual([snapshot(target.path) for target in self.targets], [{}] * 3)
        write(self.lab.base + "/edited", "".join(li for li in lines if "127.0.0.3" not in li))
        done = self.lab.offsync("apply --plan", self.lab.base + "/edited", check=1)
        self.assertIn(
            "%s: this target is not covered by the reviewed plan" % self.targets[2].login, done.err
        )
        self.assertIn("3 targets: 2 ok, 1 failed", done.out)
        self.assertEqual(snapshot(self.targets[2].path), {})
        other = json.loads(lines[-1])
        for change in (
            {"path": "../up"},
            {"path": "/etc/passwd"},
            {"login": "x@y"},
            {"sha256": "00" * 32},
            {"type": "directory", "size": 0, "sha256": None},
            {"link": "x", "type": "symlink", "sha256": None},
            {"type": "directory"},
        ):
            with self.subTest(change=change):  # what it has besides must be in the source
                fields = {k: v for k, v in {**other, **change}.items() if v is not None}
                write(
                    self.lab.base + "/edited",
                    "".join(lines) + json.dumps(fields, sort_keys=True) + "\n",
                )
                done = self.lab.offsync("apply --plan", self.lab.base + "/edited")
                expected = 2 if "path" in change or len(change) == 1 and "type" in change else 1
                self.assertEqual(done.returncode, 0 if "login" in change else expected, done.err)

    def test_what_a_line_shows_is_what_it_approves(self) -> None:
        """A name that is another one in base64, a key that stands there twice, an entry with an
        error.
        """
        write(self.source + "/f", "x")
        write(self.targets[0].path + "/gone", "x")
        text = self.lab.offsync("plan --json --delete", check=0).out
        self.assertIn('"path": "gone"', text)
        for forged in (
            text.replace('"path": "gone"', '"path": "harmless", "path_b64": "Z29uZQ=="'),
            text.replace('"path": "gone"', '"path": "harmless", "path": "gone"'),
            text.replace('"kind": "missing"', '"error": "nothing approved", "kind": "missing"'),
        ):
            plan = self.lab.base + "/forged.jsonl"
            write(plan, forged)
            self.assert_refused(
                self.lab.offsync("apply --delete --plan", plan), 2, "not a line of a plan"
            )
            self.assertTrue(os.path.exists(self.targets[0].path + "/gone"))
        write(plan, text)
        self.lab.offsync("apply --delete --plan", plan, check=0)
        self.assertFalse(os.path.exists(self.targets[0].path + "/gone"))

    def test_leftovers_are_not_compared(self) -> None:
        write(self.source + "/f", "x")
        reviewed = self.review()
        write(self.targets[0].path + "/.~tmp~/f", "")
        self.lab.offsync("apply --plan", reviewed, check=0)
        write(self.targets[1].path + "/.f.aB3xY9", "")
        self.lab.offsync("apply --plan", reviewed, check=0)

    def test_a_plan_file_writes_nothing_to_the_terminal(self) -> None:
        write(self.source + "/f", "x")
        reviewed = self.review()
        text = read(reviewed)
        for source in ("/x\\u001b]0;evil\\u0007", "/a\\nb", "relative"):
            before, _, after = text.partition('"source": "')
            write(reviewed, before + '"source": "' + source + after[after.index('"') :])
            done = self.lab.offsync("apply --plan", reviewed)
            self.assertEqual(done.returncode, 2, done.err)
            self.assertNotIn("\x1b", done.err)
            self.assertNotIn("--source", done.err)

    def test_a_leftover_that_was_not_reviewed_is_not_deleted(self) -> None:
        write(self.source + "/f", "x")
        write(self.targets[0].path + "/.~tmp~/f", "listed")
        reviewed = self.review("--delete")
        write(self.targets[1].path + "/.f.aB3xY9", "somebody's")
        self.lab.offsync("apply --delete --plan", reviewed, check=0)
        self.assertEqual(read(self.targets[1].path + "/.f.aB3xY9"), "somebody's")
        self.assertFalse(os.path.exists(self.targets[0].path + "/.~tmp~"))

    def test_a_plan_from_a_pipe_and_one_that_is_too_deep(self) -> None:
        write(self.source + "/f", "x")
        reviewed = self.review()
        done = subprocess.run(
            ["bash", "-c", "%s %s apply --plan <(cat %s)" % (sys.executable, OFFSYNC, reviewed)],
            env=self.lab.env,
            stdin=subprocess.DEVNULL,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        write(self.lab.base + "/deep", "[" * 100_000 + "\n")
        self.assert_refused(
            self.lab.offsync("apply --plan", self.lab.base + "/deep"), 2, "not a line of a plan"
        )
        write(self.lab.state + "/last/" + self.targets[0].login, "[" * 100_000)
        self.lab.offsync("target list", check=0)

    def test_random_sequences_apply_nothing_that_was_not_approved(self) -> None:
        """Plans, partial applies, edits, kills, repeats under one approval, against an oracle."""
        rng = random.Random(int(os.environ.get("SEED", "1")))
        for sequence in range(int(os.environ.get("SEQUENCES", "2"))):
            with self.subTest(sequence=sequence):
                self.setUp()
                for number in range(6):
                    write(self.source + "/d%d/f%d" % (number % 2, number), str(rng.random()))
                    for target in self.targets:
                        if rng.random() < 0.5:
                            write(target.path + "/d%d/f%d" % (number % 2, number), "old")
                if rng.random() < 0.5:
                    write(rng.choice(self.targets).path + "/gone", "x")
                reviewed = self.review("--delete")
                approved = snapshot(self.source)
                before = [snapshot(target.path) for target in self.targets]
                for _ in range(4):
                    act = rng.random()
                    if act < 0.3:
                        write(self.source + "/d0/f%d" % rng.choice([0, 2, 4, 9]), str(rng.random()))
                    elif act < 0.5:  # back to what was approved
                        shutil.rmtree(self.source)
                        os.mkdir(self.source)
                        self.lab.offsync("plan", check=0)
                    process = self.lab.start(
                        "apply",
                        *rng.choice(
                            [[], [self.targets[0].login], [t.login for t in self.targets[1:]]]
                        ),
                        "--plan",
                        reviewed,
                        "--delete",
                    )
                    if rng.random() < 0.4:
                        try:
                            process.communicate(timeout=rng.uniform(0.1, 1.2))
                        except subprocess.TimeoutExpired:
                            victims = [process.pid, *descendants(process.pid)]
                            try:
                                os.kill(
                                    rng.choice(victims), rng.choice([signal.SIGKILL, signal.SIGINT])
                                )
                            except ProcessLookupError:
                                pass
                    process.communicate(timeout=120)
                    for target, old in zip(self.targets, before):
                        for path, entry in snapshot(target.path).items():
                            if b".~tmp~" not in path and not os.path.basename(path).startswith(
                                b"."
                            ):
                                self.assertIn(entry, (old.get(path), approved.get(path)), path)


if __name__ == "__main__":
    unittest.main()
