# SPDX-License-Identifier: Apache-2.0
"""The queue of objects that still have to reach a lower tier.

Objects are written in the order they were committed, a batch at a time with one batch waiting behind it, so that the
tier's thread never idles. A queued object is dirty: its pages stay until it is written, or until the arena is so full
that the oldest queued writes are given up (counted); those that a writer was promised are not. Threading: the cache's
thread.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator

from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import Slices
from loracache.cache.tier.flushes import Flushes
from loracache.cache.tier.io import TierIO
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result, Transfer, padded

__all__ = ["WriteBehind"]

_BATCH_BYTES = 32 << 20
_BATCH_OBJECTS = 64
_BATCHES_IN_FLIGHT = 2
_NOT_LOST = (Cause.EXISTS, "moved")  # the tier has it, or shall not have it: an operator moves it from there


class WriteBehind:
    """Writes committed objects to one tier.

    refuse(node) returns NONE where the object may be written now (room was made for it), else the cause why not, and
    yields where that takes long.
    written(node, outcome): how the writing of an object that was not refused ended; answers whether the tier keeps it.
    started: whether writing may begin; else objects queue until `start`.
    """

    def __init__(
        self,
        io: TierIO,
        arena: Arena,
        index: Index,
        counters: Counters,
        slices: Slices,
        flushes: Flushes,
        refuse: Callable[[Node], Generator[None, None, Cause]],
        written: Callable[[Node, Outcome], bool],
        *,
        started: bool = True,
    ) -> None:
        self.io = io
        self._started = started
        self._arena = arena
        self._index = index
        self._counters = counters
        self._slices = slices
        self._flushes = flushes
        flushes.open(io.tier)
        self._refuse = refuse
        self._on_written = written
        self._queue: OrderedDict[Node, int] = OrderedDict()  # a dict finds its first key only behind all deleted ones
        self._in_flight: dict[Node, int] = {}
        self._batches = 0
        self._pumping = False
        self._sequence = 0
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._watching: list[Callable[[None], None]] = []
        self.promised: set[Node] = set()  # queued for a writer that waits rather than have them given up

    @property
    def depth(self) -> int:
        """Objects queued or being written."""
        return len(self._queue) + len(self._in_flight)

    def __contains__(self, node: Node) -> bool:
        """Whether the object is queued or being written."""
        return node in self._queue or node in self._in_flight

    def cost_in_flight(self, cost: Callable[[Node], int]) -> int:
        """The sum of what the objects cost that are being written."""
        return sum(map(cost, self._in_flight))

    def enqueue(self, node: Node, *, promised: bool = False) -> None:
        """Queue one object that is in the arena. promised: room for others is never made by giving it up."""
        if promised:
            self.promised.add(node)
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
        watching, self._watching = self._watching, []
        for shorter in watching:
            shorter(None)

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
                self._give_up(cause)
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

    def when_shorter(self, done: Callable[[None], None]) -> None:
        """Call `done` when fewer objects may be queued than now."""
        self._watching.append(done)

    def forget(self, node: Node, cause: str) -> bool:
        """Drop a queued write, of an object that is being evicted; whether one was queued."""
        if node not in self._queue:
            return False
        self._drop(node, cause)
        return True

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
        self.promised.discard(node)
        self._give_up(cause)
        self._index.unqueue(node, self.io.tier)

    def _give_up(self, cause: str) -> None:
        self._counters.add(f"write.{self.io.tier.label}.dropped.{cause}")
        if cause not in _NOT_LOST:
            self._flushes.gave_up(self.io.tier)

    def _written(self, nodes: list[Node], results: list[Result]) -> None:
        self._batches -= 1
        label = self.io.tier.label
        for node, result in zip(nodes, results, strict=True):
            if result.outcome is Outcome.OK:
                self._counters.add(f"write.{label}.objects")
                self._counters.add(f"write.{label}.bytes", node.size)
            else:
                self._counters.add(f"write.{label}.dropped.{result.outcome.value}")
            if self._on_written(node, result.outcome):
                interval = self._flushes.wrote(self.io.tier)
                if node.held_in(self.io.tier):  # which the index says of the disk alone
                    node.written = interval
            else:
                self._flushes.gave_up(self.io.tier)
            self._finish(node)
        self.pump()

    def _finish(self, node: Node) -> None:
        del self._in_flight[node]
        self.promised.discard(node)
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
