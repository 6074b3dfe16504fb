# SPDX-License-Identifier: Apache-2.0
"""The worker's thread that loads. It has a connection and a copier of its own; storer.py has the one that stores.

The engine's loop hands jobs over and collects what is done; it never waits for a daemon. A load comes in parts that are
small against the daemon's arena: held there, copied, let go, so that it may be larger than the arena, and share that
with others. Where a load ends early, what was copied under a lease that held counts, and the scheduler has the rest
recomputed. What was decided to have failed is never copied afterwards.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loracache.backoff import Backoff
from loracache.client import requests
from loracache.client.connection import Reply
from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.common.messages import Load
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.errors import LoRACacheError, Rejected, Unavailable
from loracache.kernels.page_copy import Move, PageCopier
from loracache.keys import checksum, object_key
from loracache.results import Cause

__all__ = ["Loader"]

_log = logging.getLogger(__name__)
_LEASE_MARGIN_S = 5.0
_CONFIRM_S = 1.0  # for the daemon's word that a lease held until now
_END_S = 2.0  # vLLM kills an engine that takes more than five seconds to end

_PARTS = 2  # of one load at a time: one is read while the other is copied
_PART_SHARE = 16  # of the arena is a part at most,
_SHARE = 4  # and this all parts of a worker, but for one that is larger
_PART_CHUNKS = 4096
_NO_ROOM_S = 1.0  # for which a load waits for room in the arena without getting any
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05


@dataclass(slots=True)
class _Part:
    """Chunks of a load that are held in the arena together. copied: those whose bytes are in their blocks."""

    lease: bytes
    nbytes: int
    positions: list[int]
    acquire: int = 0
    release: int = 0
    copied: list[int] = field(default_factory=list)
    bad: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Loading:
    """A load under way. todo: positions of chunks to be asked for, a heap. missing: those that did not arrive, or whose
    part is held still. gap: one of them never will, so that those behind it are of no use. deadline: for the next
    byte. most: chunks of a part. again: when to ask for room once more, after the last of `pauses`. cause: why it ends
    early.
    """

    load: Load
    after: Any  # a CUDA event: nothing writes to the blocks any more once it has happened
    deadline: float
    todo: list[int]
    missing: set[int]
    most: int
    parts: list[_Part] = field(default_factory=list)
    causes: dict[str, int] = field(default_factory=dict)
    gap: bool = False
    again: float = 0.0
    pauses: Backoff = field(default_factory=lambda: Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S))
    no_room_since: float | None = None
    cause: str = ""

    def count(self, cause: str, amount: int = 1) -> None:
        """Count failures."""
        if amount:
            self.causes[cause] = self.causes.get(cause, 0) + amount


class Loader:
    """Copies chunks from the arena into blocks.

    timeout: seconds without a byte after which a load is given up. finished(load, failed blocks, causes) is called on
    this thread once per load. may_load(load) says whether the adapter the load belongs to is still the one it was
    planned for; asked before the first byte and after the last.
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

    # -- the thread ----------

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
        connection = self._link.connection
        due = [self._due(job) for job in self._active]
        if connection.connected:
            poller.register(connection.fileno(), select.POLLIN | (select.POLLOUT if connection.unsent else 0))
        elif any(job.parts for job in self._active):
            due.append(0.0)  # the daemon hung up meanwhile: hear it out, and end what it will not answer
        timeout = min(due, default=None)
        poller.poll(None if timeout is None else max(0.0, timeout - time.monotonic()) * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _due(self, job: _Loading) -> float:
        """When to look at a job again, whatever the daemon says."""
        now = time.monotonic()
        waits = job.again if job.again > now else now + _LONGEST_PAUSE_S  # for others of ours to make room
        return min(job.deadline if job.parts else math.inf, waits if job.todo and len(job.parts) < _PARTS else math.inf)

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
        for work in (self._advance, self._ask):
            for job in list(self._active):
                try:
                    work(job)
                except (LoRACacheError, ValueError) as error:
                    _log.debug("load of %s: %s", job.load.request_id, error)
                    self._end(job, Cause.REJECTED if isinstance(error, Rejected) else Cause.UNAVAILABLE)

    def _begin(self, load: Load, after: Any) -> None:
        positions = list(range(len(load.chunks)))
        job = _Loading(load, after, time.monotonic() + self._timeout, positions, set(positions), _PART_CHUNKS)
        self._active.append(job)
        if not self._may_load(load):
            self._end(job, Cause.ADAPTER_CHANGED)
        elif not self._link.ready():
            self._end(job, Cause.UNAVAILABLE)

    # -- parts ----------

    def _advance(self, job: _Loading) -> None:
        """Take what has arrived; end what is late."""
        for part in list(job.parts):
            self._receive(job, part)
        now = time.monotonic()
        if job.parts and job.deadline <= now:
            self._let_go(job)
        elif job.no_room_since is not None and now - job.no_room_since > min(_NO_ROOM_S, self._timeout):
            job.count(Cause.MEMORY_FULL, len(job.todo))
            job.todo.clear()
        if job.gap:
            job.todo.clear()

    def _ask(self, job: _Loading) -> None:
        """Ask for the next parts, as far as they fit beside all that are under way; where none is left, end."""
        size = job.load.chunk_blocks * self._block_bytes
        now = time.monotonic()
        while job.todo and len(job.parts) < _PARTS and now >= job.again:
            arena = self._link.connection.map
            if arena is None:
                raise Unavailable("no daemon")
            count = min(job.most, max(1, len(arena) // _PART_SHARE // size), len(job.todo))
            held = sum(part.nbytes for other in self._active for part in other.parts)
            if held and held + count * size > len(arena) // _SHARE:
                return
            part = _Part(os.urandom(16), count * size, positions=[heapq.heappop(job.todo) for _ in range(count)])
            keys = [object_key(job.load.chunks[position].key, self._shard) for position in part.positions]
            if not job.parts:
                job.deadline = now + self._timeout
            job.parts.append(part)
            acquire = requests.Acquire(part.lease, requests.join_keys(keys), self._timeout + _LEASE_MARGIN_S)
            part.acquire = self._link.connection.send(acquire)
        if not job.parts and not job.todo:
            self._end(job, job.cause)

    def _receive(self, job: _Loading, part: _Part) -> None:
        connection = self._link.connection
        while not part.release:
            reply = connection.take(part.acquire)
            if reply is None:
                return
            self._copy(job, part, reply)
            if reply.last:
                part.release = connection.send(requests.Release(part.lease, requests.join_keys(part.bad)))
                connection.poll()
        reply = connection.take(part.release)
        if reply is None:
            return
        job.parts.remove(part)
        if reply.payload[0]:  # held until now: nothing can have reused the extents while they were copied
            job.missing.difference_update(part.copied)
        else:
            job.count(Cause.LEASE_LOST)
            job.gap = True

    def _copy(self, job: _Loading, part: _Part, reply: Reply) -> None:
        for place, *rest in reply.payload:
            position = part.positions[place]
            if len(rest) == 1 and rest[0] == Cause.MEMORY_FULL:
                self._no_room(job, part, position)
                continue
            cause = rest[0] if len(rest) == 1 else self._scatter(job, part, position, *rest)
            if cause:
                job.count(cause)
                job.gap = True
                continue
            part.copied.append(position)
            job.deadline = time.monotonic() + self._timeout
            job.pauses.reset()
            job.no_room_since = None

    def _scatter(
        self, job: _Loading, part: _Part, position: int, size: int, expected: int, extents: list[int]
    ) -> Cause:
        chunk = job.load.chunks[position]
        if size != job.load.chunk_blocks * self._block_bytes:
            return Cause.SIZE
        payload = self._link.connection.buffers(extents, size)
        if checksum(payload) != expected:
            part.bad.append(object_key(chunk.key, self._shard))
            return Cause.CHECKSUM
        self._copier.scatter([Move(chunk.blocks, payload, chunk.first, job.load.chunk_blocks)], job.after).wait()
        return Cause.NONE

    def _no_room(self, job: _Loading, part: _Part, position: int) -> None:
        """The arena is full of what others hold: ask again, for less at a time."""
        heapq.heappush(job.todo, position)
        now = time.monotonic()
        if job.again > now:  # others of the same answer
            return
        job.no_room_since = job.no_room_since or now
        job.most = max(1, len(part.positions) // 2)
        job.again = now + job.pauses.next()

    # -- the end ----------

    def _let_go(self, job: _Loading) -> None:
        """The next byte is late: ask for no more. What was copied counts where its lease held until now, which the
        daemon may say still."""
        late, job.cause = bool(job.cause), Cause.DEADLINE
        job.todo.clear()
        for part in list(job.parts):
            if late or not part.copied:
                self._forget(job, part)
            elif not part.release:
                self._link.connection.forget(part.acquire)
                bad = requests.join_keys(part.bad)
                part.release = self._link.connection.send(requests.Release(part.lease, bad))
        job.deadline = time.monotonic() + _CONFIRM_S

    def _forget(self, job: _Loading, part: _Part) -> None:
        connection = self._link.connection
        job.parts.remove(part)
        connection.forget(part.release or part.acquire)
        connection.send(requests.Release(part.lease, b""), answer=False)

    def _end(self, job: _Loading, cause: str) -> None:
        """Report the load: what did not arrive has failed, and all of it where it is not what was asked for."""
        self._active.remove(job)
        for part in list(job.parts):
            self._forget(job, part)
        if not self._may_load(job.load):
            cause = Cause.ADAPTER_CHANGED
        if cause:
            job.count(cause)
        if cause in (Cause.ADAPTER_CHANGED, Cause.BUG, Cause.SHUTDOWN):
            job.missing = set(range(len(job.load.chunks)))
        failed = [block for position in sorted(job.missing) for block in job.load.chunks[position].blocks]
        self._finished(job.load, failed, job.causes)

    def _fail_all(self, cause: str) -> None:
        while not self._jobs.empty():
            submitted = self._jobs.get()
            if submitted is not None:
                self._active.append(_Loading(*submitted, 0.0, [], set(), 1))
        for job in list(self._active):
            self._end(job, cause)
