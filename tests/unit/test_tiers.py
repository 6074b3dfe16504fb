# SPDX-License-Identifier: Apache-2.0
"""What moves between the arena, disk and Redis: in which order, within which bounds, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


def keys(rig: Any, names: Sequence[str]) -> list[bytes]:
    return [rig.info(name).key for name in names]


# -- write-behind ------------------------------------------------------------------------------------------------------


def test_objects_are_written_in_the_order_of_their_commits(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.chain(*"abcdef")
    rig.settle()
    assert rig.disk.stored == rig.redis.stored == keys(rig, "abcdef")


def test_a_flush_waits_for_what_was_committed_before_it_and_for_no_more(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.chain(*"abc")
    flushed: list[set[bytes]] = []
    rig.cache.when_flushed(lambda: flushed.append(set(rig.disk.held()) & set(rig.redis.held())))
    rig.store("d", "c")
    assert flushed == []
    while not flushed:
        assert rig.step("disk-write") or rig.step("redis-write")
    assert flushed[0] >= set(keys(rig, "abc"))


def test_a_flush_with_nothing_to_write_is_answered(rig_of: Make) -> None:
    for options in ({}, {"disk": 1 << 20, "redis": True}):
        rig = rig_of(**options)
        flushed: list[bool] = []
        rig.cache.when_flushed(lambda flushed=flushed: flushed.append(True))
        rig.settle()
        assert flushed == [True]


def test_a_flush_waits_for_deletions_too(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"abc")
    rig.settle()
    rig.evict("a", tiers=[Tier.DISK])
    flushed: list[int] = []
    rig.cache.when_flushed(lambda: flushed.append(len(rig.disk.held())))
    rig.settle()
    assert flushed == [0]


def test_a_flush_is_answered_too_where_writes_fail(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.disk.fails["store"] = rig.redis.fails["store"] = Outcome.UNAVAILABLE
    rig.chain(*"abc")
    flushed: list[bool] = []
    rig.cache.when_flushed(lambda: flushed.append(True))
    rig.settle()
    assert flushed == [True]
    assert rig.count("write.disk.dropped.unavailable") == 3


def test_pages_stay_until_they_are_written(rig_of: Make) -> None:
    rig = rig_of(pages=2, disk=1 << 20)
    rig.chain("a", "b")  # both in flight
    assert rig.store("c") == "full"
    rig.settle()
    assert rig.store("c") == ""
    assert set(rig.disk.held()) >= set(keys(rig, "ab"))


def test_a_full_arena_gives_up_queued_writes_and_says_so(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    for name in "abcd":  # a and b are being written, c and d wait
        rig.store(name)
    assert rig.store("e") == ""
    assert rig.count("write.disk.dropped.memory_full") == 1
    rig.settle()
    assert rig.get("c") == "absent"  # the oldest that was queued
    assert set(rig.disk.held()) == set(keys(rig, "abde"))


def test_a_write_that_failed_is_tried_again_with_the_next_child(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.disk.fails["store"] = Outcome.FULL
    rig.chain("a", "b")
    rig.settle()
    assert rig.disk.held() == {}
    del rig.disk.fails["store"]
    rig.store("c", "b")
    rig.settle()
    assert rig.disk.stored == keys(rig, "abc")


def test_an_evicted_object_is_not_written_any_more(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"abcd")
    assert rig.evict("d")[0] == 1
    rig.store("other")
    rig.settle()
    assert set(rig.disk.held()) == {*keys(rig, "abc"), *keys(rig, ["other"])}
    assert rig.count("write.disk.dropped.evicted") == 1


def test_a_shutdown_counts_what_it_drops(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"abcd")
    assert rig.cache.disk.writer.drop_all() == 4  # two of them may still get there
    assert rig.count("write.disk.dropped.shutdown") == 2
    rig.settle()
    assert set(rig.disk.held()) == set(keys(rig, "ab"))


# -- the disk's budget and order ---------------------------------------------------------------------------------------


def test_the_budget_holds_with_what_is_still_being_written(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=5 * PAGE)
    for number in range(20):
        rig.store(number)
        assert rig.cache.disk.used <= rig.cache.disk.limit
        if number % 3 == 0:
            rig.step("disk-write")
    rig.settle()
    assert len(rig.disk.held()) == 5
    assert rig.count("evict.disk.policy") >= 1


def test_an_object_larger_than_the_budget_is_not_written_and_costs_nobody_a_place(rig_of: Make) -> None:
    rig = rig_of(disk=3 * PAGE)
    rig.store("a")
    rig.settle()
    rig.store("big", size=4 * PAGE)
    rig.settle()
    assert rig.count("write.disk.dropped.full") == 1
    assert rig.count("evict.disk.policy") == 0
    assert set(rig.disk.held()) == set(keys(rig, "a"))


def test_a_child_is_never_on_disk_without_its_parent(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=4 * PAGE)
    for turn in range(6):
        rig.chain(*[f"{turn}-{number}" for number in range(3)])
        if turn % 2:
            rig.settle()
    rig.settle()
    held = rig.disk.held()
    assert held
    assert all(not info.parent or info.parent in held for info in held.values())


def test_room_for_a_child_is_not_made_by_its_parent(rig_of: Make) -> None:
    rig = rig_of(disk=2 * PAGE)
    rig.store("a")
    rig.store("x")
    rig.settle()
    rig.store("b", "a")
    rig.settle()
    assert set(rig.disk.held()) == set(keys(rig, "ab"))


def test_a_child_whose_parent_failed_to_land_does_not_stay(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.store("a")
    rig.store("b", "a")
    rig.disk.fails["store"] = Outcome.FAILED
    rig.step("disk-write")  # a
    del rig.disk.fails["store"]
    rig.settle()  # b was on its way behind it
    assert rig.disk.held() == {}
    assert rig.count("write.disk.dropped.no_parent") == 1
    assert rig.cache.lookup(keys(rig, "ab")) == [Tier.CPU, Tier.CPU]


def test_an_adapters_chain_is_written_though_the_adapter_is_not_held(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.cache.index.adapters.add(rig.info("adapter").key)
    rig.store("a", "adapter")
    rig.settle()
    assert set(rig.disk.held()) == set(keys(rig, "a"))


# -- an earlier run's disk ---------------------------------------------------------------------------------------------


def test_an_earlier_run_is_entered_in_any_order_and_orphans_are_deleted_and_counted(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"abc")
    rig.store("o", "c")
    rig.settle()
    infos = rig.disk.held()
    a, b, c, orphan = (infos[key] for key in keys(rig, "abco"))
    orphan = type(orphan)(orphan.key, rig.info("nobody").key, orphan.kind, orphan.namespace, orphan.size, 0)

    fresh = rig_of(disk=1 << 20)
    fresh.disk._objects.update(rig.disk._objects)
    fresh.disk._used = rig.disk._used
    waiting = fresh.cache.disk.adopt([b, orphan, a, c])
    assert waiting == [b, orphan, c]
    waiting = fresh.cache.disk.adopt(waiting)
    fresh.cache.disk.adopted_all(waiting)
    assert fresh.cache.lookup(keys(rig, "abc")) == [Tier.DISK] * 3
    fresh.settle()
    assert fresh.count("disk.orphans") == 1
    assert set(fresh.disk.held()) == set(keys(rig, "abc"))
    assert fresh.get("c") == rig.get("c")


def test_a_smaller_limit_shrinks_what_an_earlier_run_left(rig_of: Make) -> None:
    rig = rig_of(disk=4 * PAGE)
    rig.chain(*"abcd")
    rig.settle()
    rig.cache.disk.limit = rig.disk.most_bytes = 2 * PAGE
    rig.cache.disk.adopted_all([])
    rig.settle()
    assert set(rig.disk.held()) == set(keys(rig, "ab"))


def test_an_outcome_of_a_dropped_write_names_its_cause(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.disk.fails["store"] = Outcome.FULL
    rig.store("a")
    rig.settle()
    assert rig.count("write.disk.dropped.full") == rig.count("failure.disk.full") == 1
    assert len(rig.get("a")) == PAGE
