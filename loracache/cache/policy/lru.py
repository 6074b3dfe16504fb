# SPDX-License-Identifier: Apache-2.0
"""Least recently used leaf first.

A heap of (tick, node) corrected lazily: a use only writes the node's tick, and an entry that proves stale when it is
popped is pushed back with the newer tick. A lookup of 500 chunks therefore costs the policy nothing.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Container

from loracache.cache.state.index import Index, Node
from loracache.tiers import Tier

__all__ = ["LRU"]


class LRU:
    """Victims of one tier in the order of their last use. `cost` gives the bytes a node takes in the tier."""

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int]) -> None:
        self._index = index
        self._tier = tier
        self._cost = cost
        self._heap: list[tuple[int, int, Node]] = []
        self._order = itertools.count()

    def offer(self, node: Node) -> None:
        """Make `node` a candidate; an offer of one that is a candidate already is ignored by the index."""
        node.offered |= 1 << self._tier
        if len(self._heap) > 2 * self._index.objects[self._tier] + 1024:
            self._drop_stale()
        heapq.heappush(self._heap, (node.tick, next(self._order), node))

    def victims(self, nbytes: int, protected: Container[Node] = ()) -> list[Node] | None:
        """Nodes worth at least `nbytes`, children before parents, or None and nothing changed."""
        tier, heap = self._tier, self._heap
        chosen: list[Node] = []
        skipped: list[Node] = []
        left: dict[Node, int] = {}  # parents of the chosen -> their children that stay
        freed = 0
        while freed < nbytes and heap:
            tick, _, node = heapq.heappop(heap)
            if tick != node.tick:
                heapq.heappush(heap, (node.tick, next(self._order), node))
                continue
            node.offered &= ~(1 << tier)
            if left.get(node, node.children[tier]) or not self._index.evictable(node, tier):
                continue  # offered again when its last child, lease, pin or write is gone
            if node in protected:
                skipped.append(node)
                continue
            chosen.append(node)
            freed += self._cost(node)
            parent = node.parent
            if parent is not None:
                left[parent] = left.get(parent, parent.children[tier]) - 1
                if not left[parent] and not parent.offered >> tier & 1 and self._index.evictable(parent, tier):
                    self.offer(parent)
        enough = freed >= nbytes
        for node in skipped if enough else [*chosen, *skipped]:
            self._index.offer(node, tier)
        return chosen if enough else None

    def _drop_stale(self) -> None:
        """Forget entries of nodes that left the tier by other ways than `victims`, so that the heap stays in bounds."""
        live = [entry for entry in self._heap if entry[2].held_in(self._tier)]
        for _, _, node in self._heap:
            if not node.held_in(self._tier):
                node.offered &= ~(1 << self._tier)
        self._heap[:] = live
        heapq.heapify(self._heap)
