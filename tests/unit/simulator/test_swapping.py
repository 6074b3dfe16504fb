# SPDX-License-Identifier: Apache-2.0
"""Prefetch in a replay: what was announced is in memory when it comes, and what is only guessed evicts nobody."""

from __future__ import annotations

import random

import pytest

from loracache.errors import ConfigError
from loracache.simulator.replay import replay
from loracache.simulator.request import BLOCK_TOKENS, Request
from loracache.simulator.store import Sizes, Store, Way
from loracache.simulator.swapping import Prefetch, parse_prefetch
from loracache.tiers import Tier

BLOCK = BLOCK_TOKENS * 1000  # bytes
LRU = Way.parse("lru")


def request(time: float, *blocks: int, adapter: int = -1) -> Request:
    return Request(time, BLOCK_TOKENS * len(blocks), blocks, adapter)


def chats(count: int = 200) -> list[Request]:
    """Sessions of up to four turns a minute apart, each longer by a block, with adapters."""
    chance = random.Random(0)
    made = []
    for session in range(count):
        begin, first = chance.uniform(0, 3 * count), 1000 * session
        for turn in range(chance.choice((1, 2, 4))):
            blocks = range(first, first + 3 + turn)
            made.append(request(begin + 60 * turn, *blocks, adapter=session % 5))
    return sorted(made, key=lambda each: each.time)


CHATS = chats()
SIZES = Sizes(40 * BLOCK, 10_000 * BLOCK, 1000, [BLOCK] * 5)


def run(prefetch: str, restart: float = 0.0, sizes: Sizes = SIZES) -> dict[str, object]:
    return replay(CHATS, sizes, LRU, prefetch=prefetch, restart=restart).as_dict() | {"seconds": 0, "choice_us": 0}


@pytest.mark.parametrize(
    ("text", "meant"),
    [("none", (False, 0)), ("timer", (True, 0)), ("hints:50", (False, 50)), ("timer+hints:100", (True, 100))],
)
def test_what_is_prefetched_is_told_in_words(text: str, meant: tuple[bool, int]) -> None:
    assert parse_prefetch(text) == meant


@pytest.mark.parametrize("text", ["", "soon", "hints", "hints:0", "hints:101", "hints:-1", "timer:5", "none+timer"])
def test_other_words_are_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"give none, timer, hints:P"):
        parse_prefetch(text)


def test_what_is_announced_is_found_in_memory_instead_of_on_disk() -> None:
    without, half, every = run("none"), run("hints:50"), run("hints:100")
    found = [float(str(each["hit_rate_cpu"])) for each in (without, half, every)]
    assert found[0] < found[1] < found[2]
    assert every["hit_rate"] == without["hit_rate"]
    assert float(str(every["ttft_mean"])) < float(str(without["ttft_mean"]))
    used, wasted, raised = (int(str(every[f"prefetch{each}"])) for each in ("_used", "_wasted", "ed"))
    assert raised / 2 < used <= used + wasted <= raised


def test_a_full_memory_takes_nothing_in_by_the_timer_and_an_empty_one_does() -> None:
    full = run("timer")
    assert int(str(full["prefetched"])) < 20
    assert run("none", restart=300.0)["prefetched"] == 0
    again = run("timer", restart=300.0)
    assert int(str(again["prefetched"])) > int(str(full["prefetched"]))


def test_without_a_restart_and_prefetch_nothing_has_changed() -> None:
    plain = replay(CHATS, SIZES, LRU).as_dict() | {"seconds": 0, "choice_us": 0}
    assert plain == run("none")


def test_the_timer_evicts_nobody_and_keeps_parents_first() -> None:
    store = Store(SIZES, LRU)
    ahead = Prefetch(store, CHATS, True, 50)
    for number, each in enumerate(CHATS):
        if number == len(CHATS) // 2:
            store.restart()
            assert store.free_bytes == store.size
        evicted = store.counts["evicted"]
        ahead.until(each.time)
        assert ahead.counters["return.announced"] or store.counts["evicted"] == evicted
        held = [node for node in store.index if node.held_in(Tier.CPU)]
        assert all(node.parent is None or node.parent.held_in(Tier.CPU) for node in held)
        assert store.free_bytes == store.size - sum(node.size for node in held) >= 0
        store.serve(each)
        ahead.served(number)
