"""config.yaml: the strict subset of YAML, what is refused by its line, and what is written."""

from __future__ import annotations

import json
import unittest

from lab import offsync

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
            ('"/a b\\u0041\\u00e9\\"\\\\"', '/a bAé"\\'),
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
                config = CONFIG.replace('source: "/srv/app-data"', "source: " + text)
                self.assertIn(text, config)
                if value is None:
                    with self.assertRaises(offsync.UsageError):
                        offsync.validate_config(config, "c")
                else:
                    self.assertEqual(offsync.validate_config(config, "c").source, value)

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

    def test_many_comments_after_a_block_that_is_replaced(self) -> None:
        """Found in linear time, with CRLF, too: 60 lines would take for ever otherwise."""
        end = "# c\r\n" * 60 + "jobs: 3\r\n"
        text = CONFIG.split("targets:")[0].replace("\n", "\r\n") + "targets: []\r\n" + end
        changed = offsync.replace_block(text, "targets", offsync.format_targets([WEB1]))
        self.assertTrue(changed.endswith('"\r\n' + end))
        self.assertEqual(offsync.validate_config(changed, "c").targets, (WEB1,))

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


if __name__ == "__main__":
    unittest.main()
