# SPDX-License-Identifier: Apache-2.0
"""One direction of a copier: two streams of its own, and the memory that copies pass through.

Large fragments are copied by the copy engines, straight. Small ones bounce: a copy engine moves large runs of the
payload to or from a slot in device memory, a kernel the fragments between the slot and the KV cache. Several slots make
the two overlap. Host memory that is not pinned goes through pinned memory first, which its caller's thread copies: for
such memory a submission returns when the bytes have passed that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from loracache.kernels.page_copy.choice import Choice
from loracache.kernels.page_copy.device import FRAGMENT, Device, Direction, Memory, SourceOrder
from loracache.kernels.page_copy.fragments import Fragments, Integers, host_runs, parts_of

__all__ = ["SLOTS", "SLOT_BYTES", "Lane"]

SLOTS, SLOT_BYTES = 3, 32 << 20  # in device memory, of each direction that needs them
_TABLES, _TABLE_FRAGMENTS = 64, 1 << 14  # 256 KiB each, in pinned and in device memory
_STAGES, _STAGE_BYTES = 2, 8 << 20  # in pinned memory
_STORE_BYTES = 32 << 20  # of a submission of stores: what a load may have to wait for


@dataclass(frozen=True, slots=True)
class _Slot:
    """filled: it holds what was copied last. free: that has left it."""

    memory: Memory
    filled: Any
    free: Any


@dataclass(frozen=True, slots=True)
class _Stage:
    """free: no copy reads or writes it."""

    memory: Memory
    free: Any


@dataclass(frozen=True, slots=True)
class _Table:
    """Fragments for the kernels. written, read: where they are put and where launches read them, and addresses there.
    free: no launch reads them.
    """

    memory: tuple[Memory, Memory]
    written: int
    read: int
    fragments: npt.NDArray[np.void]
    free: Any


@dataclass(frozen=True, slots=True)
class _Filled:
    """How fragments fill slots, one behind another. starts: the number of each slot's first. begins: bytes before that.
    offsets, lengths: of each fragment, in its slot, in units of 16 bytes; one length where all are alike.
    """

    starts: list[int]
    begins: Integers
    offsets: Integers | npt.NDArray[np.uint32]
    lengths: Integers | int


class Lane:
    """See the module. Used by one thread."""

    def __init__(self, device: Device, direction: Direction, choice: Choice) -> None:
        self._device = device
        self._direction = direction
        self._choice = choice
        self._copies, self._kernels = device.stream(direction), device.stream(direction)
        self._slots: Iterator[_Slot] | None = None
        self._tables: Iterator[_Table] | None = None
        self._stages: Iterator[_Stage] | None = None

    def submit(self, fragments: Fragments, edges: Integers, after: Any) -> None:
        """Copy between pinned memory and the device, once `after` has happened. edges: addresses in host memory that no
        copy may reach across; no fragment does."""
        if not len(fragments):
            return
        if self._choice.bounces(self._direction, fragments):
            self._bounce(fragments, edges, after)
        else:
            self._copy(fragments, after)

    def submit_unpinned(self, fragments: Fragments, after: Any) -> None:
        """Copy between other memory and the device."""
        stages = self._stages = self._stages or cycle([self._new_stage() for _ in range(_STAGES)])
        fragments = fragments.at_most(_STAGE_BYTES)
        filling: tuple[_Stage, Fragments] | None = None
        for part in fragments.parts(_STAGE_BYTES):
            piece, stage = fragments[part], next(stages)
            self._device.synchronize(stage.free)
            if self._direction is Direction.LOAD:
                _move(stage.memory.address, piece, into_host=False)
            offset = np.cumsum(piece.nbytes) - piece.nbytes
            try:
                self.submit(piece.at(stage.memory.address + offset), np.zeros(0, np.int64), after)
            finally:
                self.end(stage.free)
            if self._direction is Direction.STORE:
                if filling:
                    self._empty(*filling)
                filling = (stage, piece)
        if filling:
            self._empty(*filling)

    def end(self, event: Any) -> Any:
        """Record `event` behind all that was submitted, and answer it."""
        first, last = (
            (self._copies, self._kernels) if self._direction is Direction.LOAD else (self._kernels, self._copies)
        )
        joint = self._device.event()
        self._device.record(joint, first)
        self._device.wait(last, joint)
        self._device.record(event, last)
        return event

    # -- straight ----------

    def _copy(self, fragments: Fragments, after: Any) -> None:
        if after is not None:
            self._device.wait(self._copies, after)
        if self._direction is Direction.LOAD:
            self._device.copy(fragments.device, fragments.host, fragments.nbytes, self._copies, SourceOrder.ANY)
            return
        fragments = fragments.at_most(_STORE_BYTES)
        for part in fragments.parts(_STORE_BYTES):
            piece = fragments[part]
            self._device.copy(piece.host, piece.device, piece.nbytes, self._copies, SourceOrder.STREAM)

    # -- bouncing ----------

    def _bounce(self, fragments: Fragments, edges: Integers, after: Any) -> None:
        if after is not None:
            self._device.wait(self._kernels, after)
        fragments = fragments.at_most(SLOT_BYTES)
        for start in range(0, len(fragments), _TABLE_FRAGMENTS):
            self._through_slots(fragments[start : start + _TABLE_FRAGMENTS], edges)

    def _through_slots(self, fragments: Fragments, edges: Integers) -> None:
        """Fragments of one table. What can be is done for all slots at once: a call of numpy's takes longer than its
        work for one."""
        tables = self._tables = self._tables or cycle(self._new_tables())
        ring = self._slots = self._slots or cycle([self._new_slot() for _ in range(SLOTS)])
        table, count = next(tables), len(fragments)
        self._device.synchronize(table.free)  # what reads it was submitted so many tables ago
        filled = _even(fragments.nbytes) or _uneven(fragments.nbytes)
        slots = [next(ring) for _ in filled.starts]
        host, nbytes = host_runs(fragments.host, fragments.nbytes, edges, filled.starts)
        before = np.cumsum(nbytes) - nbytes  # bytes before each run
        runs = [*np.searchsorted(before, filled.begins).tolist(), len(before)]
        staged = before + np.repeat([slot.memory.address for slot in slots] - filled.begins, np.diff(runs))
        table.fragments["device"][:count] = fragments.device
        table.fragments["offset"][:count] = filled.offsets
        table.fragments["length"][:count] = filled.lengths
        try:
            one = np.array([[table.read], [table.written], [count * FRAGMENT.itemsize]], np.int64)
            self._device.copy(one[0], one[1], one[2], self._kernels, SourceOrder.STREAM)
            places = zip(slots, pairwise([*filled.starts, count]), pairwise(runs), strict=True)
            for slot, (start, end), (low, high) in places:
                place = table.read + start * FRAGMENT.itemsize
                self._through_slot(slot, host[low:high], staged[low:high], nbytes[low:high], place, end - start)
        finally:  # else the next to use it would write over what a launch of before still has to read
            self._device.record(table.free, self._kernels)

    def _through_slot(
        self, slot: _Slot, host: Integers, staged: Integers, nbytes: Integers, table: int, count: int
    ) -> None:
        """`count` fragments of a table: runs in host memory, and where they lie in the slot."""
        device, copies, kernels = self._device, self._copies, self._kernels
        if self._direction is Direction.LOAD:
            device.wait(copies, slot.free)
            device.copy(staged, host, nbytes, copies, SourceOrder.ANY)
            device.record(slot.filled, copies)
            device.wait(kernels, slot.filled)
            device.launch(self._direction, table, count, slot.memory.address, kernels)
            device.record(slot.free, kernels)
        else:
            device.wait(kernels, slot.free)
            device.launch(self._direction, table, count, slot.memory.address, kernels)
            device.record(slot.filled, kernels)
            device.wait(copies, slot.filled)
            device.copy(host, staged, nbytes, copies, SourceOrder.STREAM)
            device.record(slot.free, copies)

    # -- memory ----------

    def _empty(self, stage: _Stage, fragments: Fragments) -> None:
        """Copy what has arrived in a stage to where it belongs."""
        self._device.synchronize(stage.free)
        _move(stage.memory.address, fragments, into_host=True)

    def _new_slot(self) -> _Slot:
        return _Slot(self._device.allocate(SLOT_BYTES), self._device.event(), self._device.event())

    def _new_stage(self) -> _Stage:
        return _Stage(self._device.allocate_host(_STAGE_BYTES), self._device.event())

    def _new_tables(self) -> list[_Table]:
        size = _TABLE_FRAGMENTS * FRAGMENT.itemsize
        memory = self._device.allocate_host(_TABLES * size), self._device.allocate(_TABLES * size)
        tables = []
        for at in range(0, _TABLES * size, size):
            written, read = (each.address + at for each in memory)
            fragments = np.frombuffer(memoryview((ctypes.c_char * size).from_address(written)), FRAGMENT)
            tables.append(_Table(memory, written, read, fragments, self._device.event()))
        return tables


def _move(stage: int, fragments: Fragments, *, into_host: bool) -> None:
    """Copy between a stage and the host's side of fragments, on the processor."""
    for host, nbytes in zip(*(each.tolist() for each in host_runs(fragments.host, fragments.nbytes)), strict=True):
        target, source = (host, stage) if into_host else (stage, host)
        ctypes.memmove(target, source, nbytes)
        stage += nbytes


def _even(nbytes: Integers) -> _Filled | None:
    """Of fragments that are all of one length, as most are: nothing has to be added up for them."""
    size = int(nbytes[0])
    if not (nbytes == size).all():
        return None
    most = SLOT_BYTES // size
    starts = list(range(0, len(nbytes), most))
    return _Filled(starts, np.array(starts) * size, _even_offsets(size >> 4, most)[: len(nbytes)], size >> 4)


@lru_cache(8)
def _even_offsets(length: int, most: int) -> npt.NDArray[np.uint32]:
    """Of a table of fragments of this length, `most` in a slot."""
    return (np.arange(_TABLE_FRAGMENTS) % most * length).astype(np.uint32)


def _uneven(nbytes: Integers) -> _Filled:
    """Of fragments of any lengths."""
    offsets = np.cumsum(nbytes)
    starts = [part.start for part in parts_of(offsets, SLOT_BYTES)]
    offsets -= nbytes
    begins = offsets[starts]
    offsets -= np.repeat(begins, np.diff([*starts, len(nbytes)]))
    offsets >>= 4
    return _Filled(starts, begins, offsets, nbytes >> 4)
