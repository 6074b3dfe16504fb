# SPDX-License-Identifier: Apache-2.0
"""What is done in the arena ahead of need: objects are raised, and room is made, for nobody yet. When, cache/swap says.

Threading: the cache's thread; what takes long is done in slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loracache.cache.room import Room
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import Slices
from loracache.cache.tier.disk import DiskTier
from loracache.cache.tier.promotion import Promoter
from loracache.cache.tier.write_behind import WriteBehind
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result
from loracache.tiers import Tier

__all__ = ["Ahead"]


class Ahead:
    """Of one cache's arena and disk."""

    def __init__(
        self,
        index: Index,
        promoter: Promoter,
        room: Room,
        slices: Slices,
        disk: DiskTier | None,
        redis: WriteBehind | None,
    ) -> None:
        self._index = index
        self._promoter = promoter
        self._room = room
        self._slices = slices
        self._disk = disk
        self._redis = redis

    def load(self, node: Node, done: Callable[[Cause], None]) -> None:
        """Raise an object that the disk holds into room that is free; `done` is told how it went."""
        if self._disk is None or not self._disk.reads(node):
            done(Cause.DISK_UNAVAILABLE)
            return
        over = self.keeping_parent(node, done)
        self._promoter.from_disk(self._disk.io, [(node, lambda _, cause: over(cause))])

    def seek(self, key: bytes, fits: Callable[[int], bool], done: Callable[[Cause, int], None]) -> None:
        """Raise an object that only Redis may have, if it has it and fits(bytes); `done` is told how it went and how
        large it is."""
        if self._redis is None or not self._redis.io.available:
            done(Cause.ABSENT, 0)
            return
        io = self._redis.io

        def answered(results: list[Result]) -> None:
            (found,) = results
            if found.outcome is not Outcome.OK or found.info is None:
                done(Cause.ABSENT, 0)
            elif not fits(size := found.info.size):
                done(Cause.MEMORY_FULL, size)
            else:
                self._promoter.from_redis(io, [(key, lambda _, cause: done(cause, size))])

        io.contains([key], answered)

    def evict(self, nbytes: int, over: Callable[[], None]) -> None:
        """Have victims leave until so many bytes are free, as far as they may; `over` is called then."""

        def work() -> Iterator[None]:
            yield from self._room.ahead(nbytes)
            over()

        self._slices.run(work())

    def keeping_parent(self, node: Node, done: Callable[[Cause], None]) -> Callable[[Cause], None]:
        """`done`, until which the parent stays in the arena if it is there: a leaf as long as its child is on its way,
        it could go before that arrives."""
        parent = node.parent
        if parent is None or not parent.held_in(Tier.CPU):
            return done
        self._index.hold(parent)

        def over(cause: Cause) -> None:
            self._index.unhold(parent)
            done(cause)

        return over
