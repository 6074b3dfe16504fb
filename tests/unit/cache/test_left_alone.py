# SPDX-License-Identifier: Apache-2.0
"""What another release or integrity_key left on disk: it counts, is not served, and goes when there is no room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache.eviction import Evicted
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


def start(make_rig: Make, *names: object, disk: int) -> Any:
    """A cache on a disk that holds one page of each name, of which it may not read any."""
    rig = make_rig(disk=disk, scanned=False)
    rig.cache.disk.adopted_all([], {rig.info(name).key: PAGE for name in names})
    return rig


def counted(rig: Any) -> tuple[int, int, int]:
    disk = rig.cache.disk
    return len(disk.left_alone), disk.left_alone_bytes, disk.used


def test_it_counts_to_the_budget_and_nothing_is_deleted(make_rig: Make) -> None:
    rig = start(make_rig, *"abc", disk=8 * PAGE)
    rig.store("new")
    rig.settle()
    assert counted(rig) == (3, 3 * PAGE, 4 * PAGE)
    assert rig.disk.deletions == []
    assert rig.get("a") == "absent"


def test_it_goes_before_anything_of_ours_when_room_is_needed_and_no_more_of_it_than_that(make_rig: Make) -> None:
    rig = start(make_rig, *"abc", disk=4 * PAGE)
    for name in range(3):
        rig.store(name)
        rig.settle()
    assert counted(rig) == (1, PAGE, 4 * PAGE)
    assert rig.count("evict.disk.left_alone") == 2
    assert rig.count("evict.disk.policy") == 0
    assert sum(map(len, rig.disk.deletions)) == 2


def test_a_smaller_disk_sheds_it_at_the_start(make_rig: Make) -> None:
    rig = start(make_rig, *"abc", disk=2 * PAGE)
    rig.settle()
    assert counted(rig) == (2, 2 * PAGE, 2 * PAGE)


def test_what_depends_on_it_is_left_with_it_and_other_orphans_go(make_rig: Make) -> None:
    rig = make_rig(disk=8 * PAGE, scanned=False)
    child, grandchild, orphan = rig.info("b", "a"), rig.info("c", "b"), rig.info("x", "nowhere")
    rig.cache.disk.adopted_all([grandchild, child, orphan], {rig.info("a").key: PAGE})
    rig.settle()
    assert counted(rig) == (3, 3 * PAGE, 3 * PAGE)
    assert rig.disk.deletions == [[orphan.key]]
    assert rig.count("disk.orphans") == 1


@pytest.mark.parametrize("outcome", [None, Outcome.FULL])
def test_an_object_that_is_computed_anew_takes_its_place(make_rig: Make, outcome: Outcome | None) -> None:
    rig = start(make_rig, *"ab", disk=8 * PAGE)
    if outcome is not None:
        rig.backend("disk").fails["store"] = outcome
    rig.store("a")
    rig.cache.disk.drop_left_alone()  # while it is being written: not its file
    rig.settle()
    left = 0 if outcome is None else 1
    assert counted(rig) == (left, left * PAGE, PAGE)
    assert rig.disk.deletions == [[rig.info("b").key]]


def test_what_a_load_finds_to_be_of_another_key_is_left_alone_too(make_rig: Make) -> None:
    rig = make_rig(disk=8 * PAGE)
    rig.chain(*"ab")
    rig.settle()
    rig.evict("b")
    rig.backend("disk").fails["load"] = Outcome.UNPROVEN
    assert rig.get("b") == "disk_unproven"
    assert counted(rig) == (1, PAGE, 2 * PAGE)
    assert rig.disk.deletions == []
    assert rig.cache.lookup([rig.info(name).key for name in "ab"]) == [Tier.CPU]


@pytest.mark.parametrize(("tier", "left"), [(Tier.DISK, 0), (Tier.CPU, 2)])
def test_clearing_the_disk_takes_it_along(make_rig: Make, tier: Tier, left: int) -> None:
    rig = start(make_rig, *"ab", disk=8 * PAGE)
    did = Evicted()
    list(rig.cache.clear([tier], did))
    rig.settle()
    assert (did.objects, did.nbytes) == (2 - left, (2 - left) * PAGE)
    assert counted(rig) == (left, left * PAGE, left * PAGE)


def test_it_is_said_once(make_rig: Make, caplog: pytest.LogCaptureFixture) -> None:
    rig = start(make_rig, *"ab", disk=8 * PAGE)
    rig.chain(*"xy")
    rig.settle()
    rig.evict("y")
    rig.backend("disk").fails["load"] = Outcome.UNPROVEN
    rig.get("y")
    assert [record.getMessage().count("left alone") for record in caplog.records] == [1]
