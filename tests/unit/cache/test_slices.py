# SPDX-License-Identifier: Apache-2.0
"""Work on very many objects lets others in, leaves nothing undone, and gives memory back."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache.cache.state.leases import Writing
from loracache.cache.state.slices import Slices, advance, whole
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


def fill(rig: Any, count: int) -> None:
    for number in range(count):
        assert rig.store(number) == ""


def test_slices_take_turns_and_the_first_is_done_at_once() -> None:
    posted: deque[Callable[[], None]] = deque()
    done: list[str] = []

    def work(name: str, parts: int) -> Iterator[None]:
        for part in range(parts):
            done.append(f"{name}{part}")
            yield

    slices = Slices(posted.append)
    slices.run(work("a", 3))
    slices.run(work("b", 2))
    slices.run(iter(()))
    assert done == ["a0", "b0"]
    while posted:
        posted.popleft()()
    assert sorted(done) == ["a0", "a1", "a2", "b0", "b1"]


def test_work_that_raises_does_not_end_the_others() -> None:
    posted: deque[Callable[[], None]] = deque()
    done: list[int] = []

    def fails() -> Iterator[None]:
        yield
        raise ZeroDivisionError

    def works() -> Iterator[None]:
        yield
        done.append(1)

    slices = Slices(posted.append)
    slices.run(fails())
    slices.run(works())
    with pytest.raises(ZeroDivisionError):
        posted.popleft()()
    while posted:
        posted.popleft()()
    assert done == [1]


def test_advance_does_one_slice_at_least_and_no_more_after_its_deadline() -> None:
    work = iter([None, None])
    assert advance(work, 0.0)
    assert advance(work, 0.0)
    assert not advance(work, 0.0)


def test_a_store_that_takes_the_place_of_very_many_lets_others_in(rig_of: Make) -> None:
    rig = rig_of(pages=1000)
    fill(rig, 1000)
    reserving = rig.cache.reserve(1, b"big", [rig.info("big", size=900 * PAGE)], 30.0)
    turns = 0
    for _ in reserving:
        turns += 1
        if turns == 3:  # somebody else, who takes some of what was freed for it, and uses one of those that shall go
            assert rig.store("other", owner=2) == ""
            rig.acquire(10, 500)
    assert turns > 20
    assert rig.node("other") is not None
    assert all(rig.node(name).held_in(Tier.CPU) for name in (10, 500))
    assert isinstance(whole(rig.cache.reserve(2, b"big", [rig.info("big", size=PAGE)], 30.0))[0], str)  # BUSY
    assert rig.cache.audit() == []


def test_a_reservation_that_was_given_up_on_the_way_leaves_what_it_had_under_its_lease(rig_of: Make) -> None:
    rig = rig_of(pages=1000)
    reserving = rig.cache.reserve(1, b"w", [rig.info(number) for number in range(600)], 30.0)
    next(reserving)
    next(reserving)
    reserving.close()
    assert rig.arena.free_bytes < 1000 * PAGE
    assert rig.cache.audit() == []
    assert rig.cache.leases.release(1, b"w")
    assert rig.arena.free_bytes == 1000 * PAGE


def test_two_who_reserve_the_same_at_once_do_not_both_get_it(rig_of: Make) -> None:
    rig = rig_of(pages=1000)
    fill(rig, 1000)
    one, two = (rig.cache.reserve(owner, b"w", [rig.info("same", size=200 * PAGE)], 30.0) for owner in (1, 2))
    next(one)
    next(two)
    answers = [whole(one)[0], whole(two)[0]]
    assert isinstance(answers[0], Writing)
    assert answers[1] == "busy"
    assert rig.cache.audit() == []


def test_a_commit_of_very_many_lets_others_in_and_they_see_what_is_there_by_then(rig_of: Make) -> None:
    rig = rig_of(pages=1000)
    infos = [rig.info(number) for number in range(700)]
    assert len(whole(rig.cache.reserve(1, b"w", infos, 30.0))) == 700
    committing = rig.cache.commit(1, b"w", [(info.key, 0) for info in infos])
    next(committing)
    assert len(rig.cache.lookup([info.key for info in infos])) == 256
    assert whole(committing) == [""] * 700


def test_a_lease_of_very_many_that_ends_lets_go_of_all_of_them_in_the_end(rig_of: Make) -> None:
    rig = rig_of(pages=3000)
    fill(rig, 3000)
    rig.acquire(*range(3000))
    assert rig.release()
    held = [node for node in rig.cache.index if node.leases]
    assert 0 < len(held) < 1000  # the rest of it is another turn's
    rig.answer()
    assert not [node for node in rig.cache.index if node.leases]


def test_writes_are_given_up_until_there_is_room_and_no_further(rig_of: Make) -> None:
    rig = rig_of(pages=400, disk=1 << 30)
    fill(rig, 400)  # and nothing is written
    assert rig.store("big", size=200 * PAGE) == ""
    given_up = rig.count("write.disk.dropped.memory_full")
    assert given_up == 200
    assert rig.count("evict.cpu.memory_full") == given_up


def test_room_on_disk_for_one_large_object_is_made_in_slices(rig_of: Make) -> None:
    rig = rig_of(pages=1000, disk=1000 * 2 * PAGE)
    fill(rig, 1000)
    rig.settle()
    before = rig.cache.index.objects[Tier.DISK]
    assert rig.store("big", size=400 * PAGE) == ""
    assert before - rig.cache.index.objects[Tier.DISK] < 100  # a slice of it, or of the choice
    rig.settle()
    assert rig.node("big").held_in(Tier.DISK)
    assert rig.cache.disk.used <= rig.cache.disk.limit


def test_memory_of_what_is_gone_is_given_back(rig_of: Make) -> None:
    rig = rig_of(pages=12_000)
    fill(rig, 12_000)
    rig.cache.tick()
    full = sys.getsizeof(rig.cache.index._nodes)
    rig.remove(lambda did: rig.cache.clear([Tier.CPU], did))
    rig.answer()
    rig.cache.tick()
    assert sys.getsizeof(rig.cache.index._nodes) < full / 100
    assert len(rig.cache._policies[Tier.CPU]) == 0
