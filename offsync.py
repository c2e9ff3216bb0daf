#!/usr/bin/env python3
"""Push one directory to many targets with rsync over SSH, using a key that can
only write below one path. Every run is explicit: plan -> apply -> verify.

roles
  controller  owns the source directory and the private key;
              runs init, target, plan, apply, verify, log, doctor
  target      receives files; runs link once (and unlink to revoke);
              afterwards only sshd, rrsync and rsync run there

reads   the source directory; through ssh: ~/.ssh/config for routing, and the
        known_hosts files of the user and the system for host keys; link also
        /etc/shadow, /proc/self/mounts and the system's host keys, if it may
writes  on the controller: $OFFSYNC_HOME (default ~/.offsync), and temporary
        files below $TMPDIR, /tmp or /var/tmp that are removed at the end;
        on the target: one line of ~/.ssh/authorized_keys, the --path directory
        if it is absent, and, through rsync, what a plan lists below that path
runs    ssh, ssh-keygen and rsync, always as argument lists, never through a
        shell; -v shows each before it starts; link also runs sshd -T, and tries
        rrsync in a scratch directory as sshd would start it (sh -c);
        install-deps, and init and link where a program is missing, run the
        package manager, after showing the commands and asking
never   deletes without "delete: true" or --delete, overwrites without
        "overwrite: true", forwards an agent or a port, trusts a host key that
        neither you nor those known_hosts confirm, sends a file before the
        restriction of the key is proved, calls a delivery ok that is not what
        was planned
exit    0 done; 1 failed, refused or some target failed; 2 wrong usage or
        config; 3 differences found; 129, 130, 143 ended by a signal

To audit it, read the trust core first: lines 245 to 2402, in the order in
which data flows. What follows serves it: the state directory, link, host keys,
packages, the config, output, commands; what failures mean comes last.
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
import subprocess
import threading
import time
import unicodedata
from typing import (
    IO, Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, NoReturn, Optional, Sequence,
    TypeVar, Union)

VERSION = "3.0.0"

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


# --- Errors and values --------------------------------------------------------------------------

COPY = "\x1f"                               # around a command to copy; no name can hold it, since
                                            # every name in a message is shown without control bytes

def compose(text: str, *values: object) -> str:
    """Return a message: text filled as by "%"; what it has in backquotes is a command to copy."""
    text = text.replace("`", COPY)
    return text % values if values else text

def plain(text: str) -> str:
    """Return a message without its marks: for a pipe, a log, another program."""
    return text.replace(COPY, "")

class OffsyncError(Exception):
    """Expected trouble: "what: why; what to do next". main() prints it, and exits with status."""
    status = 1

    def __init__(self, text: str, *values: object) -> None:
        super().__init__(compose(text, *values))

    @property
    def text(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return plain(self.text)

class UsageError(OffsyncError):
    """Wrong arguments, environment or config."""
    status = 2

class Failure:
    """A kind of failure of a target: the words by which it is known, why it is, and what mends it.

    words: "a|b" is one of them, "a&b" both in one line, "" what only we find. Each is an attribute
    of Kind, whose name it bears: none can be misspelt without mypy saying so.
    """
    name = ""

    def __init__(self, words: str, why: str, remedy: str = "") -> None:
        self.words = [[part.encode() for part in way.split("&")] for way in words.split("|") if way]
        self.why, self.remedy = why, remedy

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.lower().replace("_", "-")

class TargetError(OffsyncError):
    """One target failed. why is the message without the login."""

    def __init__(self, login: str, kind: Failure, why: str) -> None:
        super().__init__("%s: %s", login, why)
        self.kind, self.why = kind, why

class Stopped(OffsyncError):
    """Work that ends because a signal asked offsync to stop, or because the run is over."""

class Interrupted(BaseException):
    """What the signal handler raises in the main thread: nothing on the way to main swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.status = signum, 128 + signum


DEFAULT_RRSYNC = "/usr/bin/rrsync"
KINDS = ("added", "modified", "missing", "leftover")
LISTED = 5                                  # names in a message: the first ones, then a count
NAME_SHOWN = 200                            # characters of a name in a message

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
    def where(self) -> str:
        return "%s:%s" % (self.login, show(os.fsencode(self.remote_path)))

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

class Entry(NamedTuple):
    """What a plan says of one entry of the source."""
    type: str                               # "directory", "file" or "symlink"
    mode: int
    size: int                               # in bytes
    sha256: bytes = b""                     # of a file
    md5: bytes = b""                        # of a file that will be sent
    link: bytes = b""                       # where a symlink points

class Change(NamedTuple):
    """One difference between source and target: one line of a plan."""
    path: bytes
    kind: str                               # one of KINDS
    directory: bool                         # of what only the target has rsync tells no more
    reasons: tuple[str, ...] = ()           # of modified: "content", "mode", "type", "link"
    entry: Optional[Entry] = None           # of added and modified, once the source is described

    @property
    def sends_content(self) -> bool:
        if self.entry is None or self.entry.type != "file":
            return False
        return self.kind == "added" or "content" in self.reasons or "type" in self.reasons

class Record(NamedTuple):
    """What became of one target in one run: the log's line, the status, --json, and the words.

    None means unknown, never "nothing".
    """
    timestamp: str                          # when the run began, UTC
    operator: str
    host: str
    login: str
    source: str
    operation: str = "apply"
    plan: Optional[str] = None              # the plan's ID, the reviewed one's with --plan
    result: str = "started"                 # then "ok", "failed", "interrupted" or "refused"
    error: Optional[str] = None
    files_changed: Optional[list[str]] = None
    files_deleted: Optional[list[str]] = None
    bytes_sent: Optional[int] = None
    seconds: Optional[float] = None

    @property
    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it: no mark of a command in the error."""
        return {**self._asdict(), "error": self.error and plain(self.error)}

class Result(NamedTuple):
    """How a program ended. status is negative for a signal, None when its deadline passed."""
    status: Optional[int]
    stdout: bytes
    stderr: bytes


# === Trust core: running programs ===============================================================

class Flag:
    """What the signal handler sets: without a lock, which the code that it interrupts may hold."""

    def __init__(self) -> None:
        self.value = False

    def is_set(self) -> bool:
        return self.value

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.value and time.monotonic() < end:
            time.sleep(0.05)                # so late is the end seen, at most

STOP = Flag()                               # all is stopping: no program starts, nothing waits
SIGNALLED = Flag()                          # by the handler: a second signal ends it all
RUNNING: set["subprocess.Popen[bytes]"] = set()     # the programs that the signal handler ends
VERBOSE = threading.Event()                 # -v
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOREVER = threading.TIMEOUT_MAX             # seconds
CONNECT_DEADLINE = 60.0                     # seconds for a connection
SESSION_DEADLINE = 45.0                     # seconds for a session that hashes nothing
STDERR_KEPT = 1 << 14                       # bytes of stderr kept, of its head and of its tail
STDOUT_LIMIT = 1 << 22                      # bytes of stdout, where it is not read line by line
MAX_LINE = 1 << 16                          # bytes; a name has 4096, times 5 when escaped
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
    again = SIGNALLED.value
    SIGNALLED.value = STOP.value = True
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

def run(argv: Argv, *, stdin: Union[int, bytes, IO[bytes]] = subprocess.DEVNULL,
        shown: bool = False, env: Optional[dict[str, str]] = None, deadline: float = FOREVER,
        greeting: float = FOREVER, linger: float = 0,
        on_line: Optional[Callable[[bytes], None]] = None) -> Result:
    """Run a program, the only place but clean_up(); return how it ended. argv is no shell's.

    stdin: PIPE stays open and silent; bytes (64 KiB at most, a pipe's room) are what it reads.
    stdout is returned, or given to on_line line by line (\\r ends a line too). What is shown writes
    to stderr, and is not ended by a signal of ours (a package manager). It runs in /, which is
    there even where the current directory is gone. Raises Stopped if all is stopping,
    OffsyncError if it cannot be started.
    """
    if VERBOSE.is_set():
        emit("+ " + shlex.join(os.fsdecode(word) for word in argv), error=True)
    if STOP.is_set():
        raise Stopped("interrupted")
    given = pipe_of(stdin) if isinstance(stdin, bytes) else stdin
    pipe = None if shown else subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv, stdin=given, env=env or environment(), stderr=pipe, stdout=2 if shown else pipe,
            start_new_session=not shown, cwd="/")
    except OSError as error:
        why = "look at that program, and at what its first line names"
        if error.errno in (11, 12, 23, 24):         # EAGAIN, ENOMEM, ENFILE, EMFILE
            why = "raise that limit (ulimit), or use --jobs 1"
        raise OffsyncError("%s: it cannot be started: %s; " + why,
                           show(os.fsencode(argv[0])), error.strerror) from None
    finally:
        if isinstance(stdin, bytes):
            os.close(given)                 # type: ignore[arg-type]
    output = Output(on_line)
    try:
        if not shown:
            RUNNING.add(process)
            if STOP.is_set():               # the handler may have looked before it was added
                kill(process)
        late = output.read(process, deadline, greeting, linger)
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

def pipe_of(data: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, data[:1 << 16])
    os.close(writer)
    return reader

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

    def read(self, process: "subprocess.Popen[bytes]", deadline: float, greeting: float,
             linger: float = 0) -> bool:
        """Read both pipes until the program ends; return whether it was ended for being late.

        deadline is in seconds for all of it, greeting for its first byte on stdout. The end is
        that of the program, not of its pipes: an ssh in the background may hold them open, and is
        waited for as long as linger says.
        """
        started, late, end = time.monotonic(), False, 0.0
        with selectors.DefaultSelector() as selector:
            for stream in filter(None, (process.stdout, process.stderr)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                ended = process.poll() is not None      # asked first: all that it wrote is there
                if ended and not end:
                    end = time.monotonic() + linger
                ready = selector.select(max(end - time.monotonic(), 0) if ended else 0.1)
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
                if not late and not end and time.monotonic() - started > min(deadline, greeting):
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

def attempts() -> Iterator[bool]:
    """Yield whether this attempt is the last one, and wait between them; the only loop of retries.

    For connections that sshd drops (MaxStartups; PerSourcePenalties of sshd 9.8: 16 s for two
    logins that failed), for rrsync's lock, for sessions beyond MaxSessions.
    """
    for delay in (0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0):
        yield False
        STOP.wait(delay)
    yield True

class Threads:
    """Threads that carry out functions; the only helper for that.

    What a function touches is its own, or says at its definition who else does. close() drops what
    is queued (the interpreter would work it all off before it ends), and waits for what has begun.
    """

    def __init__(self, threads: int) -> None:
        from concurrent import futures      # here: slow to import
        self.futures, self.executor = futures, futures.ThreadPoolExecutor(max_workers=threads)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the future of a function. Raises OffsyncError where no thread can be started."""
        try:
            return self.executor.submit(function, *arguments)
        except RuntimeError:
            raise OffsyncError("threads: none can be started; raise the limit (ulimit -u), or use "
                               "--jobs 1") from None

    def each(self, function: Callable[[_Item], _Value],
             items: Sequence[_Item]) -> Iterator[tuple[_Item, _Value]]:
        """Begin with function(item) for all items; return an iterator over (item, value) as each
        ends. Whatever stops the consumer, no other item is begun, and all that was has ended.
        """
        begun = {self.submit(function, item): item for item in items}

        def take() -> Iterator[tuple[_Item, _Value]]:
            try:
                for number, future in enumerate(self.futures.as_completed(begun)):
                    if len(items) > 1:
                        PROGRESS.update("(all)", "%d of %d done" % (number + 1, len(items)))
                    yield begun[future], future.result()
            finally:
                for future in begun:
                    future.cancel()
                self.futures.wait(begun)
                PROGRESS.update("(all)", None)

        return take()

    def close(self) -> None:
        self.executor.shutdown(cancel_futures=True)

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


# --- Trust core: names ----------------------------------------------------------------------------

# What str.isprintable() lets pass, and is drawn as nothing all the same.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                    "\U0001d159\U000e0100-\U000e01ef]")
LETTERS = {7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 34: '"', 92: "\\"}
MISLEADING = re.compile(r'["\\]|^ | $| {3}| -> ')

def show(name: bytes, quoted: bool = False) -> str:
    """Return a name for people and logs: as it is, or quoted as git does where it could mislead.

    Unambiguous: what is not quoted has no quote and no backslash. Nothing in it moves a cursor.
    quoted: it looks like another name beside it.
    """
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    seen = text.isprintable() and not MISLEADING.search(text) and not UNSEEN.search(text)
    if text and seen and not quoted and not unicodedata.combining(text[0]):
        return text
    letters = ("\\" + LETTERS[byte] if byte in LETTERS else chr(byte) if 32 <= byte < 127 else
               "\\%03o" % byte for byte in name)
    return '"' + "".join(letters) + '"'

def show_text(text: str) -> str:
    return cut(show(os.fsencode(text)))

def cut(text: str) -> str:
    return text if len(text) <= NAME_SHOWN else text[:NAME_SHOWN] + "..."

def folded(name: bytes) -> str:
    """Return what names have in common that a file system may take for one (case, and NFC)."""
    text = unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape"))
    return unicodedata.normalize("NFC", text.casefold())

def alike(paths: Iterable[bytes]) -> set[bytes]:
    """Return those paths that look like another one of them: equal after NFC."""
    seen: dict[str, set[bytes]] = {}
    for path in paths:
        if not path.isascii():
            text = unicodedata.normalize("NFC", path.decode("utf-8", "surrogateescape"))
            seen.setdefault(text, set()).add(path)
    return set().union(*(names for names in seen.values() if len(names) > 1))

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
    if b"\0" in path or not {b"..", b".", b""}.isdisjoint(path.split(b"/")):
        raise ValueError("a name that leaves the directory: " + show(path[:100]))
    return path

def leaves(path: bytes, link: bytes) -> bool:
    """Return whether a symlink, as it is written, leads out of the source."""
    led = os.path.normpath(os.path.join(os.path.dirname(path), link))
    return led.startswith((b"/", b"../")) or led == b".."

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
    text = printable(" | ".join([line for line in lines if line.strip("^~ \t")][-4:]))  # no "^^^"
    return text if len(text) <= 300 else "..." + text[-297:]

def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return "%d %s" % (size, unit) if unit == "B" else "%.1f %s" % (size, unit)
        size /= 1024
    return "%.1f TiB" % size

def plural(count: int, singular: str, several: str = "") -> str:
    return "%d %s" % (count, singular if count == 1 else several or singular + "s")

def some_of(names: Sequence[str], separator: str = ", ") -> str:
    more = len(names) - LISTED
    return separator.join([*names[:LISTED], *(["and %d more" % more] if more > 0 else [])])

def some_paths(paths: Iterable[bytes]) -> str:
    names = sorted(paths)
    similar = alike(names)
    return some_of([cut(show(name, name in similar)) for name in names])

def quote_for_rsync(word: str) -> str:
    """Return a word of rsync's -e option: it splits at blanks and knows quotes, doubled within."""
    plain = re.fullmatch(r"[A-Za-z0-9_./=@:,~-]+", word)
    return word if plain else "'" + word.replace("'", "''") + "'"

def scratch_file(scratch: str, names: Iterable[bytes] = ()) -> BinaryIO:
    """Return an open file that has no name, with the NUL-terminated names, at its beginning."""
    import tempfile                         # here: slow to import
    stream = tempfile.TemporaryFile(dir=scratch)
    stream.writelines(name + b"\0" for name in names)
    stream.seek(0)
    return stream


# --- Trust core: the source ---------------------------------------------------------------------

BATCH = 64                                  # source entries that a thread describes at a time
STAGING = b".~tmp~"                         # where --delay-updates collects files
# A killed receiver leaves .NAME.XXXXXX beside NAME, one dot for names that have one (receiver.c).
TEMPORARY_NAME = re.compile(rb"\.(.+)\.[A-Za-z0-9]{6}", re.DOTALL)

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

def new_digest(data: bytes = b"", name: str = "sha256") -> Any:
    import hashlib                          # here: slow to import
    return hashlib.new(name, data, usedforsecurity=False)       # MD5 is there under FIPS, too

def hash_file(path: bytes, with_md5: bool = False,
              parent: Optional[int] = None) -> tuple[bytes, int]:
    """Return (SHA-256, then MD5 if wanted; size in bytes) of a file, never through a symlink."""
    digests = [new_digest(name=name) for name in ("sha256", "md5")[:1 + with_md5]]
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

def describe_entry(root: bytes, path: bytes, with_md5: bool = False) -> Entry:
    """Return what a plan says of a source entry. Raises OSError, also for devices and the like."""
    directory, name = os.path.split(path)
    parent = open_directory(root, directory)
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            return Entry("directory", mode, 0)
        if stat.S_ISLNK(status.st_mode):
            link = os.readlink(name, dir_fd=parent)
            if leaves(path, link):          # it is not what was scanned
                raise OSError(22, "it is a symlink that leaves the source", path)
            return Entry("symlink", 0o777, len(link), link=link)
        if not stat.S_ISREG(status.st_mode):        # it is not even opened
            raise OSError(22, "it is no file, directory or symlink any more", path)
        sums, size = hash_file(name, with_md5, parent)
        return Entry("file", mode, size, sums[:32], sums[32:])
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
        self.accepted = threading.Event()   # it is scanned, and all of it can be delivered
        self.entries: dict[bytes, Optional[Entry]] = {}     # None where it is not described yet
        self.errors: dict[bytes, str] = {}
        self.described = 0                  # about so many, for the progress
        self.lock = threading.Lock()        # for the next two
        self.batch: list[bytes] = []
        self.pending: list[Any] = []        # futures of batches
        self.threads = Threads(min(os.cpu_count() or 1, 4))

    def want(self, path: bytes) -> None:
        with self.lock:
            if path not in self.entries:
                self.entries[path] = None
                self.batch.append(path)
                if len(self.batch) >= BATCH:
                    self.hand_over([self.batch])

    def flush(self) -> None:
        """Have the rest described too, one at a time: no large file shall wait for another."""
        with self.lock:
            self.hand_over([[path] for path in self.batch])

    def hand_over(self, batches: list[list[bytes]]) -> None:
        self.batch = []
        self.pending += [self.threads.submit(self.describe, paths) for paths in batches]

    def describe(self, paths: list[bytes]) -> None:
        for path in paths:
            if STOP.is_set():
                raise Stopped("interrupted")
            try:
                self.entries[path] = describe_entry(self.root, path, self.with_md5)
            except (OSError, ValueError, MemoryError) as error:
                self.errors[path] = getattr(error, "strerror", None) or str(error)
            self.described += 1

    def wait(self) -> None:
        """Return when all that is wanted is described; raise for what vanished or is unreadable."""
        self.flush()
        with self.lock:
            pending = self.pending = [future for future in self.pending if not future.done()]
        for future in pending:
            PROGRESS.update("source", "hashing %d of %s" % (
                self.described + 1, plural(len(self.entries), "changed entry", "changed entries")))
            future.result()
        PROGRESS.update("source", None)
        if STOP.is_set():
            raise Stopped("interrupted")
        if self.errors:
            named = ["%s: %s" % (cut(show(path)), why) for path, why in sorted(self.errors.items())]
            raise OffsyncError("source %s: it changed meanwhile, or cannot be read; try again: %s",
                               show(self.root), some_of(named))

    def entry(self, path: bytes) -> Entry:
        entry = self.entries[path]
        assert entry is not None
        return entry

    def is_as(self, path: bytes, planned: Entry) -> bool:
        """Return whether an entry is now what was planned; its content is read again."""
        try:
            return describe_entry(self.root, path, bool(planned.md5)) == planned
        except OSError:
            return False

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
            raise OffsyncError(
                "%s: it cannot be read completely; mend that, then try again (rsync said: %s)",
                show(self.root), quote_answer(result.stderr))
        return names - {b".", b""}

def symlink_offence(root: bytes, real_root: bytes, path: bytes) -> str:
    """Return why a symlink cannot be delivered, "" if it stays inside, written and resolved."""
    place = os.path.join(root, path)
    try:
        link, real = os.readlink(place), os.path.realpath(place)
    except OSError as error:
        return "it is a symlink that cannot be read: %s" % error.strerror
    within = (real + b"/").startswith(real_root.rstrip(b"/") + b"/")
    if link.startswith(b"/"):
        relative = "ln -srfn " + shlex.join([os.fsdecode(link), os.fsdecode(place)])
        return "it is a symlink to an absolute path" + (
            ", within the source; make it relative: " + printable(relative) if within else "")
    if leaves(path, link) or not within:
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
        PROGRESS.update("source", "scanning " + cut(show(directory or b".")))
        if STOP.is_set():
            raise Stopped("interrupted")
        try:
            with os.scandir(os.path.join(source.root, directory)) as entries:
                for entry in entries:
                    source.count += 1
                    path = prefix + entry.name
                    if entry.is_symlink():
                        source.symlinks.append(path)
                        why = symlink_offence(source.root, real_root, path)
                    else:
                        why = entry_offence(entry, needed)
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(path)
                    if entry.name == STAGING:
                        why = "rsync reserves the name .~tmp~ for itself; rename it"
                    if why:
                        offences[path] = why
        except OSError as error:
            if not directory:
                remedy = "raise that limit (ulimit -n)" if error.errno == 24 else \
                    "name a readable directory"
                raise OffsyncError("source %s: %s; " + remedy, show(source.root),
                                   error.strerror) from None
            offences.setdefault(directory, "it cannot be read")
    PROGRESS.update("source", None)
    return offences

def check_place(source: Source, private: Iterable[str]) -> None:
    """Raise unless the source is a directory that holds none of these private files."""
    if not os.path.isdir(source.root):
        raise OffsyncError(
            "source %s: it is not a readable directory; name one with --source (for this run), or "
            "with `offsync init --source DIR`", show(source.root))
    top = os.path.realpath(source.root).rstrip(b"/") + b"/"
    for path in private:                    # the key may be a symlink to another place
        if (os.path.realpath(os.fsencode(path)) + b"/").startswith(top):
            raise OffsyncError(
                "source %s: it contains %s and so the private key; choose a directory of its own: "
                "`offsync init --source DIR`", show(source.root), show_text(path))

def check_source(source: Source, rsync: str, targets: Sequence[Target]) -> None:
    """Scan the source. Raises unless all that is not excluded can be delivered to these targets."""
    offences = scan(source, 0o500 if any(target.user != "root" for target in targets) else 0)
    if all(target.symlinks for target in targets):
        source.symlinks = []                # nobody minds them
    if source.exclude and (offences or source.symlinks):
        included = source.included(rsync, complete=False)
        offences = {path: offences[path] for path in offences if path in included}
        source.symlinks = [path for path in source.symlinks if path in included]
    if offences:
        named = ["%s: %s" % (cut(show(path)), offences[path]) for path in sorted(offences)]
        raise OffsyncError(
            "source %s: %s cannot be delivered; remove or exclude what is named, then plan again: "
            "%s", show(source.root), plural(len(named), "entry", "entries"), some_of(named))


# --- Trust core: the connection -------------------------------------------------------------------

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
    "GSSAPIKeyExchange=no",                 # nor is Kerberos, which would take known_hosts' place
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
# Logs in, opens no session, and stays behind. Without -f, OpenSSH before 8.7 asks for a shell all
# the same. These come first: ssh takes the first value of each option.
SSH_MASTER = ("-f", "-N", "-o", "ControlMaster=yes")
# A session goes over the open connection or nowhere: were the master gone, ssh would connect
# afresh, unproved. It is sent to a program that is not there, and whose name says what happened.
# Nothing of ~/.ssh/config is for a session (RemoteCommand, SendEnv).
SSH_SESSION = ("-F", "/dev/null", "-o", "ControlMaster=no", "-o", "BatchMode=yes", *SSH_QUIET,
               "-o", "ProxyCommand=/nonexistent/offsync-connection-ended")
MASTER_IDLE = 600                           # seconds until a forgotten connection ends itself
# After an error rsync's server sleeps for 0.1 s (cleanup.c), under rrsync's lock: the end is that
# of the session, which ssh tells by closing its stderr.
LINGERING = 0.5                             # seconds it is waited for at most
OTHER_LIMIT = 1 << 24                       # bytes beside items: a target can have rsync print any
SILENT = b"rsync ended without a word"      # said for it

class Steering:
    """The kinds of failure that decide what is tried again or asked; looked for first, in order."""

    REVOKED = Failure(
        "REVOKED HOST KEY|is marked as revoked|revoked by file",
        "its host key is marked as revoked (@revoked in a known_hosts, or RevokedHostKeys of "
        "ssh_config), so it must not be trusted", "give that host a new key")
    HOST_KEY_EXPIRED = Failure(
        "Certificate invalid: expired|ertificate has expired", "its host certificate has expired",
        "have it signed again by its CA")
    HOST_KEY_CHANGED = Failure(
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key CHANGED, somebody else may answer there",
        "compare with its own console: `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`, and "
        "only if it is the new one, trust it: `offsync target add {add} --host-key SHA256:...`")
    HOST_KEY_UNKNOWN = Failure(
        "host key is known for|Host key verification failed", "its host key is not trusted yet",
        "confirm it with: `offsync target add {add}`")
    LOCKED = Failure(
        "Another instance of rrsync is already accessing", "another rsync is using {path} there",
        "try again when it has finished")
    SESSION_REFUSED = Failure(
        "ession open refused|session request failed|open failed: connect failed",
        "sshd there allows no further session", "raise MaxSessions in its sshd_config")
    ENDED = Failure(
        "offsync-connection-ended", "sshd there accepted the login, then ended the connection",
        "try again; if it goes on, look at sshd's log there: what ends its process?")
    BUSY_SSHD = Failure(
        "kex_exchange_identification|ssh_exchange_identification|Not allowed at this time",
        "sshd closed the connection before logging in; it is overloaded (MaxStartups), punishes "
        "logins that failed (PerSourcePenalties), or blocks us", "wait a minute, then try again")

RETRIED = (Steering.BUSY_SSHD, Steering.LOCKED, Steering.SESSION_REFUSED)

class Run:
    """What all targets of one command share: config, programs, threads, the scratch directory."""

    def __init__(self, home: "Home", config: Config, jobs: Optional[int] = None,
                 with_md5: bool = False) -> None:
        check_private(home.key)
        self.home, self.config = home, config
        self.ssh = program("ssh")
        self.started = time.time_ns()       # to say which side changed; nothing else rests on it
        self.targets = 1                    # how many are planned
        self.plans: dict[bytes, list[Change]] = {}      # by digest; under source.lock
        self.numbers = itertools.count()
        self.scratch = make_scratch()
        self.empty = os.fsencode(os.path.join(self.scratch, "empty"))   # source of what only asks
        os.mkdir(self.empty)
        self.guard = start_guard(self.scratch, self.ssh)
        self.source = Source(config.source, config.exclude, with_md5)
        self.jobs, self.provers = Threads(jobs or config.jobs), Threads(jobs or config.jobs)
        self.finding = self.provers.submit(find_rsync)      # beside what comes first

    @property
    def rsync(self) -> str:
        """Return the rsync that is used. Raises OffsyncError where there is none."""
        return str(self.finding.result()[0])

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, nor anything at work; the guard cleans up, or we do without it."""
        STOP.value = True
        for process in list(RUNNING):
            kill(process)
        for threads in (self.jobs, self.provers, self.source.threads):
            threads.close()
        if not SIGNALLED.is_set():
            STOP.value = False
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
        self.opened = False
        self.restricted = False             # proved on this connection: no command
        self.path_proved = False            # proved on this connection: where it writes
        self.answered = False               # the last rsync was answered by one there
        self.pass_seconds = 0.0             # what the plan's pass took, and the proof of the path,
        self.session_seconds = 0.0          # which is a session that does nothing

    def options(self) -> list[str]:
        home, port = self.shared.home, self.target.port
        files = '"%s" ~/.ssh/known_hosts ~/.ssh/known_hosts2' % home.known_hosts
        words = [*SSH_OPTIONS, "-o", "UserKnownHostsFile=" + (self.known_hosts or files),
                 "-o", 'IdentityFile="%s"' % home.key]
        if self.known_hosts:                # that one alone
            words += ["-o", "GlobalKnownHostsFile=none"]
        return words + (["-o", "Port=%d" % port] if port else [])

    def destination(self) -> list[str]:
        return ["-l", self.target.user, "--", self.target.host]

    def session_options(self) -> list[str]:
        return [*SSH_SESSION, "-o", "ControlPath=" + self.socket]

    def is_open(self) -> bool:
        """Return whether the master is there: it is asked, its socket file proves nothing."""
        return run([self.shared.ssh, "-F", "/dev/null", "-o", "ControlPath=" + self.socket,
                    "-O", "check", "--", "offsync"], deadline=SESSION_DEADLINE).status == 0

    def log_in(self, *options: str) -> Result:
        """Start the master of this connection; afterwards opened tells whether it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)          # of a master that is gone
        argv = [self.shared.ssh, *SSH_MASTER, "-o", "ControlPath=" + self.socket, *options]
        result = run([*argv, *self.options(), *self.destination()], deadline=CONNECT_DEADLINE)
        self.restricted, self.opened = False, result.status == 0
        return result

    def open(self) -> None:
        """Log in, without a session, and leave the connection open behind. Raises TargetError."""
        for last in attempts():
            result = self.log_in(*SSH_QUIET, "-o", "ControlPersist=%d" % MASTER_IDLE)
            if self.opened:
                return
            error = explain_login(self, result, last)
            if self.opened:                 # when it was asked once more
                return
            if error.kind not in RETRIED or last:
                raise error

    def reopen(self) -> None:
        """Open the connection again with the proofs that this target has passed before."""
        path_proved, self.path_proved = self.path_proved, False
        self.open()
        self.prove_restricted()
        if path_proved:
            prove_path(self)

    def session(self, options: Sequence[str], command: str) -> Result:
        argv = [self.shared.ssh, *self.session_options(), *options, *self.destination(), command]
        return run(argv, stdin=subprocess.PIPE, deadline=SESSION_DEADLINE)

    def prove_restricted(self, patient: bool = True) -> None:
        """Ask for a command on this connection; raise TargetError unless it was refused.

        Where that cannot be told: not patient only leaves .restricted false.
        """
        for last in attempts():
            error = judge_refusal(self.target, self.session((), PROOF_COMMAND))
            self.restricted = error is None
            if error is None or not patient:
                return
            if error.kind not in RETRIED or last:
                raise error

    def rsync_words(self, path: str) -> list[str]:
        """Return rsync's words for this connection and a path on the target."""
        shell = map(quote_for_rsync, [self.shared.ssh, *self.session_options()])
        host = "[%s]" % self.target.host if ":" in self.target.host else self.target.host
        return ["-e", " ".join(shell), "--", "%s@%s:%s" % (self.target.user, host, path)]

    def run_rsync(self, options: Sequence[str], *, source: bytes = b"", path: str = ".",
                  stdin: Optional[BinaryIO] = None, item_format: bytes = b"%i %n",
                  on_item: Callable[[bytes], None] = lambda line: None,
                  on_other: Callable[[bytes], None] = lambda line: None, strong: bool = False,
                  deadline: float = FOREVER, greeting: float = FOREVER,
                  timeout: int = 0) -> Result:
        """Run one rsync to the target, once; give each itemized line to on_item.

        stdin is an open file, read from its beginning. Seconds: timeout without a byte, deadline
        for all of it, greeting until the server has answered.
        """
        other, self.answered = 0, False     # other: bytes that are no items

        def on_any_line(line: bytes) -> None:
            self.answered = True            # it is not tried again then
            on_line(line)

        def on_other_line(line: bytes) -> None:
            nonlocal other
            other += len(line)
            if other > OTHER_LIMIT + 200 * self.shared.source.count:    # progress: a line a file
                raise failure(self.target, Kind.ELSEWHERE, "text without end")
            on_other(line)

        out_format, on_line = marked(item_format, on_item, on_other_line)
        *shell, destination = self.rsync_words(path)
        # -8: raw bytes in every locale. flist1 prints a line once the server has answered.
        argv: list[Union[str, bytes]] = [self.shared.rsync, "-8", "--info=flist1", *options]
        argv += ["--timeout=%d" % (timeout or self.shared.config.timeout), out_format, *shell,
                 (source or self.shared.source.root).rstrip(b"/") + b"/", destination]
        if stdin:
            os.lseek(stdin.fileno(), 0, os.SEEK_SET)
        result = run(argv, stdin=stdin or subprocess.DEVNULL, on_line=on_any_line,
                     deadline=deadline, greeting=greeting, linger=LINGERING,
                     env=environment(rsync=True, strong=strong))
        if result.status != 0 and not result.stderr:    # the last words of a dying one may be lost
            return result._replace(stderr=SILENT + b" (code %d)" % (result.status or 0))
        return result

    def rsync(self, options: Sequence[str], **more: Any) -> Result:
        """Run one rsync as run_rsync() does; again after a lock or a lost connection.

        But not once rsync there has answered: what it did is then for the caller to judge.
        """
        for last in attempts():
            if not self.opened:
                self.reopen()
            result = self.run_rsync(options, **more)
            if result.status in (0, None) or self.answered or last:
                return result
            self.opened = self.is_open()
            if self.opened and diagnose(self.target, result.stderr).kind not in RETRIED:
                return result
        raise AssertionError("the last attempt returns")

def explain_login(connection: Connection, result: Result, last: bool) -> TargetError:
    """Return what a connection that did not open meant.

    With ControlPersist ssh hides what a jump host says, and at LogLevel ERROR much of what sshd
    says: so where the first answer tells too little, it logs in once more, without the one and at
    INFO; if that opens the connection, it is open. It needs our environment (a ProxyCommand may),
    and sends nothing of it, since there is no session.
    """
    target, error = connection.target, diagnose(connection.target, result.stderr)
    if result.status is None:
        return failure(target, Kind.TIMEOUT)
    if error.kind is Steering.HOST_KEY_CHANGED:
        return explain_host_key(connection, error)
    if error.kind is Kind.KEY_REFUSED or b"Load key" in result.stderr:
        check_own_key(connection.shared.home.key)       # raises for what is wrong with it here
    if error.kind not in (Kind.OTHER, Steering.BUSY_SSHD, Kind.LOST):
        return error
    route = has_route(connection)
    if error.kind is Steering.BUSY_SSHD and not route and not last:
        return error                        # it is tried again first
    again = connection.log_in("-o", "LogLevel=INFO")
    talking = diagnose(target, again.stderr)
    before_sshd = (b"kex_exchange_identification", b"UNKNOWN port")
    if route and any(words in again.stderr for words in before_sshd):
        if not last and again.stderr.startswith(before_sshd[0]):
            return talking                  # no word of the jump host's: it is tried again, too
        return failure(target, Kind.ROUTE, "%s: %s" % (route, quote_answer(again.stderr)))
    return error if talking.kind is Kind.OTHER and not again.stderr.strip() else talking


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
        raise failure(target, Kind.OPEN, "a shell command ran there")
    if result.status is None:               # a start file that reads its stdin, for example
        raise failure(target, Kind.SILENT)
    if result.stdout.strip():               # some real ones speak there: nologin(8)
        error = diagnose(target, result.stdout + b"\n" + result.stderr)
        if error.kind in (Kind.NOLOGIN, Kind.EXPIRED, Kind.OTHER_SERVICE):
            raise error
        raise failure(target, Kind.PRINTS, quote_answer(result.stdout))
    if result.status == 0:
        raise failure(target, Kind.NOT_RRSYNC)
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
    expected, silences = os.fsencode(target.remote_path), 0
    for last in attempts():
        started = time.monotonic()
        result = connection.run_rsync(("-n", "-r"), source=connection.shared.empty,
                                      path="/%s/x" % marker.decode(), deadline=SESSION_DEADLINE)
        connection.session_seconds = time.monotonic() - started - 0.1   # see LINGERING
        if result.status == 0:
            raise failure(target, Kind.OPEN, "it writes anywhere")
        before, found, _ = printed_name(result.stderr).partition(marker)
        quoted = b'"' + expected + b"/"
        if found and before.endswith((quoted, quoted + b"/")):      # two slashes up to 3.1.3
            connection.path_proved = True
            return "it stays below " + show(expected)
        quote = before.rfind(b'"/')
        if found and quote >= 0:
            elsewhere = before[quote + 1:].rstrip(b"/") or b"/"
            other = target._replace(remote_path=os.fsdecode(elsewhere))
            raise failure(other, Kind.OPEN if elsewhere == b"/" else Kind.OTHER_PATH,
                          "its key writes below %s, not below %s" % (
                              show(elsewhere), show(expected)))
        silences += result.stderr.startswith(SILENT)
        error = diagnose(target, result.stderr)
        again = error.kind in RETRIED or result.stderr.startswith(SILENT)
        if not again or last or silences == 5:      # a dying rsync now and then loses its words
            break
    if error.kind in (Kind.OTHER, Kind.NO_ANSWER):
        error = failure(target, Kind.MUTE, quote_answer(result.stderr))
    raise error


# --- Trust core: what rsync prints --------------------------------------------------------------

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

    def __init__(self, target: Target, planned: Sequence[Change]) -> None:
        self.target = target
        self.planned: dict[bytes, list[Change]] = {}        # also what is above; "a -> b" may be
        for change in planned:                              # two symlinks: a, and a -> b
            self.planned.setdefault(self.name(change), []).append(change)
        self.reported: set[bytes] = set()   # paths, as planned
        self.wrong: set[bytes] = set()      # other content, mode or link, or not planned at all
        self.bytes = 0
        self.room = 50 * len(planned) + 1000        # reports: a target can ask again and again

    @staticmethod
    def name(change: Change) -> bytes:
        """Return the letter of a planned entry's type, and how %n%L names it."""
        assert change.entry is not None
        end = {"directory": b"/", "symlink": b" -> " + change.entry.link, "file": b""}
        return change.entry.type[:1].encode() + change.path + end[change.entry.type]

    def take(self, line: bytes) -> None:
        """Take one report. Raises ValueError for what is none, TargetError for a deletion.

        rsync prints what a target says that it deleted, in any pass and without end.
        """
        md5 = line[:32].strip()
        mode, count, itemized = line[33:].split(b" ", 2)
        code, name = itemized[:11], printed_name(itemized[12:])
        self.room -= 1
        if code.startswith(b"*deleting") or self.room < 0:
            raise failure(self.target, Kind.ELSEWHERE, "a deletion" if self.room >= 0 else
                          "without end", [name])
        self.bytes += int(count)
        changes = self.planned.get(code[1:2].replace(b"L", b"s") + name, ())
        if not changes:
            if code[:1] != b"." or code[2:].strip(b" .t"):      # unchanged directories come along
                self.wrong.add(name.rstrip(b"/"))
            return
        change = next((c for c in changes if c.path not in self.reported), changes[-1])
        entry, as_planned = change.entry, True
        assert entry is not None
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
    return sum(change.entry.size for change in changes if change.entry and change.sends_content)


# --- Trust core: the plan -----------------------------------------------------------------------

# One pass shows additions, changes and deletions. -t only adds time flags, which quick needs;
# differences of time alone are not reported.
RSYNC_PLAN = {"hash": ("-n", "-rlptc", "--delete"), "strong": ("-n", "-rlptc", "--delete"),
              "quick": ("-n", "-rlpt", "--delete")}
# Of the listed entries, those that do not exist at all on the target.
RSYNC_ABSENT = ("-n", "-lpt", "--ignore-existing", "--from0", "--files-from=-")
# Of the listed entries, those that differ by hash.
RSYNC_COMPARE = ("-n", "-lptc", "--from0", "--files-from=-")
MAX_TARGET_ONLY = 1 << 31                   # bytes that what only targets have may take in all
ENTRY_COST = 150                            # bytes of memory for each, beside its name
PLAN_VERSION = 3                            # counts the form of plans
POLICY = ("source", "delete", "overwrite", "verify", "exclude")     # what a review approves

class TargetPlan:
    """The plan of one target; error says why there is none. Equal plans share their changes."""

    def __init__(self, shared: Run, target: Target) -> None:
        self.target, self.connection = target, Connection(shared, target)
        self.error: Optional[TargetError] = None
        self.changes: list[Change] = []     # sorted by path
        self.digest = b""                   # of the changes: equal for targets with equal plans
        self.spared: set[bytes] = set()     # leftovers that a reviewed plan does not list

    def of(self, *kinds: str) -> list[Change]:
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
            raise failure(target, Kind.ELSEWHERE, str(error)) from None
        if not change:
            return
        found.append(change)
        if change.kind != "missing":
            most -= 1                       # it can ask for an entry again and again
            want(change.path)
        elif paths is not None:
            raise failure(target, Kind.ELSEWHERE, "a deletion", [change.path])
        else:
            room -= len(change.path) + ENTRY_COST
        if room < 0 or most < 0:            # a hostile target shall not fill our memory
            raise failure(target, Kind.ELSEWHERE, "too many entries")

    if paths is None:
        excludes = ["--exclude=" + pattern for pattern in shared.config.exclude]
        more.setdefault("greeting", SESSION_DEADLINE)
        result = connection.rsync((*options, *excludes), on_item=on_item, **more)
    else:
        with scratch_file(shared.scratch, map(listed_name, paths)) as names:
            result = connection.rsync(options, stdin=names, on_item=on_item, **more)
    if result.status is None:
        raise failure(target, Kind.SILENT)
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
    mode, started = shared.config.verify, time.monotonic()
    failed: Optional[OffsyncError] = None

    def begin_proof(_: bytes) -> None:
        if not proofs:
            proofs.append(shared.provers.submit(connection.prove_restricted, False))

    try:
        changes = itemize(connection, RSYNC_PLAN[mode], want=shared.source.want,
                          on_other=begin_proof, strong=mode == "strong")
    except OffsyncError as error:
        failed = error
    connection.pass_seconds = time.monotonic() - started
    shared.source.flush()
    if proofs:
        proofs[0].result()                  # raises where the key is known to be open
    waited = isinstance(failed, Stopped) or getattr(failed, "kind", None) is Kind.SILENT
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
            raise failure(connection.target, Kind.ELSEWHERE, "%s twice" % show(one.path))
    return changes

def plan_target(shared: Run, target: Target) -> TargetPlan:
    """Return the plan of one target, errors included.

    It connects while the source is scanned, and compares nothing before that is accepted. Where
    there is something to do, the key must really write below the configured path: that is proved
    while the source entries are hashed.
    """
    plan, source = TargetPlan(shared, target), shared.source
    try:
        PROGRESS.update(target.login, "connecting")
        plan.connection.open()
        while not source.accepted.wait(0.1):
            if STOP.is_set():               # also where it was refused: the run is over
                raise Stopped("interrupted")
        if not target.symlinks and source.symlinks:
            raise failure(target, Kind.SYMLINKS, names=source.symlinks)
        PROGRESS.update(target.login, "comparing")
        changes = classify(plan.connection, compare_proved(plan.connection))
        if changes:
            prove_path(plan.connection)
        source.wait()
        for index, change in enumerate(changes):
            if change.kind in ("added", "modified"):
                changes[index] = change._replace(entry=source.entry(change.path))
        plan.changes, plan.digest = share(shared, target, changes)
    except Stopped:
        raise
    except TargetError as error:
        plan.error = error
    except (OffsyncError, OSError) as problem:
        plan.error = TargetError(target.login, Kind.LOCAL, getattr(problem, "text", str(problem)))
    PROGRESS.update(target.login, None)
    return plan

def share(shared: Run, target: Target, changes: list[Change]) -> tuple[list[Change], bytes]:
    """Return (the changes, or the same ones of another target; their digest)."""
    if shared.targets == 1:
        return changes, target.login.encode()
    digest = new_digest()
    for change in changes:
        digest.update(repr(change).encode())
    with shared.source.lock:
        return shared.plans.setdefault(digest.digest(), changes), digest.digest()

def plan_all(shared: Run, targets: Sequence[Target]) -> list[TargetPlan]:
    """Return the plan of each target, in the given order. Raises where the source is refused."""
    source, home = shared.source, shared.home
    check_place(source, (home.path, home.key))      # before any target is contacted
    shared.targets = len(targets)
    planning = shared.jobs.each(lambda target: plan_target(shared, target), targets)
    check_source(source, shared.rsync, targets)
    source.accepted.set()
    with contextlib.closing(planning):      # type: ignore[type-var]
        plans = dict(planning)
    return [plans[target] for target in targets]

def json_line(fields: dict[str, Any]) -> bytes:
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
    return before + b'"login": ', after

def plan_lines(config: Config, plans: Sequence[TargetPlan]) -> Iterator[bytes]:
    """Yield a plan as JSON Lines, its only form: printed, kept; the plan ID is its sha256.

    A line for the policy, one a target, one an entry; sorted by login and path.
    """
    yield json_line({"version": PLAN_VERSION, **{key: getattr(config, key) for key in POLICY}})
    for plan in plans:
        target, error = plan.target, plan.error.kind.name if plan.error else None
        yield json_line({"login": target.login, "host": target.host, "port": target.port,
                         "remote_path": target.remote_path, "error": error})
    equal = collections.Counter(plan.digest for plan in plans)
    pieces: dict[bytes, list[tuple[bytes, bytes]]] = {}     # of targets with equal plans: made once
    for plan in plans:
        login = json.dumps(plan.target.login).encode()
        lines: Iterable[tuple[bytes, bytes]] = map(split_line, plan.changes)
        if equal[plan.digest] > 1:
            lines = pieces[plan.digest] = pieces.get(plan.digest) or list(lines)
        for before, after in lines:
            yield before + login + after

def identify_plan(config: Config, plans: Sequence[TargetPlan]) -> tuple[str, int]:
    """Return (the plan ID, the sha256 of the plan's lines; their size in bytes)."""
    digest, size = new_digest(), 0
    for line in plan_lines(config, plans):
        digest.update(line)
        size += len(line)
    return digest.hexdigest(), size

def read_line(line: bytes) -> tuple[dict[str, Any], Optional[Change]]:
    """Return the fields of a plan's line, and the change of an entry's.

    Raises ValueError, KeyError or TypeError unless the line is byte for byte what plan_lines()
    prints of them: so nothing can be shown otherwise than it is approved.
    """
    fields, change = json.loads(line), None
    if "kind" in fields:
        entry = None
        if fields["kind"] in ("added", "modified"):
            link = read_json_name(fields, "link") if fields["type"] == "symlink" else b""
            entry = Entry(fields["type"], int(fields["mode"], 8), fields["size"],
                          bytes.fromhex(fields.get("sha256", "")), link=link)
        change = Change(inside(read_json_name(fields)), KINDS[KINDS.index(fields["kind"])],
                        fields["type"] == "directory", tuple(fields.get("changes", ())), entry)
        before, after = split_line(change)
        printed = before + json.dumps(fields["login"]).encode() + after
    else:
        known = ("login", "host", "port", "remote_path", "error") if "login" in fields else (
            "version", *POLICY)
        printed = json_line({key: fields[key] for key in known})
    if printed != line:
        raise ValueError("it is not as offsync prints it")
    hash((fields.get("login"), change))     # no list where a word belongs
    return fields, change


# --- Trust core: approval -----------------------------------------------------------------------

# What the config must allow for a kind of change, and the ways out.
POLICIES = {
    "missing": ("delete", "take them into the source, exclude them, or allow it: --delete, or "
                '"delete: true" in the config'),
    "modified": ("overwrite", "exclude them, remove them there, or allow it: "
                 '"overwrite: true" in the config')}
MANY_DELETIONS = 10                         # from so many on, max_delete is asked

def line_key(line: bytes) -> bytes:
    """Return what of a plan's line an approval compares: all but whether a target was reached.

    One that cannot be reached now fails alone. "error" is the first of a target's sorted keys.
    """
    line = re.sub(rb'\A\{"error": (?:null|"[a-z-]*"), ', b"{", line)
    return bytes(new_digest(line).digest())

def approve(shared: Run, plans: Sequence[TargetPlan], reviewed: Iterable[bytes], name: str) -> None:
    """Raise, naming the differences, unless a reviewed plan approves the plan of now.

    Every line of now must stand in it, but for leftovers; and what it has besides must be on the
    targets already: so the source must hold all that it adds or modifies, and lack all that it
    deletes. A target that it does not show fails alone, by its plan's error.
    """
    unapproved = {line_key(line) for line in plan_lines(shared.config, plans)
                  if b'"kind": "leftover"' not in line}
    held: set[tuple[bytes, Entry]] = set()
    leftovers: set[tuple[str, bytes]] = set()
    shown: dict[bytes, bool] = {}           # target lines: whether it was compared then
    differing: list[str] = []
    policy: dict[str, Any] = {}
    for number, line in enumerate(reviewed, 1):
        key = line_key(line)
        if key in unapproved and not line.startswith(b'{"error"'):
            unapproved.discard(key)
            continue
        try:
            fields, change = read_line(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            refuse_line(name, number, line)
        if change is None:
            shown[key] = fields.get("error") is None
            unapproved.discard(key)
            policy = fields if "login" not in fields else policy
        elif change.kind == "leftover":
            leftovers.add((fields["login"], change.path))
        elif change.entry:
            held.add((change.path, change.entry))
        elif os.path.lexists(os.path.join(shared.source.root, change.path)):
            differing.append("%s is in the source again" % cut(show(change.path)))
    unknown = refuse_unknown(shared, plans, shown)
    if unknown == {plan.target.login for plan in plans}:
        differing.append("it shows none of these targets, or could not compare them")
    differing += ["%s is not in the source as reviewed" % cut(show(path))
                  for path in not_in_source(shared.source, held)]
    if unapproved:                          # the policy comes first
        new = (json.loads(line) for line in plan_lines(shared.config, plans)
               if line_key(line) in unapproved)
        differing = [*dict.fromkeys(name_line(fields, policy) for fields in new
                                    if fields.get("login") not in unknown), *differing]
    if differing:
        raise OffsyncError(
            "refused, nothing was sent: plan %s does not approve what would be done now; review a "
            "new one: `offsync plan`; what differs: %s", show_text(name), some_of(differing, "; "))
    for plan in plans:                      # nothing is deleted that was not listed
        plan.spared = {change.path for change in plan.of("leftover")
                       if (plan.target.login, change.path) not in leftovers}

def refuse_line(name: str, number: int, line: bytes) -> NoReturn:
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        fields = json.loads(line)
        if "source" in fields and fields.get("version") != PLAN_VERSION or "set" in fields.values():
            raise UsageError("plan %s: it is of another version of offsync; plan again: "
                             "`offsync plan`", show_text(name))
    raise UsageError(
        "plan %s:%d: this is no line of a plan, as offsync prints it; name a file that 'offsync "
        "plan --json' printed, unchanged", show_text(name), number)

def refuse_unknown(shared: Run, plans: Sequence[TargetPlan], shown: dict[bytes, bool]) -> set[str]:
    """Set the error of each target that a review did not show; return their logins."""
    unknown, lines = set(), plan_lines(shared.config, plans)
    next(lines)                             # the policy
    for plan, line in zip(plans, lines):
        compared = shown.get(line_key(line))
        if not compared:
            unknown.add(plan.target.login)
            plan.error = plan.error or failure(plan.target, Kind.NOT_REVIEWED)
            plan.changes = []
    return unknown

def not_in_source(source: Source, held: set[tuple[bytes, Entry]]) -> list[bytes]:
    """Return the paths of those entries that the source does not hold; hashes what is not yet."""
    def same(path: bytes, entry: Entry) -> bool:
        now = source.entries.get(path)
        return now._replace(md5=b"") == entry if now else source.is_as(path, entry)

    return sorted({path for path, entry in held if not same(path, entry)})

def name_line(fields: dict[str, Any], policy: dict[str, Any]) -> str:
    if "source" in fields:
        return "the policy is now another (config, --source and --delete as for the plan?): " + \
            ", ".join("%s %s, not %s" % (key, json.dumps(fields[key]), json.dumps(policy.get(key)))
                      for key in fields if fields[key] != policy.get(key))
    return "%s: %s is now %s" % (
        fields["login"], cut(show(read_json_name(fields))), fields["kind"])

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
    forbidden = []
    for kind, (key, ways_out) in POLICIES.items():
        concerned = [plan for plan in plans if plan.of(kind)]
        if concerned and not getattr(config, key):
            forbidden.append(refuse_kind(kind, key, ways_out, plans, concerned))
    if forbidden:
        return "; and ".join(forbidden)
    for plan in () if reviewed else deleting:
        gone, new = len(plan.of("missing", "leftover")), len(plan.of("added"))
        there = kept - new + gone           # what it has now; it will have what the source has
        if gone >= MANY_DELETIONS and 100 * kept < (100 - config.max_delete) * there:
            return "%s would shrink from %d to %d entries (max_delete: %d percent); is the " \
                   "source %s mounted and filled? If it is meant, review it: offsync plan, then " \
                   "offsync apply --plan ID, both with the same --source and --delete; or raise " \
                   "max_delete in the config" % (
                       plan.target.login, there, kept, config.max_delete, source)
    return ""

def refuse_kind(kind: str, key: str, ways_out: str, plans: Sequence[TargetPlan],
                concerned: Sequence[TargetPlan]) -> str:
    """Return why a kind of change that the policy forbids stops the run, and the ways out."""
    if len(concerned) < len(plans) and len(concerned) <= LISTED:
        logins = shlex.join(word for plan in concerned for word in ("--except", plan.target.login))
        ways_out += ", or leave those targets out: `offsync apply %s`" % logins
    named = ["%s: %s" % (plan.target.login, some_paths(change.path for change in plan.of(kind)))
             for plan in concerned]
    total = sum(len(plan.of(kind)) for plan in concerned)
    return compose("%s is false, and the plan has %d %s; " + ways_out.replace("%", "%%") + ": %s",
                   key, total, kind, some_of(named, "; "))


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
# Deletes what the include rules name, protects all else, and can send nothing: the first filter
# hides all but directories here, so that a target that means ill has no file to ask for. None of
# the config's rules: a "+ " rule among them would permit deletions that nobody planned. --from0
# must stand before --include-from. (--delete-missing-args fails in several releases.)
RSYNC_DELETE = ("--filter=hide,! */", "-r", "--delete", "--existing", "--ignore-existing",
                "--from0", "--include-from=-", "--exclude=*")
# Seconds without a byte while sending: nothing is hashed in silence then, and a killed rsync there
# leaves no EOF.
SEND_TIMEOUT = 300
RESCAN_DEADLINE = 15.0                      # seconds to learn what arrived after a failure

class Verdict(NamedTuple):
    """How a target compares with the source, as far as one pass looked."""
    differs: dict[bytes, Change]            # what the source has
    only_there: set[bytes]                  # but for leftovers that are not to be deleted

class Delivery:
    """Carries one target's plan out and verifies it."""

    def __init__(self, shared: Run, plan: TargetPlan) -> None:
        self.shared, self.plan, self.connection = shared, plan, plan.connection
        self.login, self.source = plan.target.login, shared.source
        self.hash = "strong" if shared.config.verify == "strong" else "hash"
        self.sent = [change for change in plan.of("added", "modified") if change.entry]
        self.deletable: dict[bytes, bool] = {}      # path -> whether it is a directory
        if shared.config.delete:
            self.deletable = {c.path: c.directory for c in plan.of("missing", "leftover")
                              if c.path not in plan.spared}
        self.bytes_sent: Optional[int] = 0
        self.begun = False                  # something may have changed there
        self.verdict: Optional[Verdict] = None      # at the end; None is unknown

    def carry_out(self, record: Record) -> Record:
        """Send, delete and verify; return the record of what became of it, also after a failure."""
        started, result = time.monotonic(), "ok"
        error: Optional[str] = None
        try:
            if self.plan.error:
                raise self.plan.error
            if self.plan.changes:
                self.deliver()
            self.verdict = Verdict({}, set())
        except Stopped:
            result, error = "interrupted", "apply again finishes the job"
        except (OffsyncError, OSError, MemoryError) as problem:
            result, error = "failed", getattr(problem, "text", str(problem) or "not enough memory")
            if isinstance(problem, TargetError):
                error = problem.why
            source_changed = getattr(problem, "kind", None) is Kind.SOURCE_CHANGED
            if self.begun and self.verdict is None and not source_changed:
                self.find_out()             # else there is nothing to compare with
        PROGRESS.update(self.login, None)
        changed, deleted = self.arrived() if self.begun or result == "ok" else ([], [])
        return record._replace(
            result=result, error=error, files_changed=changed, files_deleted=deleted,
            bytes_sent=self.bytes_sent, seconds=round(time.monotonic() - started, 3))

    def arrived(self) -> tuple[Optional[list[str]], Optional[list[str]]]:
        """Return what was delivered and what was deleted, None where that is not known.

        A file whose mode was not taken has arrived all the same.
        """
        if self.verdict is None:
            return None, None
        differs, only_there = self.verdict
        changed = []
        for change in self.sent:
            left = differs.get(change.path)
            if left is None or left.reasons == ("mode",) and change.reasons != ("mode",):
                changed.append(show(change.path))
        return changed, [show(path) for path in sorted(set(self.deletable) - only_there)]

    def deliver(self) -> None:
        """Do what the plan lists: files and directories, modes, symlinks, then deletions.

        Each step is verified before the next one relies on it: no symlink points at what has not
        arrived, and nothing is deleted before what replaces it is there.
        """
        links = [c for c in self.sent if c.entry and c.entry.type == "symlink"]
        others = [c for c in self.sent if c.entry and c.entry.type != "symlink"]
        modes = [c for c in others if c.reasons == ("mode",)]
        content = [c for c in others if c.reasons != ("mode",)]
        self.check_excluded()
        self.check_twins()
        self.make_way(content)
        self.send(content, RSYNC_CONTENT)
        self.send(modes, RSYNC_MODES)
        verdict = self.verify([*content, *modes]) if others else None
        self.make_way(links)
        self.send(links, ())
        if links or verdict is None:
            verdict = self.compare_tree()
        if not verdict.differs and verdict.only_there & set(self.deletable):
            verdict = self.delete_verified(verdict.only_there)
        if verdict.differs or verdict.only_there:
            self.verdict = verdict
            raise self.differs(verdict)

    def check_excluded(self) -> None:
        """Raise if an entry would replace a directory there that an exclude protects.

        A rule such as "uploads/" protects a directory of that name, but none of what is in it once
        the source has a file or symlink called so. rsync is asked, with directories of these names.
        """
        replacing = [change.path for change in self.sent if "type" in change.reasons
                     and change.entry and change.entry.type != "directory"]
        if not replacing or not self.shared.config.exclude:
            return
        place = os.path.join(self.shared.scratch, "rules-%d" % next(self.shared.numbers))
        for path in replacing:
            os.makedirs(os.path.join(os.fsencode(place), path), exist_ok=True)
        asking = Source(place, self.shared.config.exclude)
        protected = set(replacing) - asking.included(self.shared.rsync)
        if protected:
            raise failure(self.plan.target, Kind.PROTECTED, names=protected)

    def check_twins(self) -> None:
        """Raise if a deletion could take along what the source has under a similar name.

        Where a target takes README for Readme, it reports README as only there and Readme as equal.
        It tells the two apart if the one of the source is added in the same pass. Where the source
        has both, they would overwrite each other in turn.
        """
        added = {c.path for c in self.plan.of("added")}
        modified = [c.path for c in self.plan.of("modified")]
        for kind, paths in (Kind.TWINS, [*self.deletable]), (Kind.SAME_NAME, modified):
            names = self.taken_for_one(paths, added, doubted=kind is Kind.TWINS)
            if names:
                raise self.failure(kind, names)

    def taken_for_one(self, paths: Sequence[bytes], added: set[bytes],
                      doubted: bool = True) -> set[bytes]:
        """Return these paths and those of the source that the target takes for the same.

        Not where the one of the source is added, nor where rsync finds that a third spelling does
        not exist there: then the target tells them apart. doubted: also where there is none.
        """
        twins = [pair for pair in find_twins(self.source, paths) if pair[1] not in added]
        there = self.source.included(self.shared.rsync) - added if twins else set()
        thirds = third_spellings(twins, there, {*there, *added, *paths})
        place = os.path.join(self.shared.scratch, "twins-%d" % next(self.shared.numbers))
        asked = sorted({third for third in thirds.values() if third})
        for third in asked:
            name = os.path.join(os.fsencode(place), third)
            os.makedirs(os.path.dirname(name), exist_ok=True)
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600))
        absent = {change.path for change in itemize(
            self.connection, RSYNC_ABSENT, asked, source=os.fsencode(place))
                  if change.kind == "added"} if asked else set()
        return {name for pair, third in thirds.items()
                if third not in absent and (third or doubted) for name in pair}

    def make_way(self, changes: Sequence[Change]) -> None:
        """Delete the planned entries below the directories that give way to these."""
        replaced = {c.path for c in changes if "type" in c.reasons and not c.directory}
        blocking = {}
        for path, directory in self.deletable.items() if replaced else ():
            above = itertools.accumulate(path.split(b"/")[:-1], lambda one, two: one + b"/" + two)
            if not replaced.isdisjoint(above):
                blocking[path] = directory
        if blocking:
            self.delete(blocking, self.compare("quick").only_there)

    def send(self, changes: Sequence[Change], how: Sequence[str]) -> None:
        """Send exactly these; raise TargetError unless what went over is what was planned."""
        if not changes:
            return
        config, total = self.shared.config, size_to_send(changes)
        report = Sent(self.plan.target, self.sent)
        options = [*RSYNC_SEND, *how]
        options += ["--ignore-existing"] if not config.overwrite else []
        options += ["--bwlimit=%d" % config.bwlimit] if config.bwlimit else []
        options += ["-z"] if config.compress else []
        options += ["--info=progress2"] if PROGRESS.enabled() else []
        PROGRESS.update(self.login, "sending %s" % format_bytes(total))
        self.begun = True
        before, self.bytes_sent = self.bytes_sent or 0, None    # unknown where rsync fails
        with scratch_file(self.shared.scratch, (listed_name(c.path) for c in changes)) as names:
            try:
                result = self.connection.rsync(
                    options, stdin=names, on_item=report.take, item_format=RSYNC_SENT, strong=True,
                    on_other=lambda line: PROGRESS.show_rsync(self.login, total, line),
                    timeout=min(SEND_TIMEOUT, config.timeout), greeting=SESSION_DEADLINE)
            except ValueError as error:
                raise failure(self.plan.target, Kind.ELSEWHERE, str(error)) from None
        if result.status == 0:
            self.bytes_sent = before + report.bytes
        if report.wrong:
            raise self.failure(Kind.SOURCE_CHANGED, report.wrong)
        # It ends with 0 where nothing could be staged.
        if result.status != 0 or b"Unable to create partial-dir" in result.stderr:
            raise self.explain(result)
        lost = {c.path: c.entry for c in changes if c.entry and c.path not in report.reported}
        here = {path for path, entry in lost.items() if not self.source.is_as(path, entry)}
        if lost:
            raise self.failure(Kind.SOURCE_CHANGED if here else Kind.CHANGED_THERE,
                               here or set(lost))

    def failure(self, kind: Failure, paths: Iterable[bytes]) -> TargetError:
        return failure(self.plan.target, kind, names=paths)

    def explain(self, result: Result) -> TargetError:
        if result.status is None:
            return failure(self.plan.target, Kind.SILENT)
        error = diagnose(self.plan.target, result.stderr)
        if error.kind is Kind.OTHER:
            names = self.taken_for_one([change.path for change in self.sent], set())
            error = self.failure(Kind.SAME_NAME, names) if names else error
        return error

    def verify(self, sent: Sequence[Change]) -> Optional[Verdict]:
        """Compare by hash what was sent; raise TargetError for what differs.

        Where all was sent, and where a pass over the tree costs less than two sessions, the tree is
        compared instead of a list of names: then this returns how, else None.
        """
        PROGRESS.update(self.login, "verifying %s" % plural(len(sent), "entry", "entries"))
        near = self.shared.config.verify != "quick" and \
            self.connection.pass_seconds < 2 * self.connection.session_seconds
        whole = len(self.sent) == self.source.count or near
        paths = [change.path for change in sent]
        verdict = self.compare(self.hash, None if whole else paths)
        different = set(paths) & set(verdict.differs)
        left = {change.path for change in self.plan.of("leftover")}
        stuck = [change for change in sent if change.path in different
                 and change.sends_content and staged(change.path) in left]
        if stuck:                           # rsync 3.2.0 to 3.2.3 never puts it in place
            self.send(stuck, RSYNC_AT_ONCE)
            verdict = self.compare(self.hash, paths)
            whole, different = False, set(verdict.differs)
        if different:
            differing = {path: verdict.differs[path] for path in different}
            raise self.differs(Verdict(differing, set()))
        return verdict if whole else None

    def compare(self, how: str, paths: Optional[Sequence[bytes]] = None, **more: Any) -> Verdict:
        """Return how the tree compares, or how these paths do (always by hash)."""
        options = RSYNC_PLAN[how] if paths is None else RSYNC_COMPARE
        changes = itemize(self.connection, options, paths, strong=how == "strong", **more)
        only_there = {c.path for c in changes if c.kind == "missing" and (
            c.path in self.deletable or not is_leftover(self.source, c))}
        return Verdict({c.path: c for c in changes if c.kind != "missing"}, only_there)

    def compare_tree(self) -> Verdict:
        """Return how the tree compares: what differs by size and time is compared by hash, too."""
        PROGRESS.update(self.login, "comparing again")
        verdict = self.compare("quick")
        if verdict.differs:                 # a quick check can be wrong: a hash is not
            by_hash = self.compare(self.hash, sorted(verdict.differs))
            verdict = verdict._replace(differs=by_hash.differs)
        return verdict

    def differs(self, verdict: Verdict) -> TargetError:
        """Return the error for what differs afterwards; names the source where that changed."""
        planned = {change.path: change.entry for change in self.sent}
        different = sorted({*verdict.differs, *verdict.only_there})
        here = []
        for path in different[:1000]:
            entry = planned.get(path)
            if not (self.source.is_as(path, entry) if entry else self.precedes(path)):
                here.append(path)
        if here:
            return self.failure(Kind.SOURCE_CHANGED, here)
        only_modes = all(change.reasons == ("mode",) for change in verdict.differs.values())
        if only_modes and not verdict.only_there:
            return self.failure(Kind.NO_MODES, different)
        names = self.taken_for_one(different, set())
        return self.failure(Kind.SAME_NAME if names else Kind.DIFFERS, names or different)

    def precedes(self, path: bytes) -> bool:
        """Return whether the source has had an entry, or its directory, as it is since before.

        For words only: a time proves nothing.
        """
        for place in (path, os.path.dirname(path)):
            with contextlib.suppress(OSError):
                place = os.path.join(self.source.root, place)
                return os.lstat(place).st_ctime_ns < self.shared.started
        return True

    def delete(self, paths: dict[bytes, bool], extraneous: set[bytes]) -> None:
        """Delete these planned entries, unless others have appeared since: then nothing.

        Raises TargetError for anything else that rsync reports: only these may go.
        """
        surprises = extraneous - set(self.deletable)
        if surprises:
            raise self.failure(Kind.APPEARED, surprises)
        PROGRESS.update(self.login, "deleting %s" % plural(len(paths), "entry", "entries"))
        may_go = {*paths, *(c.path for c in self.sent
                            if "type" in c.reasons and not c.directory)}

        def judge(line: bytes) -> None:
            code, name = line[:11], printed_name(line[12:]).rstrip(b"/")
            gone = code.startswith(b"*deleting") and name in may_go
            may_go.discard(name)            # once: a target can report it without end
            if not gone and not code.startswith(b".d"):
                raise failure(self.plan.target, Kind.ELSEWHERE, "in a deletion", [name])

        rules = {include_rule(path, directory): None for path, directory in paths.items()}
        for path in paths:                  # rsync must be let into the directories above
            while b"/" in path:
                path = os.path.dirname(path)
                rules[include_rule(path, True)] = None
        self.begun = True
        with scratch_file(self.shared.scratch, rules) as stream:
            result = self.connection.rsync(RSYNC_DELETE, stdin=stream, on_item=judge)
        if result.status != 0:
            raise self.explain(result)

    def delete_verified(self, extraneous: set[bytes]) -> Verdict:
        """Delete all that may go, and return how the tree compares then.

        What the deletion took along (a target that takes two names for one) is sent again.
        """
        self.delete(self.deletable, extraneous)
        verdict = self.compare_tree()
        taken = [path for path, change in verdict.differs.items() if change.kind == "added"]
        if not taken:
            return verdict
        for path in taken:
            self.source.want(path)
        self.source.wait()
        again = [Change(path, "added", self.source.entry(path).type == "directory",
                        entry=self.source.entry(path)) for path in sorted(taken)]
        planned = {change.path for change in self.sent}
        self.sent += [change for change in again if change.path not in planned]
        for links in (False, True):
            some = [c for c in again if c.entry and (c.entry.type == "symlink") is links]
            self.send(some, () if links else RSYNC_CONTENT)
        found = self.compare(self.hash, sorted(taken))
        return found if found.differs else self.compare_tree()

    def find_out(self) -> None:
        """After a failure, learn what arrived all the same, in a bounded time; else: unknown."""
        with contextlib.suppress(OffsyncError, OSError):
            verdict = self.compare("quick", deadline=RESCAN_DEADLINE)
            if self.sent:
                paths = [change.path for change in self.sent]
                by_hash = self.compare(self.hash, paths, deadline=RESCAN_DEADLINE)
                verdict = verdict._replace(differs=by_hash.differs)
            self.verdict = verdict

def staged(path: bytes) -> bytes:
    return os.path.join(os.path.dirname(path), STAGING, os.path.basename(path))

Twins = tuple[bytes, bytes]

def find_twins(source: Source, paths: Iterable[bytes]) -> list[Twins]:
    """Return (path, similar path of the source) where a file system may take the two for one.

    Also of the directories above: it would merge these. What lies below a missing directory goes
    the way of that one.
    """
    found: list[Twins] = []
    seen: set[bytes] = set()
    by_directory: dict[bytes, list[bytes]] = {}
    for path in paths:
        while path and path not in seen:
            seen.add(path)
            directory, name = os.path.split(path)
            by_directory.setdefault(directory, []).append(name)
            path = directory
    for directory, names in by_directory.items():
        similar: dict[str, list[bytes]] = {}
        with contextlib.suppress(OSError):  # it is missing, too
            for name in os.listdir(os.path.join(source.root, directory)):
                similar.setdefault(folded(name), []).append(name)
        for name in names:
            found += [(os.path.join(directory, name), os.path.join(directory, twin))
                      for twin in similar.get(folded(name), ()) if twin != name]
    return found

def third_spellings(twins: Sequence[Twins], there: set[bytes],
                    taken: set[bytes]) -> dict[Twins, Optional[bytes]]:
    """Return for each pair a name that is not taken, None where there is none.

    A name of the same directory that is there (best the twin's), spelt in another way: in the way
    in which the two differ, since a target may ignore case and not form (composed or not).
    """
    names: dict[bytes, list[bytes]] = {}
    for path in sorted(there) if twins else ():
        names.setdefault(os.path.dirname(path), []).append(path)
    found: dict[Twins, Optional[bytes]] = {}
    spare: dict[tuple[bytes, bool], Optional[bytes]] = {}
    for pair in twins:
        forms, directory = len(alike(pair)) == 2, os.path.dirname(pair[1])
        found[pair] = next((p for p in spellings(pair[1], forms) if p not in taken), None)
        if not found[pair]:
            if (directory, forms) not in spare:
                spelt = (p for name in names.get(directory, ()) for p in spellings(name, forms))
                spare[directory, forms] = next((p for p in spelt if p not in taken), None)
            found[pair] = spare[directory, forms]
    return found

def spellings(path: bytes, forms: bool) -> list[bytes]:
    """Return a path with its name in other cases, or for forms composed and decomposed."""
    directory, name = os.path.split(path)
    text = name.decode("utf-8", "replace")
    spelt = [text.swapcase(), text.upper(), text.lower(), text.title()]
    if forms:
        spelt = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    return [os.path.join(directory, other.encode("utf-8")) for other in spelt
            if other != text and "\ufffd" not in other and len(other.encode("utf-8")) < 256]


# --- Trust core: record, status and lock --------------------------------------------------------

def take_lock(home: "Home", what: str, shared: bool = False) -> None:
    """Take the lock until the end: writers one at a time, readers (shared) beside each other.

    The loser says who has it. A writer logs the runs that were killed.
    """
    flags = os.O_RDWR | os.O_CREAT
    if shared and not os.access(home.path, os.W_OK):
        flags = os.O_RDONLY
    try:
        descriptor = os.open(home.lock_file, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = quote_answer(read_file(home.lock_file, "lock", "try again")) or "another offsync"
        raise OffsyncError("%s is running and holds the lock %s; try again when it has finished",
                           holder, show_text(home.lock_file)) from None
    except OSError as error:
        if flags == os.O_RDONLY and isinstance(error, FileNotFoundError):
            return                          # where nobody may write, nobody does
        raise OffsyncError("lock %s: %s; nothing was sent or changed; mend that, then try again",
                           show_text(home.lock_file), error.strerror) from None
    with contextlib.suppress(OSError):      # only words for others: the disk may be full
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"offsync %s (process %d)\n" % (what.encode(), os.getpid()), 0)
    if not shared:
        log_killed_runs(home)

def open_log(home: "Home", so_far: str = "") -> int:
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        log = os.open(home.log, flags | os.O_NONBLOCK, 0o600)
        if not stat.S_ISREG(os.fstat(log).st_mode):
            raise OSError(22, "it is no regular file")
        size = os.fstat(log).st_size
        if size and os.pread(log, 1, size - 1) != b"\n":    # the disk was full once: what
            os.write(log, b"\n")                            # follows stays readable
        return log
    except OSError as error:
        raise OffsyncError("log %s: it cannot be written: %s; mend that, then apply again" + so_far,
                           show_text(home.log), error.strerror) from None

def append_log(home: "Home", fields: dict[str, Any]) -> None:
    """Append one record with one write. Raises OffsyncError if it is not all there."""
    line, log, why = json_line(fields), open_log(home), "no space left"
    try:
        written = os.write(log, line)
    except OSError as error:
        written, why = 0, str(error.strerror)
    os.close(log)
    if written != len(line):
        raise OffsyncError("log %s: the record could not be written: %s; mend that",
                           show_text(home.log), why)

def write_status(home: "Home", fields: dict[str, Any]) -> None:
    """Replace a target's status, last/LOGIN: its newest record, without the names."""
    make_directory(os.path.realpath(home.last), 0o700)
    status = {key: value for key, value in fields.items() if not key.startswith("files_")}
    write_atomically(os.path.join(home.last, fields["login"]), [json_line(status)], 0o600)

def read_statuses(home: "Home") -> dict[str, dict[str, Any]]:
    """Return the newest record of each login; what cannot be read is passed over."""
    found = {}
    for name in sorted(os.listdir(home.last)) if os.path.isdir(home.last) else ():
        with contextlib.suppress(OffsyncError, ValueError, TypeError, KeyError, RecursionError):
            fields = json.loads(read_file(os.path.join(home.last, name), "status", ""))
            if fields["login"] == name and isinstance(fields["result"], str):
                found[name] = fields
    return found

def log_killed_runs(home: "Home") -> None:
    """Log the deliveries that were killed before they could do so themselves. With the lock."""
    for name, fields in read_statuses(home).items():
        if fields["result"] == "started":
            fields.update(result="interrupted", error="offsync was killed; what arrived is "
                          "unknown; the next apply finishes the job")
            append_log(home, {**fields, "files_changed": None, "files_deleted": None})
            write_status(home, fields)
            warn("an apply to %s was killed; the next one finishes its job", show_text(name))

class Log:
    """The records of one apply, one for each target, whatever ends the run.

    finish() is called by the thread of a target, all else by the main thread.
    """

    def __init__(self, home: "Home", config: Config, targets: Sequence[Target],
                 as_json: bool) -> None:
        self.home, self.as_json, self.locked = home, as_json, False
        operator, sudo = name_of(os.getuid()), os.environ.get("SUDO_USER")
        operator += " (sudo by %s)" % sudo if sudo else ""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.open = {target.login: Record(when, operator, target.host, target.login, config.source)
                     for target in targets}
        self.started: set[str] = set()      # something may have changed there
        self.ended: dict[str, Record] = {}  # by login, not printed yet
        self.results: collections.Counter[str] = collections.Counter()      # of those printed
        self.said: dict[tuple[str, str], list[str]] = {}    # failures that were printed, and whose

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, _: object, error: Optional[BaseException], __: object) -> None:
        """End what has no end yet, for the reason that ended the run; say what all came to."""
        lost, begun = "", bool(self.results)
        for login in [*self.open] if error else ():
            begun_here = login in self.started
            nothing: Optional[list[str]] = None if begun_here else []       # None: unknown
            result, why = "interrupted", (
                "what was sent is unknown" if begun_here else "nothing was sent")
            if not isinstance(error, (Interrupted, Stopped)):
                result, why = "refused", getattr(error, "text", str(error))
            try:
                self.finish(self.open[login]._replace(
                    result=result, error=why, files_changed=nothing, files_deleted=nothing,
                    bytes_sent=None if begun_here else 0, seconds=0.0))
            except OffsyncError as problem:
                lost = problem.text
        expected = (OffsyncError, OSError, MemoryError)     # main() says why, once for all of them
        refused = isinstance(error, expected) and not isinstance(error, Stopped) and not begun
        for login in sorted(self.ended):
            self.report(login, quiet=refused)
        for (result, _), logins in self.said.items():
            if len(logins) > 1:
                emit("offsync: %s for the same reason as %s: %s" % (
                    result, logins[0], some_of(logins[1:])), error=True)
        if not refused and not self.as_json:
            words = ["%d %s" % (count, word)
                     for word, count in sorted(self.results.items(), reverse=True)]
            emit("%s: %s" % (plural(sum(self.results.values()), "target"), ", ".join(words)))
        if isinstance(error, OffsyncError) and lost not in error.text:
            raise OffsyncError("%s; and %s", error.text, lost) from None

    def identify(self, plan: str) -> None:
        self.open = {login: record._replace(plan=plan) for login, record in self.open.items()}

    def start(self, login: str) -> None:
        write_status(self.home, self.open[login].fields)
        self.started.add(login)

    def finish(self, record: Record) -> None:
        """Log what became of a target, and keep its status. Raises OffsyncError if that fails.

        Without the lock the status is left alone: it is the other run's.
        """
        self.ended[record.login] = record
        self.open.pop(record.login, None)
        append_log(self.home, record.fields)
        if self.locked:
            write_status(self.home, record.fields)

    def report(self, login: str, quiet: bool = False) -> None:
        """Print what became of a target: an equal failure is counted, and named at the end."""
        record = self.ended.pop(login)
        self.results[record.result] += 1
        if self.as_json:
            emit(json_line(record.fields))
        if record.result == "ok":
            if not self.as_json:
                emit(describe_ok(record), prose=True)
        elif not quiet:
            text = describe_failed(record)
            logins = self.said.setdefault((record.result, without_words(text)), [])
            if not logins:
                emit("offsync: %s: %s: %s" % (login, record.result, text), error=True)
            logins.append(login)

def deliver(shared: Run, log: Log, plan: TargetPlan) -> None:
    """Carry out one target's plan and log it at once, whatever becomes of the others."""
    login = plan.target.login
    record = log.open[login]
    nothing = record._replace(result="failed", files_changed=[], files_deleted=[], bytes_sent=0)
    try:
        if STOP.is_set():
            record = nothing._replace(result="interrupted", error="nothing was sent")
        else:
            if plan.changes:
                log.start(login)
            record = Delivery(shared, plan).carry_out(record)
    except OffsyncError as error:
        record = nothing._replace(error="%s; nothing was sent" % error)
    try:
        log.finish(record)
    except OffsyncError as error:           # it belongs to this target alone
        why = "%s; %s" % (record.error or "delivered and verified, but not logged", error.text)
        log.ended[login] = record = record._replace(result="failed", error=why)
        with contextlib.suppress(OffsyncError):
            write_status(log.home, record.fields)       # it was not killed


# === The trust core ends here. The state directory ==============================================

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"    # where sshd lives; often not in a user's PATH
FILE_LIMIT = 1 << 26                        # bytes of a config, key or status that are read
PLANS_KEPT_DAYS = 30                        # how long "plan" keeps plans for "apply --plan"
PLAN_LIMIT = 1 << 30                        # bytes of a plan that is kept

def program(name: str) -> str:
    """Return the path of a system program; the error names the command that installs it."""
    found = shutil.which(name) or shutil.which(name, path=SBIN)
    if not found:
        raise OffsyncError("%s: the program is not installed; run: `offsync install-deps`", name)
    return os.path.abspath(found)

def make_scratch() -> str:
    """Return a new private directory whose path is short and plain enough for control sockets.

    The only place where scratch is made. sun_path has 104 bytes on macOS; ssh appends 17 to a
    socket's name while it binds it. Nobody else may be able to put another directory in its place.
    """
    import tempfile
    for parent in map(os.path.realpath, (tempfile.gettempdir(), "/tmp", "/var/tmp")):
        plain_name = re.fullmatch(r"[A-Za-z0-9/._+-]+", parent) and len(parent) + 24 < 104 - 17
        if plain_name and os.access(parent, os.W_OK | os.X_OK):
            made = tempfile.mkdtemp(prefix="offsync-", dir=parent)
            if not find_strangers(made):
                return made
            os.rmdir(made)
    raise OffsyncError("TMPDIR: set it to a writable directory with a short, plain name, in which "
                       "nobody else can replace what is yours")

@contextlib.contextmanager
def scratch_directory() -> Iterator[str]:
    made = make_scratch()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)

def read_file(path: str, what: str, missing: str, regular: bool = True) -> bytes:
    """Return a small file's contents; missing says what to do without it. regular: no pipe."""
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if regular else 0)
        with open(os.open(path, flags), "rb") as stream:
            if regular and not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UsageError("%s %s: it is not a regular file; replace it by one",
                                 what, show_text(path))
            pieces = iter(lambda: stream.read(1 << 16), b"")        # one call would allocate it all
            data = b"".join(itertools.islice(pieces, FILE_LIMIT >> 16))
            if len(data) == FILE_LIMIT:
                raise UsageError("%s %s: it is larger than %s; name the right file",
                                 what, show_text(path), format_bytes(FILE_LIMIT))
            return data
    except FileNotFoundError:
        raise UsageError("%s %s: it does not exist; " + missing, what, show_text(path)) from None
    except OSError as error:
        remedy = "mend that, then try again"
        if isinstance(error, PermissionError):
            remedy = "it must be readable for %s" % name_of(os.geteuid())
        raise OffsyncError("%s %s: %s; " + remedy, what, show_text(path), error.strerror) from None

def write_atomically(path: str, data: Iterable[bytes], mode: int) -> None:
    """Replace a file: a temporary neighbour, mode first, fsync, rename. Symlink and owner stay.

    No other run can have made a neighbour of that name, not even one that was killed.
    """
    path = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), ".offsync-" + os.urandom(8).hex())
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
        raise OffsyncError("%s: it cannot be written: %s; nothing was changed",
                           show_text(path), error.strerror) from None

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
        raise OffsyncError("%s: it cannot be created: %s; make it, or choose another place",
                           show_text(path), error.strerror) from error
    finally:
        os.close(descriptor)

def name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)

def find_strangers(path: str, itself: bool = True) -> str:
    """Return who else could replace what lies at a path, "" if only root and this account can.

    Each existing directory from / on is judged, the one judge of this: owner root or this account,
    no write for the group or others (an access control list shows as the group's bits). A sticky
    one (/tmp) does not count where the next one is ours. itself: path too, else its parents.
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
            return compose("%s belongs to %s; choose another place, or run: `chown %s %s`",
                           show_text(place), name_of(status.st_uid), name_of(os.geteuid()), quoted)
        following = real[len(place.rstrip("/")) + 1:].split("/")[0]
        below = os.path.join(place, following)
        if following and mode & stat.S_ISVTX and os.path.lexists(below):
            if os.lstat(below).st_uid in ours:
                continue
        who = "everybody" if mode & 0o002 else "its group" if mode & 0o020 else ""
        letters = {0o002: "o", 0o020: "g", 0o022: "go"}.get(mode & 0o022, "")
        if who:                             # /tmp and the like are meant to be so
            remedy = "choose another place" if mode & stat.S_ISVTX else compose(
                "run: `chmod %s-w %s`", letters, quoted)
            return "%s may write to %s (mode %04o); %s" % (who, show_text(place), mode, remedy)
    return ""

def check_private(path: str) -> str:
    if not os.path.exists(path):
        raise OffsyncError("%s: it does not exist; restore it, or make a new one, which is to be "
                           "linked on each target again: `offsync init`", show_text(path))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise OffsyncError("%s: others may read it (mode %04o); run: `chmod %o %s`",
                           show_text(path), mode, mode & 0o700, shlex.quote(path))
    return show_text(path)

def check_home() -> str:
    """Return the home directory; raise where HOME is that of another account.

    As "sudo -u" that keeps it, or su without "-" leave it. A scratch one is fine.
    """
    home, user = os.path.expanduser("~"), name_of(os.geteuid())
    try:
        own = pwd.getpwuid(os.geteuid()).pw_dir
        owner = os.stat(home).st_uid
    except KeyError:
        return home                         # without an account there is nothing to compare with
    except OSError as error:
        raise OffsyncError("HOME %s: %s; set it to the home of %s", show_text(home),
                           error.strerror, user) from None
    if owner != os.geteuid() and os.path.realpath(home) != os.path.realpath(own):
        raise OffsyncError(
            "HOME %s belongs to %s, and this is %s; run it as that account with its own home: "
            "`sudo -iu %s offsync ...`", show_text(home), name_of(owner), user, user)
    return home

class Home:
    """$OFFSYNC_HOME and its files. Refused where others could change it."""

    def __init__(self) -> None:
        named = os.environ.get("OFFSYNC_HOME") or os.path.join(check_home(), ".offsync")
        self.path = path = os.path.realpath(validate_absolute_path(named, "OFFSYNC_HOME"))
        if re.search(r'["%$\\]', path):
            raise UsageError('OFFSYNC_HOME %s: ssh would interpret one of " %% $ \\ in it; choose '
                             "another directory", show_text(path))
        self.config, self.key, self.known_hosts, self.log, self.lock_file, self.plans, self.last = (
            os.path.join(path, name) for name in ("config.yaml", "id_ed25519", "known_hosts",
                                                  "operations.log", "lock", "plans", "last"))
        if os.path.lexists(path):
            self.refuse_strangers()

    def refuse_strangers(self) -> None:
        strangers = find_strangers(self.path)
        if strangers:
            raise OffsyncError("state directory %s: others could change what offsync does: %s",
                               show_text(self.path), strangers)

    def read_config(self) -> str:
        if not os.path.lexists(self.config):
            raise UsageError("config %s: it does not exist; %s", show_text(self.config),
                             compose(self.find_state()))
        data = read_file(self.config, "config", "run: `offsync init --source DIR`")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[:error.start].count(b"\n") + 1
            raise UsageError("%s:%d: not UTF-8; save it as UTF-8", self.config, line) from None

    def find_state(self) -> str:
        """Return what to do where this account has no config."""
        keys = os.path.join(os.path.expanduser("~"), ".ssh", "authorized_keys")
        with contextlib.suppress(OffsyncError, OSError):
            lines = read_file(keys, "authorized_keys", "").decode("utf-8", "replace").splitlines()
            if any(re.fullmatch(OUR_LINE, line.strip()) for line in lines):
                return "this account is a target, which receives: plan, apply and doctor run on " \
                       "its controller"
        for home, user in sorted(login_accounts().items()):
            place = os.path.join(home, ".offsync")
            hidden = os.path.isdir(place) and not os.access(place, os.X_OK)
            if place != self.path and (hidden or os.path.exists(place + "/config.yaml")):
                return "the account %s has a state directory here, %s: work as it: `sudo -iu %s " \
                       "offsync ...`" % (user, show_text(place), user)
        return "run first: `offsync init --source DIR`"

    def load(self) -> Config:
        return validate_config(self.read_config(), self.config)

    def replace_in_config(self, key: str, block: Sequence[str]) -> None:
        """Replace one top-level key's lines in the config."""
        text = replace_block(self.read_config(), key, block)
        validate_config(text, self.config)
        write_atomically(self.config, [text.encode()], 0o600)

    def keep_plan(self, config: Config, plans: Sequence[TargetPlan]) -> str:
        """Store a plan under its ID, for "apply --plan", and drop old ones; return the ID."""
        name, size = identify_plan(config, plans)
        try:
            if size > PLAN_LIMIT:
                raise OffsyncError("it is larger than %s", format_bytes(PLAN_LIMIT))
            make_directory(os.path.realpath(self.plans), 0o700)
            write_atomically(os.path.join(self.plans, name), plan_lines(config, plans), 0o600)
            for entry in os.scandir(self.plans):
                with contextlib.suppress(OSError):      # another plan drops it, too
                    if entry.stat().st_mtime < time.time() - PLANS_KEPT_DAYS * 86400:
                        os.unlink(entry.path)
        except (OSError, OffsyncError) as error:
            warn("the plan is not kept (%s); keep it yourself: `offsync plan --json > FILE`, then "
                 "`offsync apply --plan FILE`", error)
        return name

    def open_plan(self, named: str, scratch: str) -> tuple[BinaryIO, str]:
        """Return (a reviewed plan, open; its ID) for --plan ID or FILE. Raises OffsyncError."""
        path = named
        if re.fullmatch("[0-9a-f]{64}", named):
            path = os.path.join(self.plans, named)
            if not os.path.exists(path):
                raise OffsyncError(
                    "plan %s: it is not among the plans that %s keeps for %d days; plan again, or "
                    "name the file that 'offsync plan --json' printed: --plan FILE",
                    named, show_text(self.plans), PLANS_KEPT_DAYS)
        elif re.fullmatch("[0-9a-f]{8,63}", named) and not os.path.exists(named):
            raise UsageError("plan %s: give all 64 digits of the ID, since fewer can be forged; "
                             "copy the line that 'offsync plan' ends with", named)
        try:
            digest, copy = new_digest(), scratch_file(scratch)  # of a pipe, too
            with open(path, "rb") as stream:
                if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):     # it may have no end
                    raise OSError(22, "it is a device")
                for chunk in iter(lambda: stream.read(1 << 18), b""):
                    digest.update(chunk)
                    copy.write(chunk)
            copy.seek(0)
        except OSError as error:
            raise UsageError(
                "plan %s: %s; give the ID that 'offsync plan' ends with, or the file that 'offsync "
                "plan --json' printed", show_text(named), error.strerror) from None
        if path != named and digest.hexdigest() != named:
            raise OffsyncError("plan %s: what %s holds is not that plan; plan again",
                               named, show_text(path))
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
                "/var/spool", "/opt/cni", *("/var/lib/" + name for name in (
                    "apt", "cloud", "confexts", "containerd", "dkms", "docker", "dpkg",
                    "extensions", "flatpak", "kubelet", "machines", "pacman", "polkit-1",
                    "portables", "rancher", "rpm", "snapd", "systemd")))
# What sshd reads: whoever writes there lets keys in. The words of sshd -T.
SSHD_PATHS = ("authorizedkeysfile", "trustedusercakeys", "hostkey", "hostcertificate",
              "authorizedkeyscommand", "authorizedprincipalsfile", "authorizedprincipalscommand",
              "revokedkeys")
# Login shells in which single quotes mean what POSIX says; others get only paths that need none.
POSIX_SHELLS = ("sh", "bash", "dash", "ash", "ksh", "ksh93", "mksh", "zsh", "busybox", "rbash")
NO_LOGIN_SHELLS = ("nologin", "false", "true", "sync")
RESTRICTED_SHELLS = ("rbash", "rksh", "rzsh", "git-shell", "scponly", "rssh")
OUR_LINE = (r'(?:from="[^"]*",)?command="(?:\\"|[^"])*-wo (?:\\"|[^"])*",' + KEY_RESTRICTIONS
            + r" \S+ (\S+)(?: .*)?")

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
        written = re.fullmatch(OUR_LINE, decoded)
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
    result = run([program("ssh-keygen"), "-l", "-E", "sha256", "-f", "-"],
                 stdin="".join(line + "\n" for line in lines).encode())
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
        raise UsageError("key: %s instead of one; " + give, plural(len(lines), "line"))
    match = re.fullmatch(r"(\S+)[ \t]+([A-Za-z0-9+/]+=*)(?:[ \t]+(.*))?", lines[0].strip())
    if not match or match[1] not in KEY_TYPES or re.search(CONTROL, match[3] or ""):
        raise UsageError("key: it is not a public key of a known type (%s, ...); " + give,
                         KEY_TYPES[0])
    key = PublicKey(match[1], match[2], (match[3] or "").strip())
    accepted = fingerprints(["%s %s" % (key.type, key.blob)])
    if not accepted:
        raise UsageError("key: ssh-keygen does not accept it; " + give)
    if key.type == "ssh-rsa" and accepted[0][0] < RSA_BITS:
        raise UsageError("key: RSA with %d bits is too weak; use the key of 'offsync init'",
                         accepted[0][0])
    return key

def find_rrsync(wanted: Optional[str]) -> tuple[str, list[str], str]:
    """Return (path, command words, "python3", "perl" or "") of the wanted or a found rrsync.

    A script that is not executable is run through the interpreter that its first line names.
    """
    places = [path for place in RRSYNC_PLACES for path in sorted(glob.glob(place))]
    for place in [wanted] if wanted else places:
        path = validate_absolute_path(place, "rrsync")
        if path.endswith(".gz") and os.path.isfile(path):
            raise OffsyncError("rrsync %s: it is compressed; run: `gunzip -c %s > "
                               "/usr/local/bin/rrsync && chmod 755 /usr/local/bin/rrsync`",
                               path, path)
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
                           "`install -m 755 %s /usr/local/bin/rrsync`", path, path)
    if wanted:
        raise UsageError("rrsync %s: it does not exist; name its place, or leave --rrsync away to "
                         "look in the known ones", show_text(wanted))
    raise OffsyncError(
        "rrsync: it is in none of the known places; run: `offsync install-deps --role target` "
        "(images without documentation lack it on EL 8 and 9: `dnf -y --setopt=tsflags= reinstall "
        "rsync`)")

# Stands in for ssh and sshd: drops the host's name, starts the forced command as sshd does.
LOCAL_SHELL = ("import os, sys; os.environ['SSH_ORIGINAL_COMMAND'] = ' '.join(sys.argv[3:]); "
               "os.execv('/bin/sh', ['sh', '-c', sys.argv[1]])")

def probe_rrsync(words: Sequence[str], munge: bool) -> None:
    """Try what a key thief would do with this host's rrsync; raise OffsyncError if it gets out.

    A symlink is sent, then a file through it (before rsync 3.5.0 that writes anywhere), and a file
    that was delivered is moved through it as a backup (rrsync 3.2.7 to 3.4.4 beside rsync 3.5.0).
    A version would prove nothing, since distributions back-port. Raises too where rrsync does not
    work.
    """
    with scratch_directory() as scratch:
        inside_it, outside, plant, through = (os.path.join(scratch, name) for name in (
            "inside", "outside", "plant", "through"))
        for directory in (inside_it, outside, plant, through, through + "/x"):
            os.mkdir(directory)
        os.symlink(outside, plant + "/x")
        for path in (plant + "/file", through + "/x/f"):
            with open(path, "wb") as stream:
                stream.write(b"offsync\n")
        shell = " ".join(map(quote_for_rsync, (
            sys.executable, "-I", "-S", "-c", LOCAL_SHELL,
            format_forced_command(words, inside_it, munge))))

        def send(*options: str) -> Result:
            return run([find_rsync()[0], "-e", shell, *options, "host:."],
                       deadline=SESSION_DEADLINE, env=environment(rsync=True))

        sent = send("-rl", "--", plant + "/")
        if sent.status != 0 or not os.path.exists(inside_it + "/file"):
            if munge and b"munge" not in read_file(words[-1], "rrsync", ""):
                raise OffsyncError(
                    "rrsync %s: it is older than 3.2.4 and knows no -munge, which --no-symlinks "
                    "needs; update rsync, or link without --no-symlinks", words[-1])
            raise OffsyncError(
                "rrsync %s: it does not work here; it must be of the same release as rsync, 3.1.2 "
                "or newer, with its interpreter; update rsync, or name another: --rrsync PATH (it "
                "said: %s)", words[-1], quote_answer(sent.stderr) or "nothing")
        send("-pR", "--no-implied-dirs", "--", through + "/./x/f")
        send("-rlbI", "--backup-dir=x", "--", plant + "/")
        if os.listdir(outside):
            ways = "" if munge else "; or link with --no-symlinks, if you deliver none"
            raise OffsyncError(
                "rrsync %s: it lets the key out of its directory (tried here: a symlink was sent, "
                "then a file through it), so whoever steals the key has a login shell; update "
                "rsync and rrsync to 3.5.0, or to ones in which that is mended%s; or accept it: "
                "--accept-risk rrsync", words[-1], ways)

def mount_points() -> list[str]:
    """Return where file systems are mounted, as Linux tells (proc(5)); elsewhere none."""
    with contextlib.suppress(OSError), open("/proc/self/mounts", "rb") as stream:
        places = [line.split(b" ")[1] for line in stream]
        return [os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), place))
                for place in places]
    return []

def same_file(one: str, other: str) -> bool:
    """Return whether two paths are one thing, also under another name (a bind mount)."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False

def validate_link_path(path: str, protected: Iterable[str], accept_risk: bool) -> str:
    """Return the real path that the key may write below. accept_risk waives what users know.

    protected: files and directories that must not lie in, above or below it.
    """
    real = os.path.realpath(validate_absolute_path(path, "path"))
    validate_absolute_path(real, "path")
    choose = "choose a directory that holds only delivered files, such as /srv/app-data"
    above = [real[:match.start()] or "/" for match in re.finditer("/", real + "/")]
    mounted = [place for place in mount_points() if place.startswith(real + "/")]

    def lies_in(place: str) -> bool:
        return (real + "/").startswith(place.rstrip("/") + "/") or any(
            same_file(place, directory) for directory in above)

    def contains(place: str) -> bool:
        parents = [place[:match.start()] for match in re.finditer("/", place + "/")]
        return (place + "/").startswith(real.rstrip("/") + "/") or any(
            same_file(mine, directory) for directory in parents if directory
            for mine in (real, *mounted))

    def may_be(place: str) -> bool:
        """Tell whether a path with % tokens may stand for one in or above the real path."""
        pairs = zip(real.split("/")[1:], place.split("/")[1:])
        return "%" in place and all(
            re.fullmatch(re.sub("%.", ".*", re.escape(theirs)), ours) for ours, theirs in pairs)

    if os.path.lexists(real) and not os.path.isdir(real):
        raise UsageError("path %s: it is no directory; choose another, or move it away",
                         show_text(real))
    homes = {os.path.realpath(home) for home in login_homes() | homes_of_owners(real)}
    keys = [home + name for home in homes for name in ("/.ssh", "/.ssh/authorized_keys")]
    found = ""
    if real == "/" or any(real == home or same_file(real, home) for home in homes):
        found = "is the root or a home directory"
    for place in sorted({*keys, *map(os.path.realpath, [*keys, *protected])}):
        if not found and (contains(place) or lies_in(place) or may_be(place)):
            found = "%s %s" % ("contains" if contains(place) else "lies in", show_text(place))
    if found:
        raise UsageError("path %s: it %s, so a key that writes there is as good as a shell; "
                         + choose, show_text(real), found)
    risks = list(link_risks(real, lies_in, contains))
    if risks and not accept_risk:
        other = "or " if COPY in risks[0] else ""
        raise UsageError("path %s: %s; " + other + choose + ", or, if it is really meant: "
                         "--accept-risk path", show_text(real), risks[0])
    return real

def login_accounts() -> dict[str, str]:
    return {account.pw_dir: account.pw_name for account in pwd.getpwall()
            if os.path.basename(account.pw_shell) not in NO_LOGIN_SHELLS}

def login_homes() -> set[str]:
    return {os.path.expanduser("~"), *login_accounts()}

def homes_of_owners(path: str) -> set[str]:
    """Return the homes of those to whom a directory, or one in it, belongs.

    Accounts of a directory service are often not listed, but each is known by its number.
    """
    found, places = set(), [path]
    with contextlib.suppress(OSError):
        places += [entry.path for entry in itertools.islice(os.scandir(path), 1000)]
    for place in places:
        with contextlib.suppress(OSError, KeyError):
            found.add(pwd.getpwuid(os.lstat(place).st_uid).pw_dir)
    return found

def link_risks(real: str, lies_in: Callable[[str], bool],
               contains: Callable[[str], bool]) -> Iterator[str]:
    """Yield what is a risk about a path for a key, unless its user knows what is done there."""
    for place in sorted({*SYSTEM_TREES, *map(os.path.realpath, SYSTEM_TREES)}):
        if contains(place) or lies_in(place):
            yield "it lies in or contains %s, where the system keeps what it runs and reads" % place
    programs = [*filter(os.path.isabs, os.get_exec_path()), os.path.expanduser("~/bin")]
    if any(contains(place) for place in map(os.path.realpath, programs)):
        yield "it is or contains a directory of $PATH, or ~/bin, where programs are found"
    default = os.path.realpath(os.path.expanduser("~/.offsync/sync"))
    if real != default and any(part.startswith(".") for part in real.split("/")):
        yield "a component begins with a dot, where programs keep what they run and read"
    if os.path.lexists(os.path.join(real, ".ssh")):
        yield "it has an entry .ssh, as the home of an account has (remove it if nobody needs it)"
    strangers = find_strangers(real, itself=False)
    if strangers:
        yield "others could put another directory in its place: " + strangers

def validate_forced_command(words: Sequence[str], path: str, shell: str, language: str = "",
                            munge: bool = False) -> str:
    """Return the forced command; refused where the user's shell might read it differently."""
    choose = "choose a path of letters, digits and /._-"
    if shlex.quote(path) != path and os.path.basename(shell) not in POSIX_SHELLS:
        raise UsageError("path %s: it cannot be quoted safely for the login shell %s; " + choose,
                         show_text(path), show_text(shell))
    if language == "perl" and re.search(r"[^A-Za-z0-9/._+@%:,=-]", path):
        raise UsageError("path %s: the Perl rrsync cannot take it; " + choose, show_text(path))
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
        new = self.edit(line)[0]
        if new == self.text:
            return
        make_directory(os.path.dirname(self.path), 0o700)
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(directory, fcntl.LOCK_EX)       # against another link
        if self.read() != self.text:
            raise OffsyncError("%s: somebody else changed it at this moment; try again", self.path)
        mode = stat.S_IMODE(os.stat(self.path).st_mode) if os.path.exists(self.path) else 0o600
        write_atomically(self.path, [new], mode)
        os.close(directory)

def own_account() -> pwd.struct_passwd:
    """Return this account; raise where there is none, or HOME is another's."""
    try:
        account = pwd.getpwuid(os.geteuid())
    except KeyError:
        raise OffsyncError("link: the user ID %d has no account here, so sshd lets nobody log in "
                           "as it; run link as one that has", os.geteuid()) from None
    check_home()
    return account

def sshd_settings(user: str) -> dict[str, list[str]]:
    """Return sshd's settings for a user (sshd -T), {} where it does not tell.

    An ordinary user may not read the host keys: it is given one, of a type that this host allows.
    """
    with scratch_directory() as scratch:
        key = os.path.join(scratch, "key")
        make_key(key, "")
        result = run([program("sshd"), "-T", "-h", key, "-C",
                      "user=%s,host=localhost,addr=127.0.0.1" % user], deadline=SESSION_DEADLINE)
    settings: dict[str, list[str]] = {}
    for line in result.stdout.decode("utf-8", "replace").splitlines() if result.status == 0 else ():
        name, *words = line.split() or [""]
        settings.setdefault(name, []).extend(word for word in words if word != key)
    return settings

def sshd_paths(settings: dict[str, list[str]]) -> list[str]:
    """Return the paths that sshd names, its % tokens left in; those below every home, too."""
    found = []
    for name in SSHD_PATHS:
        words = settings.get(name, [])
        for word in words[:1] if name.endswith("command") else words:       # not its arguments
            word = word[3:] if word.startswith("%h/") else word
            if word != "none":
                homes = [""] if word.startswith("/") else login_homes()
                found += [os.path.join(home, word) for home in homes]
    return found

def account_problem(account: pwd.struct_passwd) -> str:
    """Return what keeps an account from starting rrsync, "" for nothing that is known."""
    shell, user = os.path.basename(account.pw_shell), account.pw_name
    if shell in NO_LOGIN_SHELLS or shell in RESTRICTED_SHELLS:
        return compose("the login shell %s does not start rrsync; run: `chsh -s /bin/sh %s`",
                       account.pw_shell, user)
    try:
        with open("/etc/shadow", encoding="utf-8", errors="replace") as stream:
            line = next(line for line in stream if line.startswith(user + ":"))
        fields = line.rstrip("\n").split(":")
    except (OSError, StopIteration):
        return ""
    if fields[1].startswith("!"):
        return compose("the account %s is locked, so that sshd without UsePAM refuses it; run: "
                       "`usermod -p '*' %s`", user, user)
    if len(fields) > 7 and fields[7].isdigit() and int(fields[7]) * 86400 < time.time():
        return compose("the account %s has expired; run as root: `chage -E -1 %s`", user, user)
    return ""

def login_problem(account: pwd.struct_passwd, sshd: dict[str, list[str]]) -> str:
    """Return which of sshd's settings keeps an account out, "" for none."""
    import grp                              # here: for link alone
    user, groups = account.pw_name, []
    for gid in os.getgrouplist(user, account.pw_gid):
        with contextlib.suppress(KeyError):
            groups.append(grp.getgrgid(gid).gr_name)

    def names(setting: str, known: Sequence[str]) -> bool:
        words = sshd.get(setting, ())       # of "Deny user@host" only some hosts are kept out
        patterns = [word.split("@")[0] for word in words
                    if setting.startswith("allow") or word.partition("@")[2] in ("", "*")]
        return any(fnmatch.fnmatchcase(name, pattern) for name in known for pattern in patterns)

    for setting, known, wanted in (("DenyUsers", [user], False), ("AllowUsers", [user], True),
                                   ("DenyGroups", groups, False), ("AllowGroups", groups, True)):
        if sshd.get(setting.lower()) and names(setting.lower(), known) is not wanted:
            return "sshd has %s, which keeps %s out; change that in sshd_config" % (setting, user)
    if account.pw_uid == 0 and sshd.get("permitrootlogin") == ["no"]:
        return "sshd has PermitRootLogin no; for this key allow forced-commands-only in sshd_config"
    if sshd.get("pubkeyauthentication") == ["no"]:
        return "sshd has PubkeyAuthentication no; allow it in sshd_config"
    return account_problem(account)

def link_warnings(account: pwd.struct_passwd, sshd: dict[str, list[str]], delivery: str,
                  keys: AuthorizedKeys) -> Iterator[str]:
    """Yield what would make sshd ignore the key, and what is wrong with the delivery directory."""
    home, status, own = os.path.expanduser("~"), os.stat(delivery), account.pw_uid
    if status.st_uid not in (0, own):
        yield "%s belongs to %s, who can change what is delivered" % (
            show_text(delivery), name_of(status.st_uid))
    if not os.access(delivery, os.W_OK):
        yield "%s is not writable for %s; change its owner or mode" % (
            show_text(delivery), account.pw_name)
    elif status.st_mode & 0o022:            # where the key writes by its group, that must stay
        remedy = compose("; run: `chmod go-w %s`", shlex.quote(delivery))
        yield "%s is writable for others, who can change what is delivered%s" % (
            show_text(delivery), remedy if status.st_uid == own else "")
    if os.path.realpath(home) != os.path.realpath(account.pw_dir):
        yield "HOME is %s, but sshd reads the account's home %s; run link as the account itself" % (
            home, account.pw_dir)
    for path in (home, os.path.join(home, ".ssh"), keys.path):
        status = os.stat(path)
        if status.st_mode & 0o022 or status.st_uid not in (0, own):
            remedy = "chown %s %s" % (account.pw_name, shlex.quote(path))
            if status.st_uid in (0, own):
                remedy = "chmod go-w " + shlex.quote(path)
            yield compose("%s is writable or owned by others: sshd may ignore the key then "
                          "(StrictModes in sshd_config(5)); run: `%s`", path, remedy)
    if not sshd:
        yield "sshd could not be asked what it reads and whom it lets in (sshd -T, which has to " \
              "read sshd_config): whether it uses this key is not known"
    if login_problem(account, sshd):
        yield login_problem(account, sshd)
    for line in keys.text.decode("utf-8", "replace").splitlines():
        if keys.key.blob not in line and ' %s",' % shlex.quote(delivery) in line:
            yield "another key may write below %s too (of a second controller?); an old one goes " \
                  "by: offsync unlink" % show_text(delivery)
    second = keys.path + "2"
    with contextlib.suppress(OffsyncError):
        if keys.key.blob.encode() in read_file(second, "keys", ""):
            yield "the key stands in %s too, which some sshd read; remove it there" % second
    if sshd.get("authorizedkeyscommand", ["none"]) not in ([], ["none"]):
        yield "sshd asks AuthorizedKeysCommand before this file; it must not print this key"
    places = [os.path.join(account.pw_dir, place.replace("%h", account.pw_dir).replace(
        "%u", account.pw_name)) for place in sshd.get("authorizedkeysfile",
                                                      [".ssh/authorized_keys"])]
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
    require_programs("target")
    account, risks, munge = own_account(), args.accept_risk or (), not args.symlinks
    rrsync, words, language = find_rrsync(args.rrsync)
    from_pattern = "" if args.from_pattern is None else validate_from_pattern(args.from_pattern)
    settings = sshd_settings(account.pw_name)
    state, module = Home(), globals().get("__file__", "")
    protected = [rrsync, state.config, state.key, state.known_hosts, state.log, state.plans,
                 state.last, *sshd_paths(settings),
                 *filter(os.path.exists, (sys.argv[0], module))]
    if os.path.exists(module):              # not "<stdin>"
        protected.append(os.path.join(os.path.dirname(module), "__pycache__"))
    named = os.path.expanduser("~/.offsync/sync") if args.path is None else args.path
    path = validate_link_path(named, protected, "path" in risks)
    forced = validate_forced_command(words, path, account.pw_shell, language, munge)
    key = read_key_argument(args)
    keys = AuthorizedKeys(key)
    strangers = find_strangers(os.path.dirname(os.path.realpath(rrsync)))
    if strangers and "rrsync" not in risks:
        raise OffsyncError("rrsync %s: others could replace what this key runs: %s; or accept it: "
                           "--accept-risk rrsync", rrsync, strangers)
    if "rrsync" in risks:
        warn("accepted: a thief of the key may get out of %s through a symlink", show_text(path))
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
        raise OffsyncError("path %s: you may not create it; run as root: `install -d -o %s %s`; "
                           "then link again", show_text(path), account.pw_name,
                           shlex.quote(path)) from None
    keys.write(line)
    report_link(keys, line, path)
    for warning in link_warnings(account, settings, path, keys):
        warn("%s", warning)
    port, host_key = own_address(settings)
    target = Target("%s@%s" % (account.pw_name, os.uname().nodename), path, rrsync, port, not munge)
    emit("Now run this on the controller, unless it knows this target (with the name by which "
         "it reaches this host; port and fingerprint are those of the system's sshd):", error=True)
    fingerprint = " --host-key " + host_key if host_key else ""
    emit("offsync target add " + add_arguments(target) + fingerprint)
    return 0

def report_link(keys: AuthorizedKeys, line: str, path: str) -> None:
    before, after = (re.sub('^from="[^"]*",', "", text).split(KEY_RESTRICTIONS)[0]
                     for text in (keys.line, line))
    if before not in ("", after):
        warn("this key was linked in another way before, which is replaced: what it could write to "
             "then can no longer be delivered to: %s", show_text(before))
    emit("%s in %s: the key may write below %s, nothing else" % (
        "already linked" if keys.line == line else "linked", keys.path, show_text(path)), True)

def cmd_unlink(args: argparse.Namespace) -> int:
    own_account()
    keys = AuthorizedKeys(read_key_argument(args))
    keys.write(None)
    emit(("removed the key from " if keys.line else "the key has no entry in ") + keys.path, True)
    return 0


# --- Host keys, proofs and target add -----------------------------------------------------------

# Asks for the host key without authenticating and without a session: safe against whoever answers.
SSH_FETCH_HOST_KEY = (*SSH_QUIET, *SSH_ALONE, "-N", "-o", "StrictHostKeyChecking=no",
                      "-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=none")
HOST_KEY_FAMILIES = ("ssh-ed25519", "ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521",
                     "rsa-sha2-512,rsa-sha2-256,ssh-rsa")

def blob(line: str) -> list[str]:
    return line.split()[1:3]

def describe_keys(lines: Iterable[str]) -> str:
    return ", ".join(sorted({"%s (%s)" % key[1:] for key in fingerprints(lines)})) or "none"

def fetch_host_key(connection: Connection, family: str = "") -> str:
    """Return the known_hosts line of the one host key that this ssh and the target agree on.

    ssh connects on its own route, so ProxyJump, HostKeyAlias and Port of ssh_config hold
    (ssh-keyscan knows none). What a server shows is not proved yet: the connection that trusts
    this line alone proves it. family: the types to ask for, in place of ssh's own.
    """
    shared, target = connection.shared, connection.target
    path = os.path.join(shared.scratch, "fetched-%d" % next(shared.numbers))
    asking = Connection(shared, target, path)
    words = [shared.ssh, *SSH_FETCH_HOST_KEY]
    words += ["-o", "HostKeyAlgorithms=" + family] if family else []
    for last in attempts():
        result = run([*words, *asking.options(), *asking.destination()], deadline=CONNECT_DEADLINE)
        error = diagnose(target, result.stderr)
        if os.path.exists(path) or error.kind not in RETRIED or last:
            break
    if not os.path.exists(path):            # with a family, most likely: it has no such key
        raise failure(target, Kind.ALGORITHMS) if family else explain_login(asking, result, True)
    line = read_file(path, "host key", "").decode("utf-8", "replace").strip()
    if not line:
        raise OffsyncError("%s: ssh could not write its host key down; is %s full?",
                           target.login, shared.scratch)
    for revoked, place in known_lines(shared, line.split()[0], "@revoked"):
        if blob(revoked) == blob(line):
            raise failure(target, Kind.REVOKED, "%s in %s" % (describe_keys([revoked]), place))
    return line

def known_lines(shared: Run, name: str, marker: str = "",
                ours: bool = False) -> list[tuple[str, str]]:
    """Return (known_hosts line without its marker, its file) of a host; asks ssh-keygen.

    Of ours alone, or also of the files that ssh reads besides: it takes the account's home,
    whatever HOME says.
    """
    try:
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        home = os.path.expanduser("~")
    others = (home + "/.ssh/known_hosts", home + "/.ssh/known_hosts2",
              "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
    found = []
    for path in (shared.home.known_hosts, *(() if ours else others)):
        if os.path.exists(path):
            words = [program("ssh-keygen"), "-F", name, "-f", path]
            text = run(words, deadline=SESSION_DEADLINE).stdout.decode("utf-8", "replace")
            for line in text.splitlines():
                has_marker = line.split(" ")[0] if line.startswith("@") else ""
                if line and not line.startswith("#") and has_marker == marker:
                    found.append((line[len(marker):].strip(), path))
    return found

def ssh_settings(connection: Connection) -> dict[str, str]:
    """Return what ssh makes of its options and ssh_config for a target (ssh -G)."""
    result = run([connection.shared.ssh, *connection.options(), "-G", *connection.destination()],
                 deadline=SESSION_DEADLINE)
    lines = result.stdout.decode("utf-8", "replace").splitlines()
    return {name: value for name, _, value in (line.partition(" ") for line in lines)}

def known_name(connection: Connection) -> str:
    """Return the name under which known_hosts has a target."""
    settings = ssh_settings(connection)
    name, port = settings.get("hostname", connection.target.host), settings.get("port", "22")
    return settings.get("hostkeyalias") or (name if port == "22" else "[%s]:%s" % (name, port))

def has_route(connection: Connection) -> str:
    """Return how ssh_config leads to the target ("ProxyJump bastion"), "" if directly."""
    settings = ssh_settings(connection)
    for name in ("ProxyJump", "ProxyCommand"):
        way = settings.get(name.lower(), "none")
        if way != "none":
            return "%s %s" % (name, show_text(way))
    return ""

def explain_host_key(connection: Connection, error: TargetError) -> TargetError:
    """Return the error for a host key that changed, with what is known and what is shown now."""
    if connection.known_hosts:              # one line was trusted, and another key came
        return error
    try:
        shown = fetch_host_key(connection)
    except TargetError as problem:
        return problem if problem.kind is Kind.REVOKED else error
    known = [line for line, _ in known_lines(connection.shared, shown.split()[0])]
    facts = "known %s, shown now %s" % (describe_keys(known), describe_keys([shown]))
    if blob(shown)[0] not in [blob(line)[0] for line in known]:
        facts += " (of another type: has ssh_config HostKeyAlgorithms for it?)"
    return failure(connection.target, Kind.HOST_KEY_CHANGED, facts)

def confirm_host_key(target: Target, line: str) -> None:
    """Ask whether a host key is the target's; raise unless a full "yes" says so."""
    emit("The host key of %s is not trusted yet. It shows:\n  %s\nCompare with what 'offsync link' "
         "printed on the target's own console." % (target.login, describe_keys([line])), error=True)
    answer = ask("Trust this key? Type yes or no: ", "give the fingerprint that 'offsync link' "
                 "printed on the target: --host-key SHA256:...")
    if answer != "yes":
        raise OffsyncError("%s: the host key was not confirmed (only a full \"yes\" does); nothing "
                           "was saved", target.login)

def find_host_key(connection: Connection, wanted: str) -> str:
    """Return the target's host key that has a fingerprint, asking for one type after another.

    The first that is shown is enough where it is the one: sshd 9.8 and newer punishes connections
    that do not log in.
    """
    shown: list[str] = []
    for family in ("", *HOST_KEY_FAMILIES):
        if any(blob(line)[0] in family.split(",") for line in shown):
            continue                        # that type was shown already
        try:
            line = fetch_host_key(connection, family)
        except TargetError as error:
            if error.kind is not Kind.ALGORITHMS:
                raise
            continue
        if any(key[1] == wanted for key in fingerprints([line])):
            return line
        shown.append(line)
    raise OffsyncError(
        "%s: its host key is NOT the expected one; somebody else may answer there: compare with "
        "what 'offsync link' printed on the target's console: expected %s, it shows %s",
        connection.target.login, wanted, describe_keys(shown))

def store_host_key(shared: Run, line: str) -> None:
    """Put this line into known_hosts in place of those of its host, hashed ones too."""
    path, old = os.path.join(shared.scratch, "known_hosts"), b""
    if os.path.exists(shared.home.known_hosts):
        shutil.copyfile(shared.home.known_hosts, path)
        removed = run([program("ssh-keygen"), "-R", line.split()[0], "-f", path])
        if removed.status != 0:             # the old key would go on being trusted
            raise OffsyncError(
                "known_hosts %s: ssh-keygen cannot edit it; remove the line that it names, then "
                "try again (it said: %s)", show_text(shared.home.known_hosts),
                quote_answer(removed.stderr))
        old = read_file(path, "known_hosts", "")
        old += b"\n" if old and not old.endswith(b"\n") else b""
    write_atomically(shared.home.known_hosts, [old, line.encode() + b"\n"], 0o600)

def connect_trusted(shared: Run, target: Target,
                    wanted: Optional[str]) -> tuple[Connection, str]:
    """Return (a connection, the host key to store, "" if it is trusted already). Asks if it must.

    A key that was not shown and compared is never trusted: where known_hosts holds several for this
    target (as 2.0.0 stored them), they are asked for again.
    """
    connection = Connection(shared, target)
    several = len(known_lines(shared, known_name(connection), ours=True)) > 1
    if not wanted and not several:
        try:
            connection.open()
            return connection, ""
        except TargetError as error:
            if error.kind not in (Kind.HOST_KEY_UNKNOWN, Kind.HOST_KEY_CHANGED):
                raise
            if error.kind is Kind.HOST_KEY_CHANGED:
                warn("%s", error.text)
    if wanted:
        line = find_host_key(connection, wanted)
    else:
        line = fetch_host_key(connection)
        confirm_host_key(target, line)
    path = os.path.join(shared.scratch, "trusted")      # for this connection, which proves it
    write_atomically(path, [line.encode() + b"\n"], 0o600)
    connection = Connection(shared, target, path)
    try:
        connection.open()
    except TargetError as error:
        if error.kind not in (Kind.HOST_KEY_UNKNOWN, Kind.HOST_KEY_CHANGED, Kind.ALGORITHMS):
            raise
        raise OffsyncError(
            "%s: it shows that key (%s), but ssh takes another one to log in: has ssh_config "
            "HostKeyAlgorithms without its type, or after another? Put that type first there (%s)",
            target.login, describe_keys([line]), line.split()[1]) from None
    return connection, line

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
    climbs = above.status == 0 or marker.encode() + b'"' in above.stderr
    proofs = [Proof("run a command", True, "refused"),
              Proof("read a file with cat", not read, quote_answer(read) or "refused"),
              Proof("read files with rsync", None if pulled is None else pulled != 0,
                    {None: "it did not answer", 0: "it sends them"}.get(pulled, "refused")),
              Proof("write to a path outside", True, prove_path(connection)),
              Proof("write to .. of the path", not climbs, "accepted" if climbs else "refused")]
    # With a terminal the refusal would come back on stdout, since a terminal has one stream only.
    # Where sshd cannot make one (it is not root's), it ends the connection: the next pass reopens.
    terminal = connection.session(("-tt",), PROOF_COMMAND).stdout.strip()
    proofs += [Proof("get a terminal (PTY)", not terminal, "given" if terminal else "refused"),
               *prove_forwarding(connection)]
    written = connection.rsync(("-n", "-r"), **dry)
    if written.status != 0:                 # a dead connection would have "refused" it all
        raise diagnose(connection.target, written.stderr)
    return [*proofs, Proof("write below the path (dry run)", True, "possible")]

def cmd_target_add(args: argparse.Namespace) -> int:
    require_programs("controller")
    target = Target(**{key: row.accept(getattr(args, key)) for key, row in TARGET_KEYS.items()
                       if row.option and getattr(args, key) is not None})
    if args.host_key is not None and not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", args.host_key):
        raise UsageError("host key %s: it must be SHA256: and 43 characters, as 'offsync link' and "
                         "ssh-keygen -l print it", show_text(args.host_key))
    home = Home()
    home.load()                             # without one, there is nothing to lock
    take_lock(home, "target add")
    config = home.load()
    others = [other for other in config.targets if other.login != target.login]
    known = [other for other in config.targets if other.login == target.login]
    if known and known != [target]:
        warn("%s is configured already, and will be replaced: it was %s; to have both, give one of "
             "them a Host alias in ~/.ssh/config", target.login, add_arguments(known[0]))
    with Run(home, config) as shared:
        connection, trusted = connect_trusted(shared, target, args.host_key)
        proofs = prove_all(connection)
        found = ["%s: %s" % proof[::2] for proof in proofs if proof.closed is False]
        if found:
            raise failure(target, Kind.OPEN, "; ".join(found))
        if trusted:
            store_host_key(shared, trusted)
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
    """How one package manager installs what each role needs: words separated by blanks."""
    install: str
    controller: str
    target: str
    refresh: str = ""                       # before that; may fail
    older: str = ""                         # instead, if that fails: a package of older releases
    extra: str = ""                         # best effort, alone: one unknown name fails a call
    hint: str = ""                          # where something is missing afterwards
    start: str = "systemctl enable --now sshd"


CLIENTS, SERVER = "openssh-clients rsync", "openssh-server rsync python3"
PACKAGE_MANAGERS = {                        # in order of preference; brew last: Linux has it too
    "apt-get": PackageManager(
        "env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends",
        "openssh-client rsync", SERVER, refresh="apt-get update", start=""),
    "dnf": PackageManager("dnf -y install", CLIENTS, SERVER, extra="rsync-rrsync"),
    "yum": PackageManager("yum -y install", CLIENTS, SERVER, extra="rsync-rrsync"),
    "pacman": PackageManager("pacman -S --needed --noconfirm", "openssh rsync",
                             "openssh rsync python",
                             hint="if a package was not found (404), run: `pacman -Syu`"),
    "zypper": PackageManager("zypper --non-interactive install --no-recommends", CLIENTS, SERVER,
                             older="openssh"),
    "apk": PackageManager("apk add --no-cache", "openssh-client openssh-keygen rsync",
                          "openssh-server rsync rrsync",
                          start="rc-update add sshd default && rc-service sshd start"),
    "brew": PackageManager("brew install", "rsync", "rsync", start="",
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
    problem = "the program is not installed"
    for path in places:
        found = path and shutil.which(path)
        if found:
            path = os.path.abspath(found)
            printed = run([path, "--version"], deadline=SESSION_DEADLINE, env=environment(True))
            version = parse_rsync_version(printed.stdout)
            if version and version >= RSYNC_OLDEST:
                return path, version
            problem = "%s is %s" % (show_text(path), "rsync %d.%d.%d, too old" % version if version
                                    else "openrsync or no rsync at all")
        elif path and named:
            raise OffsyncError("rsync: %s, which OFFSYNC_RSYNC names, is no program; correct that "
                               "variable, or unset it", show_text(path))
    raise OffsyncError("rsync: %s; offsync needs rsync %d.%d.%d or newer: run `offsync "
                       "install-deps`, or set OFFSYNC_RSYNC", problem, *RSYNC_OLDEST)

def missing_programs(role: str) -> dict[str, str]:
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
            missing[name] = error.text
    return missing

def install_commands(name: str, role: str) -> list[list[list[str]]]:
    """Return the steps that install what a role needs; of each, commands to try in turn."""
    manager = PACKAGE_MANAGERS[name]
    sudo = ["sudo"] if name != "brew" and os.geteuid() != 0 else []
    install = sudo + manager.install.split()
    wanted = {"controller": manager.controller, "target": manager.target}.get(
        role, manager.controller + " " + manager.target)
    packages = list(dict.fromkeys(wanted.split()))
    steps = [[sudo + manager.refresh.split()]] if manager.refresh else []
    steps.append([install + packages])
    if manager.older:
        rest = [package for package in packages if not package.startswith(manager.older)]
        steps[-1].append([*install, manager.older, *rest])
    if manager.extra and role != "controller":
        steps.append([install + manager.extra.split()])
    return steps

def install_dependencies(role: str, assume_yes: bool = False) -> None:
    """Install what a role needs, after showing how and asking. Raises if any is missing then."""
    missing = missing_programs(role)
    names = ", ".join(missing)
    if not missing:
        emit("install-deps: everything for the role %s is here" % role, error=True)
        return
    name = next((name for name in PACKAGE_MANAGERS if shutil.which(name)), None)
    if not name:
        raise OffsyncError(
            "install-deps: missing: %s, and no known package manager (%s) is here; install OpenSSH "
            "and rsync with rrsync by hand", names, ", ".join(PACKAGE_MANAGERS))
    steps = install_commands(name, role)
    emit("missing here: %s. These commands install it:" % names, error=True)
    for step in steps:
        emit("\n".join(compose("  `%s`", shlex.join(words)) for words in step), error=True)
    if steps[0][0][0] == "sudo" and not shutil.which("sudo"):
        here = "offsync" if shutil.which("offsync") else "python3 " + shlex.quote(
            os.path.realpath(sys.argv[0]))
        raise OffsyncError("install-deps: this account is not root, and there is no sudo; have "
                           "root run: `%s install-deps --role %s -y`", here, role)
    if not assume_yes and ask("Run them now? Type y or n: ", compose(
            "%s not installed; run: `offsync install-deps --role %s -y`, which asks nothing",
            names + (" is" if len(missing) == 1 else " are"), role)) not in ("y", "yes"):
        raise OffsyncError("install-deps: nothing was installed; missing: %s", names)
    for step in steps:                      # what is missing afterwards tells whether it worked
        any(run(command, shown=True).status == 0 for command in step)
    still = missing_programs(role)
    if still:
        hint = PACKAGE_MANAGERS[name].hint or "look at what %s printed above" % name
        raise OffsyncError("install-deps: still missing: %s; " + hint, ", ".join(still))
    start = PACKAGE_MANAGERS[name].start
    if "sshd" in missing and start:
        emit(compose("install-deps: now start sshd, for example: `%s`", start), error=True)

def require_programs(role: str) -> None:
    """Make sure of what a role needs, asking to install what is not here; raise for the rest.

    Not of rrsync: find_rrsync() says more of that.
    """
    missing = missing_programs(role)
    if missing and set(missing) != {"rrsync"}:
        if "rsync" in missing and (os.environ.get("OFFSYNC_RSYNC") or shutil.which("rsync")):
            raise OffsyncError("%s", missing["rsync"])      # openrsync, too old, a wrong variable
        install_dependencies(role)

def cmd_install_deps(args: argparse.Namespace) -> int:
    install_dependencies(args.role, args.yes)
    return 0


# --- config.yaml: a strict subset of YAML -------------------------------------------------------

# What is accepted means the same to any YAML 1.1 or 1.2 parser; the rest is refused by line:
# top-level "key: value", lists of scalars, lists of mappings, comments. In double quotes, the
# escapes that JSON and every YAML share; no surrogates.
YAML_TEXT = r'"(?:[^"\\\t]|\\["\\bfnrt]|\\u(?![dD][89A-Fa-f])[0-9A-Fa-f]{4})*"'
YAML_LINE = (
    r"(?P<indent> *)(?P<dash>- +)?"
    r"(?:(?!(?i:y|n|yes|no|on|off|true|false|null):)(?P<key>[A-Za-z_][A-Za-z0-9_]*):(?: +|$))?"
    r"(?P<value>" + YAML_TEXT + r"|'(?:[^'\t]|'')*'"
    r"|\[ *(?:" + YAML_TEXT + r"(?: *, *" + YAML_TEXT + r")*)? *\]"
    r"|[A-Za-z0-9/][A-Za-z0-9_./@+-]*)?(?:(?:^|(?<= )| +)#.*)? *")
YAML_FORBIDDEN = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]"
# Plain words that some YAML parser takes for a boolean, a null or a merge.
YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")

class Node(NamedTuple):
    """A value of config.yaml: a scalar, or a list or dict of nodes; the line where it begins."""
    value: Any
    line: int

def parse_yaml_value(text: str, line: int) -> Any:
    """Return the value of one token: a scalar, or a list of nodes."""
    if text[0] == '"':
        return json.loads(text)
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == "[":
        return [Node(word, line) for word in json.loads(text)]
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        return int(text)
    if text[0].isdigit() or text.lower() in YAML_WORDS:
        raise ValueError("%s is not supported; write true, false, a decimal number, or text in "
                         "quotes" % text)
    return text

def explain_yaml(line: str) -> str:
    """Return what is wrong with a line that is not in the subset, and what to write instead."""
    bad = (re.search(YAML_FORBIDDEN, line) or "?")[0]
    odd = next((c for c in line if c.isspace() and c not in " \t"), "")
    value = line.split("#")[0].strip().rpartition(": ")[2].lstrip("- ")
    return next(why for wrong, why in (
        ("\t" in line, "a tab; write blanks instead"),
        (bad == "\ufeff", "a byte order mark (U+FEFF); save the file as UTF-8 without one"),
        (bad != "?", "the character U+%04X is not allowed; remove it" % ord(bad)),
        (odd, "the character U+%04X looks like a blank; write a blank" % ord(odd or " ")),
        (value[:1] == "~", "~ is not expanded here; write the whole path, from / on"),
        (value[:1] in ("*", "&", "!", "%", "@", "?"),
         'text that begins with %s needs double quotes: "%s"' % (value[:1], value)),
        (line.rstrip() == "---", "a second document; only the first line may be ---"),
        (re.search(r", *\]", value), "a comma before ]; remove it"),
        (True, "unsupported syntax or value; put text in double quotes, as JSON")) if wrong)

def add_pair(mapping: dict[str, Node], key: str, node: Node) -> None:
    if key in mapping:
        raise ValueError("the key %s stands in line %d, too; remove one" % (key, mapping[key].line))
    mapping[key] = node

def yaml_lines(text: str) -> list[str]:
    """Return the lines of a document, CR before LF taken off (nowhere else: it would hide text)."""
    *lines, last = text.split("\n")
    return [*(line[:-1] if line.endswith("\r") else line for line in lines), last]

def parse_yaml(text: str) -> dict[str, Node]:
    """Return a document's nodes. Raises ValueError(line, why) where it is not in the subset."""
    nodes: dict[str, Node] = {}
    opened: Optional[Node] = None           # the open list
    dash = keys = -1                        # the columns of its dashes, and of its last item's keys
    lines, number = yaml_lines(text), 0
    try:
        for number, line in enumerate(lines, 1):
            if number == 1 and line == "---":
                continue
            match = re.fullmatch(YAML_LINE, line)
            if re.search(YAML_FORBIDDEN, line) or not match:
                raise ValueError(explain_yaml(line))
            indent, key, value = len(match["indent"]), match["key"], match["value"]
            node = None if value is None else Node(parse_yaml_value(value, number), number)
            if match["dash"]:
                if opened is None or opened.value and indent != dash:
                    raise ValueError("a list item where none is expected; indent all items alike")
                if node is None:
                    raise ValueError("an empty list item; remove it")
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
            if node.value == [] and "[" not in lines[number - 1].split("#")[0]:
                raise ValueError(key + ": has no value; write [] for an empty list")
    except ValueError as error:
        raise ValueError(number, str(error)) from None
    return nodes

def format_yaml(value: Any) -> str:
    """Return a scalar as any YAML parser reads it back; ours hold nothing that YAML forbids."""
    return json.dumps(value, ensure_ascii=False)

def format_targets(targets: Sequence[Target]) -> list[str]:
    """Return the block "targets" of config.yaml: all text, and what is not the default."""
    lines = ["targets:"] if targets else ["targets: []"]
    for target in targets:
        values = {key: getattr(target, key) for key in TARGET_KEYS}
        pairs = ["%s: %s" % (key, format_yaml(value)) for key, value in values.items()
                 if TARGET_KEYS[key].type is str or value != TARGET_KEYS[key].default]
        lines += ["  %s %s" % (" " if index else "-", pair) for index, pair in enumerate(pairs)]
    return lines

def format_new_config(source: str) -> str:
    return ('version: 1\nsource: %s\ndelete: false\noverwrite: true\nverify: "hash"\nexclude:\n'
            '  - ".git/"\ntargets: []\n' % format_yaml(source))

def replace_block(text: str, key: str, block: Sequence[str]) -> str:
    """Return config text with one top-level key's lines replaced; all else stays."""
    lines, node = text.split("\n"), parse_yaml(text)[key]
    last = node.line
    for item in node.value if isinstance(node.value, list) else ():
        pairs = item.value.values() if isinstance(item.value, dict) else ()
        last = max([item.line, *(pair.line for pair in pairs)])
    end = "\r" if lines[node.line - 1].endswith("\r") else ""
    lines[node.line - 1:last] = [line + end for line in block]
    return "\n".join(lines)


LOGIN = (r"(?a)[A-Za-z0-9_.][A-Za-z0-9_.@+\\-]*\$?@"
         r"(?:\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)")
CONTROL = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]"

def validate_login(login: str) -> str:
    """Return a login: user@host, an IPv6 address in brackets."""
    if not re.fullmatch(LOGIN, login) or len(login) > 200:      # it is the name of a file, too
        raise UsageError("login %s: it is not of the form user@host (user@[address] for IPv6; a "
                         "port goes into --port)", show_text(login))
    return login

def validate_absolute_path(path: str, what: str) -> str:
    """Return the path normalised; absolute, without control characters and undecodable bytes."""
    if not path.startswith("/") or re.search(CONTROL, path) or len(os.fsencode(path)) > 4000:
        raise UsageError("%s %s: it must be an absolute path in UTF-8, of at most 4000 bytes, "
                         "without control characters", what, show_text(path))
    return posixpath.normpath("/" + path.lstrip("/"))

def validate_port(port: Any) -> int:
    if not re.fullmatch("[1-9][0-9]{0,4}", str(port)) or int(port) > 65535:
        raise UsageError("port %s: it must be a number from 1 to 65535", show_text(str(port)))
    return int(port)

def flag(text: str) -> dict[str, Any]:
    """Return the words for add_argument of an option without a value."""
    return {"action": "store_true", "help": text}

def value(metavar: str, text: str, **more: Any) -> dict[str, Any]:
    """Return the words for add_argument of an option or argument with a value."""
    return {"metavar": metavar, "help": text, **more}

class Rule(NamedTuple):
    """What a key of config.yaml must be.

    accept returns the value in its normal form; another value, and UsageError, are a refusal. A
    target's key is an argument of "target add", too: option, with its words for add_argument.
    """
    what: str
    type: type
    default: Any                            # ... where the key is required
    accept: Callable[[Any], Any] = lambda value: value
    option: str = ""
    words: dict[str, Any] = {}

def between(least: int, most: int) -> Callable[[int], Optional[int]]:
    """Return what accepts numbers in a range."""
    return lambda number: number if least <= number <= most else None


BOOLEAN, PATH = "true or false", "an absolute path without .. and double or trailing slashes"
TOP_KEYS = {
    "version": Rule("the number 1", int, ..., between(1, 1)),
    "source": Rule("an absolute path", str, ...,
                   lambda path: validate_absolute_path(path, "") and path),
    "delete": Rule(BOOLEAN, bool, False),
    "overwrite": Rule(BOOLEAN, bool, True),
    "verify": Rule('"hash", "strong" or "quick"', str, "hash",
                   lambda word: word if word in RSYNC_PLAN else None),
    "exclude": Rule("a list of rsync patterns", list, [Node(".git/", 0)]),
    "jobs": Rule("a number from 1 to 1000", int, 8, between(1, 1000)),
    "bwlimit": Rule("a number of KiB/s", int, 0),
    "compress": Rule(BOOLEAN, bool, False),
    # A large file is hashed in silence: hours.
    "timeout": Rule("a number of seconds, 60 or more", int, 10800, between(60, 10 ** 9)),
    "max_delete": Rule("a number of percent from 0 to 100", int, 50, between(0, 100)),
    "targets": Rule("a list of targets, or []", list, ...)}
TARGET_KEYS = {
    "login": Rule("user@host (user@[address] for IPv6)", str, ..., validate_login, "login",
                  value("LOGIN", "user@host; IPv6 as user@[address]")),
    "user": Rule("the user of login", str, ...),
    "host": Rule("the host of login", str, ...),
    "remote_path": Rule(
        PATH, str, ..., lambda path: validate_absolute_path(path, "path"), "--path",
        value("DIR", "the path given to link there", required=True, dest="remote_path")),
    "rrsync": Rule(PATH, str, DEFAULT_RRSYNC, lambda path: validate_absolute_path(path, "rrsync"),
                   "--rrsync", value("PATH", "where rrsync is there, if not " + DEFAULT_RRSYNC)),
    "port": Rule("a number from 1 to 65535", int, None, validate_port, "--port",
                 value("N", "the port of sshd (default: ssh_config, else 22)")),
    "symlinks": Rule(BOOLEAN, bool, True, option="--no-symlinks", words={
        "action": "store_false", "dest": "symlinks",
        "help": "rrsync munges symlinks there, so none are delivered"})}

def add_arguments(target: Target) -> str:
    """Return what follows "offsync target add" to add a target (again)."""
    words = [target.login]
    for key, rule in TARGET_KEYS.items():
        given = getattr(target, key)
        if rule.option.startswith("--") and given != rule.default:
            words += [rule.option, str(given)] if rule.type is not bool else [rule.option]
    return shlex.join(words)

def validate_config(text: str, filename: str) -> Config:
    """Return the config; every refusal names file, line and what is allowed."""
    def refuse(line: int, message: str) -> NoReturn:
        raise UsageError("%s:%d: %s; correct that", filename, line, message)

    def values_of(nodes: dict[str, Node], rules: dict[str, Rule], first: int) -> dict[str, Any]:
        for key, node in nodes.items():
            if key not in rules:
                refuse(node.line, "the key %s is unknown; known here are %s" % (
                    key, ", ".join(rules)))
        values = {}
        for key, rule in rules.items():
            if key not in nodes and rule.default is ...:
                refuse(first, 'the key "%s" is missing; it is %s' % (key, rule.what))
            given = values[key] = nodes[key].value if key in nodes else rule.default
            fine = key not in nodes
            with contextlib.suppress(UsageError):
                fine = fine or type(given) is rule.type and rule.accept(given) == given
            if not fine:
                home = isinstance(given, str) and given.startswith("~")
                more = "; ~ is not expanded here" if home else ""
                refuse(nodes[key].line, "%s must be %s%s" % (key, rule.what, more))
        return values

    try:
        nodes = parse_yaml(text)
    except ValueError as error:
        refuse(*error.args)
    values = values_of(nodes, TOP_KEYS, 1)
    for node in values["exclude"]:
        if type(node.value) is not str or node.value in ("", "!") or re.search(CONTROL, node.value):
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
        if match and total:                 # it divides by 1024 (progress.c)
            percent = 100 * int(re.sub(rb"[,.]", b"", match[1])) // total
            rate = match[2].decode() + " " + match[3].decode().replace("k", "K").replace("B", "iB")
            self.update(name, "sending %d%% of %s%s" % (
                min(percent, 100), format_bytes(total), " at " + rate if total > 1 << 20 else ""))

    def tick(self, interval: float = 0.5) -> None:
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
        columns, rows = terminal_size(sys.stderr)
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

def terminal_size(stream: Any) -> tuple[int, int]:
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except OSError:
        columns, rows = 0, 0
    return columns or 80, rows or 24

def lay_out(text: str, columns: int) -> str:
    """Return a message for a terminal: broken between words, each command on a line of its own.

    A command is never broken, so that it can be copied.
    """
    import textwrap
    lines: list[str] = []
    for paragraph in text.split("\n"):
        parts = paragraph.split(COPY)
        for number, part in enumerate(parts):
            if number % 2:
                lines.append("    " + part)
            elif part.strip(" ;:,.()") or len(parts) == 1:
                lines += textwrap.wrap(
                    part.lstrip(" ;:,.)") if number else part, columns - 1,
                    initial_indent="  " if number else "", subsequent_indent="  ",
                    break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)

def emit(text: Union[str, bytes], error: bool = False, prose: bool = False) -> None:
    """Print a line, or bytes: a result on stdout, else on stderr. A reader who left is no error.

    A message (all on stderr, and prose) is laid out for a terminal; in a pipe it is one line.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        with PROGRESS.lock:                 # no other thread draws in between
            if PROGRESS.drawn:
                PROGRESS.draw([])
            if isinstance(text, bytes):
                stream.flush()
                stream.buffer.write(text)
            else:
                if (error or prose) and stream.isatty() and not text.startswith("+ "):
                    text = lay_out(text, terminal_size(stream)[0])
                stream.write(plain(text) + "\n")
            stream.flush()
    except OSError as problem:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())      # nothing fails on it again
        os.close(null)
        if not error and not isinstance(problem, BrokenPipeError):
            LOST_OUTPUT.append(str(problem.strerror))

def emit_lines(lines: Iterable[bytes]) -> None:
    lines = iter(lines)
    for batch in iter(lambda: b"".join(itertools.islice(lines, 1000)), b""):
        emit(batch)

def print_table(rows: Sequence[Sequence[str]], below: Sequence[str] = ()) -> None:
    """Print rows in columns, each cut to one line of the terminal, and what stands below it."""
    columns = terminal_size(sys.stdout)[0] if sys.stdout.isatty() else sys.maxsize
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row, text in itertools.zip_longest(rows, below):
        cells = (printable(cell).ljust(width) for cell, width in zip(row, widths))
        line = "  ".join(cells).rstrip()
        emit(line if len(line) <= columns else line[:columns - 3] + "...")
        if text:
            emit("    " + printable(text), prose=True)

def warn(text: str, *values: object) -> None:
    emit("offsync: warning: " + compose(text, *values), error=True)


COLOURS = {"added": 32, "modified": 33, "missing": 31, "leftover": 36, "failed": 31, "ok": 32}

def colour(kind: str, text: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if plain or not sys.stdout.isatty():
        return text
    return "\x1b[%dm%s\x1b[0m" % (COLOURS[kind], text)

def ask(question: str, twin: str) -> str:
    """Return the answer typed on the terminal; without one, an error that names the twin.

    Under "su -c" only stdin leads to the terminal.
    """
    try:
        try:
            terminal = open("/dev/tty", "r+b", buffering=0)
        except OSError:
            if not os.isatty(0):
                raise
            terminal = open(os.dup(0), "r+b", buffering=0)
        with terminal:
            terminal.write(question.encode())
            return terminal.readline().decode("utf-8", "replace").strip()
    except OSError:
        raise OffsyncError("there is no terminal to ask on; %s", twin) from None


# --- Commands: init, targets --------------------------------------------------------------------

def make_key(path: str, comment: str) -> None:
    """Make a key pair without a passphrase: ED25519, or ECDSA where this host's policy (FIPS)
    refuses that. Raises OffsyncError."""
    for words in (("ed25519",), ("ecdsa", "-b", "256")):
        made = run([program("ssh-keygen"), "-q", "-t", *words, "-N", "", "-C", comment, "-f", path])
        if made.status == 0:
            return
    raise OffsyncError("key %s: ssh-keygen cannot make it; mend what it says, then try again (it "
                       "said: %s)", show_text(path), quote_answer(made.stderr))

def read_public_key(path: str) -> bytes:
    """Return the public line of our private key, as ssh-keygen has it.

    Raises OffsyncError, with what mends the key, where ssh could not use it.
    """
    done = run([program("ssh-keygen"), "-y", "-P", "", "-f", path])
    if done.status == 0:
        return done.stdout
    data, quoted = read_file(path, "key", "run: `offsync init`"), shlex.quote(path)
    if data and (b"\r" in data or not data.endswith(b"\n")):
        raise OffsyncError("key %s: its line ends are damaged (CR LF, or none at the end, as a CI "
                           r"variable leaves them); run: `sed -i -e 's/\r$//' -e '$a\' %s`",
                           show_text(path), quoted)
    if b"passphrase" in done.stderr:
        raise OffsyncError("key %s: it has a passphrase, and nobody is there to type it; take it "
                           "away (it asks for it): `ssh-keygen -p -N '' -f %s`",
                           show_text(path), quoted)
    raise OffsyncError("key %s: ssh-keygen cannot read it; restore it, or move it away, run init, "
                       "and link the new one (it said: %s)",
                       show_text(path), quote_answer(done.stderr))

def check_own_key(path: str) -> str:
    """Return the type of our key; raise for what keeps ssh from using it."""
    public, shown = read_public_key(path).split()[:2], path + ".pub"
    if os.path.exists(shown) and read_file(shown, "key", "").split()[:2] != public:
        raise OffsyncError("key %s: ssh offers %s, which is of another key; run: `offsync init`",
                           show_text(path), show_text(shown))
    return public[0].decode()

def cmd_init(args: argparse.Namespace) -> int:
    require_programs("controller")
    home, source = Home(), ""
    if args.source is not None or not os.path.lexists(home.config):
        named = "." if args.source is None else args.source
        source = validate_absolute_path(os.path.abspath(named), "source")
        if not named or not os.path.isdir(source):
            raise UsageError("source %s: it is not a directory; create one", show_text(named))
        real, private = os.path.realpath(source), os.path.realpath(home.path)
        holds = (private + "/").startswith(real.rstrip("/") + "/")
        if holds or real == os.path.realpath(os.path.expanduser("~")):
            raise UsageError("source %s: it is the home directory or holds the private key; name "
                             "the directory to deliver: `offsync init --source DIR`",
                             show_text(source))
    home.refuse_strangers()
    make_directory(os.path.realpath(home.path), 0o700)
    take_lock(home, "init")
    if not os.path.lexists(home.config):
        write_atomically(home.config, [format_new_config(source).encode()], 0o600)
    elif source and source != home.load().source:
        if home.load().targets:
            warn("the source was %s; %s will get the new one (a second tree has its own "
                 "OFFSYNC_HOME)", show_text(home.load().source),
                 plural(len(home.load().targets), "target"))
        home.replace_in_config("source", ["source: " + format_yaml(source)])
    if not os.path.lexists(home.key):
        if os.path.exists(home.key + ".pub"):
            warn("the private key was gone: this is a new one, to be linked on each target again")
        make_key(home.key, "offsync@" + re.sub(r"[^A-Za-z0-9.-]", "", os.uname().nodename))
    check_private(home.key)
    public, path = read_public_key(home.key), home.key + ".pub"
    if not os.path.exists(path) or read_file(path, "key", "").split()[:2] != public.split()[:2]:
        write_atomically(path, [public], 0o644)     # the key that is linked is the one used
    key = read_file(path, "key", "").decode("utf-8", "replace").strip()
    emit("source %s, config %s" % (show_text(home.load().source), show_text(home.config)), True)
    emit(compose("Now run this on each target: `offsync link --path DIR --key %s`",
                 shlex.quote(key)), error=True)
    emit(key)
    return 0

def read_log(home: Home) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line, record) of operations.log; what is half written, or none, is passed over."""
    if not os.path.isfile(home.log):
        return
    with open(home.log, "rb") as stream:
        for line in stream:
            with contextlib.suppress(ValueError, RecursionError):
                fields = json.loads(line)
                if isinstance(fields, dict) and isinstance(fields.get("timestamp"), str):
                    for key in ("files_changed", "files_deleted"):
                        names = fields.get(key)
                        fields[key] = [*map(str, names)] if isinstance(names, list) else None
                    yield line, fields

def short_time(timestamp: str) -> str:
    return timestamp[:16].replace("T", " ")

def cmd_target_list(args: argparse.Namespace) -> int:
    home = Home()
    config, last = home.load(), read_statuses(home)
    targets = sorted(config.targets)
    if not {target.login for target in targets} <= set(last):       # older than the statuses
        for _, fields in read_log(home):
            login = fields.get("login")
            if isinstance(login, str) and not os.path.exists(os.path.join(home.last, login)):
                last[login] = {key: fields[key] for key in fields if key[:6] != "files_"}
    if args.json:
        listed = [{**target._asdict(), "user": target.user, "host": target.host,
                   "last": last.get(target.login)} for target in targets]
        emit(json.dumps({"version": 1, "targets": listed}, sort_keys=True))
        return 0
    rows = [["TARGET", "LAST RUN (UTC)", "RESULT", "PLAN", "PATH, OR WHY NOT"]]
    for target in targets:
        record, where = last.get(target.login), show_text(target.remote_path)
        where += " port %d" % target.port if target.port else ""
        rows.append([target.login, "", "none", "", where + ": never delivered (no record)"])
        if record:
            other, why = record.get("source") or config.source, str(record.get("error") or "")
            why = why.removeprefix("refused, nothing was sent: ")       # RESULT says it, too
            where += " from %s" % other if other != config.source else ""
            rows[-1][1:] = [short_time(str(record.get("timestamp"))), str(record.get("result")),
                            str(record.get("plan") or "-")[:12], "%s (%s)" % (why, where)
                            if why else where]
    print_table(rows)
    if not targets:
        emit("no targets yet; on a target run: offsync link; then here: offsync target add", True)
    return 0

def cmd_target_remove(args: argparse.Namespace) -> int:
    home = Home()
    home.load()
    take_lock(home, "target remove")
    targets = home.load().targets
    named = [target for target in targets if args.login in (target.login, target.host)]
    if len(named) != 1:
        raise UsageError(
            "target %s: %s; known targets: %s", show_text(args.login),
            "several have this host, name the login" if named else "unknown",
            some_of(sorted(target.login for target in targets)) or "none")
    home.replace_in_config("targets", format_targets([t for t in targets if t != named[0]]))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(home.last, named[0].login))
    emit("removed %s here; to revoke the key, run there: offsync unlink, with the key that "
         "'offsync init' prints" % named[0].login, error=True)
    return 0

def read_inventory(path: str) -> list[str]:
    """Return the patterns that a file lists, one a line; nothing in it is an option or "all"."""
    data = read_file(path, "list of targets", "name a file with a pattern a line", False)
    lines = [re.split(r"(?:^|\s)#", line)[0].strip()
             for line in data.decode("utf-8", "replace").split("\n")]
    patterns = [line for line in lines if line]
    wrong = [pattern for pattern in patterns if pattern.startswith(("-", "@"))]
    if wrong or not patterns:
        why = "%s is no pattern" % show_text(wrong[0]) if wrong else "it names no target"
        raise UsageError("list of targets %s: %s; list logins, hosts or patterns, one a line",
                         show_text(path), why)
    return patterns

def match_targets(logins: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Return the logins that match one of these patterns, by login or host. Raises UsageError."""
    chosen: set[str] = set()
    known = sorted(logins)
    for word in patterns:
        for pattern in read_inventory(word[1:]) if word.startswith("@") else [word]:
            matching = {login for login in known for name in (login, Target(login, "").host)
                        if name == pattern or fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                raise UsageError("target %s: nothing matches; known targets: %s",
                                 show_text(pattern), some_of(known) or "none")
            chosen |= matching
    return chosen

def select_targets(targets: Sequence[Target], patterns: Sequence[str],
                   excepted: Sequence[str] = ()) -> list[Target]:
    """Return the targets that match a pattern (all for none), but for those excepted; sorted."""
    logins = {target.login for target in targets}
    chosen = match_targets(logins, patterns) if patterns else logins
    chosen = chosen - match_targets(logins, excepted)
    if not chosen:
        raise UsageError("targets: --except leaves none; name fewer")
    return sorted(target for target in targets if target.login in chosen)

def load_targets(home: Home, args: argparse.Namespace) -> tuple[Config, list[Target]]:
    config = home.load()
    if not config.targets:
        raise UsageError("targets: there are none yet; run on a target: `offsync link --path DIR`; "
                         "then here the 'offsync target add' command that it prints")
    if args.source == "":
        raise UsageError("source: it is empty; name a directory: --source DIR")
    if args.source is not None:
        source = validate_absolute_path(os.path.abspath(args.source), "source")
        config = config._replace(source=source)
    if getattr(args, "delete", False):
        config = config._replace(delete=True)
    return config, select_targets(config.targets, args.targets, args.excepted)


# --- Commands: plan, apply, verify, log ---------------------------------------------------------

def plan_summary(config: Config, plan: TargetPlan, planning: bool = True) -> str:
    if plan.error:
        return "not compared"
    deletes = {"missing", "leftover"} if config.delete and planning else set()
    counts = ["%d %s%s" % (len(plan.of(kind)), kind, " (to delete)" if kind in deletes else "")
              for kind in KINDS if plan.of(kind)]
    if not counts:
        return "equal, nothing to do"
    size = "; %s to send" % format_bytes(size_to_send(plan.changes)) if planning else ""
    return ", ".join(counts) + size

def change_line(change: Change, quoted: bool = False) -> str:
    """Return one entry of a plan: kind, reasons, size, path."""
    entry, path = change.entry, show(change.path, quoted)
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
    groups: dict[Any, list[TargetPlan]] = {}
    entries_wanted = entries
    for plan in plans:
        key = without_words(plan.error.why) if plan.error else plan.digest
        groups.setdefault(key, []).append(plan)
    emit("source %s" % show(os.fsencode(config.source)))
    for group in groups.values():
        plan = group[0]
        for other in group:
            emit(other.target.where)
        if plan.error:
            emit("  %s: %s" % (colour("failed", "not compared"), plan.error.why), prose=True)
            continue
        similar = alike(change.path for change in plan.changes)
        for change in plan.changes[:entries]:
            emit(change_line(change, change.path in similar))
        more = len(plan.changes) - entries
        if 0 < more < len(plan.changes):
            emit("  ... and %d more" % more)
        entries = max(entries - len(plan.changes), 0)
        each = "" if len(group) == 1 else "%d targets, each: " % len(group)
        emit("  " + each + plan_summary(config, plan, entries_wanted == sys.maxsize))

def name_leftovers(plans: Sequence[TargetPlan]) -> None:
    """Say which targets hold files under rsync's own names: interrupted runs, or a hidden file."""
    logins = [plan.target.login for plan in plans if plan.of("leftover")]
    paths = {change.path for plan in plans for change in plan.of("leftover")}
    if logins:
        warn("%s under names that rsync gives to what it receives, from interrupted runs, or "
             "hidden there by somebody: look at them, and remove them there, or allow it: `offsync "
             "apply --delete`: %s: %s", plural(len(paths), "entry lies", "entries lie"),
             some_of(logins), some_paths(paths))

def raise_for_failed(plans: Sequence[TargetPlan], what: str, as_json: bool) -> None:
    """Raise if a target has no plan; why was printed unless as JSON, which has only its kind."""
    failed = [str(plan.error) if as_json else plan.target.login for plan in plans if plan.error]
    if failed:
        raise OffsyncError("%s: %d of %s could not be compared; mend what is said of each, then "
                           "try again: %s", what, len(failed), plural(len(plans), "target"),
                           some_of(failed))

def cmd_plan(args: argparse.Namespace) -> int:
    home = Home()
    config, targets = load_targets(home, args)
    with Run(home, config, args.jobs) as shared:
        plans = plan_all(shared, targets)
        name, why = home.keep_plan(config, plans), refusal(shared, plans, False)
        never = bool(why and refusal(shared, plans, True))
    refuses = "apply will refuse" if never else "apply without --plan will refuse"
    name_leftovers(plans)
    if args.json:
        emit_lines(plan_lines(config, plans))
        if why:
            warn("%s: %s", refuses, why)
    else:
        named = {plan.target.login: plan_summary(config, plan) for plan in plans}
        if args.summary:
            emit("source %s" % show(os.fsencode(config.source)))
            named.update({plan.target.login: "not compared: " + plain(plan.error.why)
                          for plan in plans if plan.error})
        else:
            print_plans(config, plans, sys.maxsize)
        if args.summary or len(plans) > 1:
            print_table(list(named.items()))
        if why:
            emit("%s: %s" % (colour("failed", refuses), why), prose=True)
        emit("plan " + name)
        if sys.stdout.isatty() and any(plan.of(*KINDS[:3]) for plan in plans) and not never:
            words = [*args.targets, *(["--source", args.source] if args.source is not None else []),
                     *(word for one in args.excepted for word in ("--except", one)),
                     *(["--delete"] if args.delete else []), "--plan", name]
            emit(compose("Next: `offsync apply %s`", shlex.join(words)), error=True)
    raise_for_failed(plans, "plan", args.json)
    return 3 if args.exit_code and any(plan.of(*KINDS[:3]) for plan in plans) else 0

def counts_of(changed: Optional[Sequence[str]], deleted: Optional[Sequence[str]]) -> str:
    counts = []
    if changed:
        counts.append(plural(len(changed), "entry", "entries") + " delivered")
    if deleted:
        counts.append("%d deleted" % len(deleted))
    return ", ".join(counts)

def describe_ok(record: Record) -> str:
    counts = counts_of(record.files_changed, record.files_deleted)
    if not counts:
        return "%s: %s: equal, nothing to do" % (record.login, colour("ok", "ok"))
    return "%s: %s: %s, verified; %s sent in %.1f s" % (
        record.login, colour("ok", "ok"), counts, format_bytes(record.bytes_sent or 0),
        record.seconds or 0)

def without_words(why: str) -> str:
    """Return a failure without what a program said of it, which differs by host and port."""
    return re.sub(r" \(it said: .*\)", "", why)

def describe_failed(record: Record) -> str:
    known = counts_of(record.files_changed, record.files_deleted) or "nothing was delivered"
    if record.files_changed is None:
        return "%s (what arrived is unknown: offsync plan tells)" % record.error
    return "%s (before that: %s)" % (record.error, known)

def decide(shared: Run, targets: Sequence[Target], reviewed: Optional[str],
           log: Log) -> list[TargetPlan]:
    """Return the plans to carry out; raise OffsyncError, with nothing sent, if they may not be."""
    if reviewed is None:
        plans = plan_all(shared, targets)
        log.identify(identify_plan(shared.config, plans)[0])
    else:
        stream, name = shared.home.open_plan(reviewed, shared.scratch)
        log.identify(name)
        with stream:
            plans = plan_all(shared, targets)
            PROGRESS.update("(all)", "comparing with the reviewed plan")
            approve(shared, plans, stream, reviewed)
    PROGRESS.update("(all)", "deciding")
    why = refusal(shared, plans, reviewed is not None)
    PROGRESS.update("(all)", None)
    if why:
        raise OffsyncError("refused, nothing was sent: %s", why)
    return plans

def cmd_apply(args: argparse.Namespace) -> int:
    home = Home()
    before = home.load()
    config, targets = load_targets(home, args)
    with Log(home, config, targets, args.json) as log:
        os.close(open_log(home, "; nothing was sent"))
        take_lock(home, "apply")
        log.locked = True
        if home.load() != before:
            raise OffsyncError("config %s: it was changed at this moment; try again", home.config)
        with Run(home, config, args.jobs, with_md5=True) as shared:
            plans = decide(shared, targets, args.plan, log)
            ended = shared.jobs.each(lambda plan: deliver(shared, log, plan), plans)
            with contextlib.closing(ended):         # type: ignore[type-var]
                for plan, _ in ended:
                    log.report(plan.target.login)
    return 0 if log.results["ok"] == len(targets) else 1

def cmd_verify(args: argparse.Namespace) -> int:
    home = Home()
    config, targets = load_targets(home, args)
    config = config._replace(verify="hash" if args.fast else "strong")
    take_lock(home, "verify", shared=True)
    with Run(home, config, args.jobs) as shared:
        plans = plan_all(shared, targets)
    name_leftovers(plans)
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

def unquoted(name: str) -> str:
    """Return the name that show() quoted, as text."""
    letters = {letter: chr(byte) for byte, letter in LETTERS.items()}

    def byte(match: "re.Match[str]") -> str:
        return letters.get(match[1]) or chr(int(match[1], 8) & 255)

    if not re.fullmatch(r'"(?:[ -!#-\[\]-~]|\\[abtnvfr"\\]|\\[0-7]{3})*"', name):
        return name
    raw = re.sub(r'\\([0-7]{3}|[abtnvfr"\\])', byte, name[1:-1])
    return os.fsdecode(raw.encode("latin-1"))

def cmd_log(args: argparse.Namespace) -> int:
    home = Home()
    records = list(read_log(home))
    logins = {str(fields.get("login") or fields.get("host")) for _, fields in records}
    if args.targets:
        known = {target.login for target in home.load().targets} if os.path.exists(
            home.config) else set()
        logins = match_targets(logins | known, args.targets)
    rows, unknown = [["WHEN (UTC)", "TARGET", "RESULT", "PLAN", "BY", "WHAT", ""]], 0
    for line, fields in records:
        login = str(fields.get("login") or fields.get("host"))
        changed, deleted = fields.get("files_changed"), fields.get("files_deleted")
        what = counts_of(changed, deleted)
        if args.name is not None:
            found = ["%s %s" % (word, name) for word, names in (
                ("changed", changed), ("deleted", deleted)) for name in names or ()
                if any(fnmatch.fnmatchcase(text, args.name)
                       for text in (unquoted(name), os.path.basename(unquoted(name))))]
            unknown += login in logins and changed is None
            what = some_of(list(map(cut, found)))
        if login not in logins or args.name is not None and not found:
            continue
        if args.json:
            emit(line if line.endswith(b"\n") else line + b"\n")
            continue
        why = str(fields.get("error") or "")
        row = [short_time(fields["timestamp"]), login, str(fields.get("result") or "ok"),
               str(fields.get("plan") or "-")[:12], str(fields.get("operator") or "-"),
               what or ("" if why else "equal, nothing to do"), why]
        rows.append(row)
    if not args.json and len(rows) > 1:
        here = sys.stdout.isatty()          # there, why a run failed stands below its row, whole
        print_table([row[:-1] for row in rows] if here else rows,
                    [row[-1] for row in rows] if here else ())
    since = "the log begins at %s (UTC)" % short_time(records[0][1]["timestamp"]) if records else \
        "it holds no record"
    emit("%s: %s%s; older records may have been rotated away" % (
        show_text(home.log), since, "; what %s changed is unknown" % plural(unknown, "run")
        if unknown else ""), error=True)
    return 0


# --- Commands: manifest, doctor, completion -----------------------------------------------------

def format_manifest_line(path: bytes, digest: str) -> bytes:
    r"""Return a line as sha256sum writes it: a backslash says that \n, \r, \\ are escaped."""
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != path else b"") + digest.encode() + b"  " + escaped + b"\n"

def parse_manifest(lines: Iterable[bytes]) -> dict[bytes, str]:
    """Return path -> sha256 of what sha256sum wrote. Raises ValueError(line number, why)."""
    found: dict[bytes, str] = {}
    letters = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}
    for number, line in enumerate(lines, 1):
        line = line[:-1] if line.endswith(b"\n") else line
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
    source.threads.close()
    return {path: source.entry(path).sha256.hex() for path in paths}

def print_manifest(root: str, exclude: Sequence[str]) -> None:
    found = manifest_files(root, exclude, None)
    manifest = b"".join(format_manifest_line(path, digest) for path, digest in found.items())
    digest = new_digest(manifest).hexdigest()
    if sys.stdout.isatty():                 # names must not write to the terminal
        text = manifest.decode("utf-8", "replace")
        manifest = "".join(c if c.isprintable() or c == "\n" else "?" for c in text).encode()
    emit(manifest)
    emit("%s; digest of the whole (sha256 of the manifest), to compare by voice: %s"
         % (plural(len(found), "file"), " ".join(re.findall("....", digest))), error=True)

def read_manifest(name: str) -> dict[bytes, str]:
    """Return path -> sha256 of a manifest file, "-" for stdin; it is read line by line."""
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as stream:
            return parse_manifest(iter(lambda: stream.readline(1 << 20), b""))
    except OSError as error:
        why = "it does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise UsageError("manifest %s: %s; name the file", show_text(name), why) from None
    except ValueError as error:
        raise UsageError("manifest %s:%s: %s; correct it", show_text(name), *error.args) from None

def cmd_manifest(args: argparse.Namespace) -> int:
    directory: str = args.directory
    exclude: tuple[str, ...] = ()
    if directory is None:
        home = Home()
        if not os.path.exists(home.config):
            raise UsageError("manifest: no config here names a source; name a directory: `offsync "
                             "manifest DIR`")
        directory, exclude = home.load().source, home.load().exclude
    if not os.path.isdir(directory):
        raise UsageError("manifest: %s is not a directory; name one", show_text(directory))
    if args.check is None:
        print_manifest(os.path.abspath(directory), exclude)
        return 0
    expected = read_manifest(args.check)
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

def check_controller(home: Home) -> bool:
    """Print what is right and wrong with this controller; return whether all is right."""
    def source() -> str:
        loaded = home.load()
        scanned = Source(loaded.source, loaded.exclude)
        check_place(scanned, (home.path, home.key))
        check_source(scanned, find_rsync()[0], loaded.targets)
        return show_text(loaded.source)

    problems: set[str] = set()
    checks: dict[str, Callable[[], Any]] = {
        "rsync": lambda: "%s %d.%d.%d" % (find_rsync()[0], *find_rsync()[1]),
        "ssh": lambda: "%s %s" % (
            program("ssh"), quote_answer(run([program("ssh"), "-V"]).stderr)),
        "ssh-keygen": lambda: program("ssh-keygen"),
        "state": lambda: check_private(home.path),
        "key": lambda: "%s %s" % (check_private(home.key), check_own_key(home.key)),
        "config": lambda: home.load() and check_private(home.config),
        "source": source}
    for what, check in checks.items():
        try:
            emit("%s %-10s  %s" % (colour("ok", "ok      "), what, check()))
        except (OffsyncError, OSError) as error:
            if str(error) not in problems:
                emit("%s %s" % (colour("failed", "PROBLEM "), getattr(error, "text", error)),
                     prose=True)
            problems.add(str(error))
    return not problems

def examine_target(shared: Run, target: Target) -> tuple[list[str], bool]:
    """Return (the lines that say what the key can do on a target, whether all is right)."""
    lines, connection = [target.where], Connection(shared, target)
    proofs: list[Proof] = []
    try:
        connection.open()
        proofs = prove_all(connection)
    except OffsyncError as error:
        why = getattr(error, "why", error.text)
        lines.append("  %s  %s" % (colour("failed", "PROBLEM"), why))
    for proof in proofs:
        word = {True: "ok", False: "OPEN", None: "unknown"}[proof.closed]
        word = colour("failed" if proof.closed is False else "ok", "%-8s" % word)
        lines.append("  %s %-30s %s" % (word, proof.tried, proof.answer))
    known = [line for line, _ in known_lines(shared, known_name(connection), ours=True)]
    if len(known) > 1:
        lines.append(compose(
            "  %s  known_hosts has %d keys for it, of which at most one was compared (offsync "
            "2.0.0 stored all that were shown): %s; replace them by the right one: `offsync target "
            "add %s --host-key SHA256:...`", colour("failed", "PROBLEM"), len(known),
            describe_keys(known), add_arguments(target)))
    return lines, bool(proofs) and len(known) < 2 and all(
        proof.closed is not False for proof in proofs)

def cmd_doctor(args: argparse.Namespace) -> int:
    home, healthy = Home(), 0
    found: dict[Target, list[str]] = {}
    if not os.path.lexists(home.config) and not os.path.lexists(home.key):
        raise OffsyncError("doctor: %s holds no controller's state: %s", show_text(home.path),
                           compose(home.find_state()))
    if not check_controller(home):
        raise OffsyncError("doctor: this controller has problems; mend what is marked PROBLEM "
                           "above, then run it again")
    config = home.load()
    targets = select_targets(config.targets, args.targets) if config.targets else []
    with Run(home, config, args.jobs) as shared:
        examined = shared.jobs.each(lambda target: examine_target(shared, target), targets)
        with contextlib.closing(examined):  # type: ignore[type-var]
            for target, (lines, fine) in examined:
                healthy += fine
                if fine and len(targets) > 1:       # a line each; what is wrong comes last, whole
                    emit("%s: %s: %d proofs" % (target.where, colour("ok", "ok"), len(lines) - 1))
                else:
                    found[target] = lines
    for line in (line for target in sorted(found) for line in found[target]):
        emit(line, prose=True)
    problems = ", %d with problems" % (len(targets) - healthy) if healthy < len(targets) else ""
    emit("%s: %d ok%s" % (plural(len(targets), "target"), healthy, problems))
    if problems:
        raise OffsyncError("doctor: there are problems; see what is marked PROBLEM or OPEN above")
    return 0


# The words are the parser's; targets and kept plans are asked for. readline replaces what follows
# the last of its word breaks: @ is one, or not, as bash's hostcomplete is set.
COMPLETION = """_offsync() {
    local line=${COMP_LINE:0:$COMP_POINT} current words login kept
    current=${line##*[[:blank:]]}
    case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
%s    *) words="%s" ;;
    esac
    if [[ $words == *@* ]]; then
        words=${words/@/}
        for login in $(offsync target list 2>/dev/null | tail -n +2 | cut -d ' ' -f 1); do
            words+=" $login ${login##*@}"
        done
    fi
    [[ ${COMP_WORDS[COMP_CWORD-1]} != --plan ]] || \\
        words=$(cd "${OFFSYNC_HOME:-$HOME/.offsync}/plans" 2>/dev/null && echo *)
    if [[ $current == @* ]]; then
        COMPREPLY=($(compgen -f -P @ -- "${current#@}"))
    else
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    fi
    [[ -z $ZSH_VERSION ]] || return 0
    kept=${current%%"${current##*["$COMP_WORDBREAKS"]}"}
    COMPREPLY=("${COMPREPLY[@]#"${kept%%@}"}")
}
complete -o default -F _offsync offsync
"""

def cmd_completion(args: argparse.Namespace) -> int:
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
    """Return where one stands: the last run, targets that failed, and what to do next."""
    if not os.path.exists(home.config) or not os.path.exists(home.key):
        state = home.find_state()
        if "run first" not in state and not os.path.exists(home.config):
            return compose(state)
        return compose("Next: `offsync init --source DIR` (on the controller), or `offsync link "
                       "--path DIR` (on a target)")
    targets, last = home.load().targets, read_statuses(home)
    if not targets:
        return compose("Next: `offsync link --path DIR` (on a target), then here the 'offsync "
                       "target add' command that it prints")
    known = [last[target.login] for target in targets if target.login in last]
    said = "%s in %s; " % (plural(len(targets), "target"), show_text(home.config))
    newest = max(known, key=lambda fields: str(fields.get("timestamp")), default=None)
    if newest:
        results = collections.Counter(printable(fields["result"]) for fields in known)
        counts = ["%d %s" % (count, word) for word, count in sorted(results.items(), reverse=True)]
        if len(known) < len(targets):
            counts.append("%d never delivered" % (len(targets) - len(known)))
        said += "the last run began at %s (UTC), by %s; last outcomes: %s. " % (
            short_time(printable(str(newest.get("timestamp")))),
            printable(str(newest.get("operator"))), ", ".join(counts))
    failed = ["%s (%s)" % (fields["login"], "did not finish" if fields["result"] == "started"
                           else printable(fields["result"]))
              for fields in known if fields["result"] != "ok"]
    if failed:
        said += "The last apply was not ok for: %s. " % some_of(sorted(failed))
    return said + compose("Next: `offsync plan`")


# --- Parser and main ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage is one line on stderr, and options are not abbreviated."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **arguments)

    def error(self, message: str) -> NoReturn:
        raise UsageError("%s; see: `%s --help`", message, self.prog)

    def print_help(self, file: Any = None) -> None:
        emit(self.format_help().rstrip("\n"))

def version_text() -> str:
    try:
        digest = hash_file(os.fsencode(os.path.realpath(__file__)))[0].hex()
    except (OSError, NameError):
        digest = "unknown (read from standard input)"
    return "offsync %s  sha256 %s" % (VERSION, digest)

def number_of_jobs(text: str) -> int:
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("it must be a number from 1 to 1000")
    return int(text)


# Arguments that several commands have: their words for add_argument.
KEY_OPTIONS = {"--key": value("TEXT", "the public key line (default: from a pipe, else asked for)"),
               "--key-file": value("FILE", "a file with the public key line")}
JSON = {"--json": flag("print JSON")}
ALL = "a login, a host, a pattern ('web*'), or @FILE with one a line"
TARGETS = {"targets": value("TARGET", ALL + " (default: all)", nargs="*")}
JOBS = {"--jobs": value("N", "targets at once (default: the config's)", type=number_of_jobs)}
FOR_RUN = {**TARGETS, "--except": value("TARGET", "all but these (the same words; repeatable)",
                                        action="append", default=[], dest="excepted"),
           "--source": value("DIR", "another source, for this run (to roll back)"), **JSON, **JOBS}
DELETE = {"--delete": flag("allow deletions, for this run")}
NO_SYMLINKS = {"--no-symlinks": TARGET_KEYS["symlinks"].words}
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
                   {**{rule.option: rule.words for rule in TARGET_KEYS.values() if rule.option},
                    "--host-key": value("FP", "the fingerprint SHA256:... to expect, unasked")}),
    "target list": (cmd_target_list, "list the targets and their last outcomes",
                    "target list --json", JSON),
    "target remove": (cmd_target_remove, "forget a target; its files and key entry stay there",
                      "target remove deploy@node02",
                      {"login": value("LOGIN", "user@host, or a host that only one target has")}),
    "install-deps": (cmd_install_deps, "both: install the system packages, after asking",
                     "install-deps --role target",
                     {"--role": {"choices": ("controller", "target", "both"), "default": "both",
                                 "help": "default: both"},
                      "-y --yes": flag("do not ask")}),
    "plan": (cmd_plan, "controller: show what apply would do; changes nothing",
             "plan 'web*' --exit-code",
             {**FOR_RUN, **DELETE, "--summary": flag("print counts only"),
              "--exit-code": flag("exit 3 if there are differences")}),
    "apply": (cmd_apply, "controller: transfer what the plan lists, verify, log",
              "apply 'web*' --except web3 --plan FILE",
              {**FOR_RUN, **DELETE,
               "--plan": value("ID|FILE", "only what this reviewed plan approves: the ID that plan "
                               "ends with, or the file that plan --json printed")}),
    "verify": (cmd_verify, "controller: hash everything again; exit 3 if a target differs",
               "verify --fast",
               {**FOR_RUN, "--fast": flag("by the fastest checksum instead of MD5")}),
    "log": (cmd_log, "controller: what reached which target, when, and who sent it",
            "log web3 --name app.conf",
            {**TARGETS, "--name": value("PATTERN", "only runs that changed or deleted such a name "
                                        "(a pattern of the path, or of its last component)"),
             **JSON}),
    "manifest": (cmd_manifest, "either: print a sha256 manifest of a tree, or check one",
                 "manifest /srv/app-data > app-data.sha256",
                 {"directory": value("DIR", "the tree (default: the configured source)", nargs="?"),
                  "--check": value("FILE", "compare with this manifest; exit 3 if it differs")}),
    "doctor": (cmd_doctor, "controller: check it, and prove what the key can do on targets",
               "doctor deploy@node02", {**TARGETS, **JOBS}),
    "completion": (cmd_completion, "either: print the code that completes words in bash",
                   "completion bash > /etc/bash_completion.d/offsync",
                   {"shell": {"choices": ("bash",)}})}

def build_parser(argv: Optional[Sequence[str]] = None) -> argparse.ArgumentParser:
    """Return the parser. Of commands that argv does not name it knows only the name."""
    about = {name: text for name, (_, text, _, _) in COMMANDS.items() if " " not in name}
    about["target"] = "controller: add, list or remove targets"
    about = {**dict(list(about.items())[:3]), "target": about["target"], **about}
    listed = ["  %-12s  %s" % item for item in about.items()]
    parser = Parser(
        prog="offsync", usage="offsync COMMAND ...   (each has --help, with an example)",
        description="\n".join([(__doc__ or "").split("\n\n")[0], "", *listed]))
    parser.add_argument("--version", **flag("print the version and this file's sha256"))
    parser.add_argument("--contract", **flag("print what it reads, writes, runs and never does"))
    verbose = flag("print every program before it starts")
    parser.add_argument("-v", "--verbose", **verbose)
    parser.set_defaults(function=None, prog="offsync")
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
        command.set_defaults(function=function, prog=command.prog)
        only_one = command.add_mutually_exclusive_group() if "--key" in arguments else command
        typed = argv is None or name.split(" ")[0] in argv
        for argument, words in arguments.items() if typed else ():
            place = only_one if argument in KEY_OPTIONS else command
            place.add_argument(*argument.split(), **words)
    return parser

def run_command(argv: Sequence[str]) -> int:
    """Carry out a command line; return the exit status. Raises OffsyncError."""
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        raise UsageError("locale: file names are not UTF-8 here; run it with PYTHONUTF8=1")
    args, unknown = build_parser(argv).parse_known_args(argv)
    if unknown:
        raise UsageError("unrecognized arguments: %s; see: `%s --help`",
                         show_text(" ".join(unknown)), args.prog)
    if args.verbose:
        VERBOSE.set()
    if args.version or args.contract:
        emit(version_text() if args.version else (__doc__ or "").strip())
        return 0
    if args.function is None:
        usage = "usage: offsync COMMAND ...   (offsync --help shows all)\n"
        emit(usage + next_step(Home()), error=True)
        return 2
    return int(args.function(args))

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; return the exit status. The only place that prints errors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:      # closed: its number would go to the next file
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # type: ignore[union-attr]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # ignored, it would hide how programs end
    if not os.environ.get("HOME"):          # empty, it would be /
        os.environ.pop("HOME", None)
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:      # nohup stays nohup
            signal.signal(signum, stop_all)
    status = 1
    try:
        status = run_command(sys.argv[1:] if argv is None else argv)
    except SystemExit:                      # --help
        status = 0
    except OffsyncError as error:
        emit("offsync: " + error.text, error=True)
        status = error.status
    except (OSError, MemoryError) as error:
        named = getattr(error, "filename", None)
        where = show(os.fsencode(named)) + ": " if isinstance(named, (str, bytes)) else ""
        why = getattr(error, "strerror", None) or str(error) or "not enough memory"
        if isinstance(error, FileNotFoundError) and not named:
            why = "the current directory is gone: change to another"
        emit("offsync: %s%s; mend that, then try again" % (where, why), error=True)
    except Interrupted as interrupted:
        name = signal.Signals(interrupted.signum).name
        emit("offsync: interrupted by %s; the same command again goes on" % name, error=True)
        status = interrupted.status
    if LOST_OUTPUT:
        emit("offsync: standard output: %s; the rest of it is lost" % LOST_OUTPUT[0], error=True)
        status = status or 1
    for signum in SIGNALS:                  # all is done, and said: a signal just ends it
        signal.signal(signum, lambda number, _: os._exit(128 + number))
    return status


# --- Appendix: what failures mean ---------------------------------------------------------------

class Kind(Steering):
    """How ssh, rrsync and rsync say that something is wrong, and what we say instead.

    Searched in this order, after Steering, in what they wrote on stderr: exit statuses say little
    (12 and 255 are interchangeable, and 0 proves nothing). They are but words: no decision on
    security rests here, and plain substrings take linear time, whatever a target writes.
    """

    # What only offsync finds
    OPEN = Failure(
        "", "the key is NOT restricted as the config says, so nothing is sent",
        "remove a line for it without command=\"...\" from authorized_keys there, or an "
        "IdentityFile with a shell from ~/.ssh/config here, then run there: `offsync link --path "
        "{path} --key '...'` with the key that 'offsync init' prints here")
    OTHER_PATH = Failure(
        "", "the key is for another path there, so nothing is sent",
        "if that is the right one, say so here: `offsync target add {add}`; else link the key "
        "there to the path that is meant; a second tree has a state of its own (OFFSYNC_HOME), "
        "with a key of its own")
    NOT_RRSYNC = Failure(
        "", "the forced command of the key there is not rrsync (it accepts any command and does "
        "nothing), so nothing was sent", "run there: `offsync link --path {path}`")
    SILENT = Failure(
        "", "it accepted the login, then did not answer in time, so nothing was sent",
        "make the shell start files of {user} there (.bashrc and the like) read and wait for "
        "nothing, then look at that host's disks")
    PRINTS = Failure(
        "is your shell clean|unexpected tag |protocol incompatibility",
        "the login prints text where rrsync must be alone, so nothing was sent",
        "make the shell start files of {user} there silent (.bashrc and the like; at its top: case "
        "$- in *i*) ;; *) return;; esac), take a ForceCommand for {user} out of its sshd_config, "
        "or link the key again: `offsync link --path {path}`")
    MUTE = Failure(
        "", "it does not tell where its key writes, so nothing was sent",
        "is its forced command rrsync, of the same release as rsync there?")
    SYMLINKS = Failure(
        "", "it takes no symlinks (--no-symlinks), and the source has some",
        "exclude them, or link it again, and add it here again, without that option")
    PROTECTED = Failure(
        "", "an exclude protects a directory of that name there, which an entry of the source "
        "would replace, with all that is in it",
        "rename the entry, or exclude it, too (without the final slash)")
    TWINS = Failure(
        "", "names that it may take for one: deleting the one could delete the other",
        "rename the one there, by way of a third name, to the one in the source; then plan again")
    SAME_NAME = Failure(
        "", "its file system takes these names for one, and the source has both or another of them",
        "rename one of them in the source, exclude it, or deliver to a file system that tells case "
        "and form apart")
    SOURCE_CHANGED = Failure(
        "", "the source changed after the plan, so what is there is not what was planned",
        "let nothing write to it meanwhile (deliver from a snapshot), then plan again")
    CHANGED_THERE = Failure(
        "", "not sent, since it was changed there after the plan", "plan and apply again")
    APPEARED = Failure(
        "", "nothing was deleted, since new entries appeared there after the plan", "plan again")
    DIFFERS = Failure(
        "", "verification found differences", "apply again, or look for what changes them there")
    NO_MODES = Failure(
        "", "verification found differences: content arrived, modes did not; its file system may "
        "keep none (exFAT, FAT, SMB), or a file there has another name (a hard link)",
        "mount it with the modes that the source has (fmask, dmask), give the source those modes, "
        "exclude what is named, or delete one name of a hard link there")
    ELSEWHERE = Failure(
        "", "it reports what was not asked for, or what rsync does not",
        "is its path the right one, and rsync there what it should be?")
    ROUTE = Failure(
        "", "the way to it failed before sshd there answered",
        "mend that way, and try it by itself with `ssh -v {login}`")
    NOT_REVIEWED = Failure(
        "", "it was not reviewed: the plan does not show it at this place, or it could not be "
        "compared then", "plan again, and review that")
    LOCAL = Failure("", "a failure on this side")
    # The way to it, and the login
    SSH_HERE = Failure(
        "Bad configuration option|bad configuration options|Bad SSH2 |Bad owner or permissions on|"
        "UNPROTECTED PRIVATE KEY|Load key&Permission denied|Load key&invalid format|"
        "Load key&error in libcrypto|No user exists for uid|unknown user |daemon() failed|"
        "[sender] fork|fork failed",
        "ssh on this controller cannot start; the target was not reached",
        "mend what it names: a line of ssh_config, the key, or a limit (ulimit -u); a user ID "
        "without an account here needs one (/etc/passwd), or run offsync as one that has")
    ALGORITHMS = Failure(
        "no matching host key type|no matching key exchange method|no matching cipher|"
        "no matching MAC", "sshd there and ssh here have no algorithm in common",
        "update the older of them, or allow here what is offered: in ~/.ssh/config "
        "HostKeyAlgorithms, KexAlgorithms, Ciphers or MACs, with a + before it; the first line "
        "that matches wins")
    NAME = Failure(
        "Could not resolve hostname|Name or service not known",
        "the name {host} does not resolve", "check the name and DNS")
    REFUSED = Failure(
        "Connection refused", "the connection was refused", "is sshd running there, on this port?")
    SECOND_FACTOR = Failure(
        "Permission denied (keyboard-interactive|Permission denied (password",
        "sshd there wants more than a key (AuthenticationMethods, two factors), or takes none",
        "allow publickey alone for {user} in its sshd_config (Match User {user})")
    KEY_REFUSED = Failure(
        "Permission denied (publickey|Permission denied (gssapi|Permission denied (hostbased|"
        "Too many authentication failures", "it refused our key",
        "run there, as {user}: `offsync link --path {path} --key '...'` with the key that 'offsync "
        "init' prints here (and --from, if its line has one, for this controller's address); if "
        "that changes nothing, sshd there refuses the account: AllowUsers, DenyUsers, AllowGroups, "
        "DenyGroups or PermitRootLogin in its sshd_config, a locked account (as root: usermod -p "
        "'*' {user}), an expired one, one without a login shell, or with a home that others may "
        "write to (StrictModes)")
    EXPIRED = Failure(
        "account has expired|Password change required|password has expired|"
        "must change your password", "the account {user} there, or its password, has expired",
        "run there as root: `chage -E -1 -d -1 -M -1 {user}`")
    CLOSED = Failure(
        "Connection closed by&port|Connection reset by&port",
        "sshd closed the connection while logging in",
        "has the account {user} expired, does PAM refuse it, or does sshd itself fail? Its log "
        "there tells")
    NOLOGIN = Failure(
        "account is currently not available|not allowed to login|This account is not available|"
        "restricted: cannot specify|: restricted",
        "the login's shell refuses commands (nologin, or a restricted one such as rbash)",
        "give {user} a real one there, as root: `chsh -s /bin/sh {user}`; or is it a ForceCommand "
        "in its sshd_config?")
    OTHER_SERVICE = Failure(
        "This service allows sftp connections only|fatal: Interactive git shell|"
        "fatal: unrecognized command|git-shell",
        "something other than rrsync is forced there (sftp only, or git-shell)",
        "take ForceCommand for {user} out of its sshd_config and restart sshd, or give {user} a "
        "real login shell: `chsh -s /bin/sh {user}`")
    # rrsync and rsync there
    NO_RRSYNC = Failure(
        "rrsync&not found|rrsync: No such file|rrsync: Permission denied|"
        "bash: line 1: /&: No such file|sh: 1: /&: not found|can't open file&rrsync|"
        "Can't open perl script|rrsync: cannot execute|Unknown command&rrsync|"
        "rrsync: inaccessible|rrsync&bad interpreter",
        "rrsync, or its interpreter, is not at {rrsync} there",
        "run there: `offsync install-deps --role target`, then: `offsync link --path {path}`")
    READ_ONLY_KEY = Failure(
        "sending to read-only server|read-only server is not allowed",
        "its key is for reading only (rrsync -ro)", "run there: `offsync link --path {path}`")
    NO_RSYNC = Failure(
        "No such file or directory: '&/rsync'|rsync: not found|rsync: command not found|"
        "/rsync&No such file|/rsync&not found|openrsync|rsync 2.6.9 compatible|: too large",
        "the real rsync is missing there (or openrsync answers instead)",
        "run there: `offsync install-deps --role target`")
    NO_DIRECTORY = Failure(
        "Restricted directory does not exist|FileNotFoundError&No such file or directory: '|"
        "NotADirectoryError|chdir&failed|Unable to chdir|Not a directory (20)",
        "{path} there, or something in it, is gone there or is no directory",
        "create it again, as root: `install -d -o {user} {path}`")
    OPTION = Failure(
        "has been disabled on this server|invalid rsync-command syntax|option is not supported|"
        "unknown option|unrecognized option|unrecognized arguments|is not rsync|"
        "Not invoked via sshd|does not run rsync", "its rrsync refused the command or an option",
        "update rsync there, so that rrsync and rsync are of the same release, 3.1.2 or newer")
    # Disks and files there
    READ_ONLY_DISK = Failure(
        "Read-only file system", "the file system is mounted read-only there", "remount it")
    NO_STAGING = Failure(
        "Unable to create partial-dir|opendir&.~tmp~|mkdir&.~tmp~|mkstemp&.~tmp~",
        "nothing could be collected in a directory .~tmp~ there, as rsync does",
        "is no inode left (df -i), or does a .~tmp~ there belong to another account (as root: find "
        "{path} -name .~tmp~)? Remove it, or free some inodes, then apply again")
    SPACE = Failure(
        "No space left on device|Disk quota exceeded|(code 11)",
        "the disk is full there, or a quota used up", "free some space, then apply again")
    SOURCE_UNREADABLE = Failure(
        "[sender]&Permission denied|[sender]&No such file or directory|"
        "send_files failed to open|file has vanished|link_stat&failed|readlink_stat",
        "the source changed while it was read", "plan again")
    IN_THE_WAY = Failure(
        "could not make way for|cannot delete non-empty directory|Device or resource busy",
        "a directory that holds excluded or new files, or a mount point, is in the way of a "
        "planned entry", "move or unmount it, or exclude it, then plan again")
    NOT_HELD = Failure(
        "symlink \"&Operation not permitted|symlink \"&not implemented|symlink \"&not supported|"
        "Invalid argument (22)|mkstemp&No such file or directory (2)",
        "its file system takes no symlinks, or not every name (a colon, say), as exFAT, FAT and "
        "SMB do not", "exclude what it names, or deliver to another file system")
    UNREADABLE_THERE = Failure(
        "opendir&Permission denied|IO error encountered",
        "{user} may not read everything below {path} there (a disk's lost+found is such a "
        "directory)", "exclude it, or mend owner and modes")
    PERMISSION = Failure(
        "Operation not permitted (1)|Permission denied (13)",
        "{user} may not change everything below {path} there",
        "mend owner and modes (as root: chown {user} {path}), or what is immutable or append-only "
        "(lsattr, chattr -ia), then apply again")
    TIMEOUT = Failure(
        "timed out|Timeout, server|not responding|io timeout after|No route to host|"
        "Network is unreachable|Host is down", "it did not answer in time, or cannot be reached",
        "check host and network")
    NO_ANSWER = Failure(
        "(0 bytes received so far)", "no rsync ever answered there, so nothing was sent",
        "is a ForceCommand for {user} in its sshd_config, the forced command of the key rrsync, "
        "the login shell a real one, and does PAM open a session? Do the shell start files of "
        "{user} (.bashrc and the like) exit, or exec another program?")
    LOST = Failure(
        "connection unexpectedly closed|unexpected EOF|unexpectedly close|Broken pipe|"
        "error in rsync protocol|onnection to&closed|error in socket IO|mux_client|client_loop",
        "the connection was lost", "apply again finishes the job")
    OTHER = Failure("", "it failed in a way that is not known",
                    "run: `ssh -v {login}` and look at sshd's log there")


FAILURES = [row for owner in (Steering, Kind) for row in vars(owner).values()
            if isinstance(row, Failure)]

def failure(target: Target, kind: Failure, facts: str = "",
            names: Iterable[bytes] = ()) -> TargetError:
    words = {"host": target.host, "user": shlex.quote(target.user), "rrsync": target.rrsync,
             "add": add_arguments(target), "path": shlex.quote(target.remote_path),
             "login": shlex.quote(target.login)}
    text = kind.why.format(**words) + (": " + facts if facts else "")
    if kind.remedy:
        text += "; " + compose(kind.remedy).format(**words)
    shown = some_paths(names)
    return TargetError(target.login, kind, text + (": " + shown if shown else ""))

def diagnose(target: Target, stderr: bytes) -> TargetError:
    """Return what a failed ssh or rsync meant: a sentence with its remedy, and its own words."""
    text = stderr[:4096] + b"\n" + stderr[4096:][-4096:]
    lines = text.splitlines()
    kind = next((row for row in FAILURES for parts in row.words
                 if all(part in text for part in parts)         # most end here: it costs nothing
                 and any(all(part in line for part in parts) for line in lines)), Kind.OTHER)
    why = failure(target, kind).why
    if kind is not Kind.ENDED:              # those words are ours
        why += " (it said: %s)" % (quote_answer(stderr) or "nothing")
    return TargetError(target.login, kind, why)


if __name__ == "__main__":
    os._exit(main())                        # all is flushed; taking Python apart takes 10 ms
