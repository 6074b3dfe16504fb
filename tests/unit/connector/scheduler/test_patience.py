# SPDX-License-Identifier: Apache-2.0
"""Waiting where it pays: a moment in the engine's loop for an answer that is about to come, longer beside it for one
that saves much. Time is what the test says.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache.connectors.vllm.common.answer_times import AnswerTimes
from loracache.connectors.vllm.scheduler import lookups, requests, side
from loracache.connectors.vllm.scheduler.patience import Patience, StepTimes

CHUNK = 32
OFF, AGAIN = (0, False), (None, False)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_just_asked_for_is_waited_for(times: AnswerTimes) -> None:
    assert 0.001 <= times.allowance(10.0, 10.0) <= 0.003


def test_the_wait_counts_from_the_question(times: AnswerTimes) -> None:
    whole = times.allowance(10.0, 10.0)
    assert times.allowance(10.0005, 10.0) == pytest.approx(whole - 0.0005)
    assert times.allowance(10.004, 10.0) == 0.0  # it is late: nobody knows when it comes


def test_the_wait_follows_what_answers_take(times: AnswerTimes) -> None:
    for _ in range(60):
        times.begin_step()
        times.answered(took=0.0003, waited=0.0003)
    times.begin_step()
    assert times.allowance(10.0, 10.0) == pytest.approx(0.001)  # the finest there is
    for _ in range(60):
        times.begin_step()
        times.answered(took=0.0018, waited=0.0018)
    times.begin_step()
    assert 0.0018 < times.allowance(10.0, 10.0) < 0.0025


def test_all_waits_of_a_step_together_are_bounded(times: AnswerTimes) -> None:
    spent = 0.0
    while seconds := times.allowance(10.0, 10.0):
        times.answered(took=0.0009, waited=min(seconds, 0.0009))
        spent += min(seconds, 0.0009)
    assert spent <= 0.003
    times.begin_step()
    assert times.allowance(10.0, 10.0)


def test_a_daemon_that_is_slow_is_waited_for_ever_more_seldom(times: AnswerTimes) -> None:
    now, pauses = 10.0, []
    for _ in range(9):
        times.begin_step()
        assert times.allowance(now, now)
        times.missed(now, 0.003)
        before = now
        while not times.allowance(now, now):
            times.begin_step()
            now += 0.01
        pauses.append(now - before)
    assert pauses[0] == pytest.approx(0.05, abs=0.011)
    assert pauses[1] == pytest.approx(0.1, abs=0.011)
    assert pauses[-2:] == pytest.approx([5.0, 5.0], abs=0.011)
    times.answered(took=0.0005, waited=0.0005)  # it is back
    times.begin_step()
    assert times.allowance(now, now)
    times.missed(now, 0.003)
    times.begin_step()
    assert not times.allowance(now + 0.04, now + 0.04)
    assert times.allowance(now + 0.06, now + 0.06)


@pytest.fixture
def times() -> AnswerTimes:
    return AnswerTimes()


# -- steps -------------------------------------------------------------------------------------------------------------


def test_what_a_token_takes_is_learnt_from_steps_of_prefill() -> None:
    steps = StepTimes()
    steps.planned(1.0, 1000)
    steps.done(3.0)
    assert steps.token_s == pytest.approx(0.002)
    for second in range(10, 40):
        steps.planned(second, 1000)
        steps.done(second + 0.5)
    assert steps.token_s == pytest.approx(0.0005, rel=0.01)
    steps.planned(100.0, 8)  # decoding
    steps.done(101.0)
    assert steps.token_s == pytest.approx(0.0005, rel=0.01)


def test_steps_that_are_planned_ahead_do_not_count_what_they_waited() -> None:
    steps = StepTimes()
    steps.planned(0.0, 100)
    for step in range(1, 20):
        steps.planned(step * 0.1 - 0.09, 100)  # before the one before it is done
        steps.done(step * 0.1)
    assert steps.token_s == pytest.approx(0.001)


def test_an_idle_engine_takes_no_longer() -> None:
    steps = StepTimes()
    for start in (0.0, 50.0, 1000.0):
        steps.planned(start, 100)
        steps.done(start + 0.1)
    assert steps.token_s == pytest.approx(0.001)


def test_steps_that_are_never_done_are_lost_sight_of() -> None:
    steps = StepTimes()
    for at in range(100):
        steps.planned(float(at), 100)
    for at in range(100, 120):
        steps.planned(float(at), 100)
        steps.done(at + 0.1)
    assert steps.token_s < 0.1
    StepTimes().done(1.0)


def test_patience_is_half_of_what_is_to_gain_between_its_bounds() -> None:
    patience = Patience(0.02, 1.0)
    patience.steps.planned(0.0, 1000)
    patience.steps.done(0.1)  # 0.1 ms a token
    assert patience.parked(10) == 0.02
    assert patience.parked(4000) == pytest.approx(0.2)
    assert patience.parked(100_000) == 1.0
    assert patience.parked(-5) == 0.02
    assert Patience(0.02, 0.0).parked(100_000) == 0.02
    assert Patience(3.0, 1.0).parked(100_000) == 3.0


def test_the_loop_does_not_wait_longer_than_what_it_saves() -> None:
    patience = Patience(0.02, 1.0)
    patience.steps.planned(0.0, 1000)
    patience.steps.done(0.01)  # 10 us a token
    assert patience.allowance(5.0, 5.0, 4000)
    assert not patience.allowance(5.0, 5.0, 16)
    assert not patience.allowance(5.0, 5.0, -16)


# -- in the scheduler --------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the scheduler's side sees: now[0]."""
    seconds = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: seconds[0])
    for module in (lookups, requests, side):
        monkeypatch.setattr(module, "time", clock)
    return seconds


def a_step(driver: Any, now: list[float], tokens: int, seconds: float) -> None:
    """The engine computes a step of so many tokens."""
    output = SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set()),
        num_scheduled_tokens={"somebody": tokens},
        preempted_req_ids=set(),
    )
    driver.side.build_plan(output)
    now[0] += seconds
    driver.side.step_done()


def test_a_request_whose_answer_is_about_to_come_loses_no_step(
    driver: Any, make_request: Any, now: list[float]
) -> None:
    request = make_request("a", 20 * CHUNK)
    driver.hold(request, ["cpu"] * 5)
    driver.link.answers = False

    def answer(seconds: float) -> None:
        now[0] += 0.0005
        driver.link.answers = True

    driver.link.on_wait = answer
    assert driver.arrive(request) == (5 * CHUNK, True)
    assert len(driver.link.waits) == 1
    assert "lookup.late" not in driver.link.counts


def test_a_slow_daemon_costs_the_loop_one_wait_and_then_none(driver: Any, make_request: Any, now: list[float]) -> None:
    driver.link.answers = False

    def silence(seconds: float) -> None:
        now[0] += seconds

    driver.link.on_wait = silence
    started = now[0]
    for name in "abcdefgh":
        assert driver.arrive(make_request(name, 20 * CHUNK, seed=ord(name))) == AGAIN
    assert len(driver.link.waits) == 1
    assert now[0] - started == pytest.approx(0.003)
    driver.link.connected = False
    now[0] += 60.0
    driver.step()
    driver.arrive(make_request("z", 20 * CHUNK))
    assert len(driver.link.waits) == 1  # a daemon that is silent is not waited for


def test_a_request_is_parked_for_as_long_as_it_may_gain(make_driver: Any, make_request: Any, now: list[float]) -> None:
    driver = make_driver(lookup_wait_most=1.0)
    driver.link.answers = False
    a_step(driver, now, tokens=100, seconds=0.1)  # 1 ms a token
    long, short = make_request("long", 20 * CHUNK), make_request("short", CHUNK, seed=2)
    assert driver.arrive(long) == driver.arrive(short) == AGAIN
    now[0] += 0.019
    assert driver.side.matched_tokens(short, 0) == AGAIN
    now[0] += 0.01
    assert driver.side.matched_tokens(short, 0) == OFF
    now[0] += 0.28  # of 0.32 s
    assert driver.side.matched_tokens(long, 0) == AGAIN
    now[0] += 0.02
    assert driver.side.matched_tokens(long, 0) == OFF
    assert driver.link.counts["lookup.late"] == 2


def test_a_request_that_the_engine_has_no_room_for_is_late_once(
    driver: Any, make_request: Any, now: list[float]
) -> None:
    """vLLM asks again in every step until there is room."""
    driver.link.answers = False
    request = make_request("a", 20 * CHUNK)
    driver.arrive(request)
    now[0] += 0.5
    assert [driver.side.matched_tokens(request, 0) for _ in range(9)] == [OFF] * 9
    assert driver.link.counts["lookup.late"] == driver.side.tally.take().data["lookups_late"] == 1
    driver.step({request: list(range(40))})
    driver.step(preempted=[request])
    driver.side.matched_tokens(request, 0)
    now[0] += 0.5
    assert [driver.side.matched_tokens(request, 0) for _ in range(9)] == [OFF] * 9
    assert driver.link.counts["lookup.late"] == 2


def test_what_the_engine_holds_itself_is_not_to_gain(make_driver: Any, make_request: Any, now: list[float]) -> None:
    driver = make_driver()
    driver.link.answers = False
    a_step(driver, now, tokens=100, seconds=0.1)
    request = make_request("a", 20 * CHUNK)
    assert driver.arrive(request, local=19 * CHUNK) == AGAIN
    now[0] += 0.05
    assert driver.side.matched_tokens(request, 19 * CHUNK) == OFF


def test_the_first_request_under_an_adapters_new_path_waits_for_its_content(
    driver: Any, make_request: Any, now: list[float], tmp_path: Path
) -> None:
    """Hashing a folder takes longer than any lookup; 640 tokens take longer still."""
    a_step(driver, now, tokens=100, seconds=0.1)
    first = make_request("first", 20 * CHUNK, lora_request=LoRARequest("one", 1, str(tmp_path)))
    driver.link.digests[str(tmp_path)] = "a" * 64
    driver.hold(first, ["cpu"] * 20)
    driver.side._adapters.renew(first.lora_request)
    driver.link.answers = False
    assert driver.arrive(first) == AGAIN
    now[0] += 0.2
    assert driver.side.matched_tokens(first, 0) == AGAIN
    driver.link.answers = True
    assert driver.side.matched_tokens(first, 0) == (20 * CHUNK, True)


def test_an_adapter_that_cannot_be_hashed_is_waited_for_no_longer_than_before(
    driver: Any, make_request: Any, now: list[float], tmp_path: Path
) -> None:
    a_step(driver, now, tokens=100, seconds=0.1)
    request = make_request("a", 20 * CHUNK, lora_request=LoRARequest("one", 1, str(tmp_path)))
    driver.link.digests[str(tmp_path)] = None
    assert driver.arrive(request) == AGAIN
    now[0] += 0.03
    assert driver.side.matched_tokens(request, 0) == OFF
