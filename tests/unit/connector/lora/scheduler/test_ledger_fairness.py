# SPDX-License-Identifier: Apache-2.0
"""Nobody waits for ever for pages: with requests that end, everybody's turn comes, and few pass before."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from loracache.connectors.vllm.scheduler.lora.ledger import PASSING_S, Answer, PageLedger

STEP_S = 1 / 16
LONGEST_S = 2.0


@dataclass(eq=False)
class Request:
    name: str
    adapter: str
    runs: float
    arrived: float
    ahead: int
    asked: float = -1.0  # when it first had to wait as the first of all, its adapter not there
    admitted: float = -1.0


class Scheduler:
    """Asks for all that wait, in the order of their arrival, every step; what runs ends by itself."""

    def __init__(self, budgets: list[int], costs: dict[str, tuple[int, ...]]) -> None:
        self.ledger = PageLedger(budgets)
        self.costs = costs
        self.now = 0.0
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.done: list[Request] = []
        self._numbers = iter(range(1 << 30))

    def arrive(self, adapter: str, runs: float) -> Request:
        name = f"request-{next(self._numbers)}"
        self.waiting.append(Request(name, adapter, runs, self.now, len(self.waiting)))
        return self.waiting[-1]

    def step(self) -> None:
        for request in [one for one in self.running if self.now >= one.admitted + one.runs]:
            self.ledger.end(request.name)
            self.running.remove(request)
            self.done.append(request)
        for request in list(self.waiting):
            answer, _ = self.ledger.ask(request.name, request.adapter, self.costs[request.adapter], self.now)
            assert answer is not Answer.NEVER
            if answer is Answer.WAIT:
                if request is self.waiting[0] and request.asked < 0:
                    request.asked = self.now
                continue
            first = self.waiting[0]
            if request is not first and first.asked >= 0:
                assert self.now - first.asked < PASSING_S, "it passed the first of all after its time"
            request.admitted = self.now
            self.waiting.remove(request)
            self.running.append(request)
        self.now += STEP_S


def arrivals(rng: random.Random, adapters: list[str], seconds: float, rate: float) -> Iterator[list[tuple[str, float]]]:
    """(adapter, how long it runs) of every step; the first adapters are by far the most wanted."""
    weights = [1 / (1 + number) for number in range(len(adapters))]
    for _ in range(int(seconds / STEP_S)):
        count = sum(rng.random() < rate * STEP_S / 4 for _ in range(4))
        yield [(each, rng.uniform(0, LONGEST_S)) for each in rng.choices(adapters, weights, k=count)]


@pytest.mark.parametrize("seed", range(12))
def test_everybody_s_turn_comes_and_in_bounded_time(seed: int) -> None:
    rng = random.Random(seed)
    budgets = [rng.randint(6, 20) for _ in range(rng.choice((1, 2, 4)))]
    names = [f"adapter-{number}" for number in range(12)]
    costs = {name: tuple(rng.randint(1, budget) for budget in budgets) for name in names}
    scheduler = Scheduler(budgets, costs)
    for wanted in arrivals(rng, names, 60.0, rate=rng.choice((2, 8, 24))):
        for adapter, runs in wanted:
            scheduler.arrive(adapter, runs)
        scheduler.step()
    most = len(scheduler.waiting) * (PASSING_S + LONGEST_S + 3 * STEP_S) + LONGEST_S + 1
    while scheduler.now < 60.0 + most:
        scheduler.step()
    assert not scheduler.waiting
    for request in scheduler.done:  # one turn ahead takes the time to pass, the longest that holds, and two steps
        turns = request.ahead + 1
        assert request.admitted - request.arrived <= turns * (PASSING_S + LONGEST_S + 3 * STEP_S)
    assert len(scheduler.done) > 50


def test_a_stream_of_requests_for_what_is_there_holds_nobody_up() -> None:
    scheduler = Scheduler([10], {"hot": (6,), "cold": (8,)})
    for _ in range(40):  # never a moment without a request that holds it
        scheduler.arrive("hot", 1.0)
        scheduler.step()
    cold = scheduler.arrive("cold", 1.0)
    behind = []
    while cold.admitted < 0:
        behind.append(scheduler.arrive("hot", 1.0))
        scheduler.step()
        assert scheduler.now < cold.arrived + PASSING_S + 1.0 + 3 * STEP_S
    passed = [request for request in behind if request.admitted >= 0]
    assert 0 < len(passed) <= PASSING_S / STEP_S  # some may use the time, and no more than that
    for _ in range(60):
        scheduler.step()
    assert not scheduler.waiting  # and those behind it have their turn again


def test_a_small_request_does_not_slip_past_a_large_one() -> None:
    ledger = PageLedger([10])
    assert ledger.ask("holder", "a", (6,), 0.0)[0] is Answer.GIVEN
    assert ledger.ask("large", "b", (8,), 0.0)[0] is Answer.WAIT
    for now in (0.0, 0.1, 10.0):
        assert ledger.ask("small", "c", (1,), now)[0] is Answer.WAIT  # there is room for it
    ledger.end("holder")
    assert ledger.ask("small", "c", (1,), 10.0)[0] is Answer.WAIT
    assert ledger.ask("large", "b", (8,), 10.0) == (Answer.GIVEN, ["a"])
    assert ledger.ask("small", "c", (1,), 10.0)[0] is Answer.GIVEN


def test_whoever_gives_up_waiting_holds_nobody_up() -> None:
    ledger = PageLedger([10])
    ledger.ask("holder", "a", (6,), 0.0)
    assert ledger.ask("large", "b", (8,), 0.0)[0] is Answer.WAIT
    assert ledger.ask("late", "a", (6,), PASSING_S)[0] is Answer.WAIT
    ledger.end("large")
    assert ledger.ask("small", "c", (4,), PASSING_S)[0] is Answer.GIVEN
    assert ledger.ask("late", "a", (6,), PASSING_S)[0] is Answer.HELD


def test_the_time_to_pass_begins_anew_for_the_next_in_turn() -> None:
    ledger = PageLedger([10])
    ledger.ask("holder", "a", (10,), 0.0)
    assert ledger.ask("first", "b", (10,), 0.0)[0] is Answer.WAIT
    ledger.end("holder")
    assert ledger.ask("first", "b", (10,), 5.0)[0] is Answer.GIVEN
    assert ledger.ask("second", "c", (10,), 5.0)[0] is Answer.WAIT
    assert ledger.ask("third", "b", (10,), 5.0 + PASSING_S - 0.01)[0] is Answer.HELD
    assert ledger.ask("fourth", "b", (10,), 5.0 + PASSING_S)[0] is Answer.WAIT


def test_a_request_that_runs_is_never_sent_back_to_wait() -> None:
    """It may be preempted and asked for again while somebody has waited for long."""
    ledger = PageLedger([10])
    ledger.ask("runs", "a", (6,), 0.0)
    assert ledger.ask("large", "b", (8,), 0.0)[0] is Answer.WAIT
    assert ledger.ask("runs", "a", (6,), PASSING_S * 10) == (Answer.HELD, [])
