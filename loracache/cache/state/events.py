# SPDX-License-Identifier: Apache-2.0
"""What happened to objects lately: admitted, evicted, moved, pinned, unpinned, failed. For operators who watch.

A ring of the last few thousand; whoever reads too slowly is told how many were lost. Threading: the cache's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loracache.cache.state.index import Node
from loracache.tiers import Tier

__all__ = ["Event", "Events"]

_REMEMBERED = 20_000
_FAILURES_KEPT = 200


@dataclass(slots=True)  # not frozen: that would cost a microsecond each
class Event:
    """number: grows by one. time: Unix seconds. key: of one object, or b"" where there is none. count: how many of the
    same (failures of a batch)."""

    number: int
    time: float
    what: str
    tier: str
    cause: str
    key: bytes
    namespace: bytes
    nbytes: int
    count: int = 1


class Events:
    """The ring. `wake` holds callables that are called, once, when the next event comes; who no longer waits takes its
    own out."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ring: deque[Event] = deque(maxlen=_REMEMBERED)
        self.failures: deque[Event] = deque(maxlen=_FAILURES_KEPT)
        self.last = int(clock() * 1000)  # numbers grow over restarts, for those who come back with one
        self._began = self.last
        self.wake: set[Callable[[], None]] = set()

    def changed(self, node: Node, tier: Tier, entered: bool, cause: str) -> None:
        """An object entered or left a tier."""
        self.add("admitted" if entered else "evicted", tier, cause, node)

    def add(self, what: str, tier: Tier, cause: str, node: Node) -> None:
        """One object's event."""
        self._add(Event(self.last + 1, self._clock(), what, tier.label, cause, node.key, node.namespace, node.size))

    def fail(self, tier: Tier, cause: str, count: int = 1, key: bytes = b"") -> None:
        """Something on the data path failed."""
        event = Event(self.last + 1, self._clock(), "failed", tier.label, cause, key, b"", 0, count)
        self.failures.append(event)
        self._add(event)

    def after(self, number: int, count: int) -> tuple[list[Event], int]:
        """The next events behind `number`, at most `count`, and how many before them are lost. Whoever comes with a
        number of an earlier run begins with this one; what he missed of that is not counted."""
        if number > self.last:  # an earlier run said more than one event a millisecond
            number = self._began
        number = max(number, self._began)
        if not self._ring or number == self.last:
            return [], 0
        first = self._ring[0].number
        start = max(0, number + 1 - first)
        end = min(len(self._ring), start + count)
        return [self._ring[place] for place in range(start, end)], max(0, first - number - 1)

    def _add(self, event: Event) -> None:
        self.last = event.number
        self._ring.append(event)
        if self.wake:
            waiting, self.wake = self.wake, set()
            for call in waiting:
                call()
