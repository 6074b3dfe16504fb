# SPDX-License-Identifier: Apache-2.0
"""vLLM's own blocks are keyed by what an adapter's id serves: real requests, hashed by vLLM."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

from loracache.connectors.vllm.common.messages import WorkerNews
from loracache.connectors.vllm.lora.paths import path_of
from loracache.connectors.vllm.scheduler.blocks import BlockKeys

BLOCK = 16


@pytest.fixture
def hashed(make_request: Any) -> Any:
    """hashed(keys, id, name, path) is a request of three blocks as vLLM makes it, keyed by `keys`."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)

    def make(keys: BlockKeys | None, number: int = 1, name: str = "one", path: str = "/x", **rest: Any) -> Any:
        request = make_request(
            "a", 3 * BLOCK, lora_request=LoRARequest(name, number, path), block_hasher=hasher, **rest
        )
        if keys is not None:
            keys.key(request)
        return request

    return make


def hashes(request: Any) -> list[bytes]:
    return list(request.block_hashes)


def test_where_nothing_is_replaced_the_hashes_are_vllms_own(hashed: Any, make_request: Any) -> None:
    keys = BlockKeys()
    assert hashes(hashed(keys)) == hashes(hashed(None))
    keys.learn({1: 1})
    assert hashes(hashed(keys)) == hashes(hashed(None))
    base = make_request("b", 3 * BLOCK)
    assert keys.key(base) == 0


def test_every_content_of_an_id_has_hashes_of_its_own(hashed: Any) -> None:
    keys = BlockKeys()
    seen = [hashes(hashed(keys))]
    for number in (2, 3, 7):
        assert keys.learn({1: number}) == {1}
        assert keys.learn({1: number}) == set()
        assert keys.key(hashed(keys)) == number
        seen.append(hashes(hashed(keys)))
        assert hashes(hashed(keys)) == seen[-1]
    for one, two in itertools.combinations(seen, 2):
        assert set(one).isdisjoint(two)


def test_another_id_of_the_same_name_has_hashes_of_its_own(hashed: Any) -> None:
    keys = BlockKeys()
    first, second = hashes(hashed(keys, 1)), hashes(hashed(keys, 2))
    assert set(first).isdisjoint(second)
    assert hashes(hashed(keys, 1)) == first
    keys.learn({1: 1, 2: 1})
    assert hashes(hashed(keys, 2)) == second


def test_a_digest_is_content_under_whatever_id(hashed: Any) -> None:
    keys = BlockKeys()
    one, two = path_of("a" * 64), path_of("b" * 64)
    assert hashes(hashed(keys, 1, path=one)) == hashes(hashed(keys, 3, path=one))
    assert set(hashes(hashed(keys, 1, path=one))).isdisjoint(hashes(hashed(keys, 2, path=two)))


def test_blocks_of_tokens_that_come_later_are_keyed_alike_and_the_request_keeps_its_adapter(hashed: Any) -> None:
    keys = BlockKeys()
    hashed(keys, 1)
    request = hashed(keys, 2)
    request.append_output_token_ids([7] * BLOCK)
    longer = hashed(None, 2)
    longer.append_output_token_ids([7] * BLOCK)
    keys.key(longer)
    assert hashes(request) == hashes(longer)
    assert len(hashes(request)) == 4
    assert (request.lora_request.lora_name, request.lora_request.lora_path) == ("one", "/x")


def test_a_waiting_request_is_hashed_anew_when_its_adapter_was_replaced(hashed: Any) -> None:
    keys = BlockKeys()
    waiting = hashed(keys)
    keys.learn({1: 2})
    assert keys.key(waiting) == 2
    assert hashes(waiting) == hashes(hashed(keys))
    keys.learn({1: 3})
    keys.key(waiting)
    assert hashes(waiting) == hashes(hashed(keys))


def test_encoder_outputs_that_an_adapter_changes_are_keyed_like_blocks(hashed: Any) -> None:
    def feature(identifier: str) -> Any:
        return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=4, length=8))

    keys = BlockKeys(towers=True)
    request = hashed(keys, mm_features=[feature("one:abc")])
    assert request.mm_features[0].identifier == "one:abc"
    for number in (2, 3):
        keys.learn({1: number})
        keys.key(request)
        assert request.mm_features[0].identifier == f"one#1.{number}:abc"


# -- inside the scheduler's side ----------


def test_requests_that_wait_are_hashed_anew_and_those_that_run_are_told_to_the_worker(
    driver: Any, hashed: Any, make_request: Any
) -> None:
    waiting, running = hashed(None), hashed(None)
    running.request_id = "b"
    driver.arrive(running, 2 * BLOCK)
    (prefix,) = driver.step({running: [5, 6, 7]}).prefixes
    assert (prefix.lora_int_id, prefix.content, prefix.blocks) == (1, 0, (5, 6))
    driver.arrive(waiting)
    before = hashes(running)
    driver.side.take_news(WorkerNews({1: ""}, contents={1: 2}))
    assert hashes(running) == before
    assert set(hashes(waiting)).isdisjoint(before)
    driver.side.matched_tokens(waiting, BLOCK)
    (prefix,) = driver.step({waiting: [1, 2, 3]}, {running: []}).prefixes
    assert (prefix.lora_int_id, prefix.content, prefix.blocks) == (1, 2, (1,))
    base = make_request("c", 3 * BLOCK)
    driver.arrive(base, 2 * BLOCK)
    assert not driver.step({base: [8, 9, 10]}).prefixes


def test_a_preempted_request_comes_back_under_what_its_adapter_is_now(driver: Any, hashed: Any) -> None:
    request = hashed(None)
    driver.arrive(request)
    assert not driver.step({request: [5, 6, 7]}).prefixes
    driver.side.take_news(WorkerNews({1: ""}, contents={1: 2}))
    before = hashes(request)
    driver.step(preempted=[request])
    assert set(hashes(request)).isdisjoint(before)
    driver.side.matched_tokens(request, BLOCK)
    (prefix,) = driver.step(more={request: [8, 9, 10]}, resumed=[request]).prefixes
    assert (prefix.content, prefix.blocks) == (2, (8,))


def test_workers_that_count_differently_are_taken_at_the_highest(driver: Any) -> None:
    one, two = WorkerNews({1: "a"}, contents={1: 2, 2: 1}), WorkerNews({1: "a"}, contents={1: 3})
    assert one.aggregate(two).contents == {1: 3, 2: 1}
