"""The right sentence for the right side: failures provoked from the real programs, each with the side that is named and the remedy.

Most of the time here is waited, so each class is a process of its own.
"""
from __future__ import annotations

import unittest

from lab import OFFSYNC, USER, free_port, read, require, write
from test_plan import SharedLab


class SentenceCase(SharedLab):
    """One target; each row changes its sshd, its forced command, or the controller's ssh_config."""

    WAITS = True

    def setUp(self) -> None:
        super().setUp()
        write(self.lab.ssh_config, "")
        write(self.source + "/f", "x")
        if not hasattr(type(self), "keys"):
            type(self).keys = read(self.target.keys)
        write(self.target.keys, self.keys)

    def said(self, *words: str, never: tuple = (), program: str = OFFSYNC) -> None:
        """plan fails, and says these words (and never others), once."""
        out = self.lab.offsync("plan", check=1, program=program, timeout=100).out
        why = out.split("not compared: ")[1].split("\n")[0]
        for word in words:
            self.assertIn(word, why)
        for word in (*never, "in a way that is not known"):
            self.assertNotIn(word, why)
        self.assertLess(len(why), 900)


class Sshd(SentenceCase):
    def test_what_sshd_is_configured_to(self) -> None:
        rows = (("Ciphers aes128-ctr", "Ciphers aes256-ctr\n", "no algorithm in common"), ("KexAlgorithms curve25519-sha256", "KexAlgorithms ecdh-sha2-nistp256\n", "no algorithm in common"),
                ("MACs hmac-sha2-256\nCiphers aes128-ctr", "MACs hmac-sha2-512\nCiphers aes128-ctr\n", "no algorithm in common"),
                ("AuthenticationMethods publickey,password\nPasswordAuthentication yes", "", "wants more than a key"), ("PubkeyAuthentication no\nPasswordAuthentication yes", "", "takes none"),
                ("MaxSessions 0", "", "raise MaxSessions"), ("DenyUsers " + USER, "", "refused our key"), ("AllowUsers nobody", "", "refused our key"),
                ("ForceCommand internal-sftp", "", "sftp only"), ("ForceCommand /bin/false", "", "no rsync ever answered"), ("ForceCommand /usr/sbin/nologin", "", "give %s a real one" % USER))
        self.addCleanup(self.restart, "")
        for options, config, words in rows:
            with self.subTest(options=options):
                self.restart(options)
                write(self.lab.ssh_config, config)
                self.said(words, never=("apply again finishes", "run: offsync doctor"))
        self.restart("")
        write(self.lab.ssh_config, "")
        self.lab.offsync("plan", check=0)

    def restart(self, options: str) -> None:
        self.target.stop()
        self.target.options = options
        self.target.start()


class Answers(SentenceCase):
    def test_what_answers_instead_of_rsync(self) -> None:
        quick = self.lab.base + "/offsync.py"       # the time for an answer is shortened in a copy
        write(quick, read(OFFSYNC).replace("SESSION_DEADLINE = 45.0", "SESSION_DEADLINE = 3.0"))
        fake = self.lab.base + "/fake"
        rrsync = "/usr/bin/rrsync -wo " + self.there
        rows = (("exit 1; " + rrsync, "no rsync ever answered"), ("exec dash", "then did not answer in time"), ("read -p name answer; " + rrsync, "then did not answer in time"),
                ("cat > /dev/null; " + rrsync, "then did not answer in time"), ("echo Welcome; " + rrsync, "prints text where rrsync must be alone"), ("true", "not rrsync"),
                ("/usr/sbin/nologin", "give %s a real one" % USER), ("bash -r -c " + rrsync.replace(" ", "\\\\ "), "restricted one"), ("/nowhere/rrsync -wo /x", "rrsync, or its interpreter, is not at"),
                (fake + " '#!/nowhere/python3'", "rrsync, or its interpreter, is not at"), ("echo 'openrsync: protocol 29' >&2; exit 2", "openrsync answers there"),
                ("echo 'option --delete has been disabled on this server.' >&2; exit 1", "of the same release"), ("echo 'Password change required but no TTY available.' >&2; exit 1", "chage -M -1"),
                ("/usr/bin/rrsync -ro " + self.there, "for reading only"), ("/usr/bin/rrsync -wo /nowhere", "gone there or is no directory"))
        for command, words in rows:
            with self.subTest(command=command):
                if command.startswith(fake):
                    write(self.lab.base + "/rrsync-odd", "#!/nowhere/python3\n", 0o755)
                    command = self.lab.base + "/rrsync-odd"
                write(self.target.keys, 'command="%s",restrict %s' % (command, self.keys.split("restrict ")[1]))
                self.said(words, never=("apply again finishes the job", "connection was lost"), program=quick)

    def test_an_rrsync_without_its_rsync(self) -> None:
        script = self.lab.base + "/rrsync"
        write(script, read(require("rrsync")).replace("/usr/bin/rsync", "/nowhere/rsync"), 0o755)
        write(self.target.keys, self.keys.replace("/usr/bin/rrsync", script))
        self.said("rsync is missing there", "install-deps --role target")


class Way(SentenceCase):
    def test_the_way_to_the_target(self) -> None:
        """A jump host or ProxyCommand that fails is told as that, in its own words; never a remedy for the target."""
        jump = self.lab.target("jump", "AllowTcpForwarding no")
        self.addCleanup(jump.stop)
        known = self.lab.base + "/jump_known"
        identity = "  IdentityFile %s\n  UserKnownHostsFile %s\n" % (self.lab.state + "/id_ed25519", known)
        host = "Host %s\n  ProxyJump bastion\nHost bastion\n  HostName %s\n  Port %%d\n  User %s\n%s" % (self.target.address, jump.address, USER, identity)
        line = "[%s]:%d %s" % (jump.address, jump.port, read(jump.host_key + ".pub"))
        never = ("MaxStartups", "offsync link", "offsync target add")
        for name, config, keys, hosts, words in (
                ("closed port", host % free_port(), "", line, "Connection refused"), ("unknown key", host % jump.port, "", "", "Host key verification failed"),
                ("refused login", host % jump.port, "", line, "Permission denied"), ("forbids forwarding", host % jump.port, read(self.lab.state + "/id_ed25519.pub"), line, "prohibited"),
                ("no such name", host.replace("HostName " + jump.address, "HostName no-such-jump.invalid") % 22, "", line, "Could not resolve"),
                ("a command that fails", "ProxyCommand sh -c 'echo gateway says no >&2; exit 1'\n", "", "", "gateway says no")):
            with self.subTest(name=name):
                write(jump.keys, keys)
                write(known, hosts)
                write(self.lab.ssh_config, config)
                self.said("the way to it failed", "Proxy", words, never=never)

    def test_the_key_and_the_name(self) -> None:
        write(self.target.keys, 'from="10.9.9.9",' + self.keys)
        self.said("refused our key", "--from")
        write(self.target.keys, self.keys)
        write(self.lab.ssh_config, "ConnectionAttempts 90\nHostName 127.0.0.1\nPort %d\n" % free_port())
        write(self.lab.state + "/config.yaml", self.config.replace("    port: %d\n" % self.target.port, ""))
        self.said("connection was refused")
        write(self.lab.ssh_config, "HostName no-such-host.invalid\n")
        self.said("does not resolve")


if __name__ == "__main__":
    unittest.main()
