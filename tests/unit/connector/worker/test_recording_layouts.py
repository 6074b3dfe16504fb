# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of both layouts, pinned and not, on a device that copies as late and as disorderly as CUDA
allows: what the engine computes late is what is stored, and what is reported has arrived."""

from __future__ import annotations

import os
import queue
from typing import Any

import numpy as np
import pytest
import torch

from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, Store
from loracache.connectors.vllm.link import pinned
from loracache.connectors.vllm.link import worker as link
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.connectors.vllm.worker.storer import StoreJob, Storer
from loracache.groups import Need
from loracache.kernels.page_copy import PageCopier, lane
from loracache.kernels.page_copy.device import Direction, SourceOrder
from loracache.kernels.page_copy.recording import RecordingDevice
from loracache.keys import Namespace

LAYERS, BLOCKS, WORDS = 3, 48, 64
CHUNKS = BLOCKS // 2
SIZE = LAYERS * WORDS * 8
SPACE = Namespace("m" * 64, "float32", "rows", 1)
OBJECTS = (GroupObjects(KVGroup(Need.ALL, 0, (Member(0, 1, ()),)), "s", (SIZE,)),)


class Host:
    """Pins everything, or refuses."""

    def __init__(self, error: int) -> None:
        self._error = error

    def register(self, start: int, nbytes: int) -> int:
        return self._error

    def unregister(self, start: int) -> int:
        return 0


def late(device: RecordingDevice, whole: torch.Tensor, content: torch.Tensor, kept: list[Any]) -> Any:
    """Have the engine compute `content` into the blocks, some time; answers the event that says it has. kept: gets what
    must stay until then."""
    stream, event = device.stream(Direction.LOAD), device.event()
    computed = device.allocate_host(content.nbytes)
    kept.append(computed)
    source = np.array([content.data_ptr()])
    device.copy(np.array([computed.address]), source, np.array([content.nbytes]), stream, SourceOrder.STREAM)
    target = np.array([whole.data_ptr()])
    device.copy(target, np.array([computed.address]), np.array([content.nbytes]), stream, SourceOrder.STREAM)
    device.record(event, stream)
    return event


@pytest.mark.parametrize("outermost", ["layer", "block"])
@pytest.mark.parametrize("bounce_below", [0, 1 << 40], ids=["straight", "bouncing"])
@pytest.mark.parametrize("error", [0, 2], ids=["pinned", "unpinned"])
def test_what_was_computed_late_is_stored_and_what_is_reported_has_arrived(
    daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch, outermost: str, bounce_below: int, error: int
) -> None:
    monkeypatch.setattr(lane, "SLOT_BYTES", 4 * SIZE)
    monkeypatch.setattr(link, "CudaHost", lambda: Host(error))
    monkeypatch.setattr(pinned, "_PIECE", 5 << 12)
    url = daemon(memory="1MiB", page_size="4KiB").url
    shape = (LAYERS, BLOCKS, WORDS) if outermost == "layer" else (BLOCKS, LAYERS, WORDS)
    whole = torch.zeros(shape, dtype=torch.int64)
    content = torch.randint(1, 1 << 60, shape, generator=torch.Generator().manual_seed(5))
    layers = whole.unbind(0) if outermost == "layer" else whole.unbind(1)
    device = RecordingDevice(3)
    kept: list[Any] = []
    copiers = [PageCopier(layers, pieces=pinned.pieces, device=device, bounce_below=bounce_below) for _ in range(2)]
    done: queue.Queue[tuple[Any, ...]] = queue.Queue()
    put = lambda *what: done.put(what)  # noqa: E731
    storer = Storer(url, lambda: None, copiers[0], OBJECTS, lambda store: True, put)
    loader = Loader(url, lambda: None, copiers[1], OBJECTS, 20.0, lambda load: True, put)
    try:
        if not error:
            eventually(lambda: int(pinned.pieces.steps()[1].sum()) >= (1 << 20) // (5 << 12), "the arena is pinned")
        keys = [os.urandom(32) for _ in range(CHUNKS)]
        blocks = np.random.default_rng(1).permutation(BLOCKS).tolist()
        stored = tuple(ChunkBlocks(key, (block,)) for key, block in zip(keys, blocks[:CHUNKS], strict=True))
        storer.submit(StoreJob(Store("s", SPACE, b"", stored, None, 1), late(device, whole, content, kept)))
        assert done.get(timeout=20)[1] == {}
        assert torch.equal(whole, content)
        loaded = tuple(ChunkBlocks(key, (block,)) for key, block in zip(keys, blocks[CHUNKS:], strict=True))
        noise = torch.flip(content, (0, 1, 2))  # what the blocks' last holder still writes
        loader.submit(Load("l", loaded, None, 1), late(device, whole, noise, kept))
        assert done.get(timeout=20)[1:] == ([], {})
        expected = noise.clone()
        axis = 1 if outermost == "layer" else 0
        expected.index_copy_(
            axis, torch.tensor(blocks[CHUNKS:]), content.index_select(axis, torch.tensor(blocks[:CHUNKS]))
        )
        assert torch.equal(whole, expected)
    finally:
        storer.close()
        loader.close()
    assert any(what == "launch" for what, *_ in device.submitted) == bool(bounce_below)
