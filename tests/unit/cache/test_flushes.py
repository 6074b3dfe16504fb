# SPDX-License-Identifier: Apache-2.0
"""What a flush may say: how many objects each lower tier keeps, and how many it gave up, since an earlier flush."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache.state.leases import Writing
from loracache.cache.state.slices import whole
from loracache.cache.tier import flushes as flushes_module
from loracache.cache.tier.flushes import Flushes
from loracache.results import Cause
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


def told(rig: Any, since: int = 1) -> dict[str, list[int]]:
    rig.settle()
    found: dict[str, list[int]] = rig.cache.flushes.since(since)
    return found


def test_what_is_written_is_durable_in_each_tier(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.chain(*"abc")
    assert told(rig) == {"disk": [3, 0], "redis": [3, 0]}


@pytest.mark.parametrize("outcome", [Outcome.FULL, Outcome.FAILED, Outcome.UNAVAILABLE, Outcome.CORRUPT])
def test_what_a_tier_does_not_take_is_given_up(rig_of: Make, outcome: Outcome) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    rig.backend("disk").fails["store"] = outcome
    rig.store("a")
    assert told(rig)["disk"] == [0, 1]
    assert told(rig)["redis"] == [1, 0]


def test_what_leaves_a_full_arena_before_it_is_written_is_given_up(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    for name in range(10):
        rig.store(name)
    assert told(rig) == {"disk": [4, 6]}


def test_what_made_room_on_disk_for_later_objects_is_given_up(rig_of: Make) -> None:
    """They were written, and are not there: only the last four fit."""
    rig = rig_of(disk=4 * PAGE)
    for name in range(10):
        rig.store(name)
        rig.settle()
    assert told(rig) == {"disk": [4, 6]}


def test_an_object_that_an_operator_takes_out_again_is_neither(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"abc")
    rig.settle()
    rig.evict("c", tiers=(Tier.CPU, Tier.DISK))
    assert told(rig) == {"disk": [2, 0]}


def test_an_object_without_its_parent_is_given_up(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.chain(*"ab")
    rig.backend("disk").fails["store"] = Outcome.FULL
    rig.step("disk-write")
    del rig.backend("disk").fails["store"]
    rig.store("c", "b")
    assert told(rig) == {"disk": [0, 3]}


def test_each_is_told_of_what_was_given_up_since_its_own_last_flush(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    first = second = rig.cache.flushes.interval
    for name in range(6):
        rig.store(name)
    assert told(rig, first) == {"disk": [4, 2]}
    first = rig.cache.flushes.end()
    rig.store("more")
    assert told(rig, first) == {"disk": [1, 0]}
    assert told(rig, second) == {"disk": [5, 2]}  # the other's flush hides nothing
    assert rig.cache.flushes.end() == rig.cache.flushes.end() == first + 1  # where nothing happened, none is kept


def test_what_an_earlier_run_left_is_nobodys_news(make_rig: Make) -> None:
    rig = make_rig(disk=2 * PAGE, scanned=False)
    rig.cache.disk.adopt([rig.info("old"), rig.info("older")])
    rig.cache.disk.adopted_all([])
    rig.store("new")
    assert told(rig) == {"disk": [1, 0]}
    assert rig.count("evict.disk.policy") == 1


def test_who_flushes_seldom_is_told_of_more_and_never_of_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushes_module, "_MOST_INTERVALS", 4)
    books = Flushes()
    books.open(Tier.DISK)
    early = books.interval
    for _ in range(20):
        books.left(Tier.DISK, books.wrote(Tier.DISK), asked=False)
        books.wrote(Tier.DISK)
        books.gave_up(Tier.DISK)
        books.end()
    assert books.since(early) == {"disk": [20, 40]}
    assert books.since(books.interval - 1) == {"disk": [1, 2]}
    assert len(books._counts) == 4
    books.left(Tier.DISK, early, asked=False)
    assert books.since(early) == {"disk": [19, 41]}


# -- a writer that waits -----------------------------------------------------------------------------------------------


def reserve(rig: Any, *names: object, lease: bytes = b"p") -> list[Writing | Cause]:
    infos = [rig.info(name) for name in names]
    found: list[Writing | Cause] = whole(rig.cache.reserve(1, lease, infos, 30.0, promised=True))
    assert len(found) <= len(infos)
    return found


def store(rig: Any, name: object) -> None:
    (item,) = reserve(rig, name)
    assert isinstance(item, Writing), item
    assert rig.commit(1, b"p", [(item.info.key, rig.write(item))]) == [Cause.NONE]


def test_a_promised_write_is_given_up_for_nobody(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    for name in range(4):
        store(rig, name)
    assert rig.store("other") == "full"
    assert reserve(rig, "mine too") == [Cause.FULL]
    assert rig.count("store.refused.full") == 1  # the other's: who waits is not refused yet
    assert told(rig) == {"disk": [4, 0]}
    assert rig.store("other") == ""  # and once they are written, they may leave as any other


def test_a_writer_that_waits_gives_up_nobody_elses_write(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    for name in range(4):
        rig.store(name)
    assert reserve(rig, "new") == [Cause.FULL]
    assert told(rig) == {"disk": [4, 0]}


def test_the_answers_end_before_the_first_object_without_room(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    answers = reserve(rig, *range(6))
    assert [isinstance(item, Writing) for item in answers] == [True] * 4 + [False]
    assert answers[-1] is Cause.FULL
    rig.cache.leases.release(1, b"p")


def test_what_exists_and_is_not_on_disk_is_offered_to_it_again(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    rig.backend("disk").fails["store"] = Outcome.FULL
    rig.chain(*"ab")
    assert told(rig) == {"disk": [0, 2]}
    del rig.backend("disk").fails["store"]
    since = rig.cache.flushes.end()
    assert reserve(rig, "b") == [Cause.EXISTS]
    assert reserve(rig, "b") == [Cause.EXISTS]
    rig.cache.pump()
    assert told(rig, since) == {"disk": [2, 0]}  # with the parent that it needs there


def test_a_queued_write_is_promised_to_who_asks_for_it_later(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20, scanned=False)  # so that nothing is written yet
    rig.chain(*"abcd")
    assert reserve(rig, "d") == [Cause.EXISTS]
    assert rig.store("other") == "full"
    rig.cache.disk.adopted_all([])
    assert told(rig) == {"disk": [4, 0]}
