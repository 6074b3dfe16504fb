# SPDX-License-Identifier: Apache-2.0
"""Adaptive admission: what never comes again is not written, what does is, each namespace by itself; all bounded."""

from __future__ import annotations

import random

import pytest

from loracache.cache.policy.admission import AdaptiveAdmission
from loracache.cache.policy.lower_shadow import SHARES, Kinds, LowerShadows
from loracache.cache.state.node import Node
from loracache.results import Refusal
from loracache.simulator.replay import Run, replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import BLOCK_TOKENS, Request
from loracache.storage_backends.base import Kind

BLOCK = BLOCK_TOKENS  # bytes, at one byte a token
Trace = list[Request]


def sessions(count: int, returning: float, seed: int = 0, first: int = 0) -> Trace:
    """Prompts of ten blocks, of which so many come again within the next hundred, and those again and again."""
    chance = random.Random(seed)
    turns: list[tuple[float, int]] = []
    for session in range(count):
        at = float(session)
        turns.append((at, session))
        while chance.random() < returning:
            at += chance.uniform(40, 120)
            turns.append((at, session))
    begin = first * 10
    return [
        Request(at, 10 * BLOCK, tuple(range(begin + 10 * session, begin + 10 * session + 10)))
        for at, session in sorted(turns)
    ]


def runs(trace: Trace, memory: int, disk: int) -> dict[str, Run]:
    sizes = Sizes(memory * BLOCK, disk * BLOCK, 1)
    return {
        name: replay(trace, sizes, Way.parse("lru", admission=name)) for name in ("all", "second_touch", "adaptive")
    }


def test_a_trace_without_reuse_writes_at_most_a_twentieth() -> None:
    found = runs(sessions(800, 0.0), 100, 2000)
    assert found["adaptive"].bytes_disk_written <= 0.05 * found["all"].bytes_disk_written


def test_where_most_returns_and_the_disk_is_large_as_much_is_found_as_with_all() -> None:
    found = runs(sessions(800, 0.6), 200, 20_000)
    assert found["second_touch"].hit_rate < 0.8 * found["all"].hit_rate
    assert found["adaptive"].hit_rate > 0.95 * found["all"].hit_rate


def test_where_the_disk_is_small_less_is_written_and_more_found() -> None:
    found = runs(sessions(1500, 0.25), 100, 300)
    assert found["adaptive"].bytes_disk_written < 0.6 * found["all"].bytes_disk_written
    assert found["adaptive"].hit_rate > found["all"].hit_rate


def node(key: bytes, namespace: bytes, kind: Kind = Kind.KV) -> Node:
    made = Node(key, kind, None)
    made.namespace = namespace
    return made


def serve(admission: AdaptiveAdmission, key: bytes, namespace: bytes) -> Refusal:
    """A chain of one object is looked up, and stored."""
    admission.asked([key], [])
    for _ in admission.work():
        pass
    return admission.came(node(key, namespace))


def test_a_namespace_without_reuse_is_not_written_beside_one_with() -> None:
    admission = AdaptiveAdmission(lambda: 1000, lambda: 50, lambda: 10_000)
    chance = random.Random(0)
    chat: list[bytes] = []
    last: dict[bytes, list[Refusal]] = {b"chat": [], b"batch": []}
    for _ in range(1500):
        again = chat and chance.random() < 0.5
        key = chance.choice(chat[-400:]) if again else chance.randbytes(32)
        if not again:
            chat.append(key)
            last[b"chat"].append(serve(admission, key, b"chat"))
        else:
            serve(admission, key, b"chat")
        last[b"batch"].append(serve(admission, chance.randbytes(32), b"batch"))
    assert set(last[b"chat"][-100:]) == {Refusal.NONE}
    assert set(last[b"batch"][-100:]) == {Refusal.FIRST_TOUCH}
    assert not admission.came(node(b"a" * 32, b"batch", Kind.LORA))


def test_what_is_found_in_some_tier_counts_as_having_come_again() -> None:
    admission = AdaptiveAdmission(lambda: 10, lambda: 10, lambda: 10)
    for number in range(100):
        admission.came(node(b"%032d" % number, b"space"))
    before = admission._spaces.share(b"space")
    found = [node(b"%032d" % number, b"space") for number in range(3)]
    for each, hits in zip(found, (5, 1, 1), strict=True):  # the first came before
        each.hits = hits
    admission.asked([each.key for each in found], found)
    assert admission._spaces._counts[b"space"][1] == 2
    assert admission._spaces.share(b"space") > before


def test_counts_of_kinds_are_bounded_and_old_ones_fade() -> None:
    kinds = Kinds()
    for number in range(10_000):
        kinds.came(number)
    assert len(kinds._counts) <= 4096
    for _ in range(3000):
        kinds.came("chat")
        kinds.again("chat")
    high = kinds.share("chat")
    for _ in range(6000):
        kinds.came("chat")
    assert high > 0.9
    assert kinds.share("chat") < 0.3


@pytest.mark.parametrize("objects", [100, 5000, 1_000_000])
def test_shadows_stay_small_whatever_the_tier_holds(objects: int) -> None:
    shadows = LowerShadows(Kinds(), lambda: objects // 10, lambda: objects)
    chance = random.Random(1)
    for _ in range(300):
        shadows.ask([chance.randbytes(32) for _ in range(400)], 0, "any")
        for _ in shadows.work():
            pass
    assert len(shadows._once) <= 8 * 2048
    assert max(map(len, [shadows._memory, *shadows._lower])) <= 8 * 2048
    assert shadows.share in SHARES


def test_lookups_that_wait_to_be_looked_at_are_bounded() -> None:
    shadows = LowerShadows(Kinds(), lambda: 10, lambda: 100)
    for number in range(1000):
        shadows.ask([b"%032d" % number] * 10_000, 0, "any")
    lengths = [len(keys) for keys, _ in shadows._asked]
    assert 28_000 < sum(lengths) == shadows._asked.chunks <= 32_768
    assert max(lengths) == 4096
