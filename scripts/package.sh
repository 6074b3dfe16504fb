#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the wheel and the sdist of what git tracks into dist/. Then install each with its dependencies (at the versions of
# requirements/dev.lock) into a virtual environment of its own, and use it from outside the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(scripts/python.sh)
here=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

environment() { # NAME PACKAGE...: a virtual environment with these
    "$python" -m venv "$work/$1"
    "$work/$1/bin/pip" install -qq --disable-pip-version-check --constraint "$here/requirements/dev.lock" "${@:2}"
}

mkdir "$work/source"
git ls-files -z | tar --create --null --files-from=- | tar --extract --directory="$work/source"
environment build setuptools wheel
rm -rf dist
(cd "$work/source" && "$work/build/bin/python" -c \
    "from setuptools import build_meta as b; b.build_sdist('$here/dist'); b.build_wheel('$here/dist')" >/dev/null)

cd "$work"
for package in "$here"/dist/*; do
    name=$(basename "$package")
    echo "Installing $name"
    environment "$name" "$package"
    "$name/bin/loracache" --version
    "$name/bin/python" -I -c \
        'import loracache.client, loracache.config, loracache.connectors, loracache.kernels, loracache.storage_backends.base'
done
