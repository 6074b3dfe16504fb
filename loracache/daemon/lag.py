# SPDX-License-Identifier: Apache-2.0
"""How late the daemon's event loop is: what every client waits for on top of its own work.

A timer that is due every 10 ms notes how long after that it came. Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections import deque
from typing import Any

__all__ = ["LoopLag"]

_PERIOD_S = 0.01
_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_PART_S = 5.0
_PARTS = 12  # of the last minute


class LoopLag:
    """A histogram of the loop's delays since the start, and the longest ones."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sum = 0.0
        self._longest = 0.0
        self._parts: deque[float] = deque([0.0], maxlen=_PARTS)  # the longest of each five seconds
        self._part_ends = 0.0

    async def watch(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        self._part_ends = time.monotonic() + _PART_S
        timer: asyncio.TimerHandle

        def look(due: float) -> None:  # no task, which a turn of the loop more would be for, a hundred times a second
            nonlocal timer
            now = time.monotonic()
            self.note(max(0.0, now - due), now)
            timer = loop.call_later(_PERIOD_S, look, now + _PERIOD_S)

        timer = loop.call_later(_PERIOD_S, look, time.monotonic() + _PERIOD_S)
        try:
            await loop.create_future()
        finally:
            timer.cancel()

    def note(self, seconds: float, now: float) -> None:
        """One delay, seen at `now` (monotonic seconds)."""
        self._counts[bisect.bisect_left(_BOUNDS_S, seconds)] += 1
        self._sum += seconds
        self._longest = max(self._longest, seconds)
        while now >= self._part_ends:
            self._part_ends = max(self._part_ends, now - _PARTS * _PART_S) + _PART_S
            self._parts.append(0.0)
        self._parts[-1] = max(self._parts[-1], seconds)

    def describe(self) -> dict[str, Any]:
        """For `status`: the longest delay of the last minute and since the start, in seconds, and how many were of at
        most so many seconds."""
        total, counts = 0, []
        for bound, count in zip((*_BOUNDS_S, "+Inf"), self._counts, strict=True):
            total += count
            counts.append([str(bound), total])
        return {
            "lag_max_s": round(max(self._parts), 6),
            "lag_longest_s": round(self._longest, 6),
            "lag_sum_s": round(self._sum, 6),
            "lag_counts": counts,
        }
