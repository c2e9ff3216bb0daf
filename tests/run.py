"""Run the suite: every test class in a process of its own, more at once than there are cores.

usage: run.py [--yes] [FILE | FILE.CLASS | FILE.CLASS.test ...]; --yes installs missing system
programs unasked. The last line is "N passed, M failed" (", K skipped" if any were).

  test_end_to_end      the whole job, from nothing to a verified delivery; what is missing
  test_config          config.yaml: the subset of YAML, what is refused with its line
  test_plan            what a plan lists, its forms, its ID; the policies
  test_reviewed_plans  apply --plan: what a review approves
  test_deleting        deletions, and what is kept
  test_exact           exactly what was planned is sent: content, modes, symlinks; time limits
  test_property        random trees against an oracle
  test_failures        what fails at work: targets, disks, kills, locks; many targets
  test_failure_table   recorded answers of programs, and the failure that each one is
  test_diagnosis       failures provoked from the real programs, and the side that is named
  test_hints           the command of each hint, typed as printed
  test_hostile         hostile targets
  test_trust           host keys, the proofs of restriction and path, connections
  test_link            link and unlink; what a thief of the key tries
  test_filesystems     targets that ignore case, keep no modes, have no inodes (exFAT by FUSE)
  test_state           the state directory, the log, signals, other users
  test_status          target list, log, doctor
  test_terminal        terminals: width, progress, colours, completion
  test_install         install.sh, install-deps, first steps
  test_readme          README: every command and claim; the release
  test_parsers         pure functions: what rsync prints, names, keys
  test_budgets         how much is to be audited, and how it is laid out

lab.py has the base classes (a laboratory of throw-away sshds); guards.py takes out each guard in a
copy, and sees its test fail. A test is skipped where what it needs cannot be had: root, mount
namespaces, FUSE, another shell; the reason says which.
"""

from __future__ import annotations

import glob
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor, as_completed

HERE = os.path.dirname(os.path.abspath(__file__))


def classes(names: list) -> list:
    """Return "module.Class" of every test class of these modules (default: all), those with many
    tests first.
    """
    found = {}
    for name in names or sorted(
        os.path.basename(path)[:-3] for path in glob.glob(os.path.join(HERE, "test_*.py"))
    ):
        if not os.path.exists(os.path.join(HERE, name.split(".")[0] + ".py")):
            sys.exit("run.py: there is no tests/%s.py; see run.py --help" % name.split(".")[0])
        if "." in name:
            found[name] = 1
            continue
        for key, value in vars(importlib.import_module(name)).items():
            if (
                isinstance(value, type)
                and issubclass(value, unittest.TestCase)
                and value.__module__ == name
            ):
                found["%s.%s" % (name, key)] = len(
                    unittest.defaultTestLoader.getTestCaseNames(value)
                )
    return sorted((name for name, count in found.items() if count), key=lambda name: -found[name])


def waits(name: str) -> bool:
    """Tell whether this class mostly waits."""
    module, _, found = name.partition(".")
    return getattr(
        getattr(importlib.import_module(module), found.split(".")[0], None), "WAITS", False
    )


def ensure_programs(words: list) -> list:
    """Make sure of the system programs through offsync itself, which asks or, for --yes, does not;
    return the other words.
    """
    if not shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin"):
        print("(An openssh-server of Debian or Ubuntu starts and enables the system's own sshd.)")
    answer = ["-y"] if "--yes" in words else []
    status = subprocess.call(
        [
            sys.executable,
            os.path.join(os.path.dirname(HERE), "offsync.py"),
            "install-deps",
            "--role",
            "both",
            *answer,
        ]
    )
    if status:
        sys.exit(status)
    return [word for word in words if word != "--yes"]


def run_one(name: str) -> None:
    """Run one class here; print what it said, and its counts as a line of JSON."""
    suite = unittest.defaultTestLoader.loadTestsFromName(name)
    stream = io.StringIO()
    result = unittest.TextTestRunner(stream=stream, verbosity=2, buffer=True).run(suite)
    # Subtests count once; a class whose setUpClass fails has run no test.
    failed = {getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors}
    passed = max(result.testsRun - len(failed) - len(result.skipped), 0)
    print(json.dumps([passed, len(failed), len(result.skipped), stream.getvalue()]))


def main(names: list) -> int:
    """Run all; print failures as they come, and the summary last."""
    if names and names[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if names[:1] != ["--one"]:
        names = ensure_programs(names)
    if names[:1] == ["--one"]:
        run_one(names[1])
        return 0
    passed = failed = skipped = 0
    started = time.monotonic()

    def start(name: str):
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, os.path.abspath(__file__), "--one", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            cwd=HERE,
        )
        return name, done, time.monotonic() - begun

    with (
        ThreadPoolExecutor(max_workers=(os.cpu_count() or 1) + 2) as pool,
        ThreadPoolExecutor(max_workers=2) as beside,
    ):
        for future in as_completed(
            [(beside if waits(name) else pool).submit(start, name) for name in classes(names)]
        ):
            name, done, seconds = future.result()
            lines = done.stdout.strip().split("\n")
            try:
                counts = json.loads(lines[-1])
            except ValueError:
                counts = [0, 1, 0, done.stdout]
            passed, failed, skipped = passed + counts[0], failed + counts[1], skipped + counts[2]
            print(
                "%-44s %3d passed %3d failed  %5.1f s" % (name, counts[0], counts[1], seconds),
                flush=True,
            )
            if counts[1] or counts[2]:
                print(counts[3], flush=True)
    print("%.0f s" % (time.monotonic() - started))
    print("%d passed, %d failed%s" % (passed, failed, ", %d skipped" % skipped if skipped else ""))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.path.insert(0, HERE)
    sys.exit(main(sys.argv[1:]))
