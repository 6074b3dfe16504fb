# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side plans again or takes back: chunks that did not reach the cache, loads of old weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm.common.messages import WorkerNews
from loracache.connectors.vllm.scheduler import side as scheduler

BLOCK, CHUNK = 16, 32


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the scheduler's side sees: now[0]."""
    seconds = [1000.0]
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def stored(plan: Any) -> list[tuple[int, ...]]:
    """The blocks of the plan's stores, chunk by chunk."""
    return [chunk.blocks for store in plan.stores for chunk in store.chunks]


def running(driver: Any, make_request: Any, name: str = "a", chunks: int = 2) -> Any:
    """A request that computed `chunks` chunks in blocks 0, 1, 2, ..., and whose stores were planned."""
    request = make_request(name, chunks * CHUNK, seed=ord(name))
    driver.arrive(request)
    driver.step({request: list(range(2 * chunks))})
    request.num_computed_tokens = chunks * CHUNK
    assert len(stored(driver.step(more={request: []}))) == chunks
    return request


def loading(driver: Any, make_request: Any, name: str = "a") -> Any:
    """A request whose two chunks are being loaded into blocks 0 to 3."""
    request = make_request(name, 2 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request) == (2 * CHUNK, True)
    driver.load(request, [0, 1, 2, 3], 2 * CHUNK)
    assert len(driver.step().loads) == 1
    return request


# -- what did not reach the cache --------------------------------------------------------------------------------------


def test_what_was_not_stored_is_offered_again_from_its_first_chunk_and_a_second_later(
    driver: Any, make_request: Any, now: list[float]
) -> None:
    request = running(driver, make_request)
    driver.side.take_news(WorkerNews(unstored={"a"}))
    for _ in range(4):
        assert not driver.step(more={request: []}).stores
        now[0] += 0.25
    plan = driver.step(more={request: []})
    assert stored(plan) == [(0, 1), (2, 3)]
    assert plan.stores[0].parent == b""
    assert not driver.step(more={request: []}).stores  # once


def test_chunks_that_were_hits_are_offered_again_too(driver: Any, make_request: Any, now: list[float]) -> None:
    """Who could not store under them may have found them gone."""
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu"])
    driver.arrive(request, local=CHUNK)
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 2 * CHUNK
    assert stored(driver.step(more={request: []})) == [(2, 3)]
    driver.side.take_news(WorkerNews(unstored={"a"}))
    now[0] += 1
    assert stored(driver.step(more={request: []})) == [(0, 1), (2, 3)]


def test_what_is_computed_meanwhile_waits_with_the_rest(driver: Any, make_request: Any, now: list[float]) -> None:
    request = running(driver, make_request)
    driver.side.take_news(WorkerNews(unstored={"a"}))
    for token in range(CHUNK):
        request.append_output_token_ids(token)
    request.num_computed_tokens = 3 * CHUNK
    assert not driver.step(more={request: [4, 5]}).stores
    now[0] += 1
    assert stored(driver.step(more={request: []})) == [(0, 1), (2, 3), (4, 5)]


def test_a_request_that_ends_does_not_wait_to_be_offered_again(
    driver: Any, make_request: Any, now: list[float]
) -> None:
    request = running(driver, make_request)
    driver.side.take_news(WorkerNews(unstored={"a"}))
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is True
    plan = driver.step()
    assert stored(plan) == [(0, 1), (2, 3)]
    assert plan.await_stores == {"a"}


def test_others_are_stored_without_delay(driver: Any, make_request: Any, now: list[float]) -> None:
    one, other = running(driver, make_request, "a"), running(driver, make_request, "b")
    driver.side.take_news(WorkerNews(unstored={"a", "one that ended"}))
    for token in range(CHUNK):
        other.append_output_token_ids(token)
    other.num_computed_tokens = 3 * CHUNK
    assert stored(driver.step(more={one: [], other: [6, 7]})) == [(6, 7)]


# -- weights changed in place ------------------------------------------------------------------------------------------

CHANGED = WorkerNews(weights={0: (2, 1)})


def test_a_load_under_way_is_void_after_a_change(driver: Any, make_request: Any) -> None:
    loading(driver, make_request)
    driver.side.take_news(CHANGED)
    assert driver.step().void == {"a"}
    assert driver.step().void == set()  # said once


def test_a_load_that_was_planned_and_not_sent_is_void_after_a_change(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    driver.arrive(request)
    driver.load(request, [0, 1, 2, 3], 2 * CHUNK)
    driver.side.take_news(CHANGED)
    plan = driver.step()
    assert ([load.request_id for load in plan.loads], plan.void) == (["a"], {"a"})


def test_a_load_that_vllm_put_off_across_a_reset_is_void(driver: Any, make_request: Any) -> None:
    """0.33 may make room for a load some steps after it was answered how far one reaches."""
    request = make_request("a", 64)
    driver.hold(request, ["cpu"] * 2)
    assert driver.arrive(request) == (64, True)
    driver.side.take_news(CHANGED)
    driver.step()
    driver.load(request, [1, 2, 3, 4], 64)
    plan = driver.step()
    assert ([load.request_id for load in plan.loads], plan.void) == (["a"], {"a"})


def test_a_load_that_is_done_and_not_computed_upon_is_void_after_a_change(driver: Any, make_request: Any) -> None:
    loading(driver, make_request)
    driver.side.finished_loading({"a"}, set())
    driver.side.take_news(CHANGED)
    assert driver.step().void == {"a"}


def test_what_has_run_or_never_loaded_is_not_void_after_a_change(driver: Any, make_request: Any) -> None:
    ran = loading(driver, make_request)
    driver.side.finished_loading({"a"}, set())
    assert driver.step({ran: [0, 1, 2, 3]}).first_runs == {"a"}
    running(driver, make_request, "b", chunks=1)
    ended = loading(driver, make_request, "c")
    driver.side.finished(ended, [[0, 1, 2, 3]])
    driver.side.take_news(CHANGED)
    assert driver.step().void == set()


def test_a_request_that_comes_after_a_change_loads_and_stores_as_ever(driver: Any, make_request: Any) -> None:
    old = loading(driver, make_request)
    driver.side.take_news(CHANGED)
    driver.side.finished(old, [[0, 1, 2, 3]])
    assert driver.step().void == {"a"}
    loading(driver, make_request)  # under the same id, with keys of its own
    driver.side.finished_loading({"a"}, set())
    running(driver, make_request, "b", chunks=1)


# -- preemption --------------------------------------------------------------------------------------------------------


def test_a_preempted_request_offers_what_it_once_loaded_where_nobody_says_that_it_is_held(
    driver: Any, make_request: Any
) -> None:
    """What the daemon held before may be gone by now, and so may the daemon."""
    request = loading(driver, make_request)
    driver.side.finished_loading({"a"}, set())
    driver.step({request: [0, 1, 2, 3]})
    driver.link.connected = False
    driver.step(preempted=[request])
    request.num_computed_tokens = 0
    assert driver.side.matched_tokens(request, 0) == (0, False)
    driver.step(more={request: [4, 5, 6, 7]}, resumed=[request])
    request.num_computed_tokens = 2 * CHUNK
    assert stored(driver.step(more={request: []})) == [(4, 5), (6, 7)]


def test_a_preempted_request_is_one_of_the_new_weights(driver: Any, make_request: Any) -> None:
    """Nothing of it is left that was computed with the old ones."""
    request = loading(driver, make_request)
    driver.side.finished_loading({"a"}, set())
    driver.step({request: [0, 1, 2, 3]})
    driver.step(preempted=[request])
    driver.side.take_news(CHANGED)
    request.num_computed_tokens = 0
    assert driver.side.matched_tokens(request, 0) == (0, False)
    driver.step(more={request: [4, 5, 6, 7]}, resumed=[request])
    request.num_computed_tokens = 2 * CHUNK
    assert stored(driver.step(more={request: []})) == [(4, 5), (6, 7)]
