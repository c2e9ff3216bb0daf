"""The whole job on one machine with nothing configured: throw-away sshd on loopback, scratch
homes, nothing left behind.
"""

from __future__ import annotations

import os
import shlex
import sys

from lab import Lab, risk, write


def say(text: str) -> None:
    """Print a heading."""
    print("\n# " + text, flush=True)


def show(lab: Lab, *args: str, home: str = "", status: int = 0, input=None) -> str:
    """Print a command, run it, print its real output; return its stdout."""
    print("\n$ " + shlex.join(("offsync", *args)).replace(lab.base, "/demo"), flush=True)
    done = lab.offsync(*args, home=home or None, input=input)
    output = (done.err, done.out) if args[0] in ("init", "link") else (done.out, done.err)
    sys.stdout.write("".join(output).replace(lab.base, "/demo"))
    print("[exit %d]" % done.returncode, flush=True)
    if done.returncode != status:
        raise SystemExit("demo: exit status %d was expected" % status)
    return done.out


def main() -> None:
    """Run the demonstration."""
    lab = Lab()
    try:
        say("On the controller: a key pair, and the directory to deliver.")
        write(lab.source + "/app.conf", "colour = green\n")
        write(lab.source + "/bin/start", "#!/bin/sh\necho started\n", 0o755)
        os.symlink("app.conf", lab.source + "/current.conf")
        key = show(lab, "init", "--source", lab.source)
        for name in ("web1", "web2"):
            target = lab.target(name)
            say(
                "On target %s: the key may write below one path. (Its throw-away sshd listens on %s"
                " port %d; its home is scratch, hence the warning.)"
                % (name, target.address, target.port)
            )
            if risk():
                say(
                    "(This host's rrsync lets a key out of its directory; that is accepted for this"
                    " scratch directory.)"
                )
            show(
                lab, "link", "--path", target.path, "--key", key.strip(), *risk(), home=target.home
            )
            say(
                "On the controller: prove host key and restriction, then save. (The throw-away sshd"
                " has a host key of its own.)"
            )
            show(
                lab,
                "target",
                "add",
                target.login,
                "--path",
                target.path,
                "--port",
                str(target.port),
                "--host-key",
                target.fingerprint,
            )
        one = lab.targets[0]
        say("What would be sent?")
        show(lab, "plan")
        say("Send it, verify it, log it.")
        show(lab, "apply")
        say(
            "A drift: somebody edits a delivered file on %s, keeping its size, and drops another"
            " beside it." % one.login
        )
        write(one.path + "/app.conf", "colour = wrong\n"[:15])
        write(one.path + "/notes.txt", "mine\n")
        show(lab, "verify", status=3)
        say(
            "apply refuses: the extra file would have to be deleted, and the config does not allow"
            " that."
        )
        show(lab, "apply", status=1)
        say("Somebody takes the extra file away; apply repairs the rest, verify is silent.")
        os.unlink(one.path + "/notes.txt")
        show(lab, "apply")
        show(lab, "verify")
        say("What can the key do there?")
        show(lab, "doctor", one.login)
    finally:
        lab.close()
    say("Done; everything that the demo made is gone.")


if __name__ == "__main__":
    from run import ensure_programs

    ensure_programs(sys.argv[1:])
    main()
