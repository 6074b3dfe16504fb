# SPDX-License-Identifier: Apache-2.0
"""TieredCache: what each operation promises, with the tiers' threads stepped by hand (conftest's `make_rig`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache.state.leases import Writing
from loracache.cache.state.slices import whole
from loracache.errors import UsageError
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def nothing_leaks(make_rig: Make) -> Any:
    """Every test ends with every page held once or free."""
    rigs = []

    def make(**options: Any) -> Any:
        rigs.append(make_rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.settle()
        assert rig.cache.audit() == []


# -- storing -----------------------------------------------------------------------------------------------------------


def test_an_object_is_visible_at_commit_and_not_before(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    writing = rig.reserve("a")
    assert isinstance(writing, Writing)
    assert rig.cache.lookup([writing.info.key]) == []
    assert rig.get("a") == "absent"
    assert rig.commit(1, b"w", [(writing.info.key, rig.write(writing))]) == [""]
    assert rig.cache.lookup([writing.info.key]) == [Tier.CPU]
    assert len(rig.get("a")) == PAGE


def test_a_reservation_that_is_given_back_leaves_nothing(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.reserve("a", size=3 * PAGE)
    assert rig.arena.free_bytes == 13 * PAGE
    assert rig.cache.leases.release(1, b"w")
    assert rig.arena.free_bytes == 16 * PAGE
    assert rig.get("a") == "absent"


def test_what_is_held_or_being_written_is_not_written_twice(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.store("a")
    assert rig.reserve("a") == "exists"
    rig.reserve("b", lease=b"w1")
    assert rig.reserve("b", lease=b"w2", owner=2) == "busy"
    answers = whole(rig.cache.reserve(1, b"w3", [rig.info("c"), rig.info("c")], 30.0))
    assert isinstance(answers[0], Writing)
    assert answers[1] == "busy"


def test_a_child_needs_its_parent_held_or_coming(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    assert rig.reserve("b", "a") == "no_parent"
    parent = rig.reserve("a", lease=b"p")
    assert isinstance(rig.reserve("b", "a", lease=b"c", owner=2), Writing)
    answers = whole(rig.cache.reserve(3, b"w", [rig.info("x"), rig.info("y", "x"), rig.info("z", "nobody")], 30.0))
    assert [isinstance(answer, Writing) for answer in answers] == [True, True, False]
    assert answers[2] == "no_parent"
    assert isinstance(parent, Writing)


def test_a_child_whose_parent_was_given_up_is_not_committed(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.reserve("a", lease=b"p")
    child = rig.reserve("b", "a", lease=b"c")
    rig.cache.leases.release(1, b"p")
    assert rig.commit(1, b"c", [(child.info.key, rig.write(child))]) == ["no_parent"]
    assert rig.arena.free_bytes == rig.arena.size
    assert len(rig.cache.index) == 0


def test_a_parent_stays_while_its_child_is_being_written(nothing_leaks: Make) -> None:
    rig = nothing_leaks(pages=4)
    rig.store("a")
    child = rig.reserve("b", "a")
    assert rig.store("big", size=3 * PAGE) == "full"
    assert rig.evict("a") == (0, 0, 1)
    assert rig.commit(1, b"w", [(child.info.key, rig.write(child))]) == [""]
    assert rig.store("big", size=3 * PAGE) == ""  # now the chain may go


@pytest.mark.parametrize("size", [0, 17 * PAGE, 2**63])
def test_a_size_that_can_never_fit_is_refused_and_evicts_nothing(nothing_leaks: Make, size: int) -> None:
    rig = nothing_leaks()
    rig.store("a")
    assert rig.reserve("b", size=size) == "too_large"
    assert rig.count("evict.cpu.policy") == 0


def test_an_object_may_not_be_its_own_parent(nothing_leaks: Make) -> None:
    """An adapter's key is known as a parent before anything is held under it: a ring would never end a walk."""
    rig = nothing_leaks()
    rig.cache.index.adapters.add(rig.info("a").key)
    assert rig.store("b", "a") == ""
    assert rig.reserve("a", "a") == "no_parent"


def test_what_is_not_committed_with_its_lease_is_free_again(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    one, two = whole(rig.cache.reserve(1, b"w", [rig.info("a"), rig.info("b")], 30.0))
    assert rig.commit(1, b"w", [(one.info.key, rig.write(one))]) == [""]
    assert rig.arena.free_bytes == 15 * PAGE
    assert rig.commit(1, b"w", [(two.info.key, 0)]) == ["lease_lost"]


def test_what_a_tier_brought_meanwhile_is_kept_and_the_copy_dropped(nothing_leaks: Make) -> None:
    """Two computations of a chunk may differ in their last bits: the index describes the copy that is held."""
    rig = nothing_leaks(disk=1 << 20)
    slow = rig.reserve("a")
    rig.put(slow.extents, b"x" * PAGE)
    rig.cache.disk.adopt([rig.info("a", size=PAGE)])  # an earlier run's, found by the scan
    assert rig.commit(1, b"w", [(slow.info.key, 99)]) == ["exists"]
    assert rig.arena.free_bytes == rig.arena.size


# -- eviction ----------------------------------------------------------------------------------------------------------


def test_a_full_arena_gives_up_the_least_recently_used(nothing_leaks: Make) -> None:
    rig = nothing_leaks(pages=4)
    for name in "abcd":
        rig.store(name)
    rig.cache.lookup([rig.info("a").key])
    assert rig.store("e") == ""
    assert [rig.node(name) is not None for name in "abcde"] == [True, False, True, True, True]


def test_reading_is_a_use(nothing_leaks: Make) -> None:
    rig = nothing_leaks(pages=4)
    for name in "abcd":
        rig.store(name)
    rig.get("a")
    rig.store("e")
    assert [rig.node(name) is not None for name in "abcde"] == [True, False, True, True, True]


def test_a_full_arena_of_leased_objects_refuses_and_keeps_them(nothing_leaks: Make) -> None:
    rig = nothing_leaks(pages=2)
    rig.chain("a", "b")
    answers = rig.acquire("a", "b")
    assert rig.store("c") == "full"
    assert rig.count("store.refused.full") == 1
    assert [len(rig.read(item)) for item in answers] == [PAGE, PAGE]
    rig.release()
    assert rig.store("c") == ""


def test_eviction_takes_descendants_along_and_reports_what_stays(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.chain("a", "b", "c")
    rig.store("b2", "a")
    rig.store("other")
    rig.acquire("b2")
    assert rig.evict("a", "other") == (3, 3 * PAGE, 2)  # b and c go; b2 is leased, so a stays
    assert [rig.node(name) is not None for name in ("a", "b", "c", "b2", "other")] == [True, False, False, True, False]


def test_each_object_that_stays_is_counted_once(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.chain("a", "b", "c")
    rig.cache.pins.pin([rig.info("c").key], Tier.CPU)
    assert rig.evict("a", "b", "c", "a") == (0, 0, 3)
    assert rig.evict("c", "b", "a") == (0, 0, 3)
    rig.cache.pins.unpin([rig.info("c").key], Tier.CPU)
    assert rig.evict("c", "b", "a") == (3, 3 * PAGE, 0)


def test_eviction_from_one_tier_leaves_the_others(nothing_leaks: Make) -> None:
    rig = nothing_leaks(disk=1 << 20, redis=True)
    rig.chain("a", "b")
    rig.settle()
    assert rig.evict("a", tiers=[Tier.CPU]) == (2, 2 * PAGE, 0)
    assert rig.cache.lookup([rig.info("a").key, rig.info("b").key]) == [Tier.DISK, Tier.DISK]
    assert len(rig.get("b")) == PAGE
    assert rig.evict("b", tiers=[Tier.CPU, Tier.DISK]) == (2, 2 * PAGE, 0)
    rig.settle()
    assert set(rig.disk.held()) == {rig.info("a").key}
    assert len(rig.get("b")) == PAGE  # Redis has it still
    assert rig.evict("a", tiers=[Tier.CPU, Tier.DISK, Tier.REDIS])[2] == 0
    rig.settle()
    assert rig.redis.held() == rig.disk.held() == {}
    assert rig.get("a") == rig.get("b") == "absent"


def test_an_object_that_stays_is_still_written(nothing_leaks: Make) -> None:
    rig = nothing_leaks(disk=1 << 20)
    rig.chain(*"abcde")  # two are being written, three are queued
    rig.acquire("e")
    assert rig.evict("a") == (0, 0, 5)
    rig.settle()
    assert len(rig.disk.held()) == 5


def test_eviction_of_what_is_nowhere_does_nothing(nothing_leaks: Make) -> None:
    rig = nothing_leaks(disk=1 << 20, redis=True)
    assert rig.evict("a", tiers=[Tier.CPU, Tier.DISK, Tier.REDIS]) == (0, 0, 0)


# -- pins and leases ---------------------------------------------------------------------------------------------------


def test_a_pin_keeps_an_object_and_its_ancestors_until_it_ends(nothing_leaks: Make) -> None:
    rig = nothing_leaks(pages=3)
    rig.chain("a", "b")
    assert rig.cache.pins.pin([rig.info("b").key, rig.info("nobody").key], Tier.CPU) == 1
    assert rig.store("big", size=2 * PAGE) == "full"
    assert rig.evict("b") == (0, 0, 1)
    assert rig.cache.pins.unpin([rig.info("b").key, rig.info("a").key], Tier.CPU) == 1
    assert rig.store("big", size=2 * PAGE) == ""


def test_a_pin_ends_with_its_time_and_the_last_word_counts(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.store("a")
    key = rig.info("a").key
    rig.cache.pins.pin([key], Tier.CPU, 5.0)
    rig.later(4.9)
    assert rig.evict("a") == (0, 0, 1)
    rig.cache.pins.pin([key], Tier.CPU)  # now for ever
    rig.later(100)
    assert rig.evict("a") == (0, 0, 1)
    rig.cache.pins.pin([key], Tier.CPU, 1.0)
    rig.later(1)
    assert rig.evict("a") == (1, PAGE, 0)


def test_a_disk_pin_keeps_an_object_on_disk_only(nothing_leaks: Make) -> None:
    rig = nothing_leaks(disk=2 * PAGE)
    rig.store("a")
    rig.settle()
    assert rig.cache.pins.pin([rig.info("a").key], Tier.DISK) == 1
    assert rig.evict("a", tiers=[Tier.CPU, Tier.DISK]) == (1, PAGE, 1)
    rig.store("b", size=2 * PAGE)
    rig.settle()
    assert rig.count("write.disk.dropped.full") == 1
    assert len(rig.get("a")) == PAGE


@pytest.mark.parametrize("tier", [Tier.GPU, Tier.REDIS])
def test_a_tier_that_keeps_no_promises_takes_no_pins(nothing_leaks: Make, tier: Tier) -> None:
    rig = nothing_leaks(disk=1 << 20, redis=True)
    with pytest.raises(UsageError, match=tier.label):
        rig.cache.pins.pin([rig.info("a").key], tier)


def test_a_read_lease_ends_by_release_by_time_and_with_its_connection(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    for name in "abc":
        rig.store(name)
    for owner, name in enumerate("abc"):
        rig.acquire(name, owner=owner, ttl=10.0)
        assert rig.evict(name) == (0, 0, 1)
    assert rig.release(owner=0)
    assert rig.evict("a") == (1, PAGE, 0)
    rig.cache.leases.disconnect(1)
    assert rig.evict("b") == (1, PAGE, 0)
    rig.later(10.0)
    assert rig.evict("c") == (1, PAGE, 0)
    assert not rig.release(owner=2)
    assert len(rig.cache.leases) == 0
    assert rig.count("lease.expired") == 1


def test_a_lease_is_prolonged_and_never_shortened(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.store("a")
    rig.acquire("a", ttl=10.0)
    assert rig.cache.leases.renew(1, b"r", 1.0)
    rig.later(5.0)
    assert rig.cache.leases.renew(1, b"r", 10.0)
    rig.later(9.9)
    assert rig.evict("a") == (0, 0, 1)
    rig.later(0.1)
    assert not rig.cache.leases.renew(1, b"r", 10.0)


def test_acquiring_twice_under_one_lease_holds_once(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.store("a")
    rig.acquire("a", "a")
    rig.acquire("a")
    assert rig.cache.leases.held_objects == 1
    assert rig.release()
    assert rig.evict("a") == (1, PAGE, 0)


def test_extents_of_a_broken_write_lease_stay_out_of_use_until_the_writer_is_gone(nothing_leaks: Make) -> None:
    rig = nothing_leaks(pages=4)
    lost = rig.reserve("a", size=2 * PAGE)
    assert rig.cache.leases.disconnect(1)  # somebody must watch the process
    assert rig.cache.leases.quarantined == 2 * PAGE
    assert rig.cache.audit() == []
    assert rig.store("b", size=3 * PAGE, owner=2) == "full"
    for offset, _ in rig.reserve("c", size=2 * PAGE, owner=2).extents:
        assert offset not in [start for start, _ in lost.extents]
    rig.cache.leases.writer_gone(1)
    assert rig.cache.leases.quarantined == 0
    assert isinstance(rig.reserve("a", size=2 * PAGE, owner=2, lease=b"again"), Writing)


@pytest.mark.parametrize("word", ["commit", "abort"])
def test_a_late_word_of_the_writer_frees_what_its_lost_lease_held(nothing_leaks: Make, word: str) -> None:
    rig = nothing_leaks()
    writing = rig.reserve("a")
    rig.later(31.0)
    assert rig.cache.leases.quarantined == PAGE
    assert isinstance(rig.reserve("a", owner=2, lease=b"other"), Writing)  # the key is free at once
    if word == "commit":
        assert rig.commit(1, b"w", [(writing.info.key, 0)]) == ["lease_lost"]
    else:
        assert not rig.cache.leases.release(1, b"w")
    assert rig.cache.leases.quarantined == 0
    assert rig.get("a") == "absent"


def test_a_connection_that_only_read_needs_no_watching(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.store("a")
    rig.acquire("a")
    assert not rig.cache.leases.disconnect(1)
    assert len(rig.cache.leases) == 0


# -- corruption in the arena -------------------------------------------------------------------------------------------


def test_a_condemned_object_is_never_served_again_and_its_pages_wait_for_its_readers(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.store("a")
    rig.acquire("a", owner=1)
    rig.acquire("a", owner=2)
    rig.cache.report_bad([rig.info("a").key])
    assert rig.count("failure.cpu.corrupt") == 1
    assert rig.cache.lookup([rig.info("a").key]) == []
    assert rig.get("a") == "absent"
    assert rig.arena.free_bytes == 15 * PAGE
    rig.release(owner=1)
    assert rig.arena.free_bytes == 15 * PAGE
    assert rig.cache.audit() == []
    assert rig.store("a") == ""  # computed anew while the old bytes are still being read
    rig.release(owner=2)
    assert rig.arena.free_bytes == 15 * PAGE
    assert len(rig.get("a")) == PAGE


def test_a_condemned_object_comes_back_from_disk(nothing_leaks: Make) -> None:
    rig = nothing_leaks(disk=1 << 20)
    rig.chain("a", "b")
    rig.settle()
    node = rig.node("a")
    rig.put(node.extents, b"broken")
    rig.cache.report_bad([node.key])
    assert rig.cache.lookup([rig.info("a").key, rig.info("b").key]) == [Tier.DISK, Tier.CPU]
    assert len(rig.get("a")) == PAGE


def test_bytes_that_do_not_match_their_checksum_reach_no_tier_and_are_served_no_more(nothing_leaks: Make) -> None:
    rig = nothing_leaks(disk=1 << 20, redis=True)
    writing = rig.reserve("a")
    assert rig.commit(1, b"w", [(writing.info.key, rig.write(writing) ^ 1)]) == [""]
    rig.settle()
    assert rig.disk.held() == rig.redis.held() == {}
    assert rig.count("failure.disk.corrupt") == 1
    assert rig.get("a") == "absent"
    assert rig.store("a") == ""


def test_an_object_condemned_in_the_middle_of_its_write_keeps_its_pages_until_that_is_done(
    nothing_leaks: Make,
) -> None:
    rig = nothing_leaks(disk=1 << 20)
    rig.store("a")
    rig.cache.report_bad([rig.info("a").key])
    assert rig.arena.free_bytes == 15 * PAGE
    rig.settle()
    assert rig.arena.free_bytes == 16 * PAGE


def test_reporting_what_is_nowhere_does_nothing(nothing_leaks: Make) -> None:
    rig = nothing_leaks()
    rig.cache.report_bad([rig.info("a").key])
    assert rig.cache.counters.all() == {}
