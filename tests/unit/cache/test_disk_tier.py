# SPDX-License-Identifier: Apache-2.0
"""The disk tier where it is hard: deletions that fail, and what comes before the earlier run's objects are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.cache.tier import disk as disk_tier
from loracache.cache.tier import io as tier_io
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the disk tier and its pauses see: now[0]."""
    seconds = [1000.0]
    for module in (disk_tier, tier_io):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def keys(rig: Any, names: Sequence[str]) -> list[bytes]:
    return [rig.info(name).key for name in names]


def undeletable(rig: Any, names: str, outcome: Outcome = Outcome.FAILED) -> None:
    """Objects that were evicted, but whose bytes the disk did not let go."""
    for name in names:
        rig.store(name)
    rig.settle()
    rig.disk.fails["delete"] = outcome
    rig.evict(*names, tiers=[Tier.CPU, Tier.DISK])
    rig.settle()
    rig.disk.deletions.clear()


# -- deletions that fail -----------------------------------------------------------------------------------------------


def test_what_could_not_be_deleted_counts_against_the_budget_though_nobody_finds_it(
    rig_of: Make, now: list[float]
) -> None:
    rig = rig_of(disk=2 * PAGE)
    undeletable(rig, "ab")
    assert rig.cache.disk.used == 2 * PAGE
    assert rig.cache.index.objects[Tier.DISK] == 0
    assert rig.get("a") == "absent"
    rig.store("c")
    rig.settle()
    assert rig.count("write.disk.dropped.full") == 1
    assert rig.cache.disk.used == 2 * PAGE
    del rig.disk.fails["delete"]
    rig.later(0)
    rig.settle()
    assert rig.store("d", "c") == ""  # and its parent is tried again with it
    rig.settle()
    assert set(rig.disk.held()) == set(keys(rig, "cd"))


def test_a_deletion_that_failed_is_tried_again_every_five_seconds(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    undeletable(rig, "ab")
    tried = []
    for _ in range(48):  # twelve seconds
        rig.later(0.25)
        rig.settle()
        if rig.disk.deletions:
            tried.append((now[0] - 1000, sorted(rig.disk.deletions.pop())))
            assert not rig.disk.deletions
        assert rig.cache.disk.used == 2 * PAGE
        now[0] += 0.25
    both = sorted(keys(rig, "ab"))
    assert tried == [(0.0, both), (5.0, both), (10.0, both)]
    del rig.disk.fails["delete"]
    now[0] = 1015.0
    rig.later(0)
    rig.settle()
    assert rig.disk.held() == {}
    assert rig.cache.disk.used == 0
    now[0] += 60
    rig.disk.deletions.clear()
    rig.later(60)
    rig.settle()
    assert not rig.disk.deletions


def test_what_is_gone_by_itself_counts_as_deleted(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    undeletable(rig, "ab")
    rig.disk.lose(rig.info("a").key)
    del rig.disk.fails["delete"]
    rig.later(0)
    rig.settle()
    assert rig.cache.disk.used == 0


def test_an_object_stored_again_meanwhile_is_not_deleted_and_counts_once(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    undeletable(rig, "ab")
    del rig.disk.fails["delete"]
    assert rig.store("a") == ""
    rig.settle()
    assert rig.cache.disk.used == 2 * PAGE
    rig.later(0)
    rig.settle()
    assert rig.disk.deletions == [keys(rig, "b")]
    assert rig.cache.disk.used == PAGE
    rig.evict("a")
    assert rig.get("a") == rig.payload("a")


def test_an_object_being_stored_again_is_not_deleted(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    undeletable(rig, "a")
    del rig.disk.fails["delete"]
    assert rig.store("a") == ""
    rig.later(0)  # while its bytes are on their way
    rig.settle()
    assert not rig.disk.deletions
    assert set(rig.disk.held()) == set(keys(rig, "a"))


def test_an_object_stored_again_behind_its_deletion_stays(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    undeletable(rig, "a")
    rig.later(0)  # asked for, and not done yet
    assert rig.store("a") == ""
    rig.settle()
    assert len(rig.disk.deletions) == 1  # failed again
    assert rig.cache.disk.used == PAGE
    now[0] += 60
    rig.later(60)
    rig.settle()
    assert rig.get("a") == rig.payload("a")
    assert len(rig.disk.deletions) == 1


def test_where_storing_it_again_fails_the_old_bytes_are_still_counted_and_deleted_later(
    rig_of: Make, now: list[float]
) -> None:
    rig = rig_of(disk=1 << 20)
    undeletable(rig, "a")
    rig.disk.fails["store"] = Outcome.FULL
    rig.store("a")
    rig.settle()
    assert rig.cache.disk.used == PAGE
    rig.disk.fails.clear()
    rig.later(0)
    rig.settle()
    assert rig.cache.disk.used == 0
    assert rig.disk.held() == {}


def test_a_disk_that_is_left_alone_is_not_asked_to_delete_until_it_is_asked_again(
    rig_of: Make, now: list[float]
) -> None:
    rig = rig_of(disk=1 << 20)
    undeletable(rig, "a", Outcome.UNAVAILABLE)
    assert not rig.cache.disk.io.available
    rig.later(0)
    rig.settle()
    assert not rig.disk.deletions
    assert rig.cache.disk.used == PAGE
    del rig.disk.fails["delete"]
    now[0] += 0.5
    rig.later(0.5)
    rig.settle()
    assert rig.disk.deletions == [keys(rig, "a")]


def test_a_deletion_asked_of_a_disk_that_is_left_alone_is_made_up_for(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    rig.store("a")
    rig.settle()
    rig.disk.fails["store"] = Outcome.UNAVAILABLE
    rig.store("b")
    rig.settle()
    assert rig.evict("a", tiers=[Tier.DISK]) == (1, PAGE, 0)
    rig.settle()
    assert (rig.disk.deletions, rig.cache.disk.used) == ([], PAGE)
    now[0] += 0.5
    rig.later(0.5)
    rig.settle()
    assert (rig.disk.deletions, rig.cache.disk.used) == ([keys(rig, "a")], 0)


def test_what_could_not_be_read_nor_deleted_counts_once_when_it_is_stored_anew(rig_of: Make, now: list[float]) -> None:
    rig = rig_of(disk=1 << 20)
    rig.store("a")
    rig.settle()
    rig.evict("a")
    rig.disk.fails |= {"load": Outcome.FAILED, "delete": Outcome.FAILED}
    assert rig.get("a") == "disk_failed"
    assert rig.store("a") == ""
    rig.settle()
    assert rig.cache.disk.used == PAGE
    assert rig.cache.disk.keeps(rig.node("a"))


def test_orphans_that_cannot_be_deleted_count(rig_of: Make, now: list[float]) -> None:
    earlier = rig_of(disk=1 << 20)
    earlier.chain("a", "b")
    earlier.settle()
    rig = rig_of(disk=1 << 20, scanned=False)
    child = earlier.disk.held()[earlier.info("b").key]
    rig.disk._objects[child.key] = earlier.disk._objects[child.key]
    rig.disk._used = child.size
    rig.disk.fails["delete"] = Outcome.FAILED
    rig.cache.disk.adopted_all(rig.cache.disk.adopt([child]))
    rig.settle()
    assert rig.cache.disk.used == PAGE
    del rig.disk.fails["delete"]
    rig.later(0)
    rig.settle()
    assert rig.cache.disk.used == 0


# -- children and parents ----------------------------------------------------------------------------------------------


def test_a_child_whose_parent_is_on_its_way_nowhere_is_not_written(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.chain("a", "b")
    rig.settle()
    rig.evict("a", tiers=[Tier.CPU, Tier.DISK])
    rig.settle()
    rig.disk.stored.clear()
    assert rig.get("b") == rig.payload("b")  # from Redis
    rig.settle()
    assert rig.disk.stored == []
    assert rig.count("write.disk.dropped.no_parent") == 1


def test_a_child_does_not_stay_whose_parent_left_while_it_was_written(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.store("a")
    rig.settle()
    rig.store("b", "a")
    assert rig.evict("a", tiers=[Tier.DISK]) == (1, PAGE, 0)
    rig.settle()
    assert (rig.disk.held(), rig.cache.disk.used) == ({}, 0)
    assert rig.cache.lookup(keys(rig, "ab")) == [Tier.CPU, Tier.CPU]


# -- before the scan of the earlier run is over ------------------------------------------------------------------------


def test_nothing_is_written_to_a_disk_that_is_not_scanned_yet_and_a_flush_waits_for_it(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True, scanned=False)
    rig.chain(*"abc")
    flushed: list[bool] = []
    rig.cache.when_flushed(lambda: flushed.append(True))
    rig.settle()
    rig.later(10)
    rig.settle()
    assert set(rig.redis.held()) == set(keys(rig, "abc"))
    assert (rig.disk.held(), rig.cache.disk.used, flushed) == ({}, 0, [])
    rig.cache.disk.adopted_all([])
    assert flushed == []
    rig.settle()
    assert flushed == [True]
    assert rig.disk.stored == keys(rig, "abc")


def test_what_the_scan_finds_is_not_written_again(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, scanned=False)
    rig.store("a")
    found = rig.node("a").info()
    rig.disk._objects[found.key] = (found, rig.payload("a"))
    rig.disk._used = PAGE
    assert rig.cache.disk.adopt([found]) == []
    rig.cache.disk.adopted_all([])
    rig.settle()
    assert rig.disk.stored == []
    assert rig.count("write.disk.dropped.exists") == 1


def test_what_waited_for_the_scan_finds_its_room_within_the_limit(rig_of: Make) -> None:
    earlier = rig_of(disk=1 << 20)
    for name in "abc":
        earlier.store(name)
    earlier.settle()
    rig = rig_of(disk=3 * PAGE, scanned=False)
    rig.disk._objects.update(earlier.disk._objects)
    rig.disk._used = 3 * PAGE
    rig.store("new")
    rig.cache.disk.adopt(earlier.disk.held().values())
    rig.cache.disk.adopted_all([])
    rig.settle()
    assert set(rig.disk.held()) == set(keys(rig, ["b", "c", "new"]))
