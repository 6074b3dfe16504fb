# SPDX-License-Identifier: Apache-2.0
"""SIEVE, leaf first (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024).

Objects stand in the order they came in. A hand goes from the oldest to the newest and begins again: what was used since
it passed last is passed by once more, what was not goes. Here the hand is the front of the line: what it passes by
stands behind all others, (lap + 1, when it came in), and what is new is reached in this lap. Who becomes a leaf only
behind the hand is looked at at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loracache.cache.policy.leaf_first import Ranked
from loracache.cache.state.index import Index, Node
from loracache.tiers import Tier

__all__ = ["Sieve"]


@dataclass(slots=True)
class _Standing:
    """lap: in which the hand reaches it. came: its tick when it came in. seen: its tick when the hand passed last."""

    lap: int
    came: int
    seen: int


class Sieve(Ranked):
    """Victims of one tier. Remembers three numbers of each node in the tier."""

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int]) -> None:
        super().__init__(index, tier, cost)
        self._lap = 0  # that the hand is in
        self._known: dict[Node, _Standing] = {}

    def rank(self, node: Node) -> tuple[float, int]:
        """Where the hand reaches it."""
        known = self._known.get(node)
        if known is None:
            known = self._known[node] = _Standing(self._lap, node.tick, node.tick)
        return known.lap, known.came

    def used(self, node: Node, before: int) -> None:
        """Nothing: its tick says so when the hand comes."""

    def spared(self, node: Node) -> bool:
        """Whether it was used since the hand passed last."""
        known = self._known[node]
        self._lap = max(self._lap, known.lap)
        if known.seen == node.tick:
            return False
        known.seen = node.tick
        known.lap = self._lap + 1
        self._move(node)
        return True

    def gone(self, node: Node) -> None:
        """It has left the tier."""
        self._known.pop(node, None)
