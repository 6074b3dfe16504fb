# SPDX-License-Identifier: Apache-2.0
"""TieredCache under random steps of clients, tiers, clock and faults, with the tiers' threads stepped by hand.

After every step: each page is held once or free, the tree's counts are those of the tree, disk stays within its budget,
whoever holds a lease still sees the bytes that belong to it, and no tier holds bytes that are not its object's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loracache.cache.policy import POLICIES
from loracache.cache.state.leases import Writing
from loracache.cache.state.node import State
from loracache.cache.tier import io as tier_io
from loracache.cache.tiered import Acquired
from loracache.keys import checksum
from loracache.storage_backends.base import Kind, Outcome
from loracache.tiers import Tier

PAGE = 4096
PAGES = 12
DISK = 9 * PAGE
names = st.integers(0, 13)
owners = st.integers(1, 3)
ADAPTER = "adapter"


def parent_of(name: int) -> object:
    """A forest: chains that branch, one of them under an adapter that is not held."""
    return (name - 1) // 2 if name > 1 else ADAPTER if name == 1 else None


def size_of(name: int) -> int:
    return (1, PAGE, PAGE + 1, 3 * PAGE)[name % 4]


@dataclass(eq=False)
class Reader:
    owner: int
    lease: bytes
    answers: list[Acquired | None]
    seen: dict[int, tuple[Any, bytes]] = field(
        default_factory=dict
    )  # position -> extents and bytes when it was answered


@dataclass(eq=False)
class Writer:
    owner: int
    lease: bytes
    name: int
    writing: Writing
    pattern: bytes


class CacheMachine(RuleBasedStateMachine):
    def __init__(self, make_rig: Callable[..., Any], clock: list[float], options: dict[str, Any]) -> None:
        super().__init__()
        self.rig = make_rig(pages=PAGES, disk=DISK, redis=True, **options)
        self.cache = self.rig.cache
        self.clock = clock
        self.rig.cache.index.adapters.add(self.rig.info(ADAPTER).key)
        self.readers: list[Reader] = []
        self.writers: list[Writer] = []
        self.serial = 0
        self.scribbled: set[int] = set()  # names whose bytes in the arena were once overwritten
        self.lost: set[bytes] = set()  # keys that disk or Redis lost or damaged
        self.flushes = self.flushed = 0

    def lease(self) -> bytes:
        self.serial += 1
        return b"%d" % self.serial

    # -- clients -------------------------------------------------------------------------------------------------------

    @rule(owner=owners, name=names)
    def reserve(self, owner: int, name: int) -> None:
        lease = self.lease()
        answer = self.rig.reserve(name, parent_of(name), size_of(name), owner=owner, lease=lease)
        if isinstance(answer, Writing):
            pattern = (b"%d." % self.serial * PAGE)[: size_of(name)]
            self.rig.put(answer.extents, pattern)
            self.writers.append(Writer(owner, lease, name, answer, pattern))

    @rule(owner=owners, name=names)
    def store(self, owner: int, name: int) -> None:
        self.rig.store(name, parent_of(name), size_of(name), owner=owner)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), good=st.integers(0, 9))
    def commit(self, data: st.DataObject, good: int) -> None:
        writer = self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1)))
        held = self.cache.leases.alive(writer.owner, writer.lease)
        proof = self.rig.write(writer.writing) if held else 0
        if not good:  # a writer that computes a wrong checksum
            proof ^= 1
            self.scribbled.add(writer.name)
        answers = self.rig.commit(writer.owner, writer.lease, [(writer.writing.info.key, proof)])
        assert (answers == ["lease_lost"]) == (not held)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        writer = self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1)))
        self.cache.leases.release(writer.owner, writer.lease)

    @rule(owner=owners, wanted=st.lists(names, min_size=1, max_size=4), ttl=st.sampled_from([5.0, 30.0]))
    def acquire(self, owner: int, wanted: list[int], ttl: float) -> None:
        lease = self.lease()
        self.readers.append(Reader(owner, lease, self.rig.acquire(*wanted, owner=owner, lease=lease, ttl=ttl)))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reader = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        held = self.cache.leases.alive(reader.owner, reader.lease)
        assert self.cache.leases.release(reader.owner, reader.lease) == held

    @rule(name=names)
    def lookup(self, name: int) -> None:
        chain: list[int] = [name]
        while isinstance(above := parent_of(chain[0]), int):
            chain.insert(0, above)
        tiers = self.cache.lookup([self.rig.info(link).key for link in chain])
        for link, tier in zip(chain, tiers, strict=False):
            assert self.rig.node(link).held_in(tier)

    @rule(owner=owners)
    def disconnect(self, owner: int) -> None:
        watched = self.cache.leases.disconnect(owner)
        self.readers = [reader for reader in self.readers if reader.owner != owner]
        assert watched or not any(writer.owner == owner for writer in self.writers)

    @rule(owner=owners)
    def process_gone(self, owner: int) -> None:
        self.disconnect(owner)
        self.cache.leases.writer_gone(owner)
        self.writers = [writer for writer in self.writers if writer.owner != owner]

    @rule(name=names, tier=st.sampled_from([Tier.CPU, Tier.DISK]), ttl=st.sampled_from([None, 3.0, 20.0]))
    def pin(self, name: int, tier: Tier, ttl: float | None) -> None:
        self.cache.pins.pin([self.rig.info(name).key], tier, ttl)

    @rule(name=names, tier=st.sampled_from([Tier.CPU, Tier.DISK]))
    def unpin(self, name: int, tier: Tier) -> None:
        self.cache.pins.unpin([self.rig.info(name).key], tier)

    @rule(some=st.lists(names, min_size=1, max_size=3), tiers=st.sets(st.sampled_from(list(Tier)[1:]), min_size=1))
    def evict(self, some: list[int], tiers: set[Tier]) -> None:
        self.rig.evict(*some, tiers=sorted(tiers))

    @rule()
    def flush(self) -> None:
        self.flushes += 1

        def done() -> None:
            self.flushed += 1

        self.cache.when_flushed(done)

    # -- time and tiers ------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.3, 4.0, 31.0]))
    def later(self, seconds: float) -> None:
        self.clock[0] += seconds
        self.rig.later(seconds)

    @rule(number=st.integers(0, 5))
    def step(self, number: int) -> None:
        self.rig.threads()[number].run_one()
        self.rig.answer()

    @rule()
    def settle(self) -> None:
        self.rig.settle()

    # -- faults --------------------------------------------------------------------------------------------------------

    @rule(name=names)
    def scribble(self, name: int) -> None:
        """Somebody overwrites an object in the arena; the next reader notices and says so."""
        node = self.rig.node(name)
        if node is not None and node.held_in(Tier.CPU):
            self.scribbled.add(name)
            self.rig.put(node.extents, b"!")

    @rule(name=names, tier=st.sampled_from(["disk", "redis"]), flip=st.booleans())
    def damage(self, name: int, tier: str, flip: bool) -> None:
        backend, key = self.rig.backend(tier), self.rig.info(name).key
        if key in backend.held():
            self.lost.add(key)
            backend.flip(key) if flip else backend.lose(key)

    @rule(
        fault=st.sampled_from(
            [("disk", "store", Outcome.FULL), ("disk", "store", Outcome.FAILED), ("disk", "load", Outcome.FAILED)]
            + [("redis", what, Outcome.UNAVAILABLE) for what in ("contains", "load", "store")]
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
    def readers_see_their_objects_and_nothing_else(self) -> None:
        for reader in self.readers:
            if not self.cache.leases.alive(reader.owner, reader.lease):
                continue
            for item in reader.answers:
                if item is None or item.node is None:
                    continue
                if item.position not in reader.seen:
                    node = item.node
                    reader.seen[item.position] = (node.extents, self.bytes_at(node.extents, node.size))
                    self.check(node, reader.seen[item.position][1])
                extents, before = reader.seen[item.position]
                assert self.bytes_at(extents, len(before))[1:] == before[1:], "reused under a reader"

    def check(self, node: Any, data: bytes) -> None:
        (name,) = [name for name in range(14) if self.rig.info(name).key == node.key]
        if checksum([data]) != node.checksum:
            assert name in self.scribbled, f"{name} holds another object's bytes"
            self.cache.report_bad([node.key])
        else:
            assert data == self.expected(name)

    def expected(self, name: int) -> bytes:
        payload: bytes = self.rig.payload(name, size_of(name))
        return payload

    def bytes_at(self, extents: Any, size: int) -> bytes:
        return b"".join(self.rig.arena.buffers(extents, size))

    @invariant()
    def nobody_writes_into_a_reservation(self) -> None:
        for writer in self.writers:
            assert self.bytes_at(writer.writing.extents, len(writer.pattern)) == writer.pattern

    @invariant()
    def tiers_hold_their_objects_bytes(self) -> None:
        for name in range(14):
            key = self.rig.info(name).key
            for backend in (self.rig.disk, self.rig.redis):
                if key in backend.held() and key not in self.lost:
                    assert backend._objects[key][1] == self.expected(name)

    @invariant()
    def disk_stays_within_its_budget(self) -> None:
        assert 0 <= self.cache.disk.used <= DISK
        assert self.rig.disk.most_bytes <= DISK

    @invariant()
    def no_child_is_on_disk_without_its_parent(self) -> None:
        for node in self.cache.index:
            parent = node.parent
            if node.held_in(Tier.DISK) and parent is not None and parent.kind is not Kind.LORA:
                assert parent.held_in(Tier.DISK) or parent.key in self.lost

    @invariant()
    def the_tree_counts_right_and_keeps_what_it_must(self) -> None:
        nodes = list(self.cache.index)
        for node in nodes:
            assert node.present or node.first_child or node.leases
            for tier in (Tier.CPU, Tier.DISK):
                assert node.children[tier] == sum(other.parent is node and other.held_in(tier) for other in nodes)
                if self.cache.index.evictable(node, tier) and not node.children[tier]:
                    assert node.offered >> tier & 1, "would stay for ever"

    @invariant()
    def states_are_what_loads_writes_and_leases_say(self) -> None:
        for node in self.cache.index:
            arena = node.state(Tier.CPU)
            assert (arena is State.LOADING) == (node in self.cache._promoter._waiting)
            assert (arena in (State.CLEAN, State.DIRTY)) == node.held_in(Tier.CPU)
            assert bool(node.extents) == (arena in (State.LOADING, State.CLEAN, State.DIRTY))
            assert node.leases or not node.condemned, "pages wait for nobody"
            for writer in self.cache.writers:
                waits = node in writer._queue or node in writer._in_flight
                assert (node.state(writer.io.tier) is State.WRITING) == waits
                assert node.held_in(Tier.CPU) or node not in writer._queue, "the write has nothing to read"
            written = any(node.state(tier) is State.WRITING for tier in (Tier.DISK, Tier.REDIS))
            assert (arena is State.DIRTY) == (node.held_in(Tier.CPU) and written)

    def teardown(self) -> None:
        """When everybody has gone and everything has settled, nothing is left behind."""
        for backend in (self.rig.disk, self.rig.redis):
            backend.fails.clear()
        for owner in range(1, 4):
            self.cache.leases.disconnect(owner)
            self.cache.leases.writer_gone(owner)
        self.clock[0] += 100
        self.rig.settle()
        self.rig.later(100)
        self.rig.settle()
        assert self.flushed == self.flushes
        assert len(self.cache.leases) == self.cache.leases.quarantined == len(self.cache._promoter) == 0
        for tier in (Tier.CPU, Tier.DISK):
            self.cache.pins.unpin([node.key for node in self.cache.index], tier)
        self.rig.evict(*range(14), tiers=[Tier.CPU, Tier.DISK])
        self.rig.settle()
        assert self.cache.audit() == []
        assert self.rig.arena.free_bytes == self.rig.arena.size
        assert len(self.cache.index) == self.cache.disk.used == 0
        assert not {key: info for key, info in self.rig.disk.held().items() if key not in self.lost}


@pytest.mark.timeout(300)  # a failure takes long to shrink
def test_no_sequence_of_events_loses_a_page_or_serves_wrong_bytes(
    make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run_state_machine_as_test(
        lambda: CacheMachine(make_rig, clock, {}),  # type: ignore[arg-type]
        settings=settings(max_examples=120, stateful_step_count=50),
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"lru"}))
def test_nor_does_it_with_another_policy_and_admission(
    policy: str, make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    options = {"policy": policy, "admission": "second_touch"}
    run_state_machine_as_test(
        lambda: CacheMachine(make_rig, clock, options),  # type: ignore[arg-type]
        settings=settings(max_examples=40, stateful_step_count=50),
    )
