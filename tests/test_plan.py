"""What a plan refuses, shows and identifies: scope, policies, IDs, JSON, manifests, excludes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import unittest

from lab import OneTargetCase, WrappedRsyncCase, read, snapshot, write


class Scope(OneTargetCase):
    def test_what_cannot_be_delivered_is_refused_before_anything_is_compared(self) -> None:
        write(self.source + "/d/inside")
        os.symlink("/etc/passwd", self.source + "/absolute")
        os.symlink("../outside", self.source + "/leaves")
        os.symlink("d/../../source/d", self.source + "/leaves-and-returns")
        os.symlink("d", self.source + "/fine")
        os.symlink("nowhere", self.source + "/dangling")
        os.mkdir(self.source + "/e")
        os.symlink("../fine/inside", self.source + "/e/fine-too")
        (
            os.symlink("..", self.lab.base + "/up")
            if not os.path.lexists(self.lab.base + "/up")
            else None
        )
        os.mkfifo(self.source + "/fifo")
        write(self.source + "/d/.~tmp~/x")
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(self.source)
            listener.bind("socket")
            os.chdir(here)
        sessions = self.target.read_log().count("Starting session")
        done = self.lab.offsync("plan")
        self.assert_refused(
            done,
            1,
            "absolute: it is a symlink to an absolute path",
            "leaves: it is a symlink that leaves the source",
            "leaves-and-returns",
            "fifo: it is a device",
            "d/.~tmp~: rsync reserves",
            "6 entries",
            "and 1 more",
        )
        self.lab.configure(exclude=["absolute", "leaves*"])
        self.assert_refused(self.lab.offsync("plan"), 1, "socket: it is a device", "3 entries")
        for fine in ("fine", "dangling", "fine-too", "inside"):
            self.assertNotIn(" %s:" % fine, done.err)
        self.assertEqual(self.target.read_log().count("Starting session"), sessions)
        self.lab.configure(exclude=[".git/", "absolute", "leaves*", "fifo", "/socket", ".~tmp~"])
        self.assertEqual(
            [entry["path"] for entry in self.plan()["targets"][0]["added"]],
            ["d", "d/inside", "dangling", "e", "e/fine-too", "fine"],
        )

    def test_a_source_that_contains_the_private_key(self) -> None:
        self.lab.configure(source='"%s"' % self.lab.home)
        self.assert_refused(self.lab.offsync("plan"), 1, "contains the private key", "private key")

    def test_through_other_symlinks(self) -> None:
        os.makedirs(self.source + "/deep/er")
        os.symlink("../..", self.source + "/deep/er/up")  # the source itself: fine
        os.symlink(
            "up/../x", self.source + "/deep/er/via"
        )  # deep/er/x as written, ../x as resolved
        os.symlink("up/deep", self.source + "/deep/er/round")
        self.assert_refused(
            self.lab.offsync("plan"), 1, "deep/er/via: it is a symlink that leaves", "1 entry"
        )

    def test_the_first_offenders_and_then_a_count(self) -> None:
        for number in range(30):
            os.symlink("/x", "%s/%02d" % (self.source, number))
        done = self.lab.offsync("plan", check=1)
        self.assertIn("30 entries", done.err)
        self.assertIn(" 04: it is", done.err)
        self.assertNotIn(" 05: it is", done.err)
        self.assertIn("and 25 more", done.err)

    @unittest.skipIf(os.geteuid() == 0, "root reads everything")
    def test_unreadable_entries(self) -> None:
        write(self.source + "/secret", "x", 0o000)
        os.mkdir(self.source + "/closed", 0o000)
        done = self.lab.offsync("plan")
        os.chmod(self.source + "/closed", 0o755)
        self.assert_refused(
            done, 1, "secret: it cannot be read", "closed: it cannot be read", "2 entries"
        )


class Reasons(OneTargetCase):
    def test_a_mode_is_shown_where_others_may_write(self) -> None:
        """Or where it has setuid or setgid: what is added needs a look then."""
        for name, mode in (("open", 0o666), ("group", 0o664), ("setgid", 0o2755), ("plain", 0o644)):
            write(self.source + "/" + name, "x", mode)
        shown = re.findall(
            r"added +not on target +([0-7]*) +1 B +(\S+)", self.lab.offsync("plan").out
        )
        self.assertEqual(
            shown, [("", "group"), ("0666", "open"), ("", "plain"), ("2755", "setgid")]
        )

    def test_every_reason(self) -> None:
        when = 1_600_000_000
        for name, ours, theirs in (
            ("content", b"aaaa", b"bbbb"),
            ("same", b"same", b"same"),
            ("size", b"a", b"aa"),
        ):
            write(self.source + "/" + name, ours, 0o644, when)
            write(self.there + "/" + name, theirs, 0o644, when)
        write(self.source + "/mode", b"m", 0o640, when)
        write(self.there + "/mode", b"m", 0o644, when + 5)
        write(self.source + "/both", b"m", 0o640)
        write(self.there + "/both", b"n", 0o600)
        write(self.source + "/time-only", b"t", 0o644, when)
        write(self.there + "/time-only", b"t", 0o644, when + 9)
        os.symlink("a", self.source + "/link")
        os.symlink("b", self.there + "/link")
        write(self.source + "/file-for-directory", b"f")
        write(self.there + "/file-for-directory/below/deep", b"x")
        write(self.source + "/directory-for-file/new", b"f")
        write(self.there + "/directory-for-file", b"x")
        os.symlink("x", self.source + "/link-for-file")
        write(self.there + "/link-for-file", b"x")
        write(self.source + "/file-for-link", b"f")
        os.symlink("same", self.there + "/file-for-link")
        write(self.source + "/directory-for-link/new", b"f")
        os.symlink(".", self.there + "/directory-for-link")
        os.mkdir(self.source + "/file-for-empty-directory-not")
        os.mkdir(self.there + "/mode-of-directory", 0o700)
        os.mkdir(self.source + "/mode-of-directory", 0o755)
        os.mkdir(self.there + "/extra")
        os.symlink("nowhere", self.there + "/extra-link")
        target = self.plan()["targets"][0]
        self.assertEqual(
            {e["path"]: e["changes"] for e in target["modified"]},
            {
                "content": ["content"],
                "size": ["content"],
                "mode": ["mode"],
                "both": ["content", "mode"],
                "link": ["link"],
                "file-for-directory": ["type"],
                "directory-for-file": ["type"],
                "link-for-file": ["type"],
                "file-for-link": ["type"],
                "directory-for-link": ["type"],
                "mode-of-directory": ["mode"],
            },
        )
        self.assertEqual(
            [e["path"] for e in target["added"]],
            ["directory-for-file/new", "directory-for-link/new", "file-for-empty-directory-not"],
        )
        self.assertEqual(
            [(e["path"], e["type"]) for e in target["missing"]],
            [
                ("extra", "directory"),
                ("extra-link", "non-directory"),
                ("file-for-directory/below", "directory"),
                ("file-for-directory/below/deep", "non-directory"),
            ],
        )
        entry = next(e for e in target["modified"] if e["path"] == "both")
        self.assertEqual(
            entry,
            {
                "path": "both",
                "type": "file",
                "size": 1,
                "mode": "0640",
                "sha256": hashlib.sha256(b"m").hexdigest(),
                "changes": ["content", "mode"],
            },
        )
        before = os.stat(self.there + "/mode")
        self.lab.configure(delete="true")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))
        self.assertEqual(
            (os.stat(self.there + "/mode").st_ino, os.stat(self.there + "/time-only").st_mtime),
            (before.st_ino, when + 9),
        )

    def test_a_read_only_directory_on_the_target(self) -> None:
        write(self.source + "/ro/f", b"new")
        write(self.there + "/ro/f", b"old")
        for root in (self.source, self.there):
            os.chmod(root + "/ro", 0o555)
        self.lab.offsync("apply", check=0)
        self.assertEqual(read(self.there + "/ro/f"), "new")
        self.assertEqual(stat.S_IMODE(os.stat(self.there + "/ro").st_mode), 0o555)

    def test_quick_compares_size_and_time(self) -> None:
        write(self.source + "/f", b"aaaa", when=1_600_000_000)
        write(self.there + "/f", b"bbbb", when=1_600_000_000)
        write(self.source + "/g", b"aaaa", when=1_600_000_000)
        write(self.there + "/g", b"aaaa", when=1_600_000_007)
        self.lab.configure(verify='"quick"')
        self.assertEqual([e["path"] for e in self.plan()["targets"][0]["modified"]], ["g"])
        self.lab.offsync("apply", check=0)
        self.assertEqual(self.plan()["targets"][0]["modified"], [])
        self.assertEqual(self.lab.offsync("verify", check=3).out.count("modified  content"), 1)

    def test_excluded_entries_are_invisible_on_both_sides(self) -> None:
        self.lab.configure(exclude=[".git/", "*.log", "/top"], delete="true")
        for root in (self.source, self.there):
            write(root + "/.git/" + os.path.basename(root))
            write(root + "/d/x.log", os.path.basename(root))
            write(root + "/top", os.path.basename(root))
        write(self.there + "/old/kept.log")
        write(self.there + "/old/gone")
        write(self.source + "/new/top")
        target = self.plan()["targets"][0]
        self.assertEqual([e["path"] for e in target["added"]], ["new", "new/top"])
        self.assertEqual([e["path"] for e in target["missing"]], ["old/gone"])
        self.lab.offsync("apply", check=0)
        self.assertEqual(
            sorted(snapshot(self.there)),
            [
                b".git",
                b".git/data",
                b"d",
                b"d/x.log",
                b"new",
                b"new/top",
                b"old",
                b"old/kept.log",
                b"top",
            ],
        )

    def test_names_that_could_be_comments_or_options(self) -> None:
        for name in ("#hash", ";semicolon", "#d/f", ";d/f", "+ plus", "- minus", "-n", "!"):
            write(self.source + "/" + name, name)
        self.assertEqual(
            {kind: len(self.plan()["targets"][0][kind]) for kind in ("added", "modified")},
            {"added": 10, "modified": 0},
        )
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_five_thousand_random_names(self) -> None:
        rng = random.Random(7)
        count = int(os.environ.get("NAMES", "1000"))
        names = set()
        while len(names) < count:
            name = bytes(
                rng.choice([b for b in range(1, 256) if b != 47]) for _ in range(rng.randint(1, 40))
            )
            if name not in (b".", b"..", b".~tmp~"):
                names.add(name)
        for name in names:
            write(os.path.join(os.fsencode(self.source), name), name)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))
        self.lab.offsync("verify", check=0)
        for name in {*sorted(names)[2::2], b"p"}:
            os.unlink(os.path.join(os.fsencode(self.source), name))
        self.lab.configure(delete="true")
        # "P" is kept: so the deletion of "p" needs a review.
        plan = self.lab.offsync("plan", check=0).out.split()[-1]
        self.lab.offsync("apply --plan", plan, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))


class Policies(WrappedRsyncCase):
    def test_delete_false_and_overwrite_false_refuse_the_whole_run(self) -> None:
        other = self.lab.configured_target("other")
        self.addCleanup(lambda: self.lab.offsync("target remove", other.login, check=0))
        write(self.source + "/f", b"new")
        write(self.there + "/f", b"old")
        write(self.there + "/mine", b"x")
        before = self.unchanged(), snapshot(other.path)
        done = self.lab.offsync("apply")
        self.assert_refused(
            done,
            1,
            "nothing was sent",
            "deleting is not allowed",
            "mine",
            self.target.login,
            "--keep",
            "--delete",
        )
        self.assertEqual((self.unchanged(), snapshot(other.path)), before)
        self.assertEqual(
            [(r["result"], r["files_changed"]) for r in self.lab.records()[-2:]],
            [("refused", [])] * 2,
        )
        self.assertIn("deleting is not allowed", self.lab.records()[-1]["error"])
        self.lab.configure(delete="true", overwrite="false")
        self.assert_refused(
            self.lab.offsync("apply"),
            1,
            "nothing was sent",
            "overwriting is not allowed",
            "f",
            '"overwrite: true"',
        )
        self.assertEqual((self.unchanged(), snapshot(other.path)), before)
        self.lab.configure(overwrite="true")
        self.lab.offsync("apply", check=0)
        self.assertEqual([snapshot(self.there), snapshot(other.path)], [snapshot(self.source)] * 2)

    def test_an_empty_source_never_deletes(self) -> None:
        write(self.there + "/precious")
        self.lab.configure(delete="true")
        self.assert_refused(self.lab.offsync("apply"), 1, "an empty source never deletes")
        write(self.source + "/.git/only")
        self.assert_refused(self.lab.offsync("apply"), 1, "an empty source never deletes")
        self.assertIn(b"precious", snapshot(self.there))
        write(self.source + "/f")
        self.lab.offsync("apply", check=0)
        self.assertEqual(list(snapshot(self.there)), [b"f"])

    def test_something_new_at_that_moment_stops_the_deletion(self) -> None:
        """The target's rsync is wrapped: after the transfer a user's file appears."""
        write(self.source + "/f", b"new")
        write(self.there + "/old")
        self.lab.configure(delete="true")
        self.wrap_target_rrsync(
            'real; s=$?; case "$SSH_ORIGINAL_COMMAND" in *--delay-updates*) echo mine > appeared;;'
            " esac; exit $s"
        )
        done = self.lab.offsync("apply", check=1)
        self.assertIn("nothing was deleted", done.err)
        self.assertIn("appeared", done.err)
        self.assertEqual(sorted(snapshot(self.there)), [b"appeared", b"f", b"old"])
        self.assertEqual(
            (self.lab.records()[-1]["result"], self.lab.records()[-1]["files_changed"]),
            ("failed", ["f"]),
        )


class PlanIds(OneTargetCase):
    def refused(self, reviewed: str, *words: str, args=()) -> None:
        before = self.unchanged()
        self.assert_refused(
            self.lab.offsync("apply --plan", reviewed, *args), 1, "nothing was sent", *words
        )
        self.assertEqual(self.unchanged(), before)
        self.assertEqual(self.lab.records()[-1]["result"], "refused")

    def test_what_changed_since_the_review_is_named(self) -> None:
        write(self.source + "/f", b"aaaa", when=1_600_000_000)
        write(self.source + "/g", b"gggg")
        write(self.there + "/g", b"hhhh")
        plan_id = self.lab.offsync("plan", check=0).out.split()[-1]
        kept = os.path.join(self.lab.state, "plans", plan_id)
        printed = self.lab.offsync("plan --json", check=0).stdout
        self.assertEqual(
            (hashlib.sha256(printed).hexdigest(), open(kept, "rb").read()), (plan_id, printed)
        )
        write(self.source + "/f", b"bbbb", when=1_600_000_000)
        self.refused(plan_id, "f would be added, which was not reviewed")
        write(self.source + "/f", b"aaaa", when=1_600_000_000)
        write(self.source + "/new", b"n")
        self.refused(plan_id, "new would be added, which was not reviewed")
        os.unlink(self.source + "/new")
        other = self.lab.configured_target("other")
        done = self.lab.offsync("apply --plan", plan_id, check=1)
        self.assertIn("%s: this target is not covered by the reviewed plan" % other.login, done.err)
        self.assertEqual(snapshot(other.path), {})
        self.refused(plan_id, "covers none of these targets", args=[other.login])
        write(self.there + "/g", b"hhhh")
        os.unlink(self.there + "/f")
        self.lab.offsync("target remove", other.login, check=0)
        self.refused(
            plan_id, "the policy is not that", "delete was false, is true", args=["--delete"]
        )
        self.assert_refused(
            self.lab.offsync("apply --plan", "f" * 64), 2, "no plan with this ID", "the whole ID"
        )
        self.assert_refused(
            self.lab.offsync("apply --plan", plan_id[:32]),
            2,
            "32 of 64 digits",
            "one that begins so is " + plan_id,
        )
        self.lab.offsync("apply --plan", plan_id, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))
        self.assertEqual(self.lab.records()[-1]["plan"], plan_id)
        self.lab.offsync(
            "apply --plan", plan_id, check=0
        )  # again: all that it approves is there already
        os.unlink(self.source + "/f")
        self.refused(plan_id, "f in the source is no longer what was reviewed")

    def test_what_is_there_already_may_be_absent_from_the_plan_of_now(self) -> None:
        write(self.source + "/f", b"ff")
        write(self.source + "/g", b"gg")
        plan_id = self.lab.offsync("plan", check=0).out.split()[-1]
        write(self.there + "/g", b"gg")
        self.lab.offsync("apply --plan", plan_id, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_a_reviewed_deletion_never_runs_without_the_additions_that_replace_it(self) -> None:
        write(self.source + "/new", b"n")
        write(self.there + "/old", b"o")
        self.lab.configure(delete="true")
        reviewed = self.lab.base + "/plan.jsonl"
        write(reviewed, self.lab.offsync("plan --json", check=0).stdout)
        os.rename(self.source + "/new", self.lab.base + "/new")
        self.refused(reviewed, "new in the source is no longer what was reviewed")
        os.rename(self.lab.base + "/new", self.source + "/new")
        write(self.source + "/old", b"o")
        self.refused(reviewed, "old existed only on a target, but is now in the source")
        os.unlink(self.source + "/old")
        self.lab.offsync("apply --plan", reviewed, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_files_that_are_no_plan(self) -> None:
        write(self.source + "/f", b"ff")
        for text in (
            b"nonsense\n",
            b"[]\n",
            b'{"kind": "added"}\n',
            b'{"kind": "odd", "path": "x"}\n',
            b"\xff\n",
        ):
            write(self.lab.base + "/p", text)
            self.assert_refused(
                self.lab.offsync("apply --plan", self.lab.base + "/p"),
                2,
                "/p:1",
                "not a line of a plan",
            )
        self.assert_refused(
            self.lab.offsync("apply --plan", self.lab.base + "/none"), 2, "No such file"
        )
        self.assertEqual(snapshot(self.there), {})

    def test_again_after_a_symlink_took_the_place_of_a_directory(self) -> None:
        """What was deleted in that directory is not back, though a path through the symlink is."""
        write(self.source + "/b/x", "x")
        os.symlink("b", self.source + "/a")
        write(self.there + "/a/x", "old")
        reviewed = self.lab.base + "/reviewed"
        write(reviewed, self.lab.offsync("plan --delete --json", check=0).stdout)
        for _ in range(2):
            self.lab.offsync("apply --delete --plan", reviewed, check=0)
            self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_a_kept_plan_that_was_edited_is_none(self) -> None:
        write(self.source + "/f", b"ff")
        plan_id = self.lab.offsync("plan", check=0).out.split()[-1]
        with open(os.path.join(self.lab.state, "plans", plan_id), "a") as stream:
            stream.write("{}\n")
        self.assert_refused(self.lab.offsync("apply --plan", plan_id), 1, "was modified")

    def test_exit_code_and_identical_json(self) -> None:
        write(self.source + "/f")
        self.lab.offsync("plan", check=0)
        self.lab.offsync("plan --exit-code", check=3)
        one, two = (self.lab.offsync("plan --json", check=0).stdout for _ in range(2))
        self.assertEqual(one, two)
        policy, target, entry = map(json.loads, one.splitlines())
        self.assertEqual(
            sorted(policy), ["delete", "exclude", "overwrite", "source", "verify", "version"]
        )
        self.assertEqual(sorted(target), ["error", "host", "login", "port", "remote_path"])
        self.assertEqual(
            sorted(entry), ["changes", "kind", "login", "mode", "path", "sha256", "size", "type"]
        )
        applied = self.lab.offsync("apply --json", check=0).out
        self.assertEqual(
            [json.loads(line) for line in applied.splitlines()], self.lab.records()[-1:]
        )
        self.lab.offsync("plan --exit-code", check=0)

    def test_plans_are_kept_for_a_month(self) -> None:
        write(self.source + "/f")
        plans = self.lab.state + "/plans"
        shutil.rmtree(plans, ignore_errors=True)
        first = self.lab.offsync("plan", check=0).out.split()[-1]
        os.utime(os.path.join(plans, first), (1, 1))
        self.lab.offsync("plan", check=0)  # a repeat renews the date
        self.assertGreater(os.stat(os.path.join(plans, first)).st_mtime, 1)
        os.utime(os.path.join(plans, first), (1, 1))
        write(self.source + "/g")
        second = self.lab.offsync("plan", check=0).out.split()[-1]
        kept = os.listdir(plans)
        self.assertIn(second, kept)
        self.assertNotIn(first, kept)
        self.assertEqual(len(kept), 1)


class Manifests(OneTargetCase):
    def test_sha256sum_reads_it_and_the_target_agrees(self) -> None:
        for name in (b"plain", b"new\nline", b"back\\slash", b"\xff", b"d/ deep", b"cr\rx"):
            write(os.path.join(os.fsencode(self.source), name), name)
        write(self.source + "/.git/no")
        os.symlink("plain", self.source + "/link")
        done = self.lab.offsync("manifest", check=0)
        self.assertIn(hashlib.sha256(done.stdout).hexdigest(), done.err.replace(" ", ""))
        self.assertEqual(done.stdout.count(b"\n"), 6)
        write(self.lab.base + "/list", done.stdout)
        subprocess.run(
            ["sha256sum", "-c", "--quiet", "--strict", self.lab.base + "/list"],
            cwd=self.source,
            check=True,
        )
        self.lab.offsync("apply", check=0)
        self.assertEqual(self.lab.offsync("manifest", self.there, check=0).stdout, done.stdout)
        self.lab.offsync("manifest", self.there, "--check", self.lab.base + "/list", check=0)
        write(self.there + "/plain", "other")
        write(self.there + "/more", "other")
        os.unlink(self.there + "/d/ deep")
        differing = self.lab.offsync(
            "manifest", self.there, "--check", "-", input=done.stdout, check=3
        )
        self.assertEqual(
            [line[:10].strip() for line in differing.out.splitlines()],
            ["not here", "not listed", "modified"],
        )
        self.assert_refused(
            self.lab.offsync("manifest", self.there, "--check", "-", input=b"nonsense\n"), 2, ":1"
        )
        self.assert_refused(
            self.lab.offsync("manifest", self.there, "--check", ""), 2, "No such file"
        )
        self.assert_refused(
            self.lab.offsync("manifest", env={"OFFSYNC_HOME": self.lab.base + "/none"}),
            2,
            "does not exist",
        )


if __name__ == "__main__":
    unittest.main()
