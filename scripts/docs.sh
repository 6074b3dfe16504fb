#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the documentation into site/ and check it. Its tools live in .venv-docs, made from requirements/docs.lock: building
# it needs neither torch nor vLLM, nor loracache installed (the API reference is read from the source).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-docs
stamp=$venv/.setup-stamp
lock=requirements/docs.lock
wanted=$({ pwd -P; cat "$lock"; } | sha256sum | cut -d' ' -f1)

if [[ ! -x $venv/bin/python || ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
    echo "Making $venv from $lock"
    python=$(scripts/python.sh)
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps -r "$lock"
    echo "$wanted" >"$stamp"
fi

# The variable silences the theme's advertisement of its successor. Colours are for terminals.
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" --quiet build --strict --clean
"$venv/bin/python" scripts/check_site.py site
echo "Ready: site/index.html"
