# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: one small class each, chosen by name in the configuration.

May import: cache.state, tiers
Threads: the daemon's loop alone. A policy orders nodes and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Protocol

from loracache.cache.policy.lru import LRU
from loracache.cache.state.index import Index, Node
from loracache.tiers import Tier

__all__ = ["LRU", "POLICIES", "Policy"]


class Policy(Protocol):
    """Chooses the victims of one tier. The index offers nodes; the policy never changes the index."""

    def offer(self, node: Node) -> None:
        """`node` has become a leaf of the tier that may leave it."""

    def victims(self, nbytes: int, protected: Container[Node]) -> list[Node] | None:
        """Nodes whose bytes add up to at least `nbytes`, children before parents, none of them `protected`; or None,
        and nothing changed, where there are not enough.
        """


POLICIES: dict[str, Callable[[Index, Tier, Callable[[Node], int]], Policy]] = {"lru": LRU}
