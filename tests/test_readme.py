"""What the README and the release promise: its commands run, its config and tables are true, two
builds are identical.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import guards
from lab import HERE, OFFSYNC, USER, LabTestCase, offsync, read, require, risk, snapshot, write

TOP = os.path.dirname(OFFSYNC)
README = read(os.path.join(TOP, "README.md"))
BLOCKS = [
    (language, text)
    for _, language, text in re.findall(r"(?ms)^( *)```(\w+)\n(.*?)^ *```$", README)
]


def section(title: str) -> str:
    """Return the text below one heading."""
    return README.split("\n## %s\n" % title)[1].split("\n## ")[0]


def options_of(parser) -> set:
    """Return the long options of a parser, and -y, but those that all have."""
    return {
        name
        for action in parser._actions
        for name in action.option_strings
        if action.help != "==SUPPRESS==" and (name.startswith("--") or name == "-y")
    } - {"--help", "--verbose"}


def subparser(*words: str):
    """Return the parser of a command."""
    parser = offsync.build_parser()
    for word in words:
        parser = next(
            action for action in parser._actions if action.dest == "==SUPPRESS==" and action.choices
        ).choices[word]
    return parser


class Claims(LabTestCase):
    def test_the_quick_start_as_it_stands(self) -> None:
        """Every line of it is typed, its names replaced by those of the laboratory."""
        lines = [
            line.strip()
            for _, text in re.findall(r"(?ms)^ *```(sh)\n(.*?)^ *```$", section("Quick start"))
            for line in text.splitlines()
        ]
        self.assertEqual(len(lines), 11, lines)
        lab, prefix, key = self.lab, self.lab.base + "/prefix", ""
        write(lab.source + "/file", "delivered")
        target = lab.target("one")
        environments = {"controller": lab.env, "target": dict(lab.env, HOME=target.home)}
        clone = lab.base + "/clone"
        os.mkdir(clone)
        for name in ("offsync.py", "install.sh"):
            shutil.copy(os.path.join(TOP, name), clone)
        seen = []
        for line in lines:
            command = line.split("#")[0].strip()
            role = "target" if " link " in command or "install -d" in command else "controller"
            if command.startswith("git clone") or "useradd" in command:
                continue
            command = (
                command.replace("sudo -iu deploy ", "")
                .replace("sudo ", "")
                .replace(
                    "/srv/app-data",
                    target.path if role == "target" or "target add" in command else lab.source,
                )
            )
            command = command.replace("-o deploy", "-o " + USER).replace(
                "deploy@node02",
                (
                    target.login + " --port %d" % target.port
                    if "target add" in command
                    else target.login
                ),
            )
            command = command.replace("offsync link", "offsync link " + " ".join(risk()))
            command = command.replace("SHA256:...", target.fingerprint).replace(
                "ssh-ed25519 AAAA... offsync@controller", key
            )
            done = subprocess.run(
                ["sh", "-c", command],
                cwd=clone,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=dict(
                    environments[role], PREFIX=prefix, PATH=prefix + "/bin:" + lab.env["PATH"]
                ),
                start_new_session=True,
            )
            self.assertEqual(done.returncode, 0, command + done.stderr)
            seen.append(command.split()[0:2])
            if " init " in command:
                key = done.stdout.strip()
                self.assertIn("offsync link --path", done.stderr)
            if " link " in command:
                self.assertTrue(done.stdout.startswith("offsync target add "))
        self.assertEqual(seen[-1], ["offsync", "verify"])
        self.assertEqual(snapshot(target.path), snapshot(lab.source))

    def test_every_command_in_code_is_one(self) -> None:
        inline = re.findall(r"`(offsync [a-z][^`|]*)`", README)
        code = re.sub(
            r"(?m)^Description=.*", "", " ".join(text.replace("\\\n", " ") for _, text in BLOCKS)
        )
        code = re.sub(r"'?ssh-ed25519 AAAA\.\.\. offsync@controller'?|'?\{\{.*?\}\}'?", "KEY", code)
        commands = re.findall(
            r"(?m)(?:^ *|['\" ]|/bin/|sudo )(offsync [a-z-]+(?![:\w])[^\n'\"#>|&;(]*)", code
        )
        self.assertGreater(min(len(inline), len(commands) // 2), 5, (inline, commands))
        for command in inline + commands:
            words = command.split()[1:]
            with self.subTest(command=command):
                try:
                    self.assertIsNotNone(offsync.build_parser().parse_args(words).function)
                except offsync.UsageError as error:
                    self.assertIn("are required", str(error))  # a command is mentioned, not shown
                    self.assertNotIn(command, commands)

    def test_the_table_of_commands_is_that_of_the_parser(self) -> None:
        rows = [line for line in section("Commands").splitlines() if line.startswith("| ")][1:]
        listed = {}
        for row in rows:
            for usage in re.findall(r"`([^`]+)`", row.replace("\\|", "/").split("|")[2]):
                words = usage.split()
                name = words[:2] if words[0] == "target" else words[:1]
                listed[" ".join(name)] = set(re.findall(r"--[a-z-]+|-y", usage))
        names = [name for name in subparser()._actions[-1].choices if name != "target"]
        names += ["target " + name for name in subparser("target")._actions[-1].choices]
        self.assertEqual(sorted(listed), sorted(names))
        for name, options in listed.items():
            self.assertEqual(options, options_of(subparser(*name.split())), name)

    def test_the_config_block_is_what_the_writer_makes(self) -> None:
        text = next(
            text for language, text in BLOCKS if language == "yaml" and text.startswith("version:")
        )
        config = offsync.validate_config(text, "README")
        self.assertEqual(
            offsync.replace_block(
                offsync.format_new_config(config.source),
                "targets",
                offsync.format_targets(config.targets),
            ),
            text,
        )
        for key in ("port", "symlinks", *offsync.Config._fields):
            if key not in ("targets", "source"):
                self.assertIn("`%s" % key, section("Configuration"))

    def test_plan_and_log_are_described_field_by_field(self) -> None:
        self.lab.configured_target("one")
        write(self.lab.source + "/file", "x")
        os.symlink("file", self.lab.source + "/link")
        lines = [
            json.loads(line) for line in self.lab.offsync("plan --json", check=0).out.splitlines()
        ]
        for key in {key for line in lines for key in line}:
            self.assertIn("`%s`" % key, section("The plan"))
        self.lab.offsync("apply", check=0)
        for key in self.lab.records()[0]:
            self.assertIn("`%s`" % key, section("Log"))

    def test_the_first_screen_is_what_is_printed(self) -> None:
        """The block of real output: the same tree on two targets, with other names."""
        lab = self.lab
        one, two = lab.linked_target("one"), lab.linked_target("two")
        write(lab.source + "/app.conf", "colour = green\n")
        write(lab.source + "/v2/helper", "#!/bin/true\n", 0o4755)
        os.symlink("v2", lab.source + "/release")
        for target in (one, two):
            write(target.path + "/app.conf", "colour = wrong\n")
        block = next(text for language, text in BLOCKS if language == "text")
        block = re.sub("(?m) +# .*$", "", block)
        shown = ""
        for command in re.findall(r"(?m)^\$ (.*)$", block):
            shown += "$ %s\n" % command
            if command.startswith("offsync"):
                done = lab.offsync(*command.replace("deploy@web1", one.login).split()[1:])
                shown += done.out + done.err
            else:
                write(one.path + "/notes.txt", "")
        for old, new in (
            (lab.source, "/srv/app-data"),
            (one.path, "/srv/app-data"),
            (two.path, "/srv/app-data"),
            (one.login, "deploy@web1"),
            (two.login, "deploy@web2"),
        ):
            shown = shown.replace(old, new)
        shown = re.sub(r"(?m)^ok  .*\n", "", shown)
        # What differs from run to run: the ID, the seconds, and which target ends first.
        expected, shown = (
            re.sub(
                r"(?m)^(deploy@web2: ok.*\n)(deploy@web1: ok.*\n)",
                r"\2\1",
                re.sub(r"sent in .* s$", "sent", re.sub("[0-9a-f]{64}", "ID", text), flags=re.M),
            )
            for text in (block, shown)
        )
        self.assertEqual(" ".join(expected.split()), " ".join(shown.split()))

    def block(self, words: str) -> str:
        """Return the block of code that has these words."""
        return next(text for _, text in BLOCKS if words in text)

    def typed(self, script: str, **more) -> subprocess.CompletedProcess:
        self.lab.program("offsync", '#!/bin/sh\nexec %s %s "$@"\n' % (sys.executable, OFFSYNC))
        return subprocess.run(
            ["sh", "-c", script],
            env={**self.lab.env, **more.pop("env", {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **more,
        )

    def test_the_loop_that_links_many_hosts(self) -> None:
        """As typed, by an own ssh key and sudo; both stand for those of a real host."""
        lab = self.lab
        lab.init()
        own = lab.base + "/own"
        make = [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", own]
        subprocess.run(make, check=True)
        there = lab.base + "/there"
        hosts, config = "", ""
        for name in ("one", "two"):
            target = lab.target(
                name, "Subsystem sftp internal-sftp\nSetEnv PATH=%s:/usr/bin:/bin" % there
            )
            write(target.keys, read(own + ".pub"))
            config += "Host node-%s\n  HostName %s\n  Port %d\n  User %s\n  IdentityFile %s\n" % (
                name,
                target.address,
                target.port,
                USER,
                own,
            )
            config += "  StrictHostKeyChecking no\n  UserKnownHostsFile %s/known-%s\n" % (
                lab.base,
                name,
            )
            hosts += "node-%s\n" % name
            write("%s/home-%d" % (there, target.port), target.home)
            settings = "port %d\nhostkey %s\n" % (target.port, target.host_key)
            write("%s/sshd-%d" % (there, target.port), settings)
        write(lab.ssh_config, config)
        write(
            there + "/sudo",
            "#!/bin/sh\ncase $1 in useradd) exit 0;; -iu) shift 2; esac\n"
            'HOME=$(cat %s/home-${SSH_CONNECTION##* }) exec "$@"\n' % there,
            0o755,
        )
        write(there + "/sshd", "#!/bin/sh\ncat %s/sshd-${SSH_CONNECTION##* }\n" % there, 0o755)
        write(there + "/python3", '#!/bin/sh\nexec %s "$@"\n' % sys.executable, 0o755)
        write(lab.base + "/hosts", hosts)
        script = self.block("done < hosts").replace("~/.offsync", lab.state)
        script = script.replace("-o deploy ", "-o %s " % USER).replace(" deploy@", " %s@" % USER)
        script = script.replace("link --path", "link %s --path" % " ".join(risk()))
        script = script.replace("/srv/app-data", lab.base + "/delivered")
        script = script.replace("< offsync.py", "< " + OFFSYNC)
        done = self.typed(script, cwd=lab.base)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr + read(lab.base + "/add.sh"))
        self.assertEqual(done.stdout.count("the key is restricted to writing below"), 2)
        write(lab.ssh_config, re.sub("(?m)^  (StrictHost|UserKnown|IdentityFile).*$", "", config))
        self.assertIn("%s@node-two" % USER, lab.offsync("target list", check=0).out)

    def test_the_line_for_a_target_without_python(self) -> None:
        """The guarded line, and the plain one, which works, too."""
        guarded, plain = (text.strip() for kind, text in BLOCKS if kind == "authorized_keys")
        command = offsync.format_forced_command("/usr/bin/rrsync", "/srv/app-data")
        key = offsync.PublicKey("ssh-ed25519", "AAAA...", "offsync@controller")
        self.assertEqual(guarded, offsync.format_authorized_key(command, key))
        self.assertEqual(
            plain, offsync.format_authorized_key("/usr/bin/rrsync -wo /srv/app-data", key)
        )
        self.lab.init()
        target = self.lab.target("one")
        public = read(self.lab.state + "/id_ed25519.pub").strip()
        os.mkdir(target.path)
        for line in (guarded, plain):
            line = line.replace("/srv/app-data", target.path)
            line = line.replace("ssh-ed25519 AAAA... offsync@controller", public)
            write(target.keys, line + "\n")
            self.lab.add(target)

    def test_two_people(self) -> None:
        """Only what the reviewer signed is applied; the chain of commands fails closed."""
        target = self.lab.configured_target("one")
        write(self.lab.source + "/f", "x")
        key = self.lab.base + "/reviewer"
        make = [require("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key]
        subprocess.run(make, check=True)
        write(self.lab.base + "/allowed", "reviewer@example.org " + read(key + ".pub"))
        script = self.block("ssh-keygen -Y sign -f ~/.ssh/id_ed25519 -n offsync-plan")
        plan, sign, *apply = script.replace("~/.ssh/id_ed25519", key).splitlines()
        for command in (plan, sign):
            done = self.typed(command, cwd=self.lab.base)
            self.assertEqual(done.returncode, 0, done.stderr)
        signed = read(self.lab.base + "/plan.jsonl")
        write(self.lab.base + "/plan.jsonl", signed.replace('"f"', '"g"'))
        done = self.typed("\n".join(apply), cwd=self.lab.base)
        self.assertNotEqual(done.returncode, 0)
        self.assertEqual(snapshot(target.path), {})
        write(self.lab.base + "/plan.jsonl", signed)
        done = self.typed("\n".join(apply), cwd=self.lab.base)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(snapshot(target.path), snapshot(self.lab.source))

    def test_several_controllers_share_one_plan(self) -> None:
        one, two = self.lab.configured_target("one"), self.lab.configured_target("two")
        write(self.lab.source + "/f", "x")
        plan = self.lab.base + "/plan.jsonl"
        write(plan, self.lab.offsync("plan --json", check=0).stdout)
        write(self.lab.base + "/east", one.login + "\n")
        write(self.lab.base + "/west", two.login + "\n")
        other = self.lab.base + "/other"
        shutil.copytree(self.lab.state, other)
        config = read(other + "/config.yaml")
        write(
            other + "/config.yaml",
            config[: config.index("  - login")]
            + config[config.index("  - login: '%s'" % two.login) :],
        )
        self.lab.offsync("apply @east --plan", plan, check=0)
        self.lab.offsync("apply @west --plan", plan, env={"OFFSYNC_HOME": other}, check=0)
        self.assertEqual([snapshot(t.path) for t in (one, two)], [snapshot(self.lab.source)] * 2)

    def test_it_is_short_and_its_first_screen_has_the_two_commands(self) -> None:
        lines = README.splitlines()
        self.assertLess(len(lines), 660)
        first = "\n".join(lines[:65])
        for words in (
            "tests/demo.py --yes",
            "tests/run.py --yes",
            "$ offsync plan",
            "$ offsync apply",
            "$ offsync verify",
            "refused, nothing was sent",
            "$ offsync doctor",
        ):
            self.assertIn(words, first)

    def test_every_promise_has_guards(self) -> None:
        text = section("Security").split("What each hash proves")[0]
        promises = [" ".join(promise.split()) for promise in text.split("\n- ")[1:]]
        kept = dict.fromkeys(guard.promise for guard in guards.GUARDS)
        self.assertEqual(kept.popitem()[0], guards.OTHERS)
        self.assertEqual(len(promises), len(kept))
        for promise, words in zip(promises, kept):
            self.assertTrue(promise.startswith(words), promise)

    def test_every_guard_has_its_place(self) -> None:
        text = read(OFFSYNC)
        for guard in guards.GUARDS:
            with self.subTest(name=guard.name):
                place = guard.function, guard.expression, guard.becomes
                self.assertTrue(guards.take_out(text, *place))
                # Else the error of a test that does not exist would count as noticed.
                named = unittest.defaultTestLoader.loadTestsFromName(guard.test)
                found = [type(test).__name__ for test in named]
                self.assertTrue(found)
                self.assertNotIn("_FailedTest", found)

    def test_troubleshooting_quotes_messages(self) -> None:
        program = " ".join(re.sub(r'"\s*\n\s*"', "", read(OFFSYNC)).split())
        for symptom in re.findall(r"(?m)^\| (`.*?`) \|", section("Troubleshooting")):
            for quoted in re.findall("`([^`]+)`", symptom):
                for part in quoted.split("..."):
                    self.assertIn(part.strip(), program)

    def test_cron_has_no_terminal_and_little_environment(self) -> None:
        line = next(text for language, text in BLOCKS if language == "cron").splitlines()[-1]
        schedule, user, command = re.fullmatch(r"((?:\S+ +){5})(\S+) +(.*)", line).groups()
        unit = next(
            text
            for language, text in BLOCKS
            if language == "ini" and "offsync-verify.service" in text
        )
        self.assertIn("User=%s\nExecStart=%s\n" % (user, command), unit)
        self.lab.configured_target("one")
        installed = self.lab.base + "/usr/local/bin/offsync"
        write(installed, '#!/bin/sh\nexec %s %s "$@"\n' % (sys.executable, OFFSYNC), 0o755)
        for expected in (0, 3):
            done = subprocess.run(
                [
                    "env",
                    "-i",
                    "HOME=" + self.lab.home,
                    "LOGNAME=" + USER,
                    "SHELL=/bin/sh",
                    "PATH=/usr/bin:/bin",
                    "sh",
                    "-c",
                    self.lab.base + command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                cwd="/",
            )
            self.assertEqual(
                (done.returncode, bool(done.stdout)), (expected, bool(expected)), done.stderr
            )
            write(self.lab.source + "/new", "x")

    def test_what_it_says_of_files_is_there(self) -> None:
        targets = re.findall(r"(?m)(?:`|^)make (\w+)", README)
        self.assertIn("dist", targets)
        for name in targets:
            self.assertRegex(read(TOP + "/Makefile"), "(?m)^%s:" % name)


class Dist(unittest.TestCase):
    def setUp(self) -> None:
        self.base = tempfile.mkdtemp(prefix="offsync-dist-")
        self.addCleanup(shutil.rmtree, self.base)

    def build(self, top: str, name: str, umask: int) -> dict:
        """Build the release of a tree; return {file name: its bytes}."""
        out = os.path.join(self.base, name)
        subprocess.run(
            [
                "sh",
                "-c",
                'umask %03o; exec "$0" "$@"' % umask,
                sys.executable,
                top + "/tests/dist.py",
                out,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = {}
        for file in os.listdir(out):
            with open(os.path.join(out, file), "rb") as stream:
                found[file] = stream.read()
        return found

    def test_two_builds_are_identical_also_from_the_tarball(self) -> None:
        first = self.build(TOP, "one", 0o022)
        version = offsync.VERSION
        self.assertEqual(
            sorted(first),
            [
                "install.sh",
                "offsync-%s-py3-none-any.whl" % version,
                "offsync-%s.tar.gz" % version,
                "offsync.1",
                "offsync.py",
                "offsync.py.sha256",
            ],
        )
        subprocess.run(
            ["tar", "-xzf", "%s/one/offsync-%s.tar.gz" % (self.base, version), "-C", self.base],
            check=True,
        )
        unpacked = "%s/offsync-%s" % (self.base, version)
        self.assertEqual(self.build(unpacked, "two", 0o077), first)
        subprocess.run(
            ["sha256sum", "--status", "-c", "offsync.py.sha256"], cwd=self.base + "/one", check=True
        )
        installed = subprocess.run(
            ["sh", unpacked + "/install.sh"],
            env={**os.environ, "PREFIX": self.base + "/p"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        self.assertIn(hashlib.sha256(first["offsync.py"]).hexdigest(), installed)
        self.assertEqual(first["offsync.py"].decode(), read(OFFSYNC))

    def test_the_wheel_gives_the_command_without_a_network(self) -> None:
        self.build(TOP, "dist", 0o022)
        if subprocess.run(
            [sys.executable, "-c", "import venv, ensurepip"], stderr=subprocess.DEVNULL
        ).returncode:
            self.skipTest("this Python has no venv with pip")
        subprocess.run([sys.executable, "-m", "venv", self.base + "/venv"], check=True)
        bin_ = self.base + "/venv/bin/"
        line = next(
            line
            for language, text in BLOCKS
            for line in text.splitlines()
            if line.startswith("pip install")
        )
        subprocess.run(
            [bin_ + "python", "-m", *line.split()],
            check=True,
            cwd=self.base,
            stdout=subprocess.DEVNULL,
        )
        out = subprocess.run(
            [bin_ + "offsync", "--version"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        with open(OFFSYNC, "rb") as stream:
            self.assertIn(hashlib.sha256(stream.read()).hexdigest(), out)
        self.assertEqual(
            subprocess.run([bin_ + "offsync", "paln"], stderr=subprocess.DEVNULL).returncode, 2
        )

    def test_all_tests_are_released(self) -> None:
        self.build(TOP, "dist", 0o022)
        listed = subprocess.run(
            ["tar", "-tzf", "%s/dist/offsync-%s.tar.gz" % (self.base, offsync.VERSION)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        for name in os.listdir(HERE):
            if not name.startswith(("__", ".")):  # caches of tools
                self.assertIn("/tests/%s\n" % name, listed)


if __name__ == "__main__":
    unittest.main()
