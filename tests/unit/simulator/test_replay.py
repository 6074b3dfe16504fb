# SPDX-License-Identifier: Apache-2.0
"""Replays: what they count is what happened, no policy does better than the bound, and no KV is without its adapter."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracache.cache.policy import ADMISSIONS, POLICIES
from loracache.simulator.belady import belady_hit_rate
from loracache.simulator.clock import Engines, Hardware
from loracache.simulator.replay import Replay, replay
from loracache.simulator.store import Sizes, Store, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request, with_adapters
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

BLOCK = BLOCK_TOKENS  # bytes, at one byte a token


def request(*blocks: int, time: float = 0.0, adapter: int = -1) -> Request:
    return Request(time, BLOCK * len(blocks), blocks, adapter)


def chat(sessions: int, seed: int = 0) -> list[Request]:
    """Sessions of a few turns, each longer by some blocks, mixed; half of them end after the first."""
    chance = random.Random(seed)
    turns: list[tuple[float, tuple[int, ...]]] = []
    for session in range(sessions):
        begin, blocks = chance.uniform(0, sessions), chance.randrange(1, 12)
        for turn in range(chance.choice((1, 1, 2, 6))):
            blocks += 2 * turn
            turns.append((begin + 3 * turn, tuple(range(1000 * session, 1000 * session + blocks))))
    return [request(*blocks, time=time) for time, blocks in sorted(turns)]


CHAT = chat(300)
LRU = Way.parse("lru")


def check(store: Store) -> None:
    """What holds after every request."""
    index, sizes = store.index, store.sizes
    for tier, limit in ((Tier.CPU, sizes.memory), (Tier.DISK, sizes.disk)):
        held = [node for node in index if node.held_in(tier)]
        assert index.bytes[tier] == sum(node.size for node in held) <= limit
        for node in held:
            assert node.parent is None or node.parent.held_in(tier), "a child outlived its parent"
    assert sum(store._used.values()) == index.bytes[Tier.CPU] + index.bytes[Tier.DISK]
    kv = [node for node in index for tier in (Tier.CPU, Tier.DISK) if node.held_in(tier) and node.kind is Kind.KV]
    assert sum(sum(of.values()) for of in store._kv_of.values()) == sum(node.size for node in kv)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_bytes_are_exact_and_the_tree_whole_after_every_request(policy: str, data: st.DataObject) -> None:
    admission = data.draw(st.sampled_from(sorted(ADMISSIONS)))
    memory, disk = data.draw(st.integers(3, 30)), data.draw(st.sampled_from([0, 10, 40]))
    adapters = data.draw(st.integers(0, 3))
    store = Store(
        Sizes(memory * BLOCK, disk * BLOCK, 1, [BLOCK, 2 * BLOCK, 700]), Way.parse(policy, admission=admission)
    )
    for each in with_adapters(chat(12, data.draw(st.integers(0, 99))), adapters, 1.0):
        found = store.serve(each)
        assert 0 <= found.cpu + found.disk <= each.tokens
        check(store)
        assert store.invalid_share() == 0


def test_hits_are_leading_tokens_and_loads_are_counted() -> None:
    store = Store(Sizes(4 * BLOCK, 8 * BLOCK, 1), LRU)
    store.serve(request(1, 2, 3))
    assert store.serve(request(1, 2, 9)).cpu == 2 * BLOCK
    store.serve(request(20, 21, 22, 23))  # memory is theirs now
    found = store.serve(request(1, 2, 3))
    assert (found.cpu, found.disk, found.disk_bytes) == (0, 3 * BLOCK, 3 * BLOCK)
    assert store.counts["disk_written"] == 8 * BLOCK


def test_an_adapter_is_loaded_once_as_long_as_it_stays() -> None:
    store = Store(Sizes(10 * BLOCK, 0, 1, [BLOCK, BLOCK]), LRU)
    assert store.serve(request(1, adapter=0)).adapter is None
    assert store.serve(request(2, adapter=0)).adapter is Tier.CPU
    assert store.serve(request(1, adapter=1)).cpu == 0  # another adapter's KV is other KV
    assert store.counts["adapters_loaded"] == 2


def test_two_pools_keep_kv_whose_adapter_has_gone() -> None:
    requests = with_adapters(CHAT, 8, 0.0)
    sizes = [2 * BLOCK] * 8
    apart = replay(requests, Sizes(100 * BLOCK, 0, 1, sizes), Way.parse("static:5"))
    together = replay(requests, Sizes(100 * BLOCK, 0, 1, sizes), LRU)
    assert apart.policy == "static:5"
    assert apart.invalid_kv > 0.2
    assert together.invalid_kv == 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("blocks", [20, 100, 10_000])
def test_no_policy_finds_more_than_the_bound(policy: str, blocks: int) -> None:
    bound = belady_hit_rate(CHAT, blocks * BLOCK, 1, [])
    assert replay(CHAT, Sizes(blocks * BLOCK, 0, 1), Way.parse(policy)).hit_rate <= bound
    if blocks == 10_000:  # nothing leaves
        assert replay(CHAT, Sizes(blocks * BLOCK, 0, 1), Way.parse(policy)).hit_rate == pytest.approx(bound)


def plain_bound(requests: Sequence[Request], blocks: int) -> int:
    """Belady's rule at its plainest, block by block."""
    held: set[int] = set()
    found = 0
    for number, each in enumerate(requests):
        for block in each.blocks:
            if block not in held:
                break
            found += 1
        held |= set(each.blocks)

        def next_use(block: int, number: int = number) -> tuple[int, int]:
            for later in range(number + 1, len(requests)):
                if block in requests[later].blocks:
                    return later, requests[later].blocks.index(block)
            return len(requests), 0

        held = set(sorted(held, key=next_use)[:blocks])
    return found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), blocks=st.integers(1, 40))
def test_the_bound_is_that_of_the_plain_rule(seed: int, blocks: int) -> None:
    requests = chat(10, seed)
    asked = sum(len(each.blocks) for each in requests)
    assert belady_hit_rate(requests, blocks * BLOCK, 1, []) == pytest.approx(plain_bound(requests, blocks) / asked)


def test_second_touch_writes_little_of_what_never_comes_again() -> None:
    scan = [request(*range(10 * number, 10 * number + 10), time=number) for number in range(200)]
    runs = {
        name: replay(scan, Sizes(50 * BLOCK, 500 * BLOCK, 1), Way.parse("lru", admission=name)) for name in ADMISSIONS
    }
    assert runs["all"].bytes_disk_written == 2000 * BLOCK
    assert runs["second_touch"].bytes_disk_written == 0
    runs = {
        name: replay(CHAT, Sizes(50 * BLOCK, 500 * BLOCK, 1), Way.parse("lru", admission=name)) for name in ADMISSIONS
    }
    assert 0 < runs["second_touch"].bytes_disk_written < runs["all"].bytes_disk_written


def test_time_to_first_token_is_waiting_and_work() -> None:
    queue = Engines(2)
    assert [queue.serve(0.0, 2.0), queue.serve(0.0, 3.0), queue.serve(1.0, 1.0), queue.serve(9.0, 1.0)] == [2, 3, 2, 1]
    assert (queue.mean, queue.percentile(0.99)) == (2.0, 3)


def test_the_same_replay_at_every_load() -> None:
    requests = [request(number, time=2.0 * number) for number in range(101)]  # 0.512 s each, at 1,000 tokens a second
    done = Replay(requests, Sizes(10 * BLOCK, 0, 1), LRU, Hardware(prefill=1000))
    assert done.run().ttft_mean == pytest.approx(0.512)
    assert done.queue(engines=1, load=0.99).mean < 0.512 * 1.2
    assert done.queue(engines=1, load=2.0).mean > 10  # half of the work waits in the end
    assert done.queue(engines=2, load=2.0).mean == pytest.approx(done.queue(engines=1, load=2.0).mean / 2, rel=0.1)
    assert done.run(engines=1, load=2.0).hit_rate == done.run().hit_rate


def test_kv_in_memory_whose_adapter_is_below_is_seen() -> None:
    requests = with_adapters(CHAT, 8, 0.0)
    sizes = Sizes(100 * BLOCK, 10_000 * BLOCK, 1, [2 * BLOCK] * 8)
    apart = replay(requests, sizes, Way.parse("static:5"))
    assert apart.invalid_kv == 0  # the disk has everything
    assert apart.invalid_kv_cpu > 0.2


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("disk", [0, 300])
def test_the_tree_alone_keeps_kv_from_being_without_its_adapter(policy: str, disk: int) -> None:
    requests = with_adapters(CHAT, 12, 0.5)
    sizes = Sizes(60 * BLOCK, disk * BLOCK, 1, [2 * BLOCK] * 12)
    with_it = replay(requests, sizes, Way.parse(policy))
    assert with_it.invalid_kv == with_it.invalid_kv_cpu == 0
    without = replay(requests, sizes, Way.parse(f"{policy}-tree"))
    assert without.policy == f"{policy}-tree"
    if policy == "lru":  # those that weigh cost may keep adapters as long as their KV
        assert without.invalid_kv_cpu > 0


def test_of_what_leaves_together_nobody_becomes_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a daemon: a parent that goes right behind its last child is put into no line and taken out again."""
    offer, offered = POLICIES["lru"].offer, []  # type: ignore[attr-defined]
    monkeypatch.setattr(POLICIES["lru"], "offer", lambda policy, node: (offered.append(node), offer(policy, node)))
    store = Store(Sizes(20 * BLOCK, 0, 1), LRU)
    for number in range(50):
        store.serve(request(*range(10 * number, 10 * number + 10)))
    assert store.counts["evicted"] == 480
    assert len(offered) == 500
