# SPDX-License-Identifier: Apache-2.0
"""The worker's thread that stores. It has a connection and a copier of its own; loader.py has the one that loads.

The engine's loop hands jobs over and collects what is done; it never waits for a daemon. A store is cut into parts
that are small against the daemon's arena, and each is visible before the next is written. On a GPU a part is copied in
large submissions, two under way at most so that loads never wait long behind stores; what has arrived is hashed while
the next flies. A write lease is committed or given up only after all that was submitted under it has ended: a copy
under way would write into what belongs to others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from loracache.backoff import Backoff
from loracache.client import requests
from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.common.messages import ChunkBlocks, Store
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.connectors.vllm.worker.gate import Gate
from loracache.connectors.vllm.worker.hashers import Hashers, cores_for_hashing
from loracache.errors import LoRACacheError, Rejected, Unavailable
from loracache.kernels.page_copy import Copy, CopyError, Move, PageCopier
from loracache.keys import object_key
from loracache.results import Cause

__all__ = ["StoreJob", "Storer"]

_log = logging.getLogger(__name__)
_CALL_TIMEOUT_S = 5.0
_WRITE_LEASE_S = 60.0
_PART_SHARE = 16  # of the arena is a part at most
_PART_CHUNKS = 4096
_FLIGHTS = 2  # of a store are under way at most,
_FLIGHT_BYTES = 32 << 20  # each of so many bytes
_NO_ROOM_S = 1.0  # for which a store waits for room without getting any
_LONGEST_S = 5.0  # and with it: what comes behind waits, too
_FULL_S = 10.0  # after which the next one waits again
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05
_END_S = 2.0  # vLLM kills an engine that takes more than five seconds to end


class _Room:
    """Waits for room in the arena: writes to disk make some. Not before `after` (monotonic seconds): the engine's
    blocks wait meanwhile, and an arena that was full for long is full of what stays."""

    def __init__(self, after: float) -> None:
        self._most = _NO_ROOM_S if time.monotonic() >= after else 0.0
        self._pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._waited = self._in_vain = 0.0

    def found(self) -> None:
        """There was some."""
        self._pauses.reset()
        self._in_vain = 0.0

    def waits(self) -> bool:
        """Whether to ask again, after a pause."""
        if self._in_vain >= self._most or self._waited >= _LONGEST_S:
            return False
        pause = self._pauses.next()
        time.sleep(pause)
        self._waited += pause
        self._in_vain += pause
        return True


class StoreJob:
    """A store on its way. Shutting its gate gives it up: no byte of its blocks is read any more when that returns."""

    def __init__(self, store: Store, after: Any = None) -> None:
        self.store = store
        self.after = after  # a CUDA event: the blocks are written once it has happened
        self.gate = Gate()
        self.nbytes = 0  # committed
        self.left = len(store.chunks)  # not dealt with yet


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
        self._hashers = Hashers(min(1, cores_for_hashing(copier.device_type)))
        self._flight_bytes = 0 if copier.device_type == "cpu" else _FLIGHT_BYTES  # 0: a chunk, hashed from the cache
        self._shard = shard
        self._block_bytes = block_bytes
        self._may_store = may_store
        self._names = names
        self._finished = finished
        self._full_until = 0.0
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
        self._hashers.close()

    def _run(self) -> None:
        leave_pinned_core()
        while (job := self._jobs.get()) is not None:
            causes: dict[str, int] = {}
            try:
                self._store(job, causes)
            except LoRACacheError as error:
                _log.debug("store for %s: %s", job.store.request_id, error)
                causes[Cause.REJECTED if isinstance(error, Rejected) else Cause.UNAVAILABLE] = job.left
            except CopyError as error:
                _log.warning("the store for %s ends early: %s", job.store.request_id, error)
                causes[Cause.COPY_FAILED] = job.left
            except Exception:  # noqa: BLE001 - top of the thread: a bug must not keep a request's blocks for ever
                _log.exception("a store failed")
                causes[Cause.BUG] = job.left
            self._finished(job, causes)
        self._link.connection.close()

    def _store(self, job: StoreJob, causes: dict[str, int]) -> None:
        store = job.store
        if not self._may_store(store):
            causes[Cause.ADAPTER_CHANGED] = len(store.chunks)
            return
        if not self._link.ready():
            raise Unavailable("no daemon")
        self._link.register(store.namespace.digest(), store.namespace.descriptor(), self._names)
        parent = object_key(store.parent, self._shard) if store.parent else requests.NO_PARENT
        room = _Room(self._full_until)
        for chunks in self._parts(store.chunks):
            keys = [object_key(chunk.key, self._shard) for chunk in chunks]
            done = 0
            while True:
                above = [keys[done - 1] if done else parent, *keys[done:-1]]
                part = self._store_part(job, chunks[done:], keys[done:], above, causes)
                if Cause.CANCELLED in causes:
                    return
                if part:
                    room.found()
                done += part
                job.left -= part
                if done == len(keys) or not room.waits():
                    break
            if done < len(keys):  # the chain ends here
                self._full_until = time.monotonic() + _FULL_S
                causes[Cause.FULL] = causes.get(Cause.FULL, 0) + len(keys) - done
                job.left -= len(keys) - done
            if Cause.OVER_QUOTA in causes:  # and the rest of the chain with what was refused
                causes[Cause.OVER_QUOTA] += job.left
                return
            parent = keys[-1]

    def _parts(self, chunks: Sequence[ChunkBlocks]) -> Iterator[Sequence[ChunkBlocks]]:
        """Runs that each take little of the arena, so that one store may be larger than it."""
        arena = self._link.connection.map
        if arena is None:
            raise Unavailable("no daemon")
        size = self._block_bytes * max(len(chunk.blocks) for chunk in chunks)
        most = min(_PART_CHUNKS, max(1, len(arena) // _PART_SHARE // size))
        for at in range(0, len(chunks), most):
            yield chunks[at : at + most]

    def _store_part(
        self,
        job: StoreJob,
        chunks: Sequence[ChunkBlocks],
        keys: list[bytes],
        parents: list[bytes],
        causes: dict[str, int],
    ) -> int:
        """Store a part; answers how many of its first chunks were dealt with: there is no room for the next."""
        connection = self._link.connection
        lease = os.urandom(16)
        reserve = requests.Reserve(
            lease,
            job.store.namespace.digest(),
            requests.join_keys(keys),
            requests.join_keys(parents),
            [self._block_bytes * len(chunk.blocks) for chunk in chunks],
            _WRITE_LEASE_S,
        )
        try:
            answer = connection.call(reserve, _CALL_TIMEOUT_S).payload
            done = next((place for place, item in enumerate(answer) if item == Cause.FULL), len(answer))
            for place, item in enumerate(answer[done:], done):
                if item in (Cause.FULL, Cause.NO_PARENT):  # because the chunk before it has no room
                    answer[place] = Cause.BUSY
            if Cause.OVER_QUOTA in answer:
                refused = answer.index(Cause.OVER_QUOTA)
                answer[refused:] = [Cause.OVER_QUOTA if item == Cause.NO_PARENT else item for item in answer[refused:]]
            written = self._write(job, chunks, keys, answer, causes)
            if not written:
                if any(isinstance(item, list) for item in answer):
                    connection.abort(lease)
                return done
            commit = requests.Commit(
                lease, requests.join_keys([key for key, _ in written]), [total for _, total in written]
            )
            answer = connection.call(commit, _CALL_TIMEOUT_S).payload
        except BaseException:  # else the extents stay reserved for as long as the lease
            connection.abort(lease)
            raise
        sizes = {key: self._block_bytes * len(chunk.blocks) for key, chunk in zip(keys, chunks, strict=True)}
        for (key, _), cause in zip(written, answer, strict=True):
            if not cause:
                job.nbytes += sizes[key]
            elif cause != Cause.EXISTS:
                causes[cause] = causes.get(cause, 0) + 1
        return done

    def _write(
        self,
        job: StoreJob,
        chunks: Sequence[ChunkBlocks],
        keys: Sequence[bytes],
        answer: Sequence[Any],
        causes: dict[str, int],
    ) -> list[tuple[bytes, int]]:
        granted: list[tuple[bytes, Move]] = []
        for key, chunk, item in zip(keys, chunks, answer, strict=True):
            if isinstance(item, list):
                count = len(chunk.blocks)
                payload = self._link.connection.buffers(item, self._block_bytes * count)
                granted.append((key, Move(chunk.blocks, payload, 0, count)))
            elif item not in (Cause.EXISTS, Cause.BUSY):
                causes[item] = causes.get(item, 0) + 1
        sums = self._gather(job, [move for _, move in granted])
        if sums is None:
            causes[Cause.CANCELLED] = causes.get(Cause.CANCELLED, 0) + 1
            return []
        return list(zip([key for key, _ in granted], sums, strict=True))

    def _gather(self, job: StoreJob, moves: Sequence[Move]) -> list[int] | None:
        """Copy; answers the checksums, or None where the job was given up meanwhile. Whatever comes of it, what was
        submitted has ended."""
        flying: deque[tuple[Copy, Sequence[Move]]] = deque()
        sums: list[Callable[[], list[int]]] = []

        def land() -> None:
            copy, landed = flying[0]
            copy.wait()
            flying.popleft()
            sums.append(self._hashers.start([move.payload for move in landed]))

        try:
            for flight in self._flights(moves):
                copy = job.gate.submit(partial(self._copier.gather, flight, job.after))
                if copy is None:
                    return None
                flying.append((copy, flight))
                while flying and (len(flying) == _FLIGHTS or flying[0][0].done()):
                    land()
            while flying:
                land()
        finally:
            for copy, _ in flying:
                with contextlib.suppress(CopyError):
                    copy.wait()
        return [each for found in sums for each in found()] if job.gate.is_open else None

    def _flights(self, moves: Sequence[Move]) -> Iterator[Sequence[Move]]:
        """Moves that are submitted together."""
        size = self._block_bytes * max((move.of for move in moves), default=1)
        most = max(1, self._flight_bytes // size)
        for at in range(0, len(moves), most):
            yield moves[at : at + most]
