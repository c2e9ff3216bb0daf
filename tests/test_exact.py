"""Exactly the plan: nothing more, nothing earlier, nothing unknown called known; on rsyncs that
answer otherwise, by stand-ins.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import unittest

from lab import (
    OFFSYNC,
    WrappedRsyncCase,
    descendants,
    mentions,
    offsync,
    processes,
    read,
    require,
    snapshot,
    wait_for,
    write,
)


class Root(WrappedRsyncCase):
    def test_the_root_of_the_target_is_never_touched(self) -> None:
        for ours, theirs, more in (
            (0o700, 0o755, {}),
            (0o755, 0o2775, {}),
            (0o777, 0o711, {"overwrite": "false"}),
            (0o1777, 0o750, {"verify": '"quick"'}),
        ):
            with self.subTest(ours=oct(ours), theirs=oct(theirs), **more):
                self.setUp()
                self.lab.configure(**more)
                for name in ("new", "d/new", "#x", ";y"):
                    write(self.source + "/" + name, name)
                os.symlink("new", self.source + "/link")
                os.chmod(self.source, ours)
                os.chmod(self.there, theirs)
                self.lab.offsync("apply", check=0)
                self.assertEqual(snapshot(self.there), snapshot(self.source))
                self.assertEqual((self.mode(self.source), self.mode(self.there)), (ours, theirs))
                self.lab.offsync("verify", check=0)
        os.chmod(self.source, 0o755)


class SymlinksLast(WrappedRsyncCase):
    def setUp(self) -> None:
        super().setUp()
        write(self.there + "/v1/app", "old")
        write(self.source + "/v1/app", "old")
        write(self.source + "/v2/app", b"n" * 100_000)
        os.symlink("v2", self.source + "/current")
        os.symlink("v1", self.there + "/current")

    def test_a_switched_link_is_never_live_before_its_files(self) -> None:
        self.wrap_target_rrsync(
            'real; s=$?; echo "$(readlink current) $(cat v2/app 2>/dev/null | wc -c)" >> %s/seen;'
            " exit $s" % self.lab.base
        )
        self.lab.offsync("apply", check=0)
        seen = read(self.lab.base + "/seen").split("\n")[:-1]
        self.assertIn("v1 100000", seen)  # the file had arrived, the link had not moved
        self.assertEqual(
            [line for line in seen if line.startswith("v2") and line != "v2 100000"], []
        )
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_nor_when_the_files_did_not_arrive(self) -> None:
        for how in ("exit 1", "real; exit 12", "real; rm -f v2/app; exit 0"):
            with self.subTest(how=how):
                self.setUp()
                self.wrap_target_rrsync(
                    'case "$SSH_ORIGINAL_COMMAND" in *delay-updates*) %s;; *) real;; esac' % how
                )
                self.lab.offsync("apply", check=1)
                self.assertEqual(os.readlink(self.there + "/current"), "v1")
                self.doCleanups()

    def test_what_stands_in_the_way_of_a_link_goes_only_then(self) -> None:
        os.unlink(self.there + "/current")
        write(self.there + "/current/old/file", "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *delay-updates*) ls current/old > %s/then;; esac; real'
            % self.lab.base
        )
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(read(self.lab.base + "/then"), "file\n")
        self.assertEqual(snapshot(self.there), snapshot(self.source))


class OutsideInfluence(WrappedRsyncCase):
    def test_nothing_of_popt_or_the_environment_counts(self) -> None:
        write(self.source + "/o/x.o", "an object file")
        write(self.source + "/f", "f", 0o640)
        evil = self.lab.base + "/evil"
        write(evil, "#!/bin/sh\ntouch %s/executed\n" % self.lab.base, 0o755)
        baseline = self.lab.offsync("plan --json", check=0).stdout
        popt = self.lab.home + "/.popt"
        self.addCleanup(lambda: os.path.exists(popt) and os.unlink(popt))
        for line in (
            "rsync alias -p --perms --chmod=F600",
            "rsync alias -r --recursive --cvs-exclude",
            "rsync alias -n --stats",
            "rsync exec --delete " + evil,
        ):
            with self.subTest(line=line):
                write(popt, line + "\n")
                env = {
                    "RSYNC_CHECKSUM_LIST": "none",
                    "RSYNC_PARTIAL_DIR": "x",
                    "RSYNC_RSH": "false",
                }
                self.assertEqual(self.lab.offsync("plan --json", env=env, check=0).stdout, baseline)
                self.assertEqual(snapshot(self.there), {})
                self.lab.offsync("apply", env=env, check=0)
                self.assertEqual(snapshot(self.there), snapshot(self.source))
                self.lab.offsync("verify", env=env, check=0)
                self.assertFalse(os.path.exists(self.lab.base + "/executed"))
                shutil.rmtree(self.there)
                os.mkdir(self.there)
        # The same lines do change what rsync does with HOME: the test is one.
        write(popt, "rsync alias -r --recursive --cvs-exclude\n")
        out = subprocess.run(
            [require("rsync"), "-n", "-r", "-i", self.source + "/", self.there],
            env=self.lab.env,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        self.assertNotIn("x.o", out)

    def test_which_checksum_each_pass_uses(self) -> None:
        record = self.lab.base + "/passes"
        env = self.wrap_local_rsync(
            'echo "${RSYNC_CHECKSUM_LIST-fastest} ${HOME-nohome} $(env | grep -c ^RSYNC_) $*" >>'
            " %s; real" % record
        )

        def passes(*args: str) -> set:
            write(record, "")
            self.lab.offsync(*args, env=env, check=0)
            found = set()
            for line in read(record).splitlines():
                checksum, home, count, words = line.split(" ", 3)
                self.assertEqual((home, int(count)), ("nohome", checksum == "md5"))
                for kind, pattern in (
                    ("tree", "-rlptc "),
                    ("send", "-ii -lptO"),
                    ("list", "-lptc "),
                ):
                    if pattern in words:
                        found.add((kind, checksum))
            return found

        write(self.source + "/f", "x")
        write(self.source + "/g", "x")
        self.assertEqual(passes("plan"), {("tree", "fastest")})
        self.assertEqual(passes("apply"), {("tree", "fastest"), ("send", "md5")})
        self.assertEqual(passes("verify"), {("tree", "md5")})
        self.assertEqual(passes("verify", "--fast"), {("tree", "fastest")})
        self.lab.configure(verify='"strong"')
        write(self.source + "/f", "y")
        self.assertEqual(passes("plan"), {("tree", "md5")})
        found = passes("apply")  # the list, where the tree is not as cheap
        self.assertEqual(found - {("list", "md5")}, {("tree", "md5"), ("send", "md5")})


class SourceChanges(WrappedRsyncCase):
    """Something writes to the source while a run is on its way: what is called ok is what was
    planned.
    """

    def failing(self, env: dict, *names: str) -> None:
        done = self.lab.offsync("apply", env=env, check=1)
        self.assertRegex(done.err, "the source changed (after it was planned|while it was read)")
        for name in names:
            self.assertRegex(done.err, ": .*%s.*(;| \\()" % re.escape(name))
        self.assertEqual(self.lab.records()[-1]["result"], "failed")

    def test_a_parent_directory_that_is_swapped_away_and_back(self) -> None:
        write(self.source + "/d/f", "good", when=1_600_000_000)
        write(self.lab.base + "/swapped/f", "evil", when=1_600_000_000)
        self.addCleanup(shutil.rmtree, self.lab.base + "/swapped", True)
        env = self.wrap_local_rsync(
            'case "$*" in *"-ii "*) mv d ../kept; mv ../swapped d; real; s=$?; mv d ../swapped; mv'
            " ../kept d; exit $s;; esac; real"
        )
        self.failing(env, "d/f")

    def test_other_content_mode_link_and_type_while_sending(self) -> None:
        for change in (
            "echo evil > f; touch -d @1600000000 f",
            "chmod 4755 f",
            "echo more >> f",
            "rm f",
            "chmod 600 m",
            "ln -sfn m l",
            "chmod 777 d",
            "rm f; mkdir f",
            "rm f; ln -s m f",
            "echo grown >> m",
        ):
            with self.subTest(change=change):
                self.setUp()
                for path, content in (("f", "good\n"), ("m", "mode"), ("d/inside", "x")):
                    write(self.source + "/" + path, content, 0o644, 1_600_000_000)
                os.symlink("f", self.source + "/l")
                write(self.there + "/m", "mode", 0o600, 1_600_000_000)
                write(self.there + "/d/inside", "x", 0o644, 1_600_000_000)
                os.chmod(self.there + "/d", 0o700)
                once = self.lab.base + "/once"
                shutil.rmtree(once, ignore_errors=True)
                env = self.wrap_local_rsync(
                    'case "$*" in *"-ii "*) mkdir %s 2>/dev/null && { %s; };; esac; real'
                    % (once, change)
                )
                done = self.lab.offsync("apply", env=env, check=1)
                self.assertRegex(
                    done.err, "the source changed (after it was planned|while it was read)"
                )
                self.assertEqual(self.lab.records()[-1]["result"], "failed")

    def test_a_mode_or_link_that_is_as_there_again_while_it_is_sent(self) -> None:
        """What was approved did not arrive, though source and target agree."""
        write(self.source + "/m", "mode", 0o640)
        write(self.there + "/m", "mode", 0o600)
        os.symlink("new", self.source + "/l")
        os.symlink("old", self.there + "/l")
        for name, change, back in (
            ("m", "chmod 600 m", "chmod 640 m"),
            ("l", "ln -sfn old l", "ln -sfn new l"),
        ):
            with self.subTest(name=name):
                env = self.wrap_local_rsync(
                    'case "$*" in *"-ii "*|*"--size-only"*) %s;; esac; real' % change
                )
                self.failing(env, name)
                subprocess.run(["sh", "-c", back], cwd=self.source, check=True)

    def test_what_changes_after_the_sending_is_the_sources_doing_too(self) -> None:
        write(self.source + "/f", "planned")
        for change in ("echo later > f", "rm f"):
            with self.subTest(change=change):
                once = self.lab.base + "/once"
                shutil.rmtree(once, ignore_errors=True)
                env = self.wrap_local_rsync(
                    'case "$*" in *"-ii "*) real; s=$?; mkdir %s 2>/dev/null && { %s; }; exit $s;;'
                    " esac; real" % (once, change)
                )
                write(self.source + "/f", "planned" + change)
                self.failing(env)

    def test_a_mode_only_entry_that_is_sent_with_content(self) -> None:
        write(self.source + "/m", b"", 0o600)
        write(self.there + "/m", b"", 0o644)
        env = self.wrap_local_rsync('case "$*" in *--size-only*) echo unplanned > m;; esac; real')
        self.failing(env, "m")

    def test_a_file_named_as_a_symlink_is_printed(self) -> None:
        write(self.source + "/a -> b", "x")
        write(self.source + "/b", "b")
        os.symlink("b", self.source + "/a")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))


class UnknownIsNull(WrappedRsyncCase):
    def test_what_is_not_known_is_null(self) -> None:
        """sshd dies while it receives, and does not come back: it is unknown what was delivered."""
        write(self.source + "/big", os.urandom(3 << 20))
        write(self.source + "/small", "x")
        self.lab.configure(bwlimit="1000")
        process = self.lab.start("apply")
        wait_for(
            lambda: any(name.startswith(".big") for name in os.listdir(self.there)), "the transfer"
        )
        self.target.stop()
        self.addCleanup(self.target.start)
        out, err = process.communicate(timeout=90)
        self.assertEqual(process.returncode, 1, err)
        self.assertIn(b"it is unknown what was delivered", err)
        record = self.lab.records()[-1]
        self.assertEqual(
            (record["result"], record["files_changed"], record["files_deleted"]),
            ("failed", None, None),
        )

    def test_what_somebody_else_deleted_is_not_logged_as_ours(self) -> None:
        write(self.source + "/f", "x")
        write(self.there + "/gone", "z")
        env = self.wrap_local_rsync(
            'case "$*" in *--delay-updates*) rm -f %s/gone; exit 23;; esac; real' % self.there
        )
        self.lab.offsync("apply --delete", env=env, check=1)
        record = self.lab.records()[-1]
        self.assertEqual((record["files_changed"], record["files_deleted"]), ([], []))

    def test_a_target_with_nothing_to_do_is_not_interrupted(self) -> None:
        other = self.lab.configured_target("busy")
        self.addCleanup(self.lab.offsync, "target", "remove", other.login, check=0)
        write(self.source + "/big", os.urandom(3 << 20))
        shutil.copytree(self.source, self.there, dirs_exist_ok=True)
        self.lab.configure(bwlimit="500")
        process = self.lab.start("apply")
        wait_for(
            lambda: any(name.startswith(".big") for name in os.listdir(other.path)), "the transfer"
        )
        wait_for(
            lambda: (
                len(self.lab.records()) and self.lab.records()[-1]["login"] == self.target.login
            ),
            "the first target's record",
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        self.assertIn(b"%s: ok: equal" % self.target.login.encode(), out)
        self.assertEqual(
            {r["login"]: r["result"] for r in self.lab.records()[-2:]},
            {self.target.login: "ok", other.login: "interrupted"},
        )


class SecondRunIsEmpty(WrappedRsyncCase):
    def test_two_names_of_one_inode_there_with_two_modes_here(self) -> None:
        for name, mode in (("one", 0o644), ("two", 0o600)):
            write(self.source + "/" + name, "same", mode, 1_600_000_000)
        write(self.there + "/one", "same", 0o644, 1_600_000_000)
        os.link(self.there + "/one", self.there + "/two")
        done = self.lab.offsync("apply", check=1)
        self.assertIn("a second hard link", done.err)
        os.unlink(self.there + "/two")  # the cure
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_two_names_of_one_inode_with_one_mode(self) -> None:
        for name in ("one", "two"):
            write(self.source + "/" + name, "same", 0o600, 1_600_000_000)
        write(self.there + "/one", "same", 0o644, 1_600_000_000)
        os.link(self.there + "/one", self.there + "/two")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_staged_files_that_are_never_put_in_place(self) -> None:
        """As rsync 3.2.0 to 3.2.3 does with what an interrupted run left in .~tmp~."""
        write(self.source + "/f", "new content")
        write(self.there + "/f", "old")
        write(self.there + "/.~tmp~/f", "new")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *delay-updates*) cp -p f ../old; real; s=$?; mkdir -p'
            " .~tmp~; mv f .~tmp~/f; mv ../old f; exit $s;; esac; real"
        )
        # Also where the review was before the interrupted run, so that it does not list it.
        os.rename(self.there + "/.~tmp~", self.lab.base + "/staged")
        reviewed = self.lab.offsync("plan", check=0).out.split()[-1]
        os.rename(self.lab.base + "/staged", self.there + "/.~tmp~")
        self.lab.offsync("apply --plan", reviewed, check=0)
        self.assertEqual(read(self.there + "/f"), "new content")
        write(self.source + "/f", "other content")
        self.lab.offsync("apply", check=0)
        self.assertEqual(read(self.there + "/f"), "other content")
        self.lab.offsync("verify", check=0)

    @unittest.skipUnless(os.geteuid() == 0, "chattr and mount need root")
    def test_append_only_files_and_mount_points(self) -> None:
        write(self.source + "/f", "new")
        write(self.there + "/f", "old")
        if (
            subprocess.run(
                ["chattr", "+a", self.there + "/f"], stderr=subprocess.DEVNULL
            ).returncode
            == 0
        ):
            try:
                self.assertIn("lsattr", self.lab.offsync("apply", check=1).err)
            finally:
                subprocess.run(["chattr", "-a", self.there + "/f"], check=True)
        self.lab.offsync("apply", check=0)
        os.mkdir(self.there + "/mnt")
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.there + "/mnt"], check=True)
        try:
            done = self.lab.offsync("apply --delete", check=1)
            self.assertRegex(done.err, "mount point|verification found differences")
        finally:
            subprocess.run(["umount", self.there + "/mnt"], check=True)
        self.lab.offsync("apply --delete", check=0)

    def test_a_complaint_with_two_slashes(self) -> None:
        """As rsync up to 3.1.3 names the directory that it could not enter."""
        write(self.source + "/f", "x")
        env = self.wrap_local_rsync(
            'case "$*" in *:/*/x) { real 2>&1 1>&3 | sed "s,%s/,%s//," >&2; } 3>&1; exit 12;; esac;'
            " real" % (self.there, self.there)
        )
        self.lab.offsync("apply", env=env, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))


class Timeouts(WrappedRsyncCase):
    WAITS = True

    def test_a_generator_that_is_killed_and_a_target_that_stops(self) -> None:
        """Neither leaves an end of file: the time without a byte is what ends it, minutes (here:
        seconds).
        """
        for signum in (signal.SIGKILL, signal.SIGSTOP):
            with self.subTest(signal=signum.name):
                self.setUp()
                self.one_dead_end(signum)

    def one_dead_end(self, signum: int) -> None:
        quick = self.lab.altered(("SEND_TIMEOUT = 300", "SEND_TIMEOUT = 4"))
        write(self.source + "/big", os.urandom(3 << 20))
        write(self.there + "/big", os.urandom(3 << 20))
        self.lab.configure(bwlimit="1000")
        process = self.lab.start("apply", program=quick)
        wait_for(
            lambda: any(name.startswith(".big") for name in os.listdir(self.there)), "the transfer"
        )
        inside = set(descendants(self.target.process.pid))
        rsyncs = [
            (pid, parent)
            for pid, parent, name, _ in processes()
            if name == "rsync" and pid in inside
        ]
        parents = {parent for _, parent in rsyncs}
        generator = next(
            pid
            for pid, _ in rsyncs
            if pid in parents and any(parent == pid for _, parent in rsyncs)
        )
        stopped = [generator] if signum == signal.SIGKILL else [pid for pid, _ in rsyncs]
        for pid in stopped:
            os.kill(pid, signum)
        _, err = process.communicate(timeout=90)
        for pid in stopped:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.assertEqual(process.returncode, 1, err)
        self.assertNotIn(b"Traceback", err)
        wait_for(lambda: not mentions(self.lab.tmp), "its processes to end")
        self.lab.configure(bwlimit="0")
        self.lab.offsync("apply", check=0)
        self.lab.offsync("verify", check=0)

    def test_ctrl_c_with_a_hung_target_and_a_second_one(self) -> None:
        for signals in (1, 2):
            with self.subTest(signals=signals):
                self.wrap_target_rrsync("touch ../begun; cat > /dev/null")
                process = self.lab.start("apply")
                wait_for(
                    lambda: os.path.exists(os.path.dirname(self.there) + "/begun"), "the session"
                )
                for _ in range(signals):
                    process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=10)
                self.assertEqual(process.returncode, 130, err)
                wait_for(
                    lambda: not mentions(self.lab.tmp) and not os.listdir(self.lab.tmp),
                    "all to be gone",
                )
                os.unlink(os.path.dirname(self.there) + "/begun")


class Manifest(WrappedRsyncCase):
    def test_its_own_output_is_not_in_it(self) -> None:
        write(self.source + "/f", "x")
        with open(self.source + "/sums", "wb") as stream:
            subprocess.run(
                [sys.executable, OFFSYNC, "manifest", self.source],
                env=self.lab.env,
                stdout=stream,
                stderr=subprocess.DEVNULL,
                check=True,
            )
        self.assertEqual(
            [line.split("  ")[1] for line in read(self.source + "/sums").splitlines()], ["f"]
        )
        self.lab.offsync("manifest", self.source, "--check", self.source + "/sums", check=0)
        with open(self.source + "/sums", "rb") as stream:
            crlf = stream.read().replace(b"  f\n", b" *f\r\n")
        write(self.lab.base + "/crlf", crlf)
        os.unlink(self.source + "/sums")
        self.lab.offsync("manifest", self.source, "--check", self.lab.base + "/crlf", check=0)
        write(self.lab.base + "/z", crlf.replace(b"\r\n", b"\0"))
        self.assert_refused(
            self.lab.offsync("manifest", self.source, "--check", self.lab.base + "/z"),
            2,
            "/z:1: not a line as sha256sum writes it (without -z)",
        )


class SourceWriter(WrappedRsyncCase):
    def test_a_parent_that_becomes_a_symlink_before_it_is_hashed(self) -> None:
        """What lies outside the source is not read, whatever stands in for a directory of it."""
        secret = self.lab.base + "/secret/f"
        write(secret, "secret", when=1_600_000_000)
        write(self.source + "/d/f", "public", when=1_600_000_000)
        env = self.wrap_local_rsync(
            'case "$*" in *--delete*--out-format*) real > ../items; s=$?; mv d ../d;'
            " ln -s ../secret d; cat ../items; exit $s;; esac; real"
        )
        done = self.lab.offsync("apply", env=env, check=1)
        self.assertNotIn("ok:", done.out)
        self.assertEqual(
            [path for path, entry in snapshot(self.there).items() if entry[0] == "file"], []
        )
        with self.assertRaises(OSError):
            offsync.describe_entry(os.fsencode(self.source), b"d/f")
        os.unlink(self.source + "/d")
        os.rename(self.lab.base + "/d", self.source + "/d")
        self.lab.offsync("apply", check=0)


class Replaced(WrappedRsyncCase):
    def test_a_file_in_place_of_a_directory_survives_the_deletions_after_it(self) -> None:
        """The rule that lets rsync into the directory must not match the file of its name."""
        write(self.source + "/d", "now a file")
        write(self.there + "/d/x", "x")
        write(self.there + "/gone", "x")
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_a_file_that_takes_the_place_of_a_directory_meanwhile(self) -> None:
        """In the last moment before the deletions: it is nothing that was planned."""
        write(self.source + "/d/kept", "x")
        write(self.there + "/d/kept", "x")
        write(self.there + "/d/gone", "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *--existing*) rm -r d; echo mine > d;; esac; real'
        )
        self.lab.offsync("apply --delete", check=1)
        self.assertEqual(read(self.there + "/d"), "mine\n")

    def test_a_file_that_takes_the_place_of_a_directory_above(self) -> None:
        """The directory was to stay, since an excluded file is in it; the source lacks it."""
        self.lab.configure(exclude=["*.log"])
        write(self.source + "/f", "x")
        for name in ("f", "d/a.log", "d/b"):
            write(self.there + "/" + name, "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *--existing*) rm -r d; echo mine > d;; esac; real'
        )
        self.lab.offsync("apply --delete", check=1)
        self.assertEqual(read(self.there + "/d"), "mine\n")

    def test_what_the_source_has_again(self) -> None:
        """Since it was planned: the target's copy is no longer one that only the target has."""
        write(self.source + "/f", "new")
        for name in ("f", "again", "gone"):
            write(self.there + "/" + name, "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *delay-updates*) cp -p again %s;; esac; real'
            % self.source
        )
        self.lab.offsync("apply --delete")
        self.assertEqual(sorted(os.listdir(self.there)), ["again", "f"])

    def test_an_empty_directory_in_place_of_a_file_that_was_to_go(self) -> None:
        write(self.source + "/f", "new")
        for name in ("f", "d"):
            write(self.there + "/" + name, "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *delay-updates*) rm d; mkdir d;; esac; real'
        )
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("new entries appeared on the target after the plan: d", done.err)
        self.assertTrue(os.path.isdir(self.there + "/d"))

    def test_what_was_planned_as_a_directory_and_is_a_file_now(self) -> None:
        """Changed before the last comparison, or in the deletion; and the other way round."""
        for moment in ("*delay-updates*", "*--existing*"):
            for planned, now in (("d/b", "echo mine > d"), ("d", "mkdir d; echo mine > d/mine")):
                with self.subTest(moment=moment, planned=planned):
                    self.setUp()
                    write(self.source + "/f", "new")
                    write(self.there + "/f", "old")
                    write(self.there + "/" + planned, "x")
                    self.wrap_target_rrsync(
                        'case "$SSH_ORIGINAL_COMMAND" in %s) rm -r d; %s;; esac; real'
                        % (moment, now)
                    )
                    self.lab.offsync("apply --delete", check=1)
                    found = [value for value in snapshot(self.there).values() if b"mine\n" in value]
                    self.assertEqual(len(found), 1)
                    self.doCleanups()


class Excluded(WrappedRsyncCase):
    """What an exclude protects is never emptied or replaced."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.configure(exclude=["uploads/", "/only/here/"])
        write(self.source + "/f", "new")

    def test_what_would_replace_a_protected_directory(self) -> None:
        for place in ("uploads", "d/uploads", "only/here"):
            for content in ("photo", ""):
                with self.subTest(place=place, content=content):
                    self.setUp()
                    os.makedirs(os.path.dirname(self.source + "/" + place), exist_ok=True)
                    os.symlink("f", self.source + "/" + place)
                    os.makedirs(self.there + "/" + place)
                    if content:
                        write(self.there + "/" + place + "/" + content, "precious")
                    before = snapshot(self.there)
                    done = self.lab.offsync("apply --delete", check=1)
                    self.assertIn("an exclude protects a directory", done.err)
                    self.assertIn(place, done.err)
                    self.assertEqual(snapshot(self.there), before)
                    self.assertEqual(self.lab.records()[-1]["files_changed"], [])
                    os.unlink(self.source + "/" + place)
                    write(self.source + "/" + place, "a file")
                    self.lab.offsync("apply --delete", check=1)
                    self.assertEqual(snapshot(self.there), before)

    def test_what_no_exclude_protects_is_replaced(self) -> None:
        os.symlink("f", self.source + "/here")
        write(self.there + "/here/old", "x")
        write(self.there + "/uploads/photo", "precious")
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(os.readlink(self.there + "/here"), "f")
        self.assertEqual(read(self.there + "/uploads/photo"), "precious")


class SourceAccepted(WrappedRsyncCase):
    def test_nothing_is_compared_before_the_source_is_accepted(self) -> None:
        """Connections are opened meanwhile; a stand-in takes its time over the excludes."""
        write(self.source + "/f", "x")
        os.mkfifo(self.source + "/fifo")
        before = self.target.read_log().count("Starting session")
        accepted = self.target.read_log().count("Accepted publickey")
        env = self.wrap_local_rsync('case "$*" in *" -rlD "*) sleep 1;; esac; real')
        self.assert_refused(self.lab.offsync("plan", env=env), 1, "it is a device")
        self.assertEqual(self.target.read_log().count("Starting session"), before)
        self.assertEqual(self.target.read_log().count("Accepted publickey"), accepted + 1)
        os.unlink(self.source + "/fifo")
        self.lab.offsync("plan", env=env, check=0)

    def test_what_is_refused_without_any_contact(self) -> None:
        connections = self.target.read_log().count("Connection from")
        os.rmdir(self.source)
        self.assert_refused(self.lab.offsync("plan"), 1, "No such file or directory")
        self.lab.configure(source='"%s"' % self.lab.home)
        self.assert_refused(self.lab.offsync("plan"), 1, "contains the private key")
        os.mkdir(self.source)
        self.assertEqual(self.target.read_log().count("Connection from"), connections)


class LookAlike(WrappedRsyncCase):
    def test_two_symlinks_whose_rows_look_alike(self) -> None:
        os.symlink("b -> c", self.source + "/a")
        os.symlink("c", self.source + "/a -> b")
        out = self.lab.offsync("plan", check=0).out
        self.assertIn('  a -> "b -> c"\n', out)
        self.assertIn('  "a -> b" -> c\n', out)
        self.assertIn("2 entries delivered", self.lab.offsync("apply", check=0).out)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_names_that_are_not_what_they_seem(self) -> None:
        shown = {
            "caf\u00e9": '"caf\\303\\251"',  # with its twin in one plan
            "cafe\u0301": '"cafe\\314\\201"',
            "na\u00efve": "na\u00efve",
            "x\u3164": '"x\\343\\205\\244"',
            "y\ufe0f": '"y\\357\\270\\217"',
            "z\u2800": '"z\\342\\240\\200"',
            "a   b": '"a   b"',
            "a  b": "a  b",
            "p -> q": '"p -> q"',
        }
        for name in shown:
            write(self.source + "/" + name, "x")
        out = self.lab.offsync("plan", check=0).out
        for text in shown.values():
            self.assertIn("1 B  %s\n" % text, out)
        long = "n" * 255
        write(self.there + "/" + long, "x")
        done = self.lab.offsync("apply", check=1)
        self.assertIn("n" * 200 + "...", done.err)
        self.assertNotIn("n" * 201, done.err)


if __name__ == "__main__":
    unittest.main()
