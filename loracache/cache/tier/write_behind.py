# SPDX-License-Identifier: Apache-2.0
"""The queue of objects that still have to reach a lower tier.

Objects are written in the order they were committed, a batch at a time with one batch waiting behind it, so that the
tier's thread never idles. A queued object is dirty: its pages stay until it is written, or until the arena is so full
that the oldest queued writes are given up (counted). Threading: the cache's thread.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator

from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import Slices
from loracache.cache.tier.io import TierIO
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result, Transfer, padded

__all__ = ["WriteBehind"]

_BATCH_BYTES = 32 << 20
_BATCH_OBJECTS = 64
_BATCHES_IN_FLIGHT = 2


class WriteBehind:
    """Writes committed objects to one tier.

    refuse(node) returns NONE where the object may be written now (room was made for it), else the cause why not, and
    yields where that takes long.
    written(node, outcome): how the writing of an object that was not refused ended.
    started: whether writing may begin; else objects queue until `start`.
    """

    def __init__(
        self,
        io: TierIO,
        arena: Arena,
        index: Index,
        counters: Counters,
        slices: Slices,
        refuse: Callable[[Node], Generator[None, None, Cause]],
        written: Callable[[Node, Outcome], None],
        *,
        started: bool = True,
    ) -> None:
        self.io = io
        self._started = started
        self._arena = arena
        self._index = index
        self._counters = counters
        self._slices = slices
        self._refuse = refuse
        self._on_written = written
        self._queue: OrderedDict[Node, int] = OrderedDict()  # a dict finds its first key only behind all deleted ones
        self._in_flight: dict[Node, int] = {}
        self._batches = 0
        self._pumping = False
        self._sequence = 0
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    @property
    def depth(self) -> int:
        """Objects queued or being written."""
        return len(self._queue) + len(self._in_flight)

    def enqueue(self, node: Node) -> None:
        """Queue one object that is in the arena."""
        if node.dirty >> self.io.tier & 1:
            return
        self._index.queue(node, self.io.tier)
        self._sequence += 1
        self._queue[node] = self._sequence

    def start(self) -> None:
        """Begin to write what is queued."""
        self._started = True
        self.pump()

    def pump(self) -> None:
        """Start as many batches as may run."""
        if not self._pumping:
            self._slices.run(self._pump())

    def _pump(self) -> Iterator[None]:
        self._pumping = True
        try:
            while self._started and self._queue and self._batches < _BATCHES_IN_FLIGHT:
                yield from self._fill_batch()
        finally:
            self._pumping = False
        self._answer_flushes()

    def _fill_batch(self) -> Iterator[None]:
        nodes: list[Node] = []
        transfers: list[Transfer] = []
        nbytes = 0
        while self._queue and len(nodes) < _BATCH_OBJECTS and nbytes < _BATCH_BYTES:
            node = next(iter(self._queue))
            self._in_flight[node] = self._queue.pop(node)
            self._index.hold(node)
            # Made before others are served: an object that leaves the arena keeps its held pages, but not its extents.
            # Pages are whole multiples of 4096, so the padding is there.
            transfer = Transfer(node.info(), self._arena.buffers(node.extents, padded(node.size)))
            cause = yield from self._refuse(node)
            if cause:
                self._counters.add(f"write.{self.io.tier.label}.dropped.{cause}")
                self._finish(node)
                continue
            nodes.append(node)
            transfers.append(transfer)
            nbytes += node.size
        if nodes:
            self._batches += 1
            self.io.store(transfers, lambda results: self._written(nodes, results))

    def oldest(self, limit: int) -> list[Node]:
        """The first objects of the queue."""
        return list(itertools.islice(self._queue, limit))

    def forget(self, node: Node, cause: str) -> None:
        """Drop a queued write, of an object that is being evicted."""
        if node in self._queue:
            self._drop(node, cause)

    def when_flushed(self, done: Callable[[], None]) -> None:
        """Call `done` once everything queued so far is written or dropped."""
        self._waiting.append((self._sequence, done))
        self._answer_flushes()

    def drop_all(self) -> int:
        """Drop every queued write (at the end of a drain); answers how many, those in flight included."""
        left = self.depth
        while self._queue:
            self._drop(next(iter(self._queue)), "shutdown")
        return left

    def _drop(self, node: Node, cause: str) -> None:
        del self._queue[node]
        self._counters.add(f"write.{self.io.tier.label}.dropped.{cause}")
        self._index.unqueue(node, self.io.tier)

    def _written(self, nodes: list[Node], results: list[Result]) -> None:
        self._batches -= 1
        label = self.io.tier.label
        for node, result in zip(nodes, results, strict=True):
            if result.outcome is Outcome.OK:
                self._counters.add(f"write.{label}.objects")
                self._counters.add(f"write.{label}.bytes", node.size)
            else:
                self._counters.add(f"write.{label}.dropped.{result.outcome.value}")
            self._on_written(node, result.outcome)
            self._finish(node)
        self.pump()

    def _finish(self, node: Node) -> None:
        del self._in_flight[node]
        self._index.unqueue(node, self.io.tier)
        self._index.unhold(node)

    def _answer_flushes(self) -> None:
        if not self._waiting:
            return
        # Objects go through both in the order of their numbers.
        oldest = next(itertools.chain(self._in_flight.values(), self._queue.values()), self._sequence + 1)
        due = [done for sequence, done in self._waiting if sequence < oldest]
        self._waiting = [entry for entry in self._waiting if entry[0] >= oldest]
        for done in due:
            done()
