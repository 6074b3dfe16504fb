# SPDX-License-Identifier: Apache-2.0
"""What a private daemon removes at its end is its own, not that of the one after it."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from loracache.config import Config
from loracache.daemon import daemon
from loracache.daemon.listening import unlink_unless_locked


def test_its_files_are_removed_while_no_other_can_serve_its_socket(short_tmp: Path, monkeypatch: Any) -> None:
    socket = short_tmp / "private.sock"
    files = [Path(f"{socket}{suffix}") for suffix in (".start", ".log", ".settings")]
    for path in files:
        path.touch()

    def remove(start: Path, others: list[Path]) -> None:
        with open(f"{socket}.lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink_unless_locked(start, others)

    monkeypatch.setattr(daemon, "unlink_unless_locked", remove)
    monkeypatch.setattr(daemon, "_PRIVATE_PATIENCE_S", 0.01)
    try:
        asyncio.run(daemon.Daemon(Config(socket=socket, memory="16MiB", private=True)).run())  # type: ignore[arg-type]
    finally:
        gc.enable()  # a daemon has its process to itself
    assert list(short_tmp.iterdir()) == []
    assert not [each for each in threading.enumerate() if each.name == "last-resort"]  # it would end this process
