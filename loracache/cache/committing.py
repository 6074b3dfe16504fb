# SPDX-License-Identifier: Apache-2.0
"""Commits: what a client has written into its pages becomes visible.

Threading: the cache's thread; a long commit is done in slices.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from loracache.cache.admitting import Admitter
from loracache.cache.policy.benefit import Benefit
from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.leases import Leases, Writing
from loracache.cache.state.node import State
from loracache.cache.state.slices import parts
from loracache.results import Cause
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Committer"]


class Committer:
    """Commits. held(node) says whether an object need not be stored again."""

    def __init__(
        self,
        arena: Arena,
        index: Index,
        leases: Leases,
        counters: Counters,
        admitter: Admitter,
        benefit: Benefit,
        held: Callable[[Node], bool],
    ) -> None:
        self._arena = arena
        self._index = index
        self._leases = leases
        self._counters = counters
        self._admitter = admitter
        self._benefit = benefit
        self._held = held

    def commit(
        self, owner: int, lease_id: bytes, written: Sequence[tuple[bytes, int]]
    ) -> Generator[None, None, list[Cause]]:
        """See TieredCache.commit; the writes that it queues are still to be started."""
        answers: list[Cause] = []
        for part in parts(written):
            if answers:
                yield
            answers += self._commit_part(owner, self._leases.take_written(owner, lease_id, part))
        self._leases.release(owner, lease_id)
        return answers

    def _commit_part(self, owner: int, items: Iterable[tuple[Writing | None, int]]) -> Iterator[Cause]:
        """What came of each; they are counted together."""
        objects = nbytes = computed = 0
        for item, checksum in items:
            if item is None:
                yield Cause.LEASE_LOST
                continue
            cause = self._commit_one(item, checksum)
            if not cause:
                objects += 1
                nbytes += item.info.size
            if item.info.kind is not Kind.LORA:
                computed += item.info.size
            yield cause
        self._counters.add("store.objects", objects)
        self._counters.add("store.bytes", nbytes)
        self._benefit.stored(owner, computed)

    def _commit_one(self, item: Writing, checksum: int) -> Cause:
        node = self._index.get(item.info.key)
        if node is not None and (self._held(node) or node.state(Tier.CPU) is State.LOADING):
            self._arena.free(item.extents)
            return Cause.EXISTS
        if node is not None and self._admitter.disk is not None:
            self._admitter.disk.give_up(node)
        node = self._index.insert(item.info, checksum)
        if node is None:
            self._arena.free(item.extents)
            self._counters.add("store.refused.no_parent")
            return Cause.NO_PARENT
        self._index.enter(node, Tier.CPU, "stored", item.extents)
        self._admitter.committed(node, item.promised)
        return Cause.NONE
