"""Hints: each failure is provoked, and the command that its hint prints is typed as printed.

The failure must be gone, and nothing else changed. What cannot be typed from here stands in
ELSEWHERE, with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

from lab import (
    OFFSYNC,
    USER,
    LabTestCase,
    ThreeTargetsCase,
    offsync,
    read,
    require,
    risk,
    snapshot,
    type_on_terminal,
    write,
)

# Commands that only look, on the target's side, with how they end where there is nothing to see.
LOOKS = {"pgrep": 1, "getent": 0, "chage": 0, "findmnt": 0, "df": 0, "cat": 0, "find": 0}
# Commands in hints of failures that are typed in no test here, and why.
ELSEWHERE = {
    "ssh-keygen -lf": "on the target's own console: it reads the host key of the system's sshd",
    "journalctl": "needs systemd's journal of the target",
    "dmesg": "needs a kernel's log that may be read",
    "ssh -v": "reads the account's own ~/.ssh/config; it only logs in",
    "offsync install-deps": "installs packages; test_install types it with stand-ins",
    "offsync target add": "asks about a host key; test_trust types it on a terminal",
}


def commands(text: str) -> list:
    """Return the commands that hints print, in their order."""
    return re.findall(r"(?m)^ *hint: .*\n +(?!hint: )(\S.*)$", text)


class Typing(LabTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.lab.program("offsync", '#!/bin/sh\nexec %s %s "$@"\n' % (sys.executable, OFFSYNC))

    def type(self, command: str, home: str = "", input: str = "") -> subprocess.CompletedProcess:
        """Type a command in a shell; home is that of the account on the target."""
        return subprocess.run(
            ["sh", "-c", command],
            env={**self.lab.env, **({"HOME": home} if home else {})},
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.lab.base,
        )

    def fix(self, failing: str, status: int, number: int = 0, home: str = "") -> str:
        """Type a command that fails, then the command of its hint; return what that printed."""
        done = self.type(failing, home=home)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        command = commands(done.stdout + done.stderr)[number]
        fixed = self.type(command, home=home)
        self.assertEqual(fixed.returncode, 0, "%s\n%s" % (command, fixed.stderr))
        return command


class OneTarget(Typing):
    def setUp(self) -> None:
        super().setUp()
        self.one = self.lab.configured_target("one")
        self.key = self.lab.state + "/id_ed25519"
        write(self.lab.source + "/f", "x")

    def test_the_key_and_what_lies_beside_it(self) -> None:
        good = read(self.key)
        shutil.copy(self.key, self.lab.base + "/other")
        for broken in (
            lambda: write(self.key, good.replace("\n", "\r\n"), 0o600),
            lambda: write(self.key, good.rstrip("\n"), 0o600),
            lambda: os.chmod(self.key, 0o644),
        ):
            broken()
            self.fix("offsync plan", 1)
            self.assertEqual(read(self.key), good)
            self.lab.offsync("plan", check=0)
        make = [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", self.lab.base + "/k"]
        subprocess.run(make, check=True)
        shutil.copy(self.lab.base + "/k.pub", self.key + ".pub")
        self.assertEqual(self.fix("offsync plan", 1), "offsync init")
        self.lab.offsync("plan", check=0)

    def test_a_passphrase(self) -> None:
        words = ["-p", "-q", "-P", "", "-N", "secret", "-f", self.key]
        subprocess.run([require("ssh-keygen"), *words], check=True, stdout=subprocess.DEVNULL)
        command = commands(self.lab.offsync("plan", check=1).out)[0]
        status, seen = type_on_terminal(
            ["/bin/sh", "-c", command], self.lab.env, (b"passphrase", "secret\n")
        )
        self.assertEqual(status, 0, seen)
        self.lab.offsync("plan", check=0)

    def test_a_state_that_others_may_write_to(self) -> None:
        for name in ("", "/config.yaml", "/known_hosts"):
            mode = os.stat(self.lab.state + name).st_mode
            os.chmod(self.lab.state + name, mode | 0o022)
            self.fix("offsync apply", 1)
            self.assertEqual(os.stat(self.lab.state + name).st_mode, mode)
            self.lab.offsync("plan", check=0)

    def test_a_refused_key(self) -> None:
        keys = read(self.one.keys)
        os.unlink(self.one.keys)
        done = self.lab.offsync("apply", check=1)
        command = commands(done.err)[0]
        typed = self.type(command + " " + " ".join(risk()), home=self.one.home)
        self.assertEqual(typed.returncode, 0, typed.stderr)
        self.assertEqual(read(self.one.keys), keys)
        self.lab.offsync("apply", check=0)

    def test_a_key_that_is_not_restricted(self) -> None:
        """The line without a command goes, as the first hint says; then the command is typed."""
        keys, public = read(self.one.keys), read(self.key + ".pub")
        write(self.one.keys, public)
        done = self.lab.offsync("apply", check=1)
        self.assertIn("remove every line of ~/.ssh/authorized_keys", done.err)
        self.assertEqual(snapshot(self.one.path), {})
        write(self.one.keys, "")
        command = commands(done.err)[0]
        typed = self.type(command + " " + " ".join(risk()), home=self.one.home, input=public)
        self.assertEqual(typed.returncode, 0, typed.stderr)
        self.assertEqual(read(self.one.keys), keys)

    def test_a_plan_of_another_policy(self) -> None:
        write(self.one.path + "/extra", "x")
        other = self.lab.base + "/a b"
        write(other + "/g", "y")
        for options in (["--delete"], ["--keep"], ["--source", other, "--delete"]):
            plan = self.lab.offsync("plan", *options, check=0).out.split()[-1]
            command = self.fix("offsync apply --plan " + plan, 1)
            self.assertEqual(command, shlex.join(["offsync", "apply", *options, "--plan", plan]))
            write(self.one.path + "/extra", "x")

    def test_the_beginning_of_an_id(self) -> None:
        plan = self.lab.offsync("plan --delete", check=0).out.split()[-1]
        done = self.lab.offsync("apply --delete --plan", plan[:12], check=2)
        self.assertIn("12 of 64 digits", done.err)
        self.assertIn("one that begins so is %s\n" % plan, done.err)
        self.lab.offsync("apply --delete --plan", plan, check=0)

    def test_a_file_where_a_target_has_a_directory(self) -> None:
        """Neither keeping nor adding is possible: no hint offers it."""
        write(self.lab.source + "/conf", "a file")
        write(self.one.path + "/conf/local", "x")
        for options in ([], ["--keep"]):
            done = self.lab.offsync("apply", *options, check=1)
            self.assertIn("conf, conf/local", done.err)
            self.assertEqual(commands(done.err), ["offsync plan --delete"])
            self.assertNotIn("add it", done.err)
        self.fix("offsync apply", 1)

    def test_a_config_that_is_not_there(self) -> None:
        """The command names the state that was meant: another tree keeps its source."""
        before = read(self.lab.state + "/config.yaml")
        done = self.type("OFFSYNC_HOME=%s/site offsync plan" % self.lab.base)
        self.assertEqual(done.returncode, 2)
        command = re.search('create it: "(.*) --source DIR"', done.stderr)[1]
        self.assertEqual(command, "OFFSYNC_HOME=%s/site offsync init" % self.lab.base)
        self.assertEqual(self.type(command + " --source " + self.lab.source).returncode, 0)
        self.assertEqual(read(self.lab.state + "/config.yaml"), before)

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_a_target_that_is_added_with_a_wrong_path(self) -> None:
        """The command has the host key and the state that were typed: no terminal is needed."""
        state = self.lab.base + "/moved"
        os.rename(self.lab.state, state)
        words = [*self.one.words, "--host-key", self.one.fingerprint]
        words[2] += "/wrong"
        command = self.fix("OFFSYNC_HOME=%s offsync target add %s" % (state, " ".join(words)), 1)
        self.assertIn("--host-key " + self.one.fingerprint, command)
        self.assertIn("remote_path: %s\n" % json.dumps(self.one.path), read(state + "/config.yaml"))

    def test_the_state_of_another_account(self) -> None:
        """Typed as that account, the command uses this state, not the account's own."""
        state = self.lab.base + "/theirs"
        os.rename(self.lab.state, state)
        os.chown(state, 65534, 65534)
        done = self.type("OFFSYNC_HOME=%s offsync apply --delete" % state)
        self.assertEqual(done.returncode, 1)
        wanted = "sudo -iu nobody env OFFSYNC_HOME=%s offsync apply --delete" % state
        self.assertEqual(commands(done.stderr), [wanted])
        os.chown(state, 0, 0)
        os.chown(state + "/config.yaml", 65534, 65534)
        self.fix("OFFSYNC_HOME=%s offsync plan" % state, 1)
        self.assertEqual(os.stat(state + "/config.yaml").st_uid, 0)

    def test_the_other_half_of_the_key_is_kept(self) -> None:
        """unlink on the targets may need the line that was linked."""
        public, other = read(self.key + ".pub"), self.lab.base + "/other"
        make = [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", other]
        subprocess.run(make, check=True)
        shutil.copy(other, self.key)
        self.assertIn("the old one is kept", self.lab.offsync("plan", check=1).out)
        self.lab.offsync("init", check=0)
        self.assertEqual(read(self.key + ".pub.old"), public)
        self.assertEqual(read(self.key + ".pub").split()[:2], read(other + ".pub").split()[:2])
        # Also where init makes a new key in place of one that is lost.
        public = read(self.key + ".pub")
        before = read(self.key + ".pub.old")
        os.unlink(self.key)
        self.lab.offsync("init", check=0)
        self.assertEqual(read(self.key + ".pub.old"), before + public)

    def test_a_target_that_is_removed(self) -> None:
        done = self.type("offsync target remove " + self.one.login)
        self.assertEqual(done.returncode, 0, done.stderr)
        (command,) = commands(done.stderr)
        self.assertEqual(self.type(command, home=self.one.home).returncode, 0)
        self.assertEqual(read(self.one.keys), "")
        self.assertNotIn("did you mean", self.type("offsync target remove 127.0.0.9").stderr)

    def test_another_state(self) -> None:
        """The command names the state that was used, also where it is not the default."""
        state = self.lab.base + "/other state"
        os.rename(self.lab.state, state)
        write(self.one.path + "/extra", "x")
        command = self.fix("OFFSYNC_HOME='%s' offsync apply" % state, 1)
        self.assertEqual(command, "OFFSYNC_HOME='%s' offsync apply --keep" % state)
        self.assertFalse(os.path.exists(self.lab.state))

    def test_many_deletions(self) -> None:
        for number in range(30):
            write(self.one.path + "/old%d" % number, "x")
        before = snapshot(self.one.path)
        self.assertEqual(self.fix("offsync apply --delete", 1), "offsync plan --delete")
        self.assertEqual(snapshot(self.one.path), before)

    def test_wrong_words(self) -> None:
        for typed, meant in (
            ("offsync plna", "did you mean plan?"),
            ("offsync target lst --json", "known: target add, target list, target remove"),
            ("offsync plan --exit-coed", "did you mean --exit-code?"),
            ("offsync add web1", "did you mean target add?"),
            ("offsync target -v lst", "known: target add, target list, target remove"),
            ("offsync plan %s9" % self.one.login, "did you mean %s?" % self.one.login),
        ):
            done = self.type(typed)
            self.assertEqual(done.returncode, 2)
            self.assertIn(meant, done.stderr)
            for command in commands(done.stderr):
                self.assertEqual(self.type(command).returncode, 0)
        # Not --source: what is only a little alike is no help.
        self.assertNotIn("did you mean", self.type("offsync plan --force").stderr)
        config = self.lab.state + "/config.yaml"
        write(config, read(config).replace("delete:", "delte:"))
        self.assertIn("did you mean delete?", self.type("offsync plan").stderr)


class SeveralTargets(ThreeTargetsCase, Typing):
    def setUp(self) -> None:
        ThreeTargetsCase.setUp(self)
        self.lab.program("offsync", '#!/bin/sh\nexec %s %s "$@"\n' % (sys.executable, OFFSYNC))
        self.yesterday = self.lab.base + "/yester day"
        write(self.yesterday + "/f", "of yesterday")
        write(self.source + "/f", "of today")

    def test_only_what_was_typed_is_done(self) -> None:
        """Another source for two of three targets; one of these has a file of its own."""
        one, two, three = self.targets
        write(one.path + "/mine", "x")
        typed = "offsync apply --source '%s' %s %s" % (self.yesterday, one.login, two.login)
        for number, mended in ((2, [None, "of yesterday"]), (0, ["of yesterday"] * 2)):
            self.fix(typed, 1, number)
            for target, text in zip((one, two), mended):
                path = target.path + "/f"
                self.assertEqual(read(path) if os.path.exists(path) else None, text)
            self.assertEqual(read(one.path + "/mine"), "x")
            self.assertEqual(snapshot(three.path), {})

    def test_what_changed_since_the_review(self) -> None:
        write(self.source + "/g", "x")
        reviewed = self.review()
        write(self.targets[0].path + "/stray", "x")
        self.fix("offsync apply --plan " + reviewed, 1, 0)
        self.assertEqual(snapshot(self.targets[1].path), {})
        self.fix("offsync apply --plan " + reviewed, 1, 1)
        self.assertEqual(snapshot(self.targets[1].path), snapshot(self.source))
        self.assertEqual(sorted(os.listdir(self.targets[0].path)), ["stray"])


class OnTheTarget(Typing):
    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.init()
        self.home = self.lab.base + "/target"
        os.mkdir(self.home)
        self.link = shlex.join(
            ["offsync", "link", "--key", self.key, *risk(), "--path", self.lab.base + "/a b"]
        )

    def test_a_risk_that_is_accepted(self) -> None:
        done = self.type(self.link + "/.dot", home=self.home)
        command = self.fix(self.link + "/.dot", 2, home=self.home)
        self.assertTrue(command.endswith(" --accept-risk path"), done.stderr)
        self.assertTrue(os.path.isdir(self.lab.base + "/a b/.dot"))

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_the_account_whose_directory_it_is(self) -> None:
        os.mkdir(self.lab.base + "/a b")
        os.chown(self.lab.base + "/a b", 65534, 65534)
        # As sudo -iu nobody, with a home that this account may have here.
        script = '#!/bin/sh\necho "$@" > %s/sudo\nshift 2\nchown root %s\nexec "$@"\n'
        path = shlex.quote(self.lab.base + "/a b")
        self.lab.program("sudo", script % (self.lab.base, path))
        self.fix(self.link, 2, home=self.home)
        self.assertTrue(read(self.lab.base + "/sudo").startswith("-iu nobody offsync link --key"))

    def test_another_path_by_mistake(self) -> None:
        self.assertEqual(self.type(self.link, home=self.home).returncode, 0)
        before = read(self.home + "/.ssh/authorized_keys")
        mistyped = self.type(self.link + "x", home=self.home)
        self.assertIn("now it writes below %s/a bx instead" % self.lab.base, mistyped.stderr)
        undo = commands(mistyped.stderr)[0]
        typed = self.type(undo + " " + " ".join(risk()), home=self.home)
        self.assertEqual(typed.returncode, 0, typed.stderr)
        without_comment = before.rsplit(" ", 1)[0] + "\n"
        self.assertEqual(read(self.home + "/.ssh/authorized_keys"), without_comment)

    def test_unlink_lists_what_is_linked(self) -> None:
        """Without a key: each with the command that removes it."""
        self.assertEqual(self.type(self.link, home=self.home).returncode, 0)
        keys = read(self.home + "/.ssh/authorized_keys")
        listed = self.type("offsync unlink < /dev/null", home=self.home)
        self.assertEqual(listed.returncode, 0, listed.stderr)
        self.assertIn(self.lab.base + "/a b", listed.stdout)
        self.assertEqual(read(self.home + "/.ssh/authorized_keys"), keys)
        command = listed.stdout.splitlines()[1].strip()
        self.assertEqual(self.type(command, home=self.home).returncode, 0)
        self.assertEqual(read(self.home + "/.ssh/authorized_keys"), "")
        listed = self.type("offsync unlink", home=self.home)
        self.assertIn("no key is linked", listed.stderr)

    def test_what_others_may_write_to(self) -> None:
        os.mkdir(self.lab.base + "/a b")
        os.chmod(self.lab.base + "/a b", 0o777)
        self.fix(self.link, 0, home=self.home)
        self.assertNotIn("writable", self.type(self.link, home=self.home).stderr)


class EveryFailure(unittest.TestCase):
    """The table of failures: each command only looks, is typed in a test, or says why it is not."""

    def test_commands(self) -> None:
        base = tempfile.mkdtemp(prefix="offsync-hints-")
        self.addCleanup(os.rmdir, base)
        target = offsync.Target("%s@127.0.0.1" % USER, base)
        typed = {"offsync link"}
        for kind in offsync.FAILURES:
            for _, command in offsync.failure(target, kind).hints:
                with self.subTest(kind=kind, command=command):
                    known = [words for words in ELSEWHERE if command.startswith(words)]
                    name = command.split(" ")[0]
                    if not command or known or command.startswith(tuple(typed)):
                        continue
                    self.assertIn(name, LOOKS)
                    if shutil.which(name):
                        done = subprocess.run(
                            ["sh", "-c", command],
                            stdout=subprocess.DEVNULL,
                            stdin=subprocess.DEVNULL,
                        )
                        self.assertIn(done.returncode, (0, LOOKS[name]))

    def test_nothing_that_does_harm(self) -> None:
        """On a healthy account, or where a disk is not mounted."""
        for row in offsync.FAILURES.values():
            for hint in row.hints:
                self.assertNotRegex(
                    " ".join(hint), "usermod|chown|install -d|mkdir|rm |chsh|chage -[EdM]"
                )


if __name__ == "__main__":
    unittest.main()
