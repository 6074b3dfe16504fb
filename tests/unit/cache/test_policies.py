# SPDX-License-Identifier: Apache-2.0
"""What every policy keeps to: leaves go first, what is in use stays, enough goes or all that may; bytes are exact. And
LRU: the least recently used leaf goes first."""

from __future__ import annotations

import random
from collections.abc import Callable, Container
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from loracache.cache.policy import LRU, POLICIES
from loracache.cache.state.index import Index, Node
from loracache.cache.state.node import State
from loracache.cache.state.slices import whole
from loracache.results import Departure
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

TIERS = (Tier.CPU, Tier.DISK)
Make = Callable[[Index, Tier, Callable[[Node], int]], Any]


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Tree:
    """An index with a policy for each of two tiers. An object takes its size."""

    def __init__(self, make: Make) -> None:
        self.index = Index(lambda tier, node: self.policies[tier].offer(node), lambda node: None)
        self.index.on_used = lambda tier, node, before: self.policies[tier].used(node, before)
        self.index.on_left = lambda tier, node: self.policies[tier].withdraw(node)
        self.index.on_gone = lambda tier, node: self.policies[tier].gone(node)
        self.policies = {tier: make(self.index, tier, lambda node: node.size) for tier in TIERS}

    def victims(self, tier: Tier, nbytes: int, protected: Container[Node] = ()) -> list[Node]:
        chosen, freed = whole(self.policies[tier].victims(nbytes, protected))
        assert freed == sum(node.size for node in chosen)
        return list(chosen)

    def store(self, number: int, parent: int | None = None, size: int = 1, kind: Kind = Kind.KV) -> Node:
        above = b"" if parent is None else key(parent)
        node = self.index.insert(ObjectInfo(key(number), above, kind, bytes(32), size, 0))
        assert node is not None
        self.index.enter(node, Tier.CPU)
        return node

    def look_up(self, *numbers: int) -> None:
        self.index.leading([key(number) for number in numbers], 1 << Tier.CPU)

    def evict(self, nbytes: int) -> list[Node]:
        gone = self.victims(Tier.CPU, nbytes)
        for node in gone:
            self.index.leave(node, Tier.CPU)
        return gone

    def may_go(self, tier: Tier, protected: Container[Node] = ()) -> set[Node]:
        """All that could leave the tier, one after the other."""
        going: set[Node] = set()
        while True:
            stays = {node.parent for node in self.index if node.held_in(tier) and node not in going}
            more = {
                node
                for node in self.index
                if self.index.evictable(node, tier) and node not in stays and node not in protected
            } - going
            if not more:
                return going
            going |= more


class IndexMachine(RuleBasedStateMachine):
    """What happens to nodes of an index whatever else is kept of it: they are used, held and let go."""

    index: Index
    held: list[Node]

    def some(self, data: st.DataObject) -> Node | None:
        return data.draw(st.sampled_from(list(self.index))) if len(self.index) else None

    @rule(data=st.data(), times=st.integers(1, 4))
    def use(self, data: st.DataObject, times: int) -> None:
        if node := self.some(data):
            for _ in range(times):
                chain = [node.key]
                while (above := self.index.get(chain[0])) and above.parent:
                    chain.insert(0, above.parent.key)
                self.index.leading(chain, 1 << Tier.CPU | 1 << Tier.DISK)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        if node := self.some(data):
            self.index.hold(node)
            self.held.append(node)

    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        if self.held:
            self.index.unhold(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(data=st.data(), tier=st.sampled_from(TIERS))
    def pin_or_unpin(self, data: st.DataObject, tier: Tier) -> None:
        if (node := self.some(data)) and node.held_in(tier):
            node.pins ^= 1 << tier
            self.index.offer(node, tier)


class PolicyMachine(IndexMachine):
    """Random trees, uses, holds, pins, writes and evictions."""

    make: Make

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree(type(self).make)
        self.index = self.tree.index
        self.count = 0
        self.held: list[Node] = []

    @initialize(seed=st.integers(0, 2**32))
    def plant(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            self.grow(chance.randrange(20), chance.randrange(1, 9), chance.randrange(6) == 0)

    @rule(up=st.integers(0, 20), size=st.integers(1, 9), lora=st.booleans())
    def grow(self, up: int, size: int, lora: bool) -> None:
        number = self.count - up
        parent = number if not lora and 0 < up <= self.count and self.index.get(key(number)) else None
        node = self.tree.store(self.count, parent, size, Kind.LORA if lora else Kind.KV)
        self.index.enter(node, Tier.DISK)
        self.count += 1

    @rule(number=st.integers(0, 30))
    def come_again(self, number: int) -> None:
        """One that left, maybe, and its name is remembered."""
        if number < self.count and self.index.get(key(number)) is None:
            self.tree.store(number)

    @rule(data=st.data())
    def queue_or_finish_a_write(self, data: st.DataObject) -> None:
        if (node := self.some(data)) and node.held_in(Tier.CPU):
            if node.state(Tier.REDIS) is State.WRITING:
                self.index.unqueue(node, Tier.REDIS)
            else:
                self.index.queue(node, Tier.REDIS)

    @rule(data=st.data(), tier=st.sampled_from(TIERS))
    def leave_by_another_way(self, data: st.DataObject, tier: Tier) -> None:
        if (node := self.some(data)) and node.held_in(tier):
            if tier is Tier.CPU:
                self.index.unqueue(node, Tier.REDIS)
            self.index.leave(node, tier)

    @rule(data=st.data(), tier=st.sampled_from(TIERS), nbytes=st.integers(1, 60), evict=st.booleans())
    def choose(self, data: st.DataObject, tier: Tier, nbytes: int, evict: bool) -> None:
        protected = {node for node in [self.some(data), self.some(data)] if node}
        may_go = self.tree.may_go(tier, protected)
        victims = self.tree.victims(tier, nbytes, protected)
        assert len(victims) == len(set(victims))
        assert set(victims) <= may_go, "in use, pinned, protected, or the parent of what stays"
        freed = sum(node.size for node in victims)
        assert freed >= nbytes or set(victims) == may_go, "more could have gone"
        assert not victims or freed - victims[-1].size < nbytes, "more than needed"
        self.check(victims, tier, nbytes, protected)
        for node in victims if evict else ():
            assert not node.children[tier], "a parent would leave before its child"
            self.index.leave(node, tier)

    def check(self, victims: list[Node], tier: Tier, nbytes: int, protected: set[Node]) -> None:
        """What a policy promises beyond what all do."""

    @invariant()
    def bytes_are_exact(self) -> None:
        for tier in TIERS:
            held = [node for node in self.index if node.held_in(tier)]
            assert self.index.bytes[tier] == sum(node.size for node in held)
            assert self.index.objects[tier] == len(held)

    @invariant()
    def a_line_holds_each_candidate_once(self) -> None:
        for tier, policy in self.tree.policies.items():
            offered = {node for node in self.index if node.offered >> tier & 1}
            assert offered == set(policy.candidates().values())
            assert len(policy) == len(offered)
            assert all(node.held_in(tier) for node in offered)

    @invariant()
    def whoever_may_go_is_a_candidate(self) -> None:
        for tier in TIERS:
            for node in self.index:
                if self.index.evictable(node, tier) and not node.children[tier]:
                    assert node.offered >> tier & 1, "would stay for ever"

    @invariant()
    def nothing_is_remembered_of_what_has_left(self) -> None:
        for tier, policy in self.tree.policies.items():
            for remembered in (value for value in vars(policy).values() if isinstance(value, dict | set)):
                assert all(node.held_in(tier) for node in remembered if isinstance(node, Node))
            if hasattr(policy, "_bytes"):
                nbytes = [getattr(known, "nbytes", known) for known in policy._known.values()]
                assert sum(policy._bytes) == sum(nbytes)


class LRUMachine(PolicyMachine):
    """Every choice of victims is compared with the plain algorithm's: again and again the oldest leaf that may go."""

    make = LRU

    def check(self, victims: list[Node], tier: Tier, nbytes: int, protected: set[Node]) -> None:
        chosen: list[Node] = []
        may_go = self.tree.may_go(tier, protected)
        while may_go and sum(node.size for node in chosen) < nbytes:
            parents = {node.parent for node in self.index if node.held_in(tier) and node not in chosen}
            chosen.append(min(may_go - parents, key=lambda node: node.tick))
            may_go.remove(chosen[-1])
        assert victims == chosen

    @invariant()
    def all_stand_by_their_last_use(self) -> None:
        for policy in self.tree.policies.values():
            assert all(node.tick == tick for tick, node in policy.candidates().items())


@pytest.fixture(params=sorted(POLICIES))
def make(request: pytest.FixtureRequest) -> Make:
    return POLICIES[request.param]


@pytest.mark.timeout(300)  # a failure takes long to shrink
def test_no_sequence_breaks_what_every_policy_keeps_to(make: Make) -> None:
    machine = type("Machine", (PolicyMachine,), {"make": staticmethod(make)})
    run_state_machine_as_test(machine, settings=settings(max_examples=50, stateful_step_count=40))


@pytest.mark.timeout(300)
def test_victims_of_lru_are_those_of_the_plain_algorithm() -> None:
    run_state_machine_as_test(LRUMachine, settings=settings(max_examples=100, stateful_step_count=40))


def test_what_was_never_used_again_goes_before_what_was(make: Make) -> None:
    tree = Tree(make)
    nodes = [tree.store(number) for number in range(20)]
    for _ in range(3):
        for number in range(0, 20, 2):
            tree.look_up(number)
    assert set(tree.evict(8)) < set(nodes[1::2])


def test_the_reason_of_kv_says_whether_it_came_once_where_that_is_kept_apart(make: Make) -> None:
    tree = Tree(make)
    once, again, adapter = tree.store(1), tree.store(2), tree.store(3, kind=Kind.LORA)
    for _ in range(3):
        tree.look_up(2)
    assert set(tree.victims(Tier.CPU, 3)) == {once, again, adapter}  # where S3-FIFO looks at their uses
    reasons = [tree.policies[Tier.CPU].reason(node) for node in (once, again, adapter)]
    if make in (POLICIES["s3fifo"], POLICIES["adaptive"]):
        assert reasons == [Departure.POLICY_ONCE, Departure.POLICY_AGAIN, Departure.POLICY]
    else:
        assert set(reasons) == {Departure.POLICY}


def test_a_chain_goes_from_its_end(make: Make) -> None:
    tree = Tree(make)
    nodes = [tree.store(number, number - 1 if number else None) for number in range(4)]
    tree.look_up(0, 1, 2, 3)
    assert tree.victims(Tier.CPU, 3) == nodes[:0:-1]


def test_an_adapter_stays_as_long_as_its_kv(make: Make) -> None:
    tree = Tree(make)
    adapter = tree.store(0, size=50, kind=Kind.LORA)
    chunks = [tree.store(number, 0 if number == 1 else number - 1) for number in range(1, 30)]
    assert tree.evict(29) == chunks[::-1]
    assert tree.evict(1) == [adapter]


def test_not_enough_is_all_that_may_go(make: Make) -> None:
    tree = Tree(make)
    nodes = [tree.store(number, number - 1 if number else None) for number in range(4)]
    tree.index.hold(nodes[1])
    assert tree.victims(Tier.CPU, 5) == [nodes[3], nodes[2]]
    assert tree.victims(Tier.CPU, 5, {nodes[3]}) == []
    assert tree.victims(Tier.CPU, 5, {nodes[0]}) == [nodes[3], nodes[2]]
    tree.index.unhold(nodes[1])
    assert tree.victims(Tier.CPU, 5) == nodes[::-1]


def test_a_long_choice_lets_others_in(make: Make) -> None:
    tree = Tree(make)
    nodes = [tree.store(number) for number in range(1000)]
    choosing = tree.policies[Tier.CPU].victims(600)
    next(choosing)
    tree.index.leave(nodes[500], Tier.CPU)
    tree.store(2000)
    chosen, freed = whole(choosing)
    assert freed == len(chosen) == len(set(chosen)) == 600
    assert nodes[500] not in chosen


def test_what_came_and_went_leaves_nothing_behind(make: Make) -> None:
    tree = Tree(make)
    for number in range(10_000):
        tree.index.leave(tree.store(number), Tier.CPU)
    policy = tree.policies[Tier.CPU]
    assert len(tree.index) == len(policy) == 0
    assert all(len(each) <= 8192 for each in vars(policy).values() if isinstance(each, dict | list | set))


@pytest.mark.parametrize("reason", ["leased", "pinned", "dirty", "protected"])
def test_what_is_in_use_is_no_victim_and_neither_are_its_ancestors(make: Make, reason: str) -> None:
    tree = Tree(make)
    parent, used, other = tree.store(1), tree.store(2, 1), tree.store(3)
    if reason == "leased":
        tree.index.hold(used)
    elif reason == "pinned":
        used.pins = 1 << Tier.CPU
    elif reason == "dirty":
        tree.index.queue(used, Tier.REDIS)
    assert tree.victims(Tier.CPU, 2, {used} if reason == "protected" else set()) == [other]
    assert parent.held_in(Tier.CPU)


def test_a_lease_and_a_queued_write_hold_nothing_on_disk(make: Make) -> None:
    tree = Tree(make)
    node = tree.store(1)
    tree.index.enter(node, Tier.DISK)
    tree.index.hold(node)
    tree.index.queue(node, Tier.REDIS)
    assert tree.victims(Tier.DISK, 1) == [node]


def test_an_object_whose_write_is_over_or_given_up_is_a_candidate_again(make: Make) -> None:
    tree = Tree(make)
    node = tree.store(0)
    tree.index.queue(node, Tier.DISK)
    assert tree.victims(Tier.CPU, 1) == []  # looked at, and no candidate from now on
    tree.index.unqueue(node, Tier.DISK)
    assert tree.victims(Tier.CPU, 1) == [node]


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    tree = Tree(LRU)
    nodes = [tree.store(number, size=10) for number in range(4)]
    tree.index.touch(nodes[0])
    assert tree.victims(Tier.CPU, 11) == [nodes[1], nodes[2]]


def test_a_choice_among_very_many_that_were_used_looks_at_no_more_than_it_takes() -> None:
    tree = Tree(LRU)
    nodes = [tree.store(number) for number in range(1000)]
    for node in reversed(nodes):
        tree.index.touch(node)
    assert list(tree.policies[Tier.CPU].victims(2)) == []  # not one slice ends before it is made
    assert tree.victims(Tier.CPU, 2) == nodes[:-3:-1]


def test_a_long_choice_by_lru_goes_on_where_it_was() -> None:
    tree = Tree(LRU)
    nodes = [tree.store(number) for number in range(1000)]
    choosing = tree.policies[Tier.CPU].victims(600)
    next(choosing)
    tree.index.leave(nodes[500], Tier.CPU)
    tree.index.touch(nodes[501])
    tree.store(2000)
    chosen, freed = whole(choosing)
    assert freed == len(chosen) == 600
    assert chosen == [*nodes[:500], *nodes[502:602]]
