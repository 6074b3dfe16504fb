# SPDX-License-Identifier: Apache-2.0
"""Under any sequence of operations, with every policy and in both tiers: quotas are accounted exactly, nobody is pushed
below its share by another's store, nobody stores beyond its limit, and only leaves go."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from loracache.cache.policy import POLICIES, Policy
from loracache.cache.policy.classes import Classes
from loracache.cache.policy.keeps import Keeps
from loracache.cache.policy.limits import Quotas
from loracache.cache.policy.quotas import EVERY, Owner, Quota, Subject
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import Slices, whole
from loracache.errors import UsageError
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier
from tests.unit.cache.test_policies import TIERS, IndexMachine

ROOM = 40
TENANTS = ("", "t1", "t2", "t3")
MODELS = ("m1", "m2")
LORA = bytes(31) + b"L"


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


ADAPTERS = ("", key(1 << 20).hex(), key(1 << 21).hex())
SPACES = {
    bytes([number + 1]) * 32: names
    for number, names in enumerate((t, a, m) for t in TENANTS for a in ADAPTERS for m in MODELS)
}
SUBJECTS = (
    *(Subject("tenant", name) for name in (*TENANTS[1:], EVERY)),
    *(Subject("adapter", name) for name in (*ADAPTERS[1:], EVERY)),
    *(Subject("model", name) for name in (*MODELS, EVERY)),
)


def names_of(namespace: bytes) -> dict[str, tuple[str, ...]] | None:
    if namespace not in SPACES:
        return None
    tenant, adapter, model = SPACES[namespace]
    return {"tenant": (tenant,) * bool(tenant), "adapter": (adapter,) * bool(adapter), "model": (model,)}


class Tree:
    """An index with a policy and quotas for each of two tiers of ROOM bytes. An object takes its size."""

    def __init__(self, make: Callable[..., Policy], room: int = ROOM) -> None:
        self.posted: deque[Callable[[], None]] = deque()
        self.policies: dict[Tier, Policy] = {}
        self.index = Index(lambda tier, node: self.policies[tier].offer(node), lambda node: None)
        self.index.on_used = lambda tier, node, before: self.policies[tier].used(node, before)
        self.index.on_left = lambda tier, node: self.policies[tier].withdraw(node)
        self.index.on_gone = lambda tier, node: self.policies[tier].gone(node)
        self.policies.update({tier: make(self.index, tier, lambda node: node.size) for tier in TIERS})
        self.quotas = Quotas(self.index, self.policies, Slices(self.posted.append))
        self.quotas.names = names_of
        self.quotas.limits.update(dict.fromkeys(TIERS, room))
        self.now = 0.0
        self.keeps = Keeps(self.index, self.quotas, Counters(), room // 3, lambda: self.now)
        self.room = room

    def settle(self) -> None:
        while self.posted:
            self.posted.popleft()()

    def free(self, tier: Tier) -> int:
        return self.room - self.index.bytes[tier]

    def owners(self, tier: Tier) -> dict[Subject, Owner]:
        policy = self.policies[tier]
        return dict(policy.shares.owners) if isinstance(policy, Classes) else {}

    def owners_of(self, tier: Tier, info: Any) -> set[Subject]:
        policy = self.policies[tier]
        return {o.subject for o in policy.shares.group_of(info).owners} if isinstance(policy, Classes) else set()

    def make_room(self, tier: Tier, info: Any, nbytes: int, protected: set[Node]) -> bool:
        policy = self.policies[tier]
        while (missing := nbytes - self.free(tier)) > 0:
            victims, freed = whole(policy.victims(missing, protected, info))
            assert freed == sum(node.size for node in victims)
            if freed < missing:
                return False
            for node in victims:
                assert not node.children[tier], "a parent was to go before its child"
                assert self.index.evictable(node, tier)
                assert policy.may_push(info, node)
                self.index.leave(node, tier)
        return True

    def store(self, tier: Tier, info: ObjectInfo) -> bool:
        node = self.index.get(info.key)
        if node is not None and node.held_in(tier):
            return False
        if self.quotas.refuses(tier, info, info.size):
            return False
        parent = self.index.get(info.parent) if info.parent else None
        if parent is not None and parent.kind is Kind.KV and not parent.held_in(tier):
            return False
        protected = {each for each in (parent, node) if each is not None}
        for each in protected:  # as a lease does
            self.index.hold(each)
        stored = self.make_room(tier, info, info.size, protected)
        if stored:
            node = self.index.insert(info)
            assert node is not None
            self.index.enter(node, tier)
        for each in protected:
            self.index.unhold(each)
        return stored


class QuotaMachine(IndexMachine):
    make: Callable[..., Policy]

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree(type(self).make)
        self.index = self.tree.index
        self.infos: list[ObjectInfo] = []
        self.held: list[Node] = []
        for name in ADAPTERS[1:]:
            self.index.adapters.add(bytes.fromhex(name))

    @initialize(seed=st.integers(0, 2**32))
    def plant(self, seed: int) -> None:
        """Quotas, and tiers that are full or nearly so."""
        chance = random.Random(seed)
        for subject in chance.sample(SUBJECTS, 3):
            self.set_quota(subject, chance.choice(TIERS), chance.randrange(ROOM // 3), chance.choice((None, 0, 4)))
        for _ in range(chance.randrange(60)):
            if chance.randrange(8):
                self.store(chance.randrange(24), chance.randrange(5), chance.randrange(1, 6), chance.choice(TIERS))
            else:
                self.store_adapter(chance.choice(ADAPTERS[1:]), chance.randrange(1, 5), chance.choice(TIERS))

    @rule(space=st.integers(0, 23), sizes=st.lists(st.integers(1, 6), max_size=20), tier=st.sampled_from(TIERS))
    def flood(self, space: int, sizes: list[int], tier: Tier) -> None:
        for size in sizes:
            self.store(space, size % 3, size, tier)

    @rule(space=st.integers(0, 23), up=st.integers(0, 4), size=st.integers(1, 6), tier=st.sampled_from(TIERS))
    def store(self, space: int, up: int, size: int, tier: Tier) -> None:
        namespace = list(SPACES)[space]
        mine = [info for info in self.infos if info.namespace == namespace and self.index.get(info.key)]
        parent = mine[-up].key if 0 < up <= len(mine) else bytes.fromhex(SPACES[namespace][1])
        info = ObjectInfo(key(len(self.infos)), parent, Kind.KV, namespace, size, 0)
        self.infos.append(info)
        self.put(tier, info)

    @rule(adapter=st.sampled_from(ADAPTERS[1:]), size=st.integers(1, 4), tier=st.sampled_from(TIERS))
    def store_adapter(self, adapter: str, size: int, tier: Tier) -> None:
        node = self.index.get(bytes.fromhex(adapter))
        self.put(
            tier,
            ObjectInfo(bytes.fromhex(adapter), b"", Kind.LORA, LORA, node.size if node and node.present else size, 0),
        )

    @rule(space=st.integers(0, 23), adapter=st.sampled_from(ADAPTERS), size=st.integers(1, 4))
    def find(self, space: int, adapter: str, size: int) -> None:
        """On disk, left by an earlier run: nobody asked whether it may be there."""
        info = ObjectInfo(key(len(self.infos)), b"", Kind.KV, list(SPACES)[space], size, 0)
        if adapter and self.index.get(bytes.fromhex(adapter)) is None:
            info = ObjectInfo(bytes.fromhex(adapter), b"", Kind.LORA, LORA, size, 0)
        if self.tree.free(Tier.DISK) >= size:
            self.infos.append(info)
            node = self.index.insert(info)
            assert node is not None
            self.index.enter(node, Tier.DISK)

    @rule(data=st.data(), tier=st.sampled_from(TIERS))
    def store_again(self, data: st.DataObject, tier: Tier) -> None:
        known = [info for info in self.infos if (node := self.index.get(info.key)) is not None and node.present]
        if known:
            self.put(tier, data.draw(st.sampled_from(known)))

    def put(self, tier: Tier, info: ObjectInfo) -> None:
        """A store, which pushes no other's owner below its share and brings none beyond its limit."""
        before = {subject: owner.bytes for subject, owner in self.tree.owners(tier).items()}
        mine = self.tree.owners_of(tier, info)
        stored = self.tree.store(tier, info)
        for subject, owner in self.tree.owners(tier).items():
            if subject not in mine:
                assert owner.bytes >= min(before[subject], owner.soft), f"{subject} was pushed below its share"
            elif stored and owner.hard is not None:
                assert owner.bytes <= owner.hard

    @rule(data=st.data(), tier=st.sampled_from(TIERS))
    def leave(self, data: st.DataObject, tier: Tier) -> None:
        node = self.some(data)
        if node is not None and self.index.evictable(node, tier) and not node.children[tier]:
            self.index.leave(node, tier)

    @rule(data=st.data(), amount=st.integers(-2, 2))
    def resize(self, data: st.DataObject, amount: int) -> None:
        """As when an object of the disk is compressed; here both tiers keep it so."""
        node = self.some(data)
        if node is not None and node.present == 1 << Tier.DISK and node.size + amount > 0:
            if self.tree.free(Tier.DISK) < amount:
                return
            self.index.resize(node, Tier.DISK, amount)
            self.index.bytes[Tier.DISK] += amount
            self.index.spaces[node.namespace].bytes[Tier.DISK] += amount
            node.size += amount

    @rule(
        subject=st.sampled_from(SUBJECTS),
        tier=st.sampled_from(TIERS),
        soft=st.integers(0, ROOM),
        more=st.none() | st.integers(0, ROOM),
    )
    def set_quota(self, subject: Subject, tier: Tier, soft: int, more: int | None) -> None:
        quota = Quota(soft, None if more is None else soft + more)
        given = sum(q.soft for t, s, q, _ in self.tree.quotas.all() if t is tier and s.name != EVERY and s != subject)
        if subject.name != EVERY and given + soft > ROOM:
            with pytest.raises(UsageError, match="add up"):
                self.tree.quotas.set(tier, subject, quota)
            return
        self.tree.quotas.set(tier, subject, quota)

    @rule(subject=st.sampled_from(SUBJECTS), tier=st.sampled_from(TIERS))
    def remove_quota(self, subject: Subject, tier: Tier) -> None:
        there = any(t is tier and s == subject for t, s, _, _ in self.tree.quotas.all())
        assert self.tree.quotas.remove(tier, subject) is there

    @rule(data=st.data(), ttl=st.sampled_from((0.0, 5.0)), priority=st.sampled_from(("", "low", "normal", "high")))
    def wish(self, data: st.DataObject, ttl: float, priority: str) -> None:
        if node := self.some(data):
            whole(self.tree.keeps.wish([node.key], ttl, priority))  # type: ignore[arg-type]

    @rule(adapter=st.sampled_from(ADAPTERS[1:]), priority=st.sampled_from(("low", "normal", "high")))
    def name(self, adapter: str, priority: str) -> None:
        self.tree.keeps.name(bytes.fromhex(adapter), priority)

    @rule(seconds=st.sampled_from((1.0, 6.0)))
    def wait(self, seconds: float) -> None:
        self.tree.now += seconds
        self.tree.keeps.tick()

    @invariant()
    def what_is_kept_is_held_and_within_its_tenants_budget(self) -> None:
        assert all(self.index.get(node.key) is node and node.present for node in self.tree.keeps._kept)
        assert all(nbytes <= ROOM // 3 for nbytes in self.tree.keeps._bytes.values())

    @rule()
    def settle(self) -> None:
        self.tree.settle()

    @invariant()
    def accounts_are_exact(self) -> None:
        for tier in TIERS:
            taken: dict[bytes, int] = {}
            for node in self.index:
                if node.held_in(tier):
                    taken[node.namespace] = taken.get(node.namespace, 0) + node.size
            for namespace, space in self.index.spaces.items():
                assert space.taken[tier] == taken.get(namespace, 0)
            if self.tree.posted:  # the accounts follow a quota that was given or ended in slices
                continue
            for subject, owner in self.tree.owners(tier).items():
                held = [node for node in self.index if node.held_in(tier)]
                assert owner.bytes == sum(node.size for node in held if subject in self.tree.owners_of(tier, node)), (
                    subject
                )
                assert owner.coming == 0
        assert list(self.tree.quotas.audit()) == []

    @invariant()
    def shares_fit(self) -> None:
        for tier in TIERS:
            assert sum(owner.soft for owner in self.tree.owners(tier).values()) <= ROOM

    @invariant()
    def candidates_stand_where_they_belong(self) -> None:
        for tier in TIERS:
            policy = self.tree.policies[tier]
            if not isinstance(policy, Classes) or self.tree.posted:
                continue
            for node in self.index:
                if node.offered >> tier & 1:
                    assert policy._standing.get(node, policy._base) is policy._part(node)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_quotas_hold_under_any_sequence_of_operations(policy: str) -> None:
    machine = type("Machine", (QuotaMachine,), {"make": staticmethod(POLICIES[policy])})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


def test_candidates_of_a_namespace_that_was_just_met_are_looked_at_once() -> None:
    """A quota is carried out in slices. An object that changes before then has its namespace's owners looked up, and
    the others of that namespace stand where they stood."""
    state = type("Machine", (QuotaMachine,), {"make": staticmethod(POLICIES["lru"])})()
    state.find(next(at for at, names in enumerate(SPACES.values()) if names[0] == "t3"), "", 1)
    (node,) = [node for node in state.index if node.held_in(Tier.DISK)]
    state.tree.quotas._of(Tier.DISK).shares.set(Subject("tenant", "t3"), Quota(0))
    state.index.resize(node, Tier.DISK, 0)
    shares = state.tree.policies[Tier.DISK].shares
    assert shares.renew(node.namespace, Kind.KV)
    assert not shares.renew(node.namespace, Kind.KV)
