# SPDX-License-Identifier: Apache-2.0
"""Raises objects from disk or Redis into the arena, once for all who wait for the same object.

Threading: the cache's thread; the reading itself runs on the tiers' threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

from loracache.cache.policy.limits import Quotas
from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.node import State
from loracache.cache.state.slices import Slices
from loracache.cache.tier.io import TierIO
from loracache.results import Cause
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Result, Transfer, padded
from loracache.tiers import Tier

__all__ = ["Promoter", "Waiter"]

Waiter = Callable[[Node | None, Cause], None]  # (the node now in the arena, NONE) or (None, cause)

_BATCH_BYTES = 8 << 20
_SLICE = 128  # objects that a load begins for between two looks at the socket


class Promoter:
    """Loads into the arena.

    make_room(nbytes, protected, node) returns whether the arena has that much free now, and the node's owners are
    within their quotas, and yields where that takes long;
    arrived(node, source) and lost(node, outcome) tell the cache how a load went.
    """

    def __init__(
        self,
        arena: Arena,
        index: Index,
        counters: Counters,
        slices: Slices,
        make_room: Callable[[int, set[Node], Node], Generator[None, None, bool]],
        quotas: Quotas,
        arrived: Callable[[Node, Tier], None],
        lost: Callable[[Node, Tier, Outcome], None],
    ) -> None:
        self._arena = arena
        self._index = index
        self._counters = counters
        self._slices = slices
        self._make_room = make_room
        self._arrived = arrived
        self._lost = lost
        self._quotas = quotas
        self._waiting: dict[Node, list[Waiter]] = {}
        self._settle: dict[Node, Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, node: Node, waiter: Waiter) -> None:
        """Join a load under way."""
        self._waiting[node].append(waiter)

    def from_disk(self, io: TierIO, wanted: Sequence[tuple[Node, Waiter]]) -> None:
        """Load objects that the disk tier holds."""
        self._slices.run(self._load(io, wanted))

    def from_redis(self, io: TierIO, wanted: Sequence[tuple[bytes, Waiter]]) -> None:
        """Ask Redis for keys that no other tier holds, in one round trip, and load what it has."""

        def answered(results: list[Result]) -> None:
            self._slices.run(self._take(io, wanted, results))

        io.contains([key for key, _ in wanted], answered)

    def _take(self, io: TierIO, wanted: Sequence[tuple[bytes, Waiter]], results: list[Result]) -> Iterator[None]:
        """Load what Redis has, a slice at a time: a node that is made is held before others are served."""
        for at in range(0, len(wanted), _SLICE):
            found: list[tuple[Node, Waiter]] = []
            for (key, waiter), result in zip(wanted[at : at + _SLICE], results[at : at + _SLICE], strict=True):
                if result.outcome is not Outcome.OK or result.info is None:
                    missing = result.outcome is Outcome.MISS
                    waiter(None, Cause.ABSENT if missing else Cause(f"redis_{result.outcome.value}"))
                    continue
                node = self._insert(result.info, key)
                if node is None:
                    waiter(None, Cause.REDIS_CORRUPT)
                elif node.present and node.checksum != result.info.checksum:
                    # Computed elsewhere, and the tier that holds ours cannot be read now.
                    waiter(None, Cause.REDIS_DIFFERS)
                elif node.held_in(Tier.CPU):
                    waiter(node, Cause.NONE)
                elif node.state(Tier.CPU) is State.LOADING:
                    self.wait(node, waiter)
                else:
                    found.append((node, waiter))
            yield from self._load(io, found)
            if at + _SLICE < len(wanted):
                yield

    def _insert(self, info: ObjectInfo, key: bytes) -> Node | None:
        if info.key != key or not 0 < info.size <= self._arena.size:
            return None
        if info.parent:
            self._index.ghost(info.parent, Kind.LORA if info.parent in self._index.adapters else Kind.KV)
        return self._index.insert(info)

    def _load(self, io: TierIO, wanted: Sequence[tuple[Node, Waiter]]) -> Iterator[None]:
        """Allocate, then read in batches small enough that the first bytes are copied on while the last are read."""
        protected = {node for node, _ in wanted}
        for node, _ in wanted:
            self._index.hold(node)  # making room for one may take the last child, and with it the node, of another
        batch: list[Node] = []
        nbytes = 0
        refused = self._arena.size + 1  # bytes for which there was no room; who waits behind asks for no less in vain
        for count, (node, waiter) in enumerate(wanted, start=1):
            size = self._arena.rounded(node.size)
            if node.state(Tier.CPU) is State.LOADING or node.held_in(Tier.CPU):
                enough = True
            elif size >= refused:
                enough = self._arena.free_bytes >= size
            elif not (enough := (yield from self._make_room(size, protected, node))):
                refused = size if self._arena.free_bytes < size else refused
            # Others were served meanwhile: the object may be on its way, or here.
            if node.state(Tier.CPU) is State.LOADING:
                self.wait(node, waiter)
                self._index.unhold(node)
                continue
            if node.held_in(Tier.CPU):
                waiter(node, Cause.NONE)
                self._index.unhold(node)
                continue
            extents = self._arena.allocate(node.size) if enough else None
            if extents is None:
                fits = self._arena.free_bytes >= size
                waiter(None, Cause.OVER_QUOTA if fits else Cause.MEMORY_FULL)
                self._index.unhold(node)
                continue
            self._index.load(node, extents)
            self._settle[node] = self._quotas.charge(Tier.CPU, node, size)
            self._waiting[node] = [waiter]
            batch.append(node)
            nbytes += size
            if nbytes >= _BATCH_BYTES or len(batch) == _SLICE:  # what comes back is taken in at once
                self._submit(io, batch)
                batch, nbytes = [], 0
            if not count % _SLICE:
                yield
        if batch:
            self._submit(io, batch)

    def _submit(self, io: TierIO, batch: list[Node]) -> None:
        transfers = [Transfer(node.info(), self._arena.buffers(node.extents, padded(node.size))) for node in batch]
        io.load(transfers, lambda results: self._loaded(io.tier, batch, results))

    def _loaded(self, tier: Tier, batch: list[Node], results: list[Result]) -> None:
        for node, result in zip(batch, results, strict=True):
            waiters = self._waiting.pop(node)
            self._settle.pop(node)()
            if result.outcome is Outcome.OK:
                self._counters.add(f"load.{tier.label}.objects")
                self._counters.add(f"load.{tier.label}.bytes", node.size)
                self._arrived(node, tier)
                for waiter in waiters:
                    waiter(node, Cause.NONE)
            else:
                self._index.load_failed(node)
                self._lost(node, tier, result.outcome)
                for waiter in waiters:
                    waiter(None, Cause(f"{tier.label}_{result.outcome.value}"))
            self._index.unhold(node)
