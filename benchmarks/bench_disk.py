# SPDX-License-Identifier: Apache-2.0
"""The disk tier against plain O_DIRECT pwritev and preadv of objects of the same size (4 MiB).

Twice: DiskBackend called directly, on one thread like the plain calls; and end to end through a daemon, where objects
are committed and flushed, evicted from L1 and acquired again, against plain calls on as many threads as the daemon uses
(one writes, two read). What the tier does beyond plain calls: a header, a checksum over every byte both ways, rename,
manifest. Plain calls write files of their own and read the tier's: where a file lies on a virtual disk decides how fast
it is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import (
    MIB,
    Daemon,
    Row,
    acquire_objects,
    aligned_buffer,
    commit_objects,
    daemon,
    free_room,
    interleaved,
    rates,
    ratio_row,
    row,
    seconds,
    work_folder,
)

from loracache.keys import checksum
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Result, Transfer
from loracache.storage_backends.disk.backend import DiskBackend

OBJECT_BYTES, OBJECTS = 4 * MIB, 31
HEADER_BYTES = 4096
NBYTES = OBJECT_BYTES * OBJECTS
TARGET = 0.8
DELETE_S = 0.2  # files are unlinked behind the evict, on the thread that writes; that is not what is timed


class PlainFiles:
    """What the tier is compared with: one O_DIRECT file an object, one call a file; read on so many threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        folder.mkdir()
        self._paths = [folder / str(number) for number in range(OBJECTS)]
        self._pool = ThreadPoolExecutor(threads)
        self._headers = [aligned_buffer(HEADER_BYTES) for _ in range(OBJECTS)]

    def write(self, buffers: Sequence[memoryview]) -> None:
        """New files, on the caller's thread, like the tier's one thread that writes."""
        for path, buffer in zip(self._paths, buffers, strict=True):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
            try:
                moved = os.pwritev(fd, [buffer], 0)
            finally:
                os.close(fd)
            assert moved == len(buffer)

    def read(self, tier: Path, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> None:
        """The files in which the tier in that folder keeps `keys`."""
        paths = [tier / "objects" / key.hex()[:2] / key.hex() for key in keys]
        list(self._pool.map(self._read_one, paths, self._headers, buffers))

    def clear(self) -> None:
        """Remove the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    @staticmethod
    def _read_one(path: Path, header: memoryview, buffer: memoryview) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            moved = os.preadv(fd, [header, buffer], 0)
        finally:
            os.close(fd)
        assert moved == len(header) + len(buffer)


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    rounds = 5 if quick else 30
    whole = aligned_buffer(NBYTES)
    buffers = [whole[start : start + OBJECT_BYTES] for start in range(0, NBYTES, OBJECT_BYTES)]
    with work_folder() as folder:
        free_room(folder, 8 * NBYTES)
        rows = _backend(folder, rounds, buffers)
        tier = folder / "daemon"
        with daemon(folder, memory="512MiB", disk_path=tier, disk="1GiB") as running:
            rows += _end_to_end(folder, tier, rounds, buffers, running)
    return rows


def _backend(folder: Path, rounds: int, buffers: Sequence[memoryview]) -> list[Row]:
    backend = DiskBackend(folder / "backend")
    plain = PlainFiles(folder / "plain", threads=1)
    transfers = [
        Transfer(ObjectInfo(os.urandom(32), b"", Kind.KV, bytes(32), OBJECT_BYTES, checksum([buffer])), [buffer])
        for buffer in buffers
    ]

    keys = [transfer.info.key for transfer in transfers]

    def emptied(empty: Callable[[], object], call: Callable[[], object]) -> float:
        empty()
        return seconds(call)

    writes = interleaved(
        rounds,
        {
            "plain": lambda: emptied(plain.clear, lambda: plain.write(buffers)),
            "tier": lambda: emptied(
                lambda: backend.delete(keys),
                lambda: _all_ok(backend.store(transfers)),
            ),
        },
    )
    reads = interleaved(
        rounds,
        {
            "plain": lambda: seconds(lambda: plain.read(folder / "backend", keys, buffers)),
            "tier": lambda: seconds(lambda: _all_ok(backend.load(transfers))),
        },
    )
    sums = interleaved(rounds, {"sum": lambda: seconds(lambda: [checksum([buffer]) for buffer in buffers])})
    note = "" if backend.direct else "the folder takes no O_DIRECT"
    backend.close()
    return [
        ratio_row("DiskBackend.store / pwritev", writes["plain"], writes["tier"], at_least=TARGET, note=note),
        row("  DiskBackend.store", "GB/s", rates(NBYTES, writes["tier"])),
        row("  plain pwritev", "GB/s", rates(NBYTES, writes["plain"])),
        ratio_row("DiskBackend.load / preadv", reads["plain"], reads["tier"], at_least=TARGET, note=note),
        row("  DiskBackend.load", "GB/s", rates(NBYTES, reads["tier"])),
        row("  plain preadv", "GB/s", rates(NBYTES, reads["plain"])),
        row("  checksums of the same bytes alone", "GB/s", rates(NBYTES, sums["sum"])),
    ]


def _end_to_end(folder: Path, tier: Path, rounds: int, buffers: Sequence[memoryview], running: Daemon) -> list[Row]:
    plain = PlainFiles(folder / "plain-2", threads=2)
    keys = [os.urandom(32) for _ in buffers]
    with running.client() as client:

        def write_behind() -> float:
            client.evict(keys)
            client.flush()
            time.sleep(DELETE_S)
            commit = commit_objects(client, keys, buffers[0])
            return seconds(lambda: (commit(), client.flush()))

        def acquire() -> float:
            client.evict(keys, tiers=["cpu"])
            return seconds(lambda: acquire_objects(client, keys))

        def plain_write() -> float:
            plain.clear()
            return seconds(lambda: plain.write(buffers))

        writes = interleaved(rounds, {"plain": plain_write, "tier": write_behind})
        reads = interleaved(
            rounds, {"plain": lambda: seconds(lambda: plain.read(tier, keys, buffers)), "tier": acquire}
        )
    return [
        ratio_row("daemon, commit to flushed / pwritev", writes["plain"], writes["tier"], at_least=TARGET),
        row("  daemon, commit to flushed", "GB/s", rates(NBYTES, writes["tier"])),
        row("  plain pwritev", "GB/s", rates(NBYTES, writes["plain"])),
        ratio_row("daemon, acquire from disk / preadv", reads["plain"], reads["tier"], at_least=TARGET),
        row("  daemon, acquire from disk", "GB/s", rates(NBYTES, reads["tier"])),
        row("  plain preadv, two threads", "GB/s", rates(NBYTES, reads["plain"])),
    ]


def _all_ok(results: Sequence[Result]) -> None:
    bad = [result for result in results if result.outcome is not Outcome.OK]
    if bad:
        raise RuntimeError(f"{len(bad)} transfers failed, the first: {bad[0]}")
