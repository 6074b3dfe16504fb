# SPDX-License-Identifier: Apache-2.0
"""Lookups: the index answers in the call, Redis in bounded time, and every one is answered once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache.tier import questions
from loracache.control.lookup import Finder, Hits
from loracache.results import Cause
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

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
