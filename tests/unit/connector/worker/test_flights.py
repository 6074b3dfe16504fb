# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of a device that copies by itself: nothing is let go, committed, hashed or reported before the bytes
have arrived, one submission takes all that is there, and a copy that fails is its own load's or store's affair.
"""

from __future__ import annotations

import os
import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.worker import hashers as hashers_module
from loracache.connectors.vllm.worker.hashers import Hashers, cores_for_hashing
from loracache.keys import checksum, object_key

SIZE = 4096


@pytest.fixture(scope="module")
def running(module_daemon: Any) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB")


@pytest.fixture
def engine(running: Any, make_engine: Any, late_copier: Any) -> Any:
    """Eight chunks in its blocks, and four of them in the daemon."""
    engine = make_engine(running.url, late_copier)
    engine.fill()
    engine.store(0, 1, 2, 3)
    assert engine.ended() == ({},)
    engine.out.gathers.clear()
    engine.rows[8:] = 0
    return engine


def same(engine: Any, *numbers: int) -> bool:
    return all(torch.equal(engine.rows[number], engine.rows[number + 8]) for number in numbers)


def cpu(running: Any) -> int:
    return running.status()["tiers"]["cpu"]["used_bytes"]  # type: ignore[no-any-return]


# -- loads -------------------------------------------------------------------------------------------------------------


def test_a_load_of_what_is_there_is_one_submission_and_held_until_its_bytes_have_arrived(
    engine: Any, running: Any, eventually: Any
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
    engine: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
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


def test_a_wrong_chunk_fails_though_it_was_copied_and_is_not_served_again(engine: Any, running: Any) -> None:
    with running.client().acquire([object_key(engine.keys[1], "s")]) as reading:
        reading.slots[0].buffers[0][100] ^= 1
    engine.load(0, 1, 2)
    assert engine.ended() == ([9], {"checksum": 1})
    assert same(engine, 0, 2)
    engine.load(1)
    assert engine.ended() == ([9], {"absent": 1})


@pytest.mark.parametrize("how", ["refuses", "fails"])
def test_a_copy_that_fails_fails_its_own_load_alone(engine: Any, running: Any, how: str) -> None:
    setattr(engine.into, how, lambda moves: [8] in [list(move.blocks) for move in moves])
    for numbers in ((0, 1), (2, 3)):
        engine.load(*numbers, name=str(numbers))
    ended = {load.request_id: rest for load, *rest in (engine.done.get(timeout=20) for _ in range(2))}
    assert ended == {"(0, 1)": [[8, 9], {"copy_failed": 2}], "(2, 3)": [[], {}]}
    assert same(engine, 2, 3)
    assert running.status()["leases"] == 0


def test_a_bug_that_a_load_meets_is_not_the_others(engine: Any, running: Any, eventually: Any) -> None:
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


def test_a_shut_down_waits_for_what_was_submitted(engine: Any, eventually: Any) -> None:
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
    engine: Any, running: Any, eventually: Any
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


def test_stores_under_way_are_bounded_and_no_load_waits_behind_them(engine: Any, eventually: Any) -> None:
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
    engine: Any, running: Any, eventually: Any, how: str
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
    engine: Any, running: Any, eventually: Any, numbers: tuple[int, ...]
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
