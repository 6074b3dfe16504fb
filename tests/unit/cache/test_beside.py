# SPDX-License-Identifier: Apache-2.0
"""Objects beside a chain, of layers that do not read all of a prefix: they hang under their chunk's object, in every
tier, and neither make a chain look hotter than it is nor come up where nobody needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loracache.cache.policy import POLICIES
from loracache.cache.policy.lower_shadow import SHARES
from loracache.cache.policy.quotas import Quota, Subject
from loracache.cache.state.leases import Writing
from loracache.cache.state.slices import whole
from loracache.cache.swap.swapper import Swapper, SwapSettings
from loracache.cache.tiered import OPERATOR
from loracache.results import Refusal
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

PAGE = 4096
CPU, DISK, REDIS = Tier.CPU, Tier.DISK, Tier.REDIS
Make = Callable[..., Any]


def beside(rig: Any, name: object, chunk: object) -> ObjectInfo:
    info: ObjectInfo = replace(rig.info(name, chunk), kind=Kind.BESIDE)
    return info


def chunk_infos(rig: Any, count: int, of: str = "", first: int = 0) -> list[ObjectInfo]:
    """a0, w0, s0, a1, w1, s1, ...: of each chunk the chain's object, and a window and a state beside it."""
    infos: list[ObjectInfo] = []
    for at in range(first, first + count):
        chunk = f"{of}a{at}"
        infos.append(rig.info(chunk, f"{of}a{at - 1}" if at else None))
        infos += [beside(rig, f"{of}{kind}{at}", chunk) for kind in "ws"]
    return infos


def store_all(rig: Any, infos: list[ObjectInfo], lease: bytes = b"all") -> list[str]:
    """Reserved, written and committed in one call each."""
    answers = whole(rig.cache.reserve(1, lease, infos, 30.0))
    written = [(each.info.key, rig.write(each)) for each in answers if isinstance(each, Writing)]
    if not written:
        return [str(each) for each in answers]
    done = iter(rig.commit(1, lease, written))
    return [next(done) if isinstance(each, Writing) else str(each) for each in answers]


def held(rig: Any, tier: Tier, *names: object) -> list[bool]:
    return [(node := rig.node(name)) is not None and node.held_in(tier) for name in names]


# -- storing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["by chunk", "chain first", "beside first within a chunk's reach"])
def test_a_chunk_and_what_is_beside_it_are_stored_in_one_call(rig_of: Make, order: str) -> None:
    rig = rig_of(pages=16, disk=1 << 20, redis=True)
    infos = chunk_infos(rig, 3)
    if order == "chain first":
        infos.sort(key=lambda info: info.kind is Kind.BESIDE)
    elif order != "by chunk":
        infos = [infos[0], infos[3], infos[1], infos[4], infos[6], infos[2], infos[5], infos[7], infos[8]]
    assert store_all(rig, infos) == [""] * 9
    assert rig.node("w2").parent is rig.node("s2").parent is rig.node("a2")
    assert rig.node("a2").parent is rig.node("a1")
    assert [rig.node(name).kind for name in ("a1", "w1")] == [Kind.KV, Kind.BESIDE]
    assert store_all(rig, infos) == ["exists"] * 9


def test_in_more_than_a_slice_too(rig_of: Make) -> None:
    rig = rig_of(pages=1024)
    infos = chunk_infos(rig, 200)
    assert store_all(rig, infos) == [""] * 600
    assert rig.cache.index.beside[CPU] == 400
    assert store_all(rig, chunk_infos(rig, 1, first=200)) == [""] * 3


def test_what_is_beside_a_chunk_that_has_no_room_is_refused_with_it(rig_of: Make) -> None:
    rig = rig_of(pages=4)
    answers = whole(rig.cache.reserve(1, b"w", chunk_infos(rig, 2), 30.0))
    assert [isinstance(each, Writing) for each in answers] == [True] * 4 + [False] * 2  # room for a1 alone
    answers = whole(rig.cache.reserve(2, b"w2", chunk_infos(rig, 1, of="other "), 30.0))
    assert answers == ["full", "no_parent", "no_parent"]
    rig.release(lease=b"w")


def test_beside_a_chunk_that_was_not_committed_there_is_nothing(rig_of: Make) -> None:
    rig = rig_of()
    _, window, _ = whole(rig.cache.reserve(1, b"w", chunk_infos(rig, 1), 30.0))
    assert rig.commit(1, b"w", [(window.info.key, rig.write(window))]) == ["no_parent"]
    assert len(rig.cache.index) == 0


def test_a_model_without_full_attention_has_roots_alone(rig_of: Make) -> None:
    rig = rig_of(pages=4, disk=3 * PAGE, redis=True)
    states = [replace(rig.info(f"s{at}"), kind=Kind.BESIDE) for at in range(6)]
    assert store_all(rig, states[:3]) == [""] * 3
    assert all(rig.node(f"s{at}").is_root for at in range(3))
    rig.settle()
    rig.cache.where([info.key for info in states[:3]])
    rig.acquire("s0")
    rig.release()
    assert store_all(rig, states[3:5], b"more") == [""] * 2
    assert held(rig, CPU, "s0", "s1", "s2", "s3", "s4") == [True, False, True, True, True]  # s0 was read
    rig.settle()
    assert rig.cache.disk.used <= 3 * PAGE
    adapter = rig.info("adapter").key
    rig.cache.index.adapters.add(adapter)
    below = replace(rig.info("s9", "adapter"), kind=Kind.BESIDE)
    assert store_all(rig, [below], b"lora") == [""]
    assert rig.node("s9").parent.key == adapter


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_is_beside_a_chunk_leaves_before_it_and_the_chain_from_its_end(rig_of: Make, policy: str) -> None:
    rig = rig_of(pages=12, policy=policy)
    store_all(rig, chunk_infos(rig, 4))
    gone: list[str] = []
    names = {rig.info(f"{kind}{at}").key: f"{kind}{at}" for kind in "aws" for at in range(4)}
    told = rig.cache.index.on_change

    def changed(node: Any, tier: Tier, entered: bool, cause: str) -> None:
        told(node, tier, entered, cause)
        if not entered:
            gone.append(names[node.key])

    rig.cache.index.on_change = changed
    for at in range(12):
        assert rig.store(f"x{at}") == ""
    assert len(gone) == 12
    for at in range(4):
        assert gone.index(f"a{at}") > max(gone.index(f"w{at}"), gone.index(f"s{at}"))
        assert at == 3 or gone.index(f"a{at}") > gone.index(f"a{at + 1}")


def test_evicting_a_chunk_takes_what_is_beside_it_and_behind_it(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20, redis=True)
    store_all(rig, chunk_infos(rig, 3))
    rig.settle()
    tiers = [CPU, DISK, REDIS]
    assert rig.evict("w2", tiers=tiers) == (2, 2 * PAGE, 0)  # cpu's and the disk's
    assert rig.evict("a1", tiers=tiers) == (10, 10 * PAGE, 0)
    rig.settle()
    assert held(rig, CPU, "a0", "w0", "s0", "a1", "w1", "s2") == [True] * 3 + [False] * 3
    assert set(rig.redis.held()) == set(rig.disk.held()) == {rig.info(name).key for name in ("a0", "w0", "s0")}


@pytest.mark.parametrize("tier", [CPU, DISK])
def test_a_pin_beside_a_chunk_keeps_the_chain_up_to_it(rig_of: Make, tier: Tier) -> None:
    rig = rig_of(pages=9, disk=9 * PAGE)
    store_all(rig, chunk_infos(rig, 3))
    rig.settle()
    assert rig.cache.pins.pin([rig.info("w1").key], tier) == 1
    assert rig.evict("a0", tiers=[tier]) == (6, 6 * PAGE, 3)
    assert held(rig, tier, "a0", "a1", "w1", "a2", "s1", "w0") == [True, True, True, False, False, False]
    assert rig.cache.pins.unpin([rig.info("w1").key], tier) == 1
    assert rig.evict("a0", tiers=[tier])[2] == 0


def test_what_is_read_beside_a_chunk_stays_and_the_rest_may_go(rig_of: Make) -> None:
    rig = rig_of(pages=9)
    store_all(rig, chunk_infos(rig, 3))
    rig.acquire("w2", "s2")
    assert [rig.store(f"x{at}") for at in range(4)] == [""] * 4
    assert held(rig, CPU, "w2", "s2", "a2", "a1", "a0") == [True] * 5
    assert held(rig, CPU, "w0", "s0", "w1", "s1") == [False] * 4


def test_a_quota_counts_what_is_beside_a_chain(rig_of: Make) -> None:
    rig = rig_of(pages=32)
    rig.cache.quotas.names = lambda namespace: {"tenant": ("t",), "adapter": (), "model": ()}
    rig.cache.quotas.set(CPU, Subject("tenant", "t"), Quota(0, 5 * PAGE))
    answers = store_all(rig, chunk_infos(rig, 2))
    assert answers == [""] * 5 + ["over_quota"]
    ((_, _, _, owner),) = rig.cache.quotas.all()
    assert owner.bytes == 5 * PAGE
    rig.evict("a0")
    assert owner.bytes == 0
    assert list(rig.cache.quotas.audit()) == []


# -- below memory ------------------------------------------------------------------------------------------------------


def test_a_chunk_is_written_before_what_is_beside_it(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20, redis=True)
    infos = chunk_infos(rig, 3)
    store_all(rig, infos)
    rig.settle()
    for backend in (rig.disk, rig.redis):
        assert backend.stored == [info.key for info in infos]
        assert [backend.held()[info.key].kind for info in infos] == [info.kind for info in infos]


def test_what_is_beside_a_chunk_that_was_given_up_is_not_written_either(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=2 * PAGE)
    store_all(rig, chunk_infos(rig, 2))
    rig.settle()
    assert rig.cache.disk.used <= 2 * PAGE
    on_disk = rig.disk.held()
    assert all(not info.parent or info.parent in on_disk for info in on_disk.values())


@pytest.mark.parametrize("order", ["as written", "children first"])
def test_an_earlier_run_s_objects_are_found_with_what_is_beside_them(rig_of: Make, order: str) -> None:
    rig = rig_of(pages=16, disk=1 << 20, scanned=False)
    infos = [replace(info, checksum=7) for info in chunk_infos(rig, 3)]
    waiting = infos if order == "as written" else infos[::-1]
    for _ in range(5):
        waiting = rig.cache.disk.adopt(waiting)
    assert waiting == []
    rig.cache.disk.adopted_all([])
    assert held(rig, DISK, "a2", "w0", "s2") == [True] * 3
    assert rig.node("w1").parent is rig.node("a1")
    assert (rig.cache.index.objects[DISK], rig.cache.index.beside[DISK]) == (9, 6)
    orphan = beside(rig, "w9", "a9")
    assert rig.cache.disk.adopt([orphan]) == [orphan]
    rig.evict("a0", tiers=[DISK])


def test_an_object_beside_a_chunk_is_raised_from_disk_and_from_redis(rig_of: Make) -> None:
    rig = rig_of(pages=16, disk=1 << 20, redis=True)
    store_all(rig, chunk_infos(rig, 3))
    rig.settle()
    rig.evict("a0")
    assert rig.get("s2") == rig.payload("s2")
    assert held(rig, CPU, "s2", "a2") == [True, False]
    rig.evict("a0", tiers=[CPU, DISK])
    assert rig.node("s2") is None
    assert rig.get("s2") == rig.payload("s2")  # of whose chunk nobody knows but its key
    assert rig.node("s2").kind is Kind.BESIDE
    for name in ("a0", "a1", "a2"):
        assert rig.get(name) == rig.payload(name)
    assert rig.node("s2").parent is rig.node("a2")
    assert rig.node("a2").parent is rig.node("a1")


# -- admission ---------------------------------------------------------------------------------------------------------


def asked(rig: Any, *names: object) -> None:
    rig.cache.lookup([rig.info(name).key for name in names])
    rig.cache.tick()


@pytest.mark.parametrize("admission", ["second_touch", "adaptive"])
def test_what_is_beside_a_chunk_goes_where_its_chunk_went(rig_of: Make, admission: str) -> None:
    rig = rig_of(pages=32, disk=1 << 20, redis=True, admission=admission)
    if admission == "adaptive":
        rig.cache._admission._shadows.best = len(SHARES) - 1  # nothing is admitted that comes for the first time
    rig.cache._admission._seen.add(hash(rig.info("a1").key), 1)
    store_all(rig, chunk_infos(rig, 2))
    rig.settle()
    written = [rig.info(name).key for name in ("a0", "a1", "w1", "s1")]  # a1 takes its parent along
    assert (rig.disk.stored, rig.redis.stored) == (written, written)
    assert store_all(rig, [beside(rig, "more", "a1"), beside(rig, "less", "elsewhere")], b"x") == ["", "no_parent"]
    rig.settle()
    assert rig.disk.stored[4:] == [rig.info("more").key]


def test_what_is_beside_a_chunk_that_came_once_is_not_written(rig_of: Make) -> None:
    rig = rig_of(pages=32, disk=1 << 20, admission="second_touch")
    store_all(rig, chunk_infos(rig, 2))
    rig.settle()
    assert rig.disk.stored == []
    assert rig.count(f"not_admitted.disk.{Refusal.FIRST_TOUCH}") == 6
    rig.acquire("w1")  # read in the arena: it is written, and its chain before it
    rig.settle()
    assert rig.disk.stored == [rig.info(name).key for name in ("a0", "a1", "w1")]


def test_what_is_beside_a_chain_does_not_take_its_kind_from_it(rig_of: Make) -> None:
    """Of a chain that goes on where nothing ever comes again each chunk is as likely to as the one before it."""

    def kinds(with_more: bool) -> list[object]:
        rig = rig_of(pages=64, disk=1 << 20, admission="adaptive")
        admission = rig.cache._admission
        seen: list[object] = []
        share = admission._kinds.share
        admission._kinds.share = lambda kind: seen.append(kind) or share(kind)
        asked(rig, *(f"a{at}" for at in range(6)))
        admission._shadows.best = len(SHARES) - 1  # no chunk goes down at once, nor what is beside it
        seen.clear()
        infos = chunk_infos(rig, 6)
        store_all(rig, [info for info in infos if with_more or info.kind is Kind.KV])
        return seen

    alone = kinds(False)
    assert len(alone) == 6
    assert alone[0] is not None
    assert set(alone) == {alone[0]}
    assert kinds(True) == alone


def test_the_shadows_of_a_tier_hold_chains_alone(rig_of: Make) -> None:
    """They are asked for chains: what they hold beside is room that the chains do not have."""
    rig = rig_of(pages=64, policy="adaptive", admission="adaptive", disk=1 << 20)
    store_all(rig, chunk_infos(rig, 8))
    sample = rig.cache._policies[CPU]._shadows._sample
    assert {node.kind for node in sample.values()} == {Kind.KV}
    assert len(sample) == 8
    assert rig.cache._memory_room() == 64 * 8 // 24


# -- ahead of need, and for a time -------------------------------------------------------------------------------------


def test_nothing_is_raised_beside_a_chain_that_nobody_read_there(rig_of: Make) -> None:
    rig = rig_of(pages=64, disk=1 << 20)
    cache = rig.cache
    swapper = Swapper(
        cache.index,
        rig.arena,
        cache.counters,
        SwapSettings(on=True),
        load=cache.ahead.load,
        evict=cache.ahead.evict,
        quiet=lambda: True,
        clock=lambda: rig.now,
    )
    store_all(rig, chunk_infos(rig, 4))
    rig.settle()
    asked(rig, "a0", "a1", "a2", "a3")
    cache.where([rig.info(name).key for name in ("w3", "s3", "w0")])
    rig.acquire("w3", "s3")
    rig.release()
    rig.evict("a0")
    for _ in range(12):
        rig.now += 1.0
        swapper.step()
        rig.settle()
    assert held(rig, CPU, "a0", "a1", "a2", "a3", "w3", "s3") == [True] * 6
    assert held(rig, CPU, "w0", "w1", "s0", "s1", "w2", "s2") == [False] * 6


def test_a_wish_for_what_is_beside_a_chain_lasts_from_its_last_use(rig_of: Make) -> None:
    rig = rig_of(pages=16, keep_share=1.0)
    store_all(rig, chunk_infos(rig, 2))
    for _ in rig.cache.keeps.wish([rig.info(name).key for name in ("a0", "a1", "w1")], 10.0, ""):
        pass
    rig.later(8.0)
    asked(rig, "a0", "a1")
    rig.cache.where([rig.info("w1").key])
    rig.acquire("w1")
    rig.later(4.0)
    assert len(rig.cache.keeps) == 3
    rig.later(8.0)
    assert len(rig.cache.keeps) == 0


def test_an_operator_s_reading_is_no_use(rig_of: Make) -> None:
    rig = rig_of()
    store_all(rig, chunk_infos(rig, 1))
    rig.cache.where([rig.info("w0").key])
    rig.acquire("w0", owner=OPERATOR)
    assert rig.node("w0").hits == 0
    rig.acquire("w0", owner=1)
    assert rig.node("w0").hits == 1


@pytest.mark.parametrize("policy", ["adaptive", "s3fifo", "gdsf", "cost"])
def test_what_a_hit_reads_beside_a_chain_outlives_what_it_does_not(rig_of: Make, policy: str) -> None:
    """With room for half of it, what is left of a chain is what a hit needs: all of it, and what is beside its end."""
    rig = rig_of(pages=20, policy=policy)
    store_all(rig, chunk_infos(rig, 4))
    names = [f"a{at}" for at in range(4)]
    for turn in range(6):
        asked(rig, *names)
        rig.cache.where([rig.info(f"{kind}{at}").key for kind in "ws" for at in range(4)])
        rig.acquire(*names, "w3", "s3", lease=b"%d" % turn)
        rig.release(lease=b"%d" % turn)
        assert rig.store(f"x{turn}", size=2 * PAGE) == ""
    assert held(rig, CPU, *names, "w3", "s3") == [True] * 6
    assert sum(held(rig, CPU, "w0", "s0", "w1", "s1", "w2", "s2")) < 6
