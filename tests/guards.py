"""Guards that prove themselves: each is taken out in a copy of offsync.py, and its test must
notice.

usage: guards.py [--few] [WORD ...]; --few runs those that CI runs, a WORD those whose name has it.
Prints a table; the last line is "N noticed, M not".

The table below has a block for each guard: its name, the test that notices, and the function with
the expression or statement, and what that becomes ("module" is outside of all functions). The place
is found by its meaning, so that a change of layout breaks none. A promise of README's Security,
after "===", stands above the guards that keep it. "*" marks the guards that matter most.
"""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
OTHERS = "What else must hold"
TABLE = r"""
=== The key is useless for anything but rsync writing below one path

* rrsync is tried
  test_link.KeyThief
  cmd_link: probe_rrsync(rrsync, munge) => None

* and its neighbour, a backup
  test_link.Neighbour
  probe_rrsync: send('-rlbI', '--backup-dir=x', '--', plant + '/') => None

* no file is read through a basis directory
  test_link.KeyThief.test_it_reads_no_file_through_a_basis_directory
  format_forced_command: FORCED_GUARD => 'exec '

AcceptEnv
  test_link.SshdSays.test_what_lets_the_key_out_of_its_restriction
  warn_of_link: filter(lets_code_in, sshd.get('acceptenv', [])) => []

PermitTunnel
  test_link.SshdSays.test_what_lets_the_key_out_of_its_restriction
  warn_of_link: sshd.get('permittunnel', ['no']) != ['no'] => False

=== `link` refuses paths where writing is as good as a shell

system trees
  test_link.Paths
  check_link_risks: {*SYSTEM_TREES, *map(os.path.realpath, SYSTEM_TREES)} => ()

dot components
  test_link.Paths
  check_link_risks: real != default and '/.' in real => False

the private key and offsync itself
  test_link.Linking
  cmd_link: [rrsync, StateDirectory().key, *programs] => [rrsync]

never in or above ~/.ssh
  test_link.Linking
  validate_link_path: within(place, real) or within(real, place) => False

parents that others may write to
  test_link.Paths
  check_link_risks: untrusted_writer(real, itself=False) => None

=== On every connection offsync tries to run a command and goes on only if that is refused

* a command must be refused
  test_trust.Restriction.test_an_unrestricted_line_above
  check_refusal: PROOF_OUTPUT in result.stdout => False

no plan without the proof
  test_trust.Restriction
  compare_with_proof: not connection.restriction_proved and (not failed or failed.kind !=
      'no-response') => False

* the path is proved
  test_trust.Restriction.test_another_directory
  plan_target: prove_path(connection) => None

sessions go over the proved connection only
  test_trust.Restriction.test_a_session_has_nowhere_else_to_go
  module: '-F /dev/null -o ControlMaster=no -o BatchMode=yes -o LogLevel=ERROR -o
      ProxyCommand=/nonexistent/offsync-connection-ended' => '-F /dev/null -o ControlMaster=no -o
      BatchMode=yes -o LogLevel=ERROR'

=== A host key is trusted only after a typed `yes`

* strict host keys
  test_trust.HostKeys.test_a_changed_host_key
  module: 'StrictHostKeyChecking=yes' => 'StrictHostKeyChecking=no'

only a full "yes"
  test_trust.HostKeys
  confirm_host_key: answer != 'yes' => answer not in ('yes', 'y')

the wanted fingerprint
  test_trust.HostKeys
  connect_trusted: wanted and shown not in wanted => fetch_host_key(connection)

@revoked binds
  test_trust.ManInTheMiddle
  Connection.options: f'UserKnownHostsFile="{self.known_hosts}" ~/.ssh/known_hosts
      ~/.ssh/known_hosts2' => f'UserKnownHostsFile="{self.known_hosts}"'

no Kerberos in place of known_hosts
  test_trust.OneKey
  module: 'GSSAPIKeyExchange=no' => 'BatchMode=yes'

=== ssh gets no agent

no forwarding
  test_trust.ManInTheMiddle
  module: 'ClearAllForwardings=yes' => 'ClearAllForwardings=no'

none of ssh_config's environment
  test_trust.ManInTheMiddle
  module: 'SetEnv=LC_ALL=C' => 'BatchMode=yes'

* rsync gets no HOME
  test_exact.OutsideInfluence
  child_environment: ours.pop('HOME', None) => None

rsync gets no RSYNC_*
  test_exact.OutsideInfluence
  child_environment: not key.startswith('RSYNC_') => True

=== Nothing but what was planned is called ok

* content sent is the planned one
  test_exact.SourceChanges.test_other_content_mode_link_and_type_while_sending
  TransferReport.take: sent and md5 != entry.md5.hex().encode() => False

mode sent is the planned one
  test_exact.SourceChanges
  TransferReport.take: mode != stat.filemode(stat.S_IFREG | entry.mode)[1:].encode() => False

every planned entry is reported
  test_hostile.HostileTarget
  Delivery.send: if lost: changed = {path for path, entry in lost.items() if not
      self.source.still_matches(path, entry)}; kind = 'source-changed' if changed else
      'changed-meanwhile'; raise self.target_error(kind, changed or set(lost)) => pass

=== `apply --plan` asks rsync to send nothing that the reviewed plan does not list

* every line of now was reviewed
  test_reviewed_plans.Approval.test_what_a_review_does_not_approve
  approve: differing.append(f'{target.login}: {quote_path(change.path)} {what}') => None

what was reviewed is in the source
  test_reviewed_plans.Approval
  not_done: now._replace(md5=b'') == entry if now else source.still_matches(path, entry) => True

* a plan's line is as offsync prints it
  test_reviewed_plans.Approval.test_what_a_line_shows_is_what_it_approves
  check_line: line != printed => False

a kept plan is its ID's
  test_plan.PlanIds
  StateDirectory.open_plan: is_id and digest.hexdigest() != named => False

nothing unplanned is sent
  test_parsers.Reports
  TransferReport.take: self.mismatched.add(name) => None

=== In a pass that deletes, nothing can be sent

* nothing can be sent while deleting
  test_hostile.Deletions.test_what_is_excluded_cannot_be_asked_for
  module: '--filter=hide,! */' => '--one-file-system'

nothing else is deleted
  test_hostile.Deletions
  Delivery.delete: not gone and (not code.startswith(b'.d')) => False

* a deletion in a pass that sends
  test_hostile.Deletions.test_deletions_in_a_pass_that_sends
  TransferReport.take: code.startswith(b'*deleting') => False

* what an exclude protects
  test_exact.Excluded
  Delivery.check_protected_directories: if protected: raise self.target_error('protected',
      protected) => pass

* names that may be one file
  test_filesystems.Case.test_both_there_and_one_here
  review_required: colliding_names((change.path for change in gone), context.included - new) =>
      set()

=== What a target answers is shown quoted and shortened

nothing shown moves a cursor
  test_hostile.Hostile
  replace_unprintable: ''.join((c if c.isprintable() else '?' for c in text)) => text

a line has an end
  test_parsers.Limits
  Output.feed: len(self.partial_line) > MAX_LINE => False

reports are bounded
  test_hostile.HostileTarget
  Output.use_room: self.room + PROGRESS_RATE * (time.monotonic() - self.started) < 0 => False

a program that falls silent
  test_parsers.Limits
  Output.read: not late and (not ended) and (now - heard > limit) => False

=== Every apply leaves a record.

a record survives a power cut
  test_state.PowerCut
  append_log: os.fsync(log) => None

a refused run leaves the last outcome alone
  test_status.Status
  RunLog.finish: self.locked and record.result != 'refused' => self.locked

=== What else must hold

* also beside a mode-only change
  test_exact.SourceChanges.test_a_mode_only_entry_that_is_sent_with_content
  TransferReport.take: change.sends_content or code[:1] == b'<' => change.sends_content

what could not be staged
  test_filesystems.UnusualFilesystems
  Delivery.send: b'Unable to create partial-dir' in result.stderr => False

content goes without a quick check
  test_plan.Reasons
  module: ('-I', '--delay-updates') => ('--delay-updates',)

* the root is not sent
  test_exact.Root
  files_from_entry: b'/' + path => b'./' + path

* symlinks go last
  test_exact.SymlinksLast
  Delivery.deliver: [change for change in self.to_send if not change.is_symlink] =>
      list(self.to_send)

files are verified before symlinks
  test_exact.SymlinksLast
  Delivery.deliver: self.verify_sent(others) if others else None => None

the tree is verified at the end
  test_failures.Trouble.test_nothing_is_deleted_while_something_differs
  Delivery.deliver: found.differs or found.extraneous => False

MD5 for what is sent
  test_exact.OutsideInfluence
  child_environment: ours['RSYNC_CHECKSUM_LIST'] = 'md5' => pass

verify compares by MD5
  test_exact.OutsideInfluence
  cmd_verify: 'hash' if args.fast else 'strong' => 'hash'

unknown is null
  test_exact.UnknownIsNull
  Delivery.delivered: not self.outcome => False

stuck staged files are sent again
  test_exact.SecondRunIsEmpty
  Delivery.verify_sent: staging_path(change.path) in self.plan.staged => False

two slashes
  test_exact.SecondRunIsEmpty
  prove_path: before[quote + 1:].rstrip(b'/') => before[quote + 1:]

the time without a byte while sending
  test_exact.Timeouts
  Connection.rsync_once: min(SEND_TIMEOUT, config.timeout) => 0

Ctrl-C ends programs
  test_exact.Timeouts
  RunContext.__exit__: for process in list(LIVE_PROCESSES): kill_group(process) => pass

a run that is over ends its work
  test_state.Surroundings.test_a_plan_that_fails_ends_what_it_began
  RunContext.__exit__: STOPPING.value = True => None

nothing is deleted in a pass over names
  test_hostile.Deletions.test_a_deletion_in_a_pass_over_names
  itemize: paths is not None => False

* deletions need the policy
  test_plan.Policies
  policy_violation: concerned and (not permitted) => False

* an empty source never deletes
  test_deleting.Deleting.test_an_empty_source_never_deletes_even_when_reviewed
  policy_violation: check_empty and any((plan.changes_of(*gone) for plan in plans)) and (not
      context.included) => False

max_delete
  test_deleting.Deleting
  review_required: len(gone) >= MANY_DELETIONS => False

few deletions are no danger
  test_deleting.Deleting
  module: MANY_DELETIONS = 10 => MANY_DELETIONS = 1

something new stops the deletion
  test_plan.Policies
  Delivery.delete: if surprises: raise self.target_error('appeared', surprises) => pass

deletions after what replaces them
  test_failures.Trouble
  Delivery.deliver: not found.differs => True

a leftover is deleted by policy only
  test_failures.Kills
  Delivery.__init__: context.config.delete => True

leftovers that were not reviewed stay
  test_reviewed_plans.Approval
  approve: plan.target in spared => False

a twin that is added is told apart
  test_filesystems.Case.test_a_rename_in_case_only_needs_one_run
  review_required: context.included - new => context.included

directories above may be one, too
  test_filesystems.ExFat.test_two_directories_that_are_one_there
  colliding_names: (path, *above(path)) => (path,)

final dots and blanks
  test_filesystems.Case.test_both_there_and_one_here
  casefold_nfc: name.rstrip('. ') => name

what was to be deleted is not back
  test_plan.PlanIds
  not_done: change.kind == 'missing' and exists_below(source.root, path) => False

reviewed paths stay inside
  test_reviewed_plans.Approval
  check_relative: not {b'..', b'.', b''}.isdisjoint(path.split(b'/')) => False

a target that was not reviewed
  test_reviewed_plans.Approval
  approve: plan.target in unreviewed => False

the source is named in the policy
  test_plan.PlanIds
  module: ('source', 'delete', 'overwrite', 'verify', 'exclude') => ('delete', 'overwrite',
      'verify', 'exclude')

success is no refusal
  test_trust.Restriction
  check_refusal: if result.status == 0: raise failure(target, 'not-rrsync') => if result.status ==
      0: return None

a proof that is cut off is none
  test_trust.Restriction
  check_refusal: if result.status is None: raise failure(target, 'no-response') => if result.status
      is None: return None

ssh's own failure is no refusal
  test_trust.Restriction
  check_refusal: 0 < result.status < 255 => 0 < result.status < 256

a reopened connection proves its path
  test_trust.Restriction
  Connection.rsync_with_retry: if path_proved: prove_path(self) => pass

an old ssh opens no session
  test_trust.OneKey.test_an_ssh_before_8_7
  module: '-f -N -o ControlMaster=yes -o ControlPersist=no -o LogLevel=VERBOSE' => '-N -o
      ControlMaster=yes -o ControlPersist=no -o LogLevel=VERBOSE'

the old host key goes
  test_trust.HostKeys
  trust_host_key: removed.status != 0 => False

symlinks stay inside
  test_plan.Scope
  symlink_problem: escapes_source(path, link) or not within => False

the reserved name
  test_plan.Scope
  scan: entry.name == STAGING_DIR => False

nothing is compared before the source is accepted
  test_exact.SourceAccepted
  plan_target: source.accepted.wait(0.1) => True

devices and fifos
  test_plan.Scope
  entry_problem: 'it is a device, socket or fifo' => ''

the private key is no delivery
  test_state.UserBeside
  plan_all: (state.path, state.key) => ()

by its real path either
  test_state.UserBeside
  plan_all: (state.path, state.key) => (home.path,)

no hash through a symlinked parent
  test_exact.SourceWriter
  open_directory: flags | os.O_NOFOLLOW => flags

a symlink is judged when it is read, too
  test_parsers.Sources
  describe_entry: escapes_source(path, link) => False

* others may not write to the state
  test_state.UserBeside
  StateDirectory.check_writers: strangers => ''

nor may its group
  test_link.Paths
  judge_place: mode & 18 => mode & 2

verify keeps writers out
  test_status.Status
  cmd_verify: take_lock(state, 'verify', shared=True) => None

a record at every end
  test_state.Records
  RunLog.__exit__: list(self.unfinished.values()) if error else () => ()

the status is the other run's
  test_state.Records.test_a_signal_before_the_lock_is_taken
  RunLog.finish: self.locked => True

nothing beside it is imported
  test_state.UserBeside
  module: del sys.path[0] => pass

scratch is nobody else's
  test_state.UserBeside
  make_scratch: not untrusted_writer(made) => True

an ignored SIGCHLD is set back
  test_state.Surroundings.test_an_ignored_sigchld
  main: signal.signal(signal.SIGCHLD, signal.SIG_DFL) => None

programs start in a directory that exists
  test_state.Surroundings.test_a_working_directory_that_is_gone
  run_program: '/' => None

HOME of another account
  test_state.Surroundings.test_homes_of_others
  home_directory: owner != os.geteuid() and os.path.realpath(home) != os.path.realpath(own) => False

our own key is asked for first
  test_state.OwnKey
  diagnose_login: error.kind == 'key-refused' or b'Load key' in result.stderr => False

an entry is reported once
  test_hostile.Hostile
  itemize: change.path in found => False

what is drawn as nothing is quoted
  test_exact.LookAlike
  quote_name: not INVISIBLE.search(text) => True

names that look alike are told apart
  test_exact.LookAlike
  change_line: quote_name(change.path, quoted) => quote_name(change.path)

--accept-risk is for one rule
  test_link.Paths
  cmd_link: 'path' in risks => bool(risks)

an entry .ssh
  test_link.SshdSays
  check_link_risks: os.path.lexists(os.path.join(real, '.ssh')) => False

a foreign line with the key
  test_link.Linking
  edit_authorized_keys: raise ValueError(number) => kept.append(line)

--from stays
  test_link.Linking
  cmd_link: kept and args.from_pattern is None => False

modes whatever the umask
  test_link.Paths
  main: os.umask(18) => None

what login shells read differently
  test_link.Quoting
  validate_link_path: check_quotable('path', real) => None

CR only before LF
  test_config.AsPeopleWriteIt
  module: '[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]' =>
      '[\x00-\x08]'

a file of stderr is bounded
  test_parsers.Limits
  Output.read: self.stderr_file and os.fstat(self.stderr_file.fileno()).st_size > self.room => False

a plan has one policy line
  test_reviewed_plans.Approval.test_what_a_review_does_not_approve
  approve: number == 1 => b'"source"' in line

an idle connection is opened once more
  test_trust.Restriction.test_an_idle_connection_that_sshd_closes_is_opened_once_more
  Connection.rsync_with_retry: error.kind == 'closed-after-login' => False

what is no regular file is not replaced
  test_link.Linking.test_what_is_no_regular_file_is_left_alone
  write_atomically: old and (not stat.S_ISREG(old.st_mode)) => False

the rule of a directory above ends with a slash
  test_exact.Replaced
  Delivery.delete: exact_filter_pattern(directory) + b'/' => exact_filter_pattern(directory)

what has another type than planned is not deleted
  test_exact.Replaced
  Delivery.delete: extraneous - self.to_delete | self.retyped => extraneous - self.to_delete

what the source has again is not deleted
  test_exact.Replaced
  Delivery.delete: paths & extraneous => paths

leftovers may be the only copy, too
  test_filesystems.Case.test_a_leftover_may_be_the_only_copy_too
  review_required: colliding_names((change.path for change in gone), context.included - new) =>
      colliding_names((c.path for c in gone if c.kind == 'missing'), context.included - new)

what a deletion may have taken is read
  test_filesystems.Case.test_what_a_cache_goes_on_showing_is_read
  Delivery.deliver: twins and (not found.differs) => False

a banner looks like no host key
  test_trust.Banners
  diagnose_login: LOGIN_FAILURES => FAILURES

no session after a failed proof
  test_trust.Restriction.test_a_connection_that_is_opened_again_proves_its_path_again
  Delivery.run_delivery: may_ask and self.connection.restriction_proved and
      self.connection.path_proved => known

only what was deleted by us is logged so
  test_exact.UnknownIsNull
  Delivery.delivered: self.tried_to_delete - self.outcome.extraneous => self.to_delete -
      self.outcome.extraneous

a policy line is as offsync prints it
  test_reviewed_plans.Approval.test_what_a_review_does_not_approve
  check_policy: check_line(reviewed, json_line(printed)) => None

* the policy is the reviewed one
  test_plan.PlanIds.test_what_changed_since_the_review_is_named
  check_policy: not differing => True

* no file is read through fuzzy
  test_link.KeyThief.test_it_reads_no_file_as_a_fuzzy_basis
  format_forced_command: FORCED_GUARD => FORCED_GUARD.replace('-*y*)', '-*nothing*)')

no file is read as a backup in place
  test_link.KeyThief.test_it_reads_no_file_as_a_fuzzy_basis
  format_forced_command: FORCED_GUARD => FORCED_GUARD.replace('|--backup-dir*', '')

rrsync knows more blanks than the shell
  test_link.KeyThief.test_it_reads_no_file_as_a_fuzzy_basis
  format_forced_command: FORCED_GUARD => FORCED_GUARD.replace(' ?*)', ' nothing)')

a path in the forced command is quoted
  test_link.Quoting
  format_forced_command: re.sub('(?![A-Za-z0-9@%+=:,./_-])[ -~]', '\\\\\\g<0>', word) => word

a path of another account
  test_link.SshdSays.test_a_web_root_that_is_written_by_its_group
  check_link_risks: user == 'root' and owner != 'root' => False

an account that ssh does not take
  test_link.SshdSays.test_accounts_that_no_controller_can_name
  cmd_link: not re.fullmatch(LOGIN_PATTERN, account.pw_name + '@host') => False

* excludes that protect nothing
  test_config.Config.test_excludes_that_protect_nothing
  never_matches: not {'', '.', '..'}.isdisjoint(parts) => False

excludes that begin with the source
  test_config.Config.test_excludes_that_protect_nothing
  never_matches: within(pattern, place) and place != '/' => False

excludes with a blank at an end
  test_config.Config.test_excludes_that_protect_nothing
  never_matches: pattern != pattern.strip() => False

excludes with another source for one run
  test_deleting.Deleting.test_an_exclude_that_begins_with_the_source_of_this_run
  validate_config: [posixpath.normpath(values['source']), os.path.realpath(values['source'])] => []

* what is kept is never deleted
  test_deleting.Keeping
  Delivery.__init__: context.config.delete is Deletion.ALLOW => context.config.delete

what cannot be kept is refused
  test_deleting.Keeping
  classify: in_place.isdisjoint(above(path)) => True

an empty source is refused with keep, too
  test_deleting.Keeping
  policy_violation: config.delete is not Deletion.REFUSE => allowed

what is kept is no difference
  test_deleting.Keeping
  Delivery.compare: keep or is_leftover(self.source, change) => is_leftover(self.source, change)

a word is no name of rsync's
  test_failures.Kills.test_a_leftover_is_only_a_word
  module: re.compile(b'\\.(.+)\\.(?![a-z]{6}$|[A-Z]{6}$|[0-9]{6}$)[A-Za-z0-9]{6}', re.DOTALL) =>
      re.compile(b'\\.(.+)\\.[A-Za-z0-9]{6}', re.DOTALL)

a rename survives a power cut
  test_state.PowerCut
  write_atomically: sync_directory(os.path.dirname(path)) => None

a file of the state that others may write to
  test_state.UserBeside
  StateDirectory.check_writers: (self.named, *files, self.plans, self.last) => (self.named,)

a server that asks for no key
  test_diagnosis.TargetHost.test_what_the_host_does_at_every_login
  Connection.open: re.search(b'(?m)^Authenticated to .* using "none"\\.\\r?$', result.stderr) =>
      False

a program that cannot start
  test_state.Surroundings.test_programs_that_cannot_start
  run_program: cannot_start(argv[0], result) => False

a connection that answered before
  test_state.Surroundings.test_a_connection_that_falls_silent_while_verifying
  Connection.explain: self.answered and error.kind in ('no-response', 'no-answer') => False
"""


class Guard(NamedTuple):
    """One guard: taken out, expression in function becomes another, and test fails."""

    name: str
    function: str
    expression: str
    becomes: str
    test: str
    few: bool
    promise: str


def read_table(table: str) -> list:
    """Return the guards of the table."""
    guards = []
    promise = ""
    for block in table.strip().split("\n\n"):
        if block.startswith("=== "):
            promise = block[4:]
            continue
        name, test, place = block.replace("\n      ", " ").split("\n")
        function, change = place.strip().split(": ", 1)
        expression, becomes = change.split(" => ")
        few = name.startswith("* ")
        name = name.removeprefix("* ")
        guards.append(Guard(name, function, expression, becomes, test.strip(), few, promise))
    return guards


GUARDS = read_table(TABLE)


@functools.cache
def qualified(text: str) -> dict:
    """Return {"Class.function" or "function": its node} of a program; "module" is all of it."""
    module = ast.parse(text)
    found: dict = {"module": module}
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
    wanted = wanted if statement else wanted.value
    dumped = ast.unparse(wanted)
    place = qualified(text).get(function)
    spots = []
    for node in ast.walk(place) if place else ():
        same = type(node) is type(wanted) and not isinstance(getattr(node, "ctx", None), ast.Store)
        if same and ast.unparse(node) == dumped:
            spots.append((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset))
    lines = [line.encode() for line in text.split("\n")]
    for first, start, last, end in sorted(set(spots), reverse=True):
        new = becomes if statement else "(%s)" % becomes
        lines[first - 1 : last] = [lines[first - 1][:start] + new.encode() + lines[last - 1][end:]]
    return b"\n".join(lines).decode() if spots else ""


def try_one(guard: Guard, base: str) -> tuple:
    """Take one guard out in a copy, run its test; return (name, test, verdict)."""
    with open(os.path.join(TOP, "offsync.py"), encoding="utf-8") as stream:
        text = take_out(stream.read(), guard.function, guard.expression, guard.becomes)
    if not text:
        return guard.name, guard.test, "the place is gone"
    try:
        compile(text, "offsync.py", "exec")
    except SyntaxError as error:
        return guard.name, guard.test, "it does not compile without it: %s" % error
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
            [sys.executable, copy + "/tests/run.py", guard.test],
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
    return guard.name, guard.test, "%s, %.0f s" % (verdict, time.monotonic() - started)


def main(words: list) -> int:
    """Try the guards; print a row for each."""
    chosen = [guard for guard in GUARDS if guard.few or "--few" not in words]
    named = [word for word in words if word != "--few"]
    chosen = [guard for guard in chosen if not named or any(word in guard.name for word in named)]
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
