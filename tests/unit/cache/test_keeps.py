# SPDX-License-Identifier: Apache-2.0
"""What requests ask to keep, and priorities: who goes last, for how long, and how much of it one tenant may have."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from loracache.cache.policy import POLICIES
from loracache.cache.policy.classes import HIGH, NORMAL
from loracache.cache.policy.quotas import Quota
from loracache.cache.state.slices import whole
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier
from tests.unit.cache.test_quota_machine import ADAPTERS, LORA, SPACES, names_of
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


# -- priorities of names -----------------------------------------------------------------------------------------------


def put(rig: Rig, info: ObjectInfo) -> None:
    place: Any = whole(rig.cache.reserve(1, b"w", [info], 30.0))[0]
    assert rig.commit(1, b"w", [(info.key, rig.write(place))]) == [""]


def served(rig: Rig, adapter: str, chunks: int = 2) -> list[bytes]:
    """Keys of an adapter's weights and of KV that was computed with it, in memory, a page each."""
    rig.cache.quotas.names = names_of
    (space,) = (each for each, names in SPACES.items() if names == ("t1", adapter, "m1"))
    keys = [bytes.fromhex(adapter), *(key_of((adapter, number)) for number in range(chunks))]
    put(rig, ObjectInfo(keys[0], b"", Kind.LORA, LORA, PAGE, 0))
    for above, key in pairwise(keys):
        put(rig, ObjectInfo(key, above, Kind.KV, space, PAGE, 0))
    return keys


def held(rig: Rig, keys: list[bytes]) -> list[bytes]:
    return [key for key in keys if (node := rig.cache.index.get(key)) is not None and node.held_in(CPU)]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("before", [True, False])
def test_what_is_of_an_adapter_goes_as_its_name_says(rig_of: Make, policy: str, before: bool) -> None:
    """Whether the priority was given before it was stored, or after."""
    rig = rig_of(pages=12, policy=policy)
    high, low = (bytes.fromhex(each) for each in ADAPTERS[1:])

    def name() -> None:
        rig.cache.keeps.name(high, "high")
        rig.cache.keeps.name(low, "low")
        rig.settle()

    if before:
        name()
    precious, cheap = served(rig, ADAPTERS[1]), served(rig, ADAPTERS[2])
    if not before:
        name()
    for number in range(9):  # six pages are free
        assert rig.store(number) == ""
    assert held(rig, cheap) == []
    for number in range(30):
        assert rig.store(("more", number)) == ""
    assert held(rig, precious) == precious
    rig.cache.keeps.name(high, "normal")
    rig.settle()
    for number in range(100):
        assert rig.store(("last", number)) == ""
        rig.cache.lookup([key_of(("last", number))])
    assert held(rig, precious[1:]) == []  # the weights may stay: adaptive has a part of the tier for them


def test_what_a_request_said_of_its_kv_comes_before_its_adapters_name(rig_of: Make) -> None:
    rig = rig_of(pages=12)
    keys = served(rig, ADAPTERS[1])
    rig.cache.keeps.name(keys[0], "low")
    whole(rig.cache.keeps.wish(keys[1:], 0.0, "high"))  # type: ignore[arg-type]
    rig.settle()
    for number in range(40):
        assert rig.store(number) == ""
    assert held(rig, keys) == keys


def test_kv_found_on_disk_before_its_namespace_was_told_of_ranks_when_it_is(rig_of: Make) -> None:
    rig = rig_of(pages=12)
    keys = served(rig, ADAPTERS[1])
    told = rig.cache.quotas.names
    rig.cache.quotas.names = lambda namespace: None
    rig.cache.keeps.name(keys[0], "high")
    rig.settle()
    node = rig.cache.index.get(keys[1])
    assert node is not None
    assert rig.cache.keeps.rank(node) == NORMAL
    rig.cache.quotas.names = told
    rig.cache.quotas.learned(node.namespace)
    rig.settle()
    assert rig.cache.keeps.rank(node) == HIGH
    for number in range(40):
        assert rig.store(number) == ""
    assert held(rig, keys) == keys
