# SPDX-License-Identifier: Apache-2.0
"""The worker's transfers on a device that does everything as late, and in as wild an order, as CUDA allows: no byte is
read before its event, none reported before it is there, none written after its load was reported, and the engine's
thread waits for nothing.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, StepPlan, Store
from loracache.connectors.vllm.link import worker as link_module
from loracache.connectors.vllm.link.pinned import pieces
from loracache.connectors.vllm.worker import side as side_module
from loracache.connectors.vllm.worker.gate import Gate, GatedCopier
from loracache.kernels.page_copy import CopyError, PageCopier
from loracache.kernels.page_copy.device import Direction, SourceOrder
from loracache.kernels.page_copy.recording import RecordingDevice
from loracache.keys import Namespace, object_key

STRAIGHT, BOUNCING = 0, 1 << 20  # bytes of fragments below which they bounce
COUNT = 4  # chunks


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB")


@pytest.fixture(autouse=True)
def pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's runtime that registers whatever it is asked to."""
    host = SimpleNamespace(register=lambda start, nbytes: 0, unregister=lambda start: 0)
    monkeypatch.setattr(link_module, "CudaHost", lambda: host)


class Gpu:
    """An engine's memory on a recording device, and the stream it computes on."""

    def __init__(self, seed: int, bounce_below: int, refuses: Any = ()) -> None:
        self.content = torch.randint(1, 1 << 60, (16, 512), generator=torch.Generator().manual_seed(seed))
        self.junk, self.instead = torch.full((512,), -1), torch.full((512,), 7)
        self._seed, self._below, self._refuses = seed, bounce_below, refuses
        self.device: Any = None
        self.engine: Any = None

    def copier(self, layers: Any) -> PageCopier:
        (rows,) = layers
        if self.device is None:
            known = [(each.data_ptr(), each.nbytes) for each in (rows, self.content, self.junk, self.instead)]
            self.device = RecordingDevice(self._seed, steps=pieces.steps, device_memory=known, refuses=self._refuses)
            self._stream = self.device.stream(Direction.STORE)
        return PageCopier(layers, pieces=pieces, device=self.device, bounce_below=self._below)

    def compute(self, block: int, result: torch.Tensor) -> Any:
        """Ask the GPU to write a block; answers the event after it."""
        where, what = (np.array([each.data_ptr()], np.int64) for each in (self.engine.rows[block], result))
        while True:
            try:
                self.device.copy(where, what, np.array([result.nbytes], np.int64), self._stream, SourceOrder.STREAM)
                break
            except CopyError:  # one of those that are refused
                continue
        event = self.device.event()
        self.device.record(event, self._stream)
        return event

    def store(self, count: int) -> Any:
        """Compute chunks into the first blocks, and store them."""
        after = [self.compute(block, self.content[block]) for block in range(count)][-1]
        return self.engine.store(*range(count), after=after)

    def load(self, count: int) -> None:
        """Load chunks into blocks that their last holder's step still writes to."""
        after = [self.compute(block + 8, self.junk) for block in range(count)][-1]
        self.engine.load(*range(count), after=after)

    def drain(self) -> None:
        """Let everything happen that was submitted."""
        while self.device.advance():
            pass

    def wrong(self, count: int, but: Any = ()) -> list[int]:
        blocks = [number + 8 for number in range(count) if number + 8 not in but]
        return [block for block in blocks if not torch.equal(self.engine.rows[block], self.content[block - 8])]


@pytest.fixture
def make_gpu(running: Any, make_engine: Any) -> Callable[..., Gpu]:
    def make(*arguments: Any) -> Gpu:
        gpu = Gpu(*arguments)
        gpu.engine = make_engine(running.url, gpu.copier)
        return gpu

    return make


@pytest.mark.parametrize("bounce_below", [STRAIGHT, BOUNCING], ids=["straight", "bouncing"])
@pytest.mark.parametrize("seed", range(5))
def test_bytes_are_read_after_their_event_and_reported_when_they_are_there(
    make_gpu: Any, running: Any, seed: int, bounce_below: int
) -> None:
    gpu = make_gpu(seed, bounce_below)
    gpu.store(COUNT)
    assert gpu.engine.ended() == ({},)
    with running.client().acquire([object_key(key, "s") for key in gpu.engine.keys[:COUNT]]) as reading:
        found = [slot.tobytes() for slot in reading.slots]
    assert found == [row.numpy().tobytes() for row in gpu.content[:COUNT]]
    gpu.load(COUNT)
    assert gpu.engine.ended() == ([], {})
    assert gpu.wrong(COUNT) == []
    gpu.drain()
    assert gpu.wrong(COUNT) == []  # nor does their last holder write to the blocks any more


@pytest.mark.parametrize("bounce_below", [STRAIGHT, BOUNCING], ids=["straight", "bouncing"])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_late_refused_or_given_up_nothing_wrong_is_kept_or_written_late(
    make_gpu: Any, running: Any, seed: int, bounce_below: int
) -> None:
    rng = random.Random(seed)
    gpu = make_gpu(seed, bounce_below, {number for number in range(200) if rng.random() < 0.15})
    for _ in range(4):
        count = rng.randint(1, COUNT)
        job = gpu.store(count)
        if rng.random() < 0.4:
            job.gate.shut()  # the blocks are somebody else's
            for block in range(count):
                gpu.compute(block, gpu.junk)
        gpu.engine.ended()
        gpu.load(count)
        failed, causes = gpu.engine.ended()
        assert bool(failed) == bool(causes)
        assert gpu.wrong(count, failed) == []
        for block in failed:
            gpu.compute(block, gpu.instead)
        gpu.drain()
        assert (gpu.engine.rows[failed] == gpu.instead).all()
    assert running.status()["leases"] == 0


class Watched(RecordingDevice):
    """Which thread asked it for what."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked: list[tuple[str, threading.Thread]] = []

    def happened(self, event: Any) -> bool:
        self.asked.append(("happened", threading.current_thread()))
        return super().happened(event)

    def synchronize(self, event: Any) -> None:
        self.asked.append(("synchronize", threading.current_thread()))
        super().synchronize(event)

    def copy(self, *arguments: Any) -> None:
        self.asked.append(("copy", threading.current_thread()))
        super().copy(*arguments)


def test_the_engines_thread_waits_for_no_copy(
    running: Any, make_side: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    """Nor asks the device for anything in a step that neither loads nor stores."""
    recorded: list[int] = []

    device = Watched(1)
    stream = device.stream(Direction.STORE)

    class OnDevice(GatedCopier):
        def __init__(self, layers: Any, bounce_below: Any) -> None:
            PageCopier.__init__(self, layers, pieces=pieces, device=device, bounce_below=STRAIGHT)
            self.gate = Gate()

    def record_event() -> Any:
        recorded.append(steps)
        event = device.event()
        device.record(event, stream)
        return event

    monkeypatch.setattr(side_module, "GatedCopier", OnDevice)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=record_event))
    side = make_side(running.url)
    side._cuda = True
    steps = 0

    def step(**plan: Any) -> tuple[set[str], set[str]]:
        nonlocal steps
        steps += 1
        whole = StepPlan(step=steps, **plan)
        side.handle_preemptions(whole)
        side.start_loads(whole)
        side.take_stores(whole)
        finished = side.take_finished()
        side.take_load_errors()
        side.take_news()
        side.start_stores()
        return finished  # type: ignore[no-any-return]

    space, key = Namespace("m" * 64, "float32", "cpu/H.N.C", 16), os.urandom(32)
    chunks = (ChunkBlocks(key, (0,)),)
    step(stores=[Store("s", space, b"", chunks, None, 1)])
    eventually(lambda: not side._storing, "it is stored")
    step(loads=[Load("l", (ChunkBlocks(key, (5,)),), None, 16)])
    eventually(lambda: "l" in step()[1], "it is loaded")
    assert torch.equal(side._copiers[0]._layers[0][0], side._copiers[0]._layers[0][5])
    assert recorded == [1, 2]
    assert {what for what, _ in device.asked} >= {"copy", "synchronize"}
    assert threading.main_thread() not in {thread for _, thread in device.asked}
