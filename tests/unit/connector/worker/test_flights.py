# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of a device that copies by itself: nothing is let go, committed, hashed or reported before the bytes
have arrived, one submission takes all that is there, and a copy that fails is its own load's or store's affair.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, Store
from loracache.connectors.vllm.worker import hashers as hashers_module
from loracache.connectors.vllm.worker.hashers import Hashers, cores_for_hashing
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.storer import StoreJob, Storer
from loracache.kernels.page_copy import PageCopier
from loracache.keys import Namespace, checksum, object_key

SIZE, BLOCKS = 4096, 16
SPACE = Namespace("m" * 64, "float32", "rows", 1)


class Engine:
    """Blocks of a chunk each, loader and storer with a late device each. `done` gets what they report."""

    def __init__(self, url: str, copier: type[PageCopier], timeout: float = 20.0) -> None:
        self.rows = torch.zeros(BLOCKS, SIZE // 8, dtype=torch.int64)
        self.keys = [os.urandom(32) for _ in range(8)]
        self.done: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.into: Any = copier((self.rows,))
        self.out: Any = copier((self.rows,))
        self.may = True
        put = lambda *what: self.done.put(what)  # noqa: E731
        ensure = lambda: None  # noqa: E731
        self.loader = Loader(url, ensure, self.into, "s", SIZE, timeout, lambda load: self.may, put)
        self.storer = Storer(url, ensure, self.out, "s", SIZE, lambda store: True, put)
        self.storer._flight_bytes = SIZE  # as if the chunks were large

    def fill(self) -> None:
        self.rows.copy_(torch.randint(1, 1 << 60, self.rows.shape, generator=torch.Generator().manual_seed(5)))

    def store(self, *numbers: int) -> StoreJob:
        """Chunks out of the blocks of their numbers."""
        plan = tuple(ChunkBlocks(self.keys[number], (number,)) for number in numbers)
        job = StoreJob(Store("s", SPACE, self.keys[numbers[0] - 1] if numbers[0] else b"", plan, None, 1))
        self.storer.submit(job)
        return job

    def load(self, *numbers: int, name: str = "l") -> None:
        """Chunks into the blocks eight behind."""
        self.loader.submit(
            Load(name, tuple(ChunkBlocks(self.keys[number], (number + 8,)) for number in numbers), None, 1)
        )

    def ended(self) -> tuple[Any, ...]:
        return self.done.get(timeout=20)[1:]

    def close(self) -> None:
        for copier in (self.into, self.out):
            copier.may.set()
        self.storer.close()
        self.loader.close()
        assert self.done.empty()
        assert not self.loader._thread.is_alive()
        assert not self.storer._thread.is_alive()


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB")


@pytest.fixture
def make_engine(late_copier: Any) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(url: str, **options: Any) -> Engine:
        made.append(Engine(url, late_copier, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(running: Any, make_engine: Any) -> Engine:
    """Eight chunks in its blocks, and four of them in the daemon."""
    engine: Engine = make_engine(running.url)
    engine.fill()
    engine.store(0, 1, 2, 3)
    assert engine.ended() == ({},)
    engine.out.gathers.clear()
    engine.rows[8:] = 0
    return engine


def same(engine: Engine, *numbers: int) -> bool:
    return all(torch.equal(engine.rows[number], engine.rows[number + 8]) for number in numbers)


def cpu(running: Any) -> int:
    return running.status()["tiers"]["cpu"]["used_bytes"]  # type: ignore[no-any-return]


# -- loads -------------------------------------------------------------------------------------------------------------


def test_a_load_of_what_is_there_is_one_submission_and_held_until_its_bytes_have_arrived(
    engine: Engine, running: Any, eventually: Any
) -> None:
    engine.into.may.clear()
    engine.load(0, 1, 2, 3)
    eventually(lambda: engine.into.scatters, "it is submitted")
    assert [len(moves) for moves, _ in engine.into.scatters] == [4]
    with pytest.raises(queue.Empty):
        engine.done.get(timeout=0.3)
    assert running.status()["leases"] == 1
    engine.into.may.set()
    assert engine.ended() == ([], {})
    assert same(engine, 0, 1, 2, 3)
    assert running.status()["leases"] == 0


def test_checksums_of_a_load_are_computed_while_it_flies(
    engine: Engine, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[threading.Thread] = []

    def watched(payload: Any) -> int:
        hashed.append(threading.current_thread())
        return checksum(payload)

    monkeypatch.setattr(hashers_module, "checksum", watched)
    engine.into.may.clear()
    engine.load(0, 1)
    eventually(lambda: len(hashed) == 2, "both are hashed before the copy has ended")
    assert engine.loader._thread not in hashed
    engine.into.may.set()
    assert engine.ended() == ([], {})


def test_a_wrong_chunk_fails_though_it_was_copied_and_is_not_served_again(engine: Engine, running: Any) -> None:
    with running.client().acquire([object_key(engine.keys[1], "s")]) as reading:
        reading.slots[0].buffers[0][100] ^= 1
    engine.load(0, 1, 2)
    assert engine.ended() == ([9], {"checksum": 1})
    assert same(engine, 0, 2)
    engine.load(1)
    assert engine.ended() == ([9], {"absent": 1})


@pytest.mark.parametrize("how", ["refuses", "fails"])
def test_a_copy_that_fails_fails_its_own_load_alone(engine: Engine, running: Any, how: str) -> None:
    setattr(engine.into, how, lambda moves: [8] in [list(move.blocks) for move in moves])
    for numbers in ((0, 1), (2, 3)):
        engine.load(*numbers, name=str(numbers))
    ended = {load.request_id: rest for load, *rest in (engine.done.get(timeout=20) for _ in range(2))}
    assert ended == {"(0, 1)": [[8, 9], {"copy_failed": 2}], "(2, 3)": [[], {}]}
    assert same(engine, 2, 3)
    assert running.status()["leases"] == 0


def test_a_bug_that_a_load_meets_is_not_the_others(engine: Engine, running: Any, eventually: Any) -> None:
    engine.into.may.clear()
    engine.load(2, 3, name="before")
    eventually(lambda: engine.into.scatters)
    engine.into.refuses = lambda moves: 1 / 0 > 0
    engine.load(0, name="bug")
    assert engine.ended() == ([8], {"bug": 1})
    engine.into.may.set()
    assert engine.ended() == ([], {})
    assert same(engine, 2, 3)
    assert running.status()["leases"] == 0


def test_a_shut_down_waits_for_what_was_submitted(engine: Engine, eventually: Any) -> None:
    engine.into.may.clear()
    engine.load(0, 1)
    eventually(lambda: engine.into.scatters)
    closing = threading.Thread(target=engine.loader.close)
    closing.start()
    with pytest.raises(queue.Empty):
        engine.done.get(timeout=0.3)
    engine.into.may.set()
    assert engine.ended() == ([8, 9], {"shutdown": 1})
    assert engine.into.scatters[0][1].ended
    closing.join(5)


# -- stores ------------------------------------------------------------------------------------------------------------


def test_a_store_is_few_submissions_two_under_way_and_visible_when_they_have_ended(
    engine: Engine, running: Any, eventually: Any
) -> None:
    engine.out.may.clear()
    engine.storer._flight_bytes = 2 * SIZE
    engine.store(4, 5, 6, 7)
    eventually(lambda: len(engine.out.gathers) == 2)
    assert [len(moves) for moves, _ in engine.out.gathers] == [2, 2]
    assert running.client().lookup([object_key(engine.keys[4], "s")]).hits == 0
    engine.out.may.set()
    assert engine.ended() == ({},)
    engine.load(4, 5, 6, 7)
    assert engine.ended() == ([], {})  # and their checksums are of what arrived
    assert same(engine, 4, 5, 6, 7)


def test_stores_under_way_are_bounded_and_no_load_waits_behind_them(engine: Engine, eventually: Any) -> None:
    engine.out.may.clear()
    engine.store(4, 5, 6, 7)
    eventually(lambda: len(engine.out.gathers) == 2)
    for number in (4, 5, 6):
        engine.store(number)
    engine.load(0, 1)
    assert engine.ended() == ([], {})
    assert len(engine.out.gathers) == 2
    engine.out.may.set()
    assert [engine.ended() for _ in range(4)] == [({},)] * 4


@pytest.mark.parametrize("how", ["refuses", "fails"])
def test_a_store_whose_copy_fails_gives_its_lease_up_after_the_other_copies(
    engine: Engine, running: Any, eventually: Any, how: str
) -> None:
    """What is under way would write into memory that was given to others."""
    before = cpu(running)
    engine.out.may.clear()
    number = 5 if how == "refuses" else 4
    setattr(engine.out, how, lambda moves: list(moves[0].blocks) == [number])
    engine.store(4, 5, 6)
    eventually(lambda: engine.out.gathers)
    with pytest.raises(queue.Empty):
        engine.done.get(timeout=0.3)
    assert cpu(running) == before + 3 * SIZE
    engine.out.may.set()
    assert engine.ended() == ({"copy_failed": 3},)
    assert all(copy.ended for _, copy in engine.out.gathers)
    eventually(lambda: cpu(running) == before, "nothing is reserved any more")
    assert running.status()["leases"] == 0
    engine.out.refuses = engine.out.fails = lambda moves: False
    engine.store(4, 5, 6)
    assert engine.ended() == ({},)


@pytest.mark.parametrize("numbers", [(4, 5), (4, 5, 6, 7)])
def test_a_store_given_up_while_it_flies_is_waited_for_and_not_kept(
    engine: Engine, running: Any, eventually: Any, numbers: tuple[int, ...]
) -> None:
    before = cpu(running)
    engine.out.may.clear()
    job = engine.store(*numbers)
    eventually(lambda: len(engine.out.gathers) == 2)
    giving_up = threading.Thread(target=job.gate.shut)
    giving_up.start()
    giving_up.join(0.2)
    assert giving_up.is_alive()
    engine.out.may.set()
    giving_up.join(5)
    assert not giving_up.is_alive()
    engine.rows[4:8] = 7  # by whom the blocks belong to now
    assert engine.ended() == ({"cancelled": 1},)
    assert len(engine.out.gathers) == 2  # nothing was submitted any more
    eventually(lambda: cpu(running) == before)


# -- checksums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_checksums_come_in_the_payloads_order(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashers_module, "_RUN", 64)
    payloads = [[memoryview(os.urandom(24)), memoryview(os.urandom(8))] for _ in range(7)]
    hashers = Hashers(threads)
    assert hashers.start(payloads)() == [checksum(payload) for payload in payloads]
    assert hashers.start([])() == []
    hashers.close()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (16, 2), (32, 4), (192, 4)])
def test_an_engine_on_a_cpu_keeps_its_cores(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashers_module, "os", SimpleNamespace(sched_getaffinity=lambda pid: set(range(cores))))
    assert cores_for_hashing("cuda") == threads
    assert cores_for_hashing("cpu") == 0
