# SPDX-License-Identifier: Apache-2.0
"""How chunks that are in the arena get into their blocks, and are checked.

On a CPU the loader's thread hashes a chunk and copies it. On a GPU what arrives at a time is one submission, a flight,
hashed while it flies; a thread of its own waits for its end. A load within a step (by_layer.py) is copied a slice of
layers at a time, for all of its chunks, and hashed behind that: the step has begun by then. Called by the loader's
thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.worker.by_layer import LayerCopies, layers_of
from loracache.connectors.vllm.worker.hashers import Hashers, cores_for_hashing
from loracache.connectors.vllm.worker.loading import Chunk, Flight, Loading, Part
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.kernels.page_copy import Copy, CopyError, Move, PageCopier
from loracache.keys import checksum
from loracache.results import Cause

__all__ = ["Landing"]

_log = logging.getLogger(__name__)


class Landing:
    """Of one worker's loads. wake: called on another thread when a flight has ended."""

    def __init__(self, copier: PageCopier, objects: Sequence[GroupObjects], wake: Callable[[], None]) -> None:
        threads = cores_for_hashing(copier.device_type)
        self._copier = copier
        self._objects = objects
        self._wake = wake
        self._hashers = Hashers(threads)
        self._pool = ThreadPoolExecutor(1, "loracache-landing", initializer=leave_pinned_core) if threads else None

    def key(self, job: Loading, position: int) -> bytes:
        """Of the object of a chunk of a load."""
        chunk = job.load.chunks[position]
        return self._objects[chunk.group].key(chunk.key)

    def copy(self, job: Loading, part: Part, chunks: list[Chunk]) -> None:
        """Copy chunks that are in the arena."""
        if job.layers is not None:
            self._by_layer(job, part, chunks, job.layers)
            return
        if self._pool is not None:
            copy = self._submit(job, chunks)
            if copy is not None:
                self._fly(job, part, chunks, self._pool, copy.wait)
            return
        for chunk in chunks:
            if self._checked(job, part, chunk, checksum(chunk.payload)) and self._submit(job, [chunk]):
                job.came(part, chunk)

    def land(self, job: Loading, part: Part) -> None:
        """Take the flights that have ended."""
        for flight in [flight for flight in part.flights if flight.landing.done()]:
            part.flights.remove(flight)
            self._take(job, part, flight.chunks, flight.landing.result)

    def await_all(self, part: Part) -> None:
        """Return when no flight of a part is in the air."""
        wait([flight.landing for flight in part.flights])
        part.flights.clear()

    def close(self) -> None:
        """End the threads, once they have done what was begun."""
        self._hashers.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    # -- whole chunks ----------

    def _submit(self, job: Loading, chunks: list[Chunk]) -> Copy | None:
        """One submission; None where the device refuses it."""
        try:
            copy = self._copier.scatter(self._moves(job, chunks), job.after)
            if self._pool is None:
                copy.wait()
            return copy
        except CopyError as error:
            self._not_copied(job, chunks, error)
            return None

    def _moves(self, job: Loading, chunks: list[Chunk]) -> list[Move]:
        moves: list[Move] = []
        for chunk in chunks:
            planned = job.load.chunks[chunk.position]
            moves += self._objects[planned.group].part(planned, chunk.payload, job.load.chunk_tokens)
        return moves

    def _fly(
        self, job: Loading, part: Part, chunks: list[Chunk], pool: ThreadPoolExecutor, end: Callable[[], None]
    ) -> None:
        """end: waits for what was submitted, and raises CopyError where it failed."""
        job.renew()
        sums = self._hashers.start([chunk.payload for chunk in chunks])
        part.flights.append(Flight(chunks, pool.submit(_landed, end, sums)))
        part.flights[-1].landing.add_done_callback(lambda _: self._wake())

    def _take(self, job: Loading, part: Part, chunks: list[Chunk], landed: Callable[[], list[int]]) -> None:
        """landed: answers the chunks' checksums. Raises CopyError where they are not in their blocks."""
        try:
            sums = landed()
        except CopyError as error:
            self._not_copied(job, chunks, error)
            return
        for chunk, found in zip(chunks, sums, strict=True):
            if self._checked(job, part, chunk, found):
                job.came(part, chunk)

    def _checked(self, job: Loading, part: Part, chunk: Chunk, found: int) -> bool:
        right = found == chunk.expected
        if not right:
            part.bad.append(self.key(job, chunk.position))
            job.lost(Cause.CHECKSUM)
        return right

    def _not_copied(self, job: Loading, chunks: list[Chunk], error: CopyError) -> None:
        _log.warning("%d chunks for %s were not copied: %s", len(chunks), job.load.request_id, error)
        job.lost(Cause.COPY_FAILED, len(chunks))

    # -- slices of layers ----------

    def _by_layer(self, job: Loading, part: Part, chunks: list[Chunk], layers: LayerCopies) -> None:
        """All chunks, slice by slice. Whatever was submitted is waited for, also where a later slice is refused."""
        moves = self._moves(job, chunks)
        submitted = _Slices()
        try:
            for rows in layers.slices:
                copy = self._copier.scatter([layers_of(move, layers.widths, rows) for move in moves], job.after)
                submitted.copies.append(copy)
                layers.submitted(copy)
        except CopyError as error:
            submitted.refused = error
        finally:
            if self._pool is not None:
                self._fly(job, part, chunks, self._pool, submitted.wait)
        if self._pool is None:
            sums = self._hashers.start([chunk.payload for chunk in chunks])
            self._take(job, part, chunks, partial(_landed, submitted.wait, sums))


class _Slices:
    """Copies that belong together. refused: what the device said to one that there is not."""

    def __init__(self) -> None:
        self.copies: list[Copy] = []
        self.refused: CopyError | None = None

    def wait(self) -> None:
        """Return when all have ended. Raises CopyError where one has failed."""
        error = self.refused
        for copy in self.copies:
            try:
                copy.wait()
            except CopyError as failed:
                error = error or failed
        if error is not None:
            raise error


def _landed(end: Callable[[], Any], sums: Callable[[], list[int]]) -> list[int]:
    """The checksums of what a copy brought, once it has ended. Raises CopyError where it failed."""
    try:
        end()
    finally:
        found = sums()
    return found
