# SPDX-License-Identifier: Apache-2.0
"""The promise of a flush: what it says is durable is found again, byte by byte, however the daemon ended; what is
not, it says. The disks are real: full, slower than their writers, smaller than what is stored.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Flushed, Namespace, Unavailable

NAMESPACE = Namespace("model", "float32", "layout", 16)
SIZE = 60_000  # 15 pages of 4 KiB


def store(client: CacheClient, count: int, size: int = SIZE) -> dict[bytes, bytes]:
    """Objects of their own chains, one after another; those that found no room are not answered."""
    root = client.register(NAMESPACE)
    stored = {}
    for _ in range(count):
        key, payload = os.urandom(32), os.urandom(size)
        with client.reserve(root, [key], [size], parents=[b""]) as reservation:
            if reservation.slots[0] is not None:
                reservation.write(0, payload)
        if reservation.causes == [""]:
            stored[key] = payload
    return stored


def found_after_a_kill(running: Any, again: Callable[[], Any], stored: dict[bytes, bytes], eventually: Any) -> int:
    """How many of `stored` a daemon finds that is started after this one was killed; all of them whole."""
    running.stop(signal.SIGKILL)
    fresh = again()
    eventually(lambda: fresh.status()["tiers"]["disk"]["scanned"], "the disk is read")
    client = fresh.client()
    found = {key: client.get(key) for key in stored}
    assert {key: data for key, data in found.items() if data is not None}.items() <= stored.items()
    return sum(data is not None for data in found.values())


def test_of_a_full_disk_what_is_reported_durable_survives_a_kill(
    daemon: Any, file_system: Callable[[int], Path], eventually: Any
) -> None:
    disk = file_system(8) / "disk"
    running = daemon(memory="32MiB", page_size="4KiB", disk_path=disk, disk="64MiB")
    client = running.client()
    stored = store(client, 200)
    flushed = client.flush(30)
    assert not flushed.complete
    assert flushed.durable["disk"] + flushed.given_up["disk"] == len(stored) == 200
    assert 80 <= flushed.durable["disk"] <= 140
    assert client.flush() == Flushed({"disk": 0}, {"disk": 0})  # it was said already

    def again() -> Any:
        return daemon(memory="32MiB", page_size="4KiB", disk_path=disk, disk="64MiB")

    assert found_after_a_kill(running, again, stored, eventually) == flushed.durable["disk"]


@pytest.mark.parametrize("durable", [True, False])
def test_of_more_than_the_arena_holds_a_patient_writer_loses_nothing_and_another_is_told(
    daemon: Any, tmp_path: Path, eventually: Any, durable: bool
) -> None:
    options = {
        "memory": "1MiB",
        "page_size": "4KiB",
        "disk_path": tmp_path / "disk",
        "disk_sync": True,
    }
    running = daemon(**options)
    client = running.client(durable=durable, timeout=60.0)
    stored = store(client, 300)
    assert len(stored) == 300
    flushed = client.flush(60)
    assert flushed.durable["disk"] + flushed.given_up["disk"] == 300
    assert flushed.complete == durable
    assert found_after_a_kill(running, lambda: daemon(**options), stored, eventually) == flushed.durable["disk"]


def test_what_does_not_fit_on_the_disk_is_given_up_though_it_was_written(
    daemon: Any, tmp_path: Path, eventually: Any
) -> None:
    options = {"memory": "16MiB", "page_size": "4KiB", "disk_path": tmp_path / "disk", "disk": "3MiB"}
    running = daemon(**options)
    client = running.client(durable=True)
    stored = store(client, 100)
    flushed = client.flush(30)
    assert (flushed.durable["disk"] + flushed.given_up["disk"], flushed.durable["disk"]) == (100, 48)
    assert found_after_a_kill(running, lambda: daemon(**options), stored, eventually) == 48


def test_nobody_is_told_that_lost_objects_are_durable_after_a_restart(daemon: Any, short_tmp: Path) -> None:
    options = {"socket": short_tmp / "lc.sock"}
    running = daemon(**options)
    client = running.client()
    store(client, 1)
    running.stop(signal.SIGKILL)
    daemon(**options)
    with pytest.raises(Unavailable, match="started anew since objects were committed"):
        client.flush()
    assert client.flush() == Flushed({}, {})


def test_a_durable_writer_needs_a_tier_to_write_to(daemon: Any) -> None:
    client = daemon().client(durable=True)
    with pytest.raises(Exception, match="nothing is durable without a tier below memory"):
        store(client, 1)


def test_the_command_says_the_numbers_and_ends_with_4_where_something_was_given_up(
    daemon: Any, file_system: Callable[[int], Path]
) -> None:
    running = daemon(memory="32MiB", page_size="4KiB", disk_path=file_system(8) / "disk", disk="64MiB")
    store(running.client(), 200)

    def flush() -> tuple[int, str]:
        command = [sys.executable, "-m", "loracache", "flush", "--socket", str(running.socket)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.stderr == ""
        return done.returncode, done.stdout

    code, said = flush()
    words = said.split()
    assert (code, words[0], int(words[1]) + int(words[4])) == (4, "disk:", 200)
    assert flush() == (0, "disk: 0 objects durable, 0 given up since the last flush\n")
