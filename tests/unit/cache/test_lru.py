# SPDX-License-Identifier: Apache-2.0
"""LRU: the least recently used leaf goes first, all that is needed goes or nothing, and what is in use stays."""

from __future__ import annotations

import random
from collections.abc import Container

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from loracache.cache.policy import LRU
from loracache.cache.state.index import Index, Node
from loracache.cache.state.node import State
from loracache.cache.state.slices import whole
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

TIERS = (Tier.CPU, Tier.DISK)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Tree:
    """An index with an LRU for each of two tiers. `costs` are what objects take in a tier."""

    def __init__(self) -> None:
        self.index = Index(lambda tier, node: self.policies[tier].offer(node), lambda node: None)
        self.index.on_used = lambda tier, node, before: self.policies[tier].used(node, before)
        self.index.on_left = lambda tier, node: self.policies[tier].withdraw(node)
        self.policies = {tier: LRU(self.index, tier, lambda node: node.size) for tier in TIERS}

    def victims(self, tier: Tier, nbytes: int, protected: Container[Node] = ()) -> list[Node] | None:
        """What would go; None where that is not enough."""
        chosen, freed = whole(self.policies[tier].victims(nbytes, protected))
        assert freed == sum(node.size for node in chosen)
        return chosen if freed >= nbytes else None

    def store(self, number: int, parent: int | None = None, size: int = 1, tier: Tier = Tier.CPU) -> Node:
        above = b"" if parent is None else key(parent)
        node = self.index.insert(ObjectInfo(key(number), above, Kind.KV, bytes(32), size, 0))
        assert node is not None
        self.index.enter(node, tier)
        return node

    def greedy(self, tier: Tier, nbytes: int, protected: set[Node]) -> list[Node] | None:
        """What LRU promises, at its plainest: again and again the oldest leaf that may go."""
        chosen: list[Node] = []
        while sum(node.size for node in chosen) < nbytes:
            parents = {node.parent for node in self.index if node.held_in(tier) and node not in chosen}
            leaves = [
                node
                for node in self.index
                if self.index.evictable(node, tier) and node not in parents and node not in {*chosen, *protected}
            ]
            if not leaves:
                return None
            chosen.append(min(leaves, key=lambda node: node.tick))
        return chosen


class LRUMachine(RuleBasedStateMachine):
    """Random trees, uses, holds, pins and writes; every choice of victims is compared with the plain algorithm's."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree()
        self.index = self.tree.index
        self.count = 0
        self.held: list[Node] = []

    @initialize(seed=st.integers(0, 2**32))
    def plant(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            self.grow(chance.randrange(20), chance.randrange(1, 9))

    @rule(up=st.integers(0, 20), size=st.integers(1, 9))
    def grow(self, up: int, size: int) -> None:
        parent = self.index.get(key(self.count - up)) if 0 < up <= self.count else None
        above = None if parent is None else self.count - up
        self.tree.store(self.count, above, size)
        node = self.index.get(key(self.count))
        assert node is not None
        self.index.enter(node, Tier.DISK)
        self.count += 1

    def some(self, data: st.DataObject) -> Node | None:
        return data.draw(st.sampled_from(list(self.index))) if len(self.index) else None

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        if node := self.some(data):
            self.index.touch(node)

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
        expected = self.tree.greedy(tier, nbytes, protected)
        victims = self.tree.victims(tier, nbytes, protected)
        assert victims == expected
        if victims is None or not evict:
            for node in victims or ():
                self.index.offer(node, tier)  # the caller may do otherwise, but then says so
            return
        for node in victims:
            assert not node.children[tier], "a parent would leave before its child"
            self.index.leave(node, tier)

    @invariant()
    def a_line_holds_each_candidate_once_and_where_it_belongs(self) -> None:
        for tier, policy in self.tree.policies.items():
            assert all(node.tick == tick and node.held_in(tier) for tick, node in policy.candidates().items())
            offered = {node for node in self.index if node.offered >> tier & 1}
            assert offered == set(policy.candidates().values())
            assert len(policy) == len(offered)


@pytest.mark.timeout(300)  # a failure takes long to shrink
def test_victims_are_those_of_the_plain_algorithm() -> None:
    run_state_machine_as_test(LRUMachine, settings=settings(max_examples=100, stateful_step_count=40))


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    tree = Tree()
    nodes = [tree.store(number, size=10) for number in range(4)]
    tree.index.touch(nodes[0])
    assert tree.victims(Tier.CPU, 11) == [nodes[1], nodes[2]]


def test_a_chain_goes_from_its_end() -> None:
    tree = Tree()
    nodes = [tree.store(number, number - 1 if number else None) for number in range(4)]
    tree.index.leading([key(number) for number in range(4)], 1 << Tier.CPU)
    assert tree.victims(Tier.CPU, 3) == nodes[:0:-1]


def test_not_enough_changes_nothing() -> None:
    tree = Tree()
    nodes = [tree.store(number, number - 1 if number else None) for number in range(4)]
    assert tree.victims(Tier.CPU, 5, ()) is None
    assert tree.victims(Tier.CPU, 4, {nodes[0]}) is None
    assert tree.victims(Tier.CPU, 4, ()) == nodes[::-1]


@pytest.mark.parametrize("reason", ["leased", "pinned", "dirty", "protected"])
def test_what_is_in_use_is_no_victim_and_neither_are_its_ancestors(reason: str) -> None:
    tree = Tree()
    parent, used, other = tree.store(1), tree.store(2, 1), tree.store(3)
    if reason == "leased":
        tree.index.hold(used)
    elif reason == "pinned":
        used.pins = 1 << Tier.CPU
    elif reason == "dirty":
        tree.index.queue(used, Tier.REDIS)
    protected = {used} if reason == "protected" else set()
    assert tree.victims(Tier.CPU, 2, protected) is None
    assert tree.victims(Tier.CPU, 1, protected) == [other]
    assert parent.held_in(Tier.CPU)


def test_a_lease_and_a_queued_write_hold_nothing_on_disk() -> None:
    tree = Tree()
    node = tree.store(1)
    tree.index.enter(node, Tier.DISK)
    tree.index.hold(node)
    tree.index.queue(node, Tier.REDIS)
    assert tree.victims(Tier.DISK, 1) == [node]


def test_the_line_does_not_grow_with_what_came_and_went() -> None:
    tree = Tree()
    for number in range(20_000):
        tree.index.leave(tree.store(number), Tier.CPU)
    assert len(tree.index) == len(tree.policies[Tier.CPU]) == 0


def test_a_choice_among_very_many_that_were_used_looks_at_no_more_than_it_takes() -> None:
    tree = Tree()
    nodes = [tree.store(number) for number in range(1000)]
    for node in reversed(nodes):
        tree.index.touch(node)
    assert list(tree.policies[Tier.CPU].victims(2)) == []  # not one slice ends before it is made
    assert tree.victims(Tier.CPU, 2) == nodes[:-3:-1]


def test_a_long_choice_lets_others_in_and_goes_on_where_it_was() -> None:
    tree = Tree()
    nodes = [tree.store(number) for number in range(1000)]
    choosing = tree.policies[Tier.CPU].victims(600)
    next(choosing)
    tree.index.leave(nodes[500], Tier.CPU)
    tree.index.touch(nodes[501])
    tree.store(2000)
    chosen, freed = whole(choosing)
    assert freed == len(chosen) == 600
    assert chosen == [*nodes[:500], *nodes[502:602]]


def test_an_object_whose_write_is_over_or_given_up_is_a_candidate_again() -> None:
    tree = Tree()
    node = tree.store(0)
    tree.index.queue(node, Tier.DISK)
    assert tree.victims(Tier.CPU, 1) is None  # looked at, and no candidate from now on
    tree.index.unqueue(node, Tier.DISK)
    assert tree.victims(Tier.CPU, 1) == [node]
