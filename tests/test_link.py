"""The target side: what link accepts and refuses, what it writes, unlink, and where rrsync is
found.
"""

from __future__ import annotations

import gzip
import os
import pwd
import shutil
import stat
import subprocess
import sys
import unittest
from unittest import mock

from lab import (
    OFFSYNC,
    Lab,
    LabTestCase,
    can_mount,
    login_shell,
    offsync,
    read,
    require,
    risk,
    snapshot,
    type_on_terminal,
    write,
)


class LinkCase(LabTestCase):
    """A key of the controller, and a target's home: link() runs link there."""

    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.init()
        self.target_home = self.lab.base + "/target"
        os.mkdir(self.target_home)
        self.keys = self.target_home + "/.ssh/authorized_keys"
        self.path = self.lab.base + "/data"

    def link(self, *args, path=None, **more):
        more.setdefault("home", self.target_home)
        return self.lab.offsync(
            "link --path", path or self.path, "--key", self.key, *risk(), *args, **more
        )


class Linking(LinkCase):
    def test_idempotent_and_replaced_by_another_path_or_comment(self) -> None:
        first = self.link(check=0)
        before = os.stat(self.keys)
        self.assertIn("already linked", self.link(check=0).err)
        self.assertEqual(os.stat(self.keys).st_ino, before.st_ino)
        other = self.lab.base + "/other"
        self.key = self.key.rsplit(" ", 1)[0] + " somebody else"
        # It says what it replaces.
        self.assertIn("could write below " + self.path, self.link(path=other, check=0).err)
        self.assertEqual(read(self.keys).count("\n"), 1)
        self.assertIn("-wo %s'\"" % other, read(self.keys))
        self.assertIn("somebody else", read(self.keys))
        self.assertRegex(
            first.out,
            r"\Aoffsync target add \S+@\S+ --path %s( --host-key SHA256:\S{43})*\n\Z" % self.path,
        )

    def test_modes_and_symlink_of_authorized_keys_stay(self) -> None:
        self.link(check=0)
        self.assertEqual(stat.S_IMODE(os.stat(self.keys).st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(self.target_home + "/.ssh").st_mode), 0o700)
        os.unlink(self.keys)
        real = self.lab.base + "/elsewhere_keys"
        write(real, b"# mine \xff\r\n", 0o640)
        os.symlink(real, self.keys)
        self.link(check=0)
        self.assertTrue(os.path.islink(self.keys))
        self.assertEqual(stat.S_IMODE(os.stat(real).st_mode), 0o640)
        with open(real, "rb") as stream:
            self.assertTrue(stream.read().startswith(b"# mine \xff\r\n"))
        # No temporary neighbour is left.
        self.assertEqual([name for name in os.listdir(self.lab.base) if name[0] == "."], [])

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_the_owner_of_authorized_keys_stays(self) -> None:
        write(self.keys, "")
        os.chown(self.keys, 65534, 65534)
        self.link(check=0)
        self.assertEqual((os.stat(self.keys).st_uid, os.stat(self.keys).st_gid), (65534, 65534))

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_a_file_whose_group_is_not_the_accounts(self) -> None:
        """As root leaves it with "chown deploy": the account may not set that group again."""
        place = self.lab.base + "/of-nobody"
        os.mkdir(place)
        write(place + "/keys", "old", 0o640)
        for path in (place, place + "/keys"):
            os.chown(path, 65534, 0)
        pid = os.fork()
        if not pid:
            os.setgid(65534)
            os.setgroups([])
            os.setuid(65534)
            offsync.write_atomically(place + "/keys", [b"new"], 0o640)
            os._exit(0)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        self.assertEqual(read(place + "/keys"), "new")
        self.assertEqual(os.stat(place + "/keys").st_uid, 65534)

    def test_existing_directory_keeps_its_mode_and_a_new_one_is_made(self) -> None:
        os.mkdir(self.path)
        os.chmod(self.path, 0o711)
        self.link(check=0)
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o711)
        self.link(path=self.path + "/a/b", check=0)
        self.assertTrue(os.path.isdir(self.path + "/a/b"))

    def test_the_default_path_is_below_home(self) -> None:
        self.lab.offsync("link --key", self.key, *risk(), home=self.target_home, check=0)
        self.assertIn("-wo %s/.offsync/sync'\"" % self.target_home, read(self.keys))
        self.assertTrue(os.path.isdir(self.target_home + "/.offsync/sync"))

    @unittest.skipIf(os.geteuid() == 0, "root may create it anywhere")
    def test_a_path_that_only_root_may_create(self) -> None:
        self.assert_refused(self.link(path="/srv/offsync-test/x"), 1, "cannot be created")
        self.assertFalse(os.path.exists(self.keys))

    def test_paths_that_would_be_a_shell(self) -> None:
        os.makedirs(self.target_home + "/.ssh/sub")
        os.symlink(self.target_home, self.lab.base + "/alias")
        copy = self.lab.base + "/tool/offsync.py"
        write(copy, read(OFFSYNC))
        controller = self.lab.base + "/state"
        os.makedirs(controller + "/in")
        for path in (
            "",
            "/",
            "//",
            "/etc",
            "/etc/cron.d/x",
            "/etc/cron.weekly",
            "/etc/rc2.d",
            "/etc/udev/rules.d",
            "/usr/local/lib/python3/dist-packages",
            self.target_home + "/.local/share/systemd/user",
            "/usr",
            pwd.getpwuid(os.geteuid()).pw_dir + "/.ssh/x",
            "/var/spool",
            "/usr/lib/python3",
            self.target_home + "/.local/bin",
            self.target_home + "/.config",
            "/usr/bin",
            "/proc/self",
            "/dev/shm",
            self.target_home,
            self.target_home + "/.ssh",
            self.target_home + "/.ssh/sub",
            self.lab.base,
            self.lab.base + "/alias",
            self.lab.base + "/alias/.ssh",
            self.target_home + "/x/../.ssh",
            self.lab.base + "/tool",
            controller,
            "relative",
            "/a\nb",
            "/a\x1b",
        ):
            with self.subTest(path=path):
                self.assert_refused(
                    self.lab.offsync(
                        "link --path",
                        path,
                        "--key",
                        self.key,
                        home=self.target_home,
                        program=copy,
                        env={"OFFSYNC_HOME": controller},
                    ),
                    2,
                )
                self.assertFalse(os.path.exists(self.keys))
        self.assertFalse(os.path.exists(self.target_home + "/x"))
        write(self.lab.base + "/file", "")
        self.assert_refused(self.link(path=self.lab.base + "/file"), 2, "not a directory")
        self.link(path=self.target_home + "/inside", check=0)  # the legitimate twin: below home

    def test_a_foreign_line_with_the_key_is_refused_by_number(self) -> None:
        text = "# one\n\n%s\n" % self.key
        write(self.keys, text, 0o600)
        self.assert_refused(self.link(), 1, self.keys + ":3", "if it may go, remove it")
        self.assert_refused(
            self.lab.offsync("unlink --key", self.key, home=self.target_home), 1, ":3"
        )
        self.assertEqual(read(self.keys), text)
        self.assertFalse(os.path.exists(self.path))
        # What the hint says to type takes away that line alone, however often it is typed.
        command = self.link().err.split("try again:\n    ")[1]
        for _ in range(2):
            subprocess.run(["sh", "-c", command], check=True)
            self.assertEqual(read(self.keys), "# one\n\n")
        self.link(check=0)
        # sshd skips these characters within a key, and lets it in.
        kind, blob = self.key.split()[:2]
        for odd in "\v\f\r":
            write(self.keys, "%s %s%s%s\n" % (kind, blob[:20], odd, blob[20:]), 0o600)
            self.assert_refused(self.link(), 1, self.keys + ":1")

    def test_what_unlink_lists_can_be_typed(self) -> None:
        """A line in authorized_keys may hold anything, also what a shell would run."""
        self.link(check=0)
        blob = self.key.split()[1]
        write(self.keys, read(self.keys).replace(blob, "AA';touch${IFS}%s/pwned;'\x1b" % self.path))
        done = self.lab.offsync("unlink", home=self.target_home, check=0, input=b"")
        self.assertNotIn("\x1b", done.out)
        command = done.out.split("\n    offsync unlink ")[1]
        subprocess.run(["sh", "-c", "true " + command], check=True)
        self.assertEqual(os.listdir(self.path), [])

    def test_what_is_no_regular_file_is_left_alone(self) -> None:
        os.makedirs(os.path.dirname(self.keys))
        os.mkfifo(self.keys)
        self.assert_refused(self.link(), 1, "no regular file")
        self.assertTrue(stat.S_ISFIFO(os.stat(self.keys).st_mode))

    def test_unlink_touches_no_other_line(self) -> None:
        others = "# a\nssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOther x\n\n"
        write(self.keys, others, 0o600)
        self.link(check=0)
        self.assertNotEqual(read(self.keys), others)
        self.lab.offsync("unlink --key", self.key, home=self.target_home, check=0)
        self.assertEqual(read(self.keys), others)
        done = self.lab.offsync("unlink --key", self.key, home=self.target_home, check=0)
        self.assertIn("no entry", done.err)

    def test_keys_that_are_refused(self) -> None:
        strong = self.lab.base + "/strong"
        subprocess.run(
            [require("ssh-keygen"), "-q", "-t", "rsa", "-b", "3072", "-N", "", "-f", strong],
            check=True,
        )
        blob = self.key.split()[1]
        for key in (
            "",
            "nonsense",
            self.key + "\n" + self.key,
            "ssh-dss AAAAB3NzaC1kc3MAAACBAJ x",
            "ssh-ed25519 " + blob[:-8],
            "ssh-rsa " + blob,
            'command="id" ' + self.key,
            read(self.lab.state + "/id_ed25519"),
            self.key + "\x1b[31m",
            self.key.rsplit(" ", 1)[0] + " " * 20_000 + "\nx",
        ):
            with self.subTest(key=key[:40]):
                self.assert_refused(
                    self.lab.offsync("link --path", self.path, "--key", key, home=self.target_home),
                    2,
                    "key",
                )
                self.assertFalse(os.path.exists(self.keys))
        self.assert_refused(
            self.lab.offsync("link --key-file", self.lab.base + "/none", home=self.target_home),
            2,
            "does not exist",
        )
        self.lab.offsync(
            "link --path",
            self.path,
            "--key-file",
            strong + ".pub",
            *risk(),
            home=self.target_home,
            check=0,
        )

    def test_from_pattern(self) -> None:
        self.link("--from", "10.0.0.*,!bad.example", check=0)
        self.assertTrue(read(self.keys).startswith('from="10.0.0.*,!bad.example",command='))
        for pattern in ("", 'a"b', "a b", "a\nb"):
            self.assert_refused(self.link("--from", pattern), 2, "from")

    def test_without_key_and_terminal_there_is_no_hang(self) -> None:
        self.assert_refused(
            self.lab.offsync("link --path", self.path, home=self.target_home), 1, "--key-file"
        )

    def test_the_key_is_asked_for_on_the_terminal(self) -> None:
        """As curl ... | python3 - does: the program is on stdin, the question goes to /dev/tty."""
        env = dict(self.lab.env, HOME=self.target_home)
        status, seen = type_on_terminal(
            [sys.executable, "-", "link", "--path", self.path, *risk()],
            env,
            (b"Paste", self.key + "\n"),
            stdin=OFFSYNC,
        )
        self.assertEqual(status, 0, seen)
        self.assertIn(self.key.split()[1], read(self.keys))

    def test_piped_into_python_the_current_directory_is_no_program(self) -> None:
        os.makedirs(self.path)
        env = dict(self.lab.env, HOME=self.target_home, SSH_CONNECTION="a b c d")
        done = subprocess.run(
            [sys.executable, "-", "link", "--path", self.path, "--key", self.key, *risk()],
            input=read(OFFSYNC),
            cwd=self.path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(
            done.stdout,
            r"\Aoffsync target add \S+ --path %s( --port \d+)?( --host-key \S+)*\n\Z" % self.path,
        )

    def test_where_only_stdin_leads_to_the_terminal(self) -> None:
        """As under su -c: the session has no terminal of its own."""
        env = dict(self.lab.env, HOME=self.target_home)
        status, seen = type_on_terminal(
            [
                require("setsid"),
                "-w",
                sys.executable,
                OFFSYNC,
                "link",
                "--path",
                self.path,
                *risk(),
            ],
            env,
            (b"Paste", self.key + "\n"),
        )
        self.assertEqual(status, 0, seen)
        self.assertIn(self.key.split()[1], read(self.keys))

    def test_a_changed_line_is_never_already_linked(self) -> None:
        self.assertIn("linked for", self.link("--from", "10.0.0.1").err)
        self.assertIn("already linked for", self.link("--from", "10.0.0.1").err)
        # Without --from the key must not come from more places than before.
        said = self.link(check=0).err
        self.assertIn('kept from="10.0.0.1"', said)
        self.assertTrue(read(self.keys).startswith('from="10.0.0.1",command='))
        said = self.link("--from", "10.0.0.2").err
        self.assertNotIn("already", said)
        # Only the place where it comes from is another.
        self.assertNotIn("could write below", said)
        self.assertEqual(read(self.keys).count("from="), 1)
        self.path += "2"
        self.link(check=0)
        self.path = self.path[:-1]
        said = self.link(check=0).err
        self.assertNotIn("already", said)
        self.assertIn("data2", said)

    def test_warnings_name_what_makes_sshd_ignore_the_key(self) -> None:
        os.chmod(self.target_home, 0o777)
        done = self.link(check=0)
        self.assertIn("StrictModes", done.err)
        self.assertIn("run link as the account itself", done.err)
        os.chmod(self.target_home, 0o755)
        self.assertNotIn("StrictModes", self.link(check=0).err)

    def test_a_user_without_an_account(self) -> None:
        """As in a container that runs with any number for a user."""
        args = offsync.build_parser().parse_args(["link", "--path", self.path, "--key", self.key])
        with (
            mock.patch.dict(os.environ, self.lab.env),
            mock.patch.object(pwd, "getpwuid", side_effect=KeyError),
            self.assertRaisesRegex(offsync.OffsyncError, "has no account on this host"),
        ):
            offsync.cmd_link(args)
        self.assertFalse(os.path.exists(self.path))


class Rrsync(LinkCase):
    """Where rrsync is found, and what can be done with it."""

    def test_not_executable_is_refused_with_the_command_that_makes_it_so(self) -> None:
        script = self.lab.base + "/doc/rrsync"
        write(script, read(require("rrsync")), 0o644)
        done = self.link("--rrsync", script)
        self.assert_refused(done, 1, "not executable", "install -m 755 %s /usr/local/bin" % script)
        self.assertFalse(os.path.exists(self.keys))
        os.chmod(script, 0o755)
        self.link("--rrsync", script, check=0)

    def test_gzipped_absent_and_odd(self) -> None:
        packed = self.lab.base + "/rrsync.gz"
        with gzip.open(packed, "wb") as stream:
            stream.write(b"#!/usr/bin/perl\n")
        self.assert_refused(self.link("--rrsync", packed), 1, "gunzip -c")
        self.assert_refused(self.link("--rrsync", self.lab.base + "/none"), 2, "does not exist")
        write(self.lab.base + "/odd", "#!/usr/bin/tclsh\n", 0o644)
        self.assert_refused(self.link("--rrsync", self.lab.base + "/odd"), 2, "not executable")
        self.assertFalse(os.path.exists(self.keys))

    def test_the_first_that_can_be_started_is_found(self) -> None:
        """What the hint for a compressed one has made is found by the next link."""
        base = self.lab.base
        write(base + "/plain", "", 0o644)
        write(base + "/packed.gz", "", 0o755)
        write(base + "/ready", "", 0o755)
        places = [base + "/none", base + "/plain", base + "/packed.gz"]
        with (
            mock.patch.object(offsync, "RRSYNC_PLACES", places),
            self.assertRaisesRegex(offsync.OffsyncError, base + "/plain: not executable"),
        ):
            offsync.find_rrsync(None)
        with mock.patch.object(offsync, "RRSYNC_PLACES", [*places, base + "/ready"]):
            self.assertEqual(offsync.find_rrsync(None), base + "/ready")

    def test_no_other_file_is_made_executable(self) -> None:
        """A mistyped path must not lead to a command that publishes a secret."""
        secret = self.lab.base + "/secret"
        write(secret, "x", 0o600)
        done = self.link("--rrsync", secret)
        self.assert_refused(done, 2, "not executable")
        self.assertNotIn("install -m", done.err)

    def test_one_whose_path_has_a_blank(self) -> None:
        """Its line is known again: link replaces it, and unlink removes it."""
        script = self.lab.base + "/my tools/rrsync"
        write(script, read(require("rrsync")), 0o755)
        self.link("--rrsync", script, check=0)
        self.assertIn("already linked", self.link("--rrsync", script, check=0).err)
        self.lab.offsync("unlink --key", self.key, home=self.target_home, check=0)
        self.assertEqual(read(self.keys), "")

    def test_a_path_that_contains_rrsync(self) -> None:
        script = self.lab.base + "/tools/bin/rrsync"
        write(script, read(require("rrsync")), 0o755)
        self.assert_refused(
            self.link("--rrsync", script, path=self.lab.base + "/tools"),
            2,
            "contains, or lies in, " + script,
        )


class Quoting(unittest.TestCase):
    """Odd paths are delivered into through a real sshd."""

    def test_delivery_into_paths_that_need_quotes(self) -> None:
        lab = Lab()
        self.addCleanup(lab.close)
        lab.init()
        write(lab.source + "/f", "content")
        target = lab.target("t")
        base = target.path
        for name in (
            "with space",
            "$HOME `id`; *",
            "-n",
            "\u00e9 per%cent a!b",
            "(x)<y>|{z}[w]?#~&",
        ):
            with self.subTest(name=name):
                target.path = "%s/%s" % (base, name)
                lab.link(target)
                lab.add(target)
                lab.offsync("apply", check=0)
                self.assertEqual(snapshot(target.path), snapshot(lab.source))

    def test_what_login_shells_read_in_different_ways_is_refused(self) -> None:
        for path in ("/srv/it's", "/srv/back\\slash", '/srv/q"'):
            with self.assertRaisesRegex(offsync.UsageError, "a quote or a backslash"):
                offsync.validate_link_path(path, (), True)


class Provisioning(LabTestCase):
    def test_as_the_last_step_of_an_image_where_no_sshd_runs(self) -> None:
        """No terminal, no sshd process to be seen, an account of its own home: warnings at most."""
        self.lab.init()
        home = self.lab.base + "/image"
        os.mkdir(home)
        done = self.lab.offsync(
            "link --path",
            self.lab.base + "/data",
            "--key-file",
            self.lab.state + "/id_ed25519.pub",
            *risk(),
            home=home,
            check=0,
        )
        self.assertIn(self.lab.base + "/data", read(home + "/.ssh/authorized_keys"))
        self.assertTrue(
            done.out.startswith("offsync target add %s@" % pwd.getpwuid(os.geteuid()).pw_name)
        )


class KeyThief(LabTestCase):
    """link proves rrsync before it installs the key."""

    LEAKY = (
        '#!/bin/sh\n[ "$1" = -wo ] || exit 1\nshift\ncd "$1" || exit 1\n[ -L x ] && echo out > x/f'
        " && exit 0\ncase $SSH_ORIGINAL_COMMAND in rsync\\ --server*) exec $SSH_ORIGINAL_COMMAND;;"
        " esac\nexit 1\n"
    )

    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.init()
        self.home = self.lab.base + "/target"
        os.mkdir(self.home)
        self.keys = self.home + "/.ssh/authorized_keys"
        self.rrsync = self.lab.base + "/tool/rrsync"

    def link(self, *args, **more):
        return self.lab.offsync(
            "link --path", self.lab.base + "/data", "--key", self.key, *args, home=self.home, **more
        )

    def assert_nothing_left(self) -> None:
        self.assertFalse(os.path.exists(self.keys))
        self.assertFalse(os.path.exists(self.lab.base + "/data"))
        self.assertEqual(os.listdir(self.lab.tmp), [])

    def test_one_that_lets_the_key_out(self) -> None:
        write(self.rrsync, self.LEAKY, 0o755)
        done = self.link("--rrsync", self.rrsync)
        self.assert_refused(
            done,
            1,
            "does not confine the key",
            "login shell",
            "update rsync",
            "--no-symlinks",
            "--accept-risk rrsync",
        )
        self.assertLess(done.err.index("update rsync"), done.err.index("--no-symlinks"))
        self.assert_nothing_left()
        write(
            self.rrsync, self.LEAKY.replace("shift\n", 'shift; [ "$1" = -munge ] && shift\n'), 0o755
        )
        done = self.link(
            "--rrsync", self.rrsync, "--no-symlinks"
        )  # it takes the option, and does nothing with it
        self.assert_refused(done, 1, "does not confine the key", "--accept-risk rrsync")
        self.assertNotIn("link without them", done.err)
        self.assert_nothing_left()
        done = self.link("--rrsync", self.rrsync, "--accept-risk", "rrsync", check=0)
        self.assertIn("a thief of the key may write outside", done.err)
        self.assertTrue(os.path.exists(self.keys))

    def test_ones_that_do_not_work(self) -> None:
        for text, said in (
            ("#!/nowhere/perl\n", "interpreter"),
            ('#!/bin/sh\necho "Usage: no -wo here" >&2; exit 1\n', "no -wo here"),
            (
                "#!/bin/sh\necho 'option --server has been disabled on this server.' >&2\nexit 1\n",
                "same release",
            ),
        ):
            write(self.rrsync, text, 0o755)
            self.assert_refused(
                self.link("--rrsync", self.rrsync), 1, "does not work on this host", said
            )
            self.assert_nothing_left()

    def test_it_reads_no_file_through_a_basis_directory(self) -> None:
        """A symlink is planted below the path, and a file outside compared with a guess.

        With the plain line the answer tells whether the guess was right, so that in the end all is
        read; with the guard nothing is answered, in every login shell.
        """
        secret, planted = self.lab.base + "/secret", self.lab.base + "/planted"
        write(secret + "/key", "the secret", 0o600)
        os.makedirs(planted + "/base")
        os.symlink(secret, planted + "/base/x")
        target = self.lab.target("one")
        self.home, self.keys = target.home, target.keys
        ssh = "ssh -F /dev/null -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        ssh += " -o LogLevel=ERROR -p %d -i %s/id_ed25519" % (target.port, self.lab.state)

        def push(tree: str, *options: str) -> subprocess.CompletedProcess:
            argv = ["rsync", "-rlci", "-e", ssh, *options, tree + "/", target.login + ":."]
            return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        def guess(option: str) -> list:
            """Return what rsync says of a right guess and of a wrong one."""
            said = []
            for text in ("the secret", "the socket"):
                write(self.lab.base + "/guess/x/key", text)
                said.append(push(self.lab.base + "/guess", "-n", option + "base"))
            return said

        options = ("--compare-dest=", "--copy-dest=", "--link-dest=")
        plain = 'command="/usr/bin/rrsync -wo %s/data",%s %s\n'
        plain %= (self.lab.base, offsync.KEY_RESTRICTIONS, self.key)
        os.mkdir(self.lab.base + "/data")
        write(self.keys, plain)
        self.assertEqual(push(planted).returncode, 0)
        for option in options:
            right, wrong = guess(option)
            self.assertNotIn("<f", right.stdout)
            self.assertIn("<f", wrong.stdout)
        done = self.link(*risk(), check=0)
        self.assertIn("replaced a line without today's guard", done.err)
        self.assertEqual(read(self.keys).count("\n"), 1)
        # A directory of such a name is delivered as any other.
        write(self.lab.base + "/honest/my-dest/f", "x")
        shells = ["dash", "bash", "zsh", "fish", "tcsh"] if can_mount() else [""]
        for shell in filter(shutil.which, shells) if can_mount() else shells:
            with self.subTest(shell=shell):
                target.stop()
                target.namespace = login_shell(shutil.which(shell)) if shell else ""
                target.start()
                for option in options:
                    for said in guess(option):
                        self.assertIn("basis directories are refused", said.stderr)
                        self.assertEqual(said.stdout, "")
                self.assertEqual(push(self.lab.base + "/honest").returncode, 0)

    def test_it_reads_no_file_as_a_fuzzy_basis(self) -> None:
        """A directory is planted as a symlink, and a file sent into it whose name is like that of a
        file in it: rsync sends a checksum for each byte of that file, and then refuses to write.
        """
        write(self.lab.base + "/secret/id_secret", "s3cret", 0o600)
        os.mkdir(self.lab.base + "/planted")
        os.symlink(self.lab.base + "/secret", self.lab.base + "/planted/d")
        write(self.lab.base + "/guess/d/id_secreu", b"\0" * 300)
        target = self.lab.target("one")
        self.home, self.keys = target.home, target.keys
        ssh = "ssh -F /dev/null -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        ssh += " -o LogLevel=ERROR -p %d -i %s/id_ed25519" % (target.port, self.lab.state)

        def push(*words: str) -> str:
            done = subprocess.run(
                ["rsync", "-e", ssh, *words, target.login + ":."],
                cwd=self.lab.base + "/guess",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            return done.stdout

        read_it = "-R --no-W --no-implied-dirs --block-size=1 --debug=deltasum3".split()
        os.mkdir(self.lab.base + "/data")
        basis_only = offsync.FORCED_GUARD.split("set -f")[0] + "exec /usr/bin/rrsync -wo "
        command = "/bin/sh -c '%s%s/data'" % (basis_only, self.lab.base)
        write(self.keys, 'command="%s",%s %s\n' % (command, offsync.KEY_RESTRICTIONS, self.key))
        push("-rl", self.lab.base + "/planted/")
        # The threat is real with the basis directories refused alone.
        self.assertIn("chunk[5]", push("-y", *read_it, "./d/id_secreu"))
        self.link(*risk(), check=0)
        for fuzzy in ("-y", "-yy", "--fuzzy", "-rlpy", "-tyI"):
            said = push(fuzzy, *read_it, "./d/id_secreu")
            self.assertIn("offsync: fuzzy and backup directories are refused", said)
            self.assertNotIn("chunk[", said)
        # As a value of another option, a dot ends nothing; and rrsync knows more blanks than sh.
        for words in (
            "--suffix . -ylogDtpre.iLsfxCIvu . .",
            "--backup-dir . --fuzzy -lte.LsfxC . .",
            "-lte.LsfxC\v-y . .",
            "-lte.LsfxC\u00a0-y . .",
            "-lte.LsfxC\u2003--fuzzy . .",
            "--existing\x1c-y\x1c.\x1c.",
            "x\r-y . .",
            # In place, a backup that was swapped for a symlink is a basis, too.
            "-vlrIe.iLsfxCIvu -B1 --inplace -b --backup-dir=zz . .",
            "-vlrIe.iLsfxCIvu --inplace -b --backup-dir zz . .",
        ):
            with self.subTest(words=words):
                argv = [*ssh.split(), target.login, "rsync --server " + words]
                done = subprocess.run(
                    argv, input=b"", stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
                self.assertRegex(done.stderr, b"offsync: .* are refused")
                self.assertEqual((done.returncode, done.stdout), (1, b""))
        push("-rlt", "--delay-updates", self.lab.base + "/guess/")
        # The twins: other options with that letter, and a directory with it.
        subprocess.run(
            ["rsync", "-rlt", "--modify-window=1", "--delete-delay", "-e", ssh]
            + [self.lab.base + "/guess/d", target.login + ":my-day"],
            check=True,
        )
        self.assertTrue(os.path.exists(self.lab.base + "/data/my-day/d/id_secreu"))

    def test_the_plain_line_goes_on_working_and_is_recognised(self) -> None:
        """As the reference wrote it, without restrict, or as README had it."""
        target = self.lab.target("one")
        self.home, self.keys = target.home, target.keys
        os.mkdir(self.lab.base + "/data")
        for final in ("", ",restrict"):
            plain = 'command="/usr/bin/rrsync -wo %s/data",no-port-forwarding,no-agent-forwarding,'
            plain += "no-X11-forwarding,no-pty%s %s\n"
            write(self.keys, plain % (self.lab.base, final, self.key))
            target.path = self.lab.base + "/data"
            self.lab.add(target)
            write(self.lab.source + "/f", "x" + final)
            self.lab.offsync("apply", check=0)
            self.assertEqual(snapshot(target.path), snapshot(self.lab.source))
            unlinked = self.lab.offsync("unlink --key", self.key, home=self.home, check=0)
            self.assertIn("goes on until it ends", unlinked.err)
            self.assertEqual(read(self.keys), "")
            write(self.keys, plain % (self.lab.base, final, self.key))
            linked = self.link(*risk(), check=0)
            self.assertIn("replaced a line without today's guard", linked.err)
            self.assertNotIn("could write below", linked.err)
            self.assertEqual(
                (read(self.keys).count("-wo"), read(self.keys).count("backup directories")), (1, 1)
            )
            foreign = "command=\"/bin/sh -c 'id; true -wo x'\",%s %s\n"
            write(self.keys, foreign % (offsync.KEY_RESTRICTIONS, self.key))
            self.assert_refused(self.link(*risk()), 1, "a line that offsync did not write")
            write(self.keys, plain % (self.lab.base, final, self.key))
            self.link(*risk(), check=0)
            again = self.link(*risk(), check=0).err
            self.assertNotIn("replaced", again)

    def test_no_symlinks_with_an_rrsync_that_knows_none_of_it(self) -> None:
        write(self.rrsync, "#!/bin/sh\necho 'unknown option' >&2\nexit 1\n", 0o755)
        done = self.link("--rrsync", self.rrsync, "--no-symlinks")
        self.assert_refused(done, 1, "does not work on this host", "3.2.4 for --no-symlinks")

    def test_no_symlinks(self) -> None:
        target = self.lab.target("one")
        linked = self.lab.offsync(
            "link --path",
            target.path,
            "--key",
            self.key,
            "--no-symlinks",
            home=target.home,
            check=0,
        )
        self.assertIn("rrsync -wo -munge %s'\"" % target.path, read(target.keys))
        self.assertIn(" --no-symlinks", linked.out)
        self.lab.add(target, "--no-symlinks")
        self.assertIn("symlinks: false", read(self.lab.state + "/config.yaml"))
        write(self.lab.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))
        os.symlink("f", self.lab.source + "/l")
        self.assertIn("was added with --no-symlinks", self.lab.offsync("apply", check=1).err)
        self.assertEqual(sorted(os.listdir(target.path)), ["f"])
        self.lab.configure(exclude=["l"])
        self.lab.offsync("plan", check=0)
        again = self.lab.offsync(
            "link --path",
            target.path,
            "--key",
            self.key,
            "--no-symlinks",
            home=target.home,
            check=0,
        )
        self.assertIn("already linked", again.err)
        # What undoes it is the command that was typed before.
        other = self.lab.base + "/other"
        moved = self.lab.offsync(
            "link --path", other, "--key", self.key, "--no-symlinks", home=target.home, check=0
        )
        undo = "offsync link --path %s --key '%s' --no-symlinks" % (
            target.path,
            " ".join(self.key.split()[:2]),
        )
        self.assertIn(undo, moved.err)
        self.lab.offsync("unlink --key", self.key, home=target.home, check=0)
        self.assertEqual(read(target.keys), "")


class Paths(LabTestCase):
    """What link refuses, with the option that waives it, and the legitimate twins."""

    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.init()
        self.home = self.lab.base + "/target"
        os.mkdir(self.home)

    def link(self, path: str, *args, **more):
        return self.lab.offsync(
            "link --path", path, "--key", self.key, *risk(), *args, home=self.home, **more
        )

    def test_a_directory_of_everybody(self) -> None:
        """As /tmp is. No hint takes away what others need."""
        place = self.lab.base + "/like-tmp"
        os.mkdir(place)
        os.chmod(place, 0o1777)
        done = self.link(place)
        self.assert_refused(done, 2, "sticky bit", "--accept-risk path")
        accepted = self.link(place, "--accept-risk", "path", check=0)
        self.assertNotIn("chmod", done.err + accepted.err)

    def test_rules_that_a_user_may_waive(self) -> None:
        cases = [
            "/etc/nginx",
            "/usr/share/nginx/html",
            "/var/spool/cron",
            "/var/lib/dpkg/info",
            "/run/x",
            "/var/lib/docker/x",
            self.home + "/.config/app",
            self.home + "/a/.b/c",
        ]
        for path in cases:
            with self.subTest(path=path):
                self.assert_refused(
                    self.link(path), 2, "--accept-risk path", "such as /srv/app-data"
                )
                real = offsync.validate_link_path(path, (), True)
                self.assertEqual(real, os.path.realpath(path))
        self.assert_refused(
            self.link(self.home + "/a/.b/c", "--accept-risk", "rrsync"), 2, "--accept-risk path"
        )
        self.link(self.home + "/a/.b/c", "--accept-risk", "path", check=0)
        self.link(self.home + "/fine/deep", check=0)
        with self.assertRaises(offsync.UsageError):
            offsync.validate_link_path("/", (), True)
        with self.assertRaises(offsync.UsageError):
            offsync.validate_link_path(os.path.expanduser("~/.ssh/x"), (), True)

    def test_a_directory_of_path(self) -> None:
        self.assert_refused(self.link(self.lab.bin), 2, "directory of $PATH", "--accept-risk path")

    def test_parents_that_others_may_write_to(self) -> None:
        for mode, refused in ((0o777, True), (0o1777, False), (0o755, False), (0o775, True)):
            with self.subTest(mode=oct(mode)):
                shutil.rmtree(self.lab.base + "/parent", ignore_errors=True)
                os.makedirs(self.lab.base + "/parent/data")
                os.chmod(self.lab.base + "/parent", mode)
                done = self.link(self.lab.base + "/parent/data")
                if refused:
                    self.assert_refused(
                        done,
                        2,
                        "others could put another directory in its place",
                        "--accept-risk path",
                    )
                else:
                    self.assertEqual(done.returncode, 0, done.err)
        os.chmod(
            self.lab.base + "/parent", 0o1777
        )  # sticky, but the next one is not there yet: anybody may make it
        shutil.rmtree(self.lab.base + "/parent/data")
        self.assert_refused(self.link(self.lab.base + "/parent/data"), 2, "everybody may write")
        os.mkdir(self.lab.base + "/open", 0o755)
        os.chmod(self.lab.base + "/open", 0o777)
        self.assertIn(
            "so others than the key can change", self.link(self.lab.base + "/open", check=0).err
        )  # itself: a warning

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_what_belongs_to_another_account(self) -> None:
        os.makedirs(self.lab.base + "/parent/data")
        os.chown(self.lab.base + "/parent", 65534, 65534)
        self.assert_refused(
            self.link(self.lab.base + "/parent/data"), 2, "belongs to nobody", "--accept-risk path"
        )
        os.chown(self.lab.base + "/parent", 0, 65534)
        os.chmod(self.lab.base + "/parent", 0o775)  # a group in which somebody is
        self.assert_refused(self.link(self.lab.base + "/parent/data"), 2, "its group may write")
        os.chown(self.home, 65534, 65534)
        self.assert_refused(
            self.link(self.lab.base + "/fine"), 1, "HOME", "belongs to nobody", "sudo -iu root"
        )
        self.assertEqual(os.listdir(self.home), [])

    def test_what_is_created_under_any_umask(self) -> None:
        for umask in ("0", "077", "002"):
            with self.subTest(umask=umask):
                base = self.lab.base + "/made" + umask
                os.mkdir(base, 0o755)
                subprocess.run(
                    [
                        "sh",
                        "-c",
                        'umask %s; exec "$@"' % umask,
                        "sh",
                        sys.executable,
                        OFFSYNC,
                        "link",
                        "--path",
                        base + "/a/b/c",
                        "--key",
                        self.key,
                        *risk(),
                    ],
                    env=dict(self.lab.env, HOME=self.home),
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                self.assertEqual(
                    [
                        stat.S_IMODE(os.stat(base + path).st_mode)
                        for path in ("/a", "/a/b", "/a/b/c")
                    ],
                    [0o755] * 3,
                )

    def test_directories_that_two_threads_make_at_once(self) -> None:
        made = [self.lab.base + "/real/%d/x" % number for number in range(20)]
        threads = offsync.ThreadPool(4)
        list(threads.imap_unordered(lambda path: offsync.make_directory(path, 0o700), made * 4))
        threads.close()
        self.assertEqual({stat.S_IMODE(os.stat(path).st_mode) for path in made}, {0o700})
        self.assertEqual(stat.S_IMODE(os.stat(self.lab.base + "/real").st_mode), 0o755)


class SshdSays(LabTestCase):
    """What sshd -T tells decides what link warns of; a stand-in prints it."""

    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.init()
        self.home = self.lab.base + "/target"
        os.mkdir(self.home)

    def link(self, path: str, *settings: str, args: tuple = ()):
        """Run link where sshd -T prints these settings ("" for none: it fails)."""
        text = "\n".join(settings)
        self.lab.program(
            "sshd", "#!/bin/sh\n[ -n '%s' ] || exit 1\ncat <<'E'\n%s\nE\n" % (text, text)
        )
        return self.lab.offsync(
            "link --path", path, "--key", self.key, *risk(), *args, home=self.home
        )

    def test_ordinary_places_are_accepted_and_others_are_not(self) -> None:
        for path in ("/srv/app-data", "/var/lib/app", "/opt/app/data", "/var/www/html"):
            self.assertEqual(offsync.validate_link_path(path, (), False), path)
        for path in ("/opt/cni/bin", "/var/lib/extensions/x", "/var/lib/confexts"):
            with self.assertRaises(offsync.UsageError) as caught:
                offsync.validate_link_path(path, (), False)
            self.assertTrue(caught.exception.hints[-1][1].endswith("--accept-risk path"))

    def test_a_directory_that_looks_like_a_home(self) -> None:
        """A thief of the key can make .ssh, and must not keep its owner from linking again."""
        data = self.lab.base + "/data"
        os.makedirs(data + "/.ssh")
        self.assert_refused(self.link(data, "port 22"), 2, "an entry .ssh", "--accept-risk path")
        done = self.link(data, "port 22", args=("--accept-risk", "path"))
        self.assertEqual(done.returncode, 0, done.err)

    def test_what_lets_the_key_out_of_its_restriction(self) -> None:
        """A variable that names code, or a tunnel device; and what is harmless."""
        data = self.lab.base + "/data"
        for setting, warned in (
            ("acceptenv *", True),
            ("acceptenv LANG\nacceptenv PYTHON*", True),
            ("acceptenv LANG LD_LIBRARY_PATH", True),
            ("acceptenv BASH_ENV", True),
            ("acceptenv PERL5*", True),
            ("acceptenv ?ATH", True),
            ("acceptenv OPENSSL_CONF", True),
            ("acceptenv XDG_DATA_*", True),
            ("acceptenv BASH_FUNC_*", True),
            ("acceptenv *%%", True),
            ("acceptenv LANG\nacceptenv LC_*", False),
            ("acceptenv COLORTERM LC_* TZ", False),
            ("permittunnel yes", True),
            ("permittunnel point-to-point", True),
            ("permittunnel no", False),
        ):
            with self.subTest(setting=setting):
                done = self.link(data, "port 22\n" + setting)
                self.assertEqual(done.returncode, 0, done.err)
                word = "AcceptEnv" if "acceptenv" in setting else "PermitTunnel"
                self.assertEqual(word in done.err, warned, done.err)

    def test_it_says_for_which_account(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        done = self.link(self.lab.base + "/data", "port 22")
        self.assertIn("linked for %s, in " % user, done.err)

    def test_accounts_that_no_controller_can_name(self) -> None:
        """target add and ssh refuse such logins; link refuses before it links anything."""
        account = pwd.getpwuid(os.geteuid())
        args = ["link", "--path", self.lab.base + "/data", "--key", self.key]
        for name in ("domain svc", "j.o'brien", "a;b", "-x"):
            other = pwd.struct_passwd((name, *account[1:]))
            with (
                self.subTest(name=name),
                # Where the guard is taken out, it must not link in the real home.
                mock.patch.dict(os.environ, self.lab.env),
                mock.patch.object(pwd, "getpwuid", return_value=other),
                self.assertRaisesRegex(offsync.OffsyncError, "no login of that name"),
            ):
                offsync.cmd_link(offsync.build_parser().parse_args(args))
            self.assertFalse(os.path.exists(self.lab.base + "/data"))

    def test_a_web_root_that_is_written_by_its_group(self) -> None:
        """The remedy for others' access must not take away the key's own."""
        data = self.lab.base + "/web"
        os.mkdir(data)
        os.chmod(data, 0o2775)
        self.assertIn("chmod go-w", self.link(data, "port 22").err)
        if os.geteuid() == 0:
            os.chown(data, 65534, 0)
            refused = self.link(data, "port 22")
            self.assert_refused(
                refused, 2, "belongs to nobody", "sudo -iu nobody", "--accept-risk path"
            )
            err = self.link(data, "port 22", args=("--accept-risk", "path")).err
            self.assertIn("belongs to nobody", err)
            self.assertIn("so others than the key can change what is delivered", err)
            self.assertNotIn("chmod", err)

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_scratch_is_nobody_elses(self) -> None:
        theirs = self.lab.base + "/theirs"
        os.mkdir(theirs)
        os.chown(theirs, 65534, 65534)
        os.chmod(theirs, 0o777)
        done = self.lab.offsync(
            "-v link --path",
            self.lab.base + "/data",
            "--key",
            self.key,
            *risk(),
            home=self.home,
            env={"TMPDIR": theirs},
            check=0,
        )
        self.assertNotIn(theirs + "/", done.err)
        self.assertEqual(os.listdir(theirs), [])


class Neighbour(KeyThief):
    """An rrsync that stops one way out and not its neighbour, as a copy that an update left."""

    def test_a_backup_through_a_symlink(self) -> None:
        write(
            self.rrsync,
            '#!/bin/sh\n[ "$1" = -wo ] || exit 1\nshift\ncd "$1" || exit 1\n'
            "case $SSH_ORIGINAL_COMMAND in *--no-implied-dirs*) exit 1;;\n"
            "*--backup-dir*) mv file x/file; exit 0;; esac\nexec $SSH_ORIGINAL_COMMAND\n",
            0o755,
        )
        done = self.link("--rrsync", self.rrsync)
        self.assert_refused(done, 1, "does not confine the key", "--accept-risk rrsync")
        self.assert_nothing_left()


for name in list(vars(KeyThief)):
    if name.startswith("test_"):
        setattr(Neighbour, name, None)


if __name__ == "__main__":
    unittest.main()
