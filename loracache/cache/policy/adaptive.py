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

from collections.abc import Callable, Container, Generator, Sequence
from math import log

from loracache.cache.policy.balance import Balance
from loracache.cache.policy.leaf_first import Ranked
from loracache.cache.policy.line import Front
from loracache.cache.policy.names import Names
from loracache.cache.policy.shadow import SHARES, Shadows
from loracache.cache.state.index import Index, Node
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Adaptive"]

_ONCE, _AGAIN, _LORA = 0, 1, 2
_FREQUENCY = 0.5  # of the mean age of victims, for each time that an object's hits grow e-fold
_WEIGHT = 1 / 64  # of the last victim in that mean
Place = tuple[float, int]


class Adaptive(Ranked):
    """Victims of one tier. Remembers a number of each node in the tier, and the names of many that left."""

    PARTS = ("balance", "cost", "count", "shadows")

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int], shares: Sequence[float] = SHARES) -> None:
        super().__init__(index, tier, cost, lines=3)
        self._known: dict[Node, int] = {}  # -> the bytes it takes
        self._once: set[Node] = set()
        self._bytes = [0, 0, 0]
        self._balance = Balance()
        self._adapters = 0  # in the tier
        self._now = 0
        self._age = 0.0  # of KV that left lately, in uses
        self._names = Names()
        self._shares = shares
        self._shadows = Shadows(lambda: index.objects[tier], shares)

    def asked(self, keys: Sequence[bytes]) -> None:
        """A lookup asks for a chain."""
        self._shadows.ask(keys)

    def line_of(self, node: Node) -> int:
        """Adapters', that of those that came once, or of those that came again."""
        if node not in self._known:
            self._meet(node)
        if node.hits and node in self._once:
            self._once.remove(node)
            self._bytes[_ONCE] -= self._known[node]
            self._bytes[_AGAIN] += self._known[node]
        if node.kind is Kind.LORA:
            return _LORA
        return _ONCE if node in self._once else _AGAIN

    def rank(self, node: Node) -> Place:
        """Its last use, the later the more it was used."""
        self._now = max(self._now, node.tick)
        if node.kind is Kind.LORA and "count" not in self.without:
            self._balance.used(node, self._age)
        return node.tick + _FREQUENCY * self._age * log(node.hits + 1), node.tick

    def pick(self, fronts: Sequence[Front[Place]], going: Sequence[int]) -> Front[Place] | None:
        """Adapters, where they take more than their part; else KV, by the way that is in force."""
        kv, lora = self._pick_kv(fronts, going), fronts[_LORA].first()
        if kv is None or lora is None:
            return kv if lora is None else fronts[_LORA]
        if "balance" in self.without:
            return fronts[_LORA] if lora < (kv.first() or lora) else kv
        taken, count = self._bytes[_LORA] - going[_LORA], self._adapters
        over = self._balance.over(taken, count, self._now, self._age, sum(self._bytes))
        return fronts[_LORA] if over else kv

    def _pick_kv(self, fronts: Sequence[Front[Place]], going: Sequence[int]) -> Front[Place] | None:
        once, again = fronts[_ONCE].first(), fronts[_AGAIN].first()
        if once is None or again is None:
            return fronts[_ONCE] if once is not None else fronts[_AGAIN] if again is not None else None
        share = self._shares[self._shadows.best] if "shadows" not in self.without else 1.0
        if share < 1:
            once_bytes = self._bytes[_ONCE] - going[_ONCE]
            first = once_bytes > share * (once_bytes + self._bytes[_AGAIN] - going[_AGAIN])
        else:
            first = once < again
        return fronts[_ONCE] if first else fronts[_AGAIN]

    def gone(self, node: Node) -> None:
        """It has left the tier; its name is remembered."""
        nbytes = self._known.pop(node, None)
        if nbytes is not None:
            lora = node.kind is Kind.LORA
            self._adapters -= lora
            self._balance.left(hash(node.key), lora, nbytes, sum(self._bytes))
            self._bytes[_LORA if lora else _ONCE if node in self._once else _AGAIN] -= nbytes
            self._once.discard(node)
            if not lora:
                self._age += _WEIGHT * (self._now - node.tick - self._age)
            self._names.add(hash(node.key), len(self._known))

    def victims(self, nbytes: int, protected: Container[Node] = ()) -> Generator[None, None, tuple[list[Node], int]]:
        """See LeafFirst; what was asked since the last choice is looked at before."""
        yield from self._shadows.work()
        return (yield from super().victims(nbytes, protected))

    def _meet(self, node: Node) -> None:
        nbytes = self._known[node] = self._cost(node)
        name, lora = hash(node.key), node.kind is Kind.LORA
        worth = self.speeds.seconds(node, self._tier) * self.speeds.prefill if "cost" not in self.without else nbytes
        self._balance.came(name, lora, worth, self._bytes[_LORA], sum(self._bytes))
        once = not node.hits and not lora and name not in self._names
        self._adapters += lora
        self._bytes[_LORA if lora else _ONCE if once else _AGAIN] += nbytes
        if once:
            self._once.add(node)
