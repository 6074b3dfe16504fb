# SPDX-License-Identifier: Apache-2.0
"""How long a transfer of so many bytes takes, learnt from the last few. Pure; one thread at a time.

    seconds = latency + bytes / bandwidth

fitted to the last transfers as Theil (1950) and Sen (JASA 63, 1968) do it: the slope is the median of those of all
pairs, the latency the median of what the slope leaves. So two slow transfers of five change little. Nothing follows
from fewer than three.
"""

from __future__ import annotations

from collections import deque
from itertools import combinations
from math import inf
from statistics import median

__all__ = ["TransferTimes"]

_KEPT = 5
_LEAST = 3
_APART = 1.5  # the larger of a pair by the smaller: of equal sizes the slope would be noise


class TransferTimes:
    """Of one way. latency: seconds; bandwidth: bytes a second, 0.0 where it is not known."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=_KEPT)
        self._largest = inf  # bytes up to which time is known to grow
        self._told_apart = False  # latency and bandwidth, ever
        self.latency = 0.0
        self.bandwidth = 0.0

    @property
    def known(self) -> bool:
        """Whether enough were seen to say anything."""
        return len(self._last) >= _LEAST

    def add(self, nbytes: int, seconds: float) -> None:
        """A transfer of so many bytes, at least one, took so long."""
        self._last.append((nbytes, seconds))
        if self.known:
            self._fit()

    def seconds(self, nbytes: int) -> float:
        """What one of so many bytes will take; 0.0 while that is not known. Where all that ever were seen are of one
        size, a smaller one is taken to need less in proportion, a larger one no longer: it may have been latency.
        """
        return self.latency + min(nbytes, self._largest) / self.bandwidth if self.bandwidth else self.latency

    def _fit(self) -> None:
        pairs = [(small, large) for small, large in combinations(sorted(self._last), 2) if large[0] > _APART * small[0]]
        self._told_apart = self._told_apart or bool(pairs)
        self._largest = inf if self._told_apart else median(nbytes for nbytes, _ in self._last)
        slope, latency = 0.0, min(self.latency, *(seconds for _, seconds in self._last))
        if pairs:
            slope = max(0.0, median((large[1] - small[1]) / (large[0] - small[0]) for small, large in pairs))
            latency = max(0.0, median(seconds - slope * nbytes for nbytes, seconds in self._last))
        if not pairs or not latency:
            slope = median((seconds - latency) / nbytes for nbytes, seconds in self._last)
        self.latency, self.bandwidth = latency, 1 / slope if slope > 0 else 0.0
