"""Build the release below dist/: offsync.py, its .sha256, a man page, install.sh, a tar.gz and a
wheel. The same input gives the same bytes.

usage: dist.py [DIRECTORY]; dist.py --man prints the man page alone
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import re
import sys
import tarfile
import zipfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXECUTABLE = ("offsync.py", "install.sh", ".ci/run")
WHEN = (1980, 1, 1, 0, 0, 0)  # the first time stamp that a zip file can have


def read(name: str) -> bytes:
    """Return a file of the repository."""
    with open(os.path.join(TOP, name), "rb") as stream:
        return stream.read()


def mode(name: str) -> int:
    """Return the mode of a released file, whatever umask it was checked out with."""
    return 0o755 if name in EXECUTABLE else 0o644


def make_tar(files: dict, top: str) -> bytes:
    """Return a tar.gz without owners, times or anything else of this machine."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(top + "/" + name)
            entry.size, entry.mode = len(files[name]), mode(name)
            archive.addfile(entry, io.BytesIO(files[name]))
    return gzip.compress(packed.getvalue(), mtime=0)


def make_wheel(program: bytes, readme: str, version: str) -> bytes:
    """Return a wheel of the one file: the module offsync and the command of that name
    (packaging.python.org, wheel 1.0).
    """
    info, summary = (
        "offsync-%s.dist-info/" % version,
        " ".join(program.decode().split('"""')[1].split()).split(". ")[0],
    )
    files = {
        "offsync.py": program,
        info + "METADATA": (
            (
                "Metadata-Version: 2.1\nName: offsync\nVersion: %s\nSummary: %s\nRequires-Python:"
                " >=3.9\nDescription-Content-Type: text/markdown\n\n%s" % (version, summary, readme)
            ).encode()
        ),
        info + "WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: offsync\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        info + "entry_points.txt": b"[console_scripts]\noffsync = offsync:main\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record += "%s,sha256=%s,%d\n" % (name, digest, len(data))
    files[info + "RECORD"] = (record + info + "RECORD,,\n").encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(
        packed, "w", zipfile.ZIP_STORED
    ) as archive:  # stored: zlib's bytes depend on its release
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, WHEN)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, data)
    return packed.getvalue()


def roff(text: str) -> str:
    """Return a line of text for man(7): nothing in it is a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def make_man(version: str) -> bytes:
    """Return the man page, made from the words of offsync's own parser and its docstring."""
    sys.path.insert(0, TOP)
    sys.dont_write_bytecode = True
    import offsync

    promise, contract = offsync.__doc__.split("\n\n", 1)
    lines = [
        '.TH OFFSYNC 1 "" "offsync %s" "User Commands"' % version,
        ".SH NAME",
        "offsync \\- push a directory to many targets with rsync over SSH",
        ".SH SYNOPSIS",
        ".B offsync",
        "COMMAND [argument ...]",
        ".SH DESCRIPTION",
        *map(roff, promise.split("\n")),
        ".SH COMMANDS",
    ]
    for name, (_, about, example, arguments) in offsync.COMMANDS.items():
        lines += [".SS offsync " + name, roff(about[:1].upper() + about[1:] + ".")]
        for argument, words in arguments.items():
            choices = words.get("choices", ())
            shown = (
                ""
                if str(words.get("action")).startswith("store_")
                else words.get("metavar") or "|".join(choices)
            )
            named = [argument, shown] if argument.startswith("-") else [shown or argument]
            lines += [
                ".TP",
                ".B " + roff(" ".join(filter(None, named))),
                roff(words.get("help", "the shell")),
            ]
        lines += [".PP", "Example: " + roff("offsync " + example)]
    lines += [
        ".SH OPTIONS",
        ".TP",
        ".B \\-v",
        "print every program before it starts",
        ".TP",
        ".B \\-\\-version",
        roff("print the version and this file's sha256"),
        ".TP",
        ".B \\-\\-contract",
        "print what it reads, writes, runs and never does",
        ".SH CONTRACT",
        ".nf",
    ]
    lines += [
        *map(roff, contract.split("To audit it")[0].rstrip().split("\n")),
        ".fi",
        ".SH SEE ALSO",
        "rsync(1), rrsync(1), ssh(1), ssh_config(5), sshd(8)",
    ]
    return ("\n".join(line or ".PP" for line in lines) + "\n").encode()


def main() -> None:
    """Write all files, and print their sha256."""
    directory = sys.argv[1] if sys.argv[1:] else os.path.join(TOP, "dist")
    program = read("offsync.py")
    found = re.search(r'^VERSION = "([0-9.]+)"$', program.decode(), re.MULTILINE)
    version = found.group(1)
    if sys.argv[1:] == ["--man"]:
        sys.stdout.buffer.write(make_man(version))
        return
    tests = sorted(
        "tests/" + name
        for name in os.listdir(os.path.join(TOP, "tests"))
        if name.endswith((".py", ".toml"))
    )
    digest = b"%s  offsync.py\n" % hashlib.sha256(program).hexdigest().encode()
    files = {
        name: read(name)
        for name in (
            "offsync.py",
            "install.sh",
            "README.md",
            "Makefile",
            ".ci/run",
            ".gitignore",
            *tests,
        )
    }
    files["offsync.py.sha256"] = digest
    files["offsync.1"] = make_man(version)
    release = {
        "offsync.py": program,
        "offsync.py.sha256": digest,
        "install.sh": files["install.sh"],
        "offsync.1": files["offsync.1"],
        "offsync-%s.tar.gz" % version: make_tar(files, "offsync-" + version),
        "offsync-%s-py3-none-any.whl" % version: make_wheel(
            program, files["README.md"].decode(), version
        ),
    }
    os.makedirs(directory, exist_ok=True)
    for name, data in release.items():
        path = os.path.join(directory, name)
        with open(path, "wb") as stream:
            stream.write(data)
        os.chmod(path, mode(name))
        print("%s  %s" % (hashlib.sha256(data).hexdigest(), name))


if __name__ == "__main__":
    main()
