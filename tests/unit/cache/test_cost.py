# SPDX-License-Identifier: Apache-2.0
"""FASTLIBRA's model: each part says what it says in the paper, and is a switch."""

from __future__ import annotations

import random

import pytest

from loracache.cache.policy.adaptive import Adaptive
from loracache.cache.policy.cost import Cost
from loracache.cache.policy.visits import Visits, needed
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Index
from loracache.cache.state.node import Node
from loracache.errors import ConfigError
from loracache.simulator.replay import Replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier


def node(number: int = 0, kind: Kind = Kind.KV, size: int = 0) -> Node:
    made = Node(number.to_bytes(32, "big"), kind, None)
    made.size = size
    return made


def test_visits_fade_and_are_counted_once() -> None:
    visits, each = Visits(), node()
    each.hits, each.tick = 3, 100
    assert visits.of(each, 50) == visits.of(each, 50) == 4
    each.hits, each.tick = 5, 150
    assert visits.of(each, 50) == pytest.approx(4 / 2.718281828 + 2)
    each.hits, each.tick = 6, 10_000
    assert visits.of(each, 50) == pytest.approx(1)
    assert visits.of(each, 0) == pytest.approx(1)


def test_what_comes_again_is_worth_what_it_was_before() -> None:
    visits, before, after = Visits(), node(), node()
    before.hits, before.tick = 9, 100
    visits.of(before, 50)
    after.tick = 110  # the same key, met anew
    assert visits.of(after, 50) > 8
    visits.forget(after)
    assert visits.of(after, 50) == 1


def test_adapters_that_a_batch_needs() -> None:
    assert needed([], 8) == 0
    assert needed([3.0], 8) == 1
    assert needed([1.0, 1.0], 1) == pytest.approx(1)
    assert needed([1.0, 1.0], 2) == pytest.approx(1.5)


def test_too_few_adapters_make_each_worth_more_never_less() -> None:
    policy = Cost(Index(lambda tier, node: None, lambda extents: None), Tier.CPU, lambda node: node.size)
    assert policy.lora_eval(needed=20, held=5) == 4
    assert policy.lora_eval(needed=5, held=20) == 1


def test_kv_of_the_tier_below_is_worth_its_load_and_an_adapter_is_never_computed() -> None:
    speeds = Speeds(prefill=1000, disk=4000, disk_latency=1, origin=100, origin_latency=2)
    chunk, adapter = node(size=8000), node(kind=Kind.LORA, size=8000)
    assert [speeds.seconds(each, Tier.CPU) for each in (chunk, adapter)] == [8, 82]
    for each in (chunk, adapter):
        each.present = 1 << Tier.CPU | 1 << Tier.DISK
    assert [speeds.seconds(each, Tier.CPU) for each in (chunk, adapter)] == [2, 3]
    assert [speeds.seconds(each, Tier.DISK) for each in (chunk, adapter)] == [8, 82]
    assert Speeds(prefill=4000, disk=1000).seconds(chunk, Tier.CPU) == 2  # computed sooner than loaded


def busy(seed: int = 0) -> list[Request]:
    chance = random.Random(seed)
    requests = []
    for number in range(1500):
        adapter = min(int(chance.expovariate(0.15)), 39)
        session = int(chance.paretovariate(0.6)) % 400
        blocks = tuple(range(100 * session, 100 * session + 1 + session % 7))
        requests.append(Request(float(number), BLOCK_TOKENS * len(blocks), blocks, adapter))
    return requests


@pytest.mark.parametrize(
    "name",
    [f"cost-{part}" for part in Cost.PARTS] + [f"adaptive-{part}" for part in Adaptive.PARTS if part != "count"],
)
def test_each_part_that_is_switched_off_was_worth_something(name: str) -> None:
    requests = busy()
    sizes = Sizes(120 * BLOCK_TOKENS << 17, 0, 1 << 17, [(1 + number % 4) * 40 << 20 for number in range(40)])
    whole, without = (Replay(requests, sizes, Way.parse(each)) for each in (name.partition("-")[0], name))
    assert whole.seconds != without.seconds
    assert without.run().policy == name


@pytest.mark.parametrize("policy", ["cost-hits", "lru-cost", "static:20-tree", "cost-"])
def test_a_part_that_there_is_not_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match="policy"):
        Way.parse(policy)
