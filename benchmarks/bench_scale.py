# SPDX-License-Identifier: Apache-2.0
"""What an operation costs with 1,000 and with 200,000 objects held, and how soon a daemon with 200,000 on disk answers.

Two daemons run side by side and take turns. Objects are small (1 KiB, one page of 4 KiB), so that bookkeeping is all
there is to measure; requests carry 100 keys, and times are per object, over the socket.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import MIB, Daemon, Row, aligned_buffer, commit_objects, daemon, free_room, row, seconds, work_folder

from loracache import CacheClient
from loracache.keys import checksum
from loracache.storage_backends.base import Kind, ObjectInfo, Transfer
from loracache.storage_backends.disk.backend import DiskBackend

PAGE, PAYLOAD = 4096, 1024
FEW, MANY = 1_000, 200_000
CHAIN, BATCH = 500, 100
SPARE = 1_000  # pages beyond the objects held, so that admitting needs no eviction until it is meant to
GROWTH = 2.0  # 200 times the objects may cost what leaving the processor's caches costs, and no more
START_S = 1.0


def run(quick: bool) -> list[Row]:
    """See the module's docstring. Quick: 20,000 objects."""
    many, rounds = (MANY // 10, 50) if quick else (MANY, 300)
    with work_folder() as folder:
        return _operations(folder, many, rounds) + _starts(folder, many, 2 if quick else 5)


class Held:
    """A daemon that holds so many objects, in chains of 500."""

    def __init__(self, running: Daemon, count: int) -> None:
        self.client: CacheClient = running.client()
        self._payload = aligned_buffer(PAGE)[:PAYLOAD]
        self.chains = [[os.urandom(32) for _ in range(CHAIN)] for _ in range(count // CHAIN)]
        for chain in self.chains:
            commit_objects(self.client, chain, self._payload)()

    def lookup(self) -> float:
        """Seconds to look up the beginning of some chain, per key."""
        keys = random.choice(self.chains)[:BATCH]
        spent = seconds(lambda: self.client.lookup(keys)) / BATCH
        assert self.client.lookup(keys).hits == BATCH
        return spent

    def admit(self) -> tuple[float, list[bytes]]:
        """Seconds to reserve, write and commit new objects, per object; and their keys."""
        keys = [os.urandom(32) for _ in range(BATCH)]
        started = time.perf_counter()
        commit_objects(self.client, keys, self._payload)()
        return (time.perf_counter() - started) / BATCH, keys

    def evict(self, keys: Sequence[bytes]) -> float:
        """Seconds to evict objects, per object."""
        started = time.perf_counter()
        objects = self.client.evict(keys).objects
        spent = (time.perf_counter() - started) / BATCH
        assert objects == BATCH
        return spent

    def fill(self) -> None:
        """Use up the spare room: from now on every admission evicts."""
        for _ in range(2 * SPARE // BATCH):
            self.admit()


def _operations(folder: Path, many: int, rounds: int) -> list[Row]:
    counts = (FEW, many)
    times: dict[tuple[str, int], list[float]] = {}

    def note(operation: str, count: int, spent: float) -> None:
        times.setdefault((operation, count), []).append(spent * 1e6)

    with (
        daemon(folder, memory=(FEW + SPARE) * PAGE, page_size=PAGE) as small,
        daemon(folder, memory=(many + SPARE) * PAGE, page_size=PAGE) as large,
    ):
        held = {count: Held(running, count) for count, running in zip(counts, (small, large), strict=True)}
        for number in range(-5, rounds):
            for count in counts if number % 2 else reversed(counts):
                spent, keys = held[count].admit()
                if number >= 0:
                    note("admit (reserve, write, commit)", count, spent)
                    note("lookup", count, held[count].lookup())
                    note("evict by key", count, held[count].evict(keys))
                else:
                    held[count].evict(keys)
        for each in held.values():
            each.fill()
        for number in range(rounds):
            for count in counts if number % 2 else reversed(counts):
                note("admit into a full arena (evicts one)", count, held[count].admit()[0])
        for each in held.values():
            each.client.close()
    return list(_growth(times, many))


def _growth(times: dict[tuple[str, int], list[float]], many: int) -> Iterator[Row]:
    for operation in dict.fromkeys(name for name, _ in times):
        few, lots = times[operation, FEW], times[operation, many]
        ratios = [b / a for a, b in zip(few, lots, strict=True)]
        yield row(f"{operation}: {many:,} held / {FEW:,} held", "x", ratios, at_most=GROWTH)
        yield row(f"  {operation}, {FEW:,} held", "us", few)
        yield row(f"  {operation}, {many:,} held", "us", lots)


def _starts(folder: Path, count: int, times: int) -> list[Row]:
    disk = folder / "disk"
    free_room(folder, count * 3 * PAGE + 256 * MIB)
    _fill_disk(disk, count)
    answered, indexed, longest = [], [], []
    for _ in range(times):
        started = time.perf_counter()
        running = Daemon(folder, memory="64MiB", page_size=PAGE, disk_path=disk, disk="4GiB")
        try:
            with running.client() as client:
                client.status()
                answered.append(time.perf_counter() - started)
                longest.append(_wait_scanned(client, count))
                indexed.append(time.perf_counter() - started)
        finally:
            running.stop()
    note = "the kernel's caches of the folder are warm"
    return [
        row(f"start to the first answer, {count:,} objects on disk", "s", answered, at_most=START_S, note=note),
        row(f"start to all {count:,} objects indexed and checked", "s", indexed, note=note),
        row("  longest answer meanwhile", "ms", longest),
    ]


def _wait_scanned(client: CacheClient, count: int) -> float:
    """Wait until the daemon knows all its objects; answers its longest answer meanwhile in milliseconds."""
    longest = 0.0
    while True:
        started = time.perf_counter()
        tiers = client.status()["tiers"]
        longest = max(longest, time.perf_counter() - started)
        assert isinstance(tiers, dict)
        if tiers["disk"]["scanned"]:
            if tiers["disk"]["objects"] != count:
                raise RuntimeError(f"the daemon found {tiers['disk']['objects']} of {count} objects")
            return longest * 1e3
        time.sleep(0.005)


def _fill_disk(disk: Path, count: int) -> None:
    payload = aligned_buffer(PAGE)
    total = checksum([payload[:PAYLOAD]])
    backend = DiskBackend(disk)
    for _ in range(count // CHAIN):
        keys = [os.urandom(32) for _ in range(CHAIN)]
        infos = [
            ObjectInfo(key, parent, Kind.KV, bytes(32), PAYLOAD, total)
            for key, parent in zip(keys, [b"", *keys[:-1]], strict=True)
        ]
        backend.store([Transfer(info, [payload]) for info in infos])
    backend.close()
