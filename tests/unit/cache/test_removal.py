# SPDX-License-Identifier: Apache-2.0
"""Taking objects out of tiers: in slices where they are many, at once where they are few, counted right either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache import eviction as removal
from loracache.cache.eviction import Evicted
from loracache.control.steps import turn
from loracache.storage_backends.base import Kind, Outcome
from loracache.tiers import Tier

PAGE = 4096
SLICE = 10
EVERYWHERE = (Tier.CPU, Tier.DISK, Tier.REDIS)
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "_SLICE", SLICE)


def store_many(rig: Any, count: int) -> None:
    for name in range(count):
        assert rig.store(name) == ""


def clear(rig: Any, *tiers: Tier) -> list[Evicted]:
    """What it did, once it is over."""
    return evicting(rig, tiers)


def evicting(rig: Any, tiers: Any, *names: object) -> list[Evicted]:
    """Out of `tiers`, and with everything where no names are given; what it did, once it is over."""
    keys = [rig.info(name).key for name in names]
    ends: list[Evicted] = rig.remove(
        lambda did: rig.cache.evict(keys, tiers, did) if keys else rig.cache.clear(tiers, did)
    )
    return ends


def test_between_two_slices_others_are_served(rig_of: Make) -> None:
    rig = rig_of(pages=64)
    store_many(rig, 25)
    answers = clear(rig, Tier.CPU)
    assert (answers, len(rig.posted)) == ([], 1)
    assert rig.cache.index.objects[Tier.CPU] == 25 - SLICE
    assert rig.store("new") == ""
    assert len(rig.posted) == 1
    rig.answer()
    assert answers == [Evicted(25, 25 * PAGE, 0)]
    assert [node.key for node in rig.cache.index] == [rig.info("new").key]


@pytest.mark.parametrize("count", [0, 1, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE, 35])
def test_it_ends_however_many_there_are(rig_of: Make, count: int) -> None:
    rig = rig_of(pages=64)
    store_many(rig, count)
    answers = clear(rig, Tier.CPU)
    rig.answer()
    assert answers == [Evicted(count, count * PAGE, 0)]
    assert len(rig.cache.index) == 0


def test_few_are_gone_at_once_without_a_turn_of_the_loop(rig_of: Make) -> None:
    rig = rig_of(pages=64)
    rig.chain("a", "b", "c")
    assert evicting(rig, [Tier.CPU], "b", "nobody") == [Evicted(2, 2 * PAGE, 0)]
    assert evicting(rig, EVERYWHERE, "nobody") == [Evicted(0, 0, 0)]
    assert not rig.posted


def test_a_long_chain_goes_slice_by_slice_from_its_end(rig_of: Make) -> None:
    rig = rig_of(pages=64)
    rig.chain(*range(3 * SLICE))
    answers = evicting(rig, [Tier.CPU], 0)
    keys = [rig.info(number).key for number in range(3 * SLICE)]
    assert len(rig.cache.lookup(keys)) == rig.cache.index.objects[Tier.CPU] == 2 * SLICE
    rig.answer()
    assert answers == [Evicted(3 * SLICE, 3 * SLICE * PAGE, 0)]
    assert len(rig.cache.index) == 0


def test_one_chunk_with_many_descendants_keeps_nobody_waiting(rig_of: Make) -> None:
    rig = rig_of(pages=64)
    assert rig.store("prompt") == ""
    for name in range(35):
        assert rig.store(name, "prompt") == ""
    answers = evicting(rig, [Tier.CPU], "prompt")
    assert rig.cache.index.objects[Tier.CPU] == 36 - SLICE
    assert rig.store("meanwhile", "prompt") == ""
    rig.answer()
    assert answers == [Evicted(35, 35 * PAGE, 1)]  # the prompt is needed by what came meanwhile
    assert rig.cache.lookup([rig.info("prompt").key, rig.info("meanwhile").key]) == [Tier.CPU] * 2


def test_what_is_leased_or_pinned_in_any_slice_is_skipped_with_its_ancestors(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=1 << 20)
    store_many(rig, 25)
    rig.chain("a", "b", "c")
    rig.settle()
    rig.acquire(1, 24, "c")
    rig.cache.pins.pin([rig.info(2).key], Tier.CPU)
    rig.cache.pins.pin([rig.info(3).key], Tier.DISK)
    answers = clear(rig, Tier.CPU, Tier.DISK)
    rig.answer()
    (done,) = answers
    assert (done.objects, done.skipped) == (22 + 27, 6 + 1)
    assert done.nbytes == done.objects * PAGE
    assert [rig.read(item) for item in rig.acquire(1, 24, "c")] == [rig.payload(name) for name in (1, 24, "c")]
    assert rig.cache.lookup([rig.info("a").key, rig.info("b").key, rig.info("c").key]) == [Tier.CPU] * 3
    rig.settle()
    assert set(rig.disk.held()) == {rig.info(3).key}


def test_what_leaves_between_two_slices_by_another_way_is_not_counted(rig_of: Make) -> None:
    rig = rig_of(pages=64)
    store_many(rig, 25)
    answers = clear(rig, Tier.CPU)
    assert rig.evict(24) == (1, PAGE, 0)
    rig.answer()
    assert answers == [Evicted(24, 24 * PAGE, 0)]


def test_a_lease_taken_between_two_slices_is_honoured(rig_of: Make) -> None:
    rig = rig_of(pages=64)
    store_many(rig, 25)
    answers = clear(rig, Tier.CPU)
    (held,) = rig.acquire(24)
    rig.answer()
    assert answers == [Evicted(24, 24 * PAGE, 1)]
    assert rig.read(held) == rig.payload(24)


def test_an_object_stored_again_after_its_slice_stays(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=1 << 20, redis=True)
    store_many(rig, 25)
    rig.settle()
    answers = clear(rig, *EVERYWHERE)
    assert rig.store(0) == ""
    rig.settle()
    assert answers == [Evicted(50, 50 * PAGE, 0)]
    assert set(rig.disk.held()) == set(rig.redis.held()) == {rig.info(0).key}
    assert rig.get(0) == rig.payload(0)


def test_lower_tiers_are_told_a_slice_at_a_time(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=1 << 20, redis=True)
    store_many(rig, 25)
    rig.settle()
    clear(rig, *EVERYWHERE)
    rig.settle()
    for backend in (rig.disk, rig.redis):
        assert [len(keys) for keys in backend.deletions] == [SLICE, SLICE, 5]
        assert backend.held() == {}
    assert rig.count("evict.disk.asked") == 25


def test_queued_writes_do_not_bring_back_what_leaves_redis(rig_of: Make) -> None:
    rig = rig_of(pages=256, redis=True)
    store_many(rig, 200)  # two batches are on their way, others wait
    clear(rig, Tier.REDIS)
    rig.settle()
    assert rig.redis.held() == {}
    assert rig.cache.index.objects[Tier.CPU] == 200


def test_how_deletions_in_redis_ended_is_told(rig_of: Make) -> None:
    rig = rig_of(pages=64, redis=True)
    store_many(rig, 3)
    rig.settle()
    rig.redis.fails["delete"] = Outcome.FAILED
    (did,) = evicting(rig, EVERYWHERE, 0, "nobody")
    rig.settle()
    del rig.redis.fails["delete"]
    (done,) = evicting(rig, [Tier.REDIS], 0, 1, "nobody")
    rig.settle()
    assert did.redis == {Outcome.FAILED: 2}
    assert done.redis == {Outcome.OK: 2, Outcome.MISS: 1}


def test_a_flush_after_a_clear_waits_for_its_deletions(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=1 << 20)
    store_many(rig, 25)
    rig.settle()
    left: list[int] = []

    async def play() -> None:
        did = Evicted()
        for _ in rig.cache.clear([Tier.CPU, Tier.DISK], did):
            await turn()
        rig.cache.when_flushed(lambda: left.append(len(rig.disk.held())))

    ends = rig.start(play())
    rig.settle()
    assert (left, ends) == ([0], [None])


@pytest.mark.parametrize("how", ["clear", "evict"])
def test_an_adapters_chains_are_removed_one_by_one(rig_of: Make, how: str) -> None:
    rig = rig_of(pages=64, disk=1 << 20)
    rig.cache.index.adapters.add(rig.info("adapter").key)
    for name in range(12):
        assert rig.store(name, "adapter") == ""
        assert rig.store(f"{name}+", name) == ""
    rig.settle()
    names = ["adapter"] if how == "evict" else []
    answers = evicting(rig, [Tier.CPU, Tier.DISK], *names)
    assert rig.cache.index.objects[Tier.CPU] == rig.cache.index.objects[Tier.DISK] == 24 - SLICE
    assert all(
        node.parent.kind is Kind.LORA or node.parent.held_in(Tier.CPU) for node in rig.cache.index if node.parent
    )
    rig.settle()
    assert answers == [Evicted(2 * 24, 2 * 24 * PAGE, 0)]
    assert len(rig.disk.deletions) == 3
    assert len(rig.cache.index) == 0  # the adapter's own node is gone, too


def test_a_pin_ends_with_the_objects_stay_in_the_tier(rig_of: Make) -> None:
    rig = rig_of()
    rig.store("a")
    assert rig.cache.pins.pin([rig.info("a").key], Tier.CPU) == 1
    rig.acquire("a")
    rig.cache.report_bad([rig.info("a").key])
    rig.store("a")
    rig.release()
    assert rig.evict("a") == (1, PAGE, 0)
