#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test.sh fast: tests/unit and tests/contract. test.sh all: everything, in stages; the first stage that fails ends the run,
# so that pytest's closing line is always the last line and tells the outcome. test.sh lowest [TEST...]: what of the fast
# tests needs neither vLLM nor torch, in the environment that test_lowest.sh makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# get WHO PACKAGE...: installs what WHO needs, where that is possible without asking; else it says so, and all ends.
get() {
    local who=$1 sudo=
    shift
    if [[ $(id -u) != 0 ]]; then
        sudo='sudo -n'
    fi
    if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
        echo "Installing $*, which $who run against"
        if $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
            --no-install-recommends "$@" >/dev/null; then
            return
        fi
    fi
    echo "$who need $*, which could not be installed from here. Install what has that name on this machine." >&2
    exit 1
}

# The Redis tests talk to a real server, by TLS too. Skipping them where it is missing would pass for a success.
need_redis() {
    if ! command -v redis-server >/dev/null || ! command -v openssl >/dev/null; then
        get 'The Redis tests' redis-server openssl
    fi
}

# And the dashboard's to a real browser.
need_chromium() {
    if ! command -v chromedriver >/dev/null || ! { command -v chromium || command -v google-chrome; } >/dev/null; then
        get "The dashboard's tests" chromium chromium-driver
    fi
}

# What the documents show is run.
need_tools() {
    if ! command -v jq >/dev/null || ! command -v curl >/dev/null; then
        get "The documents' commands" jq curl
    fi
}

# A folder with no tests yet is no failure (pytest says 5).
stage() {
    local status=0
    echo "== $1"
    "${VENV:-.venv}/bin/pytest" "${@:2}" || status=$?
    [[ $status == 5 ]] && status=0
    return "$status"
}

# Containers often forbid Python to keep what it has compiled. Then every process that a test starts compiles us anew, which
# is a third of what a daemon takes to start, and every worker compiles all tests.
unset PYTHONDONTWRITEBYTECODE

# A file stays in one process: its tests may share what is dear to make. Files come in their order, which ends with quick
# ones: by how many tests they have, the two that compile kernels would come last, for half a minute and on one core.
side_by_side=(--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)

need_redis
need_chromium
need_tools
case ${1:-} in
fast)
    stage 'fast tests' "${side_by_side[@]}" tests/unit tests/contract
    ;;
all)
    stage 'fast tests' "${side_by_side[@]}" tests/unit tests/contract
    stage 'stress tests' tests/stress
    stage 'end to end, with a real vLLM (minutes)' tests/e2e
    ;;
lowest)
    tests=("${@:2}")
    if [[ ${#tests[@]} == 0 ]]; then
        tests=(tests/unit tests/contract --ignore=tests/unit/connector --ignore=tests/unit/kernels)
    fi
    # What old versions warn of is theirs: they and what they depend on are years apart.
    stage 'fast tests, lowest versions' "${side_by_side[@]}" -W ignore::DeprecationWarning \
        -W ignore::PendingDeprecationWarning "${tests[@]}"
    ;;
*)
    echo 'usage: test.sh fast | all | lowest [TEST...]' >&2
    exit 2
    ;;
esac
