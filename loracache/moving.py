"""Copies and moves objects between tiers, and rewrites those of a tier compressed or plain, because somebody asked.

Everything goes through the arena, a slice at a time that is small against it: raised under a lease, written to where it
shall be, and, of what came only to pass through, dropped again. A move leaves its source when all slices have arrived,
children before parents. Threading: the cache's thread, between whose other calls the steps run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from loracache.cache import Acquired, TieredCache
from loracache.index import Node
from loracache.operations import Operation
from loracache.storage_backends.base import Outcome, Result, Transfer, padded
from loracache.tier_io import Post
from loracache.tiers import Tier

__all__ = ["Mover"]

_OWNER = 0  # of the daemon's own leases
_LEASE_S = 3600.0
_SLICE_OBJECTS = 256
_SLICE_BYTES = 32 << 20
_SHARE = 8  # of the arena, at most, in one slice

Parts = Iterator[list[bytes]]
Done = Callable[[], None]


class Mover:
    """One operation's work. planes(node): how to keep an object on its target, where it is already (0: as it is); None
    where objects are brought there. wanted(node): whether there is anything to do.

    source: objects that are not there are skipped; None takes them from wherever they are. keep: leave them there.
    """

    def __init__(
        self,
        cache: TieredCache,
        post: Post,
        operation: Operation,
        parts: Parts,
        target: Tier,
        done: Done,
        *,
        source: Tier | None = None,
        keep: bool = True,
        planes: Callable[[Node], int] | None = None,
        wanted: Callable[[Node], bool] = lambda node: True,
    ) -> None:
        self._cache = cache
        self._post = post
        self._operation = operation
        self._parts = parts
        self._target = target
        self._done = done
        self._source = source
        self._keep = keep
        self._planes = planes
        self._wanted = wanted
        self._pending: list[bytes] = []
        self._arrived: list[list[bytes]] = []
        self._lease = os.urandom(16)
        self._room = min(_SLICE_BYTES, cache.arena.size // _SHARE)

    def start(self) -> None:
        """Begin; `done` is called at the end, however it comes."""
        self._next()

    # -- one slice after the other ----------

    def _next(self) -> None:
        keys = self._slice() if self._operation.running else []
        if keys:
            self._raise(keys)
        elif self._keep or self._source is None or not self._operation.running:
            self._done()
        else:
            self._leave_source()

    def _slice(self) -> list[bytes]:
        """The next keys that fit together; those that need not or cannot be moved are counted and left out."""
        index, source = self._cache.index, self._source
        keys: list[bytes] = []
        nbytes = 0
        while len(keys) < _SLICE_OBJECTS and nbytes < self._room:
            if not self._pending:
                self._pending = next(self._parts, [])
                if not self._pending:
                    break
                self._pending.reverse()
            key = self._pending.pop()
            node = index.get(key)
            if source in (Tier.CPU, Tier.DISK) and (node is None or not node.held_in(source)):
                self._operation.skip("absent")
                continue
            if node is not None and not self._wanted(node):
                self._operation.skip("already")
                continue
            keys.append(key)
            nbytes += node.size if node is not None else 0
        return keys

    def _raise(self, keys: list[bytes]) -> None:
        index = self._cache.index
        there = {key for key in keys if (node := index.get(key)) is not None and node.held_in(Tier.CPU)}
        nodes: list[Node] = []
        left = len(keys)

        def ready(acquired: list[Acquired]) -> None:
            nonlocal left
            left -= len(acquired)
            for item in acquired:
                if item.node is None:
                    self._operation.skip(item.cause)
                else:
                    nodes.append(item.node)
            if not left:
                place = {key: position for position, key in enumerate(keys)}
                nodes.sort(key=lambda node: place[node.key])  # parents enter a tier before their children
                self._post(lambda: self._raised(nodes, there))

        self._cache.acquire(_OWNER, self._lease, keys, _LEASE_S, ready)

    def _raised(self, nodes: list[Node], there: set[bytes]) -> None:
        def written(arrived: list[Node]) -> None:
            self._operation.objects += len(arrived)
            self._operation.nbytes += sum(node.size for node in arrived)
            if not self._keep:
                self._arrived.append([node.key for node in arrived])
            self._cache.leases.release(_OWNER, self._lease)
            if self._target is not Tier.CPU:  # what only passed through goes again
                passed = [node for node in nodes if node.key not in there and node.held_in(Tier.CPU)]
                self._cache.drop(passed[::-1], Tier.CPU, "passed")
            self._post(self._next)

        if not self._operation.running or self._target is Tier.CPU:
            written(nodes if self._operation.running else [])
        elif self._planes is not None:
            self._rewrite(nodes, self._planes, written)
        elif self._target is Tier.DISK:
            self._to_disk(nodes, written)
        else:
            self._to_redis(nodes, written)

    # -- where they go ----------

    def _to_disk(self, nodes: list[Node], written: Callable[[list[Node]], None]) -> None:
        disk = self._cache.disk
        assert disk is not None

        def flushed() -> None:
            arrived = [node for node in nodes if node.held_in(Tier.DISK)]
            self._operation.skip("not_written", len(nodes) - len(arrived))
            written(arrived)

        for node in nodes:
            if not node.held_in(Tier.DISK):
                disk.queue_write(node)
        disk.writer.pump()
        disk.writer.when_flushed(flushed)

    def _to_redis(self, nodes: list[Node], written: Callable[[list[Node]], None]) -> None:
        redis = self._cache.redis
        assert redis is not None

        def answered(results: list[Result]) -> None:
            arrived = [node for node, result in zip(nodes, results, strict=True) if result.outcome is Outcome.OK]
            self._operation.skip("not_written", len(nodes) - len(arrived))
            written(arrived)

        for node in nodes:
            redis.enqueue(node)
        redis.pump()
        redis.when_flushed(lambda: redis.io.contains([node.key for node in nodes], answered))

    def _rewrite(self, nodes: list[Node], planes: Callable[[Node], int], written: Callable[[list[Node]], None]) -> None:
        def stored(kept: list[tuple[Node, Result]]) -> None:
            arrived = [node for node, result in kept if result.outcome is Outcome.OK]
            for node, result in kept:
                if result.outcome is not Outcome.OK:
                    self._operation.skip(result.outcome.value)
                elif result.stored:
                    self._operation.saved += node.size - result.stored
            written(arrived)

        arena = self._cache.arena
        if self._target is Tier.DISK:
            assert self._cache.disk is not None
            self._cache.disk.rewrite([(node, planes(node)) for node in nodes], stored)
            return
        redis = self._cache.redis
        assert redis is not None

        def asked(results: list[Result]) -> None:
            there = [node for node, result in zip(nodes, results, strict=True) if result.outcome is Outcome.OK]
            self._operation.skip("absent", len(nodes) - len(there))
            transfers = [
                Transfer(node.info(), arena.buffers(node.extents, padded(node.size)), planes(node)) for node in there
            ]
            redis.io.store(transfers, lambda results: stored(list(zip(there, results, strict=True))))

        redis.io.contains([node.key for node in nodes], asked)

    # -- where they were ----------

    def _leave_source(self) -> None:
        """The slices in the opposite order: children come after their parents in each chain."""
        if not self._arrived or not self._operation.running:
            self._done()
            return
        keys = self._arrived.pop()[::-1]
        source = self._source
        if source is Tier.REDIS:
            assert self._cache.redis is not None
            self._cache.redis.io.delete(keys)
        else:
            assert source is not None
            nodes = [node for node in map(self._cache.index.get, keys) if node is not None and node.held_in(source)]
            self._operation.skip("stays", self._cache.drop(nodes, source, "moved").skipped)
            for node in nodes:
                if not node.held_in(source):
                    self._cache.events.add("moved", self._target, f"from_{source.label}", node)
        self._post(self._leave_source)
