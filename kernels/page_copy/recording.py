# SPDX-License-Identifier: Apache-2.0
"""A device that is none: copies between host memory and host memory that stands for a GPU's, as late as CUDA allows.

For tests and benchmarks where there is no GPU. What is submitted is recorded and does nothing until somebody waits for
it: `synchronize` runs what that event needs and no more, each question whether an event has happened one operation of
a random stream. Copies of a batch run in any order, and a source that may be read at any time is read now or late.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loracache.kernels.page_copy.device import FRAGMENT, Direction, SourceOrder
from loracache.kernels.page_copy.fragments import Integers
from loracache.kernels.page_copy.moves import CopyError

__all__ = ["RecordingDevice", "RecordingEvent"]

_Steps = Callable[[], tuple[Integers, npt.NDArray[np.bool_]]]


@dataclass(eq=False, slots=True)
class RecordingEvent:
    """An event: how often it was recorded, and up to which of these it has happened."""

    recorded: int = 0
    happened: int = 0
    stream: _Stream | None = None


@dataclass(eq=False, slots=True)
class _Stream:
    direction: Direction
    ops: deque[_Op] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class _Op:
    run: Callable[[], None]
    awaits: tuple[RecordingEvent, int] | None = None  # it cannot run before


class _Memory:
    def __init__(self, nbytes: int, content: int) -> None:
        self._bytes = np.full(nbytes + 256, content, np.uint8)
        self.address = (self._bytes.ctypes.data + 255) & ~255


class RecordingDevice:
    """See the module. steps: what is pinned, as pinned.steps() says it; copies of other host memory are refused as CUDA
    refuses those that reach across registrations. device_memory: (address, bytes) of what stands for the device's.
    refuses: numbers of copies and launches, from 0, that raise CopyError. copied: bytes by direction.
    """

    identity, has_kernels = "recording", True

    def __init__(
        self,
        seed: int = 0,
        *,
        steps: _Steps | None = None,
        device_memory: Collection[tuple[int, int]] = (),
        refuses: Collection[int] = (),
    ) -> None:
        self._random = random.Random(seed)
        self._steps = steps
        self._device_memory = list(device_memory)
        self._pinned: list[tuple[int, int]] = []
        self._refuses = refuses
        self._streams: list[_Stream] = []
        self._lock = threading.RLock()
        self.submitted: list[tuple[str, Direction, int, int]] = []  # ("copy" | "launch", stream's, runs, bytes)

    # -- what a device offers ----------

    def stream(self, direction: Direction) -> _Stream:
        """See Device."""
        self._streams.append(_Stream(direction))
        return self._streams[-1]

    def event(self) -> RecordingEvent:
        """See Device."""
        return RecordingEvent()

    def record(self, event: RecordingEvent, stream: _Stream) -> None:
        """See Device."""
        with self._lock:
            event.recorded += 1
            event.stream, number = stream, event.recorded
            stream.ops.append(_Op(lambda: setattr(event, "happened", max(event.happened, number))))

    def wait(self, stream: _Stream, event: RecordingEvent) -> None:
        """See Device."""
        with self._lock:
            if event.recorded:
                stream.ops.append(_Op(lambda: None, (event, event.recorded)))

    def happened(self, event: RecordingEvent) -> bool:
        """See Device."""
        with self._lock:
            self.advance()
            return event.happened >= event.recorded

    def synchronize(self, event: RecordingEvent) -> None:
        """See Device."""
        with self._lock:
            self._reach(event, event.recorded)

    def allocate(self, nbytes: int) -> _Memory:
        """See Device."""
        memory = _Memory(nbytes, 0xA5)
        self._device_memory.append((memory.address, nbytes))
        return memory

    def allocate_host(self, nbytes: int) -> _Memory:
        """See Device."""
        memory = _Memory(nbytes, 0x5A)
        self._pinned.append((memory.address, nbytes))
        return memory

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers, stream: _Stream, order: SourceOrder) -> None:
        """See Device."""
        with self._lock:
            self._submit("copy", stream, len(nbytes), int(nbytes.sum()))
            if self._steps is not None:
                self._check(targets, nbytes)
                self._check(sources, nbytes)
            early = order is SourceOrder.ANY and self._steps is not None and self._random.random() < 0.5
            contents = [ctypes.string_at(*run) for run in _runs(sources, nbytes)] if early else None
            stream.ops.append(_Op(lambda: self._copy(targets, sources, nbytes, contents)))

    def launch(self, direction: Direction, table: int, count: int, slot: int, stream: _Stream) -> None:
        """See Device."""
        with self._lock:
            self._submit("launch", stream, count, 0)
            stream.ops.append(_Op(lambda: self._launch(direction, table, count, slot)))

    # -- running ----------

    def advance(self) -> bool:
        """Run one operation of any stream that can; False where none can."""
        with self._lock:
            able = [stream for stream in self._streams if stream.ops and self._able(stream.ops[0])]
            if able:
                self._random.choice(able).ops.popleft().run()
            return bool(able)

    def run_ahead(self, stream: _Stream) -> None:
        """Run all of a stream that waits for nothing: as early as CUDA may run it."""
        with self._lock:
            while stream.ops and self._able(stream.ops[0]):
                stream.ops.popleft().run()

    def _able(self, op: _Op) -> bool:
        return op.awaits is None or op.awaits[0].happened >= op.awaits[1]

    def _reach(self, event: RecordingEvent, number: int) -> None:
        """Run what has to run before `event` happens for the `number`th time, and nothing else."""
        while event.happened < number:
            assert event.stream is not None
            op = event.stream.ops[0]
            if op.awaits is not None:
                self._reach(*op.awaits)
            event.stream.ops.popleft().run()

    def _submit(self, what: str, stream: _Stream, runs: int, nbytes: int) -> None:
        number = len(self.submitted)
        self.submitted.append((what, stream.direction, runs, nbytes))
        if number in self._refuses:
            raise CopyError(f"{what} {number} was refused")

    def _copy(self, targets: Integers, sources: Integers, nbytes: Integers, contents: list[bytes] | None) -> None:
        order = list(range(len(nbytes)))
        self._random.shuffle(order)
        for at in order:
            source = contents[at] if contents is not None else int(sources[at])
            ctypes.memmove(int(targets[at]), source, int(nbytes[at]))

    def _launch(self, direction: Direction, table: int, count: int, slot: int) -> None:
        fragments = np.frombuffer(ctypes.string_at(table, count * FRAGMENT.itemsize), FRAGMENT)
        for device, offset, length in self._random.sample(fragments.tolist(), count):
            assert device % 16 == 0, f"a fragment at {device:#x}"
            staged = slot + 16 * offset
            target, source = (device, staged) if direction is Direction.LOAD else (staged, device)
            ctypes.memmove(target, source, 16 * length)

    def _check(self, start: Integers, nbytes: Integers) -> None:
        assert self._steps is not None
        edges, pinned = self._steps()
        for low, length in zip(start.tolist(), nbytes.tolist(), strict=True):
            if any(base <= low and low + length <= base + size for base, size in self._device_memory + self._pinned):
                continue
            place = int(np.searchsorted(edges, low, side="right")) - 1
            if place < 0 or not pinned[place] or low + length > edges[place + 1]:
                raise CopyError(f"invalid argument: {length} bytes at {low:#x} are not pinned in one piece")


def _runs(start: Integers, nbytes: Integers) -> list[tuple[int, int]]:
    return list(zip(start.tolist(), nbytes.tolist(), strict=True))
