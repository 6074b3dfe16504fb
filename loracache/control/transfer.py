"""Copies and moves objects between tiers, and rewrites those of a tier compressed or plain, because somebody asked.

Everything goes through the arena, a slice at a time that is small against it: raised and held there, written to where
it shall be, and, of what came only to pass through, dropped again. A move leaves its source when all slices have
arrived, children before parents, and only what is at its target then: until it has left, an object may have been
evicted there. Threading: the cache's thread, between whose other calls the steps run; none looks at more objects than
take a few milliseconds. A step that raises ends the operation, which holds nothing then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec

from loracache.cache.state.index import Node, parents_first
from loracache.cache.tier.io import Post
from loracache.cache.tiered import Acquired, TieredCache
from loracache.control.jobs import Operation, guarded
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result, Transfer, padded
from loracache.tiers import Tier

__all__ = ["Mover"]

_OWNER = 0  # of the daemon's own leases
_LEASE_S = 3600.0
_SLICE_OBJECTS = 256
_SLICE_BYTES = 32 << 20
_SHARE = 8  # of the arena, at most, in one slice

Parts = Iterator[list[bytes]]
_P = ParamSpec("_P")


class Mover:
    """One operation's work. planes(node): how to keep an object on its target, where it is already (0: as it is); None
    where objects are brought there. wanted(node): whether there is anything to do. done(error): called once, at the
    end, however it comes; error is "" but where a step raised.

    source: objects that are not there are skipped; None takes them from wherever they are. keep: leave them there.
    """

    def __init__(
        self,
        cache: TieredCache,
        post: Post,
        operation: Operation,
        parts: Parts,
        target: Tier,
        done: Callable[[str], None],
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
        self._room = min(_SLICE_BYTES, cache.arena.size // _SHARE)
        self._pending: list[tuple[bytes, int]] = []  # the rest of a part, the last first: key, size (0: not known)
        self._lease = os.urandom(16)  # while a slice is raised; then its nodes are held without a time to live
        self._held: list[Node] = []
        self._passing: list[bytes] = []
        self._arrived: list[bytes] = []
        self._left_over: set[bytes] = set()  # arrived, and still at the source
        self._leaving: list[bytes] = []
        self._over = False

    def start(self) -> None:
        """Begin; `done` is called at the end."""
        self._guard(self._next)()

    # -- steps ----------

    def _guard(self, step: Callable[_P, None]) -> Callable[_P, None]:
        """`step`, as long as the operation is not over; it ends where that raises."""

        def unless_over(*args: _P.args, **kwargs: _P.kwargs) -> None:
            if not self._over:
                step(*args, **kwargs)

        return guarded(unless_over, self._end)

    def _then(self, step: Callable[[], None]) -> None:
        self._post(self._guard(step))

    def _end(self, error: str = "") -> None:
        if not self._over:
            self._over = True
            self._let_go()
            self._done(error)

    def _let_go(self) -> None:
        """Hold nothing any more."""
        held, self._held = self._held, []
        for node in held:
            self._cache.index.unhold(node)
        self._cache.leases.release(_OWNER, self._lease)
        for key in self._passing:
            self._cache.passing[key] -= 1
            if not self._cache.passing[key]:
                del self._cache.passing[key]
        self._cache.leaving.difference_update(self._leaving)
        self._passing, self._leaving = [], []

    # -- one slice after the other ----------

    def _next(self) -> None:
        if not self._operation.running:
            self._end()
        elif self._pending:
            self._raise(self._slice())
        elif (part := next(self._parts, None)) is not None:
            self._look_at(part)
        elif self._keep or self._source is None:
            self._end()
        else:
            self._leave()

    def _look_at(self, part: list[bytes]) -> None:
        """Leave out, and count, what need not or cannot be moved. Redis is asked for what it alone may have: how large
        that is decides what fits into a slice.
        """
        source, redis = self._source, self._cache.redis
        bringing = source is None and self._target is Tier.REDIS
        found: dict[bytes, int] = {}
        asked: list[bytes] = []
        for key in part:
            node = self._cache.index.get(key)
            held = node is not None and bool(node.present)
            if source in (Tier.CPU, Tier.DISK) and (node is None or not node.held_in(source)):
                self._operation.skip(Cause.ABSENT)
            elif node is not None and held and not self._wanted(node):
                self._operation.skip(Cause.ALREADY)
            else:
                found[key] = node.size if node is not None and held else 0
                if source is Tier.REDIS or bringing or not held:
                    asked.append(key)

        def answered(results: list[Result]) -> None:
            for key, result in zip(asked, results, strict=True):
                if result.outcome is Outcome.OK and bringing:
                    del found[key]
                    self._operation.skip(Cause.ALREADY)
                elif result.outcome is Outcome.OK:
                    found[key] = found[key] or (result.info.size if result.info is not None else 0)
                elif not found[key] or source is Tier.REDIS:
                    del found[key]
                    missing = result.outcome is Outcome.MISS
                    self._operation.skip(Cause.ABSENT if missing else Cause(f"redis_{result.outcome.value}"))
            self._pending = list(found.items())[::-1]
            self._then(self._next)

        if asked and redis is not None:
            redis.io.contains(asked, self._guard(answered))
        else:
            answered([Result(Outcome.MISS)] * len(asked))

    def _slice(self) -> list[bytes]:
        """The next keys that fit together."""
        keys: list[bytes] = []
        nbytes = 0
        while self._pending and len(keys) < _SLICE_OBJECTS and nbytes < self._room:
            key, size = self._pending.pop()
            keys.append(key)
            nbytes += self._cache.arena.rounded(size)
        return keys

    def _raise(self, keys: list[bytes]) -> None:
        index = self._cache.index
        place = {key: position for position, key in enumerate(keys)}
        nodes = {key: index.get(key) for key in keys}
        there = {key for key, node in nodes.items() if node is not None and node.held_in(Tier.CPU)}
        on_disk = {key for key, node in nodes.items() if node is not None and node.held_in(Tier.DISK)}
        left = len(keys)

        def ready(acquired: list[Acquired]) -> None:
            nonlocal left
            left -= len(acquired)
            for item in acquired:
                if item.node is None:
                    self._operation.skip(item.cause)
                else:
                    index.hold(item.node)
                    self._held.append(item.node)
            if not left:
                self._held.sort(key=lambda node: place[node.key])
                self._then(lambda: self._raised(there, on_disk))

        if self._target is not Tier.CPU:
            self._passing = [key for key in keys if key not in there]
            self._cache.passing.update(self._passing)
        self._cache.acquire(_OWNER, self._lease, keys, _LEASE_S, self._guard(ready))

    def _raised(self, there: set[bytes], on_disk: set[bytes]) -> None:
        nodes = parents_first([node for node in self._held if node.held_in(Tier.CPU)])
        self._operation.skip(Cause.CORRUPT, len(self._held) - len(nodes))  # what a reader reported since it was raised

        def written(arrived: list[Node]) -> None:
            self._operation.objects += len(arrived)
            self._operation.nbytes += sum(node.size for node in arrived)
            if not self._keep:
                self._arrived += [node.key for node in arrived]
                self._left_over.update(node.key for node in arrived)
            self._let_go()
            if self._target is not Tier.CPU:  # what only passed through goes again, but for the last copy
                safe = on_disk - {node.key for node in arrived}
                passed = [node for node in nodes if node.key not in there and node.held_in(Tier.CPU)]
                passed = [node for node in passed if node.held_in(Tier.DISK) or node.key not in safe]
                self._cache.drop(passed[::-1], Tier.CPU, "passed")
            self._then(self._next)

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
            self._operation.skip(Cause.NOT_WRITTEN, len(nodes) - len(arrived))
            written(arrived)

        for node in nodes:
            if not node.held_in(Tier.DISK):
                disk.queue_write(node)
        disk.writer.pump()
        disk.writer.when_flushed(self._guard(flushed))

    def _to_redis(self, nodes: list[Node], written: Callable[[list[Node]], None]) -> None:
        redis = self._cache.redis
        assert redis is not None

        def answered(results: list[Result]) -> None:
            arrived = [node for node, result in zip(nodes, results, strict=True) if result.outcome is Outcome.OK]
            self._operation.skip(Cause.NOT_WRITTEN, len(nodes) - len(arrived))
            written(arrived)

        def flushed() -> None:
            redis.io.contains([node.key for node in nodes], self._guard(answered))

        for node in nodes:
            redis.enqueue(node)
        redis.pump()
        redis.when_flushed(self._guard(flushed))

    def _rewrite(self, nodes: list[Node], planes: Callable[[Node], int], written: Callable[[list[Node]], None]) -> None:
        def stored(kept: list[tuple[Node, Result]]) -> None:
            arrived = [node for node, result in kept if result.outcome is Outcome.OK]
            for node, result in kept:
                if result.outcome is not Outcome.OK:
                    missing = result.outcome is Outcome.MISS
                    self._operation.skip(Cause.ABSENT if missing else Cause(result.outcome.value))
                elif result.stored:
                    self._operation.saved += node.size - result.stored
            written(arrived)

        if self._target is Tier.DISK:
            assert self._cache.disk is not None
            self._cache.disk.rewrite([(node, planes(node)) for node in nodes], self._guard(stored))
            return
        arena, redis = self._cache.arena, self._cache.redis
        assert redis is not None

        def asked(results: list[Result]) -> None:
            there = [node for node, result in zip(nodes, results, strict=True) if result.outcome is Outcome.OK]
            there = [node for node in there if node.held_in(Tier.CPU)]
            self._operation.skip(Cause.ABSENT, len(nodes) - len(there))
            transfers = [
                Transfer(node.info(), arena.buffers(node.extents, padded(node.size)), planes(node)) for node in there
            ]
            redis.io.store(transfers, self._guard(lambda results: stored(list(zip(there, results, strict=True)))))

        redis.io.contains([node.key for node in nodes], self._guard(asked))

    # -- where they were ----------

    def _leave(self) -> None:
        """The next of what arrived, from the end of each chain on, as far as the target has it now. Two operations
        never take the same object out of two tiers at once: each would trust the other's.
        """
        if not self._operation.running:
            self._end()
            return
        if not self._arrived:
            self._operation.skip(Cause.STAYS, len(self._left_over))
            self._end()
            return
        keys: dict[bytes, None] = {}
        for _ in range(min(_SLICE_OBJECTS, len(self._arrived))):
            key = self._arrived.pop()
            if key not in self._left_over:
                continue
            if key in self._cache.leaving:
                self._stays(key)
            else:
                keys[key] = None
        self._leaving = list(keys)
        self._cache.leaving.update(keys)
        redis = self._cache.redis

        def asked(results: list[Result]) -> None:
            self._depart([result.outcome is Outcome.OK for result in results])

        if self._target is Tier.REDIS and redis is not None:
            redis.io.contains(self._leaving, self._guard(asked))
        else:
            self._depart([self._is_there(key) for key in self._leaving])

    def _is_there(self, key: bytes) -> bool:
        """Whether the target has it, and not only because another operation passes it through."""
        node = self._cache.index.get(key)
        there = node is not None and node.held_in(self._target)
        return there and not (self._target is Tier.CPU and key in self._cache.passing)

    def _stays(self, key: bytes) -> None:
        self._left_over.discard(key)
        self._operation.skip(Cause.STAYS)

    def _depart(self, safe: list[bool]) -> None:
        keys: list[bytes] = []
        for key, there in zip(self._leaving, safe, strict=True):
            if there:
                keys.append(key)
            else:
                self._stays(key)
        if self._source is Tier.REDIS:
            self._delete(keys)
            return
        assert self._source is not None
        going: list[Node] = []
        skipped = self._cache.drop(self._leaves(keys, self._source, going), self._source, "moved").skipped
        self._operation.skip(Cause.STAYS, skipped)
        self._departed([node for node in going if not node.held_in(self._source)])

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

    def _delete(self, keys: list[bytes]) -> None:
        redis, index = self._cache.redis, self._cache.index
        assert redis is not None

        def deleted(results: list[Result]) -> None:
            gone = [result.outcome in (Outcome.OK, Outcome.MISS) for result in results]
            self._operation.skip(Cause.STAYS, gone.count(False))
            nodes = [index.get(key) for key, left in zip(keys, gone, strict=True) if left]
            self._departed([node for node in nodes if node is not None])

        for key in keys:
            self._left_over.discard(key)
            node = index.get(key)
            if node is not None:
                redis.forget(node, "moved")  # else a queued write would bring it back
        redis.io.delete(keys, self._guard(deleted))

    def _departed(self, nodes: list[Node]) -> None:
        assert self._source is not None
        for node in nodes:
            self._cache.events.add("moved", self._target, f"from_{self._source.label}", node)
        self._let_go()
        self._then(self._leave)
