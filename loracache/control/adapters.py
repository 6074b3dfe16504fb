"""The daemon's adapters: takes PEFT folders into the cache, keeps their names, says where they are.

Threading: everything public is called on the event loop and answers through a callback there, sooner or later. Files
and names are read and written on threads of its own, which ask the loop for what only it may touch.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from loracache.adapters.names import AdapterNames, NameRecord, check_name
from loracache.adapters.payload import AdapterDigests, Packing
from loracache.adapters.peft import PeftFolder
from loracache.cache.eviction import Evicted
from loracache.cache.state.leases import Writing
from loracache.cache.tier.workers import Workers
from loracache.errors import LoRACacheError, Rejected, UsageError
from loracache.keys import LORA_NAMESPACE, checksum
from loracache.results import Cause
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Result
from loracache.tiers import Tier

if TYPE_CHECKING:
    from loracache.cache.tier.io import Post
    from loracache.cache.tiered import TieredCache
    from loracache.namespaces import Namespaces

__all__ = ["Adapters", "Answer"]

_log = logging.getLogger(__name__)
_OWNER = 0  # of our own write leases; connections count from 1
_LEASE_S = 600.0
_LOOP_S = 30.0
_TRY_AGAIN_S = 0.02
_PAGE_BYTES = 6 << 20  # of an answer, which is one frame; behind it one more record, with its configuration of a MiB
_BESIDES = 700  # bytes of a record, at most, but for its configuration
_T = TypeVar("_T")

Answer = Callable[["list[Any] | Exception"], None]
"""Takes the payload of an answer, or why there is none."""


class Adapters:
    """Adapters of one daemon. `engines` counts, by key, the engines that hold an adapter in their own memory."""

    def __init__(self, cache: TieredCache, namespaces: Namespaces, names: AdapterNames, post: Post) -> None:
        self._cache = cache
        self._namespaces = namespaces
        self._digests = AdapterDigests()
        self._names = names
        self._files = Workers(2, "adapter-files")
        self._others = Workers(2, "adapter-names")  # never behind somebody's gigabytes
        self._post = post
        self.engines: Counter[bytes] = Counter()
        names.changed = self._renamed
        cache.keep(bytes.fromhex(record.digest) for record in names.known().values())

    # -- on the loop ----------

    def digest(self, path: str, answer: Answer) -> None:
        """[hex digest, identity of the files] of a PEFT folder."""

        def work() -> list[Any]:
            digest, identity = self._digests.digest(path)
            return [digest, list(identity)]

        self._run(self._files, work, answer)

    def add(self, path: str, name: str, answer: Answer) -> None:
        """Take a folder in; answers [hex digest] when it can be loaded from the cache."""
        if name:
            check_name(name)
        self._run(self._files, lambda: [self._take_in(path, name)], answer)

    def find(self, name: str, answer: Answer) -> None:
        """[hex digest] that a name points to, or []."""

        def work() -> list[Any]:
            record = self._names.find(name)
            return [record.digest] if record is not None else []

        if self._names.waits:
            self._run(self._others, work, answer)
        else:
            answer(work())

    def show(self, name: str, answer: Answer) -> None:
        """What there is to say of an adapter, by name or digest."""

        def work() -> list[Any]:
            record = self._names.find(name)
            try:
                key = bytes.fromhex(record.digest if record is not None else name)
            except ValueError:
                return []
            found = self._on_loop(lambda: self._describe(key, record))
            if len(key) != len(LORA_NAMESPACE) or (record is None and not found["size"] and not found["kv"]):
                return []
            found["tiers"] += self._in_redis(key)
            return [found]

        self._run(self._others, work, answer)

    def page(self, after: str, count: int, answer: Answer) -> None:
        """The next named adapters behind `after`: `count`, or as many as one answer holds."""

        def work() -> list[Any]:
            if not after:
                self._names.refresh()
            names = sorted(item for item in self._names.known().items() if item[0] > after)[:count]
            sizes = itertools.accumulate(len(record.config.encode()) + _BESIDES for _, record in names)
            fit = 1 + sum(size < _PAGE_BYTES for size in sizes)
            records = [(bytes.fromhex(record.digest), record) for _, record in names[:fit]]
            return self._on_loop(lambda: [self._describe(key, record) for key, record in records])

        self._run(self._others, work, answer)

    def remove(self, name: str, answer: Answer) -> None:
        """Forget a name, and evict what no other name points to."""

        def work() -> list[Any] | None:
            record = self._names.remove(name)
            if record is None:
                return []
            self._names.refresh()  # another machine may have given it a name
            if self._named(record.digest):
                return [0, 0, 0]
            tiers = (Tier.CPU, Tier.DISK, Tier.REDIS)
            key = bytes.fromhex(record.digest)

            def evicted(did: Evicted) -> None:
                answer(Rejected(did.error) if did.error else [did.objects, did.nbytes, did.skipped])

            self._post(lambda: self._cache.evict([key], tiers, evicted))
            return None

        self._run(self._others, work, answer)

    def names(self) -> dict[str, list[str]]:
        """What is known here of names, by hex digest."""
        found: dict[str, list[str]] = {}
        for record in self._names.known().values():
            found.setdefault(record.digest, []).append(record.name)
        return found

    def close(self) -> None:
        """The last call."""
        self._files.end()
        self._others.end()
        self._names.close()

    # -- on another thread ----------

    def _renamed(self, before: NameRecord | None, after: NameRecord) -> None:
        """A name points elsewhere: what has a name is kept, what has none any more is not."""

        def settle() -> None:
            if before is not None and before.digest and not self._named(before.digest):
                self._cache.unkeep(bytes.fromhex(before.digest))
            if after.digest:
                self._cache.keep([bytes.fromhex(after.digest)])

        self._post(settle)

    def _named(self, digest: str) -> bool:
        return any(record.digest == digest for record in self._names.known().values())

    def _run(self, workers: Workers, work: Callable[[], list[Any] | None], answer: Answer) -> None:
        def run() -> None:
            result: list[Any] | Exception | None
            try:
                result = work()
            except LoRACacheError as error:
                result = error
            except Exception as error:  # noqa: BLE001 - top of a thread: an answer that never comes hangs a client
                _log.exception("an adapter operation failed")
                result = Rejected(repr(error))
            if result is not None:
                self._post(lambda: answer(result))

        workers.submit(run)

    def _on_loop(self, work: Callable[[], _T]) -> _T:
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                future.set_exception(error)

        self._post(run)
        return future.result(_LOOP_S)

    def _take_in(self, path: str, name: str) -> str:
        with PeftFolder(path) as folder:
            packing = Packing(folder)
            digest, _ = self._digests.digest(path)
            self._store(bytes.fromhex(digest), packing, path)
            if name:
                self._names.put(name, digest, folder.config_text)
                # Its last other name may have been removed meanwhile, and it with that. From now on it stays.
                self._store(bytes.fromhex(digest), packing, path)
        return digest

    def _store(self, key: bytes, packing: Packing, path: str) -> None:
        deadline = time.monotonic() + _LEASE_S
        info = ObjectInfo(key, b"", Kind.LORA, LORA_NAMESPACE, packing.size, 0)
        lease = os.urandom(16)
        while True:
            place = self._on_loop(lambda: self._cache.reserve(_OWNER, lease, [info], _LEASE_S)[0])
            if place is Cause.EXISTS:
                return
            if isinstance(place, Writing):
                break
            # BUSY: the same adapter is being taken in already.
            if place is not Cause.BUSY or time.monotonic() > deadline:
                raise Rejected(
                    f"{path} is not taken into the cache ({place}): it has {packing.size} bytes; make the daemon's "
                    f"memory larger, or remove adapters or pins"
                )
            time.sleep(_TRY_AGAIN_S)
        try:
            buffers = self._cache.arena.buffers(place.extents, packing.size)
            if packing.write(buffers) != key.hex():
                raise UsageError(f"{path} changed while it was read; try again")
            total = checksum(buffers)
            cause = self._on_loop(lambda: self._cache.commit(_OWNER, lease, [(key, total)]))[0]
        except BaseException:
            self._on_loop(lambda: self._cache.leases.release(_OWNER, lease))
            raise
        if cause not in (Cause.NONE, Cause.EXISTS):
            raise Rejected(f"{path} is not taken into the cache ({cause}); try again")

    def _in_redis(self, key: bytes) -> list[str]:
        redis = self._cache.redis
        if redis is None or not redis.io.available:
            return []
        done = threading.Event()
        found: list[Result] = []

        def answered(results: list[Result]) -> None:
            found.extend(results)
            done.set()

        self._post(lambda: redis.io.contains([key], answered))
        done.wait(_LOOP_S)
        return [Tier.REDIS.label] if found and found[0].outcome is Outcome.OK else []

    # -- on the loop ----------

    def _describe(self, key: bytes, record: NameRecord | None) -> dict[str, Any]:
        index = self._cache.index
        node = index.get(key)
        if node is not None and node.kind is not Kind.LORA:
            node = None
        tiers = [Tier.GPU.label] if self.engines[key] else []
        if node is not None:
            tiers += [tier.label for tier in (Tier.CPU, Tier.DISK) if node.held_in(tier)]
        digest = key.hex()
        held = [index.spaces[space] for space in self._namespaces.of_adapter(digest) if space in index.spaces]
        kv = {
            tier.label: [sum(space.objects[tier] for space in held), sum(space.bytes[tier] for space in held)]
            for tier in (Tier.CPU, Tier.DISK)
        }
        return {
            "name": record.name if record is not None else "",
            "digest": digest,
            "added": record.added if record is not None else 0.0,
            "config": record.config if record is not None else "",
            "size": node.size if node is not None else 0,
            "tiers": tiers,
            "engines": self.engines[key],
            "kv": {label: count for label, count in kv.items() if count[0]},
        }
