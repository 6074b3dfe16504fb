# SPDX-License-Identifier: Apache-2.0
"""Loads that a step waits for layer by layer, on a device that does everything as late as CUDA allows, or computes as
early: the stream that computes reads no layer before its bytes are there, the engine's thread waits for no copy before
the step's end, and what is reported has ended.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, Store
from loracache.connectors.vllm.link import worker as link_module
from loracache.connectors.vllm.link.pinned import pieces
from loracache.connectors.vllm.worker import by_layer
from loracache.connectors.vllm.worker.by_layer import StepLoads
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.storer import StoreJob, Storer
from loracache.kernels.page_copy import CopyError, PageCopier
from loracache.kernels.page_copy.device import Direction, SourceOrder
from loracache.kernels.page_copy.recording import RecordingDevice
from loracache.keys import Namespace, object_key

LAYERS, WORDS, COUNT = 6, 256, 4  # layers, words of a block of each, chunks of a block each
STRAIGHT, BOUNCING = 0, 1 << 20
SPACE = Namespace("m" * 64, "float32", "rows", 1)


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB")


class Watched(RecordingDevice):
    """Which threads waited for it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waiters: set[threading.Thread] = set()

    def happened(self, event: Any) -> bool:
        self.waiters.add(threading.current_thread())
        return super().happened(event)

    def synchronize(self, event: Any) -> None:
        self.waiters.add(threading.current_thread())
        super().synchronize(event)


class Gpu:
    """Sixteen blocks of six layers on a recording device, a loader, a storer, and a stream that computes."""

    def __init__(self, url: str, objects: Any, seed: int, bounce_below: int, refuses: Any = ()) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layers = [torch.randint(1, 1 << 60, (16, WORDS), generator=generator) for _ in range(LAYERS)]
        self.content = [layer[:COUNT].clone() for layer in self.layers]
        self.read = torch.zeros(LAYERS, COUNT, WORDS, dtype=torch.int64)
        self._junk = torch.full((8, WORDS), -1)
        known = [(each.data_ptr(), each.nbytes) for each in [*self.layers, self.read, self._junk]]
        self.device = Watched(seed, steps=pieces.steps, device_memory=known, refuses=refuses)
        self.stream = self.device.stream(Direction.STORE)
        copiers = [
            PageCopier(self.layers, pieces=pieces, device=self.device, bounce_below=bounce_below) for _ in range(2)
        ]
        self.keys = [os.urandom(32) for _ in range(COUNT)]
        self.done: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.loader = Loader(
            url, lambda: None, copiers[0], objects, 20.0, lambda load: True, lambda *what: self.done.put(what)
        )
        self._storer = Storer(
            url, lambda: None, copiers[1], objects, lambda store: True, lambda *what: self.done.put(what)
        )
        caches = {f"layer.{number}": layer.unsqueeze(1).unsqueeze(1) for number, layer in enumerate(self.layers)}
        self.step_loads = StepLoads(self.layers, caches)
        self.step_loads._on_gpu = True

    def store(self) -> None:
        plan = tuple(ChunkBlocks(key, (number,)) for number, key in enumerate(self.keys))
        self._storer.submit(StoreJob(Store("s", SPACE, b"", plan, None, 1), None))
        assert self.done.get(timeout=20)[1] == {}

    def step(self, name: str = "l", *, early: bool = False) -> tuple[bool, list[int], dict[str, int]]:
        """Load all chunks eight blocks behind, into blocks that the step before still writes to, and read each layer
        of them on the stream that computes; answers what the end of the step says. early: that stream runs as soon as
        it may, else not before all has ended."""
        self.device.waiters.clear()
        for layer in self.layers:
            self._copy(layer[8 : 8 + COUNT], self._junk[:COUNT])
        after = self.device.event()
        self.device.record(after, self.stream)
        plan = tuple(ChunkBlocks(key, (number + 8,)) for number, key in enumerate(self.keys))
        load = Load(name, plan, None, 1, within_step=True)
        self.loader.submit(load, after, self.step_loads.begin(load, 7))
        for number, layer in enumerate(self.layers):
            self.step_loads.wait_for_layer(f"layer.{number}")
            self._copy(self.read[number], layer[8 : 8 + COUNT])
            if early:
                self.device.run_ahead(self.stream)
        assert threading.main_thread() not in self.device.waiters
        ((ended, waited),) = self.step_loads.end(self.loader.alive)
        assert ended is load
        _, failed, causes = self.done.get(timeout=0)  # it was reported by then
        return waited, failed, causes

    def compute_to_its_end(self) -> None:
        event = self.device.event()
        self.device.record(event, self.stream)
        self.device.synchronize(event)

    def drain(self) -> None:
        while self.device.advance():
            pass

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        to, of = (np.array([each.data_ptr()], np.int64) for each in (target, source))
        while True:
            try:
                self.device.copy(to, of, np.array([target.nbytes], np.int64), self.stream, SourceOrder.STREAM)
                return
            except CopyError:  # one of those that are refused
                continue

    def close(self) -> None:
        self.loader.close()
        self._storer.close()


@pytest.fixture
def make_gpu(running: Any, plain_objects: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Gpu]]:
    host = SimpleNamespace(register=lambda start, nbytes: 0, unregister=lambda start: 0)
    monkeypatch.setattr(link_module, "CudaHost", lambda: host)
    monkeypatch.setattr(by_layer, "_SLICE_BYTES", 2 * COUNT * WORDS * 8)  # two layers
    made: list[Gpu] = []

    def make(*arguments: Any) -> Gpu:
        made.append(Gpu(running.url, plain_objects(LAYERS * WORDS * 8), *arguments))
        gpu = made[-1]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=gpu.stream))
        gpu.store()
        return gpu

    yield make
    for gpu in made:
        gpu.close()


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("bounce_below", [STRAIGHT, BOUNCING], ids=["straight", "bouncing"])
@pytest.mark.parametrize("seed", range(4))
def test_no_layer_is_read_before_its_bytes_are_there(
    make_gpu: Any, running: Any, seed: int, bounce_below: int, early: bool
) -> None:
    gpu = make_gpu(seed, bounce_below)
    for round_ in range(3):
        gpu.read.zero_()
        assert gpu.step(f"l{round_}", early=early) == (True, [], {})
        for layer, content in zip(gpu.layers, gpu.content, strict=True):
            assert torch.equal(layer[8 : 8 + COUNT], content), "it was reported before it was there"
        assert early or not gpu.read.any(), "the computing stream has not run yet"
        gpu.compute_to_its_end()
        assert all(map(torch.equal, gpu.read, gpu.content))
    assert gpu.step_loads.take_news() == {}
    assert running.status()["leases"] == 0


def test_a_slice_is_as_few_layers_as_are_worth_a_submission(make_gpu: Any) -> None:
    gpu = make_gpu(1, STRAIGHT)
    gpu.step()
    loads = [nbytes for what, direction, _, nbytes in gpu.device.submitted if direction is Direction.LOAD]
    assert loads == [2 * COUNT * WORDS * 8] * 3


@pytest.mark.parametrize("bounce_below", [STRAIGHT, BOUNCING], ids=["straight", "bouncing"])
@pytest.mark.parametrize("seed", range(4))
def test_a_slice_that_the_device_refuses_fails_the_load_and_nothing_is_written_late(
    make_gpu: Any, running: Any, seed: int, bounce_below: int
) -> None:
    rng = random.Random(seed)
    gpu = make_gpu(seed, bounce_below, {number for number in range(10, 300) if rng.random() < 0.2})
    for round_ in range(6):
        waited, failed, causes = gpu.step(f"l{round_}")
        assert failed == ([8, 9, 10, 11] if causes else [])
        assert waited
        before = [layer.clone() for layer in gpu.layers]
        gpu.drain()
        if failed:
            assert all(map(torch.equal, gpu.layers, before)), "it was written after it was reported"
    assert running.status()["leases"] == 0


def test_a_wrong_chunk_is_known_at_the_end_of_the_step(make_gpu: Any, running: Any) -> None:
    gpu = make_gpu(1, STRAIGHT)
    with running.client().acquire([object_key(gpu.keys[2], "s")]) as reading:
        reading.slots[0].buffers[0][100] ^= 1
    assert gpu.step() == (True, [10], {"checksum": 1})
    assert gpu.step("again")[2] == {"absent": 1}


def test_a_wait_that_the_device_refuses_fails_the_load(make_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make_gpu(1, STRAIGHT)
    main, wait = threading.main_thread(), gpu.device.wait

    def refuse(stream: Any, event: Any) -> None:
        if threading.current_thread() is main:
            raise CopyError("cuStreamWaitEvent: CUDA_ERROR_INVALID_HANDLE")
        wait(stream, event)

    monkeypatch.setattr(gpu.device, "wait", refuse)
    assert gpu.step() == (False, [], {})


def test_a_step_goes_on_without_a_daemon_that_says_nothing_and_its_load_has_failed(
    make_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = make_gpu(1, STRAIGHT)
    monkeypatch.setattr(gpu.loader._link.connection, "take", lambda number: None)
    monkeypatch.setattr(by_layer, "_PATIENCE_S", 60.0)
    began = time.monotonic()
    assert gpu.step() == (False, [8, 9, 10, 11], {"deadline": 1})
    assert time.monotonic() - began < 20  # the loader gives up before the step does


def test_a_loader_that_died_holds_up_no_step(make_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_layer, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(by_layer, "_LOOK_S", 0.05)
    gpu = make_gpu(1, STRAIGHT)
    gpu.loader.close()
    load = Load("l", (ChunkBlocks(gpu.keys[0], (8,)),), None, 1, within_step=True)
    gpu.loader.submit(load, None, gpu.step_loads.begin(load, 1))
    gpu.step_loads.wait_for_layer("layer.0")
    assert gpu.step_loads.end(gpu.loader.alive) == [(load, False)]


def test_a_step_that_loads_nothing_only_looks(make_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make_gpu(1, STRAIGHT)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("it asked for the stream"))
    submitted = len(gpu.device.submitted)
    for number in range(LAYERS):
        gpu.step_loads.wait_for_layer(f"layer.{number}")
    assert gpu.step_loads.end(gpu.loader.alive) == []
    assert len(gpu.device.submitted) == submitted
    assert gpu.step_loads.take_news() == {}


def test_rows_and_layers_of_every_layout() -> None:
    """Each layer waits for the last row that holds some of it: one of its own, one a head, or one for all."""
    from loracache.connectors.vllm.worker.layout import last_rows, read_layout

    tensors = {f"l{number}": torch.zeros(4, 2, 16, 8) for number in range(3)}
    assert last_rows(tensors, read_layout(tensors, 4).rows) == {"l0": 0, "l1": 1, "l2": 2}
    assert last_rows(tensors | {"shares": tensors["l1"]}, read_layout(tensors, 4).rows)["shares"] == 1
    heads = {f"l{number}": torch.zeros(2, 4, 16, 8).transpose(0, 1) for number in range(3)}
    assert last_rows(heads, read_layout(heads, 4).rows) == {"l0": 1, "l1": 3, "l2": 5}
    blocks = torch.zeros(4, 3, 2, 16, 8)
    joined = {f"l{number}": blocks[:, number] for number in range(3)}
    assert last_rows(joined, read_layout(joined, 4).rows) == {"l0": 0, "l1": 0, "l2": 0}


def test_a_slice_is_at_least_a_mebibyte() -> None:
    assert by_layer._slices([8, 8, 8], 1) == [slice(0, 3)]
    assert by_layer._slices([1 << 20] * 3, 1) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert by_layer._slices([1 << 18] * 5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
