# SPDX-License-Identifier: Apache-2.0
"""What requests wait for, and ask for most, is raised first, from disk and from Redis; never at others' cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loracache.keys import checksum
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome
from loracache.tiers import Tier
from tests.unit.cache.test_returns import Announced
from tests.unit.cache.test_swapper import PAGE, in_cpu, keys, on_disk_only, swapped

Make = Callable[..., Any]


def in_redis_only(rig: Any, *names: str, pages: int = 1) -> None:
    """Adapters that another machine has put there."""
    for name in names:
        info = rig.info(name, size=PAGE * pages)
        put(rig, replace(info, kind=Kind.LORA, namespace=bytes(32)), rig.payload(name, info.size))


def put(rig: Any, info: ObjectInfo, payload: bytes) -> None:
    rig.redis._objects[info.key] = (replace(info, checksum=checksum([memoryview(payload)])), payload)


def adapters_on_disk_only(rig: Any, *names: str) -> None:
    for name in names:
        rig.chain(name)
        rig.node(name).kind = Kind.LORA
        rig.settle()
        rig.evict(name)


def test_adapters_that_are_wanted_come_before_those_that_were_used_last(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20)
    swap = swapped(rig, in_flight=PAGE)  # one after another
    adapters_on_disk_only(rig, *"abcd")
    swap.wanted = keys(rig, "nowhere", "b", "a")
    for _ in range(6):
        swap.step()
    assert [node.key for node in swap.begun] == keys(rig, *"badc")


def test_what_is_wanted_stays_below_the_mark_and_within_the_pace(rig_of: Make) -> None:
    rig = rig_of(pages=10, disk=1 << 20)
    swap = swapped(rig, mark=0.5, bandwidth=10 * PAGE)
    adapters_on_disk_only(rig, *"abcdefgh")
    swap.wanted = keys(rig, *"abcdefgh")
    rig.now += 1.0
    for tenth in range(1, 30):
        swap.step()
        assert len(swap.begun) <= tenth + 1
    assert in_cpu(rig, *"abcdefgh").count(True) == 5
    assert rig.count("evict.cpu.policy") == 0


def test_nothing_wanted_is_raised_while_somebody_waits_for_the_disk(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    swap = swapped(rig)
    adapters_on_disk_only(rig, "a")
    in_redis_only(rig, "r")
    swap.wanted, swap.quiet = keys(rig, "a", "r"), False
    swap.step()
    assert in_cpu(rig, "a", "r") == [False, False]


@pytest.mark.parametrize("disk", [1 << 20, None])
def test_a_wanted_adapter_that_redis_alone_has_is_raised(rig_of: Make, disk: int | None) -> None:
    rig = rig_of(disk=disk, redis=True)
    swap = swapped(rig)
    in_redis_only(rig, "r", "s")
    swap.wanted = keys(rig, "r", "s")
    for _ in range(4):
        swap.step()
    assert in_cpu(rig, "r", "s") == [True, True]
    assert (rig.count("prefetch.objects"), rig.count("prefetch.bytes")) == (2, 2 * PAGE)
    assert rig.count("load.redis.objects") == 2


def test_from_redis_nothing_is_raised_at_others_cost(rig_of: Make) -> None:
    rig = rig_of(pages=10, redis=True)
    swap = swapped(rig)
    for number in range(6):
        rig.chain(number)
    rig.settle()
    in_redis_only(rig, "large", pages=2)
    swap.wanted = keys(rig, "large")
    for _ in range(4):
        swap.step()
    assert in_cpu(rig, "large") == [False]
    assert in_cpu(rig, *range(6)) == [True] * 6
    assert rig.count("prefetch.failed") == 0


def test_what_redis_has_not_is_asked_for_once_in_a_while(rig_of: Make) -> None:
    rig = rig_of(redis=True)
    swap = swapped(rig)
    asked: list[bytes] = []
    contains = rig.redis.contains
    rig.redis.contains = lambda wanted: asked.extend(wanted) or contains(wanted)
    swap.wanted = keys(rig, "nowhere")
    for _ in range(50):
        swap.step()
    assert len(asked) == 1
    for _ in range(100):
        swap.step()
    assert len(asked) == 2
    assert rig.count("prefetch.failed") == 0


def test_a_redis_that_fails_is_left_alone_for_longer_each_time(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    swap = swapped(rig)
    in_redis_only(rig, "r")
    swap.wanted = keys(rig, "r")
    rig.redis.fails["load"] = Outcome.FAILED
    swap.step()
    assert swap.swapper.paused
    assert rig.count("prefetch.failed") == 1


def test_the_adapter_of_an_announced_chain_that_redis_alone_has_is_raised_with_it(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    told = Announced(rig)
    in_redis_only(rig, "lora")
    adapter = rig.info("lora").key
    rig.cache.index.adapters.add(adapter)
    for name, parent in (("a", adapter), ("b", rig.info("a").key)):
        put(rig, replace(rig.info(name), parent=parent), rig.payload(name))
    told.announce("a", "b", seconds=0.0)
    for _ in range(4):
        told.step()
    assert in_cpu(rig, "lora", "a", "b") == [True] * 3
    node = rig.node("lora")
    assert node.held_in(Tier.CPU)
    assert node.first_child is rig.node("a")


def test_chunks_still_come_where_nothing_is_wanted(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    swap = swapped(rig)
    on_disk_only(rig, *"ab")
    for _ in range(4):
        swap.step()
    assert in_cpu(rig, *"ab") == [True, True]
