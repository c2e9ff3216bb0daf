"""People who mean ill: a thief of the key, a user beside you, a writer of the source, a hostile target, a man in the middle."""
from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import unittest

from lab import OFFSYNC, Lab, read, require, risk, snapshot, write
from test_exact import Standing
from test_job import LabCase
from test_text import offsync


class KeyThief(LabCase):
    """link proves rrsync before it installs the key."""

    LEAKY = '#!/bin/sh\n[ "$1" = -wo ] || exit 1\nshift\ncd "$1" || exit 1\n[ -L x ] && echo out > x/f && exit 0\ncase $SSH_ORIGINAL_COMMAND in rsync\\ --server*) exec $SSH_ORIGINAL_COMMAND;; esac\nexit 1\n'

    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.init()
        self.home = self.lab.base + "/target"
        os.mkdir(self.home)
        self.keys = self.home + "/.ssh/authorized_keys"
        self.rrsync = self.lab.base + "/tool/rrsync"

    def link(self, *args, **more):
        return self.lab.offsync("link", "--path", self.lab.base + "/data", "--key", self.key, *args, home=self.home, **more)

    def assert_nothing_left(self) -> None:
        self.assertFalse(os.path.exists(self.keys))
        self.assertFalse(os.path.exists(self.lab.base + "/data"))
        self.assertEqual(os.listdir(self.lab.tmp), [])

    def test_one_that_lets_the_key_out(self) -> None:
        write(self.rrsync, self.LEAKY, 0o755)
        done = self.link("--rrsync", self.rrsync)
        self.assert_refused(done, 1, "lets the key out", "login shell", "update rsync", "--no-symlinks", "--accept-risk rrsync")
        self.assertLess(done.err.index("update rsync"), done.err.index("--no-symlinks"))
        self.assert_nothing_left()
        write(self.rrsync, self.LEAKY.replace("shift\n", 'shift; [ "$1" = -munge ] && shift\n'), 0o755)
        done = self.link("--rrsync", self.rrsync, "--no-symlinks")      # it takes the option, and does nothing with it
        self.assert_refused(done, 1, "lets the key out", "--accept-risk rrsync")
        self.assertNotIn("--no-symlinks", done.err)
        self.assert_nothing_left()
        done = self.link("--rrsync", self.rrsync, "--accept-risk", "rrsync", check=0)
        self.assertIn("a thief of the key may get out", done.err)
        self.assertTrue(os.path.exists(self.keys))

    def test_ones_that_do_not_work(self) -> None:
        for text, said in (("#!/nowhere/perl\n", "interpreter"), ('#!/bin/sh\necho "Usage: no -wo here" >&2; exit 1\n', "no -wo here"),
                           ("#!/bin/sh\necho 'option --server has been disabled on this server.' >&2\nexit 1\n", "same release")):
            write(self.rrsync, text, 0o755)
            self.assert_refused(self.link("--rrsync", self.rrsync), 1, "does not work here", said)
            self.assert_nothing_left()

    def test_no_symlinks(self) -> None:
        target = self.lab.target("one")
        linked = self.lab.offsync("link", "--path", target.path, "--key", self.key, "--no-symlinks", home=target.home, check=0)
        self.assertIn('rrsync -wo -munge %s"' % target.path, read(target.keys))
        self.assertIn(" --no-symlinks", linked.out)
        self.lab.add(target, "--no-symlinks")
        self.assertIn("symlinks: false", read(self.lab.state + "/config.yaml"))
        write(self.lab.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))
        os.symlink("f", self.lab.source + "/l")
        self.assertIn("takes no symlinks", self.lab.offsync("apply", check=1).err)
        self.assertEqual(sorted(os.listdir(target.path)), ["f"])
        self.lab.configure(exclude=["l"])
        self.lab.offsync("plan", check=0)
        again = self.lab.offsync("link", "--path", target.path, "--key", self.key, "--no-symlinks", home=target.home, check=0)
        self.assertIn("already linked", again.err)
        self.lab.offsync("unlink", "--key", self.key, home=target.home, check=0)
        self.assertEqual(read(target.keys), "")


class Paths(LabCase):
    """What link refuses, with the option that waives it, and the legitimate twins."""

    def setUp(self) -> None:
        super().setUp()
        self.key = self.lab.init()
        self.home = self.lab.base + "/target"
        os.mkdir(self.home)

    def link(self, path: str, *args, **more):
        return self.lab.offsync("link", "--path", path, "--key", self.key, *risk(), *args, home=self.home, **more)

    def test_rules_that_a_user_may_waive(self) -> None:
        cases = ["/etc/nginx", "/usr/share/nginx/html", "/var/spool/cron", "/var/lib/dpkg/info", "/run/x", "/var/lib/docker/x", self.home + "/.config/app", self.home + "/a/.b/c"]
        for path in cases:
            with self.subTest(path=path):
                self.assert_refused(self.link(path), 2, "--accept-risk path", "such as /srv/app-data")
                real = offsync.validate_link_path(path, (), True)
                self.assertEqual(real, os.path.realpath(path))
        self.assert_refused(self.link(self.home + "/a/.b/c", "--accept-risk", "rrsync"), 2, "--accept-risk path")
        self.link(self.home + "/a/.b/c", "--accept-risk", "path", check=0)
        self.link(self.home + "/fine/deep", check=0)
        with self.assertRaises(offsync.UsageError):
            offsync.validate_link_path("/", (), True)
        with self.assertRaises(offsync.UsageError):
            offsync.validate_link_path(os.path.expanduser("~/.ssh/x"), (), True)

    def test_a_directory_of_path(self) -> None:
        self.assert_refused(self.link(self.lab.bin), 2, "directory of $PATH", "--accept-risk path")

    def test_parents_that_others_may_write_to(self) -> None:
        for mode, refused in ((0o777, True), (0o1777, False), (0o755, False), (0o775, os.stat(self.home).st_gid != os.getegid())):
            with self.subTest(mode=oct(mode)):
                shutil.rmtree(self.lab.base + "/parent", ignore_errors=True)
                os.makedirs(self.lab.base + "/parent/data")
                os.chmod(self.lab.base + "/parent", mode)
                done = self.link(self.lab.base + "/parent/data")
                if refused:
                    self.assert_refused(done, 2, "others could put another directory in its place", "chmod", "--accept-risk path")
                else:
                    self.assertEqual(done.returncode, 0, done.err)
        os.chmod(self.lab.base + "/parent", 0o1777)     # sticky, but the next one is not there yet: anybody may make it
        shutil.rmtree(self.lab.base + "/parent/data")
        self.assert_refused(self.link(self.lab.base + "/parent/data"), 2, "everybody may write")
        os.mkdir(self.lab.base + "/open", 0o755)
        os.chmod(self.lab.base + "/open", 0o777)
        self.assertIn("writable for others", self.link(self.lab.base + "/open", check=0).err)   # itself: a warning

    @unittest.skipUnless(os.geteuid() == 0, "only root can give directories away")
    def test_what_belongs_to_another_account(self) -> None:
        os.makedirs(self.lab.base + "/parent/data")
        os.chown(self.lab.base + "/parent", 65534, 65534)
        self.assert_refused(self.link(self.lab.base + "/parent/data"), 2, "belongs to nobody", "--accept-risk path")
        os.chown(self.lab.base + "/parent", 0, 65534)
        os.chmod(self.lab.base + "/parent", 0o775)      # a group in which somebody is
        self.assert_refused(self.link(self.lab.base + "/parent/data"), 2, "its group may write")
        os.chown(self.home, 65534, 65534)
        self.assert_refused(self.link(self.lab.base + "/fine"), 1, "HOME", "belongs to nobody", "sudo -iu nobody")
        self.assertEqual(os.listdir(self.home), [])

    def test_what_is_created_under_any_umask(self) -> None:
        for umask in ("0", "077", "002"):
            with self.subTest(umask=umask):
                base = self.lab.base + "/made" + umask
                os.mkdir(base, 0o755)
                subprocess.run(["sh", "-c", 'umask %s; exec "$@"' % umask, "sh", sys.executable, OFFSYNC, "link", "--path", base + "/a/b/c", "--key", self.key, *risk()],
                               env=dict(self.lab.env, HOME=self.home), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                self.assertEqual([stat.S_IMODE(os.stat(base + path).st_mode) for path in ("/a", "/a/b", "/a/b/c")], [0o755] * 3)

    def test_no_directory_is_made_through_a_symlink(self) -> None:
        os.mkdir(self.lab.base + "/elsewhere")
        os.symlink(self.lab.base + "/elsewhere", self.lab.base + "/planted")
        with self.assertRaisesRegex(offsync.OffsyncError, "cannot be created"):
            offsync.make_directory(self.lab.base + "/planted/x", 0o755)
        self.assertEqual(os.listdir(self.lab.base + "/elsewhere"), [])
        offsync.make_directory(self.lab.base + "/real/x", 0o700)
        self.assertEqual(stat.S_IMODE(os.stat(self.lab.base + "/real/x").st_mode), 0o700)


class UserBeside(LabCase):
    def test_a_state_directory_that_others_may_write_to(self) -> None:
        self.lab.joined_by_hand("one")
        for mode in (0o777, 0o702):
            os.chmod(self.lab.state, mode)
            for command in (["plan"], ["apply"], ["verify"], ["target", "list"], ["init"], ["target", "remove", "x"], []):
                with self.subTest(command=command):
                    self.assert_refused(self.lab.offsync(*command), 1, "state directory", "others could change", "chmod o-w")
        os.chmod(self.lab.state, 0o700)
        os.chmod(self.lab.home, 0o777)      # a parent
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
            write("%s/%s.py" % (trap, name), "open(%r, 'w').close()\nraise SystemExit(9)\n" % (self.lab.base + "/sprung"))
        shutil.copy(OFFSYNC, trap + "/offsync.py")
        for argv, stdin in (([sys.executable, trap + "/offsync.py", "--version"], None), ([sys.executable, "-", "--version"], OFFSYNC), ([trap + "/offsync.py", "--version"], None)):
            done = subprocess.run(argv, cwd=trap, stdin=open(stdin) if stdin else None, stdout=subprocess.PIPE, text=True, env=self.lab.env)
            self.assertEqual((done.returncode, done.stdout.split()[0]), (0, "offsync"))
        self.assertFalse(os.path.exists(self.lab.base + "/sprung"))
        subprocess.run([sys.executable, "-c", "import json"], cwd=trap, env=self.lab.env)
        self.assertTrue(os.path.exists(self.lab.base + "/sprung"))      # the trap is one

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
        write(self.lab.state + "/last/" + one.login + "/in-the-way", "")        # no status can be written for this one
        done = self.lab.offsync("apply", check=1)
        self.assertIn("offsync: %s: failed" % one.login, done.err)
        self.assertIn("2 targets: 1 ok, 1 failed", done.out)
        self.assertEqual(snapshot(two.path), snapshot(self.lab.source))
        shutil.rmtree(self.lab.state + "/last")
        write(self.lab.state + "/last", "a file")       # nor for any of them
        write(self.lab.source + "/g", "x")
        done = self.lab.offsync("apply", check=1)
        self.assertIn("2 targets: 2 failed", done.out)
        self.assertEqual(len(self.lab.records()), 2 + 1 + 1)


class SourceWriter(Standing):
    def test_a_parent_that_becomes_a_symlink_before_it_is_hashed(self) -> None:
        """What lies outside the source is not read, whatever stands in for a directory of it."""
        secret = self.lab.base + "/secret/f"
        write(secret, "secret", when=1_600_000_000)
        write(self.source + "/d/f", "public", when=1_600_000_000)
        env = self.here_runs('case "$*" in *--delete*--out-format*) real; s=$?; mv d ../d; ln -s ../secret d; exit $s;; esac; real')
        done = self.lab.offsync("apply", env=env, check=1)
        self.assertNotIn("ok:", done.out)
        self.assertEqual([path for path, entry in snapshot(self.there).items() if entry[0] == "file"], [])
        with self.assertRaises(OSError):
            offsync.describe_entry(os.fsencode(self.source), b"d/f")
        os.unlink(self.source + "/d")
        os.rename(self.lab.base + "/d", self.source + "/d")
        self.lab.offsync("apply", check=0)


class HostileTarget(Standing):
    def test_answers_made_for_a_regular_expression(self) -> None:
        """Tens of kilobytes on stderr, of what a pattern with nested repetition takes minutes for, cost nothing."""
        other = self.lab.joined_by_hand("other")
        self.addCleanup(lambda: self.lab.offsync("target", "remove", other.login, check=0))
        write(self.source + "/f", "x")
        evil = self.lab.base + "/stderr"
        write(evil, " ' \"/' " * 3000 + "/" * 32700 + "\n" + "rsync: connection " * 3000)
        script = self.lab.base + "/standing-rrsync"
        write(script, "#!/bin/sh\ncat %s >&2\nexit 12\n" % evil, 0o755)
        line = read(self.target.keys)
        self.addCleanup(write, self.target.keys, line)
        write(self.target.keys, line.replace("/usr/bin/rrsync", script))
        done = self.lab.offsync("apply", check=1, timeout=60)
        self.assertIn("2 targets: 1 ok, 1 failed", done.out)
        self.assertLess(len(done.err), 3000)
        self.assertEqual(snapshot(other.path), snapshot(self.source))

    def test_every_sentence_is_found_in_linear_time(self) -> None:
        import time
        target = offsync.Target("u@h", "/srv/x")
        for text in (b"' \"/" * 16000, b"(" * 65536, b"rsync: " * 9000, b"\n" * 65536):
            started = time.process_time()
            offsync.diagnose(target, text)
            self.assertLess(time.process_time() - started, 2)      # it takes milliseconds; minutes would be the fault

    def test_a_target_that_says_all_is_equal(self) -> None:
        """What offsync cannot know: README says so. It must not be called delivered, though."""
        write(self.source + "/f", "x")
        env = self.here_runs('case "$*" in *-rlptc*) echo "sending incremental file list"; exit 0;; esac; real')
        self.assertIn("equal, nothing to do", self.lab.offsync("apply", env=env, check=0).out)
        readme = read(os.path.join(os.path.dirname(OFFSYNC), "README.md")).split("What it does not guarantee")[1]
        self.assertIn('answers "all equal" is believed', " ".join(readme.split()))

    def test_memory_is_bounded_over_all_targets(self) -> None:
        write(self.source + "/f", "x")
        quick = self.lab.base + "/offsync.py"
        write(quick, read(OFFSYNC).replace("MAX_TARGET_ONLY = 1 << 31", "MAX_TARGET_ONLY = 20_000"))
        for number in range(200):
            write(self.there + "/only%d" % number)
        self.assertIn("too many entries", self.lab.offsync("plan", program=quick, check=1).out)
        self.lab.offsync("plan", check=0)


class ManInTheMiddle(LabCase):
    def test_no_session_and_no_environment_for_a_host_that_is_not_verified(self) -> None:
        self.lab.init()
        seen = self.lab.base + "/seen"
        target = self.lab.target("one", "AcceptEnv *\nPermitEmptyPasswords yes\nForceCommand env >> %s" % seen)
        self.lab.link(target)
        write(self.lab.ssh_config, "SendEnv *\nSetEnv SECRET=abc\n")
        for args in ((), ("--host-key", "SHA256:" + "A" * 43)):
            self.lab.offsync("target", "add", target.login, "--path", target.path, "--port", str(target.port), *args, env={"LC_SECRET": "x"}, check=1)
        self.assertFalse(os.path.exists(seen))
        self.assertEqual(target.read_log().count("Starting session"), 0)

    def test_nothing_of_the_users_environment_reaches_a_session(self) -> None:
        target = self.lab.joined_by_hand("one", "AcceptEnv *")
        seen = self.lab.base + "/seen"
        script = self.lab.base + "/env-rrsync"
        write(script, '#!/bin/sh\nenv >> %s\nexec /usr/bin/rrsync "$@"\n' % seen, 0o755)
        write(target.keys, read(target.keys).replace("/usr/bin/rrsync", script))
        write(self.lab.ssh_config, "SendEnv *\nSetEnv OFSECRET=abc\n")
        write(self.lab.source + "/f", "x")
        self.lab.offsync("apply", env={"OFSECRET2": "x"}, check=0)
        self.assertIn("SSH_ORIGINAL_COMMAND", read(seen))
        self.assertNotIn("OFSECRET", read(seen))

    def test_a_remote_forward_never_opens_in_proofs_either(self) -> None:
        from lab import free_port
        target, port = self.lab.joined("one"), free_port()
        blob = read(target.keys).split("restrict ")[1]
        script = self.lab.base + "/look-rrsync"
        write(script, '#!/bin/bash\n(exec 3<>/dev/tcp/127.0.0.1/%d) 2>/dev/null && echo open >> %s/opened\nexec /usr/bin/rrsync -wo %s\n' % (port, self.lab.base, target.path), 0o755)
        write(target.keys, 'command="%s" %s' % (script, blob))      # forwarding is not forbidden by this key
        write(self.lab.ssh_config, "RemoteForward 127.0.0.1:%d 127.0.0.1:9\n" % port)
        out = self.lab.offsync("doctor", check=1).out
        self.assertRegex(out, "OPEN +forward a port")
        write(self.lab.source + "/f", "x")
        self.lab.offsync("apply")
        self.assertFalse(os.path.exists(self.lab.base + "/opened"))
        self.assertNotIn("port %d" % port, "".join(re.findall(r".*tcpip-forward.*|.*forwarding.*", target.read_log())))

    def test_a_revoked_key_binds_target_add(self) -> None:
        self.lab.init()
        target = self.lab.target("one")
        self.lab.link(target)
        known = self.lab.home + "/.ssh/known_hosts"
        for marker, refused in (("@revoked * %s", True), ("@revoked [%s]:%d %%s" % (target.address, target.port), True), ("@revoked other.example %s", False)):
            with self.subTest(marker=marker):
                write(known, marker % read(target.host_key + ".pub").strip() + "\n")
                done = self.lab.add(target, check=1 if refused else 0)
                if refused:
                    self.assertIn("marked @revoked", done.err)
                    self.assertIn(known, done.err)
                    self.assertNotIn(target.login, read(self.lab.state + "/config.yaml"))

    def test_host_key_algorithms_of_ssh_config_raise_no_alarm(self) -> None:
        rsa = self.lab.base + "/rsa"
        subprocess.run([require("ssh-keygen"), "-q", "-t", "rsa", "-N", "", "-f", rsa], check=True)
        self.lab.init()
        target = self.lab.target("one", "HostKey " + rsa)
        self.lab.link(target)
        write(self.lab.ssh_config, "HostKeyAlgorithms rsa-sha2-512,ssh-ed25519\n")
        self.lab.add(target)
        self.assertIn("ssh-ed25519", read(self.lab.state + "/known_hosts"))
        done = self.lab.offsync("plan", check=0)
        self.assertIn("HostKeyAlgorithms in ssh_config", done.err)
        self.assertNotIn("CHANGED", done.out + done.err)

    def test_one_connection_is_enough_where_the_first_key_is_the_one(self) -> None:
        self.lab.init()
        target = self.lab.target("one")
        self.lab.link(target)
        self.lab.add(target)
        self.assertEqual(target.read_log().count("Connection from"), 3)     # asking for the key, the connection, the forwarding proof


del Lab

if __name__ == "__main__":
    unittest.main()
