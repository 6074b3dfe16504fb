# SPDX-License-Identifier: Apache-2.0
"""Counts anew what the index says that it holds, and looks at the state of every entry, while both change.

Objects are counted in the order of namespaces and keys, a slice at a time. What changes beyond the place that is
reached is seen when its turn comes; what changes before it is added or taken off at once. So the sums are those of the
moment in which the end is reached, however busy the cache is. Threading: the cache's thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loracache.cache.state.node import Node
from loracache.control.steps import done
from loracache.tiers import Tier

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache

__all__ = ["Recount", "Recounter"]

_SLICE = 128  # entries between two looks at the socket: a few tenths of a millisecond
_EXAMPLES = 100
_COUNTED = (Tier.CPU, Tier.DISK)


@dataclass(slots=True)
class _Sum:
    """Of a tier. cost: bytes of its budget."""

    objects: int = 0
    nbytes: int = 0
    cost: int = 0


@dataclass(slots=True)
class _States:
    """What was seen of entries in states that cannot be: how many, and of the first ones key and words."""

    checked: int = 0
    faults: int = 0
    examples: list[tuple[bytes, str]] = field(default_factory=list)


class Recount:
    """One count of what `cache` holds."""

    def __init__(self, cache: TieredCache) -> None:
        self._cache = cache
        self._index = cache.index
        self._sums = {tier: _Sum() for tier in _COUNTED}
        self._states = _States()
        self._taken: Counter[tuple[bytes, Tier]] = Counter()  # of each namespace
        self._place = (b"", b"")  # (namespace, key) of the object counted last
        self._here = sum(1 << tier for tier in _COUNTED if tier in cache.tiers)
        self._writers = {writer.io.tier: writer for writer in cache.writers}

    def run(self) -> Generator[None, None, dict[str, Any]]:
        """Answers a map of what came of it; yields between two slices, for others to be served."""
        told = self._index.on_change
        rewritten = self._rewritten()

        def changed(node: Node, tier: Tier, entered: bool, cause: str) -> None:
            told(node, tier, entered, cause)
            if (node.namespace, node.key) <= self._place:
                self._add(node, tier, 1 if entered else -1)

        yield from self._look_at_states()
        self._index.on_change = changed
        try:
            yield from self._count()
        finally:
            self._index.on_change = told
        # Here nobody was let in since the last object was counted.
        if self._cache.quotas.given and rewritten == self._rewritten():
            self._look_at_quotas()
        return {
            "checked": self._states.checked,
            "faults": self._states.faults,
            "examples": [[key, words] for key, words in self._states.examples],
            "counts": self._counts(),
            "used": self._used(exact=rewritten == self._rewritten()),
        }

    # -- counting ----------

    def _count(self) -> Iterator[None]:
        looked = 0
        while (following := self._following()) is not None:
            digest, keys = following
            for key in keys:
                self._place = (digest, key)
                node = self._index.get(key)
                if node is None or node.namespace != digest or not node.present:
                    self._fault(key, f"listed in namespace {digest.hex()}, and not held in it")
                else:
                    for tier in _COUNTED:
                        if node.held_in(tier):
                            self._add(node, tier, 1)
                looked += 1
                if not looked % _SLICE:
                    yield
                    break

    def _following(self) -> tuple[bytes, Iterator[bytes]] | None:
        """The namespace to go on with, and its keys that are not counted yet."""
        space, key = self._place
        for digest in self._index.spaces.irange(space):
            keys = self._index.spaces[digest].keys
            at = keys.bisect_right(key) if digest == space else 0
            if at < len(keys):
                return digest, keys.islice(at)
        return None

    def _add(self, node: Node, tier: Tier, sign: int) -> None:
        total = self._sums[tier]
        total.objects += sign
        total.nbytes += sign * node.size
        cost = sign * self._cost(node, tier)
        total.cost += cost
        self._taken[node.namespace, tier] += cost

    def _look_at_quotas(self) -> None:
        """What each namespace takes, as it was counted, and what its owners are said to."""
        for namespace, space in self._index.spaces.items():
            for tier in _COUNTED:
                if space.taken[tier] != self._taken[namespace, tier]:
                    said, counted = space.taken[tier], self._taken[namespace, tier]
                    self._fault(namespace, f"a namespace said to take {said} bytes of {tier.label}, not {counted}")
        for name, words in self._cache.quotas.audit():
            self._fault(name, words)

    def _cost(self, node: Node, tier: Tier) -> int:
        if tier is Tier.CPU:
            return self._cache.arena.rounded(node.size)
        return self._cache.disk.cost(node) if self._cache.disk is not None else 0

    def _counts(self) -> dict[str, list[int]]:
        """By tier: objects and bytes by the books, and as they were counted."""
        books = self._index
        return {
            tier.label: [books.objects[tier], books.bytes[tier], self._sums[tier].objects, self._sums[tier].nbytes]
            for tier in _COUNTED
        }

    def _used(self, *, exact: bool) -> dict[str, list[int]]:
        """By tier: bytes of its budget that are in use, and the least and most that what is there explains. exact:
        whether no object of the disk was kept in another way meanwhile."""
        cache, cost = self._cache, self._sums[Tier.CPU].cost
        quiet = not (cache.loading or len(cache.leases) or cache.leases.quarantined)
        quiet = quiet and not any(writer.depth for writer in cache.writers)
        used = {Tier.CPU.label: [cache.arena.size - cache.arena.free_bytes, cost, cost if quiet else cache.arena.size]}
        if cache.disk is not None and cache.disk.loaded and exact:
            least, most = cache.disk.used_beside()
            cost = self._sums[Tier.DISK].cost
            used[Tier.DISK.label] = [cache.disk.used, cost + least, cost + most]
        return used

    def _rewritten(self) -> int:
        return self._cache.disk.rewritten if self._cache.disk is not None else 0

    # -- states ----------

    def _look_at_states(self) -> Iterator[None]:
        for count, node in enumerate(list(self._index), start=1):
            if self._index.get(node.key) is node:
                self._states.checked += 1
                if words := self._words(node):
                    self._fault(node.key, words)
            if not count % _SLICE:
                yield

    def _fault(self, key: bytes, words: str) -> None:
        self._states.faults += 1
        if len(self._states.examples) < _EXAMPLES:
            self._states.examples.append((key, words))

    def _words(self, node: Node) -> str:
        """What cannot be about an entry, in words; "" where nothing is."""
        pages = sum(length for _, length in node.extents)
        if node.held_in(Tier.CPU) and pages != self._cache.arena.rounded(node.size):
            return f"held in cpu with {pages} bytes of pages for {node.size} bytes"
        if not node.held_in(Tier.CPU) and node.extents and not node.leases:
            return "has pages, and is neither held in cpu nor on its way there"
        if node.condemned and not node.leases:
            return "has pages that nobody reads and nobody freed"
        if node.pins & ~node.present:
            return "pinned where it is not held"
        if not (node.present or node.leases or node.first_child is not None):
            return "in no tier, and nothing needs it"
        return self._words_of_tiers(node)

    def _words_of_tiers(self, node: Node) -> str:
        if unknown := node.present & ~self._here:
            return f"held in {_labels(unknown)}, of which the index keeps no books"
        if twice := node.present & node.dirty:
            return f"waits to be written to {_labels(twice)}, where it is"
        for tier in Tier if node.dirty else ():
            if node.dirty >> tier & 1 and (tier not in self._writers or node not in self._writers[tier]):
                return f"waits to be written to {tier.label}, and is not queued"
        parent = node.parent
        if parent is not None:
            for tier in _COUNTED:
                if node.held_in(tier) and not parent.children[tier]:
                    return f"held in {tier.label}, and its parent counts no child there"
        return ""


def _labels(tiers: int) -> str:
    return ", ".join(tier.label for tier in Tier if tiers >> tier & 1)


class Recounter:
    """Counts when somebody asks, for one at a time."""

    def __init__(self, cache: TieredCache) -> None:
        self._cache = cache
        self._free = asyncio.Lock()

    async def count(self) -> list[Any]:
        """[a map]: what came of a count."""
        async with self._free:
            return [await done(Recount(self._cache).run())]
