# SPDX-License-Identifier: Apache-2.0
"""What engines say of their requests: how many run at once, and which adapters they ask for how often.

Threading: the cache's thread.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from math import log

__all__ = ["Demand"]

_WINDOW_S = 5.0  # over which the batch is averaged, as FASTLIBRA does
_HALF_LIFE_S = 60.0  # of an arrival
_PER_S = log(2) / _HALF_LIFE_S  # requests at a steady rate r pile up to r * half-life / ln 2
_MOST = 10_000  # adapters remembered


class Demand:
    """Of all engines of a daemon. clock(): seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._running: dict[int, deque[tuple[float, int]]] = {}  # by engine: (when, how many ran from then on)
        self._waiting: dict[int, int] = {}
        self._wanted: dict[int, Sequence[bytes]] = {}
        self._prefill: dict[int, int] = {}
        self._rates: dict[bytes, tuple[float, float]] = {}  # adapter -> (arrivals, decayed, as of when)

    def report(
        self, engine: int, running: int, waiting: int, arrivals: Sequence[bytes], wanted: Sequence[bytes] = ()
    ) -> None:
        """An engine says what runs and waits now, the adapters of requests that have arrived since it last did, and
        which those that wait want, those of most requests first."""
        now = self._clock()
        samples = self._running.setdefault(engine, deque())
        samples.append((now, running))
        self._waiting[engine] = waiting
        self._wanted[engine] = wanted
        for adapter in arrivals:
            count, at = self._rates.get(adapter, (0.0, now))
            self._rates[adapter] = count * _decay(now - at) + 1, now
        if len(self._rates) > _MOST:
            kept = heapq.nlargest(_MOST // 2, self._rates, key=lambda adapter: self._score(adapter, now))
            self._rates = {adapter: self._rates[adapter] for adapter in kept}

    def gone(self, engine: int) -> None:
        """An engine is not there any more."""
        self._prefill.pop(engine, None)
        self._running.pop(engine, None)
        self._waiting.pop(engine, None)
        self._wanted.pop(engine, None)

    def computes(self, engine: int, rate: int) -> None:
        """An engine says how many bytes of KV it computes a second."""
        self._prefill[engine] = rate

    @property
    def prefill(self) -> float:
        """Bytes of KV that an engine computes a second, in the mean; 0 where none says."""
        return sum(self._prefill.values()) / max(1, len(self._prefill))

    @property
    def waiting(self) -> int:
        """Requests that wait in all engines, as last said."""
        return sum(count for engine, count in self._waiting.items() if self._fresh(engine))

    @property
    def wanted(self) -> list[bytes]:
        """The adapters of requests that wait, as last said: of each engine the first, then the second, ..."""
        told = [keys for engine, keys in self._wanted.items() if self._fresh(engine)]
        return list(dict.fromkeys(key for turn in itertools.zip_longest(*told) for key in turn if key is not None))

    def batch(self) -> float:
        """Requests that ran at once, of all engines together: a mean over the last 5 s."""
        return sum(self._mean(samples) for samples in self._running.values())

    def rate(self, adapter: bytes) -> float:
        """Its requests a second, of late."""
        return self._score(adapter, self._clock()) * _PER_S

    def hottest(self, count: int) -> list[bytes]:
        """The adapters asked for most of late, in that order."""
        now = self._clock()
        return heapq.nlargest(count, self._rates, key=lambda adapter: self._score(adapter, now))

    def _fresh(self, engine: int) -> bool:
        return self._running[engine][-1][0] >= self._clock() - _WINDOW_S

    def _score(self, adapter: bytes, now: float) -> float:
        count, at = self._rates.get(adapter, (0.0, now))
        return count * _decay(now - at)

    def _mean(self, samples: deque[tuple[float, int]]) -> float:
        """By time: what was said last holds until something else is said, or for as long as the window is: an engine
        that has nothing to do says nothing."""
        now = self._clock()
        since = now - _WINDOW_S
        if samples[-1][0] < since:
            return 0.0
        while len(samples) > 1 and samples[1][0] <= since:
            samples.popleft()
        total = spent = 0.0
        end = now
        for at, running in reversed(samples):
            begin = max(at, since)
            total += running * (end - begin)
            spent += end - begin
            end = begin
        return total / spent if spent else float(samples[-1][1])


def _decay(seconds: float) -> float:
    return float(0.5 ** (seconds / _HALF_LIFE_S))
