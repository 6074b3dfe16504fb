# SPDX-License-Identifier: Apache-2.0
"""What all policies share: only leaves go, and with the last child its parent becomes one.

A policy says where a node stands. The rest is here: who is a candidate, and the choice, in slices, of enough of them.
Only leaves are candidates: a lookup of 500 chunks moves one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Generator, Sequence
from typing import Generic

from loracache.cache.policy.line import Front, Line, R
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Index, Node
from loracache.results import Departure
from loracache.tiers import Tier

__all__ = ["LeafFirst", "Ranked"]

_REASONS = (Departure.POLICY_ONCE, Departure.POLICY_AGAIN)  # of a policy with two lines
_SLICE = 64  # candidates looked at between two looks at the socket


class LeafFirst(ABC, Generic[R]):
    """Victims of one tier. `cost` gives the bytes a node takes in the tier; `lines` is how many lines there are.
    `speeds` say what it takes to have a node again; `without` are those of the policy's PARTS that are switched off, to
    see what each is good for."""

    PARTS: tuple[str, ...] = ()

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int], lines: int = 1) -> None:
        self._index = index
        self._tier = tier
        self._cost = cost
        self._lines: list[Line[R]] = [Line() for _ in range(lines)]
        self.speeds = Speeds()
        self.without: Collection[str] = ()

    def __len__(self) -> int:
        return sum(map(len, self._lines))

    def candidates(self) -> dict[R, Node]:
        """All of them by rank, for audits."""
        return {rank: node for line in self._lines for rank, node in line.all().items()}

    # -- what a policy says ----------

    @abstractmethod
    def offer(self, node: Node) -> None:
        """Make `node` a candidate; an offer of one that is a candidate already is ignored by the index."""

    @abstractmethod
    def used(self, node: Node, before: int) -> None:
        """A candidate was used: its tick was `before`."""

    @abstractmethod
    def withdraw(self, node: Node) -> None:
        """A candidate has left the tier, or is no leaf any more."""

    def gone(self, node: Node) -> None:
        """A node has left the tier, a candidate or not."""

    def asked(self, keys: Sequence[bytes]) -> None:
        """A lookup asks for a chain, held or not."""

    def expect(self, batch: float) -> None:
        """So many requests run at once, as engines say; 0: nobody said."""

    @abstractmethod
    def place(self, node: Node) -> R:
        """The rank that `node` has in its line, or would have there."""

    def line_of(self, node: Node) -> int:
        """Which of the lines is `node`'s."""
        return 0

    def pick(self, fronts: Sequence[Front[R]], going: Sequence[int]) -> Front[R] | None:
        """Where the next to go is looked for. going: the bytes chosen of each line so far."""
        return fronts[0] if fronts[0].first() is not None else None

    def reason(self, node: Node) -> Departure:
        """Why a victim goes, where it stands before it has gone."""
        return Departure.POLICY if len(self._lines) != len(_REASONS) else _REASONS[self.line_of(node)]

    def spared(self, node: Node) -> bool:
        """Whether the first in line stays for now; then it has another place from now on."""
        return False

    # -- the choice ----------

    def victims(self, nbytes: int, protected: Container[Node] = ()) -> Generator[None, None, tuple[list[Node], int]]:
        """Nodes, children before parents, and their bytes: at least `nbytes`, or all there are. Changes nothing but
        who stands where; yields between two slices, and what was chosen before one may be in use after it."""
        tier = self._tier
        chosen: dict[Node, None] = {}
        left: dict[Node, int] = {}  # parents of the chosen -> their children that stay
        fronts = [Front(line) for line in self._lines]
        going = [0] * len(fronts)
        freed = looked = 0
        while freed < nbytes and (front := self.pick(fronts, going)) is not None:
            looked += 1
            if not looked % _SLICE:
                yield
            rank, node = front.pop()
            offered = node.offered >> tier & 1
            if not offered and not self._index.evictable(node, tier):
                continue
            place = self.place(node)
            if place != rank:  # used meanwhile: it stands further behind
                if not offered:
                    fronts[self.line_of(node)].push(place, node)
                continue
            if node in chosen:
                continue
            if left.get(node, node.children[tier]) or not self._index.evictable(node, tier):
                if offered:
                    self.withdraw(node)  # offered again when its last child, lease, pin or write is gone
                continue
            if node in protected:
                continue
            if self.spared(node):
                if not offered:
                    fronts[self.line_of(node)].push(self.place(node), node)
                continue
            chosen[node] = None
            takes = self._cost(node)
            freed += takes
            going[self.line_of(node)] += takes
            parent = node.parent
            if parent is not None:
                left[parent] = left.get(parent, parent.children[tier]) - 1
                if not left[parent] and not parent.offered >> tier & 1 and self._index.evictable(parent, tier):
                    fronts[self.line_of(parent)].push(self.place(parent), parent)
        return list(chosen), freed


class Ranked(LeafFirst[tuple[float, int]]):
    """A policy whose ranks are no function of the tick alone: (what it says, the tick), kept for each candidate."""

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int], lines: int = 1) -> None:
        super().__init__(index, tier, cost, lines)
        self._standing: dict[Node, tuple[int, tuple[float, int]]] = {}  # -> its line, and its rank there

    @abstractmethod
    def rank(self, node: Node) -> tuple[float, int]:
        """Where `node` belongs now, in the line that is its own now."""

    def place(self, node: Node) -> tuple[float, int]:
        """The rank that `node` has in its line, or would have there."""
        standing = self._standing.get(node)
        return self.rank(node) if standing is None else standing[1]

    def offer(self, node: Node) -> None:
        """Make `node` a candidate."""
        node.offered |= 1 << self._tier
        line, rank = self._standing[node] = self.line_of(node), self.rank(node)
        self._lines[line].put(rank, node)

    def used(self, node: Node, before: int) -> None:
        """A candidate was used."""
        self._move(node)

    def withdraw(self, node: Node) -> None:
        """A candidate has left the tier, or is no leaf any more."""
        node.offered &= ~(1 << self._tier)
        line, rank = self._standing.pop(node)
        self._lines[line].take(rank)

    def _move(self, node: Node) -> None:
        """A candidate, if it is one, belongs elsewhere now."""
        standing = self._standing.pop(node, None)
        if standing is not None:
            line, rank = standing
            self._lines[line].take(rank)
            self.offer(node)
