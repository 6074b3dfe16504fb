# SPDX-License-Identifier: Apache-2.0
"""The dependency tree: counts that never drift from the tree, nodes that go when nothing needs them, and no sooner."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loracache.cache.state.arena import Extent
from loracache.cache.state.index import Index, Node
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

NAMESPACE = bytes(32)
TIERS = (Tier.CPU, Tier.DISK)
ANY = 1 << Tier.CPU | 1 << Tier.DISK
PAGE = 4096


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def info(number: int, parent: int | None = None, size: int = 100) -> ObjectInfo:
    return ObjectInfo(key(number), b"" if parent is None else key(parent), Kind.KV, NAMESPACE, size, number)


class Offers:
    """What the index tells policies and cache."""

    def __init__(self) -> None:
        self.freed: list[Extent] = []
        self.index = Index(self.offer, self.freed.extend)

    def offer(self, tier: Tier, node: Node) -> None:
        assert not node.offered >> tier & 1
        node.offered |= 1 << tier

    def store(self, item: ObjectInfo, tier: Tier = Tier.CPU) -> Node:
        node = self.index.insert(item)
        assert node is not None
        self.index.enter(node, tier)
        return node


class IndexMachine(RuleBasedStateMachine):
    """Random steps; the invariants recount everything from the tree itself.

    A parent has a smaller number than its child, as in a chain of hashes: there are no rings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offers = Offers()
        self.index = self.offers.index
        self.held: list[Node] = []
        self.taken: list[Extent] = []

    def pages(self) -> tuple[Extent, ...]:
        self.taken.append((PAGE * len(self.taken), PAGE))
        return (self.taken[-1],)

    def some(self, data: st.DataObject) -> Node:
        return data.draw(st.sampled_from(sorted(self.index, key=lambda node: node.key)))

    @rule(number=st.integers(0, 12), up=st.integers(0, 12), tier=st.sampled_from(TIERS))
    def store(self, number: int, up: int, tier: Tier) -> None:
        item = info(number, number - up if 0 < up <= number else None, size=10 + number)
        known = self.index.get(item.key)
        held = known is not None and known.present
        node = self.index.insert(item)
        if node is None:
            assert not held
            assert not self.index.knows(item.parent)
            return
        if not held and item.parent and (known is None or known.parent is None):
            assert node.parent is self.index.get(item.parent)
        if not node.held_in(tier):
            self.index.enter(node, tier, extents=self.pages() if tier is Tier.CPU else ())

    @rule(number=st.integers(0, 12))
    def ghost(self, number: int) -> None:
        """As a promotion from Redis makes the parent that it does not know: only ever followed by a child."""
        node = self.index.ghost(key(number), Kind.KV)
        child = self.index.insert(info(number + 20, number))
        assert child is not None
        if not child.held_in(Tier.CPU):
            self.index.enter(child, Tier.CPU)
        assert self.index.get(key(number)) is node

    @precondition(lambda self: len(self.index) > 0)
    @rule(data=st.data(), tier=st.sampled_from(TIERS))
    def leave(self, data: st.DataObject, tier: Tier) -> None:
        node = self.some(data)
        if node.held_in(tier):
            self.index.leave(node, tier)
            node.offered &= ~(1 << tier)  # as a policy does with what it finds gone

    @rule(tier=st.sampled_from(TIERS))
    def policy_sweeps(self, tier: Tier) -> None:
        """A policy that looked for victims forgets the offers of those that may not go now."""
        for node in self.index:
            if node.children[tier] or not self.index.evictable(node, tier):
                node.offered &= ~(1 << tier)

    @precondition(lambda self: len(self.index) > 0)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        node = self.some(data)
        self.index.hold(node)
        self.held.append(node)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        node = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.index.unhold(node)

    @precondition(lambda self: len(self.index) > 0)
    @rule(data=st.data(), tier=st.sampled_from(TIERS))
    def pin(self, data: st.DataObject, tier: Tier) -> None:
        node = self.some(data)
        if node.held_in(tier):
            node.pins ^= 1 << tier
            self.index.offer(node, tier)

    @precondition(lambda self: len(self.index) > 0)
    @rule(data=st.data())
    def subtrees_have_children_before_parents(self, data: st.DataObject) -> None:
        roots = [self.some(data), self.some(data), self.some(data)]
        seen: set[Node] = set()
        order = [node for root in roots for node in self.index.below(root, seen)]
        assert seen == set(order)
        assert len(order) == len(set(order))
        assert set(order) == {node for node in self.index if set(roots) & set(ancestors(node))}
        place: dict[Node | None, int] = {node: number for number, node in enumerate(order)}
        assert all(place[node] < place.get(node.parent, len(order)) for node in order)

    @invariant()
    def counts_are_those_of_the_tree(self) -> None:
        nodes = list(self.index)
        assert len(self.index) == len(nodes)
        for tier in TIERS:
            held = [node for node in nodes if node.held_in(tier)]
            assert self.index.objects[tier] == len(held)
            assert self.index.bytes[tier] == sum(node.size for node in held)
            for node in nodes:
                assert node.children[tier] == sum(child.parent is node for child in held)

    @invariant()
    def pages_are_free_once_nobody_has_them(self) -> None:
        used = [extent for node in self.index for extent in (*node.extents, *node.condemned)]
        assert sorted(used + self.offers.freed) == self.taken
        for node in self.index:
            assert not node.condemned or node in self.held

    @invariant()
    def siblings_are_linked_both_ways(self) -> None:
        for node in self.index:
            assert self.index.get(node.key) is node
            assert node.parent is None or self.index.get(node.parent.key) is node.parent
            linked = []
            child, before = node.first_child, None
            while child is not None:
                assert child.previous_sibling is before
                linked.append(child)
                child, before = child.next_sibling, child
            assert set(linked) == {other for other in self.index if other.parent is node}
            assert len(linked) == len(set(linked))

    @invariant()
    def a_node_stays_while_it_is_needed_and_no_longer(self) -> None:
        for node in self.index:
            assert node.present or node.first_child or node.leases, f"{node.key.hex()} is kept for nobody"
        for node in self.held:
            assert self.index.get(node.key) is node

    @invariant()
    def every_possible_victim_was_offered(self) -> None:
        for node in self.index:
            for tier in TIERS:
                if self.index.evictable(node, tier) and not node.children[tier]:
                    assert node.offered >> tier & 1, f"{node.key.hex()} would stay in {tier.label} for ever"


def ancestors(node: Node | None) -> list[Node]:
    found = []
    while node is not None:
        found.append(node)
        node = node.parent
    return found


@pytest.mark.timeout(300)  # a failure takes long to shrink
def test_tree_counts_and_offers_never_drift() -> None:
    run_state_machine_as_test(IndexMachine, settings=settings(max_examples=120, stateful_step_count=50))


def test_an_object_without_its_parent_is_not_entered() -> None:
    index = Offers().index
    assert index.insert(info(2, 1)) is None
    assert len(index) == 0


def test_an_adapter_that_is_not_held_stands_as_a_parent_while_it_has_children() -> None:
    offers = Offers()
    offers.index.adapters.add(key(1))
    child = offers.store(info(2, 1))
    assert child.parent is not None
    assert child.parent.kind is Kind.LORA
    assert not child.parent.present
    offers.index.leave(child, Tier.CPU)
    assert len(offers.index) == 0
    assert offers.index.knows(key(1))


def test_a_node_kept_by_its_child_keeps_its_place_until_the_child_goes() -> None:
    offers = Offers()
    parent, child = offers.store(info(1)), offers.store(info(2, 1))
    offers.index.leave(parent, Tier.CPU)
    assert offers.index.get(key(1)) is parent
    assert offers.index.leading([key(1), key(2)], ANY) == []
    assert offers.store(info(1)) is parent
    assert offers.index.leading([key(1), key(2), key(3)], ANY) == [parent, child]
    for node in (child, parent):
        offers.index.leave(node, Tier.CPU)
    assert len(offers.index) == 0


def test_what_a_tier_holds_keeps_its_size_and_checksum() -> None:
    """Another writer's bytes may differ in their last bits; the tier's copy is described by its own checksum."""
    offers = Offers()
    node = offers.store(info(1, size=100), Tier.DISK)
    assert offers.index.insert(ObjectInfo(key(1), b"", Kind.KV, NAMESPACE, 200, 99)) is node
    assert (node.size, node.checksum) == (100, 1)


def test_an_object_that_is_held_gets_no_other_place_in_the_tree() -> None:
    """Its parent counts the children in each tier when they enter and leave: linked in between, it would miscount."""
    offers = Offers()
    parent, node = offers.store(info(1)), offers.store(info(2))
    assert offers.index.insert(info(2, 1)) is node
    offers.index.leave(node, Tier.CPU)
    assert parent.children == [0, 0, 0, 0]


def test_a_lookup_is_a_use_and_ends_at_the_first_gap() -> None:
    offers = Offers()
    nodes = [offers.store(info(number)) for number in range(4)]
    before = [node.tick for node in nodes]
    assert offers.index.leading([key(0), key(1), key(9), key(3)], ANY) == nodes[:2]
    assert [node.tick > tick for node, tick in zip(nodes, before, strict=True)] == [True, True, False, False]


def test_entering_twice_is_a_bug_and_says_so() -> None:
    offers = Offers()
    node = offers.store(info(1))
    with pytest.raises(AssertionError, match="already"):
        offers.index.enter(node, Tier.CPU)
    with pytest.raises(AssertionError, match="not in disk"):
        offers.index.leave(node, Tier.DISK)
    with pytest.raises(AssertionError, match="not held"):
        offers.index.unhold(node)
