# SPDX-License-Identifier: Apache-2.0
"""The disk under a daemon: restarted, killed, damaged, full. What is found is byte-exact, all else a counted miss."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace

NAMESPACE = Namespace("model", "float32", "layout", 16)
SIZE = 100_000


def store(client: CacheClient, count: int, size: int = SIZE) -> dict[bytes, bytes]:
    """A chain."""
    root = client.register(NAMESPACE)
    payloads = {os.urandom(32): os.urandom(size) for _ in range(count)}
    with client.reserve(root, list(payloads), [size] * count) as reservation:
        for position, payload in enumerate(payloads.values()):
            reservation.write(position, payload)
    assert reservation.causes == [""] * count
    return payloads


def scanned(running: Any) -> bool:
    return bool(running.status()["tiers"]["disk"]["scanned"])


def files(disk: Path) -> dict[str, Path]:
    return {path.name: path for path in (disk / "objects").glob("*/*")}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def restart(daemon: Any, disk: Path, eventually: Callable[..., Any]) -> Callable[..., Any]:
    """restart(before) ends a daemon in order, and starts another on the same disk that has read it."""

    def start(before: Any = None, **options: Any) -> Any:
        if before is not None and before.process.poll() is None:
            assert before.stop() == 0
        running = daemon(**({"memory": "16MiB", "disk_path": disk, "disk": "64MiB"} | options))
        eventually(lambda: scanned(running), "the disk is read")
        return running

    return start


def test_a_restart_finds_everything_in_its_chains(restart: Callable[..., Any]) -> None:
    first = restart()
    payloads = store(first.client(), 40)
    root = first.client().register(NAMESPACE)
    second = restart(first)  # drains: nothing was flushed before
    client = second.client()
    keys = list(payloads)
    assert client.lookup(keys).tiers == ("disk",) * 40
    assert {key: client.get(key) for key in keys} == payloads
    assert second.status()["counters"]["load.disk.objects"] == 40
    with client.reserve(root, [os.urandom(32)], [SIZE], parents=[keys[-1]]) as reservation:  # known namespace and chain
        pass
    assert reservation.causes == [""]


@pytest.mark.parametrize("manifest", ["lost", "torn", "garbage"])
def test_a_manifest_that_is_lost_or_damaged_costs_time_and_no_object(
    restart: Callable[..., Any], disk: Path, manifest: str
) -> None:
    first = restart()
    payloads = store(first.client(), 30)
    first.stop()
    file = disk / "manifest"
    if manifest == "lost":
        file.unlink()
    else:
        raw = file.read_bytes()
        file.write_bytes(raw[: len(raw) // 2 + 7] if manifest == "torn" else os.urandom(5000))
    client = restart().client()
    assert client.lookup(list(payloads)).hits == 30
    assert {key: client.get(key) for key in payloads} == payloads


STORE_FOR_EVER = """
number = 0
while True:
    keys = chunk_keys(root, [number] * 64, 16)
    with client.reserve(root, keys, [65536] * 4) as reservation:
        for position, key in enumerate(keys):
            if reservation.slots[position]:
                reservation.write(position, key * 2048)
    if number == 50:
        say("going")
    number += 1
"""


def test_a_daemon_killed_in_the_middle_of_writing_has_only_whole_objects_afterwards(
    restart: Callable[..., Any], client_process: Any, disk: Path, eventually: Callable[..., Any]
) -> None:
    first = restart()
    writer = client_process(first.url, STORE_FOR_EVER)
    assert writer.line() == "going"
    eventually(lambda: first.status()["tiers"]["disk"]["objects"] > 100, "writing goes on")
    first.stop(signal.SIGKILL)
    writer.kill()
    second = restart()
    client = second.client()
    names = list(files(disk))
    assert len(names) > 100
    assert second.status()["tiers"]["disk"]["objects"] == len(names)
    for name in names:
        assert client.get(bytes.fromhex(name)) == bytes.fromhex(name) * 2048
    assert second.status()["failures"] == {}
    assert list((disk / "tmp").iterdir()) == []


@pytest.mark.parametrize("when", ["running", "restarted"])
def test_damaged_files_are_counted_misses_and_their_neighbours_are_served(
    restart: Callable[..., Any], disk: Path, when: str
) -> None:
    running = restart()
    client = running.client()
    payloads = store(client, 12)
    client.flush()
    keys = list(payloads)
    client.clear(tiers=["cpu"])
    if when == "restarted":
        running.stop()
    truncated, flipped, header, swapped, with_that, gone = (files(disk)[key.hex()] for key in keys[1:12:2])
    os.truncate(truncated, SIZE // 2)
    flip(flipped, 4096 + SIZE // 2)
    flip(header, 40)
    aside = swapped.rename(disk / "aside")
    with_that.rename(swapped)
    aside.rename(with_that)
    gone.unlink()
    if when == "restarted":
        running = restart()
        client = running.client()
    for at, key in enumerate(keys):
        assert client.get(key) == (None if at % 2 else payloads[key])
    failures = running.status()["failures"]
    assert failures["disk.corrupt"] >= (5 if when == "running" else 4)  # a wrong size is seen at start already
    if when == "running":
        assert failures["disk.miss"] == 1
    assert client.lookup(keys).hits == 1
    again = dict.fromkeys(keys[1:], b"x" * SIZE)
    root = client.register(NAMESPACE)
    with client.reserve(root, keys[1:], [SIZE] * 11, parents=keys[:-1]) as reservation:
        for at, cause in enumerate(reservation.causes):
            assert cause == ("" if at % 2 == 0 else "exists")
            if not cause:
                reservation.write(at, again[keys[at + 1]])
    assert client.lookup(keys).hits == 12


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_full_disk_is_counted_and_the_cache_goes_on(daemon: Any, file_system: Callable[[int], Path]) -> None:
    running = daemon(memory="32MiB", disk_path=file_system(8) / "disk", disk="64MiB")
    client = running.client()
    payloads = store(client, 150)
    client.flush()
    status = running.status()
    assert status["failures"]["disk.full"] >= 1
    written = status["tiers"]["disk"]["objects"]
    assert 40 <= written <= 80
    assert {key: client.get(key) for key in payloads} == payloads
    client.clear(tiers=["cpu"])
    keys = list(payloads)
    assert client.lookup(keys).hits == written
    assert [client.get(key) for key in keys[:written]] == [payloads[key] for key in keys[:written]]
    client.evict(keys)
    more = store(client, 10)
    client.flush()
    client.clear(tiers=["cpu"])
    assert {key: client.get(key) for key in more} == more


def test_the_disk_never_takes_more_than_its_limit(restart: Callable[..., Any], disk: Path) -> None:
    running = restart(disk="3MiB")
    client = running.client()
    seen = 0
    for _ in range(10):
        store(client, 15)
        client.flush()
        seen = max(seen, sum(path.stat().st_size for path in files(disk).values()))
    assert 2 << 20 <= seen <= 3 << 20
    assert running.status()["tiers"]["disk"]["used_bytes"] == sum(path.stat().st_size for path in files(disk).values())


def test_a_smaller_limit_shrinks_the_disk_at_the_next_start(restart: Callable[..., Any], disk: Path) -> None:
    first = restart()
    keys = list(store(first.client(), 40))
    second = restart(first, disk="1MiB")
    client = second.client()
    client.flush()
    held = client.lookup(keys).hits
    assert 5 <= held <= 10
    second.stop()
    assert set(files(disk)) == {key.hex() for key in keys[:held]}
