# SPDX-License-Identifier: Apache-2.0
"""What requests asked for: objects that are kept for a time since their last use, and others' priorities.

A kept object goes only where all that is not kept gave too little room (classes.py); its time always runs out. A tenant
may have so much kept, and no more is; of two wishes for one object the longer, and the higher, counts. What no request
gave a priority has that of its adapter's name. Threading: the cache's thread.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from loracache.cache.policy.classes import HIGH, KEPT, LOW, NORMAL
from loracache.cache.policy.limits import Quotas
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["PRIORITIES", "Keeps"]

PRIORITIES = {"low": LOW, "normal": NORMAL, "high": HIGH}
_SLICE = 256  # objects between two looks at the socket


@dataclass(slots=True)
class _Kept:
    until: float
    ttl: float
    tenant: str
    nbytes: int


class Keeps:
    """budget: bytes of memory that one tenant may have kept."""

    def __init__(
        self, index: Index, quotas: Quotas, counters: Counters, budget: int, clock: Callable[[], float]
    ) -> None:
        self._index = index
        self._quotas = quotas
        self._counters = counters
        self._budget = budget
        self._clock = clock
        self._kept: dict[Node, _Kept] = {}
        self._priorities: dict[Node, int] = {}
        self._named: dict[bytes, int] = {}  # adapters, by key -> the rank that a name of theirs gives, if not NORMAL
        self._spaces: dict[bytes, int] = {}  # namespaces -> the same; only while there are any
        self._bytes: Counter[str] = Counter()  # that are kept, by tenant
        self._ends: list[tuple[float, int, Node, _Kept]] = []  # a heap, one entry for each that is kept
        self._order = itertools.count()
        quotas.rank, quotas.rank_of = self.rank, self._rank_of
        quotas.on_gone = self._gone

    def __len__(self) -> int:
        return len(self._kept)

    def rank(self, node: Node) -> int:
        """Its rank among those of its owners."""
        if node in self._kept:
            return KEPT
        own = self._priorities.get(node)
        if own is not None or not self._named:
            return own if own is not None else NORMAL
        return self._named.get(node.key, NORMAL) if node.kind is Kind.LORA else self._rank_of(node.namespace)

    def name(self, adapter: bytes, priority: str) -> None:
        """What is of an adapter (by key), its weights and its KV, has the priority of its name from now on, as far as
        no request gave it another. What is there is looked at in slices."""
        rank = PRIORITIES[priority]
        if rank == self._named.get(adapter, NORMAL):
            return
        self._quotas.engage()
        if rank == NORMAL:
            del self._named[adapter]
        else:
            self._named[adapter] = rank
        self._spaces.clear()
        self._quotas.rerank(adapter)

    def wish(self, keys: Sequence[bytes], ttl: float, priority: str) -> Iterator[None]:
        """Keep what is held of `keys` for `ttl` seconds (0: not at all) since its last use, and give it a priority (""
        or one of PRIORITIES) for as long as some tier holds it. Yields between two slices."""
        self._quotas.engage()
        rank = PRIORITIES.get(priority, NORMAL)
        for at in range(0, len(keys), _SLICE):
            if at:
                yield
            for node in map(self._index.get, keys[at : at + _SLICE]):
                if node is None or not node.present:
                    continue
                if rank != NORMAL:
                    self._priorities[node] = max(rank, self._priorities.get(node, rank))
                if ttl:
                    self._keep(node, ttl)
                self._quotas.move(node)

    def used(self, nodes: Iterable[Node]) -> None:
        """Their times begin anew."""
        if not self._kept:
            return
        now = self._clock()
        for node in nodes:
            kept = self._kept.get(node)
            if kept is not None:
                kept.until = max(kept.until, now + kept.ttl)

    def tick(self) -> None:
        """End those whose time is over."""
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            _, _, node, kept = heapq.heappop(self._ends)
            if self._kept.get(node) is not kept:
                continue
            if kept.until > now:
                self._end_at(node, kept)
                continue
            self._release(node)
            self._counters.add("keep.expired")
            self._quotas.move(node)

    def _rank_of(self, namespace: bytes) -> int:
        """Of what is of a namespace, by its adapter's name."""
        if not self._named:
            return NORMAL
        rank = self._spaces.get(namespace)
        if rank is None:
            told = self._quotas.names(namespace)
            if told is None:
                return NORMAL
            (adapter,) = told["adapter"] or ("",)
            rank = self._spaces[namespace] = self._named.get(bytes.fromhex(adapter), NORMAL)
        return rank

    def _keep(self, node: Node, ttl: float) -> None:
        until = self._clock() + ttl
        kept = self._kept.get(node)
        if kept is not None:
            kept.until, kept.ttl = max(kept.until, until), max(kept.ttl, ttl)
            return
        tenant, nbytes = self._quotas.tenant_of(node), self._index.costs[Tier.CPU](node)
        if self._bytes[tenant] + nbytes > self._budget:
            self._counters.add("keep.refused")
            return
        self._bytes[tenant] += nbytes
        kept = self._kept[node] = _Kept(until, ttl, tenant, nbytes)
        self._end_at(node, kept)
        self._counters.add("keep.objects")

    def _end_at(self, node: Node, kept: _Kept) -> None:
        heapq.heappush(self._ends, (kept.until, next(self._order), node, kept))

    def _release(self, node: Node) -> None:
        kept = self._kept.pop(node, None)
        if kept is not None:
            self._bytes[kept.tenant] -= kept.nbytes
            if not self._bytes[kept.tenant]:
                del self._bytes[kept.tenant]

    def _gone(self, node: Node) -> None:
        """No tier has it any more."""
        self._release(node)
        self._priorities.pop(node, None)
