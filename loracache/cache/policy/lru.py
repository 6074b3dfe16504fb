# SPDX-License-Identifier: Apache-2.0
"""Least recently used leaf first: candidates stand in the order of their ticks, which no two nodes share."""

from __future__ import annotations

from loracache.cache.policy.leaf_first import LeafFirst
from loracache.cache.state.index import Node

__all__ = ["LRU"]


class LRU(LeafFirst[int]):
    """Victims of one tier in the order of their last use. Keeps nothing of a node but its place."""

    def offer(self, node: Node) -> None:
        """Make `node` a candidate; an offer of one that is a candidate already is ignored by the index."""
        node.offered |= 1 << self._tier
        self._lines[0].put(node.tick, node)

    def used(self, node: Node, before: int) -> None:
        """A candidate was used: its tick was `before`."""
        line = self._lines[0]
        line.take(before)
        line.put(node.tick, node)

    def withdraw(self, node: Node) -> None:
        """A candidate has left the tier, or is no leaf any more."""
        node.offered &= ~(1 << self._tier)
        self._lines[0].take(node.tick)

    def place(self, node: Node) -> int:
        """Its tick."""
        return node.tick
