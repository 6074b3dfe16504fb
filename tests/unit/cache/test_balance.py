# SPDX-License-Identifier: Apache-2.0
"""Adapters and KV in one tier: room goes where its want costs more, and a batch's adapters always have theirs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from loracache.cache.policy.adaptive import Adaptive
from loracache.cache.policy.balance import Balance
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Index, Node
from loracache.simulator.clock import Hardware
from loracache.simulator.replay import Replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

TIER, EACH = 1000, 10
KV, LORA = False, True


def full(balance: Balance, kind: bool) -> list[int]:
    """So many victims of one kind as are remembered; answers their places."""
    return [balance.left(kind, EACH, TIER) for _ in range(TIER // EACH // 4)]


def test_who_is_asked_for_after_it_left_gets_room_for_its_kind() -> None:
    balance = Balance()
    balance.adapters = 300.0
    last = full(balance, LORA)[-1]
    balance.back(last, LORA, 2 * EACH, 300, TIER)
    assert balance.adapters == 320
    for place in full(balance, KV)[:3]:
        balance.back(place, KV, EACH, 300, TIER)
    assert balance.adapters == pytest.approx(290, abs=1)
    before = balance.adapters
    balance.back(last, LORA, EACH, 300, TIER)  # it has not left since
    assert balance.adapters == before


def test_what_costs_the_same_by_a_byte_moves_nothing_in_the_end() -> None:
    balance = Balance()
    balance.adapters = 500.0
    for _ in range(20):
        for kind in (KV, LORA):
            balance.back(full(balance, kind)[0], kind, EACH, 500, TIER)
    assert balance.adapters == pytest.approx(500, abs=2 * EACH)


def test_the_part_of_adapters_stays_near_what_they_take_and_one_miss_moves_little() -> None:
    balance = Balance()
    balance.adapters = 100.0
    for _ in range(50):
        balance.back(full(balance, LORA)[0], LORA, 100 * TIER, 100, TIER)
    assert 100 < balance.adapters <= 100 + TIER / 8


def test_victims_are_remembered_as_far_as_they_were_the_last() -> None:
    balance = Balance()
    balance.adapters = 0.0
    places = [balance.left(LORA, EACH, TIER) for _ in range(1000)]
    balance.back(places[900], LORA, EACH, 0, TIER)
    assert balance.adapters == 0
    balance.back(places[999], LORA, EACH, 0, TIER)
    assert balance.adapters > 0


def adapter(number: int, tick: int) -> Node:
    node = Node(number.to_bytes(32, "big"), Kind.LORA, None)
    node.tick = tick
    return node


def test_adapters_never_have_less_than_a_batch_needs() -> None:
    balance = Balance(batch=8)
    balance.adapters = 0.0
    assert balance.over(100, 10, 0, 1000, TIER)
    for number in range(10):
        balance.used(adapter(number, number), 1000)
    assert not balance.over(50, 5, 5000, 10_000, TIER)  # 8 requests for 10 adapters need 5.7 of them, of 10 bytes
    assert balance.over(60, 6, 5000, 10_000, TIER)
    assert balance.over(600, 5, 10_000, 10_000, TIER)  # but no more than half of the tier


def test_an_adapter_that_leaves_with_its_chunks_was_used_all_the_same() -> None:
    """It is no candidate while it has chunks, nor when all of them leave together."""
    index = Index(lambda tier, node: policy.offer(node), lambda extents: None)
    policy = Adaptive(index, Tier.CPU, lambda node: node.size)
    index.on_left = lambda tier, node: policy.withdraw(node)
    index.on_gone = lambda tier, node: policy.gone(node)
    chain = [
        index.insert(ObjectInfo(key, parent, kind, bytes(32), 1, 0))
        for key, parent, kind in ((b"a" * 32, b"", Kind.LORA), (b"c" * 32, b"a" * 32, Kind.KV))
    ]
    for node in filter(None, chain):
        index.enter(node, Tier.CPU)
    assert chain[0] is not None
    chain[0].hits += 5
    index.touch(chain[0])
    with index.together():
        for node in filter(None, reversed(chain)):
            index.leave(node, Tier.CPU)
    assert policy._balance._visits.all(0, 0) == [pytest.approx(6, abs=1)]


def mixed(adapters: int, seed: int = 0) -> list[Request]:
    """Sessions of one to four turns, each with an adapter of its own; the n-th adapter as often as 1 / n."""
    chance = random.Random(seed)
    weights = [1 / (number + 1) for number in range(adapters)]
    requests = []
    for session in range(1000):
        (number,) = chance.choices(range(adapters), weights)
        for turn in range(1, chance.choice((1, 1, 2, 4)) + 1):
            blocks = tuple(range(100 * session, 100 * session + 3 * turn))
            requests.append(Request(session + 15 * turn, BLOCK_TOKENS * len(blocks), blocks, number))
    return sorted(requests, key=lambda request: request.time)


def work(requests: Sequence[Request], policy: str, origin: float) -> float:
    """Seconds of the engines. origin: bytes a second of adapters' files; a byte is a token's KV."""
    hardware = Hardware(cpu=1e9, below=Speeds(prefill=8000, disk=1e9, origin=origin, origin_latency=0))
    sizes = Sizes(150 * BLOCK_TOKENS, 0, 1, [2 * BLOCK_TOKENS] * 50)
    return sum(Replay(requests, sizes, Way.parse(policy), hardware).seconds)


@pytest.mark.parametrize("origin", [1_000, 8_000, 100_000])
def test_one_pool_does_as_well_as_the_best_of_all_splits_whatever_adapters_cost(origin: float) -> None:
    requests = mixed(50)
    splits = [work(requests, f"static:{percent}", origin) for percent in range(10, 100, 10)]
    adaptive = work(requests, "adaptive", origin)
    assert adaptive < 1.03 * min(splits)  # it has to find it out first
    assert adaptive < work(requests, "lru", origin)


def test_without_the_balance_dear_adapters_are_lost() -> None:
    requests = mixed(50)
    assert work(requests, "adaptive", 1_000) < 0.9 * work(requests, "adaptive-balance", 1_000)
