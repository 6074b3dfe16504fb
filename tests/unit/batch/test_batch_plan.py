# SPDX-License-Identifier: Apache-2.0
"""The plan's order sends each request once, what shares together, and computes what the bound says; the replay of the
prefix cache is exact."""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracache.batch.holding import Blocks, Holding
from loracache.batch.plan import Plan, make_plan
from loracache.batch.prompts import PromptHasher
from loracache.batch.replay import computed_at_least, replay
from loracache.batch.tree import NOTHING
from loracache.errors import UsageError
from tests.unit.batch.conftest import Asked, batches, prompts_of

blocks = st.integers(1, 3)
few = settings(max_examples=50, deadline=None)


# -- the order ----------


@few
@given(batches(), blocks)
def test_the_order_has_each_request_once_and_every_subtree_together(batch: list[Asked], block: int) -> None:
    plan = make_plan(prompts_of(batch, block))
    assert sorted(plan.order.tolist()) == list(range(len(batch)))
    place = np.argsort(plan.order)
    for first, last in zip(plan.tree.first.tolist(), plan.tree.last.tolist(), strict=True):
        places = sorted(place[plan.tree.order[first:last]].tolist())
        assert places == list(range(places[0], places[-1] + 1))
    for name in {each.adapter for each in batch}:
        places = sorted(int(place[n]) for n, each in enumerate(batch) if each.adapter == name)
        assert places == list(range(places[0], places[-1] + 1))


def test_what_decodes_most_for_its_prefill_goes_first_on_every_level() -> None:
    batch = [
        Asked([5, 5, 5, 5, 1, 1], decode=1),
        Asked([7, 7, 7, 7, 1, 1], decode=30),
        Asked([5, 5, 5, 5, 2, 2], decode=2),
        Asked([7, 7, 7, 7, 2, 2], decode=40),
        Asked([9, 9, 9, 9], decode=1000),
    ]
    assert make_plan(prompts_of(batch, 2)).order.tolist() == [4, 3, 1, 2, 0]


def test_adapters_stand_together_and_go_by_their_ratio() -> None:
    batch = [
        Asked([1] * 9, "few", decode=1),
        Asked([1] * 9, "many", "x", decode=50),
        Asked([1] * 9, "few", decode=2),
        Asked([1] * 9, "many", "y", decode=1),
    ]
    assert make_plan(prompts_of(batch, 2)).order.tolist() == [1, 3, 2, 0]


# -- the replay ----------


def block_by_block(batch: Sequence[Asked], order: Sequence[int], block: int, room: int, running: int) -> int:
    """Tokens computed, by a cache that knows nothing but blocks under the tokens before them."""
    resident: set[Any] = set()
    users: dict[Any, int] = {}
    free: OrderedDict[Any, None] = OrderedDict()
    ends: list[tuple[int, int]] = []
    step = computed = 0

    def keys(number: int) -> list[Any]:
        each = batch[number]
        whole = len(each.tokens) // block
        root = (each.adapter, each.salt)
        named = [(root, tuple(each.tokens[: (at + 1) * block])) for at in range(whole)]
        return named + [(number, at) for at in range(whole, -(-(len(each.tokens) + each.decode) // block))]

    for number in order:
        mine = keys(number)
        while ends and (
            ends[0][0] <= step or len(ends) >= running or len(users) + sum(key not in users for key in mine) > room
        ):
            end, ended = heapq.heappop(ends)
            step = max(step, end)
            for key in reversed(keys(ended)):
                users[key] -= 1
                if not users[key]:
                    del users[key]
                    free[key] = None
        hits = 0
        while hits < len(mine) and mine[hits] in resident:
            hits += 1
        computed += len(batch[number].tokens) - block * min(hits, max(len(batch[number].tokens) - 1, 0) // block)
        for key in mine:
            users[key] = users.get(key, 0) + 1
            free.pop(key, None)
        for key in mine:
            if key not in resident:
                if len(resident) >= room:
                    gone, _ = free.popitem(last=False)
                    resident.remove(gone)
                resident.add(key)
        heapq.heappush(ends, (step + 1 + batch[number].decode, number))
    return computed


@settings(max_examples=120, deadline=None)
@given(batches(8, 24), st.integers(1, 2), st.integers(0, 12), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_replay_computes_what_a_cache_of_single_blocks_does(
    batch: list[Asked], block: int, more: int, running: int, chance: random.Random
) -> None:
    plan = make_plan(prompts_of(batch, block))
    held = Blocks(plan.prompts, plan.tree)
    room = held.largest + more
    order = list(range(len(batch)))
    chance.shuffle(order)
    done = replay(plan.prompts, held, order, room * block, running)
    assert done.computed == block_by_block(batch, order, block, room, running)
    assert done.most_held <= room * block


@few
@given(batches(), blocks, st.integers(1, 4))
def test_the_plan_computes_the_bound_where_the_longest_request_fits(
    batch: list[Asked], block: int, running: int
) -> None:
    plan = make_plan(prompts_of(batch, block))
    held = Blocks(plan.prompts, plan.tree)
    bound = computed_at_least(plan.prompts, plan.tree)
    for order in (plan.order, plan.tree.order):
        assert replay(plan.prompts, held, order.tolist(), held.largest * block, running).computed == bound


@few
@given(batches(), blocks, st.randoms(use_true_random=False))
def test_no_order_computes_less_than_the_bound(batch: list[Asked], block: int, chance: random.Random) -> None:
    plan = make_plan(prompts_of(batch, block))
    held = Blocks(plan.prompts, plan.tree)
    order = list(range(len(batch)))
    chance.shuffle(order)
    room = sum(held.size) * block
    assert replay(plan.prompts, held, order, room, 1).computed >= computed_at_least(plan.prompts, plan.tree)


def test_a_request_that_does_not_fit_is_refused_by_its_size() -> None:
    plan = make_plan(prompts_of([Asked([1] * 10, decode=20)], 4))
    with pytest.raises(UsageError, match="a request of 32 tokens does not fit a KV cache of 31 tokens"):
        plan.figures(31, 1)


# -- what running requests hold ----------


@few
@given(batches(), blocks, st.integers(0, 12), st.randoms(use_true_random=False))
def test_what_groups_hold_never_passes_the_bound(
    batch: list[Asked], block: int, more: int, chance: random.Random
) -> None:
    plan = make_plan(prompts_of(batch, block))
    held = Blocks(plan.prompts, plan.tree)
    room = held.largest + more
    holding = Holding(held.size, room)
    running: list[int] = []
    for number in plan.order.tolist():
        while not holding.fits(held.path(number)):
            holding.release(held.path(running.pop(chance.randrange(len(running)))))
        holding.take(held.path(number))
        running.append(number)
        counted = {key for each in running for key in _keys(batch, each, block)}
        assert holding.in_use == len(counted) <= room
    for number in running:
        holding.release(held.path(number))
    assert holding.in_use == 0


def _keys(batch: list[Asked], number: int, block: int) -> list[Any]:
    each = batch[number]
    whole = len(each.tokens) // block
    named = [(each.adapter, each.salt, tuple(each.tokens[: (at + 1) * block])) for at in range(whole)]
    return named + [(number, at) for at in range(whole, -(-(len(each.tokens) + each.decode) // block))]


def test_a_request_larger_than_all_the_room_runs_alone() -> None:
    plan = make_plan(prompts_of([Asked([1] * 10), Asked([2])], 1))
    held = Blocks(plan.prompts, plan.tree)
    holding = Holding(held.size, 5)
    assert holding.fits(held.path(0))
    holding.take(held.path(0))
    assert not holding.fits(held.path(1))


# -- the sets of the benchmark ----------


def planned(items: Any) -> Plan:
    hasher = PromptHasher(16)
    for prompt, decode in items:
        hasher.add(prompt, decode=decode)
    return make_plan(hasher.prompts())


@pytest.mark.parametrize("name", ["documents", "few_shot", "agents", "conversations"])
def test_planned_batches_compute_the_bound_where_the_files_order_computes_half_as_much_again(
    sets: Any, name: str
) -> None:
    small = {"documents": {"count": 60, "tokens": 2000}, "few_shot": {"tasks": 40, "questions": 30}}
    plan = planned(getattr(sets, name)(**small.get(name, {})))
    bound = computed_at_least(plan.prompts, plan.tree)
    found = plan.figures(bound // 20, 64)
    assert found.planned <= 1.02 * found.bound
    assert found.first_come >= 1.5 * found.bound
    assert found.bound <= found.tokens - found.saved_by_groups


def test_hash_ids_of_a_trace_become_tokens_that_share_what_they_share(sets: Any) -> None:
    one, other = sets.tokens_of([4, 5, 6], 1100), sets.tokens_of([4, 5, 7], 1536)
    assert (len(one), len(other)) == (1100, 1536)
    assert one[:1024].tolist() == other[:1024].tolist()
    assert one[1024:].tolist() != other[1024:1100].tolist()
    items = [(sets.tokens_of(ids, length), 8) for ids, length in sets.hash_ids_of(60, 5)]
    plan = planned(items)
    bound = computed_at_least(plan.prompts, plan.tree)
    assert plan.figures(bound // 10, 16).planned == bound


def test_a_large_batch_is_planned_by_prefix_and_adapter(sets: Any) -> None:
    items = list(sets.large(2000, tokens=200))
    hasher = PromptHasher()
    for prompt, adapter, decode in items:
        hasher.add(prompt, adapter=adapter, decode=decode)
    plan = make_plan(hasher.prompts())
    adapters = [items[number][1] for number in plan.order.tolist()]
    assert len([at for at in range(1, 2000) if adapters[at] != adapters[at - 1]]) == len(set(adapters)) - 1
    assert (plan.group != NOTHING).mean() > 0.95
    assert plan.saved > 0.3 * plan.prompts.tokens.sum()
