"""Guards that prove themselves: each is taken out in a copy of offsync.py, and its test must
notice.

usage: guards.py [--few] [WORD ...]; --few runs those that CI runs, a WORD those whose name has it.
Prints a table; the last line is "N noticed, M not". A guard is (name, function, expression, what it
becomes, test): the expression or statement is found in that function ("" for outside of all) by
its meaning, so that a change of layout breaks none. FEW marks those that matter most.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
FEW = True
CHANGES = "test_exact.SourceChanges"
REVIEW = "test_approval.Approval"
GUARDS = [
    # What is sent and called ok
    (
        "content sent is the planned one",
        "Sent.take",
        "sent and md5 != entry.md5.hex().encode()",
        "False",
        CHANGES + ".test_other_content_mode_link_and_type_while_sending",
        FEW,
    ),
    (
        "also beside a mode-only change",
        "Sent.take",
        "change.sends_content or code[:1] == b'<'",
        "change.sends_content",
        CHANGES + ".test_a_mode_only_entry_that_is_sent_with_content",
        FEW,
    ),
    (
        "mode sent is the planned one",
        "Sent.take",
        "entry.type != 'symlink' and mode != planned_mode",
        "False",
        CHANGES,
    ),
    (
        "nothing unplanned is sent",
        "Sent.take",
        "self.wrong.add(name.rstrip(b'/'))",
        "None",
        "test_text.Reports",
    ),
    (
        "a deletion in a pass that sends",
        "Sent.take",
        "code.startswith(b'*deleting')",
        "False",
        "test_hostile.Deletions.test_deletions_in_a_pass_that_sends",
        FEW,
    ),
    (
        "every planned entry is reported",
        "Delivery.send",
        (
            "if lost:\n    raise self.failure("
            "Kind.SOURCE_CHANGED if here else Kind.CHANGED_THERE, here or set(lost))"
        ),
        "pass",
        CHANGES,
    ),
    (
        "what could not be staged",
        "Delivery.send",
        "b'Unable to create partial-dir' in result.stderr",
        "False",
        "test_filesystems.Odd",
    ),
    (
        "content goes without a quick check",
        "",
        "('-I', '--delay-updates')",
        "('--delay-updates',)",
        "test_plan.Reasons",
    ),
    ("the root is not sent", "listed_name", "b'/' + path", "b'./' + path", "test_exact.Root", FEW),
    (
        "symlinks go last",
        "Delivery.deliver",
        "[c for c in self.sent if c.entry and c.entry.type != 'symlink']",
        "list(self.sent)",
        "test_exact.SymlinksLast",
        FEW,
    ),
    (
        "files are verified before symlinks",
        "Delivery.deliver",
        "self.verify([*content, *modes]) if others else None",
        "None",
        "test_exact.SymlinksLast",
    ),
    (
        "the tree is verified at the end",
        "Delivery.deliver",
        "verdict.differs or verdict.only_there",
        "False",
        "test_failures.Trouble.test_nothing_is_deleted_while_something_differs",
    ),
    (
        "rsync gets no HOME",
        "environment",
        "ours.pop('HOME', None)",
        "None",
        "test_exact.OutsideInfluence",
        FEW,
    ),
    (
        "rsync gets no RSYNC_*",
        "environment",
        "not key.startswith('RSYNC_')",
        "True",
        "test_exact.OutsideInfluence",
    ),
    (
        "MD5 for what is sent",
        "environment",
        "ours['RSYNC_CHECKSUM_LIST'] = 'md5'",
        "pass",
        "test_exact.OutsideInfluence",
    ),
    (
        "verify compares by MD5",
        "cmd_verify",
        "'hash' if args.fast else 'strong'",
        "'hash'",
        "test_exact.OutsideInfluence",
    ),
    ("unknown is null", "Delivery.arrived", "self.verdict is None", "False", "test_exact.Unknown"),
    (
        "lockout modes",
        "entry_offence",
        "needed and entry.stat(follow_symlinks=False).st_mode & needed != needed",
        "False",
        "test_exact.Converges",
    ),
    (
        "stuck staged files are sent again",
        "Delivery.verify",
        "staged(change.path) in left",
        "False",
        "test_exact.Converges",
    ),
    ("two slashes", "prove_path", "(quoted, quoted + b'/')", "(quoted,)", "test_exact.Converges"),
    (
        "the time without a byte while sending",
        "Delivery.send",
        "min(SEND_TIMEOUT, config.timeout)",
        "0",
        "test_exact.DeadEnds",
    ),
    (
        "Ctrl-C ends programs",
        "stop_all",
        "for process in list(RUNNING):\n    kill(process)",
        "pass",
        "test_exact.DeadEnds",
    ),
    (
        "what a program writes last is read",
        "Output.read",
        "selector.select(0 if ended else 0.1)",
        "selector.select(0.1) if not ended else []",
        "test_text.Limits",
    ),
    (
        "a run that is over ends its work",
        "Run.__exit__",
        "STOP.value = True",
        "None",
        "test_state.Surroundings.test_a_plan_that_fails_ends_what_it_began",
    ),
    # Deleting
    (
        "nothing can be sent while deleting",
        "",
        "'--filter=hide,! */'",
        "'--one-file-system'",
        "test_hostile.Deletions.test_what_is_excluded_cannot_be_asked_for",
        FEW,
    ),
    (
        "nothing is deleted in a pass over names",
        "itemize",
        "change.kind == 'missing' and paths is not None",
        "False",
        "test_hostile.Deletions.test_a_deletion_in_a_pass_over_names",
    ),
    (
        "nothing else is deleted",
        "Delivery.delete",
        "not gone and (not code.startswith(b'.d'))",
        "False",
        "test_hostile.Deletions",
    ),
    (
        "deletions need the policy",
        "refusal",
        "concerned and (not getattr(config, key))",
        "False",
        "test_plan.Policies",
        FEW,
    ),
    (
        "an empty source never deletes",
        "refusal",
        "not kept",
        "False",
        "test_deleting.Deleting.test_an_empty_source_never_deletes_even_when_reviewed",
        FEW,
    ),
    ("max_delete", "refusal", "gone >= MANY_DELETIONS", "False", "test_deleting.Deleting"),
    (
        "few deletions are no danger",
        "",
        "MANY_DELETIONS = 10",
        "MANY_DELETIONS = 1",
        "test_deleting.Deleting",
    ),
    (
        "something new stops the deletion",
        "Delivery.delete",
        "if surprises:\n    raise self.failure(Kind.APPEARED, surprises)",
        "pass",
        "test_plan.Policies",
    ),
    (
        "deletions after what replaces them",
        "Delivery.deliver",
        "not verdict.differs",
        "True",
        "test_failures.Trouble",
    ),
    (
        "a leftover is deleted by policy only",
        "Delivery.__init__",
        "shared.config.delete",
        "True",
        "test_failures.Kills",
    ),
    (
        "leftovers that were not reviewed stay",
        "Delivery.__init__",
        "c.path not in plan.spared",
        "True",
        REVIEW,
    ),
    (
        "names that may be one there",
        "Delivery.check_twins",
        "if names:\n    raise self.failure(kind, names)",
        "pass",
        "test_filesystems.Case.test_a_target_that_may_take_two_names_for_one",
        FEW,
    ),
    (
        "a twin that is added is told apart",
        "Delivery.taken_for_one",
        "pair[1] not in added",
        "True",
        "test_filesystems.Case.test_a_rename_in_case_only_needs_one_run",
    ),
    (
        "directories above may be one, too",
        "find_twins",
        "path = directory",
        "path = b''",
        "test_filesystems.ExFat.test_two_directories_that_are_one_there",
    ),
    (
        "what is excluded shows nothing",
        "Delivery.taken_for_one",
        "self.source.included(self.shared.rsync)",
        "{b'skipped'}",
        "test_filesystems.Case.test_what_is_excluded_shows_nothing",
    ),
    (
        "what a deletion took along",
        "Delivery.delete_verified",
        "not taken",
        "True",
        "test_filesystems.Case.test_what_a_deletion_took_along_is_sent_again",
    ),
    (
        "what an exclude protects",
        "Delivery.check_excluded",
        "if protected:\n    raise failure(self.plan.target, Kind.PROTECTED, names=protected)",
        "pass",
        "test_exact.Excluded",
        FEW,
    ),
    # Approval
    (
        "every line of now was reviewed",
        "approve",
        (
            "if unapproved:\n    new = (json.loads(line) for line in plan_lines(shared.config,"
            " plans) if line_key(line) in unapproved)\n    differing ="
            " [*dict.fromkeys((name_line(fields, policy) for fields in new if fields.get('login')"
            " not in unknown)), *differing]"
        ),
        "pass",
        REVIEW + ".test_what_a_review_does_not_approve",
        FEW,
    ),
    (
        "what was reviewed is in the source",
        "not_in_source",
        "not same(path, entry)",
        "False",
        REVIEW,
    ),
    (
        "what was to be deleted is not back",
        "approve",
        "os.path.lexists(os.path.join(shared.source.root, change.path))",
        "False",
        "test_plan.PlanIds",
    ),
    (
        "reviewed paths stay inside",
        "inside",
        "not {b'..', b'.', b''}.isdisjoint(path.split(b'/'))",
        "False",
        REVIEW,
    ),
    (
        "a plan's line is as offsync prints it",
        "read_line",
        "printed != line",
        "False",
        REVIEW + ".test_what_a_line_shows_is_what_it_approves",
        FEW,
    ),
    ("a target that was not reviewed", "refuse_unknown", "not compared", "False", REVIEW),
    (
        "an ID has 64 digits",
        "Home.open_plan",
        "'[0-9a-f]{64}'",
        "'[0-9a-f]{8,64}'",
        "test_plan.PlanIds",
    ),
    (
        "a kept plan is its ID's",
        "Home.open_plan",
        "path != named and digest.hexdigest() != named",
        "False",
        "test_plan.PlanIds",
    ),
    (
        "the source is named in the policy",
        "",
        "('source', 'delete', 'overwrite', 'verify', 'exclude')",
        "('delete', 'overwrite', 'verify', 'exclude')",
        "test_plan.PlanIds",
    ),
    # Connection and proofs
    (
        "a command must be refused",
        "judge_refusal",
        "PROOF_OUTPUT in result.stdout",
        "False",
        "test_trust.Restriction.test_an_unrestricted_line_above",
        FEW,
    ),
    (
        "success is no refusal",
        "judge_refusal",
        "if result.status == 0:\n    raise failure(target, Kind.NOT_RRSYNC)",
        "if result.status == 0:\n        return None",
        "test_trust.Restriction",
    ),
    (
        "a proof that is cut off is none",
        "judge_refusal",
        "if result.status is None:\n    raise failure(target, Kind.SILENT)",
        "if result.status is None:\n        return None",
        "test_trust.Restriction",
    ),
    (
        "ssh's own failure is no refusal",
        "judge_refusal",
        "0 < result.status < 255",
        "0 < result.status < 256",
        "test_trust.Restriction",
    ),
    (
        "no plan without the proof",
        "compare_proved",
        "not connection.restricted and (not waited)",
        "False",
        "test_trust.Restriction",
    ),
    (
        "the path is proved",
        "plan_target",
        "if changes:\n    prove_path(plan.connection)",
        "pass",
        "test_trust.Restriction.test_another_directory",
        FEW,
    ),
    (
        "a reopened connection proves its path",
        "Connection.reopen",
        "if path_proved:\n    prove_path(self)",
        "pass",
        "test_trust.Restriction",
    ),
    (
        "sessions go over the proved connection only",
        "",
        "'ProxyCommand=/nonexistent/offsync-connection-ended'",
        "'BatchMode=yes'",
        "test_trust.Restriction.test_a_session_has_nowhere_else_to_go",
    ),
    (
        "strict host keys",
        "",
        "'StrictHostKeyChecking=yes'",
        "'StrictHostKeyChecking=no'",
        "test_trust.HostKeys.test_a_changed_host_key",
        FEW,
    ),
    (
        "no forwarding",
        "",
        "'ClearAllForwardings=yes'",
        "'ClearAllForwardings=no'",
        "test_trust.ManInTheMiddle",
    ),
    (
        "no Kerberos in place of known_hosts",
        "",
        "'GSSAPIKeyExchange=no'",
        "'BatchMode=yes'",
        "test_trust.OneKey",
    ),
    (
        "none of ssh_config's environment",
        "",
        "'SetEnv=LC_ALL=C'",
        "'BatchMode=yes'",
        "test_trust.ManInTheMiddle",
    ),
    (
        "an old ssh opens no session",
        "",
        "('-f', '-N', '-o', 'ControlMaster=yes')",
        "('-N', '-o', 'ControlMaster=yes')",
        "test_trust.OneKey.test_an_ssh_before_8_7",
    ),
    (
        "@revoked binds",
        "fetch_host_key",
        "blob(revoked) == blob(line)",
        "False",
        "test_trust.ManInTheMiddle",
    ),
    (
        "known_hosts of the account, not of HOME",
        "known_lines",
        "pwd.getpwuid(os.geteuid()).pw_dir",
        "os.path.expanduser('~')",
        "test_trust.ManInTheMiddle",
    ),
    (
        "one connection is enough",
        "find_host_key",
        "any((key[1] == wanted for key in fingerprints([line])))",
        "False",
        "test_trust.HostKeys",
    ),
    (
        "the wanted fingerprint",
        "connect_trusted",
        "find_host_key(connection, wanted)",
        "fetch_host_key(connection)",
        "test_trust.HostKeys",
    ),
    (
        "keys that were never compared are asked for",
        "connect_trusted",
        "not wanted and (not several)",
        "not wanted",
        "test_status.Doctor",
    ),
    (
        'only a full "yes"',
        "confirm_host_key",
        "answer != 'yes'",
        "answer not in ('yes', 'y')",
        "test_trust.HostKeys",
    ),
    (
        "the old host key goes",
        "store_host_key",
        "removed.status != 0",
        "False",
        "test_trust.HostKeys",
    ),
    # Source
    (
        "symlinks stay inside",
        "symlink_offence",
        "leaves(path, link) or not within",
        "False",
        "test_plan.Scope",
    ),
    ("the reserved name", "scan", "entry.name == STAGING", "False", "test_plan.Scope"),
    (
        "nothing is compared before the source is accepted",
        "plan_target",
        "source.accepted.wait(0.1)",
        "True",
        "test_exact.Accepted",
    ),
    (
        "devices and fifos",
        "entry_offence",
        "'it is a device, socket or fifo'",
        "''",
        "test_plan.Scope",
    ),
    (
        "the private key is no delivery",
        "plan_all",
        "(home.path, home.key)",
        "()",
        "test_state.UserBeside",
    ),
    (
        "by its real path either",
        "plan_all",
        "(home.path, home.key)",
        "(home.path,)",
        "test_state.UserBeside",
    ),
    (
        "no hash through a symlinked parent",
        "open_directory",
        "flags | os.O_NOFOLLOW",
        "flags",
        "test_exact.SourceWriter",
    ),
    (
        "a symlink is judged when it is read, too",
        "describe_entry",
        "leaves(path, link)",
        "False",
        "test_text.Sources",
    ),
    # State, output, hostile targets
    (
        "others may not write to the state",
        "Home.refuse_strangers",
        "strangers",
        "''",
        "test_state.UserBeside",
        FEW,
    ),
    ("nor may its group", "find_strangers", "mode & 16", "False", "test_link.Paths"),
    (
        "the lock is no symlink",
        "take_lock",
        "flags | os.O_CLOEXEC | os.O_NOFOLLOW",
        "flags | os.O_CLOEXEC",
        "test_state.UserBeside",
    ),
    (
        "verify keeps writers out",
        "cmd_verify",
        "take_lock(home, 'verify', shared=True)",
        "None",
        "test_status.Status",
    ),
    (
        "a record at every end",
        "Log.__exit__",
        "[*self.open] if error else ()",
        "()",
        "test_state.Records",
    ),
    (
        "the status is the other run's",
        "Log.finish",
        "self.locked",
        "True",
        "test_state.Records.test_the_lock_is_taken",
    ),
    ("nothing beside it is imported", "", "del sys.path[0]", "pass", "test_state.UserBeside"),
    (
        "scratch is nobody else's",
        "make_scratch",
        "not find_strangers(made)",
        "True",
        "test_state.UserBeside",
    ),
    (
        "an ignored SIGCHLD is set back",
        "main",
        "signal.signal(signal.SIGCHLD, signal.SIG_DFL)",
        "None",
        "test_state.Surroundings.test_an_ignored_sigchld",
    ),
    (
        "programs start in a directory that exists",
        "run",
        "'/'",
        "None",
        "test_state.Surroundings.test_a_working_directory_that_is_gone",
    ),
    (
        "HOME of another account",
        "check_home",
        "owner != os.geteuid() and os.path.realpath(home) != os.path.realpath(own)",
        "False",
        "test_state.Surroundings.test_homes_of_others",
    ),
    (
        "our own key is asked for first",
        "explain_login",
        "error.kind is Kind.KEY_REFUSED or b'Load key' in result.stderr",
        "False",
        "test_state.OwnKey",
    ),
    (
        "an entry is reported once",
        "classify",
        "one.path == other.path",
        "False",
        "test_hostile.Hostile",
    ),
    (
        "reports are bounded",
        "itemize",
        "room < 0 or most < 0",
        "False",
        "test_hostile.HostileTarget",
    ),
    ("a line has an end", "Output.take", "len(self.rest) > MAX_LINE", "False", "test_text.Limits"),
    (
        "nothing shown moves a cursor",
        "printable",
        "''.join((c if c.isprintable() else '?' for c in text))",
        "text",
        "test_hostile.Hostile",
    ),
    (
        "what is drawn as nothing is quoted",
        "show",
        "not UNSEEN.search(text)",
        "True",
        "test_exact.LookAlike",
    ),
    (
        "names that look alike are told apart",
        "change_line",
        "show(change.path, quoted)",
        "show(change.path)",
        "test_exact.LookAlike",
    ),
    # link
    (
        "rrsync is tried",
        "cmd_link",
        "probe_rrsync(words, munge)",
        "None",
        "test_link.KeyThief",
        FEW,
    ),
    (
        "and its neighbour, a backup",
        "probe_rrsync",
        "send('-rlbI', '--backup-dir=x', '--', plant + '/')",
        "None",
        "test_link.Neighbour",
        FEW,
    ),
    (
        "--accept-risk is for one rule",
        "cmd_link",
        "'path' in risks",
        "bool(risks)",
        "test_link.Paths",
    ),
    (
        "system trees",
        "link_risks",
        "{*SYSTEM_TREES, *map(os.path.realpath, SYSTEM_TREES)}",
        "()",
        "test_link.Paths",
    ),
    (
        "what sshd names",
        "cmd_link",
        (
            "[rrsync, state.config, state.key, state.known_hosts, "
            "state.log, state.plans, state.last, *sshd_paths(settings), *filter(os.path.exists, "
            "(sys.argv[0], module))]"
        ),
        "[rrsync]",
        "test_link.SshdSays",
    ),
    (
        "the same directory under another name",
        "same_file",
        "os.path.samefile(one, other)",
        "False",
        "test_link.SshdSays",
    ),
    (
        "an entry .ssh",
        "link_risks",
        "os.path.lexists(os.path.join(real, '.ssh'))",
        "False",
        "test_link.SshdSays",
    ),
    (
        "dot components",
        "link_risks",
        "real != default and any((part.startswith('.') for part in real.split('/')))",
        "False",
        "test_link.Paths",
    ),
    (
        "parents that others may write to",
        "link_risks",
        "find_strangers(real, itself=False)",
        "''",
        "test_link.Paths",
    ),
    (
        "never in or above ~/.ssh",
        "validate_link_path",
        "not found and (contains(place) or lies_in(place) or may_be(place))",
        "False",
        "test_link.Linking",
    ),
    (
        "a foreign line with the key",
        "edit_authorized_keys",
        "raise ValueError(number)",
        "kept.append(line)",
        "test_link.Linking",
    ),
    (
        "--from stays",
        "cmd_link",
        "kept and args.from_pattern is None",
        "False",
        "test_link.Linking",
    ),
    (
        "modes whatever the umask",
        "make_directory",
        "os.fchmod(descriptor, mode if index == len(parts) - 1 else 493)",
        "None",
        "test_link.Paths",
    ),
    (
        "quoting that the shell knows",
        "validate_forced_command",
        "os.path.basename(shell) not in POSIX_SHELLS",
        "False",
        "test_link.Quoting",
    ),
    # Config
    (
        "CR only before LF",
        "",
        "'[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ud800-\\udfff\\ufffe\\uffff]'",
        "'[\\x00-\\x08]'",
        "test_text.AsPeopleWriteIt",
    ),
]


def qualified(module: ast.Module) -> dict:
    """Return {"Class.function" or "function": its node}; "" is the module without functions."""
    found: dict = {"": module}
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                found["%s.%s" % (node.name, inner.name)] = inner
    return found


def take_out(text: str, function: str, expression: str, becomes: str) -> str:
    """Return the program without a guard; "" where the place is gone."""
    wanted = ast.parse(expression).body[0]
    statement = not isinstance(wanted, ast.Expr)
    dumped = ast.unparse(wanted if statement else wanted.value)
    place = qualified(ast.parse(text)).get(function)
    spots = []
    for node in ast.walk(place) if place else ():
        same = isinstance(node, (ast.expr, ast.stmt)) and not isinstance(node, ast.Expr)
        same = same and not isinstance(getattr(node, "ctx", None), ast.Store)
        if same and ast.unparse(node) == dumped:
            spots.append((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset))
    lines = [line.encode() for line in text.split("\n")]
    for first, start, last, end in sorted(set(spots), reverse=True):
        new = becomes if statement else "(%s)" % becomes
        lines[first - 1 : last] = [lines[first - 1][:start] + new.encode() + lines[last - 1][end:]]
    return b"\n".join(lines).decode() if spots else ""


def try_one(guard: tuple, base: str) -> tuple:
    """Take one guard out in a copy, run its test; return (name, test, verdict)."""
    name, function, expression, becomes, test = guard[:5]
    with open(os.path.join(TOP, "offsync.py"), encoding="utf-8") as stream:
        text = take_out(stream.read(), function, expression, becomes)
    if not text:
        return name, test, "the place is gone"
    copy = tempfile.mkdtemp(dir=base)
    shutil.copytree(HERE, copy + "/tests", ignore=shutil.ignore_patterns("__pycache__"))
    for other in ("README.md", "install.sh", "Makefile"):
        shutil.copy(os.path.join(TOP, other), copy)
    with open(copy + "/offsync.py", "w", encoding="utf-8") as stream:
        stream.write(text)
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
    chosen = [guard for guard in GUARDS if len(guard) > 5 or "--few" not in words]
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
