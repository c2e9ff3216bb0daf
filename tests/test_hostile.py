"""Hostile answers of a target: bounded, never shown raw, and nobody else's trouble."""

from __future__ import annotations

import os
import signal
import unittest

from lab import (
    OFFSYNC,
    OneTargetCase,
    WrappedRsyncCase,
    comm,
    descendants,
    offsync,
    read,
    require,
    snapshot,
    wait_for,
    write,
)


class HostileTarget(WrappedRsyncCase):
    def test_answers_made_for_a_regular_expression(self) -> None:
        """Tens of kilobytes on stderr, of what a pattern with nested repetition takes minutes for,
        cost nothing.
        """
        other = self.lab.configured_target("other")
        self.addCleanup(lambda: self.lab.offsync("target remove", other.login, check=0))
        write(self.source + "/f", "x")
        evil = self.lab.base + "/stderr"
        write(evil, " ' \"/' " * 3000 + "/" * 32700 + "\n" + "rsync: connection " * 3000)
        script = self.lab.base + "/standing-rrsync"
        write(script, "#!/bin/sh\ncat %s >&2\nexit 12\n" % evil, 0o755)
        line = read(self.target.keys)
        self.addCleanup(write, self.target.keys, line)
        write(self.target.keys, line.replace("/usr/bin/rrsync", script))
        done = self.lab.offsync("apply", check=1, timeout=60)
        self.assertIn("2 targets: 1 ok, 1 failed", done.out)
        self.assertLess(len(done.err), 3000)
        self.assertEqual(snapshot(other.path), snapshot(self.source))

    def test_every_sentence_is_found_in_linear_time(self) -> None:
        import time

        target = offsync.Target("u@h", "/srv/x")
        for text in (b"' \"/" * 16000, b"(" * 65536, b"rsync: " * 9000, b"\n" * 65536):
            started = time.process_time()
            offsync.diagnose(target, offsync.Result(12, b"", text))
            self.assertLess(
                time.process_time() - started, 2
            )  # it takes milliseconds; minutes would be the fault

    def test_a_target_that_says_all_is_equal(self) -> None:
        """What offsync cannot know: README says so. It must not be called delivered, though."""
        write(self.source + "/f", "x")
        env = self.wrap_local_rsync(
            'case "$*" in *-rlptc*) echo "sending incremental file list"; exit 0;; esac; real'
        )
        self.assertIn("equal, nothing to do", self.lab.offsync("apply", env=env, check=0).out)
        readme = read(os.path.join(os.path.dirname(OFFSYNC), "README.md")).split(
            "What it does not guarantee"
        )[1]
        self.assertIn('answers "all equal" is believed', " ".join(readme.split()))

    def test_a_target_that_takes_nothing_and_says_all_is_equal(self) -> None:
        """It was planned, so rsync here must report that it went."""
        write(self.source + "/f", "x")
        env = self.wrap_local_rsync(
            'case "$*" in *--delay-updates*) touch ../sent; exit 0;; *-lptc*|*-rlpt*) [ -e ../sent'
            ' ] && { echo "sending incremental file list"; exit 0; };; esac; real'
        )
        done = self.lab.offsync("apply", env=env, check=1)
        self.assertNotIn(" ok: ", done.out)
        self.assertEqual(snapshot(self.there), {})

    def test_memory_is_bounded_over_all_targets(self) -> None:
        write(self.source + "/f", "x")
        quick = self.lab.altered(("LISTING_ROOM = 1 << 31", "LISTING_ROOM = 20_000"))
        for number in range(200):
            write(self.there + "/only%d" % number)
        self.assertIn(
            "printed more than offsync reads", self.lab.offsync("plan", program=quick, check=1).out
        )
        self.lab.offsync("plan", check=0)


class Hostile(OneTargetCase):
    # The beginning of a false rsync that knows the marker of the lines that count.
    MARKED = (
        "#!/bin/sh\nfor w; do case $w in --out-format=*) m=${w#--out-format=}; m=${m%%:*};; esac;"
        " done\n"
    )

    def force(self, script: str) -> None:
        """Give the key a hostile forced command."""
        line = read(self.target.keys)
        self.addCleanup(write, self.target.keys, line)
        program = self.lab.base + "/hostile"
        write(program, "#!/bin/sh\n" + script, 0o755)
        write(self.target.keys, 'command="%s",restrict %s' % (program, line.split("restrict ")[1]))

    def test_control_characters_never_reach_the_terminal(self) -> None:
        self.force("printf '\\033]0;evil\\007\\302\\2332J\\377 No space\\n' >&2; exit 9\n")
        done = self.lab.offsync("plan", check=1)
        for stream in (done.stdout, done.stderr):
            self.assertFalse(set(stream) & (set(range(32)) - {10}), stream)
            self.assertNotIn("\x9b", stream.decode())

    def test_output_without_end(self) -> None:
        for script in (
            "case $SSH_ORIGINAL_COMMAND in rsync*) yes >&2;; *) echo no >&2; exit 1;; esac\n",
            "yes\n",
        ):
            self.force(script)
            process = self.lab.start("plan")
            if ">&2" in script:
                wait_for(
                    lambda: (
                        {"yes", "hostile"} <= set(map(comm, descendants(self.target.process.pid)))
                    ),
                    "the flood",
                )
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=100)
            self.assertIn(process.returncode, (1, 143))
            self.assertNotIn(b"Traceback", err)
            self.assertLess(len(out) + len(err), 4000)

    def test_forged_lines_are_no_plan(self) -> None:
        """A target can write to our rsync's stdout; without the run's random prefix that is
        nothing.
        """
        write(self.source + "/f")
        self.force(
            'case $SSH_ORIGINAL_COMMAND in rsync*) exec /usr/bin/rrsync -wo %s;; *) echo "*deleting'
            '   x" >&2; exit 1;; esac\n' % self.there
        )
        out = self.lab.offsync("plan", check=0).out
        self.assertNotIn("deleting", out)
        self.assertIn("1 added;", out)

    def test_an_entry_reported_again_and_again(self) -> None:
        """A target may ask for the same file as often as it likes: neither a plan nor our memory
        may grow with that.
        """
        write(self.source + "/f")
        for count, complaint in ((2, "f twice"), (5000, "f twice")):
            fake = self.lab.program(
                "repeating",
                self.MARKED
                + 'case "$*" in *--delete*--out-format=*) yes "$m:<f+++++++++ f" | head -%d; exit'
                ' 0;; *--ignore-existing*--out-format=*) echo "$m:<f+++++++++ f"; exit 0;;'
                ' esac\nexec %s "$@"\n' % (count, require("rsync")),
            )
            done = self.lab.offsync("plan", env={"OFFSYNC_RSYNC": fake}, check=1, timeout=60)
            self.assertIn(complaint, done.out)

    def test_progress_that_is_no_number(self) -> None:
        """A target can write to our rsync's stdout while it sends; that must not stop the other
        targets.
        """
        write(self.source + "/f")
        fake = self.lab.program(
            "boasting",
            '#!/bin/sh\n%s "$@" || exit\ncase "$*" in *--delay-updates*)'
            ' printf " %%05000d   5%%%%    1.00kB/s\\n" 0 | tr 0 1;; esac\n' % require("rsync"),
        )
        self.lab.offsync("apply", env={"OFFSYNC_RSYNC": fake}, check=0)
        self.assertEqual(snapshot(self.there), snapshot(self.source))

    def test_a_pass_that_breaks_off_after_its_first_item(self) -> None:
        """What it had wanted hashed is waited for by nobody for ever."""
        write(self.source + "/f")
        fake = self.lab.program(
            "breaking",
            self.MARKED
            + 'case "$*" in *--delete*--out-format=*) printf "%%s:<f+++++++++ f\\n%%s:garbage\\n"'
            ' "$m" "$m"; exit 0;; esac\nexec %s "$@"\n' % require("rsync"),
        )
        done = self.lab.offsync("plan", env={"OFFSYNC_RSYNC": fake}, check=1, timeout=60)
        self.assertIn("no itemized line", done.out)


class Deletions(WrappedRsyncCase):
    """In a pass that deletes nothing can be sent; in one that sends nothing may be deleted."""

    def test_what_is_excluded_cannot_be_asked_for(self) -> None:
        """It reports an excluded file as only there; asked to delete that, it asks for its
        content.
        """
        write(self.source + "/.git/config", "a password")
        write(self.source + "/f", "x")
        write(self.there + "/f", "x")
        self.wrap_target_rrsync(
            'case "$SSH_ORIGINAL_COMMAND" in *--existing*) export SSH_ORIGINAL_COMMAND="$(echo'
            ' "$SSH_ORIGINAL_COMMAND" | sed "s/--existing//; s/--ignore-existing//")";; esac; real'
        )
        fake = self.lab.program(
            "lying",  # and it tells what it did when the pass is over, too late to be stopped
            Hostile.MARKED
            + 'case "$*" in *" -rlpt"*--delete*) %s "$@" || exit; echo "$m:*deleting   .git/";'
            ' echo "$m:*deleting   .git/config"; exit;; *--existing*) said=$(%s "$@"); s=$?;'
            ' echo "$said"; exit $s;; esac\nexec %s "$@"\n' % ((require("rsync"),) * 3),
        )
        done = self.lab.offsync("apply --delete", env={"OFFSYNC_RSYNC": fake}, check=1)
        self.assertEqual([p for p in snapshot(self.there) if b"config" in p], [])
        self.assertNotIn("ok:", done.out)
        self.assertFalse(self.lab.records()[-1]["files_deleted"])

    def test_a_rule_of_the_config_permits_no_deletion(self) -> None:
        self.lab.configure(exclude=["+ *.conf", ".git/"])
        write(self.source + "/f", "x")
        write(self.there + "/f", "x")
        write(self.there + "/planned", "x")
        self.wrap_target_rrsync(  # what appears in the last moment is not in any plan
            'case "$SSH_ORIGINAL_COMMAND" in *--existing*) echo mine > late.conf;; esac; real'
        )
        self.lab.offsync("apply --delete", check=1)
        self.assertEqual(read(self.there + "/late.conf"), "mine\n")
        self.assertFalse(os.path.exists(self.there + "/planned"))

    def test_deletions_in_a_pass_that_sends(self) -> None:
        """One is enough; without end they cost no memory."""
        write(self.source + "/f", "new")
        line = "$(printf %32s) rw-r--r-- 0 *deleting   "
        for how in ('echo "$m:%sx"' % line, 'yes "$m:%sx"' % line):
            with self.subTest(how=how[:4]):
                fake = self.lab.program(
                    "deleting",
                    Hostile.MARKED
                    + 'case "$*" in *--delay-updates*) %s; sleep 60;; esac\nexec %s "$@"\n'
                    % (how, require("rsync")),
                )
                done = self.lab.offsync("apply", env={"OFFSYNC_RSYNC": fake}, check=1, timeout=50)
                self.assertIn("the target's rsync reported what was not asked for", done.err)
                self.assertIn("a deletion", done.err)
                self.assertNotIn("the source changed", done.err)

    def test_a_deletion_in_a_pass_over_names(self) -> None:
        write(self.source + "/f", "new")
        write(self.there + "/f", "old")
        write(self.source + "/g", "g")
        fake = self.lab.program(
            "deleting",
            Hostile.MARKED
            + 'case "$*" in *--ignore-existing*--files-from*) echo "$m:*deleting   g";; esac\n'
            'exec %s "$@"\n' % require("rsync"),
        )
        done = self.lab.offsync("apply", env={"OFFSYNC_RSYNC": fake}, check=1)
        self.assertIn("the target's rsync reported what was not asked for: a deletion", done.err)

    def test_the_same_report_without_end(self) -> None:
        write(self.source + "/f", "x")
        write(self.there + "/gone", "x")
        line = "$(printf %32s) rw-r--r-- 0 .d          ./"
        for passes, report in (("--include-from", "*deleting   gone"), ("--delay-updates", line)):
            with self.subTest(passes=passes):
                write(self.source + "/f", passes)
                fake = self.lab.program(
                    "repeating",
                    Hostile.MARKED
                    + 'case "$*" in *%s*) yes "$m:%s"; exit 0;; esac\nexec %s "$@"\n'
                    % (passes, report, require("rsync")),
                )
                env = {"OFFSYNC_RSYNC": fake}
                done = self.lab.offsync("apply --delete", env=env, check=1, timeout=60)
                self.assertIn("the target's rsync reported what was not asked for", done.err)

    def test_an_unplanned_deletion_in_the_pass_that_deletes(self) -> None:
        write(self.source + "/f", "x")
        write(self.there + "/gone", "x")
        fake = self.lab.program(
            "deleting",
            Hostile.MARKED
            + 'case "$*" in *--include-from*) echo "$m:*deleting   other";; esac\nexec %s "$@"\n'
            % require("rsync"),
        )
        done = self.lab.offsync("apply --delete", env={"OFFSYNC_RSYNC": fake}, check=1)
        self.assertIn("the target's rsync reported what was not asked for", done.err)
        self.assertIn("other", done.err)


if __name__ == "__main__":
    unittest.main()
