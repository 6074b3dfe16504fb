# SPDX-License-Identifier: Apache-2.0
"""The worker's transfer threads against a real daemon: the right bytes, or blocks reported once and left alone."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loracache.client import link as client_link
from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import AdapterBinding, ChunkBlocks, Load, Store
from loracache.connectors.vllm.worker import loader as loader_module
from loracache.connectors.vllm.worker.layout import read_layout
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.connectors.vllm.worker.storer import StoreJob, Storer
from loracache.groups import Need
from loracache.kernels.page_copy import PageCopier
from loracache.keys import Namespace, object_key

BLOCKS, WIDTH, SHARD = 16, 2, "all"
NAMESPACE = Namespace("m" * 64, "float32", "cpu/H.N.C", 32)
KEYS = [os.urandom(32) for _ in range(4)]


class Worker:
    """One engine's memory and transfer threads. `done` gets (load, failed blocks, causes) or (job, causes)."""

    def __init__(self, url: str, timeout: float = 5.0, shape: tuple[int, ...] = (2, 16, 32)) -> None:
        self.caches = {f"layer{number}": torch.zeros(BLOCKS, *shape) for number in range(2)}
        self.layout = read_layout(self.caches, BLOCKS)
        self.done: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.may = True
        self.objects = (GroupObjects(KVGroup(Need.ALL, 0, (Member(0, 1, ()),)), SHARD, (self.layout.block_bytes,)),)
        self.loader = Loader(
            url,
            lambda: None,
            PageCopier(self.layout.rows),
            self.objects,
            timeout,
            lambda load: self.may,
            lambda *what: self.done.put(what),
        )
        self.storer = Storer(
            url,
            lambda: None,
            PageCopier(self.layout.rows),
            self.objects,
            lambda store: self.may,
            lambda *what: self.done.put(what),
        )

    def fill(self, seed: int = 1) -> None:
        torch.manual_seed(seed)
        for tensor in self.caches.values():
            tensor.copy_(torch.rand(tensor.shape))

    def blocks(self, *numbers: int) -> list[torch.Tensor]:
        return [tensor[number].clone() for tensor in self.caches.values() for number in numbers]

    def store_job(self, *chunks: tuple[int, tuple[int, ...]]) -> StoreJob:
        """A job that stores (number of a key, blocks) as a run of the chain."""
        first = chunks[0][0]
        plan = tuple(ChunkBlocks(KEYS[number], blocks) for number, blocks in chunks)
        return StoreJob(Store("r", NAMESPACE, KEYS[first - 1] if first else b"", plan, None, 1), None)

    def store(self, *chunks: tuple[int, tuple[int, ...]]) -> dict[str, int]:
        self.storer.submit(self.store_job(*chunks))
        return self.done.get(timeout=20)[1]  # type: ignore[no-any-return]

    def load(self, *chunks: tuple[Any, ...], adapter: Any = None, name: str = "r") -> Load:
        """Submit a load of (number of a key, blocks, the chunk's first of them)."""
        plan = tuple(ChunkBlocks(KEYS[number], blocks, *first) for number, blocks, *first in chunks)
        load = Load(name, plan, adapter, WIDTH)
        self.loader.submit(load)
        return load

    def loaded(self) -> tuple[list[int], dict[str, int]]:
        _, failed, causes = self.done.get(timeout=20)
        return failed, causes

    def close(self) -> None:
        self.storer.close()
        self.loader.close()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(*arguments: Any, **options: Any) -> Worker:
        made.append(Worker(*arguments, **options))
        return made[-1]

    yield make
    for worker in made:
        worker.close()
        assert worker.done.empty()  # nothing was reported twice
        assert not worker.loader._thread.is_alive()
        assert not worker.storer._thread.is_alive()


@pytest.fixture(autouse=True)
def fast_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_link, "RETRY_S", 0.05)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_one_engine_stored_another_loads(daemon: Any, make_worker: Any) -> None:
    running = daemon(page_size="4KiB")
    here, there = make_worker(running.url), make_worker(running.url)
    here.fill()
    assert here.store((0, (3, 9)), (1, (1, 15))) == {}
    there.load((0, (8,), 1), (1, (2, 0)))  # its own prefix ends inside the first chunk
    assert there.loaded() == ([], {})
    assert equal(there.blocks(8, 2, 0), here.blocks(9, 1, 15))
    assert not any(block.any() for block in there.blocks(*(set(range(BLOCKS)) - {8, 2, 0})))
    there.load((1, (4,), 0))  # part of a chunk from its beginning
    assert there.loaded() == ([], {})
    assert equal(there.blocks(4), here.blocks(1))
    assert running.status()["leases"] == 0


def test_a_store_of_what_is_there_is_no_failure_and_a_gap_is_one(daemon: Any, make_worker: Any) -> None:
    worker = make_worker(daemon().url)
    worker.fill()
    assert worker.store((0, (0, 1))) == {}
    assert worker.store((0, (0, 1))) == {}
    assert worker.store((2, (4, 5))) == {"no_parent": 1}


def test_what_is_absent_fails_alone(daemon: Any, make_worker: Any) -> None:
    worker = make_worker(daemon().url)
    worker.fill()
    worker.store((0, (0, 1)))
    worker.load((0, (8, 9)), (3, (10, 11)))
    assert worker.loaded() == ([10, 11], {"absent": 1})
    assert equal(worker.blocks(8, 9), worker.blocks(0, 1))


def test_bytes_that_do_not_match_are_never_scattered_nor_served_again(daemon: Any, make_worker: Any) -> None:
    running = daemon()
    worker = make_worker(running.url)
    worker.fill()
    worker.store((0, (0, 1)), (1, (2, 3)))
    before = worker.blocks(8, 9)
    client = running.client()
    with client.acquire([object_key(KEYS[0], SHARD)]) as reading:
        reading.slots[0].buffers[0][100] ^= 1
    worker.load((0, (8, 9)), (1, (10, 11)))
    assert worker.loaded() == ([8, 9], {"checksum": 1})
    assert equal(worker.blocks(8, 9), before)
    assert equal(worker.blocks(10, 11), worker.blocks(2, 3))
    worker.load((0, (8, 9)))
    assert worker.loaded() == ([8, 9], {"absent": 1})
    assert worker.store((0, (0, 1))) == {}  # and may be stored anew
    worker.load((0, (8, 9)))
    assert worker.loaded() == ([], {})
    assert equal(worker.blocks(8, 9), worker.blocks(0, 1))


def test_an_object_of_another_size_is_not_ours(daemon: Any, make_worker: Any) -> None:
    running = daemon()
    small, large = make_worker(running.url, shape=(1, 16, 32)), make_worker(running.url)
    small.fill()
    assert small.store((0, (0, 1))) == {}
    large.load((0, (8, 9)))
    assert large.loaded() == ([8, 9], {"size": 1})
    assert not any(block.any() for block in large.blocks(*range(BLOCKS)))


def test_chunks_may_have_any_number_of_blocks(daemon: Any, make_worker: Any) -> None:
    """The scheduler decides for all shards; a shard with larger blocks would have chosen fewer."""
    worker = make_worker(daemon().url)
    worker.fill()
    assert worker.store((0, (0, 1, 2, 3, 4))) == {}
    worker.loader.submit(Load("r", (ChunkBlocks(KEYS[0], (9, 10), 3),), None, 5))
    assert worker.loaded() == ([], {})
    assert equal(worker.blocks(9, 10), worker.blocks(3, 4))


def test_past_its_deadline_a_load_has_failed_and_nothing_comes_late(daemon: Any, make_worker: Any) -> None:
    running = daemon()
    worker = make_worker(running.url, timeout=1.0)
    worker.fill()
    worker.store((0, (0, 1)))
    before = worker.blocks(8, 9)
    running.send(signal.SIGSTOP)
    worker.load((0, (8, 9)))
    assert worker.loaded() == ([8, 9], {"deadline": 1})
    running.send(signal.SIGCONT)
    worker.load((0, (10, 11)), name="next")  # the next one works, its answer behind the late one
    assert worker.loaded() == ([], {})
    assert equal(worker.blocks(8, 9), before)
    assert equal(worker.blocks(10, 11), worker.blocks(0, 1))
    assert running.status()["leases"] == 0


def test_a_store_whose_copy_fails_gives_its_memory_back_at_once(
    daemon: Any, make_worker: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = daemon()
    worker = make_worker(running.url)

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(worker.storer._copier, "gather", fails)
    assert worker.store((0, (1, 2))) == {"bug": 1}
    eventually(lambda: running.status()["tiers"]["cpu"]["used_bytes"] == 0, "nothing is reserved", 5)


def test_a_lease_that_ended_meanwhile_fails_the_whole_load(
    daemon: Any, make_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = daemon()
    worker = make_worker(running.url)
    worker.fill()
    worker.store((0, (0, 1)))
    monkeypatch.setattr(loader_module, "_LEASE_MARGIN_S", -4.9)  # a lease of 0.1 s
    scatter = worker.loader._landing._copier.scatter

    def slow(*arguments: Any) -> Any:
        copy = scatter(*arguments)
        time.sleep(0.6)
        return copy

    monkeypatch.setattr(worker.loader._landing._copier, "scatter", slow)
    worker.load((0, (8, 9)))
    assert worker.loaded() == ([8, 9], {"lease_lost": 1})


def test_a_daemon_killed_during_a_load_fails_it_at_once_and_its_successor_works(
    daemon: Any, make_worker: Any, eventually: Any
) -> None:
    running = daemon()
    worker = make_worker(running.url, timeout=40.0)
    worker.fill()
    worker.store((0, (0, 1)))
    before = worker.blocks(8, 9)
    running.send(signal.SIGSTOP)
    worker.load((0, (8, 9)))
    started = time.monotonic()
    running.stop(signal.SIGKILL)
    assert worker.loaded() == ([8, 9], {"unavailable": 1})
    assert time.monotonic() - started < 20
    assert equal(worker.blocks(8, 9), before)
    worker.load((0, (8, 9)))
    assert worker.loaded() == ([8, 9], {"unavailable": 1})
    assert worker.store((0, (0, 1)), (1, (2, 3))) == {"unavailable": 2}
    daemon(socket=running.socket)
    time.sleep(0.1)
    eventually(lambda: worker.store((0, (0, 1))) == {}, "the new daemon takes stores")

    def loads() -> bool:
        worker.load((0, (8, 9)))
        return bool(worker.loaded() == ([], {}))

    eventually(loads, "the new daemon serves loads")
    assert equal(worker.blocks(8, 9), worker.blocks(0, 1))


def test_a_load_for_another_adapter_is_not_begun(daemon: Any, make_worker: Any) -> None:
    worker = make_worker(daemon().url)
    worker.fill()
    worker.store((0, (0, 1)))
    before = worker.blocks(8, 9)
    worker.may = False
    worker.load((0, (8, 9)), adapter=AdapterBinding(1, "a" * 64))
    assert worker.loaded() == ([8, 9], {"adapter_changed": 1})
    assert equal(worker.blocks(8, 9), before)
    assert worker.store((1, (2, 3))) == {"adapter_changed": 1}


def test_an_adapter_that_changes_during_a_load_fails_it(daemon: Any, make_worker: Any, monkeypatch: Any) -> None:
    worker = make_worker(daemon().url)
    worker.fill()
    worker.store((0, (0, 1)))
    scatter = worker.loader._landing._copier.scatter

    def changes(*arguments: Any) -> Any:
        worker.may = False
        return scatter(*arguments)

    monkeypatch.setattr(worker.loader._landing._copier, "scatter", changes)
    worker.load((0, (8, 9)), adapter=AdapterBinding(1, "a" * 64))
    assert worker.loaded() == ([8, 9], {"adapter_changed": 1})


def test_after_cancel_no_byte_of_the_blocks_is_read(daemon: Any, make_worker: Any, monkeypatch: Any) -> None:
    running = daemon()
    worker = make_worker(running.url)
    worker.fill()
    inside, go = threading.Event(), threading.Event()
    gathered: list[Any] = []
    gather = worker.storer._copier.gather

    def watched(moves: Any, after: Any) -> Any:
        inside.set()
        go.wait(5)
        copy = gather(moves, after)
        gathered.extend(tuple(move.blocks) for move in moves)
        return copy

    monkeypatch.setattr(worker.storer._copier, "gather", watched)
    job, later = worker.store_job((0, (0, 1)), (1, (2, 3))), worker.store_job((0, (4, 5)))
    later.gate.shut()
    worker.storer.submit(job)
    worker.storer.submit(later)
    assert inside.wait(5)
    canceller = threading.Thread(target=job.gate.shut)
    canceller.start()
    canceller.join(0.1)
    assert canceller.is_alive()  # a copy is under way: its blocks may not be given away yet
    go.set()
    canceller.join(5)
    seen = list(gathered)
    assert [worker.done.get(timeout=5)[1] for _ in range(2)] == [{"cancelled": 1}] * 2
    assert gathered == seen == [(0, 1)]
    status = running.status()
    assert (status["leases"], status["tiers"]["cpu"]["objects"], status["quarantined_bytes"]) == (0, 0, 0)
    assert status["tiers"]["cpu"]["used_bytes"] == 0


def test_closing_finishes_stores_and_gives_loads_up(daemon: Any) -> None:
    running = daemon()
    worker = Worker(running.url)
    worker.fill()
    for number in range(3):
        worker.storer.submit(worker.store_job((number, (2 * number, 2 * number + 1))))
    worker.storer.close()
    assert [worker.done.get_nowait()[1] for _ in range(3)] == [{}] * 3
    running.send(signal.SIGSTOP)
    loads = [worker.load((number, (8, 9)), name=str(number)) for number in range(3)]
    worker.loader.close()
    ended = [worker.done.get_nowait() for _ in range(3)]
    assert [load for load, _, _ in ended] == loads
    assert [(failed, causes) for _, failed, causes in ended] == [([8, 9], {"shutdown": 1})] * 3
    assert worker.done.empty()
    assert not worker.loader._thread.is_alive()


def test_every_job_ends_exactly_once_and_right_under_random_kills(daemon: Any) -> None:
    running = daemon()
    worker = Worker(running.url, timeout=0.5)
    worker.fill()
    original = worker.blocks(0, 1)
    rng = random.Random(7)
    ended: dict[str, tuple[list[int], dict[str, int]]] = {}
    submitted = stores = 0
    for _ in range(3):
        for _ in range(15):
            if rng.random() < 0.4:
                worker.storer.submit(worker.store_job((0, (0, 1))))
                stores += 1
            else:
                block = rng.randrange(2, BLOCKS - 1)
                worker.load((0, (block, block + 1)), name=str(submitted))
                submitted += 1
            if rng.random() < 0.2:
                time.sleep(0.02)
        running.stop(signal.SIGKILL)
        running = daemon(socket=running.socket)
    worker.close()
    with contextlib.suppress(queue.Empty):
        while True:
            job, *rest = worker.done.get_nowait()
            if isinstance(job, Load):
                assert job.request_id not in ended
                ended[job.request_id] = (rest[0], rest[1])
                assert rest[0] in ([], list(job.chunks[0].blocks))
                assert bool(rest[0]) == bool(rest[1])
            else:
                stores -= 1
    assert len(ended) == submitted
    assert stores == 0
    assert equal(worker.blocks(0, 1), original)
