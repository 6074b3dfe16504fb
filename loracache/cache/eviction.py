# SPDX-License-Identifier: Apache-2.0
"""Takes objects out of tiers because somebody asked for it, a slice at a time, so that no request waits behind it.

Children go before their parents. What is leased or pinned stays, and its ancestors with it. Threading: the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from loracache.cache.state.index import Index, Node
from loracache.cache.tier.disk import DiskTier
from loracache.cache.tier.write_behind import WriteBehind
from loracache.results import Departure
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

__all__ = ["Evicted", "Remover"]

_SLICE = 250  # objects between two looks at the socket: two or three milliseconds


@dataclass(slots=True)
class Evicted:
    """What an eviction did so far: objects and bytes that left, objects skipped because of a lease, a write that reads
    them, a pin, a name or a kept child. redis: how its deletions ended, which is known only when they are done.
    """

    objects: int = 0
    nbytes: int = 0
    skipped: int = 0
    redis: Counter[Outcome] = field(default_factory=Counter, compare=False)


class Remover:
    """Evicts by key. leave_arena(node, cause) takes one object out of the arena."""

    def __init__(
        self, index: Index, leave_arena: Callable[[Node, str], None], disk: DiskTier | None, redis: WriteBehind | None
    ) -> None:
        self._index = index
        self._leave_arena = leave_arena
        self._disk = disk
        self._redis = redis

    def remove(self, keys: Sequence[bytes], tiers: Collection[Tier], did: Evicted) -> Iterator[None]:
        """Take `keys` and all their descendants out of `tiers`, noting in `did` what came of it. Yields between two
        slices, for others to be served; whoever asks for no more ends it there.
        """
        keys = list(dict.fromkeys(keys))
        if Tier.REDIS in tiers and self._redis is not None:  # the index does not know all that Redis holds
            self._delete([key for key in keys if self._index.get(key) is None], did)
        roots = [node for node in map(self._index.get, keys) if node is not None]
        yield from self._remove_below(roots, tiers, did)

    def remove_all(self, tiers: Collection[Tier], did: Evicted) -> Iterator[None]:
        """Take everything that is there now out of `tiers` (out of Redis: what the index knows of), as `remove`."""
        there = list(self._index)
        there.reverse()
        going = (there.pop() for _ in range(len(there)))  # so that what has gone is kept by nobody
        roots = (node for node in going if node.parent is None)  # looked for a slice at a time
        if Tier.DISK in tiers and self._disk is not None:
            objects, nbytes = self._disk.drop_left_alone()
            did.objects += objects
            did.nbytes += nbytes
        yield from self._remove_below(roots, tiers, did, disjoint=True)

    def _remove_below(
        self, roots: Iterable[Node], tiers: Collection[Tier], did: Evicted, *, disjoint: bool = False
    ) -> Iterator[None]:
        for nodes in self._slices(roots, disjoint):
            self._remove(nodes, tiers, did)
            if len(nodes) == _SLICE:  # not the last
                yield

    def _slices(self, roots: Iterable[Node], disjoint: bool) -> Iterator[list[Node]]:
        """What is below `roots`, each once. disjoint: none of them is below another."""
        seen: set[Node] = set()
        part: list[Node] = []
        for root in roots:
            for node in self._index.below(root, seen):
                part.append(node)
                if len(part) == _SLICE:
                    yield part
                    part = []
            if disjoint:
                seen.clear()
        yield part

    def _remove(self, nodes: list[Node], tiers: Collection[Tier], total: Evicted) -> None:
        if Tier.REDIS in tiers and self._redis is not None:
            for node in nodes:
                self._redis.forget(node, "evicted")  # else it would be written after all
                node.sent = False
            self._delete([node.key for node in nodes], total)
        with self._index.together():
            for tier in (Tier.CPU, Tier.DISK):
                if tier in tiers:
                    self._drop(nodes, tier, total, Departure.ASKED)

    def _delete(self, keys: list[bytes], did: Evicted) -> None:
        named = [key for key in keys if key in self._index.retained]  # without a disk Redis may be all that has them
        did.skipped += len(named)
        keys = [key for key in keys if key not in self._index.retained] if named else keys
        if keys and self._redis is not None:
            self._redis.io.delete(keys, lambda results: did.redis.update(result.outcome for result in results))

    def drop(self, nodes: Iterable[Node], tier: Tier, cause: str) -> Evicted:
        """Take just these objects, children before parents, out of the arena or the disk, as far as they may go. The
        next is asked for when the one before it has gone."""
        total = Evicted()
        self._drop(nodes, tier, total, cause)
        return total

    def _drop(self, nodes: Iterable[Node], tier: Tier, total: Evicted, cause: str) -> None:
        going = self._going(nodes, tier, total)
        if tier is Tier.CPU:
            for node in going:
                self._leave_arena(node, cause)
        elif self._disk is not None:
            self._disk.evict(going, cause)

    def _going(self, nodes: Iterable[Node], tier: Tier, total: Evicted) -> Iterator[Node]:
        """Those that may go, one by one: a node may when its last child has gone."""
        for node in nodes:
            if not node.held_in(tier):
                continue
            if node.children[tier] or self._index.stays(node, tier) or (tier is Tier.CPU and node.leases):
                total.skipped += 1  # and its write, where one is queued, stays queued
                continue
            total.objects += 1
            total.nbytes += node.size
            yield node
