# SPDX-License-Identifier: Apache-2.0
"""Adaptive finds out which way is best for its tier, and is not far from it then."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from loracache.cache.policy.shadow import LINES, WAYS, Shadow, Shadows
from loracache.cache.state.index import Node
from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request
from loracache.storage_backends.base import Kind


def hit_rate(requests: Sequence[Request], blocks: int, policy: str) -> float:
    return replay(requests, Sizes(blocks * BLOCK_TOKENS, 0, 1), Way.parse(policy)).hit_rate


def request(*blocks: int) -> Request:
    return Request(0.0, BLOCK_TOKENS * len(blocks), blocks)


def scans(seed: int = 0) -> list[Request]:
    """Of ten prompts nine never come again; the tenth is one of a hundred that do, too far apart for a small tier."""
    chance = random.Random(seed)
    fresh = iter(range(10**6, 10**9, 10))
    return [
        request(*range(10 * (session := chance.randrange(100)), 10 * session + 5))
        if chance.random() < 0.1
        else request(*range(begin := next(fresh), begin + 5))
        for _ in range(5_000)
    ]


def turns(seed: int = 0) -> list[Request]:
    """Sessions that come back for a while, soon, and never again."""
    chance = random.Random(seed)
    live: list[tuple[int, int]] = []
    requests = []
    for number in range(12_000):
        if len(live) < 40 or chance.random() < 0.2:
            live.append((100 * number, 1))
        begin, length = live.pop(chance.randrange(len(live)))
        requests.append(request(*range(begin, begin + length)))
        if length < 8:
            live.append((begin, length + 1))
    return requests


def test_what_comes_again_is_kept_from_what_never_does() -> None:
    requests = scans()
    assert hit_rate(requests, 600, "adaptive") > 3 * hit_rate(requests, 600, "lru")


def test_where_lru_is_best_it_does_as_lru_does() -> None:
    requests = turns()
    lru = hit_rate(requests, 700, "lru")
    assert hit_rate(requests, 700, "s3fifo") < 0.97 * lru
    assert hit_rate(requests, 700, "adaptive") > 0.97 * lru


def test_among_what_comes_again_it_keeps_what_comes_often() -> None:
    """A few prompts come ten times as often as very many others, which come again once or twice."""
    chance = random.Random(0)
    picks = chance.choices(range(4020), [10.0] * 20 + [1.0] * 4000, k=8_000)
    requests = [request(*range(5 * pick, 5 * pick + 5)) for pick in picks]
    assert hit_rate(requests, 200, "adaptive") > 2 * hit_rate(requests, 200, "lru")


LRU, RECENT, OFTEN, TWICE = WAYS


def node(key: bytes, tick: int) -> Node:
    found = Node(key, Kind.KV, None)
    found.tick = tick
    return found


def shadows_of(objects: int) -> Shadows:
    """Of a tier that is full of what is never asked for."""
    shadows = Shadows()
    for number in range(objects):
        shadows.entered(node(number.to_bytes(32, "little"), 0))
    return shadows


def drive(shadows: Shadows, requests: Sequence[Request], objects: int) -> None:
    now = 0
    for each in requests:
        shadows.ask([(1 << 40 | block).to_bytes(32, "little") for block in each.blocks], now)
        now += len(each.blocks)
        slices = sum(1 for _ in shadows.work(lambda node: 0, objects))
        assert slices == 1 if now > len(each.blocks) else slices >= 1  # at first they become what the tier is


@pytest.mark.parametrize(("requests", "ways"), [(scans(), {TWICE, OFTEN}), (turns(), {LRU, RECENT})])
def test_the_best_shadow_is_in_force(requests: Sequence[Request], ways: set[tuple[float, ...]]) -> None:
    shadows = shadows_of(600)
    drive(shadows, requests, 600)
    assert shadows.best in ways


def test_shadows_of_a_large_tier_begin_in_slices_and_are_whole_then() -> None:
    shadows = shadows_of(5_000)
    shadows.ask([bytes(32)], 0)
    begun = shadows.work(lambda node: 0, 5_000)
    next(begun)
    assert list(shadows.work(lambda node: 0, 5_000)) == []  # meanwhile others choose without them
    assert sum(1 for _ in begun) > 7
    assert [len(shadow) for shadow in shadows._shadows] == [5_000] * len(WAYS)


def test_lookups_that_wait_are_bounded_in_chunks() -> None:
    shadows = shadows_of(10)
    list(shadows.work(lambda node: 0, 10))
    for number in range(1000):
        shadows.ask([bytes(32)] * (100 + 50 * number), number)
    waiting = sum(len(keys) for keys, _ in shadows._asked)
    assert 30_000 < waiting == shadows._asked.chunks <= 32_768
    assert list(shadows._asked)[-1][1] == 999


def test_in_a_tier_that_is_not_full_the_last_lookup_waits_alone() -> None:
    shadows = shadows_of(10)
    for number in range(100):
        shadows.ask([bytes(32)] * 500, number)
    assert [(len(keys), now) for keys, now in shadows._asked] == [(500, 99)]


def test_chance_changes_nothing() -> None:
    """A difference of one lookup, however long, is no evidence."""
    shadows = shadows_of(100)
    drive(shadows, [request(*range(60)), request(*range(1000, 1090)), request(*range(60))], 100)
    assert shadows.best == TWICE


def test_lookups_that_nobody_looks_at_are_forgotten() -> None:
    shadows = shadows_of(10)
    list(shadows.work(lambda node: 0, 10))
    for number in range(10_000):
        shadows.ask([number.to_bytes(32, "little")], 0)
    assert sum(1 for _ in shadows.work(lambda node: 0, 10)) == 256
    shadows.ask([number.to_bytes(32, "little") for number in range(100_000)], 0)
    assert [len(keys) for keys, _ in shadows._asked] == [2048]


def test_a_shadow_begins_as_the_tier_is() -> None:
    shadows = shadows_of(100)
    list(shadows.work(lambda node: 2, 100))
    for shadow in shadows._shadows:
        assert len(shadow) == len(shadow._lines[2]) == 100


def test_of_a_large_tier_a_sample_is_enough() -> None:
    shadows = Shadows()
    nodes = [node(number.to_bytes(2, "big") + bytes(30), 0) for number in range(65_536)]
    for each in nodes:
        shadows.entered(each)
    assert 4096 <= len(shadows._sample) <= 8192
    for each in nodes:
        shadows.left(each)
    assert not shadows._sample


def test_a_shadow_holds_no_more_than_it_may_and_a_name_once() -> None:
    chance = random.Random(0)
    for way in WAYS:
        shadow = Shadow(way)
        for now in range(200):
            names = {chance.randrange(40).to_bytes(1): chance.randrange(LINES) for _ in range(chance.randrange(1, 15))}
            shadow.ask(names.items(), now, 10, 10)
            held = [name for line in shadow._lines for name in line]
            assert len(held) == len(set(held)) == len(shadow) <= 10


def test_a_chunk_that_a_lookup_names_twice_is_asked_for_once() -> None:
    """Else it would stand in two lines, and leave twice."""
    shadows = shadows_of(10)
    list(shadows.work(lambda node: 0, 10))
    shadows.ask([b"twice".ljust(32)] * 2, 1)
    for number in range(100):
        shadows.ask([(1 << 40 | number).to_bytes(32, "little")], number)
    list(shadows.work(lambda node: 0, 10))
    assert [sum(map(len, shadow._lines)) for shadow in shadows._shadows] == [10] * len(WAYS)
