"""The table of failures: recorded answers of the real programs, and the row that each one gets."""

from __future__ import annotations

import ast
import unittest
from unittest import mock

from lab import OFFSYNC, offsync, read

KEY = offsync.PublicKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIKtest", "me@here")


class Diagnosis(unittest.TestCase):
    """Answers as the real programs gave them: OpenSSH 9.2, rsync and rrsync 3.5.0, and older ones
    where another is named. Further lines of an answer are indented by four.
    """

    ANSWERS = """
host-key-changed: @    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
    Host key verification failed.
host-key-unknown: No ED25519 host key is known for [127.0.0.1]:2201 and you have requested strict \
checking.
    Host key verification failed.
unresolved-host: ssh: Could not resolve hostname no-such-host.invalid: Name or service not known
connection-refused: ssh: connect to host 127.0.0.1 port 58015: Connection refused
timeout: ssh: connect to host 10.9.9.9 port 22: No route to host
timeout: ssh: connect to host 10.9.9.9 port 22: Network is unreachable
timeout: ssh: connect to host 10.9.9.9 port 22: Connection timed out
timeout: Connection timed out during banner exchange
    Connection to 127.0.0.2 port 2201 timed out
timeout: Timeout, server 127.0.0.1 not responding.
ssh-client-error: /root/.ssh/config: line 1: Bad configuration option: nonsense
    /root/.ssh/config: terminating, 1 bad configuration options
ssh-client-error: Load key "/x/.offsync/id_ed25519": error in libcrypto
    root@127.0.0.1: Permission denied (publickey).
key-refused: root@127.0.0.1: Permission denied (publickey,password).
key-refused: Received disconnect from 127.0.0.1 port 22:2: Too many authentication failures
busy-sshd: kex_exchange_identification: Connection closed by remote host
    Connection closed by 127.0.0.1 port 2201
busy-sshd: kex_exchange_identification: read: Connection reset by peer
session-refused: mux_client_request_session: session request failed: Session open refused by peer
nologin: This account is currently not available.
    rsync: connection unexpectedly closed (0 bytes received so far) [sender]
locked: /usr/bin/rrsync error: Another instance of rrsync is already accessing this directory.
    rsync: connection unexpectedly closed
no-rrsync: bash: line 1: /nowhere/rrsync: No such file or directory
no-rrsync: sh: 1: /nowhere/rrsync: not found
no-rrsync: bash: line 1: /nowhere/rrsync: Permission denied
no-rrsync: /usr/bin/python3: can't open file '/usr/share/doc/rsync/support/rrsync': [Errno 2] No \
such file or directory
read-only-key: /usr/bin/rrsync error: sending to read-only server is not allowed
read-only-key: rrsync: sending to read-only server not allowed
rrsync-rejected-option: /usr/bin/rrsync: SSH_ORIGINAL_COMMAND='echo hi' is not rsync
no-directory: /usr/bin/rrsync: Restricted directory does not exist!
no-directory:     os.chdir(args.dir)
    FileNotFoundError: [Errno 2] No such file or directory: '/srv/gone'
no-directory: NotADirectoryError: [Errno 20] Not a directory: '/srv/file'
no-rsync: FileNotFoundError: [Errno 2] No such file or directory: '/usr/bin/rsync'
    rsync: connection unexpectedly closed
no-rsync: openrsync: unrecognized option
rrsync-rejected-option: /usr/bin/rrsync error: option --delete has been disabled on this server.
rrsync-rejected-option: /usr/bin/rrsync: invalid rsync-command syntax or options
shell-output: protocol version mismatch -- is your shell clean?
    (see the rsync manpage for an explanation)
space: rsync: [receiver] write failed on "/srv/x/big": No space left on device (28)
space: rsync: [receiver] write failed on "/srv/x/big": Disk quota exceeded (122)
read-only-disk: rsync: [receiver] mkstemp "/srv/x/.f.7SxgQw" failed: Read-only file system (30)
file-error: rsync error: error in file IO (code 11) at receiver.c(380) [receiver=3.5.0]
other: rsync ended without a word (code 11)
source-unreadable: rsync: [sender] link_stat "/srv/app/gone" failed: No such file or directory (2)
source-unreadable: rsync: [sender] send_files failed to open "/srv/app/x": Permission denied (13)
source-unreadable: file has vanished: "/srv/app/x"
blocked-by-directory: could not make way for new regular file: f
permission: rsync: [receiver] mkstemp "/srv/x/.f.7SxgQw" failed: Permission denied (13)
permission: rsync: [generator] set times on "/srv/x" failed: Operation not permitted (1)
no-directory: rsync: [receiver] mkstemp "/srv/x/d/.f.7SxgQw" failed: Not a directory (20)
connection-lost: rsync: connection unexpectedly closed (8 bytes received so far) [sender]
connection-lost: client_loop: send disconnect: Broken pipe
algorithms: Unable to negotiate with 127.0.0.1 port 2201: no matching host key type found. Their \
offer: ssh-rsa
algorithms: Unable to negotiate with 127.0.0.1 port 2201: no matching cipher found. Their offer: \
3des-cbc
second-factor: root@127.0.0.1: Permission denied (keyboard-interactive).
second-factor: root@127.0.0.1: Permission denied (password).
key-refused: root@127.0.0.1: Permission denied (publickey,password,keyboard-interactive).
ssh-client-error: Bad owner or permissions on /root/.ssh/config
busy-sshd: kex_exchange_identification: read: Connection reset by peer
    Not allowed at this time
expired: Your account has expired; please contact your system administrator.
    Connection closed by 127.0.0.1 port 34699
closed-after-login: /bin/bash: line 1: /nonexistent/offsync-connection-ended: No such file or \
directory
    kex_exchange_identification: Connection closed by remote host
other-service: fatal: unrecognized command '/usr/bin/rrsync -wo /srv/x'
    rsync: connection unexpectedly closed (0 bytes received so far) [sender]
closed-during-login: Connection closed by 127.0.0.1 port 2201
session-refused: mux_client_request_session: session request failed: Session open refused by peer
expired: Password change required but no TTY available.
    rsync: connection unexpectedly closed (0 bytes received so far) [sender]
other-service: This service allows sftp connections only.
other-service: fatal: unrecognized command 'rsync --server -e.LsfxCIvu . .'
    fatal: Interactive git shell is not enabled.
nologin: rbash: line 1: /usr/bin/rrsync: restricted: cannot specify `/' in command names
revoked: @       WARNING: REVOKED HOST KEY DETECTED!               @
    The ED25519 host key for h host key is revoked.
host-key-expired: Certificate invalid: expired
    Host key verification failed.
no-rsync: rsync: --timeout=10800: too large
blocked-by-directory: rsync: [generator] delete_file: rmdir(mnt) failed: Device or resource busy \
(16)
unreadable-below: rsync: [generator] opendir "/srv/x/lost+found" failed: Permission denied (13)
permission: rsync: [receiver] rename "/srv/x/.~tmp~/f" -> "f": Operation not permitted (1)
no-answer: rsync: connection unexpectedly closed (0 bytes received so far) [sender]
    rsync error: error in rsync protocol data stream (code 12)
ssh-client-error: No user exists for uid 4711
unsupported-name: rsync: [generator] symlink "/srv/x/l" -> "f" failed: Operation not permitted (1)
unsupported-name: rsync: [receiver] mkstemp "/srv/x/.a:b.7SxgQw" failed: Invalid argument (22)
no-staging: Unable to create partial-dir for f -- discarding completed file.
no-staging: rsync: [generator] opendir "/srv/x/.~tmp~" failed: Permission denied (13)
revoked: Host key ED25519 SHA256:x revoked by file /etc/revoked
    Host key verification failed.
chroot: Changed root directory to "/srv"\r
    /bin/bash: No such file or directory
booting: System is booting up. Unprivileged users are not permitted to log in yet. Please come \
back later. For technical details, see pam_nologin(8).
broken: rsync: error while loading shared libraries: libpopt.so.0: cannot open shared object \
file: No such file or directory
    rsync: connection unexpectedly closed (0 bytes received so far) [sender]
broken: /usr/bin/env: 'python3': No such file or directory
broken: Traceback (most recent call last):
      File "/usr/bin/rrsync", line 7, in <module>
        import braceexpand
    ModuleNotFoundError: No module named 'braceexpand'
name-too-long: rsync: [receiver] mkstemp "/srv/x/.nnn.7SxgQw" failed: File name too long (36)
file-too-large: rsync: [receiver] write failed on "/srv/x/big": File too large (27)
    rsync error: error in file IO (code 11) at receiver.c(657) [receiver=3.5.0]
disk-error: rsync: [receiver] write failed on "/srv/x/f": Input/output error (5)
    rsync error: error in file IO (code 11) at receiver.c(657) [receiver=3.5.0]
stale: rsync: [receiver] mkstemp "/srv/x/.f.7SxgQw" failed: Stale file handle (116)
    rsync error: error in file IO (code 11) at receiver.c(657) [receiver=3.5.0]
source-unreadable: rsync: [sender] read errors mapping "/srv/source/f": Input/output error (5)
unresolved-host: Could not resolve host "nope" by any of its canonical domains
other: something never seen before
other: (nothing)
"""

    def test_every_row_by_a_real_answer(self) -> None:
        target = offsync.Target("u@h", "/srv/a b")
        seen = set()
        for row in self.ANSWERS.strip().replace("\n    ", "\0").split("\n"):
            kind, said = row.split(": ", 1)
            answer = said.replace("(nothing)", "").replace("\0", "\n")
            seen.add(kind)
            with self.subTest(answer=answer):
                error = offsync.diagnose(target, offsync.Result(12, b"", answer.encode()))
                self.assertEqual(error.kind, kind)
                self.assertTrue(str(error).startswith("u@h: "))
                self.assertNotIn("{", str(error))
                self.assertNotIn("\n", str(error))
        self.assertEqual(
            seen - {"other"},
            {kind for kind, row in offsync.FAILURES.items() if row.patterns},
        )


class Names(unittest.TestCase):
    """A row is named by a text: a misspelt one must not wait for the failure."""

    def test_each_name_is_that_of_a_row_and_each_row_is_used(self) -> None:
        used = set()
        for node in ast.walk(ast.parse(read(OFFSYNC))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                place = {"failure": 1, "target_error": 0}.get(called)
                if place is not None:
                    used |= texts(node.args[place])
            if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(
                ("error.kind", "failed.kind")
            ):
                used |= texts(*node.comparators)
        self.assertGreater(len(used), 25)
        self.assertEqual(used - set(offsync.FAILURES), set())
        for kind, row in offsync.FAILURES.items():
            if not row.patterns:
                self.assertIn('"%s"' % kind, read(OFFSYNC))

    def test_each_row_says_why_and_a_way_out(self) -> None:
        for kind, row in offsync.FAILURES.items():
            with self.subTest(kind=kind):
                self.assertTrue(row.why)
                self.assertEqual(bool(row.hints), kind != "local-error")


def texts(*nodes: ast.AST) -> set:
    """Return the texts in these expressions."""
    return {
        constant.value
        for node in nodes
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant)
    }


class FailedLogins(unittest.TestCase):
    """What ssh wrote when a login failed: OpenSSH 7.9, 9.2 and 9.9, through jump hosts, too."""

    DROPPED = "ssh_exchange_identification: Connection closed by remote host"
    ANSWERS = """
proxy-failed | ssh: connect to host 10.0.0.1 port 22: Connection refused / %(dropped)s
proxy-failed | gateway says no / kex_exchange_identification: Connection closed by remote host / \
Connection closed by UNKNOWN port 65535
proxy-failed | no profile / banner exchange: Connection to UNKNOWN port 65535: Broken pipe
timeout | Connection timed out during banner exchange / \\
Connection to UNKNOWN port 65535 timed out
busy-sshd | dlopen none failed: none: cannot open shared object file / %(dropped)s
busy-sshd | kex_exchange_identification: Connection closed by remote host / \
Connection closed by 127.0.0.1 port 22
closed-during-login | a banner / Connection closed by 127.0.0.1 port 22
expired | Your account has expired / Connection closed by 127.0.0.1 port 22
key-refused | HAS CHANGED / Host key verification failed. / u@h: Permission denied (publickey).
key-refused | REMOTE HOST IDENTIFICATION HAS CHANGEDu@h: Permission denied (publickey).
host-key-unknown | No ED25519 host key is known for h / Host key verification failed.
""" % {"dropped": DROPPED}

    def test_what_each_means(self) -> None:
        target = offsync.Target("u@h", "/srv/x")
        connection = mock.Mock(target=target)
        connection.context.state.key = "/nonexistent/id_ed25519"
        for row in self.ANSWERS.replace("\\\n", "").strip().splitlines():
            kind, said = row.split(" | ")
            result = offsync.Result(255, b"", said.replace(" / ", "\r\n").encode() + b"\r\n")
            with (
                self.subTest(said=said),
                mock.patch.object(offsync, "check_own_key"),
                mock.patch.object(offsync, "read_file", return_value=b""),
            ):
                self.assertEqual(offsync.diagnose_login(connection, result).kind, kind)


if __name__ == "__main__":
    unittest.main()
