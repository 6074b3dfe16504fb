# SPDX-License-Identifier: Apache-2.0
"""Moves between tiers: all there is arrives, nothing is lost on the way, and what passed through leaves no trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from loracache.control import transfer as moving
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
LARGE = 1 << 20
CPU, DISK, REDIS = Tier.CPU, Tier.DISK, Tier.REDIS
PAIRS = list(itertools.permutations((CPU, DISK, REDIS), 2))
Make = Callable[..., Any]


def only_in(made: Any, tier: Tier, count: int) -> range:
    """A chain of so many objects that `tier` alone holds."""
    names = range(count)
    made.rig.chain(*names)
    made.rig.settle()
    others = [each for each in (CPU, DISK, REDIS) if each is not tier and each in made.cache.tiers]
    made.rig.evict(names[0], tiers=[each for each in others if each is not REDIS])
    if REDIS in others:
        made.cache.redis.io.delete(made.keys(names))
    made.rig.settle()
    assert {each: len(made.held(each)) for each in others} == dict.fromkeys(others, 0)
    assert len(made.held(tier)) == count
    return names


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("keep", [True, False])
def test_every_object_arrives_with_its_bytes_and_leaves_or_stays_at_its_source(
    settled: Make, source: Tier, target: Tier, keep: bool
) -> None:
    made = settled(pages=64, disk=LARGE, redis=True)
    names = only_in(made, source, 11)
    operation = made.move(names, target, source=source, keep=keep)
    assert (operation.state, operation.objects, operation.nbytes) == ("done", 11, 11 * PAGE)
    assert not operation.causes
    assert made.held(target) == made.named(*names)
    assert made.held(source) == (made.named(*names) if keep else set())
    (third,) = {CPU, DISK, REDIS} - {source, target}
    # What comes from Redis to be used in the arena is kept on the disk, too, as any load does.
    assert len(made.held(third)) == (11 if (source, target) == (REDIS, CPU) else 0)
    assert [made.rig.get(name) for name in names] == [made.rig.payload(name) for name in names]


@pytest.mark.parametrize(("source", "target"), [(DISK, CPU), (REDIS, CPU), (CPU, DISK), (CPU, REDIS), (REDIS, DISK)])
def test_admitting_takes_objects_from_wherever_they_are_and_leaves_them_there(
    settled: Make, source: Tier, target: Tier
) -> None:
    made = settled(pages=64, disk=LARGE, redis=True)
    names = only_in(made, source, 7)
    operation = made.move([*names, "nobody"], target, wanted=lambda node: not node.held_in(target))
    assert (operation.objects, dict(operation.causes)) == (7, {"absent": 1})
    assert made.held(target) == made.held(source) == made.named(*names)
    again = made.move(names, target, wanted=lambda node: not node.held_in(target))
    assert (again.objects, dict(again.causes)) == (0, {"already": 7})


def test_what_is_admitted_for_a_while_is_held_and_so_is_what_was_there(operated: Make) -> None:
    made = operated(pages=64, disk=LARGE)
    made.rig.chain("a", "b", "c")
    made.rig.settle()
    made.rig.evict("b")
    operation = made.begin("abc", CPU, wanted=lambda node: not node.held_in(CPU), hold=5.0)
    made.rig.settle()
    assert (operation.objects, dict(operation.causes)) == (2, {"already": 1})
    assert made.rig.evict("a") == (0, 0, 3)
    made.rig.later(5.0)
    made.check(operation)
    assert made.rig.evict("a")[0] == 3


def test_what_is_admitted_for_a_while_gives_way_to_what_is_stored(operated: Make) -> None:
    made = operated(pages=4, disk=LARGE)
    made.rig.chain("a", "b")
    made.rig.settle()
    made.begin("ab", CPU, wanted=lambda node: not node.held_in(CPU), hold=60.0)
    made.rig.settle()
    assert [made.rig.store(name) for name in "cdef"] == [""] * 4
    made.rig.settle()


@pytest.mark.parametrize(("source", "target"), [(DISK, REDIS), (REDIS, DISK)])
def test_a_chain_far_larger_than_the_arena_passes_through_it(settled: Make, source: Tier, target: Tier) -> None:
    made = settled(pages=64, disk=LARGE, redis=True)
    chain: list[int] = []
    for name in range(120):  # a few at a time: the arena holds fewer than there are
        assert made.rig.store(name, chain[-1] if chain else None, 2 * PAGE) == ""
        chain.append(name)
        if len(chain) % 20 == 0:
            made.rig.settle()
            made.rig.evict(0)
    made.rig.evict(0, tiers=[CPU, *({CPU, DISK} - {source, CPU})])
    if source is DISK:
        made.cache.redis.io.delete(made.keys(chain))
    made.rig.settle()
    operation = made.move(chain, target, source=source, keep=False)
    assert (operation.objects, dict(operation.causes)) == (120, {})
    assert made.held(target) == made.named(*chain)
    assert made.held(source) == made.held(CPU) == set()


def test_objects_of_redis_that_are_large_against_the_arena_fit_into_it_a_slice_at_a_time(settled: Make) -> None:
    made = settled(pages=32, disk=LARGE, redis=True)
    for name in range(12):
        assert made.rig.store(name, None, 8 * PAGE) == ""
        made.rig.settle()
    made.rig.evict(*range(12), tiers=[CPU, DISK])
    made.rig.settle()
    operation = made.move(range(12), DISK)
    assert (operation.objects, dict(operation.causes)) == (12, {})
    assert made.held(CPU) == set()


def test_what_was_in_the_arena_before_stays_and_what_only_passed_leaves_again(settled: Make) -> None:
    made = settled(pages=64, disk=LARGE, redis=True)
    names = only_in(made, DISK, 9)
    made.rig.get(0)
    made.rig.get(1)
    made.move(names, REDIS, source=DISK)
    assert made.held(CPU) == made.named(0, 1)


def test_what_comes_from_redis_only_to_be_rewritten_there_is_not_written_to_the_disk(settled: Make) -> None:
    made = settled(pages=64, disk=LARGE, redis=True)
    names = only_in(made, REDIS, 9)
    operation = made.move(names, REDIS, source=REDIS, planes=lambda node: 2)
    assert (operation.objects, made.held(DISK), made.held(CPU)) == (9, set(), set())


@pytest.mark.parametrize("order", ["chain", "reverse", "mixed"])
@pytest.mark.parametrize("source", [CPU, DISK])
def test_a_source_is_left_children_before_parents_in_whatever_order_keys_come(
    settled: Make, order: str, source: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of whole namespaces come in their own order, which is that of no chain."""
    monkeypatch.setattr(moving, "_SLICE_OBJECTS", 5)
    made = settled(pages=64, disk=LARGE)
    made.rig.chain(*range(24))
    made.rig.settle()
    target = DISK if source is CPU else CPU
    names = {"chain": list(range(24)), "reverse": list(range(24))[::-1], "mixed": [n * 7 % 24 for n in range(24)]}
    operation = made.move(names[order], target, source=source, keep=False)
    assert (operation.objects, dict(operation.causes), made.held(source)) == (24, {}, set())


def test_parents_enter_the_disk_before_their_children_in_whatever_order_keys_come(settled: Make) -> None:
    made = settled(pages=64, disk=LARGE, redis=True)
    names = only_in(made, REDIS, 4)
    operation = made.move([2, 3, 1, 0], DISK, source=REDIS)
    assert (operation.objects, dict(operation.causes)) == (4, {})
    assert [made.rig.node(name).parent for name in names[1:]] == [made.rig.node(name) for name in names[:-1]]


@pytest.mark.parametrize("hold", ["lease", "pin", "name"])
@pytest.mark.parametrize("source", [CPU, DISK])
def test_what_is_held_at_its_source_stays_there_with_its_ancestors_and_is_counted(
    settled: Make, source: Tier, hold: str
) -> None:
    if (source, hold) == (DISK, "lease"):
        return  # a lease holds nothing there
    made = settled(pages=64, disk=LARGE)
    made.rig.chain(*range(8))
    made.rig.settle()
    key = made.rig.info(3).key
    if hold == "lease":
        made.rig.acquire(3)
    elif hold == "pin":
        made.cache.pins.pin([key], source)
    else:
        made.cache.retain([key])
        made.cache.index.retaining_tier = source
    operation = made.begin(range(8), DISK if source is CPU else CPU, source=source, keep=False)
    made.rig.settle()
    assert (operation.objects, dict(operation.causes)) == (8, {"stays": 4})
    assert made.held(source) == made.named(0, 1, 2, 3)
    made.rig.release()
    made.check(operation)
    made.cache.index.retaining_tier = DISK


def test_what_the_target_dropped_again_stays_at_its_source(settled: Make) -> None:
    """A disk smaller than what moves to it drops the first to write the last."""
    made = settled(pages=64, disk=6 * PAGE, redis=True)
    names = [f"single {n}" for n in range(20)]
    for name in names:
        made.rig.store(name)
    made.rig.settle()
    operation = made.move(names, DISK, source=CPU, keep=False)
    assert len(made.held(DISK)) == 6
    assert made.held(CPU) | made.held(DISK) == made.named(*names)
    assert operation.causes["stays"] + operation.causes["not_written"] == 14


def test_what_the_arena_could_not_keep_stays_on_disk(settled: Make) -> None:
    made = settled(pages=16, disk=LARGE)
    chain = [f"single {n}" for n in range(40)]
    for name in chain:
        assert made.rig.store(name) == ""
        made.rig.settle()
    operation = made.move(chain, CPU, source=DISK, keep=False)
    assert operation.objects == 40
    assert made.held(CPU) | made.held(DISK) == made.named(*chain)
    assert made.held(CPU) & made.held(DISK) == set()
    assert 0 < len(made.held(CPU)) <= 16
    kept = [name for name in chain if made.rig.node(name).held_in(CPU)]
    assert [made.rig.get(name) for name in kept] == [made.rig.payload(name) for name in kept]


def test_what_redis_dropped_meanwhile_stays_at_its_source(settled: Make) -> None:
    made = settled(pages=64, redis=True)
    made.rig.chain(*range(12))
    made.rig.settle()
    operation = made.begin(range(12), REDIS, source=CPU, keep=False)
    while operation.objects < 12:
        assert made.one_by_one()
    for name in (0, 1, 2):
        made.rig.redis.lose(made.rig.info(name).key)
    made.rig.settle()
    made.check(operation)
    assert (made.held(CPU), operation.causes["stays"]) == (made.named(0, 1, 2), 3)


def test_two_moves_of_the_same_objects_in_opposite_directions_lose_nothing(settled: Make) -> None:
    for steps in range(0, 60, 3):
        made = settled(pages=64, disk=LARGE, redis=True)
        made.rig.chain(*range(6))
        made.rig.settle()
        made.rig.evict(0)
        there = made.begin(range(6), REDIS, source=DISK, keep=False)
        for _ in range(steps):
            made.one_by_one()
        back = made.begin(range(6), DISK, source=REDIS, keep=False)
        made.rig.settle()
        made.check(there, back)
        assert made.held(DISK) | made.held(REDIS) == made.named(*range(6)), f"after {steps} steps"


def test_what_another_move_is_taking_out_of_a_tier_stays_at_its_source(settled: Make) -> None:
    """Both have looked at their targets by then, which are each other's sources."""
    made = settled(pages=64, disk=LARGE, redis=True)
    names = only_in(made, DISK, 3)
    others = set(made.keys(names))
    made.cache.leaving.update(others)
    operation = made.begin(names, REDIS, source=DISK, keep=False)
    made.rig.settle()
    assert made.held(DISK) == made.held(REDIS) == made.named(*names)
    assert operation.causes["stays"] == 3
    assert made.cache.leaving == others
    made.cache.leaving.clear()
    made.check(operation)


def test_a_write_that_is_queued_does_not_bring_back_what_was_moved_out_of_redis(settled: Make) -> None:
    made = settled(pages=64, redis=True)
    names = only_in(made, REDIS, 3)
    operation = made.begin(names, CPU, source=REDIS, keep=False)
    while len(made.held(CPU)) < 3:
        assert made.one_by_one()
    for name in names:
        made.cache.redis.enqueue(made.rig.node(name))
    made.rig.settle()
    made.check(operation)
    made.cache.redis.pump()
    made.rig.settle()
    assert (made.held(CPU), made.held(REDIS)) == (made.named(*names), set())


def test_what_is_only_passing_through_the_arena_does_not_count_as_moved_there(settled: Make) -> None:
    for steps in range(0, 60, 2):
        made = settled(pages=64, redis=True)
        made.rig.chain(*range(6))
        made.rig.settle()
        made.rig.evict(0)
        passing = made.begin(range(6), REDIS, source=REDIS, planes=lambda node: 2)
        for _ in range(steps):
            made.one_by_one()
        moving_up = made.begin(range(6), CPU, source=REDIS, keep=False)
        made.rig.settle()
        made.check(passing, moving_up)
        assert made.held(CPU) | made.held(REDIS) == made.named(*range(6)), f"after {steps} steps"


# -- in the middle of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_move_cancelled_after_any_step_holds_nothing_and_lost_nothing(
    operated: Make, source: Tier, target: Tier
) -> None:
    steps = 0
    while True:
        made = operated(pages=64, disk=LARGE, redis=True)
        names = only_in(made, source, 9)
        operation = made.begin(names, target, source=source, keep=False)
        for _ in range(steps):
            made.one_by_one()
        over = bool(operation.ended)
        made.operations.cancel(operation.id, "")
        made.rig.settle()
        made.check(operation)
        assert made.held(source) | made.held(target) >= made.named(*names), f"after {steps} steps"
        if over:
            assert operation.state == "done"
            return
        assert operation.state == "cancelled"
        steps += 1


@pytest.mark.parametrize("what", ["evict", "clear", "corrupt", "unpin", "disconnect"])
@pytest.mark.parametrize(("source", "target"), [(CPU, DISK), (DISK, CPU), (CPU, REDIS), (REDIS, DISK), (DISK, REDIS)])
def test_whatever_happens_between_two_steps_the_move_ends_and_the_books_are_right(
    operated: Make, source: Tier, target: Tier, what: str
) -> None:
    for steps in range(0, 40, 2):
        made = operated(pages=64, disk=LARGE, redis=True)
        names = only_in(made, source, 9)
        operation = made.begin(names, target, source=source, keep=False)
        for _ in range(steps):
            made.one_by_one()
        if what == "evict":
            made.rig.evict(4, tiers=[CPU, DISK])
        elif what == "clear":
            made.rig.remove(partial(made.cache.clear, [CPU, DISK, REDIS]))
        elif what == "corrupt":
            made.cache.report_bad(made.keys([2, 5]))
        elif what == "unpin":
            made.cache.pins.pin(made.keys([6]), source) if source is not REDIS else None
        else:
            made.rig.acquire(3, 4, owner=7)
            made.rig.answer()
            made.cache.leases.disconnect(7)
        made.rig.settle()
        made.check(operation)
        assert operation.state == "done"
        assert made.cache.disk.used == sum(info.size for info in made.rig.disk.held().values())


@pytest.mark.parametrize(
    ("tier", "what", "outcome", "causes"),
    [
        ("disk", "store", Outcome.FULL, {"not_written"}),
        ("disk", "store", Outcome.UNAVAILABLE, {"not_written"}),
        ("redis", "contains", Outcome.UNAVAILABLE, {"redis_unavailable"}),
        ("redis", "load", Outcome.UNAVAILABLE, {"redis_unavailable"}),
        ("redis", "load", Outcome.CORRUPT, {"redis_corrupt"}),
    ],
)
def test_a_tier_that_fails_is_a_counted_cause_and_the_move_ends(
    operated: Make, tier: str, what: str, outcome: Outcome, causes: set[str]
) -> None:
    made = operated(pages=64, disk=LARGE, redis=True)
    names = only_in(made, REDIS, 9)
    made.rig.backend(tier).fails[what] = outcome
    operation = made.move(names, DISK, source=REDIS, keep=False)
    assert (operation.state, operation.objects) == ("done", 0)
    assert (set(operation.causes), operation.causes.total()) == (causes, 9)
    assert (made.held(REDIS), made.held(CPU), made.held(DISK)) == (made.named(*names), set(), set())


def test_a_redis_that_does_not_delete_keeps_its_copy_and_it_is_counted(operated: Make) -> None:
    made = operated(pages=64, disk=LARGE, redis=True)
    names = only_in(made, REDIS, 3)
    made.rig.redis.fails["delete"] = Outcome.UNAVAILABLE
    operation = made.move(names, DISK, source=REDIS, keep=False)
    assert (operation.objects, dict(operation.causes)) == (3, {"stays": 3})
    assert made.held(REDIS) == made.held(DISK) == made.named(*names)
    assert "moved" not in {event.what for event in made.cache.events.after(made.cache.events._began, 1000)[0]}
