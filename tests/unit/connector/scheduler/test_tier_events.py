# SPDX-License-Identifier: Apache-2.0
"""Routers hear which of an engine's blocks our tiers hold: real requests, hashed by vLLM, and a daemon that tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, maybe_convert_block_hash

from loracache.connectors.vllm.scheduler import tier_events
from loracache.keys import object_key

BLOCK, CHUNK = 16, 32


@pytest.fixture
def publishing(make_driver: Any, make_config: Any) -> Any:
    return lambda **options: make_driver(
        make_config(kv_events_config=SimpleNamespace(enable_kv_cache_events=True)), **options
    )


@pytest.fixture
def hashed(make_request: Any) -> Any:
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return lambda name, prompt, **rest: make_request(name, prompt, block_hasher=hasher, **rest)


def tell(driver: Any, what: str, tier: str, *keys: bytes, shard: str = "all", lost: bool = False) -> list[Any]:
    """The daemon tells of chunks; answers what vLLM is given then."""
    driver.link.told.append((lost, [(what, tier, object_key(key, shard)) for key in keys]))
    return list(driver.side.events.take())


def test_what_a_lookup_found_is_told_with_its_tier(publishing: Any, hashed: Any) -> None:
    driver, request = publishing(), hashed("a", 3 * CHUNK + 5)
    driver.hold(request, ["cpu", "disk"])
    driver.arrive(request)
    first, second = driver.side.events.take()
    hashes = [maybe_convert_block_hash(each) for each in request.block_hashes]
    tokens = list(request.all_token_ids)
    assert isinstance(first, BlockStored)
    assert (first.block_hashes, first.parent_block_hash, first.medium) == (hashes[:2], None, "cpu")
    assert (second.block_hashes, second.parent_block_hash, second.medium) == (hashes[2:4], hashes[1], "disk")
    assert (first.token_ids, second.token_ids) == (tokens[:CHUNK], tokens[CHUNK : 2 * CHUNK])
    assert (first.block_size, first.lora_id, first.lora_name) == (BLOCK, None, None)
    assert not driver.side.events.take()


def test_what_enters_and_leaves_tiers_is_told(publishing: Any, hashed: Any) -> None:
    driver, request = publishing(), hashed("a", 2 * CHUNK)
    driver.arrive(request)
    assert not driver.side.events.take()
    one, two = driver.side._requests["a"].chunk_keys
    [stored] = tell(driver, "admitted", "cpu", one)
    assert (type(stored), stored.medium) == (BlockStored, "cpu")
    assert not tell(driver, "admitted", "cpu", one)  # as it is known already
    assert [event.medium for event in tell(driver, "admitted", "disk", one, two)] == ["disk", "disk"]
    [removed] = tell(driver, "evicted", "cpu", one, two)
    assert (type(removed), removed.medium) == (BlockRemoved, "cpu")
    assert removed.block_hashes == [maybe_convert_block_hash(each) for each in request.block_hashes[:2]]
    assert not tell(driver, "pinned", "disk", one)
    assert not tell(driver, "admitted", "cpu", bytes(32))  # of somebody else's prompt


def test_answers_that_are_decoded_are_told_too(publishing: Any, hashed: Any) -> None:
    driver, request = publishing(), hashed("a", CHUNK)
    driver.arrive(request)
    driver.step({request: [0, 1, 2, 3]})
    request.append_output_token_ids([7] * CHUNK)
    request.num_computed_tokens = 2 * CHUNK
    driver.step(more={request: []})
    events = tell(driver, "admitted", "cpu", *driver.side._requests["a"].chunk_keys)
    assert [event.token_ids for event in events] == [list(request.prompt_token_ids), [7] * CHUNK]


def test_a_chunk_is_held_when_all_its_shards_are(publishing: Any, hashed: Any) -> None:
    driver, request = publishing(shards=("rank0", "rank1")), hashed("a", CHUNK)
    driver.arrive(request)
    [key] = driver.side._requests["a"].chunk_keys
    assert not tell(driver, "admitted", "cpu", key, shard="rank0")
    assert len(tell(driver, "admitted", "cpu", key, shard="rank1")) == 1
    assert len(tell(driver, "evicted", "cpu", key, shard="rank0")) == 1
    assert not tell(driver, "evicted", "cpu", key, shard="rank1")


def test_an_adapter_is_named(publishing: Any, hashed: Any, tmp_path: Any) -> None:
    driver = publishing()
    driver.link.digests[str(tmp_path)] = "a" * 64
    request = hashed("a", CHUNK, lora_request=LoRARequest("mine", 7, str(tmp_path)))
    driver.arrive(request)
    [event] = tell(driver, "admitted", "cpu", *driver.side._requests["a"].chunk_keys)
    assert (event.lora_id, event.lora_name, event.extra_keys) == (7, "mine", [("mine",)] * 2)


def test_a_tenants_requests_are_not_told(publishing: Any, hashed: Any) -> None:
    driver, request = publishing(), hashed("a", CHUNK, cache_salt="secret")
    driver.hold(request, ["cpu"])
    driver.arrive(request)
    assert not tell(driver, "admitted", "disk", *driver.side._requests["a"].chunk_keys)


def test_when_the_daemon_is_lost_everything_is_taken_back(publishing: Any, hashed: Any) -> None:
    driver, request = publishing(), hashed("a", 2 * CHUNK)
    driver.hold(request, ["cpu", "disk"])
    driver.arrive(request)
    driver.side.events.take()
    assert [(type(event), event.medium) for event in tell(driver, "admitted", "cpu", lost=True)] == [
        (BlockRemoved, "cpu"),
        (BlockRemoved, "disk"),
    ]
    again = hashed("b", 2 * CHUNK)
    driver.arrive(again)
    assert [event.medium for event in driver.side.events.take()] == ["cpu", "disk"]


def test_what_is_kept_in_mind_is_bounded(publishing: Any, hashed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_events, "_MOST_CHUNKS", 2)
    driver, request = publishing(), hashed("a", 3 * CHUNK)
    driver.hold(request, ["cpu"] * 3)
    driver.arrive(request)
    kinds = [type(event) for event in driver.side.events.take()]
    assert kinds == [BlockStored] * 3 + [BlockRemoved]
    assert len(driver.side.events._objects) == 2


def test_an_engine_that_publishes_nothing_asks_for_nothing(driver: Any, hashed: Any) -> None:
    request = hashed("a", CHUNK)
    driver.hold(request, ["cpu"])
    driver.arrive(request)
    driver.link.told.append((False, []))
    assert not driver.side.events.take()
    assert driver.link.told
