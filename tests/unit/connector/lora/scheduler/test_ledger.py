# SPDX-License-Identifier: Apache-2.0
"""Who has pages: never more than there are, nobody's while they are held, those that are seldom used first."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from loracache.connectors.vllm.scheduler.lora.ledger import PASSING_S, Answer, PageLedger

REQUESTS = [f"request-{number}" for number in range(8)]
ADAPTERS = [f"adapter-{number}" for number in range(7)]
requests, adapters = st.sampled_from(REQUESTS), st.sampled_from(ADAPTERS)


class Ledger(RuleBasedStateMachine):
    """The ledger beside what its words mean. Which adapters leave first: test_s3_fifo.py."""

    @initialize(data=st.data(), workers=st.integers(1, 3))
    def begin(self, data: Any, workers: int) -> None:
        self.budgets = data.draw(st.lists(st.integers(1, 10), min_size=workers, max_size=workers))
        pages = st.lists(st.integers(0, 7), min_size=workers, max_size=workers)
        self.costs = {name: data.draw(pages) for name in ADAPTERS}
        self.ledger = PageLedger(self.budgets)
        self.holders: dict[str, set[str]] = {}
        self.pinned: set[str] = set()
        self.head: tuple[str, float] | None = None
        self.now = 0.0

    def free(self, without: list[str]) -> list[int]:
        """Pages by worker that are free once these adapters have none."""
        kept = [self.costs[name] for name in self.holders if name not in without]
        return [budget - sum(cost[worker] for cost in kept) for worker, budget in enumerate(self.budgets)]

    def fits(self, adapter: str, without: list[str]) -> bool:
        return all(cost <= free for cost, free in zip(self.costs[adapter], self.free(without), strict=True))

    def idle(self) -> list[str]:
        return [name for name, held in self.holders.items() if not held and name not in self.pinned]

    def waits_behind(self, request: str, at_least: float = 0.0) -> bool:
        return self.head is not None and self.head[0] != request and self.now - self.head[1] >= at_least

    def hold(self, request: str, adapter: str) -> None:
        self.holders[adapter].add(request)
        if self.head is not None and self.head[0] == request:
            self.head = None

    def forget(self, adapter: str) -> set[str]:
        self.pinned.discard(adapter)
        return self.holders.pop(adapter, set())

    @rule(adapter=adapters)
    def give(self, adapter: str) -> None:
        spare = self.ledger.spare(self.costs[adapter])
        assert spare is (self.fits(adapter, []) and self.head is None)
        if spare and adapter not in self.holders:
            self.ledger.give(adapter, self.costs[adapter])
            self.holders[adapter] = set()

    @rule(request=requests, adapter=adapters)
    def ask(self, request: str, adapter: str) -> None:
        held = request in self.holders.get(adapter, ())
        answer, victims = self.ledger.ask(request, adapter, self.costs[adapter], self.now)
        if answer is Answer.GIVEN:
            assert adapter not in self.holders
            assert not self.waits_behind(request)
            self.check_victims(adapter, victims)
            for victim in victims:
                self.forget(victim)
            self.holders[adapter] = set()
            self.hold(request, adapter)
            return
        assert not victims
        if held:
            assert answer is Answer.HELD
        elif any(cost > budget for cost, budget in zip(self.costs[adapter], self.budgets, strict=True)):
            assert answer is Answer.NEVER
        elif adapter in self.holders:
            assert answer is (Answer.WAIT if self.waits_behind(request, PASSING_S) else Answer.HELD)
            if answer is Answer.HELD:
                self.hold(request, adapter)
        else:
            assert answer is Answer.WAIT
            assert self.waits_behind(request) or not self.fits(adapter, self.idle())
            self.head = self.head or (request, self.now)

    def check_victims(self, adapter: str, victims: list[str]) -> None:
        assert set(victims) <= set(self.idle())
        assert len(set(victims)) == len(victims)
        assert self.fits(adapter, victims)
        assert not victims or not self.fits(adapter, victims[:-1]), "more were evicted than it takes"

    @rule(request=requests)
    def end(self, request: str) -> None:
        self.ledger.end(request)
        for held in self.holders.values():
            held.discard(request)
        if self.head is not None and self.head[0] == request:
            self.head = None

    @rule(adapter=adapters, pinned=st.booleans())
    def pin(self, adapter: str, pinned: bool) -> None:
        self.ledger.pin(adapter, pinned)
        if adapter in self.holders:
            (self.pinned.add if pinned else self.pinned.discard)(adapter)

    @rule(adapter=adapters)
    def drop(self, adapter: str) -> None:
        assert self.ledger.drop(adapter) == self.forget(adapter)

    @rule(request=requests, adapter=adapters)
    def also_hold(self, request: str, adapter: str) -> None:
        self.ledger.also_hold(request, adapter)
        if adapter in self.holders:
            self.hold(request, adapter)

    @rule(seconds=st.sampled_from([0.125, PASSING_S]))
    def later(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_books_agree(self) -> None:
        assert self.ledger._free == self.free([])
        assert min(self.free([])) >= 0
        assert set(self.ledger.adapters()) == set(self.holders)
        for adapter in ADAPTERS:
            held = self.holders.get(adapter, set())
            assert (adapter in self.ledger) == (adapter in self.holders)
            assert self.ledger.held(adapter) == bool(held)
            assert {request for request in REQUESTS if self.ledger.holds(request, adapter)} == held


def test_pages_are_given_within_budgets_and_taken_from_nobody_who_holds_them() -> None:
    run_state_machine_as_test(Ledger, settings=settings(max_examples=150, stateful_step_count=40))


def test_what_is_larger_than_one_worker_s_pool_never_gets_pages_and_delays_nobody() -> None:
    ledger = PageLedger([10, 3])
    assert ledger.ask("large", "l", (1, 4), 0.0) == (Answer.NEVER, [])
    assert ledger.ask("other", "o", (10, 3), 0.0) == (Answer.GIVEN, [])
    assert ledger.ask("large", "l", (1, 4), 0.0) == (Answer.NEVER, [])
    assert ledger.adapters() == ["o"]


def test_the_scarcest_worker_decides() -> None:
    ledger = PageLedger([100, 4])
    assert ledger.ask("a", "x", (1, 2), 0.0) == (Answer.GIVEN, [])
    assert ledger.ask("b", "y", (1, 2), 0.0) == (Answer.GIVEN, [])
    ledger.end("b")
    ledger.end("a")
    assert ledger.ask("c", "z", (1, 1), 0.0) == (Answer.GIVEN, ["x"])  # it came first
    assert ledger.ask("d", "w", (99, 0), 0.0) == (Answer.GIVEN, ["y"])  # no pages of worker 1, all but one of worker 0


def test_a_scan_of_tenants_that_come_once_throws_no_other_out() -> None:
    """Twenty that many ask for have pages; a hundred others come, one after another, each once."""
    ledger, numbers = PageLedger([21]), iter(range(1 << 20))

    def serve(adapter: str) -> list[str]:
        request = f"request {next(numbers)}"
        answer, victims = ledger.ask(request, adapter, (1,), 0.0)
        assert answer in (Answer.GIVEN, Answer.HELD)
        ledger.end(request)
        return victims

    hot = [f"hot {number}" for number in range(20)]
    for adapter in hot * 4:
        assert not serve(adapter)
    thrown_out = [victim for number in range(100) for victim in serve(f"cold {number}") if victim.startswith("hot")]
    assert len(thrown_out) <= 2, thrown_out


def test_an_evicted_adapter_takes_its_pin_with_it() -> None:
    ledger = PageLedger([4])
    ledger.ask("a", "x", (4,), 0.0)
    ledger.pin("x", True)
    ledger.end("a")
    assert ledger.ask("b", "y", (1,), 0.0) == (Answer.WAIT, [])
    assert ledger.drop("x") == set()
    assert ledger.ask("b", "y", (1,), 0.0) == (Answer.GIVEN, [])
    ledger.ask("a", "x", (1,), 0.0)
    ledger.end("a")
    assert ledger.ask("c", "z", (3,), 0.0) == (Answer.GIVEN, ["x"])
