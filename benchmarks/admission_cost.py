# SPDX-License-Identifier: Apache-2.0
"""What a load without reuse costs the cache with each admission: lookups, stores, and the threads of the tier below.

    python benchmarks/admission_cost.py

Chains of 50 objects of 4 KiB, in an arena that holds 2,000 and is full, over the reference backend: no device is timed.
Seconds of CPU; `threads` are those that the backend's calls took.
"""

from __future__ import annotations

import gc
import os
import queue
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from loracache.cache.policy import ADMISSIONS
from loracache.cache.state.arena import Arena
from loracache.cache.state.leases import Writing
from loracache.cache.state.slices import whole
from loracache.cache.tiered import TieredCache
from loracache.keys import checksum
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.storage_backends.memory import MemoryBackend

CHAINS, LENGTH, SIZE = 400, 50, 4096
PROOF = checksum([bytes(SIZE)])


def measure(admission: str) -> tuple[str, ...]:
    """Store chains that nobody asks for again."""
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    cache = TieredCache(
        Arena(2000 * SIZE, SIZE), posted.put, disk=MemoryBackend(), disk_limit=1 << 30, admission=admission
    )
    assert cache.disk is not None
    cache.disk.adopted_all([])
    looking = storing = 0.0
    for number in range(CHAINS):
        keys = [os.urandom(32) for _ in range(LENGTH)]
        parents = [b"", *keys[:-1]]
        infos = [ObjectInfo(key, above, Kind.KV, bytes(32), SIZE, 0) for key, above in zip(keys, parents, strict=True)]
        began = time.thread_time()
        cache.lookup(keys)
        looked = time.thread_time()
        answers = whole(cache.reserve(1, b"lease", infos, 30.0))
        written = [(each.info.key, PROOF) for each in answers if isinstance(each, Writing)]
        whole(cache.commit(1, b"lease", written))
        looking, storing = looking + looked - began, storing + time.thread_time() - looked
        if not number % 20:
            cache.tick()
        while not posted.empty():
            posted.get()()
    count = cache.counters
    cells = f"{looking / CHAINS * 1e6:.0f}", f"{storing / CHAINS / LENGTH * 1e6:.1f}"
    cache.disk.io.close()
    return admission, *cells, str(count["write.disk.objects"]), f"{count['busy_us.disk.store'] / 1e3:.0f}"


def main() -> None:
    """Each admission once."""
    gc.disable()
    table = Table("admission", f"us a lookup of {LENGTH}", "us an object stored", "objects written", "ms of threads")
    for admission in ADMISSIONS:
        table.add_row(*measure(admission))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
