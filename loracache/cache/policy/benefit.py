# SPDX-License-Identifier: Apache-2.0
"""Whether writing KV to a tier can save anybody time: not where reading it back takes longer than computing it again.

Both sides are measured, and nothing is refused before. A writer that has stored so many bytes of KV in a few seconds
has computed them at least that fast; a tier reads as fast as its threads did lately. Threading: the cache's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from loracache.cache.state.counters import Counters
from loracache.tiers import Tier

__all__ = ["Benefit"]

_WINDOW_S = 10.0  # a writer that stores what it computed before, in one go, does not look fast over so long
_KEPT = 0.98  # of the fastest so far, at each window: engines change
_SURE = 256 << 20  # bytes read from a tier before its speed is believed
_THREADS = 2  # of a tier that read at a time: each one's seconds are counted


class Benefit:
    """Speeds as they were. clock: seconds. always: everything is worth it, as `admission: all` has it."""

    def __init__(self, counters: Counters, clock: Callable[[], float], *, always: bool) -> None:
        self._counters = counters
        self._clock = clock
        self._always = always
        self._stored: Counter[int] = Counter()  # by writer, in this window
        self._since = clock()
        self._computed = 0.0  # bytes a second of the fastest writer

    def stored(self, writer: int, nbytes: int) -> None:
        """A writer has stored so many bytes of KV."""
        if not self._always:
            self._stored[writer] += nbytes

    def tick(self) -> None:
        """End a window that is over."""
        seconds = self._clock() - self._since
        if seconds >= _WINDOW_S:
            fastest = max(self._stored.values(), default=0) / seconds
            self._computed = max(self._computed * _KEPT, fastest)
            self._stored.clear()
            self._since += seconds

    def worth(self, tier: Tier) -> bool:
        """Whether to write KV to `tier`."""
        if self._always or not self._computed:
            return True
        nbytes, spent = self._counters[f"load.{tier.label}.bytes"], self._counters[f"busy_us.{tier.label}.load"]
        if nbytes < _SURE or not spent:
            return True
        return self._computed < _THREADS * nbytes / (spent / 1e6)
