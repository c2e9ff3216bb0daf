"""File systems of a target that are not like the source's: case, modes, symlinks, names, inodes."""

from __future__ import annotations

import os
import shutil
import subprocess
import unittest

from lab import WrappedRsyncCase, can_mount, read, require, snapshot, write

CAN_EXFAT = (
    can_mount()
    and os.path.exists("/dev/fuse")
    and all(shutil.which(name) for name in ("mkfs.exfat", "mount.exfat-fuse", "losetup"))
)


class Case(WrappedRsyncCase):
    """Names that differ only in case, on a file system that tells them apart."""

    def test_a_rename_in_case_only_needs_one_run(self) -> None:
        write(self.source + "/Readme", "text")
        write(self.source + "/Docs/a", "a")
        write(self.there + "/README", "text")
        write(self.there + "/docs/a", "a")
        write(self.source + "/alone/x", "one letter")
        write(self.there + "/alone/X", "one letter")
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_both_there_and_one_here(self) -> None:
        """Nobody can tell from here whether they are one file: so the deletion needs a review."""
        names = (
            ("README", "Readme"),
            ("A", "a"),
            ("caf\u00e9", "cafe\u0301"),
            ("D*\\/x", "d*\\/x"),
            ("E/below/x", "e/x"),
            (b"\xffX", b"\xffx"),
            ("odd\nX", "odd\nx"),
            ("p.", "p"),
            ("q/r /s", "q/r/s"),
        )
        for theirs, ours in names:
            with self.subTest(theirs=theirs):
                self.setUp()
                for root, name in ((self.there, theirs), (self.there, ours), (self.source, ours)):
                    write(os.path.join(os.fsencode(root), os.fsencode(name)), name)
                before = snapshot(self.there)
                done = self.lab.offsync("apply --delete", check=1)
                self.assertIn("these names may be one file", done.err)
                self.assertIn("rename the one in the source, apply, rename it back", done.err)
                self.assertEqual(snapshot(self.there), before)
                plan = self.lab.offsync("plan --delete", check=0).out.split()[-1]
                self.lab.offsync("apply --delete --plan", plan, check=0)
                self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_a_leftover_may_be_the_only_copy_too(self) -> None:
        """It has the form of a name of rsync's, and differs from one of the source in case."""
        write(self.source + "/.env", "x")
        for root, name in (
            (self.source, ".env.Backup"),
            (self.there, ".env.Backup"),
            (self.there, ".env.bACKup"),
        ):
            write(root + "/" + name, "the only copy")
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn(".env.Backup, .env.bACKup", done.err)
        self.assertEqual(sorted(os.listdir(self.there)), [".env.Backup", ".env.bACKup"])

    def test_what_a_cache_goes_on_showing_is_read(self) -> None:
        """A reviewed deletion takes the only copy, and the target's list still shows it."""
        for root, name in ((self.source, "README"), (self.there, "README"), (self.there, "Readme")):
            write(root + "/" + name, "text", when=1_600_000_000)
        plan = self.lab.offsync("plan --delete", check=0).out.split()[-1]
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *--existing*) real; s=$?; echo xext > README;'
            " truncate -s 4 README; touch -d @1600000000 README; exit $s;; esac; real"
        )
        done = self.lab.offsync("apply --delete --plan", plan, check=1)
        self.assertNotIn(" ok: ", done.out)
        self.lab.configure(verify='"strong"')
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_the_way_out_from_the_controller_alone(self) -> None:
        for root, name in ((self.there, "README"), (self.there, "Readme"), (self.source, "Readme")):
            write(root + "/" + name, "text")
        self.lab.offsync("apply --delete", check=1)
        os.rename(self.source + "/Readme", self.source + "/other")
        self.lab.offsync("apply --delete", check=0)
        os.rename(self.source + "/other", self.source + "/Readme")
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_what_is_excluded_or_not_the_same_is_no_collision(self) -> None:
        self.lab.configure(exclude=["skipped"])
        write(self.source + "/skipped", "x")
        write(self.source + "/docs/a", "x")
        write(self.there + "/docs/a", "x")
        for name in ("SKIPPED", "docs/b", "doc", "docs.old"):
            write(self.there + "/" + name, "x")
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(sorted(os.listdir(self.there)), ["docs"])

    def test_both_here_and_both_there(self) -> None:
        """Where nothing tells whether they are one, what was sent is verified, as ever."""
        for name in ("x", "X"):
            write(self.source + "/d/" + name, name)
        self.lab.offsync("apply", check=0)
        for name in ("x", "X"):
            write(self.source + "/d/" + name, "new " + name)
        os.chmod(self.source + "/d", 0o700)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_both_directories_here_and_there(self) -> None:
        for root in (self.source, self.there):
            for name in ("docs/a", "Docs/b", "Docs/deep/er/c"):
                write(root + "/" + name, name)
        write(self.there + "/Docs/deep/er/gone", "x")
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("Docs, docs", done.err)
        plan = self.lab.offsync("plan --delete", check=0).out.split()[-1]
        self.lab.offsync("apply --delete --plan", plan, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_what_a_deletion_took_along_is_a_difference_and_is_sent_again(self) -> None:
        write(self.source + "/kept/f", "kept", 0o640)
        shutil.copytree(self.source, self.there, dirs_exist_ok=True)
        os.symlink("f", self.source + "/kept/l")
        os.symlink("f", self.there + "/kept/l")
        write(self.there + "/gone", "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *--existing*) real; s=$?; rm -r kept; exit $s;; esac;'
            " real"
        )
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("verification found differences", done.err)
        self.assertIn("kept, kept/f, kept/l", done.err)
        self.assertEqual(self.lab.records()[-1]["files_deleted"], ["gone"])
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_and_where_it_cannot_be_the_target_fails(self) -> None:
        write(self.source + "/kept", "kept")
        write(self.there + "/kept", "kept")
        write(self.there + "/gone", "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *--existing*|*delay-updates*)'
            " real; s=$?; rm -f kept; exit $s;; esac; real"
        )
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("verification found differences", done.err)
        self.assertNotIn("ok:", done.out)


class UnusualFilesystems(WrappedRsyncCase):
    def test_nothing_can_be_collected(self) -> None:
        """rsync ends with 0 where it cannot make .~tmp~."""
        write(self.source + "/f", "x")
        env = self.wrap_local_rsync(
            'case "$*" in *--delay-updates*) echo "Unable to create partial-dir for f --'
            ' discarding completed file." >&2;; esac; real'
        )
        done = self.lab.offsync("apply", env=env, check=1)
        self.assertIn("its staging directory .~tmp~", done.err)
        self.assertIn("df -i", done.err)
        self.assertNotIn("exclude it", done.err)

    @unittest.skipUnless(can_mount(), "a file system without inodes needs root")
    def test_no_inode_left(self) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=3", "tmpfs", self.there], check=True
        )
        self.addCleanup(subprocess.run, ["umount", self.there], check=False)
        for name in ("a", "b", "c", "d"):
            write(self.source + "/" + name, name)
        done = self.lab.offsync("apply", check=1)
        self.assertRegex(done.err, "df -i|the target's disk is full")
        subprocess.run(["mount", "-o", "remount,nr_inodes=100", self.there], check=True)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    @unittest.skipUnless(os.geteuid() != 0, "root may read it")
    def test_a_staging_directory_of_somebody_else(self) -> None:
        os.mkdir(self.there + "/.~tmp~", 0)
        self.addCleanup(os.chmod, self.there + "/.~tmp~", 0o700)
        write(self.source + "/f", "x")
        done = self.lab.offsync("plan", check=1)
        self.assertIn("a .~tmp~ of another account", done.out)
        self.assertNotIn("exclude it", done.out)


@unittest.skipUnless(CAN_EXFAT, "no exFAT can be mounted here (root, exfat-fuse, a loop device)")
class ExFat(WrappedRsyncCase):
    """A real file system without case, modes and symlinks."""

    def setUp(self) -> None:
        super().setUp()
        image, self.mounted = self.lab.base + "/image", self.there
        with open(image, "wb") as stream:
            stream.truncate(32 << 20)
        subprocess.run([require("mkfs.exfat"), image], check=True, stdout=subprocess.DEVNULL)
        device = subprocess.run(
            ["losetup", "-f", "--show", image], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "-d", device], check=True)
        subprocess.run(
            ["mount.exfat-fuse", "-o", "umask=022", device, self.there],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(subprocess.run, ["umount", self.there], check=True)

    def test_a_name_that_changed_only_in_case(self) -> None:
        write(self.source + "/README", "text", 0o755)
        write(self.source + "/d/f", "x", 0o755)
        self.lab.offsync("apply", check=0)
        os.rename(self.source + "/README", self.source + "/Readme")
        os.rename(self.source + "/d", self.source + "/D")
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("these names may be one file", done.err)
        for name in ("README", "Readme", "D"):
            self.assertRegex(done.err, r"[ :]%s[, ]" % name)
        self.assertEqual((read(self.there + "/README"), read(self.there + "/d/f")), ("text", "x"))

    def test_accents_in_another_case(self) -> None:
        write(self.source + "/caf\u00e9", "the only copy", 0o755)
        write(self.there + "/CAF\u00c9", "the only copy", 0o755)
        os.utime(self.source + "/caf\u00e9", (1_600_000_000, 1_600_000_000))
        os.utime(self.there + "/CAF\u00c9", (1_600_000_000, 1_600_000_000))
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("these names may be one file", done.err)
        self.assertEqual(read(self.there + "/CAF\u00c9"), "the only copy")

    def test_two_names_that_are_one_there(self) -> None:
        write(self.source + "/README", "one", 0o755)
        write(self.source + "/readme", "two", 0o755)
        done = self.lab.offsync("apply", check=1)
        self.assertIn("may take these names for one", done.err)
        self.assertIn("README, readme", done.err)
        for name, content in (("README", "1"), ("readme", "2")):
            write(self.source + "/" + name, content, 0o755)
        done = self.lab.offsync("apply", check=1)
        self.assertIn("may take these names for one", done.err)
        self.assertNotIn(" ok: ", done.out)

    def test_two_directories_that_are_one_there(self) -> None:
        """They are merged there: what is in the one is missing in the other, and the only copy."""
        for name in ("docs/a", "Docs/b"):
            write(self.source + "/" + name, name, 0o755)
        done = self.lab.offsync("apply", check=1)
        self.assertIn("may take these names for one", done.err)
        for name in ("Docs", "docs"):
            self.assertRegex(done.err, r"[ :]%s[, ]" % name)
        done = self.lab.offsync("apply --delete", check=1)
        self.assertIn("these names may be one file", done.err)
        for name in ("Docs", "docs"):
            self.assertRegex(done.err, r"[ :]%s[, ]" % name)
        self.assertEqual(read(self.there + "/docs/a"), "docs/a")
        self.assertEqual(read(self.there + "/docs/b"), "Docs/b")

    def test_modes_symlinks_and_colons(self) -> None:
        write(self.source + "/plain", "x", 0o644)
        done = self.lab.offsync("apply", check=1)
        self.assertIn("content arrived, modes did not", done.err)
        self.assertIn("1 entry delivered", done.err)
        self.assertEqual(self.lab.records()[-1]["files_changed"], ["plain"])
        self.assertEqual(read(self.there + "/plain"), "x")
        os.chmod(self.source + "/plain", 0o755)
        self.lab.offsync("apply", check=0)  # with the modes that the mount shows
        for make in (
            lambda: os.symlink("plain", self.source + "/odd"),
            lambda: write(self.source + "/odd:name", "x", 0o755),
        ):
            make()
            write(self.source + "/more", "more", 0o755)
            done = self.lab.offsync("apply", check=1)
            self.assertIn("does not support symlinks or some characters", done.err)
            self.assertNotRegex(done.err, "lsattr|sshd's log|nothing was delivered")
            for name in os.listdir(self.source):
                if name.startswith("odd") or name == "more":
                    os.unlink(self.source + "/" + name)
            self.lab.offsync("apply --delete", check=0)


if __name__ == "__main__":
    unittest.main()
