# SPDX-License-Identifier: Apache-2.0
"""What a lookup found is held loosely: it gives way to what is read now, where it can be had again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loracache.cache.state.leases import Grip
from loracache.tiers import Tier

Make = Callable[..., Any]


def keys(rig: Any, names: str) -> list[bytes]:
    return [rig.info(name).key for name in names]


def look(rig: Any, names: str, lease: bytes, owner: int = 1) -> None:
    """What an engine's scheduler does when a request arrives."""
    assert len(rig.cache.lookup(keys(rig, names))) == len(names)
    rig.cache.hold(owner, lease, keys(rig, names), 30.0)


def full_of_promises(rig: Any) -> None:
    """Four pages: "wxyz" of two requests that wait, and on disk "ab" of one whose turn it is."""
    rig.chain(*"ab")
    rig.settle()
    rig.evict("a")
    rig.chain(*"wx")
    rig.chain(*"yz")
    rig.settle()
    look(rig, "wx", b"older")
    look(rig, "yz", b"younger")


def test_requests_that_wait_do_not_keep_out_what_one_that_runs_loads(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    full_of_promises(rig)
    answers = rig.acquire("a", "b", owner=2)
    rig.settle()
    assert [item.cause for item in answers] == ["", ""]
    # The youngest lease is needed last; what it was promised is to be had still.
    assert [rig.cache.lookup(keys(rig, names)) for names in ("wx", "yz")] == [[Tier.CPU] * 2, [Tier.DISK] * 2]
    assert rig.count("lease.gave_way") == 2
    assert rig.release(owner=2)


def test_the_end_of_a_chain_gives_way_before_its_beginning(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    full_of_promises(rig)
    rig.acquire("a", owner=2)
    rig.settle()
    assert rig.cache.lookup(keys(rig, "yz")) == [Tier.CPU, Tier.DISK]
    assert rig.release(owner=2)


def test_a_lease_whose_objects_gave_way_is_not_lost(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    full_of_promises(rig)
    rig.acquire("a", "b", owner=2)
    rig.settle()
    assert rig.release(lease=b"younger")
    assert rig.release(lease=b"older")
    assert rig.release(owner=2)
    assert rig.cache.leases.held_objects == 0


def test_what_somebody_reads_never_gives_way(rig_of: Make) -> None:
    """Nor where the same lease held it loosely before."""
    rig = rig_of(pages=4, disk=1 << 20)
    full_of_promises(rig)
    held = rig.acquire(*"yz", lease=b"younger")
    rig.acquire(*"wx", lease=b"reads", owner=3)
    answers = rig.acquire("a", owner=2)
    rig.settle()
    assert answers[0].cause == "memory_full"
    assert [rig.read(item) for item in held] == [rig.payload("y"), rig.payload("z")]
    for lease, owner in ((b"younger", 1), (b"reads", 3), (b"r", 2)):
        assert rig.release(lease=lease, owner=owner)


def test_what_is_prefetched_gives_way_too(rig_of: Make) -> None:
    rig = rig_of(pages=2, disk=1 << 20)
    rig.chain(*"ab")
    rig.settle()
    rig.evict("a")
    rig.chain(*"yz")
    rig.settle()
    rig.evict("y")
    rig.cache.acquire(1, b"prefetch", keys(rig, "yz"), 30.0, lambda acquired: None, Grip.LOOSE)
    rig.settle()
    assert rig.cache.lookup(keys(rig, "yz")) == [Tier.CPU] * 2
    answers = rig.acquire("a", "b", owner=2)
    rig.settle()
    assert [item.cause for item in answers] == ["", ""]
    assert rig.release(owner=2)


def test_what_no_other_tier_has_does_not_give_way(rig_of: Make) -> None:
    """It would be lost: a store is refused instead."""
    rig = rig_of(pages=2)
    rig.chain(*"yz")
    look(rig, "yz", b"waits")
    assert rig.store("a") == "full"
    assert rig.cache.lookup(keys(rig, "yz")) == [Tier.CPU] * 2
    assert rig.release(lease=b"waits")


def test_what_is_not_written_yet_does_not_give_way(rig_of: Make) -> None:
    rig = rig_of(pages=2, disk=1 << 20)
    rig.chain(*"yz")
    look(rig, "yz", b"waits")
    assert rig.store("a") == "full"
    rig.settle()
    assert rig.store("a") == ""
    assert rig.release(lease=b"waits")


def test_a_load_that_finds_no_room_asks_for_it_once(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    rig.chain(*"abcd")
    rig.settle()
    rig.evict("a")
    rig.chain(*"wxyz")
    rig.settle()
    rig.acquire(*"wxyz", owner=3)
    asked = []
    make_room = rig.cache._promoter._make_room
    rig.cache._promoter._make_room = lambda *room: asked.append(room) or make_room(*room)
    answers = rig.acquire(*"abcd", owner=2)
    rig.settle()
    assert [item.cause for item in answers] == ["memory_full"] * 4
    assert len(asked) == 1
    assert rig.release(owner=2)
    assert rig.release(owner=3)
