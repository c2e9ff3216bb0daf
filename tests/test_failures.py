"""Kills, cuts, full disks, races and hostile answers: nothing lost, nothing left behind,
everything said in one sentence.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import unittest

from lab import (
    OFFSYNC,
    LabTestCase,
    OneTargetCase,
    WrappedRsyncCase,
    comm,
    descendants,
    mentions,
    processes,
    read,
    risk,
    snapshot,
    wait_for,
    write,
)

MEBIBYTE = 1 << 20


class Kills(OneTargetCase):
    """Each test stops a slow transfer of one large file while it is on its way."""

    WAITS = True

    def setUp(self) -> None:
        super().setUp()
        self.lab.configure(bwlimit="1000")
        self.big = os.urandom(3 * MEBIBYTE)
        write(self.source + "/d/big", self.big)
        write(self.source + "/d/small", "new")
        write(self.there + "/d/small", "old")

    def arriving(self) -> list:
        """Return rsync's temporary files of the large file that hold something."""
        found = []
        for directory, _, names in os.walk(self.there):
            found += [
                os.path.join(directory, name) for name in names if "big" in name and name != "big"
            ]
        return [path for path in found if os.path.getsize(path) > 300_000]

    def apply_until_it_sends(self) -> subprocess.Popen:
        process = self.lab.start("apply")
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.stdout.close)
        wait_for(self.arriving, "the large file to be on its way")
        return process

    def kill_rsync_there(self) -> None:
        """Kill rsync, and rrsync, on the target."""
        for pid in [p for p in descendants(self.target.process.pid) if "rsync" in comm(p)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def assert_clean(self) -> None:
        """No process, socket or temporary directory of the run is left; live files are whole."""
        wait_for(
            lambda: not mentions(self.lab.tmp) and not os.listdir(self.lab.tmp),
            "processes and files to be gone",
        )
        self.assertIn(read(self.there + "/d/small"), ("old", "new"))
        self.assertFalse(os.path.lexists(self.there + "/d/big"))

    def assert_finished_by_the_next_apply(self) -> None:
        """Leftovers never block; delete: true lets them go."""
        self.lab.configure(bwlimit="0")
        planned = self.lab.offsync("plan", check=0).out
        self.assertNotIn("missing", planned)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.source).items() - snapshot(self.there).items(), set())
        self.lab.offsync("verify", check=0)
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))
        self.assertIn("equal, nothing to do", self.lab.offsync("plan", check=0).out)

    def test_signals_that_can_be_caught(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(signal=signum.name):
                self.setUp()
                process = self.apply_until_it_sends()
                process.send_signal(signum)
                out, err = process.communicate(timeout=60)
                self.assertEqual(process.returncode, 128 + signum, err)
                self.assertIn(b"interrupted", err)
                self.assertNotIn(b"Traceback", err)
                self.assert_clean()
                record = self.lab.records()[-1]
                self.assertEqual(
                    (record["result"], record["files_changed"], record["files_deleted"]),
                    ("interrupted", None, None),
                )
                self.assertIn(b"unknown", err)
                self.assertIn(b"1 target: 1 interrupted", out)
                self.assert_finished_by_the_next_apply()

    def test_offsync_is_killed_and_the_next_run_resumes_and_says_so(self) -> None:
        process = self.apply_until_it_sends()
        process.kill()
        process.wait()
        self.assert_clean()
        self.lab.configure(bwlimit="0")
        self.assertRegex(self.lab.offsync("plan", check=0).out, "leftover")
        done = self.lab.offsync("apply", check=0)
        self.assertIn("was killed", done.err)
        records = self.lab.records()
        self.assertEqual([r["result"] for r in records[-2:]], ["interrupted", "ok"])
        self.assertLess(
            records[-1]["bytes_sent"], len(self.big) - 250_000
        )  # what had arrived was not sent again
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_its_children_and_the_other_side_are_killed(self) -> None:
        for name, victims in (
            (
                "rsync here",
                lambda process: [p for p in descendants(process.pid) if "rsync" in comm(p)],
            ),
            ("ssh", lambda process: [p for p in descendants(process.pid) if "ssh" in comm(p)]),
            (
                "rsync there",
                lambda process: [
                    p for p in descendants(self.target.process.pid) if "rsync" in comm(p)
                ],
            ),
            ("sshd session", lambda process: descendants(self.target.process.pid)),
        ):
            with self.subTest(victim=name):
                self.setUp()
                process = self.apply_until_it_sends()
                for pid in victims(process):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                _, err = process.communicate(timeout=120)
                self.assertEqual(process.returncode, 1, err)
                self.assertNotIn(b"Traceback", err)
                self.assert_clean()
                record = self.lab.records()[-1]
                self.assertEqual(
                    (record["result"], record["bytes_sent"]), ("failed", None)
                )  # some went over; nobody knows how many
                self.assert_finished_by_the_next_apply()

    def test_a_leftover_is_only_a_word(self) -> None:
        """Names of rsync's own never block, are no difference, and are deleted under the delete
        policy only: a user may have made them.
        """
        for name in ("d/.big.aB3xY9", "x/.~tmp~/precious", "d/.~tmp~/big"):
            write(self.there + "/" + name, "somebody's")
        others = ["d/.other.aB3xY9", "d/.big.backup", "d/.big.SERVER", "d/.big.202611", "x/mine"]
        for name in others:
            write(self.there + "/" + name, "a user's")
        os.mkdir(self.there + "/d/.big.cD4zZ9")
        self.lab.configure(bwlimit="0")
        out = self.lab.offsync("plan", check=0).out
        for name, kind in (
            ("d/.big.aB3xY9", "leftover"),
            ("d/.big.backup", "missing"),
            ("d/.big.SERVER", "missing"),
            ("d/.big.202611", "missing"),
            ("x/.~tmp~/precious", "leftover"),
            ("d/.other.aB3xY9", "missing"),
            ("d/.big.cD4zZ9", "missing"),
            ("x/mine", "missing"),
        ):
            self.assertRegex(out, r"(?m)^  %s +\S.* %s$" % (kind, re.escape(name)))
        self.assert_refused(self.lab.offsync("apply"), 1, "7 entries exist only on a target")
        for name in others:
            os.unlink(self.there + "/" + name)
        os.rmdir(self.there + "/d/.big.cD4zZ9")
        write(self.source + "/x/more", "so x is in the source")
        self.lab.offsync("apply", check=0)
        for name in ("d/.big.aB3xY9", "x/.~tmp~/precious"):
            self.assertEqual(read(self.there + "/" + name), "somebody's")
        self.lab.offsync("verify", check=0)
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_killed_while_deleting_is_logged_by_the_next_run(self) -> None:
        for name in ("big", "small"):
            os.unlink(self.source + "/d/" + name)
            write(self.there + "/d/" + name)
        self.lab.configure(delete="true", bwlimit="0")
        killer = self.lab.program(
            "killer",
            '#!/bin/sh\n%s "$@"\ns=$?\ncase "$*" in *include-from*) kill -9 $PPID;; esac\nexit $s\n'
            % shutil.which("rsync"),
        )
        self.lab.offsync("apply", env={"OFFSYNC_RSYNC": killer}, check=-9)
        self.assertEqual(os.listdir(self.there + "/d"), [])
        self.assertIn("was killed", self.lab.offsync("apply", check=0).err)
        self.assertEqual(
            [(r["result"], r["files_changed"]) for r in self.lab.records()[-2:]],
            [("interrupted", None), ("ok", [])],
        )

    def test_the_guard_is_killed(self) -> None:
        """Whoever ends, connections and scratch go with it: the guard, or offsync in its place."""
        process = self.apply_until_it_sends()
        guard = next(
            pid
            for pid, parent, _, args in processes()
            if parent == process.pid and "offsync.py" in args
        )
        os.kill(guard, signal.SIGKILL)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        self.assert_clean()

    def test_a_signal_within_the_handler_of_another(self) -> None:
        """What it sets takes no lock, or the second one would wait for the first for ever."""
        code = (
            "import importlib.util, os, signal, sys\n"
            "spec = importlib.util.spec_from_file_location('offsync', %r)\n"
            "offsync = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(offsync)\n"
            "signal.signal(signal.SIGTERM, offsync.handle_signal)\n"
            "def trace(frame, event, arg):\n"
            "    inside = event == 'line' and frame.f_code.co_name == 'set'\n"
            "    if inside and frame.f_locals['self']._cond._lock.locked():\n"
            "        sys.settrace(None)\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return trace\n"
            "try:\n"
            "    sys.settrace(trace)\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "except offsync.Interrupted as interrupted:\n"
            "    os._exit(interrupted.status)\n" % OFFSYNC
        )
        done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=20)
        self.assertEqual(done.returncode, 143, done.stderr)

    def test_two_signals_at_once(self) -> None:
        for pair in (
            (signal.SIGTERM, signal.SIGINT),
            (signal.SIGINT, signal.SIGTERM),
            (signal.SIGTERM, signal.SIGTERM),
        ):
            self.setUp()
            process = self.apply_until_it_sends()
            for signum in pair:
                process.send_signal(signum)
            _, err = process.communicate(timeout=60)
            self.assertNotIn(b"Traceback", err)
            self.assertIn(process.returncode, (130, 143))


# For wrap_target_rrsync(): an rrsync that delivers, and then loses this file.
DISCARD = (
    'real; s=$?; case "$SSH_ORIGINAL_COMMAND" in *--delay-updates*) rm -f %s; exit 0;; esac;'
    " exit $s"
)


class Trouble(WrappedRsyncCase):
    def failing(self, *words: str) -> None:
        """apply fails with these words, logs it, and works again when the trouble is over (the
        caller mends it).
        """
        done = self.lab.offsync("apply", check=1)
        for word in words:
            self.assertIn(word, done.err)

    def test_log_not_writable_then_nothing_is_sent(self) -> None:
        write(self.source + "/f")
        log = self.lab.state + "/operations.log"
        if os.path.lexists(log):
            os.unlink(log)
        os.mkdir(log)
        self.addCleanup(lambda: os.path.isdir(log) and os.rmdir(log))
        self.assert_refused(self.lab.offsync("apply"), 1, "operations.log", "Is a directory")
        self.assertEqual(snapshot(self.there), {})

    def test_a_torn_record_spoils_no_other(self) -> None:
        write(self.source + "/f")
        log = self.lab.state + "/operations.log"
        self.lab.offsync("apply", check=0)
        with open(log, "a") as stream:
            stream.write('{"bytes_sent": 1')
        self.lab.offsync("apply", check=0)
        lines = read(log).splitlines()
        self.assertEqual(
            (lines[-2], '"result": "ok"' in lines[-1], lines[-1][0]),
            ('{"bytes_sent": 1', True, "{"),
        )
        write(log, "\n".join(lines[:-2] + lines[-1:]) + "\n")

    def test_two_applies_and_apply_and_init(self) -> None:
        with open(self.lab.state + "/lock", "w") as stream:
            stream.write("offsync apply (process 4711)\n")
            stream.flush()
            fcntl.flock(stream, fcntl.LOCK_EX)
            for args in (
                ["apply"],
                ["init", "--source", self.source],
                ["target", "remove", self.target.login],
            ):
                self.assert_refused(
                    self.lab.offsync(*args), 1, "it was taken by offsync apply (process 4711)"
                )
            self.lab.offsync("plan", check=0)
        self.lab.offsync("apply", check=0)

    def test_rrsyncs_lock_is_waited_for(self) -> None:
        write(self.source + "/f")
        held = os.open(self.there, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        before = self.target.read_log().count("Starting session")
        process = self.lab.start("apply")
        # The proof, a first attempt, and a second one: then it was waiting.
        wait_for(
            lambda: self.target.read_log().count("Starting session") >= before + 3,
            "a second attempt",
        )
        fcntl.flock(held, fcntl.LOCK_UN)
        os.close(held)
        out, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, err)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_nothing_is_deleted_while_something_differs(self) -> None:
        """A file that was equal is changed there after the sending: what is to be deleted may be
        its only copy.
        """
        write(self.source + "/f", "new")
        write(self.source + "/g", "good")
        write(self.there + "/g", "good")
        write(self.there + "/old", "old")
        keys = self.wrap_target_rrsync(
            "real; s=$?; set -- $SSH_ORIGINAL_COMMAND\n"
            'case "$3" in *n*) ;; *) echo spoiled > g;; esac; exit $s'
        )
        done = self.lab.offsync("apply --delete", check=1)
        self.assertEqual(read(self.there + "/f"), "new", done.err)
        self.assertEqual(read(self.there + "/g"), "spoiled\n", done.err)
        self.assertEqual(read(self.there + "/old"), "old", done.err)
        write(self.target.keys, keys)
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_source_changes_under_the_run(self) -> None:
        """The target's rrsync is wrapped: the source file changes after the transfer."""
        write(self.source + "/f", "planned")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *--delay-updates*) echo changed > %s/f;; esac; real'
            % self.source
        )
        done = self.lab.offsync("apply", check=1)
        self.assertRegex(done.err, "the source changed after it was planned.*: f;")
        self.assertEqual(self.lab.records()[-1]["result"], "failed")

    def test_a_target_that_discards_what_it_gets(self) -> None:
        """Exit status 0 proves nothing."""
        write(self.source + "/f", "content")
        self.wrap_target_rrsync(DISCARD % "f")
        self.failing("verification found differences:", ": f; nothing was delivered")
        self.assertEqual(
            (self.lab.records()[-1]["result"], self.lab.records()[-1]["files_changed"]),
            ("failed", []),
        )

    def test_a_target_that_changes_what_it_gets(self) -> None:
        """Same size, same time stamp: only hashes tell, in a first delivery as in a later one."""
        write(self.source + "/unchanging")
        for content in ("good", "fine"):
            write(self.source + "/f", content + "\n")
            line = self.wrap_target_rrsync(
                'real; s=$?; case "$SSH_ORIGINAL_COMMAND" in *--delay-updates*) touch -r f ../time;'
                " echo evil > f; touch -r ../time f;; esac; exit $s"
            )
            self.failing("verification found differences:", ": f; ")
            self.assertEqual(
                self.lab.records()[-1]["files_changed"], [] if content == "fine" else ["unchanging"]
            )
            write(self.target.keys, line)
            self.lab.offsync("apply", check=0)
            self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_nothing_is_deleted_before_what_replaces_it_has_arrived(self) -> None:
        write(self.source + "/new.conf", "content")
        write(self.there + "/old.conf", "content")
        self.lab.configure(delete="true")
        line = self.wrap_target_rrsync(DISCARD % "new.conf")
        self.failing("verification found differences:", ": new.conf; nothing was delivered")
        self.assertEqual(read(self.there + "/old.conf"), "content")
        write(self.target.keys, line)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    @unittest.skipUnless(os.geteuid() == 0, "mounting a small tmpfs needs root")
    def test_disk_full(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", self.there], check=True)
        self.addCleanup(subprocess.run, ["umount", self.there], check=False)
        write(self.source + "/old", "old")
        self.lab.offsync("apply", check=0)
        write(self.source + "/big", os.urandom(3 * MEBIBYTE))
        write(self.source + "/old", "new")
        self.failing("disk is full", "free some space")
        self.assertEqual(read(self.there + "/old"), "old")
        os.unlink(self.source + "/big")
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("disk is full", done.err)
        self.assertNotIn("--delete", done.err)
        shutil.rmtree(self.there + "/.~tmp~")
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))
        write(self.source + "/big", os.urandom(3 * MEBIBYTE))
        self.lab.offsync("apply", check=1)
        subprocess.run(["mount", "-o", "remount,size=8m", self.there], check=True)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_path_replaced_and_read_only(self) -> None:
        write(self.source + "/f")
        shutil.rmtree(self.there)
        write(self.there, "a file")
        self.failing("is gone or is no directory")
        os.unlink(self.there)
        os.mkdir(self.there)
        if (
            os.geteuid() == 0
            and subprocess.run(["chattr", "+i", self.there], stderr=subprocess.DEVNULL).returncode
            == 0
        ):
            try:
                self.failing("lsattr")
            finally:
                subprocess.run(["chattr", "-i", self.there], check=True)
        self.lab.offsync("apply", check=0)

    def test_a_link_that_goes_dead(self) -> None:
        """A ProxyCommand that is stopped in the middle: packets neither arrive nor are refused."""
        quick = self.lab.altered(("ServerAliveInterval=15", "ServerAliveInterval=1"))
        write(self.source + "/big", os.urandom(3 * MEBIBYTE))
        self.lab.configure(bwlimit="1000")
        write(
            self.lab.ssh_config,
            "ProxyCommand %s %s %%h %%p 0\n"
            % (sys.executable, os.path.join(os.path.dirname(OFFSYNC), "tests", "delay.py")),
        )
        self.addCleanup(write, self.lab.ssh_config, "")
        process = self.lab.start("apply", program=quick)
        wait_for(
            lambda: (
                any(
                    os.path.getsize(os.path.join(self.there, name)) > 300_000
                    for name in os.listdir(self.there)
                    if name.startswith(".big")
                )
                or os.path.isdir(self.there + "/.~tmp~")
            ),
            "the transfer",
        )
        proxies = [
            pid
            for pid, _, _, args in processes()
            if "delay.py" in args and str(self.target.port) in args and "sh -c" not in args
        ]
        self.assertTrue(proxies)
        for pid in proxies:
            os.kill(pid, signal.SIGSTOP)
        _, err = process.communicate(timeout=90)
        for pid in proxies:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.assertEqual(process.returncode, 1, err)
        self.assertRegex(err, b"connection was lost|did not answer in time")
        write(self.lab.ssh_config, "")
        self.lab.configure(bwlimit="0")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_sshd_that_drops_connections_is_tried_again(self) -> None:
        """A ProxyCommand that closes the first two connections before the banner, as MaxStartups
        does.
        """
        proxy = self.lab.base + "/dropping"
        write(
            proxy,
            '#!/bin/sh\nn=$(cat %s/n 2>/dev/null || echo 0)\necho $((n+1)) > %s/n\n[ "$n" -lt 2 ]'
            ' && exit 0\nexec %s %s "$@" 0\n'
            % (
                self.lab.base,
                self.lab.base,
                sys.executable,
                os.path.join(os.path.dirname(OFFSYNC), "tests", "delay.py"),
            ),
            0o755,
        )
        write(self.lab.ssh_config, "ProxyCommand %s %%h %%p\n" % proxy)
        self.addCleanup(write, self.lab.ssh_config, "")
        self.lab.offsync("plan", check=0)
        self.assertEqual(read(self.lab.base + "/n").strip(), "3")

    def test_one_failing_target_does_not_stop_the_others(self) -> None:
        other = self.lab.configured_target("other")
        self.addCleanup(lambda: self.lab.offsync("target remove", other.login, check=0))
        write(self.source + "/f")
        keys = read(other.keys)
        os.unlink(other.keys)
        done = self.lab.offsync("apply", check=1)
        self.assertIn(
            "offsync: error: %s: the target refused this controller's key" % other.login, done.err
        )
        self.assertEqual(done.err.count("refused this controller's key"), 1)
        last = "2 targets: 1 ok, 1 failed: %s\n" % other.login
        self.assertTrue(done.out.endswith(last), done.out)
        self.assertEqual(snapshot(self.there), snapshot(self.source))
        self.assertEqual(
            {r["login"]: r["result"] for r in self.lab.records()[-2:]},
            {self.target.login: "ok", other.login: "failed"},
        )
        write(other.keys, keys)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(other.path), snapshot(self.source))


class BadSurroundings(LabTestCase):
    def test_closed_and_full_streams(self) -> None:
        self.lab.configured_target("one")
        write(self.lab.source + "/f")
        for number in range(300):
            write(self.lab.source + "/n%d" % number)

        def shell(command: str) -> subprocess.CompletedProcess:
            return subprocess.run(
                ["sh", "-c", command.replace("OFFSYNC", "%s %s" % (sys.executable, OFFSYNC))],
                env=self.lab.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd=self.lab.base,
                text=True,
            )

        for command in (
            "OFFSYNC plan | head -1",
            "OFFSYNC manifest | head -1",
            "OFFSYNC plan >&-",
            "OFFSYNC --version >&-",
            "OFFSYNC plan <&-",
            "OFFSYNC apply <&- >&- 2>&-",
            "LC_ALL=C OFFSYNC plan",
            "OFFSYNC verify | cat",
        ):
            with self.subTest(command=command):
                done = shell(command)
                self.assertNotIn("Traceback", done.stderr)
                self.assertEqual(done.returncode, 0, done.stderr)
        for command in (
            "OFFSYNC plan > /dev/full",
            "OFFSYNC --version > /dev/full",
            "OFFSYNC manifest > /dev/full",
        ):
            with self.subTest(command=command):
                done = shell(command)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(
                    done.stderr,
                    r"(?m)^offsync: error: writing to standard output failed: No space left .*\n\Z",
                )
        self.assertEqual(snapshot(self.lab.base + "/one/data"), snapshot(self.lab.source))
        two = self.lab.configured_target(
            "two"
        )  # what cannot be printed for one target keeps nothing from the other
        write(self.lab.source + "/more")
        self.assertEqual(shell("OFFSYNC apply --jobs 1 > /dev/full").returncode, 1)
        self.assertEqual([record["result"] for record in self.lab.records()[-2:]], ["ok", "ok"])
        self.assertEqual(snapshot(two.path), snapshot(self.lab.source))

    def test_odd_environments(self) -> None:
        self.lab.init()
        for home in ("relative", "/x\ny", '/x"y', "/x%y", "/x$y"):
            self.assert_refused(
                self.lab.offsync("plan", env={"OFFSYNC_HOME": home}), 2, "OFFSYNC_HOME"
            )
        self.assert_refused(
            self.lab.offsync("manifest", self.lab.source, env={"OFFSYNC_RSYNC": "/none"}),
            1,
            "/none, which OFFSYNC_RSYNC names",
        )
        spaced = self.lab.base + "/state with space"
        self.lab.offsync("init --source", self.lab.source, env={"OFFSYNC_HOME": spaced}, check=0)
        target = self.lab.target("one")
        self.lab.offsync(
            "link --path",
            target.path,
            "--key-file",
            spaced + "/id_ed25519.pub",
            *risk(),
            home=target.home,
            check=0,
        )
        words = ("target add", *target.words, "--host-key", target.fingerprint)
        self.lab.offsync(*words, env={"OFFSYNC_HOME": spaced}, check=0)
        write(self.lab.source + "/f")
        long = self.lab.base + "/" + "t" * 100
        os.mkdir(long)
        self.lab.offsync(
            "apply",
            env={
                "OFFSYNC_HOME": spaced,
                "TMPDIR": long,
                "RSYNC_PROTECT_ARGS": "1",
                "RSYNC_RSH": "false",
                "LC_ALL": "C",
            },
            check=0,
        )
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))

    def test_bad_configs(self) -> None:
        self.lab.init()
        config = self.lab.state + "/config.yaml"
        good = read(config)
        for text in (
            "",
            "\x00",
            "[" * 10000,
            "version: 1\n" * 3,
            good + "nonsense\n",
            good.replace("targets: []", "targets:\n  - x"),
            b'version: 1\nsource: "/\xff"\n',
            good.replace("false", "False"),
            good.replace("delete: false", "delete: no"),
            "a" * 1_000_000,
        ):
            write(config, text)
            done = self.lab.offsync("plan")
            self.assert_refused(done, 2, "config.yaml:")
            self.assertLess(len(done.err), 2000)
        os.unlink(config)
        os.mkfifo(config)  # nobody writes to it: it is empty, and nothing hangs
        self.assert_refused(self.lab.offsync("plan", timeout=30), 2, 'the key "version" is missing')

    @unittest.skipIf(os.geteuid() == 0, "root may write anywhere")
    def test_state_directory_read_only(self) -> None:
        target = self.lab.configured_target("one")
        write(self.lab.source + "/f")
        os.chmod(self.lab.state, 0o500)
        self.addCleanup(os.chmod, self.lab.state, 0o700)
        self.lab.offsync("plan", check=0)
        self.assert_refused(self.lab.offsync("apply"), 1, "nothing was sent")
        self.assertEqual(snapshot(target.path), {})


class ManyTargets(LabTestCase):
    """Far-away targets, six of them dead in different ways (GOOD sets how many are not)."""

    WAITS = True

    def test_the_dead_are_named_and_the_others_served(self) -> None:
        good_ones = int(os.environ.get("GOOD", "4"))
        lab = self.lab
        lab.init()
        quick = lab.altered(
            ("CONNECT_DEADLINE = 60.0", "CONNECT_DEADLINE = 20.0"),
            ("SESSION_DEADLINE = 45.0", "SESSION_DEADLINE = 15.0"),
            ("ConnectTimeout=15", "ConnectTimeout=5"),
        )
        good = [lab.configured_target("good%d" % number) for number in range(good_ones)]
        refusing, silent, hanging, mute, full, keyless = (
            lab.configured_target(name)
            for name in ("refusing", "silent", "hanging", "mute", "full", "keyless")
        )
        refusing.stop()
        silent.stop()
        with socket.socket() as listener:  # accepts nobody's banner
            listener.bind((silent.address, silent.port))
            listener.listen(5)
            # One hangs at once, as long as its connection lasts; one refuses the proof (which says
            # nothing), then hangs.
            for target, how in ((hanging, "cat > /dev/null"), (mute, "cat > /dev/null")):
                write(
                    target.keys,
                    read(target.keys).replace("/usr/bin/rrsync", how + "; /usr/bin/rrsync"),
                )
            small = os.geteuid() == 0
            if small:
                subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", full.path], check=True
                )
                self.addCleanup(subprocess.run, ["umount", full.path], check=False)
            os.unlink(keyless.keys)
            write(
                lab.ssh_config,
                "ProxyCommand %s %s %%h %%p 0.025\n"
                % (sys.executable, os.path.join(os.path.dirname(OFFSYNC), "tests", "delay.py")),
            )
            for number in range(20):
                write(lab.source + "/d/f%d" % number, os.urandom(20_000))
            done = lab.offsync("apply", program=quick, check=1, timeout=180)
        for target in good:
            self.assertEqual(snapshot(target.path), snapshot(lab.source), target.name)
        reasons = {
            refusing: "refused|closed the connection",
            silent: "did not answer in time|closed the connection|timed out",
            hanging: "did not answer in time",
            mute: "did not answer in time",
            keyless: "refused this controller's key",
            **({full: "disk is full"} if small else {}),
        }
        said = dict(re.findall(r"(?m)^offsync: error: (\S+@\S+): ((?!the same as ).*)$", done.err))
        for others, first in re.findall(r"(?m)^offsync: error: (.*): the same as (\S+)$", done.err):
            said.update((login, said[first]) for login in others.split(", "))
        for target, reason in reasons.items():
            self.assertRegex(said[target.login], reason)
        self.assertIn(
            "%d targets: %d ok, %d failed"
            % (good_ones + 6, good_ones + 6 - len(reasons), len(reasons)),
            done.out,
        )
        self.assertEqual(
            sorted(r["result"] for r in lab.records()),
            ["failed"] * len(reasons) + ["ok"] * (good_ones + 6 - len(reasons)),
        )


class Soak(OneTargetCase):
    """Random kills: KILLS sets how many ("make soak" runs many), SEED where they begin."""

    def test_random_kills(self) -> None:
        rng = random.Random(int(os.environ.get("SEED", "1")))
        for number in range(int(os.environ.get("KILLS", "4"))):
            with self.subTest(kill=number):
                self.one_kill(rng)

    def one_kill(self, rng: random.Random) -> None:
        for name in range(30):
            path = "%s/d%d/f%d" % (self.source, name % 3, name)
            if not os.path.exists(path) or rng.random() < 0.3:
                write(
                    path,
                    (
                        rng.randbytes(rng.choice([10, 1000, 400_000]))
                        if hasattr(rng, "randbytes")
                        else os.urandom(1000)
                    ),
                )
        old, new = snapshot(self.there), snapshot(self.source)
        process = self.lab.start("apply")
        try:
            process.communicate(timeout=rng.uniform(0.05, 3.0))
        except subprocess.TimeoutExpired:
            victim = rng.choice(["offsync", "child", "there"])
            pids = {
                "offsync": [process.pid],
                "child": descendants(process.pid),
                "there": descendants(self.target.process.pid),
            }[victim]
            if pids:
                try:
                    os.kill(
                        rng.choice(pids),
                        rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]),
                    )
                except ProcessLookupError:
                    pass
            _, err = process.communicate(timeout=120)
            self.assertNotIn(b"Traceback", err)
        wait_for(
            lambda: not mentions(self.lab.tmp) and not os.listdir(self.lab.tmp),
            "processes and temporary files to be gone",
        )
        now = snapshot(self.there)
        for path, entry in now.items():
            if b".~tmp~" in path or os.path.basename(path).startswith(b"."):
                continue
            self.assertIn(entry, (old.get(path), new.get(path)), path)
        planned = self.lab.offsync("plan", check=0).out
        self.assertNotIn("missing", planned)
        self.lab.offsync("apply", check=0)
        self.assertEqual(new.items() - snapshot(self.there).items(), set())
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), new)
        self.assertEqual(stat.S_IMODE(os.stat(self.lab.state + "/operations.log").st_mode), 0o600)


if __name__ == "__main__":
    unittest.main()
