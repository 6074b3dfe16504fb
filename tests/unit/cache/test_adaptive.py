# SPDX-License-Identifier: Apache-2.0
"""Adaptive finds out which way is best for its tier, and is not far from it then."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from loracache.cache.policy.shadow import SHARES, Shadow, Shadows
from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request


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


def drive(shadows: Shadows, requests: Sequence[Request]) -> None:
    for each in requests:
        shadows.ask([block.to_bytes(32, "little") for block in each.blocks])
        assert sum(1 for _ in shadows.work()) == 1


@pytest.mark.parametrize(("requests", "shares"), [(scans(), {0.0}), (turns(), {1.0, 0.7, 0.4})])
def test_the_best_shadow_is_in_force(requests: Sequence[Request], shares: set[float]) -> None:
    shadows = Shadows(lambda: 600)
    drive(shadows, requests)
    assert SHARES[shadows.best] in shares


def test_lookups_that_nobody_looks_at_are_forgotten() -> None:
    shadows = Shadows(lambda: 10)
    for number in range(10_000):
        shadows.ask([number.to_bytes(32, "little")])
    assert sum(1 for _ in shadows.work()) == 256
    shadows.ask([number.to_bytes(32, "little") for number in range(100_000)])
    assert len(shadows._asked[0]) == 2048


def test_a_shadow_is_as_much_smaller_as_its_sample() -> None:
    shadows = Shadows(lambda: 1_000_000)
    drive(shadows, [request(*range(1000))])
    assert 0 < shadows._now < 30


def test_a_shadow_holds_no_more_than_it_may() -> None:
    for share in SHARES:
        shadow = Shadow(share)
        for name in range(100):
            shadow.use(name % 30, name, known=name >= 30)
            shadow.shrink(10)
            assert len(shadow._once) + len(shadow._again) <= 10
