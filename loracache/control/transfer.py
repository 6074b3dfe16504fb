# SPDX-License-Identifier: Apache-2.0
"""Copies and moves objects between tiers, and rewrites those of a tier compressed or plain, because somebody asked.

Everything goes through the arena, a slice at a time that is small against it: raised and held there, written to where
it shall be, and, of what came only to pass through, dropped again. A move leaves its source when all slices have
arrived, children before parents, and only what is at its target then: until it has left, an object may have been
evicted there. Threading: a coroutine on the event loop, which serves everybody else between two steps; none looks at
more objects than take a few milliseconds. However it ends, it holds nothing then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence

from loracache.cache.state.leases import Grip
from loracache.cache.state.node import Node, parents_first
from loracache.cache.tier.write_behind import WriteBehind
from loracache.cache.tiered import OPERATOR, Acquired, TieredCache
from loracache.control.incompressible import Incompressible
from loracache.control.jobs import Operation
from loracache.control.steps import answer, turn
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result, Transfer, padded
from loracache.tiers import Tier

__all__ = ["Mover", "flushed"]

_LEASE_S = 3600.0
_SLICE_OBJECTS = 256
_SLICE_BYTES = 32 << 20
_SHARE = 8  # of the arena, at most, in one slice

Parts = Iterator[list[bytes]]


class Mover:
    """One operation's work. planes(node): how to keep an object on its target, where it is already (0: as it is); None
    where objects are brought there. wanted(node): whether there is anything to do; in_redis(stored): the same, of what
    Redis is asked for. hopeless: what compression makes no smaller; it is left alone, and more is learnt.

    source: objects that are not there are skipped; None takes them from wherever they are. keep: leave them there.
    hold: seconds for which what is in the arena then is held there, loosely.
    """

    def __init__(
        self,
        cache: TieredCache,
        operation: Operation,
        parts: Parts,
        target: Tier,
        *,
        source: Tier | None = None,
        keep: bool = True,
        planes: Callable[[Node], int] | None = None,
        wanted: Callable[[Node], bool] = lambda node: True,
        in_redis: Callable[[int], bool] = lambda stored: True,
        hopeless: Incompressible | None = None,
        hold: float = 0.0,
    ) -> None:
        self._cache = cache
        self._operation = operation
        self._parts = parts
        self._target = target
        self._source = source
        self._keep = keep
        self._planes = planes
        self._wanted = wanted
        self._wanted_in_redis = in_redis
        self._hopeless = hopeless
        self._hold = hold
        self._holding = os.urandom(16)  # the lease of that
        self._room = min(_SLICE_BYTES, cache.arena.size // _SHARE)
        self._lease = os.urandom(16)  # while a slice is raised; then its nodes are held without a time to live
        self._held: list[Node] = []
        self._passing: list[bytes] = []
        self._arrived: list[bytes] = []
        self._left_over: set[bytes] = set()  # arrived, and still at the source
        self._leaving: list[bytes] = []

    async def run(self) -> None:
        """Do it, as long as the operation runs."""
        try:
            for part in self._operation.while_running(self._parts):
                sizes = await self._sizes(part)
                await turn()
                for keys in self._operation.while_running(self._slices(sizes)):
                    await self._carry(keys)
                    await turn()
            if not self._keep and self._source is not None:
                await self._leave(self._source)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Hold nothing any more."""
        held, self._held = self._held, []
        for node in held:
            self._cache.index.unhold(node)
        self._cache.leases.release(OPERATOR, self._lease)
        for key in self._passing:
            self._cache.passing[key] -= 1
            if not self._cache.passing[key]:
                del self._cache.passing[key]
        self._cache.leaving.difference_update(self._leaving)
        self._passing, self._leaving = [], []

    # -- one slice after the other ----------

    async def _sizes(self, part: list[bytes]) -> dict[bytes, int]:
        """Of what can be moved (0: not known); what need not or cannot be is counted. Redis is asked for what it alone
        may have: how large that is decides what fits into a slice.
        """
        source = self._source
        bringing = source is None and self._target is Tier.REDIS
        sizes: dict[bytes, int] = {}
        unsure: list[bytes] = []
        for key in part:
            node = self._cache.index.get(key)
            held = node is not None and bool(node.present)
            if source in (Tier.CPU, Tier.DISK) and (node is None or not node.held_in(source)):
                self._operation.skip(Cause.ABSENT)
            elif node is not None and held and not self._wanted(node):
                self._operation.skip(Cause.ALREADY)
                self._hold_on([node])
            elif self._hopeless is not None and key in self._hopeless:
                self._operation.skip(Cause.INCOMPRESSIBLE)
            else:
                sizes[key] = node.size if node is not None and held else 0
                if source is Tier.REDIS or bringing or not held:
                    unsure.append(key)
        for key, result in zip(unsure, await self._ask_redis(unsure), strict=True):
            if result.outcome is Outcome.OK and (bringing or self._kept_so(result)):
                del sizes[key]
                self._operation.skip(Cause.ALREADY)
            elif result.outcome is Outcome.OK:
                sizes[key] = sizes[key] or (result.info.size if result.info is not None else 0)
            elif not sizes[key] or source is Tier.REDIS:
                del sizes[key]
                missing = result.outcome is Outcome.MISS
                self._operation.skip(Cause.ABSENT if missing else Cause(f"redis_{result.outcome.value}"))
        return sizes

    def _kept_so(self, found: Result) -> bool:
        """Whether Redis keeps it as it shall be."""
        return found.info is not None and not self._wanted_in_redis(found.info.stored)

    async def _ask_redis(self, keys: list[bytes]) -> list[Result]:
        """What it says of each; it has none where there is none."""
        redis = self._cache.redis
        if redis is None or not keys:
            return [Result(Outcome.MISS)] * len(keys)
        return await answer(lambda done: redis.io.contains(keys, done))

    def _slices(self, sizes: dict[bytes, int]) -> Iterator[list[bytes]]:
        """Keys that fit together."""
        keys: list[bytes] = []
        nbytes = 0
        for key, size in sizes.items():
            if len(keys) >= _SLICE_OBJECTS or nbytes >= self._room:
                yield keys
                keys, nbytes = [], 0
            keys.append(key)
            nbytes += self._cache.arena.rounded(size)
        if keys:
            yield keys

    async def _carry(self, keys: list[bytes]) -> None:
        """One slice to its target."""
        nodes = [node for node in map(self._cache.index.get, keys) if node is not None]
        in_cpu = {node.key for node in nodes if node.held_in(Tier.CPU)}
        on_disk = {node.key for node in nodes if node.held_in(Tier.DISK)}
        if self._target is not Tier.CPU:
            self._passing = [key for key in keys if key not in in_cpu]
            self._cache.passing.update(self._passing)
        nodes = await self._raise(keys)
        arrived = await self._deliver(nodes) if self._operation.running else []
        self._hold_on(arrived)
        self._operation.objects += len(arrived)
        self._operation.nbytes += sum(node.size for node in arrived)
        if not self._keep:
            self._arrived += [node.key for node in arrived]
            self._left_over.update(node.key for node in arrived)
        self._let_go()
        if self._target is not Tier.CPU:  # what only passed through goes again, but for the last copy
            safe = on_disk - {node.key for node in arrived}
            passed = [node for node in nodes if node.key not in in_cpu and node.held_in(Tier.CPU)]
            passed = [node for node in passed if node.held_in(Tier.DISK) or node.key not in safe]
            self._cache.drop(passed[::-1], Tier.CPU, "passed")

    async def _raise(self, keys: list[bytes]) -> list[Node]:
        """Hold in the arena what of `keys` can be had, parents first. Each is held as it arrives: its lease may end
        before the last one is there."""

        def ask(done: Callable[[None], None]) -> None:
            left = len(keys)

            def ready(acquired: list[Acquired]) -> None:
                nonlocal left
                left -= len(acquired)
                for item in acquired:
                    if item.node is None:
                        self._operation.skip(item.cause)
                    else:
                        self._cache.index.hold(item.node)
                        self._held.append(item.node)
                if not left:
                    done(None)

            self._cache.acquire(OPERATOR, self._lease, keys, _LEASE_S, ready)

        await answer(ask)
        await turn()
        place = {key: position for position, key in enumerate(keys)}
        self._held.sort(key=lambda node: place[node.key])
        nodes = parents_first([node for node in self._held if node.held_in(Tier.CPU)])
        self._operation.skip(Cause.CORRUPT, len(self._held) - len(nodes))  # what a reader reported since it was raised
        return nodes

    def _hold_on(self, nodes: list[Node]) -> None:
        here = [node for node in nodes if node.held_in(Tier.CPU)]
        if self._hold and here:
            self._cache.leases.hold(OPERATOR, self._holding, self._hold, here, Grip.LOOSE)

    # -- where they go ----------

    async def _deliver(self, nodes: list[Node]) -> list[Node]:
        """Those that are at the target then, as they shall be."""
        if self._target is Tier.CPU:
            return nodes
        if self._planes is not None:
            return await self._rewrite(nodes, self._planes)
        arrived = await (self._to_disk(nodes) if self._target is Tier.DISK else self._to_redis(nodes))
        self._operation.skip(Cause.NOT_WRITTEN, len(nodes) - len(arrived))
        return arrived

    async def _to_disk(self, nodes: list[Node]) -> list[Node]:
        disk = self._cache.disk
        assert disk is not None
        for node in nodes:
            if not node.held_in(Tier.DISK):
                disk.queue_write(node)
        await flushed(disk.writer)
        return [node for node in nodes if node.held_in(Tier.DISK)]

    async def _to_redis(self, nodes: list[Node]) -> list[Node]:
        redis = self._cache.redis
        assert redis is not None
        for node in nodes:
            self._cache.admitter.to_redis_alone(node)
        await flushed(redis)
        return await self._in_redis(nodes)

    async def _in_redis(self, nodes: list[Node]) -> list[Node]:
        results = await self._ask_redis([node.key for node in nodes])
        return [node for node, result in zip(nodes, results, strict=True) if result.outcome is Outcome.OK]

    async def _rewrite(self, nodes: list[Node], planes: Callable[[Node], int]) -> list[Node]:
        results = await (self._on_disk(nodes, planes) if self._target is Tier.DISK else self._at_redis(nodes, planes))
        done, larger = [], []
        for node, result in results:
            if result.outcome is not Outcome.OK:
                self._operation.skip(Cause.ABSENT if result.outcome is Outcome.MISS else result.outcome.value)
            elif self._hopeless is not None and not result.stored:
                larger.append(node.key)
            else:
                done.append(node)
                self._operation.saved += node.size - result.stored if result.stored else 0
        if self._hopeless is not None:
            self._hopeless.update(larger)
        self._operation.skip(Cause.INCOMPRESSIBLE, len(larger))
        return done

    async def _on_disk(self, nodes: list[Node], planes: Callable[[Node], int]) -> list[tuple[Node, Result]]:
        disk = self._cache.disk
        assert disk is not None
        items = [(node, planes(node)) for node in nodes]
        return await answer(lambda done: disk.rewrite(items, done))

    async def _at_redis(self, nodes: list[Node], planes: Callable[[Node], int]) -> list[tuple[Node, Result]]:
        arena, redis = self._cache.arena, self._cache.redis
        assert redis is not None
        there = [node for node in await self._in_redis(nodes) if node.held_in(Tier.CPU)]
        self._operation.skip(Cause.ABSENT, len(nodes) - len(there))
        transfers = [
            Transfer(node.info(), arena.buffers(node.extents, padded(node.size)), planes(node)) for node in there
        ]
        results: list[Result] = await answer(lambda done: redis.io.store(transfers, done))
        return list(zip(there, results, strict=True))

    # -- where they were ----------

    async def _leave(self, source: Tier) -> None:
        """Take out of the source what arrived, from the end of each chain on, as far as the target has it now. Two
        operations never take the same object out of two tiers at once: each would trust the other's.
        """
        while self._operation.running and self._arrived:
            self._leaving = self._next_to_leave()
            self._cache.leaving.update(self._leaving)
            safe = await self._safe(self._leaving)
            for key in self._leaving:
                if key not in safe:
                    self._stays(key)
            keys = [key for key in self._leaving if key in safe]
            gone = await self._delete(keys) if source is Tier.REDIS else self._drop(keys, source)
            for node in gone:
                self._cache.events.add("moved", self._target, f"from_{source.label}", node)
            self._let_go()
            await turn()
        if self._operation.running:
            self._operation.skip(Cause.STAYS, len(self._left_over))

    def _next_to_leave(self) -> list[bytes]:
        keys: dict[bytes, None] = {}
        for _ in range(min(_SLICE_OBJECTS, len(self._arrived))):
            key = self._arrived.pop()
            if key not in self._left_over:
                continue
            if key in self._cache.leaving:
                self._stays(key)
            else:
                keys[key] = None
        return list(keys)

    async def _safe(self, keys: list[bytes]) -> set[bytes]:
        """What the target has, and not only because another operation passes it through."""
        if self._target is Tier.REDIS:
            results = await self._ask_redis(keys)
            return {key for key, result in zip(keys, results, strict=True) if result.outcome is Outcome.OK}
        nodes = [node for node in map(self._cache.index.get, keys) if node is not None and node.held_in(self._target)]
        passing = self._cache.passing if self._target is Tier.CPU else ()
        return {node.key for node in nodes if node.key not in passing}

    def _stays(self, key: bytes) -> None:
        self._left_over.discard(key)
        self._operation.skip(Cause.STAYS)

    def _drop(self, keys: Sequence[bytes], source: Tier) -> list[Node]:
        """Out of cpu or disk; answers what has gone."""
        going: list[Node] = []
        self._operation.skip(Cause.STAYS, self._cache.drop(self._leaves(keys, source, going), source, "moved").skipped)
        return [node for node in going if not node.held_in(source)]

    def _leaves(self, keys: Sequence[bytes], source: Tier, going: list[Node]) -> Iterator[Node]:
        """Objects that may leave, one by one, each when the one before it has left; notes them in `going`."""
        for key in keys:
            node = self._cache.index.get(key)
            if node is None or not node.held_in(source):
                self._left_over.discard(key)
            elif not node.children[source]:  # else its last child brings it up again
                self._left_over.discard(key)
                parent = node.parent
                going.append(node)
                yield node
                if parent is not None and parent.key in self._left_over and not parent.children[source]:
                    self._arrived.append(parent.key)

    async def _delete(self, keys: list[bytes]) -> list[Node]:
        """Out of Redis; answers what has gone, as far as the index knows it."""
        redis, index = self._cache.redis, self._cache.index
        assert redis is not None
        for key in keys:
            self._left_over.discard(key)
            node = index.get(key)
            if node is not None:
                redis.forget(node, "moved")  # else a queued write would bring it back
                node.sent = False
        results: list[Result] = await answer(lambda done: redis.io.delete(keys, done))
        gone = [result.outcome in (Outcome.OK, Outcome.MISS) for result in results]
        self._operation.skip(Cause.STAYS, gone.count(False))
        nodes = [index.get(key) for key, left in zip(keys, gone, strict=True) if left]
        return [node for node in nodes if node is not None]


async def flushed(writer: WriteBehind) -> None:
    """Once everything queued so far is written or dropped."""
    writer.pump()
    over: asyncio.Future[None] = answer(lambda done: writer.when_flushed(lambda: done(None)))
    await over
