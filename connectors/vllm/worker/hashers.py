# SPDX-License-Identifier: Apache-2.0
"""Threads that compute checksums while copies fly: one core hashes more slowly than a GPU's link brings bytes.

None for an engine on a CPU: there a chunk is hashed by the thread that copies it, while its bytes lie in the core's
cache, and more threads would only take cores from the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.keys import checksum

__all__ = ["Hashers", "cores_for_hashing"]

_RUN = 16 << 20  # bytes that a thread takes at once: a task costs some 30 us
_CORES_SHARE = 8  # of the cores is taken, with several engines' workers on a host,
_MOST = 4  # and no more than this: xxh3 makes 7 to 23 GB/s a core


def cores_for_hashing(device_type: str) -> int:
    """Threads for the loads of one worker; 0 on a CPU."""
    if device_type == "cpu":
        return 0
    return min(_MOST, max(1, len(os.sched_getaffinity(0)) // _CORES_SHARE))


class Hashers:
    """So many threads; with 0 of them checksums are computed at once, by whom asks for them."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "loracache-hash", initializer=leave_pinned_core) if threads else None

    def start(self, payloads: Sequence[Sequence[memoryview]]) -> Callable[[], list[int]]:
        """Begin; the answer, when called, waits for the checksums, one a payload. Payloads must stay as they are until
        then."""
        if self._pool is None:
            sums = _sums(payloads)
            return lambda: sums
        size = sum(len(buffer) for buffer in payloads[0]) if payloads else 1
        count = max(1, _RUN // max(1, size))
        runs = [self._pool.submit(_sums, payloads[at : at + count]) for at in range(0, len(payloads), count)]
        return lambda: [each for run in runs for each in run.result()]

    def close(self) -> None:
        """End the threads, once they have done what was begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)


def _sums(payloads: Sequence[Sequence[memoryview]]) -> list[int]:
    return [checksum(payload) for payload in payloads]
