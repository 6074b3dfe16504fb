# SPDX-License-Identifier: Apache-2.0
"""Every source file of ours says its licence in its first line; in a script that is the line after #!."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TAG = "SPDX-License-Identifier: Apache-2.0"
LINES = {".py": f"# {TAG}", ".sh": f"# {TAG}", ".cu": f"// {TAG}", ".cuh": f"// {TAG}", ".js": f"// {TAG}"}
LINES |= {".css": f"/* {TAG} */", "": f"# {TAG}"}
NOT_OURS = {"build", "dist", "site", "__pycache__", "swagger_ui"}


def sources() -> Iterator[Path]:
    """Each file once: symlinks are not followed, and what starts with a dot is a tool's, but for .ci."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [each for each in folders if each not in NOT_OURS and (each == ".ci" or each[0] != ".")]
        for path in (Path(folder, name) for name in names):
            script = path.suffix == "" and path.is_file() and path.read_bytes()[:2] == b"#!"
            if not path.is_symlink() and (script or path.suffix in LINES.keys() - {""}):
                yield path


def test_every_source_file_says_its_licence_first() -> None:
    seen, missing = set(), []
    for path in sources():
        lines = path.read_text().splitlines()
        first = lines[1:2] if lines and lines[0].startswith("#!") else lines[:1]
        seen.add(path.suffix)
        if first != [LINES[path.suffix]]:
            missing.append(str(path.relative_to(ROOT)))
    assert {".py", ".sh", ".js", ".css", ""} <= seen
    assert not missing, f"no SPDX line: {missing}"
