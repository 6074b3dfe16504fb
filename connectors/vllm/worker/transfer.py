# SPDX-License-Identifier: Apache-2.0
"""The worker's two transfer threads: one loads, one stores. Each has a connection and a copier of its own.

The engine's loop hands jobs over and collects what is done; it never waits for a daemon. A load that is late, or
whose lease or bytes prove wrong, fails: the scheduler then recomputes. What was decided to have failed is never
copied afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loracache.client import requests
from loracache.client.connection import Reply
from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.common.messages import Load, Store
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.connectors.vllm.worker.gate import Gate
from loracache.errors import LoRACacheError, Rejected, Unavailable
from loracache.kernels.page_copy import PageCopier
from loracache.keys import checksum, object_key
from loracache.results import Cause

__all__ = ["Loader", "StoreJob", "Storer"]

_log = logging.getLogger(__name__)
_CALL_TIMEOUT_S = 5.0
_LEASE_MARGIN_S = 5.0
_WRITE_LEASE_S = 60.0
_END_S = 2.0  # vLLM kills an engine that takes more than five seconds to end


@dataclass(slots=True)
class _Loading:
    """A load under way. Positions whose chunk did not arrive whole stay in `missing`."""

    load: Load
    after: Any  # a CUDA event: nothing writes to the blocks any more once it has happened
    deadline: float
    lease: bytes
    missing: set[int]
    bad: list[bytes] = field(default_factory=list)
    causes: dict[str, int] = field(default_factory=dict)
    acquire: int = 0
    release: int = 0


class Loader:
    """Copies chunks from the arena into blocks.

    finished(load, failed blocks, causes) is called on this thread once per load. may_load(load) says whether the
    adapter the load belongs to is still the one it was planned for; asked before the first byte and after the last.
    """

    def __init__(
        self,
        server: str,
        ensure: Callable[[], None],
        copier: PageCopier,
        shard: str,
        block_bytes: int,
        timeout: float,
        may_load: Callable[[Load], bool],
        finished: Callable[[Load, list[int], dict[str, int]], None],
    ) -> None:
        self._link = WorkerLink(server, "vllm-load", ensure, copier.device_type)
        self._copier = copier
        self._shard = shard
        self._block_bytes = block_bytes
        self._timeout = timeout
        self._may_load = may_load
        self._finished = finished
        self._jobs: queue.SimpleQueue[tuple[Load, Any] | None] = queue.SimpleQueue()
        self._active: list[_Loading] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = True
        self._thread = threading.Thread(target=self._run, name="loracache-load", daemon=True)
        self._link.ready()
        self._thread.start()

    def submit(self, load: Load, after: Any = None) -> None:
        """Start a load; returns at once. Its blocks are written once the CUDA event `after` has happened: what their
        last holder computed may be on its way to them still.
        """
        self._jobs.put((load, after))
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread; loads under way are given up."""
        self._jobs.put(None)
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout=_END_S)

    def _run(self) -> None:
        leave_pinned_core()
        while self._open:
            try:
                self._wait()
                self._step()
            except Exception:  # noqa: BLE001 - top of the thread: no load may wait for ever because of a bug
                _log.exception("loading failed; the loads under way are recomputed")
                self._link.connection.close()
                self._fail_all(Cause.BUG)
        self._fail_all(Cause.SHUTDOWN)
        self._link.connection.close()

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._link.connection.connected:
            poller.register(self._link.connection.fileno(), select.POLLIN)
        timeout = min((job.deadline for job in self._active), default=None)
        poller.poll(None if timeout is None else max(0.0, timeout - time.monotonic()) * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _step(self) -> None:
        while not self._jobs.empty():
            submitted = self._jobs.get()
            if submitted is None:
                self._open = False
                return
            self._begin(*submitted)
        try:
            self._link.connection.poll()
        except LoRACacheError as error:
            self._link.outage.goes_on(error)
        for job in list(self._active):
            try:
                self._advance(job)
            except (LoRACacheError, ValueError) as error:
                _log.debug("load of %s: %s", job.load.request_id, error)
                self._forget(job)
                self._end(job, Cause.REJECTED if isinstance(error, Rejected) else Cause.UNAVAILABLE)
        now = time.monotonic()
        for job in [job for job in self._active if job.deadline <= now]:
            self._forget(job)
            self._end(job, Cause.DEADLINE)

    def _begin(self, load: Load, after: Any) -> None:
        job = _Loading(load, after, time.monotonic() + self._timeout, os.urandom(16), set(range(len(load.chunks))))
        self._active.append(job)
        if not self._may_load(load):
            self._end(job, Cause.ADAPTER_CHANGED)
        elif not self._link.ready():
            self._end(job, Cause.UNAVAILABLE)
        else:
            keys = requests.join_keys([object_key(chunk.key, self._shard) for chunk in load.chunks])
            ttl = self._timeout + _LEASE_MARGIN_S
            try:
                job.acquire = self._link.connection.send(requests.Acquire(job.lease, keys, ttl))
            except Unavailable:
                self._end(job, Cause.UNAVAILABLE)

    def _advance(self, job: _Loading) -> None:
        connection = self._link.connection
        while not job.release:
            reply = connection.take(job.acquire)
            if reply is None:
                return
            self._copy(job, reply)
            if reply.last:
                bad = requests.join_keys(job.bad)
                job.release = connection.send(requests.Release(job.lease, bad))
                connection.poll()
        reply = connection.take(job.release)
        if reply is not None:
            # Held until now: nothing can have reused the extents while they were copied.
            self._end(job, Cause.NONE if reply.payload[0] else Cause.LEASE_LOST)

    def _copy(self, job: _Loading, reply: Reply) -> None:
        for position, *rest in reply.payload:
            chunk = job.load.chunks[position]
            if len(rest) == 1:
                job.causes[rest[0]] = job.causes.get(rest[0], 0) + 1
                continue
            size, expected, extents = rest
            if size != job.load.chunk_blocks * self._block_bytes:
                job.causes[Cause.SIZE] = job.causes.get(Cause.SIZE, 0) + 1
                continue
            payload = self._link.connection.buffers(extents, size)
            if checksum(payload) != expected:
                job.bad.append(object_key(chunk.key, self._shard))
                job.causes[Cause.CHECKSUM] = job.causes.get(Cause.CHECKSUM, 0) + 1
                continue
            self._copier.scatter(chunk.blocks, payload, first=chunk.first, of=job.load.chunk_blocks, after=job.after)
            job.missing.discard(position)

    def _forget(self, job: _Loading) -> None:
        connection = self._link.connection
        connection.forget(job.release or job.acquire)
        connection.send(requests.Release(job.lease, b""), answer=False)

    def _end(self, job: _Loading, cause: str) -> None:
        """Report the load. Without a cause, only what did not arrive has failed."""
        self._active.remove(job)
        if not cause and not self._may_load(job.load):
            cause = Cause.ADAPTER_CHANGED
        if cause:
            job.missing = set(range(len(job.load.chunks)))
            job.causes[cause] = job.causes.get(cause, 0) + 1
        failed = [block for position in sorted(job.missing) for block in job.load.chunks[position].blocks]
        self._finished(job.load, failed, job.causes)

    def _fail_all(self, cause: str) -> None:
        while not self._jobs.empty():
            submitted = self._jobs.get()
            if submitted is not None:
                self._active.append(_Loading(*submitted, 0.0, b"", set()))
        for job in list(self._active):
            self._end(job, cause)


class StoreJob:
    """A store on its way. Shutting its gate gives it up: no byte of its blocks is read any more when that returns."""

    def __init__(self, store: Store, after: Any = None) -> None:
        self.store = store
        self.after = after  # a CUDA event: the blocks are written once it has happened
        self.gate = Gate()


class Storer:
    """Copies computed chunks into the arena. finished(job, causes) is called on this thread once per job;
    may_store(store) says whether the chunks were computed with the adapter they are stored for. names: what the engine
    calls its model.
    """

    def __init__(
        self,
        server: str,
        ensure: Callable[[], None],
        copier: PageCopier,
        shard: str,
        block_bytes: int,
        may_store: Callable[[Store], bool],
        finished: Callable[[StoreJob, dict[str, int]], None],
        names: Sequence[str] = (),
    ) -> None:
        self._link = WorkerLink(server, "vllm-store", ensure, copier.device_type)
        self._copier = copier
        self._shard = shard
        self._block_bytes = block_bytes
        self._may_store = may_store
        self._names = names
        self._finished = finished
        self._jobs: queue.SimpleQueue[StoreJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="loracache-store", daemon=True)
        self._link.ready()
        self._thread.start()

    def submit(self, job: StoreJob) -> None:
        """Start a store; returns at once."""
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what is queued, within a bounded time, and end the thread."""
        self._jobs.put(None)
        self._thread.join(timeout=_END_S)

    def _run(self) -> None:
        leave_pinned_core()
        while (job := self._jobs.get()) is not None:
            causes: dict[str, int] = {}
            try:
                self._store(job, causes)
            except LoRACacheError as error:
                _log.debug("store for %s: %s", job.store.request_id, error)
                causes[Cause.REJECTED if isinstance(error, Rejected) else Cause.UNAVAILABLE] = len(job.store.chunks)
            except Exception:  # noqa: BLE001 - top of the thread: a bug must not keep a request's blocks for ever
                _log.exception("a store failed")
                causes[Cause.BUG] = len(job.store.chunks)
            self._finished(job, causes)
        self._link.connection.close()

    def _store(self, job: StoreJob, causes: dict[str, int]) -> None:
        store = job.store
        if not self._may_store(store):
            causes[Cause.ADAPTER_CHANGED] = len(store.chunks)
            return
        if not self._link.ready():
            raise Unavailable("no daemon")
        connection = self._link.connection
        namespace = store.namespace.digest()
        self._link.register(namespace, store.namespace.descriptor(), self._names)
        keys = [object_key(chunk.key, self._shard) for chunk in store.chunks]
        parents = [object_key(store.parent, self._shard) if store.parent else requests.NO_PARENT, *keys[:-1]]
        lease = os.urandom(16)
        reserve = requests.Reserve(
            lease,
            namespace,
            requests.join_keys(keys),
            requests.join_keys(parents),
            [self._block_bytes * len(chunk.blocks) for chunk in store.chunks],
            _WRITE_LEASE_S,
        )
        try:
            answer = connection.call(reserve, _CALL_TIMEOUT_S).payload
            written = self._write(job, keys, answer, causes)
            if not written:
                if any(isinstance(item, list) for item in answer):
                    connection.abort(lease)
                return
            commit = requests.Commit(
                lease, requests.join_keys([key for key, _ in written]), [total for _, total in written]
            )
            answer = connection.call(commit, _CALL_TIMEOUT_S).payload
        except BaseException:  # of a copier, too: else the extents stay reserved for as long as the lease
            connection.abort(lease)
            raise
        for cause in answer:
            if cause and cause != Cause.EXISTS:
                causes[cause] = causes.get(cause, 0) + 1

    def _write(
        self, job: StoreJob, keys: Sequence[bytes], answer: Sequence[Any], causes: dict[str, int]
    ) -> list[tuple[bytes, int]]:
        written = []
        for key, chunk, item in zip(keys, job.store.chunks, answer, strict=True):
            if not isinstance(item, list):
                if item not in (Cause.EXISTS, Cause.BUSY):
                    causes[item] = causes.get(item, 0) + 1
                continue
            blocks = chunk.blocks
            payload = self._link.connection.buffers(item, self._block_bytes * len(blocks))
            if not job.gate.run(lambda: self._copier.gather(blocks, payload, job.after)):  # noqa: B023
                causes[Cause.CANCELLED] = causes.get(Cause.CANCELLED, 0) + 1
                return []
            written.append((key, checksum(payload)))
        return written
