# SPDX-License-Identifier: Apache-2.0
"""Greedy-Dual-Size-Frequency, leaf first (Cherkasova, HP Laboratories, 1998).

    H = L + frequency * cost / size

with L the H of the last victim at the time of the node's last use: what was not used for long falls behind because L
grows. cost is the seconds to have it again, by those of computing as much KV, size its bytes, so that adapters and KV
are weighed in one currency, which stays the same where an engine's speed does not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from loracache.cache.policy.leaf_first import Ranked
from loracache.cache.state.index import Index, Node
from loracache.tiers import Tier

__all__ = ["GDSF"]

_STEPS = 4096  # of L that are remembered; of uses before them the oldest stands for all


class GDSF(Ranked):
    """Victims of one tier. Remembers nothing of a node: when it was used last, its tick says, and what L was then."""

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int]) -> None:
        super().__init__(index, tier, cost)
        self._now = 0
        self._ticks = [0]  # since when L was ...
        self._levels = [0.0]  # ... that

    def rank(self, node: Node) -> tuple[float, int]:
        """H."""
        self._now = max(self._now, node.tick)
        level = self._levels[max(0, bisect_right(self._ticks, node.tick) - 1)]
        worth = self.speeds.by_size(node, self._tier) * self.speeds.prefill
        return level + (node.hits + 1) * worth, node.tick

    def withdraw(self, node: Node) -> None:
        """A candidate has left the tier, which raises L, or is no leaf any more."""
        height = self._standing[node][1][0]
        super().withdraw(node)
        if node.held_in(self._tier):
            return
        first = self._lines[0].first()
        if first is not None:  # somebody asked for it: it was not the lowest
            height = min(height, first[0])
        if height > self._levels[-1]:
            self._rise(height)

    def _rise(self, level: float) -> None:
        if self._ticks[-1] == self._now:
            self._levels[-1] = level
            return
        self._ticks.append(self._now)
        self._levels.append(level)
        if len(self._ticks) > 2 * _STEPS:  # of two neighbours one stands for both
            self._ticks[:_STEPS] = self._ticks[:_STEPS:2]
            self._levels[:_STEPS] = self._levels[:_STEPS:2]
