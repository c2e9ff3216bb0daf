#!/usr/bin/env python3
"""Push one directory to many targets with rsync over SSH, using a key that can
only write below one path. Every run is explicit: plan -> apply -> verify.

roles
  controller  owns the source directory and the private key;
              runs init, target, plan, apply, verify, log, doctor
  target      receives files; runs link once (and unlink to revoke);
              afterwards only sshd, rrsync and rsync run on it
  either      install-deps, manifest, completion

reads   the source directory; $OFFSYNC_HOME (default ~/.offsync); the files that
        you name; through ssh: ~/.ssh/config, for routing and algorithms, and the
        known_hosts files of the user and the system; link and unlink:
        ~/.ssh/authorized_keys; link: the accounts of this host, and the public
        halves of the system's host keys
writes  on the controller: $OFFSYNC_HOME;
        on the target: one line of ~/.ssh/authorized_keys; the --path directory,
        and those above it and ~/.ssh, where they are absent; and, through
        rsync, what a plan lists below that path;
        on both: temporary files below $TMPDIR, /tmp or /var/tmp that are removed
        at the end
runs    ssh, ssh-keygen and rsync, always as argument lists, never through a
        shell; -v shows each before it starts, except the ssh that ends a connection;
        link also runs sshd -T, and tries rrsync in a scratch directory as sshd
        would start it (sh -c); install-deps, and init, link and target add
        where a program is missing, run the package manager, after showing the
        commands and asking (install-deps -y does not ask)
never   deletes without "delete: true" or --delete, overwrites where the config
        says "overwrite: false", forwards an agent, forwards a port (doctor and
        target add try to, to prove that the key cannot), trusts a host key that
        neither you nor these known_hosts files confirm, sends a file before the
        restriction of the key is proved, calls a delivery ok that is not what
        was planned
exit    0 done; 1 failed, refused or some target failed; 2 wrong usage or
        config; 3 differences found; 129, 130, 143 ended by a signal

To audit it, read the trust core first: lines 354 to 3444, in the order in
which data flows. What follows serves it: files and programs, the state
directory, link, host keys, packages, the config, output, commands.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # the script's or the current directory, where somebody
    # else may have put a json.py
if sys.version_info < (3, 9):
    sys.exit(
        "offsync: error: Python %d.%d is too old; run offsync with Python 3.9 or newer"
        % sys.version_info[:2]
    )

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes over: no traceback

import argparse
import base64
import collections
import contextlib
import enum
import errno
import fcntl
import fnmatch
import functools
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
from typing import IO, Any, BinaryIO, Callable, NamedTuple, NoReturn, TypeVar, Union
from collections.abc import Iterable, Iterator, Sequence

VERSION = "3.0.0"

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


# --- Errors and values --------------------------------------------------------------------------

# A way out of trouble: what to do, and the command that does it, if one does.
Hint = Union[str, tuple[str, str]]


class OffsyncError(Exception):
    """Expected trouble. main() prints it, and exits with status.

    message: one sentence, what and why; it alone goes into the log and into JSON. hints: the ways
    out. said: what another program said of it.
    """

    status = 1

    def __init__(self, message: str, *hints: Hint, said: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hints = hints
        self.said = said


class UsageError(OffsyncError, argparse.ArgumentTypeError):
    """Wrong arguments, environment or config. argparse puts the option before the message."""

    status = 2


class Failure(NamedTuple):
    """A kind of failure of a target: one row of the table of failures.

    patterns: each is a list of texts; a line of stderr that holds all texts of one pattern shows
    this kind. Without patterns, only offsync itself detects it. why and hints: what we say.
    retry: another attempt may help.
    """

    patterns: list[list[bytes]]
    why: str
    hints: list[tuple[str, str]]
    retry: bool


class TargetError(OffsyncError):
    """One target failed. kind: the name of a Failure; why: the message without the login."""

    def __init__(
        self, login: str, kind: str, why: str, *hints: Hint, said: str = "", retry: bool = False
    ) -> None:
        super().__init__(f"{login}: {why}", *hints, said=said)
        self.kind = kind
        self.why = why
        self.retry = retry


def as_offsync_error(problem: BaseException) -> OffsyncError:
    """Return an error that has a message and hints, whatever was raised."""
    if isinstance(problem, OffsyncError):
        return problem
    # A MemoryError has no text. A FileNotFoundError without a file name is that of os.getcwd().
    why = getattr(problem, "strerror", None) or str(problem) or "not enough memory"
    name = getattr(problem, "filename", None)
    if name:
        why = f"{quote_name(os.fsencode(name))}: {why}"
    elif isinstance(problem, FileNotFoundError):
        why = "the current directory is gone"
    return OffsyncError(why, "fix this, then try again")


class Cancelled(OffsyncError):
    """Work that ends because a signal asked offsync to stop, or because the run is over."""


class EndlessOutput(OffsyncError):
    """A program printed more than it may."""


class Interrupted(BaseException):
    """What the signal handler raises in the main thread: nothing on the way to main swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.status = 128 + signum


DEFAULT_RRSYNC = "/usr/bin/rrsync"
# added: not on the target; modified: it differs; missing: not in the source, only on the target;
# leftover: only on the target, under a temporary name of rsync's.
CHANGE_KINDS = ("added", "modified", "missing", "leftover")
LISTED = 5  # names in a message: the first ones, then a count
NAME_SHOWN = 200  # characters of a name in a message


class Target(NamedTuple):
    """Where to push: one entry of "targets" in config.yaml. port None leaves it to ssh_config."""

    login: str
    remote_path: str
    rrsync: str = DEFAULT_RRSYNC
    port: int | None = None
    symlinks: bool = True  # False: its rrsync munges them, so none are sent

    @property
    def user(self) -> str:
        return self.login.rpartition("@")[0]

    @property
    def host(self) -> str:
        """An IPv6 address has no brackets here."""
        return self.login.rpartition("@")[2].strip("[]")

    @property
    def where(self) -> str:
        return f"{self.login}:{quote_name(os.fsencode(self.remote_path))}"


class Deletion(enum.Enum):
    """What is done with entries that exist only on a target: "delete" of config.yaml.

    All members are true in a condition, REFUSE as well: compare with "is".
    """

    REFUSE = False  # an apply is refused where there are any
    ALLOW = True
    KEEP = "keep"  # they are left alone


class Config(NamedTuple):
    """config.yaml, validated."""

    source: str
    delete: Deletion
    overwrite: bool
    verify: str  # by what plan compares: "hash", "strong" (MD5) or "quick" (size and time)
    exclude: tuple[str, ...]
    jobs: int
    bwlimit: int  # KiB/s for each target; 0 means none
    compress: bool
    timeout: int  # seconds without a byte
    max_delete: int  # percent by which a target may shrink without a review
    targets: tuple[Target, ...]


class PublicKey(NamedTuple):
    """A public key; its identity is (type, blob)."""

    type: str
    blob: str
    comment: str


class Entry(NamedTuple):
    """What a plan says of one entry of the source."""

    type: str  # "directory", "file" or "symlink"
    mode: int
    size: int  # in bytes
    sha256: bytes = b""  # of a file
    md5: bytes = b""  # of a file that will be sent
    link: bytes = b""  # where a symlink points


class Change(NamedTuple):
    """One difference between source and target: one line of a plan."""

    path: bytes
    kind: str  # one of CHANGE_KINDS, or "kept": only on the target, and left alone
    # Whether it is a directory. Of what exists only on the target, rsync tells no more of its type.
    directory: bool
    reasons: tuple[str, ...] = ()  # of modified: "content", "mode", "type", "link"
    entry: Entry | None = None  # of added and modified; None until the source entry is hashed

    @property
    def is_symlink(self) -> bool:
        return self.entry is not None and self.entry.type == "symlink"

    @property
    def sends_content(self) -> bool:
        if self.entry is None or self.entry.type != "file":
            return False
        return self.kind == "added" or "content" in self.reasons or "type" in self.reasons


class Record(NamedTuple):
    """What became of one target in one run: for the log, the status, --json and the messages.

    None means unknown, never "nothing".
    """

    timestamp: str  # when the run began, UTC
    operator: str
    host: str
    login: str
    source: str
    operation: str = "apply"
    plan: str | None = None  # the plan's ID, the reviewed one's with --plan
    result: str = "started"  # then "ok", "failed", "interrupted" or "refused"
    error: str | None = None
    files_changed: list[str] | None = None
    files_deleted: list[str] | None = None
    bytes_sent: int | None = None
    seconds: float | None = None


def offsync_command(*words: str) -> str:
    """Return a command for this controller, with the state that this run uses."""
    home = os.environ.get("OFFSYNC_HOME")
    return (f"OFFSYNC_HOME={shlex.quote(home)} " if home else "") + shlex.join(["offsync", *words])


def typed_again(*more: str, user: str = "", state: str = "") -> str:
    """Return the command line as it was typed, with more options, or as another account.

    state: the OFFSYNC_HOME of that command. It is named unless it is that account's default, since
    sudo -i drops our environment.
    """
    typed = shlex.join(["offsync", *sys.argv[1:], *more])
    if not user:
        return offsync_command(*sys.argv[1:], *more)
    if state and os.path.realpath(state) != os.path.realpath(
        os.path.expanduser(f"~{user}/.offsync")
    ):
        typed = f"env OFFSYNC_HOME={shlex.quote(state)} {typed}"
    return f"sudo -iu {shlex.quote(user)} {typed}"


class Typed(NamedTuple):
    """What was typed, for the hints: a command in a hint is this one with one thing changed."""

    command: str
    configured: Config  # what the file says
    targets: Sequence[str] = ()
    excepted: Sequence[str] = ()
    source: str | None = None
    deletion: Deletion | None = None  # ALLOW or KEEP, where an option said so
    plan: str | None = None

    def again(self, **changed: Any) -> str:
        """Return the command line with some of these fields changed."""
        typed = self._replace(**changed)
        words = [*typed.command.split(), *typed.targets]
        for pattern in typed.excepted:
            words += ["--except", pattern]
        if typed.source is not None:
            words += ["--source", typed.source]
        if typed.deletion is not None:
            words.append("--keep" if typed.deletion is Deletion.KEEP else "--delete")
        if typed.plan is not None:
            words += ["--plan", typed.plan]
        return offsync_command(*words)


class Result(NamedTuple):
    """How a program ended. status is negative for a signal, None when its deadline passed."""

    status: int | None
    stdout: bytes
    stderr: bytes


# === Trust core: running programs ===============================================================


class SignalFlag:
    """A flag that a signal handler can set.

    threading.Event takes a lock that the interrupted code may already hold, so setting one in the
    handler could hang.
    """

    def __init__(self) -> None:
        self.value = False

    def is_set(self) -> bool:
        return self.value

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.value and time.monotonic() < end:
            # A signal is noticed this late at most.
            time.sleep(0.05)


# Set when a signal arrives or the run is over: no program is started, and waits end at once.
STOPPING = SignalFlag()
# The programs that end with the run.
LIVE_PROCESSES: set[subprocess.Popen[bytes]] = set()
VERBOSE = SignalFlag()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOREVER = threading.TIMEOUT_MAX  # seconds
CONNECT_DEADLINE = 60.0  # seconds for a connection
SESSION_DEADLINE = 45.0  # seconds for a session that hashes nothing
STDERR_KEPT = 1 << 14  # bytes
OUTPUT_LIMIT = 1 << 22  # bytes that a program may print, except rsync
MAX_LINE = 1 << 16  # bytes; a path has at most 4096, and rsync writes up to 5 for each
LINE_COST = 150  # bytes of memory that a line takes beside its text
# Seconds in which we go on reading, at most, once our rsync has ended. After an error the target's
# rsync sleeps for 0.1 s (cleanup.c) before it releases rrsync's lock; our ssh ends only then. It
# writes to the same pipe as our rsync (stderr): the end of that pipe shows that the lock is free.
SESSION_END = 0.5
# Bytes a second that a program may print beyond its room: rsync shows a line of progress a second.
PROGRESS_RATE = 1000
Argv = Sequence[Union[str, bytes]]


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a program and what it started, if it has a session of its own (run_program()).

    A gentler signal would gain nothing: no program of ours keeps a state on this controller, and
    the target's rsync sees its connection end, and keeps what has arrived for the next run.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def end_now(signum: int, _: object) -> NoReturn:
    """Handle a second signal, or one after the end: exit at once. The reaper, a process that
    outlives us (start_reaper), cleans up.
    """
    os._exit(128 + signum)


def handle_signals(handler: Callable[[int, Any], NoReturn]) -> None:
    for signum in SIGNALS:
        # What is ignored stays ignored (nohup).
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def handle_signal(signum: int, _: object) -> NoReturn:
    """Handle the first signal: RunContext.__exit__ ends what has begun, and main() tells of it."""
    handle_signals(end_now)
    STOPPING.value = True
    raise Interrupted(signum)


def child_environment(for_rsync: bool = False, force_md5: bool = False) -> dict[str, str]:
    """Return the environment of a program: ours, with messages in English.

    rsync gets no HOME, since it would take options and programs to run from ~/.popt (popt(3)), and
    no RSYNC_* (rsync(1), ENVIRONMENT VARIABLES). force_md5 makes it compare by MD5, not xxh128:
    nobody can construct a second file with a given MD5; for xxh128 it is easy.
    """
    ours = {key: value for key, value in os.environ.items() if not key.startswith("RSYNC_")}
    # BatchMode does not reach the ssh that ProxyJump starts: it would open a password dialog.
    ours.update(LC_ALL="C", SSH_ASKPASS_REQUIRE="never")
    if for_rsync:
        ours.pop("HOME", None)
    if force_md5:
        ours["RSYNC_CHECKSUM_LIST"] = "md5"
    return ours


def run_program(
    argv: Argv,
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stderr: BinaryIO | None = None,
    attach_terminal: bool = False,
    env: dict[str, str] | None = None,
    limit: float = FOREVER,
    silence: float = 0,
    room: int = OUTPUT_LIMIT,
    on_line: Callable[[bytes], None] | None = None,
) -> Result:
    """Run a program and return how it ended. Every program but those of clean_up() starts here.

    No shell is used. stdin: with PIPE, a pipe into which nothing is written, and which stays open.
    stderr: an open file instead of a pipe. stdout is returned, or given to on_line line by line
    (\\r ends a line, too). limit: seconds for the whole run. If silence is given, limit holds until
    the first output on stdout; from then on, stdout may be silent for that many seconds (silence).
    room: bytes that it may print.
    attach_terminal: a package manager: it writes to our stderr, and no signal of ours ends it.
    The working directory is /, since ours may be gone.
    Raises Cancelled where the run is over, EndlessOutput, and OffsyncError if it cannot be started.
    """
    if VERBOSE.is_set():
        emit("+ " + shlex.join(os.fsdecode(word) for word in argv), error=True)
    if STOPPING.is_set():
        raise Cancelled("interrupted")
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=2 if attach_terminal else pipe,
            stderr=2 if attach_terminal else stderr or pipe,
            env=env or child_environment(),
            start_new_session=not attach_terminal,
            cwd="/",
        )
    except OSError as error:
        raise OffsyncError(
            f"{quote_name(os.fsencode(argv[0]))}: cannot be started: {error.strerror}",
            "check the program, the interpreter in its first line, and the limits (ulimit -a)",
        ) from None
    output = Output(on_line, room, stderr)
    try:
        if not attach_terminal:
            LIVE_PROCESSES.add(process)
            # The run may have ended before the program was added.
            if STOPPING.is_set():
                kill_group(process)
        late = output.read(process, limit, silence)
    except BaseException:
        kill_group(process)
        raise
    finally:
        status = process.wait()
        LIVE_PROCESSES.discard(process)
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            stream.close()
    if STOPPING.is_set():
        raise Cancelled("interrupted")
    result = Result(None if late else status, bytes(output.stdout), output.stderr)
    if cannot_start(argv[0], result):
        raise OffsyncError(
            f"{quote_name(os.fsencode(argv[0]))}: this program cannot start on this host",
            "install it again, or what it names",
            said=quote_output(result.stderr),
        )
    return result


def cannot_start(program: str | bytes, result: Result) -> bool:
    """Return whether a local program failed before it began, by the dynamic loader's message.

    Our ssh and rsync also pass on what a target's program prints. So the message must name the
    local program, and if our rsync adds an error of its own, then our rsync did start.
    """
    loader = (
        b"error while loading shared libraries|Error loading shared library|Error relocating"
        b"|Library not loaded|symbol lookup error|version `.*' not found"
    )
    first = result.stderr.split(b"\n")[0]
    named = os.path.basename(os.fsencode(program))
    if not result.status or b"rsync error: " in result.stderr:
        return False
    if first.startswith(b"OpenSSL version mismatch"):
        return True
    by_name = rb"^\S*\b%s: |needed by \S*\b%s\)" % (re.escape(named), re.escape(named))
    return bool(re.search(loader, first) and re.search(by_name, result.stderr, re.MULTILINE))


class Output:
    """Takes a program's output as it comes, and keeps little of it, whatever a target sends."""

    def __init__(
        self,
        on_line: Callable[[bytes], None] | None,
        room: int = OUTPUT_LIMIT,
        stderr_file: BinaryIO | None = None,
    ) -> None:
        self.on_line = on_line
        self.room = room
        self.started = time.monotonic()
        self.stderr_file = stderr_file
        self.stdout = bytearray()  # where there is no on_line
        self.partial_line = b""  # a line of stdout that has no end yet
        self.stderr = b""  # the end of it

    def feed(self, chunk: bytes) -> None:
        """Take output on stdout: give each whole line to on_line, or keep the chunk."""
        self.use_room(len(chunk))
        if not self.on_line:
            self.stdout += chunk
            return
        # A name holds no raw \r or \n: rsync escapes them.
        *lines, self.partial_line = (self.partial_line + chunk).replace(b"\r", b"\n").split(b"\n")
        self.use_room(LINE_COST * len(lines))
        for line in lines:
            self.on_line(line)
        if len(self.partial_line) > MAX_LINE:
            self.overflow()

    def feed_stderr(self, chunk: bytes) -> None:
        self.use_room(len(chunk))
        self.stderr = (self.stderr + chunk)[-STDERR_KEPT:]

    def use_room(self, size: int) -> None:
        self.room -= size
        if self.room + PROGRESS_RATE * (time.monotonic() - self.started) < 0:
            self.overflow()

    def overflow(self) -> NoReturn:
        raise EndlessOutput("a program printed more than offsync reads, and was stopped")

    def read(self, process: subprocess.Popen[bytes], limit: float, silence: float = 0) -> bool:
        """Read what a program prints until it ends; return whether it was ended for being late.

        limit and silence are those of run_program(). The end is that of the program, not of its
        pipes, which an ssh in the background may hold open. rsync's pipes get SESSION_END more.
        """
        heard = time.monotonic()
        over = 0.0
        late = False
        # Only rsync runs with on_line.
        patience = SESSION_END if self.on_line else 0
        with selectors.DefaultSelector() as selector:
            for stream in filter(None, (process.stdout, process.stderr)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                # Asked before reading: if it has ended, all that it wrote is in the pipes.
                ended = process.poll() is not None
                if ended and not over:
                    over = time.monotonic()
                ready = selector.select(0.1)
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 18)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stderr:
                        self.feed_stderr(chunk)
                    else:
                        self.feed(chunk)
                        # From the first output on, only silence counts.
                        if silence:
                            heard = time.monotonic()
                            limit = silence
                if self.stderr_file and os.fstat(self.stderr_file.fileno()).st_size > self.room:
                    self.overflow()
                PROGRESS.tick()
                now = time.monotonic()
                if ended and not ready and now - over >= patience:
                    break
                if not late and not ended and now - heard > limit:
                    late = True
                    kill_group(process)
        if self.partial_line and self.on_line:
            self.on_line(self.partial_line)
        try:
            process.wait(max(heard + limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:  # it closed its pipes, and goes on
            late = True
            kill_group(process)
        if self.stderr_file:
            end = os.lseek(self.stderr_file.fileno(), 0, os.SEEK_END)
            self.stderr = os.pread(
                self.stderr_file.fileno(), STDERR_KEPT, max(end - STDERR_KEPT, 0)
            )
        return late


def retry_attempts() -> Iterator[bool]:
    """Yield once for each attempt, True for the last one; wait between the attempts.

    All retries use this. They are for connections that sshd drops (MaxStartups), for rrsync's lock,
    and for sessions beyond MaxSessions. The delays add up to 24 s, more than the penalty of sshd
    9.8 for two failed logins (PerSourcePenalties: 16 s).
    """
    for delay in (0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0):
        yield False
        STOPPING.wait(delay)
    yield True


class ThreadPool:
    """Threads that carry out functions; the only helper for that."""

    def __init__(self, threads: int) -> None:
        # Imported on first use, since it is slow to import.
        from concurrent import futures

        self.futures = futures
        self.executor = futures.ThreadPoolExecutor(max_workers=threads)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the future of a function. Raises OffsyncError where no thread can be started."""
        try:
            return self.executor.submit(function, *arguments)
        except RuntimeError:
            raise OffsyncError(
                "cannot start a thread", "raise the limit (ulimit -u), or use --jobs 1"
            ) from None

    def imap_unordered(
        self, function: Callable[[_Item], _Value], items: Sequence[_Item]
    ) -> Iterator[tuple[_Item, _Value]]:
        """Begin function(item) for all items; return an iterator over (item, value) as they end."""
        begun = {self.submit(function, item): item for item in items}

        def ended() -> Iterator[tuple[_Item, _Value]]:
            for number, future in enumerate(self.futures.as_completed(begun), 1):
                if len(items) > 1:
                    PROGRESS.update("(all)", "%d of %d done" % (number, len(items)))
                yield begun[future], future.result()
            PROGRESS.update("(all)", None)

        return ended()

    def close(self) -> None:
        """Cancel what has not begun (the interpreter would carry it out), and wait for the rest."""
        self.executor.shutdown(cancel_futures=True)


# --- Trust core: names ----------------------------------------------------------------------------

# Characters that str.isprintable() accepts, but that are invisible.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U0001d159\U000e0100-\U000e01ef]"
)
C_ESCAPES = {7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 34: '"', 92: "\\"}
# Quotes and backslashes mark a quoted name. The others are blanks at an end, what looks like the
# gap between columns, and the arrow before the target of a symlink.
MISLEADING = re.compile(r'["\\]|^ | $| {3}| -> ')


def quote_name(name: bytes, quoted: bool = False) -> str:
    """Return a name for people and logs: as it is, or quoted as git does where it could mislead.

    An unquoted result holds no double quote and no backslash; nothing in a result moves a cursor.
    quoted: quote it in any case, since a similar name stands beside it.
    """
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    clear = text.isprintable() and not MISLEADING.search(text) and not INVISIBLE.search(text)
    if text and clear and not quoted and not unicodedata.combining(text[0]):
        return text
    letters = (
        "\\" + C_ESCAPES[byte]
        if byte in C_ESCAPES
        else chr(byte)
        if 32 <= byte < 127
        else f"\\{byte:03o}"
        for byte in name
    )
    return '"' + "".join(letters) + '"'


def quote_text(text: str) -> str:
    return truncate(quote_name(os.fsencode(text)))


def quote_path(path: bytes) -> str:
    return truncate(quote_name(path))


def truncate(text: str) -> str:
    return text if len(text) <= NAME_SHOWN else text[:NAME_SHOWN] + "..."


def casefold_nfc(path: bytes) -> str:
    """Return a key that is equal for paths that some file system takes for the same.

    Such file systems ignore case, Unicode form, or final dots and blanks of a name.
    """
    text = unicodedata.normalize("NFC", path.decode("utf-8", "surrogateescape"))
    folded = unicodedata.normalize("NFC", text.casefold())
    return "/".join(name.rstrip(". ") for name in folded.split("/"))


def above(path: bytes) -> Iterator[bytes]:
    """Yield the directories above a path, the nearest one first."""
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        yield path


def nfc_lookalikes(paths: Iterable[bytes]) -> set[bytes]:
    """Return the paths that differ from another of them in Unicode normalisation only."""
    names = list(paths)
    if all(map(bytes.isascii, names)):
        return set()
    seen: dict[str, set[bytes]] = {}
    for path in names:
        text = unicodedata.normalize("NFC", path.decode("utf-8", "surrogateescape"))
        seen.setdefault(text, set()).add(path)
    return set().union(*(group for group in seen.values() if len(group) > 1))


def name_to_json(name: bytes, key: str = "path") -> dict[str, str]:
    """Return the JSON fields of a name: "path", and "path_b64" where it is not UTF-8."""
    try:
        return {key: name.decode("utf-8")}
    except UnicodeDecodeError:
        encoded = base64.b64encode(name).decode()
        return {key: name.decode("utf-8", "replace"), key + "_b64": encoded}


def name_from_json(fields: dict[str, Any], key: str = "path") -> bytes:
    """Return the name that name_to_json() wrote.

    Raises ValueError, KeyError, TypeError or AttributeError where there is none.
    """
    if key + "_b64" in fields:
        return base64.b64decode(fields[key + "_b64"], validate=True)
    return bytes(fields[key].encode("utf-8"))


def check_relative(path: bytes) -> bytes:
    """Return the path if it stays below the directory that it is relative to; else ValueError."""
    if b"\0" in path or not {b"..", b".", b""}.isdisjoint(path.split(b"/")):
        raise ValueError("a name that leaves the directory: " + quote_name(path[:100]))
    return path


def escapes_source(path: bytes, link: bytes) -> bool:
    """Return whether a symlink, as it is written, leads out of the source."""
    led = os.path.normpath(os.path.join(os.path.dirname(path), link))
    return led.startswith((b"/", b"../")) or led == b".."


def files_from_entry(path: bytes) -> bytes:
    """Return a path as --files-from takes it: "/" keeps a leading # or ; from being a comment.

    rsync takes "/path" as relative to the source. ("./path" would also send the source's root.)
    """
    return b"/" + path


def exact_filter_pattern(path: bytes) -> bytes:
    """Return the anchored rsync pattern that matches only this path (rsync(1), PATTERN MATCHING).

    A backslash escapes only in a pattern that has a wildcard character; else it is a plain byte.
    """
    if re.search(rb"[*?\[]", path):
        path = re.sub(rb"([*?\[\\])", rb"\\\1", path)
    return b"/" + path


def unescape_rsync_name(name: bytes) -> bytes:
    r"""Return the exact bytes of a name that rsync printed: it writes control bytes as \#ooo."""
    # & 255: a target may print \#777, which is no byte.
    return re.sub(rb"\\#([0-7]{3})", lambda match: bytes([int(match[1], 8) & 255]), name)


def replace_unprintable(text: str) -> str:
    """Return a text in which nothing moves a cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def quote_output(output: bytes) -> str:
    """Return the last four lines that a program printed, joined, in at most 300 characters."""
    lines = [line.strip() for line in output[-4096:].decode("utf-8", "replace").splitlines()]
    # Python underlines errors with lines such as "^^^~~".
    kept = [line for line in lines if line.strip("^~ \t")]
    text = replace_unprintable(" | ".join(kept[-4:]))
    return text if len(text) <= 300 else "..." + text[-297:]


def join_first(names: Sequence[str], separator: str = ", ") -> str:
    more = len(names) - LISTED
    return separator.join([*names[:LISTED], *(["and %d more" % more] if more > 0 else [])])


def quote_first(paths: Iterable[bytes]) -> str:
    names = sorted(paths)
    similar = nfc_lookalikes(names)
    return join_first([truncate(quote_name(name, name in similar)) for name in names])


def quote_rsh_word(word: str) -> str:
    """Return a word for rsync's -e: rsync splits it at blanks; in '...', a doubled ' is one '."""
    plain = re.fullmatch(r"[A-Za-z0-9_./=@:,~-]+", word)
    return word if plain else "'" + word.replace("'", "''") + "'"


# --- Trust core: failures -------------------------------------------------------------------------


# How ssh, rrsync and rsync say that something is wrong, and what we say instead. The first row that
# matches what they wrote on stderr counts: exit statuses say little (12 and 255 are
# interchangeable, and 0 proves nothing). Rows only choose a sentence, and what is worth another
# attempt: no proof rests on them.
#
# A row begins with its name, which is also its word in "plan --json". "if" is a text in one line of
# stderr, or several that stand in one line, joined by "&". They are plain texts, which take linear
# time, whatever a target writes; a first letter that may be a capital is left out. Rows without
# "if" are what only offsync finds. A command follows its hint after "$".
FAILURE_TABLE = """
# Host keys, and what is tried again

revoked
  if: REVOKED HOST KEY
  if: is marked as revoked
  if: revoked by file
  why: the target's host key is revoked (@revoked in known_hosts, or RevokedHostKeys of ssh)
  hint: make a new host key on the target

host-key-expired
  if: Certificate invalid: expired
  if: ertificate has expired
  why: the target's host certificate has expired
  hint: have it signed again by its CA

host-key-changed
  if: REMOTE HOST IDENTIFICATION HAS CHANGED
  why: the target's host key has CHANGED: the host was installed again, or someone is
    impersonating it
  hint: on the target's own console, run:
    $ ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub
  hint: only if its fingerprint is the one shown now, accept it, after comparing once more:
    $ {add}
  hint: if two machines answer to this name in turn, put the keys of both into
    ~/.ssh/known_hosts

host-key-unknown
  if: host key is known for
  if: Host key verification failed
  why: the target's host key is not trusted yet
  hint: compare it, and accept it:
    $ {add}

locked (retry)
  if: Another instance of rrsync is already accessing
  why: another rsync session holds the lock on {path}
  hint: try again when it has ended
  hint: a lost connection can hold it until "timeout" of the config has passed; on the target,
    see which rsync works below this path, and only if you are sure end that one with kill:
    $ pgrep -u {user} -fa rsync

session-refused (retry)
  if: ession open refused
  if: session request failed
  if: open failed: connect failed
  why: the target's sshd allows no more sessions on one connection
  hint: raise MaxSessions in its sshd_config

# The text is the name of the ProxyCommand in SSH_SESSION.

closed-after-login
  if: offsync-connection-ended
  why: the target's sshd accepted the login, then closed the connection
  hint: try again; if it persists, see sshd's log on the target

busy-sshd (retry)
  if: kex_exchange_identification
  if: ssh_exchange_identification
  if: Not allowed at this time
  why: the target closed the connection before login: too many connections (MaxStartups), a
    penalty for failed logins (PerSourcePenalties), or this address is blocked
  hint: check the port: what answers on it may not be sshd
  hint: wait a minute, then try again
  hint: see sshd's log on the target

# What only offsync finds

not-restricted
  why: the key is NOT restricted on the target, so nothing was sent
  hint: on the target, as {user}, remove every line of ~/.ssh/authorized_keys that has the key,
    then link it:
    $ {link}
  hint: on this controller, look for an IdentityFile in ~/.ssh/config that opens a shell

no-key-asked
  why: the target's sshd lets anybody log in as {user} without a key, so nothing was sent
  hint: set PermitEmptyPasswords no in its sshd_config, or give the account a password
  hint: check the port: an ssh server of another kind, such as that of a VPN, may answer there

other-path
  why: the key is restricted to a different path, so nothing was sent
  hint: if that path is right, add the target with it:
    $ {add}
  hint: otherwise run offsync link on the target, with the path that is meant
  hint: to deliver a second tree, use a second OFFSYNC_HOME, with its own key

not-rrsync
  why: what the target runs for this key is not rrsync: it accepts any command and does nothing;
    nothing was sent
  hint: on the target, as {user}, remove the line of this key from ~/.ssh/authorized_keys, then
    link the key:
    $ {link}
  hint: or look for a ForceCommand for {user} in its sshd_config: it wins over the key's

no-response
  why: the target accepted the login but did not answer in time, or rsync printed nothing for
    longer than "timeout" of the config
  hint: check that the shell start files of {user} (.bashrc and the like) wait for nothing
  hint: check the target's disks; raise the timeout where they are only slow

stalled
  why: the target answered at first, then fell silent: the connection was lost, or a disk hangs
  hint: apply again to finish

shell-output
  if: is your shell clean
  if: unexpected tag
  if: protocol incompatibility
  why: the login prints text, which breaks the rsync protocol, so nothing was sent
  hint: on the target, let the shell start files of {user} (.bashrc and the like) print nothing;
    at their top: case $- in *i*) ;; *) return;; esac
  hint: look at /etc/ssh/sshrc, and for a ForceCommand for {user} in its sshd_config
  hint: if the text is the forced command's own, remove the line of this key, then link the key:
    $ {link}

path-unknown
  why: cannot determine where the key writes, so nothing was sent
  hint: check that the forced command is rrsync, of the same release as the target's rsync

symlinks
  why: the target was added with --no-symlinks, and the source contains symlinks
  hint: exclude them
  hint: or link the key again, and add the target again, without --no-symlinks

protected
  why: an exclude protects a directory of this name on the target, so an entry of another type
    cannot replace it
  hint: rename the entry, or exclude it, too (without the final slash)

source-changed
  why: the source changed after it was planned, so the target does not match the plan
  hint: deliver from a snapshot, or stop what writes to the source; then plan again

changed-meanwhile
  why: rsync did not send an entry that changed on the target after the plan
  hint: plan and apply again

appeared
  why: nothing was deleted, since new entries appeared on the target after the plan
  hint: plan again

differs
  why: verification found differences
  hint: apply again; if they return, something on the target modifies these files

name-collision
  why: the target's file system may take these names for one file (it ignores case, or Unicode
    form)
  hint: rename one of them in the source, exclude it, or deliver to another file system

modes-not-kept
  why: verification found differences: content arrived, modes did not
  hint: the file system may keep none (exFAT, FAT, SMB): mount it with the modes of the source
    (fmask, dmask), give the source those modes, or exclude what is named
  hint: or a file has a second hard link on the target: delete one of the two

unexpected-report
  why: the target's rsync reported what was not asked for
  hint: check the configured path, and the rsync installed on the target
  hint: if there are very many entries that the source lacks, plan fewer targets at once

proxy-failed
  why: the jump host or ProxyCommand failed before the target's sshd answered
  hint: test the way there by itself:
    $ {ssh}

not-reviewed
  why: this target is not covered by the reviewed plan: it is not listed with this address and
    path, or could not be compared then
  hint: plan again, and have that reviewed

local-error
  why: a failure on this controller

# The way to the target, and the login

ssh-client-error
  if: Bad configuration option
  if: bad configuration options
  if: Bad SSH2
  if: Bad owner or permissions on
  if: UNPROTECTED PRIVATE KEY
  if: Load key&Permission denied
  if: Load key&invalid format
  if: Load key&error in libcrypto
  if: No user exists for uid
  if: unknown user
  if: daemon() failed
  if: [sender] fork
  if: fork failed
  why: ssh on this controller cannot start; the target was not reached
  hint: fix what it names: a line of ssh_config, the key, or a limit (ulimit -u)
  hint: a user ID without an account needs one (/etc/passwd), or run offsync as an account

algorithms
  if: no matching host key type
  if: no matching key exchange method
  if: no matching cipher
  if: no matching MAC
  why: the target's sshd and this controller's ssh have no algorithm in common
  hint: update the older of them
  hint: or allow what the target offers: in ~/.ssh/config HostKeyAlgorithms, KexAlgorithms,
    Ciphers or MACs, with a + before it; the first line that matches wins

unresolved-host
  if: Could not resolve host
  if: Name or service not known
  why: the name {host} does not resolve
  hint: check the name and DNS

connection-refused
  if: Connection refused
  why: the connection was refused
  hint: check that sshd runs on the target, and on which port (--port of target add)

second-factor
  if: Permission denied (keyboard-interactive
  if: Permission denied (password
  why: the target's sshd wants more than a key (AuthenticationMethods, two factors), or takes
    none
  hint: allow publickey alone for {user} in its sshd_config (Match User {user})

key-refused
  if: Permission denied (publickey
  if: Permission denied (gssapi
  if: Permission denied (hostbased
  if: Too many authentication failures
  why: the target refused this controller's key
  hint: on the target, as {user}, run:
    $ {link}
  hint: if that says "already linked", sshd's log on the target says why it refuses (--from,
    AuthorizedKeysFile, AllowUsers, StrictModes, a locked account, none of that name); as root:
    $ journalctl -u ssh -n 20
  hint: to drop a wrong --from, unlink the key, then link it

expired
  if: account has expired
  if: Password change required
  if: password has expired
  if: must change your password
  why: the account {user} on the target, or its password, has expired
  hint: on the target, as root, see since when, then extend it:
    $ chage -l {user}

booting
  if: System is booting up
  if: System is going down
  if: System is shutting down
  if: nologin(8)
  why: the target is booting, shutting down, or closed for logins (/etc/nologin)
  hint: wait, or see why logins are closed: /etc/nologin on the target

closed-during-login
  if: Connection closed by&port
  if: Connection reset by&port
  why: the target's sshd closed the connection during login
  hint: sshd's log on the target says why (an expired account, PAM, /etc/nologin); as root:
    $ journalctl -u ssh -n 20

nologin
  if: account is currently not available
  if: not allowed to login
  if: This account is not available
  if: : restricted
  why: the login shell of {user} refuses commands (nologin, or a restricted one such as rbash)
  hint: on the target, see which it is, then give the account another:
    $ getent passwd {user}
  hint: or look for a ForceCommand for {user} in its sshd_config

other-service
  if: This service allows sftp connections only
  if: fatal: Interactive git shell
  if: fatal: unrecognized command
  if: git-shell
  why: the target forces something other than rrsync for {user} (sftp only, or git-shell)
  hint: take ForceCommand for {user} out of its sshd_config, and restart sshd
  hint: or give {user} an ordinary login shell

# rrsync and rsync on the target

chroot
  if: Changed root directory to
  why: the target's sshd puts {user} into a directory of its own (ChrootDirectory), in which the
    shell, rrsync or rsync is missing
  hint: take ChrootDirectory for {user} out of sshd_config: rrsync keeps the key below its path

broken
  if: error while loading shared libraries
  if: Error loading shared library
  if: symbol lookup error
  if: ModuleNotFoundError
  if: ImportError
  if: No module named
  if: Can't locate&@INC
  if: SyntaxError:
  if: env: &python&No such file
  if: env: &perl&No such file
  if: bad interpreter
  if: libc.so&not found
  why: rrsync or rsync on the target cannot start: a library, a module or its interpreter is
    missing
  hint: install what it names on the target

no-rrsync
  if: rrsync&not found
  if: rrsync: No such file
  if: rrsync: Permission denied
  if: bash: line 1: /&: No such file
  if: sh: 1: /&: not found
  if: sh: 1: exec: /&: not found
  if: sh: line 1: /&: No such file
  if: can't open file&rrsync
  if: Can't open perl script
  if: rrsync: cannot execute
  if: Unknown command&rrsync
  if: rrsync: inaccessible
  why: rrsync, or its interpreter, is missing on the target, or cannot be started
  hint: on the target, run:
    $ offsync install-deps --role target
  hint: then, as {user}, link the key again, with the rrsync that there is:
    $ {link}

read-only-key
  if: sending to read-only server
  if: read-only server is not allowed
  why: the key is for reading only (rrsync -ro)
  hint: on the target, as {user}, remove the line of this key from ~/.ssh/authorized_keys, then
    link the key:
    $ {link}

no-rsync
  if: No such file or directory: '&/rsync'
  if: Permission denied: '&/rsync'
  if: rsync: not found
  if: rsync: command not found
  if: /rsync&No such file
  if: /rsync&not found
  if: openrsync
  if: rsync 2.6.9 compatible
  if: : too large
  why: the real rsync is missing on the target, or cannot be started (or openrsync answers)
  hint: on the target, run:
    $ offsync install-deps --role target

no-directory
  if: Restricted directory does not exist
  if: FileNotFoundError&No such file or directory: '
  if: NotADirectoryError
  if: chdir&failed
  if: Unable to chdir
  if: Not a directory (20)
  why: {path} on the target, or something in it, is gone or is no directory
  hint: see whether a disk is to be mounted; on the target:
    $ cat /etc/fstab
  hint: if not, create it again, for the account {user}

rrsync-rejected-option
  if: has been disabled on this server
  if: invalid rsync-command syntax
  if: option is not supported
  if: unknown option
  if: unrecognized option
  if: unrecognized arguments
  if: is not rsync
  if: Not invoked via sshd
  if: does not run rsync
  if: offsync: fuzzy and backup directories
  if: offsync: basis directories are refused
  if: offsync: characters that are not ASCII
  why: the target's rrsync refused the command or an option
  hint: update rsync on the target, so that rrsync and rsync are of the same release, 3.1.2 or
    newer

# Disks and files of the target

read-only-disk
  if: Read-only file system
  why: the target's file system is mounted read-only
  hint: see why, then remount it; on the target:
    $ findmnt -T {path}

no-staging
  if: Unable to create partial-dir
  if: opendir&.~tmp~
  if: mkdir&.~tmp~
  if: mkstemp&.~tmp~
  why: rsync could not create its staging directory .~tmp~ on the target
  hint: check for free inodes; on the target:
    $ df -i {path}
  hint: and for a .~tmp~ of another account:
    $ find {path} -name .~tmp~ -ls

space
  if: No space left on device
  if: Disk quota exceeded
  why: the target's disk is full, or a quota is used up
  hint: free some space, then apply again; see how much there is, on the target:
    $ df -h {path}
  hint: or delete files, if the inodes are used up:
    $ df -i {path}
  hint: what interrupted runs left in .~tmp~ may be removed, too; see it, on the target:
    $ find {path} -name .~tmp~ -ls

source-unreadable
  if: [sender]&Permission denied
  if: [sender]&No such file or directory
  if: [sender]&Input/output error
  if: [sender]&Stale file handle
  if: send_files failed to open
  if: file has vanished
  if: link_stat&failed
  if: readlink_stat
  why: the source changed while it was read, or cannot be read
  hint: plan again

name-too-long
  if: File name too long
  if: ENAMETOOLONG
  why: a name is too long for the target's file system
  hint: rename it, or exclude it, then plan again

file-too-large
  if: File too large
  why: a file is larger than the target's file system, or a limit of {user} (ulimit -f), allows
  hint: exclude it, or raise that limit, then plan again

disk-error
  if: Input/output error
  if: Structure needs cleaning
  why: the target's disk has errors
  hint: see the kernel's log; on the target, as root:
    $ dmesg

stale
  if: Stale file handle
  if: Stale NFS file handle
  if: Transport endpoint is not connected
  if: Host is down (112)
  why: what is mounted at or below {path} on the target has gone away
  hint: mount it again, then plan again

blocked-by-directory
  if: could not make way for
  if: cannot delete non-empty directory
  if: Device or resource busy
  why: a directory that holds excluded or new files, or a mount point, is in the way of a
    planned entry
  hint: move or unmount it, or exclude it, then plan again

unsupported-name
  if: symlink "&Operation not permitted
  if: symlink "&not implemented
  if: symlink "&not supported
  if: Invalid argument (22)
  if: mkstemp&No such file or directory (2)
  why: the target's file system (exFAT, FAT, SMB?) does not support symlinks or some characters
    in names
  hint: exclude what it names, or deliver to another file system

unreadable-below
  if: opendir&Permission denied
  if: IO error encountered
  why: {user} may not read everything below {path} on the target
  hint: exclude what it names (a disk's lost+found is such a directory), or fix owner and modes

permission
  if: Operation not permitted (1)
  if: Permission denied (13)
  why: {user} may not change everything below {path} on the target
  hint: look at owner, mode and attributes (ls -ld, lsattr) of what it names, and of the directory
    that this lies in: {user} must be able to write there; then apply again

file-error
  if: error in file IO
  why: rsync cannot read or write a file
  hint: fix what it names, then apply again

timeout
  if: timed out
  if: Timeout, server
  if: not responding
  if: io timeout after
  if: No route to host
  if: Network is unreachable
  if: Host is down
  why: the target timed out or is unreachable
  hint: check the host, the port and the network

no-answer
  if: (0 bytes received so far)
  why: rsync did not start on the target, so nothing was sent
  hint: look for a ForceCommand for {user} in its sshd_config
  hint: check that the forced command of the key is rrsync, and the login shell an ordinary one
  hint: check that the shell start files of {user} (.bashrc and the like) do not exit or exec,
    and that PAM opens a session

connection-lost
  if: unexpected EOF
  if: unexpectedly close
  if: Broken pipe
  if: error in rsync protocol
  if: onnection to&closed
  if: error in socket IO
  if: mux_client
  if: client_loop
  why: the connection was lost
  hint: apply again to finish

other
  why: unrecognised failure
  hint: test the login by itself:
    $ {ssh}
  hint: see sshd's log on the target
"""


def parse_failures(table: str) -> dict[str, Failure]:
    """Return the rows of the table by name, in its order."""
    rows = {}
    for name, retry, body in re.findall(r"(?m)^([a-z-]+)( \(retry\))?\n((?:  .*\n)+)", table):
        fields: dict[str, list[str]] = {"if": [], "why": [], "hint": []}
        for key, text in re.findall(r"(?m)^  (\w+): (.*\n(?:    .*\n)*)", body):
            fields[key].append(re.sub(r"\n    (?!\$)", " ", text.rstrip()))
        patterns = [text.encode().split(b"&") for text in fields["if"]]
        parted = [hint.partition("\n    $ ") for hint in fields["hint"]]
        hints = [(words, command) for words, _, command in parted]
        rows[name] = Failure(patterns, " ".join(fields["why"]), hints, bool(retry))
    return rows


FAILURES = parse_failures(FAILURE_TABLE)
# Without the rows about host keys, which stand first. Once a host key is verified, no text of the
# server must be reported as a failure of host keys.
LOGIN_FAILURES = list(FAILURES)[list(FAILURES).index("locked") :]


def failure(
    target: Target,
    kind: str,
    facts: str = "",
    names: Iterable[bytes] = (),
    said: str = "",
) -> TargetError:
    """Return the error for a target. facts and names describe what happened."""
    home = os.environ.get("OFFSYNC_HOME") or os.path.expanduser("~/.offsync")
    key = "..."
    with contextlib.suppress(OffsyncError):
        key = read_file(home + "/id_ed25519.pub", "key").decode("utf-8", "replace").strip()
    link = ["offsync", "link", "--path", target.remote_path, "--key", key]
    ssh = "ssh -v -o IdentitiesOnly=yes -o StrictHostKeyChecking=yes -i".split()
    ssh += [
        home + "/id_ed25519",
        "-o",
        f'UserKnownHostsFile="{home}/known_hosts" ~/.ssh/known_hosts',
    ]
    ssh += ["-p", str(target.port)] if target.port else []
    words = {
        "host": target.host,
        "user": shlex.quote(target.user),
        "path": shlex.quote(target.remote_path),
        "add": f"{offsync_command('target', 'add')} {target_add_args(target)}",
        "link": shlex.join(link if target.symlinks else [*link, "--no-symlinks"]),
        "ssh": shlex.join([*ssh, "-l", target.user, "--", target.host]),
    }
    # For "other-path", the path is one that the target sent.
    words = {name: replace_unprintable(word) for name, word in words.items()}
    row = FAILURES[kind]
    why = ": ".join(filter(None, [row.why.format(**words), facts, quote_first(names)]))
    hints = [(text.format(**words), command.format(**words)) for text, command in row.hints]
    return TargetError(target.login, kind, why, *hints, said=said, retry=row.retry)


def diagnose(
    target: Target, result: Result, kinds: Iterable[str] = FAILURES, program: str = "rsync"
) -> TargetError:
    """Return the error for a failed program, with what it said."""
    if result.status is None:
        return failure(target, "no-response")
    lines = result.stderr.splitlines()
    said = quote_output(result.stderr) or "nothing, status %d" % result.status
    said = said if said.startswith(program) else f"{program}: {said}"
    for kind in kinds:
        # The whole text is looked at first: that is cheap, and excludes most rows.
        if any(
            all(part in result.stderr for part in parts)
            and any(all(part in line for part in parts) for line in lines)
            for parts in FAILURES[kind].patterns
        ):
            # For closed-after-login, stderr holds only the name of our own ProxyCommand.
            return failure(target, kind, said="" if kind == "closed-after-login" else said)
    return failure(target, "other", said)


# --- Trust core: the source ---------------------------------------------------------------------

HASHERS = 4  # threads that hash source entries, outside the interpreter's lock
STAGING_DIR = b".~tmp~"  # where --delay-updates collects files
# A killed receiver leaves .NAME.XXXXXX beside NAME, without a second dot where NAME begins with one
# (receiver.c). Six small letters, capitals or digits alone are a word or a number, as in
# .env.backup: such a file counts as a user's. For one in a hundred of rsync's files that is wrong,
# but safe.
TEMPORARY_NAME = re.compile(rb"\.(.+)\.(?![a-z]{6}$|[A-Z]{6}$|[0-9]{6}$)[A-Za-z0-9]{6}", re.DOTALL)


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


def exists_below(root: bytes, path: bytes) -> bool:
    """Return whether a path exists in a tree, without following a symlink on the way."""
    directory, name = os.path.split(path)
    try:
        parent = open_directory(root, directory)
    except OSError:
        return False
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
        return True
    except OSError:
        return False
    finally:
        os.close(parent)


def new_digest(data: bytes = b"", name: str = "sha256") -> Any:
    # Imported on first use, since it is slow to import.
    import hashlib

    # usedforsecurity=False: rsync's checksum is MD5, which FIPS forbids for security.
    return hashlib.new(name, data, usedforsecurity=False)


def hash_file(path: bytes, with_md5: bool = False, parent: int | None = None) -> tuple[bytes, int]:
    """Return (SHA-256, then MD5 if wanted; size in bytes) of a file, never through a symlink."""
    digests = [new_digest()]
    if with_md5:
        digests.append(new_digest(name="md5"))
    size = 0
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, dir_fd=parent)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file any more", path)
        # A byte more than the size is asked for: if a small file has grown since fstat(), then its
        # size and hash differ from what was planned. (A large one may escape this; the report of
        # the transfer notices it.)
        while size < status.st_size:
            chunk = os.read(descriptor, min(status.st_size + 1, 1 << 18))
            if STOPPING.is_set():
                raise Cancelled("interrupted")
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
            if escapes_source(path, link):
                # The scan refuses such a symlink: this one has appeared since.
                raise OSError(errno.EINVAL, "it is a symlink that leaves the source", path)
            return Entry("symlink", 0o777, len(link), link=link)
        # Anything else is not even opened.
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no file, directory or symlink any more", path)
        sums, size = hash_file(name, with_md5, parent)
        return Entry("file", mode, size, sums[:32], sums[32:])
    finally:
        os.close(parent)


class Source:
    """The source directory of a run: scanned once; what differs is hashed once, for all targets.

    The hashing threads write entries and errors; their values are read only after wait().
    """

    def __init__(self, path: str, exclude: Sequence[str] = (), with_md5: bool = False) -> None:
        self.root = os.fsencode(path)
        self.exclude = exclude
        self.with_md5 = with_md5
        self.entry_count = 0  # of entries, excluded ones too, once it is scanned
        self.symlinks: list[bytes] = []  # not excluded: a target that takes none fails with them
        self.accepted = threading.Event()  # it is scanned, and all of it can be delivered
        self.entries: dict[bytes, Entry | None] = {}  # None until it is described
        self.errors: dict[bytes, str] = {}
        self.lock = threading.Lock()  # held to add to entries, and to use the next three
        self.wanted: collections.deque[bytes] = collections.deque()
        self.working = 0  # threads
        self.pending: list[Any] = []  # their futures
        self.threads = ThreadPool(HASHERS)

    def request(self, path: bytes) -> None:
        """Have an entry described by a thread, once."""
        with self.lock:
            if path in self.entries:
                return
            self.entries[path] = None
            self.wanted.append(path)
            if self.working < HASHERS:
                self.pending = [future for future in self.pending if not future.done()]
                self.pending.append(self.threads.submit(self.describe_batch))
                self.working += 1

    def describe_batch(self) -> None:
        """Describe entries until none is wanted; a thread does so."""
        while True:
            with self.lock:
                if not self.wanted:
                    self.working -= 1
                    return
                path = self.wanted.popleft()
            if STOPPING.is_set():
                raise Cancelled("interrupted")
            try:
                self.entries[path] = describe_entry(self.root, path, self.with_md5)
            except (OSError, ValueError, MemoryError) as error:
                self.errors[path] = getattr(error, "strerror", None) or str(error)

    def wait(self) -> None:
        """Return when all that is wanted is described; raise for what vanished or is unreadable."""
        with self.lock:
            pending = list(self.pending)
        for future in pending:
            PROGRESS.update("source", "hashing, %d left" % (len(self.wanted) + 1))
            future.result()
        PROGRESS.update("source", None)
        if STOPPING.is_set():
            raise Cancelled("interrupted")
        if self.errors:
            named = [f"{quote_path(path)}: {why}" for path, why in sorted(self.errors.items())]
            raise OffsyncError(
                f"source {quote_name(self.root)}: changed or became unreadable while it was hashed"
                f": {join_first(named)}",
                "deliver from a snapshot, or try again",
            )

    def entry(self, path: bytes) -> Entry:
        entry = self.entries[path]
        # It was queued, but no thread read it.
        if entry is None:
            raise OffsyncError(
                f"source {quote_name(self.root)}: {quote_path(path)} was not read", "try again"
            )
        return entry

    def still_matches(self, path: bytes, planned: Entry) -> bool:
        """Return whether an entry is now what was planned; its content is read again."""
        try:
            return describe_entry(self.root, path, bool(planned.md5)) == planned
        except OSError:
            return False

    def list_included(self, rsync: str, complete: bool = True) -> set[bytes]:
        """Return the paths that the excludes leave, as a local rsync dry run applies them.

        Where complete, raises OffsyncError if anything is unreadable; else that is ignored.
        """
        names: set[bytes] = set()
        out_format, on_line = tag_items(
            b"%n", lambda name: names.add(unescape_rsync_name(name).rstrip(b"/"))
        )
        # To a target that does not exist, so that every entry is listed. -D: devices, too.
        argv: list[str | bytes] = [rsync, "-8", "-n", "-rlD", out_format]
        argv += ["--exclude=" + rule for rule in self.exclude]
        argv += ["--", self.root.rstrip(b"/") + b"/", f"/nonexistent/{os.urandom(8).hex()}/"]
        result = run_program(
            argv, env=child_environment(for_rsync=True), on_line=on_line, room=sys.maxsize
        )
        # 23: it could not read everything; 24: something vanished.
        if result.status not in ((0,) if complete else (0, 23, 24)):
            raise OffsyncError(
                f"source {quote_name(self.root)}: rsync cannot read all of it",
                "fix the permissions, or exclude the entry, then try again",
                said="rsync: " + quote_output(result.stderr),
            )
        return names - {b".", b""}


def symlink_problem(root: bytes, real_root: bytes, path: bytes) -> str:
    """Return why a symlink cannot be delivered; "" if it stays inside, as written and resolved."""
    place = os.path.join(root, path)
    try:
        link = os.readlink(place)
        real = os.path.realpath(place)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"it is a symlink that cannot be read: {error.strerror}"
    if link.startswith(b"/"):
        return "it is a symlink to an absolute path"
    within = (real + b"/").startswith(real_root.rstrip(b"/") + b"/")
    if escapes_source(path, link) or not within:
        return "it is a symlink that leaves the source"
    return ""


def entry_problem(entry: os.DirEntry[bytes]) -> str:
    """Return why a file or directory of the source cannot be delivered, "" if it can."""
    if entry.is_dir(follow_symlinks=False):
        access = os.R_OK | os.X_OK
    elif entry.is_file(follow_symlinks=False):
        access = os.R_OK
    else:
        return "it is a device, socket or fifo"
    if not os.access(entry.path, access) and os.path.lexists(entry.path):
        return "it cannot be read"
    return ""


def scan(source: Source) -> dict[bytes, str]:
    """Walk the source once, count it, note its symlinks; return {path: why it is undeliverable}.

    What has vanished meanwhile is no offence.
    """
    offences: dict[bytes, str] = {}
    real_root = os.path.realpath(source.root)
    pending = [b""]
    while pending:
        directory = pending.pop()
        prefix = directory + b"/" if directory else b""
        PROGRESS.update("source", "scanning " + quote_path(directory or b"."))
        if STOPPING.is_set():
            raise Cancelled("interrupted")
        try:
            with os.scandir(os.path.join(source.root, directory)) as entries:
                for entry in entries:
                    source.entry_count += 1
                    path = prefix + entry.name
                    if entry.is_symlink():
                        source.symlinks.append(path)
                        why = symlink_problem(source.root, real_root, path)
                    else:
                        why = entry_problem(entry)
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(path)
                    if entry.name == STAGING_DIR:
                        why = "rsync reserves the name .~tmp~ for itself; rename it"
                    if why:
                        offences[path] = why
        except OSError as error:
            if not directory:
                raise OffsyncError(
                    f"source {quote_name(source.root)}: {error.strerror}",
                    "name a readable directory",
                ) from None
            if not isinstance(error, FileNotFoundError):
                offences.setdefault(directory, "it cannot be read")
    PROGRESS.update("source", None)
    return offences


def check_source_location(root: bytes, private: Iterable[str]) -> None:
    """Raise unless a source is a readable directory that holds none of these private files."""
    problem = "Permission denied"
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            problem = "a file, not a directory"
        elif os.access(root, os.R_OK | os.X_OK):
            problem = ""
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise OffsyncError(
            f"source {quote_name(root)}: {problem}",
            "name another directory with --source; check that it is mounted",
        )
    top = os.path.realpath(root).rstrip(b"/") + b"/"
    # By its real path: the key may be a symlink to another place.
    for path in private:
        if (os.path.realpath(os.fsencode(path)) + b"/").startswith(top):
            raise OffsyncError(
                f"source {quote_name(root)}: contains the private key ({quote_text(path)})",
                "name a directory of its own with --source",
            )


def check_source(source: Source, rsync: str, targets: Sequence[Target]) -> None:
    """Scan the source. Raises OffsyncError unless all that is not excluded can be delivered.

    A target that takes no symlinks fails alone, in plan_target().
    """
    offences = scan(source)
    if all(target.symlinks for target in targets):
        source.symlinks = []
    if source.exclude and (offences or source.symlinks):
        included = source.list_included(rsync, complete=False)
        offences = {path: offences[path] for path in offences if path in included}
        source.symlinks = [path for path in source.symlinks if path in included]
    if offences:
        named = [f"{quote_path(path)}: {offences[path]}" for path in sorted(offences)]
        count = plural(len(named), "entry", "entries")
        raise OffsyncError(
            f"source {quote_name(source.root)}: {count} cannot be delivered: {join_first(named)}",
            "change, remove or exclude what is named, then plan again",
        )


# --- Trust core: the connection -------------------------------------------------------------------

# Every connection gets all of these; the command line wins over ~/.ssh/config (ssh_config(5)).
SSH_OPTIONS = tuple(
    word
    for option in (
        # Makes ssh ignore options that it does not know, here and in ~/.ssh/config: the next three
        # came with OpenSSH 8.5 and 8.7.
        "IgnoreUnknown=*",
        "KnownHostsCommand=none",
        "StdinNull=no",
        "ForkAfterAuthentication=no",
        # Never ask: a question would hang a cron job.
        "BatchMode=yes",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "PKCS11Provider=none",
        "AddKeysToAgent=no",
        "PreferredAuthentications=publickey",
        "PubkeyAuthentication=yes",
        "StrictHostKeyChecking=yes",
        "NoHostAuthenticationForLocalhost=no",
        # DNS is no proof of a host key, nor is Kerberos, which would take known_hosts' place.
        "VerifyHostKeyDNS=no",
        "GSSAPIKeyExchange=no",
        # known_hosts changes only in "target add".
        "UpdateHostKeys=no",
        "HashKnownHosts=no",
        # The operator confirmed the key of a name, not of an address.
        "CheckHostIP=no",
        "ForwardAgent=no",
        "ForwardX11=no",
        "ClearAllForwardings=yes",
        "Tunnel=no",
        # Replaces every SetEnv of ~/.ssh/config: the master would add those to each session.
        "SetEnv=LC_ALL=C",
        "PermitLocalCommand=no",
        "RemoteCommand=none",
        "RequestTTY=no",
        "EscapeChar=none",
        # We try again ourselves where that can help.
        "ConnectTimeout=15",
        "ConnectionAttempts=1",
        # A dead link ends within a minute.
        "ServerAliveInterval=15",
        "ServerAliveCountMax=3",
    )
    for word in ("-o", option)
)
# For a connection of its own, without a master.
SSH_NO_MUX = "-o ControlMaster=no -o ControlPath=none".split()
# ssh logs in, opens no session, and stays in the background as the master of this connection. -f is
# needed since OpenSSH before 8.7 asks for a shell with -N alone. Without ControlPersist, and at
# LogLevel VERBOSE, ssh hides nothing of what a jump host or sshd says when a login fails. These
# options come first: ssh takes the first value of each.
SSH_MASTER = "-f -N -o ControlMaster=yes -o ControlPersist=no -o LogLevel=VERBOSE".split()
# A session goes over the open connection or nowhere. If the master has gone, ssh would open a new
# connection, which nobody has proved: a ProxyCommand that does not exist prevents that, and its
# name in the error tells the cause. -F /dev/null: a session takes nothing from ~/.ssh/config (such
# as RemoteCommand or SendEnv).
SSH_SESSION = (
    "-F /dev/null -o ControlMaster=no -o BatchMode=yes -o LogLevel=ERROR"
    " -o ProxyCommand=/nonexistent/offsync-connection-ended"
).split()
# Bytes that rsync may print:
LISTING_ROOM = 1 << 31  # in passes with --delete, shared by all targets
PASS_ROOM = 1 << 26  # in any other pass
ENTRY_ROOM = 1000  # and more for each source entry


class RunContext:
    """What all targets of one command share: config, programs, threads, the scratch directory."""

    def __init__(
        self,
        state: StateDirectory,
        config: Config,
        typed: Typed,
        jobs: int | None = None,
        with_md5: bool = False,
    ) -> None:
        check_private(state.key)
        self.state = state
        self.config = config
        self.typed = typed
        self.ssh = find_program("ssh")
        self.target_count = 1  # targets of this run, which share LISTING_ROOM
        # Equal plans are one object. Written by the threads of all targets.
        self.equal_changes: dict[tuple[Change, ...], tuple[Change, ...]] = {}
        self.numbers = itertools.count()
        self.scratch = make_scratch()
        # An empty source, for what only asks.
        self.empty = os.fsencode(os.path.join(self.scratch, "empty"))
        os.mkdir(self.empty)
        self.reaper = start_reaper(self.scratch, self.ssh)
        self.source = Source(config.source, config.exclude, with_md5)
        self.pool = ThreadPool(jobs or config.jobs)  # for the targets
        self.provers = ThreadPool(jobs or config.jobs)  # for the proofs of compare_with_proof()

    @functools.cached_property
    def rsync_path(self) -> str:
        """The path of the rsync that is used. Raises OffsyncError where there is none."""
        return find_rsync()[0]

    @functools.cached_property
    def included(self) -> set[bytes]:
        """The paths of the source that the excludes leave. Raises OffsyncError."""
        return self.source.list_included(self.rsync_path)

    def __enter__(self) -> RunContext:
        return self

    def __exit__(self, *_: object) -> None:
        """End all work, and remove the scratch directory: the reaper does, or we if it failed."""
        STOPPING.value = True
        for process in list(LIVE_PROCESSES):
            kill_group(process)
        for threads in (self.pool, self.provers, self.source.threads):
            threads.close()
        PROGRESS.clear()
        pid, pipe = self.reaper
        os.close(pipe)
        if os.waitpid(pid, 0)[1] != 0:
            with contextlib.suppress(OSError):
                clean_up(self.scratch, self.ssh)


class Connection:
    """One authenticated ssh connection to a target; sessions and rsyncs go over it or nowhere."""

    def __init__(self, context: RunContext, target: Target, known_hosts: str = "") -> None:
        self.context = context
        self.target = target
        self.known_hosts = known_hosts or context.state.known_hosts
        self.socket = os.path.join(context.scratch, "%d" % next(context.numbers))
        self.restriction_proved = False  # it is proved that the key runs no command
        self.path_proved = False  # it is proved where the key writes
        self.answered = False  # an rsync pass has succeeded
        self.plan_pass_seconds = 0.0  # what the plan's pass took
        self.session_overhead = 0.0  # seconds of a session that does nothing (prove_path)

    def options(self) -> list[str]:
        files = f'UserKnownHostsFile="{self.known_hosts}" ~/.ssh/known_hosts ~/.ssh/known_hosts2'
        words = [*SSH_OPTIONS, "-o", files, "-o", f'IdentityFile="{self.context.state.key}"']
        if self.target.port:
            words += ["-o", "Port=%d" % self.target.port]
        return words

    def destination(self) -> list[str]:
        return ["-l", self.target.user, "--", self.target.host]

    def session_options(self) -> list[str]:
        return [*SSH_SESSION, "-o", "ControlPath=" + self.socket]

    def run(self, argv: Argv, **more: Any) -> Result:
        """Run a program that prints what a target sends. Raises TargetError if it is too much."""
        try:
            return run_program(argv, **more)
        except EndlessOutput as error:
            raise failure(self.target, "unexpected-report", str(error)) from None

    def open(self) -> None:
        """Log in, without a session, and leave the master of the connection behind.

        Raises TargetError.
        """
        argv = [self.context.ssh, *SSH_MASTER, "-o", "ControlPath=" + self.socket]
        argv += [*self.options(), *self.destination()]
        self.restriction_proved = self.path_proved = False
        for last in retry_attempts():
            # The socket of a master that has ended.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.socket)
            # A file, no pipe: a ProxyCommand stays in the background, and would keep the pipe open.
            with scratch_file(self.context.scratch) as stderr:
                result = self.run(argv, stderr=stderr, limit=CONNECT_DEADLINE)
            if result.status == 0:
                break
            error = diagnose_login(self, result)
            if last or not error.retry:
                raise error
        # A host can imitate this line in its banner. That harms only the host: it is refused.
        if re.search(rb'(?m)^Authenticated to .* using "none"\.\r?$', result.stderr):
            raise failure(self.target, "no-key-asked")

    def session(self, options: Sequence[str], command: str) -> Result:
        argv = [self.context.ssh, *self.session_options(), *options, *self.destination(), command]
        return self.run(argv, stdin=subprocess.PIPE, limit=SESSION_DEADLINE)

    def prove_restricted(self, patient: bool = True) -> None:
        """Ask for a command on this connection; raise TargetError unless it was refused.

        If the answer tells nothing: patient asks again where that may help, and in the end raises
        TargetError; otherwise restriction_proved stays False.
        """
        for last in retry_attempts():
            error = check_refusal(self.target, self.session((), PROOF_COMMAND))
            self.restriction_proved = error is None
            if error is None or not patient:
                return
            if last or not error.retry:
                raise error

    def rsync_remote_args(self, path: str) -> list[str]:
        """Return the last arguments of an rsync over this connection: -e, --, LOGIN:PATH."""
        shell = map(quote_rsh_word, [self.context.ssh, *self.session_options()])
        host = f"[{self.target.host}]" if ":" in self.target.host else self.target.host
        return ["-e", " ".join(shell), "--", f"{self.target.user}@{host}:{path}"]

    def rsync_once(
        self,
        options: Sequence[str],
        *,
        source: bytes = b"",
        path: str = ".",
        stdin: BinaryIO | None = None,
        item_format: bytes = b"%i %n",
        on_item: Callable[[bytes], None] = lambda line: None,
        on_other: Callable[[bytes], None] = lambda line: None,
        sends: bool = False,
        limit: float = 0,
    ) -> Result:
        """Run one rsync to the target; give each itemized line to on_item.

        stdin is an open file, read from its beginning. sends: it is a pass that sends, and reports
        MD5 sums. limit: seconds for all of it; without one, the server must answer within
        SESSION_DEADLINE, and then may stay silent for "timeout" of the config, in seconds.
        """
        context = self.context
        config = self.context.config
        out_format, on_line = tag_items(item_format, on_item, on_other)
        # -e SHELL --
        *shell, destination = self.rsync_remote_args(path)
        timeout = min(SEND_TIMEOUT, config.timeout) if sends else config.timeout
        # -8: raw bytes in every locale. flist1 prints a line once the server has answered.
        argv: list[str | bytes] = [context.rsync_path, "-8", "--info=flist1", *options]
        argv += ["--timeout=%d" % timeout, out_format, *shell]
        argv += [(source or context.source.root).rstrip(b"/") + b"/", destination]
        room = LISTING_ROOM // context.target_count if "--delete" in options else PASS_ROOM
        if stdin:
            os.lseek(stdin.fileno(), 0, os.SEEK_SET)
        result = self.run(
            argv,
            stdin=stdin or subprocess.DEVNULL,
            on_line=on_line,
            limit=limit or SESSION_DEADLINE,
            silence=0 if limit else config.timeout,
            room=room + ENTRY_ROOM * context.source.entry_count,
            env=child_environment(for_rsync=True, force_md5=sends or config.verify == "strong"),
        )
        self.answered = self.answered or result.status == 0
        return result

    def explain(self, result: Result) -> TargetError:
        """Return what a failed pass meant. Where one has succeeded before, login and start files
        are as they must be: it is the connection that was lost.
        """
        error = diagnose(self.target, result)
        if self.answered and error.kind in ("no-response", "no-answer"):
            error = failure(self.target, "stalled")
        return error

    def rsync_with_retry(self, options: Sequence[str], **more: Any) -> Result:
        """Run one rsync as rsync_once() does; again where it did not even begin on the target.

        That is so where rrsync's lock is held, where sshd allows no further session, and where sshd
        has closed the connection while nothing went over it: then it is opened once more, with the
        proofs that it has passed before.
        """
        for last in retry_attempts():
            result = self.rsync_once(options, **more)
            if result.status == 0 or last:
                break
            error = diagnose(self.target, result)
            if error.kind == "closed-after-login":
                path_proved = self.path_proved
                self.open()
                self.prove_restricted()
                if path_proved:
                    prove_path(self)
            elif not error.retry:
                break
        return result


def diagnose_login(connection: Connection, result: Result) -> TargetError:
    """Return what a connection that did not open meant. Raises OffsyncError for a bad key of ours.

    A banner of sshd stands before ssh's own words, and may look like anything. So ssh's last line
    is used, and the line before it where the last one tells nothing. All lines are used only where
    no banner can have come before them.
    """
    target = connection.target
    said = [line for line in result.stderr.splitlines() if line.strip()]
    if result.status is None:
        return failure(target, "timeout")

    # Port 65535 means that the program which leads to sshd (a jump host) has ended. sshd has not
    # answered then, so the lines before are that program's.
    exchange = (b"kex_exchange_identification: ", b"ssh_exchange_identification: ")
    nowhere = said and re.search(rb"UNKNOWN port 65535(?! timed out)", said[-1])
    if nowhere or said and said[-1].startswith(exchange):
        # Without the lines of our own ssh. (OpenSSH 7.9 takes PKCS11Provider=none for a library.)
        ours = (*exchange, b"dlopen none failed")
        route = [line for line in said[:-1] if not line.startswith(ours)]
        if route:
            return failure(target, "proxy-failed", quote_output(b"\n".join(route)))

    def judge(lines: Sequence[bytes], kinds: Iterable[str]) -> TargetError:
        return diagnose(target, result._replace(stderr=b"\n".join(lines)), kinds, "ssh")

    if said[-1:] == [b"Host key verification failed."]:
        # Host keys are verified before any banner.
        error = judge(said, FAILURES)
    else:
        # The reason of sshd or PAM may stand in the line before.
        error = judge(said[-1:], LOGIN_FAILURES)
        if error.kind in ("closed-during-login", "other"):
            error = judge(said[-2:], LOGIN_FAILURES)
    if error.kind == "key-refused" or b"Load key" in result.stderr:
        check_own_key(connection.context.state.key)
    if error.kind == "host-key-changed":
        facts = describe_changed_key(connection.context.state, result.stderr)
        return failure(target, "host-key-changed", facts)
    return error


# --- Trust core: proofs -------------------------------------------------------------------------

# A shell prints this without its quotes; what only repeats the command keeps them. The guard that
# link puts before rrsync lets all of these words pass, so that rrsync itself must refuse them.
PROOF_COMMAND, PROOF_OUTPUT = 'echo a-""shell-""answers', b"a-shell-answers"
# How the Perl rrsync (up to 3.2.3) refuses it, and then exits with 255, as ssh does when it fails.
PERL_REFUSAL = b"SSH_ORIGINAL_COMMAND='%s' is not rsync" % PROOF_COMMAND.encode()


def check_refusal(target: Target, result: Result) -> TargetError | None:
    """Judge the answer to PROOF_COMMAND.

    Returns None if it was refused, as rrsync refuses it; an error if the answer proves nothing.
    Raises TargetError if rrsync did not refuse the command, and if there was no answer in time.
    """
    if PROOF_OUTPUT in result.stdout:
        raise failure(target, "not-restricted", "a shell command ran")
    # For example a shell start file that reads its stdin.
    if result.status is None:
        raise failure(target, "no-response")
    if result.stdout.strip():
        # nologin(8) and others say on stdout what they are.
        said = result._replace(stderr=result.stdout + b"\n" + result.stderr)
        error = diagnose(target, said, program="ssh")
        if error.kind in ("nologin", "expired", "other-service"):
            raise error
        raise failure(target, "shell-output", quote_output(result.stdout))
    if result.status == 0:
        raise failure(target, "not-rrsync")
    # rrsync's own status, also when it only says that it is locked.
    if 0 < result.status < 255:
        return None
    if result.status == 255 and PERL_REFUSAL in result.stderr:
        return None
    # 255 is ssh's own failure, and no proof.
    return diagnose(target, result, program="ssh")


def prove_path(connection: Connection) -> str:
    """Prove where the key writes: ask for a dry run to /RANDOM/x, where /RANDOM does not exist.

    rsync's error then names RANDOM after the directory that it lies in. Returns a sentence for
    people; raises TargetError unless that directory is named, and is the configured path.
    """
    target = connection.target
    marker = os.urandom(8).hex().encode()
    expected = os.fsencode(target.remote_path)
    for number, last in enumerate(retry_attempts()):
        started = time.monotonic()
        result = connection.rsync_once(
            ("-n", "-r"),
            source=connection.context.empty,
            path=f"/{marker.decode()}/x",
            limit=SESSION_DEADLINE,
        )
        # Without the time in which the target's rsync sleeps after an error (see SESSION_END).
        connection.session_overhead = time.monotonic() - started - 0.1
        if result.status == 0:
            raise failure(target, "not-restricted", "it writes anywhere")
        before, found, _ = unescape_rsync_name(result.stderr).partition(marker)
        quote = before.rfind(b'"')
        if found and quote >= 0:
            # Up to rsync 3.1.3, two slashes follow the directory.
            directory = before[quote + 1 :].rstrip(b"/")
            written = quote_name(directory or b"/")
            facts = f"its key writes below {written}, not below {quote_name(expected)}"
            if not directory:
                raise failure(target, "not-restricted", facts)
            if directory != expected.rstrip(b"/"):
                other = target._replace(remote_path=os.fsdecode(directory))
                raise failure(other, "other-path", facts)
            connection.path_proved = True
            return "it stays below " + quote_name(expected)
        error = diagnose(target, result)
        # A dying rsync now and then loses its last words: where it printed nothing, four more
        # tries.
        silent = not result.stderr and number < 4
        if last or not (error.retry or silent):
            break
    if error.kind in ("other", "no-answer"):
        error = failure(target, "path-unknown", quote_output(result.stderr))
    raise error


# --- Trust core: what rsync prints --------------------------------------------------------------


def tag_items(
    item_format: bytes,
    on_item: Callable[[bytes], None],
    on_other: Callable[[bytes], None] = lambda line: None,
) -> tuple[bytes, Callable[[bytes], None]]:
    """Return the --out-format for rsync, and the function that takes rsync's lines.

    Items bear a secret marker, so that no other output of rsync's, nor anything that a target
    sends, can look like one.
    """
    marker = b"offsync-" + os.urandom(9).hex().encode() + b":"

    def on_line(line: bytes) -> None:
        if line.startswith(marker):
            on_item(line[len(marker) :])
        else:
            on_other(line)

    return b"--out-format=" + marker + item_format, on_line


def parse_itemized(line: bytes) -> Change | None:
    """Return what "%i %n" says, or None where nothing that we compare differs. Raises ValueError.

    The code is YXcstpoguax (rsync(1), --itemize-changes). Another time alone is no difference, nor
    is anything about the root of the tree.
    """
    code = line[:11]
    blank = line[11:12]
    escaped = line[12:]
    if len(code) != 11 or blank != b" " or not escaped:
        raise ValueError("no itemized line: " + quote_name(line[:100]))
    name = unescape_rsync_name(escaped)
    path = name.rstrip(b"/")
    if path == b"." or not path:
        return None
    check_relative(path)
    if code.startswith(b"*deleting"):
        return Change(path, "missing", name.endswith(b"/"))
    update = code[:1]
    letter = code[1:2]
    if update not in b"<>ch." or letter not in b"fdL":
        raise ValueError("an unknown itemize code: " + quote_name(line[:100]))
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


class TransferReport:
    """Checks what rsync reports of each entry that it sends against the plan.

    A report says what really went over the connection, whatever the source held before or after:
    it comes from the rsync that sends, behind a marker that no target knows.
    """

    def __init__(self, target: Target, planned: Sequence[Change]) -> None:
        self.target = target
        self.planned = {change.path: change for change in planned}
        self.confirmed: set[bytes] = set()  # paths that went as planned
        self.mismatched: set[bytes] = set()  # another content, mode or link, or not planned at all
        self.bytes = 0

    def take(self, line: bytes) -> None:
        """Take one report, "%C %B %b %i %n//%L": MD5, mode, bytes, what was done, name, " -> link".

        Raises ValueError for what is no report, TargetError for a deletion: rsync prints what a
        target says that it deleted, in any pass.
        """
        md5 = line[:32].strip()
        mode, count, itemized = line[33:].split(b" ", 2)
        code = itemized[:11]
        # No path holds "//"; a directory's name ends with "/" of its own.
        name, _, rest = unescape_rsync_name(itemized[12:]).partition(b"//")
        if code.startswith(b"*deleting"):
            raise failure(self.target, "unexpected-report", "a deletion", [name])
        self.bytes += int(count)
        change = self.planned.get(name)
        if change is None:
            # Unchanged directories come along, and only their times may differ.
            if code[:1] != b"." or code[2:].strip(b" .t"):
                self.mismatched.add(name)
            return
        entry = change.entry
        assert entry is not None
        endings = {"file": (b"f", b""), "directory": (b"d", b"/")}
        expected = endings.get(entry.type, (b"L", b" -> " + entry.link))
        as_planned = (code[1:2], rest) == expected
        # No symlink has a mode.
        if (
            entry.type != "symlink"
            and mode != stat.filemode(stat.S_IFREG | entry.mode)[1:].encode()
        ):
            as_planned = False
        # "<": content went, also where only a mode was planned.
        sent = change.sends_content or code[:1] == b"<"
        if sent and md5 != entry.md5.hex().encode():
            as_planned = False
        (self.confirmed if as_planned else self.mismatched).add(name)


def is_leftover(source: Source, change: Change) -> bool:
    """Return whether an entry that exists only on the target has a temporary name of rsync's.

    These are .~tmp~ and all in it, and .NAME.XXXXXX where NAME is in the source. It is most likely
    rsync's, so it never stops an apply. It may still be a user's file, so it is deleted only where
    the policy allows deletions.
    """
    directory, name = os.path.split(change.path)
    if STAGING_DIR in change.path.split(b"/"):
        return True
    match = TEMPORARY_NAME.fullmatch(name)
    if not match or change.directory:
        return False
    originals = (match[1], b"." + match[1])
    return any(exists_below(source.root, os.path.join(directory, name)) for name in originals)


# --- Trust core: the plan -----------------------------------------------------------------------

# One pass shows additions, changes and deletions. "strong" is "hash" with MD5
# (child_environment()). -t: the quick check takes a file with another time for changed. With -c,
# rsync reports that only the time differs, which parse_itemized() ignores.
RSYNC_HASH = ("-n", "-rlptc", "--delete")
RSYNC_PLAN = {"hash": RSYNC_HASH, "strong": RSYNC_HASH, "quick": ("-n", "-rlpt", "--delete")}
# Of the listed entries, those that do not exist at all on the target.
RSYNC_ABSENT = ("-n", "-lpt", "--ignore-existing", "--from0", "--files-from=-")
# Of the listed entries, those that differ by hash.
RSYNC_COMPARE = ("-n", "-lptc", "--from0", "--files-from=-")
PLAN_VERSION = 3  # of the format of plans
POLICY_KEYS = ("source", "delete", "overwrite", "verify", "exclude")  # what a review approves


class TargetPlan(NamedTuple):
    """The plan of one target; error says why there is none. Equal plans share their changes."""

    target: Target
    connection: Connection
    changes: tuple[Change, ...] = ()  # sorted by path
    error: TargetError | None = None
    staged: frozenset[bytes] = frozenset()  # leftovers in .~tmp~, reviewed or not

    def changes_of(self, *kinds: str) -> list[Change]:
        return [change for change in self.changes if change.kind in kinds]


def itemize(
    connection: Connection,
    options: Sequence[str],
    paths: Iterable[bytes] | None = None,
    want: Callable[[bytes], None] = lambda path: None,
    **more: Any,
) -> dict[bytes, Change]:
    """Return what a run of rsync itemizes, by path, for the tree or for some paths.

    want is called with each path that differs, as soon as it is reported. Raises TargetError, also
    where the target reports a path twice, or a deletion in a pass over paths.
    """
    context = connection.context
    target = connection.target
    found: dict[bytes, Change] = {}

    def on_item(line: bytes) -> None:
        try:
            change = parse_itemized(line)
        except ValueError as error:
            raise failure(target, "unexpected-report", str(error)) from None
        if not change:
            return
        if change.path in found:
            raise failure(target, "unexpected-report", f"{quote_name(change.path)} twice")
        found[change.path] = change
        if change.kind != "missing":
            want(change.path)
        elif paths is not None:
            raise failure(target, "unexpected-report", "a deletion", [change.path])

    if paths is None:
        excludes = ["--exclude=" + pattern for pattern in context.config.exclude]
        result = connection.rsync_with_retry((*options, *excludes), on_item=on_item, **more)
    else:
        with scratch_file(context.scratch, map(files_from_entry, paths)) as names:
            result = connection.rsync_with_retry(options, stdin=names, on_item=on_item, **more)
    if result.status != 0:
        raise connection.explain(result)
    return found


def compare_with_proof(connection: Connection) -> dict[bytes, Change]:
    """Return what the plan's pass itemizes, once it is proved that the key runs no command.

    The proof runs beside the pass, on the same connection. It begins when the server has answered
    the pass: by then the pass holds rrsync's lock, which the proof cannot take from it. Where the
    proof tells nothing (MaxSessions of sshd may be 1), it is tried again after the pass. A pass
    sends names and checksums of the source, no content.
    """
    context = connection.context
    failed = None
    proof: list[Any] = []
    started = time.monotonic()

    def begin_proof(_: bytes) -> None:
        if not proof:
            proof.append(context.provers.submit(lambda: connection.prove_restricted(patient=False)))

    try:
        changes = itemize(
            connection,
            RSYNC_PLAN[context.config.verify],
            want=context.source.request,
            on_other=begin_proof,
        )
    except TargetError as error:
        failed = error
    connection.plan_pass_seconds = time.monotonic() - started
    for future in proof:
        future.result()
    # A target that did not answer the pass is not waited for a second time.
    if not connection.restriction_proved and (not failed or failed.kind != "no-response"):
        connection.prove_restricted()
    if failed:
        raise failed
    return changes


def classify(connection: Connection, found: dict[bytes, Change]) -> list[Change]:
    """Return the sorted changes of a target, from what rsync itemized.

    rsync shows an entry that replaces one of another type as new. So the new entries whose parent
    is not new (below a new directory all is new) are looked up on the target; those that exist
    on the target become "modified", with "type" as the reason.
    """
    new = {path for path, change in found.items() if change.kind == "added"}
    tops = sorted(path for path in new if os.path.dirname(path) not in new)
    absent = itemize(connection, RSYNC_ABSENT, tops) if tops else {}
    replaced = set(tops).difference(absent)
    for path in replaced:
        found[path] = found[path]._replace(kind="modified", reasons=("type",))
    delete = connection.context.config.delete
    # Where a file or symlink replaces a directory, the contents of the directory cannot stay. An
    # entry there is never "kept", and it is a "leftover" only where deletions are allowed. Else it
    # stays "missing", for which policy_violation() refuses the run.
    in_place = {path for path in replaced if not found[path].directory}
    for path, change in found.items():
        if change.kind != "missing":
            continue
        stays = in_place.isdisjoint(above(path))
        if is_leftover(connection.context.source, change) and (stays or delete is Deletion.ALLOW):
            found[path] = change._replace(kind="leftover")
        elif stays and delete is Deletion.KEEP:
            found[path] = change._replace(kind="kept")
    return [found[path] for path in sorted(found)]


def plan_target(context: RunContext, target: Target) -> TargetPlan:
    """Return the plan of one target, errors included.

    It connects while the source is scanned, and compares only once the source is accepted. Where
    there is something to do, the key must really write below the configured path: that is proved
    while the source entries are hashed.
    """
    connection = Connection(context, target)
    source = context.source
    try:
        PROGRESS.update(target.login, "connecting")
        connection.open()
        while not source.accepted.wait(0.1):
            # The run is over, also where the source was refused.
            if STOPPING.is_set():
                raise Cancelled("interrupted")
        if not target.symlinks and source.symlinks:
            raise failure(target, "symlinks", names=source.symlinks)
        PROGRESS.update(target.login, "comparing")
        changes = classify(connection, compare_with_proof(connection))
        # What vanished from the source does not concern a target that is equal to it.
        if changes:
            prove_path(connection)
            source.wait()
        for index, change in enumerate(changes):
            if change.kind in ("added", "modified"):
                changes[index] = change._replace(entry=source.entry(change.path))
        staged = {c.path for c in changes if c.kind == "leftover" and STAGING_DIR in c.path}
        plan = TargetPlan(target, connection, tuple(changes), staged=frozenset(staged))
        if context.target_count > 1:
            plan = plan._replace(
                changes=context.equal_changes.setdefault(plan.changes, plan.changes)
            )
    except Cancelled:
        raise
    except TargetError as error:
        plan = TargetPlan(target, connection, error=error)
    except (OffsyncError, OSError) as problem:
        why = as_offsync_error(problem)
        local = TargetError(target.login, "local-error", why.message, *why.hints, said=why.said)
        plan = TargetPlan(target, connection, error=local)
    PROGRESS.update(target.login, None)
    return plan


def plan_all(context: RunContext, targets: Sequence[Target]) -> list[TargetPlan]:
    """Return the plan of each target, in the given order. Raises where the source is refused."""
    source = context.source
    state = context.state
    # Before any target is contacted.
    check_source_location(source.root, (state.path, state.key))
    context.target_count = len(targets)
    planning = context.pool.imap_unordered(lambda target: plan_target(context, target), targets)
    check_source(source, context.rsync_path, targets)
    source.accepted.set()
    plans = dict(planning)
    if any(plan.changes_of("kept") for plan in plans.values()) and not context.included:
        # An empty source is an accident. As "missing", these make policy_violation() refuse it.
        for target, plan in plans.items():
            changes = (c._replace(kind="missing") if c.kind == "kept" else c for c in plan.changes)
            plans[target] = plan._replace(changes=tuple(changes))
    return [plans[target] for target in targets]


def json_line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True).encode() + b"\n"


def entry_line_parts(change: Change) -> tuple[bytes, bytes]:
    """Return an entry's line of a plan, in two pieces around its login."""
    # That a kept entry stays is said by "delete" in the line of the policy.
    kind = "missing" if change.kind == "kept" else change.kind
    fields: dict[str, Any] = {"login": "", "kind": kind, **name_to_json(change.path)}
    entry = change.entry
    if entry is None:
        fields["type"] = "directory" if change.directory else "non-directory"
    else:
        fields.update(type=entry.type, size=entry.size, mode=f"{entry.mode:04o}")
        fields["changes"] = list(change.reasons)
        if entry.type == "file":
            fields["sha256"] = entry.sha256.hex()
        if entry.type == "symlink":
            fields.update(name_to_json(entry.link, "link"))
    # In JSON, a quote within a text has a backslash: so this can only be the key.
    before, after = json_line(fields).split(b'"login": ""', 1)
    return before + b'"login": ', after


def policy_line(config: Config) -> bytes:
    fields = {key: getattr(config, key) for key in POLICY_KEYS}
    return json_line({"version": PLAN_VERSION, **fields, "delete": config.delete.value})


def target_line(plan: TargetPlan) -> bytes:
    target = plan.target
    error = plan.error.kind if plan.error else None
    fields = {"login": target.login, "host": target.host, "port": target.port}
    return json_line({**fields, "remote_path": target.remote_path, "error": error})


def entry_lines(plans: Sequence[TargetPlan]) -> Iterator[tuple[TargetPlan, Change, bytes]]:
    """Yield each entry of the plans with its line. Those of equal plans are formatted once."""
    equal = collections.Counter(id(plan.changes) for plan in plans)
    pieces: dict[int, list[tuple[bytes, bytes]]] = {}
    for plan in plans:
        login = json.dumps(plan.target.login).encode()
        key = id(plan.changes)
        lines: Iterable[tuple[bytes, bytes]] = map(entry_line_parts, plan.changes)
        if equal[key] > 1:
            if key not in pieces:
                pieces[key] = list(lines)
            lines = pieces[key]
        for change, (before, after) in zip(plan.changes, lines):
            yield plan, change, before + login + after


def plan_lines(config: Config, plans: Sequence[TargetPlan]) -> Iterator[bytes]:
    """Yield a plan as JSON Lines. The same bytes are printed, stored, and hashed into the plan ID.

    First comes the line of the policy, then a line for each target, then one for each entry; they
    are sorted by login, then by path.
    """
    yield policy_line(config)
    yield from map(target_line, plans)
    for _, _, line in entry_lines(plans):
        yield line


def plan_id(config: Config, plans: Sequence[TargetPlan]) -> tuple[str, int]:
    """Return (the plan ID: the sha256 of the plan's lines, in hex; the size of these in bytes)."""
    digest = new_digest()
    size = 0
    for line in plan_lines(config, plans):
        digest.update(line)
        size += len(line)
    return digest.hexdigest(), size


def parse_plan_line(line: bytes) -> set[Change]:
    """Return {the change} of an entry's line of a plan, or set() for a target's line.

    Raises one of the errors that approve() catches, unless the line is byte for byte what
    plan_lines() prints of it: so nothing can be shown otherwise than it is approved.
    """
    fields = json.loads(line)
    if "kind" not in fields:
        known = ("login", "host", "port", "remote_path", "error")
        check_line(line, json_line({key: fields[key] for key in known}))
        return set()
    entry = None
    if fields["kind"] in ("added", "modified"):
        link = name_from_json(fields, "link") if fields["type"] == "symlink" else b""
        sha256 = bytes.fromhex(fields.get("sha256", ""))
        entry = Entry(
            fields["type"], int(fields["mode"], 8), int(fields["size"]), sha256, link=link
        )
    elif fields["kind"] not in CHANGE_KINDS:
        raise ValueError("an unknown kind")
    reasons = tuple(fields.get("changes", ()))
    directory = fields["type"] == "directory"
    change = Change(
        check_relative(name_from_json(fields)), fields["kind"], directory, reasons, entry
    )
    before, after = entry_line_parts(change)
    check_line(line, before + json.dumps(str(fields["login"])).encode() + after)
    # A set hashes the change: that raises TypeError for a list where a text belongs.
    return {change}


def check_line(line: bytes, printed: bytes) -> None:
    if line != printed:
        raise ValueError("it is not as offsync prints it")


# --- Trust core: approval -----------------------------------------------------------------------

MANY_DELETIONS = 10  # max_delete applies from this many on


# What reading a line that is none of a plan can raise.
NO_PLAN_LINE = (
    UsageError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def approve(
    context: RunContext, plans: Sequence[TargetPlan], reviewed: Iterable[bytes], name: str
) -> list[TargetPlan]:
    """Return the plans as far as a reviewed plan approves them.

    A target is reviewed if the reviewed plan compared it without an error; any other target fails
    alone. Each change of a reviewed target must be in the reviewed plan, byte for byte. A leftover
    or kept entry that is not in it is not touched. With a change that only the reviewed plan lists
    (it is made, or for a target that is not in this run) the source must still agree: it must hold
    what was added or modified, and lack what was to be deleted. Raises OffsyncError that names the
    differences, UsageError for what is no plan.
    """
    compared = [plan for plan in plans if not plan.error]
    replan = context.typed.again(command="plan", plan=None)
    # What is not approved yet, by the digests of its lines: there may be millions.
    unapproved: dict[bytes, tuple[Target, Change | None]] = {}
    for plan in compared:
        unapproved[new_digest(target_line(plan)).digest()] = plan.target, None
    for plan, changed, line in entry_lines(compared):
        unapproved[new_digest(line).digest()] = plan.target, changed
    done: set[Change] = set()
    differing: list[str] = []
    lines = iter(reviewed)
    # An empty file has no line of the policy.
    for number, line in enumerate(itertools.chain([next(lines, b"")], lines), 1):
        try:
            if number == 1:
                check_policy(context, line)
            elif not unapproved.pop(new_digest(line).digest(), None):
                done |= parse_plan_line(line)
        except NO_PLAN_LINE:
            raise UsageError(
                f"plan {quote_text(name)}:{number}: not a line of a plan exactly as this version "
                "of offsync prints it",
                "use the unmodified output of 'offsync plan --json'",
                ("or have a new plan reviewed:", replan),
            ) from None
    other_reasons = [why for why in (not_done(context.source, change) for change in done) if why]
    unreviewed = {target for target, change in unapproved.values() if change is None}
    # Leftovers and kept entries that the review does not list, which are not touched.
    spared: dict[Target, set[bytes]] = {}
    differing_logins: set[str] = set()
    for target, change in unapproved.values():
        if change and change.kind in ("leftover", "kept"):
            spared.setdefault(target, set()).add(change.path)
        elif change and target not in unreviewed:
            what = "now exists only on the target"
            if change.entry:
                what = f"would be {change.kind}, which was not reviewed"
            differing.append(f"{target.login}: {quote_path(change.path)} {what}")
            differing_logins.add(target.login)
    if len(unreviewed) == len(compared) > 0:
        other_reasons.append("it covers none of these targets")
    differing += other_reasons
    if differing:
        hints = [("have a new plan reviewed:", replan)]
        if len(differing_logins) < len(compared) and not other_reasons:
            excepted = [*context.typed.excepted, *sorted(differing_logins)]
            hints.append(("or leave those targets out:", context.typed.again(excepted=excepted)))
        raise OffsyncError(
            "refused, nothing was sent: the current plan is not the reviewed plan "
            f"{quote_text(name)}: {join_first(sorted(set(differing)), '; ')}",
            *hints,
        )
    approved = []
    for plan in plans:
        if plan.target in unreviewed:
            error = failure(plan.target, "not-reviewed")
            plan = TargetPlan(plan.target, plan.connection, error=error)
        elif plan.target in spared:
            remaining = (c for c in plan.changes if c.path not in spared[plan.target])
            plan = plan._replace(changes=tuple(remaining))
        approved.append(plan)
    return approved


def check_policy(context: RunContext, reviewed: bytes) -> None:
    """Raise OffsyncError unless a reviewed plan's first line is the policy of this run.

    A run always has its own policy, never the plan's. Raises ValueError, KeyError, TypeError,
    AttributeError or UsageError for what is no such line.
    """
    now = json.loads(policy_line(context.config))
    then = json.loads(reviewed)
    deletion = Deletion(then["delete"])
    validate_absolute_path(then["source"], "source")
    printed = {**{key: then[key] for key in now}, "delete": deletion.value}
    check_line(reviewed, json_line(printed))
    if json.dumps(then["version"]) != json.dumps(now["version"]):
        raise ValueError("it is of another version of offsync")
    # As text, since to Python 1 == True.
    pairs = [(key, json.dumps(then[key]), json.dumps(now[key])) for key in now]
    differing = [(key, old, new) for key, old, new in pairs if old != new]
    if not differing:
        return
    typed = context.typed
    source = None if then["source"] == typed.configured.source else then["source"]
    wanted = None if deletion is typed.configured.delete else deletion
    replan_hint = ("have a new plan reviewed:", typed.again(command="plan", plan=None))
    hints: list[Hint] = ["restore the policy of the plan in the config", replan_hint]
    by_option = all(key in ("source", "delete") for key, _, _ in differing)
    if by_option and wanted is not Deletion.REFUSE:
        again = typed.again(source=source, deletion=wanted)
        hints = [("apply it with its own policy:", again), replan_hint]
    raise OffsyncError(
        "refused, nothing was sent: the policy is not that of the reviewed plan: "
        + ", ".join(f"{key} was {old}, is {new}" for key, old, new in differing),
        *hints,
    )


def not_done(source: Source, change: Change) -> str:
    """Return how the source contradicts a reviewed change, "" if it agrees; hashes if it must."""
    path = change.path
    entry = change.entry
    if change.kind == "missing" and exists_below(source.root, path):
        return f"{quote_path(path)} existed only on a target, but is now in the source"
    if entry is None:
        return ""
    now = source.entries.get(path)
    same = now._replace(md5=b"") == entry if now else source.still_matches(path, entry)
    return "" if same else f"{quote_path(path)} in the source is no longer what was reviewed"


def colliding_names(paths: Iterable[bytes], existing: Iterable[bytes]) -> set[bytes]:
    """Return the existing names that a file system may take for one of the paths, and these paths.

    Also for a directory above a path, since the file system would merge the two directories.
    """
    wanted: dict[str, set[bytes]] = {}
    for path in paths:
        for place in (path, *above(path)):
            wanted.setdefault(casefold_nfc(place), set()).add(place)
    found: set[bytes] = set()
    if not wanted:
        return found
    for name in existing:
        similar = wanted.get(casefold_nfc(name), set()) - {name}
        if similar:
            found |= {name, *similar}
    return found


def policy_violation(context: RunContext, plans: Sequence[TargetPlan]) -> OffsyncError | None:
    """Return why none of these plans may be carried out, reviewed or not; None if all may."""
    config = context.config
    allowed = config.delete is Deletion.ALLOW
    gone = ("missing", "leftover") if allowed else ("missing",)
    # Where deletions are refused anyway, this only gives a better message: then rsync is not run
    # for it (context.included), unless the scan found nothing at all.
    check_empty = config.delete is not Deletion.REFUSE or not context.source.entry_count
    if check_empty and any(plan.changes_of(*gone) for plan in plans) and not context.included:
        return OffsyncError(
            f"the source {quote_text(config.source)} is empty after the excludes, and an empty "
            "source never deletes",
            "check that it is mounted and filled",
        )
    facts: list[str] = []
    hints: list[Hint] = []
    for kind, permitted in (("missing", allowed), ("modified", config.overwrite)):
        concerned = [plan for plan in plans if plan.changes_of(kind)]
        if concerned and not permitted:
            fact, ways = describe_forbidden_changes(context, kind, plans, concerned)
            facts.append(fact)
            hints += ways
    return OffsyncError("; and ".join(facts), *hints) if facts else None


def review_required(
    context: RunContext, plans: Sequence[TargetPlan], name: str = ""
) -> OffsyncError | None:
    """Return why these plans, which policy_violation() allows, need a review; None if they do not.

    name: the ID under which this plan was stored, if it was.

    They need one if MANY_DELETIONS or more entries would be deleted, and a target would shrink by
    more than max_delete percent: the source may be an empty mount. So do deletions on a file system
    that takes two names for one. On a target that ignores case and holds README, where the source
    has Readme, rsync reports README as only on the target, and Readme as equal: deleting README
    deletes the only copy. If the plan adds the name of the source, too, then the target tells the
    two apart. With delete: keep, a kept file could be overwritten in the same way.
    """
    allowed = context.config.delete is Deletion.ALLOW
    review = ("review the plan, then apply it by its ID:", context.typed.again(command="plan"))
    if name:
        review = ("apply this plan:", context.typed.again(command="apply", plan=name))
    for plan in plans:
        gone = plan.changes_of("missing", "leftover") if allowed else plan.changes_of("kept")
        new = {change.path for change in plan.changes_of("added")}
        if not gone:
            continue
        after = len(context.included)
        before = after - len(new) + len(gone)
        percent = context.config.max_delete
        if allowed and len(gone) >= MANY_DELETIONS and 100 * after < (100 - percent) * before:
            return OffsyncError(
                f"{plan.target.login} would shrink by more than max_delete ({percent}%): "
                f"{before} entries now, {after} afterwards",
                f"check that the source {quote_text(context.config.source)} is mounted and filled",
                ("if this is intended, " + review[0], review[1]),
                "or raise max_delete in the config",
            )
        names = colliding_names((change.path for change in gone), context.included - new)
        if names:
            return OffsyncError(
                f"{plan.target.login}: these names may be one file on the target (case or Unicode "
                "form), so that deleting or keeping one would delete or overwrite the other: "
                + quote_first(names),
                ("if it tells them apart, " + review[0], review[1]),
                "else rename the one in the source, apply, rename it back, and apply again",
            )
    return None


def describe_forbidden_changes(
    context: RunContext, kind: str, plans: Sequence[TargetPlan], concerned: Sequence[TargetPlan]
) -> tuple[str, list[Hint]]:
    """Return (why a kind of change that the policy forbids stops the run, the ways out)."""
    replaced = {
        change.path for plan in concerned for change in plan.changes if "type" in change.reasons
    }
    # Whether each of these entries lies below one that the source replaces.
    in_the_way = all(
        not replaced.isdisjoint(above(change.path))
        for plan in concerned
        for change in plan.changes_of(kind)
    )
    typed = context.typed._replace(command="apply")
    # With another policy, a reviewed plan would no longer fit.
    unreviewed = typed._replace(plan=None)
    total = sum(len(plan.changes_of(kind)) for plan in concerned)
    fact = plural(total, "entry exists", "entries exist") + " only on a target"
    them = "it" if total == 1 else "them"
    hints: list[Hint] = []
    if kind == "modified":
        fact = plural(total, "entry differs", "entries differ") + ", and overwriting is not allowed"
        hints.append(f"exclude {them}, or remove {them} on the target")
        hints.append('or allow it: "overwrite: true" in the config')
    elif in_the_way:
        fact += f", below an entry that the source replaces, so keeping {them} is impossible"
        hints.append("rename that entry in the source, or exclude it")
    else:
        fact += ", and deleting is not allowed"
        hints.append(f"add {them} to the source, or exclude {them}")
        kept = unreviewed.again(deletion=Deletion.KEEP)
        hints.append((f"leave {them} on the target, for this run:", kept))
    if kind == "missing":
        review = unreviewed.again(command="plan", deletion=Deletion.ALLOW)
        look = "see what would be deleted; to allow it, type apply instead of plan:"
        hints.append((look, review))
    if len(concerned) < len(plans):
        excepted = [*typed.excepted, *(plan.target.login for plan in concerned)]
        those = "that target" if len(concerned) == 1 else "those targets"
        hints.append((f"leave {those} out:", typed.again(excepted=excepted)))
    named = []
    for plan in concerned:
        paths = {change.path for change in plan.changes_of(kind)}
        # And the entries of the source that replace the directories above.
        paths |= {place for path in paths for place in above(path) if place in replaced}
        named.append(f"{plan.target.login}: {quote_first(paths)}")
    return f"{fact}: {join_first(named, '; ')}", hints


# --- Trust core: delivery -----------------------------------------------------------------------

# --files-from sends exactly what is listed (no -r: directories without their contents); -ii reports
# what needed nothing, too; progress2 prints a line each second, so that silence means something.
# --delay-updates renames all files at the end, and an interrupted run resumes from what it left in
# .~tmp~. Never --partial-dir, --partial or --temp-dir: some releases lose files or leave half a
# file under the live name.
RSYNC_SEND = ("-ii", "-lptO", "--from0", "--files-from=-", "--info=progress2")
# -I: no quick check, which a file with a forged time stamp would pass.
RSYNC_CONTENT = ("-I", "--delay-updates")
RSYNC_UNSTAGED = ("-I",)  # for a second attempt: see verify_sent()
RSYNC_MODES = ("--size-only",)  # the plan found the content equal: only the mode is to be set
RSYNC_SENT = b"%C %B %b %i %n//%L"
# Deletes what the include rules name, and protects all else. The first filter hides every source
# entry but directories, so a hostile target has no file to ask for. The config's rules are not
# passed: a "+ " rule would permit deletions that nobody planned. --from0 must stand before
# --include-from. (--delete-missing-args fails in several releases.)
RSYNC_DELETE = (
    *("--filter=hide,! */", "-r", "--delete", "--existing", "--ignore-existing"),
    *("--from0", "--include-from=-", "--exclude=*"),
)
# Seconds without a byte while sending; "timeout" may be longer. Here no side hashes in silence, and
# if the target's rsync is killed, only this limit ends the pass.
SEND_TIMEOUT = 300
RESCAN_DEADLINE = 15.0  # seconds to learn what arrived after a failure


class Comparison(NamedTuple):
    """How a target compares with the source, as far as one pass looked."""

    differs: dict[bytes, Change]  # of what the source has
    # Only on the target; without kept entries, and without leftovers that are not to be deleted.
    extraneous: set[bytes]


class Delivery:
    """Carries one target's plan out and verifies it."""

    def __init__(self, context: RunContext, plan: TargetPlan) -> None:
        self.context = context
        self.plan = plan
        self.connection = plan.connection
        self.login = plan.target.login
        self.source = context.source
        self.to_send = [change for change in plan.changes if change.entry]
        allowed = context.config.delete is Deletion.ALLOW
        gone = plan.changes_of("missing", "leftover") if allowed else ()
        self.planned_gone = {change.path: change.directory for change in gone}
        self.to_delete = set(self.planned_gone)
        self.retyped: set[bytes] = set()  # of these, what has another type now than was planned
        # Files and symlinks that replace an entry of another type, which may be a directory.
        self.replacing = {c.path for c in self.to_send if "type" in c.reasons and not c.directory}
        self.bytes_sent: int | None = 0
        self.target_touched = False  # something may have changed on the target
        self.tried_to_delete: set[bytes] = set()
        self.outcome: Comparison | None = None  # at the end; None is unknown

    def run_delivery(self, record: Record) -> tuple[Record, OffsyncError | None]:
        """Send, delete and verify; return (the record of what became of it, why it failed)."""
        started = time.monotonic()
        result = "ok"
        failed: OffsyncError | None = None
        try:
            if self.plan.error:
                raise self.plan.error
            if self.to_send or self.to_delete:
                self.deliver()
            self.outcome = Comparison({}, set())
        except Cancelled:
            result = "interrupted"
            failed = OffsyncError("interrupted", "run apply again to finish")
        except (OffsyncError, OSError, MemoryError) as problem:
            result = "failed"
            failed = as_offsync_error(problem)
            # If the source changed, a comparison would mean nothing. A connection whose proofs
            # failed is asked nothing more.
            may_ask = getattr(problem, "kind", None) != "source-changed"
            may_ask = may_ask and self.connection.restriction_proved and self.connection.path_proved
            if self.target_touched and not self.outcome and may_ask:
                with contextlib.suppress(OffsyncError, OSError):
                    self.outcome = self.compare("hash", limit=RESCAN_DEADLINE)
        PROGRESS.update(self.login, None)
        changed, deleted = self.delivered() if self.target_touched or result == "ok" else ([], [])
        record = record._replace(
            result=result,
            error=getattr(failed, "why", failed.message) if failed else None,
            files_changed=changed,
            files_deleted=deleted,
            bytes_sent=self.bytes_sent,
            seconds=round(time.monotonic() - started, 3),
        )
        return record, failed

    def delivered(self) -> tuple[list[str] | None, list[str] | None]:
        """Return what was delivered and what was deleted, None where that is not known.

        A file whose mode differs has been delivered.
        """
        if not self.outcome:
            return None, None
        changed = []
        for change in self.to_send:
            left = self.outcome.differs.get(change.path)
            only_mode = left is not None and left.reasons == ("mode",)
            if left is None or (only_mode and change.reasons != ("mode",)):
                changed.append(quote_name(change.path))
        deleted = self.tried_to_delete - self.outcome.extraneous
        return changed, [quote_name(path) for path in sorted(deleted)]

    def deliver(self) -> None:
        """Do what the plan lists: files and directories, modes, symlinks, then deletions.

        Each step is verified before the next one relies on it: no symlink points at what has not
        arrived, and nothing is deleted before what replaces it is there. What stands in a directory
        that a file or symlink replaces must go first, to make way.
        """
        links = [change for change in self.to_send if change.is_symlink]
        others = [change for change in self.to_send if not change.is_symlink]
        modes = [c for c in others if c.reasons == ("mode",)]
        content = [c for c in others if c.reasons != ("mode",)]
        self.check_protected_directories()
        self.delete_blocking(content)
        self.send(content, RSYNC_CONTENT)
        self.send(modes, RSYNC_MODES)
        found = self.verify_sent(others) if others else None
        self.delete_blocking(links)
        self.send(links, ())
        if links or not found:
            found = self.compare_whole_tree()
        if not found.differs and found.extraneous & self.to_delete:
            self.delete(self.to_delete, found.extraneous)
            found = self.compare_whole_tree()
            # A file system that ignores case may go on listing the source's name from its cache
            # after the deletion: so such files are compared by hash.
            twins = colliding_names(self.to_delete, self.context.included) & self.context.included
            if twins and not found.differs:
                found = found._replace(differs=self.compare("hash", sorted(twins)).differs)
        if found.differs or found.extraneous:
            self.outcome = found
            raise self.mismatch_error(found)

    def check_protected_directories(self) -> None:
        """Raise if an entry would replace a directory of the target that an exclude protects.

        A rule such as "uploads/" matches directories only. It does not match a file of the source
        with that name: so rsync would replace the target's directory by the file, and its protected
        contents would be lost. So rsync is asked whether the rules match directories of such names.
        """
        if not self.replacing or not self.context.config.exclude:
            return
        place = os.path.join(self.context.scratch, "rules-%d" % next(self.context.numbers))
        for path in self.replacing:
            os.makedirs(os.path.join(os.fsencode(place), path), exist_ok=True)
        directories = Source(place, self.context.config.exclude)
        protected = self.replacing - directories.list_included(self.context.rsync_path)
        if protected:
            raise self.target_error("protected", protected)

    def delete_blocking(self, changes: Sequence[Change]) -> None:
        """Carry out the planned deletions below the directories that these entries replace."""
        replaced = self.replacing.intersection(change.path for change in changes)
        if replaced:
            blocking = {path for path in self.to_delete if not replaced.isdisjoint(above(path))}
            if blocking:
                self.delete(blocking, self.compare("quick").extraneous)

    def send(self, changes: Sequence[Change], how: Sequence[str]) -> None:
        """Send exactly these; raise TargetError unless what went over is what was planned."""
        if not changes:
            return
        config = self.context.config
        report = TransferReport(self.plan.target, self.to_send)
        options = [*RSYNC_SEND, *how]
        options += ["--ignore-existing"] if not config.overwrite else []
        options += ["--bwlimit=%d" % config.bwlimit] if config.bwlimit else []
        options += ["-z"] if config.compress else []
        total = format_bytes(size_to_send(changes))
        PROGRESS.update(self.login, "sending " + total)
        self.target_touched = True
        before = self.bytes_sent or 0
        # Unknown where rsync fails.
        self.bytes_sent = None
        with scratch_file(
            self.context.scratch, (files_from_entry(c.path) for c in changes)
        ) as names:
            try:
                result = self.connection.rsync_with_retry(
                    options,
                    stdin=names,
                    on_item=report.take,
                    item_format=RSYNC_SENT,
                    on_other=lambda line: PROGRESS.show_rsync(self.login, total, line),
                    sends=True,
                )
            except ValueError as error:
                raise failure(self.plan.target, "unexpected-report", str(error)) from None
        if result.status == 0:
            self.bytes_sent = before + report.bytes
        if report.mismatched:
            raise self.target_error("source-changed", report.mismatched)
        # rsync ends with 0 even where it could not create its staging directory.
        if result.status != 0 or b"Unable to create partial-dir" in result.stderr:
            raise self.explain(result)
        lost = {c.path: c.entry for c in changes if c.entry and c.path not in report.confirmed}
        if lost:
            changed = {
                path for path, entry in lost.items() if not self.source.still_matches(path, entry)
            }
            kind = "source-changed" if changed else "changed-meanwhile"
            raise self.target_error(kind, changed or set(lost))

    def target_error(self, kind: str, paths: Iterable[bytes]) -> TargetError:
        return failure(self.plan.target, kind, names=paths)

    def explain(self, result: Result) -> TargetError:
        """Return the error for a failed pass that sends, with colliding names if there are any."""
        error = self.connection.explain(result)
        if error.kind == "other":
            sent = (change.path for change in self.to_send)
            names = colliding_names(sent, self.context.included)
            error = self.target_error("name-collision", names) if names else error
        return error

    def verify_sent(self, sent: Sequence[Change]) -> Comparison | None:
        """Compare by hash what was sent; raise TargetError for what differs.

        If all entries were sent, or if a pass over the tree costs less than two sessions, the whole
        tree is compared, not a list: then its Comparison is returned, else None.
        """
        PROGRESS.update(self.login, "verifying " + plural(len(sent), "entry", "entries"))
        cheap = self.connection.plan_pass_seconds < 2 * self.connection.session_overhead
        cheap = cheap and self.context.config.verify != "quick"
        whole = cheap or len(self.to_send) == self.source.entry_count
        paths = [change.path for change in sent]
        found = self.compare("hash", None if whole else paths)
        different = set(paths).intersection(found.differs)
        # rsync 3.2.0 to 3.2.3 never puts a file in place that it finds in .~tmp~: such files are
        # sent once more, without --delay-updates.
        stuck = [
            change
            for change in sent
            if change.path in different
            and change.sends_content
            and staging_path(change.path) in self.plan.staged
        ]
        if stuck:
            self.send(stuck, RSYNC_UNSTAGED)
            whole = False
            found = self.compare("hash", paths)
            different = set(found.differs)
        if different:
            raise self.mismatch_error(Comparison({p: found.differs[p] for p in different}, set()))
        return found if whole else None

    def compare(
        self, how: str, paths: Sequence[bytes] | None = None, limit: float = 0
    ) -> Comparison:
        """Return how the whole tree compares, by how ("hash" or "quick").

        If paths are given, only these are compared, by hash.
        """
        options = RSYNC_PLAN[how] if paths is None else RSYNC_COMPARE
        changes = itemize(self.connection, options, paths, limit=limit)
        extraneous = set()
        keep = self.context.config.delete is Deletion.KEEP
        for path in [path for path, change in changes.items() if change.kind == "missing"]:
            change = changes.pop(path)
            if path in self.to_delete or not (keep or is_leftover(self.source, change)):
                extraneous.add(path)
            if self.planned_gone.get(path, change.directory) != change.directory:
                self.retyped.add(path)
        return Comparison(changes, extraneous)

    def compare_whole_tree(self) -> Comparison:
        """Return how the tree compares: what differs by size or time is compared by hash, too."""
        PROGRESS.update(self.login, "comparing again")
        found = self.compare("quick")
        # A quick check can be wrong: a hash is not.
        if found.differs:
            found = found._replace(differs=self.compare("hash", sorted(found.differs)).differs)
        return found

    def mismatch_error(self, found: Comparison) -> TargetError:
        """Return the error for what differs afterwards; names the source where that changed."""
        different = {*found.differs, *found.extraneous}
        suspects = [change for change in self.to_send if change.path in different]
        changed = [
            c.path
            for c in suspects[:1000]
            if c.entry and not self.source.still_matches(c.path, c.entry)
        ]
        if changed:
            return self.target_error("source-changed", changed)
        only_modes = all(change.reasons == ("mode",) for change in found.differs.values())
        if only_modes and not found.extraneous:
            return self.target_error("modes-not-kept", different)
        names = colliding_names(different, self.context.included | self.to_delete)
        return self.target_error("name-collision" if names else "differs", names or different)

    def delete(self, paths: set[bytes], extraneous: set[bytes]) -> None:
        """Delete these planned entries; none if others have appeared, or one has another type now.

        Raises TargetError for anything else that rsync reports: only these may go.
        """
        surprises = (extraneous - self.to_delete) | self.retyped
        if surprises:
            raise self.target_error("appeared", surprises)
        # What the source has got again since the plan is no longer only on the target: it stays.
        paths = paths & extraneous
        PROGRESS.update(self.login, "deleting " + plural(len(paths), "entry", "entries"))
        # When all contents of a directory are deleted that an entry replaces, rsync may delete the
        # directory itself, too: the rules let rsync into it.
        may_go = paths | self.replacing

        def judge(line: bytes) -> None:
            code = line[:11]
            name = unescape_rsync_name(line[12:]).rstrip(b"/")
            gone = code.startswith(b"*deleting") and name in may_go
            # Each name may be reported once, so that a target cannot go on for ever.
            may_go.discard(name)
            if not gone and not code.startswith(b".d"):
                raise failure(self.plan.target, "unexpected-report", "in a deletion", [name])

        # rsync must be let into the directories above. A rule that ends with a slash matches
        # directories only: not a file or symlink that has taken the place of one meanwhile.
        rules = set()
        for path in paths:
            rules.add(exact_filter_pattern(path) + (b"/" if self.planned_gone[path] else b""))
            rules.update(exact_filter_pattern(directory) + b"/" for directory in above(path))
        self.target_touched = True
        self.tried_to_delete |= paths
        with scratch_file(self.context.scratch, rules) as stream:
            result = self.connection.rsync_with_retry(RSYNC_DELETE, stdin=stream, on_item=judge)
        if result.status != 0:
            raise self.connection.explain(result)


def staging_path(path: bytes) -> bytes:
    directory, name = os.path.split(path)
    return os.path.join(directory, STAGING_DIR, name)


# --- Trust core: record, status and lock --------------------------------------------------------


def take_lock(state: StateDirectory, what: str, shared: bool = False) -> None:
    """Hold the lock until the process ends: writers one at a time, readers (shared) side by side.

    Raises OffsyncError if it is taken. A writer logs the runs that were killed. The descriptor is
    never closed, on purpose.
    """
    flags = os.O_RDWR | os.O_CREAT
    if shared and not os.access(state.path, os.W_OK):
        flags = os.O_RDONLY
    try:
        descriptor = os.open(state.lock_file, flags | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        # Of several readers, the one that began last, which may have ended.
        last = quote_output(read_file(state.lock_file, "lock", "try again"))
        raise OffsyncError(
            f"another offsync is running and holds the lock {quote_text(state.lock_file)}; last, "
            f"it was taken by {last or 'an unknown one'}",
            "try again when it has finished",
        ) from None
    except OSError as error:
        # There is no lock file, so no writer has ever been at work here.
        if flags == os.O_RDONLY and isinstance(error, FileNotFoundError):
            return
        raise OffsyncError(
            f"lock {quote_text(state.lock_file)}: {error.strerror}; nothing was sent or changed",
            "fix this, then try again",
        ) from None
    # This text only informs others: a full disk must not stop us here.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"offsync %s (process %d)\n" % (what.encode(), os.getpid()), 0)
    if not shared:
        log_killed_runs(state)


def open_log(state: StateDirectory, so_far: str = "") -> int:
    """Return a descriptor of the log, at its end. Raises OffsyncError, whose message ends with
    so_far.
    """
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        log = os.open(state.log, flags | os.O_NONBLOCK, 0o600)
        status = os.fstat(log)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        # A new file: make its name durable, too.
        if not status.st_size:
            sync_directory(os.path.dirname(os.path.realpath(state.log)))
        # A full disk may have cut the last record short: start a new line.
        if status.st_size and os.pread(log, 1, status.st_size - 1) != b"\n":
            os.write(log, b"\n")
        return log
    except OSError as error:
        raise OffsyncError(
            f"log {quote_text(state.log)}: cannot be written: {error.strerror}{so_far}",
            "fix this, then apply again",
        ) from None


def append_log(state: StateDirectory, record: Record) -> None:
    """Append one record with one write. Raises OffsyncError if it is not all there."""
    line = json_line(record._asdict())
    log = open_log(state)
    why = "no space left"
    try:
        written = os.write(log, line)
        os.fsync(log)
    except OSError as error:
        written = 0
        why = str(error.strerror)
    os.close(log)
    if written != len(line):
        raise OffsyncError(
            f"log {quote_text(state.log)}: the record could not be written: {why}",
            "free some space, or fix the permissions, then apply again",
        )


def write_status(state: StateDirectory, record: Record) -> None:
    """Replace a target's status, last/LOGIN: its newest record, without the names."""
    make_directory(os.path.realpath(state.last), 0o700)
    status = record._replace(files_changed=None, files_deleted=None)
    write_atomically(os.path.join(state.last, record.login), [json_line(status._asdict())], 0o600)


def log_killed_runs(state: StateDirectory) -> None:
    """Log the deliveries that were killed before they could do so. The caller holds the lock."""
    for name, record in read_statuses(state).items():
        if record.result == "started":
            why = (
                "offsync was killed; it is unknown what was delivered; the next apply completes it"
            )
            record = record._replace(result="interrupted", error=why)
            append_log(state, record)
            write_status(state, record)
            warn(f"the last apply to {quote_text(name)} was killed; another apply completes it")


class RunLog:
    """The records of one apply, one for each target, whatever ends the run.

    deliver() and finish() are called by the threads of the targets.
    """

    def __init__(self, state: StateDirectory, config: Config, targets: Sequence[Target]) -> None:
        self.state = state
        self.locked = False
        who = user_name(os.getuid())
        sudo = os.environ.get("SUDO_USER")
        who += f" (sudo by {sudo})" if sudo else ""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        # By login. files_changed is [] until the delivery begins, and None, unknown, from then on.
        self.unfinished: dict[str, Record] = {}
        for target in targets:
            record = Record(when, who, target.host, target.login, config.source)
            self.unfinished[target.login] = record._replace(
                files_changed=[], files_deleted=[], bytes_sent=0
            )
        self.unreported: dict[str, tuple[Record, OffsyncError | None]] = {}  # logged, not shown

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Finish the records that have no end yet, with the error that ended the run."""
        for record in list(self.unfinished.values()) if error else ():
            begun = record.files_changed is None
            result = "interrupted"
            why = OffsyncError("interrupted", "run apply again to finish")
            if error and ended_by_error(error) and not begun:
                result = "refused"
                why = as_offsync_error(error)
            self.finish(record._replace(result=result, error=why.message, seconds=0.0), why)

    def identify(self, plan: str) -> None:
        self.unfinished = {
            login: record._replace(plan=plan) for login, record in self.unfinished.items()
        }

    def deliver(self, context: RunContext, plan: TargetPlan) -> None:
        """Carry out one target's plan and log it at once, whatever becomes of the others."""
        record = self.unfinished[plan.target.login]
        failed = None
        try:
            if plan.changes:
                unknown = record._replace(files_changed=None, files_deleted=None, bytes_sent=None)
                write_status(self.state, unknown)
                self.unfinished[record.login] = unknown
            record, failed = Delivery(context, plan).run_delivery(record)
        except OffsyncError as error:
            failed = error
            record = record._replace(result="failed", error=error.message)
        self.finish(record, failed)

    def finish(self, record: Record, failed: OffsyncError | None) -> None:
        """Log what became of a target, and store its status. What cannot be recorded has failed.

        The status tells what a target has: a run that was refused leaves it alone. So does a run
        without the lock, since the status is the other run's.
        """
        why = record.error or "verified, but not logged"
        try:
            append_log(self.state, record)
            why = record.error or "verified and logged, but this outcome cannot be stored"
            if self.locked and record.result != "refused":
                write_status(self.state, record)
        except OffsyncError as error:
            failed = error
            if error.message not in why:
                record = record._replace(result="failed", error=f"{why}; {error.message}")
            # If the log failed, the status is still "started", which the next run would take for
            # that of a killed run.
            with contextlib.suppress(OffsyncError):
                if self.locked and self.unfinished[record.login].files_changed is None:
                    write_status(self.state, record)
        self.unreported[record.login] = record, failed
        self.unfinished.pop(record.login)


def ended_by_error(error: BaseException | None) -> bool:
    """Return whether an error ended a run, not a signal: a refusal, or a failure of all targets."""
    return isinstance(error, Exception) and not isinstance(error, Cancelled)


# === The trust core ends here. Files and programs ===============================================

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # where sshd lives; often not in a user's PATH
FILE_LIMIT = 1 << 26  # bytes of a config, key or status that are read
MIN_RSYNC = (3, 1, 2)  # the first with rrsync -wo
# macOS ships openrsync as rsync.
BREW_RSYNC = """
    /opt/homebrew/bin/rsync
    /usr/local/bin/rsync
    /home/linuxbrew/.linuxbrew/bin/rsync
""".split()


def find_program(name: str) -> str:
    """Return the path of a system program; the error names the command that installs it."""
    found = shutil.which(name) or shutil.which(name, path=SBIN)
    if not found:
        raise OffsyncError(
            f"{name}: the program is not installed", ("install it:", "offsync install-deps")
        )
    return os.path.abspath(found)


def parse_rsync_version(output: bytes) -> tuple[int, int, int] | None:
    """Return the version that "rsync --version" prints, None for openrsync and unknown programs."""
    pattern = rb"rsync\s+version\s+v?(\d+)\.(\d+)\.(\d+)\S*\s+protocol version \d+"
    match = None if b"openrsync" in output else re.search(pattern, output[:4096])
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def find_rsync() -> tuple[str, tuple[int, int, int]]:
    """Return (path, version) of a real rsync: $OFFSYNC_RSYNC, PATH's or brew's."""
    named = os.environ.get("OFFSYNC_RSYNC")
    problem = "the program is not installed"
    hints: list[Hint] = [
        ("install it:", "offsync install-deps"),
        "or name another with OFFSYNC_RSYNC",
    ]
    if named:
        problem = f"{quote_text(named)}, which OFFSYNC_RSYNC names, is no program"
        hints = ["correct OFFSYNC_RSYNC, or unset it"]
    for name in [named] if named else ["rsync", *BREW_RSYNC]:
        found = shutil.which(name)
        if not found:
            continue
        path = os.path.abspath(found)
        printed = run_program(
            [path, "--version"], limit=SESSION_DEADLINE, env=child_environment(for_rsync=True)
        )
        version = parse_rsync_version(printed.stdout)
        if version and version >= MIN_RSYNC:
            return path, version
        what = "rsync %d.%d.%d, too old" % version if version else "openrsync or no rsync at all"
        if printed.status != 0:
            what = f"a program that fails: {quote_output(printed.stderr) or 'it says nothing'}"
        problem = f"{quote_text(path)} is {what}"
    least = "%d.%d.%d" % MIN_RSYNC
    raise OffsyncError(f"rsync: {problem}; offsync needs rsync {least} or newer", *hints)


def make_scratch() -> str:
    """Return a new private directory whose path is short and plain enough for control sockets.

    The path of a socket may have 104 bytes on macOS. Up to 24 bytes follow the parent ("/offsync-",
    8 random characters, "/" and a number), and ssh appends 17 more while it binds the socket.
    Nobody else may be able to put another directory in place of this one.
    """
    import tempfile

    for parent in map(os.path.realpath, (os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp")):
        plain_name = re.fullmatch(r"[A-Za-z0-9/._+-]+", parent) and len(parent) + 24 < 104 - 17
        if plain_name and os.access(parent, os.W_OK | os.X_OK):
            made = tempfile.mkdtemp(prefix="offsync-", dir=parent)
            if not untrusted_writer(made):
                return made
            os.rmdir(made)
    raise OffsyncError(
        "no usable temporary directory",
        "set TMPDIR to a writable directory with a short path (at most 62 characters of A-Z a-z "
        "0-9 . _ + - /), in which nobody else can replace what is yours",
    )


def start_reaper(scratch: str, ssh: str) -> tuple[int, int]:
    """Fork a process that cleans up when offsync ends, even by SIGKILL; return (PID, a pipe).

    It waits for the other end of the pipe to close. Then it ends every ssh connection whose control
    socket lies in scratch, so that the rsyncs of a killed run end, too, and removes scratch. To be
    called before any thread is started.
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
        # Else the lock would be held until this process ends: its descriptor is inherited.
        os.closerange(3, reader)
        os.closerange(reader + 1, 1024)
        # This returns when no process holds the other end any more.
        os.read(reader, 1)
        signal.alarm(20)  # seconds, should clean_up() hang
        clean_up(scratch, ssh)
        os._exit(0)
    finally:
        os._exit(1)


def clean_up(scratch: str, ssh: str) -> None:
    """End every ssh connection whose control socket lies in scratch, and remove scratch."""
    # One may vanish at any time, so none is looked at.
    sockets = [e.path for e in os.scandir(scratch) if not e.is_file() and not e.is_dir()]
    # ssh wants a host, "offsync", but the ControlPath, which follows -o, tells which connection.
    words = [ssh, *"-F /dev/null -O exit offsync -o".split()]
    for pid in [os.spawnv(os.P_NOWAIT, ssh, [*words, "ControlPath=" + path]) for path in sockets]:
        os.waitpid(pid, 0)
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def scratch_directory() -> Iterator[str]:
    made = make_scratch()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def scratch_file(scratch: str, names: Iterable[bytes] = ()) -> BinaryIO:
    """Return an open, unnamed temporary file that holds these names, each ended by a NUL byte."""
    import tempfile

    stream = tempfile.TemporaryFile(dir=scratch)
    stream.writelines(name + b"\0" for name in names)
    stream.seek(0)
    return stream


def read_file(path: str, what: str, *missing: Hint) -> bytes:
    """Return what a small file or a pipe holds. Raises OffsyncError.

    what: the purpose of the file, for that error. missing: the hints if it does not exist.
    """
    try:
        # A FIFO that nobody writes to is empty, instead of waiting for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            os.set_blocking(descriptor, True)
            data = stream.read(FILE_LIMIT)
    except FileNotFoundError:
        raise UsageError(f"{what} {quote_text(path)}: does not exist", *missing) from None
    except OSError as error:
        hint = "fix this, then try again"
        if isinstance(error, PermissionError):
            hint = f"make it readable for the account {user_name(os.geteuid())}"
        raise OffsyncError(f"{what} {quote_text(path)}: {error.strerror}", hint) from None
    if len(data) == FILE_LIMIT:
        limit = format_bytes(FILE_LIMIT)
        raise UsageError(f"{what} {quote_text(path)}: larger than {limit}", "name the right file")
    return data


def write_atomically(path: str, data: Iterable[bytes], mode: int) -> None:
    """Replace a file, so that it has the old contents or the new ones whenever the power fails.

    A temporary neighbour gets owner and mode, then the data, is made durable, and is renamed. A
    symlink at the path stays one. Raises OffsyncError, and leaves no neighbour.
    """
    path = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), ".offsync-" + os.urandom(8).hex())
    try:
        old = os.stat(path) if os.path.exists(path) else None
        # /dev/null, for example, to which a symlink may lead.
        if old and not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                if old:
                    os.fchown(descriptor, old.st_uid, -1)
                    # Not everybody may give a file a group that is not their own.
                    with contextlib.suppress(OSError):
                        os.fchown(descriptor, -1, old.st_gid)
                os.fchmod(descriptor, mode)
                stream.writelines(data)
                stream.flush()
                os.fsync(descriptor)
            os.rename(temporary, path)
            sync_directory(os.path.dirname(path))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise OffsyncError(
            f"{quote_text(path)}: cannot be written: {error.strerror}",
            "fix this, then try again",
        ) from None


def sync_directory(path: str) -> None:
    """Sync a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: str, mode: int) -> None:
    """Create a directory if it is absent, and those above it with mode 0755 (by main()'s umask).

    The mode of a directory that exists stays as it is.
    """
    try:
        os.makedirs(path, mode, exist_ok=True)
    except OSError as error:
        raise OffsyncError(
            f"{quote_text(path)}: cannot be created: {error.strerror}",
            f"create it, owned by {user_name(os.geteuid())}, or choose another place",
        ) from None


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def untrusted_writer(
    path: str, itself: bool = True, seen: set[tuple[str, bool]] | None = None
) -> OffsyncError | None:
    """Return an error that says who else could replace what lies at an absolute path, or None.

    All existing directories above the path are judged, and, where a component is a symlink, those
    above what it leads to. itself: what lies at the path is judged, too. seen: (path, itself) of
    what is judged already.
    """
    path = path.rstrip("/")
    seen = set() if seen is None else seen
    if (path, itself) in seen:
        return OffsyncError(f"{quote_text(path)} is a symlink to itself") if itself else None
    seen.add((path, itself))
    place, name = os.path.split(path)
    found = None
    if name:
        found = untrusted_writer(place, False, seen) or judge_place(place or "/", name)
    if not found and os.path.islink(path):
        return untrusted_writer(os.path.join(place, os.readlink(path)), itself, seen)
    return found or (judge_place(path or "/") if itself else None)


def judge_place(place: str, entry: str = "") -> OffsyncError | None:
    """Return an error that says who else could change a directory, or a file; None if nobody can.

    Its owner must be root or this account, without write permission for the group or others (on
    Linux, an access control list shows as the group's bits). In a sticky directory (/tmp), others
    cannot replace an entry that is ours, so it is accepted. What does not exist we shall make.
    """
    ours = (0, os.geteuid())
    try:
        status = os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return OffsyncError(f"{quote_text(place)} cannot be looked at: {error.strerror}")
    if status.st_uid not in ours:
        return OffsyncError(f"{quote_text(place)} belongs to {user_name(status.st_uid)}")
    mode = stat.S_IMODE(status.st_mode)
    following = os.path.join(place, entry)
    if entry and mode & stat.S_ISVTX and os.path.lexists(following):
        if os.lstat(following).st_uid in ours:
            return None
    if not mode & 0o022:
        return None
    who = "everybody" if mode & 0o002 else "its group"
    # chmod is suggested only for the path itself, and only if it is ours. A directory above it,
    # such as /srv/www, one with the sticky bit (/tmp), or /dev/null may be writable for others on
    # purpose.
    on_purpose = bool(entry) or stat.S_ISCHR(status.st_mode) or bool(mode & stat.S_ISVTX)
    hint = ("run:", f"chmod go-w {shlex.quote(place)}")
    if on_purpose or status.st_uid != os.geteuid():
        look = "see who may write to it; take that permission away, or choose another place:"
        hint = (look, f"ls -ld {shlex.quote(place)}")
    return OffsyncError(f"{who} may write to {quote_text(place)} (mode {mode:04o})", hint)


# --- The state directory --------------------------------------------------------------------------

PLANS_KEPT_DAYS = 30  # how long "plan" keeps plans for "apply --plan"
PLAN_LIMIT = 1 << 30  # bytes of a plan that is kept


def no_state_hints() -> list[Hint]:
    return [
        f'create it: "{offsync_command("init")} --source DIR"',
        "or work as the account that has the state, or set OFFSYNC_HOME",
    ]


def check_private(path: str) -> None:
    """Raise OffsyncError unless a file of the state exists, and nobody else may read it."""
    if not os.path.exists(path):
        raise OffsyncError(
            f"{quote_text(path)}: does not exist",
            "restore it",
            ("or create a new one, and link it on every target:", offsync_command("init")),
        )
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        hint: Hint = ("run:", f"chmod {mode & 0o700:o} {shlex.quote(path)}")
        # Another account's, such as in a mounted volume of secrets: we cannot change its mode.
        if status.st_uid != os.geteuid():
            owner = user_name(status.st_uid)
            hint = f"it belongs to {owner}; put a copy in its place that only you can read"
        raise OffsyncError(f"{quote_text(path)}: others may read it (mode {mode:04o})", hint)


def home_directory() -> str:
    """Return the home directory. Raises OffsyncError where HOME is another account's.

    After "sudo -u" (where it keeps HOME) and "su -m", HOME is still the caller's. Any HOME that
    this account owns is accepted.
    """
    home = os.path.expanduser("~")
    user = user_name(os.geteuid())
    try:
        own = pwd.getpwuid(os.geteuid()).pw_dir
        owner = os.stat(home).st_uid
    except KeyError:
        # A user ID without an account: there is nothing to compare HOME with.
        if home != "~":
            return home
        raise OffsyncError(
            f"the user ID {user} has no account, and HOME is not set", "set HOME or OFFSYNC_HOME"
        ) from None
    except OSError as error:
        raise OffsyncError(
            f"HOME {quote_text(home)}: {error.strerror}", f"set it to the home of {user}"
        ) from None
    if owner != os.geteuid() and os.path.realpath(home) != os.path.realpath(own):
        raise OffsyncError(
            f"HOME {quote_text(home)} belongs to {user_name(owner)}, and this is {user}",
            (f"run it with the home of {user}:", typed_again(user=user)),
        )
    return home


class StateDirectory:
    """$OFFSYNC_HOME and its files. Refused where others could change it."""

    def __init__(self) -> None:
        named = os.environ.get("OFFSYNC_HOME") or os.path.join(home_directory(), ".offsync")
        self.named = validate_absolute_path(named, "OFFSYNC_HOME")
        self.path = path = os.path.realpath(self.named)
        if re.search(r'["%$\\]', path):
            raise UsageError(
                f'OFFSYNC_HOME {quote_text(path)}: ssh would interpret one of " % $ \\ in it',
                "choose another directory",
            )
        names = "config.yaml id_ed25519 known_hosts operations.log lock plans last".split()
        paths = [os.path.join(path, name) for name in names]
        self.config, self.key, self.known_hosts, self.log, self.lock_file = paths[:5]
        self.plans, self.last = paths[5:]
        if os.path.lexists(path):
            self.check_writers()

    def check_writers(self) -> None:
        """Raise OffsyncError where others could change the directory or a file in it.

        It raises, too, where this account cannot read one of them: an unreadable file must not be
        taken for an absent one.
        """
        files = (self.config, self.key, self.known_hosts, self.log, self.lock_file)
        for path in (self.named, *files, self.plans, self.last):
            strangers = untrusted_writer(path)
            if strangers:
                raise OffsyncError(
                    f"state directory {quote_text(self.path)}: other users than "
                    f"{user_name(os.geteuid())} could modify it: {strangers.message}",
                    *(self.owner_hints(path) or strangers.hints),
                )
            access = os.R_OK | os.X_OK if os.path.isdir(path) else os.R_OK
            if os.path.exists(path) and not os.access(path, access):
                read_it = ("run:", f"chmod u+rwX {shlex.quote(path)}")
                hints = self.owner_hints(path) or [read_it]
                raise OffsyncError(f"{quote_text(path)}: Permission denied", *hints)

    def owner_hints(self, path: str) -> list[Hint]:
        """Return the hints if the state, or this file of it, belongs to another account."""
        if not os.path.exists(path):
            return []
        user = os.geteuid()
        real = os.path.realpath(path)
        owner = os.stat(self.path).st_uid
        if owner != user:
            again = typed_again(user=user_name(owner), state=self.path)
            why = f"it belongs to {user_name(owner)}; work as that account:"
            return [(why, again), "if that is a mistake, have root give it to this account"]
        owner = os.stat(path).st_uid
        # What a symlink leads to is not ours to give away.
        if owner != user and within(real, self.path):
            why = f"it belongs to {user_name(owner)}; if that is a mistake, as root:"
            return [(why, f"chown {user_name(user)} {shlex.quote(real)}")]
        return []

    def read_config(self) -> str:
        data = read_file(self.config, "config", *no_state_hints())
        # What is no UTF-8 becomes surrogates, which the reader refuses by line.
        return data.decode("utf-8", "surrogateescape")

    def load(self, source: str | None = None) -> Config:
        return validate_config(self.read_config(), self.config, source)

    def replace_in_config(self, key: str, block: Sequence[str]) -> None:
        """Replace one top-level key's lines in the config."""
        text = replace_block(self.read_config(), key, block)
        validate_config(text, self.config)
        write_atomically(self.config, [text.encode()], 0o600)

    def store_plan(self, config: Config, plans: Sequence[TargetPlan]) -> str:
        """Store a plan under its ID, for "apply --plan", and drop old ones; return the ID."""
        name, size = plan_id(config, plans)
        try:
            if size > PLAN_LIMIT:
                raise OffsyncError(f"it is larger than {format_bytes(PLAN_LIMIT)}")
            make_directory(os.path.realpath(self.plans), 0o700)
            write_atomically(os.path.join(self.plans, name), plan_lines(config, plans), 0o600)
            for entry in os.scandir(self.plans):
                with contextlib.suppress(OSError):  # another plan drops it, too
                    if entry.stat().st_mtime < time.time() - PLANS_KEPT_DAYS * 86400:
                        os.unlink(entry.path)
        except (OSError, OffsyncError) as error:
            warn(
                f"the plan could not be stored ({error})",
                "save it yourself: 'offsync plan --json > FILE', then 'offsync apply --plan FILE'",
            )
        return name

    def open_plan(self, typed: Typed, scratch: str) -> tuple[BinaryIO, str]:
        """Return (the reviewed plan, open; its ID) for --plan ID or FILE. Raises OffsyncError."""
        named = str(typed.plan)
        is_id = re.fullmatch("[0-9a-f]{64}", named)
        path = os.path.join(self.plans, named) if is_id else named
        # A copy: it may be a pipe, and may change meanwhile.
        digest = new_digest()
        copy = scratch_file(scratch)
        try:
            with open(path, "rb") as stream:
                # A device may have no end.
                if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                    raise OSError(errno.EINVAL, "it is a device")
                for chunk in iter(lambda: stream.read(1 << 18), b""):
                    digest.update(chunk)
                    copy.write(chunk)
            copy.seek(0)
        except OSError as error:
            hints: list[Hint] = [
                "give the whole ID that 'offsync plan' ends with (plans are kept for "
                f"{PLANS_KEPT_DAYS} days), or a file that 'offsync plan --json' printed"
            ]
            why = str(error.strerror)
            if is_id and isinstance(error, FileNotFoundError):
                why = "no plan with this ID is kept"
            if isinstance(error, FileNotFoundError) and re.fullmatch("[0-9a-f]{6,63}", named):
                why = f"{len(named)} of 64 digits"
                kept = os.listdir(self.plans) if os.path.isdir(self.plans) else []
                hints += [f"one that begins so is {n}" for n in sorted(kept) if n.startswith(named)]
            raise UsageError(f"plan {quote_text(named)}: {why}", *hints) from None
        if is_id and digest.hexdigest() != named:
            raise OffsyncError(
                f"plan {named}: the stored file was modified (its SHA-256 differs): "
                + quote_text(path),
                ("have a new plan reviewed:", typed.again(command="plan", plan=None)),
            )
        return copy, digest.hexdigest()


# --- The target side: link and unlink -----------------------------------------------------------

KEY_TYPES = (
    "ssh-ed25519 ecdsa-sha2-nistp256 ecdsa-sha2-nistp384 ecdsa-sha2-nistp521 ssh-rsa"
    " sk-ssh-ed25519@openssh.com sk-ecdsa-sha2-nistp256@openssh.com"
).split()
KEY_RESTRICTIONS = "no-port-forwarding,no-agent-forwarding,no-X11-forwarding,no-pty,restrict"
RRSYNC_PLACES = """
    /usr/bin/rrsync
    /usr/local/bin/rrsync
    /opt/homebrew/bin/rrsync
    /home/linuxbrew/.linuxbrew/bin/rrsync
    /usr/lib/rsync/rrsync
    /usr/share/rsync/scripts/rrsync
    /usr/share/doc/rsync/support/rrsync
    /usr/share/doc/packages/rsync/support/rrsync
    /usr/share/doc/rsync-*/support/rrsync
    /usr/share/doc/rsync/scripts/rrsync
    /usr/share/doc/rsync/scripts/rrsync.gz
""".split()
# Who can write in or above one of these will get a shell, sooner or later.
SYSTEM_TREES = """
    /bin /boot /dev /etc /lib /lib32 /lib64 /libx32 /Library /opt/cni /proc /run /sbin /sys /System
    /usr /var/spool
    /var/lib/apt /var/lib/cloud /var/lib/confexts /var/lib/containerd /var/lib/dkms /var/lib/docker
    /var/lib/dpkg /var/lib/extensions /var/lib/flatpak /var/lib/kubelet /var/lib/machines
    /var/lib/pacman /var/lib/polkit-1 /var/lib/portables /var/lib/rancher /var/lib/rpm
    /var/lib/snapd /var/lib/systemd
""".split()
NO_LOGIN_SHELLS = ("nologin", "false", "true", "sync")
# A line that link wrote, or that somebody wrote by hand as README shows it:
#   from="...",command="/bin/sh -c '...; exec /usr/bin/rrsync -wo /srv'",...,restrict TYPE BLOB
# from=, the guard and "restrict" may be absent. In the path of rrsync, blanks are escaped.
OFFSYNC_KEY_LINE = (
    r'(?:from="[^"]*",)?command="(?:/bin/sh -c [^"]*; exec )?(?P<rrsync>(?:\\.|[^\\\s;&|"])+)'
    r' -wo (?P<path>(?:\\"|[^"])*)",'
    + KEY_RESTRICTIONS.replace(",restrict", "(?:,restrict)?")
    + r" (?P<key>\S+ (?P<blob>\S+))(?: (?P<comment>.*))?"
)
# What the forced command does before it starts rrsync.
#
# Every rrsync up to 3.5.0 lets a thief of the key read files outside its path: rsync can be told to
# compare what it receives with other files of the target, and what they hold shows in the checksums
# that it sends back. These are files in basis directories (--compare-dest and its like), files of a
# similar name (--fuzzy, or "y" among short options), and backups (--backup-dir); a planted symlink
# leads to the file outside. offsync uses none of these options, so the guard refuses them.
#
# The guard splits the command as the shell does: at blank, tab and newline. rrsync also splits it
# at other blanks (vertical tab, U+00A0, ...), and an option behind one of these would escape the
# guard: so every other character that is not printable ASCII is refused, too. rrsync accepts no
# option in quotes.
FORCED_GUARD = (
    "case $SSH_ORIGINAL_COMMAND in *--compare-dest*|*--copy-dest*|*--link-dest*)"
    " echo offsync: basis directories are refused >&2; exit 1;; esac; set -f; "
    "case $(printf %s $SSH_ORIGINAL_COMMAND | LC_ALL=C tr -d [:print:] || echo x) in"
    " ?*) echo offsync: characters that are not ASCII are refused >&2; exit 1;; esac; "
    "for w in $SSH_ORIGINAL_COMMAND; do case $w in --fuzzy*|--backup-dir*) ;; --*) continue;;"
    " -*y*) ;; *) continue;; esac;"
    " echo offsync: fuzzy and backup directories are refused >&2; exit 1; done; exec "
)


def format_forced_command(rrsync: str, path: str, munge: bool = False) -> str:
    """Return the forced command: the guard, then rrsync, write-only, below path.

    Every login shell reads it alike: /bin/sh -c, and one word in apostrophes. What is special in a
    path gets a backslash. Double quotes around the path would not do: in authorized_keys they are
    written as \", and dropbear's sshd does not take that backslash away.
    """
    words = [rrsync, "-wo", *(["-munge"] if munge else []), path]
    escaped = (re.sub(r"(?![A-Za-z0-9@%+=:,./_-])[ -~]", r"\\\g<0>", word) for word in words)
    return f"/bin/sh -c '{FORCED_GUARD}{' '.join(escaped)}'"


def format_authorized_key(command: str, key: PublicKey, from_pattern: str = "") -> str:
    """Return the authorized_keys line (sshd(8))."""
    options = f'from="{from_pattern}",' if from_pattern else ""
    options += f'command="{command}",{KEY_RESTRICTIONS}'
    return " ".join(filter(None, (options, key.type, key.blob, key.comment)))


def written_path(line: re.Match[str]) -> str:
    """Return the path in a line that matches OFFSYNC_KEY_LINE."""
    # The apostrophe that ends the word of /bin/sh -c is part of the match.
    return re.sub(r"\\(.)", r"\1", line["path"].removeprefix("-munge ").strip("'"))


def edit_authorized_keys(text: bytes, key: PublicKey, new_line: str | None) -> tuple[bytes, str]:
    """Return (the new text; the old line of offsync's for this key, "" if there was none).

    new_line takes the place of the old line, or is appended; None removes the old line. Other lines
    stay byte for byte. Raises ValueError(line number) for a foreign line with the key.
    """
    kept = []
    was = ""
    new = b"" if new_line is None else os.fsencode(new_line) + b"\n"
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", text), 1):
        decoded = line.decode("utf-8", "surrogateescape").strip()
        written = re.fullmatch(OFFSYNC_KEY_LINE, decoded)
        # sshd skips these characters within a key.
        words = re.sub("[\v\f\r]", "", decoded).replace("\0", " ").split()
        if decoded.startswith("#") or key.blob not in words:
            kept.append(line)
        elif not written:
            raise ValueError(number)
        # A line of ours for another key, whose comment happens to hold the text of this key.
        elif written["blob"] != key.blob:
            kept.append(line)
        # The first line with this key is replaced; any further one goes.
        else:
            kept.append(b"" if was else new)
            was = was or decoded
    if new and not was:
        kept += [b"\n" if kept and not kept[-1].endswith(b"\n") else b"", new]
    return b"".join(kept), was


def find_authorized_key(key: PublicKey) -> tuple[str, bytes, str]:
    """Return (the real path of ~/.ssh/authorized_keys, what it holds, offsync's line for a key).

    The line is "" where there is none. Raises OffsyncError for a foreign line with the key.
    """
    path = os.path.realpath(os.path.expanduser("~/.ssh/authorized_keys"))
    text = read_file(path, "authorized_keys") if os.path.exists(path) else b""
    try:
        return path, text, edit_authorized_keys(text, key, None)[1]
    except ValueError as error:
        raise OffsyncError(
            f"{path}:{error}: this key is in a line that offsync did not write, and sshd uses the "
            "first line that has it",
            ("look at that line:", f"sed -n {error}p {shlex.quote(path)}"),
            (
                "if it may go, remove it, then try again:",
                f"sed -i.old '\\|{key.blob}|d' {shlex.quote(path)}",
            ),
        ) from None


def set_authorized_key(key: PublicKey, new_line: str | None) -> None:
    """Set offsync's line for a key, or remove it for None. A symlinked file stays a symlink."""
    path, text, _ = find_authorized_key(key)
    new, _ = edit_authorized_keys(text, key, new_line)
    if new != text:
        make_directory(os.path.dirname(path), 0o700)
        mode = stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else 0o600
        write_atomically(path, [new], mode)


def validate_public_key(text: str) -> PublicKey:
    """Return the public key of a line. Raises UsageError unless it is one that ssh-keygen reads.

    Only types that OpenSSH accepts by default, so no DSA.
    """
    give = "give the one line that 'offsync init' prints on the controller, without options"
    if "PRIVATE KEY" in text:
        raise UsageError("key: a private key, which must never leave the controller", give)
    key_type, blob, comment = [*text.strip().split(None, 2), "", "", ""][:3]
    fine = key_type in KEY_TYPES and re.fullmatch("[A-Za-z0-9+/]+=*", blob)
    if fine and not re.search(CONTROL_CHARS, text.strip()):
        with scratch_directory() as scratch:
            path = os.path.join(scratch, "key.pub")
            write_atomically(path, [(f"{key_type} {blob}\n").encode()], 0o600)
            accepted = run_program(
                [find_program("ssh-keygen"), "-l", "-f", path], limit=SESSION_DEADLINE
            )
        if accepted.status == 0:
            return PublicKey(key_type, blob, comment)
    raise UsageError(f"key: not one public key of a known type ({KEY_TYPES[0]}, ...)", give)


def find_rrsync(wanted: str | None) -> str:
    """Return the path of the wanted rrsync, or of the first executable one in the known places."""
    places = [path for place in RRSYNC_PLACES for path in sorted(glob.glob(place))]
    if wanted:
        places = [validate_absolute_path(wanted, "rrsync")]
    files = [path for path in places if os.path.isfile(path)]
    for path in files:
        if os.access(path, os.X_OK) and not path.endswith(".gz"):
            return path
    if files and os.path.basename(files[0]) not in ("rrsync", "rrsync.gz"):
        raise UsageError(f"rrsync {quote_text(files[0])}: not executable", "name an rrsync")
    if files:
        make = "install -m 755 %s /usr/local/bin/rrsync"
        if files[0].endswith(".gz"):
            make = "gunzip -c %s > /usr/local/bin/rrsync && chmod 755 /usr/local/bin/rrsync"
        hints: list[Hint] = [("as root, run:", make % shlex.quote(files[0]))]
        if wanted:
            hints.append(("then:", typed_again("--rrsync", "/usr/local/bin/rrsync")))
        raise OffsyncError(f"rrsync {files[0]}: not executable, or compressed", *hints)
    if wanted:
        raise UsageError(
            f"rrsync {quote_text(wanted)}: does not exist, or is no file",
            "name its place, or leave --rrsync away to look in the known ones",
        )
    raise OffsyncError(
        "rrsync: in none of the known places",
        ("install it:", "offsync install-deps --role target"),
        (
            "container images of EL 8 and 9 leave out documentation, and rrsync with it; there, as "
            "root, run:",
            "dnf -y --setopt=tsflags= reinstall rsync",
        ),
    )


# Stands in for ssh and sshd: drops the host's name, starts the forced command as sshd does.
FAKE_SSH_SCRIPT = (
    "import os, sys; os.environ['SSH_ORIGINAL_COMMAND'] = ' '.join(sys.argv[3:]); "
    "os.execv('/bin/sh', ['sh', '-c', sys.argv[1]])"
)


def probe_rrsync(rrsync: str, munge: bool) -> None:
    """Try what a thief of the key would do; raise OffsyncError if a file lands outside the path.

    A symlink is sent; then a file through it (before rsync 3.5.0 that writes anywhere); then rsync
    is told to move a delivered file through it, as a backup (with rrsync 3.2.7 to 3.4.4, this
    attack succeeds even beside rsync 3.5.0). The version would prove nothing, since distributions
    back-port fixes. Raises OffsyncError, too, if rrsync does not work.
    """
    with scratch_directory() as scratch:
        inside_it, outside, plant, through = (
            os.path.join(scratch, name) for name in ("inside", "outside", "plant", "through")
        )
        for directory in (inside_it, outside, plant, through, through + "/x"):
            os.mkdir(directory)
        os.symlink(outside, plant + "/x")
        for path in (plant + "/file", through + "/x/f"):
            with open(path, "wb") as stream:
                stream.write(b"offsync\n")
        # Without the guard: rrsync alone is tried.
        forced = format_forced_command(rrsync, inside_it, munge).replace(FORCED_GUARD, "exec ")
        words = (sys.executable, "-I", "-S", "-c", FAKE_SSH_SCRIPT, forced)
        shell = " ".join(map(quote_rsh_word, words))

        rsync = find_rsync()[0]

        def send(*options: str) -> Result:
            argv = [rsync, "-e", shell, *options, "host:."]
            return run_program(argv, limit=SESSION_DEADLINE, env=child_environment(for_rsync=True))

        sent = send("-rl", "--", plant + "/")
        if sent.status != 0 or not os.path.exists(inside_it + "/file"):
            raise OffsyncError(
                f"rrsync {rrsync}: does not work on this host",
                "it must be of the same release as rsync, 3.1.2 or newer (3.2.4 for "
                "--no-symlinks), with its interpreter: update rsync, or name another with --rrsync",
                said="rrsync: " + (quote_output(sent.stderr) or "nothing"),
            )
        send("-pR", "--no-implied-dirs", "--", through + "/./x/f")
        send("-rlbI", "--backup-dir=x", "--", plant + "/")
        if os.listdir(outside):
            hints: list[Hint] = ["update rsync and rrsync to 3.5.0, or to packages with the fix"]
            if not munge:
                without = typed_again("--no-symlinks")
                hints.append(("or, if you deliver no symlinks, link without them:", without))
            raise OffsyncError(
                f"rrsync {rrsync}: does not confine the key (a file was written through a symlink, "
                "as a test), so a stolen key amounts to a login shell",
                *hints,
                ("or accept that:", typed_again("--accept-risk", "rrsync")),
            )


def within(path: str, place: str) -> bool:
    """Return whether a path is a place, or lies below it."""
    return (path + "/").startswith(place.rstrip("/") + "/")


def check_quotable(what: str, path: str) -> None:
    """Raise UsageError if login shells or sshds read a path differently, even in apostrophes."""
    if re.search(r"""['"\\]""", path):
        raise UsageError(
            f"{what} {quote_text(path)}: holds a quote or a backslash, which login shells read in "
            "different ways",
            "choose another place",
        )


def validate_link_path(path: str, protected: Iterable[str], accept_risk: bool) -> str:
    """Return the real path that the key may write below. accept_risk skips check_link_risks().

    protected: paths that it must neither contain nor lie in.
    """
    real = os.path.realpath(validate_absolute_path(path, "path"))
    validate_absolute_path(real, "path")
    check_quotable("path", real)
    if os.path.lexists(real) and not os.path.isdir(real):
        raise UsageError(
            f"path {quote_text(real)}: not a directory", "choose another, or move it away"
        )
    homes = {os.path.realpath(home) for home in login_homes()}
    keys = [home + name for home in homes for name in ("/.ssh", "/.ssh/authorized_keys")]
    places = {*keys, *map(os.path.realpath, [*keys, *protected])}
    near = sorted(place for place in places if within(place, real) or within(real, place))
    if near or real in homes or real == "/":
        what = f"contains, or lies in, {quote_text(near[0])}" if near else "a home directory"
        raise UsageError(
            f"path {quote_text(real)}: {what}, so write access to it amounts to a login shell",
            CHOOSE_PATH,
        )
    if not accept_risk:
        check_link_risks(real)
    return real


def login_homes() -> set[str]:
    return {os.path.expanduser("~")} | {
        account.pw_dir
        for account in pwd.getpwall()
        if account.pw_dir and os.path.basename(account.pw_shell) not in NO_LOGIN_SHELLS
    }


CHOOSE_PATH = "choose a directory that holds only delivered files, such as /srv/app-data"


def check_link_risks(real: str) -> None:
    """Raise where it is risky to give a key this path. "--accept-risk path" waives it."""

    def refuse(why: str, *hints: Hint) -> NoReturn:
        accept = ("or accept that:", typed_again("--accept-risk", "path"))
        raise UsageError(f"path {quote_text(real)}: {why}", *hints, CHOOSE_PATH, accept)

    for place in sorted({*SYSTEM_TREES, *map(os.path.realpath, SYSTEM_TREES)}):
        if within(place, real) or within(real, place):
            refuse(f"it lies in or contains {place}, where the system keeps what it runs and reads")
    programs = map(os.path.realpath, filter(os.path.isabs, os.get_exec_path()))
    if any(within(place, real) for place in programs):
        refuse("it is or contains a directory of $PATH, where programs are found")
    default = os.path.realpath(os.path.expanduser("~/.offsync/sync"))
    if real != default and "/." in real:
        refuse("a component begins with a dot, where programs keep what they run and read")
    if os.path.lexists(os.path.join(real, ".ssh")):
        refuse("it has an entry .ssh, as the home of an account has")
    strangers = untrusted_writer(real, itself=False)
    if strangers:
        why = f"others could put another directory in its place: {strangers.message}"
        refuse(why, *strangers.hints)
    if os.path.isdir(real) and os.stat(real).st_mode & stat.S_ISVTX:
        refuse("others may keep files of their own in it (it has the sticky bit, like /tmp)")
    if os.path.isdir(real):
        owner = user_name(os.stat(real).st_uid)
        user = user_name(os.geteuid())
        # Root may write anywhere.
        if not os.access(real, os.W_OK | os.X_OK) or (user == "root" and owner != "root"):
            hint: Hint = (f"link it as {owner}:", typed_again(user=owner))
            if owner in ("root", user):
                look = f"see what it is for; if only for this, root can give it to {user}:"
                hint = (look, f"ls -ld {shlex.quote(real)}")
            refuse(f"it belongs to {owner}, and this links it for {user}", hint)


def validate_from_pattern(pattern: str) -> str:
    """Return a pattern list for from="..." (sshd(8))."""
    if not re.fullmatch(r"[A-Za-z0-9.:*?!,/_%\[\]-]+", pattern):
        raise UsageError(
            f"from {quote_text(pattern)}: not host names, addresses or patterns, with commas",
            "see sshd(8)",
        )
    return pattern


def read_key_argument(args: argparse.Namespace) -> str | None:
    """Return the text of --key, --key-file or a pipe; None where no key was given."""
    if args.key is not None:
        return str(args.key)
    if args.key_file is not None:
        data = read_file(args.key_file, "key file", "name the file of the public key")
    # No key comes from a terminal or /dev/null, nor where python reads this program from stdin.
    elif sys.argv[0] in ("-", "") or stat.S_ISCHR(os.fstat(0).st_mode):
        return None
    else:
        emit("reading the public key from standard input ...", error=True)
        data = sys.stdin.buffer.read(1 << 16)
        if not data.strip():
            return None
    return data.decode("utf-8", "replace").strip()


def current_account() -> pwd.struct_passwd:
    """Return this account; raise where there is none, or HOME is another's."""
    try:
        account = pwd.getpwuid(os.geteuid())
    except KeyError:
        raise OffsyncError(
            f"the user ID {os.geteuid()} has no account on this host, so nobody can log in as it",
            "run this as an account of this host",
        ) from None
    home_directory()
    return account


def sshd_settings(user: str) -> dict[str, list[str]]:
    """Return sshd's settings for a user (sshd -T), {} where that fails.

    It is given a host key made for this, since an ordinary user may not read the real ones.
    """
    settings: dict[str, list[str]] = {}
    # Errors are ignored: the key is linked already. Without the settings, link warns of less, and
    # guesses port and host keys.
    with contextlib.suppress(OffsyncError), scratch_directory() as scratch:
        key = os.path.join(scratch, "key")
        make_key(key, "")
        who = f"user={user},host=localhost,addr=127.0.0.1"
        argv = [find_program("sshd"), "-T", "-h", key, "-C", who]
        told = run_program(argv, limit=SESSION_DEADLINE)
        if told.status == 0:
            for line in os.fsdecode(told.stdout.replace(os.fsencode(key), b"")).splitlines():
                name, *words = line.split() or [""]
                settings.setdefault(name, []).extend(words)
    return settings


def warn_of_link(account: pwd.struct_passwd, sshd: dict[str, list[str]], delivery: str) -> None:
    """Warn of what makes sshd ignore the key, undoes its restriction, or spoils the delivery."""
    home = account.pw_dir
    user = account.pw_name
    if not os.access(delivery, os.W_OK):
        warn(f"{user} may not write to {quote_text(delivery)}", "change its owner or mode")
    ignored = "so sshd may ignore the key (StrictModes)"
    for path, consequence in (
        (delivery, "so others than the key can change what is delivered"),
        ("~", ignored),
        ("~/.ssh", ignored),
        ("~/.ssh/authorized_keys", ignored),
    ):
        strangers = judge_place(os.path.realpath(os.path.expanduser(path)))
        if strangers:
            warn(f"{strangers.message}, {consequence}", *strangers.hints)
    if os.path.realpath(os.path.expanduser("~")) != os.path.realpath(home):
        warn(
            f"HOME is {os.path.expanduser('~')}, but sshd reads the account's home {home}",
            "run link as the account itself",
        )
    files = sshd.get("authorizedkeysfile", [".ssh/authorized_keys"])
    places = [
        os.path.join(home, f.replace("%h", home).replace("%u", user)) for f in files if f != "none"
    ]
    if os.path.join(home, ".ssh/authorized_keys") not in places:
        where = ", ".join(places) or "no file"
        warn(
            f"sshd reads keys from {where} (AuthorizedKeysFile), not from ~/.ssh/authorized_keys",
            "copy the line there",
        )
    let_through = ", ".join(filter(lets_code_in, sshd.get("acceptenv", [])))
    if let_through:
        warn(
            f"sshd takes {let_through} from whoever has the key (AcceptEnv), and so runs a program "
            "that they delivered",
            "take that out of sshd_config",
        )
    if sshd.get("permittunnel", ["no"]) != ["no"]:
        warn(
            "sshd lets the key make a tunnel device, into this host's network (PermitTunnel)",
            "set it to no in sshd_config",
        )


def lets_code_in(pattern: str) -> bool:
    """Return whether a pattern of AcceptEnv (sshd_config(5)) lets through a risky variable.

    That is one that tells rrsync's interpreter, a shell or the dynamic loader what to run.
    """
    names = (
        "PATH HOME ENV BASH_ENV SHELLOPTS ZDOTDIR XDG_CONFIG_HOME XDG_DATA_HOME XDG_DATA_DIRS"
        " OPENSSL_CONF OPENSSL_MODULES OPENSSL_ENGINES PERLLIB PERL5LIB PERL5OPT PERL5DB"
        " LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT DYLD_INSERT_LIBRARIES GCONV_PATH BASH_FUNC_x%%"
        " PYTHONPATH PYTHONHOME PYTHONUSERBASE PYTHONSTARTUP PYTHONINSPECT PYTHONBREAKPOINT"
    ).split()
    families = ("PYTHON", "PERL", "LD_", "DYLD_", "OPENSSL_", "BASH_FUNC_")
    return pattern.startswith(families) or any(fnmatch.fnmatchcase(n, pattern) for n in names)


def advertised_address(settings: dict[str, list[str]]) -> tuple[int | None, list[str]]:
    """Return (the port that the controller should use, None for 22; the host keys' fingerprints).

    link may run over ssh, through an sshd that is not the system's: then its port is returned, and
    no fingerprints, since these settings are not its own.
    """
    ports = settings.get("port") or ["22"]
    # SSH_CONNECTION: the client's address and port, the server's address and port. Its last word is
    # the port of the sshd through which link runs.
    answering = (os.environ.get("SSH_CONNECTION", "").split() or ports[:1])[-1]
    found: list[str] = []
    if answering in ports:
        paths = [path + ".pub" for path in settings.get("hostkey", [])]
        for path in paths or sorted(glob.glob("/etc/ssh/ssh_host_*_key.pub")):
            with contextlib.suppress(OffsyncError, ValueError, IndexError):
                line = read_file(path, "host key").decode("utf-8", "replace")
                found.append(fingerprint(line.split()[1]))
    usable = re.fullmatch("[0-9]{1,5}", answering) and answering != "22"
    return int(answering) if usable else None, found


def cmd_link(args: argparse.Namespace) -> int:
    require_programs("target")
    account = current_account()
    risks = args.accept_risk
    munge = not args.symlinks
    # "target add" refuses an account name that does not match, and ssh refuses most of these, too.
    if not re.fullmatch(LOGIN_PATTERN, account.pw_name + "@host"):
        raise OffsyncError(
            f"account {quote_text(account.pw_name)}: ssh takes no login of that name",
            "link it for another account",
        )
    rrsync = find_rrsync(args.rrsync)
    check_quotable("rrsync", rrsync)
    from_pattern = "" if args.from_pattern is None else validate_from_pattern(args.from_pattern)
    named = os.path.expanduser("~/.offsync/sync") if args.path is None else args.path
    # Where offsync was piped into python, there is no program file.
    programs = filter(os.path.exists, (sys.argv[0], globals().get("__file__", "")))
    path = validate_link_path(named, [rrsync, StateDirectory().key, *programs], "path" in risks)
    given = read_key_argument(args)
    if given is None:
        given = ask(
            "Paste the public key (the line that 'offsync init' prints): ",
            "give the key: --key 'ssh-ed25519 AAAA...' or --key-file FILE",
        )
    key = validate_public_key(given)
    strangers = untrusted_writer(rrsync)
    if strangers and "rrsync" not in risks:
        raise OffsyncError(
            f"rrsync {rrsync}: others could replace what this key runs: {strangers.message}",
            *strangers.hints,
            ("or accept that:", typed_again("--accept-risk", "rrsync")),
        )
    if "rrsync" in risks:
        warn(
            f"risk accepted: a thief of the key may write outside {quote_text(path)}, by a symlink"
        )
    else:
        probe_rrsync(rrsync, munge)
    # An existing from= stays: linking again must not let the key come from more places.
    file, _, was = find_authorized_key(key)
    kept = re.match(r'from="([^"]*)",', was)
    if kept and args.from_pattern is None:
        from_pattern = kept[1]
        emit(
            f'kept from="{from_pattern}" of the line of this key; to drop it, unlink the key, then '
            "link it again",
            error=True,
        )
    make_directory(path, 0o755)
    command = format_forced_command(rrsync, path, munge)
    line = format_authorized_key(command, key, from_pattern)
    set_authorized_key(key, line)
    if was and FORCED_GUARD not in was:
        emit(
            "replaced a line without today's guard: the key could read files outside its path",
            error=True,
        )
    written = re.fullmatch(OFFSYNC_KEY_LINE, was)
    if written and written_path(written) != path:
        old = written_path(written)
        undo = ["link", "--path", old, "--key", f"{key.type} {key.blob}"]
        if written["path"].startswith("-munge "):
            undo.append("--no-symlinks")
        if kept:
            undo += ["--from", kept[1]]
        if args.rrsync is not None:
            undo += ["--rrsync", re.sub(r"\\(.)", r"\1", written["rrsync"])]
        for risk in risks:
            undo += ["--accept-risk", risk]
        warn(
            f"this key could write below {quote_text(old)}; now it writes below {quote_text(path)} "
            "instead",
            ("to undo that:", shlex.join(["offsync", *undo])),
            "for a second tree, use another OFFSYNC_HOME on the controller, with its own key",
        )
    if written and written["path"].startswith("-munge ") and not munge:
        warn("the line had --no-symlinks; now the key may make symlinks")
    verb = "already linked" if was == line else "linked"
    emit(
        f"{verb} for {account.pw_name}, in {file}: the key may write below {quote_text(path)}",
        error=True,
    )
    settings = sshd_settings(account.pw_name)
    warn_of_link(account, settings, path)
    port, host_keys = advertised_address(settings)
    target = Target(f"{account.pw_name}@{os.uname().nodename}", path, rrsync, port, not munge)
    emit(
        "Now add this target on the controller (replace the host by the name that the controller "
        "uses; fingerprints are those of the system's sshd):",
        error=True,
    )
    words = [word for key in host_keys for word in ("--host-key", key)]
    emit(" ".join(["offsync target add", target_add_args(target), *words]))
    return 0


def list_linked_keys() -> int:
    """Print the keys that offsync linked, each with the command that removes it."""
    path = os.path.realpath(os.path.expanduser("~/.ssh/authorized_keys"))
    text = read_file(path, "authorized_keys") if os.path.exists(path) else b""
    lines = text.decode("utf-8", "surrogateescape").split("\n")
    linked = list(filter(None, (re.fullmatch(OFFSYNC_KEY_LINE, line.strip()) for line in lines)))
    for match in linked:
        place = quote_text(written_path(match))
        emit(f"{place}, {replace_unprintable(match['comment'] or 'a key without a comment')}:")
        emit(replace_unprintable(f"    offsync unlink --key {shlex.quote(match['key'])}"))
    if not linked:
        emit(f"no key is linked in {quote_text(path)}", error=True)
    return 0


def cmd_unlink(args: argparse.Namespace) -> int:
    current_account()
    text = read_key_argument(args)
    if text is None:
        return list_linked_keys()
    key = validate_public_key(text)
    path, _, line = find_authorized_key(key)
    set_authorized_key(key, None)
    emit(("removed the key from " if line else "the key has no entry in ") + path, error=True)
    if line:
        emit("a connection of that key which is open now goes on until it ends", error=True)
    return 0


# --- Host keys, proofs and target add -----------------------------------------------------------

# Asks for the host key without authenticating and without a session: safe against whoever answers.
SSH_FETCH_HOST_KEY = (
    "-N -o LogLevel=VERBOSE -o StrictHostKeyChecking=no -o GlobalKnownHostsFile=none"
    " -o PubkeyAuthentication=no -o PreferredAuthentications=none"
).split()


def fingerprint(blob: str) -> str:
    """Return the fingerprint of a public key as ssh prints it. Raises ValueError for no base64."""
    digest = new_digest(base64.b64decode(blob, validate=True)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def describe_changed_key(state: StateDirectory, stderr: bytes) -> str:
    """Return which host key was expected and which was shown, from ssh's warning (sshconnect.c)."""
    text = stderr.decode("utf-8", "replace")
    shown = re.search(
        r"fingerprint for the (\S+) key sent by the remote host is\s+(SHA256:\S+)\.", text
    )
    known = re.search(r"Offending \S+ key in (.+):(\d+)", text)
    facts = f"shown now {shown[2]} ({shown[1]})" if shown else "shown now another one"
    name, number = known.groups() if known else ("", "0")
    # The target, or a jump host, writes to stderr, too, and may have forged this name: so only our
    # known_hosts, or a file with one of these usual names, is opened.
    usual = ("known_hosts", "known_hosts2", "ssh_known_hosts", "ssh_known_hosts2")
    if name != state.known_hosts and os.path.basename(name) not in usual:
        return replace_unprintable(facts)
    # Somebody may have edited the file since.
    with contextlib.suppress(OffsyncError, ValueError, IndexError):
        line = (
            read_file(name, "known_hosts").decode("utf-8", "replace").split("\n")[int(number) - 1]
        )
        key = re.search(r" (?:ssh|ecdsa|sk)-\S+ +([A-Za-z0-9+/]+=*)", line)
        if key:
            facts = f"known {fingerprint(key[1])} ({name}:{number}), {facts}"
    return replace_unprintable(facts)


def fetch_host_key(connection: Connection) -> tuple[str, str, str]:
    """Return (host, type, blob) of the one host key that this ssh and the target agree on.

    ssh connects on its own route, so ProxyJump, HostKeyAlias and Port of ssh_config hold
    (ssh-keyscan knows none). What a server shows is not proved yet: the connection that trusts this
    key proves it.
    """
    context = connection.context
    path = os.path.join(context.scratch, "fetched-%d" % next(context.numbers))
    argv = [context.ssh, *SSH_NO_MUX, *SSH_FETCH_HOST_KEY, "-o", "UserKnownHostsFile=" + path]
    for last in retry_attempts():
        words = [*argv, *connection.options(), *connection.destination()]
        result = connection.run(words, limit=CONNECT_DEADLINE)
        found = read_file(path, "host key").split() if os.path.exists(path) else []
        if len(found) >= 3:
            break
        error = diagnose_login(connection, result)
        if last or not error.retry:
            raise error
    host, key_type, blob = map(os.fsdecode, found[:3])
    return host, key_type, blob


def confirm_host_key(target: Target, shown: str) -> None:
    """Ask whether a host key is the target's; raise unless a full "yes" says so."""
    emit(
        f"The host key of {target.login} is not trusted. It presents:\n    {shown}\n"
        "Compare with what 'offsync link' or 'ssh-keygen -lf' prints on the target's own console.",
        error=True,
    )
    answer = ask(
        "Trust this key? Type yes or no: ",
        "give the fingerprint that 'offsync link' printed on the target: --host-key SHA256:...",
    )
    if answer != "yes":
        raise OffsyncError(
            f"{target.login}: the host key was not accepted; nothing was saved",
            'only the whole word "yes" accepts it',
        )


def trust_host_key(context: RunContext, host: str, line: str) -> str:
    """Return a scratch copy of our known_hosts with this line in place of those of its host."""
    path = os.path.join(context.scratch, "known_hosts")
    old = b""
    if os.path.exists(context.state.known_hosts):
        shutil.copyfile(context.state.known_hosts, path)
        # ssh-keygen -R finds hashed names, too.
        removed = run_program(
            [find_program("ssh-keygen"), "-R", host, "-f", path], limit=SESSION_DEADLINE
        )
        # Else the old key would go on being trusted.
        if removed.status != 0:
            raise OffsyncError(
                f"known_hosts {quote_text(context.state.known_hosts)}: ssh-keygen cannot edit it",
                "remove the line that it names, then try again",
                said="ssh-keygen: " + quote_output(removed.stderr),
            )
        old = read_file(path, "known_hosts")
        old += b"\n" if old and not old.endswith(b"\n") else b""
    write_atomically(path, [old, line.encode() + b"\n"], 0o600)
    return path


def connect_trusted(
    context: RunContext, target: Target, wanted: Sequence[str]
) -> tuple[Connection, str]:
    """Return (an open connection, the known_hosts file to store; "" if the key is trusted already).

    Only one key is trusted: the one that ssh negotiates, once it was compared. A man in the middle
    can show a key that is not his, but without its private half no connection succeeds. So the
    connection that is made next proves that the target has it. ssh also reads the known_hosts files
    of the user and the system then, and refuses a key that they mark as revoked.
    """
    connection = Connection(context, target)
    if not wanted:
        try:
            connection.open()
            return connection, ""
        except TargetError as error:
            if error.kind not in ("host-key-unknown", "host-key-changed"):
                raise
            if error.kind == "host-key-changed":
                warn(error.message)
    host, key_type, blob = fetch_host_key(connection)
    shown = fingerprint(blob)
    if wanted and shown not in wanted:
        raise OffsyncError(
            f"{target.login}: the target's host key is NOT the expected one: wrong --host-key, or "
            "someone is impersonating the target: expected "
            f"{' or '.join(wanted)}, got {shown} ({key_type})",
            "compare with what 'offsync link' or 'ssh-keygen -lf' prints on the target's console",
        )
    if not wanted:
        confirm_host_key(target, f"{shown} ({key_type})")
    known_hosts = trust_host_key(context, host, f"{host} {key_type} {blob}")
    connection = Connection(context, target, known_hosts)
    connection.open()
    return connection, known_hosts


class Proof(NamedTuple):
    """One thing that was tried on a target. passed is None where the answer tells nothing."""

    attempt: str
    passed: bool | None
    detail: str


def prove_forwarding(connection: Connection) -> list[Proof]:
    """Open another connection that asks for a port of the target; return what sshd allows.

    ssh -v shows what sshd says of the key's options when it authenticates (auth_debug in OpenSSH):
    nothing else tells the controller of agent forwarding. dropbear's sshd does not report it.
    """
    argv = [connection.context.ssh, *SSH_NO_MUX, *"-v -o LogLevel=DEBUG1".split()]
    argv += [*connection.options(), "-W", "127.0.0.1:%d" % (connection.target.port or 22)]
    result = connection.run([*argv, *connection.destination()], limit=CONNECT_DEADLINE)
    # Those of a jump host come before.
    told = re.findall(rb"Remote: .*key options:(.*)", result.stderr)
    options = told[-1].split() if told else []
    port = agent = None
    if told:
        port = b"port-forwarding" not in options
        agent = b"agent-forwarding" not in options
    elif b"administratively prohibited" in result.stderr:
        port = True
    if result.stdout:
        port = False
    answers = {True: "refused", False: "allowed", None: "sshd does not tell"}
    return [
        Proof("forward a port", port, answers[port]),
        Proof("forward an agent", agent, answers[agent]),
    ]


def prove_all(connection: Connection) -> list[Proof]:
    """Try all that the key must not do, and that it can write; no file is sent."""
    connection.prove_restricted()
    context = connection.context
    marker = os.urandom(8).hex()
    dry: dict[str, Any] = {"source": context.empty, "limit": SESSION_DEADLINE}
    read = connection.session((), "cat /etc/passwd")
    # Here LOGIN:PATH is the source.
    *shell, remote = connection.rsync_remote_args(".")
    argv = [context.rsync_path, "-n", "-r", *shell, remote, os.fsdecode(context.empty) + "/"]
    # sshd may not have ended the session before, where it allows only one (MaxSessions).
    for last in retry_attempts():
        pulled = connection.run(argv, limit=SESSION_DEADLINE, env=child_environment(for_rsync=True))
        if last or not diagnose(connection.target, pulled).retry:
            break
    climbed = connection.rsync_with_retry(("-n", "-r"), path="../" + marker, **dry)
    # rsync names in double quotes the directory that it tried to enter: then rrsync let .. pass.
    climbs = climbed.status == 0 or marker.encode() + b'"' in climbed.stderr

    def refused(what: str, result: Result, answer: str) -> Proof:
        """Return the proof that something is refused; answer: what the target did instead, or "".

        Raises TargetError if the target was not asked: a dead connection is no refusal.
        """
        error = diagnose(connection.target, result)
        if not answer and (error.retry or error.kind in ("no-response", "closed-after-login")):
            raise error
        return Proof(what, not answer, answer or "refused")

    # prove_restricted() and prove_path() raise where these two do not hold.
    proofs = [
        Proof("run a command", True, "refused"),
        refused("read a file with cat", read, quote_output(read.stdout)),
        refused("read files with rsync", pulled, "it sends them" if pulled.status == 0 else ""),
        Proof("write to a path outside", True, prove_path(connection)),
        refused("write to .. of the path", climbed, "accepted" if climbs else ""),
    ]
    # A terminal has one stream only: if the target gives one, the refusal comes back on stdout.
    terminal = connection.session(("-tt",), PROOF_COMMAND)
    passed: bool | None = not terminal.stdout.strip()
    # An sshd that is not root's cannot make a terminal, and ends the connection. The dry run below
    # then connects again.
    if passed and check_refusal(connection.target, terminal):
        passed = None
    word = {True: "refused", False: "given", None: "the connection ended"}[passed]
    proofs.append(Proof("get a terminal (PTY)", passed, word))
    proofs += prove_forwarding(connection)
    written = connection.rsync_with_retry(("-n", "-r"), **dry)
    if written.status != 0:
        raise diagnose(connection.target, written)
    accepted = "accepted; permissions show when apply writes"
    return [*proofs, Proof("write below the path (dry run)", True, accepted)]


def cmd_target_add(args: argparse.Namespace) -> int:
    require_programs("controller")
    given = {key: getattr(args, key) for key, rule in TARGET_KEYS.items() if rule.option}
    target = Target(
        **{
            key: TARGET_KEYS[key].normalize(value)
            for key, value in given.items()
            if value is not None
        }
    )
    for host_key in args.host_key:
        if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", host_key):
            raise UsageError(
                f"host key {quote_text(host_key)}: not SHA256: and 43 characters",
                "copy it as 'offsync link' and ssh-keygen -l print it",
            )
    state = StateDirectory()
    # Without a config, there is nothing to lock.
    state.load()
    take_lock(state, "target add")
    config = state.load()
    others = [other for other in config.targets if other.login != target.login]
    known = [other for other in config.targets if other.login == target.login]
    if known and known != [target]:
        warn(
            f"{target.login} is configured already; if the proofs succeed, this replaces "
            + target_add_args(known[0]),
            "to have both, give one of them a Host alias in ~/.ssh/config",
        )
    with RunContext(state, config, Typed("target add", config)) as context:
        try:
            connection, known_hosts = connect_trusted(context, target, args.host_key)
            proofs = prove_all(connection)
        except TargetError as error:
            # A command to add the target gets the host keys that were typed.
            typed = "".join(" --host-key " + host_key for host_key in args.host_key)
            error.hints = tuple(
                (hint[0], hint[1] + typed) if "target add" in hint[1] else hint
                for hint in error.hints
            )
            raise
        found = [f"{p.attempt}: {p.detail}" for p in proofs if p.passed is False]
        if found:
            raise failure(target, "not-restricted", "; ".join(found))
        if known_hosts:
            trusted = read_file(known_hosts, "known_hosts")
            write_atomically(state.known_hosts, [trusted], 0o600)
    state.replace_in_config("targets", format_targets([*others, target]))
    done = "updated" if known else "added"
    passed = plural(sum(proof.passed is True for proof in proofs), "proof")
    emit(
        f"{done} {target.login}: the key is restricted to writing below "
        f"{quote_text(target.remote_path)} ({passed}); next: {offsync_command('plan')}",
        prose=True,
    )
    return 0


# --- System packages ----------------------------------------------------------------------------

# Packages of a controller on Fedora and its like; packages of a target on these and on Debian.
CLIENTS = "openssh-clients rsync"
SERVER = "openssh-server rsync python3"
# name: (how it installs a package, the packages of a controller, those of a target), in order of
# preference; brew last, since Linux has it, too.
PACKAGE_MANAGERS = {
    "apt-get": (
        "env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends",
        "openssh-client rsync",
        SERVER,
    ),
    "dnf": ("dnf -y install", CLIENTS, SERVER + " rsync-rrsync"),
    "yum": ("yum -y install", CLIENTS, SERVER + " rsync-rrsync"),
    "pacman": ("pacman -S --needed --noconfirm", "openssh rsync", "openssh rsync python"),
    "zypper": (
        "zypper --non-interactive install --no-recommends",
        "openssh rsync",
        "openssh rsync python3",
    ),
    "apk": (
        "apk add --no-cache",
        "openssh-client openssh-keygen rsync",
        "openssh-server rsync rrsync",
    ),
    "brew": ("brew install", "rsync", "rsync"),
}


def missing_programs(role: str) -> dict[str, OffsyncError]:
    """Return {program: why it cannot be used} of what a role needs and this host lacks."""
    names = {"controller": "ssh", "target": "sshd rrsync"}.get(role, "ssh sshd rrsync").split()
    missing = {}
    for name in ("rsync", "ssh-keygen", *names):
        try:
            if name == "rsync":
                find_rsync()
            elif name == "rrsync":
                find_rrsync(None)
            else:
                find_program(name)
        except OffsyncError as error:
            missing[name] = error
    return missing


def install_commands(manager: str, role: str, missing: Iterable[str]) -> list[list[str]]:
    """Return the commands that install what a role needs.

    One command for each package, so that one which this system does not know blocks no other. An
    OpenSSH of which no program is missing is left alone: an upgrade would restart its sshd.
    """
    install, controller, target = PACKAGE_MANAGERS[manager]
    sudo = ["sudo"] if manager != "brew" and os.geteuid() != 0 else []
    wanted = {"controller": controller, "target": target}.get(role, controller + " " + target)
    commands = [[*sudo, "apt-get", "update"]] if manager == "apt-get" else []
    packages = list(dict.fromkeys(wanted.split()))
    if not any(name.startswith("ssh") for name in missing):
        packages = [name for name in packages if not name.startswith("openssh")]
    return commands + [[*sudo, *install.split(), package] for package in packages]


def install_dependencies(role: str, assume_yes: bool = False) -> None:
    """Install what a role needs, after showing how and asking. Raises if any is missing then."""
    missing = missing_programs(role)
    names = ", ".join(missing)
    if not missing:
        emit(f"install-deps: everything for the role {role} is installed", error=True)
        return
    manager = next((name for name in PACKAGE_MANAGERS if shutil.which(name)), None)
    if not manager:
        raise OffsyncError(
            f"install-deps: missing: {names}, and this host has no known package manager "
            f"({', '.join(PACKAGE_MANAGERS)})",
            "install OpenSSH, and rsync with rrsync, by hand",
        )
    commands = install_commands(manager, role, missing)
    emit(f"missing on this host: {names}; these commands install it:", error=True)
    emit("\n".join("    " + shlex.join(words) for words in commands), error=True)
    if commands[0][0] == "sudo" and not shutil.which("sudo"):
        raise OffsyncError(
            "install-deps: this account is not root, and there is no sudo",
            "have root run these commands without sudo",
        )
    unasked = "to be asked nothing, run:", f"offsync install-deps --role {role} -y"
    if not assume_yes and ask("Run them now? Type y or n: ", unasked) not in ("y", "yes"):
        raise OffsyncError(f"install-deps: nothing was installed; missing: {names}")
    # What is missing afterwards tells whether it worked.
    for words in commands:
        run_program(words, attach_terminal=True)
    still = missing_programs(role)
    if still:
        raise OffsyncError(
            f"install-deps: still missing: {', '.join(still)}",
            f"look at what {manager} printed above",
        )
    sshd = "; make sure that sshd runs" if "sshd" in missing else ""
    emit(f"install-deps: done: installed {names}{sshd}", error=True)


def require_programs(role: str) -> None:
    """Require a role's programs; ask to install those that are missing, or raise.

    Where rrsync alone is missing, find_rrsync() reports it later, and says more.
    """
    missing = missing_programs(role)
    if missing and set(missing) != {"rrsync"}:
        # openrsync, too old, or a wrong variable.
        if "rsync" in missing and (os.environ.get("OFFSYNC_RSYNC") or shutil.which("rsync")):
            raise missing["rsync"]
        install_dependencies(role)


def cmd_install_deps(args: argparse.Namespace) -> int:
    install_dependencies(args.role, args.yes)
    return 0


# --- config.yaml: a strict subset of YAML -------------------------------------------------------

# What is accepted means the same to every YAML 1.1 or 1.2 parser: "key: value" without indentation,
# lists of scalars, lists of mappings, and comments. Any other line is refused, by its number. Text
# in double quotes may hold the escapes that JSON and YAML share, but no surrogates.
YAML_TEXT = r'"(?:[^"\\\t]|\\["\\bfnrt]|\\u(?![dD][89A-Fa-f])[0-9A-Fa-f]{4})*"'
YAML_LINE = (
    r"(?P<indent> *)(?P<dash>- +)?"
    r"(?:(?!(?i:y|n|yes|no|on|off|true|false|null):)(?P<key>[A-Za-z_][A-Za-z0-9_]*):(?: +|$))?"
    r"(?P<value>" + YAML_TEXT + r"|'(?:[^'\t]|'')*'"
    r"|\[ *(?:" + YAML_TEXT + r"(?: *, *" + YAML_TEXT + r")*)? *\]"
    r"|[A-Za-z0-9/][A-Za-z0-9_./@+-]*)?(?:(?:^|(?<= )| +)#.*)? *"
)
YAML_FORBIDDEN = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]"
# What is wrong with a line that is not in the subset, and what to write instead.
YAML_ERRORS = (
    ("\t", "a tab; write blanks instead"),
    ("\ufeff", "a byte order mark (U+FEFF); save the file as UTF-8 without one"),
    ("[\udc80-\udcff]", "not UTF-8; save it as UTF-8"),
    (YAML_FORBIDDEN, "the character U+{0:04X} is not allowed; remove it"),
    ("[^\\S ]", "the character U+{0:04X} looks like a blank; write a blank"),
    ("^ *[A-Za-z_]+:[^ ]", "a blank is missing after the colon"),
    ("^ *-[A-Za-z\"']", "a blank is missing after the dash"),
    ("(?:^|[-:]) *~", "~ is not expanded; write the whole path, from / on"),
    ("(?:^|[-:]) *([*&!%@?].*)", 'text that begins so needs double quotes: "{1}"'),
    ("^--- *$", "a second document; only the first line may be ---"),
    (r", *\]", "a comma before ]; remove it"),
    (r"\[", 'text in brackets needs double quotes: [".git/", "cache/"]'),
    ("[0-9]%", "a percentage is a number without the sign: 50"),
    ("", "unsupported syntax or value; put text in double quotes, as JSON"),
)
# Plain words that some YAML parser takes for a boolean or a null.
YAML_WORDS = "y n yes no on off true false null".split()


def parse_yaml_value(text: str, line: int, key: str | None) -> Any:
    """Return the value of one token: a scalar, or a list of (line, text).

    key: that of the value, for the message of the UsageError that this raises; None in a list.
    """
    if text[0] == '"':
        return json.loads(text)
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == "[":
        return [(line, word) for word in json.loads(text)]
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        return int(text)
    if text[0].isdigit() or text.lower() in YAML_WORDS:
        rule = {**TOP_KEYS, **TARGET_KEYS}.get(key or "")
        if not rule or rule.type is str:
            raise UsageError(f'{text} needs double quotes: "{text}"')
        raise UsageError(f"{text} is not supported; {key} must be {rule.expected}")
    return text


def explain_yaml(line: str) -> str:
    """Return what is wrong with a line that is not in the subset, and what to write instead."""
    # A forbidden character is found in a comment, too; all else is looked for outside of it.
    text = line if re.search(YAML_FORBIDDEN, line) else line.split(" #")[0]
    for pattern, why in YAML_ERRORS:
        found = re.search(pattern, text)
        if found:
            return why.format(ord(found[0][:1] or " "), found[0].lstrip("-: "))
    raise AssertionError("the last pattern matches every line")


def format_yaml(value: Any) -> str:
    """Return a value as every YAML parser reads it; it holds nothing that YAML_FORBIDDEN has."""
    return json.dumps(value, ensure_ascii=False)


def format_targets(targets: Sequence[Target]) -> list[str]:
    """Return the lines of "targets" in config.yaml.

    Of a target, they have all keys whose value is text, and others that differ from the default.
    """
    lines = ["targets:"] if targets else ["targets: []"]
    for target in targets:
        mark = "-"
        for key, rule in TARGET_KEYS.items():
            value = getattr(target, key)
            if rule.type is str or value != rule.default:
                lines.append(f"  {mark} {key}: {format_yaml(value)}")
                mark = " "
    return lines


def format_new_config(source: str) -> str:
    return (
        f"version: 1\nsource: {format_yaml(source)}\ndelete: false\noverwrite: true\n"
        'verify: "hash"\nexclude:\n  - ".git/"\ntargets: []\n'
    )


def replace_block(text: str, key: str, block: Sequence[str]) -> str:
    """Return config text with one top-level key's lines replaced; all else stays.

    The key's lines are those from the key to the last line below it that is indented or begins with
    a dash. Comments between them are lost; comments after them stay.
    """
    comment = r"\n *(?:#[^\r\n]*)?\r?"  # or a blank line
    item = r"\n(?:-| +[^ #\r\n]).*"
    lines = rf"(?m)^{key}:.*(?:(?:{comment})*{item})*"

    def replaced(match: re.Match[str]) -> str:
        end = "\r" if match[0].endswith("\r") else ""
        return "\n".join(line + end for line in block)

    return re.sub(lines, replaced, text, count=1)


LOGIN_PATTERN = (
    r"(?a)[A-Za-z0-9_.][A-Za-z0-9_.@+\\-]*\$?@"
    r"(?:\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)"
)
CONTROL_CHARS = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]"


def validate_login(login: str) -> str:
    """Return a login: user@host, an IPv6 address in brackets."""
    if not re.fullmatch(LOGIN_PATTERN, login) or len(login) > 200:  # it is the name of a file, too
        raise UsageError(
            f"login {quote_text(login)}: not of the form user@host",
            "an IPv6 address stands in brackets, user@[address]; a port goes into --port",
        )
    return login


def validate_absolute_path(path: str, what: str) -> str:
    """Return the path normalised. Raises UsageError unless it is absolute, short and plain text."""
    if not path.startswith("/") or re.search(CONTROL_CHARS, path) or len(os.fsencode(path)) > 4000:
        why = "not an absolute path"
        if path.startswith("/"):
            why = "longer than 4000 bytes, or with control characters, or not UTF-8"
        raise UsageError(f"{what} {quote_text(path)}: {why}")
    return posixpath.normpath("/" + path.lstrip("/"))


def flag_option(text: str) -> dict[str, Any]:
    """Return the keyword arguments of add_argument() for an option without a value."""
    return {"action": "store_true", "help": text}


def value_option(metavar: str, text: str, **more: Any) -> dict[str, Any]:
    """Return the keyword arguments of add_argument() for an option or argument with a value."""
    return {"metavar": metavar, "help": text, **more}


class KeySpec(NamedTuple):
    """What a key of config.yaml must be.

    normalize: config.yaml may have a value only if this returns it unchanged; if not, or if this
    raises UsageError, the value is refused. ("target add" uses what it returns.) option and
    argparse_kwargs: the argument of "target add" for this key, and how add_argument() defines it.
    """

    expected: str
    type: type
    default: Any  # Ellipsis if the key is required
    normalize: Callable[[Any], Any] = lambda value: value
    option: str = ""
    argparse_kwargs: dict[str, Any] = {}


def in_range(least: int, most: int) -> Callable[[Any], int]:
    """Return what accepts numbers in a range, from config.yaml and from an option."""

    def check(given: Any) -> int:
        if not re.fullmatch("[0-9]{1,10}", str(given)) or not least <= int(given) <= most:
            raise UsageError(f"{quote_text(str(given))}: not a number from {least} to {most}")
        return int(given)

    return check


def deletion_word(given: object) -> object:
    # 0 and 1 are equal to False and True.
    return given if isinstance(given, (bool, str)) and given in (False, True, "keep") else None


BOOLEAN = "true or false"
PATH_RULE = "an absolute path without ~, .. and double or trailing slashes"
TOP_KEYS = {
    "version": KeySpec("the number 1", int, ..., in_range(1, 1)),
    "source": KeySpec(
        # The path stays as it was typed, even with .. or a final slash.
        "an absolute path; ~ is not expanded",
        str,
        ...,
        lambda path: validate_absolute_path(path, "") and path,
    ),
    "delete": KeySpec('false, true or "keep"', object, False, deletion_word),
    "overwrite": KeySpec(BOOLEAN, bool, True),
    "verify": KeySpec(
        '"hash", "strong" or "quick"',
        str,
        "hash",
        lambda word: word if word in RSYNC_PLAN else None,
    ),
    "exclude": KeySpec('a list of rsync patterns, such as [".git/"]', list, [(0, ".git/")]),
    "jobs": KeySpec("a number from 1 to 1000", int, 8, in_range(1, 1000)),
    "bwlimit": KeySpec("a number of KiB/s, such as 10240 for 10 MiB/s", int, 0),
    "compress": KeySpec(BOOLEAN, bool, False),
    # rsync is silent while it hashes a large file, which may take hours.
    "timeout": KeySpec("a number of seconds, 60 or more", int, 10800, in_range(60, 999_999_999)),
    "max_delete": KeySpec("a number of percent from 0 to 100", int, 50, in_range(0, 100)),
    "targets": KeySpec("a list of targets, or []", list, ...),
}
TARGET_KEYS = {
    "login": KeySpec(
        "user@host (user@[address] for IPv6)",
        str,
        ...,
        validate_login,
        "login",
        value_option("LOGIN", "user@host; IPv6 as user@[address]"),
    ),
    "user": KeySpec("the user of login", str, ...),
    "host": KeySpec("the host of login", str, ...),
    "remote_path": KeySpec(
        PATH_RULE,
        str,
        ...,
        lambda path: validate_absolute_path(path, "path"),
        "--path",
        value_option("DIR", "the path given to link", required=True, dest="remote_path"),
    ),
    "rrsync": KeySpec(
        PATH_RULE,
        str,
        DEFAULT_RRSYNC,
        lambda path: validate_absolute_path(path, "rrsync"),
        "--rrsync",
        value_option("PATH", "rrsync on the target, if not " + DEFAULT_RRSYNC),
    ),
    "port": KeySpec(
        "a number from 1 to 65535",
        int,
        None,
        in_range(1, 65535),
        "--port",
        value_option(
            "N", "the port of sshd (default: ssh_config, else 22)", type=in_range(1, 65535)
        ),
    ),
    "symlinks": KeySpec(
        BOOLEAN,
        bool,
        True,
        option="--no-symlinks",
        argparse_kwargs={
            "action": "store_false",
            "dest": "symlinks",
            "help": "deliver no symlinks: rrsync munges them on the target",
        },
    ),
}


def target_add_args(target: Target) -> str:
    """Return what follows "offsync target add" to add a target (again)."""
    words = [target.login]
    for key, rule in TARGET_KEYS.items():
        given = getattr(target, key)
        if rule.option.startswith("--") and given != rule.default:
            words += [rule.option, str(given)] if rule.type is not bool else [rule.option]
    return shlex.join(words)


def never_matches(rule: str, *places: str) -> tuple[str, str] | None:
    """Return (why an exclude can match nothing, what to write instead); None if it may match.

    With "delete: true", what such an exclude was to protect would be deleted. rsync compares a
    pattern with paths that begin at the source (rsync(1), PATTERN MATCHING). places: the paths of
    the source and of the targets, with which a pattern must not begin.
    """
    pattern = re.sub("^[-+] ", "", rule)
    if pattern != pattern.strip():
        return "it begins or ends with a blank", "if a name really does, write [ ] for the blank"
    for place in places:
        if within(pattern, place) and place != "/":
            return "patterns are relative to the source", f"write it without {quote_text(place)}"
    # A class of characters ends with the first ] that is not its first character.
    classes = re.findall(r"(?<!\\)\[[!^]?\]?([^]]*)(\]?)", pattern)
    if any("/" in characters or not end for characters, end in classes):
        return "its [ does not begin a character class", "write \\[ for the character ["
    parts = re.sub("^/|/$", "", pattern).split("/")
    if not {"", ".", ".."}.isdisjoint(parts):
        return "no name has an empty component, . or ..", "write it without them"
    return None


def put(mapping: dict[str, Any], rules: dict[str, KeySpec], key: str, given: Any) -> None:
    """Add a key of config.yaml. Raises UsageError where it is not as its rule says."""
    if key not in rules:
        raise UsageError(f"unknown key {key}", *did_you_mean(key, rules))
    if key in mapping:
        why = '; each target begins with "- login:"' if rules is TARGET_KEYS else ""
        raise UsageError(f"the key {key} is there twice{why}")
    fine = False
    with contextlib.suppress(UsageError):
        typed = rules[key].type in (object, type(given))
        fine = typed and rules[key].normalize(given) == given
    if not fine:
        raise UsageError(f"{key} must be {rules[key].expected}")
    mapping[key] = given


def complete(mapping: dict[str, Any], rules: dict[str, KeySpec]) -> dict[str, Any]:
    """Return a mapping with the defaults of absent keys. Raises UsageError for a required one."""
    for key, rule in rules.items():
        if key not in mapping and rule.default is ...:
            raise UsageError(f'the key "{key}" is missing; it is {rule.expected}')
    return {key: mapping.get(key, rule.default) for key, rule in rules.items()}


def validate_config(text: str, filename: str, source: str | None = None) -> Config:
    """Return the config. Raises UsageError with the file's name and line.

    source: another one than the config's, for this run.
    """
    values: dict[str, Any] = {}
    # Lists that have a line for each item: (line of the key, [(line of the item, its value)]).
    blocks: list[tuple[int, list[tuple[int, Any]]]] = []
    opened: list[tuple[int, Any]] | None = None  # the list that is being read
    dash = keys = -1  # the columns of its dashes, and of the keys of its last item
    targets: dict[str, Target] = {}
    number = 1  # the line that an error names; 1 where none is to blame
    try:
        # CR before LF alone: elsewhere it would hide text.
        for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
            if number == 1 and line == "---":
                continue
            match = re.fullmatch(YAML_LINE, line)
            if re.search(YAML_FORBIDDEN, line) or not match:
                raise UsageError(explain_yaml(line))
            indent = len(match["indent"])
            key = match["key"]
            value = match["value"] and parse_yaml_value(match["value"], number, key)
            if match["dash"]:
                if opened is None or (opened and indent != dash):
                    raise UsageError(
                        "a list item where none is expected; remove it, or indent all items alike"
                    )
                if value is None:
                    raise UsageError(
                        f"{key} has no value" if key else "an empty list item; remove it"
                    )
                dash = indent
                keys = match.start("key") if key else -1
                opened.append((number, {} if key else value))
                if key:
                    put(opened[-1][1], TARGET_KEYS, key, value)
            elif not key:
                if value is not None:
                    raise UsageError('expected "key: value"')
            elif indent == 0:
                opened = None
                if value is None:
                    value = opened = []
                    blocks.append((number, opened))
                put(values, TOP_KEYS, key, value)
            elif value is not None and opened and indent == keys:
                put(opened[-1][1], TARGET_KEYS, key, value)
            else:
                raise UsageError("unexpected indentation, or no value")
        for number, block in blocks:
            if not block:
                raise UsageError("a key without a value; write [] for an empty list")
        number = 1
        values = complete(values, TOP_KEYS)
        values["source"] = source or values["source"]
        for number, given in values["targets"]:
            if not isinstance(given, dict):
                raise UsageError("a target is a list of keys: " + ", ".join(TARGET_KEYS))
            fields = complete(given, TARGET_KEYS)
            user = fields.pop("user")
            host = fields.pop("host")
            target = Target(**fields)
            if (target.user, target.host) != (user, host):
                raise UsageError("login, user and host disagree; login is user@host")
            if target.login in targets:
                raise UsageError(f"the target {target.login} is listed twice")
            targets[target.login] = target
        places = [posixpath.normpath(values["source"]), os.path.realpath(values["source"])]
        places += [target.remote_path for target in targets.values()]
        # One component, such as /data, may be the name of an entry of the source, too.
        places = [place for place in places if place.count("/") > 1]
        for number, rule in values["exclude"]:
            if type(rule) is not str or rule in ("", "!") or re.search(CONTROL_CHARS, rule):
                raise UsageError("exclude takes rsync patterns as text")
            why = never_matches(rule, *places)
            if why:
                fact = f"the exclude {quote_text(rule)} protects nothing: {why[0]}"
                raise UsageError(fact, why[1])
    except UsageError as error:
        raise UsageError(f"{filename}:{number}: {error}", *error.hints) from None
    del values["version"]
    values["delete"] = Deletion(values["delete"])
    values["exclude"] = tuple(rule for _, rule in values["exclude"])
    values["targets"] = tuple(targets.values())
    return Config(**values)


# --- Output -------------------------------------------------------------------------------------


class Progress:
    """A line for each thing that is being done, on stderr, if that is a terminal with a cursor."""

    LINES = 20  # at most

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.texts: dict[str, str] = {}  # name -> what is being done
        self.drawn: list[str] = []
        self.start = time.monotonic()
        # When it was last drawn. As if in the future: so a run of less than 0.3 s draws nothing.
        self.last = self.start + 0.3

    def update(self, name: str, text: str | None) -> None:
        if draws(sys.stderr) and not VERBOSE.is_set():
            with self.lock:
                self.texts.pop(name, None)
                if text is not None:
                    self.texts[name] = text
                self.tick(0.1 if text else 0)

    def clear(self) -> None:
        self.texts.clear()

    def show_rsync(self, name: str, total: str, line: bytes) -> None:
        """Show the progress that rsync prints. A target could forge it: it is shown, never used."""
        match = re.match(rb" *[0-9][0-9,.]* +([0-9]{1,3}%) +([0-9.,]+[kMGT]?B/s)", line[:100])
        if match:
            self.update(name, f"sending {match[1].decode()} of {total} at {match[2].decode()}")

    def tick(self, interval: float = 0.5) -> None:
        now = time.monotonic()
        if (self.texts or self.drawn) and now >= self.last + interval:
            with self.lock:
                self.last = now
                lines = [f"{name}: {text}" for name, text in sorted(self.texts.items())]
                if lines and now - self.start >= 2:
                    lines[0] += ", %d s" % (now - self.start)
                self.draw(lines)

    def draw(self, lines: list[str]) -> None:
        """Draw lines in place of those drawn before, cut to the terminal; [] takes them away."""
        columns, rows = terminal_size(sys.stderr)
        limit = max(min(self.LINES, rows - 2), 1)
        if len(lines) > limit:
            more = len(lines) - limit + 1
            lines = [*lines[: limit - 1], "... and %d more" % more]
        with self.lock:
            text = "\x1b[%dA\r\x1b[J" % len(self.drawn) if self.drawn else ""
            self.drawn = [line[: columns - 1] for line in lines]
            # A terminal that is gone is no error.
            with contextlib.suppress(OSError):
                sys.stderr.write(text + "".join(line + "\n" for line in self.drawn))
                sys.stderr.flush()


PROGRESS = Progress()
STDOUT_ERRORS: list[str] = []  # reported at the end; the work goes on


def terminal_size(stream: Any) -> tuple[int, int]:
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except OSError:
        columns = 0
        rows = 0
    return columns or 80, rows or 24


def fold(text: str, columns: int) -> str:
    """Return a text for a terminal, with each line broken between words, except for commands.

    A command is a line that is indented by four blanks or more, and is no hint. Colours have no
    width.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        command = indent >= 4 and not line.lstrip(" ").startswith("hint: ")
        lines.append(line[:indent])
        width = indent
        for number, word in enumerate(line[indent:].split(" ")):
            length = len(re.sub("\x1b\\[[0-9;]*m", "", word))
            if number and not command and width + 1 + length >= columns:
                lines.append(" " * (indent + 2))
                width = indent + 2
            elif number:
                lines[-1] += " "
                width += 1
            lines[-1] += word
            width += length
    return "\n".join(lines)


def emit(text: str | bytes, error: bool = False, prose: bool = False) -> None:
    """Print a line, or bytes, on stdout; on stderr if error is set. A closed pipe is no error.

    On a terminal, prose is folded, and so is all on stderr but the commands that -v shows. In a
    pipe, lines stay as they are.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        # No other thread draws in between.
        with PROGRESS.lock:
            if PROGRESS.drawn:
                PROGRESS.draw([])
            if isinstance(text, bytes):
                stream.flush()
                stream.buffer.write(text)
            else:
                if (error or prose) and stream.isatty() and not text.startswith("+ "):
                    text = fold(text, terminal_size(stream)[0])
                stream.write(text + "\n")
            stream.flush()
    except OSError as problem:
        null = os.open(os.devnull, os.O_WRONLY)
        # So nothing fails on it again.
        os.dup2(null, stream.fileno())
        os.close(null)
        if not error and not isinstance(problem, BrokenPipeError):
            STDOUT_ERRORS.append(str(problem.strerror))


def emit_error(text: str, error: OffsyncError, stdout: bool = False, indent: str = "") -> None:
    """Print a text, what a program said, and each way out of an error."""
    lines = [indent + text + (f" ({error.said})" if error.said else "")]
    for hint in error.hints:
        words, command = (hint, "") if isinstance(hint, str) else hint
        lines.append(f"{indent}  hint: {replace_unprintable(words)}")
        if command:
            lines.append(f"{indent}    {replace_unprintable(command)}")
    emit("\n".join(lines), error=not stdout, prose=True)


def emit_lines(lines: Iterable[bytes]) -> None:
    lines = iter(lines)
    for batch in iter(lambda: b"".join(itertools.islice(lines, 1000)), b""):
        emit(batch)


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def plural(count: int, singular: str, several: str = "") -> str:
    return "%d %s" % (count, singular if count == 1 else several or singular + "s")


def print_table(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print rows in columns, each cut to a line of the terminal, with its note on the line below.

    In a pipe nothing is cut, and a note ends its row's line: a line is a record.
    """
    columns = terminal_size(sys.stdout)[0] if sys.stdout.isatty() else sys.maxsize
    rows = [[replace_unprintable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row, text in itertools.zip_longest(rows, notes):
        line = "  ".join(map(str.ljust, row, widths)).rstrip()
        if text and not sys.stdout.isatty():
            line += "  " + replace_unprintable(text)
            text = ""
        emit(line if len(line) <= columns else line[: columns - 3] + "...")
        if text:
            emit("  " + replace_unprintable(text), prose=True)


def warn(message: str, *hints: Hint) -> None:
    emit_error("offsync: warning: " + message, OffsyncError("", *hints))


def did_you_mean(word: str, known: Iterable[str], listed: bool = True) -> list[Hint]:
    """Return the hints for an unknown word; listed: list the known ones, too.

    Of each known one, the last word counts, without its dashes.
    """
    import difflib

    names = {name.split()[-1].lstrip("-"): name for name in sorted(known) if name.split()}
    alike = difflib.get_close_matches(word.lstrip("-"), names, 1, 0.75)
    hints: list[Hint] = [f"did you mean {names[name]}?" for name in alike]
    return [*hints, "known: " + (join_first(list(names.values())) or "none")] if listed else hints


COLOURS = {
    "added": 32,
    "modified": 33,
    "missing": 31,
    "leftover": 36,
    "kept": 36,
    "failed": 31,
    "ok": 32,
}


def colour(kind: str, text: str) -> str:
    if os.environ.get("NO_COLOR") or not draws(sys.stdout):
        return text
    return "\x1b[%dm%s\x1b[0m" % (COLOURS[kind], text)


def draws(stream: Any) -> bool:
    """Return whether a stream is a terminal with a cursor and colours."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def ask(question: str, *hints: Hint) -> str:
    """Return the answer typed on the terminal. Without a terminal, raise OffsyncError with hints.

    What was typed before the question is discarded. Under "su -c" only stdin leads to the
    terminal.
    """
    import termios

    try:
        try:
            terminal = open("/dev/tty", "r+b", buffering=0)
        except OSError:
            if not os.isatty(0):
                raise
            terminal = open(os.dup(0), "r+b", buffering=0)
        with terminal:
            termios.tcflush(terminal, termios.TCIFLUSH)
            terminal.write(question.encode())
            return terminal.readline().decode("utf-8", "replace").strip()
    except (OSError, termios.error):
        raise OffsyncError("no terminal to ask on", *hints) from None


# --- Commands: init, targets --------------------------------------------------------------------


FIRST_TARGET = 'run "offsync link --path DIR" on a target; on this controller, run what it prints'


def make_key(path: str, comment: str) -> None:
    """Make a key pair without a passphrase: ED25519, or ECDSA where this host's policy (FIPS)
    refuses that. Raises OffsyncError."""
    for words in (("ed25519",), ("ecdsa", "-b", "256")):
        made = run_program(
            [find_program("ssh-keygen"), "-q", "-t", *words, "-N", "", "-C", comment, "-f", path]
        )
        if made.status == 0:
            return
    raise OffsyncError(
        f"key {quote_text(path)}: ssh-keygen could not create it",
        "fix the cause, then try again",
        said="ssh-keygen: " + quote_output(made.stderr),
    )


def read_public_key(path: str) -> bytes:
    """Return the public line of our private key, as ssh-keygen has it.

    Raises OffsyncError, with what repairs the key, where ssh could not use it.
    """
    # The limit is for a FIFO, which would be waited for.
    argv = [find_program("ssh-keygen"), "-y", "-P", "", "-f", path]
    done = run_program(argv, limit=SESSION_DEADLINE)
    if done.status == 0:
        return done.stdout
    data = read_file(path, "key", ("create it:", offsync_command("init")))
    quoted = shlex.quote(path)
    if data and (b"\r" in data or not data.endswith(b"\n")):
        raise OffsyncError(
            f"key {quote_text(path)}: CRLF line endings, or no final newline (a CI variable?)",
            ("run:", rf"sed -i -e 's/\r$//' -e '$a\' {quoted}"),
        )
    if b"passphrase" in done.stderr:
        raise OffsyncError(
            f"key {quote_text(path)}: has a passphrase, which offsync cannot enter",
            ("remove the passphrase:", f"ssh-keygen -p -N '' -f {quoted}"),
        )
    raise OffsyncError(
        f"key {quote_text(path)}: ssh-keygen cannot read it",
        "restore it",
        (
            "or move it away, create a new one, and link it on every target:",
            offsync_command("init"),
        ),
        said="ssh-keygen: " + quote_output(done.stderr),
    )


def check_own_key(path: str) -> str:
    """Return the type of our key; raise for what keeps ssh from using it."""
    public = read_public_key(path).split()[:2]
    shown = path + ".pub"
    # ssh offers the public half that lies beside the private key.
    if os.path.exists(shown) and read_file(shown, "key").split()[:2] != public:
        raise OffsyncError(
            f"key {quote_text(path)}: {quote_text(shown)} belongs to a different key",
            (
                "if the private key is the right one, write its public half anew (the old one is "
                "kept beside it):",
                offsync_command("init"),
            ),
        )
    return public[0].decode()


def keep_old_line(public: str) -> None:
    """Append the line of a public key to a file beside it: "unlink" may need it on targets."""
    old = public + ".old"
    lines = read_file(old, "key") if os.path.exists(old) else b""
    write_atomically(old, [lines, read_file(public, "key")], 0o644)


def cmd_init(args: argparse.Namespace) -> int:
    require_programs("controller")
    state = StateDirectory()
    source = args.source
    # A second init, without --source, leaves the source as it is.
    if source is None and not os.path.lexists(state.config):
        source = given_source(".")
    if source and os.path.realpath(source) == os.path.realpath(os.path.expanduser("~")):
        raise UsageError(
            "source: the home directory", "name the directory to deliver: --source DIR"
        )
    if source:
        check_source_location(os.fsencode(source), (state.path, state.key))
    state.check_writers()
    make_directory(state.path, 0o700)
    take_lock(state, "init")
    if not os.path.lexists(state.config):
        write_atomically(state.config, [format_new_config(source).encode()], 0o600)
    config = state.load()
    if source and source != config.source:
        if config.targets:
            count = plural(len(config.targets), "target")
            warn(
                f"the source was {quote_text(config.source)}; {count} will get the new one",
                "for a second tree, use another OFFSYNC_HOME, with its own key",
            )
        state.replace_in_config("source", ["source: " + format_yaml(source)])
    comment = "offsync@" + re.sub(r"[^A-Za-z0-9.-]", "", os.uname().nodename)
    public = state.key + ".pub"
    if not os.path.lexists(state.key):
        lost = os.path.exists(public)
        if lost:
            keep_old_line(public)
        make_key(state.key, comment)
        if lost:
            warn("the private key was missing; a new one was created", "link it on every target")
    check_private(state.key)
    # ssh-keygen before OpenSSH 8.2 prints no comment.
    words = [*read_public_key(state.key).decode("utf-8", "replace").split(None, 2), comment]
    key = " ".join(words[:3]).strip()
    if os.path.exists(public) and read_file(public, "key").split()[:2] != key.encode().split()[:2]:
        keep_old_line(public)
    write_atomically(public, [key.encode() + b"\n"], 0o644)
    emit(f"source {quote_text(state.load().source)}, config {quote_text(state.config)}", error=True)
    emit(
        "Now run this on each target, as the account that receives, and paste the key that "
        "follows:\n    offsync link --path DIR",
        error=True,
    )
    emit(key)
    return 0


def read_record(line: bytes) -> Record | None:
    """Return the record in a line of the log, or of a status; None if offsync did not write it."""
    try:
        record = Record(**json.loads(line))
        names = (*(record.files_changed or ()), *(record.files_deleted or ()))
        texts = (record.timestamp, record.operator, record.login, record.source, record.result)
        # Raises TypeError if one of these is no text.
        "".join((*texts, record.plan or "", record.error or "", *names))
    except (ValueError, TypeError, RecursionError):
        return None
    return record


def read_statuses(state: StateDirectory) -> dict[str, Record]:
    """Return the newest record of each login; what cannot be read is passed over."""
    found = {}
    for name in sorted(os.listdir(state.last)) if os.path.isdir(state.last) else ():
        with contextlib.suppress(OffsyncError):
            record = read_record(read_file(os.path.join(state.last, name), "status"))
            if record and record.login == name:
                found[name] = record
    return found


def read_log(state: StateDirectory) -> Iterator[tuple[bytes, Record]]:
    """Yield (line, record) of operations.log. Lines that are no records are passed over."""
    if os.path.isfile(state.log):
        with open(state.log, "rb") as stream:
            for line in stream:
                record = read_record(line)
                if record:
                    yield line, record


def cmd_target_list(args: argparse.Namespace) -> int:
    state = StateDirectory()
    config = state.load()
    last = read_statuses(state)
    targets = sorted(config.targets)
    if args.json:
        listed = []
        for target in targets:
            record = last.get(target.login)
            fields = {**target._asdict(), "user": target.user, "host": target.host}
            listed.append({**fields, "last": record and record._asdict()})
        emit(json.dumps({"version": 1, "targets": listed}, sort_keys=True))
        return 0
    print_targets(config, last)
    if not targets:
        emit(f"no targets yet: {FIRST_TARGET}", error=True)
    return 0


def print_targets(config: Config, last: dict[str, Record]) -> None:
    """Print the targets and what became of each in the last run that was not refused."""
    rows = [["TARGET", "LAST OUTCOME (UTC)", "RESULT", "PLAN", "PATH, OR ERROR"]]
    for target in sorted(config.targets):
        record = last.get(target.login)
        where = quote_text(target.remote_path)
        where += " port %d" % target.port if target.port else ""
        if not record:
            rows.append([target.login, "", "none", "", where + ": never delivered (no record)"])
            continue
        if record.source != config.source:
            where += " from " + record.source
        if record.error:
            where = f"{record.error} ({where})"
        plan = (record.plan or "-")[:12]
        rows.append([target.login, record.timestamp, record.result, plan, where])
    print_table(rows)


def cmd_target_remove(args: argparse.Namespace) -> int:
    state = StateDirectory()
    state.load()
    take_lock(state, "target remove")
    targets = state.load().targets
    named = [target for target in targets if args.login in (target.login, target.host)]
    if len(named) != 1:
        known = sorted(target.login for target in targets)
        why = "several targets have this host; name the login" if named else "no such target"
        # No "did you mean": whoever followed it without looking could remove the wrong target.
        raise UsageError(
            f"target {quote_text(args.login)}: {why}", f"known: {join_first(known) or 'none'}"
        )
    state.replace_in_config("targets", format_targets([t for t in targets if t != named[0]]))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(state.last, named[0].login))
    key = "..."
    with contextlib.suppress(OffsyncError):
        public = read_file(state.key + ".pub", "key").decode("utf-8", "replace").split()
        key = " ".join(public[:2])
    hint: Hint = ("to revoke it, on the target, run:", f"offsync unlink --key {shlex.quote(key)}")
    emit_error(
        f"removed {named[0].login} from this controller's config; its key is still linked",
        OffsyncError("", hint),
    )
    return 0


def read_inventory(path: str) -> list[str]:
    """Return the patterns that a file lists, one a line. Raises UsageError if it lists none.

    An empty list would otherwise mean all targets.
    """
    data = read_file(path, "list of targets", "name a file with a pattern a line")
    lines = data.decode("utf-8", "replace").split("\n")
    patterns = list(filter(None, (re.split(r"(?:^|\s)#", line)[0].strip() for line in lines)))
    wrong = [pattern for pattern in patterns if pattern.startswith(("-", "@"))]
    if wrong or not patterns:
        why = f"{quote_text(wrong[0])} is no pattern" if wrong else "names no target"
        raise UsageError(
            f"list of targets {quote_text(path)}: {why}",
            "list logins, hosts or patterns, one a line",
        )
    return patterns


def match_targets(logins: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Return the logins that match one of these patterns, by login or host. Raises UsageError."""
    chosen: set[str] = set()
    known = sorted(logins)
    for word in patterns:
        for pattern in read_inventory(word[1:]) if word.startswith("@") else [word]:
            matching = {
                login
                for login in known
                for name in (login, Target(login, "").host)
                if name == pattern or fnmatch.fnmatchcase(name, pattern)
            }
            if not matching:
                raise UsageError(
                    f"target {quote_text(pattern)}: no such target", *did_you_mean(pattern, known)
                )
            chosen |= matching
    return chosen


def select_targets(
    targets: Sequence[Target], patterns: Sequence[str], excepted: Sequence[str] = ()
) -> list[Target]:
    """Return the targets that match a pattern (all for none), but for those excepted; sorted."""
    logins = {target.login for target in targets}
    chosen = match_targets(logins, patterns) if patterns else logins
    chosen = chosen - match_targets(logins, excepted)
    if not chosen:
        raise UsageError("targets: --except excludes every target", "exclude fewer of them")
    return sorted(target for target in targets if target.login in chosen)


def load_targets(
    state: StateDirectory, args: argparse.Namespace
) -> tuple[Config, list[Target], Typed]:
    """Return (the config, with what the options change; the targets; what was typed)."""
    config = state.load()
    plan = getattr(args, "plan", None)
    typed = Typed(
        args.command, config, args.targets, args.excepted, args.source, args.deletion, plan
    )
    if not config.targets:
        raise UsageError(
            "targets: there are none yet",
            FIRST_TARGET,
        )
    config = state.load(args.source)
    if args.deletion:
        config = config._replace(delete=args.deletion)
    return config, select_targets(config.targets, args.targets, args.excepted), typed


# --- Commands: plan, apply, verify, log ---------------------------------------------------------


EQUAL = "equal, nothing to do"


def size_to_send(changes: Iterable[Change]) -> int:
    return sum(change.entry.size for change in changes if change.entry and change.sends_content)


def plan_summary(config: Config, plan: TargetPlan, planning: bool) -> str:
    """Return what a target's plan comes to: counts, and for planning what would be done."""
    if plan.error:
        return "not compared: " + plan.error.why
    notes = {"kept": "missing (kept)"}
    if config.delete is Deletion.ALLOW and planning:
        notes.update(missing="missing (to delete)", leftover="leftover (to delete)")
    counts = []
    for kind in (*CHANGE_KINDS, "kept"):
        count = len(plan.changes_of(kind))
        if count:
            counts.append("%d %s" % (count, notes.get(kind, kind)))
    size = f"; {format_bytes(size_to_send(plan.changes))} to send" if planning else ""
    return ", ".join(counts) + size if counts else EQUAL


def change_line(change: Change, quoted: bool = False) -> str:
    """Return one entry of a plan: kind, reasons, size, path."""
    entry = change.entry
    path = quote_name(change.path, quoted)
    kind = change.kind
    if entry is None:
        notes = {"missing": "only on target", "kept": "only on target, kept"}
        reason = notes.get(kind, "rsync's temporary")
        size = "directory" if change.directory else ""
    else:
        reason = ",".join(change.reasons) or "not on target"
        size = entry.type
        if entry.type == "file":
            size = format_bytes(entry.size)
        if entry.type == "symlink":
            path += " -> " + quote_name(entry.link)
        else:
            # Setuid, setgid, and writable for everybody.
            if "mode" in change.reasons or entry.mode & 0o6002:
                reason += f" {entry.mode:04o}"
    shown = colour(kind, "%-8s" % ("missing" if kind == "kept" else kind))
    return "  %s  %-20s  %10s  %s" % (shown, reason, size, path)


def print_plans(
    config: Config, plans: Sequence[TargetPlan], summary: bool = False, planning: bool = True
) -> None:
    """Print plans for people: a list for all targets with equal plans, or a line a target."""
    emit(f"source {quote_name(os.fsencode(config.source))}")
    if summary:
        rows = [(p.target.login, plan_summary(config, p, planning)) for p in plans]
        print_table(rows)
        return
    groups: dict[Any, list[TargetPlan]] = {}
    for plan in plans:
        # Equal plans share one object (RunContext.equal_changes).
        key = (plan.error.why, plan.error.hints) if plan.error else id(plan.changes)
        groups.setdefault(key, []).append(plan)
    # Targets with changes come last, next to the prompt.
    for group in sorted(groups.values(), key=lambda group: bool(group[0].changes)):
        plan = group[0]
        shown = group if plan.changes or len(group) <= LISTED else group[:LISTED]
        for other in shown:
            emit(other.target.where)
        if len(shown) < len(group):
            emit("and %d more" % (len(group) - len(shown)))
        similar = nfc_lookalikes(change.path for change in plan.changes)
        for change in plan.changes:
            emit(change_line(change, change.path in similar))
        text = "%d targets, each: " % len(group) if len(group) > 1 else ""
        text += plan_summary(config, plan, planning)
        emit_error(text, plan.error or OffsyncError(""), stdout=True, indent="  ")


def has_differences(plan: TargetPlan) -> bool:
    """Return whether a target differs from the source; leftovers and kept entries do not count."""
    return any(change.kind not in ("leftover", "kept") for change in plan.changes)


def raise_for_failed(
    plans: Sequence[TargetPlan],
    what: str,
    as_json: bool,
    hint: Hint = "fix these, then try again",
) -> None:
    """Raise OffsyncError if a target has no plan.

    For people the reasons were printed before; JSON has only their kinds.
    """
    errors = [plan.error for plan in plans if plan.error]
    if errors:
        logins = [plan.target.login for plan in plans if plan.error]
        named = join_first([str(error) for error in errors] if as_json else logins)
        count = f"{len(errors)} of {plural(len(plans), 'target')}"
        raise OffsyncError(f"{what}: {count} could not be compared: {named}", hint)


def cmd_plan(args: argparse.Namespace) -> int:
    state = StateDirectory()
    config, targets, typed = load_targets(state, args)
    with RunContext(state, config, typed, args.jobs) as context:
        plans = plan_all(context, targets)
        name = state.store_plan(config, plans)
        stored = name if os.path.exists(os.path.join(state.plans, name)) else ""
        refused = policy_violation(context, plans)
        unreviewed = None if refused else review_required(context, plans, stored)
    differs = any(map(has_differences, plans))
    problem = refused or unreviewed
    refuses = "apply will refuse" if refused else "apply without --plan will refuse"
    if args.json:
        emit_lines(plan_lines(config, plans))
        if problem:
            warn(f"{refuses}: {problem.message}", *problem.hints)
    else:
        print_plans(config, plans, args.summary)
        if problem:
            text = f"{colour('failed', refuses)}: {problem.message}"
            emit_error(text, problem, stdout=True)
        emit("plan " + name)
        if sys.stdout.isatty() and differs and stored and not refused:
            emit("Next:\n    " + typed.again(command="apply", plan=name), error=True)
    hint: Hint = "fix these, then try again"
    if args.summary:
        hint = ("see why, and what to do:", typed.again(command="plan"))
    raise_for_failed(plans, "plan", args.json, hint)
    return 3 if args.exit_code and differs else 0


def describe_counts(record: Record) -> str:
    counts = []
    if record.files_changed:
        counts.append(plural(len(record.files_changed), "entry", "entries") + " delivered")
    if record.files_deleted:
        counts.append("%d deleted" % len(record.files_deleted))
    return ", ".join(counts)


def describe_record(record: Record) -> str:
    """Return what became of a target, in words."""
    counts = describe_counts(record)
    if record.result == "ok":
        sent = format_bytes(record.bytes_sent or 0)
        seconds = record.seconds or 0
        return f"{counts}, verified; {sent} sent in {seconds:.1f} s" if counts else EQUAL
    so_far = f"; before that: {counts}" if counts else "; nothing was delivered"
    if record.files_changed is None:
        so_far = "; it is unknown what was delivered"
    # Not to say it twice.
    if "nothing was " in (record.error or ""):
        so_far = ""
    return f"{record.error}{so_far}"


def plan_and_approve(
    context: RunContext, targets: Sequence[Target], reviewed: str | None, log: RunLog
) -> list[TargetPlan]:
    """Return the plans to carry out; raise OffsyncError, with nothing sent, if they may not be."""
    if reviewed is None:
        plans = plan_all(context, targets)
        log.identify(plan_id(context.config, plans)[0])
    else:
        stream, name = context.state.open_plan(context.typed, context.scratch)
        log.identify(name)
        with stream:
            plans = plan_all(context, targets)
            plans = approve(context, plans, stream, reviewed)
    why = policy_violation(context, plans)
    if not why and reviewed is None:
        why = review_required(context, plans)
    if why:
        raise OffsyncError(f"refused, nothing was sent: {why.message}", *why.hints)
    return plans


class Report:
    """Prints what became of each target of an apply, and what all came to."""

    def __init__(self, log: RunLog, as_json: bool) -> None:
        self.log = log
        self.as_json = as_json
        self.results: dict[str, list[str]] = {}  # result: logins
        self.said: dict[tuple[str, ...], list[str]] = {}  # failures, and whose they are

    def __enter__(self) -> Report:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # If all targets were refused, main() prints the reason once.
        quiet = ended_by_error(error) and not self.results
        for login in sorted(self.log.unreported):
            self.print(login, quiet)
        for logins in self.said.values():
            if len(logins) > 1:
                emit(
                    f"offsync: error: {join_first(logins[1:])}: the same as {logins[0]}", error=True
                )
        if not quiet and not self.as_json:
            counts = []
            for result in sorted(self.results, reverse=True):
                logins = self.results[result]
                named = "" if result == "ok" else f": {join_first(sorted(logins))}"
                counts.append(f"{len(logins)} {result}{named}")
            total = sum(map(len, self.results.values()))
            emit(f"{plural(total, 'target')}: {', '.join(counts)}", prose=True)

    def print(self, login: str, quiet: bool = False) -> None:
        """Print one record, once. Of equal failures, the first; __exit__ names the other logins."""
        record, failed = self.log.unreported.pop(login)
        self.results.setdefault(record.result, []).append(login)
        text = describe_record(record)
        if self.as_json:
            emit(json_line(record._asdict()))
        elif record.result == "ok":
            emit(f"{login}: {colour('ok', 'ok')}: {text}", prose=True)
        if record.result != "ok" and not (quiet and record.result == "refused"):
            # Equal failures are printed once. But a "target add" command differs for each target.
            hints = failed.hints if failed else ()
            commands = (hint[1] for hint in hints if isinstance(hint, tuple))
            each = [command for command in commands if "target add" in command]
            logins = self.said.setdefault((text, *each), [])
            if not logins and failed:
                emit_error(f"offsync: error: {login}: {text}", failed)
            logins.append(login)


def cmd_apply(args: argparse.Namespace) -> int:
    state = StateDirectory()
    config, targets, typed = load_targets(state, args)
    log = RunLog(state, config, targets)
    with Report(log, args.json) as report, log:
        # What cannot be logged is not sent.
        os.close(open_log(state, "; nothing was sent"))
        take_lock(state, "apply")
        log.locked = True
        if state.load() != typed.configured:
            raise OffsyncError(
                f"config {state.config}: it changed while apply was starting", "try again"
            )
        with RunContext(state, config, typed, args.jobs, with_md5=True) as context:
            plans = plan_and_approve(context, targets, args.plan, log)
            for plan, _ in context.pool.imap_unordered(
                lambda plan: log.deliver(context, plan), plans
            ):
                report.print(plan.target.login)
    return 0 if report.results.keys() == {"ok"} else 1


def cmd_verify(args: argparse.Namespace) -> int:
    state = StateDirectory()
    config, targets, typed = load_targets(state, args)
    config = config._replace(verify="hash" if args.fast else "strong")
    take_lock(state, "verify", shared=True)
    with RunContext(state, config, typed, args.jobs) as context:
        plans = plan_all(context, targets)
    # Those with an error, or with anything but kept entries: leftovers are shown, too.
    shown = [p for p in plans if p.error or len(p.changes_of("kept")) < len(p.changes)]
    if args.json:
        emit_lines(plan_lines(config, plans))
    elif shown:
        print_plans(config, shown, planning=False)
    elif sys.stdout.isatty():
        count = plural(len(plans), "target")
        emit(f"{colour('ok', 'ok')}: equal to {quote_text(config.source)}: {count}")
    raise_for_failed(plans, "verify", args.json)
    return 3 if any(map(has_differences, plans)) else 0


def names_that_match(record: Record, pattern: str) -> list[str]:
    """Return what a run changed and deleted under such a name, or a path of that form."""
    found = []
    for verb, names in (("changed", record.files_changed), ("deleted", record.files_deleted)):
        for name in names or ():
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(
                os.path.basename(name), pattern
            ):
                found.append(f"{verb} {truncate(name)}")
    return found


def cmd_log(args: argparse.Namespace) -> int:
    state = StateDirectory()
    records = list(read_log(state))
    logins = {record.login for _, record in records}
    config = state.load() if os.path.exists(state.config) else None
    if args.targets:
        known = {target.login for target in config.targets} if config else set()
        logins = match_targets(logins | known, args.targets)
    rows = [["WHEN (UTC)", "TARGET", "RESULT", "PLAN", "BY"]]
    below = [""]
    unknown = 0
    found = False
    for line, record in records:
        if record.login not in logins:
            continue
        what = describe_counts(record) or ("" if record.error else EQUAL)
        if args.name is not None:
            names = names_that_match(record, args.name)
            unknown += record.files_changed is None
            what = join_first(names)
            if not names:
                continue
        found = True
        if args.json:
            emit(line if line.endswith(b"\n") else line + b"\n")
            continue
        plan = (record.plan or "-")[:12]
        rows.append([record.timestamp, record.login, record.result, plan, record.operator])
        # On a terminal, names and errors stand on a line of their own, uncut.
        source = "" if config and record.source == config.source else f"from {record.source}"
        below.append("; ".join(filter(None, (what, record.error, source))))
    if len(rows) > 1:
        print_table(rows, below)
    if not records:
        why = "no apply has run yet"
    elif args.name is not None and not found:
        to_these = " to these targets" if args.targets else ""
        why = f"no run{to_these} changed {quote_text(args.name)}"
    else:
        why = "the log begins at " + records[0][1].timestamp
    lost = f"; what {plural(unknown, 'run')} changed is unknown" if unknown else ""
    emit(f"{quote_text(state.log)}: {why}{lost}", error=True)
    return 0


# --- Commands: manifest, doctor, completion -----------------------------------------------------


def format_manifest_line(path: bytes, digest: str) -> bytes:
    r"""Return a line as sha256sum writes it: a backslash says that \n, \r, \\ are escaped."""
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != path else b"") + digest.encode() + b"  " + escaped + b"\n"


def parse_manifest(lines: Iterable[bytes]) -> dict[bytes, str]:
    """Return path -> sha256 of what sha256sum wrote. Raises ValueError(line number)."""
    found: dict[bytes, str] = {}
    letters = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}
    for number, line in enumerate(lines, 1):
        # A CR before the line end is passed over, as by sha256sum.
        match = re.fullmatch(rb"(\\?)([0-9a-f]{64}) [ *]([^\0]+?)\r?\n?", line, re.DOTALL)
        if not match:
            raise ValueError(number)
        name = match[3]
        if match[1]:
            name = re.sub(rb"\\([\\nr])", lambda escape: letters[escape[1]], name)
        name = name[2:] if name.startswith(b"./") else name
        # Two different sums for a file cannot both hold.
        if found.setdefault(name, match[2].decode()) != match[2].decode():
            raise ValueError(number)
    return found


def manifest_files(root: str, exclude: Sequence[str], manifest: str | None) -> dict[bytes, str]:
    """Return path -> sha256 of every file of a tree.

    But not of the manifest that is compared, nor of the one that is written (to stdout).
    """
    source = Source(root, exclude)
    own = [os.fstat(1)]
    paths = []
    if manifest not in (None, "-"):
        own.append(os.stat(str(manifest)))
    for path in sorted(source.list_included(find_rsync()[0])):
        status = os.lstat(os.path.join(source.root, path))
        if stat.S_ISREG(status.st_mode) and not any(os.path.samestat(status, s) for s in own):
            paths.append(path)
            source.request(path)
    source.wait()
    source.threads.close()
    return {path: source.entry(path).sha256.hex() for path in paths}


def print_manifest(found: dict[bytes, str]) -> None:
    manifest = b"".join(format_manifest_line(path, digest) for path, digest in found.items())
    digest = new_digest(manifest).hexdigest()
    # A file name may hold control sequences: on a terminal, they are replaced.
    if sys.stdout.isatty():
        lines = manifest.decode("utf-8", "replace").split("\n")
        manifest = "\n".join(map(replace_unprintable, lines)).encode()
    emit(manifest)
    groups = " ".join(re.findall("....", digest))
    emit(
        f"{plural(len(found), 'file')}; digest of the whole (sha256 of the manifest), to compare "
        f"by voice: {groups}",
        error=True,
    )


def read_manifest(name: str) -> dict[bytes, str]:
    """Return path -> sha256 of a manifest file, "-" for stdin; it is read line by line."""
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as stream:
            return parse_manifest(iter(lambda: stream.readline(1 << 20), b""))
    except OSError as error:
        raise UsageError(
            f"manifest {quote_text(name)}: {error.strerror}", "name the file"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"manifest {quote_text(name)}:{error}: not a line as sha256sum writes it (without -z)"
        ) from None


def cmd_manifest(args: argparse.Namespace) -> int:
    directory: str = args.directory
    exclude: tuple[str, ...] = ()
    if directory is None:
        config = StateDirectory().load()
        directory = config.source
        exclude = config.exclude
    if not os.path.isdir(directory):
        raise UsageError(f"manifest: {quote_text(directory)} is not a directory", "name one")
    expected = {} if args.check is None else read_manifest(args.check)
    found = manifest_files(os.path.abspath(directory), exclude, args.check)
    if args.check is None:
        print_manifest(found)
        return 0
    for path in sorted({*expected, *found}):
        if expected.get(path) != found.get(path):
            word = "not listed" if path not in expected else "modified"
            word = "not here" if path not in found else word
            emit(f"{word:10}  {quote_name(path)}")
    if expected != found:
        return 3
    emit(f"{plural(len(found), 'file')}, all as in the manifest", error=True)
    return 0


def check_controller(state: StateDirectory) -> bool:
    """Print what is right and wrong with this controller; return whether all is right."""
    problems: set[str] = set()

    def check(what: str, find: Callable[[], str]) -> None:
        try:
            emit("%s %-10s  %s" % (colour("ok", "ok      "), what, find()))
        except (OffsyncError, OSError) as error:
            # One cause may break several.
            if str(error) not in problems:
                problem = as_offsync_error(error)
                text = f"{colour('failed', 'PROBLEM ')} {problem.message}"
                emit_error(text, problem, stdout=True)
            problems.add(str(error))

    def source() -> str:
        config = state.load()
        scanned = Source(config.source, config.exclude)
        check_source_location(scanned.root, (state.path, state.key))
        check_source(scanned, find_rsync()[0], config.targets)
        return quote_text(config.source)

    def private(path: str) -> str:
        check_private(path)
        return quote_text(path)

    def config() -> str:
        state.load()
        return private(state.config)

    def ssh() -> str:
        asked = run_program([find_program("ssh"), "-V"], limit=SESSION_DEADLINE)
        said = quote_output(asked.stderr)
        if asked.status != 0:
            raise OffsyncError(
                "ssh: fails even when asked for its version", "install it again", said=said
            )
        return f"{find_program('ssh')} {said}"

    check("rsync", lambda: "%s %d.%d.%d" % (find_rsync()[0], *find_rsync()[1]))
    check("ssh", ssh)
    check("ssh-keygen", lambda: find_program("ssh-keygen"))
    check("state", lambda: private(state.path))
    check("key", lambda: f"{private(state.key)} {check_own_key(state.key)}")
    check("config", config)
    check("source", source)
    return not problems


def check_target(context: RunContext, target: Target) -> list[Proof] | OffsyncError:
    """Return what the key can and cannot do on a target, or why that cannot be told."""
    connection = Connection(context, target)
    try:
        connection.open()
        return prove_all(connection)
    except (OffsyncError, OSError) as error:
        return as_offsync_error(error)


def print_examined(target: Target, found: list[Proof] | OffsyncError, short: bool) -> bool:
    """Print what was found out on a target; return whether all is right.

    short: print one line for a healthy target.
    """
    if isinstance(found, OffsyncError):
        emit(target.where)
        text = f"{colour('failed', 'PROBLEM')}  {getattr(found, 'why', found.message)}"
        emit_error(text, found, stdout=True, indent="  ")
        return False
    healthy = all(proof.passed is not False for proof in found)
    if healthy and short:
        passed = sum(proof.passed is True for proof in found)
        emit(f"{target.where}: {colour('ok', 'ok')}: {passed} proofs")
        return True
    emit(target.where)
    for proof in found:
        word = {True: "ok", False: "OPEN", None: "unknown"}[proof.passed]
        word = colour("failed" if proof.passed is False else "ok", "%-8s" % word)
        emit("  %s %-30s %s" % (word, proof.attempt, proof.detail), prose=True)
    if not healthy:
        open_to_thieves = failure(target, "not-restricted")
        emit_error(open_to_thieves.why, open_to_thieves, stdout=True, indent="  ")
    return healthy


def cmd_doctor(args: argparse.Namespace) -> int:
    state = StateDirectory()
    healthy = 0
    if not os.path.lexists(state.config) and not os.path.lexists(state.key):
        raise OffsyncError(
            f"doctor: {quote_text(state.path)} holds no controller's state", *no_state_hints()
        )
    if not check_controller(state):
        raise OffsyncError(
            "doctor: this controller has problems",
            "fix what is marked PROBLEM above, then run it again",
        )
    config = state.load()
    targets = []
    # Without targets in the config, the controller alone is checked.
    if config.targets or args.targets:
        targets = select_targets(config.targets, args.targets)
    with RunContext(state, config, Typed("doctor", config), args.jobs) as context:
        examined = context.pool.imap_unordered(
            lambda target: check_target(context, target), targets
        )
        for target, found in examined:
            healthy += print_examined(target, found, short=len(targets) > 1)
    emit(f"{plural(len(targets), 'target')}: {healthy} ok")
    if healthy < len(targets):
        raise OffsyncError("doctor: there are problems", "fix what is marked PROBLEM or OPEN above")
    return 0


def cmd_completion(args: argparse.Namespace) -> int:
    """Print the line for bash's init files. bash then runs this command to complete a word."""
    if "COMP_LINE" not in os.environ:
        emit("complete -o default -C 'offsync completion bash' offsync")
        return 0
    point = os.environ.get("COMP_POINT", "")
    line = os.environ["COMP_LINE"][: int(point) if re.fullmatch("[0-9]{1,9}", point) else None]
    current = line.rpartition(" ")[2]
    known = {word for name in COMMANDS for word in name.split(" ")}
    for _, _, _, arguments in COMMANDS.values():
        known.update(word for name in arguments for word in name.split() if word[0] == "-")
    if current.startswith("@"):
        known.update("@" + path for path in glob.glob(current[1:] + "*"))
    with contextlib.suppress(OffsyncError, OSError):
        state = StateDirectory()
        for target in state.load().targets:
            known |= {target.login, target.host}
        known.update(os.listdir(state.plans) if current else ())
    # readline breaks words at @ and :, too, and replaces only the part after the last break. bash
    # gives that part as its second argument.
    cut_off = len(current) - len(args.words[1]) if len(args.words) > 1 else 0
    for word in sorted(known):
        if word.startswith(current):
            emit(word[cut_off:])
    return 0


# --- Parser and main ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage raises UsageError, and options are not abbreviated."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **arguments
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, ("see:", f"{self.prog} --help"))

    def print_help(self, file: Any = None) -> None:
        emit(self.format_help().rstrip("\n"))


def version_text() -> str:
    try:
        digest = hash_file(os.fsencode(os.path.realpath(__file__)))[0].hex()
    except (OSError, NameError):
        digest = "unknown (read from standard input)"
    return f"offsync {VERSION}  sha256 {digest}"


def given_source(named: str) -> str:
    """Return the path of --source."""
    if not named:
        raise UsageError("source: empty; name a directory")
    return validate_absolute_path(os.path.abspath(named), "source")


# Arguments of several commands, with their keyword arguments for add_argument().
KEY_OPTIONS = {
    "--key": value_option("TEXT", "the public key line (default: from a pipe)"),
    "--key-file": value_option("FILE", "a file with the public key line"),
}
JSON = {"--json": flag_option("print JSON")}
TARGET_HELP = "a login, a host, a pattern ('web*'), or @FILE with one a line"
TARGETS = {"targets": value_option("TARGET", TARGET_HELP + " (default: all)", nargs="*")}
JOBS = {
    "--jobs": value_option(
        "N", "targets at once (default: the config's)", type=TOP_KEYS["jobs"].normalize
    )
}
REPEATED = {"action": "append", "default": []}
KEEP = {
    "--keep": {
        "action": "store_const",
        "const": Deletion.KEEP,
        "dest": "deletion",
        "help": "leave alone what exists only on a target, for this run",
    }
}
DELETE = {
    "--delete": {
        "action": "store_const",
        "const": Deletion.ALLOW,
        "dest": "deletion",
        "help": "allow deletions, for this run",
    },
    **KEEP,
}
# Of these, a command takes one.
EXCLUSIVE = ("--key", "--key-file", "--delete", "--keep")
RUN_OPTIONS = {
    **TARGETS,
    "--except": value_option(
        "TARGET", "all but these (the same words; repeatable)", dest="excepted", **REPEATED
    ),
    "--source": value_option(
        "DIR", "another source, for this run (to roll back)", type=given_source
    ),
    **JSON,
    **JOBS,
}
Arguments = dict[str, dict[str, Any]]
# name: (function, where it runs and what it does, example, arguments)
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, str, Arguments]] = {
    "init": (
        cmd_init,
        "controller: create key pair and config; prints the public key",
        "init --source /srv/app-data",
        {
            "--source": value_option(
                "DIR", "the directory to deliver (default: this one)", type=given_source
            )
        },
    ),
    "link": (
        cmd_link,
        "target: let the controller's key write below one path only",
        "link --path /srv/app-data --key 'ssh-ed25519 AAAA... offsync@controller'",
        {
            "--path": value_option("DIR", "where the key may write (default: ~/.offsync/sync)"),
            "--rrsync": value_option("PATH", "where rrsync is (default: known places)"),
            **KEY_OPTIONS,
            "--from": value_option(
                "PATTERN", "accept the key only from these hosts (sshd(8))", dest="from_pattern"
            ),
            "--no-symlinks": TARGET_KEYS["symlinks"].argparse_kwargs,
            "--accept-risk": {
                "choices": ("rrsync", "path"),
                "help": "go on although link reports a risk in rrsync, or in the path",
                **REPEATED,
            },
        },
    ),
    "unlink": (
        cmd_unlink,
        "target: remove the key again",
        "unlink --key 'ssh-ed25519 AAAA...'",
        KEY_OPTIONS,
    ),
    "target add": (
        cmd_target_add,
        "controller: prove host key and restriction of a target, then save it",
        "target add deploy@node02 --path /srv/app-data --host-key SHA256:...",
        {
            **{rule.option: rule.argparse_kwargs for rule in TARGET_KEYS.values() if rule.option},
            "--host-key": value_option(
                "FP", "accept this host key, SHA256:..., without asking (repeatable)", **REPEATED
            ),
        },
    ),
    "target list": (
        cmd_target_list,
        "controller: list the targets and their last outcomes",
        "target list --json",
        JSON,
    ),
    "target remove": (
        cmd_target_remove,
        "controller: forget a target; its files and its line for the key stay",
        "target remove deploy@node02",
        {"login": value_option("LOGIN", "user@host, or a host that only one target has")},
    ),
    "install-deps": (
        cmd_install_deps,
        "either: install the system packages, after asking",
        "install-deps --role target",
        {
            "--role": {
                "choices": ("controller", "target", "both"),
                "default": "both",
                "help": "default: both",
            },
            "-y --yes": flag_option("do not ask"),
        },
    ),
    "plan": (
        cmd_plan,
        "controller: show what apply would do; changes nothing",
        "plan 'web*' --exit-code",
        {
            **RUN_OPTIONS,
            **DELETE,
            "--summary": flag_option("print counts only"),
            "--exit-code": flag_option("exit 3 if there are differences"),
        },
    ),
    "apply": (
        cmd_apply,
        "controller: transfer what the plan lists, verify, log",
        "apply 'web*' --except web3 --plan FILE",
        {
            **RUN_OPTIONS,
            **DELETE,
            "--plan": value_option(
                "ID|FILE",
                "only what this reviewed plan approves: the ID that plan ends with, or the file "
                "that plan --json printed",
            ),
        },
    ),
    "verify": (
        cmd_verify,
        "controller: hash everything again; exit 3 if a target differs",
        "verify --fast",
        {
            **RUN_OPTIONS,
            **KEEP,
            "--fast": flag_option("by rsync's fastest checksum instead of MD5"),
        },
    ),
    "log": (
        cmd_log,
        "controller: what reached which target, when, and who sent it",
        "log web3 --name app.conf",
        {
            **TARGETS,
            "--name": value_option(
                "PATTERN",
                "only runs that changed or deleted such a name (a pattern of the path, or of its "
                "last component)",
            ),
            **JSON,
        },
    ),
    "manifest": (
        cmd_manifest,
        "either: print a sha256 manifest of a tree, or check one",
        "manifest /srv/app-data > app-data.sha256",
        {
            "directory": value_option(
                "DIR", "the tree (default: the configured source)", nargs="?"
            ),
            "--check": value_option("FILE", "compare with this manifest; exit 3 if it differs"),
        },
    ),
    "doctor": (
        cmd_doctor,
        "controller: check it, and prove what the key can do on targets",
        "doctor deploy@node02",
        {**TARGETS, **JOBS},
    ),
    "completion": (
        cmd_completion,
        "either: print the line that completes words in bash",
        "completion bash > /etc/bash_completion.d/offsync",
        {
            "shell": {"choices": ("bash",)},
            "words": {"nargs": argparse.REMAINDER, "help": argparse.SUPPRESS},
        },
    ),
}


def build_parser() -> argparse.ArgumentParser:
    about = "\n".join("  %-14s  %s" % (name, text) for name, (_, text, _, _) in COMMANDS.items())
    parser = Parser(
        prog="offsync",
        usage="offsync COMMAND ...   (each has --help, with an example)",
        description=(__doc__ or "").split("\n\n")[0] + "\n\n" + about,
    )
    parser.add_argument("--version", **flag_option("print the version and this file's sha256"))
    parser.add_argument(
        "--contract", **flag_option("print what it reads, writes, runs and never does")
    )
    verbose = flag_option("print each program before it starts")
    parser.add_argument("-v", "--verbose", **verbose)
    parser.set_defaults(function=None, prog="offsync", command=None)
    commands = parser.add_subparsers(
        metavar="COMMAND", parser_class=Parser, prog="offsync", help=argparse.SUPPRESS
    )
    about = "controller: add, list or remove targets"
    example = "example:\n  offsync "
    group = commands.add_parser("target", description=about, epilog=example + "target list")
    group.add_argument("-v", "--verbose", **verbose, default=argparse.SUPPRESS)
    words = group.add_subparsers(metavar="add|list|remove", parser_class=Parser, required=True)
    for name, (function, text, sample, arguments) in COMMANDS.items():
        place = words if " " in name else commands
        command = place.add_parser(
            name.split(" ")[-1], help=text, description=text, epilog=example + sample
        )
        command.add_argument("-v", "--verbose", **verbose, default=argparse.SUPPRESS)
        command.set_defaults(function=function, prog=command.prog, command=name)
        exclusive: Any = command
        if not arguments.keys().isdisjoint(EXCLUSIVE):
            exclusive = command.add_mutually_exclusive_group()
        for argument, options in arguments.items():
            where = exclusive if argument in EXCLUSIVE else command
            where.add_argument(*argument.split(), **options)
    return parser


def run_command(argv: Sequence[str]) -> int:
    """Carry out a command line; return the exit status. Raises OffsyncError."""
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        raise UsageError(
            "locale: file names are not UTF-8", ("run it so:", "PYTHONUTF8=1 " + typed_again())
        )
    words = [word for word in argv if not word.startswith("-")]
    typed = " ".join(words[: 2 if words[:1] == ["target"] else 1])
    if typed and typed not in (*COMMANDS, "target"):
        alike = did_you_mean(typed, COMMANDS, listed=False)
        raise UsageError(
            f"unknown command {quote_text(typed)}",
            *(["known: target add, target list, target remove"] if " " in typed else alike),
            ("all commands:", "offsync --help"),
        )
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        arguments = COMMANDS[args.command][3] if args.command else {}
        options = [word for name in arguments for word in name.split() if word[0] == "-"]
        hints = did_you_mean(unknown[0], options, listed=False)
        if not unknown[0].startswith("-"):
            hints.append("put what has blanks, such as a key, into quotes")
        raise UsageError(
            f"unrecognized arguments: {quote_text(' '.join(unknown))}",
            *hints,
            ("see:", f"{args.prog} --help"),
        )
    if args.verbose:
        VERBOSE.value = True
    if args.version or args.contract:
        emit(version_text() if args.version else (__doc__ or "").strip())
        return 0
    if args.function is None:
        state = StateDirectory()
        if not os.path.lexists(state.config):
            raise UsageError(
                "no command",
                'on the controller, begin with "offsync init --source DIR", on a target with '
                '"offsync link --path DIR"',
                ("all commands:", "offsync --help"),
            )
        config = state.load()
        print_targets(config, read_statuses(state))
        following: Hint = ("see what an apply would do:", offsync_command("plan"))
        if not config.targets:
            following = FIRST_TARGET
        raise UsageError("no command", following, ("all commands:", "offsync --help"))
    return int(args.function(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run offsync with these arguments; return the exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # The number of a closed standard stream would go to the next file that is opened.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Nobody else may write to a directory that is made.
    os.umask(0o022)
    # An ignored SIGCHLD would hide how programs end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # An empty HOME would be /.
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
    handle_signals(handle_signal)
    try:
        status = report_errors(sys.argv[1:] if argv is None else argv)
        # The result is printed: from now on, a signal just ends the process.
        handle_signals(end_now)
    except Interrupted as interrupted:
        name = signal.Signals(interrupted.signum).name
        emit(f"offsync: interrupted by {name}; run the same command again to continue", error=True)
        status = interrupted.status
    return status


def report_errors(argv: Sequence[str]) -> int:
    """Run one command, print the error that ends it, and return the exit status."""
    status = 1
    try:
        status = run_command(argv)
    except SystemExit:  # --help
        status = 0
    # re.error: what fnmatch in Python 3.9 raises for a pattern such as [b-a].
    except (OffsyncError, OSError, MemoryError, RecursionError, re.error) as problem:
        error = as_offsync_error(problem)
        emit_error("offsync: error: " + error.message, error)
        status = error.status
    if STDOUT_ERRORS:
        why = f"writing to standard output failed: {STDOUT_ERRORS[0]}; the remaining output is lost"
        emit_error("offsync: error: " + why, OffsyncError(why))
        status = status or 1
    return status


if __name__ == "__main__":
    # All output is flushed. This skips the shutdown of the interpreter, which takes 10 ms.
    os._exit(main())
