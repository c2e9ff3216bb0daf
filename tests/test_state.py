"""The state directory, and a user beside you: what others could change is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unittest

from lab import LabCase, OFFSYNC, read, snapshot, write


class UserBeside(LabCase):
    def test_a_state_directory_that_others_may_write_to(self) -> None:
        self.lab.joined_by_hand("one")
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
                        "others could change",
                        "chmod o-w",
                    )
        os.chmod(self.lab.state, 0o700)
        os.chmod(self.lab.home, 0o777)  # a parent
        self.assert_refused(self.lab.offsync("plan"), 1, "chmod o-w " + self.lab.home)
        os.chmod(self.lab.home, 0o755)
        self.lab.offsync("plan", check=0)

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_one_that_belongs_to_another(self) -> None:
        self.lab.init()
        os.chown(self.lab.state, 65534, 65534)
        self.assert_refused(self.lab.offsync("plan"), 1, "belongs to nobody", "chown")

    def test_what_is_in_it_is_opened_without_following_symlinks(self) -> None:
        self.lab.joined_by_hand("one")
        write(self.lab.source + "/f", "x")
        for name in ("lock", "operations.log"):
            with self.subTest(name=name):
                victim = self.lab.base + "/victim"
                write(victim, "keep")
                path = self.lab.state + "/" + name
                if os.path.lexists(path):
                    os.unlink(path)
                os.symlink(victim, path)
                self.assert_refused(self.lab.offsync("apply"), 1, name)
                self.assertEqual(read(victim), "keep")
                os.unlink(path)
        self.lab.offsync("apply", check=0)

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
        self.lab.joined_by_hand("one")
        os.mkdir(self.lab.base + "/theirs")
        os.chown(self.lab.base + "/theirs", 65534, 65534)
        os.chmod(self.lab.base + "/theirs", 0o777)
        err = self.lab.offsync("-v", "plan", env={"TMPDIR": self.lab.base + "/theirs"}, check=0).err
        self.assertNotIn("ControlPath=%s/theirs" % self.lab.base, err)
        self.assertEqual(os.listdir(self.lab.base + "/theirs"), [])

    def test_the_private_key_is_never_delivered_by_its_real_path_either(self) -> None:
        self.lab.joined_by_hand("one")
        os.rename(self.lab.state + "/id_ed25519", self.lab.source + "/key")
        os.symlink(self.lab.source + "/key", self.lab.state + "/id_ed25519")
        self.assert_refused(self.lab.offsync("plan"), 1, "so the private key")

    def test_a_log_that_cannot_be_written_stops_only_what_it_belongs_to(self) -> None:
        one, two = self.lab.joined_by_hand("one"), self.lab.joined_by_hand("two")
        write(self.lab.source + "/f", "x")
        write(
            self.lab.state + "/last/" + one.login + "/in-the-way", ""
        )  # no status can be written for this one
        done = self.lab.offsync("apply", check=1)
        self.assertIn("offsync: %s: failed" % one.login, done.err)
        self.assertIn("2 targets: 1 ok, 1 failed", done.out)
        self.assertEqual(snapshot(two.path), snapshot(self.lab.source))
        shutil.rmtree(self.lab.state + "/last")
        write(self.lab.state + "/last", "a file")  # nor for any of them
        write(self.lab.source + "/g", "x")
        done = self.lab.offsync("apply", check=1)
        self.assertIn("2 targets: 2 failed", done.out)
        self.assertEqual(len(self.lab.records()), 2 + 1 + 1)


if __name__ == "__main__":
    unittest.main()
