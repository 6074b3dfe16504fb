#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test_lowest.sh [TEST...]: the fast tests (all, or these) with the lowest version of each dependency that pyproject.toml
# declares, in .venv-lowest. What those depend on is the newest that fits them. Without vLLM and torch, and what tests them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-lowest
python=$(scripts/python.sh)
constraints=$("$python" scripts/lowest.py)
stamp=$({ pwd -P; echo "$constraints"; } | sha256sum)
if [[ ! -f $venv/.stamp || $(cat "$venv/.stamp") != "$stamp" ]]; then
    echo "Installing into $venv:" $constraints
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check --constraint <(echo "$constraints") -e '.[otel,dev]'
    echo "$stamp" >"$venv/.stamp"
fi
VENV=$venv exec scripts/test.sh lowest "$@"
