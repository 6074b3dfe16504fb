# SPDX-License-Identifier: Apache-2.0
"""The tree of a batch holds exactly the prefixes that are shared; the fold saves as much as any choice of groups."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from loracache.batch import prompts as prompts_module
from loracache.batch.fold import fold
from loracache.batch.plan import make_plan
from loracache.batch.tree import NOTHING, build_tree
from loracache.errors import UsageError
from tests.unit.batch.conftest import Asked, batches, prompts_of, shared

blocks = st.integers(1, 3)


@settings(max_examples=60, deadline=None)
@given(batches(), blocks)
def test_neighbours_share_what_their_tokens_say(batch: list[Asked], block: int) -> None:
    tree = build_tree(prompts_of(batch, block))
    assert sorted(tree.order.tolist()) == list(range(len(batch)))
    order = [batch[number] for number in tree.order]
    assert tree.shared.tolist()[1:] == [shared(*pair, block) for pair in itertools.pairwise(order)]


@settings(max_examples=60, deadline=None)
@given(batches(), blocks)
def test_no_earlier_request_shares_more_than_the_neighbour_does(batch: list[Asked], block: int) -> None:
    tree = build_tree(prompts_of(batch, block))
    order = [batch[number] for number in tree.order]
    for at, each in enumerate(order):
        assert int(tree.shared[at]) == max((shared(each, before, block) for before in order[:at]), default=0)


@settings(max_examples=60, deadline=None)
@given(batches(), blocks)
def test_nodes_are_the_prefixes_that_two_requests_share_and_no_others(batch: list[Asked], block: int) -> None:
    tree = build_tree(prompts_of(batch, block))
    expected = {
        (depth, frozenset(n for n, each in enumerate(batch) if shared(each, batch[one], block) >= depth))
        for one, other in itertools.combinations(range(len(batch)), 2)
        if (depth := shared(batch[one], batch[other], block))
    }
    nodes = [
        (int(depth), frozenset(tree.order[first:last].tolist()))
        for depth, first, last in zip(tree.depth, tree.first, tree.last, strict=True)
        if depth > 0
    ]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == expected
    for at, leaf in enumerate(tree.leaf.tolist()):
        above = [node for node in range(len(tree.depth)) if tree.first[node] <= at < tree.last[node]]
        assert leaf == max(above, key=lambda node: tree.depth[node], default=NOTHING)
    seen: set[int] = set()
    for node in tree.upward.tolist():
        parent = int(tree.parent[node])
        assert parent not in seen
        if parent != NOTHING:
            assert tree.first[parent] <= tree.first[node]
            assert tree.last[node] <= tree.last[parent]
            assert tree.depth[parent] < tree.depth[node]
        seen.add(node)
    assert len(seen) == len(tree.depth)


@settings(max_examples=40, deadline=None)
@given(batches(5, 4))
def test_the_fold_saves_what_the_best_of_all_groupings_saves(batch: list[Asked]) -> None:
    best = 0
    for lengths in itertools.product(*(range(len(each.tokens) + 1) for each in batch)):
        groups = Counter(
            (each.adapter, each.salt, *each.tokens[:length]) for each, length in zip(batch, lengths, strict=True)
        )
        best = max(best, sum((count - 1) * (len(prefix) - 2) for prefix, count in groups.items()))
    plan = make_plan(prompts_of(batch, 1))
    assert plan.saved == best
    counts = Counter(plan.group.tolist())
    counts.pop(NOTHING, None)
    assert sum((count - 1) * plan.prefix(group) for group, count in counts.items()) == best
    for number, group in enumerate(plan.group.tolist()):
        members = [batch[other] for other in np.flatnonzero(plan.group == group)]
        if group != NOTHING:
            assert all(shared(batch[number], each, 1) >= plan.prefix(group) for each in members)


def best_of_all_prefixes(batch: list[Asked]) -> int:
    """Tokens saved by the best set of prefixes that two requests share, each request with the longest of its own."""
    prefixes = {
        (one.adapter, one.salt, *one.tokens[:length])
        for one, other in itertools.combinations(batch, 2)
        if (length := shared(one, other, 1))
    }
    assume(len(prefixes) <= 8)
    whole = [(each.adapter, each.salt, *each.tokens) for each in batch]
    best = 0
    for count in range(len(prefixes) + 1):
        for chosen in itertools.combinations(prefixes, count):
            saved = -sum(len(each) - 2 for each in chosen)
            saved += sum(
                max((len(each) - 2 for each in chosen if own[: len(each)] == each), default=0) for own in whole
            )
            best = max(best, saved)
    return best


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(batches(14, 16))
def test_the_fold_saves_what_the_best_choice_of_shared_prefixes_saves(batch: list[Asked]) -> None:
    assert make_plan(prompts_of(batch, 1)).saved == best_of_all_prefixes(batch)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=9))
def test_the_fold_is_exact_where_prefixes_lie_within_each_other(lengths: list[int]) -> None:
    """Prompts that leave one long prefix at different places: a chain of nodes, each with rivals above it."""
    batch = [Asked([0] * length + [1 + number]) for number, length in enumerate(lengths)]
    assert make_plan(prompts_of(batch, 1)).saved == best_of_all_prefixes(batch)


def test_a_prefix_far_down_is_forked_though_its_parent_is_not() -> None:
    """Where each node decides against its parent alone, all stay with the shortest prefix: 60 tokens saved."""
    above = [Asked([0] * 10 + [9 + number]) for number in range(4)]
    between = [Asked([0] * 15 + [8])]
    below = [Asked([0] * 30 + [number]) for number in (1, 2)]
    batch = [*above, *between, *below]
    plan = make_plan(prompts_of(batch, 1))
    assert [plan.prefix(group) for group in plan.group.tolist()] == [10] * 5 + [30] * 2
    assert plan.saved == 4 * 10 + 30


@settings(max_examples=30, deadline=None)
@given(batches(), blocks, st.integers(1, 40))
def test_hashes_do_not_depend_on_how_many_prompts_are_hashed_at_once(
    batch: list[Asked], block: int, at_once: int
) -> None:
    whole = prompts_of(batch, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_module, "_AT_ONCE", at_once)
        parts = prompts_of(batch, block)
    assert whole.hashes.tolist() == parts.hashes.tolist()
    assert whole.starts.tolist() == parts.starts.tolist()


def test_an_empty_batch_has_a_plan() -> None:
    plan = make_plan(prompts_of([], 16))
    assert (len(plan.order), plan.saved, plan.figures(0, 1).bound) == (0, 0, 0)
    assert fold(plan.tree).saved == 0


def test_blocks_have_a_token_at_least() -> None:
    with pytest.raises(UsageError, match="block_tokens=0 must be 1 or more"):
        prompts_of([], 0)
