"""Deletions: planned ones only, guarded against an empty or shrunken source."""

from __future__ import annotations

import os
import shutil
import unittest

from lab import SharedLab, snapshot, write


class Deleting(SharedLab):
    def fill(self, here: int, there: int) -> None:
        for number in range(here):
            write(self.source + "/here%d" % number, "x")
        for number in range(there):
            write(self.there + "/there%d" % number, "x")

    def test_a_run_that_leaves_less_than_half_is_refused(self) -> None:
        self.fill(1, 0)
        self.lab.offsync("apply", check=0)
        os.mkdir(self.source + "/lost+found")  # as an unmounted disk looks
        os.unlink(self.source + "/here0")
        self.fill(0, 30)
        before = snapshot(self.there)
        self.assert_refused(
            self.lab.offsync("apply", "--delete"),
            1,
            "nothing was sent",
            "from 31 to 1 entries",
            "max_delete",
            "apply --plan",
            "mounted",
        )
        self.assertEqual(snapshot(self.there), before)
        plan = self.lab.offsync("plan", "--delete", check=0).out.split()[-1]
        self.lab.offsync("apply", "--delete", "--plan", plan, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_the_boundaries(self) -> None:
        for here, there, percent, fine in (
            (10, 9, 0, True),
            (10, 10, 50, True),
            (9, 10, 50, False),
            (8, 9, 50, True),
            (19, 20, 50, False),
            (20, 20, 50, True),
            (1, 40, 99, True),
            (50, 10, 0, False),
            (50, 10, 17, True),
        ):
            with self.subTest(here=here, there=there, percent=percent):
                self.setUp()
                self.fill(here, 0)
                shutil.copytree(self.source, self.there, dirs_exist_ok=True)
                self.fill(0, there)
                self.lab.configure(delete="true", max_delete=percent)
                done = self.lab.offsync("apply")
                self.assertEqual(done.returncode == 0, fine, done.err)

    def test_turnover_is_no_shrinking(self) -> None:
        """A web build whose files all have new names."""
        self.fill(30, 30)
        self.lab.offsync("apply", "--delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_an_empty_source_never_deletes_even_when_reviewed(self) -> None:
        self.fill(0, 12)
        plan = self.lab.offsync("plan", "--delete", check=0).out.split()[-1]
        self.assert_refused(
            self.lab.offsync("apply", "--delete", "--plan", plan),
            1,
            "an empty source never deletes",
        )
        shutil.rmtree(self.there)
        write(self.there + "/.~tmp~/x", "only leftovers")
        self.assert_refused(
            self.lab.offsync("apply", "--delete"), 1, "an empty source never deletes"
        )
        self.lab.offsync("plan", "--exit-code", check=0)  # they are no difference

    def test_an_empty_name_of_a_source_is_not_this_directory(self) -> None:
        self.fill(1, 0)
        for command in ("plan", "apply", "verify"):
            self.assert_refused(self.lab.offsync(command, "--source", ""), 2, "it is empty")

    def test_delete_holds_for_one_run_and_rollback_is_a_run(self) -> None:
        self.fill(2, 1)
        self.lab.offsync("apply", "--delete", check=0)
        write(self.there + "/again", "x")
        self.assert_refused(self.lab.offsync("apply"), 1, "delete is false")
        old = self.lab.base + "/yesterday"
        shutil.rmtree(old, ignore_errors=True)
        write(old + "/here0", "as it was")
        out = self.lab.offsync("plan", "--source", old, "--delete", check=0).out
        self.assertTrue(out.startswith("source %s\n" % old), out)
        self.lab.offsync("apply", "--source", old, "--delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(old))
        self.lab.offsync("verify", "--source", old, check=0)
        self.lab.offsync("verify", check=3)
        record = self.lab.records()[-1]
        self.assertEqual(
            (record["source"], record["files_changed"], record["files_deleted"]),
            (old, ["here0"], ["again", "here1"]),
        )
        self.assert_refused(
            self.lab.offsync("plan", "--source", old + "/none"), 1, "not a readable directory"
        )


if __name__ == "__main__":
    unittest.main()
