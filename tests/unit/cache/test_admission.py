# SPDX-License-Identifier: Apache-2.0
"""Admission: what is written down the second time only, with its parents, and what is written down whatever it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loracache.cache.policy import ADMISSIONS
from loracache.cache.state.slices import whole
from loracache.cache.tier.io import TierIO
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

PAGE = 4096


@pytest.fixture
def rig(make_rig: Callable[..., Any]) -> Any:
    return make_rig(pages=8, disk=64 * PAGE, redis=True, admission="second_touch")


def on_disk(rig: Any, *names: object) -> list[bool]:
    return [rig.info(name).key in rig.disk.held() for name in names]


def store(rig: Any, name: object, *, kind: Kind = Kind.KV, promised: bool = False) -> None:
    info = replace(rig.info(name), kind=kind)
    (writing,) = whole(rig.cache.reserve(1, b"p", [info], 30.0, promised=promised))
    rig.commit(1, b"p", [(info.key, rig.write(writing))])


def test_a_load_without_reuse_writes_nothing(rig: Any) -> None:
    for name in range(40):
        rig.store(name)
    rig.settle()
    assert not rig.disk.held()
    assert not rig.redis.held()


@pytest.mark.parametrize("admission", sorted(set(ADMISSIONS) - {"all"}))
def test_and_has_no_thread_of_the_lower_tiers_do_anything(
    admission: str, make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(pages=8, disk=64 * PAGE, redis=True, admission=admission)
    work: list[str] = []
    monkeypatch.setattr(TierIO, "_run", lambda self, workers, what, *more: work.append(what))
    for name in range(0, 2000, 2):
        rig.cache.lookup([rig.info(name).key, rig.info(name + 1).key])
        rig.chain(name, name + 1)
        rig.cache.tick()
        rig.answer()
        assert rig.arena.free_bytes < 2 * PAGE or name < 10
    # Adaptive tries a few, until it has seen that none comes again.
    assert len(work) <= (0 if admission == "second_touch" else 0.05 * 2000)


def test_what_is_used_in_the_arena_is_written_with_its_parents_and_once(rig: Any) -> None:
    for name in range(3):
        rig.store(name, name - 1 if name else None)
    rig.acquire(1)
    rig.settle()
    assert on_disk(rig, 0, 1, 2) == [True, True, False]
    assert set(rig.redis.held()) == {rig.info(name).key for name in (0, 1)}
    rig.acquire(1)
    rig.settle()
    assert len(rig.redis.stored) == len(rig.disk.stored) == 2


def test_what_comes_again_after_it_left_is_written(rig: Any) -> None:
    rig.store(0)
    rig.evict(0, tiers=[Tier.CPU])
    rig.store(0)
    rig.settle()
    assert on_disk(rig, 0) == [True]


def test_all_is_the_default(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(disk=64 * PAGE)
    rig.store(0)
    rig.settle()
    assert on_disk(rig, 0) == [True]


def test_adapters_what_was_promised_and_what_has_a_name_are_written_at_once(rig: Any) -> None:
    store(rig, "adapter", kind=Kind.LORA)
    store(rig, 1, promised=True)
    rig.store(2)
    rig.cache.retain([rig.info(2).key])
    rig.settle()
    assert on_disk(rig, "adapter", 1, 2) == [True] * 3


def test_what_an_operation_moves_is_not_written_down_by_that(rig: Any) -> None:
    rig.store(0)
    rig.cache.leaving.add(rig.info(0).key)
    rig.acquire(0)
    rig.settle()
    assert on_disk(rig, 0) == [False]


def slow_tier(rig: Any, tier: str, *, computed: int, loaded: int) -> None:
    """A writer stored so many bytes a second, and the tier was read at that many."""
    rig.cache._benefit.stored(1, 10 * computed)
    rig.later(10)
    rig.cache.counters.add(f"load.{tier}.bytes", 300 << 20)
    rig.cache.counters.add(f"busy_us.{tier}.load", int(2 * (300 << 20) / loaded * 1e6))


def test_nothing_goes_to_a_tier_that_reads_slower_than_engines_compute(rig: Any) -> None:
    slow_tier(rig, "redis", computed=200_000_000, loaded=100_000_000)
    slow_tier(rig, "disk", computed=200_000_000, loaded=900_000_000)
    rig.store(0)
    rig.acquire(0)
    store(rig, "adapter", kind=Kind.LORA)
    rig.settle()
    assert on_disk(rig, 0, "adapter") == [True, True]
    assert set(rig.redis.held()) == {rig.info("adapter").key}  # which nobody computes
    assert rig.count("not_admitted.redis.below_benefit") == 1
    assert rig.count("not_admitted.disk.below_benefit") == 0


def test_what_is_promised_goes_there_all_the_same(rig: Any) -> None:
    slow_tier(rig, "redis", computed=200_000_000, loaded=100_000_000)
    store(rig, 0, promised=True)
    rig.settle()
    assert set(rig.redis.held()) == {rig.info(0).key}


def test_with_all_it_goes_there_too(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(redis=True)
    slow_tier(rig, "redis", computed=200_000_000, loaded=100_000_000)
    rig.store(0)
    rig.settle()
    assert set(rig.redis.held()) == {rig.info(0).key}


def test_first_touches_are_counted_by_tier(rig: Any) -> None:
    rig.store(0)
    rig.store(1)
    rig.acquire(1)
    assert rig.count("not_admitted.disk.first_touch") == rig.count("not_admitted.redis.first_touch") == 2
