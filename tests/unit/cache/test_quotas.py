# SPDX-License-Identifier: Apache-2.0
"""Quotas in the cache: shares that nobody pushes, limits that refuse, in memory and on disk, with every policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from loracache.cache.policy import POLICIES
from loracache.cache.policy.quotas import EVERY, Owner, Quota, Subject
from loracache.cache.state.index import Node
from loracache.cache.state.leases import Writing
from loracache.cache.state.slices import whole
from loracache.control.recount import Recount
from loracache.errors import UsageError
from loracache.results import Cause
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier
from tests.unit.cache.test_quota_machine import ADAPTERS, LORA, SPACES, Tree, key, names_of
from tests.unit.conftest import PAGE, Rig, key_of, payload_of

Make = Callable[..., Rig]
CPU, DISK = Tier.CPU, Tier.DISK
A, B = (Subject("tenant", name) for name in ("t1", "t2"))
SPACE_OF = {names: namespace for namespace, names in SPACES.items()}
SPACE = {subject: SPACE_OF[(subject.name, "", "m1")] for subject in (A, B)} | {None: SPACE_OF[("", "", "m1")]}


class Tenants:
    """What tenants store in a rig, a page an object."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.cache.quotas.names = names_of

    def info(self, tenant: Subject | None, name: object, parent: object = None) -> ObjectInfo:
        above = b"" if parent is None else key_of(parent)
        return ObjectInfo(key_of(name), above, Kind.KV, SPACE[tenant], PAGE, 0)

    def reserve(self, tenant: Subject | None, name: object, lease: bytes = b"s") -> Writing | Cause:
        return whole(self.rig.cache.reserve(1, lease, [self.info(tenant, name)], 30.0))[0]

    def store(self, tenant: Subject | None, name: object, parent: object = None) -> Cause:
        (place,) = whole(self.rig.cache.reserve(1, b"s", [self.info(tenant, name, parent)], 30.0))
        if not isinstance(place, Writing):
            return place
        (cause,) = whole(self.rig.cache.commit(1, b"s", [(place.info.key, self.rig.write(place))]))
        return cause

    def held(self, tier: Tier, *names: object) -> list[object]:
        nodes = {name: self.rig.node(name) for name in names}
        return [name for name, node in nodes.items() if node is not None and node.held_in(tier)]

    def owner(self, tier: Tier, subject: Subject) -> Owner:
        return next(owner for t, s, _, owner in self.rig.cache.quotas.all() if (t, s) == (tier, subject) and owner)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("tier", [CPU, DISK])
def test_no_flood_of_another_tenant_pushes_one_below_its_share(rig_of: Make, policy: str, tier: Tier) -> None:
    rig = rig_of(pages=16, disk=16 * PAGE, policy=policy)
    tenants = Tenants(rig)
    rig.cache.quotas.set(tier, A, Quota(soft=6 * PAGE))
    for number in range(10):  # four more than its share
        assert tenants.store(A, number) == ""
        rig.settle()
    for number in range(100):
        parent = ("flood", number - 1) if number % 3 else None
        tenants.store(B, ("flood", number), parent)
        if number % 2:
            rig.cache.lookup([key_of(("flood", number))])
        rig.settle()
        assert tenants.owner(tier, A).bytes >= 6 * PAGE
    assert tenants.owner(tier, A).bytes == 6 * PAGE
    assert len(tenants.held(tier, *range(10))) == 6
    assert rig.count(f"evict.{tier.label}.over_quota") == 4
    other = DISK if tier is CPU else CPU  # where it has no share
    assert len(tenants.held(other, *range(10))) < 6


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_above_its_share_a_tenants_own_objects_go_first(rig_of: Make, policy: str) -> None:
    rig = rig_of(pages=16, policy=policy)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(soft=4 * PAGE))
    for number in range(8):
        assert tenants.store(None, ("rest", number)) == ""
    for number in range(40):
        assert tenants.store(A, number) == ""
        rig.settle()
    assert tenants.held(CPU, *(("rest", number) for number in range(8))) == [("rest", number) for number in range(8)]
    assert tenants.owner(CPU, A).bytes == 8 * PAGE


def test_below_its_share_a_tenant_takes_what_is_above_anothers(rig_of: Make) -> None:
    rig = rig_of(pages=16)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(soft=8 * PAGE))
    rig.cache.quotas.set(CPU, B, Quota(soft=8 * PAGE))
    for number in range(16):
        assert tenants.store(B, ("b", number)) == ""
    for number in range(20):
        assert tenants.store(A, number) == ""
    assert [tenants.owner(CPU, each).bytes for each in (A, B)] == [8 * PAGE, 8 * PAGE]
    assert tenants.held(CPU, *range(20)) == [*range(12, 20)]


def test_one_in_use_or_pinned_stays_and_another_is_not_pushed_for_it(rig_of: Make) -> None:
    rig = rig_of(pages=4)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(soft=2 * PAGE))
    for name in "ab":
        assert tenants.store(A, name) == ""
    for name in "cd":
        assert tenants.store(B, name) == ""
    rig.cache.pins.pin([key_of("c"), key_of("d")], CPU)
    assert tenants.store(B, "e") is Cause.FULL
    assert tenants.held(CPU, *"abcd") == [*"abcd"]


def test_a_queued_write_of_one_at_its_share_is_not_given_up_for_another(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=64 * PAGE)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(soft=2 * PAGE))
    for name in "ab":
        assert tenants.store(A, name) == ""  # queued, and nobody writes
    for name in "cdef":
        assert tenants.store(None, name) == ""
    assert tenants.held(CPU, *"ab") == [*"ab"]
    rig.settle()


def test_a_store_beyond_the_limit_is_refused_and_counted(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=64 * PAGE)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(hard=3 * PAGE))
    rig.cache.quotas.set(DISK, A, Quota(hard=2 * PAGE))
    assert [tenants.store(A, number) for number in range(5)] == ["", "", "", Cause.OVER_QUOTA, Cause.OVER_QUOTA]
    rig.settle()
    assert tenants.held(CPU, *range(5)) == [0, 1, 2]
    assert tenants.held(DISK, *range(5)) == [0, 1]
    assert rig.count("store.refused.over_quota") == 2
    assert rig.count("write.disk.dropped.over_quota") == 1
    assert tenants.owner(CPU, A).refused == 2
    assert tenants.owner(DISK, A).refused == 1
    assert tenants.store(B, "b") == ""


def test_what_is_being_written_counts_for_the_limit_until_it_is_given_up(rig_of: Make) -> None:
    rig = rig_of(pages=16)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(hard=2 * PAGE))
    assert isinstance(tenants.reserve(A, 1, b"1"), Writing)
    assert isinstance(tenants.reserve(A, 2, b"2"), Writing)
    assert tenants.reserve(A, 3, b"3") is Cause.OVER_QUOTA
    rig.cache.leases.release(1, b"1")
    assert isinstance(tenants.reserve(A, 3, b"3"), Writing)
    rig.later(60)  # both leases end
    rig.cache.leases.writer_gone(1)
    assert tenants.owner(CPU, A).coming == 0
    assert tenants.store(A, 4) == ""


def test_what_is_raised_at_the_limit_takes_the_room_of_its_owners_own(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=64 * PAGE)
    tenants = Tenants(rig)
    for number in range(4):
        assert tenants.store(A, number) == ""
    rig.settle()
    assert rig.evict(*range(2))[0] == 2
    rig.cache.quotas.set(CPU, A, Quota(hard=2 * PAGE))
    assert rig.get(0) == payload_of(key_of(0), PAGE)
    assert tenants.held(CPU, *range(4)) == [0, 3]
    rig.cache.pins.pin([key_of(0), key_of(3)], CPU)
    assert rig.get(1) is Cause.OVER_QUOTA
    assert tenants.owner(CPU, A).bytes == 2 * PAGE


def test_a_default_is_everybodys_who_has_none_and_its_shares_are_halved_until_they_fit(rig_of: Make) -> None:
    rig = rig_of(pages=16)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(soft=8 * PAGE))
    rig.cache.quotas.set(CPU, Subject("tenant", EVERY), Quota(soft=6 * PAGE, hard=7 * PAGE))
    SPACE[three := Subject("tenant", "t3")] = SPACE_OF[("t3", "", "m1")]
    assert tenants.store(B, "b") == ""
    shares = rig.cache._policies[CPU].shares  # type: ignore[attr-defined]
    assert (shares.owners[B].soft, shares.owners[B].hard) == (6 * PAGE, 7 * PAGE)
    assert tenants.store(three, "c") == ""
    assert (shares.owners[B].soft, shares.owners[three].soft) == (3 * PAGE, 3 * PAGE)
    assert shares.owners[A].soft == 8 * PAGE
    rig.evict("c")
    assert three not in shares.owners  # what holds nothing is forgotten
    assert shares.owners[B].soft == 6 * PAGE
    rig.cache.quotas.set(CPU, B, Quota(soft=PAGE))
    assert shares.owners[B].soft == PAGE


def test_shares_that_do_not_fit_are_refused_with_words(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=64 * PAGE, redis=True)
    quotas = rig.cache.quotas
    quotas.set(CPU, A, Quota(soft=10 * PAGE))
    with pytest.raises(UsageError, match=rf"soft={7 * PAGE}: .*add up to {17 * PAGE} .*give at most {6 * PAGE}"):
        quotas.set(CPU, B, Quota(soft=7 * PAGE))
    with pytest.raises(UsageError, match="hard=1 is less than soft=2"):
        quotas.set(CPU, B, Quota(2, 1))
    with pytest.raises(UsageError, match="redis_max_bytes"):
        quotas.set(Tier.REDIS, B, Quota(2))
    quotas.set(CPU, A, Quota(soft=16 * PAGE))  # in the place of the first
    assert quotas.remove(CPU, A)
    assert not quotas.remove(CPU, A)
    quotas.set(CPU, B, Quota(soft=16 * PAGE))


def test_an_adapters_quota_counts_its_weights_and_its_kv(rig_of: Make) -> None:
    tree = Tree(POLICIES["lru"])
    adapter = ADAPTERS[1]
    weights = ObjectInfo(bytes.fromhex(adapter), b"", Kind.LORA, LORA, 3, 0)
    chunk = ObjectInfo(key(1), weights.key, Kind.KV, SPACE_OF[("t1", adapter, "m1")], 2, 0)
    for given_first in (True, False):
        subject = Subject("adapter", adapter)
        if given_first:
            tree.quotas.set(CPU, subject, Quota(soft=10))
        for info in (weights, chunk):  # entered without anybody having asked, as from disk
            node = tree.index.insert(info)
            assert node is not None
            tree.index.enter(node, CPU)
        if not given_first:
            tree.quotas.set(CPU, subject, Quota(soft=10))
        tree.settle()
        (owner,) = (owner for *_, owner in tree.quotas.all() if owner is not None)
        assert owner.bytes == 5
        for key_ in (chunk.key, weights.key):
            gone = tree.index.get(key_)
            assert gone is not None
            tree.index.leave(gone, CPU)
        assert owner.bytes == 0
        tree.quotas.remove(CPU, subject)
        tree.settle()


def test_a_namespace_that_is_told_of_later_is_counted_then(rig_of: Make) -> None:
    rig = rig_of(pages=16)
    tenants = Tenants(rig)
    rig.cache.quotas.names = lambda namespace: None
    rig.cache.quotas.set(CPU, A, Quota(soft=4 * PAGE))
    assert tenants.store(A, 1) == ""
    assert tenants.owner(CPU, A).bytes == 0
    rig.cache._policies[CPU].shares._names = names_of  # type: ignore[attr-defined]
    rig.cache.quotas.learned(SPACE[A])
    rig.answer()
    assert tenants.owner(CPU, A).bytes == PAGE


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_choice_among_many_owners_looks_at_few(policy: str) -> None:
    """2,000 tenants, each above its share: what a choice takes does not grow with them."""
    owners, each = 2000, 10
    tree = Tree(POLICIES[policy], owners * each)
    tree.quotas.names = lambda namespace: {"tenant": (namespace.hex(),)}
    tree.quotas.set(CPU, Subject("tenant", EVERY), Quota(soft=2))
    number = 0
    for owner in range(owners):
        for _ in range(each):
            node = tree.index.insert(ObjectInfo(key(number), b"", Kind.KV, key(owner), 1, 0))
            assert node is not None
            tree.index.enter(node, CPU)
            number += 1
    taken = []
    for turn in range(300):
        info = ObjectInfo(key(number), b"", Kind.KV, key(turn), 1, 0)
        begun = time.perf_counter()
        assert tree.make_room(CPU, info, 3, set())
        taken.append(time.perf_counter() - begun)
        node = tree.index.insert(info)
        assert node is not None
        tree.index.enter(node, CPU)
        number += 1
    assert sorted(taken)[150] < 0.002, "half of the choices of three take less; on an idle core 50 us"


def test_quotas_are_given_to_many_objects_in_slices() -> None:
    tree = Tree(POLICIES["lru"], 100_000)
    space = SPACE[A]
    nodes: list[Node] = []
    for number in range(5000):
        node = tree.index.insert(ObjectInfo(key(number), b"", Kind.KV, space, 1, 0))
        assert node is not None
        tree.index.enter(node, CPU)
        nodes.append(node)
    tree.quotas.set(CPU, A, Quota(soft=10))
    assert tree.posted, "it is over at once, however many there are"
    shares = tree.policies[CPU].shares  # type: ignore[attr-defined]
    assert shares.owners[A].bytes == 5000  # exact from the first slice on
    tree.index.leave(nodes[4999], CPU)
    tree.index.touch(nodes[4998])
    tree.settle()
    assert shares.owners[A].bytes == 4999
    ticks = [node.tick for node in whole(tree.policies[CPU].victims(4999, ()))[0]]
    assert all(one < two for one, two in pairwise(ticks)), "and each stands where its last use put it"


def test_a_count_anew_finds_an_owner_whose_bytes_are_wrong(rig_of: Make) -> None:
    rig = rig_of(pages=16)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(soft=4 * PAGE))
    assert tenants.store(A, 1) == ""
    assert whole(Recount(rig.cache).run())["faults"] == 0
    tenants.owner(CPU, A).bytes += 1
    found = whole(Recount(rig.cache).run())
    assert (found["faults"], found["examples"][0][1]) == (
        1,
        f"of tenant t1, said to take {PAGE + 1} bytes of cpu, not {PAGE}",
    )
    tenants.owner(CPU, A).bytes -= 1
    rig.cache.index.spaces[SPACE[A]].taken[CPU] += 1
    assert whole(Recount(rig.cache).run())["faults"] == 2
    rig.cache.index.spaces[SPACE[A]].taken[CPU] -= 1
