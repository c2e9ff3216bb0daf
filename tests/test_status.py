"""Where one stands: the list of targets, the log, verify, killed runs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import unittest

from lab import OFFSYNC, ThreeTargetsCase, read, type_on_terminal, wait_for, write


class Status(ThreeTargetsCase):
    def test_what_the_list_says(self) -> None:
        write(self.source + "/f", "x")
        shutil.rmtree(self.lab.state + "/last", ignore_errors=True)
        if os.path.exists(self.lab.state + "/operations.log"):
            os.unlink(self.lab.state + "/operations.log")
        self.assertEqual(self.lab.offsync("target list", check=0).out.count("never delivered"), 3)
        self.targets[1].stop()
        self.lab.offsync("apply", check=1)
        self.targets[1].start()
        if os.path.exists(self.lab.state + "/operations.log"):
            os.unlink(self.lab.state + "/operations.log")  # rotated
        heading, *rows = self.lab.offsync("target list", check=0).out.splitlines()
        self.assertEqual(len(rows), 3)
        self.assertIn("the connection was refused", rows[1])
        column = heading.index("RESULT")
        self.assertEqual([row[column:].split()[0] for row in rows], ["ok", "failed", "ok"])
        done = self.lab.offsync(check=2)  # without a command: the same, and what is next
        self.assertEqual(done.out.splitlines(), [heading, *rows])
        self.assertIn("\n    offsync plan\n", done.err)
        last = {
            t["login"]: t["last"]
            for t in json.loads(self.lab.offsync("target list --json", check=0).out)["targets"]
        }
        self.assertEqual(
            {login: record["result"] for login, record in last.items()},
            dict(zip([t.login for t in self.targets], ["ok", "failed", "ok"])),
        )
        self.assertEqual({record["source"] for record in last.values()}, {self.source})
        write(self.targets[0].path + "/mine", "x")
        before = self.lab.offsync("target list", check=0).out
        self.lab.offsync("apply", check=1)
        self.lab.offsync("apply --plan", "0" * 64, check=2)
        self.assertEqual([record["result"] for record in self.lab.records()[-6:]], ["refused"] * 6)
        self.assertEqual(self.lab.offsync("target list", check=0).out, before)
        self.lab.offsync(
            "target remove", self.targets[2].address, check=0
        )  # a host that only one has
        self.assertFalse(os.path.exists(self.lab.state + "/last/" + self.targets[2].login))

    def test_an_inventory_file(self) -> None:
        names = self.lab.base + "/names"
        write(names, "# two of them\r\n\r\n%s\r\n127.0.0.2\n" % self.targets[0].login)
        out = self.lab.offsync("plan --summary", "@" + names, check=0).out
        self.assertEqual([t.login in out for t in self.targets], [True, True, False])
        for text, said in (
            ("", "names no target"),
            ("# only\n", "names no target"),
            ("--jobs\n", "is no pattern"),
            ("@other\n", "is no pattern"),
            ("nobody\n", "no such target"),
        ):
            write(names, text)
            self.assert_refused(self.lab.offsync("plan", "@" + names), 2, said)
        self.assert_refused(self.lab.offsync("plan", "@" + names + "x"), 2, "does not exist")
        # A pipe can be read only once.
        piped = self.targets[0].login.encode()
        out = self.lab.offsync("apply", "@/dev/stdin", input=piped, check=0).out
        self.assertEqual([t.login in out for t in self.targets], [True, False, False])

    def test_verify_beside_an_apply_says_so_and_ends(self) -> None:
        write(self.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        with open(self.lab.state + "/lock", "r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            self.assert_refused(self.lab.offsync("verify"), 1, "offsync apply (process", "running")
        with open(self.lab.state + "/lock", "r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)  # another verify
            self.lab.offsync("verify", check=0)
            self.assert_refused(self.lab.offsync("apply"), 1, "offsync verify (process", "running")
        self.lab.offsync("verify", check=0)

    def test_verify_on_a_terminal_and_a_long_listing(self) -> None:
        write(self.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        env = {**self.lab.env, "TERM": "dumb"}
        self.assertEqual(
            type_on_terminal([sys.executable, OFFSYNC, "verify"], env),
            (0, "ok: equal to %s: 3 targets\r\n" % self.source),
        )
        self.assertEqual(self.lab.offsync("verify", check=0).out, "")
        for number in range(1200):
            write(self.source + "/n%d" % number)
        out = self.lab.offsync("verify", check=3).out
        self.assertEqual((out.count("  added"), "3 targets, each: 1200 added" in out), (1200, True))
        self.assertEqual(
            len(self.lab.offsync("verify --json", check=3).out.splitlines()), 1 + 3 + 3600
        )

    def test_interrupted_and_killed_runs(self) -> None:
        write(self.source + "/big", os.urandom(3 << 20))
        self.lab.configure(bwlimit="1000")
        process = self.lab.start("apply")
        wait_for(
            lambda: any(name.startswith(".big") for name in os.listdir(self.targets[0].path)),
            "the transfer",
        )
        process.kill()
        process.communicate()
        self.assertIn("started", self.lab.offsync("target list", check=0).out)
        self.lab.configure(bwlimit="0")
        done = self.lab.offsync("init", check=0)  # the next command with the lock logs it
        self.assertEqual(done.err.count("was killed"), 3)
        self.assertEqual(
            [(r["result"], r["files_changed"]) for r in self.lab.records()[-3:]],
            [("interrupted", None)] * 3,
        )
        wait_for(lambda: not os.listdir(self.lab.tmp), "the guard")
        self.lab.offsync("apply", check=0)

    def test_replacing_a_login_is_said_before(self) -> None:
        target = self.targets[0]
        done = self.lab.offsync(
            "target add",
            target.login,
            "--path",
            "/other",
            "--port",
            "1",
            "--host-key",
            "SHA256:" + "A" * 43,
            check=1,
        )
        self.assertIn(
            "is configured already; if the proofs succeed, this replaces %s --path %s --port %d"
            % (target.login, target.path, target.port),
            done.err,
        )
        self.assertIn("Host alias", done.err)


class OperationsLog(ThreeTargetsCase):
    """offsync log: when, to whom, what came of it, which plan, by whom."""

    def setUp(self) -> None:
        super().setUp()
        log = self.lab.state + "/operations.log"
        if os.path.exists(log):
            os.unlink(log)

    def log(self, *args, **more) -> list:
        return self.lab.offsync("log", *args, check=0, **more).out.splitlines()

    def test_what_reached_whom(self) -> None:
        write(self.source + "/app.conf", "1")
        write(self.source + "/d/new\nline.conf", "1")
        write(self.source + "/d/deep.txt", "1")
        one = self.targets[0].login
        self.lab.offsync("apply", one, check=0, env={"SUDO_USER": "anna"})
        self.lab.offsync("apply", check=0)
        write(self.source + "/other", "1")
        os.unlink(self.source + "/app.conf")
        self.lab.offsync("apply", one, "--delete", check=0)
        self.lab.offsync("apply", check=1)  # refused
        rows = self.log()
        records = self.lab.records()
        self.assertEqual(len(rows), 1 + len(records))
        for row, record in zip(rows[1:], records):
            for word in (
                record["timestamp"][:10],
                record["login"],
                record["result"],
                record["plan"][:12],
                record["operator"],
            ):
                self.assertIn(word, row)
        self.assertIn("(sudo by anna)", rows[1])
        found = self.log(one, "--name", "app.conf")
        self.assertEqual(
            [row.split("  ")[-1].strip() for row in found[1:]],
            ["changed app.conf", "deleted app.conf"],
        )
        self.assertEqual(len(self.log("--name", "app.conf")), 1 + 4)
        # A name that is quoted is matched as the log has it.
        for pattern, count in (
            ("*.conf", 4),
            ('"d/*', 3),
            ("*new*line.conf*", 3),
            ("deep.*", 3),
            ("nothing", 0),
        ):
            self.assertEqual(len(self.log("--name", pattern)[1:]), count, pattern)
        lines = self.log(one, "--json")
        self.assertEqual(
            [json.loads(line) for line in lines],
            [record for record in records if record["login"] == one],
        )
        done = self.lab.offsync("log", check=0)
        self.assertIn("the log begins at %s" % records[0]["timestamp"][:10], done.err)
        log = self.lab.state + "/operations.log"
        write(log, read(log) + json.dumps({**records[0], "login": " "}) + "\n")
        self.assert_refused(self.lab.offsync("log nobody"), 2, "no such target")

    def test_a_rotated_and_a_half_written_log(self) -> None:
        log = self.lab.state + "/operations.log"
        self.assertIn("no apply has run yet", self.lab.offsync("log", check=0).err)
        unknown = {
            "timestamp": "2026-01-01T00:00:00Z",
            "operator": "root",
            "login": self.targets[0].login,
            "host": "h",
            "source": "/s",
            "result": "ok",
            "files_changed": None,
            "files_deleted": None,
        }
        known = {**unknown, "login": "u@old.example", "files_changed": ["f"]}
        other = {**unknown, "files_changed": [7]}
        records = [json.dumps(record) for record in (known, unknown, other)]
        write(log, '{"torn": \n[]\n7\n%s\n{"timestamp": "2026-' % "\n".join(records))
        self.assertEqual(len(self.log()), 3)
        self.assertEqual([row.split()[1] for row in self.log("--name", "f")[1:]], ["u@old.example"])
        self.assertIn(
            "what 1 run changed is unknown", self.lab.offsync("log --name f", check=0).err
        )


class ResumedRuns(ThreeTargetsCase):
    """One host is down, another has a stray file: the rest goes on."""

    def test_except(self) -> None:
        write(self.source + "/f", "x")
        logins = [target.login for target in self.targets]
        write(self.targets[1].path + "/stray", "mine")
        done = self.lab.offsync("apply", check=1)
        words = done.err.split("leave that target out:\n    ")[1].split("\n")[0]
        self.assertEqual(words, "offsync apply --except " + logins[1])
        self.assertIn("stray", done.err)
        # Without that target, the reviewed plan holds: it is not dropped from the command.
        reviewed = self.lab.offsync("plan", check=0).out.split()[-1]
        done = self.lab.offsync("apply --plan", reviewed, check=1)
        self.assertIn("apply --except %s --plan %s\n" % (logins[1], reviewed), done.err)
        done = self.lab.offsync(*words.split()[1:], check=0)
        self.assertIn("2 targets: 2 ok", done.out)
        self.assertEqual([os.path.exists(t.path + "/f") for t in self.targets], [True, False, True])
        names = self.lab.base + "/names"
        write(names, "127.0.0.1\t# the first\n%s\n" % logins[1])
        out = self.lab.offsync("plan --summary --except", "@" + names, check=0).out
        self.assertEqual([login in out for login in logins], [False, False, True])
        for args, said in (
            (["--except", "nobody"], "no such target"),
            (["--except", "127.*"], "excludes every target"),
            (["--except", "@" + names, logins[0]], "excludes every target"),
        ):
            self.assert_refused(self.lab.offsync("verify", *args), 2, said)

    def test_one_that_was_offline_when_the_plan_was_reviewed(self) -> None:
        write(self.source + "/f", "x")
        self.targets[2].stop()
        reviewed = self.lab.base + "/plan.jsonl"
        write(reviewed, self.lab.offsync("plan --json", check=1).stdout)
        self.targets[2].start()
        done = self.lab.offsync("apply --plan", reviewed, check=1)
        self.assertIn(
            "%s: this target is not covered by the reviewed plan" % self.targets[2].login, done.err
        )
        self.assertIn("3 targets: 2 ok, 1 failed", done.out)
        self.assertEqual([os.path.exists(t.path + "/f") for t in self.targets], [True, True, False])
        done = self.lab.offsync("apply", self.targets[2].login, "--plan", reviewed)
        self.assert_refused(done, 1, "is not the reviewed plan", "covers none of these targets")

    def test_equal_failures_are_said_once_with_their_targets(self) -> None:
        write(self.source + "/f", "x")
        for target in self.targets[:2]:
            target.stop()
            self.addCleanup(target.start)
        done = self.lab.offsync("apply", check=1)
        self.assertLessEqual(done.err.count("the connection was refused"), 2)
        self.assertIn("3 targets: 1 ok, 2 failed", done.out)
        for target in self.targets[:2]:
            self.assertIn(target.login, done.err)

    def test_leftovers_are_named(self) -> None:
        write(self.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        write(self.targets[1].path + "/.~tmp~/shell.php", "hidden")
        for command in (["plan"], ["verify"], ["verify", "--json"]):
            done = self.lab.offsync(*command, check=0)
            self.assertIn("leftover", done.out)
            self.assertIn(".~tmp~/shell.php", done.out)
            self.assertIn(self.targets[1].login, done.out)
        self.lab.offsync("apply --delete", check=0)
        self.assertEqual(self.lab.offsync("verify", check=0).out, "")


class Doctor(ThreeTargetsCase):
    def test_targets_and_a_count(self) -> None:
        done = self.lab.offsync("doctor", check=0)
        self.assertTrue(done.out.endswith("3 targets: 3 ok\n"), done.out)
        self.targets[0].stop()
        self.addCleanup(self.targets[0].start)
        done = self.lab.offsync("doctor", check=1)
        self.assertIn("3 targets: 2 ok\n", done.out)
        self.assertIn("PROBLEM", done.out)
        self.lab.offsync("doctor", self.targets[1].login, check=0)


if __name__ == "__main__":
    unittest.main()
