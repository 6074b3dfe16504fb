# SPDX-License-Identifier: Apache-2.0
"""What engines report: a mean batch of the last five seconds, and arrivals that fade."""

from __future__ import annotations

import pytest

from loracache.cache.swap import demand
from loracache.cache.swap.demand import Demand

A, B = b"a" * 32, b"b" * 32


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def told(now: list[float]) -> Demand:
    return Demand(lambda: now[0])


def test_nobody_has_said_anything(told: Demand) -> None:
    assert (told.batch(), told.waiting, told.rate(A), told.hottest(3)) == (0.0, 0, 0.0, [])


def test_the_batch_is_a_mean_over_time_of_the_last_five_seconds(told: Demand, now: list[float]) -> None:
    told.report(1, 30, 2, [])
    assert told.batch() == 30
    now[0] += 4.0
    told.report(1, 10, 0, [])
    now[0] += 1.0
    assert told.batch() == pytest.approx((4 * 30 + 10) / 5)
    now[0] += 2.0
    assert told.batch() == pytest.approx((2 * 30 + 3 * 10) / 5)
    now[0] += 3.1
    assert (told.batch(), told.waiting) == (0, 0), "an engine that has nothing to do says nothing"


def test_engines_add_up_and_one_that_is_gone_does_not_count(told: Demand, now: list[float]) -> None:
    told.report(1, 3, 1, [])
    told.report(2, 4, 5, [])
    now[0] += 1.0
    assert (told.batch(), told.waiting) == (7, 6)
    told.gone(1)
    told.gone(3)
    assert (told.batch(), told.waiting) == (4, 5)


def test_the_adapter_that_is_asked_for_most_of_late_is_the_hottest(told: Demand, now: list[float]) -> None:
    for _ in range(10):
        told.report(1, 0, 0, [A])
    assert told.hottest(2) == [A]
    now[0] += 300.0
    told.report(2, 0, 0, [B])
    assert told.hottest(2) == [B, A]
    assert told.hottest(1) == [B]


def test_a_steady_rate_is_told_in_requests_a_second(told: Demand, now: list[float]) -> None:
    for _ in range(1200):
        now[0] += 0.5
        told.report(1, 0, 0, [A])
    assert told.rate(A) == pytest.approx(2.0, rel=0.02)


def test_of_too_many_adapters_the_hottest_are_remembered(told: Demand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "_MOST", 10)
    told.report(1, 0, 0, [A] * 5)
    for number in range(50):
        told.report(1, 0, 0, [number.to_bytes(32, "big")])
    assert told.hottest(1) == [A]
    assert len(told.hottest(100)) <= 10


def test_what_those_who_wait_want_is_known_while_their_engine_says_so(told: Demand, now: list[float]) -> None:
    c = b"c" * 32
    told.report(1, 1, 3, [], [A, B])
    told.report(2, 1, 3, [], [c, A])
    assert told.wanted == [A, c, B]
    told.report(1, 1, 0, [], [])
    assert told.wanted == [c, A]
    now[0] += 6
    assert told.wanted == []
    told.report(2, 1, 1, [], [c])
    told.gone(2)
    assert told.wanted == []
