# SPDX-License-Identifier: Apache-2.0
"""How the plan's order is dealt to several engines, and dealt anew when one is done early, is gone or comes back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracache.batch.plan import Plan, make_plan
from loracache.batch.shares import Shares
from tests.unit.batch.conftest import Asked, batches, prompts_of

blocks = st.integers(1, 3)
few = settings(max_examples=50, deadline=None)


def grouped(groups: int, members: int, prefix: int = 64, decode: int = 1) -> list[Asked]:
    return [Asked([group] * prefix + [number], decode=decode) for number in range(members) for group in range(groups)]


def group_of(batch: list[Asked], requests: list[int]) -> list[int]:
    return [batch[request].tokens[0] for request in requests]


def rest(shares: Shares, engine: int, *, answer: bool = True) -> list[int]:
    """All that an engine sends if nobody else does anything."""
    sent = []
    while (request := shares.first(engine)) is not None:
        shares.begin(engine)
        if answer:
            shares.answered(engine, request)
        sent.append(request)
    return sent


def cut(plan: Plan, engines: int) -> list[list[int]]:
    """What each of so many engines is given at the beginning."""
    return [plan.order[list(waiting)].tolist() for waiting in Shares(plan, [True] * engines)._waiting]


# -- at the beginning ----------


@few
@given(batches(), blocks, st.integers(1, 4))
def test_parts_for_engines_are_the_order_cut(batch: list[Asked], block: int, engines: int) -> None:
    plan = make_plan(prompts_of(batch, block))
    parts = cut(plan, engines)
    assert len(parts) == engines
    assert [number for part in parts for number in part] == plan.order.tolist()


@pytest.mark.parametrize(("groups", "engines", "each"), [(12, 3, [4, 4, 4]), (12, 5, [2, 3, 2, 3, 2]), (3, 2, [1, 2])])
def test_engines_get_whole_subtrees_of_about_the_same_work(groups: int, engines: int, each: list[int]) -> None:
    batch = grouped(groups, 20)
    parts = [set(group_of(batch, part)) for part in cut(make_plan(prompts_of(batch, 4)), engines)]
    assert sorted(map(len, parts)) == sorted(each)
    assert sum(map(len, parts)) == groups


def test_a_subtree_that_is_more_than_an_engines_share_is_cut_evenly() -> None:
    plan = make_plan(prompts_of(grouped(1, 100), 4))
    assert [len(part) for part in cut(plan, 2)] == [50, 50]


def test_an_engine_that_is_not_there_at_the_beginning_takes_over_its_part_when_it_comes() -> None:
    batch = grouped(4, 10)
    shares = Shares(make_plan(prompts_of(batch, 4)), [True, False])
    assert shares.first(0) is not None
    shares.begin(0)
    shares.come_back(1)
    assert shares.first(1) is not None
    assert shares.taken == [0, 20]


# -- done early ----------


def test_an_engine_that_is_done_early_takes_whole_subtrees_from_the_end_of_the_others_share() -> None:
    batch = grouped(8, 10)
    plan = make_plan(prompts_of(batch, 4))
    shares = Shares(plan, [True, True])
    mine = rest(shares, 0)
    assert shares.taken[0] == len(mine) - 40
    theirs = rest(shares, 1)
    assert sorted(mine + theirs) == list(range(80))
    assert not {*group_of(batch, mine)} & {*group_of(batch, theirs)}
    assert mine[40:60] == plan.order.tolist()[60:]


def test_half_a_subtree_is_taken_only_where_that_is_worth_its_prefix() -> None:
    for members, decode, worth in ((6, 1, False), (60, 4, True)):
        shares = Shares(make_plan(prompts_of(grouped(2, members, decode=decode), 4)), [True, True])
        shares.first(1)
        shares.begin(1)  # it has the prefix now
        rest(shares, 0)
        assert bool(shares.taken[0]) == worth


def test_what_both_have_in_their_caches_costs_nothing_to_share() -> None:
    """One long document: whoever has it takes as much as makes both end together."""
    shares = Shares(make_plan(prompts_of(grouped(1, 40, prefix=4000), 4)), [True, True])
    for engine in (0, 1):
        shares.first(engine)
        shares.begin(engine)
    sent = rest(shares, 0)
    assert len(sent) > 19
    assert shares.taken[0] == len(sent) - 19


# -- gone ----------


def test_what_a_lost_engine_had_not_answered_goes_to_the_one_that_is_left_in_the_plans_order() -> None:
    batch = grouped(6, 10)
    plan = make_plan(prompts_of(batch, 4))
    shares = Shares(plan, [True, True])
    began = [shares.first(1) for _ in range(5) if shares.begin(1) is None] if shares.first(1) is not None else []
    assert began
    assert shares.leave(1)
    assert rest(shares, 0) == plan.order.tolist()
    assert shares.unanswered == 0


def test_the_share_of_a_lost_engine_is_split_among_those_that_are_left_between_subtrees() -> None:
    batch = grouped(12, 10)
    shares = Shares(make_plan(prompts_of(batch, 4)), [True, True, True])
    for _ in range(5):
        shares.first(2)
        shares.begin(2)
    shares.leave(2)
    own = [[], []]  # type: list[list[int]]
    for _ in range(40):
        for engine in (0, 1):
            request = shares.first(engine)
            assert request is not None
            shares.begin(engine)
            shares.answered(engine, request)
            own[engine].append(request)
    assert not shares.taken[0]
    for _ in range(20):
        for engine in (0, 1):
            request = shares.first(engine)
            assert request is not None
            shares.begin(engine)
            shares.answered(engine, request)
            own[engine].append(request)
    assert shares.unanswered == 0
    assert sum(shares.taken) == 40
    groups = [{*group_of(batch, each)} for each in own]
    assert not groups[0] & groups[1]


def test_when_the_last_engine_leaves_nobody_is_left() -> None:
    shares = Shares(make_plan(prompts_of(grouped(2, 2), 4)), [True, True])
    assert shares.leave(0)
    assert not shares.leave(1)
    shares.come_back(0)
    assert sorted(rest(shares, 0)) == [0, 1, 2, 3]


@settings(max_examples=200, deadline=None)
@given(batches(most=20), blocks, st.integers(1, 4), st.integers(0, 1 << 32))
def test_each_request_is_answered_once_whoever_is_gone_and_comes_back(
    batch: list[Asked], block: int, engines: int, seed: int
) -> None:
    plan = make_plan(prompts_of(batch, block))
    chance = random.Random(seed)
    shares = Shares(plan, [True] * engines)
    here, begun, answered = [True] * engines, [set[int]() for _ in range(engines)], list[int]()
    steps = 0
    while shares.unanswered:
        engine = chance.randrange(engines)
        steps += 1
        trouble = chance.random() < (0.2 if steps < 200 else 0)
        if not here[engine]:
            if chance.random() < 0.3 or not any(here):
                shares.come_back(engine)
                here[engine] = True
        elif trouble:
            here[engine] = False
            begun[engine].clear()
            assert shares.leave(engine) == any(here)
        elif begun[engine] and chance.random() < 0.5:
            request = begun[engine].pop()
            shares.answered(engine, request)
            answered.append(request)
        elif (next_one := shares.first(engine)) is not None:
            shares.begin(engine)
            begun[engine].add(next_one)
        assert _ordered(plan, shares)
        assert steps < 20_000
    assert sorted(answered) == list(range(len(batch)))


def _ordered(plan: Plan, shares: Shares) -> bool:
    """Whether each share is in the plan's order."""
    return all(list(each) == sorted(each) for each in shares._waiting)
