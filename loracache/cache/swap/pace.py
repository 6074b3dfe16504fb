# SPDX-License-Identifier: Apache-2.0
"""How fast and how much at once: bytes a second, and bytes in flight. Pure; one thread."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Pace"]

_BURST_S = 0.1  # of the rate may go at once


class Pace:
    """In any stretch of t seconds no more begins than `rate` * (t + 0.1) bytes and one object, and no more than `most`
    bytes, or one object, are under way. clock(): seconds."""

    def __init__(self, rate: float, most: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._most = most
        self._clock = clock
        self._left = rate * _BURST_S
        self._at = clock()
        self.in_flight = 0

    def allows(self, nbytes: int) -> bool:
        """Whether so many may begin now."""
        return self._credit() > 0 and (not self.in_flight or self.in_flight + nbytes <= self._most)

    def begin(self, nbytes: int) -> None:
        """They do."""
        self._left, self._at = self._credit() - nbytes, self._clock()
        self.in_flight += nbytes

    def end(self, nbytes: int) -> None:
        """They have arrived, or never will."""
        self.in_flight -= nbytes

    def _credit(self) -> float:
        return min(self._rate * _BURST_S, self._left + (self._clock() - self._at) * self._rate)
