"""The right sentence for the right side: failures provoked from the real programs, each with the
side that is named and the remedy.

About 60 rows: what sshd is configured to, what answers instead of rsync, accounts, shells and disks
of the target (in a mount namespace of
its own, as root), dropbear, and the way there. Recorded answers of programs that cannot be had here
are in test_failure_table.Diagnosis.
Most of the time here is waited, so each class is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import unittest

from lab import (
    USER,
    DiagnosisCase,
    can_mount,
    change,
    free_port,
    login_shell,
    pam,
    read,
    require,
    wait_for,
    write,
)


class Sshd(DiagnosisCase):
    def test_what_sshd_is_configured_to(self) -> None:
        rows = (
            ("Ciphers aes128-ctr", "Ciphers aes256-ctr\n", "no algorithm in common"),
            (
                "KexAlgorithms curve25519-sha256",
                "KexAlgorithms ecdh-sha2-nistp256\n",
                "no algorithm in common",
            ),
            (
                "MACs hmac-sha2-256\nCiphers aes128-ctr",
                "MACs hmac-sha2-512\nCiphers aes128-ctr\n",
                "no algorithm in common",
            ),
            (
                "AuthenticationMethods publickey,password\nPasswordAuthentication yes",
                "",
                "wants more than a key",
            ),
            ("PubkeyAuthentication no\nPasswordAuthentication yes", "", "takes none"),
            ("MaxSessions 0", "", "raise MaxSessions"),
            ("DenyUsers " + USER, "", "refused this controller's key"),
            ("AllowUsers nobody", "", "refused this controller's key"),
            ("ForceCommand internal-sftp", "", "sftp only"),
            ("ForceCommand /bin/false", "", "rsync did not start on the target"),
            ("ForceCommand /usr/sbin/nologin", "", "getent passwd %s" % USER),
        )
        if os.geteuid() == 0:
            rows += (("ChrootDirectory /usr/share", "", "take ChrootDirectory"),)
        self.addCleanup(self.restart, "")
        for options, config, words in rows:
            with self.subTest(options=options):
                self.restart(options)
                write(self.lab.ssh_config, config)
                self.said(words, never=("apply again finishes", "run: offsync doctor"))
        self.restart("")
        write(self.lab.ssh_config, "")
        self.lab.offsync("plan", check=0)


class ForcedCommandAnswers(DiagnosisCase):
    def test_what_answers_instead_of_rsync(self) -> None:
        quick = self.lab.altered(("SESSION_DEADLINE = 45.0", "SESSION_DEADLINE = 3.0"))
        fake = self.lab.base + "/fake"
        rrsync = "/usr/bin/rrsync -wo " + self.there
        rows = (
            ("exit 1; " + rrsync, "rsync did not start on the target"),
            ("exec dash", "but did not answer in time"),
            ("read -p name answer; " + rrsync, "but did not answer in time"),
            ("cat > /dev/null; " + rrsync, "but did not answer in time"),
            ("echo Welcome; " + rrsync, "prints text, which breaks the rsync protocol"),
            (
                "/usr/bin/python3 -c 'import no_such_module'",
                "a library, a module or its interpreter is missing",
            ),
            ("/usr/bin/env no-such-python3", "a library, a module or its interpreter is missing"),
            ("true", "not rrsync"),
            ("/usr/sbin/nologin", "getent passwd %s" % USER),
            ("bash -r -c " + rrsync.replace(" ", "\\\\ "), "restricted one"),
            ("/nowhere/rrsync -wo /x", "rrsync, or its interpreter, is missing on the target"),
            (
                fake + " '#!/nowhere/python3'",
                "rrsync, or its interpreter, is missing on the target",
            ),
            ("echo 'openrsync: protocol 29' >&2; exit 2", "or openrsync answers"),
            (
                "echo 'option --delete has been disabled on this server.' >&2; exit 1",
                "of the same release",
            ),
            ("echo 'Password change required but no TTY available.' >&2; exit 1", "chage -l"),
            ("kill -9 $PPID", "accepted the login, then closed the connection"),
            ("/usr/bin/rrsync -ro " + self.there, "for reading only"),
            ("/usr/bin/rrsync -wo /nowhere", "is gone or is no directory"),
        )
        for command, words in rows:
            with self.subTest(command=command):
                if command.startswith(fake):
                    write(self.lab.base + "/rrsync-odd", "#!/nowhere/python3\n", 0o755)
                    command = self.lab.base + "/rrsync-odd"
                write(
                    self.target.keys,
                    'command="%s",restrict %s' % (command, self.keys.split("restrict ")[1]),
                )
                self.said(
                    words,
                    never=("apply again finishes the job", "connection was lost"),
                    program=quick,
                )

    def test_an_rrsync_without_its_rsync(self) -> None:
        script = self.lab.base + "/rrsync"
        write(script, read(require("rrsync")).replace("/usr/bin/rsync", "/nowhere/rsync"), 0o755)
        write(self.target.keys, self.keys.replace("/usr/bin/rrsync", script))
        self.said("rsync is missing on the target", "install-deps --role target")


@unittest.skipUnless(can_mount(), "no mount namespace can be had here (it needs root)")
class TargetHost(DiagnosisCase):
    """The target's accounts, shells, PAM and disks; nothing of this machine's is changed."""

    def test_accounts_and_shells(self) -> None:
        rows = [
            (login_shell("/usr/sbin/nologin"), "", "getent passwd root"),
            (login_shell("/bin/false"), "", "the login shell an ordinary one"),
            (login_shell("/nowhere/sh"), "", "journalctl -u ssh"),
            (login_shell("/bin/rbash"), "", "a restricted one such as rbash"),
            (change("/etc/shadow", "s,^root:[^:]*:,root:!:,"), "", "a locked account"),
            (
                change("/etc/shadow", "s,^root:.*,root:*:19000:0:99999:7::1:,"),
                "",
                "journalctl -u ssh",
            ),
        ]
        if os.path.exists("/usr/bin/git-shell"):
            rows.append((login_shell("/usr/bin/git-shell"), "", "git-shell"))
        if os.path.exists("/etc/pam.d/sshd"):
            account = pam("account required pam_unix.so", "session required pam_permit.so")
            rows += [
                (
                    change("/etc/shadow", "s,^root:.*,root:*:19000:0:99999:7::1:,") + account,
                    "UsePAM yes",
                    "chage -l root",
                ),
                (
                    change("/etc/shadow", "s,^root:.*,root:*:0:0:99999:7:::,") + account,
                    "UsePAM yes",
                    "chage -l root",
                ),
                (pam("account required pam_deny.so"), "UsePAM yes", "an expired account, PAM"),
                (
                    pam("account required pam_permit.so", "session required pam_deny.so"),
                    "UsePAM yes",
                    "PAM opens a session",
                ),
            ]
        for namespace, options, words in rows:
            with self.subTest(words=words, namespace=namespace):
                self.restart(options, namespace)
                self.said(
                    words, never=("apply again finishes", "connection was lost", "~/.ssh/config")
                )

    def test_what_the_host_does_at_every_login(self) -> None:
        for name in ("/etc/ssh/sshrc", "/run/nologin"):
            # A place to mount at, in the host's own file system for a moment.
            if not os.path.exists(name):
                write(name, "")
                self.addCleanup(os.unlink, name)
        script, text = self.lab.base + "/sshrc", self.lab.base + "/nologin"
        write(script, "echo hello\n")
        write(text, "System is booting up. Unprivileged users are not permitted to log in yet.\n")
        account = pam("account required pam_nologin.so", "session required pam_permit.so")
        empty = change("/etc/shadow", "s,^root:[^:]*:,root::,")
        for namespace, options, words in (
            ("mount --bind %s /etc/ssh/sshrc\n" % script, "", "/etc/ssh/sshrc"),
            (account + "mount --bind %s /run/nologin\n" % text, "UsePAM yes", "closed for logins"),
            (
                empty,
                "PermitEmptyPasswords yes\nPasswordAuthentication yes",
                "lets anybody log in as root without a key",
            ),
        ):
            with self.subTest(words=words):
                self.restart(options, namespace)
                self.said(words, never=("ForceCommand is", "authorized_keys", "expired"))

    def test_disks(self) -> None:
        """Each fails an apply; what the disk is mounted at is the target's path."""
        small = "mount -t tmpfs -o size=16k tmpfs %s\n" % self.there
        for namespace, command, words in (
            (small, "apply", "the target's disk is full"),
            ("ulimit -f 1\n", "apply", "a file is larger than"),
            (small + "mount -o remount,ro %s\n" % self.there, "apply", "mounted read-only"),
            (
                small.replace("16k", "1m")
                + "mkdir %s/m && mount -t tmpfs tmpfs %s/m\n" % (self.there, self.there),
                "apply --delete",
                "or a mount point, is in the way",
            ),
        ):
            with self.subTest(words=words):
                write(self.source + "/f", "x" * 100000)
                self.restart("", namespace)
                self.said(words, never=("connection was lost", "host key"), command=command)

    def test_other_login_shells_work(self) -> None:
        """The twin: what is no failure with the shells that are here."""
        for path in filter(
            os.path.exists,
            (
                "/bin/dash",
                "/bin/zsh",
                "/bin/mksh",
                "/bin/ksh",
                "/bin/tcsh",
                "/usr/bin/fish",
                "/bin/busybox",
            ),
        ):
            with self.subTest(path=path):
                self.restart("", login_shell(path))
                self.lab.offsync("plan", check=0)


@unittest.skipUnless(
    can_mount() and shutil.which("dropbear"), "needs root for a mount namespace, and dropbear"
)
class Dropbear(DiagnosisCase):
    def test_dropbear_instead_of_sshd(self) -> None:
        self.target.stop()
        key = self.target.base + "/dropbear_key"
        subprocess.run(
            ["dropbearkey", "-t", "ed25519", "-f", key],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        shown = subprocess.run(
            ["dropbearkey", "-y", "-f", key], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        line = next(line for line in shown.splitlines() if line.startswith("ssh-ed25519 "))
        write(
            self.lab.state + "/known_hosts",
            "[%s]:%d %s\n" % (self.target.address, self.target.port, line),
        )
        os.chmod(self.target.home + "/.ssh", 0o700)
        for shell, options, keys, config, words in (
            ("/bin/sh", [], self.keys, "", ""),
            ("/bin/sh", [], "\n", "", "refused this controller's key"),
            ("/bin/rbash", [], self.keys, "", "restricted one"),
            (
                "/bin/sh",
                [],
                self.keys,
                "Ciphers aes256-gcm@openssh.com\n",
                "no algorithm in common",
            ),
            ("/bin/sh", ["-c", "/usr/sbin/nologin"], self.keys, "", "getent passwd root"),
            ("/bin/sh", ["-t"], self.keys, "", "wants more than a key"),
        ):
            with self.subTest(words=words or "it works"):
                write(self.target.keys, keys, 0o600)
                write(self.lab.ssh_config, config)
                prepare = change(
                    "/etc/passwd", "s,^root:.*,root:x:0:0:root:%s:%s," % (self.target.home, shell)
                )
                argv = [
                    "unshare",
                    "--mount",
                    "sh",
                    "-e",
                    "-c",
                    prepare + 'exec "$0" "$@"',
                    require("dropbear"),
                    "-F",
                    "-E",
                    "-r",
                    key,
                    "-p",
                    "%s:%d" % (self.target.address, self.target.port),
                    "-P",
                    "",
                    *options,
                ]
                with open(self.target.log, "wb") as log:
                    self.target.process = subprocess.Popen(
                        argv,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                self.target.pump = subprocess.Popen(["true"])
                wait_for(lambda: "Not backgrounding" in self.target.read_log(), "dropbear")
                try:
                    if words:
                        self.said(words, never=("apply again finishes", "connection was lost"))
                    else:
                        self.lab.offsync("plan", check=0)
                finally:
                    self.target.stop()


class JumpHosts(DiagnosisCase):
    def test_the_way_to_the_target(self) -> None:
        """A jump host or ProxyCommand that fails is told as that, in its own words; never a remedy
        for the target.
        """
        jump = self.lab.target("jump", "AllowTcpForwarding no")
        self.addCleanup(jump.stop)
        known = self.lab.base + "/jump_known"
        identity = "  IdentityFile %s\n  UserKnownHostsFile %s\n" % (
            self.lab.state + "/id_ed25519",
            known,
        )
        host = (
            "Host %s\n  ProxyJump bastion\nHost bastion\n  HostName %s\n  Port %%d\n  User %s\n%s"
            % (self.target.address, jump.address, USER, identity)
        )
        line = "[%s]:%d %s" % (jump.address, jump.port, read(jump.host_key + ".pub"))
        never = ("MaxStartups", "offsync link", "offsync target add")
        for name, config, keys, hosts, words in (
            ("closed port", host % free_port(), "", line, "Connection refused"),
            ("unknown key", host % jump.port, "", "", "Host key verification failed"),
            ("refused login", host % jump.port, "", line, "Permission denied"),
            (
                "forbids forwarding",
                host % jump.port,
                read(self.lab.state + "/id_ed25519.pub"),
                line,
                "prohibited",
            ),
            (
                "no such name",
                host.replace("HostName " + jump.address, "HostName no-such-jump.invalid") % 22,
                "",
                line,
                "Could not resolve",
            ),
            (
                "a command that fails",
                "ProxyCommand sh -c 'echo gateway says no >&2; exit 1'\n",
                "",
                "",
                "gateway says no",
            ),
        ):
            with self.subTest(name=name):
                write(jump.keys, keys)
                write(known, hosts)
                write(self.lab.ssh_config, config)
                self.said("the jump host or ProxyCommand failed", words, never=never)

    def test_the_key_and_the_name(self) -> None:
        write(self.target.keys, 'from="10.9.9.9",' + self.keys)
        self.said("refused this controller's key", "--from")
        write(self.target.keys, self.keys)
        write(
            self.lab.ssh_config,
            "ConnectionAttempts 90\nHostName 127.0.0.1\nPort %d\n" % free_port(),
        )
        write(
            self.lab.state + "/config.yaml",
            self.config.replace("    port: %d\n" % self.target.port, ""),
        )
        self.said("connection was refused")
        write(self.lab.ssh_config, "HostName no-such-host.invalid\n")
        self.said("does not resolve")


if __name__ == "__main__":
    unittest.main()
