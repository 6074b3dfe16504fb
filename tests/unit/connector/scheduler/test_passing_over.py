# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side does with chunks that are computed sooner than they are loaded."""

from __future__ import annotations

from typing import Any

from loracache.connectors.vllm.common.messages import WorkerNews
from loracache.keys import object_key

CHUNK = 32
OFF = (0, False)


def a_step(driver: Any, tokens: int, seconds: float) -> None:
    """The engine computes a step of so many tokens."""
    steps = driver.side._patience.steps
    steps.planned(0.0, tokens)
    steps.done(seconds)


def load(driver: Any, request: Any, blocks: list[int], seconds: float) -> int:
    """The request arrives, and loads what it is worth in so many seconds; the tokens."""
    tokens, _ = driver.arrive(request)
    if tokens:
        driver.load(request, blocks, tokens)
        driver.step()
        driver.side.take_news(WorkerNews(loaded={request.request_id: seconds}))
        driver.side.finished_loading({request.request_id}, set())
    return int(tokens)


def slow(make_driver: Any, make_request: Any, tier: str = "redis", **options: Any) -> Any:
    """A driver of an engine that computes 1 ms a token, and whose `tier` takes seconds for two chunks."""
    driver = make_driver(**options)
    a_step(driver, 100, 0.1)
    for seed, chunks in enumerate((1, 2, 4), 1):
        request = make_request(f"seen-{seed}", chunks * CHUNK + 1, seed=seed)
        driver.hold(request, [tier] * chunks)
        assert load(driver, request, list(range(2 * chunks + 1)), 1.0 * chunks) == chunks * CHUNK
        driver.side.finished(request, [[]])
    driver.link.prefetched.clear()
    driver.side.tally.take()
    return driver


def test_what_is_not_loaded_is_not_held_nor_raised_and_counted_once(make_driver: Any, make_request: Any) -> None:
    driver = slow(make_driver, make_request)
    request = make_request("a", 9 * CHUNK)
    driver.hold(request, ["redis"] * 8)
    assert [driver.arrive(request), *(driver.side.matched_tokens(request, 0) for _ in range(9))] == [OFF] * 10
    assert not driver.link.leases
    assert not driver.link.prefetched
    assert not driver.link.counts
    driver.step({request: list(range(18))})
    driver.step(more={request: []})
    assert driver.link.counts == {"load.passed_over": 8}
    assert driver.side.tally.take().data["chunks_not_loaded"] == 8


def test_a_load_is_cut_where_a_slow_tier_begins(make_driver: Any, make_request: Any) -> None:
    driver = slow(make_driver, make_request)
    request = make_request("a", 9 * CHUNK)
    driver.hold(request, ["cpu"] * 3 + ["redis"] * 4 + ["cpu"])
    assert driver.arrive(request) == (3 * CHUNK, True)
    assert len(driver.link.leases) == 1
    held = [object_key(key, "all") for key in driver.keys(request)[:3]]
    assert driver.link.prefetched == held  # the lease begins anew: the last chunk is let go of
    driver.load(request, list(range(18)), 3 * CHUNK)
    plan = driver.step()
    assert [len(each.chunks) for each in plan.loads] == [3]
    assert driver.link.prefetched == held
    driver.side.finished_loading({"a"}, set())
    assert not driver.link.leases
    driver.step({request: list(range(18))})
    assert driver.link.counts == {"load.passed_over": 5}


def test_what_was_computed_instead_is_offered_to_the_store(make_driver: Any, make_request: Any) -> None:
    """Memory has it the next time."""
    driver = slow(make_driver, make_request)
    request = make_request("a", 9 * CHUNK)
    driver.hold(request, ["redis"] * 8)
    driver.arrive(request)
    driver.step({request: list(range(18))})
    request.num_computed_tokens = 9 * CHUNK
    (store,) = driver.step(more={request: []}).stores
    assert len(store.chunks) == 9
    assert store.parent == b""


def test_the_engines_own_hits_are_never_computed_anew(make_driver: Any, make_request: Any) -> None:
    driver = slow(make_driver, make_request)
    request = make_request("a", 9 * CHUNK)
    driver.hold(request, ["redis"] * 8)
    assert driver.arrive(request, local=4 * CHUNK) == OFF
    assert driver.side._requests["a"].hits == ("redis",) * 4
    driver.step({request: list(range(18))})
    assert driver.link.counts == {"load.passed_over": 4}


def test_recompute_if_faster_0_loads_whatever_is_found(make_driver: Any, make_request: Any) -> None:
    driver = slow(make_driver, make_request, recompute_if_faster=0.0)
    request = make_request("a", 9 * CHUNK)
    driver.hold(request, ["redis"] * 8)
    assert driver.arrive(request) == (8 * CHUNK, True)


def test_what_is_raised_ahead_at_a_requests_wish_is_loaded(make_driver: Any, make_request: Any) -> None:
    """By its turn it is in memory."""
    driver = slow(make_driver, make_request)
    request = make_request("a", 9 * CHUNK)
    driver.hold(request, ["redis"] * 8)
    driver.side.on_new_request(request)
    state = driver.side._requests["a"]
    driver.side._ahead.append(state)
    driver.step()
    assert len(driver.link.prefetched) == 8
    assert driver.side.matched_tokens(request, 0) == (8 * CHUNK, True)


def test_a_preempted_request_is_weighed_anew(make_driver: Any, make_request: Any) -> None:
    driver = slow(make_driver, make_request)
    request = make_request("a", 9 * CHUNK)
    driver.hold(request, ["redis"] * 8)
    assert driver.arrive(request) == OFF
    driver.step({request: list(range(18))})
    driver.hold(request, ["cpu"] * 8)
    driver.step(preempted=[request])
    assert driver.side.matched_tokens(request, 0) == (8 * CHUNK, True)


def test_an_aborted_load_leaves_the_link_to_others(make_driver: Any, make_request: Any) -> None:
    driver = slow(make_driver, make_request, "disk")
    request = make_request("a", 3 * CHUNK)
    driver.hold(request, ["cpu"] * 2)
    driver.load(request, list(range(6)), driver.arrive(request)[0])
    driver.step()
    assert driver.side._choice.loads._loads
    driver.side.finished(request, [[]])
    driver.side.finished_loading({"a"}, set())
    assert not driver.side._choice.loads._loads


def test_workers_tell_of_loads_together() -> None:
    together = WorkerNews(loaded={"a": 0.1, "b": 0.2}).aggregate(WorkerNews(loaded={"a": 0.3}))
    assert together.loaded == {"a": 0.3, "b": 0.2}
