# SPDX-License-Identifier: Apache-2.0
"""The daemon's adapters: takes PEFT folders into the cache, keeps their names, says where they are.

Threading: coroutines on the event loop. Files and names are read and written on threads of its own, which touch nothing
else but the pages that an adapter is written to.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, assert_never

from loracache.adapters.names import AdapterNames, NameRecord, check_name
from loracache.adapters.payload import AdapterDigests, Packing
from loracache.adapters.peft import PeftFolder
from loracache.cache.eviction import Evicted
from loracache.cache.policy.keeps import PRIORITIES
from loracache.cache.state.leases import Writing
from loracache.cache.tier.workers import Workers
from loracache.control.listing import sum_of
from loracache.control.steps import all_written, answer, done, turn
from loracache.errors import Rejected, UsageError
from loracache.keys import LORA_NAMESPACE, checksum
from loracache.results import Cause
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Result
from loracache.tiers import Tier
from loracache.wire import protocol
from loracache.wire.requests import AdapterChange

if TYPE_CHECKING:
    from loracache.cache.tier.io import Post
    from loracache.cache.tiered import TieredCache
    from loracache.namespaces import Namespaces

__all__ = ["Adapters"]

_OWNER = 0  # of our own write leases; connections count from 1
_LEASE_S = 600.0
_REDIS_S = 30.0
_DELETED_S = 5.0  # less than clients wait: behind a long queue of writes it is answered first
_TRY_AGAIN_S = 0.02
_TAKEN_IN_AT_ONCE = 2  # each holds room in the arena while it is read
_PAGE = 1000  # adapters of one answer, however many are asked for
_PAGE_BYTES = 6 << 20  # of an answer, which is one frame; behind it one more record, with its configuration of a MiB
_SLICE = 1000  # names looked at between two looks at the socket
_BESIDES = 700  # bytes of a record, at most, but for its configuration


class Adapters:
    """Adapters of one daemon. `engines` counts, by key, the engines that hold an adapter in their own memory."""

    def __init__(self, cache: TieredCache, namespaces: Namespaces, names: AdapterNames, post: Post) -> None:
        self._cache = cache
        self._namespaces = namespaces
        self._digests = AdapterDigests()
        self._names = names
        self._files = Workers(_TAKEN_IN_AT_ONCE, "adapter-files")
        self._turns = asyncio.Semaphore(_TAKEN_IN_AT_ONCE)
        self._others = Workers(2, "adapter-names")  # never behind somebody's gigabytes
        self._descriptors = Workers(1, "namespaces")
        self._post = post
        self.engines: Counter[bytes] = Counter()
        names.changed = self._renamed
        cache.retain(bytes.fromhex(record.digest) for record in names.known().values())
        for digest in {record.digest for record in names.known().values() if record.priority != "normal"}:
            self._prioritize(digest)

    async def digest(self, path: str) -> list[Any]:
        """[hex digest, identity of the files] of a PEFT folder."""
        digest, identity = await self._files.result(lambda: self._digests.digest(path))
        return [digest, list(identity)]

    def change(self, request: AdapterChange) -> Coroutine[Any, Any, list[Any]]:
        """What answers a request that changes a name."""
        match request:
            case protocol.AdapterAdd():
                return self.add(request.path, request.name, request.priority)
            case protocol.AdapterPrioritize():
                return self.prioritize(request.name, request.priority)
            case protocol.AdapterRemove():
                return self.remove(request.name)
        assert_never(request)

    async def add(self, path: str, name: str, priority: str = "") -> list[Any]:
        """Take a folder in; answers [hex digest] when it can be loaded from the cache. priority: of the name, "" for
        the one that it has."""
        if name:
            check_name(name)
        async with self._turns:
            folder = await self._files.result(lambda: PeftFolder(path))
            with folder:
                return [await self._take_in(folder, path, name, priority)]

    async def prioritize(self, name: str, priority: str) -> list[Any]:
        """Give a name another priority: [hex digest], or [] for no such name."""
        record = await self._others.result(lambda: self._names.prioritize(name, priority))
        return [record.digest] if record is not None else []

    async def find(self, name: str) -> list[Any]:
        """[hex digest] that a name points to, or []."""
        if self._names.waits:
            record = await self._others.result(lambda: self._names.find(name))
        else:
            record = self._names.find(name)
        return [record.digest] if record is not None else []

    async def show(self, name: str) -> list[Any]:
        """What there is to say of an adapter, by name or digest."""
        record = await self._others.result(lambda: self._names.find(name))
        try:
            key = bytes.fromhex(record.digest if record is not None else name)
        except ValueError:
            return []
        found = await done(self._describe(key, record))
        if len(key) != len(LORA_NAMESPACE) or (record is None and not found["size"] and not found["kv"]):
            return []
        found["tiers"] += await self._in_redis(key)
        return [found]

    async def page(self, after: str, count: int) -> list[Any]:
        """The next named adapters behind `after`: `count`, or as many as one answer holds."""
        names = await self._others.result(lambda: self._page(after, min(count, _PAGE)))
        return await done(self._describe_all(names))

    async def keep_namespaces(self) -> None:
        """Write the descriptors that are registered and not written yet."""
        await self._descriptors.result(self._namespaces.keep)

    async def remove(self, name: str) -> list[Any]:
        """Forget a name, and evict what no other name points to: [objects, bytes, skipped], or [] for no such name.
        Out of Redis goes what the index knows, which is waited for a while."""
        record = await self._others.result(lambda: self._forget(name))
        if record is None:
            return []
        did = Evicted()
        if not self._named(record.digest):
            for _ in self._cache.evict([bytes.fromhex(record.digest)], (Tier.CPU, Tier.DISK, Tier.REDIS), did):
                await turn()
            if (redis := self._cache.redis) is not None:
                await asyncio.wait({all_written(redis.io)}, timeout=_DELETED_S)
        return [did.objects, did.nbytes, did.skipped]

    async def named(self) -> frozenset[bytes]:
        """Keys of the adapters that have a name, given on any machine."""
        await self._others.result(self._names.refresh)
        return frozenset(map(bytes.fromhex, await self.names()))

    async def names(self) -> dict[str, list[str]]:
        """What is known here of names, by hex digest."""
        found: dict[str, list[str]] = {}
        for count, record in enumerate(self._names.known().values(), start=1):
            found.setdefault(record.digest, []).append(record.name)
            if not count % _SLICE:
                await turn()
        return found

    def close(self) -> None:
        """The last call."""
        self._files.end()
        self._others.end()
        self._descriptors.end()
        self._names.close()

    # -- on other threads ----------

    def _page(self, after: str, count: int) -> list[NameRecord]:
        if not after:
            self._names.refresh()
        names = sorted(item for item in self._names.known().items() if item[0] > after)[:count]
        sizes = itertools.accumulate(len(record.config.encode()) + _BESIDES for _, record in names)
        fit = 1 + sum(size < _PAGE_BYTES for size in sizes)
        return [record for _, record in names[:fit]]

    def _forget(self, name: str) -> NameRecord | None:
        record = self._names.remove(name)
        if record is not None:
            self._names.refresh()  # another machine may have given it a name
        return record

    def _renamed(self, before: NameRecord | None, after: NameRecord) -> None:
        """A name points elsewhere: what has a name is kept, what has none any more is not."""

        def settle() -> None:
            if before is not None and before.digest and not self._named(before.digest):
                self._cache.stop_retaining(bytes.fromhex(before.digest))
            if after.digest:
                self._cache.retain([bytes.fromhex(after.digest)])
            for digest in {after.digest, before.digest if before is not None else ""} - {""}:
                self._prioritize(digest)

        self._post(settle)

    def _prioritize(self, digest: str) -> None:
        """What is of an adapter has the highest priority that a name of it has."""
        found = {record.priority for record in self._names.known().values() if record.digest == digest}
        highest = next((each for each in reversed(PRIORITIES) if each in found), "normal")
        self._cache.keeps.name(bytes.fromhex(digest), highest)

    def _named(self, digest: str) -> bool:
        return any(record.digest == digest for record in self._names.known().values())

    # -- on the loop ----------

    async def _take_in(self, folder: PeftFolder, path: str, name: str, priority: str) -> str:
        packing = await self._files.result(lambda: Packing(folder))
        digest, _ = await self._files.result(lambda: self._digests.digest(path))
        await self._store(bytes.fromhex(digest), packing, path)
        if name:
            await self._keep(bytes.fromhex(digest), path)
            await self._files.result(lambda: self._names.put(name, digest, folder.config_text, priority))
            # Its last other name may have been removed meanwhile, and it with that. From now on it stays.
            await self._store(bytes.fromhex(digest), packing, path)
            await self._keep(bytes.fromhex(digest), path)
        return digest

    async def _keep(self, key: bytes, path: str) -> None:
        """Once the tiers below have the content, or gave it up: its name is not to outlive it by a crash. Raises
        Rejected where names are synced, and the disk has not taken what this one would stand for.
        """
        cache = self._cache
        node = cache.index.get(key)
        if cache.disk is not None and node is not None:
            cache.disk.queue_write(node)  # again, where it was not taken before
        cache.pump()
        flushed: asyncio.Future[None] = answer(lambda done: cache.when_flushed(lambda: done(None)))
        await flushed
        node = cache.index.get(key)
        if self._names.sync and cache.disk is not None and (node is None or not node.held_in(Tier.DISK)):
            raise Rejected(
                f"{path} is in memory, but the disk does not take it, and a name for it would outlive it (disk_sync); "
                "see failures and write.disk.dropped in loracache status, and add it again"
            )

    async def _store(self, key: bytes, packing: Packing, path: str) -> None:
        lease = os.urandom(16)
        place = await self._reserve(key, packing, path, lease)
        if place is None:
            return
        try:
            buffers = self._cache.arena.buffers(place.extents, packing.size)
            total = await self._files.result(lambda: _written(key, packing, buffers, path))
            cause = (await done(self._cache.commit(_OWNER, lease, [(key, total)])))[0]
        except BaseException:
            self._cache.leases.release(_OWNER, lease)
            raise
        if cause not in (Cause.NONE, Cause.EXISTS):
            raise Rejected(f"{path} is not taken into the cache ({cause}); try again")

    async def _reserve(self, key: bytes, packing: Packing, path: str, lease: bytes) -> Writing | None:
        """Room for it, or None where it is there already."""
        deadline = time.monotonic() + _LEASE_S
        info = ObjectInfo(key, b"", Kind.LORA, LORA_NAMESPACE, packing.size, 0)
        while True:
            place = (await done(self._cache.reserve(_OWNER, lease, [info], _LEASE_S)))[0]
            if isinstance(place, Writing):
                return place
            if place is Cause.EXISTS:
                return None
            # BUSY: the same adapter is being taken in already.
            if place is not Cause.BUSY or time.monotonic() > deadline:
                raise Rejected(
                    f"{path} is not taken into the cache ({place}): it has {packing.size} bytes; make the daemon's "
                    f"memory larger, or remove adapters or pins"
                )
            await asyncio.sleep(_TRY_AGAIN_S)

    async def _in_redis(self, key: bytes) -> list[str]:
        redis = self._cache.redis
        if redis is None or not redis.io.available:
            return []
        asked: asyncio.Future[list[Result]] = answer(lambda done: redis.io.contains([key], done))
        await asyncio.wait({asked}, timeout=_REDIS_S)
        return [Tier.REDIS.label] if asked.done() and asked.result()[0].outcome is Outcome.OK else []

    def _describe_all(self, records: list[NameRecord]) -> Generator[None, None, list[dict[str, Any]]]:
        found = []
        for record in records:
            found.append((yield from self._describe(bytes.fromhex(record.digest), record)))
        return found

    def _describe(self, key: bytes, record: NameRecord | None) -> Generator[None, None, dict[str, Any]]:
        index = self._cache.index
        total, _ = yield from sum_of(index, list(self._namespaces.of_adapter(key.hex())))
        yield
        node = index.get(key)
        if node is not None and node.kind is not Kind.LORA:
            node = None
        tiers = [Tier.GPU.label] if self.engines[key] else []
        if node is not None:
            tiers += [tier.label for tier in (Tier.CPU, Tier.DISK) if node.held_in(tier)]
        kv = {tier.label: [total.objects[tier], total.bytes[tier]] for tier in (Tier.CPU, Tier.DISK)}
        return {
            "name": record.name if record is not None else "",
            "digest": key.hex(),
            "added": record.added if record is not None else 0.0,
            "config": record.config if record is not None else "",
            "priority": record.priority if record is not None else "normal",
            "size": node.size if node is not None else 0,
            "tiers": tiers,
            "engines": self.engines[key],
            "kv": {label: count for label, count in kv.items() if count[0]},
        }


def _written(key: bytes, packing: Packing, buffers: list[memoryview], path: str) -> int:
    """The checksum of what was written."""
    if packing.write(buffers) != key.hex():
        raise UsageError(f"{path} changed while it was read; try again")
    return checksum(buffers)
