# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side answers vLLM: how far a request is held, and what is loaded for it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import PoolingParams, SamplingParams
from vllm.platforms import current_platform

from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import Facts, GroupFacts, WorkerNews
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.scheduler import lookups
from loracache.connectors.vllm.scheduler import side as scheduler
from loracache.groups import Need

BLOCK, CHUNK = 16, 32
GROUPS = (KVGroup(Need.ALL, 0, (Member(0, BLOCK, ("layer",)),)),)
OFF = (0, False)


def test_a_hit_reaches_as_far_as_the_leading_run_of_chunks(driver: Any, make_request: Any) -> None:
    request = make_request("a", 5 * CHUNK + 3)
    driver.hold(request, ["cpu", "disk", "redis"])
    assert driver.arrive(request) == (3 * CHUNK, True)


def test_an_exact_multiple_of_the_chunk_may_be_loaded_whole(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request) == (2 * CHUNK, True)


def test_a_prompt_shorter_than_a_chunk_asks_nothing(driver: Any, make_request: Any) -> None:
    assert driver.arrive(make_request("a", CHUNK - 1)) == OFF
    assert not driver.link.lookups
    assert not driver.link.leases


def test_asking_again_and_again_asks_the_daemon_once(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu"])
    driver.arrive(request)
    assert {driver.side.matched_tokens(request, 0) for _ in range(50)} == {(CHUNK, True)}
    assert len(driver.link.lookups) == len(driver.link.leases) == 1
    driver.side.finished(request, [[]])
    assert not driver.link.leases


def test_a_request_never_allocated_leaves_no_lease(make_driver: Any, make_request: Any, daemon: Any) -> None:
    running = daemon()
    link = SchedulerLink(running.url)
    driver = make_driver(link=link, lookup_wait=10.0)
    request = make_request("a", 2 * CHUNK)
    driver.side.on_new_request(request)
    deadline = time.monotonic() + 5
    while driver.side.matched_tokens(request, 0) == (None, False):
        assert time.monotonic() < deadline
    for _ in range(20):
        assert driver.side.matched_tokens(request, 0) == OFF
    assert driver.side.finished(request, [[]]) is False
    assert running.status()["leases"] == 0
    driver.side.close()


def test_what_misses_gives_its_lease_back_at_once(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu"])
    assert driver.arrive(request, local=CHUNK) == OFF  # the engine holds as much itself
    assert not driver.link.leases


def test_a_late_answer_parks_the_request_for_a_moment_only(make_driver: Any, make_request: Any) -> None:
    driver = make_driver(lookup_wait=0.05)
    driver.link.answers = False
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu"])
    started = time.monotonic()
    assert driver.arrive(request) == (None, False)
    while driver.side.matched_tokens(request, 0) == (None, False):
        time.sleep(0.001)
    assert 0.05 <= time.monotonic() - started < 20
    assert driver.side.matched_tokens(request, 0) == OFF
    assert driver.link.counts["lookup.late"] >= 1
    driver.link.answers = True  # it waits in the queue still: the answer serves it now
    assert driver.side.matched_tokens(request, 0) == (CHUNK, True)


def test_a_question_nobody_waits_for_any_more_is_forgotten(driver: Any, make_request: Any) -> None:
    driver.link.answers = False
    request = make_request("a", 2 * CHUNK)
    driver.side.on_new_request(request)
    (state,) = driver.side._requests.values()
    question = state.question
    driver.step({request: [1, 2]})
    driver.step(preempted=[request])
    assert driver.link.forgotten == [question]


def test_an_old_answer_is_asked_for_again(driver: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu"])
    assert driver.arrive(request) == (CHUNK, True)
    driver.hold(request, ["cpu", "cpu"])
    assert driver.side.matched_tokens(request, 0) == (CHUNK, True)
    monkeypatch.setattr(lookups, "_STALE_S", 0.0)
    assert driver.side.matched_tokens(request, 0) == (2 * CHUNK, True)


def test_a_load_names_every_chunk_and_its_blocks(driver: Any, make_request: Any) -> None:
    request = make_request("a", 3 * CHUNK + 1)
    driver.hold(request, ["cpu", "disk", "redis"])
    tokens, _ = driver.arrive(request)
    driver.load(request, [10, 11, 12, 13, 14, 15, 16], tokens)
    (load,) = driver.step().loads
    assert [(chunk.key, chunk.blocks, chunk.first) for chunk in load.chunks] == [
        (key, blocks, 0) for key, blocks in zip(driver.keys(request), [(10, 11), (12, 13), (14, 15)], strict=True)
    ]
    assert load.chunk_tokens == CHUNK
    assert len(driver.link.prefetched) == 2  # disk and redis
    assert driver.side.load_tiers("a") == ("cpu", "disk", "redis")
    assert not driver.step().loads


def test_little_is_raised_ahead_where_the_memory_is_small(driver: Any, make_request: Any) -> None:
    """The workers need room for the rest."""
    for arena, raised in ((64 * 8192, 6), (16 * 8192, 4), (8192, 1)):
        request = make_request(f"a{arena}", 6 * CHUNK)
        driver.hold(request, ["disk"] * 6)
        driver.link.arena_bytes = arena
        driver.link.prefetched.clear()
        tokens, _ = driver.arrive(request)
        driver.load(request, list(range(12)), tokens)
        assert driver.link.prefetched == driver.side._chunks.object_keys(driver.keys(request)[:raised])


def test_a_local_prefix_may_end_inside_a_chunk(driver: Any, make_request: Any) -> None:
    request = make_request("a", 3 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request, local=BLOCK) == (2 * CHUNK - BLOCK, True)
    driver.load(request, [7, 8, 9, 10, 11, 12], 2 * CHUNK - BLOCK)
    (load,) = driver.step().loads
    assert [(chunk.blocks, chunk.first) for chunk in load.chunks] == [((8,), BLOCK), ((9, 10), 0)]


def test_drafts_that_lag_behind_cost_the_last_block(make_driver: Any, make_config: Any, make_request: Any) -> None:
    driver = make_driver(make_config(speculative_config=SimpleNamespace(use_eagle=lambda: True)))
    request = make_request("a", 3 * CHUNK, computed=2 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request) == (2 * CHUNK - BLOCK, True)
    driver.load(request, list(range(6)), 2 * CHUNK - BLOCK)
    (load,) = driver.step().loads
    assert [(chunk.blocks, chunk.first) for chunk in load.chunks] == [((0, 1), 0), ((2,), 0)]


def test_a_hit_needs_every_shard_and_is_as_slow_as_the_slowest(make_driver: Any, make_request: Any) -> None:
    driver = make_driver(shards=("rank0", "rank1"))
    request = make_request("a", 3 * CHUNK)
    driver.hold(request, ["cpu", "cpu", "cpu"], shards=["rank0"])
    driver.hold(request, ["cpu", "disk"], shards=["rank1"])
    tokens, _ = driver.arrive(request)
    assert tokens == 2 * CHUNK
    driver.load(request, list(range(6)), tokens)
    assert driver.side.load_tiers("a") == ("cpu", "disk")
    assert len(driver.link.prefetched) == 2  # both shards of the second chunk


@pytest.mark.parametrize(
    "what",
    [
        {"prompt": None, "prompt_embeds": torch.zeros(64, 8)},  # token ids that are all 0
        {"prompt": 64, "sampling_params": None, "pooling_params": PoolingParams(task="embed")},
        {"prompt": 64, "resumable": True},
    ],
    ids=["prompt_embeds", "pooling", "resumable"],
)
def test_what_is_no_function_of_its_tokens_stays_out(driver: Any, make_request: Any, what: dict[str, Any]) -> None:
    request = make_request("a", what["prompt"], computed=64, **{k: v for k, v in what.items() if k != "prompt"})
    assert driver.arrive(request) == OFF
    assert not driver.link.lookups
    driver.step({request: [0, 1, 2, 3]})
    assert not driver.step(more={request: []}).stores
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is False


def test_shards_of_different_sizes_cut_the_same_chunks(make_config: Any, make_request: Any, link: Any) -> None:
    """Pipeline stages with 17 and 16 layers: the smallest decides, and the plan tells the workers."""
    side = scheduler.SchedulerSide(make_config(), Options(), lambda: "m" * 64, link, GROUPS)
    side.set_facts(
        [Facts((GroupFacts("stage0", "x", (600 << 10,)),)), Facts((GroupFacts("stage1", "x", (300 << 10,)),))]
    )
    request = make_request("a", 4 * BLOCK)
    side.on_new_request(request)
    link.tiers = dict.fromkeys(link.lookups[0], "cpu")
    side.finished(request, [[]])
    side.on_new_request(request)
    assert side.matched_tokens(request, 0) == (4 * BLOCK, True)
    side.planned_load(request, SimpleNamespace(get_block_ids=lambda: ([0, 1, 2, 3],)), 4 * BLOCK)
    (load,) = side._plan.loads
    assert load.chunk_tokens == len(load.chunks[0].blocks) * BLOCK == 4 * BLOCK


def test_a_request_that_must_not_read_takes_no_lease_but_is_stored(driver: Any, make_request: Any) -> None:
    request = make_request("a", 64, sampling_params=SamplingParams(max_tokens=5, prompt_logprobs=1))
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request) == OFF
    assert not driver.link.lookups
    assert not driver.link.leases
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 64
    assert len(driver.step(more={request: []}).stores) == 1


def test_tenants_and_models_do_not_meet(driver: Any, make_request: Any) -> None:
    keys = {driver.keys(make_request("a", CHUNK, cache_salt=salt))[0] for salt in (None, "one", "two")}
    driver.side.take_news(WorkerNews(weights={0: (2, 1)}))  # weights changed in place
    keys |= {driver.keys(make_request("a", CHUNK))[0]}
    driver.side.take_news(WorkerNews(weights={0: (4, 1)}))
    keys |= {driver.keys(make_request("a", CHUNK))[0]}
    assert len(keys) == 5


def test_engines_that_lay_kv_out_differently_do_not_meet(make_config: Any, make_request: Any, link: Any) -> None:
    for layout in ("cpu/H.N16.C64:bfloat16", "cpu/N16.H.C64:bfloat16"):
        side = scheduler.SchedulerSide(make_config(), Options(), lambda: "m" * 64, link, GROUPS)
        side.set_facts([Facts((GroupFacts("all", layout, (1 << 20,)),))])
        side.on_new_request(make_request("a", 4 * BLOCK))
    one, other = link.lookups
    assert one
    assert set(one).isdisjoint(other)


def test_kinds_of_kv_do_not_meet_and_names_of_one_kind_do(
    make_driver: Any, make_config: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(dtype: str, fnuz: bool = False) -> bytes:
        monkeypatch.setattr(type(current_platform), "is_fp8_fnuz", classmethod(lambda cls: fnuz))
        driver = make_driver(make_config(cache_config__cache_dtype=dtype))
        return bytes(driver.keys(make_request("a", CHUNK))[0])

    assert key("fp8") == key("fp8_e4m3")
    assert key("auto") == key("bfloat16")
    fp8 = ("fp8", "fp8_e5m2", "fp8_per_token_head")
    kinds = {key(dtype) for dtype in ("auto", "float16", *fp8)} | {key(dtype, fnuz=True) for dtype in fp8}
    assert len(kinds) == 8


def test_requests_from_before_a_change_of_weights_are_neither_loaded_nor_stored(driver: Any, make_request: Any) -> None:
    request = make_request("a", 64)
    driver.hold(request, ["cpu", "cpu"])
    driver.side.on_new_request(request)
    driver.arrive(request)
    driver.side.take_news(WorkerNews(weights={0: (2, 1)}))
    assert driver.side.matched_tokens(request, 0) == OFF
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 64
    assert not driver.step(more={request: []}).stores


def test_without_a_daemon_the_engine_goes_on(driver: Any, make_request: Any) -> None:
    driver.link.connected = False
    request = make_request("a", 64)
    assert driver.arrive(request) == OFF
    assert driver.link.counts["lookup.unavailable"] == 1
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 64
    driver.step(more={request: []})
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is True


def test_a_daemon_that_never_was_costs_no_exception(make_driver: Any, make_request: Any, tmp_path: Any) -> None:
    driver = make_driver(link=SchedulerLink(f"unix:///tmp/{tmp_path.name}-nobody.sock"))
    for number in range(3):
        request = make_request(f"r{number}", 64)
        assert driver.arrive(request) == OFF
        driver.step({request: [0, 1, 2, 3]})
        driver.side.finished(request, [[0, 1, 2, 3]])
    driver.side.close()


def test_off_until_the_workers_have_spoken(make_driver: Any, make_request: Any, link: Any, make_config: Any) -> None:
    side = scheduler.SchedulerSide(make_config(), Options(), lambda: "m" * 64, link, GROUPS)
    request = make_request("a", 64)
    side.on_new_request(request)
    assert side.matched_tokens(request, 0) == OFF
    side.set_facts([Facts((GroupFacts("a", "x", (4096,)),)), Facts((GroupFacts("b", "y", (4096,)),))])
    assert not side.on  # workers that lay out KV differently
    side = scheduler.SchedulerSide(make_config(), Options(), lambda: "m" * 64, link, GROUPS)
    side.set_facts([Facts((), "no reason")])
    assert not side.on


def test_requests_are_computed_while_the_models_identity_is_not_known(
    make_config: Any, make_request: Any, link: Any
) -> None:
    """Nobody waits for it; what such a request computed is stored once it is known."""
    known: list[str] = []
    side = scheduler.SchedulerSide(make_config(), Options(), lambda: known[0] if known else None, link, GROUPS)
    side.set_facts([Facts((GroupFacts("a", "x", (1 << 20,)),))])
    request = make_request("a", 64)
    side.on_new_request(request)
    assert side.matched_tokens(request, 0) == OFF
    assert not link.lookups
    assert link.counts == {"identity.pending": 1}
    known.append("m" * 64)
    side.on_new_request(make_request("b", 64))
    assert len(link.lookups) == 1
    assert link.counts == {"identity.pending": 1}


@pytest.mark.parametrize(("may_load", "may_store"), [(False, True), (True, False)])
def test_roles_are_kept(make_driver: Any, make_config: Any, make_request: Any, may_load: bool, may_store: bool) -> None:
    driver = make_driver(
        make_config(kv_transfer_config__is_kv_consumer=may_load, kv_transfer_config__is_kv_producer=may_store)
    )
    request = make_request("a", 64)
    driver.hold(request, ["cpu"])
    assert driver.arrive(request) == ((32, True) if may_load else OFF)
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 64
    assert bool(driver.step(more={request: []}).stores) == may_store
