# SPDX-License-Identifier: Apache-2.0
"""Adaptive, leaf first: how much room what came once may take is what did best lately in shadows of the tier.

Objects stand in two lines: those that came once, and those that came again, that is, were found by a lookup or have
names that are remembered from before. Each line has the order of the last uses, which many uses put off a little:

    S = t_last + 0.5 * age * ln(hits + 1)                       age: the mean age of victims, in uses

What came once goes first as long as it takes more than a share of the tier. With a share of 1 the lower S goes, as in
LRU: best where the tier reaches as far as objects come again. With a share of 0 what is new stays as long as the next
that is new: best where the tier is small. Each of SHARES is tried all the time on a shadow of the tier (shadow.py), and
the best is in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import log

from loracache.cache.policy.leaf_first import Ranked
from loracache.cache.policy.line import Front
from loracache.cache.policy.names import Names
from loracache.cache.policy.shadow import SHARES, Shadows
from loracache.cache.state.index import Index, Node
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Adaptive"]

_ONCE, _AGAIN = 0, 1
_FREQUENCY = 0.5  # of the mean age of victims, for each time that an object's hits grow e-fold
_WEIGHT = 1 / 64  # of the last victim in that mean
Place = tuple[float, int]


class Adaptive(Ranked):
    """Victims of one tier. Remembers a number of each node in the tier, and the names of many that left."""

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int], shares: Sequence[float] = SHARES) -> None:
        super().__init__(index, tier, cost, lines=2)
        self._known: dict[Node, int] = {}  # -> the bytes it takes
        self._once: set[Node] = set()
        self._bytes = [0, 0]
        self._now = 0
        self._age = 0.0  # of those that left lately, in uses
        self._names = Names()
        self._shares = shares
        self._shadows = Shadows(lambda: index.objects[tier], shares)

    def asked(self, keys: Sequence[bytes]) -> None:
        """A lookup asks for a chain."""
        self._shadows.ask(keys)

    def line_of(self, node: Node) -> int:
        """Of those that came once, or of the others."""
        if node not in self._known:
            self._meet(node)
        if node.hits and node in self._once:
            self._once.remove(node)
            self._bytes[_ONCE] -= self._known[node]
            self._bytes[_AGAIN] += self._known[node]
        return _ONCE if node in self._once else _AGAIN

    def rank(self, node: Node) -> Place:
        """Its last use, the later the more it was used."""
        self._now = max(self._now, node.tick)
        return node.tick + _FREQUENCY * self._age * log(node.hits + 1), node.tick

    def pick(self, fronts: Sequence[Front[Place]], going: Sequence[int]) -> Front[Place] | None:
        """By the way that is in force."""
        once, again = fronts[_ONCE].first(), fronts[_AGAIN].first()
        if once is None or again is None:
            return fronts[_ONCE] if once is not None else fronts[_AGAIN] if again is not None else None
        share = self._shares[self._shadows.best]
        if share < 1:
            first = self._bytes[_ONCE] - going[_ONCE] > share * (sum(self._bytes) - sum(going))
        else:
            first = once < again
        return fronts[_ONCE] if first else fronts[_AGAIN]

    def gone(self, node: Node) -> None:
        """It has left the tier; its name is remembered."""
        nbytes = self._known.pop(node, None)
        if nbytes is not None:
            self._bytes[_ONCE if node in self._once else _AGAIN] -= nbytes
            self._once.discard(node)
            self._age += _WEIGHT * (self._now - node.tick - self._age)
            self._names.add(hash(node.key), len(self._known))

    def prepare(self) -> Iterator[None]:
        """What was asked since the last choice is looked at."""
        return self._shadows.work()

    def sibling(self) -> Adaptive:
        """See LeafFirst: the shadows are the whole tier's."""
        sibling = Adaptive(self._index, self._tier, self._cost, self._shares)
        sibling._shadows = self._shadows
        return sibling

    def _meet(self, node: Node) -> None:
        nbytes = self._known[node] = self._cost(node)
        once = not node.hits and node.kind is not Kind.LORA and hash(node.key) not in self._names
        self._bytes[_ONCE if once else _AGAIN] += nbytes
        if once:
            self._once.add(node)
