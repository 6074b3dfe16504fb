# SPDX-License-Identifier: Apache-2.0
"""Hints are true, come from as many sessions as asked, and what they hold is there when their session comes back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from loracache.simulator.belady import belady_hit_rate
from loracache.simulator.hints import with_hints
from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Store, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request

BLOCK = BLOCK_TOKENS  # bytes, at one byte a token
LRU = Way.parse("lru")


def request(*blocks: int, time: float = 0.0) -> Request:
    return Request(time, BLOCK * len(blocks), blocks)


def visits(seed: int = 0) -> list[Request]:
    """A third of the sessions come back once, after very many others."""
    chance = random.Random(seed)
    found: list[Request] = []
    for session in range(900):
        blocks = range(100 * session, 100 * session + 5)
        found.append(request(*blocks, time=float(session)))
        if chance.random() < 1 / 3:
            found.append(request(*blocks, time=session + chance.uniform(60, 240)))
    return sorted(found, key=lambda each: each.time)


def test_a_hint_comes_with_each_request_of_a_session_but_the_last() -> None:
    others = [request(number) for number in range(100, 130)]
    requests = [request(1, 2), request(7), request(1, 2, 3), request(1, 5), *others]
    hinted = with_hints(requests, 1.0)
    assert [each.returns for each in hinted[:5]] == [True, False, True, False, False]
    assert hinted[0].session == hinted[2].session == hinted[3].session
    assert len({each.session for each in hinted}) == 2 + len(others)
    assert not any(each.returns for each in with_hints(requests, 0.0))


def test_a_system_prompt_is_no_session() -> None:
    requests = [request(0, number) for number in range(1, 30)] + [request(0, 5, 6)]
    assert [number for number, each in enumerate(with_hints(requests, 1.0)) if each.returns] == [4]


def test_half_of_the_sessions_give_half_of_the_hints() -> None:
    every, half = (sum(each.returns for each in with_hints(visits(), share)) for share in (1.0, 0.5))
    assert every > 250
    assert 0.4 * every < half < 0.6 * every


def test_what_a_hint_holds_outlives_what_comes_after_it_and_goes_when_its_time_is_over() -> None:
    store = Store(Sizes(10 * BLOCK, 0, 1), LRU)
    first = replace(request(1, 2, 3), session=1, returns=True)
    again = replace(first, returns=False)
    store.serve(first)
    for number in range(20):
        store.serve(request(10 * number + 50, 10 * number + 51))
    assert store.serve(again).cpu == 3 * BLOCK
    store.serve(first)
    for number in range(20):
        store.serve(request(10 * number + 50, 10 * number + 51, time=2000.0))
    assert store.serve(again).cpu == 0


def test_hints_hold_no_more_than_their_part_and_stores_go_on() -> None:
    store = Store(Sizes(20 * BLOCK, 0, 1), LRU)
    for number in range(1, 40):
        store.serve(replace(request(10 * number, 10 * number + 1), session=number, returns=True))
        held = [node for node in store.index if node.leases]
        assert sum(node.size for node in held) <= 18 * BLOCK
    assert len(held) == 18
    assert store.serve(request(390, 391)).cpu == 2 * BLOCK  # the last, which found no room to be held


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_half_of_the_hints_close_a_third_of_the_gap_to_who_knows_the_future(policy: str) -> None:
    requests, sizes = visits(), Sizes(300 * BLOCK, 0, 1)
    lru = replay(requests, sizes, LRU).hit_rate
    gap = belady_hit_rate(requests, sizes.memory, 1, []) - lru
    told = replay(with_hints(requests, 0.5), sizes, Way.parse(policy)).hit_rate
    assert gap > 0.1
    assert told - lru > gap / 3
