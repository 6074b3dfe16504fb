# SPDX-License-Identifier: Apache-2.0
"""The worker's side: every plan is carried out, every result is reported once and in the step it is due."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.common.messages import (
    AdapterBinding,
    ChunkBlocks,
    Facts,
    GroupFacts,
    Load,
    StepPlan,
    Store,
    WorkerNews,
)
from loracache.connectors.vllm.worker.side import WorkerSide
from loracache.errors import Unavailable
from loracache.kernels.page_copy import PageCopier
from loracache.keys import Namespace

BLOCKS = 8
NAMESPACE = Namespace("m" * 64, "float32", "cpu/H.N.C", 16)
OLD, NEW = "a" * 64, "b" * 64


def chunk(key: bytes, *blocks: int) -> ChunkBlocks:
    return ChunkBlocks(key, blocks)


def test_an_engine_that_names_a_dead_daemon_does_not_start(make_side: Any, short_tmp: Path) -> None:
    with pytest.raises(Unavailable, match="loracache serve"):
        make_side(f"unix://{short_tmp}/nobody.sock")


def test_a_private_daemon_is_there_from_the_first_step_on(
    make_side: Any, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
    side = make_side("", memory="16MiB")
    step(side, 1, stores=[store("a", os.urandom(32), 0)], await_stores={"a"})
    assert finished(side, eventually) == ({"a"}, set())
    assert side.take_news().failures == {}
    (log,) = short_tmp.glob("*/*.log")
    assert log.read_text().count("listening on") == 1
    side.close()
    eventually(lambda: not log.exists(), "the daemon ends with the engine, and leaves nothing behind")


def store(name: str, key: bytes, *blocks: int, adapter: AdapterBinding | None = None, first_step: int = 1) -> Store:
    return Store(name, NAMESPACE, b"", (chunk(key, *blocks),), adapter, first_step)


def load(name: str, key: bytes, *blocks: int, adapter: AdapterBinding | None = None) -> Load:
    return Load(name, (chunk(key, *blocks),), adapter, 16)


def step(side: WorkerSide, number: int, **plan: Any) -> None:
    whole = StepPlan(step=number, **plan)
    side.handle_preemptions(whole)
    side.start_loads(whole)
    side.take_stores(whole)
    side.start_stores()


def finished(side: WorkerSide, eventually: Any, ended: Set[str] = frozenset()) -> tuple[set[str], set[str]]:
    """The first report that is not empty."""
    return eventually(lambda: result if any(result := side.take_finished(ended)) else None)  # type: ignore[no-any-return]


def idle(side: WorkerSide, eventually: Any) -> None:
    eventually(lambda: not side._storing, "the stores end")


def test_only_awaited_stores_are_reported_and_once(daemon: Any, make_side: Any, eventually: Any) -> None:
    side = make_side(daemon().url)
    keys = [os.urandom(32) for _ in range(3)]
    step(side, 1, stores=[store("a", keys[0], 0), store("b", keys[1], 1)])
    idle(side, eventually)
    assert side.take_finished() == (set(), set())
    step(side, 2, stores=[store("a", keys[2], 2)], await_stores={"a", "nothing under way"})
    seen: list[str] = []
    eventually(lambda: seen.extend(side.take_finished()[0]) or len(seen) >= 2, "both are reported")
    assert sorted(seen) == ["a", "nothing under way"]
    idle(side, eventually)
    assert side.take_finished() == (set(), set())
    assert side.take_load_errors() == set()


def test_an_awaited_store_is_reported_where_the_daemon_is_gone(daemon: Any, make_side: Any, eventually: Any) -> None:
    running = daemon()
    side = make_side(running.url)
    running.stop(9)
    step(side, 1, stores=[store("a", os.urandom(32), 0)], await_stores={"a"})
    assert finished(side, eventually) == ({"a"}, set())
    news = side.take_news()
    assert news.failures == {"store.unavailable": 1}
    assert side.take_news() is None


def test_loads_are_reported_once_with_the_blocks_that_failed(daemon: Any, make_side: Any, eventually: Any) -> None:
    side = make_side(daemon().url)
    key = os.urandom(32)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("hit", key, 5)])
    assert finished(side, eventually) == (set(), {"hit"})
    assert side.take_load_errors() == set()
    step(side, 3, loads=[load("miss", os.urandom(32), 6)])
    assert finished(side, eventually) == (set(), {"miss"})
    assert side.take_load_errors() == {6}
    assert side.take_load_errors() == set()
    assert side.take_finished() == (set(), set())


def test_facts_and_failures_are_news_once(daemon: Any, make_side: Any) -> None:
    side = make_side(daemon().url)
    news = side.take_news()
    assert news.facts == [side.facts] == [Facts((GroupFacts("all", "cpu-test/H.N16.C16:float32", (2 * 16 * 16 * 4,)),))]
    assert side.take_news() is None


def test_what_several_workers_say_is_added_up_and_contradictions_believe_nobody() -> None:
    one = WorkerNews({1: OLD, 2: OLD}, {"x": 1}, {"p"}, [Facts((GroupFacts("a", "l", (1,)),))])
    other = WorkerNews({1: NEW, 3: NEW}, {"x": 2, "y": 1}, {"q"}, [Facts((GroupFacts("b", "l", (1,)),))])
    both = one.aggregate(other)
    assert both.adapters == {1: "", 2: OLD, 3: NEW}
    assert both.failures == {"x": 3, "y": 1}
    assert both.unstored == {"p", "q"}
    assert [fact.groups[0].shard for fact in both.facts] == ["a", "b"]


def test_a_preempted_requests_blocks_are_read_no_more(
    daemon: Any, make_side: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = daemon()
    side = make_side(running.url)
    inside, go = threading.Event(), threading.Event()
    gather = side._storer._copier.gather

    def slow(*arguments: Any) -> Any:
        inside.set()
        go.wait(5)
        return gather(*arguments)

    monkeypatch.setattr(side._storer._copier, "gather", slow)
    step(side, 1, stores=[store("other", os.urandom(32), 0), store("a", os.urandom(32), 1)])
    assert inside.wait(5)
    side.handle_preemptions(StepPlan(step=2, preempted={"a", "unknown"}))  # its store is queued: returns at once
    go.set()
    idle(side, eventually)
    assert side.take_news().failures == {"store.cancelled": 1}
    assert running.status()["tiers"]["cpu"]["objects"] == 1


def serve(side: WorkerSide, adapter: int, digest: str) -> None:
    """vLLM's loader loads this content under this id."""
    side._adapters.confirm(adapter, digest)


def test_an_adapter_changed_between_load_and_first_run_fails_the_load_in_that_step(
    daemon: Any, make_side: Any, eventually: Any
) -> None:
    side = make_side(daemon().url)
    key = os.urandom(32)
    binding = AdapterBinding(1, OLD)
    serve(side, 1, OLD)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("a", key, 5, adapter=binding), load("base", key, 7)])
    reported: set[str] = set()
    eventually(lambda: reported.update(side.take_finished()[1]) or len(reported) == 2)
    assert side.take_load_errors() == set()
    plan = StepPlan(step=3, first_runs={"a"})
    side.handle_preemptions(plan)
    serve(side, 1, NEW)  # before this step computes
    side.start_loads(plan)
    side.take_stores(plan)
    side.start_stores()
    assert side.take_finished() == (set(), set())
    assert side.take_load_errors() == {5}
    news = side.take_news()
    assert (news.adapters, news.failures) == ({1: NEW}, {"load.adapter_changed": 1})
    serve(side, 1, OLD)  # it has run: not its affair any more
    assert side.take_load_errors() == set()


def test_an_adapter_changed_before_a_load_is_reported_fails_it_there(
    daemon: Any, make_side: Any, eventually: Any
) -> None:
    side = make_side(daemon().url)
    key = os.urandom(32)
    serve(side, 1, OLD)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("a", key, 5, adapter=AdapterBinding(1, OLD))])
    eventually(lambda: side._done_loads, "the load is done")
    serve(side, 1, NEW)
    assert side.take_finished() == (set(), {"a"})
    assert side.take_load_errors() == {5}


def test_an_adapter_changed_while_a_load_is_being_reported_fails_it(make_side: Any, daemon: Any) -> None:
    """The loader has looked for the last time; the change comes before it reports."""
    side = make_side(daemon().url)
    serve(side, 1, OLD)
    late = load("a", os.urandom(32), 5, 6, adapter=AdapterBinding(1, OLD))
    side._not_yet_run["a"] = late
    assert side._may_load(late)
    serve(side, 1, NEW)
    side._loaded(late, [], {})
    assert side.take_finished() == (set(), {"a"})
    assert side.take_load_errors() == {5, 6}


def test_a_request_that_ended_before_it_ran_is_not_warned_about(daemon: Any, make_side: Any, eventually: Any) -> None:
    side = make_side(daemon().url)
    serve(side, 1, OLD)
    step(side, 1, loads=[load(name, os.urandom(32), 5, adapter=AdapterBinding(1, OLD)) for name in ("a", "b")])
    reported: set[str] = set()
    eventually(lambda: reported.update(side.take_finished({"a"})[1]) or len(reported) == 2)
    side.take_finished({"b"})
    side.take_load_errors()
    serve(side, 1, NEW)  # their blocks are others' by now
    assert side.take_load_errors() == set()
    assert not side._not_yet_run
    assert not side._collected
    assert not side._ended


def test_what_another_adapter_computed_is_not_stored(daemon: Any, make_side: Any, eventually: Any) -> None:
    running = daemon()
    side = make_side(running.url)
    serve(side, 1, OLD)
    side.handle_preemptions(StepPlan(step=5))
    serve(side, 1, NEW)  # in step 5: requests that began by then may have used the old one
    namespaces = [AdapterBinding(1, OLD), AdapterBinding(1, NEW), AdapterBinding(2, OLD)]
    step(side, 6, stores=[store("a", os.urandom(32), 0, adapter=each, first_step=5) for each in namespaces])
    idle(side, eventually)
    assert running.status()["tiers"]["cpu"]["objects"] == 0
    assert side.take_news().failures == {"store.adapter_changed": 3}
    step(side, 7, stores=[store("b", os.urandom(32), 0, adapter=AdapterBinding(1, NEW), first_step=6)])
    idle(side, eventually)
    assert running.status()["tiers"]["cpu"]["objects"] == 1


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def test_transfers_wait_for_what_the_gpu_was_asked_to_compute_before_them(
    daemon: Any, make_side: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores for the blocks' KV, loads for whatever the blocks' last holder is still writing to them."""
    side = make_side(daemon().url)
    moments = iter(["first", "second"])
    stream = SimpleNamespace(record_event=lambda: next(moments))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    run, seen = PageCopier._run, []

    def watched(copier: PageCopier, *args: Any, into_host: bool, after: Any) -> Any:
        seen.append((into_host, after))
        return run(copier, *args, into_host=into_host, after=None)

    monkeypatch.setattr(PageCopier, "_run", watched)
    side._cuda = True
    key = os.urandom(32)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2)  # nothing to move: nothing is recorded
    step(side, 3, loads=[load("a", key, 5)])
    assert finished(side, eventually) == (set(), {"a"})
    assert seen == [(True, "first"), (False, "second")]


# -- weights changed in place ------------------------------------------------------------------------------------------


def loaded(side: WorkerSide, eventually: Any, key: bytes, *blocks: int) -> None:
    """Request "a" has loaded `key`, and vLLM knows."""
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("a", key, *blocks)])
    assert finished(side, eventually) == (set(), {"a"})
    assert side.take_load_errors() == set()
    assert side.take_news().failures == {}  # type: ignore[union-attr]


@pytest.mark.parametrize("first_runs", [set(), {"a"}])
def test_a_void_load_that_was_reported_fails_in_that_very_step(
    daemon: Any, make_side: Any, eventually: Any, first_runs: set[str]
) -> None:
    side = make_side(daemon().url)
    loaded(side, eventually, os.urandom(32), 5)
    step(side, 3, void={"a", "nobody"}, first_runs=first_runs)
    assert side.take_finished() == (set(), set())  # reported before
    assert side.take_load_errors() == {5}
    assert side.take_news().failures == {"load.weights_changed": 1}
    step(side, 4, first_runs={"a"})
    assert side.take_load_errors() == set()
    assert not side._void


def test_a_void_load_that_is_done_and_not_reported_is_reported_as_failed(
    daemon: Any, make_side: Any, eventually: Any
) -> None:
    side = make_side(daemon().url)
    key = os.urandom(32)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("a", key, 5), load("b", key, 6)])
    eventually(lambda: len(side._done_loads) == 2, "the loads are done")
    step(side, 3, void={"a"})
    assert side.take_load_errors() == set()  # not before vLLM hears that it is done
    assert side.take_finished() == (set(), {"a", "b"})
    assert side.take_load_errors() == {5}


def test_a_void_load_under_way_fails_whole_with_its_end(daemon: Any, make_side: Any, eventually: Any) -> None:
    running = daemon()
    side = make_side(running.url, load_timeout=60)
    keys = [os.urandom(32) for _ in range(2)]
    step(side, 1, stores=[store("s", keys[0], 0), store("s", keys[1], 1)])
    idle(side, eventually)
    running.send(signal.SIGSTOP)
    step(side, 2, loads=[Load("a", (chunk(keys[0], 5), chunk(keys[1], 6)), None, 16), load("b", keys[0], 7)])
    step(side, 3, void={"a"})
    assert side.take_finished() == (set(), set())
    assert side.take_load_errors() == set()
    running.send(signal.SIGCONT)
    reported: set[str] = set()
    eventually(lambda: reported.update(side.take_finished()[1]) or len(reported) == 2)
    assert side.take_load_errors() == {5, 6}  # though its bytes arrived
    assert side.take_news().failures == {"load.weights_changed": 1}


def test_a_load_planned_and_void_in_one_step_fails_whole(daemon: Any, make_side: Any, eventually: Any) -> None:
    side = make_side(daemon().url)
    key = os.urandom(32)
    step(side, 1, stores=[store("s", key, 0)])
    idle(side, eventually)
    step(side, 2, loads=[load("a", key, 5)], void={"a"})
    assert finished(side, eventually) == (set(), {"a"})
    assert side.take_load_errors() == {5}


def test_a_later_load_under_the_same_id_is_not_void(daemon: Any, make_side: Any, eventually: Any) -> None:
    side = make_side(daemon().url)
    key = os.urandom(32)
    loaded(side, eventually, key, 5)
    step(side, 3, void={"a"})
    assert side.take_load_errors() == {5}
    step(side, 4, loads=[load("a", key, 6)])  # of the weights that the engine has now
    assert finished(side, eventually) == (set(), {"a"})
    assert side.take_load_errors() == set()
    step(side, 5, first_runs={"a"})
    assert not side._void
