# SPDX-License-Identifier: Apache-2.0
"""The pool's books: a page is held by one adapter or free, whatever happens in whatever order, on two threads."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from loracache.connectors.vllm.lora.layout import ModuleShape, PoolShape
from loracache.connectors.vllm.worker.lora.pool import PagedAdapter, PagePool, SlotTables

PAGES, PAGE = 20, 8
CPU = torch.device("cpu")
# One rank is a page of A and a page of B.
SHAPE = PoolShape((ModuleShape("m", ("p",), PAGE, (PAGE,)),), PAGES, PAGE, PAGE, 4, PAGES)
names = st.sampled_from("abcdef")


def reserve(pool: PagePool, rank: int) -> PagedAdapter | None:
    return pool.reserve(pool.shape.place({"p": rank}), np.ones(1, dtype=np.float32))


def pages_of(adapter: PagedAdapter) -> list[int]:
    return [page for first, count in adapter.runs for page in range(first, first + count)]


class Books(RuleBasedStateMachine):
    """The pool beside whom each page belongs to: residents, and what is being copied in."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(SHAPE, torch.float32, CPU)
        self.wanted: set[str] = set()
        self.resident: dict[str, PagedAdapter] = {}
        self.copying: list[PagedAdapter] = []

    def free(self) -> int:
        return PAGES - sum(len(pages_of(each)) for each in [*self.resident.values(), *self.copying])

    @rule(rank=st.integers(0, 6))
    def begin(self, rank: int) -> None:
        free = self.free()
        found = reserve(self.pool, rank)
        if found is None:
            assert 2 * rank > free
            return
        assert len(found.page_ids) == 2 * rank <= free
        assert found.page_ids.tolist() == sorted(pages_of(found))
        self.copying.append(found)

    @rule(name=names, at=st.integers(0, 5))
    def settle(self, name: str, at: int) -> None:
        if at >= len(self.copying):
            return
        adapter = self.copying.pop(at)
        there = self.pool.settle(name, adapter)
        assert there == (name in self.wanted or name in self.resident)
        if there and name not in self.resident:
            self.resident[name] = adapter
        assert self.pool.get(name) is self.resident.get(name)

    @rule(at=st.integers(0, 5))
    def give_back(self, at: int) -> None:
        if at < len(self.copying):
            self.pool.give_back(self.copying.pop(at))

    @rule(name=names)
    def want(self, name: str) -> None:
        self.pool.want(name)
        self.wanted.add(name)

    @rule(name=names)
    def evict(self, name: str) -> None:
        self.pool.evict(name)
        self.wanted.discard(name)
        self.resident.pop(name, None)
        assert self.pool.get(name) is None

    @invariant()
    def every_page_is_held_once_or_free(self) -> None:
        held = [page for each in [*self.resident.values(), *self.copying] for page in pages_of(each)]
        assert len(held) == len(set(held))
        assert self.pool.free_pages == PAGES - len(held)
        assert sorted(self.pool.digests()) == sorted(self.resident)
        if not self.copying:
            assert self.pool.audit() == []


def test_no_page_is_lost_or_held_twice_in_any_order() -> None:
    run_state_machine_as_test(Books, settings=settings(max_examples=100, stateful_step_count=40))


def test_an_adapter_evicted_while_it_is_copied_in_leaves_no_page_behind() -> None:
    pool = PagePool(SHAPE, torch.float32, CPU)
    pool.want("a")
    adapter = reserve(pool, 3)
    assert adapter is not None
    pool.evict("a")
    assert not pool.settle("a", adapter)
    assert pool.get("a") is None
    assert pool.free_pages == PAGES
    pool.want("a")  # and again while it is copied in for the order before
    adapter = reserve(pool, 3)
    assert adapter is not None
    pool.evict("a")
    pool.want("a")
    assert pool.settle("a", adapter)
    assert pool.get("a") is adapter


def test_what_is_copied_in_twice_is_there_once() -> None:
    pool = PagePool(SHAPE, torch.float32, CPU)
    pool.want("a")
    first, second = reserve(pool, 2), reserve(pool, 2)
    assert first is not None
    assert second is not None
    assert pool.settle("a", first)
    assert pool.settle("a", second)
    assert pool.get("a") is first
    assert pool.free_pages == PAGES - 4
    assert pool.audit() == []


def test_the_audit_names_lost_and_doubly_held_pages() -> None:
    pool = PagePool(SHAPE, torch.float32, CPU)
    pool.want("a")
    adapter = reserve(pool, 2)
    assert adapter is not None
    assert pool.audit() == ["pages 0..4 are lost"]  # they are nobody's while they are copied in
    pool.settle("a", adapter)
    assert pool.audit() == []
    pool._resident["b"] = adapter
    assert pool.audit() == ["pages 0..4 are held twice"]
    pool._resident.clear()
    for name in "xy":
        pool.want(name)
    tail = reserve(pool, 8)
    assert tail is not None
    assert pool.audit() == ["pages 0..20 are lost"]


def test_where_too_few_pages_are_free_none_are_taken() -> None:
    pool = PagePool(SHAPE, torch.float32, CPU)
    assert reserve(pool, 11) is None
    assert pool.free_pages == PAGES
    assert reserve(pool, 10) is not None
    assert reserve(pool, 1) is None
    assert pool.free_pages == 0


def test_adapters_lie_on_free_pages_wherever_those_are_and_in_one_run_where_there_is_one() -> None:
    pool = PagePool(SHAPE, torch.float32, CPU)
    taken = [reserve(pool, 1) for _ in range(10)]
    for each in taken[1::2]:
        assert each is not None
        pool.give_back(each)
    scattered = reserve(pool, 5)
    assert scattered is not None
    assert scattered.page_ids.tolist() == [2, 3, 6, 7, 10, 11, 14, 15, 18, 19]
    pool.give_back(scattered)
    for each in taken[2::2]:
        assert each is not None
        pool.give_back(each)
    together = reserve(pool, 4)
    assert together is not None
    assert together.runs == ((2, 8),)


class Guarded:
    """Free pages that are touched under the pool's lock only: a race would be seen once in many runs."""

    def __init__(self, pool: PagePool) -> None:
        self._free, self._lock = pool._free, pool._lock

    def __getattr__(self, name: str) -> Any:
        assert self._lock.locked() or name == "free"
        return getattr(self._free, name)


class Copier(threading.Thread):
    """Copies in what `name` names at the moment, for ever; a fifth of its copies fail."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__()
        self.pool = pool
        self.name_now = "a"
        self.settled = self.late = 0
        self.stop = False

    def run(self) -> None:
        rng = random.Random(1)
        while not self.stop:
            name = self.name_now
            adapter = reserve(self.pool, rng.randint(1, 4))
            if adapter is None:
                continue
            self.pool.pages[pages_of(adapter)] = float(ord(name))
            if rng.random() < 0.2:
                self.pool.give_back(adapter)
            elif self.pool.settle(name, adapter):
                self.settled += 1
            else:
                self.late += 1


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Threads take turns every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_two_threads_never_share_a_page(fast_switches: None) -> None:
    """One copies in, the other evicts and reads: whoever is there has its own bytes on its pages until it goes."""
    pool = PagePool(SHAPE, torch.float32, CPU)
    pool._free = Guarded(pool)  # type: ignore[assignment]
    copier, rng, seen = Copier(pool), random.Random(2), 0
    copier.start()
    try:
        while seen < 1000 or not (copier.settled > 100 and copier.late):
            copier.name_now = rng.choice("abcdef")
            pool.want(copier.name_now)
            for name in pool.digests():
                adapter = pool.get(name)
                assert adapter is not None  # nobody else evicts
                assert (pool.pages[pages_of(adapter)] == float(ord(name))).all()
                seen += 1
            pool.evict(rng.choice("abcdef"))
            assert copier.is_alive()
    finally:
        copier.stop = True
        copier.join()
    assert pool.audit() == []
    for name in pool.digests():
        pool.evict(name)
    assert pool.free_pages == PAGES


# -- slots -------------------------------------------------------------------------------------------------------------


def test_the_tables_keep_their_addresses_and_a_cleared_slot_adds_nothing(
    make_shape: Callable[..., Any], make_adapter: Any, fill: Any, compute: Any
) -> None:
    shape = make_shape(pages=200)
    pool, tables = PagePool(shape, torch.float32, CPU), SlotTables(3, shape, CPU)
    addresses = [each.data_ptr() for each in (tables.page_ids, tables.places, tables.scales)]
    adapters = [make_adapter("large", 8), make_adapter("small", {"model.layers.1.self_attn.k_proj": 2})]
    layers = [object() for _ in shape.modules]
    large, small = (fill(pool, [memoryview(bytearray(each.payload()))], layers) for each in adapters)
    x = torch.randn(2, 24)
    nothing = torch.zeros(2, 56).double()
    by_large, by_small = (
        torch.cat([each.delta(part, x, torch.float32) for part in shape.modules[3].parts], dim=1) for each in adapters
    )

    def in_slots() -> torch.Tensor:
        return compute(pool, tables, 3, x.repeat(3, 1), [0, 0, 1, 1, 2, 2]).double()

    tables.fill(0, large)
    tables.fill(2, small)
    torch.testing.assert_close(in_slots(), torch.cat([by_large, nothing, by_small]), rtol=1e-5, atol=1e-5)
    tables.fill(0, small)  # its pages are fewer: what the row had before stays behind them
    tables.fill(1, large)
    tables.clear(2)
    torch.testing.assert_close(in_slots(), torch.cat([by_small, by_large, nothing]), rtol=1e-5, atol=1e-5)
    assert [each.data_ptr() for each in (tables.page_ids, tables.places, tables.scales)] == addresses


@pytest.mark.parametrize("rank", [1, 16])
def test_a_slot_has_room_for_the_largest_adapter(make_shape: Callable[..., Any], rank: int) -> None:
    shape = make_shape(pages=1000, most_rank=rank)
    every = {part: rank for module in shape.modules for part in module.parts}
    tables = SlotTables(1, shape, CPU)
    assert tables.page_ids.shape[1] == shape.cost(shape.place(every).elements)
    few = make_shape(pages=3, most_rank=rank)
    assert SlotTables(1, few, CPU).page_ids.shape[1] == 3  # no adapter has more pages than there are
