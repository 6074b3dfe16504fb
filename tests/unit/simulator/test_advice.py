# SPDX-License-Identifier: Apache-2.0
"""Recommendations: the cheapest sizes that are nearly the best, in bounded time, and a sample says what all say."""

from __future__ import annotations

import random

import pytest

from loracache.simulator import advice
from loracache.simulator.advice import Prices, advise, sizes_for
from loracache.simulator.replay import replay
from loracache.simulator.request import Kept
from loracache.simulator.sampling import sampled, working_set
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request

BLOCK = BLOCK_TOKENS
LRU = Way.parse("lru")
SYSTEM = (1 << 40, (1 << 40) + 1)


def chats(sessions: int, seed: int = 1) -> list[Request]:
    """Sessions of a few turns with a system prompt of two blocks."""
    chance = random.Random(seed)
    turns = []
    for session in range(sessions):
        at, blocks = chance.uniform(0, sessions), chance.randrange(2, 8)
        for _ in range(chance.choice((1, 1, 3, 6))):
            turns.append((at, (*SYSTEM, *range(1000 * session, 1000 * session + blocks))))
            at, blocks = at + chance.expovariate(1 / 150), blocks + chance.randrange(1, 4)
    return [Request(at, BLOCK * len(blocks), blocks) for at, blocks in sorted(turns)]


TRACE = chats(3000)


@pytest.mark.parametrize("blocks", [300, 1000, 3000, 10_000])
def test_a_tenth_of_the_chains_finds_what_all_find(blocks: int) -> None:
    asked = sum(len(request.blocks) for request in TRACE)
    sample = sampled(TRACE, asked / 10, 1)
    assert 0.08 < sum(len(request.blocks) for request in sample.requests) / asked < 0.12
    assert 0.08 < sample.share < 0.12
    whole = replay(TRACE, Sizes(blocks * BLOCK, 0, 1), LRU).hit_rate
    part = replay(sample.requests, Sizes(sample.scaled(blocks * BLOCK), 0, 1), LRU).hit_rate
    assert part == pytest.approx(whole, abs=0.025)


def test_of_a_chain_all_requests_are_taken_or_none() -> None:
    sample = sampled(TRACE, sum(len(request.blocks) for request in TRACE) / 10, 1)
    taken = {request.blocks[2] for request in sample.requests}
    assert [request.blocks for request in TRACE if request.blocks[2] in taken] == [
        request.blocks for request in sample.requests
    ]


def test_what_is_small_is_looked_at_whole() -> None:
    assert sampled(TRACE[:100], 10, 1).requests == TRACE[:100]
    assert sampled(TRACE, 1e9, 1).share == 1.0


def test_what_engines_stored_goes_with_its_chain() -> None:
    kept = [Kept((500_000 + number,), request.blocks[-1], -1, BLOCK) for number, request in enumerate(TRACE)]
    recorded = [
        Request(each.time, each.tokens, each.blocks, held=len(each.blocks), kept=(kept[number - 1],) if number else ())
        for number, each in enumerate(TRACE)
    ]
    sample = sampled(recorded, sum(len(request.blocks) for request in TRACE) / 10, 1)
    ends = {request.blocks[-1] for request in sample.requests}
    stored = [each for request in sample.requests for each in request.kept]
    assert len(stored) > 100
    assert all(each.below in ends for each in stored)


def test_the_working_set_is_everything_once() -> None:
    distinct = {block for request in TRACE for block in request.blocks}
    assert working_set(TRACE, 3, []) == len(distinct) * BLOCK * 3
    mine = [Request(0.0, BLOCK, (1,), 0), Request(1.0, BLOCK, (1,), 1)]
    assert working_set(mine, 1, [10, 20, 40]) == 2 * BLOCK + 30
    assert sizes_for(3 << 30)[0] == 64 << 20
    assert sizes_for(3 << 30)[-1] == 4 << 30


def test_the_cheapest_point_that_is_nearly_the_best_is_recommended() -> None:
    token = 128 << 10  # 64 MiB a block
    memories = [blocks * BLOCK * token for blocks in (100, 1000, 8000, 40_000)]
    found = advise(TRACE, token, [], [LRU], memories, [0], Prices(1, 0), 5)
    saved = [point.saved for point in found.points]
    assert saved == sorted(saved)
    assert found.best is not None
    assert found.best.saved >= 0.95 * saved[-1]
    assert found.best == next(point for point in found.points if point.saved >= 0.95 * saved[-1])
    careful = advise(TRACE, token, [], [LRU], memories, [0], Prices(1, 0), 0)
    assert careful.best is not None
    assert careful.best.memory >= found.best.memory


def test_prices_choose_between_memory_and_disk() -> None:
    token = 128 << 10
    sizes = [100 * BLOCK * token, 40_000 * BLOCK * token]
    cheap = advise(TRACE, token, [], [LRU], sizes, [0, sizes[1]], Prices(100, 0.01), 60).best
    dear = advise(TRACE, token, [], [LRU], sizes, [0, sizes[1]], Prices(1, 1000), 60).best
    assert cheap is not None
    assert (cheap.memory, cheap.disk) == (sizes[0], sizes[1])
    assert dear is not None
    assert (dear.memory, dear.disk) == (sizes[1], 0)


def test_where_nothing_comes_again_nothing_is_recommended() -> None:
    scan = [Request(float(number), BLOCK, (number,)) for number in range(50)]
    assert advise(scan, 1, [], [LRU], [], [], Prices(30, 1), 5).best is None


def test_a_long_trace_is_sampled_so_that_it_ends_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def counted(requests: list[Request], *rest: object, **named: object) -> object:
        nonlocal seen
        seen += sum(len(request.blocks) for request in requests)
        return replay(requests, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(advice, "replay", counted)
    monkeypatch.setattr(advice, "_MOST_BLOCKS", 200_000)
    found = advise(TRACE, 128 << 10, [], [LRU, Way.parse("s3fifo")], [], [], Prices(30, 1), 5)
    assert len(found.points) == 2 * 8 * 3
    assert seen < 260_000
    assert 0 < found.sample < 0.2
