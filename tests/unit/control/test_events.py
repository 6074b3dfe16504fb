# SPDX-License-Identifier: Apache-2.0
"""Events: in their order, with their causes, and how many were missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache.state import events as module
from loracache.cache.state.events import Events
from loracache.cache.state.index import Node
from loracache.storage_backends.base import Kind, Outcome
from loracache.tiers import Tier

CPU, DISK, REDIS = Tier.CPU, Tier.DISK, Tier.REDIS
NODE = Node(b"k" * 32, Kind.KV, None)


def said(events: Events, since: int = 0) -> list[tuple[str, str, str]]:
    return [(event.what, event.tier, event.cause) for event in events.after(since or events._began, 1000)[0]]


def many(events: Events, count: int) -> None:
    for number in range(count):
        events.add("admitted", CPU, str(number), NODE)


def test_events_come_in_order_a_page_at_a_time() -> None:
    events = Events()
    since = events.last
    assert events.after(since, 10) == ([], 0)
    many(events, 25)
    numbers: list[int] = []
    while True:
        found, lost = events.after(since, 10)
        assert lost == 0
        if not found:
            break
        numbers += [event.number for event in found]
        since = found[-1].number
    assert numbers == list(range(events.last - 24, events.last + 1))


def test_who_reads_too_slowly_is_told_how_many_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 10)
    events = Events()
    since = events.last
    many(events, 25)
    found, lost = events.after(since, 4)
    assert ([event.cause for event in found], lost) == (["15", "16", "17", "18"], 15)
    assert events.after(found[-1].number, 100)[1] == 0


def test_who_comes_from_an_earlier_run_begins_with_this_one() -> None:
    now = 1000.0
    before = Events(lambda: now)
    many(before, 5)
    now += 60
    after = Events(lambda: now)
    assert after.last > before.last
    assert after.after(before.last, 10) == ([], 0)
    many(after, 3)
    found, lost = after.after(before.last, 10)
    assert ([event.cause for event in found], lost) == (["0", "1", "2"], 0)  # none of this run's


def test_so_does_who_comes_with_a_number_that_this_run_has_not_reached() -> None:
    now = 1000.0
    before = Events(lambda: now)
    many(before, 5000)  # more than one a millisecond
    now += 1
    after = Events(lambda: now)
    assert before.last > after.last
    many(after, 3)
    assert len(after.after(before.last, 10)[0]) == 3


def test_all_who_wait_are_woken_once_by_the_first_event() -> None:
    events = Events()
    woken: list[int] = []
    waiting = [lambda number=number: woken.append(number) for number in range(100)]
    events.wake.update(waiting)
    events.wake.discard(waiting[7])
    many(events, 2)
    assert sorted(woken) == [number for number in range(100) if number != 7]


def test_failures_are_kept_longer_than_what_is_said_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 10)
    events = Events()
    events.fail(REDIS, "unavailable", 7)
    many(events, 50)
    (failure,) = events.failures
    assert (failure.tier, failure.cause, failure.count, failure.key) == ("redis", "unavailable", 7, b"")
    for _ in range(1000):
        events.fail(DISK, "failed")
    assert len(events.failures) == 200


def test_what_happens_to_an_object_is_said_with_its_cause(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(pages=2, disk=1 << 20, redis=True)
    events = rig.cache.events
    rig.store("a")
    rig.settle()
    rig.store("b")
    rig.settle()
    rig.store("c")  # the arena is full
    rig.settle()
    assert said(events) == [
        ("admitted", "cpu", "stored"), ("admitted", "disk", "written"), ("admitted", "cpu", "stored"),
        ("admitted", "disk", "written"), ("evicted", "cpu", "policy"), ("admitted", "cpu", "stored"),
        ("admitted", "disk", "written"),
    ]  # fmt: skip
    since = events.last
    rig.get("a")
    rig.cache.pins.pin([rig.info("a").key], CPU)
    rig.cache.pins.pin([rig.info("a").key], CPU, 5.0)
    rig.later(6)
    rig.cache.report_bad([rig.info("a").key])
    rig.evict("a", tiers=[CPU, DISK])
    rig.redis.fails["load"] = Outcome.UNAVAILABLE
    rig.get("a")
    assert said(events, since) == [
        ("evicted", "cpu", "policy"), ("admitted", "cpu", "from_disk"), ("pinned", "cpu", "asked"),
        ("unpinned", "cpu", "time_over"), ("failed", "cpu", "corrupt"), ("evicted", "cpu", "corrupt"),
        ("evicted", "disk", "asked"), ("failed", "redis", "unavailable"),
    ]  # fmt: skip
    told = events.after(since, 1)[0][0]
    assert (told.key, told.nbytes, told.namespace) == (rig.info("b").key, 4096, bytes(32))


def test_a_move_says_from_where_and_what_passed_says_so(operated: Callable[..., Any]) -> None:
    made = operated(pages=64, disk=1 << 20, redis=True)
    made.rig.store("a")
    made.rig.settle()
    made.rig.evict("a")
    since = made.cache.events.last
    made.move(["a"], REDIS, source=DISK, keep=False)
    assert said(made.cache.events, since) == [
        ("admitted", "cpu", "from_disk"), ("evicted", "cpu", "passed"), ("evicted", "disk", "moved"),
        ("moved", "redis", "from_disk"),
    ]  # fmt: skip
