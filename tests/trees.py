"""Random pairs of trees, and an oracle that says by itself what a plan of them must be. Shares no
code with offsync.
"""

from __future__ import annotations

import os
import random
import stat

from lab import snapshot

ODD = [
    b" lead",
    b"trail ",
    b"a -> b",
    b"new\nline",
    b"\\#012",
    b"deleting x",
    b"sent mail",
    b"*",
    b"?x",
    b"[a]",
    b"\\",
    b"b\\*c",
    b"-n",
    b"--delete",
    b"#c",
    b";d",
    b"+ p",
    b"- m",
    b"!",
    b"caf\xc3\xa9",
    b"\xff\xfe",
    b"tab\tx",
    b"cr\rx",
    b"\x01",
    b"\x7f",
    b"\x85",
    b"\xc2\x85",
    b"'q'",
    b'"dq"',
    b"$HOME",
    b"`id`",
    b"{a,b}",
    b"~",
    b":",
    b"a:b",
    b"x" * 200,
    b".hidden",
    b"...",
    b"\xe2\x80\xae",
    b"a\\#134b",
    b"..x",
    b"%i",
    b"@",
    b"a,b",
    b".x.abc123",
]
WHEN = 1_600_000_000


def name(rng: random.Random) -> bytes:
    """Return a random file name."""
    if rng.random() < 0.5:
        return rng.choice(ODD)
    if rng.random() < 0.3:
        raw = bytes(
            rng.choice([b for b in range(1, 256) if b != 47]) for _ in range(rng.randint(1, 12))
        )
        return raw if raw not in (b".", b"..", b".~tmp~") else b"dot"
    return b"n%d" % rng.randint(0, 30)


def build(rng: random.Random, root: bytes, depth: int = 0) -> None:
    """Fill a directory at random: files, directories, symlinks that stay inside."""
    for _ in range(rng.randint(0, 6 if depth else 8)):
        path = os.path.join(root, name(rng))
        if os.path.lexists(path):
            continue
        put(rng, path, rng.choice("fffddl"), depth)


def put(rng: random.Random, path: bytes, kind: str, depth: int) -> None:
    """Create one random entry."""
    if kind == "d" and depth < 3:
        os.mkdir(path)
        build(rng, path, depth + 1)
        os.chmod(path, rng.choice([0o755, 0o700, 0o555, 0o1777, 0o2755]))
    elif kind == "l":
        os.symlink(rng.choice([b"n1", b"nowhere", b"x y", b"\xff", b"n\n2", b"./n3"]), path)
    else:
        with open(path, "wb") as stream:
            stream.write(
                rng.choice(
                    [
                        b"",
                        b"a",
                        b"b",
                        b"aaaa",
                        b"bbbb",
                        bytes(rng.randint(0, 255) for _ in range(50)),
                    ]
                )
            )
        os.chmod(
            path,
            rng.choice([0o644, 0o600, 0o755, 0o444, 0o4755, 0o000 if os.geteuid() == 0 else 0o400]),
        )
        os.utime(path, (WHEN, WHEN + rng.choice([0, 0, 0, 1])))


def remove(path: bytes) -> None:
    """Remove an entry of any type."""
    if os.path.isdir(path) and not os.path.islink(path):
        os.chmod(path, 0o700)
        for entry in os.listdir(path):
            remove(os.path.join(path, entry))
        os.rmdir(path)
    else:
        os.unlink(path)


def copy(source: bytes, destination: bytes) -> None:
    """Copy a tree with modes and times."""
    for entry in os.listdir(source):
        old, new = os.path.join(source, entry), os.path.join(destination, entry)
        status = os.lstat(old)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(old), new)
        elif stat.S_ISDIR(status.st_mode):
            os.mkdir(new)
            copy(old, new)
            os.chmod(new, stat.S_IMODE(status.st_mode))
        else:
            with open(old, "rb") as reader, open(new, "wb") as writer:
                writer.write(reader.read())
            os.chmod(new, stat.S_IMODE(status.st_mode))
            os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))


def mutate(rng: random.Random, root: bytes, depth: int = 0) -> None:
    """Change a tree at random: contents (size and time kept or not), modes, types, new and removed
    entries.
    """
    own_mode = stat.S_IMODE(os.lstat(root).st_mode)
    os.chmod(root, 0o700)
    for entry in sorted(os.listdir(root)):
        path = os.path.join(root, entry)
        status = os.lstat(path)
        is_link, is_dir = stat.S_ISLNK(status.st_mode), stat.S_ISDIR(status.st_mode)
        act = rng.random()
        if act < 0.12:
            remove(path)
        elif act < 0.25:
            remove(path)
            put(rng, path, rng.choice("fdl"), depth)
        elif act < 0.35 and not is_link:
            os.chmod(path, rng.choice([0o750 if is_dir else 0o644, 0o700, 0o755, 0o555]))
        elif act < 0.5 and not is_link and not is_dir:
            os.chmod(path, 0o600)
            with open(path, "r+b") as stream:
                old = stream.read()
                stream.seek(0)
                stream.write(bytes(255 - b for b in old))
            os.chmod(path, stat.S_IMODE(status.st_mode))
            if rng.random() < 0.7:
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif act < 0.6 and not is_link and not is_dir:
            os.utime(path, (WHEN, WHEN + 7))
        elif is_dir:
            mutate(rng, path, depth + 1)
    if rng.random() < 0.5:
        build(rng, root, 2)
    os.chmod(root, own_mode)


def oracle(source: bytes, target: bytes) -> dict:
    """Return what a plan must be: {path: (kind, reasons)}."""
    ours, theirs = snapshot(source), snapshot(target)
    plan = {}
    for path, (kind, mode, content) in ours.items():
        if path not in theirs:
            plan[path] = ("added", ())
            continue
        other_kind, other_mode, other_content = theirs[path]
        if kind != other_kind:
            plan[path] = ("modified", ("type",))
            continue
        reasons = []
        if content != other_content:
            reasons.append("link" if kind == "symlink" else "content")
        if mode != other_mode:
            reasons.append("mode")
        if reasons:
            plan[path] = ("modified", tuple(reasons))
    for path in theirs:
        if path not in ours:
            plan[path] = ("missing", ())
    return plan
