# SPDX-License-Identifier: Apache-2.0
"""Objects raised from disk and Redis: once for all who wait, a counted miss where it fails, tiers left alone when
gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.cache.state.leases import Writing
from loracache.cache.tier import io as tier_io
from loracache.keys import checksum
from loracache.storage_backends.base import Outcome, Standing
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


def keys(rig: Any, names: Sequence[str]) -> list[bytes]:
    return [rig.info(name).key for name in names]


# -- write-behind ------------------------------------------------------------------------------------------------------


# -- promotion ---------------------------------------------------------------------------------------------------------


def on_disk_only(rig: Any, names: str) -> None:
    rig.chain(*names)
    rig.settle()
    assert rig.evict(names[0])[0] == len(names)


def in_redis_only(rig: Any, names: str) -> None:
    rig.chain(*names)
    rig.settle()
    rig.evict(names[0], tiers=[Tier.CPU, Tier.DISK])
    rig.settle()


def test_an_object_is_raised_once_for_all_who_wait(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    on_disk_only(rig, "ab")
    one = rig.acquire("a", "b", "a", owner=1)
    two = rig.acquire("b", owner=2)
    assert one == [None] * 3
    rig.settle()
    assert {rig.read(item) for item in one} == {rig.read(one[0]), rig.read(two[0])}
    assert rig.count("load.disk.objects") == 2
    rig.release(owner=1)
    rig.release(owner=2)


def test_every_position_is_answered_once_whatever_happens(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    in_redis_only(rig, "ab")
    rig.chain(*"cd")
    rig.settle()
    rig.evict("d")
    answers = rig.acquire("a", "c", "d", "nowhere", "a", "b")
    rig.settle()
    assert [item.cause for item in answers] == ["", "", "", "absent", "", ""]
    rig.release()


def test_what_arrives_after_its_lease_ended_is_kept_but_not_handed_out(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    on_disk_only(rig, "a")
    answers = rig.acquire("a")
    rig.release()
    rig.settle()
    assert answers[0].cause == "lease_lost"
    assert rig.cache.leases.held_objects == 0
    assert rig.cache.lookup(keys(rig, "a")) == [Tier.CPU]


@pytest.mark.parametrize(
    ("outcome", "stays"),
    [(Outcome.MISS, False), (Outcome.CORRUPT, False), (Outcome.FAILED, True), (Outcome.UNAVAILABLE, False)],
)
def test_a_failed_load_is_a_counted_miss(rig_of: Make, outcome: Outcome, stays: bool) -> None:
    rig = rig_of(disk=1 << 20)
    on_disk_only(rig, "a")
    rig.disk.fails["load"] = outcome
    assert rig.get("a") == f"disk_{outcome.value}"
    assert rig.count(f"failure.disk.{outcome.value}") == 1
    assert rig.arena.free_bytes == rig.arena.size
    assert bool(rig.cache.lookup(keys(rig, "a"))) == stays
    del rig.disk.fails["load"]
    if outcome in (Outcome.MISS, Outcome.CORRUPT):
        rig.disk.lose(rig.info("a").key)
    assert rig.store("a") == ""  # computed anew, it is wanted anew
    rig.settle()
    assert rig.cache.lookup(keys(rig, "a")) == [Tier.CPU]
    assert rig.cache.audit() == []


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.UNAVAILABLE])
def test_what_was_computed_anew_takes_the_place_of_what_could_not_be_read(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    now = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rig = rig_of(disk=1 << 20)
    on_disk_only(rig, "ab")
    rig.disk.fails["load"] = outcome
    rig.get("a")
    del rig.disk.fails["load"]
    writing = rig.reserve("a", lease=b"again")
    other = bytes(PAGE)  # another computation, other rounding
    rig.put(writing.extents, other)
    assert rig.commit(1, b"again", [(writing.info.key, checksum([other]))]) == [""]
    rig.settle()
    now[0] += 60
    rig.later(60)
    rig.settle()
    answers = rig.acquire("a")
    rig.settle()
    assert rig.read(answers[0]) == other
    rig.release()
    written = outcome is Outcome.FAILED  # a disk that is left alone is not written to either
    assert rig.cache.lookup(keys(rig, "ab")) == [Tier.CPU, Tier.DISK]
    rig.evict("a")
    assert rig.cache.lookup(keys(rig, "ab")) == ([Tier.DISK, Tier.DISK] if written else [])
    assert len(rig.disk.held()) == 1 + written
    assert rig.cache.disk.used == len(rig.disk.held()) * rig.disk.footprint(PAGE)


def test_a_disk_that_is_left_alone_is_no_hit_and_redis_is_asked_instead(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.chain("a", "b")
    rig.settle()
    rig.evict("a")
    rig.disk.fails["load"] = Outcome.UNAVAILABLE
    assert rig.get("a") == "disk_unavailable"
    assert rig.cache.lookup(keys(rig, "ab")) == []
    assert rig.get("a") == rig.payload("a")
    assert rig.count("load.redis.objects") == 1


def test_a_corrupt_object_on_disk_is_deleted_and_its_children_are_reached_again_later(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    on_disk_only(rig, "abc")
    rig.disk.flip(rig.info("b").key)
    assert rig.get("b") == "disk_corrupt"
    assert rig.cache.lookup(keys(rig, "abc")) == [Tier.DISK]
    assert rig.store("b", "a") == ""
    assert rig.cache.lookup(keys(rig, "abc")) == [Tier.DISK, Tier.CPU, Tier.DISK]


def test_a_load_that_finds_no_room_is_a_counted_miss_and_disturbs_no_reader(rig_of: Make) -> None:
    rig = rig_of(pages=2, disk=1 << 20)
    on_disk_only(rig, "ab")
    rig.chain(*"cd")
    rig.settle()
    held = rig.acquire("c", "d", owner=2)
    answers = rig.acquire("a")
    rig.settle()
    assert answers[0].cause == "memory_full"
    assert [len(rig.read(item)) for item in held] == [PAGE, PAGE]
    rig.release(owner=2)


def test_what_is_being_loaded_is_not_written_beside_it(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    on_disk_only(rig, "a")
    rig.acquire("a")
    assert rig.reserve("a") == "exists"
    rig.settle()
    rig.release()


def test_a_copy_computed_while_redis_is_read_gives_way(rig_of: Make) -> None:
    rig = rig_of(redis=True)
    in_redis_only(rig, "a")
    writing = rig.reserve("a")
    answers = rig.acquire("a")
    assert isinstance(writing, Writing)
    rig.step("redis-ask")  # found, now being read
    assert rig.commit(1, b"w", [(writing.info.key, rig.write(writing))]) == ["exists"]
    rig.settle()
    assert len(rig.read(answers[0])) == PAGE
    rig.release()


def test_what_comes_from_redis_is_written_to_disk_with_its_ancestors_order(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    in_redis_only(rig, "abc")
    rig.disk.stored.clear()
    rig.acquire(*"abc")
    rig.settle()
    assert rig.disk.stored == keys(rig, "abc")
    assert rig.count("load.redis.objects") == 3
    rig.release()


def test_a_chunk_from_redis_without_its_parent_is_served_but_not_written_to_disk(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    in_redis_only(rig, "ab")
    assert len(rig.get("b")) == PAGE
    assert rig.disk.held() == {}
    assert rig.count("write.disk.dropped.no_parent") == 1
    assert len(rig.get("a")) == PAGE
    assert rig.cache.lookup(keys(rig, "ab")) == [Tier.CPU, Tier.CPU]


def test_making_room_for_a_load_does_not_lose_what_is_loaded_beside_it(rig_of: Make) -> None:
    """c is all that keeps the node of b in the tree: when c makes room for a, b must not vanish from it half loaded."""
    rig = rig_of(pages=3, redis=True)
    rig.chain(*"abc")
    rig.settle()
    rig.evict("a")
    rig.store("x")
    rig.cache.pins.pin(keys(rig, "x"), Tier.CPU)
    assert len(rig.get("c")) == PAGE  # alone, under a parent that is nowhere
    answers = rig.acquire("a", "b")
    rig.settle()
    assert [item.cause for item in answers] == ["", ""]
    assert rig.cache.lookup(keys(rig, "abc")) == [Tier.CPU, Tier.CPU]
    rig.release()


def test_nothing_is_left_in_the_tree_by_what_redis_does_not_have(rig_of: Make) -> None:
    rig = rig_of(pages=2, redis=True)
    in_redis_only(rig, "ab")
    rig.redis.fails["load"] = Outcome.CORRUPT
    assert rig.get("b") == "redis_corrupt"
    assert rig.get("a") == "redis_corrupt"
    assert rig.get("c") == "absent"
    assert len(rig.cache.index) == 0
    del rig.redis.fails["load"]
    rig.store("x", size=2 * PAGE)
    rig.acquire("x", owner=2)
    assert rig.get("b") == "memory_full"
    assert len(rig.cache.index) == 1
    rig.release(owner=2)


# -- a tier that fails -------------------------------------------------------------------------------------------------


def test_a_tier_that_is_gone_is_left_alone_and_asked_again_later(rig_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rig = rig_of(redis=True)
    io = rig.cache.redis.io
    rig.redis.fails["contains"] = Outcome.UNAVAILABLE
    assert rig.get("a") == "redis_unavailable"
    pauses = []
    for _ in range(7):
        assert not io.available
        del rig.redis.fails["contains"]
        assert rig.get("a") == "redis_unavailable"  # without asking
        rig.redis.fails["contains"] = Outcome.UNAVAILABLE
        started = now[0]
        while not io.available:
            now[0] += 0.25
        pauses.append(now[0] - started)
        rig.get("a")
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    now[0] += 15
    del rig.redis.fails["contains"]
    assert rig.get("a") == "absent"
    assert io.available


def test_a_question_that_stays_unanswered_is_noticed(rig_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rig = rig_of(redis=True)
    io = rig.cache.redis.io
    answers: list[object] = []
    io.contains(keys(rig, "a"), answers.append)
    now[0] += 0.01
    assert not io.asked_too_long(0.02)
    now[0] += 0.02
    assert io.asked_too_long(0.02)
    rig.settle()
    assert len(answers) == 1
    assert not io.asked_too_long(0.02)


def test_a_backends_bug_fails_its_batch_and_loses_nobody(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    on_disk_only(rig, "a")

    def broken(transfers: object) -> Any:
        raise RuntimeError("a bug")

    rig.disk.load = broken
    assert rig.get("a") == "disk_failed"
    assert rig.arena.free_bytes == rig.arena.size
    del rig.disk.load
    assert len(rig.get("a")) == PAGE


def test_what_redis_has_is_not_taken_for_other_bytes_that_a_disk_here_has(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.store("a")
    rig.settle()
    rig.evict("a")
    key = rig.info("a").key
    info, payload = rig.redis._objects[key]
    rig.redis._objects[key] = (replace(info, checksum=info.checksum ^ 1), payload)  # computed elsewhere
    rig.cache.disk.io.stand(Standing(reads=False, writes=False, reason="gone for now"))
    assert rig.get("a") == "redis_differs"
    rig.cache.disk.io.stand(Standing())
    assert rig.get("a") == rig.payload("a")
