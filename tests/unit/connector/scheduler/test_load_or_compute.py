# SPDX-License-Identifier: Apache-2.0
"""How much of what was found is loaded, and how much is computed because that is faster. Time is what the test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.connectors.vllm.scheduler import load_or_compute
from loracache.connectors.vllm.scheduler.load_or_compute import LoadChoice, LoadTimes
from loracache.connectors.vllm.scheduler.patience import Patience, StepTimes, even_position

CHUNK, MB = 32, 1_000_000
TIERS = ("cpu", "disk", "redis")


def steps_of(token_s: float, even: float = float("inf")) -> StepTimes:
    """An engine that computes a token in so long."""
    steps = StepTimes(even)
    steps.planned(0.0, 1000)
    steps.done(1000 * token_s)
    return steps


def choice_of(
    chunk_s: Mapping[str, float], token_s: float = 0.001, *, factor: float = 1.0, even: float = float("inf")
) -> LoadChoice:
    """An engine that computes a token in token_s, and whose tiers load a chunk of 1 MB in so long each."""
    choice = LoadChoice(steps_of(token_s, even), factor)
    for tier, seconds in chunk_s.items():
        for chunks in (1, 2, 4):
            measure(choice.loads, tier, chunks, chunks * seconds)
        choice.loads.tiers[tier].next_try = float("inf")
    return choice


def measure(loads: LoadTimes, tier: str, chunks: int, seconds: float, name: str = "seen") -> None:
    loads.began(name, [tier] * chunks, MB)
    loads.took(name, seconds)
    loads.over(name)


def leading(choice: LoadChoice, tiers: Sequence[str], first: int = 0) -> int:
    return choice.leading(tiers, first, CHUNK, MB)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the choice sees: now[0]."""
    seconds = [1000.0]
    monkeypatch.setattr(load_or_compute, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


# -- the choice: a chunk takes 32 ms to compute ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_s", "tiers", "first", "expected"),
    [
        ({"redis": 0.100}, ["redis"] * 9, 0, 0),
        ({"redis": 0.010}, ["redis"] * 9, 0, 9),
        ({"cpu": 0.001, "redis": 0.1}, ["cpu"] * 5 + ["redis"] * 4, 0, 5),
        ({"cpu": 0.001, "redis": 0.1}, ["cpu"] * 5 + ["redis"] * 4, 5, 5),
        ({"cpu": 0.001, "redis": 0.1}, ["cpu"] * 5 + ["redis"] + ["cpu"] * 9, 0, 15),  # what is behind pays for it
        ({"cpu": 0.001, "redis": 0.1}, ["cpu"] * 5 + ["redis"] * 9 + ["cpu"], 0, 5),
        ({"cpu": 0.001, "disk": 0.01, "redis": 0.1}, ["cpu", "disk", "redis"] * 2, 0, 2),
        ({"disk": 0.1, "redis": 0.1}, ["disk"] * 3 + ["redis"] * 3, 0, 0),
        ({"redis": 0.035}, ["redis"] * 3, 0, 3),  # 9 ms are not worth it
        ({"redis": 0.036}, ["redis"] * 3, 0, 0),
        ({"redis": 0.1}, [], 0, 0),
        ({"redis": 0.1}, ["redis"] * 3, 3, 3),
        ({"redis": 0.1}, ["cpu"] * 9, 0, 9),  # never measured: loaded
    ],
)
def test_what_is_computed_sooner_is_not_loaded(
    chunk_s: dict[str, float], tiers: list[str], first: int, expected: int
) -> None:
    assert leading(choice_of(chunk_s), tiers, first) == expected


def test_computing_has_to_be_faster_by_the_factor() -> None:
    tiers = ["redis"] * 9
    assert leading(choice_of({"redis": 0.045}, factor=1.5), tiers) == 9
    assert leading(choice_of({"redis": 0.055}, factor=1.5), tiers) == 0
    assert leading(choice_of({"redis": 99.0}, factor=0.0), tiers) == 9


def test_deep_chunks_are_worth_more_than_early_ones() -> None:
    """Attention: at position 3200 a token takes twice what the first does."""
    choice = choice_of({"redis": 0.05}, even=3200.0)
    assert leading(choice, ["redis"] * 9) == 0
    assert leading(choice, ["redis"] * 109, first=100) == 109


def test_nothing_is_passed_over_before_a_step_was_seen() -> None:
    choice = LoadChoice(StepTimes(), 1.0)
    for _ in range(3):
        measure(choice.loads, "redis", 1, 99.0)
    assert leading(choice, ["redis"] * 9) == 9


def test_loads_under_way_share_the_link() -> None:
    choice = choice_of({"redis": 0.02})
    tiers = ["redis"] * 10
    assert leading(choice, tiers) == 10
    choice.loads.began("other", tiers, MB)
    choice.loads.began("third", tiers, MB)
    assert leading(choice, tiers) == 0
    choice.loads.over("other")
    choice.loads.over("third")
    assert leading(choice, tiers) == 10


def test_what_a_load_took_beside_others_is_not_all_its_own() -> None:
    loads = LoadTimes()
    for _ in range(3):
        for name in "abcd":
            loads.began(name, ["redis"] * 10, MB)
        for name in "abcd":
            loads.took(name, 0.4)  # all of the 40 MB came by then
            loads.over(name)
    assert loads.seconds({"redis": 10 * MB}) == pytest.approx(0.1)


def test_the_slowest_worker_counts() -> None:
    loads = LoadTimes()
    for _ in range(3):
        loads.began("a", ["redis"], MB)
        for seconds in (0.1, 0.3, 0.2):
            loads.took("a", seconds)
        loads.over("a")
    assert loads.seconds({"redis": MB}) == pytest.approx(0.3)


def test_a_load_of_two_tiers_tells_of_the_slower() -> None:
    loads = LoadTimes()
    for _ in range(3):
        measure(loads, "cpu", 10, 0.001)
    for chunks in (10, 20, 40):
        loads.began("a", ["cpu"] * 10 + ["redis"] * chunks, MB)
        loads.took("a", 0.001 + 0.05 * chunks)
        loads.over("a")
    assert loads.seconds({"redis": 20 * MB}) == pytest.approx(1.0, rel=0.1)
    assert loads.seconds({"cpu": 10 * MB}) == pytest.approx(0.001)


def test_a_load_that_failed_tells_nothing_and_is_over() -> None:
    choice = choice_of({"redis": 0.02})
    for _ in range(50):
        choice.loads.began("a", ["redis"] * 10, MB)
        choice.loads.over("a")
    choice.loads.took("gone", 1.0)
    choice.loads.over("gone")
    assert leading(choice, ["redis"] * 10) == 10
    assert not choice.loads._loads


# -- a tier that is passed over is tried again -------------------------------------------------------------------------


def slow_redis(now: list[float]) -> LoadChoice:
    """A chunk takes 320 ms to load, ten times what computing it takes; it was measured just now."""
    choice = LoadChoice(steps_of(0.001), 1.5)
    for chunks in (1, 2, 4):
        measure(choice.loads, "redis", chunks, 0.32 * chunks)
    return choice


def test_a_slow_tier_is_tried_with_a_part_and_ever_more_seldom(now: list[float]) -> None:
    choice, tiers = slow_redis(now), ["redis"] * 100
    began, tries = now[0], []
    while now[0] - began < 2000:
        count = leading(choice, tiers)
        if count:
            assert count == 5  # takes 1.6 s of the 3.2 s that computing takes
            tries.append(now[0] - began)
            measure(choice.loads, "redis", count, 0.32 * count)
        now[0] += 1.0
    assert [round(at) for at in tries[:5]] == [30, 60, 120, 240, 480]
    assert len(tries) == 7


def test_one_chunk_is_tried_at_least(now: list[float]) -> None:
    choice = slow_redis(now)
    now[0] += 31
    assert leading(choice, ["redis"] * 2) == 1
    assert leading(choice, ["redis"] * 2) == 0  # the next one does not have to


def test_a_tier_that_has_become_fast_is_loaded_from_again_at_once(now: list[float]) -> None:
    choice, tiers = slow_redis(now), ["redis"] * 100
    now[0] += 31
    requests = 0
    while (count := leading(choice, tiers)) < 100:
        assert count > 0
        measure(choice.loads, "redis", count, 0.002 * count)
        requests += 1
    assert 0 < requests <= 5


def test_a_slow_first_load_turns_nothing_off(now: list[float]) -> None:
    choice, tiers = LoadChoice(steps_of(0.001), 1.0), ["redis"] * 100
    assert leading(choice, tiers) == 100
    measure(choice.loads, "redis", 100, 60.0)
    for _ in range(10):
        assert leading(choice, tiers) == 100
        measure(choice.loads, "redis", 100, 0.3)


# -- what always holds -------------------------------------------------------------------------------------------------

speeds = st.fixed_dictionaries({tier: st.floats(1e-5, 10.0) for tier in TIERS})
found = st.lists(st.sampled_from(TIERS), max_size=30)


@given(speeds, found, st.integers(0, 30), st.floats(1e-6, 1.0), st.floats(1.0, 10.0))
def test_never_more_than_was_found_nor_less_than_the_engine_has(
    chunk_s: dict[str, float], tiers: list[str], first: int, token_s: float, factor: float
) -> None:
    first = min(first, len(tiers))
    assert first <= leading(choice_of(chunk_s, token_s, factor=factor), tiers, first) <= len(tiers)


@given(speeds, found, st.sampled_from(TIERS), st.floats(1.0, 100.0))
def test_a_slower_tier_is_loaded_from_no_more(
    chunk_s: dict[str, float], tiers: list[str], slower: str, times: float
) -> None:
    fast = leading(choice_of(chunk_s), tiers)
    assert leading(choice_of(chunk_s | {slower: times * chunk_s[slower]}), tiers) <= fast


@given(speeds, found, st.floats(1e-6, 0.1), st.floats(1.0, 100.0))
def test_a_slower_engine_loads_no_less(
    chunk_s: dict[str, float], tiers: list[str], token_s: float, times: float
) -> None:
    fast = leading(choice_of(chunk_s, token_s), tiers)
    assert leading(choice_of(chunk_s, token_s * times), tiers) >= fast


# -- the engine's own speed --------------------------------------------------------------------------------------------


def test_a_token_takes_longer_the_more_are_before_it() -> None:
    steps = StepTimes(even=1000.0)
    steps.planned(0.0, 500, 500 * 250.0)  # the first 500 of a prompt
    steps.done(0.625)
    assert steps.token_s == pytest.approx(0.001)
    assert steps.seconds(0, 500) == pytest.approx(0.625)
    assert steps.seconds(9500, 10_000) == pytest.approx(0.5 * 10.75)
    steps.planned(1.0, 500, 500 * 9750.0)
    steps.done(1.0 + 0.5 * 10.75)
    assert steps.token_s == pytest.approx(0.001)


def test_a_step_that_mostly_decodes_says_nothing_of_prompts(make_request: Any) -> None:
    patience = Patience(0.02, 1.0, even=1000.0)
    state: Any = SimpleNamespace(request=make_request("long", 2000, computed=1000))
    patience.step_planned(0.0, {"long": 100} | {f"decodes-{number}": 1 for number in range(200)}, {})
    patience.steps.done(9.0)
    assert not patience.steps.seen
    patience.step_planned(10.0, {"long": 100, "decodes": 1}, {"long": state})
    patience.steps.done(10.2)
    assert patience.steps.token_s == pytest.approx(0.2 / (101 + 100 * 1050 / 1000))


def test_attention_is_even_with_the_weights_at_six_times_the_width(make_config: Callable[..., Any]) -> None:
    known = make_config(model_config__hf_text_config=SimpleNamespace(hidden_size=4096))
    assert even_position(known) == 24_576
    assert even_position(make_config()) == float("inf")
