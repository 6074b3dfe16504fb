# SPDX-License-Identifier: Apache-2.0
"""What a release consists of besides code agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from loracache import __version__

ROOT = Path(__file__).parents[2]


def test_the_version_is_told_by_the_command_and_is_the_packages() -> None:
    command = [sys.executable, "-m", "loracache", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"loracache {__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_the_changelog_has_what_is_to_come_and_the_version_that_is() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[?([^\]\n]+)\]?", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert __version__ in headings or f"this is what {__version__} will be" in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
