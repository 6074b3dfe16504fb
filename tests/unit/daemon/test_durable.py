# SPDX-License-Identifier: Apache-2.0
"""Reserving for a writer that waits: for the writes before it, not for what it holds itself, and not for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.cache.state.leases import Writing
from loracache.daemon import durable
from loracache.daemon.durable import reserve_in_time
from loracache.results import Cause
from loracache.wire.protocol import Reserve

Make = Callable[..., Any]
WAIT_S = 5.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [1000.0]
    monkeypatch.setattr(durable, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def begin(rig: Any, names: Sequence[object], wanted: Callable[[], bool] = lambda: True) -> list[Any]:
    """A reservation that waits; its answers come into the list."""
    infos = [rig.info(name) for name in names]
    request = Reserve(b"w", infos[0].namespace, b"", b"", [], 30.0, WAIT_S)
    found: list[Any] = rig.start(reserve_in_time(rig.cache, 1, request, infos, wanted))
    rig.answer()
    return found


def outcomes(found: list[Any]) -> list[str]:
    (answers,) = found
    return ["room" if isinstance(item, Writing) else item for item in answers]


def test_room_comes_when_what_is_queued_is_written(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    rig.chain(*"abcd")
    found = begin(rig, "ef")
    assert found == []
    while not found:
        assert rig.step("disk-write")
    assert outcomes(found) == ["room", "room"]
    assert rig.count("write.disk.dropped.memory_full") == rig.count("store.refused.full") == 0
    rig.release(lease=b"w")


def test_who_asks_for_more_than_there_is_at_once_is_answered_at_once(rig_of: Make, now: list[float]) -> None:
    """Nothing is being written that its own objects wait for."""
    rig = rig_of(pages=4, disk=1 << 20)
    assert outcomes(begin(rig, range(6))) == ["room"] * 4 + ["full"] * 2
    assert rig.count("store.refused.full") == 2
    rig.release(lease=b"w")


def test_a_disk_that_takes_nothing_is_waited_for_until_the_time_is_over(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(pages=4, disk=1 << 20, scanned=False)
    rig.chain(*"abcd")
    found = begin(rig, "e")
    for _ in range(3):
        now[0] += WAIT_S / 4
        rig.later(WAIT_S / 4)
        rig.answer()
        assert found == []
    now[0] += WAIT_S / 2
    assert max(rig.loop.fire()) <= WAIT_S
    rig.answer()
    assert outcomes(found) == ["full"]
    assert rig.count("store.refused.full") == 1
    rig.cache.disk.adopted_all([])


def test_nothing_is_reserved_for_who_has_gone_meanwhile(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    rig.chain(*"abcd")
    here = [True]
    found = begin(rig, "e", lambda: here[0])
    here[0] = False
    rig.settle()
    assert outcomes(found) == [Cause.FULL]
    assert rig.cache.leases.held_extents() == []
    assert len(rig.cache.leases) == 0


def test_what_has_its_room_keeps_it_while_the_rest_waits(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(pages=4, disk=1 << 20, scanned=False)
    rig.chain(*"ab")
    found = begin(rig, "cde")
    for _ in range(4):  # longer than the lease's time
        rig.later(10.0)
        rig.answer()
    assert found == []
    assert rig.cache.leases.alive(1, b"w")
    rig.cache.disk.adopted_all([])
    rig.settle()
    assert outcomes(found) == ["room"] * 3
    rig.release(lease=b"w")
