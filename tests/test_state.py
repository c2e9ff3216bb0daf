"""The state directory, and a user beside you: what could modify it is refused."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from lab import (
    OFFSYNC,
    USER,
    LabTestCase,
    WrappedRsyncCase,
    can_mount,
    offsync,
    read,
    require,
    snapshot,
    wait_for,
    write,
)


class UserBeside(LabTestCase):
    def test_a_state_directory_that_others_may_write_to(self) -> None:
        self.lab.configured_target("one")
        for mode in (0o777, 0o702):
            os.chmod(self.lab.state, mode)
            for command in (
                ["plan"],
                ["apply"],
                ["verify"],
                ["target", "list"],
                ["init"],
                ["target", "remove", "x"],
                [],
            ):
                with self.subTest(command=command):
                    self.assert_refused(
                        self.lab.offsync(*command),
                        1,
                        "state directory",
                        "could modify it",
                        "chmod go-w",
                    )
        os.chmod(self.lab.state, 0o700)
        os.chmod(self.lab.home, 0o777)  # a parent
        self.assert_refused(self.lab.offsync("plan"), 1, "everybody may write to " + self.lab.home)
        os.chmod(self.lab.home, 0o755)
        self.lab.offsync("plan", check=0)

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_one_that_belongs_to_another(self) -> None:
        self.lab.init()
        os.chown(self.lab.state, 65534, 65534)
        self.assert_refused(self.lab.offsync("plan"), 1, "belongs to nobody")
        self.assertNotIn("chown", self.lab.offsync("plan", check=1).err)

    @unittest.skipIf(os.geteuid() == 0, "root may enter it")
    def test_one_that_its_owner_may_not_enter(self) -> None:
        self.lab.init()
        os.chmod(self.lab.state, 0o600)
        self.addCleanup(os.chmod, self.lab.state, 0o700)
        self.assert_refused(self.lab.offsync("plan"), 1, "chmod u+rwX " + self.lab.state)

    def test_a_file_in_it_that_others_may_write_to(self) -> None:
        """Another user could name a source, a host key, or a plan of their own."""
        self.lab.configured_target("one")
        write(self.lab.source + "/f", "x")
        plan_id = self.lab.offsync("plan", check=0).out.split()[-1]
        self.lab.offsync("apply", check=0)
        names = "config.yaml known_hosts id_ed25519 operations.log lock plans last".split()
        for name in names:
            path = self.lab.state + "/" + name
            mode = stat.S_IMODE(os.stat(path).st_mode)
            for wrong in (mode | 0o020, mode | 0o002):
                os.chmod(path, wrong)
                done = self.lab.offsync("plan")
                self.assert_refused(done, 1, "could modify it", "chmod go-w " + path)
            os.chmod(path, mode)
        self.lab.offsync("apply --plan", plan_id, check=0)

    def test_a_log_elsewhere_is_written_where_only_we_can_change_it(self) -> None:
        self.lab.configured_target("one")
        write(self.lab.source + "/f", "x")
        elsewhere = self.lab.base + "/logs/offsync.log"
        os.mkdir(os.path.dirname(elsewhere))
        os.symlink(elsewhere, self.lab.state + "/operations.log")
        self.lab.offsync("apply", check=0)
        self.assertEqual(len(self.lab.records()), 1)
        self.assertTrue(os.path.islink(self.lab.state + "/operations.log"))
        self.assertIn(" ok ", self.lab.offsync("log", check=0).out)
        os.chmod(os.path.dirname(elsewhere), 0o777)
        self.assert_refused(self.lab.offsync("plan"), 1, "everybody may write", "logs")

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_a_symlink_on_the_way_that_another_user_can_turn(self) -> None:
        """What it leads to is ours; who owns its directory can lead it to another place."""
        self.lab.configured_target("one")
        log = self.lab.state + "/operations.log"
        write(self.lab.base + "/logs/log", "")
        os.mkdir(self.lab.base + "/eve")
        os.symlink(self.lab.base + "/logs/log", self.lab.base + "/eve/l")
        os.symlink(self.lab.base + "/eve/l", log)
        self.lab.offsync("plan", check=0)
        os.chown(self.lab.base + "/eve", 65534, 65534)
        self.assert_refused(self.lab.offsync("plan"), 1, "eve belongs to nobody")
        os.unlink(log)
        os.symlink("/dev/null", log)
        done = self.lab.offsync("plan")
        self.assert_refused(done, 1, "may write to /dev/null")
        self.assertNotIn("chmod", done.err)
        os.unlink(log)
        os.symlink(log, log)
        self.assert_refused(self.lab.offsync("plan"), 1, "is a symlink to itself")

    def test_many_symlinks_within_each_other(self) -> None:
        """Each place is judged once: else the time would double with each of them."""
        self.lab.init()
        path = self.lab.base
        for _ in range(30):
            os.mkdir(path + "/d")
            os.symlink("d", path + "/s")
            path += "/s"
        os.rename(self.lab.state, os.path.realpath(path) + "/state")
        done = self.lab.offsync("plan", env={"OFFSYNC_HOME": path + "/state"})
        self.assert_refused(done, 2, "there are none yet")

    def test_nothing_beside_it_or_in_the_current_directory_is_imported(self) -> None:
        trap = self.lab.base + "/trap"
        for name in ("json", "argparse", "hashlib", "signal", "grp"):
            write(
                "%s/%s.py" % (trap, name),
                "open(%r, 'w').close()\nraise SystemExit(9)\n" % (self.lab.base + "/sprung"),
            )
        shutil.copy(OFFSYNC, trap + "/offsync.py")
        for argv, stdin in (
            ([sys.executable, trap + "/offsync.py", "--version"], None),
            ([sys.executable, "-", "--version"], OFFSYNC),
            ([trap + "/offsync.py", "--version"], None),
        ):
            done = subprocess.run(
                argv,
                cwd=trap,
                stdin=open(stdin) if stdin else None,
                stdout=subprocess.PIPE,
                text=True,
                env=self.lab.env,
            )
            self.assertEqual((done.returncode, done.stdout.split()[0]), (0, "offsync"))
        self.assertFalse(os.path.exists(self.lab.base + "/sprung"))
        subprocess.run([sys.executable, "-c", "import json"], cwd=trap, env=self.lab.env)
        self.assertTrue(os.path.exists(self.lab.base + "/sprung"))  # the trap is one

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_a_temporary_directory_of_somebody_else(self) -> None:
        """They could put another one, with another connection in it, in the place of ours."""
        self.lab.configured_target("one")
        os.mkdir(self.lab.base + "/theirs")
        os.chown(self.lab.base + "/theirs", 65534, 65534)
        os.chmod(self.lab.base + "/theirs", 0o777)
        err = self.lab.offsync("-v plan", env={"TMPDIR": self.lab.base + "/theirs"}, check=0).err
        self.assertNotIn("ControlPath=%s/theirs" % self.lab.base, err)
        self.assertEqual(os.listdir(self.lab.base + "/theirs"), [])

    def test_the_private_key_is_never_delivered_by_its_real_path_either(self) -> None:
        self.lab.configured_target("one")
        os.rename(self.lab.state + "/id_ed25519", self.lab.source + "/key")
        os.symlink(self.lab.source + "/key", self.lab.state + "/id_ed25519")
        self.assert_refused(self.lab.offsync("plan"), 1, "contains the private key")

    def test_a_log_that_cannot_be_written_stops_only_what_it_belongs_to(self) -> None:
        one, two = self.lab.configured_target("one"), self.lab.configured_target("two")
        write(self.lab.source + "/f", "x")
        write(
            self.lab.state + "/last/" + one.login + "/in-the-way", ""
        )  # no status can be written for this one
        done = self.lab.offsync("apply", check=1)
        self.assertIn("offsync: error: %s: " % one.login, done.err)
        self.assertIn("2 targets: 1 ok, 1 failed: " + one.login, done.out)
        self.assertEqual(snapshot(two.path), snapshot(self.lab.source))
        shutil.rmtree(self.lab.state + "/last")
        write(self.lab.state + "/last", "a file")  # nor for any of them
        write(self.lab.source + "/g", "x")
        done = self.lab.offsync("apply", check=1)
        self.assertIn("2 targets: 2 failed", done.out)
        self.assertEqual(len(self.lab.records()), 2 + 1 + 1)


class Records(WrappedRsyncCase):
    """Every apply that knew its targets leaves a record, whatever ended it; --json prints it."""

    def last(self) -> dict:
        return self.lab.records()[-1]

    def test_a_signal_before_the_lock_is_taken(self) -> None:
        """The outcome of a target is that of the run that has the lock."""
        with mock.patch.dict(os.environ, {"OFFSYNC_HOME": self.lab.state}):
            state = offsync.StateDirectory()
        config = state.load()
        for locked in (False, True):
            with (
                self.assertRaises(offsync.Interrupted),
                offsync.RunLog(state, config, config.targets) as log,
            ):
                log.locked = locked
                raise offsync.Interrupted(signal.SIGINT)
            self.assertEqual(self.last()["result"], "interrupted")
            path = state.last + "/" + self.target.login
            self.assertEqual(os.path.exists(path), locked)

    def test_an_outcome_that_cannot_be_stored(self) -> None:
        """It has failed, since a later run would not know of it; each thing is said once."""
        status = self.lab.state + "/last/" + self.target.login
        if os.path.exists(status):
            os.unlink(status)
        os.makedirs(status)
        write(self.source + "/f", "x")
        done = self.lab.offsync("apply", check=1)
        self.assertIn("it is no regular file; nothing was delivered", done.err)
        self.assertEqual(snapshot(self.there), {})
        os.rmdir(status)
        self.lab.offsync("apply", check=0)
        os.unlink(status)
        os.mkdir(status)
        self.addCleanup(os.rmdir, status)
        done = self.lab.offsync("apply", check=1)
        self.assertIn("verified and logged, but this outcome cannot be stored; ", done.err)
        self.assertEqual(self.last()["result"], "ok")

    def test_a_plan_file_that_is_none_and_a_plan_of_an_older_version(self) -> None:
        write(self.source + "/f", "x")
        plan = self.lab.base + "/plan"
        write(plan, "")
        done = self.lab.offsync("apply --plan", plan)
        self.assert_refused(done, 2, "plan:1: not a line of a plan")
        policy = '"delete": false, "exclude": [], "overwrite": true, "source": "/s"'
        for text, said in (
            ("nonsense\n", "not a line of a plan"),
            (
                "{%s, %s}\n" % (policy, '"verify": "hash"'),
                "not a line of a plan exactly as this version",
            ),
            ('{"kind": "set", "path": "the config", %s}\n' % policy, "not a line of a plan"),
            ('{"source": "/s", "targets": [], "version": 1}\n', "or have a new plan reviewed"),
            (
                '{"kind": "leftover", "login": [], "path": ".~tmp~", "type": "directory"}\n',
                "not a line of a plan",
            ),
            (
                '{"changes": [], "kind": "added", "login": "u@h", "mode": "0644", "path": "f",'
                ' "sha256": "%s", "size": [], "type": "file"}\n' % ("0" * 64),
                "not a line of a plan",
            ),
        ):
            with self.subTest(text=text):
                write(plan, text)
                done = self.lab.offsync("apply --json --plan", plan)
                self.assert_refused(done, 2, said)
                self.assertEqual(json.loads(done.out), self.last())
                self.assertEqual(
                    (self.last()["result"], self.last()["files_changed"]), ("refused", [])
                )
                self.assertIn("not a line of a plan", self.last()["error"])

    def test_refused_by_the_policy(self) -> None:
        write(self.there + "/mine", "x")
        write(self.source + "/f", "x")
        done = self.lab.offsync("apply --json")
        self.assert_refused(done, 1, "deleting is not allowed")
        self.assertEqual(json.loads(done.out), self.last())

    def test_the_lock_is_taken(self) -> None:
        write(self.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        status = self.lab.state + "/last/" + self.target.login
        before = read(status)
        with open(self.lab.state + "/lock", "r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            done = self.lab.offsync("apply --json")
        self.assert_refused(done, 1, "is running and holds the lock")
        self.assertEqual(self.last()["result"], "refused")
        self.assertIn("holds the lock", self.last()["error"])
        self.assertEqual(json.loads(done.out), self.last())
        self.assertEqual(read(status), before)  # it is the other run's

    def test_interrupted_while_it_plans(self) -> None:
        write(self.source + "/f", "x")
        begun = self.lab.base + "/begun"
        self.wrap_target_rrsync("touch %s; cat > /dev/null" % begun)
        process = self.lab.start("apply --json")
        wait_for(lambda: os.path.exists(begun), "the pass")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 130, err)
        self.assertEqual(json.loads(out), self.last())
        self.assertEqual((self.last()["result"], self.last()["files_changed"]), ("interrupted", []))

    @unittest.skipUnless(can_mount(), "a full disk needs root")
    def test_the_log_is_full_and_the_run_is_refused(self) -> None:
        """Both are said."""
        write(self.there + "/mine", "x")
        write(self.source + "/f", "x")
        log = self.lab.state + "/operations.log"
        write(log, "", 0o600)
        full = self.lab.base + "/full"
        os.mkdir(full)
        mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", full]
        subprocess.run(mount, check=True)
        self.addCleanup(subprocess.run, ["umount", full], check=True)
        write(full + "/log", "x" * 4095 + "\n", 0o600)
        subprocess.run(["mount", "--bind", full + "/log", log], check=True)
        self.addCleanup(subprocess.run, ["umount", log], check=True)
        done = self.lab.offsync("apply", check=1)
        self.assertIn("deleting is not allowed", done.err)
        self.assertIn("the record could not be written", done.err)


class OwnKey(WrappedRsyncCase):
    """A private key that ssh cannot use is found here; no target is blamed."""

    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.state + "/id_ed25519"
        good = read(self.key)
        self.addCleanup(write, self.key, good, 0o600)
        self.good = good

    def assert_mended(self, *words: str) -> None:
        """plan, doctor and init name the key; what they say mends it when typed."""
        said = [self.lab.offsync("plan", check=1).out, self.lab.offsync("doctor", check=1).out]
        said.append(self.lab.offsync("init", check=1).err)
        for text in said:
            for word in ("key %s: " % self.key, *words):
                self.assertIn(word, text)
            self.assertNotRegex(text, "refused this controller's key|make a new")
        remedy = re.search(r"\n    (\S.*)\n", said[2])[1]
        subprocess.run(
            ["sh", "-c", remedy],
            check=True,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            env={**self.lab.env, "SSH_ASKPASS": "/bin/false"},
        )
        self.lab.offsync("plan", check=0)

    def test_line_ends_of_a_ci_variable(self) -> None:
        for text in (
            self.good.replace("\n", "\r\n"),
            self.good.rstrip("\n"),
            self.good.rstrip("\n").replace("\n", "\r\n"),
        ):
            with self.subTest(end=text[-4:]):
                write(self.key, text.encode(), 0o600)
                self.assert_mended("CRLF line endings")

    def test_the_public_half_of_another_key(self) -> None:
        """ssh offers what lies beside the private key."""
        public = self.key + ".pub"
        other = self.lab.base + "/other"
        make = [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", other]
        subprocess.run(make, check=True)
        shutil.copy(other + ".pub", public)
        self.assertIn("belongs to a different key", self.lab.offsync("plan", check=1).out)
        self.lab.offsync("init", check=0)
        self.lab.offsync("plan", check=0)

    def test_a_passphrase(self) -> None:
        subprocess.run(
            [require("ssh-keygen"), "-q", "-p", "-P", "", "-N", "secret", "-f", self.key],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for command in ("plan", "doctor", "init"):
            done = self.lab.offsync(command, check=1)
            self.assertIn("has a passphrase", done.out + done.err)
            self.assertIn("ssh-keygen -p -N '' -f", done.out + done.err)
        subprocess.run(
            [require("ssh-keygen"), "-q", "-p", "-P", "secret", "-N", "", "-f", self.key],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.lab.offsync("plan", check=0)

    def test_a_host_whose_policy_refuses_ed25519(self) -> None:
        """As FIPS does: a stand-in for ssh-keygen; the ECDSA key works all the way."""
        real = require("ssh-keygen")
        self.lab.program(
            "ssh-keygen",
            '#!/bin/sh\ncase "$*" in *"-t ed25519"*) echo "ED25519 keys'
            ' are not allowed in FIPS mode" >&2; exit 255;; esac\nexec %s "$@"\n' % real,
        )
        self.addCleanup(os.unlink, self.lab.bin + "/ssh-keygen")
        public = read(self.key + ".pub")
        self.addCleanup(write, self.key + ".pub", public)
        os.unlink(self.key)
        key = self.lab.init()
        self.assertTrue(key.startswith("ecdsa-sha2-nistp256 "), key)
        line = read(self.target.keys)
        self.addCleanup(write, self.target.keys, line)
        self.lab.offsync(
            "unlink --key", line.split("restrict ")[1].strip(), home=self.target.home, check=0
        )
        self.lab.link(self.target)
        write(self.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))


class PowerCut(unittest.TestCase):
    """What a kernel has only in memory is lost with the power: order and names count, too."""

    def setUp(self) -> None:
        self.base = tempfile.mkdtemp(prefix="offsync-power-")
        self.addCleanup(shutil.rmtree, self.base)
        self.done: list = []
        for name, what in (
            ("fsync", lambda number: os.readlink("/proc/self/fd/%d" % number)),
            ("rename", lambda old, new: "rename " + new),
        ):
            real = getattr(os, name)

            def noted(*args, real=real, what=what):
                self.done.append(what(*args))
                return real(*args)

            patched = mock.patch.object(os, name, noted)
            patched.start()
            self.addCleanup(patched.stop)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "the names of open files are not told")
    def test_a_rename_and_a_log_record(self) -> None:
        path = self.base + "/file"
        offsync.write_atomically(path, [b"text"], 0o600)
        content, rename, directory = self.done
        self.assertTrue(content.startswith(self.base + "/.offsync-"))
        self.assertEqual([rename, directory], ["rename " + path, self.base])
        self.done.clear()
        home = mock.Mock(log=self.base + "/operations.log")
        record = offsync.Record("2026-01-01T00:00:00Z", "me", "web1", "deploy@web1", "/srv")
        offsync.append_log(home, record)
        self.assertEqual(self.done, [self.base, home.log])
        offsync.append_log(home, record)
        self.assertEqual(self.done[2:], [home.log])


class Surroundings(WrappedRsyncCase):
    def test_programs_that_cannot_start(self) -> None:
        """A library is missing, or is of another version: it is this host's, and is said as that.

        It must not look like another host key, a bad key, or a target's failure.
        """
        write(self.source + "/f", "x")
        missing = (
            '#!/bin/sh\necho "$0: error while loading shared libraries: libcrypto.so.3: cannot open'
            ' shared object file: No such file or directory" >&2\nexit 127\n'
        )
        mismatch = (
            '#!/bin/sh\necho "OpenSSL version mismatch. Built against 30000080, you have 30500000"'
            " >&2\nexit 255\n"
        )
        musl = (
            '#!/bin/sh\necho "Error loading shared library libz.so.1: No such file or directory'
            ' (needed by $0)" >&2\nexit 127\n'
        )
        for name, text in (
            ("ssh", missing),
            ("ssh", mismatch),
            ("ssh-keygen", missing),
            ("ssh-keygen", mismatch),
            ("rsync", missing),
            ("rsync", musl),
        ):
            with self.subTest(name=name, text=text):
                path = self.lab.bin + "/" + name
                before = read(path) if os.path.exists(path) else None
                self.lab.program(name, text)
                try:
                    doctor = self.lab.offsync("doctor", check=1)
                    self.assertIn("%s: this program cannot start on this host" % path, doctor.out)
                    self.assertNotIn("host key", doctor.out + doctor.err)
                    command = ["plan"]
                    if name == "ssh-keygen":
                        command = ["link", "--key-file", self.lab.state + "/id_ed25519.pub"]
                    done = self.lab.offsync(*command)
                    self.assertEqual(done.returncode, 1, done.err)
                    self.assertIn("cannot start on this host", done.err + done.out)
                finally:
                    os.unlink(path)
                    if before is not None:
                        self.lab.program(name, before)
        self.assertEqual(snapshot(self.there), {})
        self.lab.offsync("apply", check=0)

    def test_what_a_target_says_is_no_failure_of_this_host(self) -> None:
        write(self.source + "/f", "x")
        words = "rsync: error while loading shared libraries: libpopt.so.0: cannot open it"
        self.wrap_target_rrsync("echo '%s' >&2; exit 127" % words)
        out = self.lab.offsync("plan", check=1).out
        self.assertIn("rrsync or rsync on the target cannot start", out)
        self.assertNotIn("this host", out)

    def test_a_connection_that_falls_silent_while_verifying(self) -> None:
        """The target has answered before, so neither its login nor its start files are at fault."""
        write(self.source + "/f", "x")
        quick = self.lab.altered(("SESSION_DEADLINE = 45.0", "SESSION_DEADLINE = 3.0"))
        self.wrap_target_rrsync("[ -e f ] && exec cat > /dev/null; real")
        done = self.lab.offsync("apply", check=1, program=quick)
        self.assertIn("the connection was lost", done.err)
        self.assertNotIn(".bashrc", done.err)

    def test_an_ignored_sigchld(self) -> None:
        write(self.source + "/f", "x")
        code = (
            "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
            "os.execv(sys.executable, [sys.executable, %r, 'apply'])" % OFFSYNC
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.lab.env,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(snapshot(self.there), snapshot(self.source))
        self.assertEqual(os.listdir(self.lab.tmp), [])

    def test_a_working_directory_that_is_gone(self) -> None:
        write(self.source + "/f", "x")
        gone = self.lab.base + "/gone"
        for command in ("plan", "apply", "doctor", "target list", "log", "--version"):
            os.mkdir(gone)
            done = subprocess.run(
                [
                    "sh",
                    "-c",
                    'cd %s; rmdir %s; exec "$@"' % (gone, gone),
                    "sh",
                    sys.executable,
                    OFFSYNC,
                    *command.split(),
                ],
                env=self.lab.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.assertEqual(done.returncode, 0, command + done.stderr)
            self.assertNotIn("Traceback", done.stderr)

    def test_a_small_host(self) -> None:
        write(self.source + "/f", "x")
        for command in ("apply", "doctor"):
            done = subprocess.run(
                ["sh", "-c", 'ulimit -v 600000; exec "$@"', "sh", sys.executable, OFFSYNC, command],
                env=self.lab.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.assertEqual(done.returncode, 0, done.stderr)

    def test_help_on_a_full_disk(self) -> None:
        for words in ("--help", "plan --help", "--contract"):
            with open("/dev/full", "wb") as full:
                done = subprocess.run(
                    [sys.executable, OFFSYNC, *words.split()],
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=self.lab.env,
                )
            self.assertEqual(done.returncode, 1)
            self.assertRegex(
                done.stderr,
                r"\Aoffsync: error: writing to standard output failed: No space left .*\n\Z",
            )

    @unittest.skipUnless(
        os.geteuid() == 0 and os.path.exists("/usr/bin/python3"),
        "only root can become another user, who needs the system's Python",
    )
    def test_a_user_id_without_an_account(self) -> None:
        """Its ssh says so, which is no failure of a target."""
        base = self.lab.base + "/nobody"
        shutil.copytree(self.lab.state, base + "/.offsync")
        subprocess.run(["chown", "-R", "4711:4711", base], check=True)
        tmp = self.lab.base + "/tmp4711"
        os.mkdir(tmp)
        os.chown(tmp, 4711, 4711)
        shutil.copy(OFFSYNC, self.lab.base + "/offsync.py")
        done = subprocess.run(
            ["/usr/bin/python3", self.lab.base + "/offsync.py", "plan"],
            user=4711,
            group=4711,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**self.lab.env, "HOME": base, "TMPDIR": tmp},
        )
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("ssh on this controller cannot start", done.stdout + done.stderr)
        self.assertNotIn("sshd's log", done.stdout + done.stderr)

    def test_homes_of_others(self) -> None:
        """The remedy names the account that runs, not the one whose home it is."""
        if os.geteuid() == 0:
            theirs = self.lab.base + "/theirs"
            os.mkdir(theirs)
            os.chown(theirs, 65534, 65534)
            done = self.lab.offsync("plan", home=theirs)
            self.assert_refused(done, 1, "belongs to nobody, and this is root", "sudo -iu root")
        else:
            done = self.lab.offsync("plan", home="/root")
            self.assert_refused(done, 1, "sudo -iu %s" % USER)
        self.assert_refused(self.lab.offsync("plan", home="/nonexistent"), 1, "HOME /nonexistent")

    def test_an_account_that_has_no_state(self) -> None:
        other = self.lab.base + "/receives"
        write(other + "/.ssh/authorized_keys", read(self.target.keys))
        done = self.lab.offsync("plan", home=other)
        self.assert_refused(done, 2, "create it", "or work as the account that has the state")
        self.assert_refused(self.lab.offsync("doctor", home=other), 1, "or set OFFSYNC_HOME")

    @unittest.skipIf(os.geteuid() == 0, "root may read it")
    def test_a_state_that_may_not_be_read_is_not_called_absent(self) -> None:
        hidden = self.lab.base + "/hidden"
        os.makedirs(hidden + "/.offsync")
        os.chmod(hidden + "/.offsync", 0)
        self.addCleanup(os.chmod, hidden + "/.offsync", 0o700)
        done = self.lab.offsync("plan", home=hidden, check=1)
        self.assertIn("Permission denied", done.err)
        self.assertNotIn("does not exist", done.err)

    def test_what_a_killed_run_left_beside_a_file(self) -> None:
        write(self.source + "/f", "x")
        for name in ("config.yaml", "last/" + self.target.login):
            for number in (1, 2, os.getpid(), os.getpid() + 1):
                directory, base = os.path.split(self.lab.state + "/" + name)
                write("%s/.offsync-%d-%s" % (directory, number, base), "left")
        self.lab.offsync("init --source", self.source, check=0)
        self.lab.offsync("apply", check=0)
        self.lab.offsync("target list", check=0)

    def test_two_plans_at_once(self) -> None:
        write(self.source + "/f", "x")
        running = [self.lab.start("plan") for _ in range(3)]
        said = [process.communicate(timeout=60) for process in running]
        self.assertEqual([process.returncode for process in running], [0, 0, 0], said)
        self.assertEqual([err for _, err in said], [b"", b"", b""])

    def test_a_large_plan_is_not_kept(self) -> None:
        quick = self.lab.altered(("PLAN_LIMIT = 1 << 30", "PLAN_LIMIT = 1000"))
        for number in range(9):
            write(self.source + "/f%d" % number, "x")
        done = self.lab.offsync("plan", program=quick, check=0)
        self.assertIn("offsync plan --json > FILE", done.err)
        self.assertFalse(os.path.exists(self.lab.state + "/plans/" + done.out.split()[-1]))
        # So no command that needs it is recommended where one is to be reviewed.
        for number in range(30):
            write(self.there + "/d%d" % number, "x")
        done = self.lab.offsync("plan --delete", program=quick, check=0)
        self.assertIn("would shrink by more than max_delete", done.out)
        self.assertNotIn("apply --delete", done.out)
        kept = self.lab.offsync("plan --delete", check=0).out
        self.assertIn("apply --delete --plan " + kept.split()[-1], kept)

    def test_a_plan_that_cannot_be_read(self) -> None:
        write(self.source + "/f", "x")
        name = self.lab.offsync("plan", check=0).out.split()[-1]
        self.assert_refused(self.lab.offsync("apply --plan", "0" * 64), 2, "with this ID is kept")
        os.unlink(self.lab.state + "/plans/" + name)
        os.mkdir(self.lab.state + "/plans/" + name)
        self.addCleanup(os.rmdir, self.lab.state + "/plans/" + name)
        done = self.lab.offsync("apply --plan", name)
        self.assert_refused(done, 2, "Is a directory")
        self.assertEqual(snapshot(self.there), {})

    def test_a_plan_that_fails_ends_what_it_began(self) -> None:
        """A large new source, and a key for another path: nothing goes on hashing, one Ctrl-C ends.

        Each piece of a file takes a moment in this copy.
        """
        pieces = "chunk = os.read(descriptor"
        slow = self.lab.altered((pieces, "STOPPING.wait(0.1)\n            " + pieces))
        with open(self.source + "/large", "wb") as stream:
            stream.truncate(1 << 28)  # two minutes at that speed
        line = read(self.target.keys)
        self.addCleanup(write, self.target.keys, line)
        other = self.lab.base + "/elsewhere"
        os.makedirs(other, exist_ok=True)
        write(self.target.keys, line.replace(self.there, other))
        done = self.lab.offsync("plan", program=slow, check=1, timeout=50)
        self.assertIn("the key is restricted to a different path", done.out + done.err)
        write(self.target.keys, line)
        before = self.target.read_log().count("Starting session")
        process = self.lab.start("plan", program=slow)
        wait_for(
            lambda: self.target.read_log().count("Starting session") >= before + 3,
            "the pass and both proofs",
        )
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 130, err)
        os.unlink(self.source + "/large")


if __name__ == "__main__":
    unittest.main()
