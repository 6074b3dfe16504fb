# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the GPU path share: shapes of KV caches, blocks on a device, and what a link gives at most."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loracache.kernels.page_copy import Move, PageCopier
from loracache.kernels.page_copy.device import Device, Direction, SourceOrder

__all__ = ["ROUNDS", "SHAPES", "Compute", "Rig", "Shape", "median"]

ROUNDS = 7
_SIDE = 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """A KV cache: bytes of a layer's row of a block; `of` blocks make a chunk of at least 1 MiB."""

    name: str
    layers: int
    row: int
    of: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""
        return self.layers * self.row


SHAPES = (
    Shape("Llama 8B", 32, 64 << 10, 1),
    Shape("Llama 70B, TP 8", 80, 8 << 10, 2),
    Shape("MLA", 61, 18 << 10, 1),
)


class Rig:
    """Blocks on a device, and pinned memory for as many bytes."""

    def __init__(self, device: Device, where: str, shape: Shape, outermost: str, nbytes: int) -> None:
        self.device = device
        blocks = max(2 * shape.of, nbytes // shape.block_bytes // shape.of * shape.of)
        self.nbytes = blocks * shape.block_bytes
        size = (shape.layers, blocks, shape.row // 8)
        if outermost == "block":
            size = (blocks, shape.layers, shape.row // 8)
        self.whole = torch.randint(-(1 << 62), 1 << 62, size, device=where)
        self.layers = self.whole.unbind(0 if outermost == "layer" else 1)
        self.host = device.allocate_host(self.nbytes)
        self.bytes = np.frombuffer(memoryview((ctypes.c_uint8 * self.nbytes).from_address(self.host.address)), np.uint8)
        order = np.random.default_rng(1).permutation(blocks).tolist()  # blocks of an engine lie anywhere
        chunk = shape.block_bytes * shape.of
        self.moves = [
            Move(order[at : at + shape.of], [self.bytes.data[at // shape.of * chunk :][:chunk]], 0, shape.of)
            for at in range(0, blocks, shape.of)
        ]

    def steps(self) -> tuple[Any, Any]:
        """All of it is pinned, in one piece."""
        return np.array([self.host.address, self.host.address + self.nbytes]), np.array([True, False])

    def settle(self) -> None:
        """Wait for what torch computes: copies have streams of their own."""
        if self.whole.is_cuda:
            torch.cuda.synchronize()

    def check(self, copier: PageCopier) -> None:
        """Raises RuntimeError where what comes back is not what went."""
        before = self.whole.clone()
        self.settle()
        copier.gather(self.moves).wait()
        expected = b"".join(
            layer[block].cpu().numpy().tobytes()
            for move in self.moves[:2]
            for layer in self.layers
            for block in move.blocks
        )
        self.whole.zero_()
        self.settle()
        copier.scatter(self.moves).wait()
        if not torch.equal(self.whole, before) or self.bytes[: len(expected)].tobytes() != expected:
            raise RuntimeError("copies are not right")

    def floor(self, direction: Direction) -> float:
        """Seconds of one copy of all bytes."""
        stream = self.device.stream(direction)
        ends = [np.array([each]) for each in (self.whole.data_ptr(), self.host.address)]
        target, source = ends if direction is Direction.LOAD else reversed(ends)

        def copy() -> None:
            event = self.device.event()
            self.device.copy(target, source, np.array([self.nbytes]), stream, SourceOrder.STREAM)
            self.device.record(event, stream)
            self.device.synchronize(event)

        return median(copy)


class Compute:
    """A stream that is busy: four products of two 8192 x 8192 matrices of bfloat16; on a CPU, small ones."""

    def __init__(self, where: str) -> None:
        self._cuda = where.startswith("cuda")
        side, dtype = (_SIDE, torch.bfloat16) if self._cuda else (64, torch.float32)
        self._left, self._right = (torch.randn(side, side, device=where, dtype=dtype) for _ in range(2))
        self.products()

    def products(self) -> float:
        """Compute; answers the seconds that it took."""
        if not self._cuda:
            began = time.perf_counter()
            self._multiply()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._multiply()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _multiply(self) -> None:
        for _ in range(4):
            torch.mm(self._left, self._right)


def median(call: Callable[[], object]) -> float:
    """Seconds, of a few rounds after one."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
