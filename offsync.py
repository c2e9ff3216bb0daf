#!/usr/bin/env python3
"""Push one directory to many targets with rsync over SSH, using a key that can
only write below one path. Every run is explicit: plan -> apply -> verify.

roles
  controller  owns the source directory and the private key;
              runs init, target, plan, apply, verify, doctor
  target      receives files; runs link once (and unlink to revoke);
              afterwards only sshd, rrsync and rsync run there

reads   the source directory; through ssh: ~/.ssh/config for routing, and the
        known_hosts files of the user and the system for host keys
writes  on the controller: $OFFSYNC_HOME (default ~/.offsync), and temporary
        files below $TMPDIR, /tmp or /var/tmp that are removed at the end;
        on the target: one line of ~/.ssh/authorized_keys, the --path directory
        if it is absent, and, through rsync, what a plan lists below that path
runs    ssh, ssh-keygen and rsync, always as argument lists, never through a
        shell; -v shows each before it starts; link also asks sshd -T;
        install-deps runs the package manager, after showing the commands
never   deletes without "delete: true" (but what its own killed rsync left),
        overwrites without "overwrite: true", forwards an agent or a port,
        trusts a host key that neither you nor those known_hosts confirm,
        sends a file before the restriction of the key is proved
exit    0 done; 1 failed, refused or some target failed; 2 wrong usage or
        config; 3 differences found; 129, 130, 143 ended by a signal
"""
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C before main takes over ends us without a traceback
if sys.version_info < (3, 9):
    sys.exit("offsync: this is Python %d.%d: offsync needs Python 3.9 or newer; run it with a newer python3"
             % sys.version_info[:2])

import argparse
import base64
import contextlib
import fcntl
import fnmatch
import functools
import glob
import hashlib
import itertools
import json
import os
import posixpath
import pwd
import queue
import re
import selectors
import shlex
import shutil
import stat
import struct
import subprocess
import tempfile
import threading
import time
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, NoReturn, Optional, Sequence, TypeVar, Union

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


# --- Version and constants: policy before code ------------------------------------------------------------------

VERSION = "1.0.0"

# Every ssh that offsync starts gets all of these; the command line wins over ~/.ssh/config (ssh_config(5)).
SSH_OPTIONS = (
    # The last four are of OpenSSH 8.7, and fatal to an older ssh, which has no such settings either. Unknown words of
    # ~/.ssh/config are passed over, too: an IgnoreUnknown there would not count beside this one.
    "-o", "IgnoreUnknown=*",
    "-o", "BatchMode=yes",                  # never ask: a question would hang a cron job
    "-o", "IdentitiesOnly=yes",             # the dedicated key, no agent ...
    "-o", "IdentityAgent=none",
    "-o", "PreferredAuthentications=publickey",
    "-o", "PubkeyAuthentication=yes",
    "-o", "NoHostAuthenticationForLocalhost=no",
    "-o", "VerifyHostKeyDNS=no",            # DNS is no proof of a host key
    "-o", "UpdateHostKeys=no",              # known_hosts changes only in "target add"
    "-o", "HashKnownHosts=no",
    "-o", "CheckHostIP=no",                 # the name is what the operator confirmed
    "-o", "ForwardAgent=no",
    "-o", "ForwardX11=no",
    "-o", "ClearAllForwardings=yes",
    "-o", "Tunnel=no",
    "-o", "PermitLocalCommand=no",
    "-o", "RemoteCommand=none",
    "-o", "RequestTTY=no",
    "-o", "EscapeChar=none",
    "-o", "ConnectTimeout=15",
    "-o", "ServerAliveInterval=15",         # a dead link ends within a minute
    "-o", "ServerAliveCountMax=3",
    "-o", "LogLevel=ERROR",                 # no banner on stderr, but every reason
    "-o", "StrictHostKeyChecking=yes",
    "-o", "KnownHostsCommand=none", "-o", "SessionType=default", "-o", "StdinNull=no", "-o", "ForkAfterAuthentication=no",
)
# A session over the open connection only: were the master gone, "false" keeps ssh from connecting afresh, unproved.
# Nothing of ~/.ssh/config is for a session (RemoteCommand, RemoteForward, StdinNull).
SSH_SESSION = ("-F", "/dev/null", "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-o", "BatchMode=yes",
               "-o", "LogLevel=ERROR")
# The master ends itself after this idle time even if everything that should end it was killed (seconds).
MASTER_IDLE = 600
# A host without multiplexing support gets one connection per session instead.
SSH_NO_MULTIPLEXING = ("-o", "ControlMaster=no", "-o", "ControlPath=none")
# Asking for the host key without authenticating at all: safe against whoever answers.
SSH_FETCH_HOST_KEY = ("-o", "StrictHostKeyChecking=no", "-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=none",
                      "-o", "GlobalKnownHostsFile=none", "-o", "ControlPath=none")
HOST_KEY_FAMILIES = ("ssh-ed25519", "ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521",
                     "rsa-sha2-512,rsa-sha2-256")

# -8: names arrive as raw bytes in every locale. -i is implied by the %i in --out-format.
# --timeout (seconds): who is silent for so long hangs. Hours, since a large file is hashed in silence.
RSYNC_ALWAYS = ("-8", "--timeout=10800")
# One pass shows additions, changes and deletions. -t only adds time flags, which tell whether a quick
# check could have noticed a change; differences of time alone are not reported.
RSYNC_PLAN = {"hash": ("-n", "-rlptc", "--delete"), "quick": ("-n", "-rlpt", "--delete")}
# --files-from sends exactly what is listed (no -r: directories without their contents); --delay-updates
# renames all files at the end, and an interrupted run resumes from what it left in .~tmp~.
# Never --partial-dir, --partial or --temp-dir: some releases lose files or leave half a file under the live name.
RSYNC_SEND = ("-lptO", "--delay-updates", "--from0", "--files-from=-")
RSYNC_COMPARE = ("-n", "-lptc", "--from0", "--files-from=-")
# Of the listed entries, those that do not exist at all on the target.
RSYNC_ABSENT = ("-n", "-lpt", "--ignore-existing", "--from0", "--files-from=-")
# Deletes what the include rules name, protects all else. --from0 must stand before --include-from.
# (--delete-missing-args fails in several releases.)
RSYNC_DELETE = ("-r", "--delete", "--existing", "--ignore-existing", "--from0", "--include-from=-", "--exclude=*")
RSYNC_LIST = ("-n", "-rlD")
RSYNC_OLDEST = (3, 1, 0)
RSYNC_SAFER = (3, 4, 0)                     # CVE-2024-12084 to 12088 and 12747: remote code execution
STAGING = b".~tmp~"                         # where --delay-updates collects files
# A killed receiver leaves .NAME.XXXXXX. Words and numbers are no random letters and digits (1 or 2 of 100 of rsync's look so).
TEMPORARY_NAME = re.compile(rb"\.(.+)\.(?![A-Za-z]?[a-z]+\Z|[A-Z]+\Z|[0-9]+\Z)[A-Za-z0-9]{6}\Z", re.DOTALL)

CONNECT_DEADLINE = 60.0                     # seconds for connection and proof
SESSION_DEADLINE = 60.0                     # seconds for a session that hashes nothing
RESCAN_DEADLINE = 15.0                      # seconds to learn what arrived after an interruption
RETRY_DELAYS = (0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)      # seconds; for MaxStartups drops and rrsync's lock
# After an error rsync's server sleeps for 0.1 s (cleanup.c), under rrsync's lock; rrsync takes as long as the rest to start.
LINGERING = 0.07
SOCKET_PATH_LIMIT = 104 - 17                # bytes: sun_path on macOS, less what ssh appends while binding
MAX_NAME_BYTES = 1 << 16                    # one line of rsync's; names are at most 4096 bytes, times 5 when escaped
MAX_TARGET_ONLY = 1 << 30                   # bytes that a target's own entries may take: it must not fill our memory
STDERR_KEPT = 1 << 15                       # bytes of a program's stderr that are kept, of its head and of its tail
STDOUT_LIMIT = 1 << 22                      # bytes of a program's stdout, where it is not read line by line
FILE_LIMIT = 1 << 30                        # bytes of a config, key file, manifest ... that are read
KILL_AFTER = 3.0                            # seconds from SIGTERM to SIGKILL
PLANS_KEPT = 10                             # reviewed plans kept so that "apply --plan" can name differences,
PLAN_KEPT_LIMIT = 1 << 25                   # of at most so many bytes
LISTED = 20                                 # offenders, differences: the first ones, then a count
KINDS = ("added", "modified", "missing", "leftover")
POLICIES = {"missing": "delete", "modified": "overwrite"}       # what the config must allow for it
HASHED_AT_ONCE = 64                         # source entries that a thread takes at a time
DEFAULT_JOBS = 8
DEFAULT_EXCLUDE = (".git/",)

SILENT = b"rsync ended without a word"      # said for it
# Printed by a shell, quoted by whatever only repeats the command: so the proof cannot be mistaken for an echo.
PROOF_COMMAND, PROOF_OUTPUT = 'echo offsync-""shell-""answers', b"offsync-shell-answers"

KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa",
             "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")
RSA_BITS = 2048
KEY_RESTRICTIONS = "no-port-forwarding,no-agent-forwarding,no-X11-forwarding,no-pty,restrict"   # sshd(8)
DEFAULT_RRSYNC = "/usr/bin/rrsync"
RRSYNC_PLACES = (DEFAULT_RRSYNC, "/usr/local/bin/rrsync", "/opt/homebrew/bin/rrsync",
                 "/home/linuxbrew/.linuxbrew/bin/rrsync", "/usr/lib/rsync/rrsync",
                 "/usr/share/rsync/scripts/rrsync", "/usr/share/doc/rsync/support/rrsync",
                 "/usr/share/doc/packages/rsync/support/rrsync", "/usr/share/doc/rsync-*/support/rrsync",
                 "/usr/share/doc/rsync/scripts/rrsync", "/usr/share/doc/rsync/scripts/rrsync.gz")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"    # where sshd lives; often not in a user's PATH
BREW_BIN = ("/opt/homebrew/bin", "/usr/local/bin", "/home/linuxbrew/.linuxbrew/bin")
# A key that can write into one of these, or into a directory that contains one, is as good as a shell.
SHELL_PLACES = ("/bin", "/boot", "/dev", "/etc/NetworkManager", "/etc/apt", "/etc/cron.d", "/etc/cron.daily",
                "/etc/cron.hourly", "/etc/cron.monthly", "/etc/cron.weekly", "/etc/dbus-1", "/etc/init", "/etc/init.d",
                "/etc/ld.so.conf.d", "/etc/logrotate.d", "/etc/modprobe.d", "/etc/network", "/etc/pam.d", "/etc/perl",
                "/etc/profile.d", "/etc/rc.d",
                *("/etc/rc%s.d" % level for level in "0123456S"), "/etc/ssh", "/etc/sudoers.d", "/etc/systemd", "/etc/udev",
                "/etc/update-motd.d", "/etc/xdg", "/lib", "/lib32", "/lib64", "/proc", "/root/.ssh", "/run/systemd", "/run/udev",
                "/sbin", "/sys", "/usr/bin", "/usr/lib", "/usr/libexec", "/usr/local/bin", "/usr/local/lib", "/usr/local/sbin",
                "/usr/sbin", "/usr/share/perl5", "/usr/share/python3", "/var/lib/dpkg", "/var/lib/rpm", "/var/spool/cron")
SHELL_PLACES_AT_HOME = (".ssh", ".config", ".local/bin", ".local/lib", ".local/share/systemd", "bin")
# Login shells in which single quotes mean what POSIX says; others get only paths that need no quoting.
POSIX_SHELLS = ("sh", "bash", "dash", "ash", "ksh", "ksh93", "mksh", "zsh", "busybox", "rbash")
NO_LOGIN_SHELLS = ("nologin", "false", "true", "sync")


class PackageManager(NamedTuple):
    """How one package manager installs what each role needs (names separated by blanks)."""
    install: str
    controller: str
    target: str
    extra: str = ""                         # best effort, in a call of its own: one unknown name fails a whole call
    refresh: str = ""                       # before that; may fail
    older: bool = False                     # older releases have one package openssh for both roles
    sudo: bool = True
    hint: str = ""


PACKAGE_MANAGERS = {                        # in the order of preference; brew last because Linux has it too
    "apt-get": PackageManager("env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends",
                              "openssh-client rsync", "openssh-server rsync python3", refresh="apt-get update"),
    "dnf": PackageManager("dnf -y install", "openssh-clients rsync", "openssh-server rsync python3", "rsync-rrsync"),
    "yum": PackageManager("yum -y install", "openssh-clients rsync", "openssh-server rsync python3", "rsync-rrsync"),
    "pacman": PackageManager("pacman -S --needed --noconfirm", "openssh rsync", "openssh rsync python",
                             hint="if a package was not found (404), run: pacman -Syu"),
    "zypper": PackageManager("zypper --non-interactive install --no-recommends", "openssh-clients rsync",
                             "openssh-server rsync python3", older=True),
    "apk": PackageManager("apk add --no-cache", "openssh-client openssh-keygen rsync", "openssh-server rsync rrsync"),
    "brew": PackageManager("brew install", "rsync", "rsync", sudo=False,
                           hint="sshd on macOS is System Settings > General > Sharing > Remote Login"),
}

# How ssh, rrsync and rsync say that something is wrong, and what we say instead: (kind, pattern, "why; what to do next").
# Searched in this order in stderr: exit statuses say little (12 and 255 are interchangeable, and 0 proves nothing).
SYMPTOMS = (
    ("host-key-changed", r"REMOTE HOST IDENTIFICATION HAS CHANGED",
             "its host key changed; if that is expected, confirm the new one with: offsync target add {add}"),
    ("host-key-unknown", r"host key is known for|Host key verification failed|no matching host key type",
             "its host key is not trusted yet; confirm it with: offsync target add {add}"),
    ("name", r"Could not resolve hostname", "the name {host} does not resolve; check the name and DNS"),
    ("refused", r"connect to .*: Connection refused|port \d+: Connection refused",
             "the connection was refused; is sshd running there, on this port?"),
    ("unreachable", r"No route to host|Network is unreachable|Host is down",
             "there is no route to it; check the network"),
    ("timeout", r"timed out|Timeout, server|not responding|io timeout after",
             "it did not answer in time; check host and network"),
    ("ssh-config", r"Bad configuration option|bad configuration options|Bad SSH2 ",
             "ssh cannot use its configuration; mend ~/.ssh/config"),
    ("key-file", r"UNPROTECTED PRIVATE KEY|Load key .*(?:Permission denied|invalid format|error in libcrypto)",
             "ssh cannot use our private key; run: offsync doctor"),
    ("key-refused", r"Permission denied \([a-z]|Too many authentication failures",
             "it refused our key; run there: offsync link --path {path}, with the key that 'offsync init' prints, and with "
             "--from, if at all, for the address of this controller"),
    ("busy-sshd", r"kex_exchange_identification|ssh_exchange_identification|Connection (?:closed|reset) by",
             "sshd closed the connection before logging in; it is overloaded (MaxStartups) or blocks us"),
    ("session-refused", r"[Ss]ession open refused|session request failed|open failed: connect failed",
             "sshd allows no further session (MaxSessions); raise it, or try again"),
    ("nologin", r"account is currently not available|not allowed to login",
             "the login's shell refuses commands; give {user} a real shell on the target"),
    ("locked", r"Another instance of rrsync is already accessing",
             "another rsync is using {path} there; try again when it has finished"),
    ("no-rrsync", r"rrsync: (?:\d+: )?(?:command )?not found|rrsync: No such file|rrsync: Permission denied"
             r"|can't open file '[^']*rrsync|Can't open perl script|rrsync: cannot execute"
             r"|Unknown command:? [^\n]*rrsync|not found: [^\n]*rrsync|rrsync: inaccessible or not found|rrsync: not found",
             "rrsync is not at {rrsync} there; run on the target: offsync install-deps --role target, then link again"),
    ("read-only-key", r"sending to read-only server|read-only server is not allowed",
             "its key is for reading only (rrsync -ro); run there: offsync link --path {path}"),
    ("perl-refusal", r"is not rsync|Not invoked via sshd|does not run rsync",
             "rrsync did not accept the command; is it of the same release as rsync there?"),
    ("no-rsync", r"No such file or directory: '[^'\n]*/rsync'|FileNotFoundError: \[Errno 2\] No such file or directory\s*\n"
             r"|rsync: (?:\d+: )?(?:command )?not found|/rsync'?: [^\n]*(?:No such file|not found)",
             "rsync is missing there; run on the target: offsync install-deps --role target"),
    ("no-directory", r"Restricted directory does not exist|FileNotFoundError: [^\n]*No such file or directory: "
             r"'|NotADirectoryError|chdir\(\)? [^\n]*failed",
             "{path} is gone there or is no directory; create it again with: offsync link --path {path}"),
    ("openrsync", r"openrsync|rsync 2\.6\.9 compatible",
             "openrsync answers there instead of rsync; install the real rsync on the target"),
    ("option", r"has been disabled on this server|invalid rsync-command syntax|option is not supported"
             r"|unknown option|unrecognized (?:option|arguments)",
             "its rrsync refused an option; are rrsync and rsync there of the same release, 3.1.2 or newer?"),
    ("noise", r"is your shell clean|unexpected tag \d+|protocol incompatibility",
             "something other than rsync answered; is the forced command rrsync, and do shell start files of {user} "
             "there print nothing?"),
    ("space", r"No space left on device", "the disk is full there; free some space, then apply again"),
    ("quota", r"Disk quota exceeded", "a disk quota is used up there; raise it, then apply again"),
    ("read-only-disk", r"Read-only file system", "the file system is mounted read-only there; remount it"),
    ("file-io", r"\(code 11\)",
             "a file could not be written there, most likely because the disk is full; free some space, then apply again"),
    ("source-unreadable", r"\[sender\][^\n]*(?:Permission denied|No such file or directory)"
             r"|send_files failed to open|file has vanished|link_stat [^\n]* failed|readlink_stat",
             "the source changed while it was read; plan again"),
    ("in-the-way", r"could not make way for|cannot delete non-empty directory",
             "a directory that holds excluded or new files is in the way of a planned entry; move it, then plan again"),
    ("permission", r"Permission denied \(13\)|Operation not permitted \(1\)",
             "{user} may not write everywhere below {path} there; mend owner and modes, then apply again"),
    ("not-a-directory", r"Not a directory \(20\)", "{path} there, or something in it, is no directory any more"),
    ("lost", r"connection unexpectedly closed|unexpected(?:ly)? (?:EOF|close)|Broken pipe|error in rsync protocol"
             r"|[Cc]onnection to [^\n]* closed|error in socket IO|mux_client|client_loop",
             "the connection was lost; apply again finishes the job"),
)
RETRIED = ("busy-sshd", "locked", "session-refused")


# --- Errors -----------------------------------------------------------------------------------------------------

class OffsyncError(Exception):
    """Expected trouble: "what: why; what to do next". main() alone prints it and exits with its status."""
    status = 1


class UsageError(OffsyncError):
    """Wrong arguments, environment or config."""
    status = 2


class TargetError(OffsyncError):
    """One target failed; why is the message without the login; kind is the symptom's name, or "other"."""

    def __init__(self, login: str, why: str, kind: str = "other") -> None:
        super().__init__("%s: %s" % (login, why))
        self.why, self.kind = why, kind


class Interrupted(BaseException):
    """A signal asked us to stop. Not an Exception: nothing on the way to main may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.status = signum, 128 + signum


# --- Values -----------------------------------------------------------------------------------------------------

class Target(NamedTuple):
    """Where to push: one entry of "targets" in config.yaml. port None leaves it to ssh (ssh_config, else 22)."""
    login: str
    user: str
    host: str
    remote_path: str
    rrsync: str = DEFAULT_RRSYNC
    port: Optional[int] = None

    @property
    def add_arguments(self) -> str:
        """Return what follows "offsync target add" to add this target (again)."""
        words = [self.login, "--path", self.remote_path]
        if self.rrsync != DEFAULT_RRSYNC:
            words += ["--rrsync", self.rrsync]
        if self.port:
            words += ["--port", str(self.port)]
        return shlex.join(words)


class Config(NamedTuple):
    """config.yaml, validated. bwlimit is in KiB/s for each running target; 0 means none."""
    source: str
    delete: bool
    overwrite: bool
    verify: str
    exclude: tuple[str, ...]
    jobs: int
    bwlimit: int
    compress: bool
    targets: tuple[Target, ...]


class Scalar(NamedTuple):
    """A scalar of config.yaml and where it stands: line index, first and last column."""
    value: Any
    line: int
    start: int
    end: int


class Document(NamedTuple):
    """config.yaml as parsed: its lines, its top-level nodes, and where each key and list item stands.

    A node is a Scalar, a list of Scalars, or a list of dicts of Scalars.
    """
    lines: list[str]
    nodes: dict[str, Any]
    key_lines: dict[str, int]


class PublicKey(NamedTuple):
    """A public key; its identity is (type, blob)."""
    type: str
    blob: str
    comment: str


class Change(NamedTuple):
    """One difference: one line of a plan, and one itemized line of rsync's."""
    path: bytes
    kind: str                               # "added", "modified", "missing", "leftover"
    directory: bool                         # for missing and leftover; rsync does not tell a file from a symlink
    changes: tuple[str, ...] = ()           # of modified: "content", "mode", "type", "link"
    quick: bool = True                      # a comparison of size and time sees the same: content and (size or time)


_ENTRY = struct.Struct("=cHQq")


class SourceEntry(NamedTuple):
    """What a plan says of one source entry: content is a file's sha256 or a symlink's target; stamp (ns) moves with changes."""
    type: str                               # "directory", "file", "symlink"
    size: int
    mode: int
    content: bytes
    stamp: int

    def pack(self) -> bytes:
        """Return all of it as bytes: there may be a million entries."""
        return _ENTRY.pack(self.type[:1].encode(), self.mode, self.size, self.stamp) + self.content

    @classmethod
    def unpack(cls, packed: bytes) -> "SourceEntry":
        """Return what pack() was given."""
        letter, mode, size, stamp = _ENTRY.unpack_from(packed)
        return cls({b"d": "directory", b"f": "file", b"s": "symlink"}[letter], size, mode, packed[_ENTRY.size:], stamp)


class Result(NamedTuple):
    """How a program ended. status is negative for a signal; None when its deadline passed."""
    status: Optional[int]
    stdout: bytes
    stderr: bytes


# --- Text: no I/O below, text in, values out --------------------------------------------------------------------

def parse_rsync_name(name: bytes) -> bytes:
    r"""Return the exact bytes of a name that rsync printed: it writes control bytes as \#ooo (octal)."""
    return re.sub(rb"\\#([0-7]{3})", lambda match: bytes([int(match.group(1), 8) & 255]), name)


def show(name: bytes) -> str:
    """Return a name for people: as it is, or quoted as git does if it could write to the terminal or mislead."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if text and text.isprintable() and not re.search(r'["\\]|^ | $', text):
        return text
    named = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
    return '"' + "".join(named.get(byte, chr(byte) if 32 <= byte < 127 else "\\%03o" % byte) for byte in name) + '"'


def parse_itemized(line: bytes) -> Optional[Change]:
    """Return what "%i %n" says, or None where nothing that we compare differs. Raises ValueError on anything else.

    The code is YXcstpoguax (rsync(1), --itemize-changes). Times alone are not compared, nor is the root itself.
    """
    code, blank, escaped = line[:11], line[11:12], line[12:]
    if len(code) != 11 or blank != b" " or not escaped:
        raise ValueError("no itemized line: " + show(line))
    name = parse_rsync_name(escaped)
    directory = name.endswith(b"/")
    path = name.rstrip(b"/")
    if path == b"." or not path:
        return None
    if path.startswith(b"/") or any(part in (b"..", b".", b"") for part in path.split(b"/")):
        raise ValueError("a name that leaves the directory: " + show(name))
    if code.startswith(b"*deleting"):
        return Change(path, "missing", directory)
    if code[:1] not in b"<>ch." or code[1:2] not in b"fdL":
        raise ValueError("an unknown itemize code: " + show(line))
    if code[2:3] == b"+":
        return Change(path, "added", code[1:2] == b"d")
    changes = []
    if code[1:2] == b"f" and code[:1] in b"<>":
        changes.append("content")
    if code[1:2] == b"L" and code[:1] == b"c":
        changes.append("link")
    if code[5:6] == b"p" and code[1:2] != b"L":
        changes.append("mode")
    # A quick check would go wrong: same size and time but other content, or the same content and another time.
    same = code[3:4] == b"." and code[4:5] == b"."
    quick = code[1:2] != b"f" or same != ("content" in changes)
    return Change(path, "modified", code[1:2] == b"d", tuple(changes), quick) if changes else None


def format_include_rule(path: bytes, directory: bool) -> bytes:
    """Return the anchored rsync pattern that matches exactly this path (rsync(1), PATTERN MATCHING RULES).

    A backslash escapes only in a pattern that has a wildcard character; elsewhere it is a plain byte.
    """
    if re.search(rb"[*?\[]", path):
        path = re.sub(rb"([*?\[\\])", rb"\\\1", path)
    return b"/" + path + (b"/" if directory else b"")


def show_text(text: str) -> str:
    """Return text from outside (an argument, a config value) fit for a message."""
    return show(os.fsencode(text))


def quote_answer(stderr: bytes) -> str:
    """Return the end of what a program said, on one line, safe for a terminal, at most 300 characters."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip("^~ \t")]    # Python's marks
    text = " | ".join(lines[-4:])
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 300 else "..." + text[-297:]


def quote_for_rsync(word: str) -> str:
    """Return a word of rsync's -e option: it splits at blanks and knows quotes, doubled within (rsync(1), --rsh)."""
    return word if re.fullmatch(r"[A-Za-z0-9_./=@:,~-]+", word) else "'" + word.replace("'", "''") + "'"


def format_bytes(size: float) -> str:
    """Return a size in bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return "%d %s" % (size, unit) if unit == "B" else "%.1f %s" % (size, unit)
        size /= 1024
    return "%.1f TiB" % size


def plural(count: int, singular: str, several: str = "") -> str:
    """Return "1 file", "2 files"."""
    return "%d %s" % (count, singular if count == 1 else several or singular + "s")


def some_of(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first names and how many more there are."""
    more = len(names) - LISTED
    return separator.join(names[:LISTED]) + (separator + "and %d more" % more if more > 0 else "")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return '; did you mean "plan"?' for the known word that is most like this one, "" if none is."""
    from difflib import get_close_matches                   # here, since only a mistake needs it
    found = get_close_matches(word, list(known), 1)
    return '; did you mean "%s"?' % found[0] if found else ""


def parse_rsync_version(output: bytes) -> Optional[tuple[int, int, int]]:
    """Return the version that "rsync --version" prints, or None for openrsync and unknown programs."""
    if b"openrsync" in output:
        return None
    match = re.search(rb"rsync\s+version\s+v?(\d+)\.(\d+)\.(\d+)\S*\s+protocol version \d+", output)
    return (int(match.group(1)), int(match.group(2)), int(match.group(3))) if match else None


def diagnose(target: Target, stderr: bytes) -> TargetError:
    """Return what a failed ssh or rsync meant, as one sentence with its remedy and the original words."""
    fields = target._asdict()
    fields.update(path=shlex.quote(target.remote_path), add=target.add_arguments)
    answer = quote_answer(stderr)
    for kind, pattern, meaning in SYMPTOMS:
        if re.search(pattern.encode(), stderr):
            return TargetError(target.login, "%s (it said: %s)" % (meaning.format(**fields), answer), kind)
    return TargetError(target.login, "it failed in an unknown way; run: offsync doctor %s (it said: %s)"
                       % (target.login, answer or "nothing"))


# config.yaml: a strict subset of YAML. What is accepted means the same to any YAML 1.1 or 1.2 parser; the rest is
# refused by line. Top-level "key: value", lists of scalars, lists of mappings, comments.
_YAML_KEY = re.compile(r"(?!(?i:y|n|yes|no|on|off|true|false|null):)([A-Za-z_][A-Za-z0-9_]*):(?= |$)")
# In double quotes, the escapes that JSON and every YAML share; no surrogates.
_YAML_SCALAR = re.compile(r'"(?:[^"\\]|\\["\\bfnrt]|\\u(?![dD][89A-Fa-f])[0-9A-Fa-f]{4})*"'
                          r"|'(?:[^']|'')*'|\[ *\]|[A-Za-z0-9/][A-Za-z0-9_./@+-]*")
_YAML_END = re.compile(r" *$| +#")
_YAML_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]")
# Plain words that some YAML parser takes for a boolean, a null or a merge.
_YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


class YamlError(ValueError):
    """config.yaml is not in our subset; line counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _parse_yaml_value(text: str) -> Any:
    """Return the value of one scalar token."""
    if text[0] == '"':
        return json.loads(text)
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == "[":
        return []
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        return int(text)
    if text[0].isdigit() or text.lower() in _YAML_WORDS:
        raise ValueError("%s is not supported; write true, false, a decimal number, or text in quotes" % text)
    return text


def _parse_yaml_scalar(line: str, number: int, start: int) -> Optional[Scalar]:
    """Return the scalar that follows column start, None if only a comment does."""
    if _YAML_END.match(line, start):
        return None
    start = len(line) - len(line[start:].lstrip(" "))
    match = _YAML_SCALAR.match(line, start)
    if not match or not _YAML_END.match(line, match.end()):
        raise ValueError("unsupported value, quoting or escape (quotes and escapes as in JSON always do): %s"
                         % json.dumps(line[start:].strip()))
    if "\t" in match.group():
        raise ValueError("a tab in a value; write \\t in double quotes")
    return Scalar(_parse_yaml_value(match.group()), number, start, match.end())


def _parse_yaml_pair(mapping: dict[str, Any], line: str, number: int, start: int) -> str:
    """Add the pair that begins at a column; return its key. Without a value it is a list to come, at column 0 only."""
    match = _YAML_KEY.match(line, start)
    if not match:
        raise ValueError('expected "key: value"')
    key = match.group(1)
    if key in mapping:
        raise ValueError("the key %s stands here for the second time" % key)
    scalar = _parse_yaml_scalar(line, number, match.end())
    if scalar is None and start:
        raise ValueError(key + ": has no value")
    mapping[key] = [] if scalar is None else scalar
    return key


def _parse_yaml_item(line: str, number: int, indent: int) -> Any:
    """Return a list item: a Scalar, or a dict of Scalars whose first pair stands beside the dash.

    The entry "" of such a dict says where it begins: the line, and the column of its keys.
    """
    start = len(line) - len(line[indent + 1:].lstrip(" "))
    if _YAML_KEY.match(line, start):
        mapping = {"": Scalar(None, number, start, start)}
        _parse_yaml_pair(mapping, line, number, start)
        return mapping
    scalar = _parse_yaml_scalar(line, number, indent + 1)
    if scalar is None:
        raise ValueError("an empty list item")
    return scalar


def parse_yaml(text: str) -> Document:
    """Return the document. Raises YamlError with the line for whatever is not in the subset."""
    document = Document(text.split("\n"), {}, {})
    items: Optional[list[Any]] = None       # the open list
    dash = number = 0                       # dash: the column of its dashes
    try:
        for number, line in enumerate(document.lines):
            bad = _YAML_FORBIDDEN.search(line)
            if bad:
                raise ValueError("the character U+%04X is not allowed" % ord(bad.group()))
            body = line.lstrip(" ")
            indent = len(line) - len(body)
            if not body or body.startswith("#"):
                continue
            if body == "-" or body.startswith("- "):
                if items is None or items and indent != dash:
                    raise ValueError("a list item where none is expected; indent all items of a list alike")
                dash = indent
                items.append(_parse_yaml_item(line, number, indent))
            elif indent == 0:
                key = _parse_yaml_pair(document.nodes, line, number, 0)
                document.key_lines[key] = number
                items = document.nodes[key] if isinstance(document.nodes[key], list) else None
            elif items and isinstance(items[-1], dict) and indent == items[-1][""].start:
                _parse_yaml_pair(items[-1], line, number, indent)
            else:
                raise ValueError("unexpected indentation")
        for key, node in document.nodes.items():
            if node == []:
                number = document.key_lines[key]
                raise ValueError(key + ": has no value; write [] for an empty list")
    except ValueError as error:
        raise YamlError(number + 1, str(error)) from None
    return document


def format_yaml(value: Any) -> str:
    """Return a scalar as any YAML parser reads it back; text in double quotes. Our values hold nothing that YAML forbids."""
    return json.dumps(value, ensure_ascii=False)


def format_new_config(source: str) -> str:
    """Return the config that init writes."""
    return ('version: 1\nsource: %s\ndelete: false\noverwrite: true\nverify: "hash"\nexclude:\n  - ".git/"\n'
            "targets: []\n" % format_yaml(source))


def replace_scalar(lines: list[str], scalar: Scalar, value: Any) -> None:
    """Replace one scalar; its line's comment stays."""
    line = lines[scalar.line]
    lines[scalar.line] = line[:scalar.start] + format_yaml(value) + line[scalar.end:]


def _replace_target(lines: list[str], item: dict[str, Scalar], target: Target) -> None:
    """Replace an existing target's values in place; comments and order stay."""
    extra = []
    for key, value in target._asdict().items():
        if key in item and value not in (None, item[key].value):
            replace_scalar(lines, item[key], value)
        elif key not in item and value not in (None, DEFAULT_RRSYNC):
            extra.append(" " * item[""].start + "%s: %s" % (key, format_yaml(value)))
    end = max(scalar.line for scalar in item.values()) + 1
    lines[end:end] = extra
    if "port" in item and target.port is None:      # a port is not given any more; beside the dash, the next pair takes its place
        line = item["port"].line
        if line == item[""].line:
            following = min(scalar.line for scalar in item.values() if scalar.line > line)
            lines[line] = lines[line][:item[""].start] + lines[following].lstrip(" ")
            line = following
        del lines[line]


def add_target_lines(text: str, target: Target) -> str:
    """Return config text with this target added, or replaced where its login stands already."""
    document = parse_yaml(text)
    lines, node, dash = document.lines, document.nodes["targets"], 2
    if isinstance(node, list):
        for item in node:
            if item["login"].value == target.login:
                _replace_target(lines, item, target)
                return "\n".join(lines)
        end, dash = max(scalar.line for scalar in node[-1].values()) + 1, lines[node[0][""].line].index("-")
    else:                                   # targets: []
        end, line = node.line + 1, lines[node.line]
        lines[node.line] = (line[:node.start].rstrip(" ") + line[node.end:]).rstrip(" ")
    pairs = ["%s: %s" % (key, format_yaml(value)) for key, value in target._asdict().items() if value is not None]
    lines[end:end] = [" " * dash + ("  " if index else "- ") + pair for index, pair in enumerate(pairs)]
    return "\n".join(lines)


def remove_target_lines(text: str, login: str) -> str:
    """Return config text without this target; comments around it stay."""
    document = parse_yaml(text)
    lines, items = document.lines, document.nodes["targets"]
    item = next(item for item in items if item["login"].value == login)
    for index in sorted({scalar.line for scalar in item.values()}, reverse=True):
        del lines[index]
    if len(items) == 1:
        index = document.key_lines["targets"]
        lines[index] = lines[index].replace("targets:", "targets: []", 1)
    return "\n".join(lines)


# authorized_keys (sshd(8), AUTHORIZED_KEYS FILE FORMAT)
def format_forced_command(rrsync_command: Sequence[str], path: str) -> str:
    """Return the shell command of the forced command: rrsync, write-only, below path."""
    return shlex.join([*rrsync_command, "-wo", path])


def format_authorized_key(command: str, key: PublicKey, from_pattern: str = "") -> str:
    """Return the authorized_keys line. Within quotes only the double quote is escaped, by a backslash."""
    options = 'from="%s",' % from_pattern if from_pattern else ""
    options += 'command="%s",%s' % (command.replace('"', '\\"'), KEY_RESTRICTIONS)
    return " ".join(filter(None, (options, key.type, key.blob, key.comment)))


_OUR_LINE = re.compile(r'(?:from="[^"]*",)?command="(?:\\"|[^"])*-wo (?:\\"|[^"])*",'
                       + re.escape(KEY_RESTRICTIONS) + r" \S+ (\S+)(?: .*)?")


def edit_authorized_keys(text: bytes, key: PublicKey, new_line: Optional[str]) -> tuple[bytes, str]:
    """Return (the file with offsync's line for this key set to new_line, or removed for None; that line as it was or "").

    Every other line stays byte for byte. Raises ValueError with the 1-based number of a foreign line with the key.
    """
    kept, was = [], ""
    new = b"" if new_line is None else os.fsencode(new_line) + b"\n"
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", text), 1):
        decoded = line.decode("utf-8", "surrogateescape").strip()
        written = _OUR_LINE.fullmatch(decoded)
        if decoded.startswith("#") or key.blob not in decoded.replace("\0", " ").split() or written and written[1] != key.blob:
            kept.append(line)
        elif not written:
            raise ValueError(number)
        else:
            kept.append(b"" if was else new)
            was = was or decoded
    if new and not was:
        kept += [b"\n" if kept and not kept[-1].endswith(b"\n") else b"", new]
    return b"".join(kept), was


# Plans and manifests as text
def json_path(path: bytes) -> dict[str, str]:
    """Return the JSON fields of a path: "path", and "path_b64" where the name is not UTF-8."""
    try:
        return {"path": path.decode("utf-8")}
    except UnicodeDecodeError:
        return {"path": path.decode("utf-8", "replace"), "path_b64": base64.b64encode(path).decode()}


def name_plan_differences(reviewed: Iterable[str], current: Iterable[str]) -> list[str]:
    """Return what differs between two canonical plans, one sentence each."""
    before, now = ({json.dumps([fields.pop("login", ""), fields.pop("path"), fields.pop("path_b64", "")]): fields
                    for fields in map(json.loads, lines)} for lines in (reviewed, current))
    found = []
    for key in sorted(set(before) | set(now)):
        login, path, encoded = json.loads(key)
        was, is_now = (plan[key]["kind"] if key in plan else "absent from the plan" for plan in (before, now))
        shown = show(base64.b64decode(encoded)) if encoded else show_text(path) if path else "the target itself"
        name = ": ".join(filter(None, (login, shown)))
        if was != is_now:
            found.append("%s: was %s, is %s" % (name, was, is_now))
        elif before[key] != now[key]:
            other = sorted(field for field in {**before[key], **now[key]} if before[key].get(field) != now[key].get(field))
            found.append("%s: %s, with another %s" % (name, was, ", ".join(other)))
    return found


def format_manifest_line(path: bytes, digest: str) -> bytes:
    r"""Return a line as sha256sum writes it: a leading backslash says that \n, \r and \\ are escaped in the name."""
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != path else b"") + digest.encode() + b"  " + escaped + b"\n"


def parse_manifest(data: bytes) -> dict[bytes, str]:
    """Return path -> sha256 of a manifest, or of what sha256sum wrote. Raises ValueError with the line number."""
    found: dict[bytes, str] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line or line.startswith(b"#"):
            continue
        match = re.fullmatch(rb"(\\?)([0-9a-f]{64}) [ *](.+)", line, re.DOTALL)
        if not match:
            raise ValueError(number)
        name = match.group(3)
        if match.group(1):
            name = re.sub(rb"\\([\\nr])", lambda m: {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}[m.group(1)], name)
        name = name[2:] if name.startswith(b"./") else name
        if found.setdefault(name, match.group(2).decode()) != match.group(2).decode():
            raise ValueError(number)
    return found


# --- Checks: return the accepted value or raise -----------------------------------------------------------------

_LOGIN = re.compile(r"(?P<user>[A-Za-z0-9_.][A-Za-z0-9_.@+\\-]*\$?)@"
                    r"(?P<host>\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)", re.ASCII)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


def validate_login(login: str) -> tuple[str, str]:
    """Return (user, host) of user@host; an IPv6 literal stands in brackets and loses them here."""
    match = _LOGIN.fullmatch(login)
    if not match or len(login) > 250:       # it is the name of a file, too
        raise UsageError("login %s: it is not of the form user@host (user@[address] for IPv6; a port goes into --port)"
                         % show_text(login))
    return match["user"], match["host"].strip("[]")


def validate_absolute_path(path: str, what: str) -> str:
    """Return the path normalised. It must be absolute and free of control characters and undecodable bytes."""
    if not path.startswith("/") or _CONTROL.search(path) or len(os.fsencode(path)) > 4000:
        raise UsageError("%s %s: it must be an absolute path in UTF-8, of at most 4000 bytes, without control "
                         "characters" % (what, show_text(path)))
    return posixpath.normpath("/" + path.lstrip("/"))


def validate_port(port: Any) -> int:
    """Return a TCP port number."""
    if not re.fullmatch("[1-9][0-9]{0,4}", str(port)) or int(port) > 65535:
        raise UsageError("port %s: it must be a number from 1 to 65535" % show_text(str(port)))
    return int(port)


def _plain(path: str) -> bool:
    """Return whether an absolute path is in its simplest form; raises if it is none."""
    return validate_absolute_path(path, "path") == path


# What a key must be, its type, its default (... if there is none), and what is false or raises for a wrong value of that type.
_Rule = tuple[str, type, Any, Optional[Callable[[Any], Any]]]
_TOP_KEYS: dict[str, _Rule] = {
    "version": ("the number 1", int, ..., lambda number: number == 1),
    "source": ("an absolute path", str, ..., lambda path: path.startswith("/") and not _CONTROL.search(path)),
    "delete": ("true or false", bool, False, None),
    "overwrite": ("true or false", bool, True, None),
    "verify": ('"hash" or "quick"', str, "hash", lambda word: word in RSYNC_PLAN),
    "exclude": ("a list of rsync patterns", list, [Scalar(pattern, 0, 0, 0) for pattern in DEFAULT_EXCLUDE], None),
    "jobs": ("a number from 1 to 1000", int, DEFAULT_JOBS, lambda number: 1 <= number <= 1000),
    "bwlimit": ("a number of KiB/s", int, 0, None),
    "compress": ("true or false", bool, False, None),
    "targets": ("a list of targets, or []", list, ..., None)}
_TARGET_KEYS: dict[str, _Rule] = {
    "login": ("user@host (user@[address] for IPv6)", str, ..., validate_login),
    "user": ("the user of login", str, ..., None),
    "host": ("the host of login", str, ..., None),
    "remote_path": ("an absolute path without .. and double or trailing slashes", str, ..., _plain),
    "rrsync": ("an absolute path without .. and double or trailing slashes", str, DEFAULT_RRSYNC, _plain),
    "port": ("a number from 1 to 65535", int, None, validate_port)}


def validate_config(text: str, filename: str) -> tuple[Config, Document]:
    """Return the config and its document; every refusal names file, line and what is allowed."""
    def refuse(line: int, message: str) -> NoReturn:
        """Raise with file and line."""
        raise UsageError("%s:%d: %s; correct that" % (filename, line + 1, message))

    def check(nodes: dict[str, Any], rules: dict[str, _Rule], lines: dict[str, int], first: int) -> dict[str, Any]:
        """Return the values of a mapping, defaults included."""
        for key, line in lines.items():
            if key not in rules:
                refuse(line, "the key %s is unknown; known here are %s" % (key, ", ".join(rules)))
        values = {}
        for key, (what, kind, default, accept) in rules.items():
            node = nodes.get(key, default)
            if node is ...:
                refuse(first, 'the key "%s" is missing; it is %s' % (key, what))
            values[key] = node.value if isinstance(node, Scalar) else node
            try:
                fine = key not in nodes or type(values[key]) is kind and (accept is None or accept(values[key]))
            except UsageError:
                fine = False
            if not fine:
                refuse(lines[key], "%s must be %s" % (key, what))
        return values

    try:
        document = parse_yaml(text)
    except YamlError as error:
        refuse(error.line - 1, str(error))
    values = check(document.nodes, _TOP_KEYS, document.key_lines, 0)
    for item in values["exclude"]:
        if not isinstance(item, Scalar) or type(item.value) is not str or item.value in ("", "!") or _CONTROL.search(item.value):
            refuse(item.line if isinstance(item, Scalar) else item[""].line, "exclude takes rsync patterns as text")
    targets: dict[str, Target] = {}
    for item in values["targets"]:
        if isinstance(item, Scalar):
            refuse(item.line, "a target is a list of keys: " + ", ".join(_TARGET_KEYS))
        fields = {key: scalar for key, scalar in item.items() if key}
        target = Target(**check(fields, _TARGET_KEYS, {key: scalar.line for key, scalar in fields.items()}, item[""].line))
        if validate_login(target.login) != (target.user, target.host):
            refuse(item["login"].line, "login, user and host disagree; login is user@host")
        if target.login in targets:
            refuse(item["login"].line, "the target %s stands here for the second time" % target.login)
        targets[target.login] = target
    del values["version"]
    values.update(exclude=tuple(item.value for item in values["exclude"]), targets=tuple(targets.values()))
    return Config(**values), document


def select_targets(targets: Sequence[Target], patterns: Sequence[str]) -> list[Target]:
    """Return the targets whose login or host matches a pattern, all of them for none, sorted by login."""
    chosen = set(targets if not patterns else ())
    for pattern in patterns:
        matching = [t for t in targets if pattern in (t.login, t.host)
                    or fnmatch.fnmatchcase(t.login, pattern) or fnmatch.fnmatchcase(t.host, pattern)]
        if not matching:
            known = ", ".join(sorted(t.login for t in targets)) or "none yet; add one with: offsync target add"
            raise UsageError("target %s: nothing matches%s; known targets: %s" % (
                show_text(pattern), nearest(pattern, [name for t in targets for name in (t.login, t.host)]), known))
        chosen.update(matching)
    return sorted(chosen, key=lambda t: t.login)


def validate_home(home: str) -> str:
    """Return $OFFSYNC_HOME: absolute, and free of what the values of ssh's options would interpret."""
    home = validate_absolute_path(home, "OFFSYNC_HOME")
    if re.search(r'["%$\\]', home):
        raise UsageError('OFFSYNC_HOME %s: ssh would interpret one of " %% $ \\ in it; choose another directory'
                         % show_text(home))
    return home


def validate_link_path(path: str, protected: Iterable[str]) -> str:
    """Return the real path that the key may write below; protected paths, like SHELL_PLACES, may not lie in it or above it."""
    real = os.path.realpath(validate_absolute_path(path, "path"))
    validate_absolute_path(real, "path")
    home = os.path.expanduser("~")
    homes = [entry.pw_dir for entry in pwd.getpwall() if os.path.basename(entry.pw_shell) not in NO_LOGIN_SHELLS]
    at_home = [os.path.join(directory, name) for directory in {home, *homes} for name in SHELL_PLACES_AT_HOME]
    named = [*SHELL_PLACES, *at_home, *protected]
    for place in {*named, *map(os.path.realpath, named)}:
        inside, above = (real + "/").startswith(place + "/"), (place + "/").startswith(real.rstrip("/") + "/")
        if inside or above:
            raise UsageError("path %s: it %s %s, so a key that writes there would be as good as a shell; choose a directory that "
                             "holds only delivered files" % (show_text(real), "lies in" if inside else "contains", place))
    if os.path.lexists(real) and not os.path.isdir(real):
        raise UsageError("path %s: it is no directory; choose another, or move it away" % show_text(real))
    return real


def validate_forced_command(words: Sequence[str], path: str, shell: str, language: str = "") -> str:
    """Return the forced command; refused where the user's shell might read its quoting differently."""
    command = format_forced_command(words, path)
    needs_quotes = command != " ".join([*words, "-wo", path])
    if needs_quotes and os.path.basename(shell) not in POSIX_SHELLS:
        raise UsageError("path %s: it cannot be quoted safely for the login shell %s; choose a path of letters, "
                         "digits and /._-" % (show_text(path), show_text(shell)))
    if language == "perl" and re.search(r"[^A-Za-z0-9/._+@%:,=-]", path):
        raise UsageError("path %s: the Perl rrsync cannot take it safely; choose a path of letters, digits and /._-"
                         % show_text(path))
    return command


def validate_from_pattern(pattern: str) -> str:
    """Return a pattern list for from="..." (sshd(8))."""
    if not re.fullmatch(r"[A-Za-z0-9.:*?!,/_%\[\]-]+", pattern):
        raise UsageError("from %s: it must be host names, addresses or patterns, separated by commas; see sshd(8)"
                         % show_text(pattern))
    return pattern


# --- Effects: the only functions that touch the outside ---------------------------------------------------------

class Children:
    """What must be known of all programs that run: the trace of -v, whether all is stopping, and the guard."""
    verbose = False
    stopping = False                        # every running program is ended (where its output is read), no other starts
    guard: Optional[int] = None             # the guard process hears here which programs run

    def tell_guard(self, sign: str, pid: int) -> None:
        """Tell the guard that a program starts ("+") or ended ("-"): it ends those that run should offsync be killed."""
        try:
            if self.guard is not None:
                os.write(self.guard, b"%s%d\n" % (sign.encode(), pid))
        except OSError:                     # one that was killed is missed only if offsync is killed too
            self.guard = None


CHILDREN = Children()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _signal_process(process: "subprocess.Popen[bytes]", signum: int) -> None:
    """Send a signal to a program and what it started (each runs in a session of its own)."""
    try:
        os.killpg(process.pid, signum)
    except (ProcessLookupError, PermissionError):
        pass


def program(name: str) -> str:
    """Return the path of a system program; the error names the command that installs it."""
    found = shutil.which(name) or shutil.which(name, path=SBIN)
    if not found:
        raise OffsyncError("%s: the program is not installed; run: offsync install-deps" % name)
    return found


def _feed_lines(data: bytes, on_line: Callable[[bytes], None]) -> bytes:
    """Give each whole line to on_line; return the rest. Names hold no raw \\r or \\n: rsync escapes them."""
    if b"\r" in data:
        data = data.replace(b"\r", b"\n")
    lines = data.split(b"\n")
    for line in lines[:-1]:
        on_line(line)
    if len(lines[-1]) > MAX_NAME_BYTES:
        raise OffsyncError("rsync printed a line without end; nothing more is read from it")
    return lines[-1]


def _read_output(process: "subprocess.Popen[bytes]", deadline: Optional[float], on_line: Optional[Callable[[bytes], None]],
                 last_words: bool) -> tuple[list[bytes], bytes, bool]:
    """Read both pipes until the program ends; return (stdout, stderr shortened, whether the deadline passed).

    The end is that of the program, not of the pipes: a master ssh in the background may hold them open. A program that
    does not end KILL_AFTER seconds after SIGTERM, for its deadline or because all is stopping, is killed.
    """
    assert process.stdout and process.stderr
    end = None if deadline is None else time.monotonic() + deadline
    kill: Optional[float] = None
    out: list[bytes] = []
    size, head, tail, rest, timed_out = 0, b"", b"", b"", False
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            ready = selector.select(0 if ended else 0.1)
            if ended and not ready:
                break
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 18)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    room = STDERR_KEPT - len(head)
                    head, tail = head + chunk[:room], (tail + chunk[room:])[-STDERR_KEPT:]
                elif on_line:
                    rest = _feed_lines(rest + chunk, on_line)
                else:
                    out.append(chunk)
                    size += len(chunk)
                    if size > STDOUT_LIMIT:
                        raise OffsyncError("a program prints without end; nothing more is read from it")
            PROGRESS.tick()
            now = time.monotonic()
            if kill is None and (end is not None and now > end or CHILDREN.stopping and not last_words):
                timed_out, kill = not CHILDREN.stopping, now + KILL_AFTER
                _signal_process(process, signal.SIGTERM)
            elif kill is not None and now > kill:
                _signal_process(process, signal.SIGKILL)
    if rest and on_line:
        on_line(rest)
    return out, head + tail, timed_out


class Progress:
    """One line for each thing that is being done, on a terminal's stderr; nothing anywhere else."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.texts: dict[str, tuple[str, float]] = {}       # name -> what is being done, since when
        self.drawn: list[str] = []
        self.last = time.monotonic() + 0.3  # when it was drawn; what takes less than this at first is not worth a line

    def enabled(self) -> bool:
        """Return whether stderr is a terminal that can move its cursor."""
        return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not CHILDREN.verbose

    def update(self, name: str, text: Optional[str]) -> None:
        """Show what is being done for a target or the source now, its first word being the phase; None ends its line."""
        if not self.enabled():
            return
        with self.lock:
            before = self.texts.pop(name, ("", 0.0))
            if text is not None:
                same_phase = before[0].split(" ")[0] == text.split(" ")[0]
                self.texts[name] = (text, before[1] if same_phase else time.monotonic())
            self.tick(0.1 if text else 0)

    def tick(self, interval: float = 0.5) -> None:
        """Draw all lines again if the last time was the interval (seconds) ago."""
        now = time.monotonic()
        if (self.texts or self.drawn) and now >= self.last + interval:
            self.last = now
            with self.lock:
                self.draw(["%s: %s%s" % (name, text, " (%d s)" % (now - since) if now - since >= 2 else "")
                           for name, (text, since) in sorted(self.texts.items())])

    def draw(self, lines: list[str]) -> None:
        """Draw lines in place of those drawn before, cut to the terminal, at most as many as fit; [] takes them away."""
        try:
            columns, rows = (number or 80 for number in os.get_terminal_size(sys.stderr.fileno()))  # windows change
        except OSError:
            columns, rows = 80, 24
        if len(lines) > rows - 2:
            lines = lines[:max(rows - 3, 1)] + ["... and %d more" % (len(lines) - max(rows - 3, 1))]
        with self.lock:
            up = sum(max(-(-len(line) // columns), 1) for line in self.drawn)       # a narrower window has wrapped them
            self.drawn = [line[:columns - 1] for line in lines]
            with contextlib.suppress(OSError):              # a terminal that is gone is no error
                sys.stderr.write(("\x1b[%dA\r\x1b[J" % up if up else "") + "".join(line + "\n" for line in self.drawn))
                sys.stderr.flush()


PROGRESS = Progress()


LOST_OUTPUT: list[str] = []                 # why standard output could not be written: said at the end, for the work goes on


def emit(text: Union[str, bytes], error: bool = False) -> None:
    """Print a line (or bytes as they are): a result on stdout, anything else on stderr. A reader who went away is no error."""
    stream = sys.stderr if error else sys.stdout
    try:
        with PROGRESS.lock:                 # no other thread draws in between
            if PROGRESS.drawn:
                PROGRESS.draw([])
            if isinstance(text, bytes):
                stream.flush()
                stream.buffer.write(text)
            else:
                stream.write(text + "\n")
            stream.flush()
    except OSError as problem:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())      # nothing fails on it again
        os.close(null)
        if not error and not isinstance(problem, BrokenPipeError):
            LOST_OUTPUT.append(str(problem.strerror))


def run(argv: Sequence[Union[str, bytes]], *, stdin: int = subprocess.DEVNULL, deadline: Optional[float] = None,
        on_line: Optional[Callable[[bytes], None]] = None, show_output: bool = False, last_words: bool = False) -> Result:
    """Start a program, the only place that does, and return how it ended.

    stdin is a file descriptor; deadline is in seconds. stdout is returned, or given line by line to on_line
    (\\r ends a line too), or shown on stderr. last_words lets it run although everything else is stopping.
    """
    if CHILDREN.verbose:
        emit("+ " + shlex.join(os.fsdecode(word) for word in argv), error=True)
    if CHILDREN.stopping and not last_words:
        return Result(None, b"", b"interrupted")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RSYNC_")}
    environment["LC_ALL"] = "C"
    try:
        process = subprocess.Popen(argv, stdin=stdin, env=environment, stdout=2 if show_output else subprocess.PIPE,
                                   stderr=None if show_output else subprocess.PIPE, start_new_session=not show_output)
    except OSError as error:
        absent = isinstance(error, (FileNotFoundError, PermissionError))
        raise OffsyncError("%s: it cannot be started: %s; %s" % (show_text(os.fsdecode(argv[0])), error.strerror, "run: offsync "
                           "install-deps" if absent else "mend that, then try again")) from None
    try:
        CHILDREN.tell_guard("+", process.pid)
        out, err, timed_out = ([], b"", False) if show_output else _read_output(process, deadline, on_line, last_words)
        status = process.wait()
    except BaseException:
        _signal_process(process, signal.SIGKILL)
        process.wait()
        raise
    finally:
        CHILDREN.tell_guard("-", process.pid)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
    return Result(None if timed_out else status, b"".join(out), err)


def fingerprints(lines: Iterable[str]) -> list[tuple[int, str, str]]:
    """Return (bits, SHA256 fingerprint, type) of each known_hosts or public key line, as ssh-keygen reads them."""
    with tempfile.TemporaryFile() as stream:
        stream.writelines(line.encode() + b"\n" for line in lines)
        stream.seek(0)
        result = run([program("ssh-keygen"), "-l", "-E", "sha256", "-f", "-"], stdin=stream.fileno())
    found = [line.split() for line in result.stdout.decode("utf-8", "replace").splitlines()]
    return [(int(words[0]), words[1], words[-1].strip("()")) for words in found if len(words) > 2 and words[0].isdigit()]


def validate_public_key(text: str) -> PublicKey:
    """Return the key of one line, as ssh-keygen accepts it, of a type and strength that OpenSSH calls safe."""
    if "PRIVATE KEY" in text:
        raise UsageError("key: that is a private key, which never leaves the controller; give the line that "
                         "'offsync init' prints there")
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) != 1:
        raise UsageError("key: %s instead of one; give the one line that 'offsync init' prints on the controller"
                         % (plural(len(lines), "line") if lines else "nothing"))
    match = re.fullmatch(r"(\S+)[ \t]+([A-Za-z0-9+/]+=*)(?:[ \t]+(.*))?", lines[0].strip())
    if not match or match[1] not in KEY_TYPES or _CONTROL.search(match[3] or ""):
        raise UsageError("key: it is not a public key of a known type (%s, ...); give the line that 'offsync init' "
                         "prints on the controller, without options" % KEY_TYPES[0])
    key = PublicKey(match[1], match[2], (match[3] or "").strip())
    accepted = fingerprints(["%s %s" % (key.type, key.blob)])
    if not accepted:
        raise UsageError("key: ssh-keygen does not accept it; copy the whole line that 'offsync init' prints")
    if key.type == "ssh-rsa" and accepted[0][0] < RSA_BITS:
        raise UsageError("key: an RSA key of %d bits is too weak; use the ed25519 key of 'offsync init'" % accepted[0][0])
    return key


def colour(kind: str, text: str) -> str:
    """Return text in its kind's colour on a terminal's stdout, else as it is (no-color.org)."""
    code = {"added": 32, "modified": 33, "missing": 31, "leftover": 36, "failed": 31, "ok": 32}.get(kind)
    if not code or not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return text
    return "\x1b[%dm%s\x1b[0m" % (code, text)


def open_terminal() -> BinaryIO:
    """Return the terminal, also where stdin is a pipe, as ssh does; under "su -c" only stdin leads to it. Raises OSError."""
    try:
        return open("/dev/tty", "r+b", buffering=0)
    except OSError:
        if not os.isatty(0):
            raise
        return open(os.dup(0), "r+b", buffering=0)


def ask(question: str, twin: str) -> str:
    """Return the answer typed on the terminal; without a terminal, an error that names the non-interactive twin."""
    try:
        with open_terminal() as terminal:
            terminal.write(question.encode())
            return terminal.readline().decode("utf-8", "replace").strip()
    except OSError:
        raise OffsyncError("there is no terminal to ask on; %s" % twin) from None


def has_terminal() -> bool:
    """Return whether a question could be asked."""
    try:
        open_terminal().close()
        return True
    except OSError:
        return False


def read_file(path: str, what: str, missing: str, regular: bool = True) -> bytes:
    """Return a small file's contents; missing says what to do where it does not exist. regular refuses pipes and devices."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if regular else 0)), "rb") as stream:
            if regular and not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UsageError("%s %s: it is not a regular file; replace it by one" % (what, show_text(path)))
            return stream.read(FILE_LIMIT)
    except FileNotFoundError:
        raise UsageError("%s %s: it does not exist; %s" % (what, show_text(path), missing)) from None
    except OSError as error:
        raise OffsyncError("%s %s: %s; mend that, then try again" % (what, show_text(path), error.strerror)) from None


def write_atomically(path: str, data: bytes, mode: int) -> None:
    """Replace a file: a temporary neighbour, mode first, fsync, rename. A symlink and an existing file's owner stay."""
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, ".offsync-%d-%s" % (os.getpid(), os.path.basename(path)))
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                if os.path.exists(path):
                    os.fchown(descriptor, os.stat(path).st_uid, os.stat(path).st_gid)
                os.fchmod(descriptor, mode)
                stream.write(data)
                stream.flush()
                os.fsync(descriptor)
            os.rename(temporary, path)
        except BaseException:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise OffsyncError("%s: it cannot be written: %s; nothing was changed" % (show_text(path), error.strerror)) \
            from None


def make_directory(path: str, mode: int) -> None:
    """Create a directory, with its parents, if it is absent; the mode of one that exists is not ours to change."""
    if not os.path.isdir(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, mode)
        os.chmod(path, mode)


class Home:
    """$OFFSYNC_HOME: names of its files, its lock and its log."""

    def __init__(self) -> None:
        self.path = validate_home(os.environ.get("OFFSYNC_HOME") or os.path.expanduser("~/.offsync"))
        self.config = os.path.join(self.path, "config.yaml")
        self.key = os.path.join(self.path, "id_ed25519")
        self.known_hosts = os.path.join(self.path, "known_hosts")
        self.log = os.path.join(self.path, "operations.log")
        self.plans = os.path.join(self.path, "plans")
        self.unfinished = os.path.join(self.path, "unfinished")
        self.locked: Optional[int] = None

    def lock(self, what: str) -> None:
        """Take the writers' lock until offsync ends; the loser says who holds it."""
        path = os.path.join(self.path, "lock")
        try:
            self.locked = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            raise UsageError("%s: it does not exist; run first: offsync init --source DIR" % show_text(self.path)) from None
        except BlockingIOError:
            holder = quote_answer(read_file(path, "lock", "")) or "another offsync"
            raise OffsyncError("%s is running and holds the lock %s; try again when it has finished" % (holder, path)) from None
        os.ftruncate(self.locked, 0)
        os.pwrite(self.locked, b"offsync %s (process %d)\n" % (what.encode(), os.getpid()), 0)

    def load(self) -> tuple[Config, Document, str]:
        """Return the config, its document and its text."""
        data = read_file(self.config, "config", "run first: offsync init --source DIR")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[:error.start].count(b"\n") + 1
            raise UsageError("%s:%d: not UTF-8; correct that" % (self.config, line)) from None
        return (*validate_config(text, self.config), text)

    def open_log(self) -> int:
        """Return a descriptor for appending to operations.log; nothing is sent where that fails."""
        try:
            log = os.open(self.log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            size = os.fstat(log).st_size
            if size and os.pread(log, 1, size - 1) != b"\n":        # the disk was full once: what follows stays readable
                os.write(log, b"\n")
            return log
        except OSError as error:
            raise OffsyncError("log %s: it cannot be written: %s; nothing was sent; mend that, then apply again"
                               % (show_text(self.log), error.strerror)) from None


def check_private(path: str) -> None:
    """Raise unless a file is there and nobody else can read it."""
    if not os.path.exists(path):
        raise OffsyncError("%s: it does not exist; run: offsync init" % show_text(path))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise OffsyncError("%s: others may read it (mode %04o); run: chmod %o %s"
                           % (show_text(path), mode, mode & 0o700, shlex.quote(path)))


def append_log(log: int, line: bytes) -> None:
    """Append one record with one write."""
    try:
        if os.write(log, line) != len(line):
            raise OSError(28, "No space left on device")
    except OSError as error:
        raise OffsyncError("operations.log: the record could not be written: %s; it was: %s"
                           % (error.strerror, line[:500].decode())) from None


def close_master(path: str, ssh: str) -> None:
    """End the ssh master that listens on this control socket, if one does."""
    if os.path.exists(path):
        with contextlib.suppress(OffsyncError, OSError):        # else it ends itself after MASTER_IDLE
            run([ssh, "-F", "/dev/null", "-o", "ControlPath=" + path, "-O", "exit", "--", "offsync"],
                deadline=SESSION_DEADLINE, last_words=True)
        with contextlib.suppress(OSError):
            os.unlink(path)                 # it would do so itself, a moment later


def clean_up(scratch: str, ssh: str) -> None:
    """End every ssh master whose control socket lies in scratch, and remove scratch."""
    for entry in sorted(os.listdir(scratch)) if os.path.isdir(scratch) else ():
        if stat.S_ISSOCK(os.lstat(os.path.join(scratch, entry)).st_mode):
            close_master(os.path.join(scratch, entry), ssh)
    shutil.rmtree(scratch, ignore_errors=True)


def start_guard(scratch: str, ssh: str) -> tuple[int, int]:
    """Fork a process that cleans up should offsync be killed; return its PID and the pipe that keeps it waiting.

    It hears which programs run ("+PID", "-PID"). When the pipe closes, by our exit or our death, it ends those, closes
    the ssh connections whose sockets are in scratch, and removes scratch. Must be called before any thread starts.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reader)
        return pid, writer
    try:
        os.setsid()
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        os.closerange(3, reader)            # the lock, among others: it ends with offsync
        os.closerange(reader + 1, 1024)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        running: set[int] = set()
        with os.fdopen(reader, "rb") as pipe:
            for line in pipe:
                (running.add if line.startswith(b"+") else running.discard)(int(line[1:]))
        for pid in running:
            try:
                os.killpg(pid, signal.SIGTERM)
            except OSError:
                pass
        clean_up(scratch, ssh)
    finally:
        os._exit(0)


def make_scratch() -> str:
    """Return a new private directory whose path is short enough for control sockets."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(parent)) + 24 < SOCKET_PATH_LIMIT and not re.search(r'["%$\\\s\']', parent) \
                and os.access(parent, os.W_OK | os.X_OK):
            return tempfile.mkdtemp(prefix="offsync-", dir=parent)
    raise OffsyncError("there is no writable temporary directory with a short, plain name; set TMPDIR to one")


def find_rsync() -> tuple[str, tuple[int, int, int]]:
    """Return (path, version) of a real rsync, new enough: $OFFSYNC_RSYNC, PATH's, or brew's (macOS ships openrsync)."""
    named = os.environ.get("OFFSYNC_RSYNC")
    candidates = [named] if named else [shutil.which("rsync"), *(os.path.join(place, "rsync") for place in BREW_BIN)]
    problem = "%s, which OFFSYNC_RSYNC names, is no program" % show_text(named) if named else "the program is not installed"
    for path in candidates:
        if not path or not shutil.which(path):
            continue
        version = parse_rsync_version(run([path, "--version"], deadline=SESSION_DEADLINE).stdout)
        if version and version >= RSYNC_OLDEST:
            return path, version
        problem = "%s is %s" % (path, "rsync %d.%d.%d, too old" % version if version else "openrsync or no rsync at all")
    raise OffsyncError("rsync: %s; offsync needs rsync 3.1.0 or newer: run offsync install-deps, or set OFFSYNC_RSYNC"
                       % problem)


def warn(text: str) -> None:
    """Print a warning."""
    emit("offsync: warning: " + text, error=True)


def warn_of_old_rsync() -> None:
    """Say so where the version suggests known vulnerabilities; distributions back-port, so it is only a hint."""
    version = find_rsync()[1]
    if version < RSYNC_SAFER:
        warn("rsync %d.%d.%d: releases before 3.4.0 have known vulnerabilities (CVE-2024-12084 and others), unless your "
             "distribution patched them; update it" % version)


def find_rrsync(wanted: Optional[str]) -> tuple[str, list[str], str]:
    """Return (path, command words, "python3", "perl" or "") of rrsync here: at the wanted place or, for None, a known one.

    A script that is not executable is run through the interpreter that its first line names.
    """
    places = [wanted] if wanted else [path for place in RRSYNC_PLACES for path in sorted(glob.glob(place))]
    for place in places:
        path = validate_absolute_path(place, "rrsync")
        if path.endswith(".gz") and os.path.isfile(path):
            raise OffsyncError("rrsync %s: it is compressed; run: gunzip -c %s > /usr/local/bin/rrsync && chmod 755 "
                               "/usr/local/bin/rrsync" % (path, path))
        if not os.path.isfile(path):
            continue
        first = read_file(path, "rrsync", "")[:200].split(b"\n")[0]
        language = next((name for name in ("python3", "perl") if name.encode() in first), "")
        if os.access(path, os.X_OK):
            return path, [path], language
        interpreter = "/usr/bin/" + language if os.path.exists("/usr/bin/" + language) else shutil.which(language)
        if language and interpreter:
            return path, [interpreter, path], language
        raise OffsyncError("rrsync %s: it is not executable and its interpreter is missing; run: install -m 755 %s "
                           "/usr/local/bin/rrsync" % (path, path))
    if wanted:
        raise UsageError("rrsync %s: it does not exist; name its place, or leave --rrsync away to look in the known ones"
                         % show_text(wanted))
    raise OffsyncError("rrsync: it is in none of the known places; run: offsync install-deps --role target (images "
                       "without documentation lack it on EL 8 and 9: dnf -y --setopt=tsflags= reinstall rsync)")


# --- Operations: the source -------------------------------------------------------------------------------------

def _symlink_offence(source: bytes, real_source: bytes, path: bytes) -> str:
    """Return why a symlink cannot be delivered, or "" if it stays within the source, as written and as resolved."""
    try:
        link = os.readlink(os.path.join(source, path))
        if link.startswith(b"/"):
            return "it is a symlink to an absolute path"
        lexical = os.path.normpath(os.path.join(os.path.dirname(path), link))
        real = os.path.realpath(os.path.join(source, path))
    except OSError as error:
        return "it is a symlink that cannot be read: %s" % error.strerror
    if lexical == b".." or lexical.startswith(b"../") \
            or not (real + b"/").startswith(real_source.rstrip(b"/") + b"/"):
        return "it is a symlink that leaves the source"
    return ""


def scan_source(source: bytes) -> tuple[list[tuple[bytes, str]], int]:
    """Walk the source once; return ([(path, why it cannot be delivered)], number of entries), excludes not applied."""
    offenders: list[tuple[bytes, str]] = []
    count = 0
    real_source = os.path.realpath(source)
    check_access = os.geteuid() != 0        # root reads everything
    pending = [b""]
    while pending:
        directory = pending.pop()
        prefix = directory + b"/" if directory else b""
        PROGRESS.update("source", "scanning " + show(directory or b"."))
        try:
            with os.scandir(os.path.join(source, directory)) as entries:
                for entry in entries:
                    count += 1
                    path = prefix + entry.name
                    if entry.name == STAGING:
                        offenders.append((path, "rsync reserves the name .~tmp~ for itself; rename it"))
                    if entry.is_file(follow_symlinks=False):        # most are
                        why = "it cannot be read" if check_access and not os.access(entry.path, os.R_OK) else ""
                    elif entry.is_symlink():
                        why = _symlink_offence(source, real_source, path)
                    elif entry.is_dir(follow_symlinks=False):
                        why = ""
                        pending.append(path)
                    else:
                        why = "it is a device, socket or fifo"
                    if why:
                        offenders.append((path, why))
        except OSError as error:
            if not directory:
                raise OffsyncError("source %s: %s; name a readable directory: offsync init --source DIR"
                                   % (show(source), error.strerror)) from None
            offenders.append((directory, "it cannot be read: %s" % error.strerror))
    PROGRESS.update("source", None)
    return sorted(offenders), count


def hash_file(path: bytes) -> tuple[bytes, int]:
    """Return (sha256, size in bytes) of a file, never through a symlink."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(22, "it is no regular file any more", path)
        while size < status.st_size:        # not "until the end": one read is enough for most files
            chunk = os.read(descriptor, min(status.st_size + 1, 1 << 18))
            if not chunk:
                break
            digest.update(chunk)
            size += len(chunk)
    finally:
        os.close(descriptor)
    return digest.digest(), size


def describe_entry(source: bytes, path: bytes) -> SourceEntry:
    """Return a source entry, a file with its sha256. Raises OSError, or ValueError for devices and the like."""
    full = os.path.join(source, path)
    status = os.lstat(full)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        return SourceEntry("directory", 0, mode, b"", status.st_ctime_ns)
    if stat.S_ISLNK(status.st_mode):
        link = os.readlink(full)
        return SourceEntry("symlink", len(link), 0o777, link, status.st_ctime_ns)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file, directory or symlink any more")
    digest, size = hash_file(full)
    return SourceEntry("file", size, mode, digest, status.st_ctime_ns)


class SourceReader:
    """What the plan says about source entries: each is looked at and hashed once, for all targets, in threads."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.entries: dict[bytes, bytes] = {}           # path -> SourceEntry.pack(), b"" until it is described
        self.errors: dict[bytes, str] = {}
        self.batch: list[bytes] = []        # a queue costs as much for one as for many
        self.wanted: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self.pending = 0                    # entries that are not described yet
        self.threads = 0
        self.condition = threading.Condition()

    def want(self, path: bytes) -> None:
        """Have an entry described in the background."""
        with self.condition:
            if path in self.entries:
                return
            self.entries[path] = b""
            self.pending += 1
            self.batch.append(path)
            if len(self.batch) >= HASHED_AT_ONCE:
                self._hand_over(self.batch)
                self.batch = []

    def flush(self) -> None:
        """Have the rest described too, one at a time: these may be large files, and all threads shall have a share."""
        with self.condition:
            for path in self.batch:
                self._hand_over([path])
            self.batch = []

    def _hand_over(self, paths: list[bytes]) -> None:
        """Give a batch to a thread; starts as many as are of use."""
        self.wanted.put(paths)
        if self.threads < min(os.cpu_count() or 1, 4):
            try:
                threading.Thread(target=self._work, daemon=True).start()
                self.threads += 1
            except RuntimeError:
                if not self.threads:
                    raise OffsyncError("source: no thread can be started to hash it; raise the limit of processes (ulimit -u)") \
                        from None

    def _work(self) -> None:
        """Describe wanted entries, in a daemon thread."""
        while True:
            paths = self.wanted.get()
            for path in paths:
                try:
                    self.entries[path] = describe_entry(self.source, path).pack()
                except (OSError, ValueError, struct.error, MemoryError) as error:
                    self.errors[path] = getattr(error, "strerror", None) or str(error)
            with self.condition:
                self.pending -= len(paths)
                if not self.pending:
                    self.condition.notify_all()

    def wait(self) -> None:
        """Return when every wanted entry is described; raise for those that vanished or cannot be read."""
        with self.condition:
            while self.pending:
                self.flush()                # also what a pass wanted that failed before it could do so
                PROGRESS.update("source", "hashing, %s to go" % plural(self.pending, "entry", "entries"))
                self.condition.wait(0.2)
        PROGRESS.update("source", None)
        if self.errors:
            raise OffsyncError("source: it changed during the plan: %s; plan again"
                               % some_of(["%s: %s" % (show(p), e) for p, e in sorted(self.errors.items())]))

    def entry(self, path: bytes) -> SourceEntry:
        """Return what is known of a wanted entry."""
        return SourceEntry.unpack(self.entries[path])

    def changed(self, path: bytes) -> bool:
        """Return whether an entry is not any more what was planned (its content is read again only if its stamp moved)."""
        planned = self.entry(path)
        try:
            status = os.lstat(os.path.join(self.source, path))
            if status.st_ctime_ns == planned.stamp:
                return False
            return describe_entry(self.source, path)._replace(stamp=0) != planned._replace(stamp=0)
        except (OSError, ValueError):
            return True


def marked(item_format: bytes, on_item: Callable[[bytes], None],
           on_other: Callable[[bytes], None] = lambda line: None) -> tuple[bytes, Callable[[bytes], None]]:
    """Return the --out-format for rsync, and who takes its output: items begin with an unguessable marker.

    So no other output of rsync's, nor anything a target sends, can look like an item.
    """
    marker = b"offsync-" + os.urandom(9).hex().encode() + b":"
    return b"--out-format=" + marker + item_format, lambda line: (
        on_item(line[len(marker):]) if line.startswith(marker) else on_other(line))


def included_names(rsync: str, source: bytes, exclude: Sequence[str], complete: bool = True) -> set[bytes]:
    """Return the paths that the excludes leave, as rsync itself applies them; complete raises if any is unreadable."""
    names: set[bytes] = set()
    out_format, on_line = marked(b"%n", lambda name: names.add(parse_rsync_name(name).rstrip(b"/")))
    result = run([rsync, *RSYNC_ALWAYS, *RSYNC_LIST, *("--exclude=" + pattern for pattern in exclude), out_format, "--",
                  source.rstrip(b"/") + b"/", "/nonexistent/%s/" % os.urandom(8).hex()], on_line=on_line)
    if complete and result.status != 0:
        raise OffsyncError("%s: it cannot be read completely; mend that, then try again (rsync said: %s)"
                           % (show(source), quote_answer(result.stderr)))
    return names - {b".", b""}


def check_source(rsync: str, config: Config) -> int:
    """Return how many entries the source has. Raises unless every one that is not excluded can be delivered."""
    source = os.fsencode(config.source)
    if not os.path.isdir(source):
        raise OffsyncError("source %s: it is not a readable directory; name one: offsync init --source DIR"
                           % show(source))
    if (os.path.realpath(os.fsencode(Home().path)) + b"/").startswith(os.path.realpath(source).rstrip(b"/") + b"/"):
        raise OffsyncError("source %s: it contains %s with the private key; choose a directory that holds only what is to be "
                           "delivered: offsync init --source DIR" % (show(source), Home().path))
    offenders, count = scan_source(source)
    if offenders and config.exclude:
        included = included_names(rsync, source, config.exclude, complete=False)
        offenders = [(path, why) for path, why in offenders if path in included]
    if offenders:
        raise OffsyncError("source %s: %s cannot be delivered: %s; remove or exclude what is named, then plan again"
                           % (show(source), plural(len(offenders), "entry", "entries"),
                              some_of(["%s: %s" % (show(path), why) for path, why in offenders])))
    return count


# --- Operations: the connection ---------------------------------------------------------------------------------

class Run:
    """What all targets of one command share: config, programs, the scratch directory and its guard."""

    def __init__(self, home: Home, config: Config, jobs: Optional[int] = None) -> None:
        self.home, self.config = home, config
        self.jobs = jobs or config.jobs
        self.source = os.fsencode(config.source)
        self.ssh, self.rsync = program("ssh"), find_rsync()[0]
        check_private(home.key)
        self.reader = SourceReader(self.source)
        self.entries = 0                    # of the source, once it is checked
        self.numbers = itertools.count()
        self.scratch = make_scratch()
        self.empty = os.fsencode(os.path.join(self.scratch, "empty"))       # the source of dry runs that only ask
        os.mkdir(self.empty)
        self.guard_pid, CHILDREN.guard = start_guard(self.scratch, self.ssh)

    def __enter__(self) -> "Run":
        """Return the run itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing of ours behind; the guard has nothing to do then."""
        clean_up(self.scratch, self.ssh)
        guard, CHILDREN.guard = CHILDREN.guard, None
        if guard is not None:
            os.close(guard)
            os.waitpid(self.guard_pid, 0)


class Connection:
    """One authenticated ssh connection to one target, proved to be restricted before it is used."""

    def __init__(self, shared: Run, target: Target, known_hosts: Optional[str] = None) -> None:
        self.shared, self.target = shared, target
        self.socket = os.path.join(shared.scratch, "%d" % next(shared.numbers))      # a name of its own
        self.known_hosts = known_hosts
        self.direct = False                 # True: no multiplexing, one connection for each session
        self.path_proved = False            # then it is proved again whenever the connection must be opened again
        self.free_at = 0.0                  # when an rsync that failed there has ended (time.monotonic())

    def options(self) -> list[str]:
        """Return the options of a connection of its own."""
        home, port = self.shared.home, self.target.port
        files = '"%s" ~/.ssh/known_hosts ~/.ssh/known_hosts2' % home.known_hosts
        return [*SSH_OPTIONS, "-o", "UserKnownHostsFile=" + (self.known_hosts or files),
                "-o", 'IdentityFile="%s"' % home.key, *(["-o", "Port=%d" % port] if port else [])]

    def session_options(self) -> list[str]:
        """Return the options of a session: over the open connection, or directly where multiplexing is impossible."""
        if self.direct:
            return [*SSH_NO_MULTIPLEXING, *self.options()]
        return [*SSH_SESSION, "-o", "ControlPath=" + self.socket]

    def destination(self) -> list[str]:
        """Return ssh's words for the login."""
        return ["-l", self.target.user, "--", self.target.host]

    def open(self) -> None:
        """Connect and prove that the key cannot run a command. Raises TargetError.

        One ssh does both: its session asks for a command, and leaves the connection open behind it. Some sshd drop
        connections under load (MaxStartups in sshd_config(5)): these are tried again.
        """
        for delay in (*RETRY_DELAYS, None):
            failure = self._prove("-o", "ControlMaster=yes", "-o", "ControlPath=" + self.socket,
                                  "-o", "ControlPersist=%d" % MASTER_IDLE)
            if not failure and os.path.exists(self.socket):
                return
            self.close()
            if not failure or failure.kind == "session-refused":
                self._open_directly()
                return
            if failure.kind == "host-key-changed":
                raise explain_changed_host_key(self.shared, self.target, failure)
            if failure.kind not in RETRIED or delay is None or CHILDREN.stopping:
                raise failure
            time.sleep(delay)

    def _prove(self, *options: str) -> Optional[TargetError]:
        """Connect and ask for a command: None if it was refused, silently on stdout, as rrsync does; else why that is not known.

        Raises if it was not refused. 255 is ssh's own failure, and how Perl's rrsync refuses; a proof cut off is none.
        """
        login, link = self.target.login, "offsync link --path " + shlex.quote(self.target.remote_path)
        result = run([self.shared.ssh, *options, *self.options(), *self.destination(), PROOF_COMMAND], deadline=CONNECT_DEADLINE)
        if PROOF_OUTPUT in result.stdout:
            raise TargetError(login, "the key is NOT restricted: a shell command ran there, so nothing was sent; is there a line "
                              "without command=\"...\" for it in authorized_keys, or an IdentityFile with a shell in "
                              "~/.ssh/config? Remove that, then run there: " + link, "open")
        if result.stdout.strip():
            raise TargetError(login, "the login prints text where rrsync must be alone, so nothing was sent; make the shell "
                              "start files there silent, or link the key again (it said: %s)" % quote_answer(result.stdout),
                              "noise")
        if result.status == 0:
            raise TargetError(login, "the forced command of the key there is not rrsync (it accepts any command and does "
                              "nothing), so nothing was sent; run there: " + link, "not-rrsync")
        failure = diagnose(self.target, result.stderr)
        if result.status is not None and 0 < result.status < 255 or failure.kind == "perl-refusal":
            return None
        if result.status is None and failure.kind != "session-refused" and not CHILDREN.stopping:
            return TargetError(login, "it accepted the connection, then did not answer within %d seconds; look at sshd and the "
                               "login's shell there" % CONNECT_DEADLINE, "timeout")
        return failure

    def _open_directly(self) -> None:
        """Prove and go on without multiplexing; refused where ssh_config has other keys, since each session connects anew."""
        result = run([self.shared.ssh, *self.options(), "-G", *self.destination()], deadline=SESSION_DEADLINE)
        keys = re.findall(rb"^identityfile (.*)$", result.stdout, re.MULTILINE)
        if len(keys) != 1:
            raise TargetError(self.target.login, "ssh cannot share one connection there, and ~/.ssh/config adds other keys "
                              "(IdentityFile), so it would not be sure which is used; remove IdentityFile for this host")
        failure = self._prove(*SSH_NO_MULTIPLEXING)
        if failure:
            raise failure
        self.direct = True

    def ensure_open(self) -> None:
        """Open the connection (again, with its proof) unless it is open."""
        if not self.direct and not os.path.exists(self.socket):
            self.open()
            if self.path_proved:
                self.path_proved = False    # prove_path comes here too
                raise_if_open(self.target, [prove_path(self)])
                self.path_proved = True

    def session(self, options: Sequence[str], command: str) -> Result:
        """Run one ssh session for a proof."""
        self.ensure_open()
        return run([self.shared.ssh, *self.session_options(), *options, *self.destination(), command], deadline=SESSION_DEADLINE)

    def rsync_words(self, path: str) -> tuple[list[str], str]:
        """Return the options with which rsync uses this connection, and its name for a path on the target."""
        shell = " ".join(quote_for_rsync(word) for word in [self.shared.ssh, *self.session_options()])
        host = "[%s]" % self.target.host if ":" in self.target.host else self.target.host
        return ["-e", shell, "--"], "%s@%s:%s" % (self.target.user, host, path)

    def rsync(self, options: Sequence[str], *, source: Optional[bytes] = None, stdin: Optional[BinaryIO] = None,
              on_item: Callable[[bytes], None] = lambda line: None, item_format: bytes = b"%i %n", path: str = ".",
              on_other: Callable[[bytes], None] = lambda line: None, deadline: Optional[float] = None,
              last_words: bool = False) -> Result:
        """Run one rsync to the target and give each itemized line to on_item. A lock or a busy sshd is waited for.

        stdin is an open file, read from its current position (again for each attempt).
        """
        seen = False

        def on_any_item(line: bytes) -> None:
            """Take note that it works."""
            nonlocal seen
            seen = True
            on_item(line)

        out_format, on_line = marked(item_format, on_any_item, on_other)
        start = stdin.tell() if stdin else 0
        for delay in (*RETRY_DELAYS, None):
            if not last_words:
                self.ensure_open()
            time.sleep(max(self.free_at - time.monotonic(), 0))
            words, destination = self.rsync_words(path)
            if stdin:
                os.lseek(stdin.fileno(), start, os.SEEK_SET)
            result = run([self.shared.rsync, *RSYNC_ALWAYS, *options, out_format, *words,
                          (source or self.shared.source).rstrip(b"/") + b"/", destination],
                         stdin=stdin.fileno() if stdin else subprocess.DEVNULL, on_line=on_line, deadline=deadline,
                         last_words=last_words)
            if result.status and not result.stderr:     # the last words of a dying rsync may be lost: its status is left
                result = result._replace(stderr=SILENT + b" (code %d)" % result.status)
            self.free_at = time.monotonic() + (LINGERING if result.status else 0)
            if result.status == 0 or seen or delay is None or last_words or CHILDREN.stopping \
                    or diagnose(self.target, result.stderr).kind not in RETRIED:
                return result
            time.sleep(delay)
        raise AssertionError("the last attempt returns")

    def close(self) -> None:
        """End the connection."""
        close_master(self.socket, self.shared.ssh)


# --- Operations: host keys --------------------------------------------------------------------------------------

def fetch_host_keys(shared: Run, target: Target) -> list[str]:
    """Return the known_hosts lines of the target's host keys, one a type, as ssh gets them on its own route.

    ssh connects without authenticating, so ProxyJump, HostKeyAlias and Port of ssh_config hold (ssh-keyscan knows none).
    """
    lines = []
    path = os.path.join(shared.scratch, "fetched-%d" % next(shared.numbers))
    connection = Connection(shared, target, path)
    stderr = b""
    for family in HOST_KEY_FAMILIES:        # ssh takes the first value of each option
        result = run([shared.ssh, *SSH_FETCH_HOST_KEY, "-o", "HostKeyAlgorithms=" + family, *connection.options(),
                      *connection.destination(), "true"], deadline=CONNECT_DEADLINE)
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as stream:
                lines += [line.strip() for line in stream if line.strip()]
            os.unlink(path)
            continue
        stderr = stderr or result.stderr
        if diagnose(target, result.stderr).kind in ("name", "refused", "unreachable", "timeout", "busy-sshd"):
            break
    if not lines:
        raise diagnose(target, stderr)
    return lines


def explain_changed_host_key(shared: Run, target: Target, error: TargetError) -> TargetError:
    """Return the error with the fingerprints that were known (in lines hashed or not) and that the host shows now."""
    try:
        shown = fetch_host_keys(shared, target)
    except OffsyncError:
        return error
    known = []
    for path in (shared.home.known_hosts, os.path.expanduser("~/.ssh/known_hosts")):
        result = run([program("ssh-keygen"), "-F", shown[0].split()[0], "-f", path], deadline=SESSION_DEADLINE)
        known += [line for line in result.stdout.decode("utf-8", "replace").splitlines() if line and line[0] != "#"]
    described = [", ".join(sorted({"%s (%s)" % key[1:] for key in fingerprints(lines)})) or "none" for lines in (known, shown)]
    return TargetError(target.login, "its host key CHANGED: known %s; shown now %s; if that is expected, confirm the new one "
                       "with: offsync target add %s" % (*described, target.add_arguments), error.kind)


def choose_host_keys(target: Target, lines: Sequence[str], wanted: Optional[str]) -> list[str]:
    """Return the known_hosts lines to store: the one with the wanted fingerprint, or all, after a typed "yes"."""
    described = [(line, "%s (%s)" % key[1:]) for line in lines for key in fingerprints([line])]
    if wanted:
        chosen = [line for line, text in described if text.split(" ")[0] == wanted]
        if not chosen:
            raise OffsyncError("%s: its host key is NOT the expected one: expected %s, it shows %s; somebody else may answer at "
                               "this address: compare with the fingerprint that 'offsync link' printed on the target's console"
                               % (target.login, wanted, ", ".join(text for _, text in described)))
        return chosen
    emit("The host key of %s is not trusted yet. It shows:" % target.login, error=True)
    for _, text in described:
        emit("  " + text, error=True)
    emit("Compare with what 'offsync link' printed on the target's own console.", error=True)
    answer = ask("Trust %s? Type yes or no: " % ("this key" if len(described) == 1 else "these keys"),
                 "give the fingerprint that 'offsync link' printed on the target: --host-key SHA256:...")
    if answer != "yes":
        raise OffsyncError("%s: the host key was not confirmed (only a full \"yes\" does); nothing was saved" % target.login)
    return [line for line, _ in described]


def store_host_keys(shared: Run, lines: Sequence[str]) -> None:
    """Put these lines into known_hosts in place of what it has for their host name (which ssh-keygen finds, hashed too)."""
    name = lines[0].split()[0]
    path, old = os.path.join(shared.scratch, "known_hosts"), b""
    if os.path.exists(shared.home.known_hosts):
        shutil.copyfile(shared.home.known_hosts, path)
        removed = run([program("ssh-keygen"), "-R", name, "-f", path], deadline=SESSION_DEADLINE)
        if removed.status != 0:             # the old key would go on being trusted
            raise OffsyncError("known_hosts %s: ssh-keygen cannot edit it; mend that, then try again (it said: %s)"
                               % (shared.home.known_hosts, quote_answer(removed.stderr)))
        old = read_file(path, "known_hosts", "")
    if old and not old.endswith(b"\n"):
        old += b"\n"
    write_atomically(shared.home.known_hosts, old + "".join(line + "\n" for line in lines).encode(), 0o600)


# --- Operations: proofs -----------------------------------------------------------------------------------------

class Proof(NamedTuple):
    """One thing that was tried on a target; closed is None where it could not be told."""
    tried: str
    closed: Optional[bool]
    answer: str


def prove_path(connection: Connection) -> Proof:
    """Try, as a dry run, to write to an absolute path whose parent does not exist.

    rsync's complaint names the directory in which it looked for our random name: that must be the configured one.
    """
    expected = os.fsencode(connection.target.remote_path)
    tried, marker = "write to a path outside", os.urandom(8).hex().encode()
    for _ in range(5):                      # a dying rsync now and then loses its last words
        result = connection.rsync(("-n", "-r"), source=connection.shared.empty, path="/%s/x" % marker.decode(),
                                  deadline=SESSION_DEADLINE)
        complaint = parse_rsync_name(result.stderr)
        found = re.search(rb' "(/[^\n]*?)/*' + marker, complaint)
        if result.status == 0:
            return Proof(tried, False, "it writes anywhere")
        if b' "%s/%s' % (expected, marker) in complaint:
            return Proof(tried, True, "it stays below " + show(expected))
        if found:
            return Proof(tried, False, "its key writes below %s, not below %s" % (show(found.group(1)), show(expected)))
        if not result.stderr.startswith(SILENT):
            break
    failure = diagnose(connection.target, result.stderr)
    if failure.kind == "other":
        failure.why = ("it does not tell where its key writes, so nothing was sent; is its forced command rrsync, of the same "
                       "release as rsync there? (it said: %s)" % (quote_answer(result.stderr) or "nothing"))
    raise failure


def _prove_forwarding(connection: Connection) -> list[Proof]:
    """Try to forward a port to the target's own network, on a connection of its own.

    ssh -v shows what sshd says of the key's options when it authenticates (auth_debug in OpenSSH): agent forwarding
    leaves no other trace that can be seen from here.
    """
    result = run([connection.shared.ssh, *SSH_NO_MULTIPLEXING, "-v", "-o", "LogLevel=DEBUG1", "-o", "ClearAllForwardings=no",
                  *connection.options(), "-W", "127.0.0.1:%d" % (connection.target.port or 22), *connection.destination()],
                 deadline=CONNECT_DEADLINE)
    told = re.findall(rb"Remote: [^\n]*key options:([^\r\n]*)", result.stderr)[-1:]    # a bastion's come before
    agent = b"agent-forwarding" not in told[0] if told else None
    port = False if result.stdout or told and b"port-forwarding" in told[0] \
        else True if told or b"administratively prohibited" in result.stderr else None
    answers = {True: "refused", False: "allowed", None: "sshd does not tell"}
    return [Proof("forward a port", port, answers[port]), Proof("forward an agent", agent, answers[agent])]


def prove_restriction(connection: Connection) -> list[Proof]:
    """Try on an open connection what the key must not do, and that it can write; return what happened, no file sent."""
    target, empty = connection.target, connection.shared.empty
    read, (words, files) = connection.session((), "cat /etc/passwd"), connection.rsync_words(".")
    pulled = run([connection.shared.rsync, "-n", "-r", *words, files, empty + b"/"], deadline=SESSION_DEADLINE)
    marker = os.urandom(8).hex()
    above = connection.rsync(("-n", "-r"), source=empty, path="../" + marker, deadline=SESSION_DEADLINE)
    # With a terminal the refusal would come back on stdout, since a terminal has one stream only.
    terminal = connection.session(("-tt",), PROOF_COMMAND)
    proofs = [
        Proof("run a command", True, "refused"),            # open() would have raised
        Proof("read a file with cat", not read.stdout, quote_answer(read.stdout) or "refused"),
        Proof("read files with rsync", pulled.status != 0, "refused" if pulled.status else "it sends them"),
        prove_path(connection),
        Proof("write to .. of the path", above.status != 0 and marker.encode() + b'"' not in above.stderr,
              "refused" if above.status else "accepted"),
        Proof("get a terminal (PTY)", not terminal.stdout.strip(), "given" if terminal.stdout.strip() else "refused"),
        *_prove_forwarding(connection)]
    written = connection.rsync(("-n", "-r"), source=empty, deadline=SESSION_DEADLINE)
    if written.status != 0:                 # a dead connection, for example, would have "refused" all of the above
        raise diagnose(target, written.stderr)
    return [*proofs, Proof("write below the path (dry run)", True, "possible")]


def raise_if_open(target: Target, proofs: Sequence[Proof]) -> None:
    """Raise if a proof found anything open: then nothing is sent."""
    found = ["%s: %s" % (proof.tried, proof.answer) for proof in proofs if proof.closed is False]
    if found:
        raise TargetError(target.login, "the key is not restricted as the config says, so nothing is sent: %s; run there: "
                          "offsync link --path %s, or here, if only the path is another: offsync target add with that path"
                          % ("; ".join(found), shlex.quote(target.remote_path)), "open")


# --- Operations: plan -------------------------------------------------------------------------------------------

def json_entry(change: Change, reader: SourceReader) -> dict[str, Any]:
    """Return one entry of a plan as JSON values."""
    fields: dict[str, Any] = dict(json_path(change.path))
    if change.kind in ("missing", "leftover"):
        return {**fields, "type": "directory" if change.directory else "non-directory"}
    entry = reader.entry(change.path)
    fields.update(type=entry.type, size=entry.size, mode="%04o" % entry.mode,
                  sha256=entry.content.hex() if entry.type == "file" else None)
    if entry.type == "symlink":
        fields.update({key.replace("path", "link"): value for key, value in json_path(entry.content).items()})
    return {**fields, "changes": list(change.changes)} if change.kind == "modified" else fields


class TargetPlan:
    """The plan of one target; error says why there is none."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.target = connection, connection.target
        self.error: Optional[str] = None
        self.changes: list[Change] = []     # sorted by path

    def of(self, *kinds: str) -> list[Change]:
        """Return the changes of these kinds."""
        return [change for change in self.changes if change.kind in kinds]

    def size(self, reader: SourceReader) -> int:
        """Return how many bytes the files to send have."""
        return sum(reader.entry(c.path).size for c in self.of("added", "modified")
                   if c.kind == "added" or "content" in c.changes or "type" in c.changes)


def original_name(path: bytes) -> Optional[bytes]:
    """Return the path that rsync was going to give to this temporary file, None if it has no such name."""
    directory, name = os.path.split(path)
    if os.path.basename(directory) == STAGING:
        return os.path.join(os.path.dirname(directory), name)
    match = TEMPORARY_NAME.fullmatch(name)
    return os.path.join(directory, b"." + match.group(1)) if match else None


def temporary_name(path: bytes) -> bytes:
    """Return what rsync's temporary file for a path is called before its .XXXXXX (get_tmpname in receiver.c): one dot, cut."""
    directory, name = os.path.split(path)
    name = name[1:] if name.startswith(b".") else name
    if len(name) > 246:
        name = re.sub(rb"[\x80-\xff]+\Z", b"", name[:246])
    return os.path.join(directory, b"." + name)


def find_leftovers(shared: Run, target: Target, missing: Sequence[Change]) -> set[bytes]:
    """Return those of the target's own paths that a killed rsync left, never a user's file; .~tmp~ itself if all below it is.

    .~tmp~/NAME is one if NAME is in the source or in the journal of an unfinished apply of this controller; .NAME.XXXXXX is
    one if NAME is in that journal, and XXXXXX looks random.
    """
    sending: set[bytes] = set()
    if missing:
        with contextlib.suppress(FileNotFoundError), open(os.path.join(shared.home.unfinished, target.login), "rb") as stream:
            stream.readline()               # the record
            sending.update(name[2:] for name in stream.read().split(b"\0"))
    sending.update([*map(temporary_name, sending)])
    found, foreign, staging = set(), set(), set()
    for path, directory in ((change.path, change.directory) for change in missing):
        original = None if directory else original_name(path)
        staged = os.path.basename(os.path.dirname(path)) == STAGING
        if directory and os.path.basename(path) == STAGING:
            staging.add(path)
        elif original and (original in sending or staged and os.path.lexists(os.path.join(shared.source, original))):
            found.add(path)
        else:
            foreign.add(path)
    return found | {directory for directory in staging if not any(path.startswith(directory + b"/") for path in foreign)}


def name_list(shared: Run, names: Iterable[bytes]) -> BinaryIO:
    """Return an open file with the NUL-terminated names, at its beginning."""
    stream = tempfile.TemporaryFile(dir=shared.scratch)
    stream.writelines(name + b"\0" for name in names)
    stream.seek(0)
    return stream


def itemize(connection: Connection, options: Sequence[str], paths: Optional[Iterable[bytes]] = None,
            reader: Optional[SourceReader] = None, **more: Any) -> list[Change]:
    """Return what one run of rsync itemizes, for the whole tree or for the given paths. Raises TargetError if it failed.

    A reader has the changed source entries hashed while rsync is still comparing.
    """
    login, found, room, most = connection.target.login, [], MAX_TARGET_ONLY, 2 * connection.shared.entries + 1000

    def on_item(line: bytes) -> None:
        """Take one line; raises TargetError for what is no itemized line."""
        nonlocal room, most
        try:
            change = parse_itemized(line)
        except ValueError as error:
            raise TargetError(login, "rsync printed %s; update rsync here and there" % error) from None
        if not change:
            return
        found.append(change)
        if change.kind == "missing":
            room -= sys.getsizeof(change.path) + 150
        else:
            most -= 1                       # it can ask for an entry again and again
            if reader:
                reader.want(change.path)
        if room < 0 or most < 0:
            raise TargetError(login, "it reports too many entries; is its path the right one, and rsync there what it should be?")

    if paths is None:
        excludes = ["--exclude=" + pattern for pattern in connection.shared.config.exclude]
        result = connection.rsync((*options, *excludes), on_item=on_item, **more)
        if reader:
            reader.flush()
    else:
        # A bare name that begins with # or ; would be a comment to rsync.
        with name_list(connection.shared, (b"./" + path for path in paths)) as names:
            result = connection.rsync(options, stdin=names, on_item=on_item, **more)
    if result.status != 0:
        raise diagnose(connection.target, result.stderr)
    return found


def classify(connection: Connection, changes: list[Change]) -> list[Change]:
    """Return the sorted changes of a target, from what rsync itemized.

    rsync shows an entry that replaces one of another type as new. So the new entries whose parent is not new (below a
    new directory all is new) are looked up on the target; what exists there is "modified" by type.
    """
    new = {change.path for change in changes if change.kind == "added"}
    doubtful = [path for path in new if os.path.dirname(path) not in new]
    replaced = set(doubtful) - {change.path for change in itemize(connection, RSYNC_ABSENT, doubtful)} if doubtful else set()
    left = find_leftovers(connection.shared, connection.target, [change for change in changes if change.kind == "missing"])
    for index, change in enumerate(changes):        # replaced one by one: there may be a million
        if change.kind == "missing" and change.path in left:
            changes[index] = change._replace(kind="leftover")
        elif change.kind == "added" and change.path in replaced:
            changes[index] = change._replace(kind="modified", changes=("type",))
    changes.sort(key=lambda change: change.path)
    for one, other in zip(changes, changes[1:]):
        if one.path == other.path:
            raise TargetError(connection.target.login, "it reports %s twice; is rsync there what it should be?" % show(one.path))
    return changes


def plan_target(shared: Run, target: Target, mode: str) -> TargetPlan:
    """Return the plan of one target, errors included.

    Where there is something to do, the key must really write below the configured path: it is proved then.
    """
    plan = TargetPlan(Connection(shared, target))
    PROGRESS.update(target.login, "connecting")
    try:
        plan.connection.open()
        PROGRESS.update(target.login, "comparing")
        plan.changes = classify(plan.connection, itemize(plan.connection, RSYNC_PLAN[mode], reader=shared.reader))
        if plan.changes:
            raise_if_open(target, [prove_path(plan.connection)])
            plan.connection.path_proved = True
    except (OffsyncError, OSError) as error:
        plan.error, plan.changes = getattr(error, "why", str(error)), []
    if not plan.changes:
        plan.connection.close()
    PROGRESS.update(target.login, None)
    return plan


def in_parallel(jobs: int, function: Callable[[_Item], _Value], items: Sequence[_Item]) -> Iterator[_Value]:
    """Yield function(item) for each item, in order, while up to jobs of them are at work.

    Whatever stops the consumer stops the rest: what was not begun is given to function with CHILDREN.stopping set.
    """
    from concurrent.futures import ThreadPoolExecutor       # here, since it is slow to import
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = [pool.submit(function, item) for item in items]
        finished = itertools.count(1)
        for future in futures if len(items) > 1 else ():
            future.add_done_callback(lambda _: PROGRESS.update("(all)", "%d of %d done" % (next(finished), len(items))))
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            CHILDREN.stopping = True
            raise
    PROGRESS.update("(all)", None)          # here, since the last result comes before its callback


def canonical_plan(shared: Run, plans: Sequence[TargetPlan]) -> Iterator[str]:
    """Yield the lines that the plan ID is the sha256 of: policies, targets, and every entry with its content."""
    config = shared.config
    policy = {key: getattr(config, key) for key in ("source", "delete", "overwrite", "verify", "exclude")}
    yield json.dumps({"path": "the config", "kind": "set", **policy}, sort_keys=True) + "\n"
    for plan in plans:
        target = plan.target
        yield json.dumps({"login": target.login, "path": "", "kind": "unreachable" if plan.error else "planned",
                          "host": target.host, "port": target.port, "remote_path": target.remote_path}, sort_keys=True) + "\n"
        for change in plan.changes:
            fields = {"login": target.login, "kind": change.kind, **json_entry(change, shared.reader)}
            yield json.dumps(fields, sort_keys=True) + "\n"


def identify(shared: Run, plans: Sequence[TargetPlan], keep: bool = False) -> str:
    """Return the plan ID. keep stores the plan (best effort), so that "apply --plan" can name differences."""
    digest, room = hashlib.sha256(), PLAN_KEPT_LIMIT if keep else 0
    text: list[str] = []
    for line in canonical_plan(shared, plans):
        digest.update(line.encode())
        room -= len(line)
        if room > 0:
            text.append(line)
    if room > 0:
        with contextlib.suppress(OSError, OffsyncError):
            directory = shared.home.plans
            make_directory(directory, 0o700)
            kept = sorted((os.stat(os.path.join(directory, name)).st_mtime_ns, name) for name in os.listdir(directory))
            for _, name in kept[:max(len(kept) - PLANS_KEPT + 1, 0)]:
                os.unlink(os.path.join(directory, name))
            write_atomically(os.path.join(directory, digest.hexdigest()), "".join(text).encode(), 0o600)
    return digest.hexdigest()


def check_plan_id(shared: Run, plans: Sequence[TargetPlan], wanted: str, plan_id: str) -> None:
    """Raise, naming the differences, unless the plan is the reviewed one."""
    if plan_id.startswith(wanted):
        return
    directory = shared.home.plans
    differences = ["it is not among the plans kept in " + directory]
    names = [name for name in (os.listdir(directory) if os.path.isdir(directory) else []) if name.startswith(wanted)]
    if names:
        reviewed = read_file(os.path.join(directory, names[0]), "plan", "plan again").decode("utf-8", "replace").splitlines()
        try:
            differences = name_plan_differences(reviewed, canonical_plan(shared, plans))
        except (ValueError, KeyError, TypeError, AttributeError):
            differences = ["what %s kept of it cannot be read" % directory]
    raise OffsyncError("plan %s: it is not the plan of now (%s): %s; review the new plan, then apply that one"
                       % (wanted, plan_id[:16], some_of(differences, "; ")))


# --- Operations: what killed runs left --------------------------------------------------------------------------

def open_journal(home: Home, plan: TargetPlan, record: dict[str, Any]) -> BinaryIO:
    """Write the journal of one apply: what operations.log must say should everything be killed, then names; return it open.

    It stands at the names to send, for rsync's --files-from. Before them are those that an earlier apply was sending.
    """
    path = os.path.join(home.unfinished, plan.target.login)
    old = filter(None, (original_name(change.path) for change in plan.of("leftover")))
    try:
        descriptor = os.open(path + "~", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        stream = os.fdopen(descriptor, "w+b")
        stream.write(json.dumps(record, sort_keys=True).encode() + b"\n")
        stream.writelines(b"./" + name + b"\0" for name in old)
        start = stream.tell()
        stream.writelines(b"./" + change.path + b"\0" for change in plan.of("added", "modified"))
        stream.flush()
        stream.seek(start)
        os.replace(path + "~", path)        # the old journal stays until the new one is whole
    except OSError as error:
        raise OffsyncError("%s: the journal cannot be written: %s; nothing was sent" % (show_text(path), error.strerror)) \
            from None
    return stream


def close_journal(path: str, finished: bool) -> None:
    """Drop the journal of a finished apply; that of a failed one stays for its leftovers, marked as logged."""
    try:
        if finished:
            os.unlink(path)
        else:
            with open(path, "r+b") as stream:
                stream.write(b"#")          # in place of the record's brace
    except FileNotFoundError:
        pass
    except OSError as error:
        warn("%s: %s" % (path, error.strerror))


def log_killed_runs(home: Home, log: int) -> None:
    """Log the runs that were killed before they could do so themselves; their journals begin with the record."""
    for name in sorted(os.listdir(home.unfinished)):
        path = os.path.join(home.unfinished, name)
        with open(path, "rb") as stream:
            record = stream.readline()
        if record.startswith(b"{") and record.endswith(b"\n"):
            append_log(log, record)
            warn("an apply to %s was killed; the next one finishes its job" % name.rstrip("~"))
            close_journal(path, name.endswith("~"))     # no login ends so: that run was killed before it sent anything


# --- Operations: transfer and verification ----------------------------------------------------------------------

def _lies_below(path: bytes, directories: set[bytes]) -> bool:
    """Return whether one of the directories is above the path."""
    while b"/" in path:
        path = os.path.dirname(path)
        if path in directories:
            return True
    return False


class Delivery:
    """Carries one target's plan out and verifies it."""

    def __init__(self, shared: Run, plan: TargetPlan, journal: Callable[[], BinaryIO]) -> None:
        self.shared, self.plan, self.journal = shared, plan, journal
        self.connection, self.login = plan.connection, plan.target.login
        self.sent = plan.of("added", "modified")
        kinds = ("missing", "leftover") if shared.config.delete else ("leftover",)
        self.deletable = {change.path: change.directory for change in plan.of(*kinds)}
        self.bytes_sent, self.seconds = 0, 0.0
        self.different: Optional[set[bytes]] = None     # after the transfer; None: not known
        self.result, self.error = "ok", ""              # or "failed", "interrupted", and why
        self.delivered: list[bytes] = []
        self.deleted: list[bytes] = []

    def carry_out(self) -> None:
        """Send, delete and verify; what became of it stands in the attributes, also after a failure or an interruption."""
        started = time.monotonic()
        try:
            if self.plan.error:
                raise TargetError(self.login, self.plan.error)
            if CHILDREN.stopping:           # nothing of it was begun
                self.different = {change.path for change in self.plan.changes}
                raise TargetError(self.login, "interrupted before anything was sent")
            if self.plan.changes:
                self._deliver()
        except (OffsyncError, OSError) as problem:
            self.result, self.error = "failed", getattr(problem, "why", str(problem))
            if not self.plan.error and self.different is None:
                self._find_out()
                if self.different is None:
                    self.error += " (what arrived is unknown; run: offsync verify)"
            if CHILDREN.stopping:
                self.result, self.error = "interrupted", "interrupted; apply again finishes the job"
        self.connection.close()
        PROGRESS.update(self.login, None)
        different = self.different if self.different is not None else {change.path for change in self.plan.changes}
        self.delivered = sorted({change.path for change in self.sent} - different)
        self.deleted = sorted(set(self.deletable) - different)
        self.seconds = time.monotonic() - started

    def _deliver(self) -> None:
        """Do what the plan lists, in this order: what stands in the way goes, files are sent, the rest is deleted."""
        replaced = {c.path for c in self.sent if "type" in c.changes and not c.directory}
        blocking = {path: directory for path, directory in self.deletable.items() if _lies_below(path, replaced)}
        wanted = {change.path for change in self.sent}
        for change in self.plan.of("leftover"):     # what does not help to resume only takes room
            if not change.directory and original_name(change.path) not in wanted:
                blocking[change.path] = False
        surprises: set[bytes] = set()
        with self.journal() as names:       # before the first change: should we be killed, the next run must know
            if blocking:
                surprises = self._delete(blocking, self._compare("quick")[1])
            if self.sent and not surprises:
                self._send(names)
        # Where all of the source was sent, one pass by hash says everything, and hashes no byte that was not sent.
        whole = len(self.sent) == self.shared.entries and not self.deletable
        suspects, extraneous = self._compare("hash" if whole else "quick")
        paths = sorted(suspects | {change.path for change in self.sent})
        if paths and not whole:
            PROGRESS.update(self.login, "verifying")
            different = {item.path for item in itemize(self.connection, RSYNC_COMPARE, paths)}
        else:
            different = suspects
        if extraneous & set(self.deletable) and not surprises and not different:    # what takes their place has arrived
            surprises = self._delete(self.deletable, extraneous)
            after, extraneous = self._compare("quick")
            different = after - suspects
        self.different = different | extraneous
        if surprises:
            raise TargetError(self.login, "nothing was deleted, since new entries appeared there after the plan: %s; plan again"
                              % some_of(list(map(show, sorted(surprises)))))
        if self.different:
            raise TargetError(self.login, "verification found %s: %s; apply again, or look for what changes them there"
                              % (plural(len(self.different), "difference"), some_of(list(map(show, sorted(self.different))))))
        moved = [show(change.path) for change in self.sent if self.shared.reader.changed(change.path)]
        if moved:
            raise TargetError(self.login, "the source changed during the run: %s; plan and apply again" % some_of(moved))

    def _send(self, names: BinaryIO) -> None:
        """Send exactly the planned entries. How rsync ends says little; verification decides."""
        config, total = self.shared.config, self.plan.size(self.shared.reader)
        options = list(RSYNC_SEND)
        # A quick check would overlook content, or send for a difference of time alone.
        options += ["-c"] if not all(change.quick for change in self.sent) else []
        options += ["--ignore-existing"] if not config.overwrite else []
        options += ["--bwlimit=%d" % config.bwlimit] if config.bwlimit else []
        options += ["-z"] if config.compress else []
        options += ["--info=progress2"] if PROGRESS.enabled() else []

        def on_item(line: bytes) -> None:
            """Count the bytes that were really sent."""
            self.bytes_sent += int(line.split(b" ", 1)[0])

        def on_other(line: bytes) -> None:
            """Show the progress that rsync prints; a target can write such lines too."""
            match = re.match(rb" *([0-9][0-9,.]{0,30}) +[0-9]+% +([0-9.,]{1,12})([kMGT]?B/s)", line)
            if match:
                done = int(re.sub(rb"[,.]", b"", match.group(1)))
                PROGRESS.update(self.login, "sending %d%% of %s at %s %s" % (
                    min(100 * done // max(total, 1), 100), format_bytes(total), match[2].decode(),
                    match[3].decode().replace("k", "K").replace("B", "iB")))     # it divides by 1024 (progress.c)

        PROGRESS.update(self.login, "sending %s" % format_bytes(total))
        result = self.connection.rsync(options, stdin=names, on_item=on_item, on_other=on_other, item_format=b"%b %i %n")
        if result.status != 0:
            raise diagnose(self.plan.target, result.stderr)

    def _compare(self, mode: str, **more: Any) -> tuple[set[bytes], set[bytes]]:
        """Compare the whole tree; return (paths that differ, paths that only the target has)."""
        PROGRESS.update(self.login, "comparing again" if mode == "quick" else "verifying")
        changes = itemize(self.connection, RSYNC_PLAN[mode], **more)
        extraneous = {change.path for change in changes if change.kind == "missing"}
        return {change.path for change in changes} - extraneous, extraneous

    def _delete(self, paths: dict[bytes, bool], extraneous: set[bytes]) -> set[bytes]:
        """Delete these planned entries, unless others have appeared since the plan: then nothing; return those others."""
        surprises = extraneous - {change.path for change in self.plan.of("missing", "leftover")}
        if surprises:
            return surprises
        PROGRESS.update(self.login, "deleting %s" % plural(len(paths), "entry", "entries"))
        rules = {format_include_rule(path, directory): None for path, directory in paths.items()}
        for path in paths:                  # rsync must be let into the directories above
            while b"/" in path:
                path = os.path.dirname(path)
                rules[format_include_rule(path, True)] = None
        with name_list(self.shared, rules) as stream:
            result = self.connection.rsync(RSYNC_DELETE, stdin=stream)
        if result.status != 0:
            raise diagnose(self.plan.target, result.stderr)
        return set()

    def _find_out(self) -> None:
        """After a failure or an interruption, learn what arrived nevertheless, within a bounded time."""
        more: dict[str, Any] = {"deadline": RESCAN_DEADLINE, "last_words": True}
        try:
            extraneous = self._compare("quick", **more)[1]
            sent = [change.path for change in self.sent]
            self.different = extraneous | {item.path for item in itemize(self.connection, RSYNC_COMPARE, sent, **more)}
        except (OffsyncError, OSError):
            self.different = None


# --- Commands: read arguments, call, print, return a status -----------------------------------------------------

# The programs that each role needs, and what raises OffsyncError where one is not here.
PROGRAM_CHECKS: dict[str, dict[str, Callable[[], Any]]] = {
    "controller": {"rsync": find_rsync, "ssh-keygen": lambda: program("ssh-keygen"), "ssh": lambda: program("ssh")},
    "target": {"rsync": find_rsync, "ssh-keygen": lambda: program("ssh-keygen"), "sshd": lambda: program("sshd"),
               "rrsync": lambda: find_rrsync(None)}}
PROGRAM_CHECKS["both"] = {**PROGRAM_CHECKS["controller"], **PROGRAM_CHECKS["target"]}


def missing_programs(role: str) -> list[str]:
    """Return the programs that this role needs and that are not here."""
    missing = []
    for name, check in PROGRAM_CHECKS[role].items():
        try:
            check()
        except OffsyncError:
            missing.append(name)
    return missing


def install_commands(name: str, role: str) -> list[list[list[str]]]:
    """Return the steps that install what a role needs; a step is a list of commands, each tried if the one before failed."""
    manager = PACKAGE_MANAGERS[name]
    sudo = ["sudo"] if manager.sudo and os.geteuid() != 0 else []
    install = sudo + manager.install.split()
    wanted = (manager.controller if role != "target" else "") + " " + (manager.target if role != "controller" else "")
    packages = list(dict.fromkeys(wanted.split()))
    steps = [[sudo + manager.refresh.split()]] if manager.refresh else []
    steps.append([install + packages])
    if manager.older:
        steps[-1].append(install + list(dict.fromkeys("openssh" if p.startswith("openssh") else p for p in packages)))
    if manager.extra and role != "controller":
        steps.append([install + manager.extra.split()])
    return steps


def install_dependencies(role: str, assume_yes: bool) -> None:
    """Install what a role needs, after showing the commands and asking. Raises if anything is missing afterwards."""
    missing = missing_programs(role)
    if not missing:
        emit("install-deps: everything for the role %s is here" % role, error=True)
        return
    name = next((name for name in PACKAGE_MANAGERS if shutil.which(name)), None)
    if not name:
        raise OffsyncError("install-deps: missing: %s, and no known package manager (%s) is here; install OpenSSH and rsync with "
                           "rrsync by hand" % (", ".join(missing), ", ".join(PACKAGE_MANAGERS)))
    steps = install_commands(name, role)
    emit("install-deps: missing here: %s. These commands install it:" % ", ".join(missing), error=True)
    for step in steps:
        emit("  " + "\n  or, if that fails: ".join(shlex.join(command) for command in step), error=True)
    if not assume_yes and ask("Run them now? Type y or n: ", "repeat with -y to run them without a question") not in ("y", "yes"):
        raise OffsyncError("install-deps: nothing was installed; missing: %s" % ", ".join(missing))
    for step in steps:                      # what is missing afterwards tells whether it worked
        any(run(command, show_output=True).status == 0 for command in step)
    still = missing_programs(role)
    if still:
        raise OffsyncError("install-deps: still missing: %s; %s"
                           % (", ".join(still), PACKAGE_MANAGERS[name].hint or "look at what %s printed above" % name))
    if "sshd" in missing and name != "apt-get":
        command = "rc-update add sshd default && rc-service sshd start" if name == "apk" else "systemctl enable --now sshd"
        emit("install-deps: now start sshd, for example: " + command, error=True)


def require_programs(role: str) -> None:
    """Make sure of the programs of a role: on a terminal offer to install them, else name the command.

    rrsync is not among them: link looks for it and knows better what to say.
    """
    missing = [name for name in missing_programs(role) if name != "rrsync"]
    if missing and has_terminal():
        install_dependencies(role, False)
    elif missing:
        raise OffsyncError("%s: not installed; run: offsync install-deps --role %s" % (", ".join(missing), role))


def cmd_install_deps(args: argparse.Namespace) -> int:
    """Install system packages."""
    install_dependencies(args.role, args.yes)
    return 0


def cmd_init(args: argparse.Namespace) -> int:
    """Create key pair and config, or update the source; print the public key."""
    require_programs("controller")
    home = Home()
    source = None
    if args.source is not None:
        source = validate_absolute_path(os.path.abspath(args.source), "source")
        if not args.source or not os.path.isdir(source):
            raise UsageError("source %s: it is not a directory; create it first" % show_text(args.source))
    make_directory(home.path, 0o700)
    home.lock("init")
    if os.path.lexists(home.config):
        config, document, text = home.load()
        if source and source != config.source:
            replace_scalar(document.lines, document.nodes["source"], source)
            text = "\n".join(document.lines)
            validate_config(text, home.config)
            write_atomically(home.config, text.encode(), 0o600)
    else:
        if source is None:
            source = os.path.join(home.path, "sync")
            make_directory(source, 0o755)
        write_atomically(home.config, format_new_config(source).encode(), 0o600)
    if not os.path.lexists(home.key):
        comment = "offsync@" + re.sub(r"[^A-Za-z0-9.-]", "", os.uname().nodename)
        result = run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", home.key])
        if result.status != 0:
            raise OffsyncError("key %s: ssh-keygen failed; mend that (it said: %s)" % (home.key, quote_answer(result.stderr)))
    check_private(home.key)
    if not os.path.exists(home.key + ".pub"):
        public = run([program("ssh-keygen"), "-y", "-f", home.key])
        if public.status != 0:
            raise OffsyncError("key %s: ssh-keygen cannot read it; move it away and run init again (it said: %s)"
                               % (home.key, quote_answer(public.stderr)))
        write_atomically(home.key + ".pub", public.stdout, 0o644)
    warn_of_old_rsync()
    config, _, _ = home.load()
    emit("source %s, config %s" % (show_text(config.source), show_text(home.config)), error=True)
    public_key = read_file(home.key + ".pub", "key", "run: offsync init").decode("utf-8", "replace").strip()
    emit("Now run this on each target:  offsync link --path DIR --key %s" % shlex.quote(public_key), error=True)
    emit(public_key)
    return 0


def read_key_argument(args: argparse.Namespace) -> PublicKey:
    """Return the public key from --key, --key-file, a pipe, or the terminal."""
    if args.key is not None:
        return validate_public_key(args.key)
    if args.key_file is not None:
        return validate_public_key(read_file(args.key_file, "key file", "name the file of the public key", False)
                                   .decode("utf-8", "replace"))
    program_on_stdin = sys.argv[0] in ("-", "")
    if not program_on_stdin and sys.stdin and not sys.stdin.isatty() and not stat.S_ISCHR(os.fstat(0).st_mode):
        emit("reading the public key from standard input ...", error=True)
        return validate_public_key(sys.stdin.buffer.read(1 << 16).decode("utf-8", "replace"))
    return validate_public_key(ask("Paste the public key (the line that 'offsync init' prints): ",
                                   "give the key: --key 'ssh-ed25519 AAAA...' or --key-file FILE"))


def authorized_keys_path() -> str:
    """Return the real path of ~/.ssh/authorized_keys: a symlinked file stays a symlink."""
    return os.path.realpath(os.path.expanduser("~/.ssh/authorized_keys"))


def replace_authorized_key(key: PublicKey, line: Optional[str]) -> tuple[Callable[[], None], str]:
    """Return (a function that sets or, for None, removes offsync's line for this key, that line as it is now or "")."""
    path, old, mode = authorized_keys_path(), b"", 0o600
    if os.path.exists(path):
        old, mode = read_file(path, "authorized_keys", ""), stat.S_IMODE(os.stat(path).st_mode)
    try:
        new, was = edit_authorized_keys(old, key, line)
    except ValueError as error:
        raise OffsyncError("%s:%s: this key stands there in a line that offsync did not write, and sshd uses the first line "
                           "that has it; remove that line, then try again" % (path, error)) from None

    def write() -> None:
        """Write the file, if that changes it."""
        if new == old:
            return
        make_directory(os.path.dirname(path), 0o700)
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(directory, fcntl.LOCK_EX)       # against another link or unlink: what was read must still be there
        if (read_file(path, "authorized_keys", "") if os.path.exists(path) else b"") != old:
            raise OffsyncError("%s: it was changed by somebody else at this moment; try again" % path)
        write_atomically(path, new, mode)
        os.close(directory)

    return write, was


def is_listening(ports: Iterable[str]) -> bool:
    """Return whether one of the TCP ports is listened on, by sshd or for it (systemd's sockets); proc(5), /proc/net/tcp."""
    wanted = {"%04X" % int(port) for port in ports}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as stream:
            if any(words[3] == "0A" and words[1].rpartition(":")[2] in wanted for words in map(str.split, stream)):
                return True
    return False


def link_warnings(account: pwd.struct_passwd, sshd: dict[str, list[str]], delivery: str) -> Iterator[str]:
    """Yield what would make sshd ignore the key, and what is wrong with the directory that it may write to."""
    if not os.access(delivery, os.W_OK):
        yield "%s is not writable for %s; change its owner or mode" % (show_text(delivery), account.pw_name)
    if os.stat(delivery).st_mode & 0o002:
        yield "%s is writable by everybody: others can change what is delivered; choose another directory" % show_text(delivery)
    home = os.path.expanduser("~")
    if os.path.realpath(home) != os.path.realpath(account.pw_dir):
        yield "HOME is %s, but sshd reads the account's home %s; run link as the account itself" % (home, account.pw_dir)
    for path in (home, os.path.join(home, ".ssh"), authorized_keys_path()):
        status = os.stat(path) if os.path.exists(path) else None
        if status and (status.st_mode & 0o022 or status.st_uid not in (0, account.pw_uid)):
            yield ("%s is writable or owned by others: sshd may ignore the key then (StrictModes in sshd_config(5)); run: "
                   "chmod go-w %s" % (path, shlex.quote(path)))
    if os.path.basename(account.pw_shell) in NO_LOGIN_SHELLS:
        yield "the login shell %s refuses commands, so rrsync cannot start; run: chsh -s /bin/sh" % account.pw_shell
    if sshd.get("pubkeyauthentication") == ["no"]:
        yield "sshd has PubkeyAuthentication no; allow it in sshd_config"
    places = sshd.get("authorizedkeysfile", [".ssh/authorized_keys"])
    expanded = [os.path.join(account.pw_dir, p.replace("%h", account.pw_dir).replace("%u", account.pw_name)) for p in places]
    if sshd and os.path.join(account.pw_dir, ".ssh/authorized_keys") not in expanded:
        yield "sshd reads keys from %s (AuthorizedKeysFile), not from ~/.ssh/authorized_keys; copy the line there" % (
            ", ".join(expanded))
    if not os.environ.get("SSH_CONNECTION") and os.path.isdir("/proc/net") and not is_listening(sshd.get("port", ["22"])):
        yield "no sshd is running here; start it before you add the target (fine while an image is being built)"


def sshd_settings(user: str) -> dict[str, list[str]]:
    """Return sshd's effective settings for a user, {} where sshd does not tell (sshd -T, with a throw-away host key)."""
    try:
        with tempfile.TemporaryDirectory(prefix="offsync-") as scratch:
            key = os.path.join(scratch, "key")
            run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key])
            result = run([program("sshd"), "-T", "-h", key, "-C", "user=%s,host=localhost,addr=127.0.0.1" % user],
                         deadline=SESSION_DEADLINE)
    except OffsyncError:
        return {}
    if result.status != 0:
        return {}
    lines = (line.split() for line in result.stdout.decode("utf-8", "replace").splitlines())
    return {words[0]: words[1:] for words in lines if len(words) > 1}


def own_host_key() -> str:
    """Return the SHA256 fingerprint of this host's ed25519 (else first) host key, "" if there is none."""
    paths = glob.glob("/etc/ssh/ssh_host_*_key.pub")
    for path in sorted(paths, key=lambda path: ("ed25519" not in path, path)):
        for _, fingerprint, _ in fingerprints([read_file(path, "host key", "").decode("utf-8", "replace").strip()]):
            return fingerprint
    return ""


def cmd_link(args: argparse.Namespace) -> int:
    """Install the restricted key on this target and print the controller's command."""
    require_programs("target")
    try:
        account = pwd.getpwuid(os.geteuid())
    except KeyError:
        raise OffsyncError("link: the user ID %d has no account here, so sshd lets nobody log in as it; run link as one that has"
                           % os.geteuid()) from None
    rrsync, words, language = find_rrsync(args.rrsync)
    from_pattern = validate_from_pattern(args.from_pattern) if args.from_pattern is not None else ""
    state = Home()                          # a controller's files, offsync itself and rrsync must not be replaced
    module = globals().get("__file__", "")
    protected = [rrsync, state.config, state.key, state.known_hosts, state.log, state.plans, state.unfinished,
                 *filter(os.path.exists, (sys.argv[0], module))]
    if os.path.exists(module):              # not "<stdin>"
        protected.append(os.path.join(os.path.dirname(module), "__pycache__"))
    path = validate_link_path(os.path.expanduser("~/.offsync/sync") if args.path is None else args.path, protected)
    command_line = validate_forced_command(words, path, account.pw_shell, language)
    key = read_key_argument(args)
    kept = re.match(r'from="([^"]*)",', replace_authorized_key(key, None)[1]) if args.from_pattern is None else None
    if kept:                                # a repeated link never lets in more than before
        from_pattern = kept[1]
        emit('kept from="%s" of the line that is here; to drop it: offsync unlink, then link again' % from_pattern, error=True)
    write_keys, old_line = replace_authorized_key(key, format_authorized_key(command_line, key, from_pattern))
    if path.startswith(os.path.realpath(os.path.expanduser("~/.offsync")) + "/"):
        make_directory(os.path.expanduser("~/.offsync"), 0o700)
    try:
        make_directory(path, 0o755)
    except PermissionError:
        raise OffsyncError("path %s: you may not create it; run as root: install -d -o %s %s; then link again"
                           % (show_text(path), account.pw_name, shlex.quote(path))) from None
    write_keys()
    same = old_line.startswith(format_authorized_key(command_line, key, from_pattern).split(KEY_RESTRICTIONS)[0])
    if old_line and not same:
        warn("this key was linked in another way before, which is replaced: "
             + show_text(old_line.split(KEY_RESTRICTIONS)[0]))
    emit("%s %s: the key may write below %s, nothing else"
         % ("already linked in" if same else "linked in", authorized_keys_path(), show_text(path)), error=True)
    settings = sshd_settings(account.pw_name)
    for warning in link_warnings(account, settings, path):
        warn(warning)
    warn_of_old_rsync()
    connection = os.environ.get("SSH_CONNECTION", "").split()
    ports = connection[3:] if len(connection) == 4 and connection[3].isdecimal() else settings.get("port", ["22"])
    user, host, host_key = account.pw_name, os.uname().nodename, own_host_key()
    target = Target("%s@%s" % (user, host), user, host, path, rrsync, int(ports[0]) if ports[0] != "22" else None)
    emit("Now run this on the controller (with the name by which it reaches this host):", error=True)
    emit("offsync target add " + target.add_arguments + (" --host-key " + host_key if host_key else ""))
    return 0


def cmd_unlink(args: argparse.Namespace) -> int:
    """Remove the key's entry from authorized_keys."""
    key = read_key_argument(args)
    write_keys, removed = replace_authorized_key(key, None)
    write_keys()
    emit("%s %s" % ("removed the key from" if removed else "the key has no entry in", authorized_keys_path()), error=True)
    return 0


def cmd_target_add(args: argparse.Namespace) -> int:
    """Prove trust and restriction of a target, then save it."""
    require_programs("controller")
    user, host = validate_login(args.login)
    rrsync = validate_absolute_path(args.rrsync, "rrsync") if args.rrsync else DEFAULT_RRSYNC
    target = Target(args.login, user, host, validate_absolute_path(args.path, "path"), rrsync,
                    validate_port(args.port) if args.port is not None else None)
    if args.host_key is not None and not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", args.host_key):
        raise UsageError("host key %s: it must be SHA256: and 43 characters, as 'offsync link' and ssh-keygen -l print it"
                         % show_text(args.host_key))
    home = Home()
    home.lock("target add")
    config, _, text = home.load()
    with Run(home, config) as shared:
        trusted: Sequence[str] = ()
        connection, confirm = Connection(shared, target), bool(args.host_key)
        try:
            if not confirm:
                connection.open()
        except TargetError as error:
            if error.kind not in ("host-key-unknown", "host-key-changed"):
                raise
            if error.kind == "host-key-changed":
                warn(str(error))
            confirm = True
        if confirm:                         # trust what was confirmed for this one connection, and for good once it is proved
            trusted = choose_host_keys(target, fetch_host_keys(shared, target), args.host_key)
            path = os.path.join(shared.scratch, "trusted")
            write_atomically(path, "".join(line + "\n" for line in trusted).encode(), 0o600)
            connection = Connection(shared, target, path)
            connection.open()
        proofs = prove_restriction(connection)
        raise_if_open(target, proofs)
        if trusted:
            store_host_keys(shared, trusted)
        text = add_target_lines(text, target)
        validate_config(text, home.config)
        write_atomically(home.config, text.encode(), 0o600)
    known = any(known.login == target.login for known in config.targets)
    emit("%s %s: the key is restricted to writing below %s (%s); next: offsync plan"
         % ("updated" if known else "added", target.login, show_text(target.remote_path),
            plural(sum(proof.closed is True for proof in proofs), "proof")))
    return 0


def cmd_target_list(args: argparse.Namespace) -> int:
    """List the targets."""
    config, _, _ = Home().load()
    targets = select_targets(config.targets, ())
    if args.json:
        emit(json.dumps({"version": 1, "targets": [target._asdict() for target in targets]}, sort_keys=True))
        return 0
    for target in targets:
        emit("%s  %s%s" % (target.login, show_text(target.remote_path), "  port %d" % target.port if target.port else ""))
    if not targets:
        emit("no targets yet; on a target run: offsync link; then here: offsync target add", error=True)
    return 0


def cmd_target_remove(args: argparse.Namespace) -> int:
    """Forget a target; its files and its key entry stay there."""
    home = Home()
    home.lock("target remove")
    config, _, text = home.load()
    if args.login not in [target.login for target in config.targets]:
        raise UsageError("target %s: unknown%s; known targets: %s" % (
            show_text(args.login), nearest(args.login, [target.login for target in config.targets]),
            ", ".join(sorted(target.login for target in config.targets)) or "none"))
    write_atomically(home.config, remove_target_lines(text, args.login).encode(), 0o600)
    emit("removed %s here; to revoke the key, run there: offsync unlink, with the key that 'offsync init' prints" % args.login,
         error=True)
    return 0


def load_targets(home: Home, patterns: Sequence[str]) -> tuple[Config, list[Target]]:
    """Return the config and the chosen targets; none configured is an error that says how to add one."""
    config, _, _ = home.load()
    if not config.targets:
        raise UsageError("targets: there are none yet; run on a target: offsync link --path DIR; then here the 'offsync target "
                         "add' command that it prints")
    return config, select_targets(config.targets, patterns)


def forbidden(config: Config, plan: TargetPlan) -> list[str]:
    """Return the kinds of changes that a plan needs and the config forbids."""
    return [kind for kind, key in POLICIES.items() if not getattr(config, key) and plan.of(kind)]


def plan_summary(shared: Run, plan: TargetPlan) -> str:
    """Return the counts of a plan, and what they need that the config forbids."""
    remarks = {"missing": " (apply will delete)"}
    remarks.update({kind: " (apply will refuse: %s is false)" % POLICIES[kind] for kind in forbidden(shared.config, plan)})
    counts = ["%d %s%s" % (len(plan.of(kind)), kind, remarks.get(kind, "")) for kind in KINDS if plan.of(kind)]
    return "%s; %s to send" % (", ".join(counts), format_bytes(plan.size(shared.reader))) if counts else "equal, nothing to do"


def print_target_plan(shared: Run, plan: TargetPlan) -> None:
    """Print one target's plan: a line an entry, then a summary."""
    emit("%s:%s" % (plan.target.login, show_text(plan.target.remote_path)))
    if plan.error:
        emit("  %s: %s" % (colour("failed", "not compared"), plan.error))
        return
    for change in plan.changes:
        size = ""
        if change.kind in ("added", "modified"):
            entry = shared.reader.entry(change.path)
            size = format_bytes(entry.size) if entry.type == "file" else entry.type
        elif change.directory:
            size = "directory"
        emit("  %s  %-12s  %10s  %s" % (colour(change.kind, "%-8s" % change.kind), ",".join(change.changes) or "-", size,
                                        show(change.path)))
    emit("  " + plan_summary(shared, plan))


def json_plan(shared: Run, plans: Sequence[TargetPlan], plan_id: str) -> Iterator[str]:
    """Yield the JSON of plans in pieces (there may be a million entries), keys sorted; without an ID for ""."""
    yield '{%s"source": %s, "targets": [' % ('"plan": "%s", ' % plan_id if plan_id else "", json.dumps(shared.config.source))
    for number, plan in enumerate(plans):
        target = plan.target
        fields = {"error": plan.error, "host": target.host, "login": target.login, "remote_path": target.remote_path}
        yield ", {" if number else "{"
        for name in sorted([*fields, *KINDS]):
            yield ('"%s": ' if name == "added" else ', "%s": ') % name
            if name in fields:
                yield json.dumps(fields[name])
                continue
            yield "["
            for index, change in enumerate(plan.of(name)):
                yield (", " if index else "") + json.dumps(json_entry(change, shared.reader), sort_keys=True)
            yield "]"
        yield "}"
    yield '], "version": 1}\n'


def plan_targets(shared: Run, targets: Sequence[Target], mode: str) -> Iterator[TargetPlan]:
    """Yield the plan of each target in the given order, its source entries described."""
    for plan in in_parallel(shared.jobs, lambda target: plan_target(shared, target, mode), targets):
        shared.reader.wait()
        yield plan


def show_plans(shared: Run, args: argparse.Namespace, targets: Sequence[Target], mode: str, quiet: bool) -> list[TargetPlan]:
    """Plan and print each target, as text or JSON; quiet prints no equal ones. Raises at the end if one has no plan."""
    shared.entries = check_source(shared.rsync, shared.config)
    plans = []
    for plan in plan_targets(shared, targets, mode):
        plans.append(plan)
        if not args.json and (plan.changes or plan.error or not quiet):
            print_target_plan(shared, plan)
    plan_id = ""
    if not quiet:
        plan_id = identify(shared, plans, keep=True)
    if args.json:
        pieces = json_plan(shared, plans, plan_id)
        for batch in iter(lambda: "".join(itertools.islice(pieces, 1000)), ""):
            emit(batch.encode())
    elif not quiet:
        for plan in plans if len(plans) > 1 else ():
            emit("%s: %s" % (plan.target.login, "not compared" if plan.error else plan_summary(shared, plan)))
        emit("plan %s" % plan_id)
        refused = any(forbidden(shared.config, plan) for plan in plans)
        if sys.stdout.isatty() and any(plan.changes for plan in plans) and not refused:
            emit("Next: offsync apply --plan %s" % plan_id[:12], error=True)
    failed = [plan.target.login for plan in plans if plan.error]
    if failed:
        raise OffsyncError("%s could not be compared: %s; see the reasons above"
                           % (plural(len(failed), "target"), some_of(failed)))
    return plans


def cmd_plan(args: argparse.Namespace) -> int:
    """Print the plan; change nothing."""
    home = Home()
    config, targets = load_targets(home, args.targets)
    with Run(home, config, args.jobs) as shared:
        plans = show_plans(shared, args, targets, config.verify, quiet=False)
    return 3 if args.exit_code and any(plan.changes for plan in plans) else 0


def refuse_by_policy(config: Config, plans: Sequence[TargetPlan], rsync: str) -> None:
    """Raise if the config forbids what any of the plans needs: then nothing is sent anywhere."""
    for kind, key in POLICIES.items():
        concerned = [plan for plan in plans if kind in forbidden(config, plan)]
        if concerned:
            described = ["%s: %s" % (plan.target.login, some_of([show(c.path) for c in plan.of(kind)])) for plan in concerned]
            raise OffsyncError('refused, nothing was sent: %s is false in the config, and the plan has %d %s: %s; allow it with '
                               '"%s: true", or %s' % (key, sum(len(p.of(kind)) for p in concerned), kind,
                                                 "; ".join(described[:LISTED]), key,
                                                 "take them into the source, or exclude them" if kind == "missing" else
                                                 "exclude them, or remove them on the target"))
    if any(plan.of("missing") for plan in plans) and not included_names(rsync, os.fsencode(config.source), config.exclude):
        raise OffsyncError("refused, nothing was deleted: the source %s is empty (after the excludes), and an empty source never "
                           "deletes; check that it is mounted and filled" % show_text(config.source))


def deliver(shared: Run, log: int, plan: TargetPlan, plan_id: str, timestamp: str, records: list[dict[str, Any]]) -> Delivery:
    """Carry out one target's plan and log it at once, whatever becomes of the others; return what became of it."""
    target = plan.target
    record = {"timestamp": timestamp, "host": target.host, "login": target.login, "operation": "apply", "plan": plan_id,
              "result": "interrupted", "files_changed": [], "bytes_sent": 0, "seconds": 0,
              "error": "offsync was killed; what arrived is unknown; the next apply finishes the job"}
    done = Delivery(shared, plan, lambda: open_journal(shared.home, plan, record))
    done.carry_out()
    record.update(result=done.result, bytes_sent=done.bytes_sent, seconds=round(done.seconds, 3), error=done.error,
                  files_changed=sorted(path.decode("utf-8", "backslashreplace") for path in done.delivered + done.deleted))
    if not done.error:
        del record["error"]
    records.append(record)
    append_log(log, json.dumps(record, sort_keys=True).encode() + b"\n")
    close_journal(os.path.join(shared.home.unfinished, target.login), done.result == "ok")
    return done


def print_outcome(done: Delivery) -> None:
    """Print what became of one target."""
    counts = [plural(len(done.delivered), "entry", "entries") + " delivered"] if done.delivered else []
    leftovers = {change.path for change in done.plan.of("leftover")} & set(done.deleted)
    deleted = len(done.deleted) - len(leftovers)
    counts += ["%d deleted" % deleted] if deleted else []
    counts += [plural(len(leftovers), "leftover") + " cleared"] if leftovers else []
    if done.result == "ok" and not counts:
        what = "equal, nothing to do"
    elif done.result == "ok":
        what = "%s, verified; %s sent in %.1f s" % (", ".join(counts), format_bytes(done.bytes_sent), done.seconds)
    else:
        what = "%s; %s before that" % (done.error, ", ".join(counts) or "nothing changed")
    emit("%s: %s: %s" % (done.login, colour(done.result, done.result), what))


def cmd_apply(args: argparse.Namespace) -> int:
    """Transfer what the plan lists, verify it, log it."""
    if args.plan is not None and not re.fullmatch(r"[0-9a-f]{8,64}", args.plan):
        raise UsageError("plan ID %s: it must be 8 to 64 hexadecimal digits, as 'offsync plan' prints it" % show_text(args.plan))
    home = Home()
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    home.lock("apply")
    config, targets = load_targets(home, args.targets)
    with Run(home, config, args.jobs) as shared:
        shared.entries = check_source(shared.rsync, config)
        log = home.open_log()
        plans = list(plan_targets(shared, targets, config.verify))
        plan_id = identify(shared, plans)
        if args.plan:
            check_plan_id(shared, plans, args.plan, plan_id)
        refuse_by_policy(config, plans, shared.rsync)
        make_directory(home.unfinished, 0o700)
        log_killed_runs(home, log)
        records: list[dict[str, Any]] = []
        try:
            for done in in_parallel(shared.jobs, lambda plan: deliver(shared, log, plan, plan_id, timestamp, records), plans):
                if not args.json:
                    print_outcome(done)
        finally:                            # also after a signal: in_parallel has waited for every target
            if args.json:
                records.sort(key=lambda record: str(record["login"]))
                emit(json.dumps({"version": 1, "plan": plan_id, "targets": records}, sort_keys=True))
            unfinished = [record for record in records if record["result"] != "ok"]
            if CHILDREN.stopping and unfinished:
                emit("offsync: interrupted: %d of %d targets are delivered and verified, not: %s; apply again finishes the job"
                     % (len(targets) - len(unfinished), len(targets), some_of([r["login"] for r in unfinished])), error=True)
    if unfinished:
        reasons = sorted("%(login)s: %(error)s" % record for record in unfinished)
        raise OffsyncError("%d of %d targets failed: %s" % (len(unfinished), len(targets), some_of(reasons, "; ")))
    return 0


def cmd_verify(args: argparse.Namespace) -> int:
    """Compare every target with the source by hash; silent when all is equal."""
    home = Home()
    config, targets = load_targets(home, args.targets)
    with Run(home, config, args.jobs) as shared:
        plans = show_plans(shared, args, targets, "hash", quiet=True)
    return 3 if any(plan.changes for plan in plans) else 0


def print_manifest_differences(expected: dict[bytes, str], found: dict[bytes, str]) -> int:
    """Print how a tree differs from a manifest; return the exit status."""
    for path in sorted(set(expected) | set(found)):
        if expected.get(path) != found.get(path):
            kind = "added" if path not in expected else "missing" if path not in found else "modified"
            emit("%s  %s" % (colour(kind, "%-8s" % kind), show(path)))
    if expected != found:
        return 3
    emit("%s, all as in the manifest" % plural(len(found), "file"), error=True)
    return 0


def cmd_manifest(args: argparse.Namespace) -> int:
    """Print the sha256 manifest of a tree, or check a tree against one."""
    directory: Optional[str] = args.directory
    exclude: tuple[str, ...] = ()
    if directory is None and not os.path.exists(Home().config):
        raise UsageError("manifest: there is no config here that names a source; name a directory: offsync manifest DIR")
    if directory is None:
        config, _, _ = Home().load()
        directory, exclude = config.source, config.exclude
    root = os.fsencode(os.path.abspath(directory))
    if not os.path.isdir(root):
        raise UsageError("manifest: %s is not a directory; name one" % show(root))
    expected = None
    if args.check is not None:
        data = sys.stdin.buffer.read(FILE_LIMIT) if args.check == "-" else read_file(args.check, "manifest", "name it", False)
        try:
            expected = parse_manifest(data)
        except ValueError as error:
            raise UsageError("manifest %s:%s: not a line of sha256sum, or a second one, with another sum, for its file; "
                             "correct it" % (show_text(args.check), error)) from None
    names = sorted(included_names(find_rsync()[0], root, exclude))
    paths = [name for name in names if stat.S_ISREG(os.lstat(os.path.join(root, name)).st_mode)]
    reader = SourceReader(root)
    for path in paths:
        reader.want(path)
    reader.wait()
    found = {path: reader.entry(path).content.hex() for path in paths}
    if expected is not None:
        return print_manifest_differences(expected, found)
    manifest = b"".join(format_manifest_line(path, digest) for path, digest in found.items())
    digest = hashlib.sha256(manifest).hexdigest()
    if sys.stdout.isatty():                 # names must not write to the terminal
        manifest = "".join(c if c.isprintable() or c == "\n" else "?" for c in manifest.decode("utf-8", "replace")).encode()
    emit(manifest)
    emit("%s; digest of the whole (sha256 of the manifest), to compare by voice: %s"
         % (plural(len(found), "file"), " ".join(re.findall("....", digest))), error=True)
    return 0


def local_checks(home: Home) -> Iterator[tuple[str, Optional[str]]]:
    """Yield (what was checked, None or what is wrong) for this controller."""
    checks: dict[str, Callable[[], Any]] = {"program " + name: check for name, check in PROGRAM_CHECKS["controller"].items()}
    checks["key " + home.key] = lambda: check_private(home.key)
    for path in filter(os.path.exists, (home.path, home.config, home.log)):
        checks["permissions of " + path] = functools.partial(check_private, path)
    checks["config " + home.config] = home.load
    checks["source"] = lambda: check_source(find_rsync()[0], home.load()[0])
    for what, check in checks.items():
        problem = None
        try:
            check()
        except (OffsyncError, OSError) as error:
            problem = str(error)
        yield what, problem


def cmd_doctor(args: argparse.Namespace) -> int:
    """Check this controller and prove, per target, what the key can and cannot do."""
    home = Home()
    healthy = True
    for what, problem in local_checks(home):
        healthy = healthy and problem is None
        emit("%s %s" % (colour("failed" if problem else "ok", "%-8s" % ("PROBLEM" if problem else "ok")), problem or what))
    if not healthy:
        raise OffsyncError("doctor: this controller has problems; mend what is marked PROBLEM above, then run it again")
    warn_of_old_rsync()
    config, _, _ = home.load()
    targets = select_targets(config.targets, args.targets)
    with Run(home, config) as shared:
        for target in targets:
            emit("%s:%s" % (target.login, show_text(target.remote_path)))
            try:
                connection = Connection(shared, target)
                connection.open()
                proofs = prove_restriction(connection)
                connection.close()
            except TargetError as error:
                emit("  %s  %s" % (colour("failed", "PROBLEM"), error.why))
                healthy = False
                continue
            for proof in proofs:
                word = {True: "ok", False: "OPEN", None: "unknown"}[proof.closed]
                emit("  %s %-30s %s" % (colour("failed" if proof.closed is False else "ok", "%-8s" % word), proof.tried,
                                        proof.answer))
                healthy = healthy and proof.closed is not False
    if not healthy:
        raise OffsyncError("doctor: there are problems; see what is marked PROBLEM or OPEN above")
    return 0


# What the shells do with our candidates; both ask offsync itself for them, so parser and targets are always those of now.
COMPLETION = {
    "bash": """_offsync() {
    local line=${COMP_LINE:0:COMP_POINT} current before candidate
    current=${line##*[[:blank:]]}
    before=${current%"${current##*[@:=]}"}      # readline replaces what follows : or =, or from @ on
    before=${before%@}
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$before"}")
    done < <(offsync completion bash --line "$line" 2>/dev/null)
}
complete -o default -F _offsync offsync
""",
    "zsh": """#compdef offsync
_offsync() {
    local -a candidates
    candidates=(${(f)"$(offsync completion zsh --line "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    compadd -a candidates || _files
}
if [[ $funcstack[1] == _offsync ]]; then _offsync "$@"; else compdef _offsync offsync; fi
"""}


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return what may stand in place of the last word: commands, options, values of options, or targets."""
    option: Optional[argparse.Action] = None
    for word in words[:-1]:
        option = next((action for action in parser._actions if word in action.option_strings), None)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                parser = action.choices[word]
    if option and option.dest == "plan":
        return os.listdir(Home().plans)
    if option and option.nargs != 0:
        return [str(choice) for choice in option.choices or ()]
    if words[-1].startswith("-"):
        return [name for action in parser._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
    found: list[str] = []
    for action in parser._actions:
        if not action.option_strings and action.choices is not None:
            found += map(str, action.choices)
        elif action.dest in ("targets", "login"):
            targets = Home().load()[0].targets
            found += sorted({t.login for t in targets} | {t.host for t in targets if action.dest == "targets"})
    return found


def cmd_completion(args: argparse.Namespace) -> int:
    """Print the code of a shell, or, for that code, the candidates for the last word of a line."""
    if args.line is None:
        emit(COMPLETION[args.shell].encode())
    else:
        words = re.split("[ \t]+", args.line.lstrip())[1:] or [""]
        emit("".join(name + "\n" for name in complete(build_parser(), words) if name.startswith(words[-1])).encode())
    return 0


def next_step(home: Home) -> str:
    """Return what to do next from where one stands."""
    if not os.path.exists(home.config) or not os.path.exists(home.key):
        return "Next: offsync init --source DIR   (on the controller), or offsync link --path DIR   (on a target)"
    config, _, _ = home.load()
    if not config.targets:
        return "Next: offsync link --path DIR   (on a target), then here the 'offsync target add' command that it prints"
    unfinished = [t.login for t in config.targets if os.path.exists(os.path.join(home.unfinished, t.login))]
    if unfinished:
        return "An apply did not finish: %s. Next: offsync apply" % some_of(unfinished)
    return "%s configured. Next: offsync plan" % plural(len(config.targets), "target")


# --- Parser and main --------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage is one line on stderr like every other error, and options are not abbreviated."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError("%s; see: %s --help" % (message, self.prog))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raise for an unknown option here, where the command is known, naming the nearest."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            self.error("%s: unknown%s" % (show_text(unknown[0]), nearest(unknown[0], options)))
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise for an unknown command (or choice), naming the nearest."""
        known = [str(choice) for choice in action.choices or ()]
        if action.choices is not None and value not in known:
            self.error("%s %s: unknown%s; known are: %s" % ((*action.option_strings, action.metavar)[0], show_text(str(value)),
                                                           nearest(str(value), known), ", ".join(known)))


def version_text() -> str:
    """Return the version and the sha256 of the running file."""
    try:
        return "offsync %s  sha256 %s" % (VERSION, hash_file(os.fsencode(os.path.realpath(__file__)))[0].hex())
    except (OSError, NameError):
        return "offsync %s  sha256 unknown (read from standard input)" % VERSION


def _jobs(text: str) -> int:
    """Return the value of --jobs."""
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("it must be a number from 1 to 1000")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    main_parser = Parser(prog="offsync", description=__doc__)
    main_parser.add_argument("--version", action="store_true", help="print the version and the sha256 of this file")
    main_parser.add_argument("-v", "--verbose", action="store_true", help="print every program before it starts")
    main_parser.set_defaults(function=None)
    commands = main_parser.add_subparsers(metavar="COMMAND", parser_class=Parser)

    def command(parent: Any, name: str, function: Callable[[argparse.Namespace], int], text: str, example: str) -> Parser:
        """Add one subcommand, with its example."""
        added: Parser = parent.add_parser(name, help=text, description=text, epilog="example:\n  " + example)
        added.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
                           help="print every program before it starts")
        added.set_defaults(function=function)
        return added

    def key_options(parser: Parser) -> None:
        """Add the ways to give a key."""
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--key", metavar="TEXT", help="the public key line (default: from a pipe, else asked for)")
        group.add_argument("--key-file", metavar="FILE", help="a file with the public key line")

    def target_arguments(parser: Parser, jobs: bool = True) -> None:
        """Add the choice of targets, and what goes with it."""
        parser.add_argument("targets", nargs="*", metavar="TARGET", help="a login, a host, or a pattern: 'web*' (default: all)")
        if jobs:
            parser.add_argument("--jobs", type=_jobs, metavar="N", help="how many targets at once (default: the config's)")
            parser.add_argument("--json", action="store_true", help="print JSON")

    init = command(commands, "init", cmd_init, "controller: create key pair and config; prints the public key",
                   "offsync init --source /srv/app-data")
    init.add_argument("--source", metavar="DIR", help="the directory to deliver (default: $OFFSYNC_HOME/sync)")

    link = command(commands, "link", cmd_link, "target: let the controller's key write below one path, and nothing else",
                   "offsync link --path /srv/app-data --key 'ssh-ed25519 AAAA... offsync@controller'")
    link.add_argument("--path", metavar="DIR", help="where the key may write (default: ~/.offsync/sync)")
    link.add_argument("--rrsync", metavar="PATH", help="where rrsync is (default: the known places)")
    link.add_argument("--from", dest="from_pattern", metavar="PATTERN", help="accept the key only from these hosts (sshd(8))")
    key_options(link)
    key_options(command(commands, "unlink", cmd_unlink, "target: remove the key again",
                        "offsync unlink --key 'ssh-ed25519 AAAA...'"))

    target = commands.add_parser("target", help="controller: add, list or remove targets",
                                 description="Add, list or remove targets.", epilog="example:\n  offsync target list")
    target.set_defaults(function=lambda args: target.error("choose add, list or remove"))
    target_commands = target.add_subparsers(metavar="COMMAND", parser_class=Parser)
    add = command(target_commands, "add", cmd_target_add, "prove trust and restriction of a target, then save it",
                  "offsync target add deploy@node02 --path /srv/app-data --host-key SHA256:...")
    add.add_argument("login", metavar="LOGIN", help="user@host; IPv6 as user@[address]")
    add.add_argument("--path", metavar="DIR", required=True, help="the path given to link on the target")
    add.add_argument("--rrsync", metavar="PATH", help="where rrsync is on the target (default: %s)" % DEFAULT_RRSYNC)
    add.add_argument("--port", metavar="N", help="the port of sshd (default: ssh_config, else 22)")
    add.add_argument("--host-key", metavar="FP", help="the fingerprint SHA256:... to expect; then nothing is asked")
    listing = command(target_commands, "list", cmd_target_list, "list the targets", "offsync target list --json")
    listing.add_argument("--json", action="store_true", help="print JSON")
    remove = command(target_commands, "remove", cmd_target_remove, "forget a target; its files and key entry stay there",
                     "offsync target remove deploy@node02")
    remove.add_argument("login", metavar="LOGIN", help="user@host as 'target list' shows it")

    deps = command(commands, "install-deps", cmd_install_deps, "both: install the system packages, after asking",
                   "offsync install-deps --role target")
    deps.add_argument("--role", choices=("controller", "target", "both"), default="controller", help="default: controller")
    deps.add_argument("-y", "--yes", action="store_true", help="do not ask")

    plan = command(commands, "plan", cmd_plan, "controller: show what apply would do; changes nothing",
                   "offsync plan 'web*' --exit-code")
    target_arguments(plan)
    plan.add_argument("--exit-code", action="store_true", help="exit 3 if there are differences")
    apply_ = command(commands, "apply", cmd_apply, "controller: transfer what the plan lists, verify, log",
                     "offsync apply --plan 1f3870be")
    target_arguments(apply_)
    apply_.add_argument("--plan", metavar="ID", help="refuse unless the plan is still this one (8 digits or more)")
    target_arguments(command(commands, "verify", cmd_verify, "controller: hash everything again; exit 3 if a target differs",
                             "offsync verify"))
    manifest = command(commands, "manifest", cmd_manifest, "either: print a sha256 manifest of a tree, or check against one",
                       "offsync manifest /srv/app-data > app-data.sha256")
    manifest.add_argument("directory", nargs="?", metavar="DIR", help="the tree (default: the configured source)")
    manifest.add_argument("--check", metavar="FILE", help="compare the tree with this manifest; exit 3 if it differs")
    doctor = command(commands, "doctor", cmd_doctor, "controller: check this machine, and prove what the key can do on targets",
                     "offsync doctor deploy@node02")
    target_arguments(doctor, jobs=False)
    completion = command(commands, "completion", cmd_completion, "either: print the code that completes words in a shell",
                         "offsync completion bash > /etc/bash_completion.d/offsync")
    completion.add_argument("shell", choices=sorted(COMPLETION), metavar="SHELL", help="bash or zsh")
    completion.add_argument("--line", help=argparse.SUPPRESS)
    return main_parser


def _ignore(signum: int, _: object) -> None:
    """Do nothing. Unlike SIG_IGN this is not inherited by programs, nor trouble for a signal that just arrives."""


def _raise_interrupted(signum: int, _: object) -> NoReturn:
    """Stop everything: the first signal ends the programs in an orderly way, all further ones are ignored meanwhile."""
    CHILDREN.stopping = True
    for other in SIGNALS:
        signal.signal(other, _ignore)
    raise Interrupted(signum)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; return the exit status. The only place that prints errors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):   # a closed one: its number would go to the next file
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # type: ignore[union-attr]
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:      # nohup stays nohup
            signal.signal(signum, _raise_interrupted)
    status = 1
    try:
        if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
            raise UsageError("locale: file names are not UTF-8 here; run it with PYTHONUTF8=1")
        args = build_parser().parse_args(argv)
        CHILDREN.verbose = args.verbose
        if args.version:
            emit(version_text())
            status = 0
        elif args.function is None:
            emit("usage: offsync COMMAND ...   (offsync --help shows all)\n" + next_step(Home()), error=True)
            status = 2
        else:
            status = args.function(args)
    except OffsyncError as error:
        emit("offsync: " + str(error), error=True)
        status = error.status
    except OSError as error:
        where = show_text(os.fsdecode(error.filename)) + ": " if isinstance(error.filename, (str, bytes)) else ""
        emit("offsync: %s%s; mend that, then try again" % (where, error.strerror or error), error=True)
    except Interrupted as interrupted:
        emit("offsync: interrupted by %s" % signal.Signals(interrupted.signum).name, error=True)
        status = interrupted.status
    if LOST_OUTPUT:
        emit("offsync: standard output: %s; the rest of the output is lost" % LOST_OUTPUT[0], error=True)
        status = status or 1
    for signum in SIGNALS:
        signal.signal(signum, _ignore)      # all is done: nothing is left to be interrupted
    return status


if __name__ == "__main__":
    sys.exit(main())
