"""Compare offsync's YAML subset with PyYAML: whatever it accepts means the same, whatever it
writes is read back the same.

usage: fuzz_yaml.py [COUNT [SEED]]   (a development tool: needs PyYAML)
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sys

import yaml

OFFSYNC = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "offsync.py")
spec = importlib.util.spec_from_file_location("offsync", OFFSYNC)
offsync = importlib.util.module_from_spec(spec)
spec.loader.exec_module(offsync)

SCALARS = [
    '["a"]',
    '["a", "b"]',
    '[ "x" , "*.log" ]',
    '["a",]',
    "['a']",
    '["a" "b"]',
    '["a", b]',
    '["a#b"]',
    '["]"]',
    '["a"] x',
    "~/dir",
    "*.log",
    "true",
    "false",
    "yes",
    "no",
    "on",
    "off",
    "null",
    "~",
    "1",
    "0",
    "22",
    "08",
    "0o7",
    "0x1f",
    "1_000",
    "1e3",
    ".5",
    "1.5",
    "-1",
    "+1",
    "1:30",
    "2001-01-01",
    "hash",
    "/srv/app",
    "deploy@node",
    "a.b-c",
    "/",
    "y",
    "n",
    "True",
    "FALSE",
    "=",
    "<<",
    ".inf",
    ".nan",
    "a:b",
    "a: b",
    "a #b",
    "a#b",
    "#",
    "'it''s'",
    "''",
    '""',
    '"a\\tb"',
    '"\\x41\\u00e9\\U0001f600"',
    '"\\q"',
    '"a" b',
    "'a'b",
    "[]",
    "[ ]",
    "[a]",
    "{}",
    "|",
    ">",
    "&a",
    "*a",
    "!x",
    "!!str 1",
    "- a",
    "? a",
    "a,b",
    "%a",
    "@a",
    "`a",
    '"unclosed',
    "'unclosed",
    '"a\tb"',
    "0.0",
    "1.",
    "_1",
    "/a+b@c",
    "a/b",
    "e1",
    "0b1",
    "1a",
    "12e",
    "/a/b.c_d",
    "inf",
    "nan",
    '"a\\',
    "\\",
    "---",
    "...",
    '"#"',
    "' #'",
    "x" * 50,
]
KEYS = [
    "version",
    "source",
    "delete",
    "exclude",
    "targets",
    "login",
    "a",
    "_x",
    "on",
    "yes",
    "1a",
    "a-b",
    '"q"',
    "x y",
    "",
    "k1",
]
TOKENS = [
    " ",
    "  ",
    "\t",
    ":",
    ": ",
    "#",
    " #",
    "-",
    "- ",
    "\n",
    '"',
    "'",
    "\\",
    "[",
    "]",
    "{",
    "}",
    ",",
    "&",
    "*",
    "!",
    "|",
    ">",
    "%",
    "@",
    "`",
    "\r",
    "\x85",
    "\u2028",
    "\ufeff",
    "\x00",
    "é",
    "\U0001f600",
    "\xa0",
    "?",
    "~",
    "<<",
    "...",
    "---",
    "0",
    "true",
    "no",
]


def document(rng: random.Random) -> str:
    """Return a random document near the subset."""
    lines = []
    for _ in range(rng.randint(0, 5)):
        key, form = rng.choice(KEYS), rng.random()
        comment = rng.choice(["", "", " # c", "  #", "#c"])
        if form < 0.5:
            lines.append(
                "%s:%s%s%s" % (key, rng.choice([" ", " ", "  ", ""]), rng.choice(SCALARS), comment)
            )
        else:
            lines.append(key + ":" + comment)
            indent, gap = " " * rng.choice([0, 2, 2, 4]), " " * rng.choice([1, 1, 3])
            for _ in range(rng.randint(0, 3)):
                if rng.random() < 0.4:
                    lines.append(
                        indent + "-" + gap + rng.choice(SCALARS) + rng.choice(["", "", " # c"])
                    )
                    continue
                first = True
                for name in rng.sample(KEYS, rng.randint(1, 3)):
                    lines.append(
                        indent
                        + ("-" + gap if first else " " * (len(gap) + 1 + (rng.random() < 0.03)))
                        + name
                        + ": "
                        + rng.choice(SCALARS)
                    )
                    first = False
        if rng.random() < 0.2:
            lines.append(rng.choice(["", "   ", "# c", "    # c", "\t", "---", "..."]))
    if rng.random() < 0.1:
        lines.insert(0, rng.choice(["---", "---", "--- ", "--- # c", "---x"]))
    text = "\n".join(lines) + rng.choice(["", "\n", "\n\n"])
    if rng.random() < 0.1:
        text = text.replace("\n", "\r\n")
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(TOKENS) + text[at + rng.choice([0, 0, 1]) :]
    return text


class AnyKey(dict):
    """A table of keys in which every key may have any value."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return offsync.KeySpec("", object, None)


class Parsed(Exception):
    """A document is parsed: (its mapping,)."""


def parse(text: str):
    """Return the mapping of a document with any keys. Raises UsageError if it is refused."""

    def parsed(mapping, rules):
        raise Parsed(mapping)

    kept = offsync.TOP_KEYS, offsync.TARGET_KEYS, offsync.complete
    offsync.TOP_KEYS, offsync.TARGET_KEYS, offsync.complete = AnyKey(), AnyKey(), parsed
    try:
        offsync.validate_config(text, "fuzz")
    except Parsed as document:
        return plain(document.args[0])
    finally:
        offsync.TOP_KEYS, offsync.TARGET_KEYS, offsync.complete = kept


def plain(value):
    """Return a parsed value without the lines that its items stand in."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for _, item in value] if isinstance(value, list) else value


def exactly(value):
    """Return a value that compares equal only to one of the same types: True is not 1."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    return (
        [exactly(item) for item in value]
        if isinstance(value, list)
        else (type(value).__name__, value)
    )


def check(text: str) -> bool:
    """Return whether the subset accepts a text; raise if PyYAML reads it otherwise."""
    try:
        ours = parse(text)
    except offsync.UsageError:
        return False
    try:
        theirs = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        theirs = "refused: %s" % error
    if theirs != ours or exactly(theirs) != exactly(ours):
        raise SystemExit("DISAGREEMENT\n%r\noffsync: %r\nPyYAML:  %r" % (text, ours, theirs))
    return True


def check_writer(rng: random.Random) -> None:
    """Raise unless PyYAML reads what the writer writes, edits included."""

    def word() -> str:
        text = "".join(
            chr(
                rng.choice(
                    [
                        rng.randint(32, 126),
                        rng.randint(0xA0, 0xD7FF),
                        rng.randint(0xE000, 0xFFFD),
                        rng.randint(0x10000, 0x10FFFF),
                        rng.choice(b"\"\\'#: -"),
                    ]
                )
            )
            for _ in range(rng.randint(0, 12))
        )
        return re.sub("[\u2028\u2029\ufeff]", "", text)  # the commands refuse these in a path

    def login() -> str:
        return "u%d@h%d" % (rng.randint(0, 3), rng.randint(0, 3))

    source = "/" + word()
    text, targets = offsync.format_new_config(source), {}
    for _ in range(rng.randint(0, 6)):
        name = login()
        if rng.random() < 0.3 and name in targets:
            del targets[name]
        else:
            targets[name] = offsync.Target(
                name,
                "/" + word(),
                "/usr/bin/rrsync",
                rng.choice([None, 22, 2222]),
                rng.random() < 0.8,
            )
        text = offsync.replace_block(
            text, "targets", offsync.format_targets(list(targets.values()))
        )
    read = yaml.safe_load(text)
    expected = {name: target.remote_path for name, target in targets.items()}
    if (
        read["source"] != source
        or {t["login"]: t["remote_path"] for t in read["targets"]} != expected
        or not check(text)
    ):
        raise SystemExit("THE WRITER\n%s\n%r" % (text, read))


def main() -> None:
    """Run COUNT documents and a tenth as many written ones."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    rng = random.Random(seed)
    accepted = sum(check(document(rng)) for _ in range(count))
    for _ in range(count // 10):
        check_writer(rng)
    print(
        "%d documents (seed %d), %d accepted and read alike by PyYAML; %d written and read back"
        % (count, seed, accepted, count // 10)
    )


if __name__ == "__main__":
    main()
