# SPDX-License-Identifier: Apache-2.0
"""In which order things leave a cache, by how often and how lately they were used. Pure; one thread at a time.

S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): what comes in for the first time
waits in a small queue, a tenth of all; what is used there moves to the main queue, and the rest leaves again. So a scan
of things that are wanted once passes through the small queue and throws nobody else out, as it would where the least
recently used leaves first. What left a short while ago and comes again goes to the main queue at once.

This one is for dozens of things that hang from nothing, an engine's adapters: a choice looks at all of them. A tier of
the daemon holds a million objects in a tree, so that it has one of its own: cache/policy/s3_fifo.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["S3FIFO"]

K = TypeVar("K", bound=Hashable)

_SMALL_SHARE = 0.1
_PROMOTED_AT = 2  # uses in the small queue after the first
_MOST_USES = 3
_LEAST_GHOSTS = 16


@dataclass(slots=True)
class _Entry:
    size: int
    uses: int = 0


class S3FIFO(Generic[K]):
    """The order of what is in one cache. All queues go from their oldest entry to their newest."""

    def __init__(self) -> None:
        self._small: OrderedDict[K, _Entry] = OrderedDict()
        self._main: OrderedDict[K, _Entry] = OrderedDict()
        self._ghosts: OrderedDict[K, None] = OrderedDict()  # what left lately: names only
        self._small_size = 0
        self._size = 0

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: K) -> bool:
        return key in self._small or key in self._main

    def add(self, key: K, size: int) -> None:
        """It comes in; `size` in any unit, the same for all. It must not be there."""
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = _Entry(size)
        else:
            self._small[key] = _Entry(size)
            self._small_size += size
        self._size += size

    def use(self, key: K) -> None:
        """It is used once more. It must be there."""
        entry = self._small.get(key) or self._main[key]
        entry.uses = min(entry.uses + 1, _MOST_USES)

    def remove(self, key: K) -> None:
        """It is gone, for another reason than that room was needed. Nothing happens where it is not there."""
        if key in self._small:
            self._small_size -= self._small[key].size
        entry = self._small.pop(key, None) or self._main.pop(key, None)
        self._size -= entry.size if entry is not None else 0

    def evict(self, may_leave: Callable[[K], bool]) -> K | None:
        """The next to leave, which is gone then; None where nothing that is there may."""
        victim = None
        if self._small_size > _SMALL_SHARE * self._size:
            victim = self._of_small(may_leave)
        if victim is None:
            victim = self._of_main(may_leave)
        if victim is None:
            victim = self._of_small(may_leave)
        if victim is None:  # all that may leave has just been promoted
            victim = self._of_main(may_leave)
        if victim is not None:
            self.remove(victim)
            self._ghosts[victim] = None
            while len(self._ghosts) > max(_LEAST_GHOSTS, len(self)):
                self._ghosts.popitem(last=False)
        return victim

    def _of_small(self, may_leave: Callable[[K], bool]) -> K | None:
        for key in list(self._small):
            if not may_leave(key):
                continue
            entry = self._small[key]
            if entry.uses < _PROMOTED_AT:
                return key
            del self._small[key]
            self._small_size -= entry.size
            entry.uses = 0
            self._main[key] = entry
        return None

    def _of_main(self, may_leave: Callable[[K], bool]) -> K | None:
        """The first, in the order of the queue, that was not used since it stood there last."""
        for _ in range(_MOST_USES + 1):
            for key in list(self._main):
                if not may_leave(key):
                    continue
                entry = self._main[key]
                if not entry.uses:
                    return key
                entry.uses -= 1
                self._main.move_to_end(key)
        return None
