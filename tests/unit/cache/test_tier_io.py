# SPDX-License-Identifier: Apache-2.0
"""A tier's threads and its pauses: what is asked of a tier that is left alone, and how one ends that hangs."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.cache.state.counters import Counters
from loracache.cache.state.events import Events
from loracache.cache.tier import io as tier_io
from loracache.cache.tier.io import TierIO
from loracache.cache.tier.workers import Workers
from loracache.storage_backends.base import Outcome, Purge, Purpose, Result, Tended
from loracache.storage_backends.memory import MemoryBackend
from loracache.tiers import Tier

PAGE = 4096
KEY = bytes(32)
Make = Callable[..., Any]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that pauses are measured in: now[0]."""
    seconds = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


# -- a tier that is left alone -----------------------------------------------------------------------------------------


def gone(rig: Any, label: str) -> None:
    """The tier has just answered that it is not there."""
    backend = rig.backend(label)
    backend.fails["contains"] = Outcome.UNAVAILABLE
    io = rig.cache.disk.io if label == "disk" else rig.cache.redis.io
    io.contains([KEY], lambda results: None)
    rig.settle()
    del backend.fails["contains"]
    assert not io.available


def test_a_disk_that_is_left_alone_is_no_hit_until_it_is_asked_again(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"abc")
    rig.settle()
    rig.evict("b")
    chain = [rig.info(name).key for name in "abc"]
    assert rig.cache.lookup(chain) == [Tier.CPU, Tier.DISK, Tier.DISK]
    gone(rig, "disk")
    assert rig.cache.lookup(chain) == [Tier.CPU]
    assert rig.get("b") == "disk_unavailable"
    now[0] += 0.5
    assert rig.cache.lookup(chain) == [Tier.CPU, Tier.DISK, Tier.DISK]
    assert rig.get("b") == rig.payload("b")


def test_what_the_arena_holds_is_a_hit_whatever_the_disk_does(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"ab")
    rig.settle()
    gone(rig, "disk")
    assert rig.cache.lookup([rig.info(name).key for name in "ab"]) == [Tier.CPU, Tier.CPU]


def test_a_refused_call_does_not_prolong_the_pause(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(redis=True)
    gone(rig, "redis")
    io = rig.cache.redis.io
    answers: list[list[Result]] = []
    io.contains([KEY, KEY], answers.append)
    assert not rig.step("redis-ask")  # without asking
    for _ in range(5):
        io.contains([KEY], lambda results: None)
    now[0] += 0.5
    rig.answer()  # after the pause is over: nobody was asked, so nothing was learnt
    assert [result.outcome for result in answers[0]] == [Outcome.UNAVAILABLE] * 2
    assert io.available
    assert rig.count("failure.redis.unavailable") == 1 + 2 + 5
    gone(rig, "redis")
    now[0] += 0.75
    assert not io.available  # it doubled once, for the second failure


def test_an_answer_ends_the_doubling_and_waiting_for_writes_does_not(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(redis=True)
    io = rig.cache.redis.io
    waited: list[bool] = []
    for pause in (0.5, 1.0, 2.0):
        gone(rig, "redis")
        now[0] += pause
        assert io.available
        io.when_written(lambda: waited.append(True))
        rig.settle()
    assert waited == [True] * 3
    io.contains([KEY], lambda results: None)
    rig.settle()
    gone(rig, "redis")
    now[0] += 0.5
    assert io.available


def test_a_part_that_is_away_has_nobody_leave_the_others_alone(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(redis=True)
    io = rig.cache.redis.io
    answer = [Result(Outcome.UNAVAILABLE, partial=True), Result(Outcome.MISS)]
    io.backend.contains = lambda keys: answer[: len(keys)]
    for keys in ([KEY, KEY], [KEY]):
        io.contains(keys, lambda results: None)
        rig.settle()
        assert io.available
    assert rig.cache.counters["failure.redis.unavailable"] == 2
    answer[:] = [Result(Outcome.UNAVAILABLE)] * 2
    io.contains([KEY], lambda results: None)
    rig.settle()
    assert not io.available


def test_what_is_due_is_done_once_at_a_time_and_makes_way_for_a_purge(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of(redis=True)
    io = rig.cache.redis.io
    monkeypatch.setattr(type(rig.redis), "due", True)
    wanted: list[bool] = []

    def tend(go_on: Callable[[], bool]) -> Tended:
        wanted.append(go_on())
        return Tended(objects=2, nbytes=300, orphans=1, used=4000)

    rig.redis.tend = tend
    rig.later(1)
    rig.later(1)
    assert rig.step("redis-care")
    assert not rig.step("redis-care")
    counted = [
        rig.count(f"{name}") for name in ("evict.redis.budget", "evicted_bytes.redis.budget", "swept.redis.orphans")
    ]
    assert (counted, io.used) == ([2, 300, 1], 4000)
    ends: list[None] = []
    rig.later(1)
    io.purge(lambda fields: Purpose(), lambda did: [], Purge(), lambda: True, ends.append)
    rig.settle()
    rig.later(1)
    rig.settle()
    assert (wanted, ends) == ([True, False, True], [None])
    gone(rig, "redis")
    rig.later(1)
    assert not rig.step("redis-care")


# -- threads -----------------------------------------------------------------------------------------------------------


class Hanging(MemoryBackend):
    """Answers no question before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bytes] = []
        self.inside, self.go = threading.Event(), threading.Event()
        self.closed = False

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        self.asked += keys
        self.inside.set()
        assert self.go.wait(50)
        return super().contains(keys)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    backend = Hanging()
    yield backend
    backend.go.set()


def asked_twice(backend: Hanging) -> tuple[TierIO, deque[Callable[[], None]]]:
    """A tier that hangs in the first of two questions, and what it posts."""
    posted: deque[Callable[[], None]] = deque()
    io = TierIO(Tier.DISK, backend, posted.append, Counters(), Events())
    for number in range(2):
        io.contains([bytes([number]) * 32], lambda results: None)
    assert backend.inside.wait(50)
    return io, posted


def test_a_call_that_hangs_keeps_nobody_from_ending(hanging: Hanging, caplog: pytest.LogCaptureFixture) -> None:
    io, posted = asked_twice(hanging)
    io.close(0.05)  # would wait for ever
    assert not hanging.closed  # the call is in it still
    assert "disk: a call hangs; left behind after 0.1 s" in caplog.text
    hanging.go.set()
    assert io._asks.ended(time.monotonic() + 50)
    assert hanging.asked == [KEY]  # what was queued was dropped
    assert len(posted) == 1


def test_a_call_that_ends_in_time_is_waited_for_and_the_backend_closed_after_it(
    hanging: Hanging, eventually: Callable[..., Any]
) -> None:
    io, posted = asked_twice(hanging)
    closing = threading.Thread(target=io.close)
    closing.start()
    eventually(lambda: io._asks._ending, "it is being closed")
    assert not hanging.closed
    hanging.go.set()
    closing.join(50)
    assert hanging.closed
    assert hanging.asked == [KEY]
    assert len(posted) == 1


def test_work_is_done_in_its_order_and_none_is_taken_up_after_the_end() -> None:
    workers = Workers(1, "test")
    done: list[int] = []
    inside, go = threading.Event(), threading.Event()
    for number in range(3):
        workers.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    workers.submit(lambda: inside.set() or (go.wait(50) and None))  # type: ignore[arg-type]
    workers.submit(lambda: done.append(3))
    assert inside.wait(50)
    workers.end()
    workers.submit(lambda: done.append(4))
    assert not workers.ended(time.monotonic())
    go.set()
    assert workers.ended(time.monotonic() + 50)
    assert done == [0, 1, 2]


def test_every_worker_ends_however_many_there_are() -> None:
    workers = Workers(4, "test")
    together = threading.Barrier(5)
    for _ in range(4):
        workers.submit(lambda: together.wait(50) and None)  # type: ignore[arg-type]  # all at once, or never
    together.wait(50)
    workers.end()
    assert workers.ended(time.monotonic() + 50)


def test_what_is_done_is_not_kept_until_the_next_work_comes(eventually: Callable[..., Any]) -> None:
    workers = Workers(1, "test")
    buffer = threading.Event()  # anything that a weak reference can point at
    kept = weakref.ref(buffer)
    workers.submit(buffer.set)
    del buffer
    eventually(lambda: kept() is None, "the buffer is let go")
    workers.end()
    assert workers.ended(time.monotonic() + 50)


# -- flush -------------------------------------------------------------------------------------------------------------


def test_a_flush_waits_for_deletions_too(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.store("a")
    rig.settle()
    rig.evict("a", tiers=[Tier.CPU, Tier.DISK])
    flushed: list[bool] = []
    rig.cache.when_flushed(lambda: flushed.append(True))
    while rig.step("disk-ask") or rig.step("disk-load"):
        pass
    assert flushed == []
    rig.settle()
    assert (flushed, rig.disk.held()) == ([True], {})


def test_a_writer_is_flushed_once_what_is_in_flight_has_landed(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.store("a")
    flushed: list[bool] = []
    rig.cache.disk.writer.when_flushed(lambda: flushed.append(True))
    assert flushed == []
    rig.step("disk-write")
    assert flushed == [True]
