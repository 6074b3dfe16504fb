# SPDX-License-Identifier: Apache-2.0
"""Pins: an operator's word that objects stay in a tier, until unpinned or for a time. Threading: the cache's thread."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

from loracache.cache.state.events import Events
from loracache.cache.state.index import Index, Node
from loracache.errors import UsageError
from loracache.tiers import Tier

__all__ = ["Pins"]

_WHERE = (Tier.CPU, Tier.DISK)


class Pins:
    """Sets and ends pins; the index keeps what is pinned, and with it its ancestors, in the tier."""

    def __init__(self, index: Index, events: Events, clock: Callable[[], float]) -> None:
        self._index = index
        self._events = events
        self._clock = clock
        self._ends: dict[tuple[Node, Tier], float] = {}
        self._queue: list[tuple[float, int, Node, Tier]] = []  # a heap; what is not in `_ends` any more is stale
        self._order = itertools.count()

    def pin(self, keys: Sequence[bytes], tier: Tier, ttl: float | None = None) -> int:
        """Keep objects in `tier` until unpinned or `ttl` seconds have passed. Answers how many of `keys` are in the
        tier and pinned now. Raises UsageError for a tier that cannot keep anything."""
        if tier not in _WHERE:
            raise UsageError(f"cannot pin in tier {tier.label!r}: give cpu or disk")
        pinned = 0
        for node in map(self._index.get, keys):
            if node is None or not node.held_in(tier):
                continue
            if not node.pins >> tier & 1:
                self._events.add("pinned", tier, "asked", node)
            node.pins |= 1 << tier
            pinned += 1
            self._ends.pop((node, tier), None)
            if ttl is not None:
                end = self._ends[(node, tier)] = self._clock() + ttl
                heapq.heappush(self._queue, (end, next(self._order), node, tier))
        return pinned

    def unpin(self, keys: Sequence[bytes], tier: Tier) -> int:
        """End pins; answers how many of `keys` were pinned."""
        nodes = [node for node in map(self._index.get, keys) if node is not None and node.pins >> tier & 1]
        for node in nodes:
            self._unpin(node, tier, "asked")
        return len(nodes)

    def tick(self) -> None:
        """End the pins whose time is over."""
        now = self._clock()
        while self._queue and self._queue[0][0] <= now:
            end, _, node, tier = heapq.heappop(self._queue)
            if self._ends.get((node, tier)) == end:
                self._unpin(node, tier, "time_over")

    def _unpin(self, node: Node, tier: Tier, cause: str) -> None:
        self._ends.pop((node, tier), None)
        if node.pins >> tier & 1:  # one that left the tier meanwhile lost its pin then
            node.pins &= ~(1 << tier)
            self._events.add("unpinned", tier, cause, node)
            self._index.offer(node, tier)
