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
REVIEW = "test_reviewed_plans.Approval"
# What README's Security promises, by the beginning of each paragraph, and what keeps it.
PROMISES = {
    "The key is useless for anything but rsync writing below one path": (
        "rrsync is tried",
        "and its neighbour, a backup",
        "no file is read through a basis directory",
        "AcceptEnv",
        "PermitTunnel",
    ),
    "`link` refuses paths where writing is as good as a shell": (
        "system trees",
        "dot components",
        "the private key and offsync itself",
        "never in or above ~/.ssh",
        "parents that others may write to",
    ),
    "On every connection offsync tries to run a command and goes on only if that is refused": (
        "a command must be refused",
        "no plan without the proof",
        "the path is proved",
        "sessions go over the proved connection only",
    ),
    "A host key is trusted only after a typed `yes`": (
        "strict host keys",
        'only a full "yes"',
        "the wanted fingerprint",
        "@revoked binds",
        "no Kerberos in place of known_hosts",
    ),
    "ssh gets no agent": (
        "no forwarding",
        "none of ssh_config's environment",
        "rsync gets no HOME",
        "rsync gets no RSYNC_*",
    ),
    "Nothing but what was planned is called ok": (
        "content sent is the planned one",
        "mode sent is the planned one",
        "every planned entry is reported",
    ),
    "`apply --plan` asks rsync to send nothing that the reviewed plan does not list": (
        "every line of now was reviewed",
        "what was reviewed is in the source",
        "a plan's line is as offsync prints it",
        "a kept plan is its ID's",
        "nothing unplanned is sent",
    ),
    "In a pass that deletes, nothing can be sent": (
        "nothing can be sent while deleting",
        "nothing else is deleted",
        "a deletion in a pass that sends",
        "what an exclude protects",
        "names that may be one file",
    ),
    "What a target answers is shown quoted and shortened": (
        "nothing shown moves a cursor",
        "a line has an end",
        "reports are bounded",
        "a program that falls silent",
    ),
    "Every apply leaves a record.": (
        "a record survives a power cut",
        "a refused run leaves the last outcome alone",
    ),
}
GUARDS = [
    (
        "content sent is the planned one",
        "TransferReport.take",
        "sent and md5 != entry.md5.hex().encode()",
        "False",
        "test_exact.SourceChanges.test_other_content_mode_link_and_type_while_sending",
        FEW,
    ),
    (
        "also beside a mode-only change",
        "TransferReport.take",
        "change.sends_content or code[:1] == b'<'",
        "change.sends_content",
        "test_exact.SourceChanges.test_a_mode_only_entry_that_is_sent_with_content",
        FEW,
    ),
    (
        "mode sent is the planned one",
        "TransferReport.take",
        "mode != stat.filemode(stat.S_IFREG | entry.mode)[1:].encode()",
        "False",
        "test_exact.SourceChanges",
    ),
    (
        "nothing unplanned is sent",
        "TransferReport.take",
        "self.mismatched.add(name)",
        "None",
        "test_parsers.Reports",
    ),
    (
        "a deletion in a pass that sends",
        "TransferReport.take",
        "code.startswith(b'*deleting')",
        "False",
        "test_hostile.Deletions.test_deletions_in_a_pass_that_sends",
        FEW,
    ),
    (
        "every planned entry is reported",
        "Delivery.send",
        (
            "if lost:\n    changed = {path for path, entry in lost.items() if not"
            " self.source.still_matches(path, entry)}\n    kind = 'source-changed' if"
            " changed else 'changed-meanwhile'\n    raise self.target_error(kind, changed"
            " or set(lost))"
        ),
        "pass",
        "test_hostile.HostileTarget",
    ),
    (
        "what could not be staged",
        "Delivery.send",
        "b'Unable to create partial-dir' in result.stderr",
        "False",
        "test_filesystems.UnusualFilesystems",
    ),
    (
        "content goes without a quick check",
        "",
        "('-I', '--delay-updates')",
        "('--delay-updates',)",
        "test_plan.Reasons",
    ),
    (
        "the root is not sent",
        "files_from_entry",
        "b'/' + path",
        "b'./' + path",
        "test_exact.Root",
        FEW,
    ),
    (
        "symlinks go last",
        "Delivery.deliver",
        "[change for change in self.to_send if not change.is_symlink]",
        "list(self.to_send)",
        "test_exact.SymlinksLast",
        FEW,
    ),
    (
        "files are verified before symlinks",
        "Delivery.deliver",
        "self.verify_sent(others) if others else None",
        "None",
        "test_exact.SymlinksLast",
    ),
    (
        "the tree is verified at the end",
        "Delivery.deliver",
        "found.differs or found.extraneous",
        "False",
        "test_failures.Trouble.test_nothing_is_deleted_while_something_differs",
    ),
    (
        "rsync gets no HOME",
        "child_environment",
        "ours.pop('HOME', None)",
        "None",
        "test_exact.OutsideInfluence",
        FEW,
    ),
    (
        "rsync gets no RSYNC_*",
        "child_environment",
        "not key.startswith('RSYNC_')",
        "True",
        "test_exact.OutsideInfluence",
    ),
    (
        "MD5 for what is sent",
        "child_environment",
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
    (
        "unknown is null",
        "Delivery.delivered",
        "not self.outcome",
        "False",
        "test_exact.UnknownIsNull",
    ),
    (
        "stuck staged files are sent again",
        "Delivery.verify_sent",
        "staging_path(change.path) in left",
        "False",
        "test_exact.SecondRunIsEmpty",
    ),
    (
        "two slashes",
        "prove_path",
        "before[quote + 1:].rstrip(b'/')",
        "before[quote + 1:]",
        "test_exact.SecondRunIsEmpty",
    ),
    (
        "the time without a byte while sending",
        "Connection.rsync_once",
        "min(SEND_TIMEOUT, config.timeout)",
        "0",
        "test_exact.Timeouts",
    ),
    (
        "Ctrl-C ends programs",
        "RunContext.__exit__",
        "for process in list(LIVE_PROCESSES):\n    kill_group(process)",
        "pass",
        "test_exact.Timeouts",
    ),
    (
        "a run that is over ends its work",
        "RunContext.__exit__",
        "STOPPING.value = True",
        "None",
        "test_state.Surroundings.test_a_plan_that_fails_ends_what_it_began",
    ),
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
        "paths is not None",
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
        "policy_violation",
        "concerned and (not permitted)",
        "False",
        "test_plan.Policies",
        FEW,
    ),
    (
        "an empty source never deletes",
        "policy_violation",
        "emptied and any((plan.changes_of(*gone) for plan in plans)) and (not context.included)",
        "False",
        "test_deleting.Deleting.test_an_empty_source_never_deletes_even_when_reviewed",
        FEW,
    ),
    (
        "max_delete",
        "review_required",
        "len(gone) >= MANY_DELETIONS",
        "False",
        "test_deleting.Deleting",
    ),
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
        "if surprises:\n    raise self.target_error('appeared', surprises)",
        "pass",
        "test_plan.Policies",
    ),
    (
        "deletions after what replaces them",
        "Delivery.deliver",
        "not found.differs",
        "True",
        "test_failures.Trouble",
    ),
    (
        "a leftover is deleted by policy only",
        "Delivery.__init__",
        "context.config.delete",
        "True",
        "test_failures.Kills",
    ),
    (
        "leftovers that were not reviewed stay",
        "approve",
        "plan.target in spared",
        "False",
        "test_reviewed_plans.Approval",
    ),
    (
        "names that may be one file",
        "review_required",
        "colliding_names((change.path for change in gone), context.included - new)",
        "set()",
        "test_filesystems.Case.test_both_there_and_one_here",
        FEW,
    ),
    (
        "a twin that is added is told apart",
        "review_required",
        "context.included - new",
        "context.included",
        "test_filesystems.Case.test_a_rename_in_case_only_needs_one_run",
    ),
    (
        "directories above may be one, too",
        "colliding_names",
        "(path, *above(path))",
        "(path,)",
        "test_filesystems.ExFat.test_two_directories_that_are_one_there",
    ),
    (
        "final dots and blanks",
        "casefold_nfc",
        "re.sub('[. ]+(?=/|$)', '', unicodedata.normalize('NFC', text.casefold()))",
        "text.casefold()",
        "test_filesystems.Case.test_both_there_and_one_here",
    ),
    (
        "what an exclude protects",
        "Delivery.check_protected_directories",
        "if protected:\n    raise self.target_error('protected', protected)",
        "pass",
        "test_exact.Excluded",
        FEW,
    ),
    (
        "every line of now was reviewed",
        "approve",
        "differing.append(f'{target.login}: {quote_path(change.path)} {state}')",
        "None",
        "test_reviewed_plans.Approval.test_what_a_review_does_not_approve",
        FEW,
    ),
    (
        "what was reviewed is in the source",
        "not_done",
        "now._replace(md5=b'') == entry if now else source.still_matches(path, entry)",
        "True",
        "test_reviewed_plans.Approval",
    ),
    (
        "what was to be deleted is not back",
        "not_done",
        "change.kind == 'missing' and exists_below(source.root, path)",
        "False",
        "test_plan.PlanIds",
    ),
    (
        "reviewed paths stay inside",
        "check_relative",
        "not {b'..', b'.', b''}.isdisjoint(path.split(b'/'))",
        "False",
        "test_reviewed_plans.Approval",
    ),
    (
        "a plan's line is as offsync prints it",
        "check_line",
        "line != printed",
        "False",
        "test_reviewed_plans.Approval.test_what_a_line_shows_is_what_it_approves",
        FEW,
    ),
    (
        "a target that was not reviewed",
        "approve",
        "plan.target in unreviewed",
        "False",
        "test_reviewed_plans.Approval",
    ),
    (
        "a kept plan is its ID's",
        "StateDirectory.open_plan",
        "is_id and digest.hexdigest() != named",
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
    (
        "a command must be refused",
        "check_refusal",
        "PROOF_OUTPUT in result.stdout",
        "False",
        "test_trust.Restriction.test_an_unrestricted_line_above",
        FEW,
    ),
    (
        "success is no refusal",
        "check_refusal",
        "if result.status == 0:\n    raise failure(target, 'not-rrsync')",
        "if result.status == 0:\n        return None",
        "test_trust.Restriction",
    ),
    (
        "a proof that is cut off is none",
        "check_refusal",
        "if result.status is None:\n    raise failure(target, 'no-response')",
        "if result.status is None:\n        return None",
        "test_trust.Restriction",
    ),
    (
        "ssh's own failure is no refusal",
        "check_refusal",
        "0 < result.status < 255",
        "0 < result.status < 256",
        "test_trust.Restriction",
    ),
    (
        "no plan without the proof",
        "compare_with_proof",
        ("not connection.restriction_proved and (not failed or failed.kind != 'no-response')"),
        "False",
        "test_trust.Restriction",
    ),
    (
        "the path is proved",
        "plan_target",
        "if changes:\n    prove_path(connection)",
        "pass",
        "test_trust.Restriction.test_another_directory",
        FEW,
    ),
    (
        "a reopened connection proves its path",
        "Connection.rsync_with_retry",
        "if path_proved:\n    prove_path(self)",
        "pass",
        "test_trust.Restriction",
    ),
    (
        "sessions go over the proved connection only",
        "",
        "'-F /dev/null -o ControlMaster=no -o BatchMode=yes -o LogLevel=ERROR"
        " -o ProxyCommand=/nonexistent/offsync-connection-ended'",
        "'-F /dev/null -o ControlMaster=no -o BatchMode=yes -o LogLevel=ERROR'",
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
        "'-f -N -o ControlMaster=yes -o ControlPersist=no -o LogLevel=VERBOSE'",
        "'-N -o ControlMaster=yes -o ControlPersist=no -o LogLevel=VERBOSE'",
        "test_trust.OneKey.test_an_ssh_before_8_7",
    ),
    (
        "@revoked binds",
        "Connection.options",
        "f'UserKnownHostsFile=\"{self.known_hosts}\" ~/.ssh/known_hosts ~/.ssh/known_hosts2'",
        "f'UserKnownHostsFile=\"{self.known_hosts}\"'",
        "test_trust.ManInTheMiddle",
    ),
    (
        "the wanted fingerprint",
        "connect_trusted",
        "wanted and shown not in wanted",
        "fetch_host_key(connection)",
        "test_trust.HostKeys",
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
        "trust_host_key",
        "removed.status != 0",
        "False",
        "test_trust.HostKeys",
    ),
    (
        "symlinks stay inside",
        "symlink_problem",
        "escapes_source(path, link) or not within",
        "False",
        "test_plan.Scope",
    ),
    ("the reserved name", "scan", "entry.name == STAGING_DIR", "False", "test_plan.Scope"),
    (
        "nothing is compared before the source is accepted",
        "plan_target",
        "source.accepted.wait(0.1)",
        "True",
        "test_exact.SourceAccepted",
    ),
    (
        "devices and fifos",
        "entry_problem",
        "'it is a device, socket or fifo'",
        "''",
        "test_plan.Scope",
    ),
    (
        "the private key is no delivery",
        "plan_all",
        "(state.path, state.key)",
        "()",
        "test_state.UserBeside",
    ),
    (
        "by its real path either",
        "plan_all",
        "(state.path, state.key)",
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
        "escapes_source(path, link)",
        "False",
        "test_parsers.Sources",
    ),
    (
        "others may not write to the state",
        "StateDirectory.check_writers",
        "strangers",
        "''",
        "test_state.UserBeside",
        FEW,
    ),
    ("nor may its group", "judge_place", "mode & 18", "mode & 2", "test_link.Paths"),
    (
        "verify keeps writers out",
        "cmd_verify",
        "take_lock(state, 'verify', shared=True)",
        "None",
        "test_status.Status",
    ),
    (
        "a record at every end",
        "RunLog.__exit__",
        "list(self.unfinished.values()) if error else ()",
        "()",
        "test_state.Records",
    ),
    (
        "the status is the other run's",
        "RunLog.finish",
        "self.locked",
        "True",
        "test_state.Records.test_a_signal_before_the_lock_is_taken",
    ),
    ("nothing beside it is imported", "", "del sys.path[0]", "pass", "test_state.UserBeside"),
    (
        "scratch is nobody else's",
        "make_scratch",
        "not untrusted_writer(made)",
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
        "run_program",
        "'/'",
        "None",
        "test_state.Surroundings.test_a_working_directory_that_is_gone",
    ),
    (
        "HOME of another account",
        "home_directory",
        "owner != os.geteuid() and os.path.realpath(home) != os.path.realpath(own)",
        "False",
        "test_state.Surroundings.test_homes_of_others",
    ),
    (
        "our own key is asked for first",
        "diagnose_login",
        "error.kind == 'key-refused' or b'Load key' in result.stderr",
        "False",
        "test_state.OwnKey",
    ),
    (
        "an entry is reported once",
        "itemize",
        "change.path in found",
        "False",
        "test_hostile.Hostile",
    ),
    (
        "reports are bounded",
        "Output.use_room",
        "self.room < 0",
        "False",
        "test_hostile.HostileTarget",
    ),
    (
        "a line has an end",
        "Output.feed",
        "len(self.partial_line) > MAX_LINE",
        "False",
        "test_parsers.Limits",
    ),
    (
        "nothing shown moves a cursor",
        "replace_unprintable",
        "''.join((c if c.isprintable() else '?' for c in text))",
        "text",
        "test_hostile.Hostile",
    ),
    (
        "what is drawn as nothing is quoted",
        "quote_name",
        "not INVISIBLE.search(text)",
        "True",
        "test_exact.LookAlike",
    ),
    (
        "names that look alike are told apart",
        "change_line",
        "quote_name(change.path, quoted)",
        "quote_name(change.path)",
        "test_exact.LookAlike",
    ),
    (
        "rrsync is tried",
        "cmd_link",
        "probe_rrsync(rrsync, munge)",
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
        "the private key and offsync itself",
        "cmd_link",
        "[rrsync, StateDirectory().key, *programs]",
        "[rrsync]",
        "test_link.Linking",
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
        "untrusted_writer(real, itself=False)",
        "''",
        "test_link.Paths",
    ),
    (
        "never in or above ~/.ssh",
        "validate_link_path",
        "within(place, real) or within(real, place)",
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
        "os.fchmod(descriptor, mode if place == path else 493)",
        "None",
        "test_link.Paths",
    ),
    (
        "what login shells read differently",
        "validate_link_path",
        "check_forced_word('path', real)",
        "None",
        "test_link.Quoting",
    ),
    (
        "CR only before LF",
        "",
        "'[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ud800-\\udfff\\ufffe\\uffff]'",
        "'[\\x00-\\x08]'",
        "test_config.AsPeopleWriteIt",
    ),
    (
        "a program that falls silent",
        "Output.read",
        "not late and (not ended) and (now - heard > limit)",
        "False",
        "test_parsers.Limits",
    ),
    (
        "a file of stderr is bounded",
        "Output.read",
        "self.stderr_file and os.fstat(self.stderr_file.fileno()).st_size > self.room",
        "False",
        "test_parsers.Limits",
    ),
    (
        "a plan has one policy line",
        "approve",
        "number == 1",
        "b'\"source\"' in line",
        "test_reviewed_plans.Approval.test_what_a_review_does_not_approve",
    ),
    (
        "an idle connection is opened once more",
        "Connection.rsync_with_retry",
        "error.kind == 'closed-after-login'",
        "False",
        "test_trust.Restriction.test_an_idle_connection_that_sshd_closes_is_opened_once_more",
    ),
    (
        "what is no regular file is not replaced",
        "write_atomically",
        "os.path.exists(path) and (not os.path.isfile(path))",
        "False",
        "test_link.Linking.test_what_is_no_regular_file_is_left_alone",
    ),
    (
        "the rule of a directory above ends with a slash",
        "Delivery.delete",
        "exact_filter_pattern(directory) + b'/'",
        "exact_filter_pattern(directory)",
        "test_exact.Replaced",
    ),
    (
        "leftovers may be the only copy, too",
        "review_required",
        "colliding_names((change.path for change in gone), context.included - new)",
        "colliding_names((c.path for c in gone if c.kind == 'missing'), context.included - new)",
        "test_filesystems.Case.test_a_leftover_may_be_the_only_copy_too",
    ),
    (
        "what a deletion may have taken is read",
        "Delivery.deliver",
        "twins and (not found.differs)",
        "False",
        "test_filesystems.Case.test_what_a_cache_goes_on_showing_is_read",
    ),
    (
        "a banner looks like no host key",
        "diagnose_login",
        "LOGIN_FAILURES",
        "FAILURES",
        "test_trust.Banners",
    ),
    (
        "no session after a failed proof",
        "Delivery.run_delivery",
        "known and self.connection.restriction_proved and self.connection.path_proved",
        "known",
        "test_trust.Restriction.test_a_connection_that_is_opened_again_proves_its_path_again",
    ),
    (
        "only what was deleted by us is logged so",
        "Delivery.delivered",
        "self.tried_to_delete - self.outcome.extraneous",
        "self.to_delete - self.outcome.extraneous",
        "test_exact.UnknownIsNull",
    ),
    (
        "a policy line is as offsync prints it",
        "check_policy",
        "check_line(reviewed, json_line(printed))",
        "None",
        "test_reviewed_plans.Approval.test_what_a_review_does_not_approve",
    ),
    (
        "the policy is the reviewed one",
        "check_policy",
        "not differing",
        "True",
        "test_plan.PlanIds.test_what_changed_since_the_review_is_named",
        FEW,
    ),
    (
        "no file is read through a basis directory",
        "format_forced_command",
        "FORCED_GUARD",
        "'exec '",
        "test_link.KeyThief.test_it_reads_no_file_through_a_basis_directory",
        FEW,
    ),
    (
        "no file is read through fuzzy",
        "format_forced_command",
        "FORCED_GUARD",
        "FORCED_GUARD.replace('-*y*)', '-*nothing*)')",
        "test_link.KeyThief.test_it_reads_no_file_as_a_fuzzy_basis",
        FEW,
    ),
    (
        "no file is read as a backup in place",
        "format_forced_command",
        "FORCED_GUARD",
        "FORCED_GUARD.replace('|--backup-dir*', '')",
        "test_link.KeyThief.test_it_reads_no_file_as_a_fuzzy_basis",
    ),
    (
        "rrsync knows more blanks than the shell",
        "format_forced_command",
        "FORCED_GUARD",
        "FORCED_GUARD.replace(' ?*)', ' nothing)')",
        "test_link.KeyThief.test_it_reads_no_file_as_a_fuzzy_basis",
    ),
    (
        "a path in the forced command is quoted",
        "format_forced_command",
        "re.sub('[ -~](?<![A-Za-z0-9@%+=:,./_-])', '\\\\\\\\\\\\g<0>', word)",
        "word",
        "test_link.Quoting",
    ),
    (
        "AcceptEnv",
        "link_warnings",
        "lets_code_in(word)",
        "False",
        "test_link.SshdSays.test_what_lets_the_key_out_of_its_restriction",
    ),
    (
        "PermitTunnel",
        "link_warnings",
        "sshd.get('permittunnel', ['no']) != ['no']",
        "False",
        "test_link.SshdSays.test_what_lets_the_key_out_of_its_restriction",
    ),
    (
        "a path of another account",
        "link_risks",
        "os.geteuid() == 0 and owner != user",
        "False",
        "test_link.SshdSays.test_a_web_root_that_is_written_by_its_group",
    ),
    (
        "an account that ssh does not take",
        "cmd_link",
        "not re.fullmatch(LOGIN_PATTERN, account.pw_name + '@host')",
        "False",
        "test_link.SshdSays.test_accounts_that_no_controller_can_name",
    ),
    (
        "excludes that protect nothing",
        "never_matches",
        "not {'', '.', '..'}.isdisjoint(parts)",
        "False",
        "test_config.Config.test_excludes_that_protect_nothing",
        FEW,
    ),
    (
        "excludes that begin with the source",
        "never_matches",
        "within(pattern, place) and place != '/'",
        "False",
        "test_config.Config.test_excludes_that_protect_nothing",
    ),
    (
        "excludes with a blank at an end",
        "never_matches",
        "pattern != pattern.strip()",
        "False",
        "test_config.Config.test_excludes_that_protect_nothing",
    ),
    (
        "excludes with another source for one run",
        "load_targets",
        "never_matches(rule, source, os.path.realpath(source))",
        "None",
        "test_deleting.Deleting.test_an_exclude_that_begins_with_the_source_of_this_run",
    ),
    (
        "what is kept is never deleted",
        "Delivery.__init__",
        "context.config.delete is Deletion.ALLOW",
        "context.config.delete",
        "test_deleting.Keeping",
        FEW,
    ),
    (
        "what cannot be kept is refused",
        "classify",
        "in_place.isdisjoint(above(path))",
        "True",
        "test_deleting.Keeping",
    ),
    (
        "an empty source is refused with keep, too",
        "policy_violation",
        "config.delete is not Deletion.REFUSE",
        "allowed",
        "test_deleting.Keeping",
    ),
    (
        "what is kept is no difference",
        "Delivery.compare",
        "keep or is_leftover(self.source, change)",
        "is_leftover(self.source, change)",
        "test_deleting.Keeping",
    ),
    (
        "a word is no name of rsync's",
        "",
        "re.compile(b'\\\\.(.+)\\\\.(?![a-z]{6}$|[A-Z]{6}$|[0-9]{6}$)[A-Za-z0-9]{6}', re.DOTALL)",
        "re.compile(rb'\\.(.+)\\.[A-Za-z0-9]{6}', re.DOTALL)",
        "test_failures.Kills.test_a_leftover_is_only_a_word",
    ),
    (
        "a rename survives a power cut",
        "write_atomically",
        "sync_directory(os.path.dirname(path))",
        "None",
        "test_state.PowerCut",
    ),
    (
        "a record survives a power cut",
        "append_log",
        "os.fsync(log)",
        "None",
        "test_state.PowerCut",
    ),
    (
        "a file of the state that others may write to",
        "StateDirectory.check_writers",
        "(self.named, *names, self.plans, self.last)",
        "(self.named,)",
        "test_state.UserBeside",
    ),
    (
        "a refused run leaves the last outcome alone",
        "RunLog.finish",
        "self.locked and record.result != 'refused'",
        "self.locked",
        "test_status.Status",
    ),
    (
        "a server that asks for no key",
        "Connection.open",
        "re.search(b'(?m)^Authenticated to .* using \"none\"\\\\.\\\\r?$', result.stderr)",
        "False",
        "test_diagnosis.TargetHost.test_what_the_host_does_at_every_login",
    ),
    (
        "a program that cannot start",
        "run_program",
        "cannot_start(argv[0], result)",
        "False",
        "test_state.Surroundings.test_programs_that_cannot_start",
    ),
    (
        "a connection that answered before",
        "Connection.explain",
        "self.answered and error.kind in ('no-response', 'no-answer')",
        "False",
        "test_state.Surroundings.test_a_connection_that_falls_silent_while_verifying",
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
