# SPDX-License-Identifier: Apache-2.0
"""The worker's thread that loads. It has a connection and a copier of its own; storer.py has the one that stores.

The engine's loop hands jobs over and collects what is done; it never waits for a daemon. A load comes in parts that are
small against the daemon's arena: held there, copied, let go, so that it may be larger than the arena, and share that
with others. Where a load ends early, what was copied under a lease that held counts, and the scheduler has the rest
recomputed. What was decided to have failed is never copied afterwards.

On a GPU what the daemon answers at a time is one submission, a flight, and its checksums are computed meanwhile. No
part is let go, and no load reported, before its flights have ended. A chunk that turns out to be wrong then lies in
blocks that nobody reads: vLLM computes with blocks, and shares them, only once their load was reported, and not with
those that failed. On a CPU a chunk is checked before it is copied.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import select
import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from loracache.client import requests
from loracache.client.connection import Reply
from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.common.messages import Load
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.connectors.vllm.worker.by_layer import LayerCopies
from loracache.connectors.vllm.worker.landing import Landing
from loracache.connectors.vllm.worker.loading import LONGEST_PAUSE_S, Chunk, Loading, Part
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.errors import LoRACacheError, Rejected, Unavailable
from loracache.kernels.page_copy import PageCopier
from loracache.results import Cause

__all__ = ["Loader"]

_log = logging.getLogger(__name__)
_LEASE_MARGIN_S = 5.0
_WITHIN_STEP_S = 0.5  # without a byte, after which a load that holds up a step is given up
_END_S = 2.0  # vLLM kills an engine that takes more than five seconds to end

_PARTS = 2  # of one load hold pages at a time: one is read while the other is copied
_PART_SHARE = 16  # of the arena is a part at most,
_SHARE = 4  # and this all parts of a worker, but for one that is larger
_PART_CHUNKS = 4096
_NO_ROOM_S = 1.0  # for which a load waits for room in the arena without getting any


class Loader:
    """Copies chunks from the arena into blocks.

    objects: how those of each of the model's groups are made up. timeout: seconds without a byte after which a load is
    given up. finished(load, failed blocks, causes) is called on this thread once per load. may_load(load) says whether
    the adapter the load belongs to is still the one it was planned for; asked before the first byte and after the last.
    """

    def __init__(
        self,
        server: str,
        ensure: Callable[[], None],
        copier: PageCopier,
        objects: Sequence[GroupObjects],
        timeout: float,
        may_load: Callable[[Load], bool],
        finished: Callable[[Load, list[int], dict[str, int]], None],
    ) -> None:
        self._link = WorkerLink(server, "vllm-load", ensure, copier.device_type)
        self._objects = objects
        self._timeout = timeout
        self._may_load = may_load
        self._finished = finished
        self._jobs: queue.SimpleQueue[tuple[Load, Any, LayerCopies | None] | None] = queue.SimpleQueue()
        self._active: list[Loading] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._landing = Landing(copier, objects, self._look)
        self._open = True
        self._thread = threading.Thread(target=self._run, name="loracache-load", daemon=True)
        self._link.ready()
        self._thread.start()

    def submit(self, load: Load, after: Any = None, layers: LayerCopies | None = None) -> None:
        """Start a load; returns at once. Its blocks are written once the CUDA event `after` has happened: what their
        last holder computed may be on its way to them still. layers: who waits for it layer by layer.
        """
        self._jobs.put((load, after, layers))
        self._look()

    def close(self) -> None:
        """End the thread; loads under way are given up."""
        self._jobs.put(None)
        self._look()
        self._thread.join(timeout=_END_S)
        self._landing.close()

    def alive(self) -> bool:
        """Whether loads that were submitted will be reported."""
        return self._thread.is_alive()

    def _look(self) -> None:
        """Have the thread look at its loads."""
        os.eventfd_write(self._wake, 1)

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
        elif any(part.acquire or part.release for job in self._active for part in job.parts):
            due.append(0.0)  # the daemon hung up meanwhile: hear it out, and end what it will not answer
        timeout = min(due, default=math.inf)
        poller.poll(None if timeout == math.inf else max(0.0, timeout - time.monotonic()) * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _due(self, job: Loading) -> float:
        """When to look at a job again, whatever the daemon says."""
        now = time.monotonic()
        waits = job.again if job.again > now else now + LONGEST_PAUSE_S  # for others of ours to make room
        deadline = job.deadline if job.waits else math.inf
        return min(deadline, waits if job.todo and len(job.holding) < _PARTS else math.inf)

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
        for work in (self._advance, self._ask, self._finish):
            for job in list(self._active):
                try:
                    work(job)
                except (LoRACacheError, ValueError) as error:
                    _log.debug("load of %s: %s", job.load.request_id, error)
                    self._give_up(job, Cause.REJECTED if isinstance(error, Rejected) else Cause.UNAVAILABLE)
                except Exception:  # noqa: BLE001 - top of the thread: a bug that one load meets is not the others'
                    _log.exception("the load of %s failed and is recomputed", job.load.request_id)
                    self._give_up(job, Cause.BUG)

    def _begin(self, load: Load, after: Any, layers: LayerCopies | None) -> None:
        timeout = min(self._timeout, _WITHIN_STEP_S) if layers is not None else self._timeout
        job = Loading(load, after, layers, timeout, [0], [], set(), _PART_CHUNKS)
        self._active.append(job)  # first: whatever goes wrong, it is reported
        job.renew()
        sizes = [objects.chunk_bytes(load.chunk_tokens) for objects in self._objects]
        job.before = list(accumulate((sizes[chunk.group] for chunk in load.chunks), initial=0))
        has = [any(objects.block_bytes) for objects in self._objects]
        job.todo = [at for at, chunk in enumerate(load.chunks) if has[chunk.group]]
        job.missing = set(job.todo)
        if not self._may_load(load):
            self._give_up(job, Cause.ADAPTER_CHANGED)
        elif not self._link.ready():
            self._give_up(job, Cause.UNAVAILABLE)

    # -- parts ----------

    def _advance(self, job: Loading) -> None:
        """Take what has arrived; end what is late."""
        for part in list(job.parts):
            self._landing.land(job, part)
            if part.dropped:
                self._drop(job, part)
            else:
                self._receive(job, part)
        now = time.monotonic()
        if job.waits and job.deadline <= now:
            self._let_go(job)
        elif job.no_room_since is not None and now - job.no_room_since > min(_NO_ROOM_S, job.timeout):
            job.count(Cause.MEMORY_FULL, len(job.todo))
            job.todo.clear()
        if job.gap:
            job.todo.clear()

    def _ask(self, job: Loading) -> None:
        """Ask for the next parts, as far as they fit beside all that hold pages: the daemon takes what one connection
        sends in its order, and has let go of what was released before it looks for room."""
        now = time.monotonic()
        while job.todo and len(job.holding) < _PARTS and now >= job.again:
            arena = self._link.connection.map
            if arena is None:
                raise Unavailable("no daemon")
            positions = job.fitting(len(arena) // _PART_SHARE)
            nbytes = job.before[positions[-1] + 1] - job.before[positions[0]]
            held = sum(part.nbytes for other in self._active for part in other.holding)
            if job.layers is None and held and held + nbytes > len(arena) // _SHARE:
                return
            part = Part(os.urandom(16), nbytes, positions)
            del job.todo[: len(positions)]
            keys = [self._landing.key(job, position) for position in positions]
            if not job.parts:
                job.renew()
            job.parts.append(part)
            acquire = requests.Acquire(part.lease, requests.join_keys(keys), job.timeout + _LEASE_MARGIN_S)
            part.acquire = self._link.connection.send(acquire)

    def _finish(self, job: Loading) -> None:
        if not job.parts and not job.todo:
            self._end(job)

    def _receive(self, job: Loading, part: Part) -> None:
        while part.acquire and (reply := self._link.connection.take(part.acquire)) is not None:
            if reply.last:
                part.acquire = 0
            part.arrived += self._arrived(job, part, reply)
        if part.arrived and not (part.acquire and job.layers is not None):  # a layer is that of all chunks
            chunks, part.arrived = part.arrived, []
            self._landing.copy(job, part, chunks)
        if not (part.acquire or part.flights):
            self._confirm(job, part)

    def _confirm(self, job: Loading, part: Part) -> None:
        """Let a part go. What was copied counts where its lease held until now: nothing can have reused the extents
        meanwhile."""
        connection = self._link.connection
        if not part.release:
            part.release = connection.send(requests.Release(part.lease, requests.join_keys(part.bad)))
            if not job.gap:
                self._ask(job)  # now: it is read while the next is copied
        reply = connection.take(part.release)
        if reply is None:
            return
        job.parts.remove(part)
        if reply.payload[0]:
            job.missing.difference_update(part.copied)
        else:
            job.lost(Cause.LEASE_LOST)

    def _arrived(self, job: Loading, part: Part, reply: Reply) -> list[Chunk]:
        """Chunks that are in the arena now."""
        chunks = []
        for place, *rest in reply.payload:
            position = part.positions[place]
            if len(rest) == 1:
                if rest[0] == Cause.MEMORY_FULL and job.layers is None:
                    self._no_room(job, part, position)
                else:
                    job.lost(rest[0])
                continue
            nbytes, expected, extents = rest
            if nbytes == job.size(position):
                chunks.append(Chunk(position, expected, self._link.connection.buffers(extents, nbytes)))
            else:
                job.lost(Cause.SIZE)
        return chunks

    def _no_room(self, job: Loading, part: Part, position: int) -> None:
        """The arena is full of what others hold: ask again, for less at a time."""
        insort(job.todo, position)
        now = time.monotonic()
        if job.again > now:  # others of the same answer
            return
        job.no_room_since = job.no_room_since or now
        job.most = max(1, len(part.positions) // 2)
        job.again = now + job.pauses.next()

    # -- the end ----------

    def _let_go(self, job: Loading) -> None:
        """The next byte is late: ask for no more. What was copied counts where its lease held until now, which the
        daemon may say still."""
        late, job.cause = bool(job.cause), Cause.DEADLINE
        job.todo.clear()
        job.renew()
        for part in list(job.parts):
            if late or not (part.copied or part.flights):
                self._drop(job, part)
            elif part.acquire:
                self._link.connection.forget(part.acquire)
                part.acquire = 0
                if not part.flights:
                    self._confirm(job, part)

    def _give_up(self, job: Loading, cause: str) -> None:
        """Ask for no more, and end as soon as what was submitted has ended."""
        job.cause = cause
        job.todo.clear()
        for part in list(job.parts):
            self._drop(job, part)
        if not job.parts:
            self._end(job)

    def _drop(self, job: Loading, part: Part) -> None:
        connection = self._link.connection
        connection.forget(part.release or part.acquire)
        part.acquire = part.release = 0
        part.dropped = True
        if not part.flights:
            job.parts.remove(part)
            connection.send(requests.Release(part.lease, requests.join_keys(part.bad)), answer=False)

    def _end(self, job: Loading) -> None:
        """Report the load: what did not arrive has failed, and all of it where it is not what was asked for."""
        self._active.remove(job)
        cause = job.cause if self._may_load(job.load) else Cause.ADAPTER_CHANGED
        if cause:
            job.count(cause)
        if cause in (Cause.ADAPTER_CHANGED, Cause.BUG, Cause.SHUTDOWN):
            job.missing = set(range(len(job.load.chunks)))
        self._finished(job.load, job.load.blocks_of(sorted(job.missing)), job.causes)
        if job.layers is not None:
            job.layers.end()

    def _fail_all(self, cause: str) -> None:
        while not self._jobs.empty():
            submitted = self._jobs.get()
            if submitted is not None:
                self._active.append(Loading(*submitted, 0.0, [0], [], set(), 1))
        for job in list(self._active):
            for part in job.parts:
                self._landing.await_all(part)
            self._give_up(job, cause)
