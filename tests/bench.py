"""Speed as ratios: offsync against one "rsync -rlptc --delete -i" over the same ssh, interleaved
in one run, monotonic clock.

usage: bench.py [ROW ...]; QUICK=1 for small trees, RUNS=n repetitions. The yardstick neither plans
nor verifies.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import subprocess
import sys
import time

from lab import OFFSYNC, Lab, LabTarget, read, require, write

QUICK = bool(os.environ.get("QUICK"))
RUNS = int(os.environ.get("RUNS", "3" if QUICK else "5"))
COLUMNS = "%-34s %9s %9s %8s %8s"


def fill(root: str, count: int, size: int, per_directory: int = 200) -> None:
    """Make count files of about size bytes each, incompressible and all different."""
    block = os.urandom(size + 65536)
    for number in range(count):
        directory = "%s/d%05d" % (root, number // per_directory)
        if number % per_directory == 0:
            os.makedirs(directory, exist_ok=True)
        with open("%s/f%07d" % (directory, number), "wb") as stream:
            start = number % 65536
            stream.write(block[start : start + size])


def median(values: list) -> float:
    """Return the middle value."""
    return sorted(values)[len(values) // 2]


class Bench:
    """A laboratory whose source is rebuilt for each row."""

    def __init__(self) -> None:
        LabTarget.KEX = ""  # as users have it
        self.lab = Lab()
        self.target = self.lab.linked_target("one")
        # The bare yardstick goes through the same sshd, key and rrsync into the same directory.
        self.rsh = (
            "%s -F /dev/null -p %d -i %s/id_ed25519 -o BatchMode=yes -o"
            " UserKnownHostsFile=%s/known_hosts"
            % (require("ssh"), self.target.port, self.lab.state, self.lab.state)
        )

    def rsync(self) -> float:
        """Run the yardstick; return seconds."""
        started = time.monotonic()
        subprocess.run(
            [
                require("rsync"),
                "-rlptc",
                "--delete",
                "-i",
                "-e",
                self.rsh,
                self.lab.source + "/",
                self.target.login + ":.",
            ],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.monotonic() - started

    def offsync(self, *args: str) -> float:
        """Run offsync; return seconds."""
        started = time.monotonic()
        subprocess.run(
            [sys.executable, OFFSYNC, *args],
            env=self.lab.env,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.monotonic() - started

    def measure(
        self, name: str, bound: str, commands: dict, prepare=lambda: None, runs: int = RUNS
    ) -> None:
        """Interleave the commands; print medians and the ratio of each to the first."""
        times: dict = {key: [] for key in commands}
        for _ in range(runs):
            for key, command in commands.items():
                prepare()
                times[key].append(command())
        base = median(times[next(iter(commands))])
        for key, values in list(times.items())[1:]:
            print(
                COLUMNS
                % (
                    name + ": " + key,
                    "%.2f s" % base,
                    "%.2f s" % median(values),
                    "%.2f x" % (median(values) / base),
                    bound,
                ),
                flush=True,
            )

    def fresh(self, count: int, size: int) -> None:
        """Fill the source, and deliver it once."""
        for path in (self.lab.source, self.target.path):
            shutil.rmtree(path)
            os.mkdir(path)
        fill(self.lab.source, count, size)

    def touch(self, count: int) -> None:
        """Change the content of count files, spread over the tree, size kept."""
        paths = sorted(
            os.path.join(base, name)
            for base, _, names in os.walk(self.lab.source)
            for name in names
        )
        for path in paths[:: max(len(paths) // count, 1)][:count]:
            with open(path, "r+b") as stream:
                stream.write(os.urandom(16))

    def row_small(self) -> None:
        """20,000 files, 1 GB: first delivery, plan, nothing to do, 100 changed."""
        count, size = (2000, 50000) if QUICK else (20000, 50000)
        self.fresh(count, size)

        def empty() -> None:
            shutil.rmtree(self.target.path)
            os.mkdir(self.target.path)

        self.measure(
            "%d files, first" % count,
            "1.65",
            {"rsync": self.rsync, "apply": lambda: self.offsync("apply")},
            empty,
            max(RUNS // 2, 1),
        )
        self.offsync("apply")
        self.measure(
            "%d files, equal" % count,
            "1.15/1.2",
            {
                "rsync": self.rsync,
                "plan": lambda: self.offsync("plan"),
                "apply": lambda: self.offsync("apply"),
            },
        )
        self.measure(
            "%d files, 100 changed" % count,
            "2.0",
            {"rsync": self.rsync, "apply": lambda: self.offsync("apply")},
            lambda: self.touch(100),
        )

    def row_large(self) -> None:
        """8 GB in 200 files, 10 changed."""
        count, size = (20, 10_000_000) if QUICK else (200, 40_000_000)
        self.fresh(count, size)
        self.offsync("apply")
        self.measure(
            "%d large files, 10 changed" % count,
            "1.15",
            {"rsync -n": lambda: self.dry(), "plan": lambda: self.offsync("plan")},
            lambda: self.touch(10),
            min(RUNS, 3),
        )
        self.measure(
            "%d large files, 10 changed" % count,
            "2.1",
            {"rsync": self.rsync, "apply": lambda: self.offsync("apply")},
            lambda: self.touch(10),
            min(RUNS, 3),
        )

    def dry(self) -> float:
        """The yardstick as a dry run, so that what plan sees stays changed."""
        started = time.monotonic()
        subprocess.run(
            [
                require("rsync"),
                "-nrlptc",
                "--delete",
                "-i",
                "-e",
                self.rsh,
                self.lab.source + "/",
                self.target.login + ":.",
            ],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.monotonic() - started

    def row_many(self) -> None:
        """16 targets, 50 ms away each, nothing to do, against one such target."""
        delay = "%s -I -S %s %%h %%p 0.025" % (
            sys.executable,
            os.path.join(os.path.dirname(os.path.abspath(__file__)), "delay.py"),
        )
        targets = [self.target] + [
            self.lab.linked_target("far%d" % number) for number in range(4 if QUICK else 15)
        ]
        write(self.lab.ssh_config, "ProxyCommand %s\n" % delay)
        self.fresh(200, 1000)
        self.offsync("apply")
        self.measure(
            "%d targets, 50 ms" % len(targets),
            "2.5",
            {
                "one": lambda: self.offsync("plan", targets[0].login),
                "plan": lambda: self.offsync("plan"),
            },
            runs=3,
        )
        write(self.lab.ssh_config, "")
        for target in targets[1:]:  # the next row has one target again
            self.lab.offsync("target remove", target.login, check=0)
            target.stop()

    def row_million(self) -> None:
        """1,000,000 entries: own peak memory and CPU, rsync's CPU; nothing to do, and all new."""
        count = 20000 if QUICK else 1_000_000
        self.fresh(count, 1)
        subprocess.run(["cp", "-a", self.lab.source + "/.", self.target.path], check=True)
        before = self.usage(self.rsync)
        own = self.usage(lambda: self.offsync("plan"), own=True)
        print(
            "%d entries, equal: rsync alone %.1f s CPU; offsync itself %.1f s CPU (%.2f of it;"
            " bound 0.2), %d MB peak (bound 50)"
            % (count, before[0], own[0], own[0] / before[0], own[1]),
            flush=True,
        )
        shutil.rmtree(self.target.path)
        os.mkdir(self.target.path)
        own = self.usage(lambda: self.offsync("plan"), own=True)
        print(
            "%d entries, all new: offsync itself %.1f s CPU, %d MB peak (bound 600)"
            % (count, own[0], own[1]),
            flush=True,
        )

    def usage(self, command, own: bool = False) -> tuple:
        """Return (CPU seconds, peak MB) of a command's children, or of offsync.py alone (which
        reports it to us).
        """
        if own:
            report = self.lab.base + "/usage"
            # VmHWM, since ru_maxrss holds what this process had before exec, too: our own peak.
            code = (
                "import os, resource, runpy, sys\ndef say():\n u ="
                " resource.getrusage(resource.RUSAGE_SELF)\n peak ="
                " open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n open(%r,"
                " 'w').write('%%f %%s' %% (u.ru_utime + u.ru_stime,"
                " peak))\nme, leave = os.getpid(), os._exit\nos._exit = lambda status:"
                " (os.getpid() == me and say(), leave(status))\nsys.argv = ['offsync',"
                " 'plan']\nrunpy.run_path(%r,"
                " run_name='__main__')\n" % (report, OFFSYNC)
            )
            subprocess.run(
                [sys.executable, "-c", code],
                env=self.lab.env,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            cpu, peak = open(report).read().split()
            return float(cpu), int(peak) // 1024
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 0

    def row_targets(self) -> None:
        """1 to 256 targets, nothing to do: what each further one costs the controller (offsync, ssh
        and rsync here); offsync's own peak of memory, and that few descriptors will do.
        """
        self.fresh(200, 1000)
        targets = [self.target] + [
            self.lab.configured_target("near%d" % number) for number in range(3 if QUICK else 255)
        ]
        self.offsync("apply")
        found = {}
        for count in (1, 4, 16, 64, 256)[: 2 if QUICK else 5]:
            logins = [target.login for target in targets[:count]]
            found[count] = median(
                [self.usage(functools.partial(self.offsync, "plan", *logins))[0] for _ in range(3)]
            )
            print(
                "%d targets: %.2f s CPU of the controller, %.3f s for each further one"
                % (count, found[count], (found[count] - found[1]) / max(count - 1, 1)),
                flush=True,
            )
        cpu, peak = self.usage(lambda: self.offsync("plan"), own=True)
        print("%d targets: offsync itself %.1f s CPU, %d MB peak" % (len(targets), cpu, peak))
        limited = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", sys.executable, OFFSYNC, "plan"]
        subprocess.run(limited, env=self.lab.env, stdout=subprocess.DEVNULL, check=True)
        print("%d targets: 128 descriptors are enough" % len(targets), flush=True)
        for target in targets[1:]:
            target.stop()
        config = os.path.join(self.lab.state, "config.yaml")
        text = read(config)
        second = text.index("  - login", text.index("  - login") + 1)
        write(config, text[:second])  # the next row has one target again

    def row_far(self) -> None:
        """1,000 small files, 200 ms there and back: nothing to do, and 10 changed."""
        self.fresh(1000, 1000)
        self.offsync("apply")
        delay = "%s -I -S %s %%h %%p 0.1" % (
            sys.executable,
            os.path.join(os.path.dirname(os.path.abspath(__file__)), "delay.py"),
        )
        write(self.lab.ssh_config, "ProxyCommand %s\n" % delay)
        near, self.rsh = self.rsh, self.rsh + " -o 'ProxyCommand=%s'" % delay
        apply = {"rsync": self.rsync, "apply": lambda: self.offsync("apply")}
        self.measure("1000 files, 200 ms, equal", "1.15", apply, runs=3)
        self.measure("1000 files, 200 ms, 10 changed", "2.4", apply, lambda: self.touch(10), 3)
        write(self.lab.ssh_config, "")
        self.rsh = near

    def row_doctor(self) -> None:
        """doctor of 12 targets against one."""
        self.fresh(10, 1000)
        more = [self.lab.configured_target("ill%d" % number) for number in range(11)]
        one = self.target.login
        commands = {
            "one": lambda: self.offsync("doctor", one),
            "12": lambda: self.offsync("doctor"),
        }
        self.measure("doctor of 12 targets", "6", commands, runs=3)
        started = time.monotonic()
        self.lab.add(self.target)
        print("target add: %.2f s (bound 2)" % (time.monotonic() - started), flush=True)
        for target in more:
            self.lab.offsync("target remove", target.login, check=0)
            target.stop()

    def row_phases(self) -> None:
        """Where one apply of 100 changed files spends its time, by when its programs start."""
        self.fresh(2000 if QUICK else 20000, 50000)
        self.offsync("apply")
        self.touch(100)
        script = (
            "import runpy, subprocess, sys, time\nbegun, real = time.monotonic(),"
            " subprocess.Popen\ndef popen(argv, **more):\n    words = ' '.join(map(str, argv))\n   "
            " print('%.3f %s' % (time.monotonic() - begun, words), file=sys.stderr)\n    return"
            " real(argv, **more)\nsubprocess.Popen = popen\nsys.argv = ['offsync',"
            " 'apply']\nrunpy.run_path(" + repr(OFFSYNC) + ", run_name='__main__')\n"
        )
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=self.lab.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        whole, at, name = time.monotonic() - started, 0.0, "start"
        steps = (("ControlMaster=yes", "open"), (" -rlptc ", "pass"), ("offsync-", ""))
        steps += ((" -r --timeout", "path"), (" --size-only", "modes"), (" -ii ", "send"))
        steps += ((" -lptc ", "compare"), (" -rlpt ", "tree"))
        found = []
        for line in done.stderr.splitlines():
            when, _, words = line.partition(" ")
            step = next((step for text, step in steps if text in words and step), "")
            if step and when[:1].isdigit():
                found.append("%s %.2f" % (name, float(when) - at))
                at, name = float(when), step if step != name else name
        found.append("%s %.2f" % (name, whole - at))
        print("phases of an apply, 100 changed (s): " + ", ".join(found), flush=True)

    def row_help(self) -> None:
        """The CPU of offsync --help over that of importing argparse."""

        def least(*words: str) -> float:
            return min(
                self.usage(
                    lambda: subprocess.run(
                        [sys.executable, *words],
                        stdout=subprocess.DEVNULL,
                        check=True,
                        env=self.lab.env,
                    )
                )[0]
                for _ in range(15)
            )

        bare, own = least("-c", "import argparse"), least(OFFSYNC, "--help")
        print(
            "--help: %.0f ms CPU, import argparse alone %.0f ms: %.0f ms more (bound 55)"
            % (own * 1000, bare * 1000, (own - bare) * 1000),
            flush=True,
        )


def main() -> None:
    """Run the named rows, or all."""
    bench = Bench()
    try:
        versions = [
            subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ).stdout
            for words in (["rsync", "--version"], ["ssh", "-V"])
        ]
        print("%d cores; medians of %d runs" % (os.cpu_count() or 1, RUNS))
        print("; ".join(version.split("  protocol")[0].split("\n")[0] for version in versions))
        print(COLUMNS % ("row", "yardstick", "offsync", "ratio", "bound"))
        for name in sys.argv[1:] or (
            "help",
            "small",
            "phases",
            "large",
            "far",
            "many",
            "doctor",
            "targets",
            "million",
        ):
            getattr(bench, "row_" + name)()
    finally:
        bench.lab.close()


if __name__ == "__main__":
    main()
