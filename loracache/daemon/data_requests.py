# SPDX-License-Identifier: Apache-2.0
"""One connection's requests of the data path: what engines ask for without pause, and may ask for very much of.

Each is a generator: it yields between two slices of a long request, and never where the request is of ordinary size, so
that it is answered in the call that received it. What waits for a tier answers later. Threading: the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from loracache.cache.state.leases import Grip, Writing
from loracache.cache.tiered import Acquired
from loracache.control.steps import done, turn
from loracache.daemon.durable import reserve_in_time
from loracache.errors import UsageError
from loracache.keys import KEY_BYTES
from loracache.results import Cause
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier
from loracache.wire import protocol
from loracache.wire.protocol import NO_PARENT, OK, PART, split_keys

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache
    from loracache.control.lookup import Finder, Hits
    from loracache.daemon.recorder import Recorder
    from loracache.daemon.swapping import Swapping
    from loracache.namespaces import Namespaces

__all__ = ["DataRequest", "DataRequests"]

DataRequest = (
    protocol.Lookup
    | protocol.Acquire
    | protocol.Reserve
    | protocol.Commit
    | protocol.Release
    | protocol.Prefetch
    | protocol.Keep
)
_FOUND, _ACQUIRED, _BAD = 1024, 512, 64  # keys of a slice: what takes about a millisecond
_UNANSWERED = 4096  # keys of one request that are waited for at a time

Answer = Callable[[int, int, object], None]
Later = Callable[[int, Awaitable[list[Any]]], None]


class DataRequests:
    """Serves them. answer(number, status, payload) sends; later(number, work) answers what `work` comes to."""

    def __init__(
        self,
        owner: int,
        cache: TieredCache,
        namespaces: Namespaces,
        finder: Finder,
        swapping: Swapping,
        answer: Answer,
        later: Later,
        recorder: Recorder | None = None,
    ) -> None:
        self._owner = owner
        self._cache = cache
        self._namespaces = namespaces
        self._finder = finder
        self._swapping = swapping
        self._answer = answer
        self._later = later
        self._recorder = recorder
        self._gone = False
        self._asking: set[bytes] = set()  # leases of what waits for a tier, until they are released

    def serve(self, number: int, request: DataRequest) -> Iterator[None]:
        """Do what is asked. Raises UsageError."""
        match request:
            case protocol.Lookup():
                return self._lookup(number, request)
            case protocol.Acquire():
                return self._acquire(number, request)
            case protocol.Reserve():
                return self._reserve(number, request)
            case protocol.Commit():
                return self._commit(number, request)
            case protocol.Release():
                return self._release(number, request)
            case protocol.Prefetch():
                return self._prefetch(number, request)
            case protocol.Keep():
                return self._keep(number, request)

    def _keep(self, number: int, request: protocol.Keep) -> Iterator[None]:
        yield from self._cache.keeps.wish(split_keys(request.keys), request.ttl, request.priority)
        self._answer(number, OK, [])

    def forget(self, lease: bytes) -> None:
        """Its holder is done with a lease: what waits for a tier takes it no more."""
        self._asking.discard(lease)

    def close(self) -> None:
        """The connection is gone: nothing is held for it any more."""
        self._gone = True

    def _lookup(self, number: int, request: protocol.Lookup) -> Iterator[None]:
        keys: list[bytes] = []
        tiers: list[Tier] = []
        for part in _parts(request.keys, _FOUND) if request.keys or not request.beside else ():
            if keys:
                yield
            if len(tiers) == len(keys):
                tiers += self._cache.lookup(part)
            keys += part
        beside: list[bytes] = []
        where = bytearray()
        for part in _parts(request.beside, _FOUND) if request.beside else ():
            if len(keys) + len(beside) >= _FOUND:
                yield
            where += self._finder.where(part)
            beside += part
        hits = self._finder.judge(tiers, len(keys), bytes(where))
        if hits.cause:
            self._asking.discard(request.lease)
            self._answer(number, OK, (yield from self._hits(request, keys, hits)))
        else:
            self._later(number, self._look_in_redis(request, keys, hits, beside))

    async def _look_in_redis(
        self, request: protocol.Lookup, keys: list[bytes], hits: Hits, beside: list[bytes]
    ) -> list[Any]:
        self._asking.add(request.lease)
        hits = await self._finder.ask_redis(keys, hits, beside)
        wanted = request.lease in self._asking
        self._asking.discard(request.lease)
        return await done(self._hits(request, keys, hits, hold=wanted))

    def _hits(
        self, request: protocol.Lookup, keys: list[bytes], hits: Hits, hold: bool = True
    ) -> Generator[None, None, list[Any]]:
        """Hold and count what was found, in whole groups."""
        counters = self._cache.counters
        count = len(hits.tiers) // request.group * request.group
        tiers = bytes(hits.tiers[:count])
        for at in range(0, max(count, 1), _FOUND) if request.lease and hold else ():
            if at:
                yield
            if not self._gone:
                self._cache.hold(self._owner, request.lease, keys[at : min(at + _FOUND, count)], request.ttl)
        counters.add("lookup")
        for tier in (Tier.CPU, Tier.DISK, Tier.REDIS):
            counters.add(f"hit.{tier.label}", tiers.count(tier))
        counters.add(f"miss.{hits.cause}", len(keys) - count)
        if self._recorder is not None and keys:
            node = self._cache.index.get(keys[0])
            space = self._namespaces.get(node.namespace) if node is not None and node.namespace else None
            self._recorder.asked(self._owner, request.lease, request.keys, request.group, tiers, space)
        if not request.beside:
            return [tiers]
        for tier in (Tier.CPU, Tier.DISK, Tier.REDIS):
            counters.add(f"beside.{tier.label}", hits.beside.count(tier))
        counters.add("beside.absent", hits.beside.count(protocol.NOWHERE))
        return [tiers, hits.beside]

    def _acquire(self, number: int, request: protocol.Acquire) -> Iterator[None]:
        left = len(request.keys) // KEY_BYTES
        if not left:
            self._answer(number, OK, [])
        node = self._cache.index.get(request.keys) if self._recorder is not None and left == 1 else None
        at = next((tier for tier in Tier if node is not None and node.held_in(tier)), None)

        def ready(first: int, acquired: list[Acquired]) -> None:
            nonlocal left
            left -= len(acquired)
            for item in acquired:
                if item.node is None:
                    self._cache.counters.add(f"acquire.failed.{item.cause}")
                elif self._recorder is not None and item.node.kind is Kind.LORA:
                    self._recorder.loaded(item.node.key, item.node.size, at)
            self._answer(number, PART if left else OK, [_acquired(first, item) for item in acquired])

        yield from self._raise(request, Grip.FIRM, ready)

    def _prefetch(self, number: int, request: protocol.Prefetch) -> Iterator[None]:
        if request.delay:
            self._swapping.announce(request.lease, split_keys(request.keys), request.delay, request.ttl)
        else:
            yield from self._raise(request, Grip.LOOSE, lambda first, acquired: None)
        self._answer(number, OK, [])

    def _raise(
        self,
        request: protocol.Acquire | protocol.Prefetch,
        grip: Grip,
        ready: Callable[[int, list[Acquired]], None],
    ) -> Iterator[None]:
        """Hold the request's keys, raising them into the arena. ready(position of the first key of a slice, answers)"""
        if len(request.keys) > _UNANSWERED * KEY_BYTES:
            self._later(0, self._raise_in_turn(request, grip, ready))  # it answers by itself
            return
        first = 0
        for part in _parts(request.keys, _ACQUIRED):
            if first:
                yield
            self._cache.acquire(self._owner, request.lease, part, request.ttl, partial(ready, first), grip)
            first += len(part)

    async def _raise_in_turn(
        self,
        request: protocol.Acquire | protocol.Prefetch,
        grip: Grip,
        ready: Callable[[int, list[Acquired]], None],
    ) -> list[Any]:
        """The same of very many keys: no more are waited for at a time than the collection of young objects, which
        looks at each that waits, gets through in a few milliseconds."""
        unanswered = first = 0
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def answered(at: int, acquired: list[Acquired]) -> None:
            nonlocal unanswered
            unanswered -= len(acquired)
            ready(at, acquired)
            if not woken.done():
                woken.set_result(None)

        for part in _parts(request.keys, _ACQUIRED):
            if first and (self._gone or not self._cache.leases.alive(self._owner, request.lease)):
                ready(first, [Acquired(position, None, Cause.LEASE_LOST) for position in range(len(part))])
            else:
                unanswered += len(part)
                self._cache.acquire(self._owner, request.lease, part, request.ttl, partial(answered, first), grip)
            first += len(part)
            await turn()
            while unanswered > _UNANSWERED:
                woken = asyncio.get_running_loop().create_future()
                await woken
        return []

    def _release(self, number: int, request: protocol.Release) -> Iterator[None]:
        self._asking.discard(request.lease)
        held = self._cache.leases.release(self._owner, request.lease)
        if held and request.keys:  # else the reader saw what came into the pages after it
            for part in _parts(request.keys, _BAD):
                self._cache.report_bad(part)
                yield
        if not held:
            self._cache.counters.add("lease.lost")
        self._answer(number, OK, [held])

    def _reserve(self, number: int, request: protocol.Reserve) -> Iterator[None]:
        counts = [len(request.keys) // KEY_BYTES, len(request.parents) // KEY_BYTES, len(request.sizes)]
        if len(set(counts)) > 1:
            raise UsageError(f"{counts[0]} keys, {counts[1]} parents and {counts[2]} sizes: give one of each")
        namespace = self._namespaces.get(request.namespace)
        if namespace is None:
            raise UsageError(
                f"namespace {request.namespace.hex()} is not registered; register it on this connection first"
            )
        if self._recorder is not None:
            self._recorder.stored(namespace, request.keys, request.parents, request.sizes)
        root = namespace.adapter_key()
        beside = set(split_keys(request.beside))
        infos: list[ObjectInfo] = []
        for keys, parents in zip(_parts(request.keys, _FOUND), _parts(request.parents, _FOUND), strict=True):
            if infos:
                yield
            sizes = request.sizes[len(infos) : len(infos) + len(keys)]
            kinds = [Kind.BESIDE if key in beside else Kind.KV for key in keys] if beside else [Kind.KV] * len(keys)
            infos += [
                ObjectInfo(key, root if parent == NO_PARENT else parent, kind, request.namespace, size, 0)
                for key, parent, kind, size in zip(keys, parents, kinds, sizes, strict=True)
            ]
        if request.wait:
            self._later(number, self._reserve_in_time(request, infos))
        else:
            answers = yield from self._cache.reserve(self._owner, request.lease, infos, request.ttl)
            self._answer(number, OK, _reserved(answers))

    async def _reserve_in_time(self, request: protocol.Reserve, infos: list[ObjectInfo]) -> list[Any]:
        if not self._cache.writers:
            raise UsageError("nothing is durable without a tier below memory; give the daemon a disk or a Redis")
        self._asking.add(request.lease)

        def wanted() -> bool:
            return not self._gone and request.lease in self._asking

        answers = await reserve_in_time(self._cache, self._owner, request, infos, wanted)
        self._asking.discard(request.lease)
        return _reserved(answers)

    def _commit(self, number: int, request: protocol.Commit) -> Iterator[None]:
        count = len(request.keys) // KEY_BYTES
        if count != len(request.checksums):
            raise UsageError(f"{count} keys and {len(request.checksums)} checksums: give one of each")
        pairs: list[tuple[bytes, int]] = []
        for part in _parts(request.keys, _FOUND):
            if pairs:
                yield
            pairs += zip(part, request.checksums[len(pairs) : len(pairs) + len(part)], strict=True)
        self._answer(number, OK, (yield from self._cache.commit(self._owner, request.lease, pairs)))


def _parts(blob: bytes, count: int) -> Iterator[list[bytes]]:
    """The keys in `blob`, so many at a time; one empty list where there are none."""
    size = count * KEY_BYTES
    return (split_keys(blob[at : at + size]) for at in range(0, max(len(blob), 1), size))


def _reserved(answers: list[Writing | Cause]) -> list[Any]:
    return [_extents(item.extents) if isinstance(item, Writing) else item for item in answers]


def _extents(extents: tuple[tuple[int, int], ...]) -> list[int]:
    return [number for extent in extents for number in extent]


def _acquired(first: int, item: Acquired) -> list[Any]:
    node = item.node
    if node is None:
        return [first + item.position, item.cause]
    return [first + item.position, node.size, node.checksum, _extents(node.extents)]
