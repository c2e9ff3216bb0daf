#!/bin/sh
# Install the offsync.py beside this script as PREFIX/bin/offsync (atomic, repeatable), with its man page
# (that of a release beside this script, or made by a checkout) and its words for bash-completion below
# PREFIX/share; or remove all of it again.
#
#   ./install.sh [--uninstall]
#
#
# PREFIX   default /usr/local for root, else ~/.local
# DESTDIR  put in front of PREFIX, for packaging
# An offsync.py.sha256 beside offsync.py is verified first.
set -eu

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

digest() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum <"$1" | cut -d ' ' -f 1
    elif command -v shasum >/dev/null 2>&1; then
        shasum -a 256 <"$1" | cut -d ' ' -f 1
    else
        python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
    fi
}

check_python() {
    command -v python3 >/dev/null 2>&1 ||
        fail "python3 is missing: offsync needs Python 3.9 or newer; install it first"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        fail "$(python3 --version 2>&1) is too old: offsync needs Python 3.9 or newer; install a newer python3"
}

check_sum() {
    [ -f "$1.sha256" ] || return 0
    expected=$(cut -d ' ' -f 1 <"$1.sha256")
    [ "$(digest "$1")" = "$expected" ] ||
        fail "$1 does not match $1.sha256: nothing was installed; fetch both again"
}

install_man() {
    mkdir -p -- "$manual" || return 1
    if [ -f "$here/offsync.1" ]; then
        cp -- "$here/offsync.1" "$manual/offsync.1" || return 1
    else
        python3 "$here/tests/dist.py" --man >"$manual/offsync.1" || return 1
    fi
    chmod 644 "$manual/offsync.1"
}

install_completion() {
    mkdir -p -- "$words" && python3 "$directory/offsync" completion bash >"$words/offsync" && chmod 644 "$words/offsync"
}

hint_path() {
    case ":$PATH:" in
    *":$1:"*) ;;
    *) printf 'install.sh: %s is not in your PATH; add it: PATH="%s:%s"\n' "$1" "$1" "\$PATH" >&2 ;;
    esac
}

main() {
    here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
    if [ -z "${PREFIX-}" ]; then
        if [ "$(id -u)" -eq 0 ]; then PREFIX=/usr/local; else PREFIX=${HOME:?HOME is not set; set PREFIX}/.local; fi
    fi
    case $PREFIX in /*) ;; *) fail "PREFIX $PREFIX is not absolute; name a directory from / on" ;; esac
    directory=${DESTDIR-}$PREFIX/bin
    manual=${DESTDIR-}$PREFIX/share/man/man1
    words=${DESTDIR-}$PREFIX/share/bash-completion/completions
    case ${1-} in
    --uninstall)
        if [ ! -e "$directory/offsync" ]; then
            printf '%s is not there; nothing to remove\n' "$directory/offsync"
            return 0
        fi
        rm -f -- "$directory/offsync" "$manual/offsync.1" "$words/offsync" || fail "$directory/offsync cannot be removed; run this as its owner"
        printf 'removed %s\n' "$directory/offsync"
        return 0
        ;;
    -h | --help)
        printf 'usage: [PREFIX=DIR] [DESTDIR=DIR] install.sh [--uninstall]\n'
        return 0
        ;;
    '') ;;
    *) fail "unknown argument $1; usage: install.sh [--uninstall]" ;;
    esac
    [ -f "$here/offsync.py" ] || fail "$here/offsync.py is missing; put it beside this script"
    check_python
    check_sum "$here/offsync.py"
    mkdir -p -- "$directory" 2>/dev/null || fail "$directory cannot be created; choose another PREFIX, or run this as root"
    temporary=$directory/.offsync.$$
    trap 'rm -f -- "$temporary"' EXIT
    trap 'exit 1' HUP INT TERM
    if ! cp -- "$here/offsync.py" "$temporary" || ! chmod 755 "$temporary" || ! mv -f -- "$temporary" "$directory/offsync"; then
        fail "$directory/offsync cannot be written; choose another PREFIX, or run this as root"
    fi
    if [ -f "$here/offsync.1" ] || [ -f "$here/tests/dist.py" ]; then
        install_man || fail "$manual/offsync.1 cannot be written; choose another PREFIX, or run this as root (offsync itself is installed)"
    fi
    install_completion || fail "$words/offsync cannot be written; choose another PREFIX, or run this as root (offsync itself is installed)"
    printf '%s\nsha256 %s\n' "$directory/offsync" "$(digest "$directory/offsync")"
    [ -n "${DESTDIR-}" ] || hint_path "$directory"
}

main "$@"
