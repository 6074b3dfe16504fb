# SPDX-License-Identifier: Apache-2.0
"""What submitting a load costs the processor: from moves to arrays that a GPU's driver takes, without the driver.

No GPU is used and no byte is moved: the copier's device records what it is handed. "A layer together" is a layout whose
layers lie one behind another, so that every block is a fragment a layer; in "a block together" all layers of a block
lie side by side. What the driver itself takes for each fragment comes on top, and is not measured here.
"""

from __future__ import annotations

import gc
import mmap
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from common import Row, interleaved, row

from loracache.kernels.page_copy import Move, PageCopier
from loracache.kernels.page_copy.choice import FEW
from loracache.kernels.page_copy.fragments import Integers
from loracache.kernels.page_copy.recording import RecordingDevice


@dataclass(frozen=True, slots=True)
class Shape:
    """A load: blocks of 16 tokens, each `row` bytes a layer; `of` blocks make a chunk. at_most: milliseconds."""

    name: str
    layers: int
    row: int
    blocks: int
    of: int
    at_most: float


SHAPES = (
    Shape("32k tokens, Llama 8B", 32, 64 << 10, 2048, 1, 5.0),
    Shape("128k tokens, Llama 70B, TP 8", 80, 8 << 10, 8192, 2, 20.0),
)


class _AllPinned:
    def __init__(self, start: int, nbytes: int) -> None:
        piece = 128 << 20
        self._edges = np.array([*range(start, start + nbytes, piece), start + nbytes], np.int64)
        self._pinned = np.arange(len(self._edges)) < len(self._edges) - 1

    def steps(self) -> tuple[Integers, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        return self._edges, self._pinned


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    found = []
    gc.collect()
    gc.freeze()  # as vLLM's workers do when they have started
    for shape in SHAPES:
        for together in ("layer", "block"):
            for way, (spent, fragments) in _measure(shape, together, 5 if quick else 30).items():
                name = f"{shape.name}, a {together} together: {fragments:,} fragments {way}"
                found.append(row(name, "ms", [each * 1e3 for each in spent], at_most=shape.at_most))
    return found


def _measure(shape: Shape, together: str, rounds: int) -> dict[str, tuple[list[float], int]]:
    """Seconds of processor time, and fragments, by the way they go."""
    nbytes = shape.layers * shape.row * shape.blocks
    whole = torch.empty(nbytes // 8, dtype=torch.int64)  # never touched: address space alone
    size = (shape.layers, shape.blocks, shape.row // 8)
    cache = whole.view(size) if together == "layer" else whole.view(size[1], size[0], size[2]).transpose(0, 1)
    arena = mmap.mmap(-1, nbytes)
    view = memoryview(arena)
    pinned = _AllPinned(int(np.frombuffer(view, np.uint8).ctypes.data), nbytes)
    places = np.random.default_rng(1).permutation(shape.blocks).tolist()  # blocks of an engine lie anywhere
    chunk = shape.layers * shape.row * shape.of
    moves = [
        Move(places[at : at + shape.of], [view[at // shape.of * chunk :][:chunk]], 0, shape.of)
        for at in range(0, shape.blocks, shape.of)
    ]
    copied: dict[str, int] = {}

    def submit(way: str, below: int) -> float:
        device = RecordingDevice()
        copier = PageCopier(list(cache.unbind(0)), pieces=pinned, device=device, bounce_below=below)
        copier.scatter(moves[:FEW])  # makes the lane, its slots and its tables
        before = len(device.submitted)
        began = time.thread_time()
        copier.scatter(moves)
        spent = time.thread_time() - began
        kind = "copy" if way == "straight" else "launch"
        copied[way] = sum(runs for what, _, runs, _ in device.submitted[before:] if what == kind)
        return spent

    ways = {"straight": 0, "through slots": 1 << 40}
    times = interleaved(rounds, {way: partial(submit, way, below) for way, below in ways.items()}, warm_up=1)
    return {way: (times[way], copied[way]) for way in ways}
