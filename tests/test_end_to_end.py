"""The whole job on a real sshd and rrsync: init, link, target add, plan, apply, verify; and what
is said when parts are missing.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import unittest

from lab import OFFSYNC, USER, LabTestCase, mentions, offsync, read, require, risk, snapshot, write


class Job(LabTestCase):
    def test_from_nothing_to_a_verified_delivery(self) -> None:
        lab = self.lab
        key = lab.init()
        self.assertRegex(key, r"\Assh-ed25519 [A-Za-z0-9+/]+ offsync@\S+\Z")
        for name, mode in (("", 0o700), ("config.yaml", 0o600), ("id_ed25519", 0o600)):
            self.assertEqual(stat.S_IMODE(os.stat(os.path.join(lab.state, name)).st_mode), mode)
        target = lab.target("one")
        linked = lab.offsync(
            "link --path", target.path, *risk(), home=target.home, input=key.encode(), check=0
        )
        self.assertEqual(linked.out.count("\n"), 1)
        self.assertTrue(linked.out.startswith("offsync target add %s@" % USER), linked.out)
        self.assertEqual(
            read(target.keys),
            offsync.format_authorized_key(
                offsync.format_forced_command("/usr/bin/rrsync", target.path),
                offsync.PublicKey(*key.split(None, 2)),
            )
            + "\n",
        )
        lab.add(target)
        write(lab.source + "/sent mail", "1")
        write(lab.source + "/new\nline", "2")
        write(lab.source + "/a/b/deep", "3", 0o600)
        write(lab.source + "/\udcff\udcfe", "4")
        write(lab.source + "/.git/excluded", "5")
        os.mkdir(lab.source + "/empty")
        os.symlink("a/b", lab.source + "/link")
        planned = lab.offsync("plan", check=0)
        self.assertEqual(snapshot(target.path), {})
        for shown in ("  sent mail", '"new\\nline"', "empty", "link", '"\\377\\376"', "8 added"):
            self.assertIn(shown, planned.out)
        self.assertNotIn("excluded", planned.out)
        lab.offsync("apply", check=0)
        expected = {
            path: entry
            for path, entry in snapshot(lab.source).items()
            if not path.startswith(b".git")
        }
        self.assertEqual(snapshot(target.path), expected)
        self.assertEqual(lab.offsync("verify", check=0).out, "")
        record = lab.records()[0]
        self.assertEqual(
            (record["operation"], record["result"], record["host"], record["login"]),
            ("apply", "ok", target.address, target.login),
        )
        self.assertEqual(
            record["files_changed"],
            ["a", "a/b", "a/b/deep", "empty", "link", '"new\\nline"', "sent mail", '"\\377\\376"'],
        )
        self.assertEqual(
            (record["files_deleted"], record["source"], record["error"], record["plan"]),
            ([], lab.source, None, planned.out.split()[-1]),
        )
        self.assertTrue(record["operator"].startswith(USER))
        self.assertRegex(record["timestamp"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")
        os.chmod(lab.source + "/a/b/deep", 0o640)
        self.assertRegex(lab.offsync("plan", check=0).out, r"modified +mode 0640 +1 B +a/b/deep\n")
        lab.offsync("apply", check=0)
        self.assertEqual(stat.S_IMODE(os.stat(target.path + "/a/b/deep").st_mode), 0o640)
        self.assertEqual(lab.records()[1]["files_changed"], ["a/b/deep"])
        self.assertEqual(os.listdir(lab.tmp), [])

    def test_init_is_repeatable_and_changes_the_source(self) -> None:
        key = self.lab.init()
        config = read(self.lab.state + "/config.yaml")
        self.assertEqual(self.lab.offsync("init", check=0).out.strip(), key)
        self.assertEqual(read(self.lab.state + "/config.yaml"), config)
        other = self.lab.base + "/other"
        os.mkdir(other)
        self.lab.offsync("init --source other", check=0)
        self.assertEqual(
            read(self.lab.state + "/config.yaml"), config.replace(self.lab.source, other)
        )
        self.assert_refused(
            self.lab.offsync("init --source", other + "/none"), 1, "No such file or directory"
        )

    def test_init_under_any_umask_and_without_the_public_half(self) -> None:
        subprocess.run(
            ["sh", "-c", 'umask 0; exec python3 "$0" init', OFFSYNC],
            env=self.lab.env,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for name, mode in (("", 0o700), ("config.yaml", 0o600), ("id_ed25519", 0o600)):
            self.assertEqual(
                stat.S_IMODE(os.stat(os.path.join(self.lab.state, name)).st_mode), mode
            )
        public = read(self.lab.state + "/id_ed25519.pub").split()[:2]
        os.unlink(self.lab.state + "/id_ed25519.pub")
        self.assertEqual(self.lab.offsync("init", check=0).out.split()[:2], public)

    def test_many_targets_one_run(self) -> None:
        targets = [self.lab.linked_target("t%d" % number) for number in range(3)]
        write(self.lab.source + "/f", "content")
        done = self.lab.offsync("apply", targets[1].login, check=0)
        self.assertEqual([os.path.exists(t.path + "/f") for t in targets], [False, True, False])
        done = self.lab.offsync("apply --jobs 2", check=0)
        self.assertEqual(
            sorted(line.split(": ")[0] for line in done.out.splitlines()),
            ["3 targets", *sorted(t.login for t in targets)],
        )
        self.assertTrue(done.out.endswith("3 targets: 3 ok\n"))
        self.assertEqual([snapshot(t.path) for t in targets], [snapshot(self.lab.source)] * 3)
        document = json.loads(self.lab.offsync("target list --json", check=0).out)
        self.assertEqual(
            [t["login"] for t in document["targets"]], sorted(t.login for t in targets)
        )
        self.lab.offsync("target remove", targets[0].login, check=0)
        self.assertNotIn(targets[0].login, self.lab.offsync("target list", check=0).out)
        self.assert_refused(
            self.lab.offsync("target remove", targets[0].login), 2, targets[1].login
        )

    def test_thousands_of_files_arrive_identical(self) -> None:
        target = self.lab.linked_target("one")
        for number in range(6000):
            directory = "%s/%d" % (self.lab.source, number % 100)
            if number < 100:
                os.mkdir(directory)
            with open("%s/%d" % (directory, number), "w") as stream:
                stream.write("%d" % number)
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))


class Connections(LabTestCase):
    def authentications(self, target) -> int:
        return target.read_log().count("Accepted publickey")

    def test_one_connection_per_target_and_run(self) -> None:
        target = self.lab.linked_target("one")
        write(self.lab.source + "/f")
        before = self.authentications(target)
        self.lab.offsync("apply", check=0)
        self.assertEqual(self.authentications(target), before + 1)

    def test_no_pass_too_many(self) -> None:
        """What rsync is started for, as -v shows it; a pass that is tried again (rrsync's lock,
        lost words) counts once.
        """
        target = self.lab.configured_target("one")
        for name in ("d/f", "d/g"):
            write("%s/%s" % (self.lab.source, name), name)
        plan, quick, absent, path, send, compare = (
            "-n -rlptc",
            "-n -rlpt",
            "-n -lpt",
            "-n -r",
            "-ii -lptO",
            "-n -lptc",
        )
        for content, expected in (
            ("d/f", [[plan, absent, path, send, plan]]),
            ("d/f", [[plan]]),
            # Where the plan's pass was quick, one pass over the tree verifies; else a list, too.
            ("new", [[plan, path, send, plan], [plan, path, send, compare, quick]]),
        ):
            write(self.lab.source + "/d/f", content)
            started = re.findall(
                r"(?m)^\+ \S+/rsync -8 --info=flist1 ((?:-n|-ii) -\w+) ",
                self.lab.offsync("-v apply", check=0).err,
            )
            once = [
                kind
                for number, kind in enumerate(started)
                if started[number - 1 : number] != [kind]
            ]
            self.assertIn(once, expected)
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))

    def test_a_server_that_allows_one_session_at_a_time(self) -> None:
        target = self.lab.linked_target("one", "MaxSessions 1")
        write(self.lab.source + "/f")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))

    def test_nothing_is_left_running_or_lying_about(self) -> None:
        self.lab.linked_target("one")
        write(self.lab.source + "/f")
        self.lab.offsync("apply", check=0)
        self.assertEqual(mentions(self.lab.tmp), [])
        self.assertEqual(os.listdir(self.lab.tmp), [])


class Missing(LabTestCase):
    """One sentence with the next step, exit 1 or 2, no traceback."""

    def test_no_config(self) -> None:
        for command in ("plan", "apply", "verify"):
            self.assert_refused(self.lab.offsync(command), 2, "offsync init")
        self.assert_refused(self.lab.offsync("doctor"), 1, "holds no controller's state")

    def test_no_targets(self) -> None:
        self.lab.init()
        self.assert_refused(self.lab.offsync("plan"), 2, "there are none yet", "offsync link")

    def test_no_key_and_a_key_that_others_may_read(self) -> None:
        self.lab.linked_target("one")
        os.chmod(self.lab.state + "/id_ed25519", 0o640)
        self.assert_refused(self.lab.offsync("plan"), 1, "others may read it", "chmod 600")
        os.unlink(self.lab.state + "/id_ed25519")
        self.assert_refused(self.lab.offsync("plan"), 1, "id_ed25519", "offsync init")

    def test_no_such_host_and_nobody_listening(self) -> None:
        target = self.lab.linked_target("one")
        self.assert_refused(
            self.lab.offsync("target add u@no-such-host.invalid --path /x"), 1, "does not resolve"
        )
        target.stop()
        self.assertRegex(
            self.lab.offsync("plan", check=1).out, "not compared: .*connection was refused"
        )
        self.assert_refused(self.lab.offsync("plan"), 1, "1 of 1 target could not be compared")

    def test_a_wrong_key(self) -> None:
        target = self.lab.linked_target("one")
        os.unlink(target.keys)
        self.assertRegex(
            self.lab.offsync("plan", check=1).out,
            r"refused this controller's key(.*\n)+    hint: on the target, as %s, run:\n"
            "      offsync link --path" % USER,
        )

    def test_no_rrsync(self) -> None:
        target = self.lab.linked_target("one")
        line = read(target.keys)
        write(target.keys, line.replace("/usr/bin/rrsync", "/nowhere/rrsync"))
        self.assertRegex(
            self.lab.offsync("plan", check=1).out,
            r"rrsync, or its interpreter, is missing on the target, (.*\n)+"
            "      offsync install-deps --role target",
        )

    def test_an_unreadable_source(self) -> None:
        self.lab.linked_target("one")
        os.rmdir(self.lab.source)
        self.assert_refused(self.lab.offsync("plan"), 1, "No such file or directory", "--source")

    def test_no_ssh_and_no_rsync(self) -> None:
        self.lab.linked_target("one")
        empty = self.lab.base + "/nobin"
        os.mkdir(empty)
        for missing in ("rsync", "ssh"):
            for name in ("ssh", "ssh-keygen", "rsync"):
                if os.path.lexists(empty + "/" + name):
                    os.unlink(empty + "/" + name)
                if name != missing:
                    os.symlink(require(name), empty + "/" + name)
            self.assert_refused(
                self.lab.offsync("plan", env={"PATH": empty}), 1, missing, "install-deps"
            )
            self.assert_refused(
                self.lab.offsync("init", env={"PATH": empty}), 1, missing, "install-deps"
            )

    def test_wrong_usage(self) -> None:
        self.lab.init()
        for args in (
            ["nonsense"],
            ["plan", "--nonsense"],
            ["target"],
            ["apply", "--plan", "xyz"],
            ["plan", "--jobs", "0"],
            ["target", "add", "nohost", "--path", "/x"],
            ["target", "add", "u@h", "--path", "relative"],
            ["target", "add", "u@h"],
            ["target", "add", "u@h", "--path", "/x", "--port", "0"],
            ["target", "add", "u@h", "--path", "/x", "--host-key", "MD5:00"],
            ["plan", "nobody@nowhere"],
        ):
            with self.subTest(args=args):
                self.assert_refused(self.lab.offsync(*args), 2)
        self.assertEqual(self.lab.offsync().returncode, 2)


if __name__ == "__main__":
    unittest.main()
