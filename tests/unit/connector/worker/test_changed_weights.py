# SPDX-License-Identifier: Apache-2.0
"""The workers' side when weights change in place, when blocks are freed early, and when the KV cache sleeps."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, StepPlan, Store
from loracache.connectors.vllm.worker import side as worker_module
from loracache.connectors.vllm.worker.side import WorkerSide
from loracache.keys import Namespace

NAMESPACE = Namespace("m" * 64, "float32", "cpu/H.N.C", 16)


def store(name: str, key: bytes, block: int) -> Store:
    return Store(name, NAMESPACE, b"", (ChunkBlocks(key, (block,)),), None, 1)


def load(name: str, key: bytes, block: int) -> Load:
    return Load(name, (ChunkBlocks(key, (block,)),), None, 16)


def step(side: WorkerSide, number: int, **plan: Any) -> None:
    whole = StepPlan(step=number, **plan)
    side.handle_preemptions(whole)
    side.start_loads(whole)
    side.take_stores(whole)
    side.start_stores()


def idle(side: WorkerSide, eventually: Any) -> None:
    eventually(lambda: not side._storing, "the stores end")


def reload(side: WorkerSide) -> dict[int, int]:
    """Weights are replaced; what the scheduler believes once it knows."""
    with side.weights.change():
        pass
    return {0: side.weights.version}


def test_nothing_planned_for_other_weights_is_stored_or_loaded(daemon: Any, make_side: Any, eventually: Any) -> None:
    running = daemon()
    side = make_side(running.url)
    key = os.urandom(32)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    known = reload(side)
    step(side, 2, stores=[store("t", os.urandom(32), 1)], loads=[load("a", key, 5)])
    reported: set[str] = set()
    eventually(lambda: reported.update(side.take_finished()[1]) or reported, "the load ends")
    assert side.take_load_errors() == {5}
    assert running.status()["tiers"]["cpu"]["objects"] == 1
    news = side.take_news()
    assert news.failures == {"store.weights_changed": 1, "load.weights_changed": 1}
    assert news.weights == {0: (known[0], 1)}
    step(side, 3, weights=known, stores=[store("t", os.urandom(32), 1)])
    idle(side, eventually)
    assert running.status()["tiers"]["cpu"]["objects"] == 2


def test_a_change_between_load_and_first_run_fails_the_load_in_the_next_step(
    daemon: Any, make_side: Any, eventually: Any
) -> None:
    side = make_side(daemon().url)
    key = os.urandom(32)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("a", key, 5)])
    eventually(lambda: side.take_finished()[1], "the load ends")
    assert side.take_load_errors() == set()
    known = reload(side)
    step(side, 3)
    assert side.take_load_errors() == {5}
    # The scheduler heard of it meanwhile. By now the blocks are computed, and they are not wrong again.
    step(side, 4, weights=known, void={"a"}, first_runs={"a"})
    assert side.take_load_errors() == set()
    assert side.take_news().failures == {"load.weights_changed": 1}


def test_what_a_look_finds_counts_for_the_plan_that_asked_for_it(
    daemon: Any, make_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make_side(daemon().url)
    looks = iter([b"old", b"new"])
    monkeypatch.setattr(side.weights, "_look", lambda: next(looks))
    step(side, 1)
    step(side, 2, check_weights=True, stores=[store("s", os.urandom(32), 0)])
    assert not side._storing
    assert side.take_news().failures == {"store.weights_changed": 1}


# -- blocks freed before their stores are done -------------------------------------------------------------------------


def test_stores_of_freed_blocks_end_before_the_step_computes(daemon: Any, make_side: Any, eventually: Any) -> None:
    running = daemon()
    side = make_side(running.url)
    keys = [os.urandom(32) for _ in range(20)]
    plan = StepPlan(step=1, stores=[store("a", key, 0) for key in keys], await_stores={"a"}, freed={"a"})
    side.handle_preemptions(plan)
    assert not side._storing
    assert running.status()["tiers"]["cpu"]["objects"] == 20
    side.start_loads(plan)
    side.take_stores(plan)
    side.start_stores()
    assert not side._storing  # none is stored twice
    assert side.take_finished() == ({"a"}, set())


def test_stores_of_freed_blocks_that_take_too_long_are_given_up(
    daemon: Any, make_side: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_STORES_PATIENCE_S", 0.1)
    running = daemon()
    side = make_side(running.url)
    copied = threading.Event()
    monkeypatch.setattr(side._storer._copier, "gather", lambda *arguments: copied.set())
    running.send(signal.SIGSTOP)
    side.handle_preemptions(StepPlan(step=1, stores=[store("a", os.urandom(32), 0)], freed={"a", "unknown"}))
    running.send(signal.SIGCONT)
    idle(side, eventually)
    assert not copied.is_set()
    assert side.take_news().failures == {"store.cancelled": 1}


# -- sleep -------------------------------------------------------------------------------------------------------------


def test_no_block_is_touched_while_the_kv_cache_sleeps(daemon: Any, make_side: Any, eventually: Any) -> None:
    running = daemon()
    side = make_side(running.url, load_timeout=60)
    keys = [os.urandom(32) for _ in range(2)]
    step(side, 1, stores=[store("s", keys[0], 0)])
    side.leave_blocks()  # what is queued is finished first
    assert running.status()["tiers"]["cpu"]["objects"] == 1
    side.leave_blocks()
    step(side, 2, stores=[store("t", keys[1], 1)], loads=[load("a", keys[0], 5)])
    eventually(lambda: side.take_finished()[1], "the load ends")
    assert side.take_load_errors() == {5}
    idle(side, eventually)
    assert running.status()["tiers"]["cpu"]["objects"] == 1
    side.return_to_blocks()
    step(side, 3, stores=[store("t", keys[1], 1)], loads=[load("b", keys[0], 6)])
    eventually(lambda: side.take_finished()[1], "the load ends")
    assert side.take_load_errors() == set()
    idle(side, eventually)
    assert running.status()["tiers"]["cpu"]["objects"] == 2


def test_loads_under_way_and_not_computed_upon_fail_when_the_kv_cache_sleeps(
    daemon: Any, make_side: Any, eventually: Any
) -> None:
    running = daemon()
    side = make_side(running.url, load_timeout=60)
    key = os.urandom(32)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("done", key, 5)])
    eventually(lambda: side.take_finished()[1], "the load ends")
    running.send(signal.SIGSTOP)
    step(side, 3, loads=[load("under way", key, 6)])
    side.leave_blocks()
    side.return_to_blocks()
    running.send(signal.SIGCONT)
    eventually(lambda: side.take_finished()[1], "the load ends")
    assert side.take_load_errors() == {5, 6}
    side.leave_blocks()  # said twice in vLLM 0.33
    assert side.take_news().failures == {"load.asleep": 2}
