# SPDX-License-Identifier: Apache-2.0
"""Stores, lookups, evictions, moves, compression, pins and cancels in any order, with every thread stepped by hand.

After every step: each page is held once or free, the disk's books are the sum of its objects' costs, nothing left its
last tier because it was moved, pins hold; and once the threads are drained, every operation has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loracache.cache.tier import io as tier_io
from loracache.control import transfer as moving
from loracache.control.jobs import Operation
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
PAGES = 14
DISK = 5 * PAGE
NAMES = 12
TIERS = (Tier.CPU, Tier.DISK, Tier.REDIS)
names = st.integers(0, NAMES - 1)
selections = st.permutations(range(NAMES)).flatmap(lambda order: st.integers(1, NAMES).map(lambda n: order[:n]))


def parent_of(name: int) -> int | None:
    """Chains that branch: 0 <- 2, 3; 1 <- 4, 5; 2 <- 6, 7; ..."""
    return (name - 2) // 2 if name > 1 else None


def line_of(name: int) -> list[int]:
    """An object and all it depends on, up to the first of its chain."""
    above = parent_of(name)
    return [name, *(line_of(above) if above is not None else [])]


def size_of(name: int) -> int:
    return (1, PAGE, PAGE + 1)[name % 3]


class MovingMachine(RuleBasedStateMachine):
    def __init__(self, operated: Callable[..., Any], compressing: Callable[..., Any], clock: list[float]) -> None:
        super().__init__()
        self.made = operated(pages=PAGES, disk=DISK, redis=True)
        self.rig = self.made.rig
        self.cache = self.rig.cache
        self.disk = compressing(self.rig.disk)
        compressing(self.rig.redis)
        self.clock = clock
        self.operations: list[Operation] = []
        self.pins: set[tuple[bytes, Tier]] = set()
        self.leases = 0

    # -- clients -------------------------------------------------------------------------------------------------------

    @initialize()
    def fill(self) -> None:
        """There is something to move."""
        self.store(range(NAMES))
        self.rig.settle()

    @rule(some=selections)
    def store(self, some: Sequence[int]) -> None:
        """Objects, and what they depend on."""
        for name in some:
            for each in reversed(line_of(name)):
                if self.rig.store(each, parent_of(each), size_of(each)) == "":
                    self.made.asked.discard(self.rig.info(each).key)

    @rule(some=st.lists(names, min_size=1, max_size=3))
    def acquire(self, some: list[int]) -> None:
        self.leases += 1
        self.rig.acquire(*some, owner=1 + self.leases % 2, lease=b"%d" % self.leases)

    @rule(owner=st.integers(1, 2))
    def disconnect(self, owner: int) -> None:
        self.cache.leases.disconnect(owner)

    @rule(name=names)
    def lookup(self, name: int) -> None:
        self.cache.lookup(self.made.keys([name]))

    @rule(name=names)
    def report(self, name: int) -> None:
        """A reader found it corrupt."""
        self.cache.report_bad([self.rig.info(name).key])

    # -- operators -----------------------------------------------------------------------------------------------------

    @rule(some=selections, source=st.sampled_from(TIERS), to=st.sampled_from(TIERS), keep=st.booleans())
    def move(self, some: list[int], source: Tier, to: Tier, keep: bool) -> None:
        if source is not to:
            self.operations.append(self.made.begin(some, to, source=source, keep=keep))

    @rule(source=st.sampled_from(TIERS), to=st.sampled_from(TIERS))
    def move_all(self, source: Tier, to: Tier) -> None:
        """Everything, from the first step to the last: more than the arena or the disk holds."""
        self.move(list(range(NAMES)), source, to, keep=False)
        self.rig.settle()

    @rule(some=selections, to=st.sampled_from(TIERS))
    def admit(self, some: list[int], to: Tier) -> None:
        self.operations.append(self.made.begin(some, to, wanted=lambda node: not node.held_in(to)))

    @rule(some=selections, tier=st.sampled_from([Tier.DISK, Tier.REDIS]), planes=st.sampled_from([0, 2]))
    def rewrite(self, some: list[int], tier: Tier, planes: int) -> None:
        self.operations.append(self.made.begin(some, tier, source=tier, planes=lambda node: planes))

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        operation = data.draw(st.sampled_from(self.operations))
        self.made.operations.cancel(operation.id, "")

    @rule(some=st.lists(names, min_size=1, max_size=3), tiers=st.sets(st.sampled_from(TIERS), min_size=1))
    def evict(self, some: list[int], tiers: set[Tier]) -> None:
        below = [name for name in range(NAMES) if any(each in some for each in line_of(name))]
        self.made.asked.update(self.made.keys(below))
        self.rig.evict(*some, tiers=sorted(tiers))

    @rule(tiers=st.sets(st.sampled_from(TIERS), min_size=1))
    def clear(self, tiers: set[Tier]) -> None:
        self.made.asked.update(self.made.keys(range(NAMES)))
        self.rig.remove(lambda did: self.cache.clear(tiers, did))

    @rule(name=names, tier=st.sampled_from([Tier.CPU, Tier.DISK]))
    def pin(self, name: int, tier: Tier) -> None:
        key = self.rig.info(name).key
        if self.cache.pins.pin([key], tier):
            self.pins.add((key, tier))

    @rule(name=names, tier=st.sampled_from([Tier.CPU, Tier.DISK]))
    def unpin(self, name: int, tier: Tier) -> None:
        key = self.rig.info(name).key
        self.cache.pins.unpin([key], tier)
        self.pins.discard((key, tier))

    # -- time, threads, faults -----------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 5))
    def step(self, number: int) -> None:
        """One job of a thread; what follows from it on the cache's thread waits."""
        self.rig.threads()[number].run_one()

    @rule(count=st.integers(1, 12))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.made.one_by_one()

    @rule(seconds=st.sampled_from([0.3, 4.0, 4000.0]))
    def later(self, seconds: float) -> None:
        """Leases end, the daemon's own too; a tier that failed is asked again."""
        self.clock[0] += seconds
        self.rig.later(seconds)

    @rule(
        fault=st.sampled_from(
            [("disk", "store", Outcome.FULL), ("disk", "store", Outcome.FAILED), ("disk", "load", Outcome.FAILED)]
            + [("redis", what, Outcome.UNAVAILABLE) for what in ("contains", "load", "store", "delete")]
        )
    )
    def break_tier(self, fault: tuple[str, str, Outcome]) -> None:
        tier, what, outcome = fault
        self.rig.backend(tier).fails[what] = outcome

    @rule(tier=st.sampled_from(["disk", "redis"]))
    def mend_tier(self, tier: str) -> None:
        self.rig.backend(tier).fails.clear()

    # -- what always holds ---------------------------------------------------------------------------------------------

    @invariant()
    def every_page_is_held_once_or_free(self) -> None:
        assert self.cache.audit() == []

    @invariant()
    def nothing_left_its_last_tier_because_it_was_moved(self) -> None:
        assert self.made.losses == []

    @invariant()
    def the_disk_stays_within_its_budget(self) -> None:
        assert 0 <= self.cache.disk.used <= DISK

    @invariant()
    def pins_hold(self) -> None:
        for key, tier in self.pins:
            assert key in self.made.damaged or self.cache.index.get(key).held_in(tier)

    @invariant()
    def no_child_is_on_disk_without_its_parent(self) -> None:
        for node in self.cache.index:
            if node.held_in(Tier.DISK) and node.parent is not None:
                assert node.parent.held_in(Tier.DISK) or node.parent.key in self.made.damaged

    @rule()
    def settle(self) -> None:
        """Drained, every operation is over, and the books of the disk are those of its backend."""
        self.rig.settle()
        assert all(operation.ended for operation in self.operations)
        assert not self.cache.passing
        assert not self.cache.leaving
        on_disk = [node for node in self.cache.index if node.held_in(Tier.DISK)]
        kept = self.cache.disk._undeleted
        assert self.cache.disk.used == sum(map(self.cache.disk.cost, on_disk)) + sum(kept.values())
        if not kept:
            assert self.cache.disk.used == self.disk.used()

    def teardown(self) -> None:
        """When everybody has gone, nothing is left behind, and what a tier holds are its objects' bytes."""
        for backend in (self.rig.disk, self.rig.redis):
            backend.fails.clear()
        for owner in (1, 2):
            self.cache.leases.disconnect(owner)
        self.settle()
        self.made.check(*self.operations)
        self.clock[0] += 100
        for name in range(NAMES):
            found = self.rig.get(name)
            assert isinstance(found, str) or found == self.rig.payload(name, size_of(name))
        for tier in (Tier.CPU, Tier.DISK):
            self.cache.pins.unpin([node.key for node in self.cache.index], tier)
        self.rig.evict(*range(NAMES), tiers=[Tier.CPU, Tier.DISK])
        self.rig.settle()
        assert self.rig.arena.free_bytes == self.rig.arena.size
        assert len(self.cache.index) == self.cache.disk.used == 0


@pytest.mark.timeout(300)  # a failure takes long to shrink
def test_no_sequence_of_operations_loses_an_object_or_a_page(
    operated: Callable[..., Any], compressing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(moving, "_SLICE_OBJECTS", 3)
    run_state_machine_as_test(
        lambda: MovingMachine(operated, compressing, clock),  # type: ignore[arg-type]
        settings=settings(max_examples=120, stateful_step_count=50),
    )
