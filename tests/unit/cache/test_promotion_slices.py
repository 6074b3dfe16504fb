# SPDX-License-Identifier: Apache-2.0
"""Very many objects that Redis has are taken in a slice at a time: who asks for little does not wait for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loracache.cache.state import slices
from loracache.cache.tier import promotion
from loracache.keys import checksum

PAGE = 4096
COUNT = 4 * promotion._SLICE + 20


@pytest.fixture
def rig(make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache whose Redis has COUNT objects, and where nothing is done beyond one slice a turn."""
    monkeypatch.setattr(slices, "TURN_S", 0.0)
    made = make_rig(pages=COUNT, redis=True)
    for name in range(COUNT):
        payload = made.payload(name)
        made.redis._objects[made.info(name).key] = (replace(made.info(name), checksum=checksum([payload])), payload)
    return made


def largest_step(rig: Any, count: Callable[[], int]) -> int:
    """The most by which `count()` grew in one call of the loop, until there is nothing more to do."""
    largest, before = 0, count()
    while rig.posted or any(thread.run_one() for thread in rig.threads()):
        while rig.posted:
            rig.posted.popleft()()
            largest, before = max(largest, count() - before), count()
    return largest


def test_objects_of_redis_are_looked_for_and_loaded_in_slices(rig: Any) -> None:
    answers = rig.acquire(*range(COUNT))
    answered = largest_step(rig, lambda: sum(each is not None for each in answers) + len(rig.cache.index))
    assert answered <= 2 * promotion._SLICE
    assert [rig.read(each) for each in answers] == [rig.payload(name) for name in range(COUNT)]
    assert rig.release()
    assert rig.cache.audit() == []


def test_objects_that_redis_lacks_are_answered_in_slices(rig: Any) -> None:
    answers = rig.acquire(*(f"nowhere {number}" for number in range(COUNT)))
    assert largest_step(rig, lambda: sum(each is not None for each in answers)) <= promotion._SLICE
    assert {each.cause for each in answers} == {"absent"}
    assert not len(rig.cache.index)


def test_who_comes_between_two_slices_gets_the_same_objects(rig: Any) -> None:
    """A node that one slice makes is held before the next, so that nobody forgets it meanwhile."""
    first = rig.acquire(*range(COUNT), lease=b"first")
    for name in ("redis-ask", "redis-ask", "redis-ask"):
        (thread,) = [each for each in rig.threads() if each.name == name]
        thread.run_one()
        if rig.posted:
            rig.posted.popleft()()
    second = rig.acquire(*range(COUNT), lease=b"second", owner=2)
    rig.release(lease=b"first")
    rig.settle()
    assert [rig.read(each) for each in second] == [rig.payload(name) for name in range(COUNT)]
    assert {each.cause for each in first} <= {"", "lease_lost"}
    assert rig.release(lease=b"second", owner=2)
    assert rig.cache.audit() == []
