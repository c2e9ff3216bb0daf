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
        shell; -v shows each before it starts; link also runs sshd -T, and tries
        rrsync in a scratch directory as sshd would start it (sh -c);
        install-deps runs the package manager, after showing the commands
never   deletes without "delete: true" or --delete, overwrites without
        "overwrite: true", forwards an agent or a port, trusts a host key that
        neither you nor those known_hosts confirm, sends a file before the
        restriction of the key is proved, calls a delivery ok that is not what
        was planned
exit    0 done; 1 failed, refused or some target failed; 2 wrong usage or
        config; 3 differences found; 129, 130, 143 ended by a signal

To audit it, read the trust core first: lines 555 to 1754, in the order in
which data flows. What follows serves it: link, host keys, packages, the config,
output, commands; a table of what failures mean comes last.
"""
import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]                         # the script's or the current directory, where somebody
                                            # else may have put a json.py
if sys.version_info < (3, 9):
    sys.exit("offsync: this is Python %d.%d: it needs Python 3.9 or newer; run it with a newer one"
             % sys.version_info[:2])

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main takes over: no traceback

import argparse
import base64
import collections
import contextlib
import fcntl
import fnmatch
import glob
import grp
import hashlib
import itertools
import json
import os
import posixpath
import pwd
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
from typing import (IO, Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, NoReturn,
                    Optional, Sequence, TypeVar, Union)

VERSION = "2.0.0"

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


# --- Errors and values --------------------------------------------------------------------------

class OffsyncError(Exception):
    """Expected trouble: "what: why; what to do next". main() prints it, and exits with status."""
    status = 1

class UsageError(OffsyncError):
    """Wrong arguments, environment or config."""
    status = 2

class TargetError(OffsyncError):
    """One target failed. why is the message without the login; kind names the symptom."""

    def __init__(self, login: str, why: str, kind: str = "other") -> None:
        super().__init__("%s: %s" % (login, why))
        self.why, self.kind = why, kind

class Stopped(OffsyncError):
    """Work that ends because a signal asked offsync to stop."""

class Interrupted(BaseException):
    """What the signal handler raises in the main thread: nothing on the way to main swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.status = signum, 128 + signum


DEFAULT_RRSYNC = "/usr/bin/rrsync"
KINDS = ("added", "modified", "missing", "leftover")
FILE_TYPES = {"d": "directory", "f": "file", "s": "symlink"}
LISTED = 5                                  # names in a message: the first ones, then a count

class Target(NamedTuple):
    """Where to push: one entry of "targets" in config.yaml. port None leaves it to ssh_config."""
    login: str
    remote_path: str
    rrsync: str = DEFAULT_RRSYNC
    port: Optional[int] = None
    symlinks: bool = True                   # False: its rrsync munges them, so none are sent

    @property
    def user(self) -> str:
        return self.login.rpartition("@")[0]

    @property
    def host(self) -> str:
        """An IPv6 address has no brackets here."""
        return self.login.rpartition("@")[2].strip("[]")

    @property
    def add_arguments(self) -> str:
        """Return what follows "offsync target add" to add this target (again)."""
        words = [self.login, "--path", self.remote_path]
        words += ["--rrsync", self.rrsync] if self.rrsync != DEFAULT_RRSYNC else []
        words += ["--port", str(self.port)] if self.port else []
        words += [] if self.symlinks else ["--no-symlinks"]
        return shlex.join(words)

class Config(NamedTuple):
    """config.yaml, validated."""
    source: str
    delete: bool
    overwrite: bool
    verify: str                             # "hash", "strong" or "quick"
    exclude: tuple[str, ...]
    jobs: int
    bwlimit: int                            # KiB/s for each target; 0 means none
    compress: bool
    timeout: int                            # seconds without a byte
    max_delete: int                         # percent of a target's entries
    targets: tuple[Target, ...]

class PublicKey(NamedTuple):
    """A public key; its identity is (type, blob)."""
    type: str
    blob: str
    comment: str

class SourceEntry(bytes):
    """What a plan says of one source entry, packed since there may be a million of them.

    The letter of its type, mode, size in bytes, then a file's SHA-256 (followed by its MD5, where
    it will be sent), or where a symlink points.
    """
    __slots__ = ()
    LAYOUT = struct.Struct("=cHQ")

    @classmethod
    def make(cls, letter: str, mode: int, size: int, content: bytes) -> "SourceEntry":
        return cls(cls.LAYOUT.pack(letter.encode(), mode, size) + content)

    @property
    def type(self) -> str:
        return FILE_TYPES[chr(self[0])]

    @property
    def mode(self) -> int:
        return int(self.LAYOUT.unpack_from(self)[1])

    @property
    def size(self) -> int:
        return int(self.LAYOUT.unpack_from(self)[2])

    @property
    def link(self) -> bytes:
        return self[self.LAYOUT.size:] if self.type == "symlink" else b""

    @property
    def sha256(self) -> bytes:
        return self[self.LAYOUT.size:self.LAYOUT.size + 32]

    @property
    def md5(self) -> bytes:
        return self[self.LAYOUT.size + 32:] if self.type == "file" else b""

    @property
    def reviewed(self) -> bytes:
        """What a plan's line tells of it: all but the MD5."""
        return self[:self.LAYOUT.size + 32] if self.type == "file" else self

class Change(NamedTuple):
    """One difference between source and target: one line of a plan."""
    path: bytes
    kind: str                               # one of KINDS
    directory: bool                         # of what only the target has rsync tells no more
    reasons: tuple[str, ...] = ()           # of modified: "content", "mode", "type", "link"
    entry: Optional[SourceEntry] = None     # of added and modified, once the source is described

    @property
    def sends_content(self) -> bool:
        """Whether it takes a file's content to the target."""
        if self.entry is None or self.entry.type != "file":
            return False
        return self.kind == "added" or "content" in self.reasons or "type" in self.reasons

class Result(NamedTuple):
    """How a program ended. status is negative for a signal, None when its deadline passed."""
    status: Optional[int]
    stdout: bytes
    stderr: bytes

class Outcome(NamedTuple):
    """What became of one target. None means unknown, never "nothing"."""
    login: str
    result: str                             # "ok", "failed", "interrupted" or "refused"
    error: Optional[str] = None
    delivered: Optional[list[bytes]] = None
    deleted: Optional[list[bytes]] = None
    bytes_sent: Optional[int] = None
    seconds: Optional[float] = None


# --- Names: bytes within, encoded in three ways; words for people -------------------------------

def show(name: bytes) -> str:
    """Return a name for people and logs: as it is, or quoted as git does where it could mislead.

    Unambiguous: what is not quoted has no quote and no backslash. Nothing in it moves a cursor.
    """
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if text and text.isprintable() and not re.search(r'["\\]|^ | $', text):
        return text
    named = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r",
             34: '\\"', 92: "\\\\"}
    quoted = (named.get(byte, chr(byte) if 32 <= byte < 127 else "\\%03o" % byte) for byte in name)
    return '"' + "".join(quoted) + '"'

def show_text(text: str) -> str:
    """Return text from outside (an argument, a config value) fit for a message."""
    return show(os.fsencode(text))

def json_name(name: bytes, key: str = "path") -> dict[str, str]:
    """Return the JSON fields of a name: "path", and "path_b64" where it is not UTF-8."""
    try:
        return {key: name.decode("utf-8")}
    except UnicodeDecodeError:
        encoded = base64.b64encode(name).decode()
        return {key: name.decode("utf-8", "replace"), key + "_b64": encoded}

def read_json_name(fields: dict[str, Any], key: str = "path") -> bytes:
    """Return the name that json_name() wrote. Raises KeyError, ValueError or AttributeError."""
    if key + "_b64" in fields:
        return base64.b64decode(fields[key + "_b64"], validate=True)
    return bytes(fields[key].encode("utf-8"))

def inside(path: bytes) -> bytes:
    """Return a path that does not leave the directory that it is relative to. Raises ValueError."""
    if not path or path.startswith(b"/") or not {b"..", b".", b""}.isdisjoint(path.split(b"/")):
        raise ValueError("a name that leaves the directory: " + show(path[:100]))
    return path

def leaves(path: bytes, link: bytes) -> bool:
    """Return whether a symlink, as it is written, leads out of the source."""
    led = os.path.normpath(os.path.join(os.path.dirname(path), link))
    return led.startswith((b"/", b"../")) or led == b".."

def read_json_path(fields: dict[str, Any]) -> bytes:
    """Return the path of a plan's line. Raises as read_json_name() does."""
    return inside(read_json_name(fields))

def listed_name(path: bytes) -> bytes:
    """Return a path as --files-from takes it: "/" keeps a leading # or ; from being a comment.

    rsync reads it as relative to the source, and, unlike "./path", sends no root of the source.
    """
    return b"/" + path

def include_rule(path: bytes, directory: bool) -> bytes:
    """Return the anchored rsync pattern that matches only this path (rsync(1), PATTERN MATCHING).

    A backslash escapes only in a pattern that has a wildcard character; else it is a plain byte.
    """
    if re.search(rb"[*?\[]", path):
        path = re.sub(rb"([*?\[\\])", rb"\\\1", path)
    return b"/" + path + (b"/" if directory else b"")

def printed_name(name: bytes) -> bytes:
    r"""Return the exact bytes of a name that rsync printed: it writes control bytes as \#ooo."""
    return re.sub(rb"\\#([0-7]{3})", lambda match: bytes([int(match[1], 8) & 255]), name)

def printable(text: str) -> str:
    """Return a text in which nothing moves a cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)

def quote_answer(output: bytes) -> str:
    """Return the end of what a program said: one line, safe for a terminal, 300 characters."""
    lines = [line.strip() for line in output[-4096:].decode("utf-8", "replace").splitlines()]
    text = " | ".join([line for line in lines if line.strip("^~ \t")][-4:])     # not Python's ^^^
    text = printable(text)
    return text if len(text) <= 300 else "..." + text[-297:]

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
    return separator.join([*names[:LISTED], *(["and %d more" % more] if more > 0 else [])])

def some_paths(paths: Iterable[bytes]) -> str:
    """Return the first paths, sorted, and how many more there are."""
    return some_of([show(path) for path in sorted(paths)])

def quote_for_rsync(word: str) -> str:
    """Return a word of rsync's -e option: it splits at blanks and knows quotes, doubled within."""
    plain = re.fullmatch(r"[A-Za-z0-9_./=@:,~-]+", word)
    return word if plain else "'" + word.replace("'", "''") + "'"

def name_list(shared: "Run", names: Iterable[bytes]) -> BinaryIO:
    """Return an open file with the NUL-terminated names, at its beginning."""
    stream = tempfile.TemporaryFile(dir=shared.scratch)
    stream.writelines(name + b"\0" for name in names)
    stream.seek(0)
    return stream


# --- What rsync prints, and the plan's form -----------------------------------------------------

# A killed receiver leaves .NAME.XXXXXX beside NAME, one dot for names that have one (receiver.c).
STAGING = b".~tmp~"                         # where --delay-updates collects files
TEMPORARY_NAME = re.compile(rb"\.(.+)\.[A-Za-z0-9]{6}", re.DOTALL)

def marked(item_format: bytes, on_item: Callable[[bytes], None],
           on_other: Callable[[bytes], None] = lambda line: None,
           ) -> tuple[bytes, Callable[[bytes], None]]:
    """Return the --out-format for rsync, and who takes its output: items have a secret marker.

    So no other output of rsync's, nor anything that a target sends, can look like an item.
    """
    marker = b"offsync-" + os.urandom(9).hex().encode() + b":"

    def on_line(line: bytes) -> None:
        if line.startswith(marker):
            on_item(line[len(marker):])
        else:
            on_other(line)

    return b"--out-format=" + marker + item_format, on_line

def parse_itemized(line: bytes) -> Optional[Change]:
    """Return what "%i %n" says, or None where nothing that we compare differs. Raises ValueError.

    The code is YXcstpoguax (rsync(1), --itemize-changes). Times are not compared, nor is the root.
    """
    code, blank, escaped = line[:11], line[11:12], line[12:]
    if len(code) != 11 or blank != b" " or not escaped:
        raise ValueError("no itemized line: " + show(line[:100]))
    name = printed_name(escaped)
    path = name.rstrip(b"/")
    if path == b"." or not path:
        return None
    inside(path)
    if code.startswith(b"*deleting"):
        return Change(path, "missing", name.endswith(b"/"))
    update, letter = code[:1], code[1:2]
    if update not in b"<>ch." or letter not in b"fdL":
        raise ValueError("an unknown itemize code: " + show(line[:100]))
    if code[2:3] == b"+":
        return Change(path, "added", letter == b"d")
    reasons = []
    if letter == b"f" and update in b"<>":
        reasons.append("content")
    if letter == b"L" and update == b"c":
        reasons.append("link")
    if letter != b"L" and code[5:6] == b"p":
        reasons.append("mode")
    return Change(path, "modified", letter == b"d", tuple(reasons)) if reasons else None

class Sent:
    """What rsync reports of what it sends: each planned entry must be reported as planned.

    A report says what really went over the connection, whatever the source held before or after:
    it comes from the rsync that sends, behind a marker that no target knows.
    """

    def __init__(self, planned: Sequence[Change]) -> None:
        self.planned = {self.name(change): change for change in planned}    # also what is above
        self.reported: set[bytes] = set()   # paths, as planned
        self.wrong: set[bytes] = set()      # other content, mode or link, or not planned at all
        self.bytes = 0

    @staticmethod
    def name(change: Change) -> bytes:
        """Return the letter of a planned entry's type, and how %n%L names it."""
        assert change.entry is not None
        end = {"directory": b"/", "symlink": b" -> " + change.entry.link, "file": b""}
        return change.entry[:1] + change.path + end[change.entry.type]

    def take(self, line: bytes) -> None:
        """Take one report. Raises ValueError for what is none."""
        md5 = line[:32].strip()
        mode, count, itemized = line[33:].split(b" ", 2)
        code, name = itemized[:11], printed_name(itemized[12:])
        self.bytes += int(count)
        change = self.planned.get(code[1:2].replace(b"L", b"s") + name)
        if change is None or change.entry is None:
            if code[:1] != b"." or code[2:].strip(b" .t"):      # unchanged directories come along
                self.wrong.add(name.rstrip(b"/"))
            return
        entry, as_planned = change.entry, True
        planned_mode = stat.filemode(stat.S_IFREG | entry.mode)[1:].encode()
        if entry.type != "symlink" and mode != planned_mode:
            as_planned = False
        sent = change.sends_content or code[:1] == b"<"         # "<" where only a mode was planned
        if sent and md5 != entry.md5.hex().encode():
            as_planned = False
        (self.reported if as_planned else self.wrong).add(change.path)

def is_leftover(source: "Source", change: Change) -> bool:
    """Return whether what only the target has bears one of rsync's own names.

    .~tmp~ and all in it, and .NAME.XXXXXX where NAME is in the source. It may be a user's all the
    same: so it never blocks, and is deleted only where the policy allows that.
    """
    directory, name = os.path.split(change.path)
    if STAGING in change.path.split(b"/"):
        return True
    match = TEMPORARY_NAME.fullmatch(name)
    if not match or change.directory:
        return False
    names = (match[1], b"." + match[1])
    return any(os.path.lexists(os.path.join(source.root, directory, name)) for name in names)

def size_to_send(changes: Iterable[Change]) -> int:
    """Return how many bytes the files to send have."""
    return sum(change.entry.size for change in changes if change.entry and change.sends_content)

def json_line(fields: dict[str, Any]) -> bytes:
    """Return one line of JSON, keys sorted."""
    return json.dumps(fields, sort_keys=True).encode() + b"\n"

def split_line(change: Change) -> tuple[bytes, bytes]:
    """Return an entry's line of a plan, in two pieces around its login."""
    fields: dict[str, Any] = {"login": "", "kind": change.kind, **json_name(change.path)}
    entry = change.entry
    if entry is None:
        fields["type"] = "directory" if change.directory else "non-directory"
    else:
        fields.update(type=entry.type, size=entry.size, mode="%04o" % entry.mode,
                      changes=list(change.reasons))
        if entry.type == "file":
            fields["sha256"] = entry.sha256.hex()
        if entry.type == "symlink":
            fields.update(json_name(entry.link, "link"))
    before, after = json_line(fields).split(b'"login": ""', 1)  # no text in JSON has a plain quote
    return before, after

def plan_lines(config: Config, plans: Sequence["TargetPlan"]) -> Iterator[bytes]:
    """Yield a plan as JSON Lines, its only form: printed, kept; the plan ID is its sha256.

    A line for the policy, one a target, one an entry; sorted by login and path.
    """
    policy = ("source", "delete", "overwrite", "verify", "exclude")
    yield json_line({key: getattr(config, key) for key in policy})
    for plan in plans:
        target, error = plan.target, plan.error.kind if plan.error else None
        yield json_line({"login": target.login, "host": target.host, "port": target.port,
                         "remote_path": target.remote_path, "error": error})
    equal = collections.Counter(plan.digest for plan in plans)
    pieces: dict[bytes, list[tuple[bytes, bytes]]] = {}     # of targets with equal plans: made once
    for plan in plans:
        login = b'"login": ' + json.dumps(plan.target.login).encode()
        lines: Iterable[tuple[bytes, bytes]] = map(split_line, plan.changes)
        if equal[plan.digest] > 1:
            lines = pieces[plan.digest] = pieces.get(plan.digest) or list(lines)
        for before, after in lines:
            yield before + login + after

def plan_id(config: Config, plans: Sequence["TargetPlan"]) -> str:
    """Return the plan ID: the sha256 of the plan's lines."""
    digest = hashlib.sha256()
    for line in plan_lines(config, plans):
        digest.update(line)
    return digest.hexdigest()

def read_line(line: bytes) -> dict[str, Any]:
    """Return the fields of a plan's line. Raises ValueError where a reader could see others."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key that stands there twice")
        return dict(pairs)

    fields: dict[str, Any] = json.loads(line, object_pairs_hook=unique)
    if "path" in fields and {**fields, **json_name(read_json_name(fields))} != fields:
        raise ValueError("a name that is another one in path_b64")
    if "kind" in fields and "error" in fields:
        raise ValueError("an entry with an error")
    return fields

def comparable(fields: dict[str, Any]) -> bytes:
    """Return what of a plan's line an approval compares, b"" for what it does not (leftovers).

    Whether a target could be reached is not compared: one that cannot be reached now fails alone.
    """
    if fields.get("kind") == "leftover":
        return b""
    text = json_line({key: value for key, value in fields.items() if key != "error"})
    return hashlib.blake2b(text, digest_size=16).digest()

def reviewed_entry(fields: dict[str, Any]) -> tuple[bytes, SourceEntry]:
    """Return (path, entry) of a line that adds or modifies. Raises as read_json_name() does."""
    letter = {name: letter for letter, name in FILE_TYPES.items()}[fields["type"]]
    content = b""
    if letter == "f":
        content = bytes.fromhex(fields["sha256"])
    if letter == "s":
        content = read_json_name(fields, "link")
    entry = SourceEntry.make(letter, int(fields["mode"], 8), fields["size"], content)
    return read_json_path(fields), entry

def name_line(fields: dict[str, Any], failed: set[str]) -> str:
    """Return a sentence for a line that was not reviewed; failed: logins that had no plan then."""
    if "source" in fields:
        return "the policy is now %s (give --source and --delete as for the plan)" % (
            json.dumps(fields))
    if fields["login"] in failed:
        return "%(login)s could not be compared then: plan again, or name the others" % fields
    if "kind" in fields:
        return "%s: %s is now %s" % (fields["login"], show(read_json_name(fields)), fields["kind"])
    return "%(login)s at port %(port)s, %(remote_path)s was not reviewed" % fields


# === Trust core: running programs ===============================================================

STOP = threading.Event()                    # all is stopping: no program starts, nothing waits
RUNNING: set["subprocess.Popen[bytes]"] = set()     # the programs that the signal handler ends
VERBOSE = threading.Event()                 # -v
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOREVER = threading.TIMEOUT_MAX             # seconds
CONNECT_DEADLINE = 60.0                     # seconds for a connection
SESSION_DEADLINE = 45.0                     # seconds for a session that hashes nothing
Argv = Sequence[Union[str, bytes]]

def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a program and what it started (each has a session of its own), whatever it is doing.

    SIGKILL, since none of ours keeps a state here that a gentler signal would save: a target sees
    its connection end, and rsync there keeps what has arrived for the next run.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)

def stop_all(signum: int, _: object) -> NoReturn:
    """Handle a signal: end every program; the first one stops the run, a second one ends it."""
    again = STOP.is_set()
    STOP.set()
    for process in list(RUNNING):
        kill(process)
    if again:
        os._exit(128 + signum)              # the guard cleans up
    raise Interrupted(signum)

def environment(rsync: bool = False, strong: bool = False) -> dict[str, str]:
    """Return the environment of a program: ours, with messages in English.

    rsync gets no HOME, since it would take options and programs to run from ~/.popt (popt(3)), and
    no RSYNC_* (rsync(1), ENVIRONMENT VARIABLES) but, for strong, the list that makes it agree on
    MD5 with every server: nobody can make a second file for a given MD5, as they can for xxh128.
    """
    ours = {key: value for key, value in os.environ.items() if not key.startswith("RSYNC_")}
    ours["LC_ALL"] = "C"
    if rsync:
        ours.pop("HOME", None)
    if strong:
        ours["RSYNC_CHECKSUM_LIST"] = "md5"
    return ours

def run(argv: Argv, *, stdin: Union[int, IO[bytes]] = subprocess.DEVNULL, shown: bool = False,
        env: Optional[dict[str, str]] = None, deadline: float = FOREVER, greeting: float = FOREVER,
        on_line: Optional[Callable[[bytes], None]] = None) -> Result:
    """Run a program, the only place that does; return how it ended. argv is never a shell's.

    stdin PIPE stays open and silent. stdout is returned, or given to on_line line by line (\\r
    ends a line too). What is shown writes to stderr, and is not ended by a signal of ours (a
    package manager). Raises Stopped if all is stopping, OffsyncError if it cannot be started.
    """
    if VERBOSE.is_set():
        emit("+ " + shlex.join(os.fsdecode(word) for word in argv), error=True)
    if STOP.is_set():
        raise Stopped("interrupted")
    pipe = None if shown else subprocess.PIPE
    try:
        process = subprocess.Popen(argv, stdin=stdin, env=env or environment(), stderr=pipe,
                                   stdout=2 if shown else pipe, start_new_session=not shown)
    except OSError as error:
        absent = isinstance(error, (FileNotFoundError, PermissionError))
        raise OffsyncError("%s: it cannot be started: %s; %s" % (
            show(os.fsencode(argv[0])), error.strerror, "run: offsync install-deps" if absent
            else "raise that limit (ulimit), or use --jobs 1")) from None
    output = Output(on_line)
    try:
        if not shown:
            RUNNING.add(process)
            if STOP.is_set():               # the handler may have looked before it was added
                kill(process)
        late = output.read(process, deadline, greeting)
    except BaseException:
        kill(process)
        raise
    finally:
        status = process.wait()
        RUNNING.discard(process)
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            stream.close()
    if STOP.is_set():
        raise Stopped("interrupted")
    return Result(None if late else status, b"".join(output.kept), output.head + output.tail)

def start_guard(scratch: str, ssh: str) -> tuple[int, int]:
    """Fork a process that cleans up when offsync ends, however it does; return (PID, a pipe).

    When the pipe closes, it ends every ssh connection whose control socket lies in scratch, so
    that the rsyncs of a killed run end with them, and removes scratch. Call it before any thread.
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
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.closerange(3, reader)            # the lock, among others: it ends with offsync
        os.closerange(reader + 1, 1024)
        os.read(reader, 1)                  # returns when nobody holds the other end any more
        clean_up(scratch, ssh)
        os._exit(0)
    finally:
        os._exit(1)

def clean_up(scratch: str, ssh: str) -> None:
    """End every ssh connection whose control socket lies in scratch, and remove scratch."""
    signal.alarm(20)                        # should one of these hang
    sockets = [entry.path for entry in os.scandir(scratch) if stat.S_ISSOCK(entry.stat().st_mode)]
    started = [os.spawnv(os.P_NOWAIT, ssh, [ssh, "-F", "/dev/null", "-O", "exit", "-o",
                                            "ControlPath=" + path, "--", "offsync"])
               for path in sockets]
    for pid in started:
        os.waitpid(pid, 0)
    shutil.rmtree(scratch, ignore_errors=True)
    signal.alarm(0)


# --- Trust core: the source ---------------------------------------------------------------------

BATCH = 64                                  # source entries that a thread describes at a time

def open_directory(root: bytes, directory: bytes) -> int:
    """Return a descriptor of a directory of the source, through no symlink. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(root, flags)
    for part in filter(None, directory.split(b"/")):
        try:
            below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor

def hash_file(path: bytes, with_md5: bool = False,
              parent: Optional[int] = None) -> tuple[bytes, int]:
    """Return (SHA-256, then MD5 if wanted; size in bytes) of a file, never through a symlink."""
    digests = [hashlib.sha256()]
    if with_md5:
        digests.append(hashlib.md5(usedforsecurity=False))      # there under FIPS, too
    size, flags = 0, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, dir_fd=parent)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(22, "it is no regular file any more", path)
        while size < status.st_size:        # not "until the end": most files need one read
            chunk = os.read(descriptor, min(status.st_size + 1, 1 << 18))
            if STOP.is_set():
                raise Stopped("interrupted")
            if not chunk:
                break
            for digest in digests:
                digest.update(chunk)
            size += len(chunk)
    finally:
        os.close(descriptor)
    return b"".join(digest.digest() for digest in digests), size

def describe_entry(root: bytes, path: bytes, with_md5: bool = False) -> SourceEntry:
    """Return what a plan says of a source entry. Raises OSError, also for devices and the like."""
    directory, name = os.path.split(path)
    parent = open_directory(root, directory)
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            return SourceEntry.make("d", mode, 0, b"")
        if stat.S_ISLNK(status.st_mode):
            link = os.readlink(name, dir_fd=parent)
            if leaves(path, link):          # it is not what was scanned
                raise OSError(22, "it is a symlink that leaves the source", path)
            return SourceEntry.make("s", 0o777, len(link), link)
        if not stat.S_ISREG(status.st_mode):        # it is not even opened
            raise OSError(22, "it is no file, directory or symlink any more", path)
        content, size = hash_file(name, with_md5, parent)
        return SourceEntry.make("f", mode, size, content)
    finally:
        os.close(parent)

class Source:
    """The source directory of a run: scanned once; what differs is hashed once, for all targets.

    entries and errors are written by the hashing threads, and read after wait() only.
    """

    def __init__(self, path: str, exclude: Sequence[str] = (), with_md5: bool = False) -> None:
        self.root, self.exclude, self.with_md5 = os.fsencode(path), exclude, with_md5
        self.count = 0                      # of entries, excluded ones too, once it is scanned
        self.symlinks: list[bytes] = []     # not excluded; where a target takes none
        self.entries: dict[bytes, SourceEntry] = {}         # b"" where it is not described yet
        self.errors: dict[bytes, str] = {}
        self.lock = threading.Lock()        # for the next two
        self.batch: list[bytes] = []
        self.pending: list[Any] = []        # futures of batches
        self.pool = Pool(min(os.cpu_count() or 1, 4))

    def want(self, path: bytes) -> None:
        """Have an entry described in the background."""
        with self.lock:
            if path not in self.entries:
                self.entries[path] = SourceEntry()
                self.batch.append(path)
                if len(self.batch) >= BATCH:
                    self._hand_over([self.batch])

    def flush(self) -> None:
        """Have the rest described too, one at a time: no large file shall wait for another."""
        with self.lock:
            self._hand_over([[path] for path in self.batch])

    def _hand_over(self, batches: list[list[bytes]]) -> None:
        """Give batches to the threads; where none can be started, describe them here."""
        self.batch = []
        for paths in batches:
            future = self.pool.submit(self._describe, paths)
            if future:
                self.pending.append(future)
            else:
                self._describe(paths)

    def _describe(self, paths: list[bytes]) -> None:
        for path in paths:
            try:
                self.entries[path] = describe_entry(self.root, path, self.with_md5)
            except (OSError, ValueError, struct.error, MemoryError) as error:
                self.errors[path] = getattr(error, "strerror", None) or str(error)

    def wait(self) -> None:
        """Return when all that is wanted is described; raise for what vanished or is unreadable."""
        self.flush()
        with self.lock:
            pending = self.pending = [future for future in self.pending if not future.done()]
        for number, future in enumerate(pending):
            PROGRESS.update("source", "hashing, %d of %d done" % (number, len(pending)))
            future.result()
        PROGRESS.update("source", None)
        if STOP.is_set():
            raise Stopped("interrupted")
        if self.errors:
            named = ["%s: %s" % (show(path), self.errors[path]) for path in sorted(self.errors)]
            raise OffsyncError("source %s: it changed meanwhile, or cannot be read; try again: %s"
                               % (show(self.root), some_of(named)))

    def is_as(self, path: bytes, planned: SourceEntry) -> bool:
        """Return whether an entry is now what was planned; its content is read again."""
        try:
            return describe_entry(self.root, path, bool(planned.md5)) == planned
        except OSError:
            return False

    def older(self, path: bytes, when: int) -> bool:
        """Return whether an entry, or what is above it, precedes a time (ns). For words only."""
        for place in (path, os.path.dirname(path)):
            with contextlib.suppress(OSError):
                return os.lstat(os.path.join(self.root, place)).st_ctime_ns < when
        return True

    def included(self, rsync: str, complete: bool = True) -> set[bytes]:
        """Return the paths that the excludes leave, as rsync itself applies them.

        complete raises OffsyncError if anything is unreadable.
        """
        names: set[bytes] = set()
        out_format, on_line = marked(b"%n", lambda name: names.add(printed_name(name).rstrip(b"/")))
        argv: list[Union[str, bytes]] = [rsync, "-8", "-n", "-rlD", out_format]
        argv += ["--exclude=" + rule for rule in self.exclude]
        argv += ["--", self.root.rstrip(b"/") + b"/", "/nonexistent/%s/" % os.urandom(8).hex()]
        result = run(argv, env=environment(rsync=True), on_line=on_line)
        if complete and result.status != 0:
            raise OffsyncError("%s: it cannot be read completely; mend that, then try again (rsync "
                               "said: %s)" % (show(self.root), quote_answer(result.stderr)))
        return names - {b".", b""}

def symlink_offence(root: bytes, real_root: bytes, path: bytes) -> str:
    """Return why a symlink cannot be delivered, "" if it stays inside, written and resolved."""
    try:
        link = os.readlink(os.path.join(root, path))
        real = os.path.realpath(os.path.join(root, path))
    except OSError as error:
        return "it is a symlink that cannot be read: %s" % error.strerror
    if link.startswith(b"/"):
        return "it is a symlink to an absolute path"
    inside = (real + b"/").startswith(real_root.rstrip(b"/") + b"/")
    if leaves(path, link) or not inside:
        return "it is a symlink that leaves the source"
    return ""

def entry_offence(entry: "os.DirEntry[bytes]", needed: int) -> str:
    """Return why a file or directory of the source cannot be delivered, "" if it can.

    needed: permissions of the owner without which a user that is not root could not compare it.
    """
    try:
        if entry.is_dir(follow_symlinks=False):
            access = os.R_OK | os.X_OK
        elif entry.is_file(follow_symlinks=False):
            access, needed = os.R_OK, needed & 0o400
        else:
            return "it is a device, socket or fifo"
        if os.geteuid() != 0 and not os.access(entry.path, access):
            return "it cannot be read"
        if needed and entry.stat(follow_symlinks=False).st_mode & needed != needed:
            return "its mode would lock the target's user out; run: chmod u+rX"
    except FileNotFoundError:               # gone since
        pass
    return ""

def scan(source: Source, needed: int) -> dict[bytes, str]:
    """Walk the source once, count it, note its symlinks; return {path: why it is no delivery}."""
    offences: dict[bytes, str] = {}
    real_root = os.path.realpath(source.root)
    pending = [b""]
    while pending:
        directory = pending.pop()
        prefix = directory + b"/" if directory else b""
        PROGRESS.update("source", "scanning " + show(directory or b"."))
        try:
            with os.scandir(os.path.join(source.root, directory)) as entries:
                for entry in entries:
                    source.count += 1
                    why = ""
                    if entry.is_symlink():
                        source.symlinks.append(prefix + entry.name)
                        why = symlink_offence(source.root, real_root, prefix + entry.name)
                    else:
                        why = entry_offence(entry, needed)
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(prefix + entry.name)
                    if entry.name == STAGING:
                        why = "rsync reserves the name .~tmp~ for itself; rename it"
                    if why:
                        offences[prefix + entry.name] = why
        except OSError as error:
            if not directory:
                raise OffsyncError("source %s: %s; name a readable directory" % (
                    show(source.root), error.strerror)) from None
            offences.setdefault(directory, "it cannot be read")
    PROGRESS.update("source", None)
    return offences

def check_source(source: Source, home: "Home", rsync: str, targets: Sequence[Target]) -> None:
    """Scan the source. Raises unless all that is not excluded can be delivered to these targets."""
    if not os.path.isdir(source.root):
        raise OffsyncError("source %s: it is not a readable directory; name one with --source (for "
                           "this run), or with offsync init --source DIR" % show(source.root))
    top = os.path.realpath(source.root).rstrip(b"/") + b"/"
    for private in (home.path, home.key):   # the key may be a symlink to another place
        if (os.path.realpath(os.fsencode(private)) + b"/").startswith(top):
            raise OffsyncError("source %s: it contains %s and so the private key; choose a "
                "directory of its own: offsync init --source DIR" % (show(source.root), show_text(
                private)))
    offences = scan(source, 0o500 if any(target.user != "root" for target in targets) else 0)
    if all(target.symlinks for target in targets):
        source.symlinks = []                # nobody minds them
    if source.exclude and (offences or source.symlinks):
        included = source.included(rsync, complete=False)
        offences = {path: offences[path] for path in offences if path in included}
        source.symlinks = [path for path in source.symlinks if path in included]
    if offences:
        named = ["%s: %s" % (show(path), offences[path]) for path in sorted(offences)]
        raise OffsyncError("source %s: %s cannot be delivered; remove or exclude what is named, "
            "then plan again: %s" % (show(source.root), plural(len(named), "entry", "entries"),
            some_of(named)))


# --- Trust core: the connection -----------------------------------------------------------------

# Every connection gets all of these; the command line wins over ~/.ssh/config (ssh_config(5)).
SSH_OPTIONS = tuple(word for option in (
    # KnownHostsCommand, StdinNull and ForkAfterAuthentication are of OpenSSH 8.5 and 8.7, fatal to
    # an older one, which has no such settings. Unknown words of ~/.ssh/config are passed over, too.
    "IgnoreUnknown=*", "KnownHostsCommand=none", "StdinNull=no", "ForkAfterAuthentication=no",
    "BatchMode=yes",                        # never ask: a question would hang a cron job
    "IdentitiesOnly=yes", "IdentityAgent=none", "PKCS11Provider=none", "AddKeysToAgent=no",
    "PreferredAuthentications=publickey", "PubkeyAuthentication=yes",
    "StrictHostKeyChecking=yes", "NoHostAuthenticationForLocalhost=no",
    "VerifyHostKeyDNS=no",                  # DNS is no proof of a host key
    "UpdateHostKeys=no", "HashKnownHosts=no",       # known_hosts changes only in "target add"
    "CheckHostIP=no",                       # the name is what the operator confirmed
    "ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes", "Tunnel=no",
    "SetEnv=LC_ALL=C",                      # and none of ~/.ssh/config, which the master would send
    "PermitLocalCommand=no", "RemoteCommand=none", "RequestTTY=no", "EscapeChar=none",
    "ConnectTimeout=15", "ConnectionAttempts=1",    # we try again where that can help
    "ServerAliveInterval=15", "ServerAliveCountMax=3",      # a dead link ends within a minute
) for word in ("-o", option))
SSH_QUIET = ("-o", "LogLevel=ERROR")        # no banner on stderr
SSH_ALONE = ("-o", "ControlMaster=no", "-o", "ControlPath=none")    # for one question
# A session goes over the open connection or nowhere: were the master gone, ssh would connect
# afresh, unproved. It is sent to a program that is not there, and whose name says what happened.
# Nothing of ~/.ssh/config is for a session (RemoteCommand, SendEnv).
SSH_SESSION = ("-F", "/dev/null", "-o", "ControlMaster=no", "-o", "BatchMode=yes", *SSH_QUIET,
               "-o", "ProxyCommand=/nonexistent/offsync-connection-ended")
MASTER_IDLE = 600                           # seconds until a forgotten connection ends itself
# Seconds. For connections that sshd drops (MaxStartups; PerSourcePenalties of sshd 9.8: 16 s for
# two logins that failed), for rrsync's lock, for sessions beyond MaxSessions.
RETRY_DELAYS = (0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
RETRIED = ("busy-sshd", "locked", "session-refused")
# After an error rsync's server sleeps for 0.1 s (cleanup.c), under rrsync's lock; the seconds
# until the next rrsync has started are taken off.
LINGERING = 0.07
# Seconds without a byte while sending: nothing is hashed in silence then, and a killed rsync there
# leaves no EOF.
SEND_TIMEOUT = 300
OTHER_LIMIT = 1 << 24                       # bytes beside items: a target can have rsync print any

class Run:
    """What all targets of one command share: config, programs, threads, the scratch directory."""

    def __init__(self, home: "Home", config: Config, jobs: Optional[int] = None,
                 with_md5: bool = False) -> None:
        check_private(home.key)
        self.home, self.config = home, config
        self.ssh, self.rsync = program("ssh"), find_rsync()[0]
        self.started = time.time_ns()       # to say which side changed; nothing else rests on it
        self.targets = 1                    # how many are planned
        self.plans: dict[bytes, list[Change]] = {}      # by digest; under source.lock
        self.numbers = itertools.count()
        self.scratch = make_scratch()
        self.empty = os.fsencode(os.path.join(self.scratch, "empty"))   # source of what only asks
        os.mkdir(self.empty)
        self.guard = start_guard(self.scratch, self.ssh)
        self.source = Source(config.source, config.exclude, with_md5)
        self.jobs, self.provers = Pool(jobs or config.jobs), Pool(jobs or config.jobs)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind: the guard cleans up, or we do if somebody killed it."""
        pid, pipe = self.guard
        os.close(pipe)
        if os.waitpid(pid, 0)[1] != 0:
            clean_up(self.scratch, self.ssh)

class Connection:
    """One authenticated ssh connection to a target; sessions and rsyncs go over it or nowhere."""

    def __init__(self, shared: Run, target: Target, known_hosts: str = "") -> None:
        self.shared, self.target = shared, target
        self.socket = os.path.join(shared.scratch, "%d" % next(shared.numbers))
        self.known_hosts = known_hosts      # a file in place of the usual ones
        self.key_types = ""                 # HostKeyAlgorithms, if ~/.ssh/config must not choose
        self.opened = False
        self.restricted = False             # proved on this connection: no command
        self.path_proved = False            # proved on this connection: where it writes
        self.free_at = 0.0                  # when an rsync that failed there has ended (monotonic)

    def options(self) -> list[str]:
        """Return the options of a connection."""
        home, port = self.shared.home, self.target.port
        files = '"%s" ~/.ssh/known_hosts ~/.ssh/known_hosts2' % home.known_hosts
        words = [*SSH_OPTIONS, "-o", "UserKnownHostsFile=" + (self.known_hosts or files),
                 "-o", 'IdentityFile="%s"' % home.key]
        words += ["-o", "HostKeyAlgorithms=" + self.key_types] if self.key_types else []
        words += ["-o", "Port=%d" % port] if port else []
        return words

    def destination(self) -> list[str]:
        """Return ssh's words for the login."""
        return ["-l", self.target.user, "--", self.target.host]

    def session_options(self) -> list[str]:
        """Return the options of a session over the open connection."""
        return [*SSH_SESSION, "-o", "ControlPath=" + self.socket]

    def is_open(self) -> bool:
        """Return whether the master is there: it is asked, its socket file proves nothing."""
        return run([self.shared.ssh, "-F", "/dev/null", "-o", "ControlPath=" + self.socket,
                    "-O", "check", "--", "offsync"], deadline=SESSION_DEADLINE).status == 0

    def open(self) -> None:
        """Log in, without a session, and leave the connection open behind. Raises TargetError."""
        for delay in (*RETRY_DELAYS, None):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.socket)      # of a master that is gone
            result = run([self.shared.ssh, "-N", *SSH_QUIET, "-o", "ControlMaster=yes", "-o",
                "ControlPath=" + self.socket, "-o", "ControlPersist=%d" % MASTER_IDLE,
                *self.options(), *self.destination()], deadline=CONNECT_DEADLINE)
            self.restricted, self.opened = False, result.status == 0
            if self.opened:
                return
            error = explain_failed_login(self, result, last=delay is None)
            if error and (error.kind not in RETRIED or delay is None):
                raise error
            STOP.wait(delay if error and delay else 0)      # None: it asks for another host key
        raise failure(self.target, "host-key-unknown")

    def open_proved(self) -> None:
        """Open the connection (again) with the proofs that this target has passed before."""
        path_proved, self.path_proved = self.path_proved, False
        self.open()
        self.prove_restricted()
        if path_proved:
            prove_path(self)

    def session(self, options: Sequence[str], command: str) -> Result:
        """Ask for a command in a session. Its stdin stays open: what reads it, is late."""
        argv = [self.shared.ssh, *self.session_options(), *options, *self.destination(), command]
        return run(argv, stdin=subprocess.PIPE, deadline=SESSION_DEADLINE)

    def prove_restricted(self, patient: bool = True) -> None:
        """Ask for a command on this connection; raise TargetError unless it was refused.

        Where that cannot be told: not patient only leaves .restricted false.
        """
        for delay in (*RETRY_DELAYS, None):
            error = judge_refusal(self.target, self.session((), PROOF_COMMAND))
            self.restricted = error is None
            if error is None or not patient:
                return
            if error.kind not in RETRIED or delay is None:
                raise error
            STOP.wait(delay)

    def rsync_words(self, path: str) -> list[str]:
        """Return rsync's words for this connection and a path on the target."""
        shell = map(quote_for_rsync, [self.shared.ssh, *self.session_options()])
        host = "[%s]" % self.target.host if ":" in self.target.host else self.target.host
        return ["-e", " ".join(shell), "--", "%s@%s:%s" % (self.target.user, host, path)]

    def rsync(self, options: Sequence[str], *, source: bytes = b"", path: str = ".",
              stdin: Optional[BinaryIO] = None, item_format: bytes = b"%i %n",
              on_item: Callable[[bytes], None] = lambda line: None,
              on_other: Callable[[bytes], None] = lambda line: None, strong: bool = False,
              deadline: float = FOREVER, greeting: float = FOREVER, timeout: int = 0) -> Result:
        """Run one rsync to the target; give each itemized line to on_item. A lock is waited for.

        stdin is an open file, read from its current position (again for each attempt). Seconds:
        timeout without a byte, deadline for all of it, greeting until the server has answered.
        """
        answered, other = False, 0          # whether rsync there has begun; bytes that are no items

        def on_any_line(line: bytes) -> None:
            nonlocal answered
            answered = True                 # it is not tried again then
            on_line(line)

        def on_other_line(line: bytes) -> None:
            nonlocal other
            other += len(line)
            if other > OTHER_LIMIT + 200 * self.shared.source.count:    # progress: a line a file
                raise failure(self.target, "elsewhere", "text without end")
            on_other(line)

        out_format, on_line = marked(item_format, on_item, on_other_line)
        start = stdin.tell() if stdin else 0
        *shell, destination = self.rsync_words(path)
        # -8: raw bytes in every locale. flist1 prints a line once the server has answered.
        argv: list[Union[str, bytes]] = [self.shared.rsync, "-8", "--info=flist1", *options]
        argv += ["--timeout=%d" % (timeout or self.shared.config.timeout), out_format, *shell,
                 (source or self.shared.source.root).rstrip(b"/") + b"/", destination]
        for delay in (*RETRY_DELAYS, None):
            if not self.opened:
                self.open_proved()
            STOP.wait(max(self.free_at - time.monotonic(), 0))
            if stdin:
                os.lseek(stdin.fileno(), start, os.SEEK_SET)
            result = run(argv, stdin=stdin or subprocess.DEVNULL, on_line=on_any_line,
                deadline=deadline, env=environment(rsync=True, strong=strong), greeting=greeting)
            if result.status == 0:
                return result
            self.free_at = time.monotonic() + LINGERING
            if not result.stderr:           # the last words of a dying rsync may be lost
                result = result._replace(stderr=SILENT + b" (code %d)" % (result.status or 0))
            if answered or delay is None or result.status is None:
                return result
            kind = diagnose(self.target, result.stderr).kind
            if kind in ("lost", "no-answer", "ended"):
                self.opened = self.is_open()
            if self.opened and kind not in RETRIED:
                return result
            STOP.wait(delay)
        raise AssertionError("the last attempt returns")


# --- Trust core: proofs -------------------------------------------------------------------------

# Printed by a shell, but only quoted by what repeats the command: no echo is mistaken for it.
PROOF_COMMAND, PROOF_OUTPUT = 'echo offsync-""shell-""answers', b"offsync-shell-answers"
# How the Perl rrsync (up to 3.2.3) refuses it, and then exits with 255, as ssh does when it fails.
PERL_REFUSAL = b"SSH_ORIGINAL_COMMAND='%s' is not rsync" % PROOF_COMMAND.encode()

def judge_refusal(target: Target, result: Result) -> Optional[TargetError]:
    """Return None if asking for a command was refused as rrsync does, else why that is not known.

    Raises TargetError where it is known that it was not refused.
    """
    if PROOF_OUTPUT in result.stdout:
        raise failure(target, "open", "a shell command ran there")
    if result.status is None:               # a start file that reads its stdin, for example
        raise failure(target, "silent")
    if result.stdout.strip():               # some real ones speak there: nologin(8)
        error = diagnose(target, result.stdout + b"\n" + result.stderr)
        if error.kind in ("nologin", "password-expired", "other-service"):
            raise error
        raise failure(target, "prints", quote_answer(result.stdout))
    if result.status == 0:
        raise failure(target, "not-rrsync")
    if 0 < result.status < 255:             # rrsync's own, also when it only says that it is locked
        return None
    if result.status == 255 and PERL_REFUSAL in result.stderr:
        return None
    return diagnose(target, result.stderr)  # 255 is ssh's own failure: no proof

def prove_path(connection: Connection) -> str:
    """Try, as a dry run, to write to an absolute path without a parent; return what it tells.

    rsync's complaint names the directory in which it looked for our random name: that must be the
    configured one, else TargetError is raised, as where nothing is told.
    """
    target, marker = connection.target, os.urandom(8).hex().encode()
    expected = os.fsencode(target.remote_path)
    for _ in range(5):                      # a dying rsync now and then loses its last words
        result = connection.rsync(("-n", "-r"), source=connection.shared.empty,
                                  path="/%s/x" % marker.decode(), deadline=SESSION_DEADLINE)
        if result.status == 0:
            raise failure(target, "open", "it writes anywhere")
        before, found, _ = printed_name(result.stderr).partition(marker)
        for slashes in (b"/", b"//"):       # two up to 3.1.3
            if found and before.endswith(b'"' + expected + slashes):
                connection.path_proved = True
                return "it stays below " + show(expected)
        quote = before.rfind(b'"/')
        if found and quote >= 0:
            elsewhere = before[quote + 1:].rstrip(b"/") or b"/"
            raise failure(target, "open" if elsewhere == b"/" else "other-path",
                          "its key writes below %s, not below %s" % (
                              show(elsewhere), show(expected)))
        if not result.stderr.startswith(SILENT):
            break
    error = diagnose(target, result.stderr)
    if error.kind in ("other", "no-answer"):
        error = failure(target, "mute", quote_answer(result.stderr))
    raise error


# --- Trust core: the plan -----------------------------------------------------------------------

# One pass shows additions, changes and deletions. -t only adds time flags, which quick needs;
# differences of time alone are not reported.
RSYNC_PLAN = {"hash": ("-n", "-rlptc", "--delete"), "strong": ("-n", "-rlptc", "--delete"),
              "quick": ("-n", "-rlpt", "--delete")}
# Of the listed entries, those that do not exist at all on the target.
RSYNC_ABSENT = ("-n", "-lpt", "--ignore-existing", "--from0", "--files-from=-")
MAX_TARGET_ONLY = 1 << 31                   # bytes that what only targets have may take in all
ENTRY_COST = 150                            # bytes of memory for each, beside its name

class TargetPlan:
    """The plan of one target; error says why there is none. Equal plans share their changes."""

    def __init__(self, shared: Run, target: Target) -> None:
        self.target, self.connection = target, Connection(shared, target)
        self.error: Optional[TargetError] = None
        self.changes: list[Change] = []     # sorted by path
        self.digest = b""                   # of the changes: equal for targets with equal plans
        self.spared: set[bytes] = set()     # leftovers that a reviewed plan does not list

    def of(self, *kinds: str) -> list[Change]:
        """Return the changes of these kinds."""
        return [change for change in self.changes if change.kind in kinds]

def itemize(connection: Connection, options: Sequence[str], paths: Optional[Iterable[bytes]] = None,
            want: Callable[[bytes], None] = lambda path: None, **more: Any) -> list[Change]:
    """Return what a run of rsync itemizes, for the tree or for some paths. Raises TargetError.

    want is called with each path that differs as it comes.
    """
    shared, target, found = connection.shared, connection.target, []
    room, most = MAX_TARGET_ONLY // shared.targets, 2 * shared.source.count + 1000

    def on_item(line: bytes) -> None:
        nonlocal room, most
        try:
            change = parse_itemized(line)
        except ValueError as error:
            raise failure(target, "elsewhere", str(error)) from None
        if not change:
            return
        found.append(change)
        if change.kind == "missing":
            room -= len(change.path) + ENTRY_COST
        else:
            most -= 1                       # it can ask for an entry again and again
            want(change.path)
        if room < 0 or most < 0:            # a hostile target shall not fill our memory
            raise failure(target, "elsewhere", "too many entries")

    if paths is None:
        excludes = ["--exclude=" + pattern for pattern in shared.config.exclude]
        more.setdefault("greeting", SESSION_DEADLINE)
        result = connection.rsync((*options, *excludes), on_item=on_item, **more)
    else:
        with name_list(shared, map(listed_name, paths)) as names:
            result = connection.rsync(options, stdin=names, on_item=on_item, **more)
    if result.status is None:
        raise failure(target, "silent")
    if result.status != 0:
        raise diagnose(target, result.stderr)
    return found

def compare_proved(connection: Connection) -> list[Change]:
    """Return what the plan's pass itemizes, once it is proved that the key runs no command there.

    The proof runs beside the pass, on the same connection, from the moment in which the server has
    answered the pass: then the pass has rrsync's lock. Where that tells nothing (MaxSessions of
    sshd may allow one session), it is tried again after the pass.
    """
    shared, proofs, changes = connection.shared, [], []     # type: ignore[var-annotated]
    mode = shared.config.verify
    failed: Optional[OffsyncError] = None

    def begin_proof(_: bytes) -> None:
        if not proofs:
            proofs.append(shared.provers.submit(connection.prove_restricted, False))

    try:
        changes = itemize(connection, RSYNC_PLAN[mode], want=shared.source.want,
                          on_other=begin_proof, strong=mode == "strong")
    except OffsyncError as error:
        failed = error
    shared.source.flush()
    if proofs and proofs[0]:
        proofs[0].result()                  # raises where the key is known to be open
    waited = isinstance(failed, Stopped) or getattr(failed, "kind", "") == "silent"
    if not connection.restricted and not waited:        # it would only be waited for once more
        connection.prove_restricted()
    if failed:
        raise failed
    return changes

def classify(connection: Connection, changes: list[Change]) -> list[Change]:
    """Return the sorted changes of a target, from what rsync itemized.

    rsync shows an entry that replaces one of another type as new. So the new entries whose parent
    is not new (below a new directory all is new) are looked up on the target; what exists there is
    "modified" by type.
    """
    new = {change.path for change in changes if change.kind == "added"}
    replaced = {path for path in new if os.path.dirname(path) not in new}
    if replaced:
        replaced -= {change.path for change in itemize(connection, RSYNC_ABSENT, sorted(replaced))}
    for index, change in enumerate(changes):        # one by one: there may be a million
        if change.kind == "missing" and is_leftover(connection.shared.source, change):
            changes[index] = change._replace(kind="leftover")
        elif change.kind == "added" and change.path in replaced:
            changes[index] = change._replace(kind="modified", reasons=("type",))
    changes.sort(key=lambda change: change.path)
    for one, other in zip(changes, changes[1:]):
        if one.path == other.path:
            raise failure(connection.target, "elsewhere", "%s twice" % show(one.path))
    return changes

def plan_target(shared: Run, target: Target) -> TargetPlan:
    """Return the plan of one target, errors included.

    Where there is something to do, the key must really write below the configured path: that is
    proved while the source entries are hashed.
    """
    plan, source = TargetPlan(shared, target), shared.source
    try:
        if not target.symlinks and source.symlinks:
            raise failure(target, "symlinks", some_paths(source.symlinks))
        PROGRESS.update(target.login, "connecting")
        plan.connection.open()
        PROGRESS.update(target.login, "comparing")
        changes = classify(plan.connection, compare_proved(plan.connection))
        if changes:
            prove_path(plan.connection)
        source.wait()
        for index, change in enumerate(changes):
            if change.kind in ("added", "modified"):
                changes[index] = change._replace(entry=source.entries[change.path])
        plan.changes, plan.digest = share(shared, target, changes)
    except Stopped:
        raise
    except TargetError as error:
        plan.error = error
    except (OffsyncError, OSError) as problem:
        plan.error = TargetError(target.login, str(problem), "local")
    PROGRESS.update(target.login, None)
    return plan

def share(shared: Run, target: Target, changes: list[Change]) -> tuple[list[Change], bytes]:
    """Return (the changes, or the same ones of another target; their digest)."""
    if shared.targets == 1:
        return changes, target.login.encode()
    digest = hashlib.sha256()
    for change in changes:
        digest.update(repr(change).encode())
    with shared.source.lock:
        return shared.plans.setdefault(digest.digest(), changes), digest.digest()

def plan_all(shared: Run, targets: Sequence[Target]) -> list[TargetPlan]:
    """Check the source, then return the plan of each target, in the given order."""
    check_source(shared.source, shared.home, shared.rsync, targets)
    shared.targets = len(targets)
    return list(shared.jobs.map(lambda target: plan_target(shared, target), targets))


# --- Trust core: approval -----------------------------------------------------------------------

# What the config must allow for a kind of change, and the ways out.
POLICIES = {
    "missing": ("delete", "take them into the source, exclude them, or allow it: --delete, or "
                '"delete: true" in the config'),
    "modified": ("overwrite", "exclude them, remove them there, or allow it: "
                 '"overwrite: true" in the config')}
MANY_DELETIONS = 10                         # from so many on, max_delete is asked

def approve(shared: Run, plans: Sequence[TargetPlan], reviewed: Iterable[bytes], name: str) -> None:
    """Raise, naming the differences, unless a reviewed plan approves the plan of now.

    Every line of now must stand in it; and what it has besides must be on the targets already: so
    the source must hold all that it adds or modifies, and lack all that it deletes.
    """
    def now() -> Iterator[dict[str, Any]]:
        return map(json.loads, plan_lines(shared.config, plans))

    unapproved = set(map(comparable, now())) - {b""}
    held: set[tuple[bytes, SourceEntry]] = set()
    leftovers: set[tuple[str, bytes]] = set()
    differing: list[str] = []
    failed: set[str] = set()                # logins that the review did not show
    for number, line in enumerate(reviewed, 1):
        try:
            fields = read_line(line)
            key = comparable(fields)
            if not key:
                leftovers.add((fields["login"], read_json_path(fields)))
            elif key in unapproved or "kind" not in fields:
                unapproved.discard(key)
                failed.update([fields["login"]] if fields.get("error") else [])
            elif fields["kind"] != "missing":
                held.add(reviewed_entry(fields))
            elif os.path.lexists(os.path.join(shared.source.root, read_json_path(fields))):
                differing.append("%s is in the source again" % show(read_json_path(fields)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
            raise UsageError("plan %s:%d: this is no line of a plan; name a file that 'offsync "
                "plan --json' printed" % (show_text(name), number)) from None
    differing += ["%s is not in the source as reviewed" % show(path)
                  for path in not_in_source(shared.source, held)]
    if unapproved:                          # the policy comes first
        new = (fields for fields in now() if comparable(fields) in unapproved)
        differing = [*dict.fromkeys(name_line(fields, failed) for fields in new), *differing]
    if differing:
        raise OffsyncError("refused, nothing was sent: plan %s does not approve what would be done "
                           "now; review a new one: offsync plan; what differs: %s"
                           % (show_text(name), some_of(differing, "; ")))
    for plan in plans:                      # nothing is deleted that was not listed
        plan.spared = {change.path for change in plan.of("leftover")
                       if (plan.target.login, change.path) not in leftovers}

def not_in_source(source: Source, held: set[tuple[bytes, SourceEntry]]) -> list[bytes]:
    """Return the paths of those entries that the source does not hold; hashes what is not yet."""
    again = Source(os.fsdecode(source.root))        # what vanished is no error here
    for path, _ in held:
        if not source.entries.get(path):
            again.want(path)
    with contextlib.suppress(OffsyncError):
        again.wait()
    found = {**again.entries, **source.entries}
    return sorted({path for path, entry in held
                   if not found.get(path) or found[path].reviewed != entry})

def refusal(shared: Run, plans: Sequence[TargetPlan], reviewed: bool) -> str:
    """Return why none of these plans may be carried out, "" if all may.

    reviewed: somebody has looked at the deletions.
    """
    config, source, kept = shared.config, show_text(shared.config.source), 0
    deleting = [plan for plan in plans
                if plan.of("missing") or config.delete and plan.of("leftover")]
    if deleting and (config.delete or not shared.source.count):     # else it is refused below
        kept = len(shared.source.included(shared.rsync))
        if not kept:
            return "the source %s is empty (after the excludes), and an empty source never " \
                   "deletes; is it mounted and filled?" % source
    for kind, (key, ways_out) in POLICIES.items():
        concerned = [plan for plan in plans if plan.of(kind)]
        if concerned and not getattr(config, key):
            named = ["%s: %s" % (plan.target.login, some_paths(c.path for c in plan.of(kind)))
                     for plan in concerned]
            return "%s is false, and the plan has %d %s; %s: %s" % (
                key, sum(len(plan.of(kind)) for plan in concerned), kind, ways_out,
                some_of(named, "; "))
    for plan in () if reviewed else deleting:
        gone, new = len(plan.of("missing", "leftover")), len(plan.of("added"))
        there = kept - new + gone           # what it has now; it will have what the source has
        if gone >= MANY_DELETIONS and 100 * kept < (100 - config.max_delete) * there:
            return "%s would shrink from %d to %d entries (max_delete: %d percent); is the " \
                   "source %s mounted and filled? If it is meant, review it: offsync plan, then " \
                   "apply --plan ID, both with the same --source and --delete; or raise " \
                   "max_delete in the config" % (
                       plan.target.login, there, kept, config.max_delete, source)
    return ""


# --- Trust core: delivery -----------------------------------------------------------------------

# --files-from sends exactly what is listed (no -r: directories without their contents); -ii reports
# what needed nothing, too. --delay-updates renames all files at the end, and an interrupted run
# resumes from what it left in .~tmp~. Never --partial-dir, --partial or --temp-dir: some releases
# lose files or leave half a file under the live name.
RSYNC_SEND = ("-ii", "-lptO", "--from0", "--files-from=-")
RSYNC_CONTENT = ("-I", "--delay-updates")   # -I: no quick check, which a forged time stamp passes
RSYNC_AT_ONCE = ("-I",)                     # for servers that do not put a staged file in place
RSYNC_MODES = ("--size-only",)              # equal by hash: only the mode is to be set
RSYNC_SENT = b"%C %B %b %i %n%L"            # MD5, mode, bytes, what was done, name, -> link
RSYNC_COMPARE = ("-n", "-lptc", "--from0", "--files-from=-")
# Deletes what the include rules name, protects all else. --from0 must stand before --include-from.
# (--delete-missing-args fails in several releases.)
RSYNC_DELETE = ("-r", "--delete", "--existing", "--ignore-existing", "--from0", "--include-from=-",
                "--exclude=*")
RESCAN_DEADLINE = 15.0                      # seconds to learn what arrived after a failure

class Delivery:
    """Carries one target's plan out and verifies it."""

    def __init__(self, shared: Run, plan: TargetPlan) -> None:
        self.shared, self.plan, self.connection = shared, plan, plan.connection
        self.login, self.source = plan.target.login, shared.source
        self.hash = "strong" if shared.config.verify == "strong" else "hash"
        self.sent = [change for change in plan.of("added", "modified") if change.entry]
        self.links = [c for c in self.sent if c.entry and c.entry.type == "symlink"]
        others = [c for c in self.sent if c.entry and c.entry.type != "symlink"]
        self.modes = [c for c in others if c.reasons == ("mode",)]
        self.content = [c for c in others if c.reasons != ("mode",)]
        self.deletable: dict[bytes, bool] = {}      # path -> whether it is a directory
        if shared.config.delete:
            self.deletable = {c.path: c.directory for c in plan.of("missing", "leftover")
                              if c.path not in plan.spared}
        self.only_there: set[bytes] = set()     # what must go, as the last pass saw it
        self.only_modes = False             # the last comparison by hash found no other difference
        self.bytes_sent: Optional[int] = 0
        self.begun = False                  # something may have changed there
        self.different: Optional[set[bytes]] = None     # of the plan, afterwards; None: unknown

    def carry_out(self) -> Outcome:
        """Send, delete and verify; return what became of it, also after a failure."""
        started, result = time.monotonic(), "ok"
        error: Optional[str] = None
        try:
            if self.plan.error:
                raise self.plan.error
            if self.plan.changes:
                self.deliver()
            self.different = set()
        except Stopped:
            result, error = "interrupted", "apply again finishes the job"
        except (OffsyncError, OSError) as problem:
            result, error = "failed", getattr(problem, "why", str(problem))
            source_changed = getattr(problem, "kind", "") == "source-changed"
            if self.begun and self.different is None and not source_changed:
                self.find_out()             # else there is nothing to compare with
        if not self.begun and result != "ok":
            self.different = {change.path for change in self.plan.changes}
        PROGRESS.update(self.login, None)
        delivered = deleted = None
        if self.different is not None:
            delivered = [c.path for c in self.sent if c.path not in self.different]
            deleted = sorted(set(self.deletable) - self.different)
        return Outcome(self.login, result, error, delivered, deleted, self.bytes_sent,
                       time.monotonic() - started)

    def deliver(self) -> None:
        """Do what the plan lists: files and directories, modes, symlinks, then deletions.

        Each step is verified before the next one relies on it: no symlink points at what has not
        arrived, and nothing is deleted before what replaces it is there.
        """
        first = [*self.content, *self.modes]
        # Where all of the source was sent, one pass over the tree is cheaper than a list of names.
        whole = len(self.sent) == self.source.count
        self.make_way(self.content, self.useless())
        self.send(self.content, RSYNC_CONTENT)
        self.send(self.modes, RSYNC_MODES)
        if first:
            self.verify(first, whole)
        self.make_way(self.links, {})
        self.send(self.links, ())
        if self.links or self.only_there or not whole:
            self.verify_tree()

    def useless(self) -> dict[bytes, bool]:
        """Return the leftovers to delete that no transfer resumes from: they only take room."""
        resumed = {self.staged(change.path) for change in self.sent}
        return {c.path: False for c in self.plan.of("leftover")
                if c.path in self.deletable and not c.directory and c.path not in resumed}

    @staticmethod
    def staged(path: bytes) -> bytes:
        """Return where --delay-updates keeps a file until all have arrived."""
        return os.path.join(os.path.dirname(path), STAGING, os.path.basename(path))

    def make_way(self, changes: Sequence[Change], also: dict[bytes, bool]) -> None:
        """Delete the planned entries below the directories that give way to these."""
        replaced = {c.path for c in changes if "type" in c.reasons and not c.directory}
        blocking = dict(also)
        for path, directory in self.deletable.items():
            above = itertools.accumulate(path.split(b"/")[:-1], lambda one, two: one + b"/" + two)
            if not replaced.isdisjoint(above):
                blocking[path] = directory
        if blocking:
            self.delete(blocking, self.compare_tree("quick")[1])

    def send(self, changes: Sequence[Change], how: Sequence[str]) -> None:
        """Send exactly these; raise TargetError unless what went over is what was planned."""
        if not changes:
            return
        config, report, total = self.shared.config, Sent(self.sent), size_to_send(changes)
        options = [*RSYNC_SEND, *how]
        options += ["--ignore-existing"] if not config.overwrite else []
        options += ["--bwlimit=%d" % config.bwlimit] if config.bwlimit else []
        options += ["-z"] if config.compress else []
        options += ["--info=progress2"] if PROGRESS.enabled() else []
        PROGRESS.update(self.login, "sending %s" % format_bytes(total))
        self.begun = True
        before, self.bytes_sent = self.bytes_sent or 0, None    # unknown where rsync fails
        with name_list(self.shared, (listed_name(c.path) for c in changes)) as names:
            try:
                result = self.connection.rsync(
                    options, stdin=names, on_item=report.take, item_format=RSYNC_SENT, strong=True,
                    on_other=lambda line: PROGRESS.show_rsync(self.login, total, line),
                    timeout=min(SEND_TIMEOUT, config.timeout), greeting=SESSION_DEADLINE)
            except ValueError as error:
                raise failure(self.plan.target, "elsewhere", str(error)) from None
        if result.status == 0:
            self.bytes_sent = before + report.bytes
        if report.wrong:
            raise self.failure("source-changed", report.wrong)
        if result.status != 0:
            raise self.explain(result)
        lost = {c.path: c.entry for c in changes if c.entry and c.path not in report.reported}
        here = {path for path, entry in lost.items() if not self.source.is_as(path, entry)}
        if lost:
            raise self.failure("source-changed" if here else "changed-there", here or set(lost))

    def failure(self, kind: str, paths: Iterable[bytes]) -> TargetError:
        """Return a failure that names paths."""
        return failure(self.plan.target, kind, some_paths(paths))

    def explain(self, result: Result) -> TargetError:
        """Return what a failed rsync meant."""
        if result.status is None:
            return failure(self.plan.target, "silent")
        error, left = diagnose(self.plan.target, result.stderr), self.plan.of("leftover")
        if error.kind in ("space", "quota") and left:
            error.why += "; leftovers of interrupted runs take room there, too (--delete lets " \
                         "them go): " + some_paths(change.path for change in left)
        return error

    def verify(self, sent: Sequence[Change], whole: bool) -> None:
        """Compare by hash what was sent; raise TargetError for what differs."""
        PROGRESS.update(self.login, "verifying")
        if whole:
            different, self.only_there = self.compare_tree(self.hash)
            different -= {change.path for change in self.links}
        else:
            different = self.compare_list(change.path for change in sent)
        left = {change.path for change in self.plan.of("leftover")}
        stuck = [change for change in sent if change.path in different
                 and change.sends_content and self.staged(change.path) in left]
        if stuck:                           # rsync 3.2.0 to 3.2.3 never puts it in place
            self.send(stuck, RSYNC_AT_ONCE)
            different = self.compare_list(change.path for change in sent)
        if different:
            raise self.differs(different)

    def compare_list(self, paths: Iterable[bytes], **more: Any) -> set[bytes]:
        """Return which of these paths differ by hash."""
        strong = self.hash == "strong"
        changes = itemize(self.connection, RSYNC_COMPARE, paths, strong=strong, **more)
        self.only_modes = all(change.reasons == ("mode",) for change in changes)
        return {change.path for change in changes}

    def compare_tree(self, mode: str, **more: Any) -> tuple[set[bytes], set[bytes]]:
        """Compare the tree; return (paths that differ, paths only there, but for leftovers)."""
        changes = itemize(self.connection, RSYNC_PLAN[mode], strong=mode == "strong", **more)
        only_there = {c.path for c in changes if c.kind == "missing" and (
            c.path in self.deletable or not is_leftover(self.source, c))}
        return {c.path for c in changes if c.kind != "missing"}, only_there

    def verify_tree(self) -> None:
        """Compare the whole tree, and delete in between what must go. Raises TargetError."""
        PROGRESS.update(self.login, "comparing again")
        different, extraneous = self.compare_tree("quick")
        if different:                       # a quick check can be wrong: a hash is not
            different = self.compare_list(sorted(different))
        if not different and extraneous & set(self.deletable):
            self.delete(self.deletable, extraneous)
            extraneous = self.compare_tree("quick")[1]
        self.different = different | extraneous
        if self.different:
            raise self.differs(self.different)

    def differs(self, different: set[bytes]) -> TargetError:
        """Return the error for what differs afterwards; names the source where that changed."""
        planned = {change.path: change.entry for change in self.sent}
        here = set()
        for path in sorted(different)[:1000]:
            entry = planned.get(path)
            if entry:
                unchanged = self.source.is_as(path, entry)
            else:
                unchanged = self.source.older(path, self.shared.started)
            if not unchanged:
                here.add(path)
        if here:
            return self.failure("source-changed", here)
        return self.failure("differs-by-mode" if self.only_modes else "differs", different)

    def delete(self, paths: dict[bytes, bool], extraneous: set[bytes]) -> None:
        """Delete these planned entries, unless others have appeared since: then nothing."""
        surprises = extraneous - set(self.deletable)
        if surprises:
            raise self.failure("appeared", surprises)
        PROGRESS.update(self.login, "deleting %s" % plural(len(paths), "entry", "entries"))
        rules = {include_rule(path, directory): None for path, directory in paths.items()}
        for path in paths:                  # rsync must be let into the directories above
            while b"/" in path:
                path = os.path.dirname(path)
                rules[include_rule(path, True)] = None
        self.begun = True
        with name_list(self.shared, rules) as stream:
            result = self.connection.rsync(RSYNC_DELETE, stdin=stream)
        if result.status != 0:
            raise self.explain(result)

    def find_out(self) -> None:
        """After a failure, learn what arrived all the same, in a bounded time; else: unknown."""
        with contextlib.suppress(OffsyncError, OSError):
            different = self.compare_tree("quick", deadline=RESCAN_DEADLINE)[1]
            if self.sent:
                sent = [change.path for change in self.sent]
                different |= self.compare_list(sent, deadline=RESCAN_DEADLINE)
            self.different = different


# --- Trust core: the log ------------------------------------------------------------------------

class Log:
    """operations.log, a record a target, and last/LOGIN, the newest record without its names."""

    def __init__(self, home: "Home", config: Config) -> None:
        self.home, self.plan = home, ""     # the plan's ID, once it is known
        operator, sudo = name_of(os.getuid()), os.environ.get("SUDO_USER")
        self.common = {"operation": "apply", "source": config.source,
                       "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                       "operator": "%s (sudo by %s)" % (operator, sudo) if sudo else operator}
        self.outcomes: dict[str, tuple[Outcome, dict[str, Any]]] = {}       # by login, not printed
        self.results: collections.Counter[str] = collections.Counter()      # of those printed
        os.close(home.open_log())           # nothing is sent where that fails

    def record(self, target: Target, done: Outcome) -> dict[str, Any]:
        """Return a record."""
        changed, deleted = ([show(path) for path in paths] if paths is not None else None
                            for paths in (done.delivered, done.deleted))
        return {**self.common, "host": target.host, "login": target.login,
                "plan": self.plan or None, "result": done.result, "error": done.error,
                "bytes_sent": done.bytes_sent, "seconds": done.seconds and round(done.seconds, 3),
                "files_changed": changed, "files_deleted": deleted}

    def start(self, target: Target) -> None:
        """Note that a delivery begins: were all killed, the next command with the lock logs it."""
        self.home.write_last(self.record(target, Outcome(target.login, "started")))

    def finish(self, target: Target, done: Outcome) -> dict[str, Any]:
        """Log what became of a target; return the record. Raises OffsyncError if that fails."""
        record = self.record(target, done)
        self.home.append_log(record)
        self.home.write_last(record)
        return record

def deliver(shared: Run, log: Log, plan: TargetPlan) -> None:
    """Carry out one target's plan and log it at once, whatever becomes of the others."""
    target = plan.target
    nothing = Outcome(target.login, "interrupted", "nothing was sent", [], [], 0)
    try:
        if plan.changes and not STOP.is_set():
            log.start(target)
        done = nothing if STOP.is_set() else Delivery(shared, plan).carry_out()
    except OffsyncError as error:
        done = nothing._replace(result="failed", error="%s; nothing was sent" % error)
    try:
        record = log.finish(target, done)
    except OffsyncError as error:           # it belongs to this target alone
        why = "%s; %s" % (done.error or "delivered and verified, but not logged", error)
        done = done._replace(result="failed", error=why)
        record = log.record(target, done)
        with contextlib.suppress(OffsyncError):
            log.home.write_last(record)     # it was not killed
    log.outcomes[target.login] = (done, record)


# === The trust core ends here. Programs, threads, the state directory ===========================

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"    # where sshd lives; often not in a user's PATH
STDERR_KEPT = 1 << 14                       # bytes of stderr kept, of its head and of its tail
STDOUT_LIMIT = 1 << 22                      # bytes of stdout, where it is not read line by line
MAX_LINE = 1 << 16                          # bytes; a name has 4096, times 5 when escaped
FILE_LIMIT = 1 << 30                        # bytes of a config, key, manifest ... that are read
PLANS_KEPT, PLANS_KEPT_DAYS = 100, 30       # plans that "plan" keeps for "apply --plan"

def program(name: str) -> str:
    """Return the path of a system program; the error names the command that installs it."""
    found = shutil.which(name) or shutil.which(name, path=SBIN)
    if not found:
        raise OffsyncError("%s: the program is not installed; run: offsync install-deps" % name)
    return found

def make_scratch() -> str:
    """Return a new private directory whose path is short and plain enough for control sockets.

    sun_path has 104 bytes on macOS; ssh appends 17 to a socket's name while it binds it. Nobody
    else may be able to put another directory in its place, with another connection in it.
    """
    for parent in map(os.path.realpath, (tempfile.gettempdir(), "/tmp", "/var/tmp")):
        plain = re.fullmatch(r"[A-Za-z0-9/._+-]+", parent) and len(parent) + 24 < 104 - 17
        if plain and os.access(parent, os.W_OK | os.X_OK):
            scratch = tempfile.mkdtemp(prefix="offsync-", dir=parent)
            if not find_strangers(scratch):
                return scratch
            os.rmdir(scratch)
    raise OffsyncError("TMPDIR: set it to a writable directory with a short, plain name, in which "
                       "nobody else can replace what is yours")

class Output:
    """Takes a program's output as it comes; keeps little of it, whatever a target sends."""

    def __init__(self, on_line: Optional[Callable[[bytes], None]]) -> None:
        self.on_line = on_line
        self.kept: list[bytes] = []         # stdout, where there is no on_line
        self.size = 0                       # of what is kept, in bytes
        self.rest = b""                     # of stdout: a line that is not complete
        self.head = self.tail = b""         # of stderr
        self.error_size = 0

    def take(self, chunk: bytes) -> None:
        """Give each whole line to on_line, else keep it. Raises OffsyncError without an end."""
        if not self.on_line:
            self.kept.append(chunk)
            self.size += len(chunk)
        else:                               # a name holds no raw \r or \n: rsync escapes them
            *lines, self.rest = (self.rest + chunk).replace(b"\r", b"\n").split(b"\n")
            for line in lines:
                self.on_line(line)
        if self.size > STDOUT_LIMIT or len(self.rest) > MAX_LINE:
            raise OffsyncError("a program prints without end; nothing more is read from it")

    def take_error(self, chunk: bytes) -> None:
        self.error_size += len(chunk)
        if self.error_size > STDOUT_LIMIT:
            raise OffsyncError("a program complains without end; nothing more is read from it")
        room = STDERR_KEPT - len(self.head)
        self.head += chunk[:room]
        self.tail = (self.tail + chunk[room:])[-STDERR_KEPT:]

    def read(self, process: "subprocess.Popen[bytes]", deadline: float, greeting: float) -> bool:
        """Read both pipes until the program ends; return whether it was ended for being late.

        deadline is in seconds for all of it, greeting for its first byte on stdout. The end is
        that of the program, not of its pipes: an ssh in the background may hold them open.
        """
        started, late = time.monotonic(), False
        with selectors.DefaultSelector() as selector:
            for stream in filter(None, (process.stdout, process.stderr)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                ended = process.poll() is not None      # asked first: all that it wrote is there
                ready = selector.select(0 if ended else 0.1)
                if ended and not ready:
                    break
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 18)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stderr:
                        self.take_error(chunk)
                    else:
                        greeting = deadline
                        self.take(chunk)
                PROGRESS.tick()
                if not late and time.monotonic() - started > min(deadline, greeting):
                    late = True
                    kill(process)
        if self.rest and self.on_line:
            self.on_line(self.rest)
        try:
            process.wait(max(started + deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:   # it closed its pipes and goes on
            late = True
            kill(process)
        return late

class Pool:
    """Threads that carry out functions; one that cannot start (a process limit) is done without."""

    def __init__(self, threads: int) -> None:
        from concurrent.futures import Future, ThreadPoolExecutor       # here: slow to import
        self.new_future: Callable[[], Any] = Future
        self.executor = ThreadPoolExecutor(max_workers=threads)
        self.threads = threads

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the future of a function, None where no thread can be started for it.

        Then it may be carried out nevertheless, by a thread that is there already.
        """
        try:
            return self.executor.submit(function, *arguments)
        except RuntimeError:
            return None

    def map(self, function: Callable[[_Item], _Value], items: Sequence[_Item]) -> Iterator[_Value]:
        """Yield function(item) for each item, in order; each thread takes the next that none has.

        Raises OffsyncError if there is no thread at all. Whatever stops the consumer, all that was
        begun has ended when this returns.
        """
        futures = [self.new_future() for _ in items]
        waiting = iter(list(zip(futures, items)))

        def work() -> None:
            for future, item in waiting:
                try:
                    future.set_result(function(item))
                except BaseException as error:          # raised again where the result is taken
                    future.set_exception(error)

        started = [self.submit(work) for _ in range(min(self.threads, len(items)))]
        if started and not any(started):
            raise OffsyncError("threads: none can be started; raise the limit (ulimit -u)")
        try:
            for number, future in enumerate(futures):
                if len(items) > 1:
                    PROGRESS.update("(all)", "%d of %d done" % (number, len(items)))
                yield future.result()
        finally:
            for future in futures:
                future.exception()          # waits
            PROGRESS.update("(all)", None)

def read_file(path: str, what: str, missing: str, regular: bool = True) -> bytes:
    """Return a small file's contents; missing says what to do without it. regular: no pipe."""
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if regular else 0)
        with open(os.open(path, flags), "rb") as stream:
            if regular and not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UsageError("%s %s: it is not a regular file; replace it by one" % (
                    what, show_text(path)))
            return stream.read(FILE_LIMIT)
    except FileNotFoundError:
        raise UsageError("%s %s: it does not exist; %s" % (
            what, show_text(path), missing)) from None
    except OSError as error:
        raise OffsyncError("%s %s: %s; mend that, then try again" % (
            what, show_text(path), error.strerror)) from None

def write_atomically(path: str, data: Iterable[bytes], mode: int) -> None:
    """Replace a file: a temporary neighbour, mode first, fsync, rename. Symlink and owner stay."""
    path = os.path.realpath(path)
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, ".offsync-%d-%s" % (threading.get_native_id(), name))
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                if os.path.exists(path):
                    os.fchown(descriptor, os.stat(path).st_uid, os.stat(path).st_gid)
                os.fchmod(descriptor, mode)
                stream.writelines(data)
                stream.flush()
                os.fsync(descriptor)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise OffsyncError("%s: it cannot be written: %s; nothing was changed" % (
            show_text(path), error.strerror)) from None

def make_directory(path: str, mode: int) -> None:
    """Create a directory if it is absent, parents 0755, whatever the umask; through no symlink.

    path is a real path. The mode of a directory that exists is not ours to change.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    parts = [part for part in path.split("/") if part]
    descriptor = os.open("/", flags)
    try:
        for index, part in enumerate(parts):
            created = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=descriptor)
                created = True
            above, descriptor = descriptor, os.open(part, flags, dir_fd=descriptor)
            os.close(above)
            if created:
                os.fchmod(descriptor, mode if index == len(parts) - 1 else 0o755)
    except OSError as error:
        raise OffsyncError("%s: it cannot be created: %s" % (
            show_text(path), error.strerror)) from error
    finally:
        os.close(descriptor)

def name_of(uid: int) -> str:
    """Return an account's name, or its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)

def group_has_strangers(gid: int) -> bool:
    """Return whether a group may have a member but this account and root.

    LDAP and SSSD often list no members: so a group is private only if it lists nobody else, and is
    this account's own (primary, of its name) or nobody's.
    """
    account = name_of(os.geteuid())
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return True
    primary = {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == gid} - {"root"}
    if set(group.gr_mem) - {account, "root"}:
        return True
    return bool(primary) and (primary != {account} or group.gr_name != account)

def has_acl(path: str) -> bool:
    """Return whether a directory has an access control list (acl(5)), masked by the group mode."""
    with contextlib.suppress(OSError, AttributeError):
        return bool(os.getxattr(path, "system.posix_acl_access"))
    return False

def find_strangers(path: str, itself: bool = True) -> str:
    """Return who else could replace what lies at a path, "" if only root and this account can.

    Each existing directory from / on is judged: owner root or this account, no write for others. A
    sticky one (/tmp) does not count where the next one is ours. itself: path too, else its parents.
    """
    real, ours = os.path.realpath(path), (0, os.geteuid())
    places = [real[:match.start()] or "/" for match in re.finditer("/", real)]
    for place in [*places, real] if itself else places:
        try:
            status = os.stat(place)
        except FileNotFoundError:
            return ""                       # from here on it is made by us
        except OSError as error:
            return "%s cannot be looked at: %s" % (show_text(place), error.strerror)
        mode, quoted = stat.S_IMODE(status.st_mode), shlex.quote(place)
        if status.st_uid not in ours:
            return "%s belongs to %s; choose another, or run: chown %s %s" % (
                show_text(place), name_of(status.st_uid), name_of(os.geteuid()), quoted)
        following = real[len(place.rstrip("/")) + 1:].split("/")[0]
        below = os.path.join(place, following)
        if following and mode & stat.S_ISVTX and os.path.lexists(below):
            if os.lstat(below).st_uid in ours:
                continue
        if mode & 0o002:                    # /tmp and the like are meant to be so
            remedy = "choose another place" if mode & stat.S_ISVTX else "run: chmod o-w " + quoted
            return "everybody may write to %s (mode %04o); %s" % (show_text(place), mode, remedy)
        if mode & 0o020 and (has_acl(place) or group_has_strangers(status.st_gid)):
            return "its group may write to %s (mode %04o); run: chmod g-w %s" % (
                show_text(place), mode, quoted)
    return ""

def check_private(path: str) -> str:
    """Return a path, shown; raise unless it is there and nobody else can read it."""
    if not os.path.exists(path):
        raise OffsyncError("%s: it does not exist; run: offsync init" % show_text(path))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise OffsyncError("%s: others may read it (mode %04o); run: chmod %o %s"
                           % (show_text(path), mode, mode & 0o700, shlex.quote(path)))
    return show_text(path)

class Home:
    """$OFFSYNC_HOME: its files, its lock and its log. Refused where others could change it."""

    def __init__(self) -> None:
        named = os.environ.get("OFFSYNC_HOME") or os.path.expanduser("~/.offsync")
        self.path = path = os.path.realpath(validate_absolute_path(named, "OFFSYNC_HOME"))
        if re.search(r'["%$\\]', path):
            raise UsageError('OFFSYNC_HOME %s: ssh would interpret one of " %% $ \\ in it; choose '
                'another ' "directory" % show_text(path))
        self.config, self.key, self.known_hosts, self.log, self.lock_file, self.plans, self.last = (
            os.path.join(path, name) for name in ("config.yaml", "id_ed25519", "known_hosts",
            "operations.log", "lock", "plans", "last"))
        if os.path.lexists(path):
            self.refuse_strangers()

    def refuse_strangers(self) -> None:
        """Raise OffsyncError if others could change what lies there."""
        strangers = find_strangers(self.path)
        if strangers:
            raise OffsyncError("state directory %s: others could change what offsync does: %s"
                               % (show_text(self.path), strangers))

    def lock(self, what: str) -> None:
        """Take the writers' lock until the end; the loser says who has it. Logs killed runs."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.lock_file, flags, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            raise UsageError("%s: it does not exist; run first: offsync init --source DIR"
                             % show_text(self.path)) from None
        except BlockingIOError:
            raise OffsyncError("%s is running and holds the lock %s; try again when it has finished"
                               % (self.lock_holder(), self.lock_file)) from None
        except OSError as error:
            raise OffsyncError("lock %s: %s; nothing was sent or changed; mend that, then try again"
                               % (show_text(self.lock_file), error.strerror)) from None
        self.name_holder(descriptor, what)
        self.log_killed_runs()

    def lock_holder(self) -> str:
        """Return who says in the lock file that it holds the lock."""
        return quote_answer(read_file(self.lock_file, "lock", "try again")) or "another offsync"

    def wait_for_writers(self) -> None:
        """Wait until no writer is at work, and keep them out: half a delivery is no finding."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None                          # nobody has ever written, or nobody may
        said = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return self.name_holder(descriptor, "verify")
            except BlockingIOError:
                if not said:
                    emit("waiting for %s, which is running ..." % self.lock_holder(), error=True)
                said = True
                STOP.wait(0.2)

    def name_holder(self, descriptor: int, what: str) -> None:
        """Write into the lock file who holds it."""
        with contextlib.suppress(OSError):  # only words for others: the disk may be full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"offsync %s (process %d)\n" % (what.encode(), os.getpid()), 0)

    def read_config(self) -> str:
        """Return the config's text."""
        data = read_file(self.config, "config", "run first: offsync init --source DIR")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[:error.start].count(b"\n") + 1
            raise UsageError("%s:%d: not UTF-8; correct that" % (self.config, line)) from None

    def load(self) -> Config:
        """Return the config."""
        return validate_config(self.read_config(), self.config)

    def replace_in_config(self, key: str, block: Sequence[str]) -> None:
        """Replace one top-level key's lines in the config."""
        text = replace_block(self.read_config(), key, block)
        validate_config(text, self.config)
        write_atomically(self.config, [text.encode()], 0o600)

    def open_log(self) -> int:
        """Return a descriptor for appending to operations.log. Raises OffsyncError."""
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            log = os.open(self.log, flags, 0o600)
            size = os.fstat(log).st_size
            if size and os.pread(log, 1, size - 1) != b"\n":    # the disk was full once: what
                os.write(log, b"\n")                            # follows stays readable
            return log
        except OSError as error:
            raise OffsyncError("log %s: it cannot be written: %s; nothing was sent; mend that, "
                "then apply again" % (show_text(self.log), error.strerror)) from None

    def append_log(self, record: dict[str, Any]) -> None:
        """Append one record with one write. Raises OffsyncError if it is not all there."""
        line, log, why = json_line(record), self.open_log(), "no space left"
        try:
            written = os.write(log, line)
        except OSError as error:
            written, why = 0, str(error.strerror)
        os.close(log)
        if written != len(line):
            raise OffsyncError("log %s: the record could not be written: %s; mend that"
                               % (show_text(self.log), why))

    def write_last(self, record: dict[str, Any]) -> None:
        """Replace a target's status: its newest record, without the names."""
        make_directory(os.path.realpath(self.last), 0o700)
        status = {key: value for key, value in record.items() if not key.startswith("files_")}
        write_atomically(os.path.join(self.last, record["login"]), [json_line(status)], 0o600)

    def read_last(self) -> dict[str, dict[str, Any]]:
        """Return the newest record of each login; what cannot be read is passed over."""
        found = {}
        for name in sorted(os.listdir(self.last)) if os.path.isdir(self.last) else ():
            with contextlib.suppress(OffsyncError, ValueError, TypeError, KeyError, RecursionError):
                record = json.loads(read_file(os.path.join(self.last, name), "status", ""))
                if record["login"] == name and isinstance(record["result"], str):
                    found[name] = record
        return found

    def log_killed_runs(self) -> None:
        """Log the deliveries that were killed before they could do so themselves. With the lock."""
        for name, record in self.read_last().items():
            if record["result"] == "started":
                record.update(result="interrupted", error="offsync was killed; what arrived is "
                    "unknown; the next apply finishes the job")
                self.append_log({**record, "files_changed": None, "files_deleted": None})
                self.write_last(record)
                warn("an apply to %s was killed; the next one finishes its job" % show_text(name))

    def keep_plan(self, name: str, lines: Iterable[bytes]) -> None:
        """Store a plan under its ID, so that "apply --plan" can be given that; drop old ones."""
        try:
            make_directory(os.path.realpath(self.plans), 0o700)
            write_atomically(os.path.join(self.plans, name), lines, 0o600)
            kept = sorted((entry.stat().st_mtime, entry.path) for entry in os.scandir(self.plans))
            oldest = time.time() - PLANS_KEPT_DAYS * 86400
            for when, path in kept[:-1]:
                if when < oldest or (when, path) < kept[-PLANS_KEPT:][0]:
                    os.unlink(path)
        except (OSError, OffsyncError) as error:
            warn("the plan is not kept (%s); keep it yourself: offsync plan --json > FILE, then "
                "apply --plan FILE" % error)

    def open_plan(self, named: str) -> tuple[BinaryIO, str]:
        """Return (a reviewed plan, open; its ID) for --plan ID or FILE. Raises OffsyncError."""
        path = named
        if re.fullmatch("[0-9a-f]{32,64}", named):
            names = os.listdir(self.plans) if os.path.isdir(self.plans) else []
            found = [name for name in sorted(names) if name.startswith(named)]
            path = os.path.join(self.plans, found[0]) if found else ""
            if not path:
                raise OffsyncError("plan %s: it is not among the plans that %s keeps for %d days; "
                                   "plan again, or name the file that 'offsync plan --json' "
                                   "printed: --plan FILE"
                                   % (named, self.plans, PLANS_KEPT_DAYS))
        elif re.fullmatch("[0-9a-f]{8,31}", named) and not os.path.exists(named):
            raise UsageError("plan %s: give 32 digits of the ID or more, since fewer can be "
                "forged; copy the line that 'offsync plan' ends with" % named)
        try:
            digest, copy = hashlib.sha256(), tempfile.TemporaryFile()   # of a pipe, too
            with open(path, "rb") as stream:
                for chunk in iter(lambda: stream.read(1 << 18), b""):
                    digest.update(chunk)
                    copy.write(chunk)
            copy.seek(0)
        except OSError as error:
            raise UsageError("plan %s: %s; give the ID that 'offsync plan' ends with, or the file "
                "that 'offsync plan --json' printed" % (show_text(named), error.strerror)) from None
        if path != named and digest.hexdigest() != os.path.basename(path):
            raise OffsyncError("plan %s: what %s holds is not that plan; plan again" % (
                named, path))
        return copy, digest.hexdigest()


# --- The target side: link and unlink -----------------------------------------------------------

KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
             "ssh-rsa", "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")
RSA_BITS = 2048
KEY_RESTRICTIONS = "no-port-forwarding,no-agent-forwarding,no-X11-forwarding,no-pty,restrict"
RRSYNC_PLACES = (DEFAULT_RRSYNC, "/usr/local/bin/rrsync", "/opt/homebrew/bin/rrsync",
                 "/home/linuxbrew/.linuxbrew/bin/rrsync", "/usr/lib/rsync/rrsync",
                 "/usr/share/rsync/scripts/rrsync", "/usr/share/doc/rsync/support/rrsync",
                 "/usr/share/doc/packages/rsync/support/rrsync",
                 "/usr/share/doc/rsync-*/support/rrsync", "/usr/share/doc/rsync/scripts/rrsync",
                 "/usr/share/doc/rsync/scripts/rrsync.gz")
# A key that can write in or above one of these is as good as a shell, sooner or later.
SYSTEM_TREES = (*("/" + name for name in ("bin", "boot", "dev", "etc", "lib", "lib32", "lib64",
                                          "libx32", "Library", "proc", "run", "sbin", "sys",
                                          "System", "usr")),
                "/var/spool", *("/var/lib/" + name for name in (
                    "apt", "cloud", "containerd", "dkms", "docker", "dpkg", "flatpak", "kubelet",
                    "pacman", "polkit-1", "rpm", "snapd", "systemd")))
# Login shells in which single quotes mean what POSIX says; others get only paths that need none.
POSIX_SHELLS = ("sh", "bash", "dash", "ash", "ksh", "ksh93", "mksh", "zsh", "busybox", "rbash")
NO_LOGIN_SHELLS = ("nologin", "false", "true", "sync")
RESTRICTED_SHELLS = ("rbash", "rksh", "rzsh", "git-shell", "scponly", "rssh")
OUR_LINE = re.compile(r'(?:from="[^"]*",)?command="(?:\\"|[^"])*-wo (?:\\"|[^"])*",'
                      + re.escape(KEY_RESTRICTIONS) + r" \S+ (\S+)(?: .*)?")

def format_forced_command(rrsync: Sequence[str], path: str, munge: bool = False) -> str:
    """Return the shell command of the forced command: rrsync, write-only, below path."""
    return shlex.join([*rrsync, "-wo", *(["-munge"] if munge else []), path])

def format_authorized_key(command: str, key: PublicKey, from_pattern: str = "") -> str:
    """Return the authorized_keys line (sshd(8)). Within quotes only the double quote is escaped."""
    options = 'from="%s",' % from_pattern if from_pattern else ""
    options += 'command="%s",%s' % (command.replace('"', '\\"'), KEY_RESTRICTIONS)
    return " ".join(filter(None, (options, key.type, key.blob, key.comment)))

def edit_authorized_keys(text: bytes, key: PublicKey, new_line: Optional[str]) -> tuple[bytes, str]:
    """Return (the file with offsync's line for this key set, or removed for None; that line or "").

    Other lines stay byte for byte. Raises ValueError(line number) for a foreign line with the key.
    """
    kept, was = [], ""
    new = b"" if new_line is None else os.fsencode(new_line) + b"\n"
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", text), 1):
        decoded = line.decode("utf-8", "surrogateescape").strip()
        written = OUR_LINE.fullmatch(decoded)
        if decoded.startswith("#") or key.blob not in decoded.replace("\0", " ").split():
            kept.append(line)
        elif written and written[1] != key.blob:        # ours for another key; this is its comment
            kept.append(line)
        elif not written:
            raise ValueError(number)
        else:
            kept.append(b"" if was else new)
            was = was or decoded
    if new and not was:
        kept += [b"\n" if kept and not kept[-1].endswith(b"\n") else b"", new]
    return b"".join(kept), was

def fingerprints(lines: Iterable[str]) -> list[tuple[int, str, str]]:
    """Return (bits, SHA256 fingerprint, type) of known_hosts or key lines; asks ssh-keygen."""
    with tempfile.TemporaryFile() as stream:
        stream.writelines(line.encode() + b"\n" for line in lines)
        stream.seek(0)
        result = run([program("ssh-keygen"), "-l", "-E", "sha256", "-f", "-"], stdin=stream)
    found = [line.split() for line in result.stdout.decode("utf-8", "replace").splitlines()]
    return [(int(words[0]), words[1], words[-1].strip("()"))
            for words in found if len(words) > 2 and words[0].isdigit()]

def validate_public_key(text: str) -> PublicKey:
    """Return the key of one line, as ssh-keygen accepts it, of a type that OpenSSH calls safe."""
    give = "give the one line that 'offsync init' prints on the controller, without options"
    if "PRIVATE KEY" in text:
        raise UsageError("key: that is a private key, which never leaves the controller; " + give)
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) != 1:
        raise UsageError("key: %s instead of one; %s" % (plural(len(lines), "line"), give))
    match = re.fullmatch(r"(\S+)[ \t]+([A-Za-z0-9+/]+=*)(?:[ \t]+(.*))?", lines[0].strip())
    if not match or match[1] not in KEY_TYPES or CONTROL.search(match[3] or ""):
        raise UsageError("key: it is not a public key of a known type (%s, ...); %s" % (
            KEY_TYPES[0], give))
    key = PublicKey(match[1], match[2], (match[3] or "").strip())
    accepted = fingerprints(["%s %s" % (key.type, key.blob)])
    if not accepted:
        raise UsageError("key: ssh-keygen does not accept it; " + give)
    if key.type == "ssh-rsa" and accepted[0][0] < RSA_BITS:
        raise UsageError("key: RSA with %d bits is too weak; use the key of 'offsync init'"
                         % accepted[0][0])
    return key

def find_rrsync(wanted: Optional[str]) -> tuple[str, list[str], str]:
    """Return (path, command words, "python3", "perl" or "") of the wanted or a found rrsync.

    A script that is not executable is run through the interpreter that its first line names.
    """
    places = [path for place in RRSYNC_PLACES for path in sorted(glob.glob(place))]
    for place in [wanted] if wanted else places:
        path = validate_absolute_path(place, "rrsync")
        if path.endswith(".gz") and os.path.isfile(path):
            raise OffsyncError("rrsync %s: it is compressed; run: gunzip -c %s > "
                "/usr/local/bin/rrsync && chmod 755 /usr/local/bin/rrsync" % (path, path))
        if not os.path.isfile(path):
            continue
        first = read_file(path, "rrsync", "")[:200].split(b"\n")[0]
        language = next((name for name in ("python3", "perl") if name.encode() in first), "")
        if os.access(path, os.X_OK):
            return path, [path], language
        interpreter = shutil.which(language, path="/usr/bin") or shutil.which(language)
        if language and interpreter:
            return path, [interpreter, path], language
        raise OffsyncError("rrsync %s: it is not executable and its interpreter is missing; run: "
            "install -m 755 %s /usr/local/bin/rrsync" % (path, path))
    if wanted:
        raise UsageError("rrsync %s: it does not exist; name its place, or leave --rrsync away to "
            "look in the known ones" % show_text(wanted))
    raise OffsyncError("rrsync: it is in none of the known places; run: offsync install-deps "
        "--role target (images without documentation lack it on EL 8 and 9: dnf -y "
        "--setopt=tsflags= reinstall rsync)")

# Stands in for ssh and sshd: drops the host's name, starts the forced command as sshd does.
LOCAL_SHELL = ("import os, sys; os.environ['SSH_ORIGINAL_COMMAND'] = ' '.join(sys.argv[3:]); "
               "os.execv('/bin/sh', ['sh', '-c', sys.argv[1]])")

def probe_rrsync(words: Sequence[str], munge: bool) -> None:
    """Try what a key thief would do with this host's rrsync; raise OffsyncError if it gets out.

    A symlink is sent, then a file through it (before rsync 3.5.0 that writes anywhere). A version
    would prove nothing, since distributions back-port. Raises too where rrsync does not work.
    """
    with tempfile.TemporaryDirectory(prefix="offsync-") as scratch:
        inside, outside, plant, through = (os.path.join(scratch, name) for name in (
            "inside", "outside", "plant", "through"))
        for directory in (inside, outside, plant, through, through + "/x"):
            os.mkdir(directory)
        os.symlink(outside, plant + "/x")
        for path in (plant + "/file", through + "/x/f"):
            with open(path, "wb") as stream:
                stream.write(b"offsync\n")
        shell = " ".join(map(quote_for_rsync, (sys.executable, "-I", "-S", "-c", LOCAL_SHELL,
                                               format_forced_command(words, inside, munge))))

        def send(*options: str) -> Result:
            return run([find_rsync()[0], "-e", shell, *options, "host:."],
                       deadline=SESSION_DEADLINE, env=environment(rsync=True))

        sent = send("-rl", "--", plant + "/")
        if sent.status != 0 or not os.path.exists(inside + "/file"):
            raise OffsyncError("rrsync %s: it does not work here%s; it must be of the same release "
                               "as rsync, 3.1.2 or newer, with its interpreter; update rsync, or "
                               "name another: --rrsync PATH (it said: %s)" % (
                                   words[-1], " with -munge, of 3.2.4" if munge else "",
                                   quote_answer(sent.stderr) or "nothing"))
        send("-pR", "--no-implied-dirs", "--", through + "/./x/f")
        if os.path.exists(outside + "/f"):
            ways = "" if munge else "; or link with --no-symlinks, if you deliver none"
            raise OffsyncError("rrsync %s: it lets the key out of its directory (tried here: a "
                "symlink was sent, then a file through it), so whoever steals the key has a login "
                "shell; update rsync to 3.5.0 or to one in which that is mended%s; or accept it: "
                "--accept-risk rrsync" % (words[-1], ways))

def validate_link_path(path: str, protected: Iterable[str], accept_risk: bool) -> str:
    """Return the real path that the key may write below. accept_risk waives what users know."""
    real = os.path.realpath(validate_absolute_path(path, "path"))
    validate_absolute_path(real, "path")
    choose = "choose a directory that holds only delivered files, such as /srv/app-data"

    def lies_in(place: str) -> bool:
        return (real + "/").startswith(place.rstrip("/") + "/")

    def contains(place: str) -> bool:
        return (place + "/").startswith(real.rstrip("/") + "/")

    if os.path.lexists(real) and not os.path.isdir(real):
        raise UsageError("path %s: it is no directory; choose another, or move it away"
                         % show_text(real))
    users = [entry.pw_dir for entry in pwd.getpwall()
             if os.path.basename(entry.pw_shell) not in NO_LOGIN_SHELLS]
    homes = set(map(os.path.realpath, (os.path.expanduser("~"), *users)))
    keys = [home + name for home in homes for name in ("/.ssh", "/.ssh/authorized_keys")]
    never = sorted({*keys, *map(os.path.realpath, [*keys, *protected])})
    found = "is the root or a home directory" if real == "/" or real in homes else ""
    for place in never:
        if contains(place) or lies_in(place):
            how = "contains" if contains(place) else "lies in"
            found = found or "%s %s" % (how, show_text(place))
    if found:
        raise UsageError("path %s: it %s, so a key that writes there is as good as a shell; %s"
                         % (show_text(real), found, choose))
    trees = sorted({*SYSTEM_TREES, *map(os.path.realpath, SYSTEM_TREES)})
    risks = ["it lies in or contains %s, where the system keeps what it runs and reads" % place
             for place in trees if contains(place) or lies_in(place)]
    programs = [*filter(os.path.isabs, os.get_exec_path()), os.path.expanduser("~/bin")]
    if any(contains(place) for place in map(os.path.realpath, programs)):
        risks.append("it is or contains a directory of $PATH, or ~/bin, where programs are found")
    default = os.path.realpath(os.path.expanduser("~/.offsync/sync"))
    if real != default and any(part.startswith(".") for part in real.split("/")):
        risks.append("a component begins with a dot, where programs keep what they run and read")
    strangers = find_strangers(real, itself=False)
    if strangers:
        risks.append("others could put another directory in its place: " + strangers)
    if risks and not accept_risk:
        raise UsageError("path %s: %s; %s, or, if it is really meant: --accept-risk path"
                         % (show_text(real), risks[0], choose))
    return real

def validate_forced_command(words: Sequence[str], path: str, shell: str, language: str = "",
                            munge: bool = False) -> str:
    """Return the forced command; refused where the user's shell might read it differently."""
    plain = "%s; choose a path of letters, digits and /._-"
    if shlex.quote(path) != path and os.path.basename(shell) not in POSIX_SHELLS:
        raise UsageError("path %s: it cannot be quoted safely for the login shell %s" % (
            show_text(path), plain % show_text(shell)))
    if language == "perl" and re.search(r"[^A-Za-z0-9/._+@%:,=-]", path):
        raise UsageError("path %s: the Perl rrsync cannot take it" % plain % show_text(path))
    return format_forced_command(words, path, munge)

def validate_from_pattern(pattern: str) -> str:
    """Return a pattern list for from="..." (sshd(8))."""
    if not re.fullmatch(r"[A-Za-z0-9.:*?!,/_%\[\]-]+", pattern):
        raise UsageError("from %s: it must be host names, addresses or patterns, separated by "
            "commas; see sshd(8)" % show_text(pattern))
    return pattern

def read_key_argument(args: argparse.Namespace) -> PublicKey:
    """Return the public key from --key, --key-file, a pipe, or the terminal."""
    if args.key is not None:
        return validate_public_key(args.key)
    if args.key_file is not None:
        data = read_file(args.key_file, "key file", "name the file of the public key", False)
        return validate_public_key(data.decode("utf-8", "replace"))
    program_on_stdin = sys.argv[0] in ("-", "")
    if not program_on_stdin and not sys.stdin.isatty() and not stat.S_ISCHR(os.fstat(0).st_mode):
        emit("reading the public key from standard input ...", error=True)
        return validate_public_key(sys.stdin.buffer.read(1 << 16).decode("utf-8", "replace"))
    return validate_public_key(ask("Paste the public key (the line that 'offsync init' prints): ",
                                   "give the key: --key 'ssh-ed25519 AAAA...' or --key-file FILE"))

class AuthorizedKeys:
    """~/.ssh/authorized_keys (a symlinked one stays a symlink), and offsync's line for a key."""

    def __init__(self, key: PublicKey) -> None:
        self.path, self.key = os.path.realpath(os.path.expanduser("~/.ssh/authorized_keys")), key
        self.text = self.read()
        self.line = self.edit(None)[1]      # as it is now, "" for none

    def read(self) -> bytes:
        """Return the file's text, b"" where there is none."""
        return read_file(self.path, "authorized_keys", "") if os.path.exists(self.path) else b""

    def edit(self, line: Optional[str]) -> tuple[bytes, str]:
        """Return edit_authorized_keys() of it; a foreign line with the key is refused by number."""
        try:
            return edit_authorized_keys(self.text, self.key, line)
        except ValueError as error:
            raise OffsyncError("%s:%s: this key stands there in a line that offsync did not write, "
                "and sshd uses the first line that has it; remove that line, then try again" % (
                self.path, error)) from None

    def write(self, line: Optional[str]) -> None:
        """Set offsync's line for the key, or remove it for None."""
        new = self.edit(line)[0]
        if new == self.text:
            return
        make_directory(os.path.dirname(self.path), 0o700)
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(directory, fcntl.LOCK_EX)       # against another link
        if self.read() != self.text:
            raise OffsyncError("%s: somebody else changed it at this moment; try again" % self.path)
        mode = stat.S_IMODE(os.stat(self.path).st_mode) if os.path.exists(self.path) else 0o600
        write_atomically(self.path, [new], mode)
        os.close(directory)

def check_own_home() -> pwd.struct_passwd:
    """Return this account; raise if HOME is another's (a scratch one is only warned about)."""
    try:
        account = pwd.getpwuid(os.geteuid())
    except KeyError:
        raise OffsyncError("link: the user ID %d has no account here, so sshd lets nobody log in "
            "as it; run link as one that has" % os.geteuid()) from None
    home = os.path.expanduser("~")
    owner = os.stat(home).st_uid
    if owner not in (0, os.geteuid()):
        raise OffsyncError("HOME %s belongs to %s, and this is %s; run link as that account: sudo "
            "-iu %s offsync link ..." % (home, name_of(owner), account.pw_name, name_of(owner)))
    return account

def sshd_settings(user: str) -> dict[str, list[str]]:
    """Return sshd's settings for a user (sshd -T), {} where it does not tell."""
    with tempfile.TemporaryDirectory(prefix="offsync-") as scratch:
        key = os.path.join(scratch, "key")
        run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key])
        result = run([program("sshd"), "-T", "-h", key, "-C",
                      "user=%s,host=localhost,addr=127.0.0.1" % user], deadline=SESSION_DEADLINE)
    settings: dict[str, list[str]] = {}
    for line in result.stdout.decode("utf-8", "replace").splitlines() if result.status == 0 else ():
        name, *words = line.split() or [""]
        settings.setdefault(name, []).extend(word for word in words if word != key)
    return settings

def account_problem(account: pwd.struct_passwd) -> str:
    """Return what keeps an account from starting rrsync, "" for nothing that is known."""
    shell, user = os.path.basename(account.pw_shell), account.pw_name
    if shell in NO_LOGIN_SHELLS or shell in RESTRICTED_SHELLS:
        return "the login shell %s does not start rrsync; run: chsh -s /bin/sh %s" % (
            account.pw_shell, user)
    try:
        with open("/etc/shadow", encoding="utf-8", errors="replace") as stream:
            line = next(line for line in stream if line.startswith(user + ":"))
        fields = line.rstrip("\n").split(":")
    except (OSError, StopIteration):
        return ""
    if fields[1].startswith("!"):
        return "the account %s is locked, so that sshd without UsePAM refuses it; run: usermod " \
               "-p '*' %s" % (user, user)
    if len(fields) > 7 and fields[7].isdigit() and int(fields[7]) * 86400 < time.time():
        return "the account %s has expired; run as root: chage -E -1 %s" % (user, user)
    return ""

def link_warnings(account: pwd.struct_passwd, sshd: dict[str, list[str]], delivery: str,
                  keys: AuthorizedKeys) -> Iterator[str]:
    """Yield what would make sshd ignore the key, and what is wrong with the delivery directory."""
    home, status = os.path.expanduser("~"), os.stat(delivery)
    if status.st_uid not in (0, account.pw_uid):
        yield "%s belongs to %s, who can change what is delivered" % (
            show_text(delivery), name_of(status.st_uid))
    if not os.access(delivery, os.W_OK):
        yield "%s is not writable for %s; change its owner or mode" % (
            show_text(delivery), account.pw_name)
    if status.st_mode & 0o002 or status.st_mode & 0o020 and group_has_strangers(status.st_gid):
        yield "%s is writable for others, who can change what is delivered; run: chmod go-w %s" % (
            show_text(delivery), shlex.quote(delivery))
    if os.path.realpath(home) != os.path.realpath(account.pw_dir):
        yield "HOME is %s, but sshd reads the account's home %s; run link as the account itself" % (
            home, account.pw_dir)
    for path in (home, os.path.join(home, ".ssh"), keys.path):
        status = os.stat(path)
        if status.st_mode & 0o022 or status.st_uid not in (0, account.pw_uid):
            yield "%s is writable or owned by others: sshd may ignore the key then (StrictModes " \
                  "in sshd_config(5)); run: chmod go-w %s" % (path, shlex.quote(path))
    if account_problem(account):
        yield account_problem(account)
    for line in keys.text.decode("utf-8", "replace").splitlines():
        if keys.key.blob not in line and ' %s",' % shlex.quote(delivery) in line:
            yield "another key may write below %s too (of a second controller?); an old one goes " \
                  "by: offsync unlink" % show_text(delivery)
    second = keys.path + "2"
    blob = keys.key.blob.encode()
    if os.path.exists(second) and blob in read_file(second, "authorized_keys2", ""):
        yield "the key stands in %s too, which some sshd read; remove it there" % second
    if sshd.get("authorizedkeyscommand", ["none"]) not in ([], ["none"]):
        yield "sshd asks AuthorizedKeysCommand before this file; it must not print this key"
    if sshd.get("pubkeyauthentication") == ["no"]:
        yield "sshd has PubkeyAuthentication no; allow it in sshd_config"
    places = [os.path.join(account.pw_dir, place.replace("%h", account.pw_dir).replace("%u",
        account.pw_name)) for place in sshd.get("authorizedkeysfile", [".ssh/authorized_keys"])]
    if os.path.join(account.pw_dir, ".ssh/authorized_keys") not in places:
        yield "sshd reads keys from %s (AuthorizedKeysFile), not from ~/.ssh/authorized_keys; " \
              "copy the line there" % ", ".join(places)

def own_address(settings: dict[str, list[str]]) -> tuple[Optional[int], str]:
    """Return (port of the sshd that will answer, None for 22; its host key's fingerprint or "")."""
    ports, connection = settings.get("port") or ["22"], os.environ.get("SSH_CONNECTION", "").split()
    answering = connection[3] if len(connection) == 4 and connection[3].isdecimal() else ports[0]
    port = None if answering == "22" else int(answering)
    if answering not in ports:              # another sshd than the one whose settings these are
        return port, ""
    paths = [path + ".pub" for path in settings.get("hostkey", [])]
    for path in sorted(paths or glob.glob("/etc/ssh/ssh_host_*_key.pub"),
                       key=lambda path: ("ed25519" not in path, path)):
        with contextlib.suppress(OffsyncError):
            line = read_file(path, "host key", "").decode("utf-8", "replace").strip()
            for key in fingerprints([line]):
                return port, key[1]
    return port, ""

def cmd_link(args: argparse.Namespace) -> int:
    """Install the restricted key on this target and print the controller's command."""
    require_programs("target")
    account, risks, munge = check_own_home(), args.accept_risk or (), args.no_symlinks
    rrsync, words, language = find_rrsync(args.rrsync)
    from_pattern = "" if args.from_pattern is None else validate_from_pattern(args.from_pattern)
    state, module = Home(), globals().get("__file__", "")
    protected = [rrsync, state.config, state.key, state.known_hosts, state.log, state.plans,
        state.last, *filter(os.path.exists, (sys.argv[0], module))]
    if os.path.exists(module):              # not "<stdin>"
        protected.append(os.path.join(os.path.dirname(module), "__pycache__"))
    named = os.path.expanduser("~/.offsync/sync") if args.path is None else args.path
    path = validate_link_path(named, protected, "path" in risks)
    forced = validate_forced_command(words, path, account.pw_shell, language, munge)
    key = read_key_argument(args)
    keys = AuthorizedKeys(key)
    if "rrsync" in risks:
        warn("accepted: a thief of the key may get out of %s through a symlink" % show_text(path))
    else:
        probe_rrsync(words, munge)
    kept = re.match(r'from="([^"]*)",', keys.line)
    if kept and args.from_pattern is None:  # a repeated link never lets in more than before
        from_pattern = kept[1]
        emit('kept from="%s" of the line that is here; to drop it: offsync unlink, then link again'
             % from_pattern, error=True)
    line = format_authorized_key(forced, key, from_pattern)
    try:
        make_directory(path, 0o755)
    except OffsyncError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        raise OffsyncError("path %s: you may not create it; run as root: install -d -o %s %s; then "
            "link again" % (show_text(path), account.pw_name, shlex.quote(path))) from None
    keys.write(line)
    before, after = (re.sub('^from="[^"]*",', "", text).split(KEY_RESTRICTIONS)[0]
                     for text in (keys.line, line))
    if before not in ("", after):
        warn("this key was linked in another way before, which is replaced: what it could write to "
            "then can no longer be delivered to: " + show_text(before))
    done = "already linked" if keys.line == line else "linked"
    emit("%s in %s: the key may write below %s, nothing else" % (
        done, keys.path, show_text(path)), error=True)
    settings = sshd_settings(account.pw_name)
    for warning in link_warnings(account, settings, path, keys):
        warn(warning)
    port, host_key = own_address(settings)
    target = Target("%s@%s" % (account.pw_name, os.uname().nodename), path, rrsync, port, not munge)
    emit("Now run this on the controller, unless it knows this target (with the name by which "
         "it reaches this host; port and fingerprint are those of the system's sshd):", error=True)
    fingerprint = " --host-key " + host_key if host_key else ""
    emit("offsync target add " + target.add_arguments + fingerprint)
    return 0

def cmd_unlink(args: argparse.Namespace) -> int:
    """Remove the key's entry from authorized_keys."""
    check_own_home()
    keys = AuthorizedKeys(read_key_argument(args))
    keys.write(None)
    what = "removed the key from" if keys.line else "the key has no entry in"
    emit("%s %s" % (what, keys.path), error=True)
    return 0


# --- Host keys, proofs and target add -----------------------------------------------------------

# Asks for the host key without authenticating and without a session: safe against whoever answers.
SSH_FETCH_HOST_KEY = (*SSH_QUIET, *SSH_ALONE, "-N", "-o", "StrictHostKeyChecking=no",
                      "-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=none",
                      "-o", "GlobalKnownHostsFile=none")
HOST_KEY_FAMILIES = ("ssh-ed25519", "ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521",
                     "rsa-sha2-512,rsa-sha2-256,ssh-rsa")
KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts",
               "/etc/ssh/ssh_known_hosts2")

def blobs(lines: Iterable[str]) -> set[tuple[str, ...]]:
    """Return (type, key) of known_hosts lines, markers left out."""
    return {tuple(line.split()[1:3]) for line in lines}

def describe_keys(lines: Iterable[str]) -> str:
    """Return the fingerprints of known_hosts lines."""
    return ", ".join(sorted({"%s (%s)" % key[1:] for key in fingerprints(lines)})) or "none"

def fetch_host_keys(connection: Connection, wanted: str = "") -> list[str]:
    """Return the known_hosts lines of the target's host keys, one a type, as ssh gets them.

    ssh connects on its own route, so ProxyJump, HostKeyAlias and Port of ssh_config hold
    (ssh-keyscan knows none). Ends with the key that has the wanted fingerprint: sshd 9.8 and newer
    punishes connections that do not log in.
    """
    shared, target, lines = connection.shared, connection.target, []
    path = os.path.join(shared.scratch, "fetched-%d" % next(shared.numbers))
    asking = Connection(shared, target, path)
    for family in HOST_KEY_FAMILIES:        # ssh takes the first value of each option
        for delay in (*RETRY_DELAYS, None):
            result = run([shared.ssh, *SSH_FETCH_HOST_KEY, "-o", "HostKeyAlgorithms=" + family,
                          *asking.options(), *asking.destination()], deadline=CONNECT_DEADLINE)
            kind = diagnose(target, result.stderr).kind
            if os.path.exists(path) or kind != "busy-sshd" or delay is None:
                break
            STOP.wait(delay)
        if os.path.exists(path):
            text = read_file(path, "host key", "").decode("utf-8", "replace")
            lines += [line.strip() for line in text.splitlines() if line.strip()]
            os.unlink(path)
        elif not lines and kind not in ("algorithms", "key-refused", "other"):
            break                           # it does not answer at all
        if wanted and any(key[1] == wanted for key in fingerprints(lines)):
            break
    if not lines:
        raise explain_failed_login(asking, result, True) or diagnose(target, result.stderr)
    for revoked, place in known_lines(shared, lines[0].split()[0], "@revoked"):
        if blobs([revoked]) & blobs(lines):
            raise failure(target, "revoked", "%s in %s" % (describe_keys([revoked]), place))
    return lines

def known_lines(shared: Run, name: str, marker: str = "") -> list[tuple[str, str]]:
    """Return (known_hosts line without its marker, its file) of a host; asks ssh-keygen."""
    found = []
    for path in (shared.home.known_hosts, *map(os.path.expanduser, KNOWN_HOSTS)):
        if os.path.exists(path):
            words = [program("ssh-keygen"), "-F", name, "-f", path]
            text = run(words, deadline=SESSION_DEADLINE).stdout.decode("utf-8", "replace")
            for line in text.splitlines():
                has_marker = line.split(" ")[0] if line.startswith("@") else ""
                if line and not line.startswith("#") and has_marker == marker:
                    found.append((line[len(marker):].strip(), path))
    return found

def explain_host_key(connection: Connection, error: TargetError) -> Optional[TargetError]:
    """Return the error for a host key that ssh did not accept, with what is known and shown.

    None where a known key is among those shown: ssh only asked for another type first, as
    HostKeyAlgorithms of ssh_config can make it do; the connection now asks for the known one.
    """
    shared, target = connection.shared, connection.target
    if connection.key_types:
        return error
    try:
        shown = fetch_host_keys(connection)
    except OffsyncError as problem:
        return problem if isinstance(problem, TargetError) and problem.kind == "revoked" else error
    if connection.known_hosts:
        data = read_file(connection.known_hosts, "known_hosts", "")
        known = data.decode("utf-8", "replace").splitlines()
    else:
        known = [line for line, _ in known_lines(shared, shown[0].split()[0])]
    trusted = blobs(shown) & blobs(known)
    for family in HOST_KEY_FAMILIES:
        if trusted and min(trusted)[0] in family.split(","):
            connection.key_types = family
            if not connection.known_hosts:
                warn("%s: HostKeyAlgorithms in ssh_config asks for another type of host key than "
                    "the known one (%s), which is used" % (target.login, min(trusted)[0]))
            return None
    if error.kind == "host-key-unknown" or not known:
        return error
    return failure(target, "host-key-changed", "known %s; shown now %s" % (
        describe_keys(known), describe_keys(shown)))

def has_route(connection: Connection) -> str:
    """Return how ssh_config leads to the target ("ProxyJump bastion"), "" if directly."""
    result = run([connection.shared.ssh, *connection.options(), "-G", *connection.destination()],
                 deadline=SESSION_DEADLINE)
    for line in result.stdout.decode("utf-8", "replace").splitlines():
        name, _, value = line.partition(" ")
        if name in ("proxyjump", "proxycommand") and value != "none":
            return ("ProxyJump " if name == "proxyjump" else "ProxyCommand ") + show_text(value)
    return ""

def explain_failed_login(connection: Connection, result: Result,
                         last: bool) -> Optional[TargetError]:
    """Return what a connection that did not open meant; None where it may be tried again at once.

    With ControlPersist ssh hides what a jump host says, and at LogLevel ERROR much of what sshd
    says: so it is asked once more, alone and at INFO, where the first answer tells too little.
    """
    target, error = connection.target, diagnose(connection.target, result.stderr)
    if result.status is None:
        return failure(target, "timeout")
    if error.kind in ("host-key-changed", "host-key-unknown"):
        return explain_host_key(connection, error)
    if error.kind not in ("other", "busy-sshd", "lost"):
        return error
    route = has_route(connection)
    if error.kind == "busy-sshd" and not route and not last:
        return error                        # it is tried again first
    again = run([connection.shared.ssh, "-o", "LogLevel=INFO", *SSH_ALONE, *connection.options(),
                 *connection.destination(), PROOF_COMMAND], stdin=subprocess.PIPE,
                env={"HOME": os.path.expanduser("~"), "PATH": os.environ.get("PATH", os.defpath),
                     "LC_ALL": "C"},
                deadline=CONNECT_DEADLINE)  # SendEnv of ~/.ssh/config finds nothing to send
    talking = diagnose(target, again.stderr)
    before_sshd = (b"kex_exchange_identification", b"UNKNOWN port")
    if route and any(words in again.stderr for words in before_sshd):
        if talking.kind == "busy-sshd" and not last:
            return talking                  # no word of the jump host's: it is tried again, too
        return failure(target, "route", "%s: %s" % (route, quote_answer(again.stderr)))
    return error if talking.kind == "other" and not again.stderr.strip() else talking

def choose_host_keys(target: Target, lines: Sequence[str], wanted: Optional[str]) -> list[str]:
    """Return the lines to store: the wanted fingerprint's, or all after a typed "yes"."""
    described = [(line, describe_keys([line])) for line in lines]
    if wanted:
        chosen = [line for line, text in described if text.split(" ")[0] == wanted]
        if not chosen:
            raise OffsyncError("%s: its host key is NOT the expected one; somebody else may answer "
                "there: compare with what 'offsync link' printed on the target's console: expected "
                "%s, it shows %s" % (target.login, wanted, describe_keys(lines)))
        return chosen
    emit("The host key of %s is not trusted yet. It shows:" % target.login, error=True)
    for _, text in described:
        emit("  " + text, error=True)
    emit("Compare with what 'offsync link' printed on the target's own console.", error=True)
    answer = ask("Trust %s? Type yes or no: " % ("this key" if len(lines) == 1 else "these keys"),
        "give the fingerprint that 'offsync link' printed on the target: --host-key SHA256:...")
    if answer != "yes":
        raise OffsyncError("%s: the host key was not confirmed (only a full \"yes\" does); nothing "
            "was saved" % target.login)
    return list(lines)

def store_host_keys(shared: Run, lines: Sequence[str]) -> None:
    """Put these lines into known_hosts in place of those of their host, hashed ones too."""
    path, old = os.path.join(shared.scratch, "known_hosts"), b""
    if os.path.exists(shared.home.known_hosts):
        shutil.copyfile(shared.home.known_hosts, path)
        removed = run([program("ssh-keygen"), "-R", lines[0].split()[0], "-f", path])
        if removed.status != 0:             # the old key would go on being trusted
            raise OffsyncError("known_hosts %s: ssh-keygen cannot edit it; mend that, then try "
                "again (it said: %s)" % (shared.home.known_hosts, quote_answer(removed.stderr)))
        old = read_file(path, "known_hosts", "")
    if old and not old.endswith(b"\n"):
        old += b"\n"
    new = "".join(line + "\n" for line in lines).encode()
    write_atomically(shared.home.known_hosts, [old, new], 0o600)

def connect_trusted(shared: Run, target: Target,
                    wanted: Optional[str]) -> tuple[Connection, list[str]]:
    """Return (a connection, the host keys to store: none if trusted already). Asks if it must."""
    connection = Connection(shared, target)
    if not wanted:
        try:
            connection.open()
            return connection, []
        except TargetError as error:
            if error.kind not in ("host-key-unknown", "host-key-changed"):
                raise
            if error.kind == "host-key-changed":
                warn(str(error))
    trusted = choose_host_keys(target, fetch_host_keys(connection, wanted or ""), wanted)
    path = os.path.join(shared.scratch, "trusted")      # for this connection, until it is proved
    write_atomically(path, ["".join(line + "\n" for line in trusted).encode()], 0o600)
    connection = Connection(shared, target, path)
    connection.open()
    return connection, trusted

class Proof(NamedTuple):
    """One thing that was tried on a target; closed is None where it could not be told."""
    tried: str
    closed: Optional[bool]
    answer: str

def prove_forwarding(connection: Connection) -> list[Proof]:
    """Try to reach the target's own network through a connection of its own; return what is told.

    ssh -v shows what sshd says of the key's options when it authenticates (auth_debug in OpenSSH):
    agent forwarding leaves no other trace that can be seen from here. dropbear says nothing of it.
    """
    result = run([connection.shared.ssh, *SSH_ALONE, "-v", "-o", "LogLevel=DEBUG1",
                  *connection.options(), "-W", "127.0.0.1:%d" % (connection.target.port or 22),
                  *connection.destination()], deadline=CONNECT_DEADLINE)
    told = [line.split(b"key options:")[1].split() for line in result.stderr.split(b"\n")
            if b"Remote: " in line and b"key options:" in line][-1:]    # a jump host's come before
    agent = b"agent-forwarding" not in told[0] if told else None
    port: Optional[bool] = None
    if result.stdout or told and b"port-forwarding" in told[0]:
        port = False
    elif told or b"administratively prohibited" in result.stderr:
        port = True
    answers = {True: "refused", False: "allowed", None: "sshd does not tell"}
    return [Proof("forward a port", port, answers[port]),
            Proof("forward an agent", agent, answers[agent])]

def prove_all(connection: Connection) -> list[Proof]:
    """Try all that the key must not do, and that it can write; no file is sent."""
    connection.prove_restricted()
    empty, marker = connection.shared.empty, os.urandom(8).hex()
    dry: dict[str, Any] = {"source": empty, "deadline": SESSION_DEADLINE}
    read = connection.session((), "cat /etc/passwd").stdout
    *shell, files = connection.rsync_words(".")
    pulled = run([connection.shared.rsync, "-n", "-r", *shell, files, empty + b"/"],
                 deadline=SESSION_DEADLINE, env=environment(rsync=True)).status
    above = connection.rsync(("-n", "-r"), path="../" + marker, **dry)
    inside = above.status == 0 or marker.encode() + b'"' in above.stderr
    # With a terminal the refusal would come back on stdout, since a terminal has one stream only.
    terminal = connection.session(("-tt",), PROOF_COMMAND).stdout.strip()
    proofs = [Proof("run a command", True, "refused"),
              Proof("read a file with cat", not read, quote_answer(read) or "refused"),
              Proof("read files with rsync", None if pulled is None else pulled != 0,
                    {None: "it did not answer", 0: "it sends them"}.get(pulled, "refused")),
              Proof("write to a path outside", True, prove_path(connection)),
              Proof("write to .. of the path", not inside, "accepted" if inside else "refused"),
              Proof("get a terminal (PTY)", not terminal, "given" if terminal else "refused"),
              *prove_forwarding(connection)]
    written = connection.rsync(("-n", "-r"), **dry)
    if written.status != 0:                 # a dead connection would have "refused" it all
        raise diagnose(connection.target, written.stderr)
    return [*proofs, Proof("write below the path (dry run)", True, "possible")]

def cmd_target_add(args: argparse.Namespace) -> int:
    """Prove trust and restriction of a target, then save it."""
    require_programs("controller")
    rrsync = validate_absolute_path(args.rrsync, "rrsync") if args.rrsync else DEFAULT_RRSYNC
    port = validate_port(args.port) if args.port is not None else None
    target = Target(validate_login(args.login), validate_absolute_path(args.path, "path"), rrsync,
        port, not args.no_symlinks)
    if args.host_key is not None and not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", args.host_key):
        raise UsageError("host key %s: it must be SHA256: and 43 characters, as 'offsync link' and "
                         "ssh-keygen -l print it" % show_text(args.host_key))
    home = Home()
    home.lock("target add")
    config = home.load()
    others = [other for other in config.targets if other.login != target.login]
    known = [other for other in config.targets if other.login == target.login]
    if known and known != [target]:
        warn("%s is configured already, and will be replaced: it was %s; to have both, give one of "
            "them a Host alias in ~/.ssh/config" % (target.login, known[0].add_arguments))
    with Run(home, config) as shared:
        connection, trusted = connect_trusted(shared, target, args.host_key)
        proofs = prove_all(connection)
        found = ["%s: %s" % proof[::2] for proof in proofs if proof.closed is False]
        if found:
            raise failure(target, "open", "; ".join(found))
        if trusted:
            store_host_keys(shared, trusted)
    home.replace_in_config("targets", format_targets([*others, target]))
    emit("%s %s: the key is restricted to writing below %s (%s); next: offsync plan"
         % ("updated" if known else "added", target.login, show_text(target.remote_path),
            plural(sum(proof.closed is True for proof in proofs), "proof")))
    return 0


# --- System packages ----------------------------------------------------------------------------

RSYNC_OLDEST = (3, 1, 2)                    # the first with rrsync -wo
# macOS ships openrsync as rsync.
BREW_RSYNC = ("/opt/homebrew/bin/rsync", "/usr/local/bin/rsync",
              "/home/linuxbrew/.linuxbrew/bin/rsync")

class PackageManager(NamedTuple):
    """How one package manager installs what each role needs (names separated by blanks)."""
    install: str
    controller: str
    target: str
    extra: str = ""                         # best effort, alone: one unknown name fails a call
    refresh: str = ""                       # before that; may fail
    older: bool = False                     # older releases have one package openssh for both roles
    sudo: bool = True
    hint: str = ""


CLIENTS, SERVER = "openssh-clients rsync", "openssh-server rsync python3"
PACKAGE_MANAGERS = {                        # in order of preference; brew last: Linux has it too
    "apt-get": PackageManager(
        "env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends",
        "openssh-client rsync", SERVER, refresh="apt-get update"),
    "dnf": PackageManager("dnf -y install", CLIENTS, SERVER, "rsync-rrsync"),
    "yum": PackageManager("yum -y install", CLIENTS, SERVER, "rsync-rrsync"),
    "pacman": PackageManager("pacman -S --needed --noconfirm", "openssh rsync",
                             "openssh rsync python",
                             hint="if a package was not found (404), run: pacman -Syu"),
    "zypper": PackageManager("zypper --non-interactive install --no-recommends", CLIENTS, SERVER,
                             older=True),
    "apk": PackageManager("apk add --no-cache", "openssh-client openssh-keygen rsync",
                          "openssh-server rsync rrsync"),
    "brew": PackageManager("brew install", "rsync", "rsync", sudo=False,
                           hint="sshd is System Settings > General > Sharing > Remote Login")}

def parse_rsync_version(output: bytes) -> Optional[tuple[int, int, int]]:
    """Return the version that "rsync --version" prints, None for openrsync and unknown programs."""
    pattern = rb"rsync\s+version\s+v?(\d+)\.(\d+)\.(\d+)\S*\s+protocol version \d+"
    match = None if b"openrsync" in output else re.search(pattern, output[:4096])
    return (int(match[1]), int(match[2]), int(match[3])) if match else None

def find_rsync() -> tuple[str, tuple[int, int, int]]:
    """Return (path, version) of a real rsync: $OFFSYNC_RSYNC, PATH's or brew's."""
    named = os.environ.get("OFFSYNC_RSYNC")
    places = [named] if named else [shutil.which("rsync"), *BREW_RSYNC]
    problem = "%s, which OFFSYNC_RSYNC names, is no program" % show_text(named) if named \
        else "the program is not installed"
    for path in places:
        if path and shutil.which(path):
            printed = run([path, "--version"], deadline=SESSION_DEADLINE, env=environment(True))
            version = parse_rsync_version(printed.stdout)
            if version and version >= RSYNC_OLDEST:
                return path, version
            problem = "%s is %s" % (show_text(path), "rsync %d.%d.%d, too old" % version if version
                                    else "openrsync or no rsync at all")
    raise OffsyncError("rsync: %s; offsync needs rsync %d.%d.%d or newer: run offsync "
        "install-deps, or set OFFSYNC_RSYNC" % (problem, *RSYNC_OLDEST))

def missing_programs(role: str) -> dict[str, str]:
    """Return the programs that a role needs and that are not here, each with what is wrong."""
    checks: dict[str, Callable[[], Any]] = {"rsync": find_rsync}
    checks["ssh-keygen"] = lambda: program("ssh-keygen")
    if role != "target":
        checks["ssh"] = lambda: program("ssh")
    if role != "controller":
        checks.update({"sshd": lambda: program("sshd"), "rrsync": lambda: find_rrsync(None)})
    missing = {}
    for name, check in checks.items():
        try:
            check()
        except OffsyncError as error:
            missing[name] = str(error)
    return missing

def install_commands(name: str, role: str) -> list[list[list[str]]]:
    """Return the steps that install what a role needs; of each, commands to try in turn."""
    manager = PACKAGE_MANAGERS[name]
    sudo = ["sudo"] if manager.sudo and os.geteuid() != 0 else []
    install = sudo + manager.install.split()
    wanted = {"controller": manager.controller, "target": manager.target}.get(
        role, manager.controller + " " + manager.target)
    packages = list(dict.fromkeys(wanted.split()))
    steps = [[sudo + manager.refresh.split()]] if manager.refresh else []
    steps.append([install + packages])
    if manager.older:
        older = ["openssh" if package.startswith("openssh") else package for package in packages]
        steps[-1].append(install + list(dict.fromkeys(older)))
    if manager.extra and role != "controller":
        steps.append([install + manager.extra.split()])
    return steps

def install_dependencies(role: str, assume_yes: bool) -> None:
    """Install what a role needs, after showing how and asking. Raises if any is missing then."""
    missing = missing_programs(role)
    if not missing:
        emit("install-deps: everything for the role %s is here" % role, error=True)
        return
    name = next((name for name in PACKAGE_MANAGERS if shutil.which(name)), None)
    if not name:
        raise OffsyncError("install-deps: missing: %s, and no known package manager (%s) is here; "
            "install OpenSSH and rsync with rrsync by hand" % (", ".join(missing), ", ".join(
            PACKAGE_MANAGERS)))
    steps = install_commands(name, role)
    emit("install-deps: missing here: %s. These commands install it:" % ", ".join(missing), True)
    for step in steps:
        emit("  " + "\n  or, if that fails: ".join(map(shlex.join, step)), error=True)
    if steps[0][0][0] == "sudo" and not shutil.which("sudo"):
        here = "offsync" if shutil.which("offsync") else "python3 " + shlex.quote(
            os.path.realpath(sys.argv[0]))
        raise OffsyncError("install-deps: this account is not root, and there is no sudo; have "
            "root run: %s install-deps --role %s -y" % (here, role))
    if not assume_yes and ask("Run them now? Type y or n: ", "repeat with -y to run them without a "
                              "question") not in ("y", "yes"):
        raise OffsyncError("install-deps: nothing was installed; missing: %s" % ", ".join(missing))
    for step in steps:                      # what is missing afterwards tells whether it worked
        any(run(command, shown=True).status == 0 for command in step)
    still = missing_programs(role)
    if still:
        raise OffsyncError("install-deps: still missing: %s; %s" % (", ".join(still), (
            PACKAGE_MANAGERS[name].hint or "look at what %s printed above" % name)))
    if "sshd" in missing and name != "apt-get":
        start = "rc-update add sshd default && rc-service sshd start" if name == "apk" \
            else "systemctl enable --now sshd"
        emit("install-deps: now start sshd, for example: " + start, error=True)

def require_programs(role: str) -> None:
    """Raise for what a role needs and is not here, but for rrsync: link says more of that."""
    missing = missing_programs(role)
    missing.pop("rrsync", None)
    if list(missing) == ["rsync"]:          # openrsync, too old, or OFFSYNC_RSYNC names another
        raise OffsyncError(missing["rsync"])
    if missing:
        raise OffsyncError("%s: not installed; run: offsync install-deps --role %s" % (
            ", ".join(missing), role))

def cmd_install_deps(args: argparse.Namespace) -> int:
    """Install system packages."""
    install_dependencies(args.role, args.yes)
    return 0


# --- config.yaml: a strict subset of YAML -------------------------------------------------------

# What is accepted means the same to any YAML 1.1 or 1.2 parser; the rest is refused by line:
# top-level "key: value", lists of scalars, lists of mappings, comments. One line of it:
YAML_LINE = re.compile(
    r"(?P<indent> *)(?P<dash>- +)?"
    r"(?:(?!(?i:y|n|yes|no|on|off|true|false|null):)(?P<key>[A-Za-z_][A-Za-z0-9_]*):(?: +|$))?"
    # In double quotes, the escapes that JSON and every YAML share; no surrogates.
    r'(?P<value>"(?:[^"\\\t]|\\["\\bfnrt]|\\u(?![dD][89A-Fa-f])[0-9A-Fa-f]{4})*"'
    r"|'(?:[^'\t]|'')*'|\[ *\]|[A-Za-z0-9/][A-Za-z0-9_./@+-]*)?(?:(?:^|(?<= )| +)#.*)? *")
YAML_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]")
# Plain words that some YAML parser takes for a boolean, a null or a merge.
YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")

class YamlError(ValueError):
    """config.yaml is not in our subset; line counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line

class Node(NamedTuple):
    """A value of config.yaml: a scalar, or a list or dict of nodes; the line where it begins."""
    value: Any
    line: int

def parse_yaml_value(text: str) -> Any:
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
    if text[0].isdigit() or text.lower() in YAML_WORDS:
        raise ValueError("%s is not supported; write true, false, a decimal number, or text in "
                         "quotes" % text)
    return text

def add_pair(mapping: dict[str, Node], key: str, node: Node) -> None:
    """Add a pair to a mapping. Raises ValueError for a second one of its key."""
    if key in mapping:
        raise ValueError("the key %s stands here for the second time" % key)
    mapping[key] = node

def parse_yaml(text: str) -> dict[str, Node]:
    """Return the nodes of a document. Raises YamlError for whatever is not in the subset."""
    nodes: dict[str, Node] = {}
    opened: Optional[Node] = None           # the open list
    dash = keys = -1                        # the columns of its dashes, and of its last item's keys
    number = 0
    try:
        for number, line in enumerate(text.split("\n"), 1):
            match = YAML_LINE.fullmatch(line)
            bad = YAML_FORBIDDEN.search(line)
            if bad or not match:
                raise ValueError("the character U+%04X is not allowed" % ord(bad[0]) if bad else
                                 "unsupported syntax or value; put text in double quotes, as JSON")
            indent, key, value = len(match["indent"]), match["key"], match["value"]
            node = None if value is None else Node(parse_yaml_value(value), number)
            if match["dash"]:
                if opened is None or opened.value and indent != dash:
                    raise ValueError("a list item where none is expected; indent all items alike")
                if node is None:
                    raise ValueError("an empty list item")
                dash, keys = indent, match.start("key") if key else -1
                opened.value.append(Node({key: node}, number) if key else node)
            elif not key:
                if value is not None:
                    raise ValueError('expected "key: value"')
            elif indent == 0:
                opened = None if node else Node([], number)
                add_pair(nodes, key, node or opened or Node(None, number))
            elif node and opened and opened.value and indent == keys:
                add_pair(opened.value[-1].value, key, node)
            else:
                raise ValueError("unexpected indentation, or no value")
        for key, node in nodes.items():
            number = node.line
            if node.value == [] and "[" not in text.split("\n")[number - 1].split("#")[0]:
                raise ValueError(key + ": has no value; write [] for an empty list")
    except ValueError as error:
        raise YamlError(number, str(error)) from None
    return nodes

def format_yaml(value: Any) -> str:
    """Return a scalar as any YAML parser reads it back; ours hold nothing that YAML forbids."""
    return json.dumps(value, ensure_ascii=False)

def format_targets(targets: Sequence[Target]) -> list[str]:
    """Return the block "targets" of config.yaml."""
    lines = ["targets:"] if targets else ["targets: []"]
    for target in targets:
        values = {"login": target.login, "user": target.user, "host": target.host,
                  "remote_path": target.remote_path, "rrsync": target.rrsync, "port": target.port,
                  "symlinks": None if target.symlinks else False}
        pairs = ["%s: %s" % (key, format_yaml(value))
                 for key, value in values.items() if value is not None]
        lines += ["  %s %s" % (" " if index else "-", pair) for index, pair in enumerate(pairs)]
    return lines

def format_new_config(source: str) -> str:
    """Return the config that init writes."""
    return ('version: 1\nsource: %s\ndelete: false\noverwrite: true\nverify: "hash"\nexclude:\n'
            '  - ".git/"\ntargets: []\n' % format_yaml(source))

def replace_block(text: str, key: str, block: Sequence[str]) -> str:
    """Return config text with one top-level key's lines replaced; all else stays."""
    lines, node = text.split("\n"), parse_yaml(text)[key]
    last = node.line
    for item in node.value if isinstance(node.value, list) else ():
        pairs = item.value.values() if isinstance(item.value, dict) else ()
        last = max([item.line, *(pair.line for pair in pairs)])
    lines[node.line - 1:last] = block
    return "\n".join(lines)


LOGIN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@+\\-]*\$?@"
                   r"(?:\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)",
                   re.ASCII)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")

def validate_login(login: str) -> str:
    """Return a login: user@host, an IPv6 address in brackets."""
    if not LOGIN.fullmatch(login) or len(login) > 200:      # it is the name of a file, too
        raise UsageError("login %s: it is not of the form user@host (user@[address] for IPv6; a "
            "port goes into --port)" % show_text(login))
    return login

def validate_absolute_path(path: str, what: str) -> str:
    """Return the path normalised; absolute, without control characters and undecodable bytes."""
    if not path.startswith("/") or CONTROL.search(path) or len(os.fsencode(path)) > 4000:
        raise UsageError("%s %s: it must be an absolute path in UTF-8, of at most 4000 bytes, "
            "without control characters" % (what, show_text(path)))
    return posixpath.normpath("/" + path.lstrip("/"))

def validate_port(port: Any) -> int:
    """Return a TCP port number."""
    if not re.fullmatch("[1-9][0-9]{0,4}", str(port)) or int(port) > 65535:
        raise UsageError("port %s: it must be a number from 1 to 65535" % show_text(str(port)))
    return int(port)

class Rule(NamedTuple):
    """What a key of config.yaml must be; accept returns false or raises for a wrong value."""
    what: str
    type: type
    default: Any                            # ... where the key is required
    accept: Callable[[Any], Any] = lambda value: True


def is_plain(path: str) -> bool:
    """Return whether an absolute path is in its simplest form; raises UsageError if it is none."""
    return validate_absolute_path(path, "path") == path


BOOLEAN, PATH = "true or false", "an absolute path without .. and double or trailing slashes"
TOP_KEYS = {
    "version": Rule("the number 1", int, ..., lambda number: number == 1),
    "source": Rule("an absolute path", str, ..., lambda path: validate_absolute_path(path, "")),
    "delete": Rule(BOOLEAN, bool, False),
    "overwrite": Rule(BOOLEAN, bool, True),
    "verify": Rule('"hash", "strong" or "quick"', str, "hash", lambda word: word in RSYNC_PLAN),
    "exclude": Rule("a list of rsync patterns", list, [Node(".git/", 0)]),
    "jobs": Rule("a number from 1 to 1000", int, 8, lambda number: 1 <= number <= 1000),
    "bwlimit": Rule("a number of KiB/s", int, 0),
    "compress": Rule(BOOLEAN, bool, False),
    # A large file is hashed in silence: hours.
    "timeout": Rule("a number of seconds, 60 or more", int, 10800, lambda number: number >= 60),
    "max_delete": Rule("a number of percent from 0 to 100", int, 50, lambda number: number <= 100),
    "targets": Rule("a list of targets, or []", list, ...)}
TARGET_KEYS = {
    "login": Rule("user@host (user@[address] for IPv6)", str, ..., validate_login),
    "user": Rule("the user of login", str, ...),
    "host": Rule("the host of login", str, ...),
    "remote_path": Rule(PATH, str, ..., is_plain),
    "rrsync": Rule(PATH, str, DEFAULT_RRSYNC, is_plain),
    "port": Rule("a number from 1 to 65535", int, None, validate_port),
    "symlinks": Rule(BOOLEAN, bool, True)}

def validate_config(text: str, filename: str) -> Config:
    """Return the config; every refusal names file, line and what is allowed."""
    def refuse(line: int, message: str) -> NoReturn:
        raise UsageError("%s:%d: %s; correct that" % (filename, line, message))

    def values_of(nodes: dict[str, Node], rules: dict[str, Rule], first: int) -> dict[str, Any]:
        """Return the values of a mapping, defaults included."""
        for key, node in nodes.items():
            if key not in rules:
                refuse(node.line, "the key %s is unknown; known here are %s" % (
                    key, ", ".join(rules)))
        values = {}
        for key, rule in rules.items():
            if key not in nodes and rule.default is ...:
                refuse(first, 'the key "%s" is missing; it is %s' % (key, rule.what))
            values[key] = nodes[key].value if key in nodes else rule.default
            fine = key not in nodes
            with contextlib.suppress(UsageError):
                fine = fine or type(values[key]) is rule.type and rule.accept(values[key])
            if not fine:
                refuse(nodes[key].line, "%s must be %s" % (key, rule.what))
        return values

    try:
        nodes = parse_yaml(text)
    except YamlError as error:
        refuse(error.line, str(error))
    values = values_of(nodes, TOP_KEYS, 1)
    for node in values["exclude"]:
        if type(node.value) is not str or node.value in ("", "!") or CONTROL.search(node.value):
            refuse(node.line, "exclude takes rsync patterns as text")
    targets: dict[str, Target] = {}
    for node in values["targets"]:
        if not isinstance(node.value, dict):
            refuse(node.line, "a target is a list of keys: " + ", ".join(TARGET_KEYS))
        fields = values_of(node.value, TARGET_KEYS, node.line)
        user, host = fields.pop("user"), fields.pop("host")
        target = Target(**fields)
        if (target.user, target.host) != (user, host):
            refuse(node.value["login"].line, "login, user and host disagree; login is user@host")
        if target.login in targets:
            refuse(node.line, "the target %s stands here for the second time" % target.login)
        targets[target.login] = target
    del values["version"]
    values["exclude"] = tuple(node.value for node in values["exclude"])
    values["targets"] = tuple(targets.values())
    return Config(**values)


# --- Output -------------------------------------------------------------------------------------

class Progress:
    """One line for each thing that is being done, on a terminal's stderr; nothing anywhere else."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.texts: dict[str, tuple[str, float]] = {}       # name -> what is being done, since when
        self.drawn: list[str] = []
        self.last = time.monotonic() + 0.3  # when it was drawn; what takes less needs no line

    def enabled(self) -> bool:
        """Return whether stderr is a terminal that can move its cursor."""
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        return sys.stderr.isatty() and not dumb and not VERBOSE.is_set()

    def update(self, name: str, text: Optional[str]) -> None:
        """Show what is done for a target, its first word being the phase; None ends its line."""
        if self.enabled():
            with self.lock:
                before, since = self.texts.pop(name, ("", 0.0))
                if text is not None:
                    same_phase = before.split(" ")[0] == text.split(" ")[0]
                    self.texts[name] = (text, since if same_phase else time.monotonic())
                self.tick(0.1 if text else 0)

    def show_rsync(self, name: str, total: int, line: bytes) -> None:
        """Show the progress that rsync prints; a target can write it too: it is only shown."""
        pattern = rb" *([0-9][0-9,.]{0,30}) +[0-9]+% +([0-9.,]{1,12})([kMGT]?B/s)"
        match = re.match(pattern, line[:100])
        if match:                           # it divides by 1024 (progress.c)
            percent = 100 * int(re.sub(rb"[,.]", b"", match[1])) // max(total, 1)
            rate = match[2].decode() + " " + match[3].decode().replace("k", "K").replace("B", "iB")
            self.update(name, "sending %d%% of %s at %s" % (
                min(percent, 100), format_bytes(total), rate))

    def tick(self, interval: float = 0.5) -> None:
        """Draw all lines again if the last time was the interval (seconds) ago."""
        now = time.monotonic()
        if (self.texts or self.drawn) and now >= self.last + interval:
            with self.lock:
                self.last, lines = now, []
                for name, (text, since) in sorted(self.texts.items()):
                    elapsed = ", %d s elapsed" % (now - since) if now - since >= 2 else ""
                    lines.append("%s: %s%s" % (name, text, elapsed))
                self.draw(lines)

    def draw(self, lines: list[str]) -> None:
        """Draw lines in place of those drawn before, cut to the terminal; [] takes them away."""
        try:
            columns, rows = (number or 80 for number in os.get_terminal_size(sys.stderr.fileno()))
        except OSError:
            columns, rows = 80, 24
        if len(lines) > rows - 2:
            lines = [*lines[:max(rows - 3, 1)], "... and %d more" % (len(lines) - max(rows - 3, 1))]
        with self.lock:                     # a narrower window has wrapped what was drawn
            up = sum(max(-(-len(line) // columns), 1) for line in self.drawn)
            self.drawn = [line[:columns - 1] for line in lines]
            text = "\x1b[%dA\r\x1b[J" % up if up else ""
            with contextlib.suppress(OSError):      # a terminal that is gone is no error
                sys.stderr.write(text + "".join(line + "\n" for line in self.drawn))
                sys.stderr.flush()


PROGRESS = Progress()
LOST_OUTPUT: list[str] = []                 # why stdout failed: said at the end, the work goes on

def emit(text: Union[str, bytes], error: bool = False) -> None:
    """Print a line, or bytes: a result on stdout, else on stderr. A reader who left is no error."""
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

def emit_lines(lines: Iterable[bytes]) -> None:
    """Print many lines, some at a time: there may be a million."""
    lines = iter(lines)
    for batch in iter(lambda: b"".join(itertools.islice(lines, 1000)), b""):
        emit(batch)

def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

def warn(text: str) -> None:
    """Print a warning."""
    emit("offsync: warning: " + text, error=True)


COLOURS = {"added": 32, "modified": 33, "missing": 31, "leftover": 36, "failed": 31, "ok": 32}

def colour(kind: str, text: str) -> str:
    """Return text in its kind's colour on a terminal's stdout, else as it is (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or not sys.stdout.isatty():
        return text
    return "\x1b[%dm%s\x1b[0m" % (COLOURS[kind], text)

def open_terminal() -> BinaryIO:
    """Return the terminal; under "su -c" only stdin leads to it. Raises OSError."""
    try:
        return open("/dev/tty", "r+b", buffering=0)
    except OSError:
        if not os.isatty(0):
            raise
        return open(os.dup(0), "r+b", buffering=0)

def ask(question: str, twin: str) -> str:
    """Return the answer typed on the terminal; without one, an error that names the twin."""
    try:
        with open_terminal() as terminal:
            terminal.write(question.encode())
            return terminal.readline().decode("utf-8", "replace").strip()
    except OSError:
        raise OffsyncError("there is no terminal to ask on; %s" % twin) from None


# --- Commands: init, targets --------------------------------------------------------------------

def cmd_init(args: argparse.Namespace) -> int:
    """Create key pair and config, or update the source; print the public key."""
    require_programs("controller")
    home, source = Home(), ""
    if args.source is not None or not os.path.lexists(home.config):
        named = "." if args.source is None else args.source
        source = validate_absolute_path(os.path.abspath(named), "source")
        if not named or not os.path.isdir(source):
            raise UsageError("source %s: it is not a directory; create one" % show_text(named))
        real, private = os.path.realpath(source), os.path.realpath(home.path)
        holds = (private + "/").startswith(real.rstrip("/") + "/")
        if holds or real == os.path.realpath(os.path.expanduser("~")):
            raise UsageError("source %s: it is the home directory or holds the private key; name "
                "the directory to deliver: offsync init --source DIR" % show_text(source))
    home.refuse_strangers()
    make_directory(os.path.realpath(home.path), 0o700)
    home.lock("init")
    if not os.path.lexists(home.config):
        write_atomically(home.config, [format_new_config(source).encode()], 0o600)
    elif source and source != home.load().source:
        if home.load().targets:
            warn("the source was %s; %s will get the new one (a second tree has its own "
                "OFFSYNC_HOME)" % (show_text(home.load().source), plural(len(home.load().targets),
                "target")))
        home.replace_in_config("source", ["source: " + format_yaml(source)])
    if not os.path.lexists(home.key):
        comment = "offsync@" + re.sub(r"[^A-Za-z0-9.-]", "", os.uname().nodename)
        made = run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", comment,
                    "-f", home.key])
        if made.status != 0:
            raise OffsyncError("key %s: ssh-keygen failed; mend that (it said: %s)"
                               % (home.key, quote_answer(made.stderr)))
    check_private(home.key)
    public = run([program("ssh-keygen"), "-y", "-f", home.key])
    if public.status != 0:
        raise OffsyncError("key %s: ssh-keygen cannot read it; move it away and run init again "
            "(it said: %s)" % (home.key, quote_answer(public.stderr)))
    path, shown = home.key + ".pub", b""
    if os.path.exists(path):
        shown = read_file(path, "key", "")
    if shown.split()[:2] != public.stdout.split()[:2]:      # the key that is linked is the one used
        write_atomically(path, [public.stdout], 0o644)
    emit("source %s, config %s" % (show_text(home.load().source), show_text(home.config)), True)
    key = read_file(home.key + ".pub", "key", "run: offsync init").decode("utf-8", "replace")
    key = key.strip()
    emit("Now run this on each target:  offsync link --path DIR --key " + shlex.quote(key), True)
    emit(key)
    return 0

def cmd_target_list(args: argparse.Namespace) -> int:
    """List the targets, each with its last outcome."""
    home = Home()
    config, last = home.load(), home.read_last()
    targets = sorted(config.targets)
    if args.json:
        listed = [{**target._asdict(), "user": target.user, "host": target.host,
                   "last": last.get(target.login)} for target in targets]
        emit(json.dumps({"version": 1, "targets": listed}, sort_keys=True))
        return 0
    rows = []
    for target in targets:
        record, where = last.get(target.login), show_text(target.remote_path)
        where += " port %d" % target.port if target.port else ""
        rows.append([target.login, where, "never delivered", "", ""])
        if record:
            other = why = ""
            if record.get("source") != config.source:
                other = " from %s" % record.get("source")
            if record["result"] == "failed":
                why = ": %s" % record.get("error")
            words = (record["result"], record.get("timestamp"),
                     str(record.get("plan"))[:12] + other + why)
            rows[-1][2:] = [printable(str(word)) for word in words]
    print_table(rows)
    if not targets:
        emit("no targets yet; on a target run: offsync link; then here: offsync target add", True)
    return 0

def cmd_target_remove(args: argparse.Namespace) -> int:
    """Forget a target; its files and its key entry stay there."""
    home = Home()
    home.lock("target remove")
    targets = home.load().targets
    named = [target for target in targets if args.login in (target.login, target.host)]
    if len(named) != 1:
        raise UsageError("target %s: %s; known targets: %s" % (
            show_text(args.login), "several have this host, name the login" if named else "unknown",
            some_of(sorted(target.login for target in targets)) or "none"))
    home.replace_in_config("targets", format_targets([t for t in targets if t != named[0]]))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(home.last, named[0].login))
    emit("removed %s here; to revoke the key, run there: offsync unlink, with the key that "
        "'offsync init' prints" % named[0].login, error=True)
    return 0

def read_inventory(path: str) -> list[str]:
    """Return the patterns that a file lists, one a line; nothing in it is an option or "all"."""
    data = read_file(path, "list of targets", "name a file with a pattern a line", False)
    lines = [line.split(" #")[0].strip() for line in data.decode("utf-8", "replace").split("\n")]
    patterns = [line for line in lines if line and not line.startswith("#")]
    wrong = [pattern for pattern in patterns if pattern.startswith(("-", "@"))]
    if wrong or not patterns:
        why = "%s is no pattern" % show_text(wrong[0]) if wrong else "it names no target"
        raise UsageError("list of targets %s: %s; list logins, hosts or patterns, one a line" % (
            show_text(path), why))
    return patterns

def select_targets(targets: Sequence[Target], patterns: Sequence[str]) -> list[Target]:
    """Return the targets whose login or host matches a pattern, all for none, sorted by login."""
    chosen, wanted = set(targets if not patterns else ()), []
    for pattern in patterns:
        wanted += read_inventory(pattern[1:]) if pattern.startswith("@") else [pattern]
    for pattern in wanted:
        matching = [target for target in targets if any(name == pattern or fnmatch.fnmatchcase(name,
            pattern) for name in (target.login, target.host))]
        if not matching:
            raise UsageError("target %s: nothing matches; known targets: %s" % (
                show_text(pattern), some_of(sorted(target.login for target in targets))))
        chosen.update(matching)
    return sorted(chosen)

def load_targets(home: Home, args: argparse.Namespace) -> tuple[Config, list[Target]]:
    """Return the config, with --source and --delete of this run, and the chosen targets."""
    config = home.load()
    if not config.targets:
        raise UsageError("targets: there are none yet; run on a target: offsync link --path DIR; "
            "then here the 'offsync target add' command that it prints")
    if args.source == "":
        raise UsageError("source: it is empty; name a directory: --source DIR")
    if args.source is not None:
        source = validate_absolute_path(os.path.abspath(args.source), "source")
        config = config._replace(source=source)
    if getattr(args, "delete", False):
        config = config._replace(delete=True)
    return config, select_targets(config.targets, args.targets)


# --- Commands: plan, apply, verify --------------------------------------------------------------

def plan_summary(config: Config, plan: TargetPlan) -> str:
    """Return the counts of a plan."""
    if plan.error:
        return "not compared"
    deletes = {"missing", "leftover"} if config.delete else set()
    counts = ["%d %s%s" % (len(plan.of(kind)), kind, " (to delete)" if kind in deletes else "")
              for kind in KINDS if plan.of(kind)]
    if not counts:
        return "equal, nothing to do"
    return "%s; %s to send" % (", ".join(counts), format_bytes(size_to_send(plan.changes)))

def change_line(change: Change) -> str:
    """Return one entry of a plan: kind, reasons, size, path."""
    entry, path = change.entry, show(change.path)
    if entry is None:
        reason = "only there" if change.kind == "missing" else "rsync's name"
        size = "directory" if change.directory else ""
    else:
        reason, size = ",".join(change.reasons) or "-", entry.type
        if entry.type == "file":
            size = format_bytes(entry.size)
        if "mode" in change.reasons:
            reason += " %04o" % entry.mode
        if entry.type == "symlink":
            path += " -> " + show(entry.link)
        else:
            reason += " setuid" if entry.mode & stat.S_ISUID else ""
            reason += " setgid" if entry.mode & stat.S_ISGID else ""
    return "  %s  %-12s  %10s  %s" % (colour(change.kind, "%-8s" % change.kind), reason, size, path)

def print_plans(config: Config, plans: Sequence[TargetPlan], entries: int) -> None:
    """Print plans as text: equal ones once, below their targets; so many entries in all."""
    groups: dict[Any, list[TargetPlan]] = {}
    for plan in plans:
        groups.setdefault(plan.target if plan.error else plan.digest, []).append(plan)
    emit("source %s" % show_text(config.source))
    for group in groups.values():
        plan = group[0]
        for other in group:
            emit("%s:%s" % (other.target.login, show_text(other.target.remote_path)))
        if plan.error:
            emit("  %s: %s" % (colour("failed", "not compared"), plan.error.why))
            continue
        for change in plan.changes[:entries]:
            emit(change_line(change))
        more = len(plan.changes) - entries
        if 0 < more < len(plan.changes):
            emit("  ... and %d more" % more)
        entries = max(entries - len(plan.changes), 0)
        each = "" if len(group) == 1 else "%d targets, each: " % len(group)
        emit("  " + each + plan_summary(config, plan))

def raise_for_failed(plans: Sequence[TargetPlan], what: str, as_json: bool) -> None:
    """Raise if a target has no plan; why was printed unless as JSON, which has only its kind."""
    failed = [str(plan.error) if as_json else plan.target.login for plan in plans if plan.error]
    if failed:
        raise OffsyncError("%s: %d of %s could not be compared; mend what is said of each, then "
            "try again: %s" % (what, len(failed), plural(len(plans), "target"), some_of(failed)))

def cmd_plan(args: argparse.Namespace) -> int:
    """Print the plan; change nothing."""
    home = Home()
    config, targets = load_targets(home, args)
    with Run(home, config, args.jobs) as shared:
        plans = plan_all(shared, targets)
        name, why = plan_id(config, plans), "" if args.json else refusal(shared, plans, False)
        home.keep_plan(name, plan_lines(config, plans))
    if args.json:
        emit_lines(plan_lines(config, plans))
    else:
        named = {plan.target.login: plan_summary(config, plan) for plan in plans}
        if args.summary:
            emit("source %s" % show_text(config.source))
            named.update({plan.target.login: "not compared: " + plan.error.why
                          for plan in plans if plan.error})
        else:
            print_plans(config, plans, sys.maxsize)
        if args.summary or len(plans) > 1:
            print_table(list(named.items()))
        if why:
            emit("%s: %s" % (colour("failed", "apply will refuse"), why))
        emit("plan " + name)
        if sys.stdout.isatty() and any(plan.of(*KINDS[:3]) for plan in plans) and not why:
            words = [*args.targets, *(["--source", args.source] if args.source is not None else []),
                     *(["--delete"] if args.delete else []), "--plan", name]
            emit("Next: offsync apply " + shlex.join(words), error=True)
    raise_for_failed(plans, "plan", args.json)
    return 3 if args.exit_code and any(plan.of(*KINDS[:3]) for plan in plans) else 0

def print_outcome(done: Outcome) -> None:
    """Print what became of one target: on stdout, or on stderr where it is not ok."""
    counts = []
    if done.delivered:
        counts.append(plural(len(done.delivered), "entry", "entries") + " delivered")
    if done.deleted:
        counts.append("%d deleted" % len(done.deleted))
    if done.result != "ok":
        known = "before that: " + (", ".join(counts) or "nothing was delivered")
        if done.delivered is None:
            known = "what arrived is unknown: offsync plan tells"
        emit("offsync: %s: %s: %s (%s)" % (done.login, done.result, done.error, known), error=True)
    elif not counts:
        emit("%s: %s: equal, nothing to do" % (done.login, colour("ok", "ok")))
    else:
        emit("%s: %s: %s, verified; %s sent in %.1f s" % (done.login, colour("ok", "ok"), ", ".join(
            counts), format_bytes(done.bytes_sent or 0), done.seconds or 0))

def report_outcome(log: Log, login: str, as_json: bool) -> None:
    """Print what became of one target."""
    done, record = log.outcomes.pop(login)
    log.results[done.result] += 1
    if as_json:
        emit(json_line(record))
    if not as_json or done.result != "ok":
        print_outcome(done)

def decide(shared: Run, targets: Sequence[Target], reviewed: Optional[str],
           log: Log) -> list[TargetPlan]:
    """Return the plans to carry out; raise OffsyncError, with nothing sent, if they may not be."""
    if reviewed is None:
        plans = plan_all(shared, targets)
        log.plan = plan_id(shared.config, plans)
    else:
        stream, log.plan = shared.home.open_plan(reviewed)
        with stream:
            plans = plan_all(shared, targets)
            approve(shared, plans, stream, reviewed)
    why = refusal(shared, plans, reviewed is not None)
    if why:
        raise OffsyncError("refused, nothing was sent: " + why)
    return plans

def cmd_apply(args: argparse.Namespace) -> int:
    """Transfer what the plan lists, verify it, log it."""
    home = Home()
    home.lock("apply")
    config, targets = load_targets(home, args)
    log = Log(home, config)
    with Run(home, config, args.jobs, with_md5=True) as shared:
        try:
            plans = decide(shared, targets, args.plan, log)
        except OffsyncError as error:       # nothing was sent to any of them
            for target in targets if not isinstance(error, UsageError) else ():
                log.finish(target, Outcome(target.login, "refused", str(error), [], [], 0, 0.0))
            raise
        try:
            ended = shared.jobs.map(lambda plan: deliver(shared, log, plan), plans)
            with contextlib.closing(ended):         # type: ignore[type-var]
                for plan, _ in zip(plans, ended):
                    report_outcome(log, plan.target.login, args.json)
        finally:                            # also after a signal: all have ended by then
            for login in sorted(log.outcomes):
                report_outcome(log, login, args.json)
            counts = sorted(log.results.items(), reverse=True)
            words = ["%d %s" % (count, word) for word, count in counts]
            if not args.json:
                emit("%s: %s" % (plural(len(targets), "target"), ", ".join(words)))
    return 0 if log.results["ok"] == len(targets) else 1

def cmd_verify(args: argparse.Namespace) -> int:
    """Compare every target with the source by hash; silent when all is equal."""
    home = Home()
    config, targets = load_targets(home, args)
    config = config._replace(verify="hash" if args.fast else "strong")
    home.wait_for_writers()
    with Run(home, config, args.jobs) as shared:
        plans = plan_all(shared, targets)
    differing = []
    for plan in plans:                      # what rsync itself left there is no difference
        plan.changes = [change for change in plan.changes if change.kind != "leftover"]
        if plan.changes or plan.error:
            differing.append(plan)
    if args.json:
        emit_lines(plan_lines(config, plans))
    elif differing:
        print_plans(config, differing, 1000)
    elif sys.stdout.isatty():
        emit("%s: equal to %s: %s" % (
            colour("ok", "ok"), show_text(config.source), plural(len(plans), "target")))
    raise_for_failed(plans, "verify", args.json)
    return 3 if differing else 0


# --- Commands: manifest, doctor, completion -----------------------------------------------------

def format_manifest_line(path: bytes, digest: str) -> bytes:
    r"""Return a line as sha256sum writes it: a backslash says that \n, \r, \\ are escaped."""
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != path else b"") + digest.encode() + b"  " + escaped + b"\n"

def parse_manifest(data: bytes) -> dict[bytes, str]:
    """Return path -> sha256 of what sha256sum wrote. Raises ValueError(line number, why)."""
    found: dict[bytes, str] = {}
    letters = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line[:-1] if line.endswith(b"\r") else line      # as sha256sum does
        if not line or line.startswith(b"#"):
            continue
        if b"\0" in line:
            raise ValueError(number, "a NUL byte, as sha256sum -z writes; make it without -z")
        match = re.fullmatch(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", line, re.DOTALL)
        if not match:
            raise ValueError(number, "not a line of sha256sum")
        name, digest = match[3], match[2].decode().lower()
        if match[1]:
            name = re.sub(rb"\\([\\nr])", lambda found: letters[found[1]], name)
        name = name[2:] if name.startswith(b"./") else name
        if found.setdefault(name, digest) != digest:
            raise ValueError(number, "a second line, with another sum, for its file")
    return found

def manifest_files(root: str, exclude: Sequence[str], manifest: Optional[str]) -> dict[bytes, str]:
    """Return path -> sha256 of every file of a tree, but of the manifest and where stdout leads."""
    source, own, paths = Source(root, exclude), set(), []
    for place in (1, manifest):
        with contextlib.suppress(OSError, TypeError):
            own.add(os.stat(place)[1:3])    # type: ignore[arg-type]
    for path in sorted(source.included(find_rsync()[0])):
        status = os.lstat(os.path.join(source.root, path))
        if stat.S_ISREG(status.st_mode) and status[1:3] not in own:     # inode and device
            paths.append(path)
            source.want(path)
    source.wait()
    return {path: source.entries[path].sha256.hex() for path in paths}

def cmd_manifest(args: argparse.Namespace) -> int:
    """Print the sha256 manifest of a tree, or check a tree against one."""
    directory: str = args.directory
    exclude: tuple[str, ...] = ()
    if directory is None:
        home = Home()
        if not os.path.exists(home.config):
            raise UsageError("manifest: no config here names a source; name a directory: offsync "
                             "manifest DIR")
        directory, exclude = home.load().source, home.load().exclude
    if not os.path.isdir(directory):
        raise UsageError("manifest: %s is not a directory; name one" % show_text(directory))
    if args.check is None:
        found = manifest_files(os.path.abspath(directory), exclude, None)
        manifest = b"".join(format_manifest_line(path, digest) for path, digest in found.items())
        digest = hashlib.sha256(manifest).hexdigest()
        if sys.stdout.isatty():             # names must not write to the terminal
            text = manifest.decode("utf-8", "replace")
            manifest = "".join(c if c.isprintable() or c == "\n" else "?" for c in text).encode()
        emit(manifest)
        emit("%s; digest of the whole (sha256 of the manifest), to compare by voice: %s"
             % (plural(len(found), "file"), " ".join(re.findall("....", digest))), error=True)
        return 0
    try:
        data = sys.stdin.buffer.read(FILE_LIMIT) if args.check == "-" else read_file(
            args.check, "manifest", "name it", False)
        expected = parse_manifest(data)
    except ValueError as error:
        raise UsageError("manifest %s:%s: %s; correct it" % (
            show_text(args.check), *error.args)) from None
    found = manifest_files(os.path.abspath(directory), exclude, args.check)
    for path in sorted(set(expected) | set(found)):
        if expected.get(path) != found.get(path):
            kind = "modified" if path in found else "missing"
            kind = kind if path in expected else "added"
            emit("%s  %s" % (colour(kind, "%-8s" % kind), show(path)))
    if expected != found:
        return 3
    emit("%s, all as in the manifest" % plural(len(found), "file"), error=True)
    return 0

def check_controller() -> bool:
    """Print what is right and wrong with this controller; return whether all is right."""
    def config_source() -> str:
        config = Home().load()
        check_source(Source(config.source, config.exclude), Home(), find_rsync()[0], config.targets)
        return show_text(config.source)

    checks: dict[str, Callable[[], str]] = {"rsync": lambda: "%s %d.%d.%d" % (find_rsync()[0],
        *find_rsync()[1]), "ssh": lambda: "%s %s" % (program("ssh"), quote_answer(run([program(
        "ssh"), "-V"]).stderr)), "ssh-keygen": lambda: program("ssh-keygen"), "state": lambda:
        check_private(Home().path), "key": lambda: check_private(Home().key), "config": lambda: (
        Home().load(), check_private(Home().config))[1], "source": config_source}
    problems: set[str] = set()
    for what, check in checks.items():
        try:
            emit("%s %-10s  %s" % (colour("ok", "ok      "), what, check()))
        except (OffsyncError, OSError) as error:
            if str(error) not in problems:
                emit("%s %s" % (colour("failed", "PROBLEM "), error))
            problems.add(str(error))
    return not problems

def cmd_doctor(args: argparse.Namespace) -> int:
    """Check this controller and prove, per target, what the key can and cannot do."""
    if not check_controller():
        raise OffsyncError("doctor: this controller has problems; mend what is marked PROBLEM "
            "above, then run it again")
    home, healthy = Home(), True
    config = home.load()
    with Run(home, config) as shared:
        for target in select_targets(config.targets, args.targets):
            emit("%s:%s" % (target.login, show_text(target.remote_path)))
            try:
                connection = Connection(shared, target)
                connection.open()
                proofs = prove_all(connection)
            except OffsyncError as error:
                proofs = []
                emit("  %s  %s" % (colour("failed", "PROBLEM"), getattr(error, "why", error)))
            for proof in proofs:
                word = {True: "ok", False: "OPEN", None: "unknown"}[proof.closed]
                word = colour("failed" if proof.closed is False else "ok", "%-8s" % word)
                emit("  %s %-30s %s" % (word, proof.tried, proof.answer))
            if not proofs or any(proof.closed is False for proof in proofs):
                healthy = False
    if not healthy:
        raise OffsyncError("doctor: there are problems; see what is marked PROBLEM or OPEN above")
    return 0


# The words are the parser's; targets are asked of offsync. readline begins a new word at @ : =
COMPLETION = """_offsync() {
    local line=${COMP_LINE:0:$COMP_POINT} current before words
    current=${line##*[[:blank:]]}
    before=${current%%"${current##*[@:=]}"}
    case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
%s    *) words="%s" ;;
    esac
    [[ $words != *@* ]] || words="${words/@/} $(offsync target list 2>/dev/null | cut -d ' ' -f 1)"
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    [[ -n $ZSH_VERSION ]] || COMPREPLY=("${COMPREPLY[@]#"${before%%@}"}")
}
complete -o default -F _offsync offsync
"""

def cmd_completion(args: argparse.Namespace) -> int:
    """Print the code that completes words and targets in bash (and in zsh, by its bashcompinit)."""
    cases = ""
    for name, (_, _, _, options) in COMMANDS.items():
        words = [option for option in options if option.startswith("-")]
        words += ["@"] if {"targets", "login"} & set(options) else []
        cases += '    "%s"*) words="%s" ;;\n' % (name, " ".join(words))
    cases += '    "target "*) words="add list remove" ;;\n'
    names = dict.fromkeys(name.split(" ")[0] for name in COMMANDS)
    emit((COMPLETION % (cases, " ".join(names))).encode())
    return 0

def next_step(home: Home) -> str:
    """Return what to do next from where one stands."""
    if not os.path.exists(home.config) or not os.path.exists(home.key):
        return "Next: offsync init --source DIR   (on the controller), or offsync link --path " \
               "DIR   (on a target)"
    targets, last = home.load().targets, home.read_last()
    if not targets:
        return "Next: offsync link --path DIR   (on a target), then here the 'offsync target " \
               "add' command that it prints"
    results = {target.login: last[target.login]["result"] for target in targets
               if target.login in last}
    failed = ["%s (%s)" % (login, "did not finish" if result == "started" else printable(result))
              for login, result in sorted(results.items()) if result != "ok"]
    if failed:
        return "The last apply was not ok for: %s. Next: offsync plan" % some_of(failed)
    return "%s in %s. Next: offsync plan" % (plural(len(targets), "target"), show_text(home.config))


# --- Parser and main ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage is one line on stderr, and options are not abbreviated."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **arguments)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError("%s; see: %s --help" % (message, self.prog))

def version_text() -> str:
    """Return the version and the sha256 of the running file."""
    try:
        digest = hash_file(os.fsencode(os.path.realpath(__file__)))[0].hex()
    except (OSError, NameError):
        digest = "unknown (read from standard input)"
    return "offsync %s  sha256 %s" % (VERSION, digest)

def number_of_jobs(text: str) -> int:
    """Return the value of --jobs."""
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("it must be a number from 1 to 1000")
    return int(text)


# Arguments that several commands have: their words for add_argument.
def flag(text: str) -> dict[str, Any]:
    """Return the words of an option without a value."""
    return {"action": "store_true", "help": text}

def value(metavar: str, text: str, **more: Any) -> dict[str, Any]:
    """Return the words of an option or argument with a value."""
    return {"metavar": metavar, "help": text, **more}


KEY_OPTIONS = {"--key": value("TEXT", "the public key line (default: from a pipe, else asked for)"),
               "--key-file": value("FILE", "a file with the public key line")}
NO_SYMLINKS = {"--no-symlinks": flag("rrsync munges symlinks there, so none are delivered")}
TARGETS = {"targets": value("TARGET", "a login, a host, a pattern ('web*'), or @FILE with one a "
                            "line (default: all)", nargs="*")}
JSON = {"--json": flag("print JSON")}
FOR_RUN = {"--source": value("DIR", "another source, for this run (to roll back)"), **JSON,
           "--jobs": value("N", "targets at once (default: the config's)", type=number_of_jobs)}
DELETE = {"--delete": flag("allow deletions, for this run")}
# name: (function, where and what, example, arguments)
Arguments = dict[str, dict[str, Any]]
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, str, Arguments]] = {
    "init": (cmd_init, "controller: create key pair and config; prints the public key",
             "init --source /srv/app-data",
             {"--source": value("DIR", "the directory to deliver (default: this one)")}),
    "link": (cmd_link, "target: let the controller's key write below one path only",
             "link --path /srv/app-data --key 'ssh-ed25519 AAAA... offsync@controller'",
             {"--path": value("DIR", "where the key may write (default: ~/.offsync/sync)"),
              "--rrsync": value("PATH", "where rrsync is (default: known places)"), **KEY_OPTIONS,
              "--from": value("PATTERN", "accept the key only from these hosts (sshd(8))",
                              dest="from_pattern"), **NO_SYMLINKS,
              "--accept-risk": {"action": "append", "choices": ("rrsync", "path"),
                                "help": "go on although link calls rrsync, or the path, a risk"}}),
    "unlink": (cmd_unlink, "target: remove the key again", "unlink --key 'ssh-ed25519 AAAA...'",
               KEY_OPTIONS),
    "target add": (cmd_target_add, "prove trust and restriction of a target, then save it",
                   "target add deploy@node02 --path /srv/app-data --host-key SHA256:...",
                   {"login": value("LOGIN", "user@host; IPv6 as user@[address]"),
                    "--path": value("DIR", "the path given to link there", required=True),
                    "--rrsync": value("PATH", "where rrsync is there, if not " + DEFAULT_RRSYNC),
                    "--port": value("N", "the port of sshd (default: ssh_config, else 22)"),
                    "--host-key": value("FP", "the fingerprint SHA256:... to expect, unasked"),
                    **NO_SYMLINKS}),
    "target list": (cmd_target_list, "list the targets and their last outcomes",
                    "target list --json", JSON),
    "target remove": (cmd_target_remove, "forget a target; its files and key entry stay there",
                      "target remove deploy@node02",
                      {"login": value("LOGIN", "user@host, or a host that only one target has")}),
    "install-deps": (cmd_install_deps, "both: install the system packages, after asking",
                     "install-deps --role target",
                     {"--role": {"choices": ("controller", "target", "both"), "default": "both",
                                 "help": "default: both"},
                      "-y": {**flag("do not ask"), "dest": "yes"}}),
    "plan": (cmd_plan, "controller: show what apply would do; changes nothing",
             "plan 'web*' --exit-code",
             {**TARGETS, **FOR_RUN, **DELETE, "--summary": flag("print counts only"),
              "--exit-code": flag("exit 3 if there are differences")}),
    "apply": (cmd_apply, "controller: transfer what the plan lists, verify, log",
              "apply 'web*' --plan FILE",
              {**TARGETS, **FOR_RUN, **DELETE,
               "--plan": value("ID|FILE", "only what this reviewed plan approves: the ID that plan "
                               "ends with, or the file that plan --json printed")}),
    "verify": (cmd_verify, "controller: hash everything again; exit 3 if a target differs",
               "verify --fast",
               {**TARGETS, **FOR_RUN, "--fast": flag("by the fastest checksum instead of MD5")}),
    "manifest": (cmd_manifest, "either: print a sha256 manifest of a tree, or check one",
                 "manifest /srv/app-data > app-data.sha256",
                 {"directory": value("DIR", "the tree (default: the configured source)", nargs="?"),
                  "--check": value("FILE", "compare with this manifest; exit 3 if it differs")}),
    "doctor": (cmd_doctor, "controller: check it, and prove what the key can do on targets",
               "doctor deploy@node02", TARGETS),
    "completion": (cmd_completion, "either: print the code that completes words in bash",
                   "completion bash > /etc/bash_completion.d/offsync",
                   {"shell": {"choices": ("bash",)}})}

def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    about = {name: text for name, (_, text, _, _) in COMMANDS.items() if " " not in name}
    about["target"] = "controller: add, list or remove targets"
    about = {**dict(list(about.items())[:3]), "target": about["target"], **about}
    listed = ["  %-12s  %s" % item for item in about.items()]
    parser = Parser(prog="offsync", usage="offsync COMMAND ...   (each has --help, with an "
        "example)", description="\n".join([(__doc__ or "").split("\n\n")[0], "", *listed]))
    parser.add_argument("--version", **flag("print the version and this file's sha256"))
    parser.add_argument("--contract", **flag("print what it reads, writes, runs and never does"))
    verbose = flag("print every program before it starts")
    parser.add_argument("-v", "--verbose", **verbose)
    parser.set_defaults(function=None)
    parents = {"": parser.add_subparsers(metavar="COMMAND", parser_class=Parser, prog="offsync",
                                           help=argparse.SUPPRESS)}
    for name, (function, text, example, arguments) in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in parents:
            above = parents[""].add_parser(group, description=about[group],
                                           epilog="example:\n  offsync target list")
            above.set_defaults(function=lambda args: parents[""].choices["target"].error(
                "choose add, list or remove"))
            parents[group] = above.add_subparsers(metavar="COMMAND", parser_class=Parser)
        command = parents[group].add_parser(word, help=text, description=text,
                                            epilog="example:\n  offsync " + example)
        command.add_argument("-v", "--verbose", **verbose, default=argparse.SUPPRESS)
        command.set_defaults(function=function)
        only_one = command.add_mutually_exclusive_group() if "--key" in arguments else command
        for argument, words in arguments.items():
            (only_one if argument in KEY_OPTIONS else command).add_argument(argument, **words)
    return parser

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; return the exit status. The only place that prints errors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:      # closed: its number would go to the next file
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # type: ignore[union-attr]
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:      # nohup stays nohup
            signal.signal(signum, stop_all)
    status = 1
    try:
        if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
            raise UsageError("locale: file names are not UTF-8 here; run it with PYTHONUTF8=1")
        args = build_parser().parse_args(argv)
        if args.verbose:
            VERBOSE.set()
        if args.version or args.contract:
            emit(version_text() if args.version else (__doc__ or "").strip())
            status = 0
        elif args.function is None:
            usage = "usage: offsync COMMAND ...   (offsync --help shows all)\n"
            emit(usage + next_step(Home()), error=True)
            status = 2
        else:
            status = args.function(args)
    except OffsyncError as error:
        emit("offsync: " + str(error), error=True)
        status = error.status
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        emit("offsync: %s%s; mend that, then try again" % (
            show_text(named) + ": " if named else "", error.strerror or error), error=True)
    except Interrupted as interrupted:
        name = signal.Signals(interrupted.signum).name
        emit("offsync: interrupted by %s; the same command again goes on" % name, error=True)
        status = interrupted.status
    if LOST_OUTPUT:
        emit("offsync: standard output: %s; the rest of it is lost" % LOST_OUTPUT[0], error=True)
        status = status or 1
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: None)      # all is done: nothing is left to interrupt
    return status


# --- Appendix: what failures mean ---------------------------------------------------------------

# How ssh, rrsync and rsync say that something is wrong, and what we say instead: (kind, words,
# sentence). Searched in this order in what they wrote on stderr: exit statuses say little (12 and
# 255 are interchangeable, and 0 proves nothing). "a|b": one of them; "a&b": both in one line; "":
# only our own findings. They are but words: no decision on security rests here, and plain
# substrings take linear time, whatever a target writes.
FAILURES = (
    ("open", "", "the key is NOT restricted as the config says, so nothing is sent; run there: "
     "offsync link --path {path}; is there a line for it without command=\"...\" in "
     "authorized_keys, or an IdentityFile with a shell in ~/.ssh/config?"),
    ("other-path", "", "the key is for another path there, so nothing is sent; for a second tree "
     "use a state of its own (OFFSYNC_HOME), with a key of its own; else run there: offsync link "
     "--path {path}, or here: offsync target add, with the path that it is for"),
    ("not-rrsync", "", "the forced command of the key there is not rrsync (it accepts any command "
     "and does nothing), so nothing was sent; run there: offsync link --path {path}"),
    ("silent", "", "it accepted the login, then did not answer in time, so nothing was sent; make "
     "the shell start files of {user} there (.bashrc and the like) read and wait for nothing, "
     "then look at that host's disks"),
    ("prints", "", "the login prints text where rrsync must be alone, so nothing was sent; make "
     "the shell start files of {user} there silent (.bashrc and the like; at its top: case $- in "
     "*i*) ;; *) return;; esac), or link the key again: offsync link --path {path}"),
    ("mute", "", "it does not tell where its key writes, so nothing was sent; is its forced "
     "command rrsync, of the same release as rsync there?"),
    ("symlinks", "", "it takes no symlinks (--no-symlinks), and the source has some; exclude "
     "them, or link it again, and add it here again, without that option"),
    ("source-changed", "", "the source changed after the plan, so what is there is not what was "
     "planned; let nothing write to it meanwhile (deliver from a snapshot), then plan again"),
    ("changed-there", "", "not sent, since it was changed there after the plan; plan and apply "
     "again"),
    ("appeared", "", "nothing was deleted, since new entries appeared there after the plan; plan "
     "again"),
    ("differs", "", "verification found differences; apply again, or look for what changes them "
     "there"),
    ("differs-by-mode", "", "verification found differences; only modes differ: has a file "
     "there another name (a hard link)? Delete one of its names, then apply again"),
    ("elsewhere", "", "it reports what rsync does not; is its path the right one, and rsync there "
     "what it should be?"),
    ("route", "", "the way to it failed before sshd there answered; mend that way, and try it by "
     "itself with ssh -v"),
    ("revoked", "REVOKED HOST KEY|is marked as revoked", "its host key is marked @revoked in "
     "known_hosts, so it must not be trusted; give that host a new key"),
    ("host-key-expired", "Certificate invalid: expired|ertificate has expired",
     "its host certificate has expired; have it signed again by its CA"),
    ("host-key-changed", "REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key CHANGED, "
     "somebody else may answer there; compare its fingerprint on its own console (ssh-keygen -lf "
     "/etc/ssh/ssh_host_ed25519_key.pub, or its HostKey), and only if it is the new one: offsync "
     "target add {add} --host-key SHA256:..."),
    ("algorithms", "no matching host key type|no matching key exchange method|no matching cipher|"
     "no matching MAC", "sshd there and ssh here have no algorithm in common; update the older of "
     "them, or allow here what is offered: in ~/.ssh/config HostKeyAlgorithms, KexAlgorithms, "
     "Ciphers or MACs, with a + before it; the first line that matches wins"),
    ("host-key-unknown", "host key is known for|Host key verification failed",
     "its host key is not trusted yet; confirm it with: offsync target add {add}"),
    ("name", "Could not resolve hostname|Name or service not known",
     "the name {host} does not resolve; check the name and DNS"),
    ("refused", "Connection refused", "the connection was refused; is sshd running there, on this "
     "port?"),
    ("unreachable", "No route to host|Network is unreachable|Host is down",
     "there is no route to it; check the network"),
    ("ssh-config", "Bad configuration option|bad configuration options|Bad SSH2 |"
     "Bad owner or permissions on", "ssh cannot use its configuration; mend the file that it "
     "names"),
    ("key-file", "UNPROTECTED PRIVATE KEY|Load key&Permission denied|Load key&invalid format|"
     "Load key&error in libcrypto", "ssh cannot use our private key; make it 0600 and yours, or "
     "move it away and make a new one: offsync init"),
    ("second-factor", "Permission denied (keyboard-interactive|Permission denied (password",
     "sshd there wants more than a key (AuthenticationMethods, two factors), or takes none; allow "
     "publickey alone for {user} in its sshd_config (Match User {user})"),
    ("key-refused", "Permission denied (publickey|Permission denied (gssapi|"
     "Permission denied (hostbased|Too many authentication failures",
     "it refused our key; run there: offsync link --path {path} --key '...', as {user}, with the "
     "key that 'offsync init' prints here (and --from, if its line has one, for this controller's "
     "address); if that changes nothing, sshd's log there tells more: a locked account (as root: "
     "usermod -p '*' {user}), an expired one, or one without a login shell is always refused"),
    ("penalty", "Not allowed at this time", "sshd there refuses this controller for a while "
     "(PerSourcePenalties, after logins that failed); wait a minute"),
    ("session-refused", "ession open refused|session request failed|open failed: connect failed",
     "sshd there allows no further session; raise MaxSessions in its sshd_config"),
    ("ended", "offsync-connection-ended", "sshd there accepted the login, then ended the "
     "connection; try again; if it goes on, look at sshd's log there: what ends its process?"),
    ("busy-sshd", "kex_exchange_identification|ssh_exchange_identification",
     "sshd closed the connection before logging in; it is overloaded (MaxStartups), punishes "
     "logins that failed (PerSourcePenalties; wait a minute) or blocks us"),
    ("account-expired", "account has expired", "the account {user} there has expired; run there as "
     "root: chage -E -1 {user}"),
    ("closed", "Connection closed by&port|Connection reset by&port",
     "sshd closed the connection while logging in: has the account {user} expired, does PAM "
     "refuse it, or does sshd itself fail? Its log there tells"),
    ("password-expired", "Password change required|password has expired|must change your password",
     "the password of {user} there has expired, so sshd starts nothing; run there as root: chage "
     "-d -1 -M -1 {user}"),
    ("nologin", "account is currently not available|not allowed to login|"
     "This account is not available", "the login's shell refuses commands; give {user} a real one "
     "there: chsh -s /bin/sh {user}"),
    ("other-service", "This service allows sftp connections only|fatal: Interactive git shell|"
     "fatal: unrecognized command|git-shell", "something other than rrsync is forced there (sftp "
     "only, or git-shell); take ForceCommand for {user} out of its sshd_config and restart sshd, "
     "or give {user} a real login shell: chsh -s /bin/sh {user}"),
    ("restricted-shell", "restricted: cannot specify|: restricted", "the login's shell is a "
     "restricted one (rbash), which cannot start rrsync; run there: chsh -s /bin/sh {user}"),
    ("locked", "Another instance of rrsync is already accessing", "another rsync is using {path} "
     "there; try again when it has finished"),
    ("no-rrsync", "rrsync&not found|rrsync: No such file|rrsync: Permission denied|"
     "bash: line 1: /&: No such file|sh: 1: /&: not found|"
     "can't open file&rrsync|Can't open perl script|rrsync: cannot execute|Unknown command&rrsync|"
     "rrsync: inaccessible|rrsync&bad interpreter", "rrsync, or its interpreter, is not at "
     "{rrsync} there; run on the target: offsync install-deps --role target, then: offsync link "
     "--path {path}"),
    ("read-only-key", "sending to read-only server|read-only server is not allowed",
     "its key is for reading only (rrsync -ro); run there: offsync link --path {path}"),
    ("perl-refusal", "is not rsync|Not invoked via sshd|does not run rsync",
     "rrsync did not accept the command; is it of the same release as rsync there?"),
    ("no-rsync", "No such file or directory: '&/rsync'|rsync: not found|rsync: command not found|"
     "/rsync&No such file|/rsync&not found", "rsync is missing there; run on the target: offsync "
     "install-deps --role target"),
    ("no-directory", "Restricted directory does not exist|"
     "FileNotFoundError&No such file or directory: '|NotADirectoryError|chdir&failed|"
     "Unable to chdir", "{path} is gone there or is no directory; create it again, as root: "
     "install -d -o {user} {path}"),
    ("openrsync", "openrsync|rsync 2.6.9 compatible|: too large", "openrsync answers there "
     "instead of rsync; install the real rsync on the target"),
    ("option", "has been disabled on this server|invalid rsync-command syntax|"
     "option is not supported|unknown option|unrecognized option|unrecognized arguments",
     "its rrsync refused an option; are rrsync and rsync there of the same release, 3.1.2 or "
     "newer?"),
    ("noise", "is your shell clean|unexpected tag |protocol incompatibility",
     "something other than rsync answered; is the forced command rrsync, and do the shell start "
     "files of {user} there print nothing?"),
    ("space", "No space left on device", "the disk is full there; free some space, then apply "
     "again"),
    ("quota", "Disk quota exceeded", "a disk quota is used up there; raise it, then apply again"),
    ("read-only-disk", "Read-only file system", "the file system is mounted read-only there; "
     "remount it"),
    ("file-io", "(code 11)", "a file could not be written there, most likely because the disk is "
     "full; free some space, then apply again"),
    ("source-unreadable", "[sender]&Permission denied|[sender]&No such file or directory|"
     "send_files failed to open|file has vanished|link_stat&failed|readlink_stat",
     "the source changed while it was read; plan again"),
    ("in-the-way", "could not make way for|cannot delete non-empty directory",
     "a directory that holds excluded or new files is in the way of a planned entry; move it, "
     "then plan again"),
    ("device", "Device or resource busy", "a mount point there is in the way; unmount it, or "
     "exclude it"),
    ("unreadable-there", "opendir&Permission denied|IO error encountered",
     "{user} may not read everything below {path} there (a disk's lost+found is such a "
     "directory); exclude it, or mend owner and modes"),
    ("immutable", "Operation not permitted (1)", "{user} may not change something below {path} "
     "there: it belongs to another, or is marked immutable or append-only (lsattr, chattr -ia); "
     "mend that, then apply again"),
    ("permission", "Permission denied (13)", "{user} may not write everywhere below {path} there; "
     "mend owner and modes (as root: chown {user} {path}), then apply again"),
    ("not-a-directory", "Not a directory (20)", "{path} there, or something in it, is no "
     "directory any more"),
    ("timeout", "timed out|Timeout, server|not responding|io timeout after",
     "it did not answer in time; check host and network"),
    ("no-answer", "(0 bytes received so far)", "no rsync ever answered there, so nothing was "
     "sent; do the shell start files of {user} (.bashrc and the like) exit, or exec another "
     "program? Is the forced command rrsync, the login shell a real one, and does PAM open a "
     "session?"),
    ("lost", "connection unexpectedly closed|unexpected EOF|unexpectedly close|Broken pipe|"
     "error in rsync protocol|onnection to&closed|error in socket IO|mux_client|client_loop",
     "the connection was lost; apply again finishes the job"),
)
SILENT = b"rsync ended without a word"      # said for it

def failure(target: Target, kind: str, detail: str = "") -> TargetError:
    """Return the failure of a target: the sentence of a kind, then what it concerns."""
    sentence = next(sentence for name, _, sentence in FAILURES if name == kind)
    text = sentence.format(host=target.host, user=target.user, rrsync=target.rrsync,
                           add=target.add_arguments, path=shlex.quote(target.remote_path))
    return TargetError(target.login, text + (": " + detail if detail else ""), kind)

def diagnose(target: Target, stderr: bytes) -> TargetError:
    """Return what a failed ssh or rsync meant: a sentence with its remedy, and its own words."""
    lines = (stderr[:4096] + b"\n" + stderr[4096:][-4096:]).splitlines()
    said = " (it said: %s)" % (quote_answer(stderr) or "nothing")
    for kind, words, _ in FAILURES:
        for alternative in filter(None, words.split("|")):
            parts = [part.encode() for part in alternative.split("&")]
            if any(all(part in line for part in parts) for line in lines):
                error = failure(target, kind)
                said = said if kind != "ended" else ""      # those words are ours
                return TargetError(target.login, error.why + said, kind)
    return TargetError(target.login, "it failed in a way that is not known; run: ssh -v %s, and "
        "look at sshd's log there%s" % (shlex.quote(target.login), said))


if __name__ == "__main__":
    sys.exit(main())
