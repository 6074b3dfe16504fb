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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from loracache.backoff import Backoff
from loracache.client import requests
from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.common.messages import ChunkBlocks, Store
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.connectors.vllm.worker.gate import Gate
from loracache.connectors.vllm.worker.hashers import Hashers, cores_for_hashing
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.errors import LoRACacheError, Rejected, Unavailable
from loracache.groups import Need
from loracache.kernels.page_copy import Copy, CopyError, Move, PageCopier
from loracache.results import Cause

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["StoreJob", "Storer", "served_names"]

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


@dataclass(frozen=True, slots=True)
class _Item:
    """An object to store. parent: its parent's key."""

    chunk: ChunkBlocks
    objects: GroupObjects
    key: bytes
    parent: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Granted:
    """One that there are pages for."""

    item: _Item
    payload: Sequence[memoryview]
    moves: Sequence[Move]
    nbytes: int


class Storer:
    """Copies computed chunks into the arena. objects: how those of each of the model's groups are made up. finished(
    job, causes) is called once per job, on this thread, or on the one that submits after the end; may_store(store) says
    whether the chunks were computed with the adapter they are stored for. names: what the engine calls its model.
    """

    def __init__(
        self,
        server: str,
        ensure: Callable[[], None],
        copier: PageCopier,
        objects: Sequence[GroupObjects],
        may_store: Callable[[Store], bool],
        finished: Callable[[StoreJob, dict[str, int]], None],
        names: Sequence[str] = (),
    ) -> None:
        self._link = WorkerLink(server, "vllm-store", ensure, copier.device_type)
        self._copier = copier
        self._hashers = Hashers(min(1, cores_for_hashing(copier.device_type)))
        self._flight_bytes = 0 if copier.device_type == "cpu" else _FLIGHT_BYTES  # 0: a chunk, hashed from the cache
        self._objects = objects
        self._may_store = may_store
        self._names = names
        self._finished = finished
        self._full_until = 0.0
        self._open = True
        self._jobs: queue.SimpleQueue[StoreJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="loracache-store", daemon=True)
        self._link.ready()
        self._thread.start()

    def submit(self, job: StoreJob) -> None:
        """Start a store; returns at once. After `close` it is over at once."""
        if not self._open:
            self._finished(job, {Cause.SHUTDOWN: job.left})
            return
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what is queued, within a bounded time, and end the thread."""
        self._open = False
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
        items = self._items(store)
        job.left = len(items)
        arena = self._link.connection.map
        if arena is None:
            raise Unavailable("no daemon")
        room = _Room(self._full_until)
        for part in _runs(items, len(arena) // _PART_SHARE, _PART_CHUNKS):  # each takes little of the arena
            left: Sequence[_Item] = part
            while left:
                count, left = len(left), self._store_part(job, left, causes)
                if Cause.CANCELLED in causes:
                    return
                job.left -= count - len(left)
                if len(left) < count:
                    room.found()
                if left and not room.waits():
                    break
            if left:  # the chain ends here
                self._full_until = time.monotonic() + _FULL_S
                causes[Cause.FULL] = causes.get(Cause.FULL, 0) + len(left)
                job.left -= len(left)
            if Cause.OVER_QUOTA in causes:  # and the rest of the chain with what was refused
                causes[Cause.OVER_QUOTA] += job.left
                return

    def _items(self, store: Store) -> list[_Item]:
        """What of a store is on this worker. In the chain each hangs under that of the chunk before;
        what is beside it, under that of its own chunk."""
        chain = next((each for each in self._objects if each.group.need is Need.ALL and any(each.block_bytes)), None)
        items, above, at = [], store.parent, b""
        for chunk in store.chunks:
            if chunk.key != at:
                above, at = at or store.parent, chunk.key
            objects = self._objects[chunk.group]
            nbytes = objects.nbytes(len(chunk.blocks))
            if nbytes:
                parent = above if objects is chain else chunk.key
                parent = chain.key(parent) if chain is not None and parent else requests.NO_PARENT
                items.append(_Item(chunk, objects, objects.key(chunk.key), parent, nbytes))
        return items

    def _store_part(self, job: StoreJob, items: Sequence[_Item], causes: dict[str, int]) -> list[_Item]:
        """Store a part; answers those of it that there was no room for."""
        connection = self._link.connection
        lease = os.urandom(16)
        reserve = requests.Reserve(
            lease,
            job.store.namespace.digest(),
            requests.join_keys([item.key for item in items]),
            requests.join_keys([item.parent for item in items]),
            [item.nbytes for item in items],
            _WRITE_LEASE_S,
            beside=requests.join_keys([item.key for item in items if item.objects.group.need is not Need.ALL]),
        )
        try:
            granted, left = self._sorted(items, connection.call(reserve, _CALL_TIMEOUT_S).payload, causes)
            sums = self._gather(job, granted)
            if sums is None:
                causes[Cause.CANCELLED] = causes.get(Cause.CANCELLED, 0) + 1
            if not sums:
                if granted:
                    connection.abort(lease)
                return left
            written = list(zip([each.item for each in granted], sums, strict=True))
            commit = requests.Commit(
                lease, requests.join_keys([item.key for item, _ in written]), [total for _, total in written]
            )
            answer = connection.call(commit, _CALL_TIMEOUT_S).payload
        except BaseException:  # else the extents stay reserved for as long as the lease
            connection.abort(lease)
            raise
        for (item, _), cause in zip(written, answer, strict=True):
            if not cause:
                job.nbytes += item.nbytes
            elif cause != Cause.EXISTS:
                causes[cause] = causes.get(cause, 0) + 1
        return left

    def _sorted(
        self, items: Sequence[_Item], answer: Sequence[Any], causes: dict[str, int]
    ) -> tuple[list[_Granted], list[_Item]]:
        """(objects to write, those that there is no room for) by a reservation's answer; others are counted. What hangs
        under one without room has none either, and under one that was refused is refused for the same."""
        granted: list[_Granted] = []
        left: list[_Item] = []
        full: set[bytes] = set()
        refused: set[bytes] = set()
        for item, found in zip(items, answer, strict=True):
            if found == Cause.NO_PARENT and item.parent in refused:
                found = Cause.OVER_QUOTA
            if isinstance(found, list):
                payload = self._link.connection.buffers(found, item.nbytes)
                granted.append(_Granted(item, payload, item.objects.whole(item.chunk, payload), item.nbytes))
            elif found == Cause.FULL or (found == Cause.NO_PARENT and item.parent in full):
                left.append(item)
                full.add(item.key)
            elif found not in (Cause.EXISTS, Cause.BUSY):
                causes[found] = causes.get(found, 0) + 1
                if found == Cause.OVER_QUOTA:
                    refused.add(item.key)
        return granted, left

    def _gather(self, job: StoreJob, granted: Sequence[_Granted]) -> list[int] | None:
        """Copy; answers the checksums, or None where the job was given up meanwhile. Whatever comes of it, what was
        submitted has ended."""
        flying: deque[tuple[Copy, Sequence[_Granted]]] = deque()
        sums: list[Callable[[], list[int]]] = []

        def land() -> None:
            copy, landed = flying[0]
            copy.wait()
            flying.popleft()
            sums.append(self._hashers.start([each.payload for each in landed]))

        try:
            for flight in _runs(granted, self._flight_bytes, len(granted)):
                moves = [move for each in flight for move in each.moves]
                copy = job.gate.submit(partial(self._copier.gather, moves, job.after))
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


_Sized = TypeVar("_Sized", _Item, _Granted)


def _runs(items: Sequence[_Sized], nbytes: int, most: int) -> Iterator[Sequence[_Sized]]:
    """Runs of at most so many bytes and items; a larger item goes alone."""
    begin = total = 0
    for at, item in enumerate(items):
        if at > begin and (total + item.nbytes > nbytes or at - begin == most):
            yield items[begin:at]
            begin, total = at, 0
        total += item.nbytes
    if begin < len(items):
        yield items[begin:]


def served_names(config: VllmConfig) -> list[str]:
    """What users call the model, for operators who name it."""
    names = getattr(config.model_config, "served_model_name", None) or []
    return [str(name) for name in ([names] if isinstance(names, str) else names)]
