# SPDX-License-Identifier: Apache-2.0
"""What requests ask to keep, and priorities: who goes last, for how long, and how much of it one tenant may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache.policy import POLICIES
from loracache.cache.policy.quotas import Quota
from loracache.cache.state.slices import whole
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier
from tests.unit.cache.test_quotas import A, B, Tenants
from tests.unit.conftest import PAGE, Rig, key_of

Make = Callable[..., Rig]
CPU, DISK = Tier.CPU, Tier.DISK


def wish(rig: Rig, *names: object, ttl: float = 0.0, priority: str = "") -> None:
    whole(rig.cache.keeps.wish([key_of(name) for name in names], ttl, priority))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_kept_chain_outlasts_a_flood_and_its_time_runs_out(rig_of: Make, policy: str) -> None:
    rig = rig_of(pages=16, policy=policy)
    rig.chain("a", "b", "c")
    wish(rig, "a", "b", "c", ttl=300)
    for number in range(60):
        assert rig.store(number) == ""
    assert all(rig.node(name) for name in "abc")
    assert rig.count("evict.cpu.kept") == 0
    rig.later(301)
    assert len(rig.cache.keeps) == 0
    assert rig.count("keep.expired") == 3
    for number in range(100, 400):
        assert rig.store(number, number - 1 if number % 2 else None) == ""
        rig.cache.lookup([key_of(number)])
    assert not any(rig.node(name) for name in "abc")


def test_a_use_begins_the_time_anew_and_the_longer_wish_counts(rig_of: Make) -> None:
    rig = rig_of(pages=16)
    rig.chain("a")
    wish(rig, "a", ttl=100)
    wish(rig, "a", ttl=10)
    rig.later(90)
    assert len(rig.cache.keeps) == 1
    rig.cache.lookup([key_of("a")])
    rig.later(90)
    assert len(rig.cache.keeps) == 1
    rig.later(11)
    assert len(rig.cache.keeps) == 0


def test_where_nothing_else_may_go_the_kept_goes_and_is_counted(rig_of: Make) -> None:
    rig = rig_of(pages=4, keep_share=1.0)
    for name in "abcd":
        assert rig.store(name) == ""
    wish(rig, *"abcd", ttl=300)
    assert rig.store("e") == ""
    assert rig.count("evict.cpu.kept") == 1
    assert len(rig.cache.keeps) == 3


def test_a_tenant_may_have_so_much_kept_and_another_as_much(rig_of: Make) -> None:
    rig = rig_of(pages=16)
    tenants = Tenants(rig)
    for tenant in (A, B):
        for number in range(8):
            assert tenants.store(tenant, (tenant.name, number)) == ""
        wish(rig, *((tenant.name, number) for number in range(8)), ttl=300)
    assert rig.count("keep.objects") == 8  # a quarter of sixteen pages each
    assert rig.count("keep.refused") == 8
    for number in range(50):
        assert tenants.store(None, number) == ""
    assert len(tenants.held(CPU, *((A.name, number) for number in range(8)))) == 4
    rig.evict((A.name, 0), (A.name, 1), (A.name, 2), (A.name, 3))
    assert tenants.store(A, "again") == ""
    wish(rig, "again", ttl=300)
    assert rig.count("keep.objects") == 9  # what is gone is no longer counted


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_lower_priorities_go_first(rig_of: Make, policy: str) -> None:
    rig = rig_of(pages=12, policy=policy)
    for name in range(12):
        assert rig.store(name) == ""
    wish(rig, *range(4), priority="high")
    wish(rig, *range(8, 12), priority="low")
    for number in range(4):
        assert rig.store(("new", number)) == ""
    assert [name for name in range(12) if rig.node(name)] == [*range(8)]
    for number in range(40):
        assert rig.store(("more", number)) == ""
    assert [name for name in range(4) if rig.node(name)] == [*range(4)]


def test_ranks_push_nobody_below_a_share_and_kept_ones_count_for_it(rig_of: Make) -> None:
    rig = rig_of(pages=16, keep_share=1.0)
    tenants = Tenants(rig)
    rig.cache.quotas.set(CPU, A, Quota(soft=6 * PAGE))
    for number in range(6):
        assert tenants.store(A, number) == ""
    wish(rig, *range(6), priority="low")
    for number in range(40):
        assert tenants.store(B, ("b", number)) == ""
        wish(rig, ("b", number), ttl=300, priority="high")
    assert tenants.held(CPU, *range(6)) == [*range(6)]


def test_keeping_counts_on_disk_as_in_memory(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=8 * PAGE)
    assert rig.store("a") == ""
    rig.settle()
    wish(rig, "a", ttl=300)
    for number in range(40):
        assert rig.store(number) == ""
        rig.settle()
    node = rig.node("a")
    assert node is not None
    assert node.held_in(DISK)


def test_an_adapter_may_be_kept_and_needs_its_own_room(rig_of: Make) -> None:
    rig = rig_of(pages=8)
    info = ObjectInfo(key_of("lora"), b"", Kind.LORA, bytes(32), PAGE, 0)
    place: Any = whole(rig.cache.reserve(1, b"w", [info], 30.0))[0]
    assert rig.commit(1, b"w", [(info.key, rig.write(place))]) == [""]
    wish(rig, "lora", ttl=300)
    for number in range(30):
        assert rig.store(number) == ""
    assert rig.node("lora") is not None
