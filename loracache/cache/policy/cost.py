# SPDX-License-Identifier: Apache-2.0
"""FASTLIBRA's cost model, leaf first (Zhang et al., arXiv:2505.03756; published as ELORA, HPCA 2026). There:

    Eval = LoRA_Eval * Retain_Eval
    Retain_Eval_i = cost_i * visit_i * (1 - sigmoid(t_i))       cost = size / bandwidth, t = time since the last use
    LoRA_Eval_i = min(1, NowLoRA_i / Low_lora)                  of adapters; 1 of KV
    Low_lora = sum_i [1 - (1 - prob_i)^BS]                      adapters that a batch of BS is expected to need

The lowest goes first. Here the same in a form whose order time does not change, so that nothing is ever scored anew:

    S = t_last + tau * ln(cost / size * visits)  (+ tau * ln LoRA_Eval for all adapters at once)

- 1 - sigmoid(x) is exp(-x) within a factor of two, and visits that decay from the last use on are another such factor:
  their product orders as S does. With t in seconds it vanishes after ten of them; so t is in units of tau, the mean age
  of the tier's victims, in uses.
- cost is min(load from the next tier, computing it), by size: an evicted byte is what room is made of.
- LoRA_Eval is max(1, Low_lora / NowLoRA): what is printed would have adapters go sooner when too few are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

from loracache.cache.policy.leaf_first import Ranked
from loracache.cache.policy.line import Front
from loracache.cache.policy.visits import Visits, needed
from loracache.cache.state.index import Index, Node
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Cost"]

_KV, _LORA = 0, 1
_WEIGHT = 1 / 64  # of the last victim in the mean age
_COUNT_AGAIN = 4096  # uses after which the adapters that are needed are counted anew


class Cost(Ranked):
    """Victims of one tier. `batch` is the mean number of requests that run at once, where engines do not say it."""

    PARTS = ("cost", "visits", "decay", "recency", "count")
    SHARED = ("_visits", "_loras")

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int], batch: float = 32) -> None:
        super().__init__(index, tier, cost, lines=2)
        self._batch = batch
        self._now = 0
        self._age = 0.0  # tau, in ticks
        self._visits = (Visits(), Visits())  # of KV that is here, of adapters that ever were
        self._loras: set[Node] = set()
        self._bonus = 0.0  # ln LoRA_Eval
        self._count_at = 0

    def line_of(self, node: Node) -> int:
        """KV's or adapters'."""
        return _LORA if node.kind is Kind.LORA else _KV

    def rank(self, node: Node) -> tuple[float, int]:
        """S, without LoRA_Eval."""
        self._now = max(self._now, node.tick)
        line = self.line_of(node)
        if line == _LORA:
            self._loras.add(node)
        value = log(self._visits_of(node, line)) if "visits" not in self.without else 0.0
        if "cost" not in self.without:
            value += log(self.worth(node))
        scale = self._scale()
        return (node.tick + scale * value if scale else value), node.tick

    def worth(self, node: Node) -> float:
        """Its cost by size, by that of KV that has to be computed."""
        return self.speeds.by_size(node, self._tier) * self.speeds.prefill

    def lora_eval(self, needed: float, held: int) -> float:
        """What adapters are worth more than KV of the same Retain_Eval."""
        return max(1.0, needed / held)

    def pick(self, fronts: Sequence[Front[tuple[float, int]]], going: Sequence[int]) -> Front[tuple[float, int]] | None:
        """The lower of both firsts, adapters with their bonus."""
        kv, lora = fronts[_KV].first(), fronts[_LORA].first()
        if lora is None:
            return fronts[_KV] if kv is not None else None
        if self._now >= self._count_at and "count" not in self.without:
            self._count_adapters()
        return fronts[_LORA] if kv is None or lora[0] + (self._scale() or 1) * self._bonus < kv[0] else fronts[_KV]

    def expect(self, batch: float) -> None:
        """So many requests run at once, as engines say; 0: nobody said."""
        self._batch = batch or self._batch

    def gone(self, node: Node) -> None:
        """It has left the tier: how old do they get?"""
        if node.kind is Kind.LORA and "visits" not in self.without:
            self._visits_of(node, _LORA)  # one that had chunks below it was no candidate when it was used last
        self._age += _WEIGHT * (self._now - node.tick - self._age)
        if node.kind is Kind.LORA:
            self._loras.discard(node)
        else:
            self._visits[_KV].forget(node)

    def shrink(self) -> None:
        """Few nodes are left of very many: keep no memory for the others."""
        super().shrink()
        self._visits[_KV].shrink()

    def _visits_of(self, node: Node, line: int) -> float:
        if "decay" in self.without:
            return node.hits + 1
        return self._visits[line].of(node, self._age)

    def _scale(self) -> float:
        """Ticks in which value falls e-fold; 0: it does not."""
        fading = ("recency" not in self.without) + ("decay" not in self.without and "visits" not in self.without)
        return self._age / fading if fading else 0.0

    def _count_adapters(self) -> None:
        self._count_at = self._now + _COUNT_AGAIN
        visits = self._visits[_LORA].all(self._now, self._age)
        self._bonus = log(self.lora_eval(needed(visits, self._batch), len(self._loras))) if self._loras else 0.0
