#!/usr/bin/env bash
# test.sh fast: tests/unit and tests/contract. test.sh all: everything, in stages; the first stage that fails ends the run,
# so that pytest's closing line is always the last line and tells the outcome.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The Redis tests talk to a real server, by TLS too. Skipping them where it is missing would pass for a success.
need_redis() {
    command -v redis-server >/dev/null && command -v openssl >/dev/null && return
    local sudo=
    if [[ $(id -u) != 0 ]]; then
        sudo='sudo -n'
    fi
    if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
        echo 'Installing redis-server and openssl, which the Redis tests run against'
        if $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
            --no-install-recommends redis-server openssl >/dev/null; then
            return
        fi
    fi
    echo 'The tests need redis-server and openssl on PATH, and they could not be installed from here. Install these packages.' >&2
    exit 1
}

# A folder with no tests yet is no failure (pytest says 5).
stage() {
    local status=0
    echo "== $1"
    .venv/bin/pytest "${@:2}" || status=$?
    [[ $status == 5 ]] && status=0
    return "$status"
}

# A file stays in one process: its tests may share what is dear to make.
side_by_side=(--numprocesses auto --maxprocesses 4 --dist loadfile)

need_redis
case ${1:-} in
fast)
    stage 'fast tests' "${side_by_side[@]}" tests/unit tests/contract
    ;;
all)
    stage 'fast tests' "${side_by_side[@]}" tests/unit tests/contract
    stage 'stress tests' tests/stress
    stage 'end to end, with a real vLLM (minutes)' tests/e2e
    ;;
*)
    echo 'usage: test.sh fast | all' >&2
    exit 2
    ;;
esac
