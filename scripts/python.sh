#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Print a Python that can be used here: $PYTHON, or the first of ours that runs.
set -euo pipefail

# A name on PATH proves nothing (a version manager leaves one behind for every version it knew): run it.
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            package=$("$candidate" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')
            echo "$candidate has no venv module (Debian, Ubuntu: apt-get install $package)" >&2
            exit 1
        fi
        echo "$candidate"
        exit 0
    fi
done
echo "needs Python 3.11, 3.12 or 3.13 (3.11 is what the lock was made with); none was found." \
    "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
exit 1
