"""Where one stands: the list of targets, the log, verify, killed runs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import unittest

from lab import Fleet, OFFSYNC, type_on_terminal, wait_for, write


class Status(Fleet):
    def test_what_the_list_says(self) -> None:
        write(self.source + "/f", "x")
        shutil.rmtree(self.lab.state + "/last", ignore_errors=True)
        if os.path.exists(self.lab.state + "/operations.log"):
            os.unlink(self.lab.state + "/operations.log")
        self.assertEqual(
            self.lab.offsync("target", "list", check=0).out.count("never delivered"), 3
        )
        self.targets[1].stop()
        self.lab.offsync("apply", check=1)
        self.targets[1].start()
        if os.path.exists(self.lab.state + "/operations.log"):
            os.unlink(self.lab.state + "/operations.log")  # rotated
        heading, *rows = self.lab.offsync("target", "list", check=0).out.splitlines()
        self.assertEqual(len(rows), 3)
        self.assertIn("the connection was refused", rows[1])
        column = heading.index("RESULT")
        self.assertEqual([row[column:].split()[0] for row in rows], ["ok", "failed", "ok"])
        self.assertIn(
            "The last apply was not ok for: %s (failed)" % self.targets[1].login,
            self.lab.offsync(check=2).err,
        )
        last = {
            t["login"]: t["last"]
            for t in json.loads(self.lab.offsync("target", "list", "--json", check=0).out)[
                "targets"
            ]
        }
        self.assertEqual(
            {login: record["result"] for login, record in last.items()},
            dict(zip([t.login for t in self.targets], ["ok", "failed", "ok"])),
        )
        self.assertEqual({record["source"] for record in last.values()}, {self.source})
        write(self.targets[0].path + "/mine", "x")
        self.lab.offsync("apply", check=1)
        self.assertEqual(self.lab.offsync("target", "list", check=0).out.count("  refused  "), 3)
        self.lab.offsync(
            "target", "remove", self.targets[2].address, check=0
        )  # a host that only one has
        self.assertFalse(os.path.exists(self.lab.state + "/last/" + self.targets[2].login))

    def test_an_inventory_file(self) -> None:
        names = self.lab.base + "/names"
        write(names, "# two of them\r\n\r\n%s\r\n127.0.0.2\n" % self.targets[0].login)
        out = self.lab.offsync("plan", "--summary", "@" + names, check=0).out
        self.assertEqual([t.login in out for t in self.targets], [True, True, False])
        for text, said in (
            ("", "names no target"),
            ("# only\n", "names no target"),
            ("--jobs\n", "is no pattern"),
            ("@other\n", "is no pattern"),
            ("nobody\n", "nothing matches"),
        ):
            write(names, text)
            self.assert_refused(self.lab.offsync("plan", "@" + names), 2, said)
        self.assert_refused(self.lab.offsync("plan", "@" + names + "x"), 2, "does not exist")

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
        self.assertEqual((out.count("  added"), "  ... and 200 more" in out), (1000, True))
        self.assertEqual(
            len(self.lab.offsync("verify", "--json", check=3).out.splitlines()), 1 + 3 + 3600
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
        self.assertIn("(did not finish)", self.lab.offsync(check=2).err)
        self.assertIn("started", self.lab.offsync("target", "list", check=0).out)
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
            "target",
            "add",
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
            "is configured already, and will be replaced: it was %s --path %s --port %d"
            % (target.login, target.path, target.port),
            done.err,
        )
        self.assertIn("Host alias", done.err)


if __name__ == "__main__":
    unittest.main()
