# SPDX-License-Identifier: Apache-2.0
"""Room in the arena for new objects: clean victims first, then objects whose queued write is given up.

Threading: the cache's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

from loracache.cache.policy import Policy
from loracache.cache.state.arena import Arena
from loracache.cache.state.index import Index, Node
from loracache.cache.tier.write_behind import WriteBehind
from loracache.results import Cause
from loracache.tiers import Tier

__all__ = ["Room"]

_GIVE_UP_AMONG = 64  # queued writes looked at for one that can be given up
_EVICTED = 32  # objects evicted between two looks at the socket


class Room:
    """Makes room. evict(node, cause) takes one object out of the arena."""

    def __init__(
        self,
        arena: Arena,
        index: Index,
        policies: Mapping[Tier, Policy],
        writers: Sequence[WriteBehind],
        evict: Callable[[Node, str], None],
    ) -> None:
        self._arena = arena
        self._index = index
        self._policies = policies
        self._writers = writers
        self._evict = evict

    def make(self, nbytes: int, protected: set[Node], promised: bool = False) -> Generator[None, None, bool]:
        """Free arena bytes: clean victims first, then leaves whose queued write is given up, the oldest chain's first,
        but not for who can wait instead (`promised`). False where even that is not enough. Yields between two slices;
        there is room when it returns, and may not be any more after the caller's next yield.
        """
        while (missing := nbytes - self._arena.free_bytes) > 0:
            victims, freed = yield from self._policies[Tier.CPU].victims(missing, protected)
            if freed < missing:
                if promised or not self._give_up_writes(missing - freed, protected):
                    return False
                yield
                continue
            for count, node in enumerate(victims, start=1):
                if node not in protected and not node.children[Tier.CPU] and self._index.evictable(node, Tier.CPU):
                    self._evict(node, "policy")
                if not count % _EVICTED:
                    yield
        return True

    def _give_up_writes(self, nbytes: int, protected: set[Node]) -> int:
        """Take leaves that only a queued write keeps out of the arena, worth about that much, but few at a time;
        answers how many."""
        given_up = 0
        while nbytes > 0 and given_up < _EVICTED and (leaf := self._unwritten_leaf(protected)) is not None:
            for writer in self._writers:
                writer.forget(leaf, Cause.MEMORY_FULL)
            nbytes -= self._arena.rounded(leaf.size)
            self._evict(leaf, Cause.MEMORY_FULL)
            given_up += 1
        return given_up

    def _unwritten_leaf(self, protected: set[Node]) -> Node | None:
        """An object that nothing keeps in the arena but a queued write; of the chain that is queued the longest."""
        for writer in self._writers:
            for node in writer.oldest(_GIVE_UP_AMONG):
                leaf = self._index.leaf_below(node, Tier.CPU)
                kept = leaf.leases or leaf in protected or any(leaf in each.promised for each in self._writers)
                if not kept and not self._index.stays(leaf, Tier.CPU):
                    return leaf
        return None
