# SPDX-License-Identifier: Apache-2.0
"""Announced chains: in memory in time, parents and adapter first, held loosely, at the swapper's pace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loracache.cache.state.leases import Grip
from loracache.cache.swap.returns import Returns
from loracache.cache.swap.swapper import Swapper, SwapSettings
from loracache.results import Cause
from loracache.storage_backends.base import Kind, Outcome
from loracache.tiers import Tier
from tests.unit.cache.test_swapper import in_cpu, keys, on_disk_only

Make = Callable[..., Any]
NAME = b"n" * 16
PAGE = 4096
QUICK = SwapSettings(bandwidth=1 << 30, in_flight=1 << 20)


class Announced:
    """A rig and the returns of its cache; raised: keys in the order they were asked for."""

    def __init__(self, rig: Any, given: SwapSettings = QUICK) -> None:
        self.rig = rig
        self.raised: list[bytes] = []
        cache = rig.cache
        self.swapper = Swapper(
            cache.index,
            rig.arena,
            cache.counters,
            given,
            load=cache.ahead.load,
            evict=cache.ahead.evict,
            quiet=lambda: True,
            clock=lambda: rig.now,
        )
        self.returns = Returns(cache.index, cache.counters, self.swapper, self._raise, lambda: rig.now)

    def _raise(self, name: bytes, key: bytes, ttl: float, done: Callable[[Cause], None]) -> None:
        self.raised.append(key)
        self.rig.cache.acquire(-1, name, [key], ttl, lambda acquired: done(acquired[0].cause), Grip.LOOSE)

    def step(self, seconds: float = 0.1) -> None:
        self.rig.now += seconds
        self.rig.cache.tick()
        self.returns.step()
        self.rig.settle()

    def announce(self, *names: object, seconds: float = 10.0, hold: float = 5.0) -> bool:
        return self.returns.announce(NAME, keys(self.rig, *names), seconds, hold)


def test_a_chain_is_in_memory_when_it_is_due_and_not_long_before(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    told = Announced(rig)
    on_disk_only(rig, *"abc")
    told.announce(*"abc", seconds=10.0)
    told.step(8.0)
    assert told.raised == []
    told.step(1.5)
    assert in_cpu(rig, *"abc") == [True] * 3
    assert told.raised == keys(rig, *"abc")
    assert rig.count("prefetch.objects") == 3
    assert len(told.returns) == 0


def test_it_is_held_for_a_while_and_then_goes_like_any_other(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    told = Announced(rig)
    on_disk_only(rig, "a")
    told.announce("a", seconds=0.0, hold=5.0)
    told.step()
    assert rig.evict("a") == (0, 0, 1)
    told.step(5.0)
    assert rig.evict("a")[0] == 1


def test_what_never_left_is_only_held(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    told = Announced(rig)
    rig.chain(*"ab")
    rig.settle()
    told.announce(*"ab", seconds=0.0)
    told.step()
    assert rig.count("prefetch.objects") == 0
    assert rig.evict("a") == (0, 0, 2)


def test_the_adapter_comes_before_its_kv(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    told = Announced(rig)
    on_disk_only(rig, "lora", "a", "b")
    rig.node("lora").kind = Kind.LORA
    told.announce("a", "b", seconds=0.0)
    told.step()
    assert told.raised == keys(rig, "lora", "a", "b")
    assert in_cpu(rig, "lora", "a", "b") == [True] * 3


def test_it_gives_way_to_what_is_read_now(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    told = Announced(rig)
    on_disk_only(rig, *"ab")
    told.announce(*"ab", seconds=0.0, hold=60.0)
    told.step()
    for name in "cdef":
        assert rig.store(name) == ""


def test_what_redis_alone_has_is_raised_too(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20, redis=True)
    told = Announced(rig)
    rig.chain(*"ab")
    rig.settle()
    rig.evict("a", tiers=[Tier.CPU, Tier.DISK])
    rig.settle()
    told.announce(*"ab", seconds=0.0)
    told.step()
    assert in_cpu(rig, *"ab") == [True, True]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_chain_ends_with_the_first_object_that_does_not_come(rig_of: Make, damaged: bool) -> None:
    rig = rig_of(disk=1 << 20)
    told = Announced(rig)
    on_disk_only(rig, *"abc")
    if damaged:
        rig.disk.flip(rig.info("a").key)
    else:
        rig.disk.fails["load"] = Outcome.FAILED
    told.announce(*"abc", seconds=0.0)
    told.step()
    assert told.raised == keys(rig, "a")
    assert rig.count("prefetch.failed") == 1
    assert (len(told.returns), told.swapper.pace.in_flight) == (0, 0)
    rig.disk.fails.clear()
    told.announce(*"bc", seconds=0.0)
    told.step()
    assert told.raised == keys(rig, "a"), "the tier is left alone for a while"
    told.step(1.1)
    told.step()
    assert in_cpu(rig, *"bc") == [False, False], "nothing before its parent"


def test_parts_under_one_name_are_one_chain(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    told = Announced(rig)
    on_disk_only(rig, *"abcd")
    told.announce(*"ab", seconds=1.0)
    told.announce(*"cd", seconds=1.0)
    assert len(told.returns) == 1
    told.step(1.0)
    assert told.raised == keys(rig, *"abcd")


def test_the_pace_is_kept(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=1 << 20)
    told = Announced(rig, replace(QUICK, bandwidth=20 * PAGE))
    on_disk_only(rig, *range(20))
    told.announce(*range(20), seconds=1.0)
    told.step(0.1)
    for tenth in range(1, 9):
        assert len(told.raised) <= 2 * tenth + 2
        told.step()
    for _ in range(4):
        told.step()
    assert in_cpu(rig, *range(20)) == [True] * 20


def test_too_much_announced_is_refused_and_counted(rig_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from loracache.cache.swap import returns

    monkeypatch.setattr(returns, "_MOST_KEYS", 3)
    rig = rig_of(disk=1 << 20)
    told = Announced(rig)
    assert told.announce(*"abc")
    assert not told.announce("d")
    assert rig.count("return.refused") == 1
    told.step(20.0)
    assert told.announce(*"abc"), "what is over is waited for no more"
