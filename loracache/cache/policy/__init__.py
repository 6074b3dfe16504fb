# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: one small class each, chosen by name in the configuration.

May import: cache.state, errors, results, storage_backends, tiers
Threads: the daemon's loop alone. A policy orders nodes and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Generator, Iterator, Sequence
from typing import Protocol

from loracache.cache.policy.adaptive import Adaptive
from loracache.cache.policy.admission import AdaptiveAdmission, AdmitAll, SecondTouch
from loracache.cache.policy.cost import Cost
from loracache.cache.policy.gdsf import GDSF
from loracache.cache.policy.lru import LRU
from loracache.cache.policy.quotas import Belongs
from loracache.cache.policy.s3_fifo import S3FIFO
from loracache.cache.policy.sieve import Sieve
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Index, Node
from loracache.results import Departure, Refusal
from loracache.tiers import Tier

__all__ = [
    "ADMISSIONS", "GDSF", "LRU", "POLICIES", "S3FIFO", "Adaptive", "AdaptiveAdmission", "Admission", "AdmitAll", "Cost",
    "Policy", "SecondTouch", "Sieve",
]  # fmt: skip


class Policy(Protocol):
    """Chooses the victims of one tier. The index offers nodes; the policy never changes the index. without: parts
    of it that are switched off. speeds: what it takes to have a node again."""

    without: Collection[str]
    speeds: Speeds

    def offer(self, node: Node) -> None:
        """`node` has become a leaf of the tier that may leave it."""

    def used(self, node: Node, before: int) -> None:
        """A node that was offered was used: its tick was `before`."""

    def withdraw(self, node: Node) -> None:
        """A node that was offered has left the tier, or is no leaf of it any more."""

    def gone(self, node: Node) -> None:
        """A node has left the tier, offered or not."""

    def asked(self, keys: Sequence[bytes]) -> None:
        """A lookup asks for a chain, held or not."""

    def expect(self, batch: float) -> None:
        """So many requests run at once, as engines say; 0: nobody said."""

    def shrink(self) -> None:
        """Few nodes are left of very many: keep no memory for the others."""

    def reason(self, node: Node) -> Departure:
        """Why a victim goes, where it stands before it has gone."""

    def victims(
        self, nbytes: int, protected: Container[Node], wanting: Belongs | None = None
    ) -> Generator[None, None, tuple[list[Node], int]]:
        """Nodes, children before parents, none of them `protected`, and the bytes that they add up to: at least
        `nbytes`, or those of all that may go for `wanting`. Yields between two slices of the choice, for others to be
        served: what was chosen before may be in use after it, or its owner at its share, which whoever evicts it has
        to look at again.
        """

    def own_victims(
        self, nbytes: int, protected: Container[Node], wanting: Belongs
    ) -> Generator[None, None, tuple[list[Node], int]]:
        """The same among what is of the owners of `wanting` that have a limit."""

    def may_push(self, wanting: Belongs | None, node: Node) -> bool:
        """Whether quotas allow that `node` leaves for `wanting` now."""

    def pushed(self, node: Node) -> None:
        """It leaves for others."""

    def beyond(self, wanting: Belongs, nbytes: int) -> int:
        """By how many bytes an object of so many would be beyond a hard quota; 0 where it fits."""


class Admission(Protocol):
    """Says what of the arena is written to the lower tiers."""

    def asked(self, keys: Sequence[bytes], found: Sequence[Node]) -> None:
        """A lookup asks for a chain, of which the first are `found`."""

    def work(self) -> Iterator[None]:
        """Look at what was asked; yields between two slices."""

    def came(self, node: Node) -> Refusal:
        """Why an object that has come into the arena is not to be written down, or NONE."""

    def again(self, node: Node) -> bool:
        """Whether one that is used in the arena, and that some lower tier lacks, is to be written down."""


POLICIES: dict[str, Callable[[Index, Tier, Callable[[Node], int]], Policy]] = {
    "lru": LRU,
    "s3fifo": S3FIFO,
    "sieve": Sieve,
    "gdsf": GDSF,
    "cost": Cost,
    "adaptive": Adaptive,
}

ADMISSIONS: dict[str, Callable[[Callable[[], int], Callable[[], int], Callable[[], int]], Admission]] = {
    "all": AdmitAll,
    "second_touch": SecondTouch,
    "adaptive": AdaptiveAdmission,
}
