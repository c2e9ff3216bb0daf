"""Deletions: planned ones only, guarded against an empty or shrunken source."""

from __future__ import annotations

import os
import shutil
import unittest

from lab import OneTargetCase, ThreeTargetsCase, read, snapshot, write


class Deleting(OneTargetCase):
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
            self.lab.offsync("apply --delete"),
            1,
            "nothing was sent",
            "31 entries now, 1 afterwards",
            "max_delete",
            "by its ID",
            "mounted",
        )
        self.assertEqual(snapshot(self.there), before)
        plan = self.lab.offsync("plan --delete", check=0).out.split()[-1]
        self.lab.offsync("apply --delete --plan", plan, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_an_exclude_that_begins_with_the_source_of_this_run(self) -> None:
        """It would match nothing in that source, and what it is to protect would be deleted."""
        other = self.lab.base + "/other"
        write(other + "/f", "x")
        write(self.there + "/uploads/mine", "x")
        self.lab.configure(exclude=[other + "/uploads/"])
        done = self.lab.offsync("apply --delete --source", other)
        self.assert_refused(done, 2, "protects nothing", "without " + other)
        self.assertTrue(os.path.exists(self.there + "/uploads/mine"))

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
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_an_empty_source_never_deletes_even_when_reviewed(self) -> None:
        self.fill(0, 12)
        plan = self.lab.offsync("plan --delete", check=0).out.split()[-1]
        self.assert_refused(
            self.lab.offsync("apply --delete --plan", plan), 1, "an empty source never deletes"
        )
        shutil.rmtree(self.there)
        write(self.there + "/.~tmp~/x", "only leftovers")
        self.assert_refused(self.lab.offsync("apply --delete"), 1, "an empty source never deletes")
        self.lab.offsync("plan --exit-code", check=0)  # they are no difference

    def test_an_empty_name_of_a_source_is_not_this_directory(self) -> None:
        self.fill(1, 0)
        for command in ("plan", "apply", "verify"):
            self.assert_refused(self.lab.offsync(command, "--source", ""), 2, "source: empty")

    def test_delete_holds_for_one_run_and_rollback_is_a_run(self) -> None:
        self.fill(2, 1)
        self.lab.offsync("apply --delete", check=0)
        write(self.there + "/again", "x")
        self.assert_refused(self.lab.offsync("apply"), 1, "deleting is not allowed")
        old = self.lab.base + "/yesterday"
        shutil.rmtree(old, ignore_errors=True)
        write(old + "/here0", "as it was")
        out = self.lab.offsync("plan --source", old, "--delete", check=0).out
        self.assertTrue(out.startswith("source %s\n" % old), out)
        self.lab.offsync("apply --source", old, "--delete", check=0)
        self.assertEqual(snapshot(self.there), snapshot(old))
        self.lab.offsync("verify --source", old, check=0)
        self.lab.offsync("verify", check=3)
        record = self.lab.records()[-1]
        self.assertEqual(
            (record["source"], record["files_changed"], record["files_deleted"]),
            (old, ["here0"], ["again", "here1"]),
        )
        self.assert_refused(
            self.lab.offsync("plan --source", old + "/none"), 1, "No such file or directory"
        )


class Keeping(ThreeTargetsCase):
    """ "delete: keep": what exists only on a target is left alone, and stops nothing."""

    def setUp(self) -> None:
        super().setUp()
        write(self.source + "/app", "v1")
        write(self.source + "/conf", "a file in the source")
        self.pid, self.directory, self.plain = self.targets

    def put_in_place(self) -> None:
        write(self.pid.path + "/app.pid", "4711")
        write(self.directory.path + "/conf/local", "in a directory called conf")

    def test_a_fleet_with_a_pid_file_a_directory_in_the_way_and_nothing(self) -> None:
        self.put_in_place()
        planned = self.lab.offsync("plan --keep", check=0).out
        self.assertRegex(planned, r"(?m)^  missing   only on target, kept +app\.pid$")
        self.assertIn("apply will refuse", planned)
        before = [snapshot(target.path) for target in self.targets]
        done = self.lab.offsync("apply --keep")
        # Both are named: what would have to go, and what comes in its place.
        self.assert_refused(
            done, 1, "keeping it is impossible", "conf, conf/local", self.directory.login
        )
        self.assertNotIn("app.pid", done.err)
        self.assertEqual([snapshot(target.path) for target in self.targets], before)
        command = "offsync apply --except %s --keep" % self.directory.login
        self.assertIn(command, done.err)
        self.lab.offsync(*command.split()[1:], check=0)
        self.assertEqual(read(self.pid.path + "/app.pid"), "4711")
        self.assertEqual(read(self.pid.path + "/app"), "v1")
        self.assertEqual(snapshot(self.plain.path), snapshot(self.source))
        self.assertEqual(read(self.directory.path + "/conf/local"), "in a directory called conf")
        record = next(r for r in self.lab.records()[-2:] if r["login"] == self.pid.login)
        self.assertEqual((record["result"], record["files_deleted"]), ("ok", []))

    def test_what_is_kept_is_no_difference(self) -> None:
        self.lab.configure(delete='"keep"')
        self.lab.offsync("apply", check=0)
        write(self.pid.path + "/app.pid", "4711")
        write(self.pid.path + "/logs/%s" % ("x" * 20), "a log")
        self.assertEqual(self.lab.offsync("verify", check=0).out, "")
        write(self.pid.path + "/.app.aB3xY9", "what rsync left, or a user's")
        self.lab.offsync("plan --exit-code", check=0)
        self.lab.offsync("apply", check=0)
        write(self.source + "/app", "v2")
        self.lab.offsync("plan --exit-code", check=3)
        self.lab.offsync("apply", check=0)
        self.assertEqual(read(self.pid.path + "/app"), "v2")
        self.assertEqual(read(self.pid.path + "/app.pid"), "4711")
        self.assertTrue(os.path.exists(self.pid.path + "/.app.aB3xY9"))
        self.lab.configure(delete="false")
        self.assertIn("only on target ", self.lab.offsync("verify", check=3).out)
        self.lab.offsync("verify --keep", check=0)

    def test_nothing_counts_towards_a_guard_and_a_source_that_lost_all_is_refused(self) -> None:
        self.lab.configure(delete='"keep"', max_delete="0")
        for number in range(30):
            write(self.pid.path + "/old%d" % number, "x")
            write(self.pid.path + "/CONF%d" % number, "x")
            write(self.source + "/conf%d" % number, "x")
        self.lab.offsync("apply", check=0)
        self.assertEqual(len(snapshot(self.pid.path)), 92)
        shutil.rmtree(self.source)
        os.mkdir(self.source)
        for excluded in ((), (".git/x",)):
            for name in excluded:
                write(self.source + "/" + name, "excluded")
            done = self.lab.offsync("apply")
            self.assert_refused(done, 1, "empty source")
        self.assertEqual(len(snapshot(self.pid.path)), 92)

    def test_a_kept_name_that_may_be_one_of_the_source(self) -> None:
        """Where a target ignores case, delivering Readme would overwrite README, which is kept."""
        write(self.pid.path + "/README", "the user's own")
        write(self.pid.path + "/Readme", "old")
        write(self.source + "/Readme", "new")
        done = self.lab.offsync("apply --keep", self.pid.login)
        self.assert_refused(done, 1, "may be one file", "README, Readme")
        self.assertEqual(read(self.pid.path + "/Readme"), "old")
        plan = self.lab.offsync("plan --keep", self.pid.login, check=0).out.split()[-1]
        self.lab.offsync("apply --keep", self.pid.login, "--plan", plan, check=0)
        self.assertEqual(read(self.pid.path + "/README"), "the user's own")
        self.assertEqual(read(self.pid.path + "/Readme"), "new")

    def test_an_unmounted_source_is_not_equal_to_what_is_kept(self) -> None:
        self.lab.configure(delete='"keep"')
        self.lab.offsync("apply", check=0)
        shutil.rmtree(self.source)
        os.mkdir(self.source)
        self.lab.offsync("verify", check=3)
        self.assertIn("empty source", self.lab.offsync("plan --exit-code", check=3).out)

    def test_what_rsync_left_in_a_directory_that_has_to_go(self) -> None:
        write(self.pid.path + "/conf/.~tmp~/part", "collected")
        for option in ("--keep", "--source=" + self.source):
            done = self.lab.offsync("apply", self.pid.login, option)
            self.assert_refused(done, 1, "conf/.~tmp~/part")
        self.lab.offsync("apply", self.pid.login, "--delete", check=0)
        self.assertEqual(snapshot(self.pid.path), snapshot(self.source))

    def test_it_does_not_go_with_delete_and_an_option_wins_over_the_config(self) -> None:
        self.put_in_place()
        self.assert_refused(self.lab.offsync("apply --keep --delete"), 2, "not allowed with")
        self.lab.configure(delete="true")
        self.lab.offsync("apply --keep", self.pid.login, check=0)
        self.assertTrue(os.path.exists(self.pid.path + "/app.pid"))
        self.lab.configure(delete='"keep"')
        self.lab.offsync("apply --delete", self.pid.login, check=0)
        self.assertFalse(os.path.exists(self.pid.path + "/app.pid"))

    def test_a_reviewed_plan_with_what_is_kept(self) -> None:
        """The review holds though another file appears that is kept, too."""
        self.lab.configure(delete='"keep"')
        write(self.pid.path + "/app.pid", "4711")
        reviewed = self.review()
        write(self.plain.path + "/app.pid", "4712")
        os.unlink(self.pid.path + "/app.pid")
        self.lab.offsync("apply --plan", reviewed, check=0)
        self.assertEqual(read(self.plain.path + "/app.pid"), "4712")
        # A plan brings no option with it; the hint does.
        self.lab.configure(delete="false")
        done = self.lab.offsync("apply", self.pid.address, "--plan", reviewed)
        self.assert_refused(done, 1, "the policy is not that", 'delete was "keep", is false')
        command = "offsync apply %s --keep --plan %s" % (self.pid.address, reviewed)
        self.assertIn(command, done.err)
        self.lab.offsync(*command.split()[1:], check=0)


if __name__ == "__main__":
    unittest.main()
