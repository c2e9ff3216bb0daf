"""What a person sees and types: progress on a terminal, completion in real shells, the nearest
word for a wrong one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import unittest

from lab import OFFSYNC, USER, LabTestCase, read, type_on_terminal, write

SHELLS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}


class Completion(LabTestCase):
    def type_in(self, shell: str, *lines: str) -> str:
        """Type lines into an interactive shell with the completion; return what was shown."""
        self.lab.program("offsync", '#!/bin/sh\nexec %s %s "$@"\n' % (sys.executable, OFFSYNC))
        env = dict(self.lab.env, PS1="$ ", TERM="xterm")
        loaded = (
            ""
            if shell == "bash"
            else "autoload -Uz compinit bashcompinit; compinit -D -u; bashcompinit; "
        )
        # The prompt in two pieces: what is typed comes back, and must not look like it.
        dialogue = [(b"$ ", "%seval \"$(offsync completion bash)\"; PS1='rea''dy> '\n" % loaded)]
        for line in (*lines, "exit\n"):
            dialogue.append((b"ready> ", line))
        return type_on_terminal([shutil.which(shell), *SHELLS[shell]], env, *dialogue)[1]

    def test_commands_options_and_targets_in_real_shells(self) -> None:
        for shell in SHELLS:
            if not shutil.which(shell):
                continue  # bash is everywhere; zsh where it is installed
            with self.subTest(shell=shell):
                config = self.lab.state + "/config.yaml"
                if not self.lab.targets:
                    one = self.lab.configured_target("one")
                    more = ["far@127.0.0.1", "far@127.0.0.11", "six@[2001:db8::1]"]
                    write(
                        config,
                        read(config)
                        + "".join(
                            "  - login: '%s'\n    user: '%s'\n    host: '%s'\n    remote_path:"
                            " '/x'\n" % (login, login[:3], login[4:].strip("[]"))
                            for login in more
                        ),
                    )
                    before = read(config)
                write(config, before)
                # Logins go on beyond their @ and :, where readline begins a new word; far@ is
                # ambiguous but for its beginning.
                shown = self.type_in(
                    shell,
                    "offsync tar\tremo\tsi\t\n",
                    "offsync target remove fa\t\t1\n",
                    "offsync plan --exi\t %s\t\n" % one.login[:-1],
                    "offsync install-d\t--role target -y\n",
                )
                self.assertIn("removed six@[2001:db8::1] from", shown)
                self.assertIn("removed far@127.0.0.11 from", shown)
                self.assertNotIn("six@", read(config))
                self.assertIn('far@127.0.0.1"', read(config).replace("'", '"'), shown)
                self.assertIn("equal, nothing to do", shown)
                self.assertIn("everything for the role target is installed", shown)

    def test_every_command_option_target_and_plan_that_begins_as_typed(self) -> None:
        one = self.lab.configured_target("one")
        write(self.lab.source + "/f", "x")
        plan = self.lab.offsync("plan", check=0).out.split()[-1]

        def complete(line: str, word: str) -> list:
            """Return what is offered for the last word, of which readline has this part."""
            env = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
            words = ["completion", "bash", "offsync", word, "before"]
            return self.lab.offsync(*words, env=env, check=0).out.splitlines()

        self.assertEqual(complete("offsync ver", "ver"), ["verify"])
        self.assertEqual(complete("offsync plan --su", "--su"), ["--summary"])
        self.assertEqual(complete("offsync target remo", "remo"), ["remove"])
        self.assertIn(one.login, complete("offsync plan " + USER[:2], USER[:2]))
        self.assertEqual(complete("offsync apply --plan " + plan[:9], plan[:9]), [plan])
        self.assertEqual(complete("offsync plan %s@" % USER, "@"), ["@" + one.address])
        self.assertEqual(complete("offsync plan excep", "excep"), [])
        env = {"COMP_LINE": "offsync ver", "COMP_POINT": "x"}
        self.assertEqual(self.lab.offsync("completion bash", env=env, check=0).out, "verify\n")
        self.assert_refused(self.lab.offsync("completion fish"), 2, "fish")


class WrongWords(LabTestCase):
    def test_what_is_known_is_named(self) -> None:
        one = self.lab.configured_target("one")
        for words, wanted in (
            (["paln"], "plan"),
            (["target", "delete"], "remove"),
            (["install-deps", "--role", "targets"], "controller"),
            (["plan", one.login + "9"], "known: " + one.login),
            (["target", "remove", one.login + "1"], one.login),
            (["plan", "--jsn"], "--jsn"),
            (["target", "list", "x"], "x"),
        ):
            with self.subTest(words=words):
                self.assert_refused(self.lab.offsync(*words), 2, wanted)


class ProgressLines(LabTestCase):
    WAITS = True

    def setUp(self) -> None:
        super().setUp()
        self.one = self.lab.configured_target("one")
        for number in range(300):
            write(self.lab.source + "/d%d/file" % number, b"x" * 100)
        # As slow as with large files: the comparing rsync starts late.
        real = shutil.which("rsync")
        self.slow = self.lab.program(
            "slow-rsync",
            '#!/bin/sh\ncase "$*" in *-rlptc*) sleep 2.5;; esac\nexec %s "$@"\n' % real,
        )

    def on_terminal(self, **env: str) -> str:
        status, seen = type_on_terminal(
            [sys.executable, OFFSYNC, "apply"],
            {**self.lab.env, "TERM": "xterm", "OFFSYNC_RSYNC": self.slow, **env},
            columns=40,
        )
        self.assertEqual(status, 0, seen)
        return seen

    def screen(self, seen: str) -> list:
        """Return what a terminal of 40 columns shows at the end: cursor up, carriage return and
        clearing carried out.
        """
        lines = [""]
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|\r\n|\r|\n|[^\x1b\r\n]+", seen):
            up = re.fullmatch(r"\x1b\[(\d+)A", part)
            if up:
                self.assertLessEqual(int(up[1]), len(lines) - 1)
                del lines[len(lines) - int(up[1]) :]
                lines[-1] = ""
            elif part.endswith("\n"):
                lines.append("")
            elif part[0] not in "\x1b\r":
                lines[-1] += part
        return [line for line in lines if line]

    def test_the_progress_of_many_files_is_no_flood(self) -> None:
        """rsync prints a line of progress for each file; the limit on what is no item is smaller
        in a copy.
        """
        small = self.lab.altered(("PASS_ROOM = 1 << 26", "PASS_ROOM = 1 << 12"))
        status, seen = type_on_terminal(
            [sys.executable, small, "apply"], {**self.lab.env, "TERM": "xterm"}
        )
        self.assertEqual(status, 0, seen)
        self.assertIn("600 entries delivered", seen)

    def test_phases_with_seconds_gone_at_the_end(self) -> None:
        seen = self.on_terminal()
        for phase in ("comparing", "sending", "verifying"):
            self.assertIn("%s: %s" % (self.one.login, phase), seen)
        self.assertIn("comparing, 2 s", seen)
        seen = re.sub(r"\x1b\[\d*m", "", seen)
        for line in re.split(r"\r?\n|\x1b\[\d*[AJ]|\r", seen):
            if line.startswith(self.one.login) and " ok: " not in line:
                self.assertLess(len(line), 40)
        left = self.screen(seen)
        self.assertEqual(left[-1], "1 target: 1 ok", left)
        self.assertIn("600 entries delivered", " ".join(" ".join(left).split()))

    def test_nothing_is_left_when_several_targets_are_equal(self) -> None:
        self.lab.configured_target("two")
        self.lab.offsync("apply", check=0)
        env = {**self.lab.env, "TERM": "xterm", "OFFSYNC_RSYNC": self.slow}
        status, seen = type_on_terminal(
            [sys.executable, OFFSYNC, "verify", "--jobs", "1"], env, columns=40
        )
        self.assertEqual(
            (
                status,
                [
                    re.sub(r"\x1b\[\d*m", "", line)
                    for line in self.screen(re.sub(r"\x1b\[\d*m", "", seen))
                ],
            ),
            (0, ["ok: equal to %s: 2 targets" % self.lab.source]),
            seen,
        )
        self.assertIn("%s: comparing" % self.one.login, seen)
        self.assertIn("(all): 1 of 2 done", seen)

    def test_equal_plans_are_one_list_and_the_next_step_follows(self) -> None:
        two, three = self.lab.configured_target("two"), self.lab.configured_target("three")
        write(three.path + "/other", "x")
        out = self.lab.offsync("plan", check=0).out.splitlines()
        self.assertEqual(
            out[:3],
            [
                "source " + self.lab.source,
                "%s:%s" % (self.one.login, self.one.path),
                "%s:%s" % (two.login, two.path),
            ],
        )
        self.assertEqual(sum(line.startswith("  added") for line in out), 1200)
        self.assertIn("  2 targets, each: 600 added; 29.3 KiB to send", out)
        self.assertIn("  600 added, 1 missing; 29.3 KiB to send", out)
        short = self.lab.offsync("plan --summary", check=0).out.splitlines()
        end = next(n for n, line in enumerate(short) if line.startswith("apply will refuse"))
        self.assertEqual(short[:1] + short[end:], out[:1] + out[end - len(short) :])
        self.assertEqual(
            [line.split(";")[0].split("  ") for line in short[1:end]],
            [
                [self.one.login, "600 added"],
                [two.login, "600 added"],
                [three.login, "600 added, 1 missing"],
            ],
        )
        seen = type_on_terminal(
            [sys.executable, OFFSYNC, "plan", "127.0.0.[12]"], {**self.lab.env, "TERM": "dumb"}
        )[1].splitlines()
        plan = next(line for line in seen if line.startswith("plan "))
        self.assertEqual(seen[-1], "    offsync apply '127.0.0.[12]' --" + plan)
        seen = type_on_terminal(
            [sys.executable, OFFSYNC, "plan"], {**self.lab.env, "TERM": "dumb"}
        )[1].splitlines()
        self.assertTrue(seen[-1].startswith("plan "), seen[-1])  # apply would refuse

    def test_a_manifest_cannot_write_to_the_terminal(self) -> None:
        write(self.lab.source + "/d0/\x1b[31mred", b"x")
        write(self.lab.source + "/d0/\x9b31m\u202ered", b"x")
        status, seen = type_on_terminal(
            [sys.executable, OFFSYNC, "manifest"], {**self.lab.env, "TERM": "dumb"}
        )
        self.assertEqual(
            (
                status,
                set("\x1b\x9b\u202e") & set(seen),
                "d0/?[31mred" in seen,
                "d0/?31m?red" in seen,
            ),
            (0, set(), True, True),
        )
        self.assertIn("d0/\x1b[31mred", self.lab.offsync("manifest", check=0).out)

    def test_none_on_a_dumb_terminal_and_no_colour_where_none_is_wanted(self) -> None:
        self.assertNotIn("\x1b", self.on_terminal(TERM="dumb"))
        shutil.rmtree(self.one.path)
        os.mkdir(self.one.path)
        seen = self.on_terminal(NO_COLOR="1")
        self.assertIn("\x1b[J", seen)
        self.assertNotRegex(seen, r"\x1b\[\d*m")


class EightyColumns(LabTestCase):
    """Messages break between words; what is to be copied stands alone, and is never broken."""

    def on_terminal(self, *args: str, columns: int = 80) -> list:
        env = {**self.lab.env, "TERM": "dumb"}
        return type_on_terminal([sys.executable, OFFSYNC, *args], env, columns=columns)[
            1
        ].splitlines()

    def test_a_message_and_its_command(self) -> None:
        one = self.lab.configured_target("one")
        os.unlink(one.keys)
        for columns in (80, 50):
            lines = self.on_terminal("plan", columns=columns)
            key = read(self.lab.state + "/id_ed25519.pub").strip()
            command = "      offsync link --path %s --key '%s'" % (one.path, key)
            self.assertIn(command, lines)
            self.assertEqual(
                [
                    line
                    for line in lines
                    if len(line) > columns - 1
                    and not line.startswith(("    ", "root", "source", "plan ", USER))
                ],
                [],
            )
            self.assertFalse([line for line in lines if line.endswith(" ")])
        piped = self.lab.offsync("plan", check=1)
        self.assertEqual(len(piped.err.splitlines()), 2)
        self.assertIn("    hint: on the target, as %s, run:\n      offsync link" % USER, piped.out)

    def test_a_terminal_that_is_too_narrow(self) -> None:
        self.lab.init()
        self.assertNotIn("Traceback", "".join(self.on_terminal("plan", columns=1)))

    def test_facts_before_the_remedy(self) -> None:
        one = self.lab.configured_target("one")
        old = one.fingerprint
        one.stop()
        one.new_host_key()
        one.start()
        text = " ".join(" ".join(self.on_terminal("plan")).split())
        self.assertLess(text.index(old), text.index(one.fingerprint))
        self.assertLess(text.index(one.fingerprint), text.index("offsync target add"))

    def test_a_usage_error_names_the_help_of_its_command(self) -> None:
        self.lab.init()
        for words, helped in (
            ("apply -n", "offsync apply --help"),
            ("plan x --bad", "offsync plan"),
            ("target add", "offsync target add --help"),
            ("target", "target --help"),
            ("log --names x", "offsync log --help"),
            ("nonsense", "offsync --help"),
            ("plan --jobs x", "offsync plan --help"),
        ):
            self.assert_refused(self.lab.offsync(*words.split()), 2, helped)

    def test_where_one_stands(self) -> None:
        one = self.lab.configured_target("one")
        write(self.lab.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        self.assertIn(self.lab.records()[-1]["timestamp"] + "  ok", self.lab.offsync(check=2).out)
        one.stop()
        self.lab.offsync("apply", check=1)
        self.assertIn("Z  failed", self.lab.offsync(check=2).out)
        rows = self.on_terminal("target", "list", columns=60)
        self.assertEqual(len(rows), 2)
        self.assertLessEqual(max(map(len, rows)), 60)


class HostComplete(LabTestCase):
    """bash with and without hostcomplete, as bash-completion sets it: @ is a word break or not."""

    def test_logins_hosts_plans_and_files(self) -> None:
        bash = Completion("type_in")
        bash.lab = self.lab
        one = self.lab.configured_target("one")
        write(self.lab.source + "/f", "x")
        plan = self.lab.offsync("plan", check=0).out.split()[-1]
        write(self.lab.base + "/listed", one.login + "\n")
        for option in ("-s", "-u"):
            with self.subTest(option=option):
                seen = bash.type_in(
                    "bash",
                    "shopt %s hostcomplete; cd %s\n" % (option, self.lab.base),
                    "echo; offsync plan --summary %s\t\n" % one.login[:-3],
                    "offsync plan --summary 127.0\t\n",
                    "offsync plan --summary @lis\t\n",
                    "offsync apply --plan %s\t\n" % plan[:6],
                )
                self.assertEqual(seen.count("%s  1 added; 1 B to send" % one.login), 3, seen)
                self.assertIn("1 target: 1 ok", seen)
                os.unlink(one.path + "/f")


if __name__ == "__main__":
    unittest.main()
