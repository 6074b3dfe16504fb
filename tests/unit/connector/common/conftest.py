# SPDX-License-Identifier: Apache-2.0
"""Where private daemons live in a test, and which run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def home(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private daemons live."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
    for name in [name for name in os.environ if name.startswith("LORACACHE_")]:
        monkeypatch.delenv(name)
    return short_tmp


@pytest.fixture
def processes(home: Path) -> Iterator[Callable[[], list[int]]]:
    """Daemons whose socket lies in `home`; whatever still runs at the end is killed."""

    def running() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
                zombie = " Z " in (folder / "stat").read_text()
                if b"serve" in arguments and any(each.startswith(bytes(home)) for each in arguments) and not zombie:
                    found.append(int(folder.name))
        return found

    yield running
    for pid in running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
