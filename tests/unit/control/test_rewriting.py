# SPDX-License-Identifier: Apache-2.0
"""Compressing and decompressing: the disk's books follow what objects take, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.control import incompressible
from loracache.control.incompressible import Incompressible
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
LARGE = 1 << 20
CPU, DISK, REDIS = Tier.CPU, Tier.DISK, Tier.REDIS
Make = Callable[..., Any]


def filled(operated: Make, compressing: Make, count: int, disk: int = LARGE) -> tuple[Any, Any]:
    made = operated(pages=64, disk=disk, redis=True)
    kept = compressing(made.rig.disk)
    for name in range(count):
        made.rig.store(name)
    made.rig.settle()
    return made, kept


def compress(made: Any, names: Any, begin: bool = False) -> Any:
    start = made.begin if begin else made.move
    return start(names, DISK, source=DISK, planes=lambda node: 2, wanted=lambda node: not node.stored)


def decompress(made: Any, names: Any) -> Any:
    return made.move(names, DISK, source=DISK, planes=lambda node: 0, wanted=lambda node: bool(node.stored))


def test_compressing_saves_what_it_says_and_decompressing_gives_it_back(operated: Make, compressing: Make) -> None:
    made, kept = filled(operated, compressing, 8)
    operation = compress(made, [*range(8), "nobody"])
    assert (operation.objects, operation.saved, dict(operation.causes)) == (8, 8 * PAGE * 3 // 4, {"absent": 1})
    assert made.cache.disk.used == kept.used() == 8 * PAGE // 4
    assert {made.rig.node(name).stored for name in range(8)} == {PAGE // 4}
    again = compress(made, range(8))
    assert (again.objects, dict(again.causes)) == (0, {"already": 8})
    back = decompress(made, range(8))
    assert (back.objects, back.saved) == (8, 0)
    assert made.cache.disk.used == kept.used() == 8 * PAGE
    assert dict(decompress(made, range(8)).causes) == {"already": 8}
    assert {planes for _, planes in kept.asked} == {0, 2}


@pytest.mark.parametrize("tier", [DISK, REDIS])
def test_what_does_not_shrink_is_said_and_not_tried_again(operated: Make, compressing: Make, tier: Tier) -> None:
    made = operated(pages=64, disk=LARGE, redis=True)
    kept = compressing(made.rig.backend(tier.label))
    for name in range(4):
        made.rig.store(name)
    made.rig.settle()
    kept.noise.update(made.keys([1, 3]))
    hopeless = Incompressible()

    def again() -> Any:
        kept.asked.clear()
        options = {"planes": lambda node: 2, "wanted": lambda node: tier is REDIS or not node.stored}
        return made.move(range(4), tier, source=tier, hopeless=hopeless, **options)

    first = again()
    assert (first.objects, first.nbytes, first.saved) == (2, 2 * PAGE, 2 * PAGE * 3 // 4)
    assert dict(first.causes) == {"incompressible": 2}
    second = again()
    assert second.causes["incompressible"] == 2
    assert not kept.noise & {key for key, _ in kept.asked}


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incompressible, "_MOST", 10)
    known = Incompressible()
    keys = [bytes([number]) * 32 for number in range(25)]
    known.update(keys)
    assert len(known) == 10
    assert [key in known for key in keys] == [False] * 15 + [True] * 10


def test_redis_keeps_what_it_has_and_nothing_else(operated: Make, compressing: Make) -> None:
    made = operated(pages=64, redis=True)
    kept = compressing(made.rig.redis)
    for name in range(4):
        made.rig.store(name)
    made.rig.settle()
    made.rig.redis.lose(made.rig.info(3).key)
    operation = made.move(range(4), REDIS, source=REDIS, planes=lambda node: 4)
    assert (operation.objects, operation.saved, dict(operation.causes)) == (3, 3 * PAGE * 3 // 4, {"absent": 1})
    assert [planes for _, planes in kept.asked[-3:]] == [4, 4, 4]
    assert made.held(REDIS) == made.named(0, 1, 2)


def test_where_there_is_no_room_for_both_an_object_stays_as_it_is(operated: Make, compressing: Make) -> None:
    made, kept = filled(operated, compressing, 4, disk=4 * PAGE)
    made.cache.pins.pin(made.keys(range(4)), DISK)
    operation = compress(made, range(4))
    assert (operation.objects, dict(operation.causes)) == (0, {"full": 4})
    assert made.cache.disk.used == kept.used() == 4 * PAGE
    assert made.held(DISK) == made.named(*range(4))


def test_room_for_both_is_made_by_what_is_not_being_rewritten(operated: Make, compressing: Make) -> None:
    made, kept = filled(operated, compressing, 4, disk=4 * PAGE)
    operation = compress(made, [0])
    assert operation.objects == 1
    assert made.held(DISK) == made.named(0, 2, 3)  # the oldest of the others went
    assert made.cache.disk.used == kept.used() == 2 * PAGE + PAGE // 4


def test_a_failed_rewrite_leaves_the_object_and_the_books_as_they_were(operated: Make, compressing: Make) -> None:
    made, _ = filled(operated, compressing, 4)
    made.rig.disk.fails["store"] = Outcome.FULL
    operation = compress(made, range(4))
    assert (operation.objects, dict(operation.causes), made.cache.disk.used) == (0, {"full": 4}, 4 * PAGE)
    assert {made.rig.node(name).stored for name in range(4)} == {0}


def test_an_object_evicted_while_it_is_rewritten_is_gone_and_not_counted(operated: Make, compressing: Make) -> None:
    for steps in range(12):
        made, kept = filled(operated, compressing, 4)
        operation = compress(made, range(4), begin=True)
        for _ in range(steps):
            made.one_by_one()
        made.rig.evict(2, tiers=[DISK])
        made.rig.settle()
        made.check(operation)
        assert made.held(DISK) == made.named(0, 1, 3) == set(made.rig.disk.held())
        assert made.cache.disk.used == kept.used() == 3 * PAGE // 4
        assert operation.objects + operation.causes.total() == 4


def test_evicting_compressed_objects_frees_as_much_as_is_needed(operated: Make, compressing: Make) -> None:
    """A victim counts for what it takes there, not for what it takes in the arena."""
    made, kept = filled(operated, compressing, 6, disk=8 * PAGE)
    compress(made, range(6))
    for name in range(10, 24):
        made.rig.store(name)
        made.rig.settle()
        assert made.cache.disk.used <= 8 * PAGE
        assert made.cache.disk.used == kept.used()


def test_objects_found_compressed_at_start_count_for_what_they_take(make_rig: Make) -> None:
    from dataclasses import replace

    rig = make_rig(disk=LARGE, scanned=False)
    assert rig.cache.disk.adopt([replace(rig.info("a"), stored=100)]) == []
    assert (rig.cache.disk.used, rig.node("a").stored) == (100, 100)
    rig.cache.disk.adopted_all([])
    rig.evict("a", tiers=[DISK])
    assert rig.cache.disk.used == 0
