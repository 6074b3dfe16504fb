# SPDX-License-Identifier: Apache-2.0
"""What all policies share: only leaves go, and with the last child its parent becomes one.

A policy says where a node stands. The rest is here and in choice.py: who is a candidate, and the choice of enough.
Only leaves are candidates: a lookup of 500 chunks moves one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Generator, Iterator, Sequence
from typing import Generic

from loracache.cache.policy.choice import Choice
from loracache.cache.policy.line import Front, Line, R, repack
from loracache.cache.policy.quotas import Belongs
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Index, Node
from loracache.results import Departure
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["LeafFirst", "Ranked"]


class LeafFirst(ABC, Generic[R]):
    """Victims of one tier. `cost` gives the bytes a node takes in the tier; `lines` is how many lines there are.
    `speeds` say what it takes to have a node again; `without` are those of the policy's PARTS that are switched off, to
    see what each is good for."""

    PARTS: tuple[str, ...] = ()
    ONCE: int | None = None  # the line of what came once, of a policy that keeps it apart
    SHARED: tuple[str, ...] = ()  # what siblings have in common: what is learned of the whole tier

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int], lines: int = 1) -> None:
        self._index = index
        self._tier = tier
        self._cost = cost
        self._lines: list[Line[R]] = [Line() for _ in range(lines)]
        self.speeds = Speeds()
        self.without: Collection[str] = ()

    def __len__(self) -> int:
        return sum(map(len, self._lines))

    @property
    def lines(self) -> Sequence[Line[R]]:
        """Its candidates."""
        return self._lines

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

    def shrink(self) -> None:
        """Few nodes are left of very many: keep no memory for the others."""
        for line in self._lines:
            line.shrink()
        for each in vars(self).values():
            if isinstance(each, dict):  # what a policy knows of nodes
                repack(each)

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
        if self.ONCE is None or node.kind is Kind.LORA:
            return Departure.POLICY
        return Departure.POLICY_ONCE if self.line_of(node) == self.ONCE else Departure.POLICY_AGAIN

    def spared(self, node: Node) -> bool:
        """Whether the first in line stays for now; then it has another place from now on."""
        return False

    # -- the choice ----------

    def victims(
        self, nbytes: int, protected: Container[Node] = (), wanting: Belongs | None = None
    ) -> Generator[None, None, tuple[list[Node], int]]:
        """Nodes, children before parents, and their bytes: at least `nbytes`, or all there are. Changes nothing but
        who stands where; yields between two slices, and what was chosen before one may be in use after it."""
        yield from self.prepare()
        choice = Choice(self._index, self._tier, protected, self._cost)
        yield from choice.take(self, nbytes)
        return list(choice.chosen), choice.freed

    def own_victims(
        self, nbytes: int, protected: Container[Node], wanting: Belongs
    ) -> Generator[None, None, tuple[list[Node], int]]:
        """Nobody: here nobody has a quota."""
        return [], 0
        yield

    def may_push(self, wanting: Belongs | None, node: Node) -> bool:
        """Always."""
        return True

    def pushed(self, node: Node) -> None:
        """Nobody counts it."""

    def beyond(self, wanting: Belongs, nbytes: int) -> int:
        """Nothing is."""
        return 0

    def prepare(self) -> Iterator[None]:
        """What is to be done before a choice; yields between two slices."""
        return iter(())

    def sibling(self) -> LeafFirst[R]:
        """Another for a part of the same tier, without candidates."""
        sibling = type(self)(self._index, self._tier, self._cost)
        for name in ("speeds", "without", *self.SHARED):
            setattr(sibling, name, getattr(self, name))
        return sibling


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
