# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side plans to store, from which blocks, and which blocks vLLM must keep until it is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache.connectors.vllm.common.messages import WorkerNews

BLOCK, CHUNK = 16, 32


def stored(plan: Any) -> list[tuple[int, ...]]:
    """The blocks of the plan's stores, chunk by chunk."""
    return [chunk.blocks for store in plan.stores for chunk in store.chunks]


def compute(driver: Any, request: Any, blocks: list[int], tokens: int | None = None) -> None:
    """The request's first step computed `tokens` (its whole prompt)."""
    driver.step({request: blocks})
    request.num_computed_tokens = request.num_tokens if tokens is None else tokens


def test_chunks_are_stored_by_the_step_after_the_one_that_completed_them(driver: Any, make_request: Any) -> None:
    request = make_request("a", 3 * CHUNK + 5)
    driver.arrive(request)
    assert not driver.step({request: [5, 4, 3, 2, 1, 0, 9]}).stores
    request.num_computed_tokens = CHUNK + BLOCK  # a chunked prefill
    first = driver.step(more={request: []})
    assert stored(first) == [(5, 4)]
    request.num_computed_tokens = 3 * CHUNK + 5
    second = driver.step(more={request: []})
    assert stored(second) == [(3, 2), (1, 0)]
    keys = driver.keys(request)
    assert (first.stores[0].parent, second.stores[0].parent) == (b"", keys[0])
    assert [chunk.key for plan in (first, second) for store in plan.stores for chunk in store.chunks] == keys
    assert not driver.step(more={request: []}).stores


def test_what_hit_locally_but_is_absent_is_stored_too(driver: Any, make_request: Any) -> None:
    request = make_request("a", 3 * CHUNK)
    driver.hold(request, ["cpu"])
    driver.arrive(request, local=2 * CHUNK)
    driver.step({request: [0, 1, 2, 3, 4, 5]})
    request.num_computed_tokens = 3 * CHUNK
    plan = driver.step(more={request: []})
    assert stored(plan) == [(2, 3), (4, 5)]
    assert plan.stores[0].parent == driver.keys(request)[0]


def test_only_confirmed_tokens_are_keyed(driver: Any, make_request: Any) -> None:
    request = make_request("a", CHUNK)
    driver.arrive(request)
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 2 * CHUNK  # placeholders of asynchronous scheduling, drafts
    assert stored(driver.step(more={request: []})) == [(0, 1)]
    for token in range(CHUNK):
        assert not driver.step(more={request: []}).stores
        request.append_output_token_ids(token)
    assert stored(driver.step(more={request: []})) == [(2, 3)]


def test_rejected_drafts_are_not_stored(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = CHUNK + BLOCK
    assert stored(driver.step(more={request: []})) == [(0, 1)]


def test_drafts_that_lag_behind_keep_the_last_block_out(make_driver: Any, make_config: Any, make_request: Any) -> None:
    driver = make_driver(make_config(speculative_config=SimpleNamespace(use_eagle=lambda: True)))
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    compute(driver, request, [0, 1, 2, 3])
    assert stored(driver.step(more={request: []})) == [(0, 1)]


def test_a_preempted_request_forgets_its_blocks_and_asks_anew(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    compute(driver, request, [0, 1, 2, 3])
    assert stored(driver.step(more={request: []})) == [(0, 1), (2, 3)]
    plan = driver.step(preempted=[request])
    assert plan.preempted == {"a"}
    request.num_computed_tokens = 0
    driver.hold(request, ["cpu"])
    assert driver.side.matched_tokens(request, 0) == (CHUNK, True)
    driver.load(request, [6, 7, 8, 9], CHUNK)
    driver.step()
    driver.side.finished_loading({"a"}, set())
    request.num_computed_tokens = CHUNK
    plan = driver.step(more={request: [6, 7, 8, 9]}, resumed=[request])
    assert plan.first_runs == {"a"}
    request.num_computed_tokens = 2 * CHUNK
    assert stored(driver.step(more={request: []})) == [(8, 9)]


def test_preempted_and_scheduled_again_in_one_step_keeps_the_new_blocks(driver: Any, make_request: Any) -> None:
    """vLLM's reset_prefix_cache(reset_running_requests=True) does that."""
    request = make_request("a", CHUNK)
    driver.arrive(request)
    compute(driver, request, [0, 1])
    driver.step(more={request: [2]})
    request.num_computed_tokens = 0
    assert driver.side.matched_tokens(request, 0) == (0, False)
    plan = driver.step(more={request: [7, 8, 9]}, resumed=[request], preempted=[request])
    assert plan.preempted == {"a"}
    for token in range(2 * CHUNK):
        request.append_output_token_ids(token)
    request.num_computed_tokens = 2 * CHUNK
    assert stored(driver.step(more={request: [10]})) == [(7, 8), (9, 10)]


def test_preempted_and_loading_again_in_one_step_keeps_its_load(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    compute(driver, request, [0, 1, 2, 3])
    driver.hold(request, ["cpu"])
    driver.side._requests["a"].answered_at = None
    assert driver.side.matched_tokens(request, 0) == (CHUNK, True)
    driver.load(request, [6, 7, 8, 9], CHUNK)
    plan = driver.step(preempted=[request])
    assert len(plan.loads) == 1
    assert driver.link.leases
    driver.side.finished_loading({"a"}, set())
    assert not driver.link.leases
    request.num_computed_tokens = CHUNK
    driver.step(more={request: [6, 7, 8, 9]}, resumed=[request])
    request.num_computed_tokens = 2 * CHUNK
    assert stored(driver.step(more={request: []})) == [(8, 9)]


def test_preempted_and_ended_while_it_loads_again_is_freed_with_its_load(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    compute(driver, request, [0, 1, 2, 3])
    driver.step(more={request: []})  # it has stored
    driver.hold(request, ["cpu"])
    driver.side._requests["a"].answered_at = None
    assert driver.side.matched_tokens(request, 0) == (CHUNK, True)
    driver.load(request, [6, 7, 8, 9], CHUNK)
    driver.step(preempted=[request])
    assert driver.side.finished(request, [[6, 7, 8, 9]]) is False
    assert not driver.side.storing.held.pending
    assert not driver.step().await_stores


def test_a_request_keeps_its_blocks_only_where_stores_were_planned(driver: Any, make_request: Any) -> None:
    short = make_request("short", CHUNK - 1)
    driver.arrive(short)
    compute(driver, short, [0, 1])
    assert driver.side.finished(short, [[0, 1]]) is False
    long = make_request("long", CHUNK)
    driver.arrive(long)
    compute(driver, long, [2, 3])
    assert driver.side.finished(long, [[2, 3]]) is True
    plan = driver.step()
    assert stored(plan) == [(2, 3)]
    assert plan.await_stores == {"long"}
    assert driver.step().await_stores == set()
    assert driver.side.finished(long, [[2, 3]]) is False  # known no more


def test_a_request_that_ends_while_it_loads_stores_nothing(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu"])
    driver.arrive(request)
    driver.load(request, [0, 1, 2, 3], CHUNK)
    driver.step()
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is False
    assert not driver.link.leases
    driver.side.finished_loading({"a"}, {0})  # reported later all the same
    plan = driver.step()
    assert not plan.stores
    assert not plan.await_stores


def test_stores_under_way_hold_the_blocks_whatever_is_learnt_meanwhile(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    compute(driver, request, [0, 1, 2, 3], CHUNK)
    assert stored(driver.step(more={request: []})) == [(0, 1)]
    driver.side.take_news(WorkerNews(weights={0: (2, 1)}))
    request.num_computed_tokens = 2 * CHUNK
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is True
    plan = driver.step()
    assert not plan.stores
    assert plan.await_stores == {"a"}


def test_what_failed_to_load_is_offered_again(driver: Any, make_request: Any) -> None:
    request = make_request("a", 3 * CHUNK)
    driver.hold(request, ["cpu", "cpu", "cpu"])
    driver.arrive(request)
    driver.load(request, [0, 1, 2, 3, 4, 5], 3 * CHUNK)
    driver.step()
    driver.side.finished_loading({"a"}, {2, 3})
    request.num_computed_tokens = CHUNK
    assert stored(driver.step({request: [0, 1, 2, 3, 4, 5]})) == [(0, 1)]
    request.num_computed_tokens = 3 * CHUNK
    assert stored(driver.step(more={request: []})) == [(2, 3), (4, 5)]


def test_requests_it_never_saw_are_ignored(driver: Any, make_request: Any) -> None:
    stranger = make_request("stranger", CHUNK)
    driver.load(stranger, [0, 1], CHUNK)
    driver.side.finished_loading({"stranger"}, {0, 1})
    plan = driver.step({stranger: [0, 1]}, preempted=[make_request("other", CHUNK)])
    assert not plan.loads
    assert not plan.stores
    assert driver.side.finished(stranger, [[0, 1]]) is False
    assert driver.side.load_tiers("stranger") == ()


def lora(tmp_path: Any, number: int = 1, name: str = "one", **rest: Any) -> LoRARequest:
    return LoRARequest(name, number, str(tmp_path), **rest)


def test_an_adapters_content_is_in_the_keys(driver: Any, make_request: Any, tmp_path: Any) -> None:
    driver.link.digests[str(tmp_path)] = "a" * 64
    plain = driver.keys(make_request("r", CHUNK))
    with_adapter = driver.keys(make_request("r", CHUNK, lora_request=lora(tmp_path)))
    same_content = driver.keys(make_request("r", CHUNK, lora_request=lora(tmp_path, 2, "two")))
    assert plain != with_adapter == same_content


def test_where_the_worker_loaded_other_content_nothing_more_is_stored(
    driver: Any, make_request: Any, tmp_path: Any
) -> None:
    driver.link.digests[str(tmp_path)] = "a" * 64
    request = make_request("r", 2 * CHUNK, lora_request=lora(tmp_path))
    driver.arrive(request)
    compute(driver, request, [0, 1, 2, 3], CHUNK)
    plan = driver.step(more={request: []})
    assert plan.stores[0].adapter.digest == "a" * 64
    assert plan.stores[0].first_step == 1
    driver.side.take_news(WorkerNews({1: "b" * 64}, {"load.deadline": 2}))
    assert driver.link.counts["load.deadline"] == 2
    request.num_computed_tokens = 2 * CHUNK
    assert not driver.step(more={request: []}).stores
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is True  # for the first store


def test_another_id_of_a_replaced_folder_is_stored_under_what_the_worker_loaded(
    driver: Any, make_request: Any, tmp_path: Any
) -> None:
    """The worker answers before the daemon. What the engine's own prefix cache has is of this id (test_blocks.py)."""
    driver.link.digests[str(tmp_path)] = "a" * 64
    old = make_request("old", CHUNK, lora_request=lora(tmp_path))
    driver.arrive(old)
    compute(driver, old, [0, 1])
    driver.side.finished(old, [[0, 1]])
    driver.link.answers = False  # the new content takes long to hash
    new = make_request("new", 2 * CHUNK, lora_request=lora(tmp_path, 2))
    driver.arrive(new, local=CHUNK)
    driver.step({new: [0, 1, 2, 3]})
    driver.side.take_news(WorkerNews({2: "b" * 64}))
    new.num_computed_tokens = 2 * CHUNK
    (store,) = driver.step(more={new: []}).stores
    assert store.namespace.adapter == "b" * 64
    assert stored(driver.step(more={new: []})) == []


def test_an_adapter_without_a_folder_goes_without_the_cache(driver: Any, make_request: Any) -> None:
    request = make_request("r", CHUNK, lora_request=LoRARequest("hub", 1, "somebody/adapter"))
    driver.arrive(request)
    assert driver.side.matched_tokens(request, 0) == (0, False)
    compute(driver, request, [0, 1])
    assert not driver.step(more={request: []}).stores


def test_an_adapter_loaded_in_place_is_asked_about_anew(driver: Any, make_request: Any, tmp_path: Any) -> None:
    driver.link.digests[str(tmp_path)] = "a" * 64
    first = driver.keys(make_request("r", CHUNK, lora_request=lora(tmp_path)))
    driver.link.digests[str(tmp_path)] = "b" * 64
    assert driver.keys(make_request("r", CHUNK, lora_request=lora(tmp_path))) == first
    assert driver.keys(make_request("r", CHUNK, lora_request=lora(tmp_path, load_inplace=True))) != first


def test_what_is_resident_is_told_when_the_last_request_is_over(
    driver: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step may follow in which it could be."""
    told: list[bool] = []
    monkeypatch.setattr(driver.side.admission, "tell_resident", lambda: told.append(True))
    one, other = make_request("a", 64), make_request("b", 64, seed=1)
    driver.arrive(one)
    driver.arrive(other)
    driver.side.finished(one, [[]])
    assert not told
    driver.side.finished(other, [[]])
    assert told
