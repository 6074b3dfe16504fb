"""What a release consists of besides code agrees with the code."""

from __future__ import annotations

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
