"""What a person sees and types: progress on a terminal, completion in real shells, the nearest word for a wrong one."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import unittest

from lab import OFFSYNC, read, type_on_terminal, write
from test_job import LabCase

SHELLS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}


class Completion(LabCase):
    def type_in(self, shell: str, *lines: str) -> str:
        """Type lines into an interactive shell with the completion loaded; return what was shown."""
        self.lab.program("offsync", '#!/bin/sh\nexec %s %s "$@"\n' % (sys.executable, OFFSYNC))
        env = dict(self.lab.env, PS1="$ ", TERM="xterm")
        loaded = "" if shell == "bash" else "autoload -Uz compinit; compinit -D -u; "
        # The prompt in two pieces: what is typed comes back, and must not look like it.
        dialogue = [(b"$ ", "%seval \"$(offsync completion %s)\"; PS1='rea''dy> '\n" % (loaded, shell))]
        for line in (*lines, "exit\n"):
            dialogue.append((b"ready> ", line))
        return type_on_terminal([shutil.which(shell), *SHELLS[shell]], env, *dialogue)[1]

    def test_commands_options_and_targets_in_real_shells(self) -> None:
        for shell in SHELLS:
            if not shutil.which(shell):
                continue                    # bash is everywhere; zsh where it is installed
            with self.subTest(shell=shell):
                config = self.lab.state + "/config.yaml"
                if not self.lab.targets:
                    one = self.lab.joined_by_hand("one")
                    more = ["far@127.0.0.1", "far@127.0.0.11", "six@[2001:db8::1]"]
                    write(config, read(config) + "".join(
                        "  - login: '%s'\n    user: '%s'\n    host: '%s'\n    remote_path: '/x'\n" % (login, login[:3], login[4:].strip("[]"))
                        for login in more))
                    before = read(config)
                write(config, before)
                # Logins go on beyond their @ and :, where readline begins a new word; far@ is ambiguous but for its beginning.
                shown = self.type_in(shell, "offsync tar\tremo\tsi\t\n", "offsync target remove fa\t\t1\n", "offsync plan --ex\t %s\t\n" % one.login[:-1],
                                     "offsync install-deps --role targ\t -y\n")
                self.assertIn("removed six@[2001:db8::1] here", shown)
                self.assertIn("removed far@127.0.0.11 here", shown)
                self.assertNotIn("six@", read(config))
                self.assertIn("far@127.0.0.1\"", read(config).replace("'", '"'), shown)
                self.assertIn("equal, nothing to do", shown)
                self.assertIn("everything for the role target is here", shown)

    @unittest.skipUnless(shutil.which("zsh"), "zsh is not installed")
    def test_the_first_tab_in_zsh_when_installed_below_fpath(self) -> None:
        write(self.lab.base + "/functions/_offsync", self.lab.offsync("completion", "zsh", check=0).out)
        self.lab.program("offsync", '#!/bin/sh\nexec %s %s "$@"\n' % (sys.executable, OFFSYNC))
        env = dict(self.lab.env, PS1="$ ", TERM="xterm", FPATH=self.lab.base + "/functions:" + subprocess.run(
            ["zsh", "-fc", "print -n $FPATH"], stdout=subprocess.PIPE, text=True, check=True).stdout)
        shown = type_on_terminal([shutil.which("zsh"), "-f", "-i"], env, (b"$ ", "autoload -Uz compinit; compinit -D -u; PS1='rea''dy> '\n"),
                                 (b"ready> ", "offsync install-d\t--role target -y\n"), (b"ready> ", "exit\n"))[1]
        self.assertIn("everything for the role target is here", shown)

    def words(self, *words: str) -> list:
        return self.lab.offsync("completion", "bash", "--line", " ".join(("offsync", *words)), check=0).out.splitlines()

    def test_candidates(self) -> None:
        for words, expected in ((["pl"], ["plan"]), (["target", ""], ["add", "list", "remove"]), (["plan", "--j"], ["--jobs", "--json"]),
                                (["install-deps", "--role", "t"], ["target"]), (["-v", "ver"], ["verify"]), (["manifest", "--check", ""], []),
                                (["zzz"], []), (["target", "add", "--host"], ["--host-key"])):
            self.assertEqual(self.words(*words), expected, words)
        self.assertIn("manifest", self.words(""))
        self.assertEqual(self.words("completion", ""), ["bash", "zsh"])
        self.assertNotIn("--line", self.words("completion", "--"))
        one = self.lab.joined_by_hand("one")
        self.assertEqual(self.words("plan", ""), [one.address, one.login])
        self.assertEqual(self.words("target", "remove", ""), [one.login])
        self.assertEqual(self.words("doctor", one.login[:6]), [one.login])
        plan_id = self.lab.offsync("plan", check=0).out.split()[-1]
        self.assertEqual(self.words("apply", "--plan", ""), [plan_id])

    def test_without_a_config_it_says_so_and_completes_nothing(self) -> None:
        self.assert_refused(self.lab.offsync("completion", "zsh", "--line", "offsync plan "), 2, "offsync init")
        self.assert_refused(self.lab.offsync("completion", "fish"), 2, "SHELL fish: unknown")


class Suggestions(LabCase):
    def test_the_nearest_command_choice_and_target(self) -> None:
        one = self.lab.joined_by_hand("one")
        for words, wanted in ((["paln"], '"plan"'), (["target", "delete"], "known are: add, list, remove"), (["target", "ad"], '"add"'),
                              (["install-deps", "--role", "targets"], '"target"'), (["plan", one.login[:-2] + "9"], '"%s"' % one.login),
                              (["apply", one.address[:-1] + "8"], '"%s"' % one.address),
                              (["target", "remove", one.login + "1"], '"%s"' % one.login), (["plan", "--jsn"], '"--json"?; see: offsync plan'),
                              (["target", "list", "x"], "x: unknown; see: offsync target list --help")):
            with self.subTest(words=words):
                self.assert_refused(self.lab.offsync(*words), 2, wanted)
        self.assertNotIn("did you mean", self.lab.offsync("zzzzzz", check=2).err)


class ProgressLines(LabCase):
    def setUp(self) -> None:
        super().setUp()
        self.one = self.lab.joined_by_hand("one")
        for number in range(300):
            write(self.lab.source + "/d%d/file" % number, b"x" * 100)
        # As slow as with large files: the comparing rsync starts late.
        real = shutil.which("rsync")
        self.slow = self.lab.program("slow-rsync", '#!/bin/sh\ncase "$*" in *-rlptc*) sleep 2.5;; esac\nexec %s "$@"\n' % real)

    def on_terminal(self, **env: str) -> str:
        status, seen = type_on_terminal([sys.executable, OFFSYNC, "apply"], {**self.lab.env, "TERM": "xterm", "OFFSYNC_RSYNC": self.slow, **env}, columns=40)
        self.assertEqual(status, 0, seen)
        return seen

    def screen(self, seen: str) -> list:
        """Return what a terminal of 40 columns shows at the end: cursor up, carriage return and clearing carried out."""
        lines = [""]
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|\r\n|\r|\n|[^\x1b\r\n]+", seen):
            up = re.fullmatch(r"\x1b\[(\d+)A", part)
            if up:
                self.assertLessEqual(int(up[1]), len(lines) - 1)
                del lines[len(lines) - int(up[1]):]
                lines[-1] = ""
            elif part.endswith("\n"):
                lines.append("")
            elif part[0] not in "\x1b\r":
                lines[-1] += part
        return [line for line in lines if line]

    def test_phases_with_seconds_gone_at_the_end(self) -> None:
        seen = self.on_terminal()
        for phase in ("comparing", "sending", "verifying"):
            self.assertIn("%s: %s" % (self.one.login, phase), seen)
        self.assertIn("comparing (2 s)", seen)
        seen = re.sub(r"\x1b\[\d*m", "", seen)
        for line in re.split(r"\r?\n|\x1b\[\d*[AJ]|\r", seen):
            if line.startswith(self.one.login) and " ok: " not in line:
                self.assertLess(len(line), 40)
        left = self.screen(seen)
        self.assertEqual(len(left), 1, left)
        self.assertIn("600 entries delivered", left[0])

    def test_nothing_is_left_when_several_targets_are_equal(self) -> None:
        self.lab.joined_by_hand("two")
        self.lab.offsync("apply", check=0)
        env = {**self.lab.env, "TERM": "xterm", "OFFSYNC_RSYNC": self.slow}
        status, seen = type_on_terminal([sys.executable, OFFSYNC, "verify", "--jobs", "1"], env, columns=40)
        self.assertEqual((status, self.screen(seen)), (0, []), seen)
        self.assertIn("%s: comparing" % self.one.login, seen)
        self.assertIn("(all): 1 of 2 done", seen)

    def test_a_plan_ends_with_a_line_for_each_target_and_the_next_step(self) -> None:
        two = self.lab.joined_by_hand("two")
        out = self.lab.offsync("plan", check=0).out.splitlines()
        self.assertEqual([line.split(";")[0] for line in out[-3:-1]], ["%s: 600 added" % self.one.login, "%s: 600 added" % two.login])
        self.assertTrue(out[-1].startswith("plan "), out[-1])
        seen = type_on_terminal([sys.executable, OFFSYNC, "plan"], {**self.lab.env, "TERM": "dumb"})[1].splitlines()
        self.assertEqual(seen[-2:], [out[-1], "Next: offsync apply --plan " + out[-1].split()[1][:12]])
        write(self.one.path + "/extra", "a user's")     # delete is false: apply would refuse
        seen = type_on_terminal([sys.executable, OFFSYNC, "plan"], {**self.lab.env, "TERM": "dumb"})[1].splitlines()
        self.assertTrue(seen[-1].startswith("plan "), seen[-1])

    def test_a_manifest_cannot_write_to_the_terminal(self) -> None:
        write(self.lab.source + "/d0/\x1b[31mred", b"x")
        write(self.lab.source + "/d0/\x9b31m\u202ered", b"x")
        status, seen = type_on_terminal([sys.executable, OFFSYNC, "manifest"], {**self.lab.env, "TERM": "dumb"})
        self.assertEqual((status, set("\x1b\x9b\u202e") & set(seen), "d0/?[31mred" in seen, "d0/?31m?red" in seen), (0, set(), True, True))
        self.assertIn("d0/\x1b[31mred", self.lab.offsync("manifest", check=0).out)

    def test_none_on_a_dumb_terminal_and_no_colour_where_none_is_wanted(self) -> None:
        self.assertNotIn("\x1b", self.on_terminal(TERM="dumb"))
        shutil.rmtree(self.one.path)
        os.mkdir(self.one.path)
        seen = self.on_terminal(NO_COLOR="1")
        self.assertIn("\x1b[J", seen)
        self.assertNotRegex(seen, r"\x1b\[\d*m")


if __name__ == "__main__":
    unittest.main()
