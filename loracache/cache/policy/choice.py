# SPDX-License-Identifier: Apache-2.0
"""One choice of victims of a tier, children before parents, in slices: over one policy, or over several that each have
a part of the tier's candidates.

Only leaves go, and with the last child that goes its parent is looked at where it would stand, in whichever policy it
belongs to. A choice changes nothing but who stands where; what was chosen before a yield may be in use after it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Sequence
from typing import Any, Protocol

from loracache.cache.policy.line import Front, Line
from loracache.cache.state.index import Index, Node
from loracache.tiers import Tier

__all__ = ["NO_LIMIT", "Choice", "Lines"]

_SLICE = 64  # candidates looked at between two looks at the socket
NO_LIMIT = 1 << 62


class Lines(Protocol):
    """What a choice asks of a policy: see LeafFirst."""

    @property
    def lines(self) -> Sequence[Line[Any]]:
        """Its candidates."""

    def pick(self, fronts: Sequence[Front[Any]], going: Sequence[int]) -> Front[Any] | None:
        """Where the next to go is looked for."""

    def place(self, node: Node) -> Any:
        """The rank that a node has in its line, or would have there."""

    def line_of(self, node: Node) -> int:
        """Which of the lines is a node's."""

    def spared(self, node: Node) -> bool:
        """Whether the first in line stays for now."""

    def withdraw(self, node: Node) -> None:
        """A node is no candidate any more."""


class Choice:
    """`chosen` are the victims so far, in the order in which they may go; `freed` is what they take of the tier.
    `uncovered` are policies to which a parent of one was added. whose(node): the policy that a node belongs to, where
    there are several; what stands elsewhere is passed by.
    """

    def __init__(
        self,
        index: Index,
        tier: Tier,
        protected: Container[Node],
        cost: Callable[[Node], int],
        whose: Callable[[Node], Lines] | None = None,
    ) -> None:
        self._index = index
        self._tier = tier
        self._protected = protected
        self._cost = cost
        self._whose = whose
        self._left: dict[Node, int] = {}  # parents of the chosen -> their children that stay
        self._open: dict[Lines, tuple[list[Front[Any]], list[int]]] = {}
        self._looked = 0
        self.chosen: dict[Node, None] = {}
        self.freed = 0
        self.uncovered: set[Lines] = set()

    def take(self, policy: Lines, nbytes: int, limit: int = NO_LIMIT) -> Generator[None, None, None]:
        """Choose among a policy's candidates until `nbytes` are freed in all, none of them that would have this policy
        lose more than `limit` bytes by this call. Yields between two slices."""
        tier, cost, whose = self._tier, self._cost, self._whose
        fronts, going = self._fronts(policy)
        while self.freed < nbytes and (front := policy.pick(fronts, going)) is not None:
            self._looked += 1
            if not self._looked % _SLICE:
                yield
            rank, node = front.pop()
            offered = node.offered >> tier & 1
            if not offered and not self._index.evictable(node, tier):
                continue
            if whose is not None and whose(node) is not policy:  # it is on its way to another
                continue
            place = policy.place(node)
            if place != rank:  # used meanwhile: it stands further behind
                if not offered:
                    fronts[policy.line_of(node)].push(place, node)
                continue
            if not self._may_go(node, policy, offered) or node in self._protected:
                continue
            if policy.spared(node):
                if not offered:
                    fronts[policy.line_of(node)].push(policy.place(node), node)
                continue
            takes = cost(node)
            if takes > limit:
                fronts[policy.line_of(node)].push(place, node)
                return
            limit -= takes
            self.chosen[node] = None
            self.freed += takes
            going[policy.line_of(node)] += takes
            if node.parent is not None:
                self._uncover(node.parent, policy)

    def _may_go(self, node: Node, policy: Lines, offered: int) -> bool:
        """Whether it goes; of one that is not offered `take` has seen that it is evictable."""
        if node in self.chosen:
            return False
        tier = self._tier
        if self._left.get(node, node.children[tier]) or (offered and not self._index.evictable(node, tier)):
            if offered:
                policy.withdraw(node)  # offered again when its last child, lease, pin or write is gone
            return False
        return True

    def _uncover(self, parent: Node, policy: Lines) -> None:
        tier = self._tier
        left = self._left[parent] = self._left.get(parent, parent.children[tier]) - 1
        if left or parent.offered >> tier & 1 or not self._index.evictable(parent, tier):
            return
        if self._whose is not None:
            policy = self._whose(parent)
            self.uncovered.add(policy)
        self._fronts(policy)[0][policy.line_of(parent)].push(policy.place(parent), parent)

    def _fronts(self, policy: Lines) -> tuple[list[Front[Any]], list[int]]:
        opened = self._open.get(policy)
        if opened is None:
            opened = self._open[policy] = [Front(line) for line in policy.lines], [0] * len(policy.lines)
        return opened
