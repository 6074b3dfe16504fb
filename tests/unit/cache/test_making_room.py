# SPDX-License-Identifier: Apache-2.0
"""A full arena of objects that no lower tier has yet: whose write is given up, and for whom nothing is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from loracache.cache.state.slices import whole
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


def keys(rig: Any, names: Sequence[str]) -> set[bytes]:
    return {rig.info(name).key for name in names}


def full_of_two_chains(rig_of: Make, **tiers: Any) -> Any:
    """x and y are being written; the chains a-b-c and d-e-f are queued behind them, and no page is free."""
    rig = rig_of(pages=8, **tiers)
    rig.store("x")
    rig.store("y")
    rig.chain(*"abc")
    rig.chain(*"def")
    assert rig.arena.free_bytes == 0
    return rig


def test_the_leaf_of_the_chain_queued_longest_goes_first_and_its_ancestors_are_written(rig_of: Make) -> None:
    rig = full_of_two_chains(rig_of, disk=1 << 20)
    assert rig.store("new") == ""
    assert [rig.node(name) is not None for name in "abcdef"] == [True, True, False, True, True, True]
    assert rig.count("write.disk.dropped.memory_full") == rig.count("evict.cpu.memory_full") == 1
    rig.settle()
    assert set(rig.disk.held()) == keys(rig, ["x", "y", "a", "b", "d", "e", "f", "new"])
    assert rig.get("c") == "absent"


def test_a_chain_is_given_up_from_its_end_before_the_next_chain_is_touched(rig_of: Make) -> None:
    rig = full_of_two_chains(rig_of, disk=1 << 20)
    assert rig.store("big", size=4 * PAGE) == ""
    assert [rig.node(name) is not None for name in "abcdef"] == [False, False, False, True, True, False]
    assert rig.count("write.disk.dropped.memory_full") == 4
    rig.settle()
    assert set(rig.disk.held()) == keys(rig, ["x", "y", "d", "e", "big"])


def test_a_chain_whose_leaf_is_in_use_is_passed_over(rig_of: Make) -> None:
    rig = full_of_two_chains(rig_of, disk=1 << 20)
    rig.acquire("c")
    assert rig.store("new") == ""
    assert [rig.node(name) is not None for name in "abcdef"] == [True] * 5 + [False]


def test_what_would_not_suffice_is_not_evicted(rig_of: Make) -> None:
    rig = rig_of(pages=4)
    rig.chain(*"abcd")
    rig.acquire("a", "b", "c")
    assert rig.store("big", size=2 * PAGE) == "full"
    assert rig.node("d") is not None
    assert rig.store("small") == ""


def test_clean_objects_go_before_any_write_is_given_up(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    rig.store("clean")
    rig.settle()
    rig.store("x")
    rig.store("y")
    rig.store("queued")
    assert rig.store("new") == ""
    assert rig.node("queued") is not None
    assert rig.count("write.disk.dropped.memory_full") == 0
    assert rig.get("clean") == rig.payload("clean")  # from disk


@pytest.mark.parametrize("tiers", [{"disk": 1 << 20}, {"redis": True}, {"disk": 1 << 20, "redis": True}])
@pytest.mark.parametrize("how", ["leased", "pinned"])
def test_what_cannot_get_room_costs_nobody_anything(rig_of: Make, tiers: dict[str, Any], how: str) -> None:
    rig = full_of_two_chains(rig_of, **tiers)
    if how == "leased":
        rig.acquire("c", "f")
    else:
        rig.cache.pins.pin(list(keys(rig, "cf")), Tier.CPU)
    queued = [writer.depth for writer in rig.cache.writers]
    assert rig.store("new") == "full"
    assert [writer.depth for writer in rig.cache.writers] == queued
    assert rig.count("evict.cpu.policy") == 0
    for tier in ("disk", "redis"):
        assert rig.count(f"write.{tier}.dropped.memory_full") == 0
    rig.settle()
    for writer in rig.cache.writers:
        assert set(rig.backend(writer.io.tier.label).held()) == keys(rig, "xyabcdef")


def test_nobody_gives_up_its_own_parent_to_make_room_for_itself(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    rig.chain(*"xyab")  # x and y are being written
    assert rig.store("c", "b") == "full"
    assert rig.count("write.disk.dropped.memory_full") == 0
    assert rig.store("other") == ""  # for somebody else b goes
    assert rig.node("b") is None


def test_a_chain_longer_than_the_arena_is_stored_as_fast_as_the_disk_takes_it(rig_of: Make) -> None:
    """The only leaf is the parent of what comes: it goes when the disk has it."""
    rig = rig_of(pages=4, disk=1 << 20)
    names = list("abcdefghij")
    for parent, name in zip([None, *names], names, strict=False):
        assert rig.store(name, parent) == ""
        rig.settle()
    assert rig.count("write.disk.dropped.memory_full") == 0
    assert set(rig.disk.held()) == keys(rig, names)
    assert [rig.get(name) for name in names] == [rig.payload(name) for name in names]


def test_another_leaf_goes_before_the_parent(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    rig.chain(*"ab")
    rig.chain(*"xy")
    rig.settle()
    assert rig.store("c", "b") == ""
    assert rig.node("b").held_in(Tier.CPU)
    assert not rig.node("y").held_in(Tier.CPU)


def test_what_is_given_up_is_given_up_in_every_tier_that_waits_for_it(rig_of: Make) -> None:
    rig = full_of_two_chains(rig_of, disk=1 << 20, redis=True)
    assert rig.store("new") == ""
    assert rig.count("write.disk.dropped.memory_full") == rig.count("write.redis.dropped.memory_full") == 1
    rig.settle()
    assert set(rig.disk.held()) == set(rig.redis.held()) == keys(rig, ["x", "y", "a", "b", "d", "e", "f", "new"])


def test_what_redis_has_already_counts_as_given_up_on_disk_only(rig_of: Make) -> None:
    rig = full_of_two_chains(rig_of, disk=1 << 20, redis=True)
    while rig.step("redis-write"):
        pass
    assert rig.store("new") == ""
    assert rig.count("write.disk.dropped.memory_full") == 1
    assert rig.count("write.redis.dropped.memory_full") == 0
    assert rig.get("c") == rig.payload("c")  # from Redis


def test_where_only_redis_lags_its_queue_gives_way(rig_of: Make) -> None:
    rig = full_of_two_chains(rig_of, disk=1 << 20, redis=True)
    while rig.step("disk-write"):
        pass
    assert rig.store("new") == ""
    assert rig.count("write.disk.dropped.memory_full") == 0
    assert rig.count("write.redis.dropped.memory_full") == 1
    assert rig.get("c") == rig.payload("c")  # from disk


def test_a_load_makes_room_in_the_same_way(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    rig.store("old")
    rig.settle()
    rig.evict("old")
    for name in "xyab":
        rig.store(name)
    answers = rig.acquire("old")
    rig.settle()
    assert rig.read(answers[0]) == rig.payload("old")
    assert rig.count("write.disk.dropped.memory_full") == 1
    assert rig.get("a") == "absent"


def test_before_the_disk_is_scanned_a_full_arena_still_takes_what_is_new(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20, scanned=False)
    rig.chain(*"abcd")
    assert rig.store("new") == ""
    assert rig.node("d") is None
    rig.cache.disk.adopted_all([])
    rig.settle()
    assert set(rig.disk.held()) == keys(rig, ["a", "b", "c", "new"])


def test_room_for_a_child_is_not_made_by_taking_its_parent(rig_of: Make) -> None:
    rig = rig_of(pages=2)
    rig.store("parent")
    rig.store("other")
    assert rig.store("child", "parent") == ""
    assert rig.node("other") is None


def test_room_for_many_is_one_choice_of_victims_and_no_more_than_they_need(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them exists and one has no parent: nothing is evicted for those."""
    rig = rig_of(pages=8)
    rig.chain(*"abcdefgh")
    choices = []
    policy = rig.cache._policies[Tier.CPU]
    choose = policy.victims
    monkeypatch.setattr(policy, "victims", lambda *asked: choices.append(asked[0]) or choose(*asked))
    infos = [rig.info("k"), rig.info("l", "k"), rig.info("a"), rig.info("n", "nobody"), rig.info("m", "l")]
    answers = whole(rig.cache.reserve(1, b"w", infos, 30.0))
    assert [str(answer) for answer in answers if isinstance(answer, str)] == ["exists", "no_parent"]
    assert choices == [3 * PAGE]
    assert [rig.node(name) is not None for name in "abcdefgh"] == [True] * 5 + [False] * 3
    assert rig.arena.free_bytes == 0
