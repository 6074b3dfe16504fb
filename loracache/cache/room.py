# SPDX-License-Identifier: Apache-2.0
"""Room in the arena for new objects: clean victims first, then objects whose queued write is given up.

Threading: the cache's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence

from loracache.cache.policy import Policy
from loracache.cache.policy.quotas import Belongs
from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.leases import Leases
from loracache.cache.tier.write_behind import WriteBehind
from loracache.results import Cause, Departure
from loracache.tiers import Tier

__all__ = ["Room"]

_GIVE_UP_AMONG = 64  # queued writes looked at for one that can be given up
_EVICTED = 32  # objects evicted between two looks at the socket


class Room:
    """Makes room. evict(node, cause) takes one object out of the arena; in_lower_tier(node) says whether one that is
    clean can be had again."""

    def __init__(
        self,
        arena: Arena,
        index: Index,
        leases: Leases,
        counters: Counters,
        policies: Mapping[Tier, Policy],
        writers: Sequence[WriteBehind],
        evict: Callable[[Node, str], None],
        in_lower_tier: Callable[[Node], bool],
    ) -> None:
        self._arena = arena
        self._index = index
        self._leases = leases
        self._counters = counters
        self._policies = policies
        self._writers = writers
        self._evict = evict
        self._in_lower_tier = in_lower_tier

    def make(
        self, nbytes: int, protected: set[Node], promised: bool = False, wanting: Belongs | None = None
    ) -> Generator[None, None, bool]:
        """Free arena bytes: clean victims first, then those of the protected that disk has too (a chain longer than
        the arena ends in its next chunk's parent), then what is held loosely and lies in a lower tier, then leaves
        whose queued write is given up, the oldest chain's first, but not for who can wait instead (`promised`). False
        where even that is not enough. wanting: the object that the room is for, in whose name nobody is pushed below
        its share. Yields between two slices; there is room when it returns, and may not be any more after the caller's
        next yield.
        """
        policy = self._policies[Tier.CPU]
        while (missing := nbytes - self._arena.free_bytes) > 0:
            kept = protected
            victims, freed = yield from policy.victims(missing, kept, wanting)
            if freed < missing and protected:
                kept = {node for node in protected if not node.held_in(Tier.DISK)}
                victims, freed = yield from policy.victims(missing, kept, wanting)
            if freed < missing and (count := self._leases.give_way(missing, self._in_lower_tier)):
                self._counters.add("lease.gave_way", count)
                yield
                continue
            if freed < missing:
                if promised or not self._give_up_writes(missing - freed, protected, wanting):
                    return False
                yield
                continue
            yield from self._evict_all(victims, kept, wanting, policy.reason)
        return True

    def make_for_load(self, nbytes: int, protected: set[Node], node: Node) -> Generator[None, None, bool]:
        """The same for an object that is raised: what would be beyond its owners' hard quota takes room of theirs."""
        policy = self._policies[Tier.CPU]
        while (beyond := policy.beyond(node, nbytes)) > 0:
            victims, freed = yield from policy.own_victims(beyond, protected, node)
            if freed < beyond:
                return False
            yield from self._evict_all(victims, protected, node, policy.reason)
        return (yield from self.make(nbytes, protected, False, node))

    def ahead(self, nbytes: int) -> Iterator[None]:
        """Have clean victims go until so many bytes are free, as far as there are some: for nobody yet, so nothing that
        is held, however loosely, goes for it, and no queued write. Yields between two slices."""
        missing = nbytes - self._arena.free_bytes
        if missing > 0:
            victims, _ = yield from self._policies[Tier.CPU].victims(missing, ())
            yield from self._evict_all(victims, (), None, lambda _: Departure.AHEAD)

    def _evict_all(
        self,
        victims: Sequence[Node],
        kept: Container[Node],
        wanting: Belongs | None,
        reason: Callable[[Node], Departure],
    ) -> Iterator[None]:
        """Evict who was chosen and may go still."""
        for at in range(0, len(victims), _EVICTED):
            if at:
                yield
            with self._index.together():
                for node in victims[at : at + _EVICTED]:
                    if node not in kept and not node.children[Tier.CPU] and self._index.evictable(node, Tier.CPU):
                        self._evict_one(node, wanting, reason)

    def _evict_one(self, node: Node, wanting: Belongs | None, reason: Callable[[Node], Departure]) -> None:
        policy = self._policies[Tier.CPU]
        if policy.may_push(wanting, node):  # others were served since it was chosen
            policy.pushed(node)
            self._evict(node, reason(node))

    def _give_up_writes(self, nbytes: int, protected: set[Node], wanting: Belongs | None) -> int:
        """Take leaves that only a queued write keeps out of the arena, worth about that much, but few at a time;
        answers how many."""
        given_up = 0
        while nbytes > 0 and given_up < _EVICTED and (leaf := self._unwritten_leaf(protected, wanting)) is not None:
            for writer in self._writers:
                writer.forget(leaf, Cause.MEMORY_FULL)
            nbytes -= self._arena.rounded(leaf.size)
            self._evict(leaf, Departure.MEMORY_FULL)
            given_up += 1
        return given_up

    def _unwritten_leaf(self, protected: set[Node], wanting: Belongs | None) -> Node | None:
        """An object that nothing keeps in the arena but a queued write; of the chain that is queued the longest."""
        for writer in self._writers:
            for node in writer.oldest(_GIVE_UP_AMONG):
                leaf = self._index.leaf_below(node, Tier.CPU)
                kept = leaf.leases or leaf in protected or any(leaf in each.promised for each in self._writers)
                if kept or self._index.stays(leaf, Tier.CPU):
                    continue
                if self._policies[Tier.CPU].may_push(wanting, leaf):
                    return leaf
        return None
