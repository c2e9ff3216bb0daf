"""install.sh, install-deps (with fakes of the package managers that cannot be had here),
--version, and the first steps.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest

from lab import OFFSYNC, LabTestCase, read, require, type_on_terminal, write

TOP = os.path.dirname(OFFSYNC)
# How an ordinary user installs a package, and what each role needs: a command for each package, so
# that a name which a release of the system does not know fails alone.
INSTALL = {
    "apt-get": "sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends",
    "dnf": "sudo dnf -y install",
    "yum": "sudo yum -y install",
    "pacman": "sudo pacman -S --needed --noconfirm",
    "zypper": "sudo zypper --non-interactive install --no-recommends",
    "apk": "sudo apk add --no-cache",
    "brew": "brew install",
}
EXPECTED = """
apt-get controller: openssh-client rsync
apt-get target: openssh-server rsync python3
apt-get both: openssh-client rsync openssh-server python3
dnf controller: openssh-clients rsync
dnf target: openssh-server rsync python3 rsync-rrsync
yum both: openssh-clients rsync openssh-server python3 rsync-rrsync
pacman controller: openssh rsync
pacman target: openssh rsync python
zypper target: openssh rsync python3
apk both: openssh-client openssh-keygen rsync openssh-server rrsync
brew controller: rsync
"""


class InstallDeps(LabTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.bin = self.lab.base + "/only"
        os.mkdir(self.bin)
        for name in ("sh", "env", "cat", "python3"):
            os.symlink(os.path.realpath(shutil.which(name)), self.bin + "/" + name)

    def fake(self, manager: str, succeed: bool = True) -> str:
        """Make a package manager that notes its call and, like the real one, makes rsync appear
        (or not).
        """
        calls = self.lab.base + "/calls"
        body = '#!/bin/sh\necho "${0##*/} $*" >> %s\n' % calls
        if succeed:
            body += (
                '[ "$1" = update ] || for p in rsync ssh ssh-keygen; do echo "#!/bin/sh\necho rsync'
                '  version 3.4.1  protocol version 32" > %s/$p; /bin/chmod 755 %s/$p; done\n'
                % (self.bin, self.bin)
            )
        else:
            body += "exit 1\n"
        write(self.bin + "/" + manager, body, 0o755)
        write(self.bin + "/sudo", '#!/bin/sh\n[ "$1" = env ] && shift 2\nexec "$@"\n', 0o755)
        return calls

    def run_deps(self, *args, check=None):
        return self.lab.offsync("install-deps", *args, env={"PATH": self.bin}, check=check)

    def test_an_openssh_that_works_is_left_alone(self) -> None:
        """An upgrade would restart the sshd of a host at work."""
        for name in ("ssh", "sshd", "ssh-keygen"):
            write(self.bin + "/" + name, "#!/bin/sh\n", 0o755)
        calls = self.fake("apt-get")
        self.run_deps("--role", "both", "-y")
        self.assertIn("rsync", read(calls))
        self.assertNotIn("openssh", read(calls))

    def test_the_commands_of_every_package_manager(self) -> None:
        for row in EXPECTED.strip().splitlines():
            manager, role = row.split(":")[0].split()
            commands = ["%s %s" % (INSTALL[manager], p) for p in row.split(":")[1].split()]
            if manager == "apt-get":
                commands.insert(0, "sudo apt-get update")
            with self.subTest(manager=manager, role=role):
                calls = self.fake(manager, succeed=False)
                done = self.run_deps("--role", role, "-y", check=1)
                shown = [
                    line.strip() for line in done.err.splitlines() if re.match("    \\S", line)
                ]
                if os.geteuid() == 0:
                    commands = [command.replace("sudo ", "") for command in commands]
                self.assertEqual(shown, commands)
                plain = [re.sub("sudo |env DEBIAN_FRONTEND=[a-z]+ ", "", c) for c in commands]
                self.assertEqual(read(calls).splitlines(), plain)
                self.assertIn("still missing", done.err)
                os.unlink(calls)
                os.unlink(self.bin + "/" + manager)

    def test_it_asks_first_and_is_content_with_what_is_there(self) -> None:
        calls = self.fake("apt-get")
        done = self.run_deps("--role", "controller", check=1)
        self.assertIn("offsync install-deps --role controller -y", done.err)
        self.assertFalse(os.path.exists(calls))
        self.run_deps("--role", "controller", "-y", check=0)
        self.assertEqual(len(read(calls).splitlines()), 3)
        self.assertIn(
            "everything for the role controller is installed",
            self.run_deps("--role", "controller", check=0).err,
        )
        self.assertEqual(len(read(calls).splitlines()), 3)

    @unittest.skipIf(os.geteuid() == 0, "root needs no sudo")
    def test_an_ordinary_user_without_sudo(self) -> None:
        self.fake("apt-get")
        os.unlink(self.bin + "/sudo")
        done = self.run_deps("-y", check=1)
        self.assertIn("have root run these commands without sudo", done.err)

    def test_no_package_manager(self) -> None:
        self.assert_refused(self.run_deps("-y"), 1, "no known package manager")

    def test_openrsync_and_old_rsync_are_not_enough(self) -> None:
        for name in ("ssh", "ssh-keygen"):
            os.symlink(require(name), self.bin + "/" + name)
        for answer, said in (
            ("openrsync: protocol version 29\nrsync version 2.6.9 compatible", "openrsync"),
            ("rsync  version 3.1.1  protocol version 31", "3.1.1, too old"),
        ):
            write(self.bin + "/rsync", "#!/bin/sh\ncat <<'E'\n%s\nE\n" % answer, 0o755)
            if not self.lab.targets:
                self.lab.configured_target("one")
            self.assert_refused(
                self.lab.offsync("plan", env={"PATH": self.bin}), 1, said, "OFFSYNC_RSYNC"
            )
        self.lab.offsync(
            "plan",
            env={"PATH": self.lab.bin + ":" + self.bin, "OFFSYNC_RSYNC": require("rsync")},
            check=0,
        )


class InstallScript(unittest.TestCase):
    def setUp(self) -> None:
        self.base = tempfile.mkdtemp(prefix="offsync install ")
        self.addCleanup(shutil.rmtree, self.base)
        for name in ("install.sh", "offsync.py"):
            shutil.copy(os.path.join(TOP, name), self.base)

    def install(
        self, shell: str, *args: str, check: int = 0, **env: str
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*shell.split(), os.path.join(self.base, "install.sh"), *args],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.assertEqual(done.returncode, check, done.stderr)
        return done

    def shells(self) -> list:
        return [
            shell
            for shell in ("sh", "dash", "bash", "busybox ash")
            if shutil.which(shell.split()[0])
        ]

    def test_install_repeat_upgrade_uninstall(self) -> None:
        for shell in self.shells():
            with self.subTest(shell=shell):
                prefix = os.path.join(self.base, "the prefix " + shell)
                done = self.install(shell, PREFIX=prefix)
                installed = prefix + "/bin/offsync"
                digest = hashlib.sha256(open(OFFSYNC, "rb").read()).hexdigest()
                self.assertEqual(done.stdout, "%s\nsha256 %s\n" % (installed, digest))
                self.assertIn("not in your PATH", done.stderr)
                self.assertEqual(stat.S_IMODE(os.stat(installed).st_mode), 0o755)
                said = subprocess.run(
                    [installed, "--version"], stdout=subprocess.PIPE, text=True, check=True
                ).stdout
                self.assertIn(digest, said)
                self.install(shell, PREFIX=prefix)
                self.assertEqual(os.listdir(prefix + "/bin"), ["offsync"])
                self.install(shell, "--uninstall", PREFIX=prefix)
                self.assertEqual(os.listdir(prefix + "/bin"), [])
                self.assertIn(
                    "nothing to remove", self.install(shell, "--uninstall", PREFIX=prefix).stdout
                )

    def test_all_that_is_installed_goes_again(self) -> None:
        """Also from a checkout, which makes the man page."""
        shutil.copytree(TOP + "/tests", self.base + "/tests", ignore=shutil.ignore_patterns("__*"))
        prefix = self.base + "/p"
        self.install("sh", PREFIX=prefix)
        files = []
        for directory, _, names in os.walk(prefix):
            files += [os.path.relpath(os.path.join(directory, name), prefix) for name in names]
        self.assertEqual(
            sorted(files),
            [
                "bin/offsync",
                "share/bash-completion/completions/offsync",
                "share/man/man1/offsync.1",
            ],
        )
        self.assertIn(".TH OFFSYNC 1", read(prefix + "/share/man/man1/offsync.1"))
        words = read(prefix + "/share/bash-completion/completions/offsync")
        self.assertIn("complete -o default -C 'offsync completion bash' offsync", words)
        self.install("sh", "--uninstall", PREFIX=prefix)
        self.assertEqual([names for _, _, names in os.walk(prefix) if names], [])

    def test_destdir_home_and_path(self) -> None:
        done = self.install("sh", PREFIX="/usr", DESTDIR=self.base + "/stage")
        self.assertTrue(os.path.exists(self.base + "/stage/usr/bin/offsync"))
        self.assertEqual(done.stderr, "")
        prefix = self.base + "/p"
        self.assertEqual(
            self.install("sh", PREFIX=prefix, PATH=prefix + "/bin:" + os.environ["PATH"]).stderr, ""
        )

    def test_the_man_page_of_a_release(self) -> None:
        subprocess.run(
            ["python3", TOP + "/tests/dist.py", self.base + "/release"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        page = read(self.base + "/release/offsync.1")
        for words in (
            ".SS offsync target add",
            ".B \\-\\-host\\-key FP",
            "Example: offsync apply 'web*' \\-\\-except web3 \\-\\-plan FILE",
            ".B TARGET",
            "never   deletes without",
        ):
            self.assertIn(words, page)
        self.assertNotIn("\n\n", page)
        if shutil.which("groff"):
            done = subprocess.run(
                ["groff", "-man", "-Tascii", "-ww", self.base + "/release/offsync.1"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                check=True,
            )
            self.assertEqual(done.stderr, "")
        shutil.copy(self.base + "/release/offsync.1", self.base)
        prefix = self.base + "/p"
        self.install("sh", PREFIX=prefix)
        self.assertEqual(read(prefix + "/share/man/man1/offsync.1"), page)
        self.install("sh", "--uninstall", PREFIX=prefix)
        self.assertFalse(os.path.exists(prefix + "/share/man/man1/offsync.1"))

    def test_refusals(self) -> None:
        prefix = self.base + "/p"
        write(self.base + "/offsync.py.sha256", "%s  offsync.py\n" % ("0" * 64))
        self.assertIn("does not match", self.install("sh", check=1, PREFIX=prefix).stderr)
        self.assertFalse(os.path.exists(prefix))
        write(
            self.base + "/offsync.py.sha256",
            "%s  offsync.py\n" % hashlib.sha256(open(OFFSYNC, "rb").read()).hexdigest(),
        )
        self.install("sh", PREFIX=prefix)
        self.assertIn("usage", self.install("sh", "--nonsense", check=1).stderr)
        self.assertIn("not absolute", self.install("sh", check=1, PREFIX="relative").stderr)
        self.assertIn("usage", self.install("sh", "--help").stdout)
        old = self.base + "/old"
        write(
            old + "/python3",
            "#!/bin/sh\ncase $1 in --version) echo Python 3.6.8;; *) exit 1;; esac\n",
            0o755,
        )
        self.assertIn(
            "Python 3.6.8 is too old",
            self.install(
                "sh", check=1, PREFIX=self.base + "/q", PATH=old + ":" + os.environ["PATH"]
            ).stderr,
        )


class FirstSteps(LabTestCase):
    def test_the_next_step_from_where_one_stands(self) -> None:
        self.assertIn("offsync init", self.lab.offsync(check=2).err)
        self.assertIn("offsync link", self.lab.offsync(check=2).err)
        self.lab.configured_target("one")
        self.assertIn("offsync plan", self.lab.offsync(check=2).err)

    def test_init_says_whether_the_key_is_one(self) -> None:
        key = self.lab.init()
        public = self.lab.state + "/id_ed25519.pub"
        write(public, "ssh-ed25519 AAAA another@controller\n")
        self.assertEqual(
            self.lab.init().split()[:2], key.split()[:2]
        )  # the one that is used, not the one that lies there
        self.assertEqual(read(public).split()[:2], key.split()[:2])
        write(self.lab.state + "/id_ed25519", "junk\n", 0o600)
        self.assert_refused(
            self.lab.offsync("init"), 1, "ssh-keygen cannot read it", "move it away"
        )

    def test_a_status_that_is_none_is_passed_over(self) -> None:
        self.lab.configured_target("one")
        for record in ('{"login": "%s", "result": ["x"]}', '{"login": "%s"}', "[]", "\udcff"):
            write(
                self.lab.state + "/last/" + self.lab.targets[0].login,
                (record.replace("%s", self.lab.targets[0].login)).encode(
                    "utf-8", "surrogateescape"
                ),
            )
            self.assertIn("never delivered", self.lab.offsync("target list", check=0).out)

    def test_every_help_has_an_example(self) -> None:
        commands = [
            "init",
            "link",
            "unlink",
            "target",
            "target add",
            "target list",
            "target remove",
            "install-deps",
            "plan",
            "apply",
            "verify",
            "manifest",
            "doctor",
        ]
        for command in commands:
            out = self.lab.offsync(*command.split(), "--help", check=0).out
            self.assertIn("example:\n  offsync " + command, out)
        top = self.lab.offsync("--help", check=0).out
        for command in commands:
            self.assertIn(" %s " % command.split()[0], top)

    def test_version_names_these_bytes(self) -> None:
        digest = hashlib.sha256(open(OFFSYNC, "rb").read()).hexdigest()
        self.assertIn(digest, self.lab.offsync("--version", check=0).out)
        piped = subprocess.run(
            ["python3", "-", "--version"],
            stdin=open(OFFSYNC, "rb"),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self.assertIn("sha256 unknown", piped.stdout)

    def test_verbose_shows_every_program(self) -> None:
        self.lab.configured_target("one")
        err = self.lab.offsync("-v plan", check=0).err
        self.assertRegex(err, r"(?m)^\+ \S+ssh .*ControlMaster=yes")
        self.assertRegex(
            err, r"(?m)^\+ \S+rsync -8 --info=flist1 -n -rlptc --delete .*--timeout=10800"
        )


class Asking(InstallDeps):
    """init and link find what is missing, show the commands, and ask on a terminal."""

    def setUp(self) -> None:
        super().setUp()
        self.calls = self.fake("apt-get")
        self.home = self.lab.base + "/fresh"
        os.mkdir(self.home)
        self.env = {**self.lab.env, "PATH": self.bin, "HOME": self.home, "TERM": "dumb"}

    def answer(self, answer: str, *args: str) -> tuple:
        return type_on_terminal(
            [sys.executable, OFFSYNC, *args], self.env, (b"y or n: ", answer + "\n")
        )

    def test_no_leaves_all_as_it_was(self) -> None:
        for args in (
            ["init", "--source", self.lab.source],
            ["link", "--path", self.lab.base + "/d"],
        ):
            status, seen = self.answer("n", *args)
            self.assertEqual(status, 1, seen)
            self.assertIn("apt-get install -y --no-install-recommends", seen)
            self.assertIn("nothing was installed", seen)
            self.assertFalse(os.path.exists(self.calls))
            self.assertEqual(os.listdir(self.home), [])

    def test_yes_installs_and_goes_on(self) -> None:
        """The stand-in for apt-get puts the real programs in place."""
        write(
            self.bin + "/apt-get",
            '#!/bin/sh\n[ "$1" = update ] || for p in %s; do /bin/ln -sf $p %s/; done\n'
            % (" ".join(map(require, ("rsync", "ssh", "ssh-keygen"))), self.bin),
            0o755,
        )
        status, seen = self.answer("y", "init", "--source", self.lab.source)
        self.assertEqual(status, 0, seen)
        self.assertIn("ssh-ed25519 ", seen)
        self.assertTrue(os.path.exists(self.home + "/.offsync/id_ed25519"))

    def test_without_a_terminal_the_error_names_install_deps(self) -> None:
        for args, role in ((["init"], "controller"), (["link"], "target")):
            done = self.lab.offsync(*args, env=self.env, check=1)
            self.assertIn("\n    offsync install-deps --role %s -y\n" % role, done.err)
            self.assertFalse(os.path.exists(self.calls))

    def test_the_word_of_the_option(self) -> None:
        self.run_deps("--role", "controller", "--yes", check=0)
        self.assertEqual(len(read(self.calls).splitlines()), 3)

    def test_a_package_manager_that_does_not_start(self) -> None:
        write(self.bin + "/apt-get", "#!/nowhere/python\n", 0o755)
        done = self.run_deps("--role", "controller", "--yes", check=1)
        self.assertRegex(done.err, "apt-get: cannot be started|still missing: ")
        self.assertNotIn("offsync install-deps", done.err)

    def test_a_program_whose_words_hold_a_percent_sign(self) -> None:
        odd = self.bin + "/100%x"
        write(odd, "#!/bin/sh\necho 100% broken >&2; exit 3\n", 0o755)
        done = self.lab.offsync("manifest", self.lab.source, env={"OFFSYNC_RSYNC": odd})
        self.assert_refused(done, 1, "100%x is a program that fails: 100% broken", "3.1.2 or newer")

    def test_a_variable_that_names_no_program(self) -> None:
        env = {"OFFSYNC_RSYNC": "/nowhere/rsync"}
        for args in (["init", "--source", self.lab.source], ["plan"]):
            if args == ["plan"]:
                self.lab.configured_target("one")
            done = self.lab.offsync(*args, env=env)
            self.assert_refused(done, 1, "OFFSYNC_RSYNC names, is no program", "unset it")
            self.assertNotIn("install-deps", done.err)


for name in list(vars(InstallDeps)):
    if name.startswith("test_"):
        setattr(Asking, name, None)


if __name__ == "__main__":
    unittest.main()
