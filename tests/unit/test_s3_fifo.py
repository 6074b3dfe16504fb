# SPDX-License-Identifier: Apache-2.0
"""The order in which things leave a cache: every one once, none that must stay, and no scan throws out what is hot."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from loracache.s3_fifo import S3FIFO

KEYS = st.integers(0, 12)


class Cache(RuleBasedStateMachine):
    """The order beside the set of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.order: S3FIFO[int] = S3FIFO()
        self.there: dict[int, int] = {}

    @rule(key=KEYS, size=st.integers(0, 9))
    def add(self, key: int, size: int) -> None:
        if key not in self.there:
            self.order.add(key, size)
            self.there[key] = size

    @rule(key=KEYS)
    def use(self, key: int) -> None:
        if key in self.there:
            self.order.use(key)

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        self.order.remove(key)
        self.there.pop(key, None)

    @rule(held=st.sets(KEYS))
    def evict(self, held: set[int]) -> None:
        victim = self.order.evict(lambda key: key not in held)
        if victim is None:
            assert set(self.there) <= held
        else:
            assert victim not in held
            del self.there[victim]

    @rule(held=st.sets(KEYS))
    def evict_all(self, held: set[int]) -> None:
        gone = list(iter(lambda: self.order.evict(lambda key: key not in held), None))
        assert sorted(gone) == sorted(set(self.there) - held)
        self.there = {key: size for key, size in self.there.items() if key in held}

    @invariant()
    def it_knows_what_is_there(self) -> None:
        assert len(self.order) == len(self.there)
        assert all((key in self.order) == (key in self.there) for key in range(13))
        assert self.order._size == sum(self.there.values())
        assert self.order._small_size == sum(self.there[key] for key in self.order._small)
        assert not self.order._ghosts.keys() & self.there.keys()


def test_every_one_leaves_once_and_none_that_must_stay() -> None:
    run_state_machine_as_test(Cache, settings=settings(max_examples=150, stateful_step_count=50))


class LRU:
    """What it is compared with."""

    def __init__(self) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def add(self, key: int, size: int) -> None:
        self._keys[key] = None

    def use(self, key: int) -> None:
        self._keys.move_to_end(key)

    def evict(self, may_leave: Callable[[int], bool]) -> int | None:
        return self._keys.popitem(last=False)[0]


def hit_rate(order: S3FIFO[int] | LRU, trace: list[int], room: int) -> float:
    hits = 0
    for key in trace:
        if key in order:
            hits += 1
            order.use(key)
            continue
        if len(order) >= room:
            order.evict(lambda _: True)
        order.add(key, 1)
    return hits / len(trace)


def zipf(rng: random.Random, keys: int, length: int, skew: float = 1.0) -> list[int]:
    return rng.choices(range(keys), [1 / (1 + rank) ** skew for rank in range(keys)], k=length)


def with_scans(rng: random.Random, keys: int, length: int, every: int, scan: int) -> list[int]:
    """Tenants as popular as Zipf's law has it; from time to time a row of others, each once."""
    cold = itertools.count(keys)
    trace = []
    for key, number in zip(zipf(rng, keys, length), itertools.count(1), strict=False):
        trace.append(key)
        if number % every == 0:
            trace += itertools.islice(cold, scan)
    return trace


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("room", "lead"), [(16, 1.15), (32, 1.15), (64, 1.1)])
def test_beside_scans_of_cold_tenants_more_requests_find_their_adapter_than_with_the_least_recently_used(
    seed: int, room: int, lead: float
) -> None:
    """Hit rates: docs/lora.md. 200 tenants; every 200 requests a scan of 100 others."""
    trace = with_scans(random.Random(seed), 200, 20_000, every=200, scan=100)
    ours, lru = hit_rate(S3FIFO(), trace, room), hit_rate(LRU(), trace, room)
    assert ours > lead * lru, f"S3-FIFO {ours:.3f}, LRU {lru:.3f}"


@pytest.mark.parametrize("skew", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("room", [4, 16, 64])
def test_without_scans_it_is_not_worse(skew: float, room: int) -> None:
    trace = zipf(random.Random(5), 200, 20_000, skew)
    ours, lru = hit_rate(S3FIFO(), trace, room), hit_rate(LRU(), trace, room)
    assert ours >= lru, f"S3-FIFO {ours:.3f}, LRU {lru:.3f}"


@given(st.integers(1, 40), st.integers(1, 400), st.randoms(use_true_random=False))
def test_no_scan_throws_out_more_than_the_small_queue(hot: int, scan: int, rng: random.Random) -> None:
    order: S3FIFO[int] = S3FIFO()
    room = hot + max(1, hot // 8)
    hit_rate(order, [rng.randrange(hot) for _ in range(60 * hot)], room)
    before = [key for key in range(hot) if key in order]
    hit_rate(order, list(range(1000, 1000 + scan)), room)
    assert sum(key in order for key in before) >= len(before) - room // 5 - 1


def drifting(rng: random.Random) -> Iterator[int]:
    """Other tenants are popular every 2,000 requests."""
    for phase in range(8):
        yield from (100 * phase + key for key in zipf(rng, 100, 2_000))


@pytest.mark.parametrize("room", [4, 16])
def test_what_was_hot_once_does_not_stay_for_ever(room: int) -> None:
    trace = list(drifting(random.Random(7)))
    order: S3FIFO[int] = S3FIFO()
    ours, lru = hit_rate(order, trace, room), hit_rate(LRU(), trace, room)
    assert ours >= 0.9 * lru, f"S3-FIFO {ours:.3f}, LRU {lru:.3f}"
    assert sum(key in order for key in range(700)) <= room // 4


def test_what_is_remembered_is_bounded() -> None:
    order: S3FIFO[int] = S3FIFO()
    hit_rate(order, list(range(10_000)), 24)
    assert len(order) == 24
    assert len(order._ghosts) <= 24
