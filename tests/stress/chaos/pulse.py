# SPDX-License-Identifier: Apache-2.0
"""A few numbers that a workload process and the supervisor share, in a mapped file that outlives the process.

The process says which call it is in, since when and how long that may take; the supervisor sees a hang while it lasts,
and adds the time for which it stopped the process itself, which is nobody's fault. Threading: one writer a field.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HANG_S", "OPERATIONS", "OUTCOMES", "Pulse"]

HANG_S = 5.0  # beyond what a call may take by its own time-out
OPERATIONS = (
    "store", "slow_store", "store_again", "flush", "lookup", "get", "hold", "pin", "evict", "evict_part", "clear_cpu",
    "raise", "compress", "decompress", "copy", "status", "list", "tree", "events", "adapter_add", "adapter_get",
    "adapter_remove", "connect", "rest_read", "rest_change",
)  # fmt: skip
OUTCOMES = (
    "done",
    "unavailable",
    "rejected",
    "lease_lost",
    "acknowledged",
    "not_durable",
    "bytes_proven",
    "rest_5xx",
    "hung",
)
_ONE = struct.Struct("<d")
_BEGAN, _LIMIT, _STOPPED, _BEFORE, _NAME, _LAST, _END = (8 * at for at in range(7))
_COUNTS = 8 * 8
_WORST = _COUNTS + 8 * (len(OPERATIONS) + len(OUTCOMES))
_BYTES = _WORST + 8 * len(OPERATIONS)


class Pulse:
    """One process's numbers, in the file at `path`. Whole calls that took too long are counted as "hung"."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_BYTES)
            self._map = mmap.mmap(file.fileno(), _BYTES)

    def _get(self, at: int) -> float:
        return float(_ONE.unpack_from(self._map, at)[0])

    def _set(self, at: int, value: float) -> None:
        _ONE.pack_into(self._map, at, value)

    # -- the process ----------

    def begin(self) -> None:
        """A new process has this file."""
        self._set(_BEGAN, 0.0)
        self._set(_END, 0.0)

    def count(self, name: str, amount: int = 1) -> None:
        """Count an outcome."""
        at = _COUNTS + 8 * (len(OPERATIONS) + OUTCOMES.index(name))
        self._set(at, self._get(at) + amount)

    @contextlib.contextmanager
    def call(self, name: str, limit: float) -> Iterator[None]:
        """Around one call, which ends by itself within `limit` seconds."""
        number = OPERATIONS.index(name)
        began, stopped = time.monotonic(), self._get(_STOPPED)
        self._set(_NAME, number)
        self._set(_LIMIT, limit)
        self._set(_BEFORE, stopped)
        self._set(_BEGAN, began)
        try:
            yield
        finally:
            self._set(_BEGAN, 0.0)
            took = time.monotonic() - began - (self._get(_STOPPED) - stopped)
            counts, worst = _COUNTS + 8 * number, _WORST + 8 * number
            self._set(counts, self._get(counts) + 1)
            if took > self._get(worst):
                self._set(worst, took)
            if took > limit + HANG_S:  # while nobody watched
                self.count("hung")

    @property
    def ends(self) -> bool:
        """Whether the process shall end."""
        return bool(self._get(_END))

    def stored(self, serial: int) -> None:
        """The last chain there may be, for others to read."""
        self._set(_LAST, serial)

    # -- the supervisor and other processes ----------

    @property
    def last(self) -> int:
        """The last chain of this owner."""
        return int(self._get(_LAST))

    def end(self) -> None:
        """Tell the process to end."""
        self._set(_END, 1.0)

    def was_stopped(self, seconds: float) -> None:
        """Say so before it goes on."""
        self._set(_STOPPED, self._get(_STOPPED) + seconds)

    def hang(self) -> str:
        """The call that takes too long by now, and how long; or ""."""
        began = self._get(_BEGAN)
        took = time.monotonic() - began - (self._get(_STOPPED) - self._get(_BEFORE))
        if not began or took < self._get(_LIMIT) + HANG_S:
            return ""
        return f"{OPERATIONS[int(self._get(_NAME))]} for {took:.1f} s"

    def counts(self) -> dict[str, int]:
        """Calls and outcomes by name."""
        names = OPERATIONS + OUTCOMES
        return {name: int(self._get(_COUNTS + 8 * at)) for at, name in enumerate(names)}

    def worst(self) -> dict[str, float]:
        """The longest of each call, in seconds."""
        return {name: self._get(_WORST + 8 * at) for at, name in enumerate(OPERATIONS)}
