# SPDX-License-Identifier: Apache-2.0
"""An object's states: every way of the tables is gone by something that happens, and the documents draw these ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache.cache.state.node import ARENA, LOWER, State
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
DISK = 1 << 20
ARCHITECTURE = Path(__file__).parents[3] / "docs" / "architecture.md"
Make = Callable[..., Any]


def states(rig: Any, name: str = "a") -> tuple[State, State, State]:
    """In the arena, on disk, in Redis."""
    node = rig.node(name)
    return node.state(Tier.CPU), node.state(Tier.DISK), node.state(Tier.REDIS)


def test_an_object_goes_down_and_leaves(make_rig: Make) -> None:
    rig = make_rig(disk=DISK, redis=True)
    rig.store("a")
    assert states(rig) == (State.DIRTY, State.WRITING, State.WRITING)
    rig.step("disk-write")
    assert states(rig) == (State.DIRTY, State.CLEAN, State.WRITING)
    rig.step("redis-write")
    assert states(rig) == (State.CLEAN, State.CLEAN, State.ABSENT)
    rig.evict("a")
    assert states(rig) == (State.ABSENT, State.CLEAN, State.ABSENT)
    rig.evict("a", tiers=[Tier.DISK])
    assert rig.node("a") is None


@pytest.mark.parametrize("fails", [False, True])
def test_an_object_comes_up_from_disk(make_rig: Make, fails: bool) -> None:
    rig = make_rig(disk=DISK)
    rig.store("a")
    rig.settle()
    rig.evict("a")
    if fails:
        rig.disk.fails["load"] = Outcome.FAILED
    rig.acquire("a")
    assert states(rig)[0] is State.LOADING
    rig.settle()
    assert states(rig)[0] is (State.ABSENT if fails else State.CLEAN)


@pytest.mark.parametrize("fails", [False, True])
def test_a_condemned_object_comes_up_from_disk_beside_its_old_pages(make_rig: Make, fails: bool) -> None:
    rig = make_rig(disk=DISK)
    rig.store("a")
    rig.settle()
    rig.acquire("a", lease=b"old")
    rig.cache.report_bad([rig.info("a").key])
    assert states(rig)[0] is State.CONDEMNED
    if fails:
        rig.disk.fails["load"] = Outcome.FAILED
    rig.acquire("a", lease=b"new")
    assert states(rig)[0] is State.LOADING
    assert rig.arena.free_bytes == 14 * PAGE
    rig.settle()
    assert states(rig)[0] is (State.CONDEMNED if fails else State.CLEAN)
    rig.release(lease=b"new")
    rig.release(lease=b"old")
    assert states(rig)[0] is (State.ABSENT if fails else State.CLEAN)
    assert rig.arena.free_bytes == (16 if fails else 15) * PAGE


def test_a_condemned_object_is_stored_anew_beside_its_old_pages(make_rig: Make) -> None:
    rig = make_rig()
    rig.store("a")
    rig.acquire("a")
    rig.cache.report_bad([rig.info("a").key])
    rig.store("a")
    assert states(rig)[0] is State.CLEAN
    assert rig.arena.free_bytes == 14 * PAGE
    rig.release()
    assert rig.arena.free_bytes == 15 * PAGE


@pytest.mark.parametrize("loaded", [False, True])
def test_an_object_condemned_in_its_write_and_back_waits_for_the_end_of_that_write(
    make_rig: Make, loaded: bool
) -> None:
    rig = make_rig(disk=DISK if loaded else None, redis=True)
    rig.store("a")
    if loaded:
        rig.step("disk-write")
    rig.cache.report_bad([rig.info("a").key])
    assert states(rig)[0] is State.CONDEMNED
    if loaded:
        rig.acquire("a")
        rig.step("disk-load")
    else:
        rig.store("a")
    assert (states(rig)[0], states(rig)[2]) == (State.DIRTY, State.WRITING)
    rig.settle()
    assert (states(rig)[0], states(rig)[2]) == (State.CLEAN, State.ABSENT)
    rig.release()
    assert rig.arena.free_bytes == 15 * PAGE


@pytest.mark.parametrize("moment", ["before", "queued", "in_flight"])
def test_what_a_scan_finds_is_on_disk_whenever_it_comes(make_rig: Make, moment: str) -> None:
    earlier = make_rig(disk=DISK)
    earlier.store("a")
    info = earlier.node("a").info()
    earlier.settle()
    rig = make_rig(disk=DISK, scanned=False)
    rig.disk._objects.update(earlier.disk._objects)
    rig.disk._used = PAGE
    if moment != "before":
        rig.store("a")
    if moment == "in_flight":
        rig.cache.disk.writer.start()
    rig.cache.disk.adopt([info])
    assert states(rig)[1] is State.CLEAN
    rig.cache.disk.adopted_all([])
    rig.settle()
    assert states(rig)[:2] == (State.ABSENT if moment == "before" else State.CLEAN, State.CLEAN)
    assert rig.cache.disk.used == PAGE
    assert rig.cache.audit() == []


def test_every_way_of_the_tables_is_gone(make_rig: Make, transitions: set[tuple[str, State, State]]) -> None:
    test_an_object_goes_down_and_leaves(make_rig)
    test_a_condemned_object_is_stored_anew_beside_its_old_pages(make_rig)
    test_what_a_scan_finds_is_on_disk_whenever_it_comes(make_rig, "before")
    for either in (False, True):
        test_an_object_comes_up_from_disk(make_rig, either)
        test_a_condemned_object_comes_up_from_disk_beside_its_old_pages(make_rig, either)
        test_an_object_condemned_in_its_write_and_back_waits_for_the_end_of_that_write(make_rig, either)
    assert transitions == {("arena", *way) for way in ARENA} | {("lower", *way) for way in LOWER}


def test_a_state_is_left_only_by_its_ways(make_rig: Make) -> None:
    rig = make_rig(disk=DISK)
    rig.store("a")
    rig.settle()
    index, node = rig.cache.index, rig.node("a")
    wrong: Callable[[], object]
    for wrong in (
        lambda: index.enter(node, Tier.CPU),
        lambda: index.load(node, ((0, PAGE),)),
        lambda: index.load_failed(node),
        lambda: index.queue(node, Tier.DISK),
        lambda: index.unhold(node),
    ):
        with pytest.raises(AssertionError):
            wrong()
    index.queue(node, Tier.REDIS)
    with pytest.raises(AssertionError, match="waits to be written"):
        index.leave(node, Tier.CPU)
    index.unqueue(node, Tier.REDIS)
    assert states(rig) == (State.CLEAN, State.CLEAN, State.ABSENT)


def test_the_diagrams_of_the_architecture_are_the_tables() -> None:
    drawn = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", ARCHITECTURE.read_text(), re.DOTALL)
    assert len(drawn) == 2
    for text, table in zip(drawn, (ARENA, LOWER), strict=True):
        ways = re.findall(r"^ +(\w+) --> (\w+): (.+)$", text, re.MULTILINE)
        assert len(ways) == len(text.splitlines())
        assert {(State[one], State[other]): cause for one, other, cause in ways} == table
