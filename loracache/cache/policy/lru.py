# SPDX-License-Identifier: Apache-2.0
"""Least recently used leaf first.

Candidates stand in the order of their ticks. A use moves a candidate to the end, and only leaves are candidates: a
lookup of 500 chunks moves one. So no call ever has to put right what many uses before it left behind.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Container, Generator, Iterator

from sortedcontainers import SortedDict

from loracache.cache.state.index import Index, Node
from loracache.tiers import Tier

__all__ = ["LRU"]

_SLICE = 64  # candidates looked at between two looks at the socket


class LRU:
    """Victims of one tier in the order of their last use. `cost` gives the bytes a node takes in the tier."""

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int]) -> None:
        self._index = index
        self._tier = tier
        self._cost = cost
        # By tick, which no two nodes share. Most become candidates as the latest used of all and stand in `_recent`,
        # where that costs next to nothing; the others, and those that were looked at, in `_line`.
        self._recent: OrderedDict[int, Node] = OrderedDict()
        self._latest = 0  # no tick in `_recent` is above
        self._line: SortedDict[int, Node] = SortedDict()

    def __len__(self) -> int:
        return len(self._line) + len(self._recent)

    def candidates(self) -> dict[int, Node]:
        """All of them by tick, for audits."""
        return {**self._line, **self._recent}

    def offer(self, node: Node) -> None:
        """Make `node` a candidate; an offer of one that is a candidate already is ignored by the index."""
        node.offered |= 1 << self._tier
        if node.tick > self._latest:
            self._recent[node.tick] = node
            self._latest = node.tick
        else:
            self._line[node.tick] = node

    def used(self, node: Node, before: int) -> None:
        """A candidate was used: its tick was `before`."""
        self._take(before)
        self.offer(node)

    def withdraw(self, node: Node) -> None:
        """A candidate has left the tier, or is no leaf any more."""
        node.offered &= ~(1 << self._tier)
        self._take(node.tick)

    def _take(self, tick: int) -> None:
        if self._recent.pop(tick, None) is None:
            del self._line[tick]

    def victims(self, nbytes: int, protected: Container[Node] = ()) -> Generator[None, None, tuple[list[Node], int]]:
        """Nodes, children before parents, and their bytes: at least `nbytes`, or all there are. Changes nothing but
        who is a candidate; yields between two slices, and what was chosen before one may be in use after it."""
        tier = self._tier
        chosen: list[Node] = []
        left: dict[Node, int] = {}  # parents of the chosen -> their children that stay
        parents: list[tuple[int, Node]] = []  # a heap of those that no child keeps any more, and that are not in line
        freed = looked = 0
        line = self._in_line()
        upcoming = next(line, None)
        while freed < nbytes and (parents or upcoming is not None):
            looked += 1
            if not looked % _SLICE:
                yield
            if upcoming is None or (parents and parents[0][0] < upcoming[0]):
                tick, node = heapq.heappop(parents)
                if node.tick != tick:
                    heapq.heappush(parents, (node.tick, node))
                    continue
            else:
                tick, node = upcoming
                upcoming = next(line, None)
                if node.tick != tick:  # used meanwhile: it stands further behind
                    continue
            if left.get(node, node.children[tier]) or not self._index.evictable(node, tier):
                if node.offered >> tier & 1:
                    self.withdraw(node)  # offered again when its last child, lease, pin or write is gone
                continue
            if node in protected:
                continue
            chosen.append(node)
            freed += self._cost(node)
            parent = node.parent
            if parent is not None:
                left[parent] = left.get(parent, parent.children[tier]) - 1
                if not left[parent] and not parent.offered >> tier & 1 and self._index.evictable(parent, tier):
                    heapq.heappush(parents, (parent.tick, parent))
        return chosen, freed

    def _in_line(self) -> Iterator[tuple[int, Node]]:
        """The candidates in their order, whatever changes meanwhile."""
        last = 0
        while True:
            upcoming = next(self._line.irange(last, inclusive=(False, True)), None)
            if self._recent and (upcoming is None or upcoming > next(iter(self._recent))):
                upcoming, node = self._recent.popitem(last=False)
                self._line[upcoming] = node
            if upcoming is None:
                return
            last = upcoming
            yield last, self._line[last]
