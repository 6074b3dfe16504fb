# SPDX-License-Identifier: Apache-2.0
"""Shadows of a tier: what other ways of choosing victims would find, on a sample of the objects, as names alone.

A sample is all objects whose key, a hash, begins with a small number, and a shadow is as much smaller than the tier: it
finds about the same share (Waldspurger et al., "SHARDS", FAST 2015). A chunk is never asked for without its parents; so
in each shadow a chain is used from its end to its beginning, and its end goes first as in the tree.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence

from loracache.cache.policy.names import Names

__all__ = ["SHARES", "Shadow", "Shadows"]

SHARES = (1.0, 0.7, 0.4, 0.0)
"""Of the tier that what came once may take before it goes first; 1: as in LRU it never does."""

_CAPACITY = 1024  # objects of a shadow, about
_WINDOW = 1  # times the capacity: names asked between two looks at who does best
_KEPT = 0.97  # of what was found before, at each look
_BETTER = 1.02  # who is not in force has to find that much more
_WAITING = 256  # lookups that wait to be looked at
_LONGEST = 2048  # chunks of one of them: the rest is left aside


class Shadow:
    """One way: what came once and takes more than `share` of the tier goes first; with a share of 1 the least lately
    used of all does."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._once: OrderedDict[int, int] = OrderedDict()  # name -> when it was used last, the oldest first
        self._again: OrderedDict[int, int] = OrderedDict()
        self.found = 0.0

    def use(self, name: int, now: int, known: bool) -> None:
        """An object is asked for. known: it was before."""
        if name in self._again:
            self.found += 1
            self._again.move_to_end(name)
            self._again[name] = now
            return
        if self._once.pop(name, None) is not None:
            self.found += 1
            known = True
        (self._again if known else self._once)[name] = now

    def shrink(self, capacity: int) -> None:
        """Drop what there is no room for."""
        once, again = self._once, self._again
        while len(once) + len(again) > capacity:
            if self._share < 1:
                first = again if len(once) <= self._share * capacity else once
            else:
                first = (
                    once if once and (not again or next(iter(once.values())) < next(iter(again.values()))) else again
                )
            (first or once or again).popitem(last=False)


class Shadows:
    """One shadow for each of `shares`. `objects` says how many the tier holds, which is full when `work` is called."""

    def __init__(self, objects: Callable[[], int], shares: Sequence[float] = SHARES) -> None:
        self._objects = objects
        self._shares = shares
        self._shadows = [Shadow(share) for share in shares]
        self._asked: deque[Sequence[bytes]] = deque(maxlen=_WAITING)
        self._names = Names()
        self._rate = 0  # of 65,536 objects that many are in the sample:
        self._limit = b""  # those whose keys are below
        self._now = 0
        self._look_at = 0
        self.best = len(shares) - 1  # a chain that never comes again does no harm there

    def ask(self, keys: Sequence[bytes]) -> None:
        """A chain is looked up. It is looked at later, in `work`."""
        self._asked.append(keys if len(keys) <= _LONGEST else keys[:_LONGEST])

    def work(self) -> Iterator[None]:
        """Look at what was asked; yields between two chains."""
        if self._asked:
            self._fit()
        while self._asked:
            keys = self._asked.popleft()
            self._use([hash(key) for key in reversed(keys) if key[:2] < self._limit])
            yield

    def _fit(self) -> None:
        """Sample as much as a shadow can hold. A new rate begins anew."""
        rate = 65_536
        while rate > 1 and rate * self._objects() > 2 * _CAPACITY * 65_536:
            rate //= 2
        if rate != self._rate and not self._rate // 2 == rate < self._rate:
            self._rate = rate
            self._limit = rate.to_bytes(2, "big") if rate < 65_536 else b"\xff\xff\xff"
            self._shadows = [Shadow(share) for share in self._shares]

    def _use(self, names: Sequence[int]) -> None:
        capacity = max(1, self._objects() * self._rate // 65_536)
        for name in names:
            self._now += 1
            known = name in self._names
            for shadow in self._shadows:
                shadow.use(name, self._now, known)
            self._names.add(name, 0)
        for shadow in self._shadows:
            shadow.shrink(capacity)
        if self._now >= self._look_at:
            self._look_at = self._now + _WINDOW * capacity
            self._choose()

    def _choose(self) -> None:
        found = [shadow.found for shadow in self._shadows]
        best = max(reversed(range(len(found))), key=found.__getitem__)
        if found[best] > _BETTER * found[self.best]:
            self.best = best
        for shadow in self._shadows:
            shadow.found *= _KEPT
