# SPDX-License-Identifier: Apache-2.0
"""The swapper: what is raised ahead of need and in which order, what it never does for that, and what it counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loracache.cache.state.index import Node
from loracache.cache.state.leases import Grip
from loracache.cache.swap.candidates import Candidates, is_root
from loracache.cache.swap.swapper import Swapper, SwapSettings
from loracache.results import Cause
from loracache.storage_backends.base import Kind, Outcome
from loracache.tiers import Tier

PAGE = 4096
ON = SwapSettings(on=True, mark=0.7, free=0.0, bandwidth=1 << 30, in_flight=1 << 20)
Make = Callable[..., Any]


class Swapped:
    """A rig, and a swapper of its cache under the rig's clock. begun: what it asked for, in order."""

    def __init__(self, rig: Any, given: SwapSettings = ON) -> None:
        self.rig = rig
        self.begun: list[Node] = []
        self.quiet = True
        self.wanted: list[bytes] = []
        cache = rig.cache

        def load(node: Node, done: Callable[[Cause], None]) -> None:
            self.begun.append(node)
            cache.ahead.load(node, done)

        self.swapper = Swapper(
            cache.index,
            rig.arena,
            cache.counters,
            given,
            load=load,
            evict=cache.ahead.evict,
            quiet=lambda: self.quiet,
            wanted=lambda: self.wanted,
            seek=cache.ahead.seek,
            clock=lambda: rig.now,
        )

    def step(self, seconds: float = 0.1) -> None:
        self.rig.now += seconds
        self.swapper.step()
        self.rig.settle()


def swapped(rig: Any, **changes: Any) -> Swapped:
    return Swapped(rig, replace(ON, **changes))


def on_disk_only(rig: Any, *names: object) -> None:
    rig.chain(*names)
    rig.settle()
    rig.evict(names[0])


def in_cpu(rig: Any, *names: object) -> list[bool]:
    nodes = [rig.node(name) for name in names]
    return [node is not None and node.held_in(Tier.CPU) for node in nodes]


def keys(rig: Any, *names: object) -> list[bytes]:
    return [rig.info(name).key for name in names]


def test_what_left_memory_comes_back_when_there_is_room_parents_first(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20)
    swap = Swapped(rig)
    on_disk_only(rig, *"abcd")
    assert in_cpu(rig, *"abcd") == [False] * 4
    for _ in range(5):
        swap.step()
    assert in_cpu(rig, *"abcd") == [True] * 4
    assert [node.key for node in swap.begun] == keys(rig, *"abcd")
    assert rig.count("prefetch.objects") == 4
    assert rig.count("prefetch.bytes") == 4 * PAGE


def test_off_it_raises_nothing_and_evicts_nothing(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    swap = swapped(rig, on=False, free=0.5)
    on_disk_only(rig, *"ab")
    rig.chain(*"cdef")
    rig.settle()
    swap.step()
    assert swap.begun == []
    assert in_cpu(rig, *"cdef") == [True] * 4


def test_it_stops_at_the_mark(rig_of: Make) -> None:
    rig = rig_of(pages=10, disk=1 << 20)
    swap = swapped(rig, mark=0.7)
    on_disk_only(rig, *range(9))
    for _ in range(12):
        swap.step()
    assert rig.arena.free_bytes == 3 * PAGE
    assert in_cpu(rig, *range(9)).count(True) == 7
    assert rig.count("evict.cpu.policy") == 0


def test_adapters_come_first_then_what_was_asked_for_most(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20)
    swap = swapped(rig, in_flight=PAGE)  # one after another
    for name in ("cold", "hot"):
        rig.chain(name)
    for _ in range(9):
        rig.cache.lookup(keys(rig, "hot"))
    rig.chain("lora")
    rig.node("lora").kind = Kind.LORA
    rig.settle()
    for name in ("lora", "hot", "cold"):
        rig.evict(name)
    for _ in range(4):
        swap.step()
    assert [node.key for node in swap.begun] == keys(rig, "lora", "hot", "cold")


def test_what_an_earlier_run_left_is_raised(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20, scanned=False)
    swap = Swapped(rig)
    first = rig.info("a")
    for info in (first, rig.info("b", "a")):
        rig.disk._objects[info.key] = (replace(info, checksum=0), rig.payload("a"))
    assert rig.cache.disk.adopt([first, rig.info("b", "a")]) == []
    rig.cache.disk.adopted_all([])
    swap.step()
    assert [node.key for node in swap.begun][:1] == [first.key]


def test_nothing_is_raised_while_somebody_waits(rig_of: Make) -> None:
    rig = rig_of(disk=1 << 20)
    swap = Swapped(rig)
    on_disk_only(rig, "a")
    swap.quiet = False
    swap.step()
    assert swap.begun == []
    swap.quiet = True
    swap.step()
    assert len(swap.begun) == 1


def test_bytes_in_flight_and_a_second_are_bounded(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=1 << 20)
    swap = swapped(rig, in_flight=3 * PAGE, bandwidth=20 * PAGE, mark=1.0)
    for name in range(30):
        rig.chain(name)
    rig.settle()
    rig.evict(*range(30))
    rig.now += 1.0
    swap.swapper.step()
    assert len(swap.begun) == 2, "a tenth of a second's worth"
    assert swap.swapper.pace.in_flight == 2 * PAGE
    rig.settle()
    for tenth in range(1, 11):
        swap.step(0.1)
        assert len(swap.begun) <= 2 + 2 * tenth + 1
    assert len(swap.begun) >= 20


def test_prefetched_and_used_is_told_from_prefetched_in_vain(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20)
    swap = Swapped(rig)
    for name in "abc":
        on_disk_only(rig, name)
    swap.step()
    swap.step()
    assert rig.count("prefetch.objects") == 3
    rig.cache.lookup(keys(rig, "a"))
    swap.step()
    assert (rig.count("prefetch.used"), rig.count("prefetch.wasted")) == (1, 0)
    swap.quiet = False
    rig.cache.lookup(keys(rig, "b"))
    rig.evict("b", "c")
    assert (rig.count("prefetch.used"), rig.count("prefetch.wasted")) == (2, 1)
    assert swap.swapper.describe()["unused_objects"] == 0


def test_room_is_kept_free_before_anybody_asks(rig_of: Make) -> None:
    rig = rig_of(pages=10, disk=1 << 20)
    swap = swapped(rig, free=0.3)
    for name in range(10):
        rig.chain(name)
    rig.settle()
    assert rig.arena.free_bytes == 0
    swap.step()
    assert rig.arena.free_bytes == 3 * PAGE
    assert in_cpu(rig, *range(10)) == [False] * 3 + [True] * 7, "the policy says who goes"
    assert rig.count("evict.cpu.ahead") == 3
    assert swap.begun == [], "what just left does not come back above the mark"


@pytest.mark.parametrize("grip", list(Grip))
def test_what_is_held_does_not_go_for_what_may_come(rig_of: Make, grip: Grip) -> None:
    rig = rig_of(pages=4, disk=1 << 20)
    swap = swapped(rig, free=0.5)
    for name in range(4):
        rig.chain(name)
    rig.settle()
    rig.cache.leases.hold(1, b"r", 60.0, [rig.node(name) for name in (0, 1)], grip)
    rig.cache.pins.pin(keys(rig, 2), Tier.CPU)
    swap.step()
    assert in_cpu(rig, *range(4)) == [True, True, True, False]


def test_a_disk_that_fails_is_counted_and_left_alone_for_longer_each_time(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20)
    swap = swapped(rig, in_flight=PAGE)
    for name in range(6):
        rig.chain(name)
    rig.settle()
    rig.evict(*range(6))
    rig.disk.fails["load"] = Outcome.FAILED
    swap.step()
    assert rig.count("prefetch.failed") == 1
    assert swap.swapper.paused
    swap.step(0.9)
    assert len(swap.begun) == 1
    swap.step(0.2)
    assert len(swap.begun) == 2
    swap.step(1.5)
    assert len(swap.begun) == 2, "two seconds this time"
    del rig.disk.fails["load"]
    swap.step(0.6)
    swap.step(0.1)
    assert rig.count("prefetch.objects") > 0
    assert not swap.swapper.paused
    assert rig.arena.free_bytes + sum(in_cpu(rig, *range(6))) * PAGE == rig.arena.size
    assert rig.cache.audit() == []


def test_a_child_whose_parent_is_gone_is_none_until_the_parent_is_back(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20)
    candidates = Candidates()
    told = rig.cache.index.on_change

    def changed(node: Node, tier: Tier, entered: bool, cause: str) -> None:
        told(node, tier, entered, cause)
        candidates.changed(node, tier, entered)

    rig.cache.index.on_change = changed
    rig.chain(*"abc")
    rig.settle()
    assert candidates.best() is None
    rig.evict("c")
    assert candidates.best() is rig.node("c")
    rig.evict("a")
    assert candidates.best() is rig.node("a")
    rig.get("a")
    assert candidates.best() is rig.node("b")
    assert not is_root(rig.node("c"))


def test_a_parent_stays_until_its_child_has_arrived(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20)
    swap = Swapped(rig)
    on_disk_only(rig, *"ab")
    rig.get("a")
    rig.now += 0.1
    swap.swapper.step()
    assert [node.key for node in swap.begun] == keys(rig, "b")
    assert rig.evict("a") == (0, 0, 1)
    rig.settle()
    assert in_cpu(rig, *"ab") == [True, True]
    assert rig.evict("a")[0] == 2


def test_of_too_many_the_best_are_remembered(rig_of: Make) -> None:
    rig = rig_of(pages=32, disk=1 << 20)
    candidates = Candidates(most=3)
    for name in range(8):
        rig.chain(name)
        for _ in range(name):
            rig.cache.lookup(keys(rig, name))
    rig.settle()
    order = list(range(8))
    random.Random(0).shuffle(order)
    for name in order:
        rig.evict(name)
        candidates.changed(rig.node(name), Tier.CPU, False)
    found = []
    while (node := candidates.best()) is not None:
        found.append(node.key)
        candidates.discard(node)
    assert found == keys(rig, 7, 6, 5)


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(0, 13)),
        st.tuples(st.just("evict"), st.integers(0, 13)),
        st.tuples(st.just("look"), st.integers(0, 13)),
        st.tuples(st.just("hold"), st.integers(0, 13)),
        st.tuples(st.just("pin"), st.integers(0, 13)),
        st.tuples(st.just("fail"), st.integers(0, 1)),
        st.tuples(st.just("drop"), st.integers(0, 13)),
        st.tuples(st.just("step"), st.integers(0, 3)),
        st.tuples(st.just("read"), st.integers(1, 3)),
    ),
    max_size=80,
)


def parent_of(name: int) -> int | None:
    return (name - 1) // 2 if name else None


class Watched(Swapped):
    """As above; every change of the arena is looked at as it happens."""

    def __init__(self, rig: Any, given: SwapSettings) -> None:
        super().__init__(rig, given)
        told = rig.cache.index.on_change

        def changed(node: Node, tier: Tier, entered: bool, cause: str) -> None:
            if tier is Tier.CPU and entered and node in self.begun:
                assert node.parent is None or node.parent.held_in(Tier.CPU), "a child without its parent"
            told(node, tier, entered, cause)

        rig.cache.index.on_change = changed

    def do(self, what: str, number: int) -> None:
        rig, cache = self.rig, self.rig.cache
        node = rig.node(number)
        if what == "store":
            rig.store(number, parent_of(number), size=(1, PAGE, 2 * PAGE)[number % 3])
        elif what == "evict":
            rig.evict(number)
        elif what == "drop":
            rig.evict(number, tiers=[Tier.DISK])
        elif what == "look":
            cache.lookup(keys(rig, number))
        elif what == "hold" and node is not None and node.held_in(Tier.CPU):
            cache.leases.hold(1, b"h", 2.0, [node], Grip.LOOSE if number % 2 else Grip.FIRM)
        elif what == "pin":
            cache.pins.pin(keys(rig, number), Tier.CPU, 1.0)
        elif what == "fail":
            rig.disk.fails = {"load": Outcome.FAILED} if number else {}
        elif what == "step":
            rig.now += number / 10
            cache.tick()
            held = [each for each in cache.index if each.held_in(Tier.CPU) and (each.leases or each.pins or each.dirty)]
            self.swapper.step()
            assert all(each.held_in(Tier.CPU) for each in held), "it evicted what is held"
        elif what == "read":
            for name in ("disk-write", "disk-load", "disk-load")[:number]:
                rig.step(name)


@given(_STEPS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_it_evicts_nothing_held_and_puts_no_child_before_its_parent(
    make_rig: Make, steps: list[tuple[str, int]]
) -> None:
    swap = Watched(make_rig(pages=12, disk=1 << 20), replace(ON, free=0.2, in_flight=3 * PAGE, bandwidth=40 * PAGE))
    pace = swap.swapper.pace
    for name in range(6):
        swap.do("store", name)
    swap.rig.settle()
    swap.do("evict", 0)
    for what, number in steps:
        before = len(swap.begun)
        room = 0.7 * swap.rig.arena.size - (swap.rig.arena.size - swap.rig.arena.free_bytes)
        swap.do(what, number)
        taken = sum(swap.rig.arena.rounded(node.size) for node in swap.begun[before:])
        assert what not in ("step", "read") or taken <= max(room, 0.7 * swap.rig.arena.size)
        assert pace.in_flight <= max(3 * PAGE, 2 * PAGE if swap.swapper.loading == 1 else 0)
        assert swap.rig.cache.audit() == []
    swap.rig.disk.fails = {}
    swap.rig.settle()
    assert (pace.in_flight, swap.swapper.loading) == (0, 0)
    assert swap.rig.cache.audit() == []
    swap.rig.release(lease=b"h")
    assert all(node.leases == 0 for node in swap.rig.cache.index), "a parent is held for a load that is over"
