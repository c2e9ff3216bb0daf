"""The pure parts: what rsync prints, names, keys, versions, and what a program may print."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import unittest
from unittest import mock

from lab import offsync

WEB1 = offsync.Target("deploy@web1", "/srv/x")
KEY = offsync.PublicKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIKtest", "me@here")
LINE = (
    "command=\"/bin/sh -c 'case $SSH_ORIGINAL_COMMAND in *--compare-dest*|*--copy-dest*"
    "|*--link-dest*) echo offsync: basis directories are refused >&2; exit 1;; esac; set -f; case"
    " $(printf %s $SSH_ORIGINAL_COMMAND | LC_ALL=C tr -d [:print:] || echo x) in ?*) echo offsync:"
    " characters that are not ASCII are refused >&2; exit 1;; esac; for w in $SSH_ORIGINAL_COMMAND;"
    " do case $w in --fuzzy*|--backup-dir*) ;; --*) continue;; -*y*) ;; *) continue;; esac; echo"
    " offsync: fuzzy and backup directories are refused >&2; exit 1; done; exec /usr/bin/rrsync"
    " -wo /srv/app-data'\",no-port-forwarding,no-agent-forwarding,no-X11-forwarding,no-pty,restrict"
    " ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKtest me@here"
)


class Sources(unittest.TestCase):
    def tree(self) -> str:
        base = tempfile.mkdtemp(prefix="offsync-text-")
        self.addCleanup(shutil.rmtree, base)
        for name in ("a", "b"):
            with open(base + "/" + name, "w") as stream:
                stream.write(name)
        return base

    def test_what_vanishes_while_it_is_scanned_is_no_offence(self) -> None:
        tree = self.tree()
        os.makedirs(tree + "/d/below")
        os.symlink("../a", tree + "/d/link")
        entered = os.scandir

        def scandir(path):
            """Remove d before it is entered, or what is in it when it has been listed."""
            ours = isinstance(path, bytes) and path.endswith(b"/d")
            if ours and whole:
                os.rmdir(path)
            entries = entered(path)
            if ours:
                listed = list(entries)
                shutil.rmtree(path)
                return contextlib.nullcontext(listed)
            return entries

        with mock.patch.object(os, "scandir", scandir):
            whole = False
            self.assertEqual(offsync.scan(offsync.Source(tree)), {})
            os.mkdir(tree + "/d")
            whole = True
            self.assertEqual(offsync.scan(offsync.Source(tree)), {})

    def test_what_another_waits_for_is_described_too(self) -> None:
        """One plan waits for a large file; a pass of another target fails, and nobody hands over
        what it wanted.
        """
        source = offsync.Source(self.tree())
        started, go_on = threading.Event(), threading.Event()
        described = offsync.describe_entry

        def slowly(root: bytes, path: bytes, with_md5: bool):
            if path == b"a":
                started.set()
                go_on.wait(30)
            return described(root, path, with_md5)

        with mock.patch.object(offsync, "describe_entry", slowly):
            source.request(b"a")
            waiting = threading.Thread(target=source.wait, daemon=True)
            waiting.start()
            self.assertTrue(started.wait(30))
            source.request(b"b")
            go_on.set()
            waiting.join(30)
            source.wait()
        self.assertFalse(waiting.is_alive())
        self.assertEqual(source.entries[b"b"].sha256, hashlib.sha256(b"b").digest())

    def test_a_symlink_that_was_not_there_when_it_was_scanned(self) -> None:
        for path, link, inside in (
            (b"l", b"a", True),
            (b"d/l", b"../a", True),
            (b"l", b"../a", False),
            (b"l", b"/etc", False),
            (b"d/l", b"../../x", False),
            (b"l", b"..", False),
            (b"l", b"d/../..", False),
        ):
            with self.subTest(link=link):
                self.assertEqual(offsync.escapes_source(path, link), not inside)
        root = self.tree()
        os.symlink("/etc", root + "/evil")
        with self.assertRaisesRegex(OSError, "leaves the source"):
            offsync.describe_entry(os.fsencode(root), b"evil")

    def test_no_thread_at_all_is_a_sentence(self) -> None:
        with (
            mock.patch.object(
                threading.Thread, "start", side_effect=RuntimeError("can't start new thread")
            ),
            self.assertRaisesRegex(offsync.OffsyncError, "cannot start a thread"),
        ):
            list(offsync.ThreadPool(2).imap_unordered(str, [1, 2]))

    def test_every_result_comes_once(self) -> None:
        found = offsync.ThreadPool(3).imap_unordered(lambda number: number * 2, range(50))
        self.assertEqual(dict(found), {number: number * 2 for number in range(50)})

    def test_what_is_queued_is_dropped_and_what_was_begun_has_ended(self) -> None:
        threads, begun, ended = offsync.ThreadPool(2), [], []

        def work(number: int) -> None:
            begun.append(number)
            hashlib.sha256(bytes(1 << 20))  # it takes a moment
            if number:
                raise ValueError(number)
            ended.append(number)

        with self.assertRaises(ValueError):
            list(threads.imap_unordered(work, range(1000)))
        threads.close()
        count = len(begun)
        self.assertLess(count, 1000)
        self.assertEqual((len(begun), ended), (count, [0]))


class Reports(unittest.TestCase):
    """What rsync reports of what it sent ("%C %B %b %i %n//%L"), as 3.1.2 to 3.5.0 print it."""

    MD5 = "764efa883dda1e11db47671c4a3bbd9e"

    def sent(self, *lines: str):
        entry = offsync.Entry
        entries = {
            b"f": entry("file", 0o644, 3, b"s" * 32, bytes.fromhex(self.MD5)),
            b"d": entry("directory", 0o755, 0),
            b"l": entry("symlink", 0o777, 1, link=b"b -> c"),
            b"l -> b": entry("symlink", 0o777, 1, link=b"c"),
            b"m": entry("file", 0o4600, 3, b"s" * 32, b"x" * 16),
        }
        reasons = {b"f": ("content",), b"m": ("mode",)}
        report = offsync.TransferReport(
            WEB1,
            [
                offsync.Change(path, "modified", path == b"d", reasons.get(path, ()), entry)
                for path, entry in entries.items()
            ],
        )
        for line in lines:
            report.take(line.encode())
        return report

    def test_as_planned(self) -> None:
        report = self.sent(
            self.MD5 + " rw-r--r-- 46 <fc........ f//",
            " " * 32 + " rwxr-xr-x 0 cd+++++++++ d///",
            " " * 32 + " rwxrwxrwx 0 cL+++++++++ l// -> b -> c",
            " " * 32 + " rwxrwxrwx 0 cL+++++++++ l -> b// -> c",
            " " * 32 + " rwS------ 0 .f...p..... m//",
            " " * 32 + " rwxr-xr-x 0 .d          above///",
        )
        self.assertEqual(
            (report.confirmed, report.mismatched, report.bytes),
            ({b"f", b"d", b"l", b"l -> b", b"m"}, set(), 46),
        )

    def test_anything_else(self) -> None:
        for line, wrong in (
            ("0" * 32 + " rw-r--r-- 46 <fc........ f//", b"f"),
            (self.MD5 + " rwxr--r-- 46 <fc........ f//", b"f"),
            (" " * 32 + " rw-r--r-- 0 .f          f//", b"f"),
            (" " * 32 + " rwx------ 0 cd+++++++++ d///", b"d"),
            (" " * 32 + " rwxr-xr-x 0 cd+++++++++ f///", b"f"),
            (self.MD5 + " rwxr-xr-x 0 <f+++++++++ d//", b"d"),
            (" " * 32 + " rwxrwxrwx 0 cL+++++++++ l// -> c", b"l"),
            (" " * 32 + " rwxrwxrwx 0 cL+++++++++ f// -> c", b"f"),
            (" " * 32 + " rw------- 0 .f...p..... m//", b"m"),
            (self.MD5 + " rw-r--r-- 46 <f+++++++++ other//", b"other"),
            (" " * 32 + " rwx------ 0 .d...p..... above///", b"above"),
        ):
            with self.subTest(line=line):
                report = self.sent(line)
                self.assertEqual((report.confirmed, report.mismatched), (set(), {wrong}))
        with self.assertRaisesRegex(offsync.TargetError, "a deletion"):
            self.sent(" " * 32 + " rw-r--r-- 0 *deleting   f//")
        for line in ("", "x", "sent 5 bytes", " " * 32 + " rwx x cd+++++++++ d///"):
            with self.subTest(line=line), self.assertRaises(ValueError):
                self.sent(line)


class Itemized(unittest.TestCase):
    # Captured from rsync 3.5.0, 3.2.7 and 3.1.3 ("%i %n").
    GOLDEN = {
        b"<f+++++++++ sent mail": (b"sent mail", "added", False, (), None),
        b"cd+++++++++ d/": (b"d", "added", True, (), None),
        b"cL+++++++++ l": (b"l", "added", False, (), None),
        b"*deleting   gone": (b"gone", "missing", False, (), None),
        b"*deleting   d/x/": (b"d/x", "missing", True, (), None),
        b"<fc........ same size and time": (
            b"same size and time",
            "modified",
            False,
            ("content",),
            None,
        ),
        b"<fcst...... a": (b"a", "modified", False, ("content",), None),
        b".f...p..... m": (b"m", "modified", False, ("mode",), None),
        b".f..tp..... m": (b"m", "modified", False, ("mode",), None),
        b".d...p..... d/": (b"d", "modified", True, ("mode",), None),
        b".d..tp..... d/": (b"d", "modified", True, ("mode",), None),
        b"cLc.t...... l": (b"l", "modified", False, ("link",), None),
        b"cLcs....... l": (b"l", "modified", False, ("link",), None),
        b"<f+++++++++ new\\#012line": (b"new\nline", "added", False, (), None),
        b"<f+++++++++ a\\#134#012b": (b"a\\#012b", "added", False, (), None),
        b"<f+++++++++  lead": (b" lead", "added", False, (), None),
        b"<f+++++++++ \xff\x85\t": (b"\xff\x85\t", "added", False, (), None),
    }

    def test_golden_lines(self) -> None:
        for line, expected in self.GOLDEN.items():
            with self.subTest(line=line):
                self.assertEqual(tuple(offsync.parse_itemized(line)), expected)
        self.assertEqual(offsync.parse_itemized(b"<fc.tp..... a").reasons, ("content", "mode"))

    def test_times_alone_and_the_root_are_no_difference(self) -> None:
        for line in (
            b".f..t...... a",
            b".d..t...... d/",
            b".L..t...... l",
            b".d...p..... ./",
            b"cd+++++++++ ./",
        ):
            self.assertIsNone(offsync.parse_itemized(line))

    def test_anything_else_is_refused(self) -> None:
        for line in (
            b"",
            b"sent 5 bytes",
            b"<f+++++++++",
            b"<f+++++++++ ",
            b"<f+++++++++ ../x",
            b"*deleting   a/../../x",
            b"<f+++++++++ /etc/passwd",
            b"xf+++++++++ a",
            b"<x+++++++++ a",
            b"cS+++++++++ sock",
        ):
            with self.subTest(line=line), self.assertRaises(ValueError):
                offsync.parse_itemized(line)


class AuthorizedKeys(unittest.TestCase):
    def test_the_line_is_the_documented_one(self) -> None:
        command = offsync.format_forced_command("/usr/bin/rrsync", "/srv/app-data")
        self.assertEqual(offsync.format_authorized_key(command, KEY), LINE)
        self.assertTrue(
            offsync.format_authorized_key(command, KEY, "10.0.0.*").startswith(
                'from="10.0.0.*",command="'
            )
        )

    def test_our_blob_as_the_comment_of_another_key(self) -> None:
        other = LINE.replace(KEY.blob, "AAAAother").replace("me@here", KEY.blob).encode() + b"\n"
        self.assertEqual(offsync.edit_authorized_keys(other, KEY, None), (other, ""))
        self.assertEqual(
            offsync.edit_authorized_keys(other, KEY, LINE), (other + LINE.encode() + b"\n", "")
        )

    def test_other_lines_stay_byte_for_byte(self) -> None:
        other = b"# \xff comment\r\n\n  ssh-rsa AAAAB3 someone\nssh-ed25519 AAAAother x"
        added = offsync.edit_authorized_keys(other, KEY, LINE)[0]
        self.assertEqual(added, other + b"\n" + LINE.encode() + b"\n")
        moved = LINE.replace("/srv/app-data", "/srv/else").replace("me@here", "new comment")
        between = added + b"# after\n"
        replaced = offsync.edit_authorized_keys(between, KEY, moved)[0]
        self.assertEqual(replaced, other + b"\n" + moved.encode() + b"\n# after\n")
        self.assertEqual(
            offsync.edit_authorized_keys(replaced, KEY, None)[0], other + b"\n# after\n"
        )
        self.assertEqual(offsync.edit_authorized_keys(other, KEY, None)[0], other)

    def test_two_lines_of_ours_become_one(self) -> None:
        twice = (LINE + "\n" + 'from="10.0.0.1",' + LINE + "\n").encode()
        self.assertEqual(offsync.edit_authorized_keys(twice, KEY, LINE)[0], LINE.encode() + b"\n")

    def test_a_foreign_line_with_the_key_is_named(self) -> None:
        for foreign in (
            "ssh-ed25519 %s x",
            "ssh-ed25519 %s\0x",
            'command="/bin/sh" ssh-ed25519 %s',
            "restrict ssh-ed25519 %s me",
            'command="/usr/bin/rrsync -wo /x" ssh-ed25519 %s',
            'command="x -wo /y",pty,%s' % LINE.split(",", 1)[1] + " %s",
        ):
            with self.subTest(foreign=foreign):
                text = ("# one\n" + foreign.replace("%s", KEY.blob) + "\n" + LINE + "\n").encode()
                with self.assertRaises(ValueError) as caught:
                    offsync.edit_authorized_keys(text, KEY, LINE)[0]
                self.assertEqual(caught.exception.args, (2,))

    def test_a_commented_line_is_a_comment(self) -> None:
        text = ("#ssh-ed25519 %s x\n" % KEY.blob).encode()
        self.assertEqual(
            offsync.edit_authorized_keys(text, KEY, LINE)[0], text + LINE.encode() + b"\n"
        )


class Names(unittest.TestCase):
    def test_nothing_that_is_shown_can_write_to_the_terminal(self) -> None:
        for raw, shown in (
            (b"plain", "plain"),
            (b"sent mail", "sent mail"),
            ("é".encode(), "é"),
            (b"new\nline", '"new\\nline"'),
            (b"\x1b[31m", '"\\033[31m"'),
            (b"\xff", '"\\377"'),
            (b'a"b\\', '"a\\"b\\\\"'),
            (b" lead", '" lead"'),
            ("\u202e".encode(), '"\\342\\200\\256"'),
            ("\x85".encode(), '"\\302\\205"'),
        ):
            with self.subTest(raw=raw):
                self.assertEqual(offsync.quote_name(raw), shown)

    def test_answers_are_shortened_and_made_harmless(self) -> None:
        quoted = offsync.quote_output(b"a\x1b]0;title\x07\r\nb\xff\n\n" + b"x" * 5000)
        self.assertTrue(quoted.isprintable())
        self.assertLessEqual(len(quoted), 300)
        self.assertEqual(offsync.quote_output(b"one\ntwo\n"), "one | two")

    def test_include_rules_escape_wildcards_only_where_there_are_any(self) -> None:
        for path, rule in (
            (b"a\\b", b"/a\\b"),
            (b"a*b\\c", b"/a\\*b\\\\c"),
            (b"[x]?", b"/\\[x]\\?"),
            (b"+ x", b"/+ x"),
        ):
            self.assertEqual(offsync.exact_filter_pattern(path), rule)

    def test_words_for_rsync(self) -> None:
        self.assertEqual(offsync.quote_rsh_word("ControlPath=/tmp/x"), "ControlPath=/tmp/x")
        self.assertEqual(offsync.quote_rsh_word("a 'b\""), "'a ''b\"'")

    def test_manifest_names_are_escaped_as_coreutils_does(self) -> None:
        for path in (b"plain", b"new\nline", b"back\\slash", b"cr\rx", b"\\n", b" x", b"\xff"):
            line = offsync.format_manifest_line(path, "0" * 64)
            self.assertEqual(line.count(b"\n"), 1)
            self.assertEqual(offsync.parse_manifest([line]), {path: "0" * 64})
        self.assertEqual(
            offsync.format_manifest_line(b"a\nb", "0" * 64), b"\\" + b"0" * 64 + b"  a\\nb\n"
        )
        with self.assertRaises(ValueError) as caught:
            offsync.parse_manifest([b"0" * 64 + b"  ok\n", b"nonsense\n"])
        self.assertEqual(caught.exception.args, (2,))
        crlf = b"0" * 64 + b" *bin\r\n" + b"a" * 64 + b"  ./text\r\n"
        self.assertEqual(
            offsync.parse_manifest(crlf.splitlines(True)), {b"bin": "0" * 64, b"text": "a" * 64}
        )
        with self.assertRaises(ValueError) as caught:
            offsync.parse_manifest([b"0" * 64 + b"  one\n", b"0" * 64 + b"  two\0"])
        self.assertEqual(caught.exception.args, (2,))
        with self.assertRaises(ValueError) as caught:  # one of the two cannot hold
            offsync.parse_manifest([b"0" * 64 + b"  one\n", b"a" * 64 + b"  one\n"])
        self.assertEqual(caught.exception.args, (2,))


class Limits(unittest.TestCase):
    def test_what_a_program_writes_just_before_it_ends_is_read(self) -> None:
        """It writes and ends between the question whether there is output and the one whether it
        has ended.
        """
        process = subprocess.Popen(
            ["sh", "-c", "read go; echo last; echo words >&2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        poll = process.poll

        def poll_late():
            with contextlib.suppress(ValueError):  # closed: it was told already
                process.stdin.close()
            process.wait()
            return poll()

        process.poll = poll_late  # type: ignore[method-assign]
        lines: list = []
        output = offsync.Output(lines.append)
        self.assertFalse(output.read(process, 30.0, 30.0))
        self.assertEqual((lines, output.stderr), ([b"last"], b"words\n"))
        process.stdout.close()
        process.stderr.close()

    def test_neither_a_line_nor_an_answer_is_read_without_end(self) -> None:
        for output, chunk in (
            (offsync.Output(lambda line: None, 1 << 30), b"x" * (offsync.MAX_LINE + 1)),
            (offsync.Output(lambda line: None), b"x\n" * (offsync.OUTPUT_LIMIT // 150)),
            (offsync.Output(None), b"x" * (offsync.OUTPUT_LIMIT + 1_000_000)),
        ):
            with self.assertRaisesRegex(offsync.EndlessOutput, "printed more than offsync reads"):
                output.feed(chunk)
        with self.assertRaisesRegex(offsync.EndlessOutput, "printed more than offsync reads"):
            offsync.Output(None).feed_stderr(b"x" * (offsync.OUTPUT_LIMIT + 1_000_000))
        # A pass that sends for days prints a line of progress a second: its room grows with time.
        days = offsync.Output(lambda line: None, 1000)
        days.started -= 10 * 86400
        days.feed(b"\r  1,000,000  10%  250.00kB/s    1:00:00".ljust(75) * 20_000)
        lines: list = []
        output = offsync.Output(lines.append)
        for _ in range(3):
            output.feed((b"x" * 1000 + b"\n") * 100)
        self.assertEqual(len(lines), 300)

    def test_a_file_of_stderr_is_bounded_too(self) -> None:
        """That of an ssh which stays in the background: a host may repeat its banner."""
        with (
            tempfile.TemporaryFile() as stream,
            self.assertRaisesRegex(offsync.EndlessOutput, "printed more than offsync reads"),
        ):
            offsync.run_program(["sh", "-c", "yes >&2; true"], stderr=stream, limit=30)

    def test_a_program_that_falls_silent_is_ended(self) -> None:
        """Also where its own time limit does not count, since it blocks in open()."""
        lines: list = []
        words = "echo one; sleep 0.2; echo two; exec sleep 60"
        done = offsync.run_program(["sh", "-c", words], on_line=lines.append, limit=30, silence=1)
        self.assertEqual((done.status, lines), (None, [b"one", b"two"]))


class Versions(unittest.TestCase):
    def test_every_way_of_printing_a_version(self) -> None:
        for text, version in (
            (b"rsync  version 3.2.7  protocol version 31", (3, 2, 7)),
            (b"rsync  version v3.2.3  protocol version 31", (3, 2, 3)),
            (b"rsync  version 3.5.0-g471e17dc  protocol version 32", (3, 5, 0)),
            (b"rsync  version 3.1.3  protocol version 31", (3, 1, 3)),
            (b"openrsync: protocol version 29\nrsync version 2.6.9 compatible", None),
            (b"", None),
        ):
            self.assertEqual(offsync.parse_rsync_version(text), version)


class Logins(unittest.TestCase):
    def test_accepted_and_refused(self) -> None:
        for login, parts in (
            ("deploy@node02", ("deploy", "node02")),
            ("a.b@[2001:db8::1]", ("a.b", "2001:db8::1")),
            ("u@d@host", ("u@d", "host")),
            ("_x@10.0.0.1", ("_x", "10.0.0.1")),
            ("u@[fe80::1%eth0]", ("u", "fe80::1%eth0")),
        ):
            target = offsync.Target(offsync.validate_login(login), "/x")
            self.assertEqual((target.user, target.host), parts)
        for login in (
            "",
            "node",
            "@host",
            "u@",
            "-u@h",
            "u@-h",
            "u@h:x",
            "u@h/x",
            "u @h",
            "u@h\n",
            "u@::1",
            "u@h;id",
            "u@$(id)",
            "\x1b@h",
            "u@é",
        ):
            with self.subTest(login=login), self.assertRaises(offsync.UsageError):
                offsync.validate_login(login)

    def test_patterns(self) -> None:
        targets = [offsync.Target(login, "/x") for login in ("b@web2", "a@web1", "c@db1")]

        def pick(*patterns: str, excepted: tuple = ()) -> list:
            return [t.login for t in offsync.select_targets(targets, patterns, excepted)]

        self.assertEqual(pick(), ["a@web1", "b@web2", "c@db1"])
        self.assertEqual(pick("web*"), ["a@web1", "b@web2"])
        self.assertEqual(pick("db1", "a@*"), ["a@web1", "c@db1"])
        self.assertEqual(pick(excepted=("web2",)), ["a@web1", "c@db1"])
        self.assertEqual(pick("web*", excepted=("b@*", "c@db1")), ["a@web1"])
        for words in (("web*",), ("none",)):
            with self.assertRaises(offsync.UsageError):
                pick("web*", excepted=words)
        with self.assertRaises(offsync.UsageError) as caught:
            pick("web1", "nope*")
        self.assertIn("known: a@web1, b@web2, c@db1", caught.exception.hints)


class Memory(unittest.TestCase):
    def test_a_file_is_read_in_pieces_and_a_large_one_is_refused(self) -> None:
        base = tempfile.mkdtemp(prefix="offsync-text-")
        self.addCleanup(shutil.rmtree, base)
        with open(base + "/f", "wb") as stream:
            stream.truncate(offsync.FILE_LIMIT)
        with self.assertRaisesRegex(offsync.UsageError, "larger than"):
            offsync.read_file(base + "/f", "config", "")
        with open(base + "/f", "wb") as stream:
            stream.write(b"x" * 200_000)
        self.assertEqual(len(offsync.read_file(base + "/f", "config", "")), 200_000)

    def test_a_manifest_takes_memory_by_its_files(self) -> None:
        import tracemalloc

        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        line = b"0" * 64 + b"  f\n"
        self.assertEqual(len(offsync.parse_manifest(line for _ in range(300_000))), 1)
        self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 20)


if __name__ == "__main__":
    unittest.main()
