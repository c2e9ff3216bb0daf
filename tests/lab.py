"""A laboratory for tests, demo and bench: throw-away sshd processes on loopback, scratch homes,
real rsync and rrsync.

Works as root and as an ordinary user. Never port 22, never the real home, nothing left behind.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import pty
import pwd
import py_compile
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell in the background has it
    signal.signal(signal.SIGINT, signal.default_int_handler)
HERE = os.path.dirname(os.path.abspath(__file__))
OFFSYNC = os.path.join(os.path.dirname(HERE), "offsync.py")
USER = pwd.getpwuid(os.geteuid()).pw_name
spec = importlib.util.spec_from_file_location("offsync", OFFSYNC)
offsync = importlib.util.module_from_spec(spec)  # for the tests of its pure parts
spec.loader.exec_module(offsync)


@functools.cache
def risk() -> tuple:
    """Return what link must be given here: most rrsyncs let a key out of its directory, which is
    accepted for scratch directories.
    """
    try:
        offsync.probe_rrsync(offsync.find_rrsync(None), False)
    except offsync.OffsyncError as error:
        return ("--accept-risk", "rrsync") if "--accept-risk rrsync" in str(error) else ()
    return ()


def require(name: str) -> str:
    """Return the path of a system program; without it the suite is in error, not skipped."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")
    if not found:
        raise RuntimeError("%s is missing: run: python3 offsync.py install-deps --role both" % name)
    return os.path.realpath(found) if name == "sshd" else found


def snapshot(root) -> dict:
    """Return {path: (type, mode, content or link)} of a tree; modes of symlinks do not count.

    Looks again where something vanishes meanwhile: a killed rsync there ends a moment later.
    """
    found = {}
    root = os.fsencode(root)

    def walk(directory: bytes) -> None:
        for name in os.listdir(os.path.join(root, directory)):
            path = os.path.join(directory, name)
            status = os.lstat(os.path.join(root, path))
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                found[path] = ("symlink", 0, os.readlink(os.path.join(root, path)))
            elif stat.S_ISDIR(status.st_mode):
                found[path] = ("directory", mode, b"")
                walk(path)
            elif stat.S_ISREG(status.st_mode):
                with open(os.path.join(root, path), "rb") as stream:
                    found[path] = ("file", mode, stream.read())
            else:
                found[path] = ("special", mode, b"")

    for last in [False] * 9 + [True]:
        found.clear()
        try:
            walk(b"")
            break
        except FileNotFoundError:
            if last:
                raise
    return found


def read_plan(lines) -> dict:
    """Return a plan's JSON Lines as {"policy": {}, "targets": [{"login": ..., kind: [entries]}],
    "plan": ID}.
    """
    rows = [json.loads(line) for line in lines.splitlines()]
    targets = {
        row["login"]: {**row, "added": [], "modified": [], "missing": [], "leftover": []}
        for row in rows[1:]
        if "kind" not in row
    }
    for row in rows[1:]:
        if "kind" in row:
            targets[row.pop("login")][row.pop("kind")].append(row)
    return {
        "policy": rows[0],
        "targets": list(targets.values()),
        "plan": hashlib.sha256(lines).hexdigest(),
    }


def write(path, content=b"x\n", mode=None, when=None) -> None:
    """Write a file and the directories above it."""
    path = os.fsencode(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode())
    if mode is not None:
        os.chmod(path, mode)
    if when is not None:
        os.utime(path, (when, when))


def remove_tree(path) -> None:
    """Remove a tree, also directories that their owner may not list or write to."""
    os.chmod(path, 0o700)
    for directory, names, _ in os.walk(os.fsencode(path)):
        for name in names:  # before they are listed
            if not os.path.islink(os.path.join(directory, name)):
                os.chmod(os.path.join(directory, name), 0o700)
    shutil.rmtree(path)


def read(path) -> str:
    """Return a text file's contents."""
    with open(path, encoding="utf-8", errors="surrogateescape") as stream:
        return stream.read()


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LabTarget:
    """One throw-away sshd: its port, scratch home, authorized_keys, delivery path and log."""

    # What OpenSSH prefers since 9.0 costs 60 ms for each login, a tenth of the suite.
    KEX = "KexAlgorithms curve25519-sha256"

    def __init__(self, lab: Lab, name: str, options: str = "", address: str = "127.0.0.1") -> None:
        self.lab, self.name, self.options, self.address = lab, name, options, address
        # what a shell, as root, does before sshd starts, in a mount namespace of their own
        self.namespace = ""
        self.base = os.path.join(lab.base, name)
        self.home = os.path.join(self.base, "home")
        self.path = os.path.join(self.base, "data")
        self.keys = os.path.join(self.home, ".ssh", "authorized_keys")
        self.log = os.path.join(self.base, "sshd.log")
        self.login = "%s@%s" % (USER, "[%s]" % address if ":" in address else address)
        os.makedirs(self.home)
        os.chmod(self.home, 0o755)
        self.host_key = os.path.join(self.base, "host_key")
        self.new_host_key()
        self.port = free_port()
        self.process = None
        self.start()

    @property
    def words(self) -> list:
        """Return what names this target to target add: login, path and port."""
        return [self.login, "--path", self.path, "--port", str(self.port)]

    def new_host_key(self) -> None:
        """Give the host a new ed25519 key; a running sshd must be restarted."""
        for path in (self.host_key, self.host_key + ".pub"):
            if os.path.exists(path):
                os.unlink(path)
        subprocess.run(
            [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", self.host_key],
            check=True,
        )

    @property
    def fingerprint(self) -> str:
        """Return the SHA256 fingerprint of the host key."""
        out = subprocess.run(
            [require("ssh-keygen"), "-l", "-f", self.host_key + ".pub"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        return out.split()[1]

    def start(self) -> None:
        """Start sshd and return when it listens."""
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # sshd's empty privilege separation directory
        config = os.path.join(self.base, "sshd_config")
        # SHLVL keeps bash from reading the account's own ~/.bashrc, which is not part of the
        # laboratory.
        write(
            config,
            "%s\n%s\nSetEnv SHLVL=2\nPort %d\nListenAddress %s\nHostKey %s\nAuthorizedKeysFile"
            " %s\nStrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication"
            " no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nLogLevel VERBOSE\nUseDNS"
            " no\n" % (self.options, self.KEX, self.port, self.address, self.host_key, self.keys),
        )
        argv = [require("sshd"), "-D", "-e", "-f", config]
        if self.namespace:
            argv = [*"unshare --mount sh -e -c".split(), self.namespace + '\nexec "$0" "$@"', *argv]
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        line = b""
        seen = b""
        while b"Server listening" not in line:
            line = self.process.stderr.readline()
            seen += line
            if not line:
                raise RuntimeError("sshd did not start: %s" % seen.decode(errors="replace"))
        log = open(self.log, "ab")
        self.pump = subprocess.Popen(
            ["cat"], stdin=self.process.stderr, stdout=log, start_new_session=True
        )
        self.process.stderr.close()
        log.close()

    def stop(self) -> None:
        """End sshd and its sessions."""
        if self.process:
            for pid in descendants(self.process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.process.kill()
            self.process.wait()
            self.pump.wait()
            self.process = None

    def read_log(self) -> str:
        """Return what sshd logged so far."""
        with open(self.log, encoding="utf-8", errors="replace") as stream:
            return stream.read()


def processes() -> list:
    """Return (PID, parent's PID, name, command line) of every process: from proc(5), or from ps
    where there is none.
    """
    found = []
    if not os.path.isdir("/proc/self"):
        out = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,comm=,args="],
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            check=True,
        ).stdout
        return [
            (int(row[0]), int(row[1]), os.path.basename(row[2]), row[3])
            for row in (line.split(None, 3) for line in out.splitlines())
            if len(row) == 4
        ]
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % name, errors="replace") as stream:
                before, _, after = stream.read().rpartition(")")
            with open("/proc/%s/cmdline" % name, "rb") as stream:
                args = stream.read().replace(b"\0", b" ").decode(errors="replace").strip()
            found.append((int(name), int(after.split()[1]), before.split("(", 1)[1], args))
        except OSError:  # it has ended
            pass
    return found


def descendants(pid: int) -> list:
    """Return the PIDs of all descendants of a process."""
    children: dict = {}
    for child, parent, _, _ in processes():
        children.setdefault(parent, []).append(child)
    found, pending = [], [pid]
    while pending:
        for child in children.get(pending.pop(), []):
            found.append(child)
            pending.append(child)
    return found


class Lab:
    """A controller and any number of targets below one scratch directory."""

    def __init__(self) -> None:
        self.base = tempfile.mkdtemp(prefix="offsync-lab-", dir="/tmp")
        os.chmod(self.base, 0o755)
        self.home = os.path.join(self.base, "controller")
        self.state = os.path.join(self.home, ".offsync")
        self.source = os.path.join(self.base, "source")
        self.tmp = os.path.join(self.base, "tmp")
        self.bin = os.path.join(self.base, "bin")
        for path in (self.home, self.source, self.tmp, self.bin):
            os.makedirs(path)
        self.ssh_config = os.path.join(self.base, "ssh_config")
        write(self.ssh_config, "")
        # ssh reads the account's own ~/.ssh/config whatever HOME says: this one reads the
        # laboratory's.
        self.program("ssh", '#!/bin/sh\nexec %s -F %s "$@"\n' % (require("ssh"), self.ssh_config))
        for name in ("rsync", "rrsync", "ssh-keygen", "sshd"):
            require(name)
        self.targets: list = []
        dropped = "OFFSYNC_HOME OFFSYNC_RSYNC SSH_CONNECTION SSH_AUTH_SOCK NO_COLOR TMUX".split()
        self.env = {key: value for key, value in os.environ.items() if key not in dropped}
        self.env.update(
            HOME=self.home,
            PATH=self.bin + ":" + self.env.get("PATH", ""),
            TMPDIR=self.tmp,
            PYTHONDONTWRITEBYTECODE="1",
        )
        # Half of what a short command costs is compiling the file: a copy in the directory in which
        # the commands run is compiled once, and found by "python -m compiled".
        copy = shutil.copy(OFFSYNC, os.path.join(self.base, "compiled.py"))
        py_compile.compile(copy, doraise=True)

    def program(self, name: str, text: str) -> str:
        """Put a script in front of the PATH; return its path."""
        path = os.path.join(self.bin, name)
        write(path, text, 0o755)
        return path

    def altered(self, *changes: tuple[str, str]) -> str:
        """Return the path of a copy of offsync.py with texts replaced, such as shorter deadlines.

        changes: (old, new). Raises AssertionError if an old text is not there exactly once.
        """
        text = read(OFFSYNC)
        for old, new in changes:
            assert text.count(old) == 1, "%d times in offsync.py: %s" % (text.count(old), old)
            text = text.replace(old, new)
        path = os.path.join(self.base, "altered.py")
        write(path, text)
        return path

    def offsync(self, *args, home=None, input=None, check=None, env=None, program="", timeout=300):
        """Run offsync, or this program, without a terminal; check is the expected exit status.

        The first argument is several words, separated by blanks.
        """
        environment = dict(self.env, **(env or {}))
        if home:
            environment["HOME"] = home
        done = subprocess.run(
            [sys.executable, *([program] if program else ["-m", "compiled"]), *words(args)],
            env=environment,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=timeout,
            cwd=self.base,
        )
        done.out = done.stdout.decode("utf-8", "surrogateescape")
        done.err = done.stderr.decode("utf-8", "surrogateescape")
        if check is not None and done.returncode != check:
            raise AssertionError(
                "offsync %s: exit %d instead of %d\nstdout: %s\nstderr: %s"
                % (" ".join(map(str, args)), done.returncode, check, done.out, done.err)
            )
        if "Traceback" in done.err:
            raise AssertionError("a traceback: " + done.err)
        return done

    def start(self, *args, program: str = OFFSYNC, **more) -> subprocess.Popen:
        """Start offsync.py in the background, as a terminal would: signals that we ourselves
        ignore (nohup) are not passed on.
        """
        return subprocess.Popen(
            [sys.executable, program, *words(args)],
            env=dict(self.env, **more.pop("env", {})),
            preexec_fn=lambda: [
                signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd=self.base,
            **more,
        )

    def init(self) -> str:
        """Run init; return the public key line."""
        return self.offsync("init", "--source", self.source, check=0).out.strip()

    def target(self, name: str, options: str = "", address: str = "127.0.0.1") -> LabTarget:
        """Start one more target; every target has another loopback address, so that its login is
        its own.
        """
        number = len(self.targets)
        if address == "127.0.0.1":
            address = "127.0.%d.%d" % (number // 250, number % 250 + 1)
        target = LabTarget(self, name, options, address)
        self.targets.append(target)
        return target

    def link(self, target: LabTarget, *args) -> subprocess.CompletedProcess:
        """Run link on a target with the controller's key."""
        key = os.path.join(self.state, "id_ed25519.pub")
        words = ("link --path", target.path, "--key-file", key, *risk(), *args)
        return self.offsync(*words, home=target.home, check=0)

    def add(self, target: LabTarget, *args, check=0):
        """Run target add with the target's real fingerprint."""
        words = ("target add", *target.words, "--host-key", target.fingerprint)
        return self.offsync(*words, *args, check=check)

    def linked_target(self, name: str, options: str = "") -> LabTarget:
        """Return a new target, linked and added."""
        if not os.path.exists(self.state):
            self.init()
        target = self.target(name, options)
        self.link(target)
        self.add(target)
        return target

    def configured_target(self, name: str, options: str = "") -> LabTarget:
        """Return a new target as linked_target() does, in a tenth of the time: its files are
        written directly.
        """
        if not os.path.exists(self.state):
            self.init()
        target = self.target(name, options)
        write(
            target.keys,
            'command="%s",%s %s'
            % (
                offsync.format_forced_command("/usr/bin/rrsync", target.path),
                offsync.KEY_RESTRICTIONS,
                read(os.path.join(self.state, "id_ed25519.pub")),
            ),
        )
        os.makedirs(target.path)
        with open(os.path.join(self.state, "known_hosts"), "a") as stream:
            stream.write(
                "[%s]:%d %s" % (target.address, target.port, read(target.host_key + ".pub"))
            )
        config = os.path.join(self.state, "config.yaml")
        block = (
            "  - login: '%s'\n    user: '%s'\n    host: '%s'\n    remote_path: '%s'\n    port: %d\n"
            % (target.login, USER, target.address, target.path, target.port)
        )
        write(config, read(config).replace("targets: []", "targets:") + block)
        return target

    def configure(self, **values) -> None:
        """Set top-level scalars of the config, or exclude."""
        path = os.path.join(self.state, "config.yaml")
        with open(path, encoding="utf-8") as stream:
            lines = stream.read().split("\n")
        if "exclude" in values:
            start = next(i for i, line in enumerate(lines) if line.startswith("exclude:"))
            end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" "))
            patterns = values.pop("exclude")
            lines[start:end] = (
                (["exclude:"] + ["  - '%s'" % p for p in patterns]) if patterns else ["exclude: []"]
            )
        for key, value in values.items():
            lines = [line for line in lines if not line.startswith(key + ":")]
            lines.insert(1, "%s: %s" % (key, value))
        write(path, "\n".join(lines))

    def records(self) -> list:
        """Return the records of operations.log."""
        path = os.path.join(self.state, "operations.log")
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    def close(self) -> None:
        """End all sshd and remove everything."""
        for target in self.targets:
            target.stop()
        remove_tree(self.base)


def wait_for(condition, what: str, seconds: float = 30.0):
    """Return condition()'s first true value; looks often, and gives up loudly."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("waited in vain for " + what)
        time.sleep(0.005)


def mentions(text: str) -> list:
    """Return the command lines of all processes that mention a text."""
    return [args for _, _, _, args in processes() if text in args]


def words(args: tuple) -> list:
    """Return the words of a command whose first argument is several, separated by blanks."""
    return [*args[0].split(" "), *args[1:]] if args else []


def type_on_terminal(
    argv: list, env: dict, *dialogue: tuple, stdin: str = "", columns: int = 80
) -> tuple:
    """Run a program on a terminal of its own and type each answer after its prompt; return (exit
    status, what was shown).

    stdin names a file that the program gets instead of the terminal.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        if stdin:
            os.dup2(os.open(stdin, os.O_RDONLY), 0)
        os.execve(argv[0], argv, env)
    seen, start = b"", 0
    try:
        for prompt, answer in dialogue:
            while prompt not in seen[start:]:
                seen += os.read(terminal, 4096)
            start = len(seen)
            os.write(terminal, answer.encode())
        while True:
            chunk = os.read(terminal, 4096)
            if not chunk:
                break
            seen += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode(errors="replace")


def comm(pid: int) -> str:
    """Return the name of a process."""
    return next((name for number, _, name, _ in processes() if number == pid), "")


def can_mount() -> bool:
    """Tell whether a mount namespace of one's own can be had here."""
    return (
        os.geteuid() == 0
        and bool(shutil.which("unshare"))
        and subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode
        == 0
    )


def change(file: str, edit: str) -> str:
    """Return the shell words that show an edited copy of a file in its place, in the namespace
    alone.
    """
    return (
        "copy=$(mktemp) && sed '%s' %s > $copy && chmod --reference=%s $copy && mount --bind $copy"
        " %s && rm $copy\n" % (edit, file, file, file)
    )


def login_shell(path: str) -> str:
    """Return the words that give root another login shell."""
    return change("/etc/passwd", "s,^\\(root:.*:\\).*,\\1%s," % path)


def pam(*lines: str) -> str:
    """Return the words that make these sshd's PAM configuration."""
    return (
        "copy=$(mktemp) && printf '%%s\\n' %s > $copy && mount --bind $copy /etc/pam.d/sshd && rm"
        " $copy\n" % " ".join("'%s'" % line for line in lines)
    )


class LabTestCase(unittest.TestCase):
    """A laboratory for each test."""

    def setUp(self) -> None:
        self.lab = Lab()
        self.addCleanup(self.lab.close)

    def assert_refused(self, done, status: int, *words: str) -> None:
        """Assert the exit status, and one error on stderr, which with its hints has these words."""
        self.assertEqual(done.returncode, status, done.err)
        lines = [line for line in done.err.splitlines() if not line.startswith(" ")]
        errors = [line for line in lines if not line.startswith("offsync: warning: ")]
        self.assertEqual(len(errors), 1, done.err)
        self.assertTrue(errors[0].startswith("offsync: error: "), done.err)
        for word in words:
            self.assertIn(word, done.err)


class OneTargetCase(LabTestCase):
    """One laboratory for the class; source, target and policies are reset for each test."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.lab = Lab()
        cls.addClassCleanup(cls.lab.close)
        cls.target = cls.lab.configured_target("one")
        cls.config = read(cls.lab.state + "/config.yaml")

    def setUp(self) -> None:
        write(self.lab.state + "/config.yaml", self.config)
        for path in (self.lab.source, self.target.path):
            remove_tree(path)
            os.mkdir(path)
        self.source, self.there = self.lab.source, self.target.path

    def plan(self, *args, check=0) -> dict:
        return read_plan(self.lab.offsync("plan --json", *args, check=check).stdout)

    def unchanged(self) -> tuple:
        """Return source and target, which a refusal must leave as they were."""
        return snapshot(self.source), snapshot(self.there)


class ThreeTargetsCase(LabTestCase):
    """Three targets in a laboratory of the class."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.lab = Lab()
        cls.addClassCleanup(cls.lab.close)
        cls.targets = [cls.lab.configured_target("t%d" % number) for number in range(3)]
        cls.config = read(cls.lab.state + "/config.yaml")

    def setUp(self) -> None:
        write(self.lab.state + "/config.yaml", self.config)
        for path in (self.lab.source, *(target.path for target in self.targets)):
            shutil.rmtree(path)
            os.mkdir(path)
        self.source = self.lab.source

    def review(self, *args) -> str:
        """Return a file with the plan of now."""
        path = self.lab.base + "/plan.jsonl"
        write(path, self.lab.offsync("plan --json", *args, check=0).stdout)
        return path

    def refused(self, reviewed: str, *words: str, args=()) -> None:
        before = [snapshot(target.path) for target in self.targets]
        self.assert_refused(
            self.lab.offsync("apply", *args, "--plan", reviewed), 1, "nothing was sent", *words
        )
        self.assertEqual([snapshot(target.path) for target in self.targets], before)


class WrappedRsyncCase(OneTargetCase):
    """Wrappers of the controller's rsync and the target's rrsync that act at one step."""

    def wrap_target_rrsync(self, script: str) -> str:
        """Replace the target's rrsync by a script, in which "real" is the real one, and which runs
        in the delivery path; return the line of authorized_keys as it was.
        """
        path = self.lab.base + "/standing-rrsync"
        write(
            path,
            '#!/bin/bash\nreal() { /usr/bin/rrsync "${args[@]}"; }\nargs=("$@")\ncd %s\n%s\n'
            % (self.there, script),
            0o755,
        )
        line = read(self.target.keys)
        self.addCleanup(write, self.target.keys, line)
        write(self.target.keys, line.replace("/usr/bin/rrsync", path))
        return line

    def wrap_local_rsync(self, script: str) -> dict:
        """Return the environment in which a script is rsync, in which "real" is the real one."""
        path = self.lab.program(
            "standing-rsync",
            '#!/bin/bash\nargs=("$@")\nreal() { %s "${args[@]}"; }\ncd %s\n%s\n'
            % (require("rsync"), self.source, script),
        )
        return {"OFFSYNC_RSYNC": path}

    def mode(self, path: str) -> int:
        return stat.S_IMODE(os.stat(path).st_mode)


class DiagnosisCase(OneTargetCase):
    """One target; each row changes its sshd, its forced command, or the controller's ssh_config."""

    WAITS = True

    def setUp(self) -> None:
        super().setUp()
        write(self.lab.ssh_config, "")
        write(self.source + "/f", "x")
        if not hasattr(type(self), "keys"):
            type(self).keys = read(self.target.keys)
        write(self.target.keys, self.keys)

    def restart(self, options: str = "", namespace: str = "") -> None:
        """Start the target's sshd again, with these options and what a shell does before."""
        self.target.stop()
        self.target.options, self.target.namespace = options, namespace
        self.target.start()

    def said(
        self, *words: str, never: tuple = (), program: str = "", command: str = "plan"
    ) -> None:
        """Assert that plan (or apply) fails with these words, and without those of "never"."""
        done = self.lab.offsync(*command.split(), check=1, program=program, timeout=100)
        text = done.err if "apply" in command else done.out
        first = "offsync: error: " if "apply" in command else "  not compared: "
        # The fact, and the hints that follow it.
        why = re.search(r"(?m)^%s.*\n(?: +.*\n)*" % first, text)[0]
        for word in words:
            self.assertIn(word, why)
        for word in (*never, "unrecognised failure"):
            self.assertNotIn(word, why)
        self.assertLess(len(why), 1200)
