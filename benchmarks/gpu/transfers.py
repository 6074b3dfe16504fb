# SPDX-License-Identifier: Apache-2.0
"""The worker's own Loader and Storer with a real daemon, alone and beside a busy stream; see run.py.

Tensors have the shapes of a worker's KV cache; where a block's layers lie together they are one row, as the worker
reads such a layout. A load is timed from its submission to its report, checksums and leases with it, a store until
all of it is committed, into an arena with room.
"""

from __future__ import annotations

import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import gpu.no_vllm  # noqa: F401 - before ours that import it
import numpy as np
import torch
from common import daemon, namespace, work_folder
from gpu.rig import SHAPES, Compute, Rig, Shape

from loracache import CacheClient
from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, Store
from loracache.connectors.vllm.link import worker as worker_link
from loracache.connectors.vllm.link.pinned import pieces
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.connectors.vllm.worker.storer import StoreJob, Storer
from loracache.groups import Need
from loracache.kernels.page_copy import PageCopier
from loracache.kernels.page_copy.device import Device, Direction
from loracache.keys import checksum
from loracache.mapping import address

__all__ = ["Found", "Transfer", "measure"]

_TOKENS, _DRY_TOKENS = (4096, 32768, 131072), (64,)
_BLOCK_TOKENS = 16
_ROUNDS, _WARM_UP = 5, 1
_TIMEOUT_S, _PINNED_S = 60.0, 180.0
_SPARE = 64 << 20
_SHARD = "benchmark"


@dataclass(frozen=True, slots=True)
class Transfer:
    """A load or store of so many tokens, medians. floor_gb_s: of one large copy between pinned memory and the device.
    cpu_ms: of all of this process's threads until it was done, the daemon's not among them. busy_gb_s: beside a busy
    stream, and slowed: how many times longer that stream's products take meanwhile.
    """

    shape: str
    outermost: str
    direction: str
    tokens: int
    nbytes: int
    gb_s: float
    floor_gb_s: float
    cpu_ms: float
    busy_gb_s: float
    slowed: float

    def line(self) -> str:
        """A row of the table."""
        ms = self.nbytes / self.gb_s / 1e6
        return (
            f"{self.shape:16} {self.outermost:6} {self.direction:7} {self.tokens:7,} tokens {self.nbytes >> 20:6,} MiB "
            f"{self.gb_s:8.2f} of {self.floor_gb_s:8.2f} GB/s ({self.gb_s / self.floor_gb_s:4.0%})  {ms:8.1f} ms, "
            f"{self.cpu_ms:8.1f} ms of processors  busy {self.busy_gb_s:8.2f} GB/s, {self.slowed:.3f}"
        )


@dataclass(frozen=True, slots=True)
class Found:
    """checksum_gb_s: of a checksum on one core, which loads and stores wait for where it is slower than the link."""

    transfers: list[Transfer]
    checksum_gb_s: float

    def as_json(self) -> dict[str, Any]:
        """What is written to a file."""
        return {"checksum_gb_s": self.checksum_gb_s, "figures": [asdict(each) for each in self.transfers]}

    def lines(self) -> list[str]:
        """The table."""
        return [f"checksum on one core {self.checksum_gb_s:.2f} GB/s", *(each.line() for each in self.transfers)]


class _HostInMemory:
    """What pins memory where there is no GPU."""

    def register(self, start: int, nbytes: int) -> int:
        return 0

    def unregister(self, start: int) -> int:
        return 0


class _Worker:
    """A worker's blocks on a device, and its threads. ended: when what was started ended, and causes of failures."""

    def __init__(self, url: str, device: Device, where: str, shape: Shape, outermost: str, tokens: int) -> None:
        blocks = max(shape.of, tokens // _BLOCK_TOKENS // shape.of * shape.of)
        words = shape.row // 8
        size = (shape.layers, blocks, words) if outermost == "layer" else (blocks, shape.layers * words)
        self.whole = torch.randint(-(1 << 62), 1 << 62, size, device=where)
        rows = self.whole.unbind(0) if outermost == "layer" else (self.whole,)
        self.nbytes = blocks * shape.block_bytes
        self._chunk_tokens = shape.of * _BLOCK_TOKENS
        group = KVGroup(Need.ALL, 0, (Member(0, _BLOCK_TOKENS, ("layer",)),))
        objects = [GroupObjects(group, _SHARD, [shape.block_bytes])]
        order = np.random.default_rng(1).permutation(blocks).tolist()  # blocks of an engine lie anywhere
        self._blocks = [tuple(order[at : at + shape.of]) for at in range(0, blocks, shape.of)]
        self._chunks: tuple[ChunkBlocks, ...] = ()
        self.ended: queue.SimpleQueue[tuple[float, dict[str, int]]] = queue.SimpleQueue()
        below = None if self.whole.is_cuda else 0  # nothing is measured, nor kept, of a device that is none
        into, out = (PageCopier(rows, pieces=pieces, device=device, bounce_below=below) for _ in range(2))
        self._loader = Loader(
            url,
            lambda: None,
            into,
            objects,
            _TIMEOUT_S,
            lambda load: True,
            lambda load, failed, causes: self.ended.put((time.perf_counter(), causes)),
        )
        self._storer = Storer(
            url,
            lambda: None,
            out,
            objects,
            lambda store: True,
            lambda job, causes: self.ended.put((time.perf_counter(), causes)),
        )

    def load(self) -> None:
        """Start to load what was stored last, to where it came from."""
        self._loader.submit(Load("load", self._chunks, None, self._chunk_tokens), self._event())

    def store(self) -> None:
        """Start to store all blocks, under keys that nobody knows."""
        self._chunks = tuple(ChunkBlocks(os.urandom(32), blocks) for blocks in self._blocks)
        self._storer.submit(StoreJob(Store("store", namespace(), b"", self._chunks, None, 1), self._event()))

    def check(self) -> None:
        """Raises RuntimeError where what comes back is not what was stored."""
        before = self.whole.clone()
        self.whole.zero_()
        self.load()
        self.outcome()
        if not torch.equal(self.whole, before):
            raise RuntimeError("what was loaded is not what was stored")

    def outcome(self) -> float:
        """When what was started ended. Raises RuntimeError where it failed."""
        ended, causes = self.ended.get()
        if causes:
            raise RuntimeError(f"it failed: {causes}")
        return ended

    def close(self) -> None:
        """End the threads."""
        self._storer.close()
        self._loader.close()

    def _event(self) -> Any:
        return torch.cuda.current_stream().record_event() if self.whole.is_cuda else None


def measure(device: Device, where: str, floor_bytes: int) -> Found:
    """Check and time loads and stores of every shape and layout; floor_bytes: of the one large copy."""
    cuda = where.startswith("cuda")
    if not cuda:
        worker_link.CudaHost = _HostInMemory  # type: ignore[attr-defined,assignment]
    rig = Rig(device, where, SHAPES[0], "layer", floor_bytes)
    floors = {direction: rig.nbytes / rig.floor(direction) / 1e9 for direction in Direction}
    began = time.perf_counter()
    checksum([rig.bytes.data])
    hashing = rig.nbytes / (time.perf_counter() - began) / 1e9
    del rig
    found: list[Transfer] = []
    for shape in SHAPES:
        tokens = [each for each in (_TOKENS if cuda else _DRY_TOKENS) if _fits(shape, each, cuda)]
        if not tokens:
            print(f"{shape.name}: no memory for it", file=sys.stderr)
            continue
        with _cache(max(tokens) // _BLOCK_TOKENS * shape.block_bytes) as (url, client):
            for outermost in ("layer", "block"):
                for count in tokens:
                    worker = _Worker(url, device, where, shape, outermost, count)
                    try:
                        for transfer in _transfers(worker, client, Compute(where), (shape.name, outermost), floors):
                            print(transfer.line(), file=sys.stderr, flush=True)
                            found.append(transfer)
                    finally:
                        worker.close()
                    del worker
    return Found(found, hashing)


@contextmanager
def _cache(nbytes: int) -> Iterator[tuple[str, CacheClient]]:
    """(URL, client) of a daemon with room for as much."""
    memory = f"{(nbytes + nbytes // 4 + _SPARE) >> 20}MiB"
    with work_folder() as folder, daemon(folder, memory=memory) as running, running.client() as client:
        yield running.url, client


def _transfers(
    worker: _Worker, client: CacheClient, compute: Compute, what: tuple[str, str], floors: dict[Direction, float]
) -> Iterator[Transfer]:
    """Stores, a check that they are right, and loads of what was stored."""

    def room() -> None:
        client.clear(tiers=["cpu"])

    _wait_pinned(client)
    starts: dict[Direction, Callable[[], None]] = {Direction.STORE: worker.store, Direction.LOAD: worker.load}
    alone = statistics.median(compute.products() for _ in range(_ROUNDS))
    for direction, start in starts.items():
        before = room if direction is Direction.STORE else lambda: None
        if direction is Direction.LOAD:
            worker.check()
        spent, cpu = _seconds(worker, start, before)
        busy, products = _beside(worker, start, before, compute)
        yield Transfer(
            *what,
            direction.value,
            worker.whole.shape[1 if what[1] == "layer" else 0] * _BLOCK_TOKENS,
            worker.nbytes,
            worker.nbytes / spent / 1e9,
            floors[direction],
            cpu * 1e3,
            worker.nbytes / busy / 1e9,
            products / alone,
        )


def _seconds(worker: _Worker, start: Callable[[], None], before: Callable[[], None]) -> tuple[float, float]:
    """(seconds, seconds of processors), medians."""
    spent, processors = [], []
    for _ in range(_WARM_UP + _ROUNDS):
        before()
        cpu, began = time.process_time(), time.perf_counter()
        start()
        spent.append(worker.outcome() - began)
        processors.append(time.process_time() - cpu)
    return statistics.median(spent[_WARM_UP:]), statistics.median(processors[_WARM_UP:])


def _beside(
    worker: _Worker, start: Callable[[], None], before: Callable[[], None], compute: Compute
) -> tuple[float, float]:
    """(seconds beside a busy stream, seconds of that stream's products meanwhile), medians."""
    spent, products = [], []
    for _ in range(_ROUNDS):
        before()
        began = time.perf_counter()
        start()
        products.append(compute.products())
        while worker.ended.empty():
            products.append(compute.products())
        spent.append(worker.outcome() - began)
    return statistics.median(spent), statistics.median(products)


def _wait_pinned(client: CacheClient) -> None:
    """Return when the arena that this process maps is pinned. Raises RuntimeError where it does not come to that."""
    arena, deadline = client.connection.map, time.monotonic() + _PINNED_S
    assert arena is not None
    while True:
        edges, pinned = pieces.steps()
        inside = pinned[(edges >= address(arena)) & (edges < address(arena) + len(arena))]
        if len(inside) and inside.all():
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"of the arena {int(inside.sum())} of {len(inside)} pieces are pinned; see the log")
        time.sleep(0.01)


def _fits(shape: Shape, tokens: int, cuda: bool) -> bool:
    """Whether the machine has room: twice on the device, for the check, and an arena."""
    nbytes = tokens // _BLOCK_TOKENS * shape.block_bytes
    free = torch.cuda.mem_get_info()[0] if cuda else nbytes * 3
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return bool(2.2 * nbytes < free and 1.5 * nbytes + _SPARE < host)
