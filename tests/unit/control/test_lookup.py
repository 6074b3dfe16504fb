# SPDX-License-Identifier: Apache-2.0
"""Lookups: the index answers in the call, Redis in bounded time, and every one is answered once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.cache.tier import questions
from loracache.control.lookup import Finder, Hits
from loracache.results import Cause
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier
from loracache.wire.protocol import NOWHERE

CPU, REDIS = Tier.CPU, Tier.REDIS
Make = Callable[..., Any]


def half_in_redis(make_rig: Make) -> tuple[Any, Finder, list[bytes]]:
    """A chain of six, of which the arena has the first three."""
    rig = make_rig(pages=64, redis=True)
    rig.chain(*range(6))
    rig.settle()
    rig.evict(3)
    return rig, Finder(rig.cache, 0.01), [rig.info(name).key for name in range(6)]


def test_what_the_index_knows_is_answered_in_the_call(make_rig: Make) -> None:
    rig, finder, keys = half_in_redis(make_rig)
    assert rig.start(finder.find(keys[:3])) == [Hits([CPU] * 3, Cause.ABSENT)]
    assert finder.look(keys) == Hits([CPU] * 3, Cause.NONE)
    alone = make_rig()
    assert alone.start(Finder(alone.cache, 0.01).find(keys)) == [Hits([], Cause.ABSENT)]


def test_redis_is_asked_for_the_rest(make_rig: Make) -> None:
    rig, finder, keys = half_in_redis(make_rig)
    whole, beyond = rig.start(finder.find(keys)), rig.start(finder.find([*keys, bytes(32)]))
    assert whole == beyond == []
    rig.settle()
    assert whole == beyond == [Hits([CPU] * 3 + [REDIS] * 3, Cause.ABSENT)]
    rig.redis.lose(keys[4])
    rig.redis.fails["contains"] = Outcome.FAILED
    failed = rig.start(finder.find(keys))
    rig.settle()
    assert failed == [Hits([CPU] * 3, Cause.REDIS_FAILED)]
    del rig.redis.fails["contains"]
    broken = rig.start(finder.find(keys))
    rig.settle()
    assert broken == [Hits([CPU] * 3 + [REDIS], Cause.ABSENT)]


def test_a_redis_that_is_slow_is_waited_for_no_longer_than_that_and_its_answer_comes_too_late(make_rig: Make) -> None:
    rig, finder, keys = half_in_redis(make_rig)
    slow = rig.start(finder.find(keys))
    rig.answer()
    assert slow == []
    assert rig.loop.fire() == [pytest.approx(0.01)]
    rig.answer()
    assert slow == [Hits([CPU] * 3, Cause.REDIS_SLOW)]
    rig.settle()
    assert (len(slow), rig.loop.errors) == (1, [])


def test_what_redis_has_said_when_time_is_up_counts(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "MOST_KEYS", 2)
    rig, finder, keys = half_in_redis(make_rig)
    slow = rig.start(finder.find(keys))
    rig.step("redis-ask")
    assert slow == []
    rig.loop.fire()
    rig.answer()
    assert slow == [Hits([CPU] * 3 + [REDIS] * 2, Cause.REDIS_SLOW)]
    assert rig.step("redis-ask")  # which was under way
    assert not rig.step("redis-ask")


# -- beside a chain ----------------------------------------------------------------------------------------------------


def beside_in_all_tiers(make_rig: Make) -> tuple[Any, Finder, list[bytes], list[bytes]]:
    """A chain of six, of which the arena has the first three, and beside it an object in each tier, and one in none."""
    rig = make_rig(pages=64, disk=1 << 20, redis=True)
    rig.chain(*range(6))
    for name in ("cpu", "disk", "redis"):
        rig.store(name, 0)
    rig.settle()
    rig.evict(3, tiers=[CPU, Tier.DISK])
    rig.evict("disk")
    rig.evict("redis", tiers=[CPU, Tier.DISK])
    beside = [rig.info(name).key for name in ("redis", "nowhere", "cpu", "disk")]
    return rig, Finder(rig.cache, 0.01), [rig.info(name).key for name in range(6)], beside


def told(*tiers: Tier | None) -> bytes:
    return bytes([NOWHERE if tier is None else tier for tier in tiers])


def test_redis_is_asked_for_the_rest_of_a_chain_and_beside_it_at_the_same_time(make_rig: Make) -> None:
    rig, finder, keys, beside = beside_in_all_tiers(make_rig)
    assert finder.look(keys, beside) == Hits([CPU] * 3, Cause.NONE, told(None, None, CPU, Tier.DISK))
    found = rig.start(finder.find(keys, beside))
    asks = [thread for thread in rig.threads() if thread.name == "redis-ask"]
    assert [len(thread.queue) for thread in asks] == [2]  # two round trips under way, none behind the other
    rig.settle()
    assert found == [Hits([CPU] * 3 + [REDIS] * 3, Cause.ABSENT, told(REDIS, None, CPU, Tier.DISK))]


def test_redis_is_asked_beside_a_chain_that_the_index_knows_and_not_where_it_knows_all(make_rig: Make) -> None:
    rig, finder, keys, beside = beside_in_all_tiers(make_rig)
    found = rig.start(finder.find(keys[:3], beside[:1]))
    rig.settle()
    assert found == [Hits([CPU] * 3, Cause.ABSENT, told(REDIS))]
    assert rig.start(finder.find(keys[:3], beside[2:])) == [Hits([CPU] * 3, Cause.ABSENT, told(CPU, Tier.DISK))]
    assert rig.start(finder.find([], beside[2:])) == [Hits([], Cause.ABSENT, told(CPU, Tier.DISK))]


def test_without_redis_what_the_index_lacks_is_nowhere(make_rig: Make) -> None:
    rig = make_rig()
    rig.store("a")
    finder = Finder(rig.cache, 0.01)
    beside = [rig.info(name).key for name in ("a", "b")]
    assert rig.start(finder.find([], beside)) == [Hits([], Cause.ABSENT, told(CPU, None))]


def test_a_disk_that_is_left_alone_has_nothing_beside_a_chain_either(make_rig: Make) -> None:
    rig, finder, _, beside = beside_in_all_tiers(make_rig)
    rig.disk.fails["load"] = Outcome.UNAVAILABLE
    rig.get("disk")
    assert finder.where(beside) == told(None, None, CPU, None)


def test_a_slow_redis_has_said_of_some_and_the_others_are_nowhere(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "MOST_KEYS", 2)
    rig = make_rig(pages=64, redis=True)
    for name in range(6):
        rig.store(name)
    rig.settle()
    rig.evict(*range(6))
    beside = [rig.info(name).key for name in range(6)]
    slow = rig.start(Finder(rig.cache, 0.01).find([], beside))
    rig.step("redis-ask")
    assert slow == []
    rig.loop.fire()
    rig.answer()
    assert slow == [Hits([], Cause.REDIS_SLOW, told(REDIS, REDIS, None, None, None, None))]
    while rig.step("redis-ask"):
        pass
    assert rig.loop.errors == []


def test_a_redis_that_fails_beside_a_chain_says_so_where_the_chain_is_there(make_rig: Make) -> None:
    rig, finder, keys, beside = beside_in_all_tiers(make_rig)
    rig.redis.fails["contains"] = Outcome.FAILED
    found = rig.start(finder.find(keys[:3], beside))
    rig.settle()
    assert found == [Hits([CPU] * 3, Cause.REDIS_FAILED, told(None, None, CPU, Tier.DISK))]


def test_what_is_found_beside_a_chain_is_no_use_until_it_is_read(make_rig: Make) -> None:
    rig, finder, keys, beside = beside_in_all_tiers(make_rig)
    before = [(rig.node(name).hits, rig.node(name).tick) for name in ("cpu", "disk")]
    for _ in range(5):
        finder.look(keys, beside)
    assert [(rig.node(name).hits, rig.node(name).tick) for name in ("cpu", "disk")] == before
    assert rig.node(0).hits == 5
    for owner in (1, 2):  # two workers that share it, for one lookup
        rig.acquire("cpu", "disk", owner=owner)
    rig.settle()
    assert [rig.node(name).hits for name in ("cpu", "disk")] == [1, 1]
    finder.look(keys, beside)
    rig.acquire("cpu", lease=b"again")
    assert [rig.node(name).hits for name in ("cpu", "disk")] == [2, 1]
    rig.acquire(0, lease=b"chain")
    assert rig.node(0).hits == 6  # a chain's objects are counted by lookups alone


def test_thousands_beside_a_chain_are_looked_at_in_slices(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are served between two of them."""
    rig = make_rig(pages=64, redis=True)
    clock = itertools.count()  # each look at it is six tenths of a turn: one slice a turn
    monkeypatch.setattr("loracache.control.steps.time", SimpleNamespace(perf_counter=lambda: next(clock) * 0.0006))
    many = [bytes([number >> 8, number & 255]) * 16 for number in range(5000)]
    found = rig.start(Finder(rig.cache, 1.0).find([], many))
    turns = 0
    while not found:
        assert rig.posted or any(thread.queue for thread in rig.threads())
        turns += bool(rig.posted)
        if rig.posted:
            rig.posted.popleft()()
        else:
            any(thread.run_one() for thread in rig.threads())
    assert found == [Hits([], Cause.ABSENT, bytes([NOWHERE]) * 5000)]
    assert turns > 8  # five slices before Redis is asked, five behind it
    rig.settle()


def test_beside_what_a_chain_lacks_redis_is_asked_no_more(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long prompt that nobody had before it would be asked for thousands that are of no use."""
    monkeypatch.setattr(questions, "MOST_KEYS", 4)
    rig = make_rig(pages=64, redis=True)
    rig.chain("a0", "a1")
    rig.settle()
    rig.evict("a0")
    chain = [rig.info(f"a{at}").key for at in range(20)]
    beside = [rig.info(f"{kind}{at}").key for at in range(20) for kind in "ws"]
    asked: list[bytes] = []
    contains = rig.redis.contains
    monkeypatch.setattr(rig.redis, "contains", lambda keys: asked.extend(keys) or contains(keys))
    found = rig.start(Finder(rig.cache, 1.0).find(chain, beside))
    rig.settle()
    assert found == [Hits([REDIS] * 2, Cause.ABSENT, told(*[None] * 40))]
    assert set(asked[:8]) == {*chain[:4], *beside[:4]}
    assert len(asked) <= 12  # what was under way when the chain's end was known, and no more
    assert rig.loop.errors == []
