# SPDX-License-Identifier: Apache-2.0
"""What happened to objects lately: admitted, evicted, moved, pinned, unpinned, failed. For operators who watch.

A ring of the last few thousand; whoever reads too slowly is told how many were lost. Threading: the cache's thread.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loracache.cache.state.index import Node
from loracache.storage_backends.base import KEY_BYTES
from loracache.tiers import Tier

__all__ = ["Event", "Events"]

_REMEMBERED = 20_000
_FAILURES_KEPT = 200
_MOST_WORDS = 10_000


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


class _Ring:
    """The last events, each in a place of its own that the one `_REMEMBERED` later takes. Kept as columns, not as
    objects: 20,000 small objects among those of the index would keep most of its memory when all else is gone.
    """

    def __init__(self) -> None:
        self._times = array("d", bytes(8 * _REMEMBERED))
        self._nbytes, self._counts = (array("q", bytes(8 * _REMEMBERED)) for _ in range(2))
        self._keys = bytearray(KEY_BYTES * _REMEMBERED)
        self._keyed = bytearray(_REMEMBERED)
        self._words: list[tuple[str, str, str, bytes]] = [("", "", "", b"")] * _REMEMBERED
        # Few are ever used: what, tier, cause, namespace. One tuple for all events that share them.
        self._known: dict[tuple[str, str, str, bytes], tuple[str, str, str, bytes]] = {}

    def put(
        self, number: int, time: float, words: tuple[str, str, str, bytes], key: bytes, nbytes: int, count: int
    ) -> None:
        at = number % _REMEMBERED
        known = self._known.get(words)
        if known is None:
            if len(self._known) >= _MOST_WORDS:
                self._known.clear()
            known = self._known[words] = words
        self._times[at] = time
        self._words[at] = known
        self._keyed[at] = bool(key)
        if key:
            self._keys[at * KEY_BYTES : (at + 1) * KEY_BYTES] = key
        self._nbytes[at] = nbytes
        self._counts[at] = count

    def get(self, number: int) -> Event:
        at = number % _REMEMBERED
        what, tier, cause, namespace = self._words[at]
        key = bytes(self._keys[at * KEY_BYTES : (at + 1) * KEY_BYTES]) if self._keyed[at] else b""
        nbytes, count = self._nbytes[at], self._counts[at]
        return Event(number, self._times[at], what, tier, cause, key, namespace, nbytes, count)


class Events:
    """The ring. `wake` holds callables that are called, once, when the next event comes; who no longer waits takes its
    own out."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ring = _Ring()
        self.failures: deque[Event] = deque(maxlen=_FAILURES_KEPT)
        self.last = int(clock() * 1000)  # numbers grow over restarts, for those who come back with one
        self._began = self.last
        self.wake: set[Callable[[], None]] = set()

    def changed(self, node: Node, tier: Tier, entered: bool, cause: str) -> None:
        """An object entered or left a tier."""
        words = "admitted" if entered else "evicted", tier.label, cause, node.namespace
        self._add(words, node.key, node.size)

    def add(self, what: str, tier: Tier, cause: str, node: Node) -> None:
        """One object's event."""
        self._add((what, tier.label, cause, node.namespace), node.key, node.size)

    def fail(self, tier: Tier, cause: str, count: int = 1, key: bytes = b"") -> None:
        """Something on the data path failed."""
        self._add(("failed", tier.label, cause, b""), key, 0, count)
        self.failures.append(self._ring.get(self.last))

    def after(self, number: int, count: int) -> tuple[list[Event], int]:
        """The next events behind `number`, at most `count`, and how many before them are lost. Whoever comes with a
        number of an earlier run begins with this one; what he missed of that is not counted."""
        if number > self.last:  # an earlier run said more than one event a millisecond
            number = self._began
        number = max(number, self._began)
        if number == self.last:
            return [], 0
        first = max(self._began, self.last - _REMEMBERED) + 1
        start = max(first, number + 1)
        end = min(self.last + 1, start + count)
        return [self._ring.get(each) for each in range(start, end)], max(0, first - number - 1)

    def _add(self, words: tuple[str, str, str, bytes], key: bytes, nbytes: int, count: int = 1) -> None:
        self.last += 1
        self._ring.put(self.last, self._clock(), words, key, nbytes, count)
        if self.wake:
            waiting, self.wake = self.wake, set()
            for call in waiting:
                call()
