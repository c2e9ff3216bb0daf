"""Day two: one approval for many steps, a guard against mass deletion, rollback, status, many targets."""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import unittest

from lab import OFFSYNC, Lab, descendants, read, read_plan, snapshot, type_on_terminal, wait_for, write
from test_job import LabCase
from test_plan import SharedLab


class Fleet(LabCase):
    """Three targets in a laboratory of the class."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.lab = Lab()
        cls.addClassCleanup(cls.lab.close)
        cls.targets = [cls.lab.joined_by_hand("t%d" % number) for number in range(3)]
        cls.config = read(cls.lab.state + "/config.yaml")

    def setUp(self) -> None:
        write(self.lab.state + "/config.yaml", self.config)
        for path in (self.lab.source, *(target.path for target in self.targets)):
            shutil.rmtree(path)
            os.mkdir(path)
        self.source = self.lab.source

    def review(self, *args) -> str:
        """Return a file with the plan of now."""
        path = self.lab.base + "/plan.jsonl"
        write(path, self.lab.offsync("plan", "--json", *args, check=0).stdout)
        return path

    def refused(self, reviewed: str, *words: str, args=()) -> None:
        before = [snapshot(target.path) for target in self.targets]
        self.assert_refused(self.lab.offsync("apply", *args, "--plan", reviewed), 1, "does not approve", *words)
        self.assertEqual([snapshot(target.path) for target in self.targets], before)


class Approval(Fleet):
    def test_one_host_first_then_the_rest_then_again(self) -> None:
        write(self.source + "/f", "x")
        reviewed = self.review()
        self.lab.offsync("apply", self.targets[0].login, "--plan", reviewed, check=0)
        self.assertEqual([os.path.exists(t.path + "/f") for t in self.targets], [True, False, False])
        self.targets[2].stop()
        done = self.lab.offsync("apply", "--plan", reviewed, check=1)       # one cannot be reached: it fails alone
        self.assertIn("3 targets: 2 ok, 1 failed", done.out)
        self.targets[2].start()
        self.lab.offsync("apply", "--plan", reviewed, check=0)
        self.assertEqual([snapshot(t.path) for t in self.targets], [snapshot(self.source)] * 3)
        plan = read_plan(open(reviewed, "rb").read())["plan"]
        self.assertEqual({record["plan"] for record in self.lab.records()[-7:]}, {plan})

    def test_what_a_review_does_not_approve(self) -> None:
        write(self.source + "/f", "x")
        write(self.source + "/g", "g")
        reviewed = self.review()
        lines = read(reviewed).splitlines(True)
        write(self.targets[0].path + "/extra", "x")
        self.refused(reviewed, "extra is now missing", args=["--delete", "--source", self.source])
        os.unlink(self.targets[0].path + "/extra")
        self.refused(reviewed, "the policy is now", args=["--delete"])
        with open(self.source + "/g", "a") as stream:
            stream.write("more")
        self.refused(reviewed, "g is now added")
        write(self.source + "/g", "g")
        os.chmod(self.source + "/g", 0o600)
        self.refused(reviewed, "g is now added")
        os.chmod(self.source + "/g", 0o644)
        for name, kept in (("an entry less", [line for line in lines if '"path": "g"' not in line or self.targets[1].login not in line]),
                           ("a target less", [line for line in lines if self.targets[2].login not in line]),
                           ("no policy", lines[1:])):
            with self.subTest(name=name):
                write(self.lab.base + "/edited", "".join(kept))
                self.refused(self.lab.base + "/edited")
        other = json.loads(lines[-1])
        for change in ({"path": "../up"}, {"path": "/etc/passwd"}, {"login": "x@y"}, {"sha256": "00" * 32}, {"type": "directory"}, {"link": "x", "type": "symlink"}):
            with self.subTest(change=change):          # what it has besides must be in the source
                write(self.lab.base + "/edited", "".join(lines) + json.dumps({**other, **change}, sort_keys=True) + "\n")
                done = self.lab.offsync("apply", "--plan", self.lab.base + "/edited")
                self.assertEqual(done.returncode, 0 if "login" in change else 2 if "path" in change else 1, done.err)

    def test_what_a_line_shows_is_what_it_approves(self) -> None:
        """A name that is another one in base64, a key that stands there twice, an entry with an error."""
        write(self.source + "/f", "x")
        write(self.targets[0].path + "/gone", "x")
        text = self.lab.offsync("plan", "--json", "--delete", check=0).out
        self.assertIn('"path": "gone"', text)
        for forged in (text.replace('"path": "gone"', '"path": "harmless", "path_b64": "Z29uZQ=="'), text.replace('"path": "gone"', '"path": "harmless", "path": "gone"'),
                       text.replace('"kind": "missing"', '"error": "nothing approved", "kind": "missing"')):
            plan = self.lab.base + "/forged.jsonl"
            write(plan, forged)
            self.assert_refused(self.lab.offsync("apply", "--delete", "--plan", plan), 2, "no line of a plan")
            self.assertTrue(os.path.exists(self.targets[0].path + "/gone"))
        write(plan, text)
        self.lab.offsync("apply", "--delete", "--plan", plan, check=0)
        self.assertFalse(os.path.exists(self.targets[0].path + "/gone"))

    def test_leftovers_are_not_compared(self) -> None:
        write(self.source + "/f", "x")
        reviewed = self.review()
        write(self.targets[0].path + "/.~tmp~/f", "")
        self.lab.offsync("apply", "--plan", reviewed, check=0)
        write(self.targets[1].path + "/.f.aB3xY9", "")
        self.lab.offsync("apply", "--plan", reviewed, check=0)

    def test_a_leftover_that_was_not_reviewed_is_not_deleted(self) -> None:
        write(self.source + "/f", "x")
        write(self.targets[0].path + "/.~tmp~/f", "listed")
        reviewed = self.review("--delete")
        write(self.targets[1].path + "/.f.backup", "somebody's")
        self.lab.offsync("apply", "--delete", "--plan", reviewed, check=0)
        self.assertEqual(read(self.targets[1].path + "/.f.backup"), "somebody's")
        self.assertFalse(os.path.exists(self.targets[0].path + "/.~tmp~"))

    def test_a_plan_from_a_pipe_and_one_that_is_too_deep(self) -> None:
        write(self.source + "/f", "x")
        reviewed = self.review()
        done = subprocess.run(["bash", "-c", "%s %s apply --plan <(cat %s)" % (sys.executable, OFFSYNC, reviewed)], env=self.lab.env, stdin=subprocess.DEVNULL, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 0, done.stderr)
        write(self.lab.base + "/deep", "[" * 100_000 + "\n")
        self.assert_refused(self.lab.offsync("apply", "--plan", self.lab.base + "/deep"), 2, "no line of a plan")
        write(self.lab.state + "/last/" + self.targets[0].login, "[" * 100_000)
        self.lab.offsync("target", "list", check=0)

    def test_random_sequences_apply_nothing_that_was_not_approved(self) -> None:
        """Plans, partial applies, edits, kills and repeats under one approval, against an oracle."""
        rng = random.Random(int(os.environ.get("SEED", "1")))
        for sequence in range(int(os.environ.get("SEQUENCES", "3"))):
            with self.subTest(sequence=sequence):
                self.setUp()
                for number in range(6):
                    write(self.source + "/d%d/f%d" % (number % 2, number), str(rng.random()))
                    for target in self.targets:
                        if rng.random() < 0.5:
                            write(target.path + "/d%d/f%d" % (number % 2, number), "old")
                if rng.random() < 0.5:
                    write(rng.choice(self.targets).path + "/gone", "x")
                reviewed = self.review("--delete")
                approved = snapshot(self.source)
                before = [snapshot(target.path) for target in self.targets]
                for _ in range(4):
                    act = rng.random()
                    if act < 0.3:
                        write(self.source + "/d0/f%d" % rng.choice([0, 2, 4, 9]), str(rng.random()))
                    elif act < 0.5:             # back to what was approved
                        shutil.rmtree(self.source)
                        os.mkdir(self.source)
                        self.lab.offsync("plan", check=0)
                    process = self.lab.start("apply", *rng.choice([[], [self.targets[0].login], [t.login for t in self.targets[1:]]]), "--plan", reviewed, "--delete")
                    if rng.random() < 0.4:
                        try:
                            process.communicate(timeout=rng.uniform(0.1, 1.2))
                        except subprocess.TimeoutExpired:
                            victims = [process.pid, *descendants(process.pid)]
                            try:
                                os.kill(rng.choice(victims), rng.choice([signal.SIGKILL, signal.SIGINT]))
                            except ProcessLookupError:
                                pass
                    process.communicate(timeout=120)
                    for target, old in zip(self.targets, before):
                        for path, entry in snapshot(target.path).items():
                            if b".~tmp~" not in path and not os.path.basename(path).startswith(b"."):
                                self.assertIn(entry, (old.get(path), approved.get(path)), path)


class Deleting(SharedLab):
    def fill(self, here: int, there: int) -> None:
        for number in range(here):
            write(self.source + "/here%d" % number, "x")
        for number in range(there):
            write(self.there + "/there%d" % number, "x")

    def test_a_run_that_leaves_less_than_half_is_refused(self) -> None:
        self.fill(1, 0)
        self.lab.offsync("apply", check=0)
        os.mkdir(self.source + "/lost+found")           # as an unmounted disk looks
        os.unlink(self.source + "/here0")
        self.fill(0, 30)
        before = snapshot(self.there)
        self.assert_refused(self.lab.offsync("apply", "--delete"), 1, "nothing was sent", "from 31 to 1 entries", "max_delete", "apply --plan", "mounted")
        self.assertEqual(snapshot(self.there), before)
        plan = self.lab.offsync("plan", "--delete", check=0).out.split()[-1]
        self.lab.offsync("apply", "--delete", "--plan", plan, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_the_boundaries(self) -> None:
        for here, there, percent, fine in ((10, 9, 0, True), (10, 10, 50, True), (9, 10, 50, False), (8, 9, 50, True), (19, 20, 50, False), (20, 20, 50, True), (1, 40, 99, True), (50, 10, 0, False), (50, 10, 17, True)):
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
        self.assert_refused(self.lab.offsync("apply", "--delete", "--plan", plan), 1, "an empty source never deletes")
        shutil.rmtree(self.there)
        write(self.there + "/.~tmp~/x", "only leftovers")
        self.assert_refused(self.lab.offsync("apply", "--delete"), 1, "an empty source never deletes")
        self.lab.offsync("plan", "--exit-code", check=0)        # they are no difference

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
        self.assertEqual((record["source"], record["files_changed"], record["files_deleted"]), (old, ["here0"], ["again", "here1"]))
        self.assert_refused(self.lab.offsync("plan", "--source", old + "/none"), 1, "not a readable directory")


class Status(Fleet):
    def test_what_the_list_says(self) -> None:
        write(self.source + "/f", "x")
        shutil.rmtree(self.lab.state + "/last", ignore_errors=True)
        self.assertEqual(self.lab.offsync("target", "list", check=0).out.count("never delivered"), 3)
        self.targets[1].stop()
        self.lab.offsync("apply", check=1)
        self.targets[1].start()
        if os.path.exists(self.lab.state + "/operations.log"):
            os.unlink(self.lab.state + "/operations.log")       # rotated
        rows = self.lab.offsync("target", "list", check=0).out.splitlines()
        self.assertIn("the connection was refused", rows[1])
        self.assertEqual([row.split("  ")[2].strip() if "  " in row else row for row in rows], ["ok", "failed", "ok"])
        self.assertIn("The last apply was not ok for: %s (failed)" % self.targets[1].login, self.lab.offsync(check=2).err)
        last = {t["login"]: t["last"] for t in json.loads(self.lab.offsync("target", "list", "--json", check=0).out)["targets"]}
        self.assertEqual({login: record["result"] for login, record in last.items()}, dict(zip([t.login for t in self.targets], ["ok", "failed", "ok"])))
        self.assertEqual({record["source"] for record in last.values()}, {self.source})
        write(self.targets[0].path + "/mine", "x")
        self.lab.offsync("apply", check=1)
        self.assertEqual(self.lab.offsync("target", "list", check=0).out.count("refused"), 3)
        self.lab.offsync("target", "remove", self.targets[2].address, check=0)     # a host that only one has
        self.assertFalse(os.path.exists(self.lab.state + "/last/" + self.targets[2].login))

    def test_an_inventory_file(self) -> None:
        names = self.lab.base + "/names"
        write(names, "# two of them\r\n\r\n%s\r\n127.0.0.2\n" % self.targets[0].login)
        out = self.lab.offsync("plan", "--summary", "@" + names, check=0).out
        self.assertEqual([t.login in out for t in self.targets], [True, True, False])
        for text, said in (("", "names no target"), ("# only\n", "names no target"), ("--jobs\n", "is no pattern"), ("@other\n", "is no pattern"), ("nobody\n", "nothing matches")):
            write(names, text)
            self.assert_refused(self.lab.offsync("plan", "@" + names), 2, said)
        self.assert_refused(self.lab.offsync("plan", "@" + names + "x"), 2, "does not exist")

    def test_verify_waits_for_an_apply(self) -> None:
        import fcntl
        write(self.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        with open(self.lab.state + "/lock", "r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            process = self.lab.start("verify")
            first = process.stderr.readline()
            self.assertIn(b"waiting for offsync apply", first)
            self.assertIsNone(process.poll())
        self.assertEqual(process.wait(60), 0)
        process.stdout.close()
        process.stderr.close()

    def test_verify_on_a_terminal_and_a_long_listing(self) -> None:
        write(self.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        env = {**self.lab.env, "TERM": "dumb"}
        self.assertEqual(type_on_terminal([sys.executable, OFFSYNC, "verify"], env), (0, "ok: equal to %s: 3 targets\r\n" % self.source))
        self.assertEqual(self.lab.offsync("verify", check=0).out, "")
        for number in range(1200):
            write(self.source + "/n%d" % number)
        out = self.lab.offsync("verify", check=3).out
        self.assertEqual((out.count("  added"), "  ... and 200 more" in out), (1000, True))
        self.assertEqual(len(self.lab.offsync("verify", "--json", check=3).out.splitlines()), 1 + 3 + 3600)

    def test_interrupted_and_killed_runs(self) -> None:
        write(self.source + "/big", os.urandom(3 << 20))
        self.lab.configure(bwlimit="1000")
        process = self.lab.start("apply")
        wait_for(lambda: any(name.startswith(".big") for name in os.listdir(self.targets[0].path)), "the transfer")
        process.kill()
        process.communicate()
        self.assertIn("(did not finish)", self.lab.offsync(check=2).err)
        self.assertIn("started", self.lab.offsync("target", "list", check=0).out)
        self.lab.configure(bwlimit="0")
        done = self.lab.offsync("init", check=0)            # the next command with the lock logs it
        self.assertEqual(done.err.count("was killed"), 3)
        self.assertEqual([(r["result"], r["files_changed"]) for r in self.lab.records()[-3:]], [("interrupted", None)] * 3)
        wait_for(lambda: not os.listdir(self.lab.tmp), "the guard")
        self.lab.offsync("apply", check=0)

    def test_replacing_a_login_is_said_before(self) -> None:
        target = self.targets[0]
        done = self.lab.offsync("target", "add", target.login, "--path", "/other", "--port", "1", "--host-key", "SHA256:" + "A" * 43, check=1)
        self.assertIn("is configured already, and will be replaced: it was %s --path %s --port %d" % (target.login, target.path, target.port), done.err)
        self.assertIn("Host alias", done.err)


if __name__ == "__main__":
    unittest.main()
