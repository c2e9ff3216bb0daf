"""Host keys and restriction proofs: every attack with its legitimate twin, against a real sshd."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import unittest

from lab import (
    HERE,
    OFFSYNC,
    USER,
    Lab,
    LabTestCase,
    can_mount,
    change,
    free_port,
    read,
    require,
    snapshot,
    type_on_terminal,
    write,
)


class HostKeys(LabTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.lab.init()
        self.target = self.lab.target("one")
        self.lab.link(self.target)

    def add(self, *args, check=None):
        return self.lab.offsync("target add", *self.target.words, *args, check=check)

    def configured(self) -> bool:
        return self.target.login in read(self.lab.state + "/config.yaml")

    def on_terminal(self, answer: str) -> tuple:
        """Run target add on a terminal of its own; return (exit status, what was shown)."""
        argv = [sys.executable, OFFSYNC, "target", "add", *self.target.words]
        return type_on_terminal(argv, self.lab.env, (b"yes or no: ", answer + "\n"))

    def test_yes_typed_in_full_stores_what_was_shown(self) -> None:
        for answer in ("y", "no", ""):
            status, seen = self.on_terminal(answer)
            self.assertEqual(status, 1, seen)
            self.assertFalse(self.configured())
            self.assertFalse(os.path.exists(self.lab.state + "/known_hosts"))
        status, seen = self.on_terminal("yes")
        self.assertEqual(status, 0, seen)
        self.assertIn(self.target.fingerprint, seen)
        self.assertTrue(self.configured())
        self.assertEqual(
            read(self.lab.state + "/known_hosts"),
            "[%s]:%d %s\n"
            % (
                self.target.address,
                self.target.port,
                " ".join(read(self.target.host_key + ".pub").split()[:2]),
            ),
        )

    def test_no_terminal_and_no_fingerprint(self) -> None:
        done = self.add()
        self.assertEqual(done.returncode, 1)
        self.assertIn("--host-key", done.err)
        self.assertFalse(self.configured())

    def test_a_fingerprint_that_does_not_match(self) -> None:
        done = self.add("--host-key", "SHA256:" + "A" * 43)
        self.assert_refused(done, 1, "NOT the expected one", self.target.fingerprint)
        self.assertFalse(self.configured())
        self.add("--host-key", self.target.fingerprint, check=0)
        self.assertTrue(self.configured())

    def test_several_fingerprints_and_the_key_that_ssh_negotiates(self) -> None:
        """As link prints them: which of its keys a controller negotiates depends on its ssh."""
        key = self.target.base + "/rsa"
        subprocess.run([require("ssh-keygen"), "-q", "-t", "rsa", "-N", "", "-f", key], check=True)
        self.target.stop()
        self.target.options = "HostKey %s" % key
        self.target.start()
        rsa = subprocess.run(
            [require("ssh-keygen"), "-l", "-f", key], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()[1]
        done = self.add("--host-key", rsa)
        self.assert_refused(done, 1, "NOT the expected one", rsa, self.target.fingerprint)
        both = ("--host-key", rsa, "--host-key", self.target.fingerprint)
        self.add(*both, check=0)
        self.assertIn(" ssh-ed25519 ", read(self.lab.state + "/known_hosts"))
        write(self.lab.ssh_config, "HostKeyAlgorithms rsa-sha2-512\n")
        self.add(*both, check=0)
        self.assertIn(" ssh-rsa ", read(self.lab.state + "/known_hosts"))
        self.lab.offsync("plan", check=0)

    def test_a_changed_host_key(self) -> None:
        self.add("--host-key", self.target.fingerprint, check=0)
        old = self.target.fingerprint
        self.target.stop()
        self.target.new_host_key()
        self.target.start()
        done = self.lab.offsync("plan", check=1)
        for part in ("CHANGED", old, self.target.fingerprint, "offsync target add"):
            self.assertIn(part, done.out)
        self.assert_refused(self.add("--host-key", old), 1, "NOT the expected one")
        self.add("--host-key", self.target.fingerprint, check=0)
        self.lab.offsync("plan", check=0)
        self.assertEqual(read(self.lab.state + "/known_hosts").count("\n"), 1)

    def test_changed_host_keys_of_several_targets_are_not_mixed_up(self) -> None:
        self.add("--host-key", self.target.fingerprint, check=0)
        targets = [
            self.target,
            *(self.lab.configured_target("more%d" % number) for number in range(3)),
        ]
        for target in targets:
            target.stop()
            target.new_host_key()
            target.start()
        out = self.lab.offsync("plan", check=1).out
        for target in targets:
            said = out.split("%s:%s\n" % (target.login, target.path))[1].split("\n")[0]
            self.assertEqual(
                [other.name for other in targets if other.fingerprint in said], [target.name], out
            )

    def test_a_known_hosts_that_cannot_be_edited(self) -> None:
        """The old key must not stay trusted beside the new one."""
        self.add("--host-key", self.target.fingerprint, check=0)
        known = self.lab.state + "/known_hosts"
        write(known, "nonsense\n" + read(known))
        before = read(known)
        self.target.stop()
        self.target.new_host_key()
        self.target.start()
        self.assert_refused(
            self.add("--host-key", self.target.fingerprint), 1, "known_hosts", "cannot edit it"
        )
        self.assertEqual(read(known), before)

    def test_hashed_known_hosts(self) -> None:
        self.add("--host-key", self.target.fingerprint, check=0)
        known = self.lab.state + "/known_hosts"
        subprocess.run(
            [require("ssh-keygen"), "-q", "-H", "-f", known],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.unlink(known + ".old")
        self.assertNotIn(self.target.address, read(known))
        self.lab.offsync("plan", check=0)
        self.add(check=0)
        self.target.stop()
        self.target.new_host_key()
        self.target.start()
        self.assertIn(": known SHA256", self.lab.offsync("plan", check=1).out)
        self.add("--host-key", self.target.fingerprint, check=0)
        self.assertEqual(read(known).count("\n"), 1)
        self.lab.offsync("plan", check=0)

    def test_port_alias_and_jump_of_the_users_ssh_config(self) -> None:
        jump = self.lab.target("jump")
        write(jump.keys, read(self.lab.state + "/id_ed25519.pub"))
        write(
            self.lab.base + "/jump_known",
            "[%s]:%d %s" % (jump.address, jump.port, read(jump.host_key + ".pub")),
        )
        write(
            self.lab.ssh_config,
            "Host node\n  HostName %s\n  Port %d\n  HostKeyAlias node-alias\n  ProxyJump"
            " %s@bastion\nHost bastion\n  HostName %s\n  Port %d\n  IdentityFile %s\n "
            " UserKnownHostsFile %s\n"
            % (
                self.target.address,
                self.target.port,
                USER,
                jump.address,
                jump.port,
                self.lab.state + "/id_ed25519",
                self.lab.base + "/jump_known",
            ),
        )
        self.lab.offsync(
            "target add",
            USER + "@node",
            "--path",
            self.target.path,
            "--host-key",
            self.target.fingerprint,
            check=0,
        )
        self.assertTrue(read(self.lab.state + "/known_hosts").startswith("node-alias ssh-ed25519 "))
        write(self.lab.source + "/f")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.target.path), snapshot(self.lab.source))
        self.assertIn("Accepted", jump.read_log())

    def test_ipv6_literal(self) -> None:
        target = self.lab.target("six", address="::1")
        self.lab.link(target)
        self.assertEqual(target.login, USER + "@[::1]")
        self.lab.add(target)
        write(self.lab.source + "/f")
        self.lab.offsync("apply", target.login, check=0)
        self.lab.offsync("doctor", target.login, check=0)
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))


class Restriction(LabTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.lab = Lab()
        cls.addClassCleanup(cls.lab.close)
        cls.target = cls.lab.linked_target("one")
        cls.line = cls.good = read(cls.target.keys)
        write(cls.lab.source + "/f", "content")

    def setUp(self) -> None:
        write(self.target.keys, self.good)
        write(self.lab.ssh_config, "")
        shutil.rmtree(self.target.path, ignore_errors=True)
        if os.path.lexists(self.target.path):
            os.unlink(self.target.path)
        os.mkdir(self.target.path)

    def assert_nothing_written(self, *words: str) -> None:
        """plan, apply and target add refuse with these words; nothing is written anywhere, not
        even in the login's home.
        """
        planned = self.lab.offsync("plan", check=1)
        applied = self.lab.offsync("apply", check=1)
        added = self.lab.add(self.target, check=1)
        for word in words:
            self.assertIn(word, planned.out)
            self.assertIn(word, applied.err)
            self.assertIn(word, added.err)
        self.assertEqual(snapshot(self.target.path), {})
        self.assertFalse(os.path.lexists(os.path.expanduser("~" + USER) + "/f"))
        write(self.target.keys, self.good)
        write(self.lab.ssh_config, "")
        self.lab.offsync("apply", check=0)  # the legitimate twin
        self.assertEqual(snapshot(self.target.path), snapshot(self.lab.source))

    def force(self, command: str) -> None:
        """Give the key another forced command."""
        write(
            self.target.keys,
            'command="%s",restrict %s' % (command, self.line.split("restrict ")[1]),
        )

    def test_an_identity_file_that_opens_a_shell(self) -> None:
        key = self.lab.base + "/shell_key"
        subprocess.run(
            [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True
        )
        write(self.lab.ssh_config, "IdentityFile %s\n" % key)
        write(self.target.keys, read(key + ".pub"))
        self.assert_nothing_written("NOT restricted", "IdentityFile")

    def test_an_unrestricted_line_above(self) -> None:
        write(self.target.keys, self.line.split("restrict ")[1] + self.line)
        self.assert_nothing_written("NOT restricted", "authorized_keys")

    def test_a_forced_command_that_runs_anything(self) -> None:
        self.force("eval $SSH_ORIGINAL_COMMAND")
        self.assert_nothing_written("NOT restricted")

    def test_a_forced_command_that_does_nothing(self) -> None:
        self.force("true")
        self.assert_nothing_written("not rrsync")

    def test_a_forced_command_that_only_fails(self) -> None:
        self.force("false")
        self.assert_nothing_written()

    def test_a_login_so_slow_that_the_proof_is_cut_off(self) -> None:
        """The master ssh is up by then: a proof that did not end is none. The deadline is
        shortened in a copy of offsync.py.
        """
        quick = self.lab.altered(("SESSION_DEADLINE = 45.0", "SESSION_DEADLINE = 2.0"))
        self.force("sleep 4; eval $SSH_ORIGINAL_COMMAND")
        done = self.lab.offsync("apply", program=quick, check=1)
        self.assertIn("did not answer in time", done.err)
        self.assertEqual(snapshot(self.target.path), {})
        write(self.target.keys, self.good)
        self.lab.offsync("apply", program=quick, check=0)

    def answer_the_proof(self, command: str) -> None:
        """Give the key a forced command that does this when asked for a command, and is rrsync
        else.
        """
        script = self.lab.base + "/odd-rrsync"
        write(
            script,
            '#!/bin/sh\ncase "$SSH_ORIGINAL_COMMAND" in echo*) %s;; esac\nexec /usr/bin/rrsync'
            ' "$@"\n' % command,
            0o755,
        )
        write(self.target.keys, self.line.replace("/usr/bin/rrsync", script))

    def test_a_proof_that_is_cut_off_is_none(self) -> None:
        """The pass is answered, asking for a command is not."""
        quick = self.lab.altered(("SESSION_DEADLINE = 45.0", "SESSION_DEADLINE = 2.0"))
        self.answer_the_proof("sleep 6")
        done = self.lab.offsync("apply", program=quick, check=1)
        self.assertIn("the target accepted the login but did not answer in time", done.err)
        self.assertEqual(snapshot(self.target.path), {})

    def test_the_status_with_which_ssh_fails_is_no_refusal(self) -> None:
        """255 with nothing known beside it: the session may have been lost before anything was
        asked.
        """
        self.answer_the_proof("exit 255")
        self.assert_nothing_written()

    def test_read_only(self) -> None:
        write(self.target.keys, self.line.replace("-wo", "-ro"))
        self.assert_nothing_written("reading only")

    def test_read_and_write(self) -> None:
        """rrsync without -wo: the key could read; found by the fuller proofs, before the target is
        saved.
        """
        write(self.target.keys, self.line.replace("-wo ", ""))
        done = self.lab.add(self.target, check=1)
        self.assertIn("read files with rsync", done.err)
        self.assertRegex(self.lab.offsync("doctor", check=1).out, "OPEN +read files with rsync")

    def test_a_key_that_writes_everywhere(self) -> None:
        """Also where the config says so: link refuses the root, and so does every run."""
        line = read(self.target.keys)
        self.addCleanup(write, self.target.keys, line)
        write(self.target.keys, line.replace("-wo " + self.target.path, "-wo /"))
        done = self.lab.offsync(
            *("target", "add", self.target.login, "--path", "/", "--port", str(self.target.port)),
            check=1,
        )
        self.assertIn("NOT restricted", done.err)
        self.assertNotIn('remote_path: "/"\n', read(self.lab.state + "/config.yaml"))

    def test_another_directory(self) -> None:
        other = self.lab.base + "/other"
        os.mkdir(other)
        write(self.target.keys, self.line.replace(self.target.path, other))
        self.assert_nothing_written(
            "the key is restricted to a different path",
            "OFFSYNC_HOME",
            "its key writes below %s, not below %s" % (other, self.target.path),
        )
        self.assertEqual(os.listdir(other), [])

    def test_rsync_without_rrsync(self) -> None:
        """A forced command that lets every rsync through writes anywhere: the fuller proofs see
        it.
        """
        self.force(
            'case \\"$SSH_ORIGINAL_COMMAND\\" in rsync*) eval exec $SSH_ORIGINAL_COMMAND;; *) exit'
            " 1;; esac"
        )
        self.assert_nothing_written("NOT restricted", "writes below /, not below")

    def test_a_lost_complaint_is_asked_for_again(self) -> None:
        """An rsync that dies under load can lose its words: silence is no proof of the path."""
        write(self.target.keys, self.line.replace(self.target.path, self.lab.base + "/elsewhere"))
        os.mkdir(self.lab.base + "/elsewhere")
        real, once = require("rsync"), self.lab.base + "/once"
        forgetful = self.lab.program(
            "forgetful",
            '#!/bin/sh\ncase "$*" in *:/*/x) mkdir %s 2>/dev/null && exec %s "$@" 2>/dev/null;;'
            ' esac\nexec %s "$@"\n' % (once, real, real),
        )
        self.assertIn(
            "its key writes below %s/elsewhere" % self.lab.base,
            self.lab.offsync("apply", env={"OFFSYNC_RSYNC": forgetful}, check=1).err,
        )
        self.assertTrue(os.path.isdir(once))
        self.assertEqual(os.listdir(self.lab.base + "/elsewhere"), [])

    def test_silence_is_no_proof_of_the_path(self) -> None:
        """A forced command that says nothing to the question where it writes."""
        script = self.lab.base + "/silent-rrsync"
        write(
            script,
            '#!/bin/sh\ncase "$SSH_ORIGINAL_COMMAND" in *" . /"*) exit 12;; esac\nexec'
            ' /usr/bin/rrsync "$@"\n',
            0o755,
        )
        write(self.target.keys, self.line.replace("/usr/bin/rrsync", script))
        self.assert_nothing_written()

    def test_a_session_has_nowhere_else_to_go(self) -> None:
        """Were its connection gone, ssh would connect afresh, by itself and unproved."""
        err = self.lab.offsync("-v apply", check=0).err
        sessions = [
            line
            for line in err.splitlines()
            if line.startswith("+ ") and "ControlMaster=no" in line and "ControlPath=/" in line
        ]
        self.assertGreater(len(sessions), 3)
        for line in sessions:
            self.assertIn("ProxyCommand=/nonexistent/offsync-connection-ended", line)
            self.assertIn("-F /dev/null", line)

    def test_a_connection_that_is_opened_again_proves_its_path_again(self) -> None:
        """While another target is compared, sshd closes the idle connection of the first one, and
        its key is linked to another directory.
        """
        other = self.lab.base + "/other-path"
        os.mkdir(other)
        self.close_idle_connections()
        two = self.lab.configured_target("two")
        self.addCleanup(self.lab.offsync, "target", "remove", two.login, check=0)
        write(self.lab.base + "/moved-keys", self.line.replace(self.target.path, other))
        script = self.lab.base + "/slow-rrsync"
        write(
            script,
            '#!/bin/sh\ncase "$SSH_ORIGINAL_COMMAND" in *--delete*) cp %s/moved-keys %s; sleep 5;;'
            ' esac\nexec /usr/bin/rrsync "$@"\n' % (self.lab.base, self.target.keys),
            0o755,
        )
        write(two.keys, read(two.keys).replace("/usr/bin/rrsync", script))
        done = self.lab.offsync("apply", check=1)
        self.assertIn("%s: the key is restricted to a different path" % self.target.login, done.err)
        self.assertEqual(os.listdir(other), [])
        record = next(r for r in self.lab.records()[-2:] if r["login"] == self.target.login)
        self.assertEqual((record["files_changed"], record["files_deleted"]), (None, None))

    def close_idle_connections(self) -> None:
        self.target.stop()
        self.target.options = "UnusedConnectionTimeout 2"
        self.addCleanup(self.restart, "")
        try:
            self.target.start()
        except RuntimeError:
            self.skipTest("this sshd closes no idle connection (OpenSSH before 9.2)")

    def restart(self, options: str) -> None:
        self.target.stop()
        self.target.options = options
        self.target.start()

    def test_an_idle_connection_that_sshd_closes_is_opened_once_more(self) -> None:
        """While the source is scanned, and while another target is compared."""
        self.close_idle_connections()
        two = self.lab.configured_target("three")
        self.addCleanup(self.lab.offsync, "target", "remove", two.login, check=0)
        script = self.lab.base + "/slow-rrsync"
        write(
            script,
            '#!/bin/sh\ncase "$SSH_ORIGINAL_COMMAND" in *--delete*) sleep 4;; esac\n'
            'exec /usr/bin/rrsync "$@"\n',
            0o755,
        )
        write(two.keys, read(two.keys).replace("/usr/bin/rrsync", script))
        before = self.target.read_log().count("Accepted publickey")
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.target.path), snapshot(self.lab.source))
        self.assertEqual(self.target.read_log().count("Accepted publickey"), before + 2)

    def test_nothing_of_ssh_config_is_for_a_session(self) -> None:
        write(
            self.lab.ssh_config,
            "RemoteCommand tmux\nRequestTTY force\nRemoteForward 127.0.0.1:1 127.0.0.1:1\nStdinNull"
            " yes\nIgnoreUnknown StdinNull,OfOurs\nOfOurs x\n",
        )
        self.lab.offsync("apply", check=0)
        self.assertEqual(snapshot(self.target.path), snapshot(self.lab.source))

    def test_forwarding_and_terminal(self) -> None:
        command = self.line.split(",no-port")[0]
        write(self.target.keys, command + " " + self.line.split("restrict ")[1])
        out = self.lab.offsync("doctor", check=1).out
        for what in ("get a terminal", "forward a port", "forward an agent"):
            if (
                what != "get a terminal" or os.geteuid() == 0
            ):  # an sshd that is not root's cannot give terminals
                self.assertRegex(out, "OPEN +" + what)
        self.assertIn("offsync link --path " + self.target.path, out)
        write(self.target.keys, self.line)
        out = self.lab.offsync("doctor", check=0).out
        for what in (
            "run a command",
            "read a file",
            "read files",
            "write to a path outside",
            "write to .. of",
            "get a terminal",
            "forward a port",
            "forward an agent",
            "write below the path",
        ):
            self.assertRegex(out, "ok +" + what)

    def test_a_shell_that_prints_a_banner(self) -> None:
        self.force("echo Welcome; " + self.line.split('"')[1])
        self.assert_nothing_written("prints text, which breaks the rsync protocol", "Welcome")

    def test_a_directory_that_is_gone(self) -> None:
        os.rmdir(self.target.path)
        self.assertIn("is gone or is no directory", self.lab.offsync("plan", check=1).out)
        write(self.target.path, "a file")
        self.assertIn("is gone or is no directory", self.lab.offsync("plan", check=1).out)

    def test_the_agent_and_other_keys_are_not_used(self) -> None:
        os.unlink(self.target.keys)
        key = self.lab.base + "/agent_key"
        subprocess.run(
            [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True
        )
        write(self.target.keys, read(key + ".pub"))
        agent = subprocess.run(
            ["ssh-agent", "-s", "-a", self.lab.base + "/agent"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        pid = agent.split("SSH_AGENT_PID=")[1].split(";")[0]
        try:
            env = {"SSH_AUTH_SOCK": self.lab.base + "/agent"}
            subprocess.run(["ssh-add", "-q", key], env=dict(self.lab.env, **env), check=True)
            self.assertIn(
                "refused this controller's key", self.lab.offsync("plan", env=env, check=1).out
            )
        finally:
            os.kill(int(pid), 15)


class Banners(LabTestCase):
    """What sshd prints before a login stands ahead of ssh's own words, and is none of these."""

    def test_a_banner_that_reads_like_a_changed_host_key(self) -> None:
        banner = self.lab.base + "/banner"
        good = self.lab.configured_target("good")
        bad = self.lab.configured_target("bad", "Banner " + banner)
        write(bad.keys, "")
        write(self.lab.source + "/f", "x")
        for text in (
            "REMOTE HOST IDENTIFICATION HAS CHANGED\nOffending ED25519 key in /etc/passwd:999999\n"
            "Host key verification failed.",
            "Offending ED25519 key in /dev/tty:1\nREMOTE HOST IDENTIFICATION HAS CHANGED"
            " Host key verification failed.",
            "Host key verification failed.\n",
            "no end " * 20_000,
        ):
            with self.subTest(text=text[:30]):
                write(banner, text)
                done = self.lab.offsync("apply", check=1, timeout=60)
                self.assertNotIn("has CHANGED", done.err)
                self.assertIn("%s: the target refused this controller's key" % bad.login, done.err)
                self.assertEqual(snapshot(good.path), snapshot(self.lab.source))


class ManInTheMiddle(LabTestCase):
    def test_no_session_and_no_environment_for_a_host_that_is_not_verified(self) -> None:
        self.lab.init()
        seen = self.lab.base + "/seen"
        target = self.lab.target(
            "one", "AcceptEnv *\nPermitEmptyPasswords yes\nForceCommand env >> %s" % seen
        )
        self.lab.link(target)
        write(self.lab.ssh_config, "SendEnv *\nSetEnv SECRET=abc\n")
        for args in ((), ("--host-key", "SHA256:" + "A" * 43)):
            words = ("target add", *target.words, *args)
            self.lab.offsync(*words, env={"LC_SECRET": "x"}, check=1)
        self.assertFalse(os.path.exists(seen))
        self.assertEqual(target.read_log().count("Starting session"), 0)

    def test_nothing_of_the_users_environment_reaches_a_session(self) -> None:
        target = self.lab.configured_target("one", "AcceptEnv *")
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
        target, port = self.lab.linked_target("one"), free_port()
        blob = read(target.keys).split("restrict ")[1]
        script = self.lab.base + "/look-rrsync"
        write(
            script,
            "#!/bin/bash\n(exec 3<>/dev/tcp/127.0.0.1/%d) 2>/dev/null && echo open >>"
            " %s/opened\nexec /usr/bin/rrsync -wo %s\n" % (port, self.lab.base, target.path),
            0o755,
        )
        write(
            target.keys, 'command="%s" %s' % (script, blob)
        )  # forwarding is not forbidden by this key
        write(self.lab.ssh_config, "RemoteForward 127.0.0.1:%d 127.0.0.1:9\n" % port)
        out = self.lab.offsync("doctor", check=1).out
        self.assertRegex(out, "OPEN +forward a port")
        write(self.lab.source + "/f", "x")
        self.lab.offsync("apply", check=0)
        self.assertFalse(os.path.exists(self.lab.base + "/opened"))
        self.assertNotIn(
            "port %d" % port,
            "".join(re.findall(r".*tcpip-forward.*|.*forwarding.*", target.read_log())),
        )

    @unittest.skipUnless(can_mount(), "the account's home is changed in a mount namespace")
    def test_a_revoked_key_binds_target_add(self) -> None:
        """The files that ssh reads are those of the account's home, whatever HOME says."""
        self.lab.init()
        target = self.lab.target("one")
        self.lab.link(target)
        home = self.lab.base + "/account"
        known = home + "/.ssh/known_hosts"
        passwd = change("/etc/passwd", "s,^root:.*,root:x:0:0:root:%s:/bin/sh," % home)
        words = ["--path", target.path, "--port", str(target.port)]
        words += ["--host-key", target.fingerprint]
        for marker, refused in (
            ("@revoked * %s", True),
            ("@revoked [%s]:%d %%s" % (target.address, target.port), True),
            ("@revoked other.example %s", False),
        ):
            with self.subTest(marker=marker):
                write(known, marker % read(target.host_key + ".pub").strip() + "\n")
                argv = ["unshare", "--mount", "sh", "-e", "-c", passwd + 'exec "$0" "$@"']
                argv += [sys.executable, OFFSYNC, "target", "add", target.login, *words]
                done = subprocess.run(
                    argv,
                    env=self.lab.env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                self.assertEqual(done.returncode, 1 if refused else 0, done.stderr)
                if refused:
                    self.assertIn("host key is revoked", done.stderr)
                    self.assertNotIn(target.login, read(self.lab.state + "/config.yaml"))

    def test_revoked_host_keys_of_ssh_config_is_one_sentence_after_one_attempt(self) -> None:
        target = self.lab.configured_target("one")
        revoked = self.lab.base + "/revoked"
        write(revoked, read(target.host_key + ".pub"))
        write(self.lab.ssh_config, "RevokedHostKeys %s\n" % revoked)
        before = target.read_log().count("Connection from")
        self.assertIn("host key is revoked", self.lab.offsync("plan", check=1).out)
        self.assertEqual(target.read_log().count("Connection from"), before + 1)
        done = self.lab.add(target, check=1)
        self.assertIn("host key is revoked", done.err)
        self.assertLess(target.read_log().count("Connection from"), before + 5)
        write(self.lab.ssh_config, "")
        self.lab.offsync("plan", check=0)

    def test_host_key_algorithms_of_ssh_config(self) -> None:
        """The key that was compared is the one that is trusted, or it is said why it cannot be."""
        rsa = self.lab.base + "/rsa"
        subprocess.run([require("ssh-keygen"), "-q", "-t", "rsa", "-N", "", "-f", rsa], check=True)
        self.lab.init()
        target = self.lab.target("one", "HostKey " + rsa)
        self.lab.link(target)
        for order in ("rsa-sha2-512", "rsa-sha2-512,ssh-ed25519"):
            write(self.lab.ssh_config, "HostKeyAlgorithms %s\n" % order)
            done = self.lab.add(target, check=1)
            self.assertIn("got SHA256:", done.err)
            self.assertIn("(ssh-rsa)", done.err)
            self.assertFalse(os.path.exists(self.lab.state + "/known_hosts"))
        write(self.lab.ssh_config, "HostKeyAlgorithms ssh-ed25519,rsa-sha2-512\n")
        self.lab.add(target)
        self.assertIn("ssh-ed25519", read(self.lab.state + "/known_hosts"))
        self.lab.offsync("plan", check=0)

    def test_one_connection_is_enough_where_the_first_key_is_the_one(self) -> None:
        self.lab.init()
        target = self.lab.target("one")
        self.lab.link(target)
        self.lab.add(target)
        self.assertEqual(
            target.read_log().count("Connection from"), 3
        )  # asking for the key, the connection, the forwarding proof


class OneKey(LabTestCase):
    """What is trusted is the one key that was shown, compared and proved."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.init()
        self.other = self.lab.base + "/ecdsa"
        make = [require("ssh-keygen"), "-q", "-t", "ecdsa", "-N", "", "-f", self.other]
        subprocess.run(make, check=True)
        self.target = self.lab.target("one", "HostKey " + self.other)
        self.lab.link(self.target)

    def test_yes_stores_what_was_shown_alone(self) -> None:
        words = [sys.executable, OFFSYNC, "target", "add", self.target.login]
        words += ["--path", self.target.path, "--port", str(self.target.port)]
        status, seen = type_on_terminal(words, self.lab.env, (b"yes or no: ", "yes\n"))
        self.assertEqual(status, 0, seen)
        self.assertEqual(seen.count("SHA256:"), 1)
        self.assertIn(self.target.fingerprint, seen)
        known = read(self.lab.state + "/known_hosts")
        self.assertEqual((known.count("\n"), known.count("ssh-ed25519")), (1, 1))

    def test_a_man_in_the_middle_with_a_key_of_his_own(self) -> None:
        """The key that he has is of a type that was never compared."""
        self.lab.add(self.target)
        write(self.lab.source + "/f", "secret")
        self.target.stop()
        self.target.new_host_key()  # he does not hold the one that is known
        self.target.host_key, held = self.other, self.target.host_key
        self.target.options = ""
        self.target.start()
        done = self.lab.offsync("apply", check=1)
        self.assertRegex(done.err, "not trusted yet|CHANGED")
        self.assertEqual(snapshot(self.target.path), {})
        self.target.host_key = held

    def test_gssapi_takes_no_part(self) -> None:
        self.lab.add(self.target)
        write(self.lab.ssh_config, "GSSAPIKeyExchange yes\nGSSAPIAuthentication yes\n")
        self.assertIn("GSSAPIKeyExchange=no", self.lab.offsync("-v plan", check=0).err)

    def test_an_ssh_before_8_7(self) -> None:
        """Without -f it asks for a shell; its master keeps stderr open."""
        real = require("ssh")
        self.lab.program(
            "ssh",
            '#!/bin/bash\nset -- -F %s "$@"\ncase " $* " in *" -N "*" ControlMaster=yes "*)\n'
            'case " $* " in *" -f "*) ;; *) echo asks for a shell >&2; exit 1;; esac;; esac\n'
            'case " $* " in *" -f "*) (exec 9>&2; sleep 20) & echo $! >> %s/held;; esac\n'
            'exec %s "$@"\n' % (self.lab.ssh_config, self.lab.base, real),
        )
        self.lab.add(self.target)
        write(self.lab.source + "/f", "x")
        self.lab.offsync("apply", check=0, timeout=15)
        self.assertEqual(snapshot(self.target.path), snapshot(self.lab.source))
        for pid in read(self.lab.base + "/held").split():
            os.kill(int(pid), signal.SIGKILL)

    def test_a_proxy_command_that_needs_the_environment(self) -> None:
        """ssh has it; nothing of it is sent."""
        self.lab.add(self.target)
        proxy = self.lab.base + "/proxy"
        write(
            proxy,
            '#!/bin/sh\n[ -n "$PROFILE" ] || { echo no profile >&2; exit 1; }\nexec %s %s "$@" 0\n'
            % (sys.executable, os.path.join(HERE, "delay.py")),
            0o755,
        )
        write(self.lab.ssh_config, "ProxyCommand %s %%h %%p\nSendEnv PROFILE\n" % proxy)
        os.unlink(self.target.keys)
        done = self.lab.offsync("plan", env={"PROFILE": "x"}, check=1)
        self.assertIn("refused this controller's key", done.out)
        self.assertIn("no profile", self.lab.offsync("plan", check=1).out)


if __name__ == "__main__":
    unittest.main()
