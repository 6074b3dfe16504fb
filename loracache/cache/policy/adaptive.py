# SPDX-License-Identifier: Apache-2.0
"""Adaptive, leaf first: what came again stays longer than what came once; how much longer is what did best lately.

Objects stand in lines by how often they came: once, twice, three times, oftener. A lookup that finds one counts, and
so does each time that it came before, as far as its name is remembered. The least of all goes first:

    S = t_last + stay[times] * n                          n: objects in the tier; t_last in uses, as an LRU has it

which is an LRU in each line, and between lines the thought of caches that rank by what age and class say of the next
use (Beckmann et al., "LHD", NSDI 2018). Four ways to set `stay` are tried all the time on shadows of the tier
(shadow.py), and the best is in force: LRU and RECENT where a tier reaches about as far as objects come again, TWICE, a
second touch, where it does not, and OFTEN where it is smaller still.

Adapters have a line of their own, an LRU; they go first where they take more of the tier than their part (balance.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import inf

from loracache.cache.policy.balance import Balance
from loracache.cache.policy.leaf_first import LeafFirst
from loracache.cache.policy.line import Front
from loracache.cache.policy.names import Names
from loracache.cache.policy.shadow import LINES, WAYS, Shadows, Way
from loracache.cache.state.index import Index, Node
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Adaptive"]

_LORA = LINES  # the line of adapters


class Adaptive(LeafFirst[int]):
    """Victims of one tier. Remembers two numbers of each node in the tier, and the names of many that left."""

    PARTS = ("balance", "cost", "count", "shadows")
    ONCE = 0
    SHARED = ("_before", "_names", "_shadows", "_balance", "_loras", "_taken")

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int], ways: Sequence[Way] = WAYS) -> None:
        super().__init__(index, tier, cost, LINES + 1)
        self._before: dict[Node, int] = {}  # -> how often it came before, not counting its hits
        self._standing: dict[Node, int] = {}  # -> the line of a candidate
        self._now = 0
        self._names = Names(wide=True)  # of what left -> its place in the balance, and how often it had come
        self._shadows = Shadows(ways)
        self._balance = Balance()
        self._loras: dict[Node, int] = {}  # -> the bytes it takes
        self._taken: Counter[Kind] = Counter()  # the sum of these

    def asked(self, keys: Sequence[bytes]) -> None:
        """A lookup asks for a chain."""
        self._shadows.ask(keys, self._now)

    def line_of(self, node: Node) -> int:
        """How often it came again; of an adapter, the last."""
        before = self._before.get(node)
        if before is None:
            before = self._meet(node)
        if node.kind is Kind.LORA:
            return _LORA
        times = before + node.hits
        return times if times < LINES else LINES - 1

    def place(self, node: Node) -> int:
        """Its tick."""
        return node.tick

    def offer(self, node: Node) -> None:
        """Make `node` a candidate."""
        node.offered |= 1 << self._tier
        tick = node.tick
        if tick > self._now:
            self._now = tick
        line = self._standing[node] = self.line_of(node)
        self._lines[line].put(tick, node)
        if line == _LORA:
            self._count(node)

    def used(self, node: Node, before: int) -> None:
        """A candidate was used: its tick was `before`."""
        self._lines[self._standing[node]].take(before)
        self.offer(node)

    def withdraw(self, node: Node) -> None:
        """A candidate has left the tier, or is no leaf any more."""
        node.offered &= ~(1 << self._tier)
        self._lines[self._standing.pop(node)].take(node.tick)

    def pick(self, fronts: Sequence[Front[int]], going: Sequence[int]) -> Front[int] | None:
        """Adapters, where they take more than their part; else KV, by the way that is in force."""
        stays = self._shadows.best if "shadows" not in self.without else WAYS[0]
        if "balance" in self.without:
            return self._least(fronts, (*stays, stays[-1]))
        kv = self._least(fronts, stays)
        lora = fronts[_LORA] if self._loras and fronts[_LORA].first() is not None else None
        if kv is None or lora is None:
            return kv or lora
        objects, nbytes = self._index.objects[self._tier], self._index.bytes[self._tier]
        taken = self._taken[Kind.LORA] - going[_LORA]
        return lora if self._balance.over(taken, len(self._loras), self._now, objects, nbytes) else kv

    def _least(self, fronts: Sequence[Front[int]], stays: Sequence[float]) -> Front[int] | None:
        """Of as many fronts as there are stays, that with the lowest first."""
        objects = self._index.objects[self._tier]
        least, chosen = inf, None
        for stay, front in zip(stays, fronts, strict=False):
            tick = front.first()
            if tick is not None and (score := tick + stay * objects) < least:
                least, chosen = score, front
        return chosen

    def shrink(self) -> None:
        """Few nodes are left of very many: keep no memory for the others."""
        super().shrink()
        self._shadows.forget()

    def expect(self, batch: float) -> None:
        """So many requests run at once, as engines say; 0: nobody said."""
        self._balance.batch = batch or self._balance.batch

    def gone(self, node: Node) -> None:
        """It has left the tier; its name is remembered."""
        before = self._before.pop(node, None)
        if before is None:
            return
        lora = node.kind is Kind.LORA
        if lora:
            self._count(node)  # one that had chunks below it was no candidate when it was used last
            nbytes = self._loras.pop(node)
            self._taken[Kind.LORA] -= nbytes
        else:
            nbytes = self._cost(node)
        place = self._balance.left(lora, nbytes, self._index.bytes[self._tier])
        times = min(before + node.hits, LINES - 1)
        self._names.add(hash(node.key), len(self._before), LINES * place + times)
        self._shadows.left(node)

    def prepare(self) -> Iterator[None]:
        """What was asked since the last choice is looked at."""
        return self._shadows.work(self.line_of, self._index.objects[self._tier])

    def _count(self, adapter: Node) -> None:
        """Its uses since it was looked at last count for how many adapters a batch needs."""
        if "count" not in self.without:
            self._balance.used(adapter, self._index.objects[self._tier])

    def _meet(self, node: Node) -> int:
        lora, nbytes, before = node.kind is Kind.LORA, self._cost(node), 0
        remembered = self._names.get(hash(node.key))
        if remembered >= 0:
            place, times = divmod(remembered, LINES)
            seconds = self.speeds.seconds(node, self._tier)
            worth = seconds * self.speeds.prefill if "cost" not in self.without else nbytes
            self._balance.back(place, lora, worth, self._taken[Kind.LORA], self._index.bytes[self._tier])
            if not lora:  # the hits of one that stayed in another tier count what is remembered of it too
                before = max(0, times + 1 - node.hits)
        self._before[node] = before
        if lora:
            self._loras[node] = nbytes
            self._taken[Kind.LORA] += nbytes
        self._shadows.entered(node)
        return before
