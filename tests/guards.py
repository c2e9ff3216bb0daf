"""Guards that prove themselves: each is taken out in a copy of offsync.py, and its test must
notice.

usage: guards.py [--few] [WORD ...]; --few runs those that CI runs, a WORD those whose name has it.
Prints a table; the last
line is "N noticed, M not". A guard is (name, the text in offsync.py, what it becomes, the test).
FEW marks the dozen that matter most.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
ILL, EXACT, DAY2, TRUST, PLAN, LINK, TEXT = (
    "test_ill.",
    "test_exact.",
    "test_day2.",
    "test_trust.",
    "test_plan.",
    "test_link.",
    "test_text.",
)
FEW = True
GUARDS = [
    # What is sent and called ok
    (
        "content sent is the planned one",
        "if sent and md5 != entry.md5.hex().encode():",
        "if False:",
        EXACT + "SourceChanges.test_other_content_mode_link_and_type_while_sending",
        FEW,
    ),
    (
        "also beside a mode-only change",
        'sent = change.sends_content or code[:1] == b"<"',
        "sent = change.sends_content",
        EXACT + "SourceChanges.test_a_mode_only_entry_that_is_sent_with_content",
        FEW,
    ),
    (
        "mode sent is the planned one",
        'if entry.type != "symlink" and mode != planned_mode:',
        "if False:",
        EXACT + "SourceChanges",
    ),
    ("nothing unplanned is sent", 'self.wrong.add(name.rstrip(b"/"))', "pass", TEXT + "Reports"),
    (
        "every planned entry is reported",
        "        if lost:\n            raise self.failure(",
        "        if False:\n            raise self.failure(",
        EXACT + "SourceChanges",
    ),
    (
        "content goes without a quick check",
        'RSYNC_CONTENT = ("-I", "--delay-updates")',
        'RSYNC_CONTENT = ("--delay-updates",)',
        PLAN + "Reasons",
    ),
    (
        "the root is not sent",
        'return b"/" + path\n\ndef include_rule',
        'return b"./" + path\n\ndef include_rule',
        EXACT + "Root",
        FEW,
    ),
    (
        "symlinks go last",
        (
            'self.links = [c for c in self.sent if c.entry and c.entry.type == "symlink"]\n       '
            ' others = [c for c in self.sent if c.entry and c.entry.type != "symlink"]'
        ),
        "self.links: list[Change] = []\n        others = list(self.sent)",
        EXACT + "SymlinksLast",
        FEW,
    ),
    (
        "files are verified before symlinks",
        "        if first:\n            self.verify(first, whole)",
        "        if False:\n            self.verify(first, whole)",
        EXACT + "SymlinksLast",
    ),
    (
        "what a failed pass means",
        "        if result.status != 0:\n            raise self.explain(result)\n        lost",
        "        lost",
        EXACT + "SymlinksLast",
    ),
    (
        "the tree is verified at the end",
        "        if self.links or self.only_there or not whole:",
        "        if False:",
        PLAN + "Policies",
    ),
    ("rsync gets no HOME", 'ours.pop("HOME", None)', "pass", EXACT + "OutsideInfluence", FEW),
    ("rsync gets no RSYNC_*", 'if not key.startswith("RSYNC_")}', "}", EXACT + "OutsideInfluence"),
    (
        "MD5 for what is sent",
        'ours["RSYNC_CHECKSUM_LIST"] = "md5"',
        "pass",
        EXACT + "OutsideInfluence",
    ),
    (
        "verify compares by MD5",
        '"hash" if args.fast else "strong"',
        '"hash"',
        EXACT + "OutsideInfluence",
    ),
    (
        "unknown is null",
        '        if not self.begun and result != "ok":',
        '        if result != "ok":',
        EXACT + "Unknown",
    ),
    (
        "lockout modes",
        "        if needed and entry.stat(follow_symlinks=False)",
        "        if False and entry.stat(follow_symlinks=False)",
        EXACT + "Converges",
    ),
    (
        "stuck staged files are sent again",
        "        if stuck:",
        "        if False:",
        EXACT + "Converges",
    ),
    (
        "two slashes",
        'for slashes in (b"/", b"//"):',
        'for slashes in (b"/",):',
        EXACT + "Converges",
    ),
    (
        "the time without a byte while sending",
        "timeout=min(SEND_TIMEOUT, config.timeout)",
        "timeout=0",
        EXACT + "DeadEnds",
    ),
    (
        "Ctrl-C ends programs",
        "    for process in list(RUNNING):\n        kill(process)\n",
        "",
        EXACT + "DeadEnds",
    ),
    (
        "what a program writes last is read",
        (
            "                ended = process.poll() is not None      # asked first: all that it"
            " wrote is there\n                ready = selector.select(0 if ended else 0.1)\n"
        ),
        (
            "                ready = selector.select(0.1)\n                ended = process.poll()"
            " is not None\n"
        ),
        TEXT + "Limits",
    ),
    # Deleting
    (
        "deletions need the policy",
        "        if concerned and not getattr(config, key):",
        "        if False:",
        PLAN + "Policies",
        FEW,
    ),
    (
        "an empty source never deletes",
        "        if not kept:",
        "        if False:",
        DAY2 + "Deleting.test_an_empty_source_never_deletes_even_when_reviewed",
        FEW,
    ),
    (
        "max_delete",
        "        if gone >= MANY_DELETIONS and",
        "        if False and",
        DAY2 + "Deleting",
    ),
    ("few deletions are no danger", "MANY_DELETIONS = 10", "MANY_DELETIONS = 1", DAY2 + "Deleting"),
    (
        "something new stops the deletion",
        "        if surprises:",
        "        if False:",
        PLAN + "Policies",
    ),
    (
        "deletions after what replaces them",
        "        if not different and extraneous & set(self.deletable):",
        "        if extraneous & set(self.deletable):",
        "test_failures.Trouble",
    ),
    (
        "a leftover is deleted by policy only",
        "        if shared.config.delete:\n            self.deletable",
        "        if True:\n            self.deletable",
        "test_failures.Kills",
    ),
    (
        "leftovers that were not reviewed stay",
        "if c.path not in plan.spared}",
        "}",
        DAY2 + "Approval",
    ),
    # Approval
    (
        "every line of now was reviewed",
        "    if unapproved:  ",
        "    if False:  ",
        DAY2 + "Approval.test_what_a_review_does_not_approve",
        FEW,
    ),
    (
        "what was reviewed is in the source",
        "found[path].reviewed != entry})",
        "False})",
        DAY2 + "Approval",
    ),
    (
        "what was to be deleted is not back",
        (
            "            elif os.path.lexists(os.path.join(shared.source.root,"
            " read_json_path(fields))):"
        ),
        "            elif False:",
        PLAN + "PlanIds",
    ),
    (
        "reviewed paths stay inside",
        (
            '    if not path or path.startswith(b"/") or not {b"..", b".",'
            ' b""}.isdisjoint(path.split(b"/")):'
        ),
        "    if False:",
        DAY2 + "Approval",
    ),
    (
        "an ID has 32 digits",
        're.fullmatch("[0-9a-f]{32,64}", named)',
        're.fullmatch("[0-9a-f]{8,64}", named)',
        PLAN + "PlanIds",
    ),
    (
        "a kept plan is its ID's",
        "        if path != named and digest.hexdigest()",
        "        if False and digest.hexdigest()",
        PLAN + "PlanIds",
    ),
    (
        "the source is named in the policy",
        'policy = ("source", "delete"',
        'policy = ("delete"',
        PLAN + "PlanIds",
    ),
    # Connection and proofs
    (
        "a command must be refused",
        "    if PROOF_OUTPUT in result.stdout:",
        "    if False:",
        TRUST + "Restriction.test_an_unrestricted_line_above",
        FEW,
    ),
    (
        "success is no refusal",
        '    if result.status == 0:\n        raise failure(target, "not-rrsync")',
        "    if result.status == 0:\n        return None",
        TRUST + "Restriction",
    ),
    (
        "a proof that is cut off is none",
        "    if result.status is None:               # a start",
        "    if False:               # a start",
        TRUST + "Restriction",
    ),
    (
        "ssh's own failure is no refusal",
        "    if 0 < result.status < 255:",
        "    if 0 < (result.status or 1) < 256:",
        TRUST + "Restriction",
    ),
    (
        "no plan without the proof",
        "    if not connection.restricted and not waited:",
        "    if False:",
        TRUST + "Restriction",
    ),
    (
        "the path is proved",
        "        if changes:\n            prove_path(plan.connection)",
        "        if False:\n            prove_path(plan.connection)",
        TRUST + "Restriction.test_another_directory",
        FEW,
    ),
    (
        "a reopened connection proves its path",
        "        if path_proved:\n            prove_path(self)",
        "        if False:\n            prove_path(self)",
        TRUST + "Restriction",
    ),
    (
        "sessions go over the proved connection only",
        '*SSH_QUIET,\n               "-o", "ProxyCommand=/nonexistent/offsync-connection-ended")',
        "*SSH_QUIET)",
        TRUST + "Restriction",
    ),
    (
        "strict host keys",
        '"StrictHostKeyChecking=yes"',
        '"StrictHostKeyChecking=no"',
        TRUST + "HostKeys.test_a_changed_host_key",
        FEW,
    ),
    (
        "no forwarding",
        '"ClearAllForwardings=yes"',
        '"ClearAllForwardings=no"',
        ILL + "ManInTheMiddle",
    ),
    ("none of ssh_config's environment", '"SetEnv=LC_ALL=C", ', "", ILL + "ManInTheMiddle"),
    (
        "@revoked binds",
        "        if blobs([revoked]) & blobs(lines):",
        "        if False:",
        ILL + "ManInTheMiddle",
    ),
    (
        "one connection is enough",
        "        if wanted and any(key[1] == wanted for key in fingerprints(lines)):",
        "        if False:",
        ILL + "ManInTheMiddle",
    ),
    ("the wanted fingerprint", "        if not chosen:", "        if False:", TRUST + "HostKeys"),
    (
        'only a full "yes"',
        '    if answer != "yes":',
        '    if answer not in ("yes", "y"):',
        TRUST + "HostKeys",
    ),
    (
        "the old host key goes",
        "        if removed.status != 0:",
        "        if False:",
        TRUST + "HostKeys",
    ),
    # Source
    (
        "symlinks stay inside",
        "    if leaves(path, link) or not inside:",
        "    if False:",
        PLAN + "Scope",
    ),
    (
        "the reserved name",
        "                    if entry.name == STAGING:",
        "                    if False:",
        PLAN + "Scope",
    ),
    (
        "devices and fifos",
        '        return "it is a device, socket or fifo"',
        '        return ""',
        PLAN + "Scope",
    ),
    (
        "the private key is no delivery",
        "    for private in (home.path, home.key):",
        "    for private in ():",
        ILL + "UserBeside",
    ),
    (
        "by its real path either",
        "    for private in (home.path, home.key):",
        "    for private in (home.path,):",
        ILL + "UserBeside",
    ),
    (
        "no hash through a symlinked parent",
        "os.open(part, flags | os.O_NOFOLLOW, dir_fd=descriptor)",
        "os.open(part, flags, dir_fd=descriptor)",
        ILL + "SourceWriter",
    ),
    # State, output, hostile targets
    (
        "others may not write to the state",
        '        if strangers:\n            raise OffsyncError("state',
        '        if False:\n            raise OffsyncError("state',
        ILL + "UserBeside",
        FEW,
    ),
    (
        "the lock is no symlink",
        "flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW",
        "flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC",
        ILL + "UserBeside",
    ),
    ("nothing beside it is imported", "    del sys.path[0]", "    pass", ILL + "UserBeside"),
    (
        "scratch is nobody else's",
        "            if not find_strangers(scratch):",
        "            if True:",
        ILL + "UserBeside",
    ),
    (
        "an entry is reported once",
        "        if one.path == other.path:",
        "        if False:",
        "test_failures.Hostile",
    ),
    (
        "reports are bounded",
        "        if room < 0 or most < 0:",
        "        if False:",
        ILL + "HostileTarget",
    ),
    ("a line has an end", "or len(self.rest) > MAX_LINE:", "or False:", TEXT + "Limits"),
    (
        "nothing shown moves a cursor",
        'return "".join(c if c.isprintable() else "?" for c in text)',
        "return text",
        "test_failures.Hostile",
    ),
    (
        "a symlink is judged when it is read, too",
        "            if leaves(path, link):  ",
        "            if False:  ",
        TEXT + "Sources",
    ),
    (
        "a plan's line shows what it approves",
        "            fields = read_line(line)",
        "            fields = json.loads(line)",
        DAY2 + "Approval.test_what_a_line_shows_is_what_it_approves",
    ),
    # link
    (
        "rrsync is proved",
        "        probe_rrsync(words, munge)",
        "        pass",
        ILL + "KeyThief",
        FEW,
    ),
    ("--accept-risk is for one rule", '"path" in risks)', "bool(risks))", ILL + "Paths"),
    (
        "system trees",
        "             for place in trees if contains(place) or lies_in(place)]",
        "             for place in ()]",
        ILL + "Paths",
    ),
    (
        "dot components",
        '    if real != default and any(part.startswith(".") for part in real.split("/")):',
        "    if False:",
        ILL + "Paths",
    ),
    (
        "parents that others may write to",
        "    strangers = find_strangers(real, itself=False)",
        '    strangers = ""',
        ILL + "Paths",
    ),
    (
        "HOME of another account",
        "    if owner not in (0, os.geteuid()):",
        "    if False:",
        ILL + "Paths",
    ),
    (
        "never in or above ~/.ssh",
        "        if contains(place) or lies_in(place):",
        "        if False:",
        LINK + "Linking",
    ),
    (
        "a foreign line with the key",
        "        elif not written:\n            raise ValueError(number)",
        "        elif not written:\n            kept.append(line)",
        LINK + "Linking",
    ),
    (
        "--from stays",
        "    if kept and args.from_pattern is None:",
        "    if False:",
        LINK + "Linking",
    ),
    (
        "modes whatever the umask",
        "                os.fchmod(descriptor, mode if index == len(parts) - 1 else 0o755)",
        "                pass",
        ILL + "Paths",
    ),
    (
        "quoting that the shell knows",
        "    if shlex.quote(path) != path and",
        "    if False and",
        LINK + "Quoting",
    ),
]


def try_one(guard: tuple, base: str) -> tuple:
    """Take one guard out in a copy, run its test; return (name, test, verdict)."""
    name, old, new, test = guard[:4]
    copy = tempfile.mkdtemp(dir=base)
    shutil.copytree(HERE, copy + "/tests", ignore=shutil.ignore_patterns("__pycache__"))
    for other in ("README.md", "install.sh", "Makefile"):
        shutil.copy(os.path.join(TOP, other), copy)
    with open(os.path.join(TOP, "offsync.py"), encoding="utf-8") as stream:
        text = stream.read()
    if text.count(old) < 1:
        return name, test, "the place is gone"
    with open(copy + "/offsync.py", "w", encoding="utf-8") as stream:
        stream.write(text.replace(old, new))
    os.chmod(copy + "/offsync.py", 0o755)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, copy + "/tests/run.py", test],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=400,
        )
        last = done.stdout.strip().split("\n")[-1]
        verdict = "noticed" if done.returncode and " failed" in last else "NOT NOTICED"
    except subprocess.TimeoutExpired:
        verdict = "noticed (it hung)"
    shutil.rmtree(copy, ignore_errors=True)
    return name, test, "%s, %.0f s" % (verdict, time.monotonic() - started)


def main(words: list) -> int:
    """Try the guards; print a row for each."""
    chosen = [guard for guard in GUARDS if guard[3] and (len(guard) > 4 or "--few" not in words)]
    named = [word for word in words if word != "--few"]
    chosen = [guard for guard in chosen if not named or any(word in guard[0] for word in named)]
    base = tempfile.mkdtemp(prefix="offsync-guards-", dir="/tmp")
    missed = 0
    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for name, test, verdict in pool.map(lambda guard: try_one(guard, base), chosen):
                missed += not verdict.startswith("noticed")
                print("%-45s %-28s %s" % (name, test, verdict), flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print("%d noticed, %d not" % (len(chosen) - missed, missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
