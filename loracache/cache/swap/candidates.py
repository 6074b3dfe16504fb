# SPDX-License-Identifier: Apache-2.0
"""Which absent object is worth most in memory: roots of what only the disk holds, kept as they come and go.

A root is an object of the disk that the arena lacks, and whose parent the arena has, or that has none. What has become
one is noted when it does: as it leaves the arena, as the disk is found to hold it, as its parent arrives. What is none
any more is noticed when it is looked at. So nothing looks at all nodes, ever. What stands beside a chain and was not
read yet is none: of all that, a prefix needs what is near its end.

Adapters stand first; the rest in the order of FASTLIBRA's Retain_Eval in the form of policy/cost.py, whose order time
does not change: S = t_last + tau * ln(seconds to load / bytes * visits). Threading: the cache's thread.
"""

from __future__ import annotations

from math import log

from sortedcontainers import SortedDict

from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Node
from loracache.cache.state.node import State
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Candidates", "is_root", "parent_is_there"]

_MOST = 65_536  # remembered; of more, the best
_CHILDREN = 256  # of one parent that are looked at when it arrives: those linked last
_WEIGHT = 1 / 64  # of the last that left in the mean age


class Candidates:
    """The roots, best first. at most `most` of them are remembered."""

    def __init__(self, speeds: Speeds | None = None, most: int = _MOST) -> None:
        self._speeds = speeds or Speeds()
        self._most = most
        self._order: SortedDict[tuple[bool, float, int], Node] = SortedDict()  # the worst first
        self._rank: dict[Node, tuple[bool, float, int]] = {}
        self._age = 0.0  # tau, in ticks
        self._now = 0

    def __len__(self) -> int:
        return len(self._order)

    def changed(self, node: Node, tier: Tier, entered: bool) -> None:
        """A node has entered a tier, or left it."""
        if tier is Tier.CPU and entered:
            self.discard(node)
            self._look_below(node)
        elif tier is Tier.CPU:
            self._now = max(self._now, node.tick)
            self._age += _WEIGHT * (self._now - node.tick - self._age)
            self._offer(node)
        elif tier is Tier.DISK and entered:
            self._offer(node)
        elif tier is Tier.DISK:
            self.discard(node)

    def best(self) -> Node | None:
        """The one that is worth most now. It stays a candidate until it is taken or its state changes."""
        while self._order:
            rank, node = self._order.peekitem()
            best: Node = node
            if is_root(best):
                return best
            del self._order[rank], self._rank[node]
        return None

    def discard(self, node: Node) -> None:
        """It is one no more, or is being raised."""
        rank = self._rank.pop(node, None)
        if rank is not None:
            del self._order[rank]

    def _offer(self, node: Node) -> None:
        if not is_root(node) or (node.kind is Kind.BESIDE and not node.hits):
            return
        self.discard(node)
        worth = self._speeds.by_size(node, Tier.CPU) * self._speeds.prefill
        rank = node.kind is Kind.LORA, node.tick + self._age * log(worth * (node.hits + 1)), node.tick
        self._order[rank] = node
        self._rank[node] = rank
        self._now = max(self._now, node.tick)
        if len(self._order) > self._most:
            _, worst = self._order.popitem(0)
            del self._rank[worst]

    def _look_below(self, node: Node) -> None:
        child, looked = node.first_child, 0
        while child is not None and looked < _CHILDREN:
            self._offer(child)
            child, looked = child.next_sibling, looked + 1


def is_root(node: Node) -> bool:
    """Whether it can be raised now: the disk alone has it, and its parent keeps nothing out."""
    absent = node.state(Tier.CPU) in (State.ABSENT, State.CONDEMNED)
    return absent and node.held_in(Tier.DISK) and parent_is_there(node)


def parent_is_there(node: Node) -> bool:
    """Whether memory has the node's parent, or there is none. An adapter that no tier has is one that an engine serves:
    its KV does not wait for it."""
    parent = node.parent
    return parent is None or parent.held_in(Tier.CPU) or (parent.kind is Kind.LORA and not parent.present)
