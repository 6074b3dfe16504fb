# SPDX-License-Identifier: Apache-2.0
"""Shadows of memory and the tier below it: what would be found with less or more written down, on a sample of names.

Each shadow admits what comes again, and of what comes for the first time those kinds of which at least a share came
again lately. The sample is all objects whose keys, hashes, begin with a small number (as in shadow.py). Memory is the
same for all of them: what is found there needs no tier below.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

from loracache.cache.policy.names import Names
from loracache.cache.policy.shadow import ALL, limit_of
from loracache.cache.policy.waiting import Waiting

__all__ = ["SHARES", "Kinds", "LowerShadows"]

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 2.0)
"""Of a kind that has to have come again for it to be admitted as it comes; 2: none is. Less is written from left to
right. The first is not 0: what never comes again is not worth a byte."""

_CAPACITY = 2048  # objects of the lower shadow, about
_LOOKS = 8  # at who does best, in the time in which a shadow's capacity is asked for
_KEPT = 0.98  # of what was found before, at each look
_ENOUGH = 0.98  # of what the best finds: the least that is written for it is in force
_SURE = 16  # objects found by the best; before, most is written down, as far as kinds come again at all
_PRIOR = 32  # first touches that a new kind is thought to have had, of which as many came again as of all
_AT_FIRST = 0.05  # of the first of all, as many
_MOST_FIRSTS = 2048  # of a kind that are counted; then the older count for half
_MOST_KINDS = 4096
_LONGEST = 4096  # chunks of a lookup that are looked at


class Kinds:
    """How much of each kind came again: first touches, and those that came again. What is long ago counts less."""

    def __init__(self) -> None:
        self._counts: OrderedDict[Hashable, list[float]] = OrderedDict()
        self._all = [0.0, 0.0]

    def came(self, kind: Hashable) -> None:
        """One of them came for the first time."""
        self._add(kind, 0)

    def again(self, kind: Hashable, count: int = 1) -> None:
        """So many came for the second."""
        self._add(kind, 1, count)

    def share(self, kind: Hashable) -> float:
        """Of those that came once, how many came again, about."""
        firsts, again = self._counts.get(kind, (0.0, 0.0))
        share = (self._all[1] + _PRIOR * _AT_FIRST) / (self._all[0] + _PRIOR)
        return (again + _PRIOR * share) / (firsts + _PRIOR)

    def _add(self, kind: Hashable, what: int, count: int = 1) -> None:
        counts = self._counts.setdefault(kind, [0.0, 0.0])
        self._counts.move_to_end(kind)
        if len(self._counts) > _MOST_KINDS:
            self._counts.popitem(last=False)
        for each in (counts, self._all):
            each[what] += count
            if each[0] >= _MOST_FIRSTS:
                each[0], each[1] = each[0] / 2, each[1] / 2


class LowerShadows:
    """One for each of SHARES. memory and lower: how many objects there is room for in the real ones."""

    def __init__(self, kinds: Kinds, memory: Callable[[], int], lower: Callable[[], int]) -> None:
        self._kinds = kinds
        self._rooms = (memory, lower)
        self._asked: Waiting[tuple[int, Hashable]] = Waiting(_LONGEST)
        self._rate = ALL  # of so many objects that many are in the sample:
        self._limit = limit_of(ALL)  # those whose keys are below
        self._now = self._look_at = 0
        self.best = 0
        self._begin()

    def _begin(self) -> None:
        self._memory: OrderedDict[int, None] = OrderedDict()
        self._lower: list[OrderedDict[int, None]] = [OrderedDict() for _ in SHARES]
        self._found = [0.0] * len(SHARES)
        self._once: OrderedDict[int, Hashable] = OrderedDict()  # names that came once, and their kinds
        self._names = Names()

    @property
    def share(self) -> float:
        """Of a kind that has to have come again for it to be admitted as it comes."""
        return SHARES[self.best]

    def ask(self, keys: Sequence[bytes], known: int, kind: Hashable) -> None:
        """A chain is looked up, whose first `known` came before; the rest is of a kind. It is looked at in `work`."""
        self._asked.add(keys, (known, kind))

    def forget(self) -> None:
        """The tiers are not what they were, nor is what the shadows hold: they begin anew."""
        self._asked.clear()
        self._begin()

    def work(self) -> Iterator[None]:
        """Look at what was asked; yields between two chains."""
        while self._asked:
            keys, (known, kind) = self._asked.take()
            self._fit()
            for at in reversed(range(len(keys))):
                if keys[at] < self._limit:
                    self._use(hash(keys[at]), kind if at >= known else None)
            self._shrink()
            yield

    def _fit(self) -> None:
        """Sample as much as a shadow can hold. A new rate begins anew."""
        rate, lower = ALL, self._rooms[1]()
        while rate > 1 and rate * lower > 2 * _CAPACITY * ALL:
            rate //= 2
        if not self._rate // 2 <= rate <= self._rate * 2:
            self._rate = rate
            self._limit = limit_of(rate)
            self._begin()

    def _use(self, name: int, kind: Hashable) -> None:
        self._now += 1
        in_memory = name in self._memory
        known = name in self._names
        if not known:
            self._names.add(name, 0)
            self._kinds.came(kind)
            self._once[name] = kind
        elif name in self._once:
            self._kinds.again(self._once.pop(name))
        share = 2.0 if known else self._kinds.share(kind)
        for number, lower in enumerate(self._lower):
            held = name in lower
            self._found[number] += held or in_memory
            if held:
                lower.move_to_end(name)
            elif share >= SHARES[number]:
                lower[name] = None
        self._memory[name] = None
        self._memory.move_to_end(name)

    def _shrink(self) -> None:
        memory, lower = (max(1, room() * self._rate // ALL) for room in self._rooms)
        for held, room in ((self._memory, memory), *((each, lower) for each in self._lower)):
            while len(held) > room:
                held.popitem(last=False)
        while len(self._once) > 8 * _CAPACITY:
            self._once.popitem(last=False)
        if self._now >= self._look_at:
            self._look_at = self._now + max(1, min(lower, _CAPACITY) // _LOOKS)
            self._choose()

    def _choose(self) -> None:
        best = max(self._found)
        self.best = max(number for number, found in enumerate(self._found) if found >= _ENOUGH * best)
        if best < _SURE:
            self.best = 0
        self._found = [found * _KEPT for found in self._found]
