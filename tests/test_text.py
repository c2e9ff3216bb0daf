"""The pure parts: the YAML subset, the itemize parser, the authorized_keys editor, quoting,
versions, diagnosis.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import unittest
from unittest import mock

from lab import OFFSYNC, offsync, read

# What is to be audited, at most: expression nodes in all and of the trust core, statements,
# expression nodes a statement. No layout changes these.
EXPRESSIONS, CORE, STATEMENTS, DENSITY = 23_900, 9_800, 3_680, 6.5
CONFIG = """version: 1
source: "/srv/app-data"
delete: false
overwrite: true
verify: "hash"
exclude:
  - ".git/"
targets:
  - login: "deploy@node02.example.com"
    user: "deploy"
    host: "node02.example.com"
    remote_path: "/srv/app-data"
    rrsync: "/usr/bin/rrsync"
"""
WEB1 = offsync.Target("deploy@web1", "/srv/x")
KEY = offsync.PublicKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIKtest", "me@here")
LINE = (
    "command=\"/bin/sh -c 'case $SSH_ORIGINAL_COMMAND in *--compare-dest*|*--copy-dest*"
    "|*--link-dest*) echo offsync: basis directories are refused >&2; exit 1;; esac; set -f; case"
    " $(printf %s $SSH_ORIGINAL_COMMAND | LC_ALL=C tr -d [:print:] || echo x) in ?*) echo offsync:"
    " characters that are not ASCII are refused >&2; exit 1;; esac; for w in $SSH_ORIGINAL_COMMAND;"
    " do case $w in --delay-updates|--size-only) ;; -*y*) echo offsync: fuzzy is refused >&2; exit"
    " 1;; esac; done; exec /usr/bin/rrsync -wo /srv/app-data'\",no-port-forwarding,"
    "no-agent-forwarding,no-X11-forwarding,no-pty,restrict"
    " ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKtest me@here"
)


class Config(unittest.TestCase):
    def test_the_documented_example_is_read(self) -> None:
        config = offsync.validate_config(CONFIG, "c")
        self.assertEqual(
            config,
            offsync.Config(
                "/srv/app-data",
                offsync.Deletion.REFUSE,
                True,
                "hash",
                (".git/",),
                8,
                0,
                False,
                10800,
                50,
                (
                    offsync.Target(
                        "deploy@node02.example.com", "/srv/app-data", "/usr/bin/rrsync", None, True
                    ),
                ),
            ),
        )
        self.assertEqual(
            (config.targets[0].user, config.targets[0].host), ("deploy", "node02.example.com")
        )

    def test_what_is_optional(self) -> None:
        text = CONFIG.replace(
            "delete:", "timeout: 600\nmax_delete: 0\njobs: 3\nbwlimit: 7\ncompress: true\ndelete:"
        ).replace('"hash"', '"strong"')
        text = text.replace(
            '"/usr/bin/rrsync"', '"/usr/bin/rrsync"\n    symlinks: false\n    port: 2222'
        )
        config = offsync.validate_config(text, "c")
        self.assertEqual(
            (
                config.timeout,
                config.max_delete,
                config.jobs,
                config.bwlimit,
                config.compress,
                config.verify,
            ),
            (600, 0, 3, 7, True, "strong"),
        )
        self.assertEqual((config.targets[0].symlinks, config.targets[0].port), (False, 2222))
        for wrong in ("timeout: 59", "max_delete: 101", "max_delete: -1", "timeout: x"):
            with self.subTest(wrong=wrong), self.assertRaises(offsync.UsageError):
                offsync.validate_config(CONFIG.replace("delete:", wrong + "\ndelete:"), "c")

    def test_exclude_defaults_only_when_absent(self) -> None:
        without = CONFIG.replace('exclude:\n  - ".git/"\n', "")
        self.assertEqual(offsync.validate_config(without, "c").exclude, (".git/",))
        empty = CONFIG.replace('exclude:\n  - ".git/"\n', "exclude: []\n")
        self.assertEqual(offsync.validate_config(empty, "c").exclude, ())

    def test_what_is_refused_names_the_line(self) -> None:
        cases = {
            "delete: no": 3,
            "delete: yes": 3,
            "delete: False": 3,
            "delete: 1": 3,
            "delete: 0": 3,
            "delete: kept": 3,
            "delete: Keep": 3,
            'delete: ["keep"]': 3,
            'delete: "true"': 3,
            "delete: ~": 3,
            "delete:": 3,
            "delete:  # nothing": 3,
            "delete: true true": 3,
            "delete: true#x": 3,
            "delete: !!bool true": 3,
            "delete: &a true": 3,
            "delete: |": 3,
            "delete: {}": 3,
            "delete : true": 3,
            "delete:true": 3,
            "\tdelete: true": 3,
            "delete: true\t": 3,
            "delete: true\nverify: 'quick'": 6,
            "nonsense: 1": 3,
            "delete: true\ndelete: true": 4,
            '"delete": true': 3,
            "? delete": 3,
            "- x": 3,
            "  delete: true": 3,
            "---": 3,
            "jobs: 08": 3,
            "jobs: 0": 3,
            "jobs: 1.5": 3,
            "jobs: 1e3": 3,
            "jobs: 0x10": 3,
            "jobs: -1": 3,
            "jobs: 1_0": 3,
            "compress: 1": 3,
            "bwlimit: fast": 3,
            "verify: size": 5 - 2,
            "delete: \x85": 3,
            "delete: 'x'": 3,
        }
        for line, number in cases.items():
            with self.subTest(line=line), self.assertRaises(offsync.UsageError) as caught:
                offsync.validate_config(CONFIG.replace("delete: false", line), "FILE")
            if "verify" not in line:
                self.assertRegex(str(caught.exception), r"^FILE:%d: ." % number)

    def test_missing_and_wrong_target_keys_are_refused(self) -> None:
        for old, new in (
            ('    user: "deploy"\n', ""),
            ('/srv/app-data"\n    rrsync', 'srv"\n    rrsync'),
            ('user: "deploy"', 'user: "root"'),
            ('    host: "node02.example.com"', '    host: "other"'),
            ("deploy@node02.example.com", "-oProxyCommand=x@h"),
            ("    user", "     user"),
            ('"/usr/bin/rrsync"\n', '"/usr/bin/rrsync"\n    port: 70000\n'),
            ('"/usr/bin/rrsync"\n', '"/usr/bin/rrsync"\n    port: "22"\n'),
            ('"/usr/bin/rrsync"\n', '"/usr/bin/rrsync"\n    prot: 22\n'),
            ('  - ".git/"', '  - name: ".git/"'),
            ('source: "/srv/app-data"', 'source: "srv"'),
            ("version: 1", "version: 2"),
            ("version: 1\n", ""),
        ):
            with self.subTest(new=new):
                self.assertIn(old, CONFIG)
                with self.assertRaises(offsync.UsageError):
                    offsync.validate_config(CONFIG.replace(old, new), "FILE")

    def test_excludes_that_protect_nothing(self) -> None:
        """With "delete: true", what they were to protect would be deleted."""
        for pattern in (
            "./uploads/",
            "uploads//",
            "/a/../uploads",
            "../uploads",
            "/srv/app-data/uploads/",
            "/srv/app-data",
            "uploads ",
            "uploads/ ",
            " uploads",
            "- ./uploads",
            "+ /srv/app-data/x",
            "a/./b",
            "uploads/..",
            ".",
            "/",
            "//uploads",
            "uploads\u00a0",
            "[draft",
            "notes[",
            "/[keep/",
            "x[/]y",
            "a[!/]uploads",
        ):
            with self.subTest(pattern=pattern):
                text = CONFIG.replace('".git/"', json.dumps(pattern))
                with self.assertRaisesRegex(offsync.UsageError, "^FILE:7: .*protects nothing"):
                    offsync.validate_config(text, "FILE")
        for pattern in (
            "uploads/",
            "/uploads",
            "/srv/app-data-old/",
            "/srv",
            "up loads",
            "**/x",
            "a/**/b",
            "...",
            ".*",
            "x..",
            "- cache/***",
            "uploads[ ]",
            "/.~lock",
            "\\[draft",
            "[]x]y",
            "[!a-z]*",
            "[[]x",
        ):
            with self.subTest(pattern=pattern):
                text = CONFIG.replace('".git/"', json.dumps(pattern))
                self.assertEqual(offsync.validate_config(text, "FILE").exclude, (pattern,))

    def test_excludes_that_begin_with_another_spelling_or_a_targets_path(self) -> None:
        for old, new, pattern in (
            ('"/srv/app-data"\ndelete', '"/srv//app/."\ndelete', "/srv/app/uploads/"),
            ('remote_path: "/srv/app-data"', 'remote_path: "/opt/app"', "/opt/app/uploads/"),
        ):
            text = CONFIG.replace(old, new).replace('".git/"', json.dumps(pattern))
            self.assertNotEqual(text.count(new), 0)
            with self.assertRaisesRegex(offsync.UsageError, "^FILE:7: .*protects nothing"):
                offsync.validate_config(text, "FILE")
        # A target's path of one component may be the name of an entry of the source.
        text = CONFIG.replace('remote_path: "/srv/app-data"', 'remote_path: "/data"')
        text = text.replace('".git/"', '"/data/tmp"')
        self.assertEqual(offsync.validate_config(text, "FILE").exclude, ("/data/tmp",))

    def test_quoting_styles_mean_what_yaml_means(self) -> None:
        for text, value in (
            ('"/a\\tb\\u0041\\u00e9\\"\\\\"', '/a\tbAé"\\'),
            ('"/a\\x41"', None),
            ('"/a\\ud800"', None),
            ("'/it''s \\n'", "/it's \\n"),
            ("/plain/path-1.x", "/plain/path-1.x"),
            ('"/a" # "comment"', "/a"),
            ("/a#b", None),
            ("'/a'b", None),
            ('"/a\\qb"', None),
        ):
            with self.subTest(text=text):
                if value is None:
                    with self.assertRaises(ValueError):
                        offsync.parse_yaml("source: " + text)
                else:
                    self.assertEqual(offsync.parse_yaml("source: " + text)["source"].value, value)

    def test_comments_outside_the_block_survive_edits(self) -> None:
        text = (
            "# top\ntargets:   # all of them\n    # first\n    - host: web0   # h\n      user: u\n "
            "     login: u@web0 # l\n      remote_path: /x # r\n    # last\n\n# between\nversion:"
            " 1\nsource: '/s' # src\n# end\n"
        )
        first = offsync.validate_config(text, "c").targets[0]
        added = offsync.replace_block(text, "targets", offsync.format_targets([first, WEB1]))
        self.assertEqual(list(offsync.validate_config(added, "c").targets), [first, WEB1])
        self.assertTrue(added.startswith("# top\ntargets:\n  - login"), added)
        self.assertTrue(
            added.endswith("    # last\n\n# between\nversion: 1\nsource: '/s' # src\n# end\n"),
            added,
        )
        gone = offsync.replace_block(added, "targets", offsync.format_targets([]))
        self.assertEqual(offsync.validate_config(gone, "c").targets, ())
        self.assertEqual(gone.count("targets: []\n"), 1)
        moved = offsync.replace_block(text, "source", ["source: " + offsync.format_yaml("/t")])
        self.assertEqual(moved, text.replace("'/s' # src", '"/t"'))

    def test_target_is_added_to_every_shape_of_list(self) -> None:
        odd = offsync.Target("u@[2001:db8::1]", "/y z", "/opt/rrsync", 2222, False)
        for shape in ("targets: []\n", "targets: [ ]  # none\n"):
            text = offsync.replace_block(
                "version: 1\nsource: /s\n" + shape, "targets", offsync.format_targets([WEB1, odd])
            )
            self.assertEqual(offsync.validate_config(text, "c").targets, (WEB1, odd))

    def test_what_the_writer_writes_is_read_back(self) -> None:
        for path in ("/a b", '/q"q', "/back\\slash", "/é\u202e\u00a0", "/#x: y", "/'"):
            config = offsync.validate_config(offsync.format_new_config(path), "c")
            self.assertEqual(config.source, path)


class Sources(unittest.TestCase):
    def tree(self) -> str:
        base = tempfile.mkdtemp(prefix="offsync-text-")
        self.addCleanup(shutil.rmtree, base)
        for name in ("a", "b"):
            with open(base + "/" + name, "w") as stream:
                stream.write(name)
        return base

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


class Diagnosis(unittest.TestCase):
    """Answers as the real programs gave them: OpenSSH 9.2, rsync and rrsync 3.5.0, and older ones
    where another is named.
    """

    ANSWERS = (
        (
            "host-key-changed",
            (
                "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nHost key verification"
                " failed."
            ),
        ),
        (
            "host-key-unknown",
            (
                "No ED25519 host key is known for [127.0.0.1]:2201 and you have requested strict"
                " checking.\nHost key verification failed."
            ),
        ),
        (
            "unresolved-host",
            "ssh: Could not resolve hostname no-such-host.invalid: Name or service not known",
        ),
        ("connection-refused", "ssh: connect to host 127.0.0.1 port 58015: Connection refused"),
        ("timeout", "ssh: connect to host 10.9.9.9 port 22: No route to host"),
        ("timeout", "ssh: connect to host 10.9.9.9 port 22: Network is unreachable"),
        ("timeout", "ssh: connect to host 10.9.9.9 port 22: Connection timed out"),
        (
            "timeout",
            (
                "Connection timed out during banner exchange\nConnection to 127.0.0.2 port 2201"
                " timed out"
            ),
        ),
        ("timeout", "Timeout, server 127.0.0.1 not responding."),
        (
            "ssh-client-error",
            (
                "/root/.ssh/config: line 1: Bad configuration option: nonsense\n/root/.ssh/config:"
                " terminating, 1 bad configuration options"
            ),
        ),
        (
            "ssh-client-error",
            (
                'Load key "/x/.offsync/id_ed25519": error in libcrypto\nroot@127.0.0.1: Permission'
                " denied (publickey)."
            ),
        ),
        ("key-refused", "root@127.0.0.1: Permission denied (publickey,password)."),
        (
            "key-refused",
            "Received disconnect from 127.0.0.1 port 22:2: Too many authentication failures",
        ),
        (
            "busy-sshd",
            (
                "kex_exchange_identification: Connection closed by remote host\nConnection closed"
                " by 127.0.0.1 port 2201"
            ),
        ),
        ("busy-sshd", "kex_exchange_identification: read: Connection reset by peer"),
        (
            "session-refused",
            "mux_client_request_session: session request failed: Session open refused by peer",
        ),
        (
            "nologin",
            (
                "This account is currently not available.\nrsync: connection unexpectedly closed (0"
                " bytes received so far) [sender]"
            ),
        ),
        (
            "locked",
            (
                "/usr/bin/rrsync error: Another instance of rrsync is already accessing this"
                " directory.\nrsync: connection unexpectedly closed"
            ),
        ),
        ("no-rrsync", "bash: line 1: /nowhere/rrsync: No such file or directory"),
        ("no-rrsync", "sh: 1: /nowhere/rrsync: not found"),
        ("no-rrsync", "bash: line 1: /nowhere/rrsync: Permission denied"),
        (
            "no-rrsync",
            (
                "/usr/bin/python3: can't open file '/usr/share/doc/rsync/support/rrsync': [Errno 2]"
                " No such file or directory"
            ),
        ),
        ("read-only-key", "/usr/bin/rrsync error: sending to read-only server is not allowed"),
        ("read-only-key", "rrsync: sending to read-only server not allowed"),
        ("rrsync-rejected-option", "/usr/bin/rrsync: SSH_ORIGINAL_COMMAND='echo hi' is not rsync"),
        ("no-directory", "/usr/bin/rrsync: Restricted directory does not exist!"),
        (
            "no-directory",
            (
                "    os.chdir(args.dir)\nFileNotFoundError: [Errno 2] No such file or directory:"
                " '/srv/gone'"
            ),
        ),
        ("no-directory", "NotADirectoryError: [Errno 20] Not a directory: '/srv/file'"),
        (
            "no-rsync",
            (
                "FileNotFoundError: [Errno 2] No such file or directory: '/usr/bin/rsync'\nrsync:"
                " connection unexpectedly closed"
            ),
        ),
        ("no-rsync", "openrsync: unrecognized option"),
        (
            "rrsync-rejected-option",
            "/usr/bin/rrsync error: option --delete has been disabled on this server.",
        ),
        ("rrsync-rejected-option", "/usr/bin/rrsync: invalid rsync-command syntax or options"),
        (
            "shell-output",
            (
                "protocol version mismatch -- is your shell clean?\n(see the rsync manpage for an"
                " explanation)"
            ),
        ),
        ("space", 'rsync: [receiver] write failed on "/srv/x/big": No space left on device (28)'),
        ("space", 'rsync: [receiver] write failed on "/srv/x/big": Disk quota exceeded (122)'),
        (
            "read-only-disk",
            'rsync: [receiver] mkstemp "/srv/x/.f.7SxgQw" failed: Read-only file system (30)',
        ),
        (
            "file-error",
            "rsync error: error in file IO (code 11) at receiver.c(380) [receiver=3.5.0]",
        ),
        ("file-error", "rsync ended without a word (code 11)"),
        (
            "source-unreadable",
            'rsync: [sender] link_stat "/srv/app/gone" failed: No such file or directory (2)',
        ),
        (
            "source-unreadable",
            'rsync: [sender] send_files failed to open "/srv/app/x": Permission denied (13)',
        ),
        ("source-unreadable", 'file has vanished: "/srv/app/x"'),
        ("blocked-by-directory", "could not make way for new regular file: f"),
        (
            "permission",
            'rsync: [receiver] mkstemp "/srv/x/.f.7SxgQw" failed: Permission denied (13)',
        ),
        (
            "permission",
            'rsync: [generator] set times on "/srv/x" failed: Operation not permitted (1)',
        ),
        (
            "no-directory",
            'rsync: [receiver] mkstemp "/srv/x/d/.f.7SxgQw" failed: Not a directory (20)',
        ),
        (
            "connection-lost",
            "rsync: connection unexpectedly closed (8 bytes received so far) [sender]",
        ),
        ("connection-lost", "client_loop: send disconnect: Broken pipe"),
        (
            "algorithms",
            (
                "Unable to negotiate with 127.0.0.1 port 2201: no matching host key type found."
                " Their offer: ssh-rsa"
            ),
        ),
        (
            "algorithms",
            (
                "Unable to negotiate with 127.0.0.1 port 2201: no matching cipher found. Their"
                " offer: 3des-cbc"
            ),
        ),
        ("second-factor", "root@127.0.0.1: Permission denied (keyboard-interactive)."),
        ("second-factor", "root@127.0.0.1: Permission denied (password)."),
        (
            "key-refused",
            "root@127.0.0.1: Permission denied (publickey,password,keyboard-interactive).",
        ),
        ("ssh-client-error", "Bad owner or permissions on /root/.ssh/config"),
        (
            "busy-sshd",
            "kex_exchange_identification: read: Connection reset by peer\nNot allowed at this time",
        ),
        (
            "expired",
            (
                "Your account has expired; please contact your system administrator.\nConnection"
                " closed by 127.0.0.1 port 34699"
            ),
        ),
        (
            "closed-after-login",
            (
                "/bin/bash: line 1: /nonexistent/offsync-connection-ended: No such file or"
                " directory\nkex_exchange_identification: Connection closed by remote host"
            ),
        ),
        (
            "other-service",
            (
                "fatal: unrecognized command '/usr/bin/rrsync -wo /srv/x'\nrsync: connection"
                " unexpectedly closed (0 bytes received so far) [sender]"
            ),
        ),
        ("closed-during-login", "Connection closed by 127.0.0.1 port 2201"),
        (
            "session-refused",
            "mux_client_request_session: session request failed: Session open refused by peer",
        ),
        (
            "expired",
            (
                "Password change required but no TTY available.\nrsync: connection unexpectedly"
                " closed (0 bytes received so far) [sender]"
            ),
        ),
        ("other-service", "This service allows sftp connections only.\n"),
        (
            "other-service",
            (
                "fatal: unrecognized command 'rsync --server -e.LsfxCIvu . .'\nfatal: Interactive"
                " git shell is not enabled."
            ),
        ),
        (
            "nologin",
            "rbash: line 1: /usr/bin/rrsync: restricted: cannot specify `/' in command names",
        ),
        (
            "revoked",
            (
                "@       WARNING: REVOKED HOST KEY DETECTED!               @\nThe ED25519 host key"
                " for h host key is revoked."
            ),
        ),
        ("host-key-expired", "Certificate invalid: expired\nHost key verification failed."),
        ("no-rsync", "rsync: --timeout=10800: too large"),
        (
            "blocked-by-directory",
            "rsync: [generator] delete_file: rmdir(mnt) failed: Device or resource busy (16)",
        ),
        (
            "unreadable-below",
            'rsync: [generator] opendir "/srv/x/lost+found" failed: Permission denied (13)',
        ),
        (
            "permission",
            'rsync: [receiver] rename "/srv/x/.~tmp~/f" -> "f": Operation not permitted (1)',
        ),
        (
            "no-answer",
            (
                "rsync: connection unexpectedly closed (0 bytes received so far) [sender]\nrsync"
                " error: error in rsync protocol data stream (code 12)"
            ),
        ),
        ("ssh-client-error", "No user exists for uid 4711"),
        (
            "unsupported-name",
            'rsync: [generator] symlink "/srv/x/l" -> "f" failed: Operation not permitted (1)',
        ),
        (
            "unsupported-name",
            'rsync: [receiver] mkstemp "/srv/x/.a:b.7SxgQw" failed: Invalid argument (22)',
        ),
        ("no-staging", "Unable to create partial-dir for f -- discarding completed file."),
        (
            "no-staging",
            'rsync: [generator] opendir "/srv/x/.~tmp~" failed: Permission denied (13)',
        ),
        (
            "revoked",
            "Host key ED25519 SHA256:x revoked by file /etc/revoked\nHost key verification failed.",
        ),
        ("chroot", 'Changed root directory to "/srv"\r\n/bin/bash: No such file or directory'),
        (
            "booting",
            (
                "System is booting up. Unprivileged users are not permitted to log in yet. Please"
                " come back later. For technical details, see pam_nologin(8)."
            ),
        ),
        (
            "broken",
            (
                "rsync: error while loading shared libraries: libpopt.so.0: cannot open shared"
                " object file: No such file or directory\nrsync: connection unexpectedly closed"
                " (0 bytes received so far) [sender]"
            ),
        ),
        ("broken", "/usr/bin/env: 'python3': No such file or directory"),
        (
            "broken",
            (
                'Traceback (most recent call last):\n  File "/usr/bin/rrsync", line 7, in'
                " <module>\n    import braceexpand\nModuleNotFoundError: No module named"
                " 'braceexpand'"
            ),
        ),
        (
            "name-too-long",
            'rsync: [receiver] mkstemp "/srv/x/.nnn.7SxgQw" failed: File name too long (36)',
        ),
        (
            "file-too-large",
            (
                'rsync: [receiver] write failed on "/srv/x/big": File too large (27)\nrsync error:'
                " error in file IO (code 11) at receiver.c(657) [receiver=3.5.0]"
            ),
        ),
        (
            "disk-error",
            (
                'rsync: [receiver] write failed on "/srv/x/f": Input/output error (5)\nrsync error:'
                " error in file IO (code 11) at receiver.c(657) [receiver=3.5.0]"
            ),
        ),
        (
            "stale",
            (
                'rsync: [receiver] mkstemp "/srv/x/.f.7SxgQw" failed: Stale file handle (116)\n'
                "rsync error: error in file IO (code 11) at receiver.c(657) [receiver=3.5.0]"
            ),
        ),
        (
            "source-unreadable",
            'rsync: [sender] read errors mapping "/srv/source/f": Input/output error (5)',
        ),
        ("unresolved-host", 'Could not resolve host "nope" by any of its canonical domains'),
        ("other", "something never seen before"),
        ("other", ""),
    )

    def test_every_row_by_a_real_answer(self) -> None:
        target = offsync.Target("u@h", "/srv/a b")
        for kind, answer in self.ANSWERS:
            with self.subTest(answer=answer):
                error = offsync.diagnose(target, offsync.Result(12, b"", answer.encode()))
                self.assertEqual(error.kind.name, kind)
                self.assertTrue(str(error).startswith("u@h: "))
                self.assertNotIn("{", str(error))
                self.assertNotIn("\n", str(error))
        self.assertEqual(
            {kind for kind, _ in self.ANSWERS} - {"other"},
            {row.name for row in offsync.FAILURES if row.patterns},
        )


class FailedLogins(unittest.TestCase):
    """What ssh wrote when a login failed: OpenSSH 7.9, 9.2 and 9.9, through jump hosts, too."""

    DROPPED = "ssh_exchange_identification: Connection closed by remote host"
    ANSWERS = """
proxy-failed | ssh: connect to host 10.0.0.1 port 22: Connection refused / %(dropped)s
proxy-failed | gateway says no / kex_exchange_identification: Connection closed by remote host / \
Connection closed by UNKNOWN port 65535
proxy-failed | no profile / banner exchange: Connection to UNKNOWN port 65535: Broken pipe
timeout | Connection timed out during banner exchange / \\
Connection to UNKNOWN port 65535 timed out
busy-sshd | dlopen none failed: none: cannot open shared object file / %(dropped)s
busy-sshd | kex_exchange_identification: Connection closed by remote host / \
Connection closed by 127.0.0.1 port 22
closed-during-login | a banner / Connection closed by 127.0.0.1 port 22
expired | Your account has expired / Connection closed by 127.0.0.1 port 22
key-refused | HAS CHANGED / Host key verification failed. / u@h: Permission denied (publickey).
key-refused | REMOTE HOST IDENTIFICATION HAS CHANGEDu@h: Permission denied (publickey).
host-key-unknown | No ED25519 host key is known for h / Host key verification failed.
""" % {"dropped": DROPPED}

    def test_what_each_means(self) -> None:
        target = offsync.Target("u@h", "/srv/x")
        connection = mock.Mock(target=target)
        connection.context.state.key = "/nonexistent/id_ed25519"
        for row in self.ANSWERS.replace("\\\n", "").strip().splitlines():
            kind, said = row.split(" | ")
            result = offsync.Result(255, b"", said.replace(" / ", "\r\n").encode() + b"\r\n")
            with (
                self.subTest(said=said),
                mock.patch.object(offsync, "check_own_key"),
                mock.patch.object(offsync, "read_file", return_value=b""),
            ):
                self.assertEqual(offsync.diagnose_login(connection, result).kind.name, kind)


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
            (offsync.Output(None), b"x" * (offsync.OUTPUT_LIMIT + 1)),
        ):
            with self.assertRaisesRegex(offsync.EndlessOutput, "printed more than offsync reads"):
                output.feed(chunk)
        with self.assertRaisesRegex(offsync.EndlessOutput, "printed more than offsync reads"):
            offsync.Output(None).feed_stderr(b"x" * (offsync.OUTPUT_LIMIT + 1))
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


class Audit(unittest.TestCase):
    def test_the_trust_core_is_where_the_docstring_says(self) -> None:
        lines = read(OFFSYNC).split("\n")
        begin = next(
            number for number, line in enumerate(lines, 1) if line.startswith("# === Trust core")
        )
        end = (
            next(
                number
                for number, line in enumerate(lines, 1)
                if line.startswith("# === The trust core ends")
            )
            - 1
        )
        while not lines[end - 1]:
            end -= 1
        named = re.search(r"trust core first: lines (\d+) to (\d+)", offsync.__doc__)
        self.assertEqual((int(named[1]), int(named[2])), (begin, end))
        sections = [
            line.split(": ")[1].split(" -")[0].split(" =")[0]
            for line in lines[begin - 1 : end]
            if line.startswith(("# --- Trust core", "# === Trust core"))
        ]
        self.assertEqual(
            sections,
            [
                "running programs",
                "names",
                "failures",
                "the source",
                "the connection",
                "proofs",
                "what rsync prints",
                "the plan",
                "approval",
                "delivery",
                "record, status and lock",
            ],
        )

    def test_budgets(self) -> None:
        """So much is to be audited at most; what is new is to be paid for by what goes."""
        nodes = list(ast.walk(ast.parse(read(OFFSYNC))))
        statements = sum(isinstance(node, ast.stmt) for node in nodes)
        lines = [node.lineno for node in nodes if isinstance(node, ast.expr)]
        named = re.search(r"trust core first: lines (\d+) to (\d+)", offsync.__doc__)
        core = sum(int(named[1]) <= line <= int(named[2]) for line in lines)
        self.assertLessEqual(len(lines), EXPRESSIONS)
        self.assertLessEqual(core, CORE)
        self.assertLessEqual(statements, STATEMENTS)
        self.assertLessEqual(len(lines) / statements, DENSITY)

    def test_what_apply_reaches_outside_the_core(self) -> None:
        """Printed for the auditor: by the names that a function uses, so rather too much."""
        text = read(OFFSYNC)
        named = re.search(r"trust core first: lines (\d+) to (\d+)", offsync.__doc__)
        begin, end = int(named[1]), int(named[2])
        found: dict = {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(node)
        reached, pending = set(), ["cmd_apply"]
        while pending:
            name = pending.pop()
            if name in found and name not in reached:
                reached.add(name)
                for node in found[name]:
                    pending += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
                    pending += [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
        outside = {
            name: sum(node.end_lineno - node.lineno + 1 for node in found[name])
            for name in reached
            if not all(begin <= node.lineno <= end for node in found[name])
        }
        print(
            "apply reaches %d lines outside the core: %s"
            % (sum(outside.values()), ", ".join(sorted(outside)))
        )
        self.assertIn("validate_config", outside)
        for name in (
            "check_refusal",
            "prove_path",
            "parse_itemized",
            "approve",
            "take_lock",
            "run_program",
        ):
            self.assertIn(name, reached - set(outside))

    def test_width(self) -> None:
        self.assertEqual([line for line in read(OFFSYNC).split("\n") if len(line) > 100], [])

    def test_programs_are_started_in_one_place(self) -> None:
        text = read(OFFSYNC)
        self.assertEqual(
            len(re.findall(r"subprocess\.(?:Popen|run|call|check_output|check_call)\(", text)), 1
        )
        self.assertNotIn("shell=True", text)
        self.assertNotIn("os.system", text)
        self.assertEqual(text.count(".sleep("), 1)  # in what waits for a signal, too


class AsPeopleWriteIt(unittest.TestCase):
    """config.yaml from other editors and habits."""

    def test_what_is_accepted(self) -> None:
        expected = offsync.validate_config(CONFIG, "c")
        listed = CONFIG.replace(
            'exclude:\n  - ".git/"\n', 'exclude: [ ".git/" , "*.tmp" ]  # two\n'
        )
        for text in (CONFIG.replace("\n", "\r\n"), "---\n" + CONFIG, "---\r\n" + CONFIG):
            with self.subTest(text=text[:10]):
                self.assertEqual(offsync.validate_config(text, "c"), expected)
        config = offsync.validate_config(listed, "c")
        self.assertEqual(config.exclude, (".git/", "*.tmp"))
        for written in ('["a"]', '["a","b"]', "[]", '["\\u00e9 \\" x"]', '["a, b", "]"]'):
            text = CONFIG.replace('exclude:\n  - ".git/"\n', "exclude: %s\n" % written)
            self.assertEqual(list(offsync.validate_config(text, "c").exclude), json.loads(written))
        changed = offsync.replace_block(
            "---\r\n" + CONFIG.replace("\n", "\r\n"), "targets", offsync.format_targets([WEB1])
        )
        self.assertEqual(offsync.validate_config(changed, "c").targets, (WEB1,))
        self.assertEqual(changed.count("\n"), changed.count("\r\n"))

    def test_what_is_refused_with_a_remedy_that_is_true(self) -> None:
        for old, new, said in (
            ("delete: false", "\tdelete: false", "a tab; write blanks"),
            ("version: 1", "\ufeffversion: 1", "byte order mark"),
            ("delete: false", "delete:\u00a0false", "U+00A0 looks like a blank"),
            ("delete: false", "delete: false\n---", "only the first line may be ---"),
            ('"/srv/app-data"\ndelete', "~/site\ndelete", "write the whole path"),
            ('"/srv/app-data"\ndelete', '"~/site"\ndelete', "~ is not expanded"),
            ('  - ".git/"', "  - *.log", '"*.log"'),
            ('exclude:\n  - ".git/"', 'exclude: ["a", ]', "a comma before ]"),
            ('exclude:\n  - ".git/"', "exclude: ['a']", "double quotes"),
            ('exclude:\n  - ".git/"', "exclude: [a]", "double quotes"),
            ("delete: false", "# x\rdelete: true", "U+000D is not allowed"),
            ("delete: false", "delete: false\r\r", "U+000D is not allowed"),
        ):
            with self.subTest(new=new):
                self.assertIn(old, CONFIG)
                with self.assertRaises(offsync.UsageError) as caught:
                    offsync.validate_config(CONFIG.replace(old, new), "FILE")
                error = caught.exception
                self.assertIn(said, " ".join([error.message, *map(str, error.hints)]))
        with self.assertRaisesRegex(offsync.UsageError, "U\\+000D"):
            offsync.validate_config(CONFIG.rstrip("\n") + "\r", "FILE")  # without LF


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
