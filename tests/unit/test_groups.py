# SPDX-License-Identifier: Apache-2.0
"""Groups: what a prefix needs is what its layers read, token by token, and a hit reaches as far as all have that."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.errors import UsageError
from loracache.groups import Group, Need, continued, furthest

widths = st.integers(1, 7)
groups = st.one_of(
    st.builds(Group, st.just(Need.WINDOW), st.integers(0, 30), st.just(("w",))),
    st.builds(Group, st.just(Need.SPAN), st.integers(1, 30), st.just(("c",))),
    st.sampled_from([Group(Need.ALL, 0, ("a",)), Group(Need.STATE, 0, ("s",))]),
)


def read(group: Group, end: int) -> set[int]:
    """Positions whose KV the layers read to compute the token at `end`; of a state, the one that it stands at."""
    match group.need:
        case Need.ALL:
            return set(range(end))
        case Need.WINDOW:  # the model's own window is one longer: it counts the token itself
            return {at for at in range(end) if end - at <= group.tokens}
        case Need.SPAN:
            return {at for at in range(end) if at // group.tokens == end // group.tokens}
        case Need.STATE:
            return {end - 1} if end else set()


def needed(group: Group, chunks: int, width: int) -> set[int]:
    """Chunks that hold any of it, for the token behind a prefix of whole chunks."""
    return {at // width for at in read(group, chunks * width)}


@given(groups, st.integers(0, 20), widths)
def test_the_first_chunk_is_that_of_the_first_token_that_is_read(group: Group, chunks: int, width: int) -> None:
    assert set(range(group.first(chunks, width), chunks)) == needed(group, chunks, width)


@given(groups, st.integers(0, 20), widths, st.integers(0, 40))
def test_what_later_tokens_read_is_not_before_what_the_first_one_does(
    group: Group, chunks: int, width: int, later: int
) -> None:
    """Else a hit would be right for its first token and wrong for the next."""
    begin = chunks * width
    before = {at for at in read(group, begin + later) if at < begin}
    if group.need is not Need.STATE:  # whose state goes on with each token
        assert before <= read(group, begin)


@st.composite
def holdings(draw: st.DrawFn) -> tuple[list[tuple[Group, list[bool]]], int, int]:
    """Some groups and which chunks of each are held, the width of a chunk, the most chunks."""
    most = draw(st.integers(0, 14))
    mostly = st.integers(0, 5).map(bool)
    held = draw(st.lists(st.tuples(groups, st.lists(mostly, max_size=16)), max_size=4))
    return held, draw(widths), most


def brute(held: list[tuple[Group, list[bool]]], width: int, most: int) -> int:
    def whole(group: Group, chunks: list[bool], end: int) -> bool:
        return all(at < len(chunks) and chunks[at] for at in needed(group, end, width))

    return max(end for end in range(most + 1) if all(whole(group, chunks, end) for group, chunks in held))


@given(holdings())
def test_the_furthest_is_what_trying_each_end_finds(case: tuple[list[tuple[Group, list[bool]]], int, int]) -> None:
    held, width, most = case
    assert furthest(held, width, most) == brute(held, width, most)


@given(holdings(), st.data())
def test_one_object_less_never_makes_a_hit_longer(
    case: tuple[list[tuple[Group, list[bool]]], int, int], data: st.DataObject
) -> None:
    held, width, most = case
    before = furthest(held, width, most)
    cases = [chunks for _, chunks in held if chunks]
    if cases:
        chunks = data.draw(st.sampled_from(cases))
        chunks[data.draw(st.integers(0, len(chunks) - 1))] = False
    assert furthest(held, width, most) <= before


def test_no_chunks_are_a_prefix_of_none() -> None:
    assert furthest([(Group(Need.STATE, 0, ("s",)), [True])], 4, 0) == 0
    assert furthest([], 4, 3) == 3


@pytest.mark.parametrize(
    ("need", "tokens"),
    [
        (Need.ALL, 1), (Need.ALL, -1), (Need.STATE, 5), (Need.STATE, -1), (Need.WINDOW, -1), (Need.WINDOW, 1.0),
        (Need.WINDOW, True), (Need.SPAN, 0), (Need.SPAN, -3), (Need.SPAN, "4"), ("window", 4), ("most", 0), (None, 0),
    ],
)  # fmt: skip
def test_tokens_that_a_need_cannot_have_are_refused(need: Any, tokens: Any) -> None:
    with pytest.raises(UsageError, match=r"group.* needs"):
        Group(need, tokens, ("s",))


@pytest.mark.parametrize("shards", [(), ("",), ["s"], "s", (1,), (None,)])
def test_a_group_has_shards_with_names(shards: Any) -> None:
    with pytest.raises(UsageError, match="shards with names"):
        Group(Need.STATE, 0, shards)


# -- how far, and from where -------------------------------------------------------------------------------------------

WINDOW, STATE = Group(Need.WINDOW, 7, ("w1", "w2")), Group(Need.STATE, 0, ("s",))


def test_a_chunk_is_as_far_away_as_the_slowest_object_that_is_needed_of_it() -> None:
    """Chunks of four tokens: a prefix of three needs the windows of its last two and the state of its last."""
    chain = [1, 1, 1, 2, 1, 1]  # two shards a chunk
    beside = [3, None, None, 3, 1, 3, 1, 1, 2]  # w1, w2, s of each chunk
    assert continued((WINDOW, STATE), 4, 2, chain, beside) == (3, [1, 3, 2])
    assert continued((WINDOW, STATE), 4, 2, chain, [*beside[:8], None]) == (0, [])
    assert continued((STATE,), 4, 2, chain, [None, 3, None]) == (2, [1, 3])


def test_what_was_not_told_of_is_not_held() -> None:
    assert continued((STATE,), 4, 1, [1, 1, 1], [1, 1]) == (2, [1, 1])
    assert continued((STATE,), 4, 1, [1, 1, 1], []) == (0, [])


def test_a_chain_without_groups_reaches_as_far_as_it_is_held() -> None:
    assert continued((), 4, 1, [1, 3, 2], []) == (3, [1, 3, 2])
    assert continued((), 4, 2, [1, 3, 2], []) == (1, [3])


def test_a_model_without_full_attention_reaches_as_far_as_its_groups_do() -> None:
    assert continued((STATE,), 4, 0, [], [1, 2, None]) == (2, [2])
    assert continued((WINDOW,), 4, 0, [], [None, None, 1, 1, 2, 1]) == (3, [1, 2])
    assert continued((Group(Need.SPAN, 8, ("c",)),), 4, 0, [], [None, None]) == (2, [])


@given(st.lists(groups.filter(lambda group: group.need is not Need.ALL), max_size=3), widths, st.data())
def test_a_chain_is_continued_behind_the_furthest(some: list[Group], width: int, data: st.DataObject) -> None:
    some = [Group(group.need, group.tokens, (f"{at}",)) for at, group in enumerate(some)]
    most = data.draw(st.integers(0, 8))
    rows = data.draw(
        st.lists(
            st.lists(st.sampled_from([None, 1, 2, 3]), min_size=len(some), max_size=len(some)),
            min_size=most,
            max_size=most,
        )
    )
    chain = data.draw(st.lists(st.integers(1, 3), min_size=most, max_size=most))
    count, tiers = continued(some, width, 1, chain, [tier for row in rows for tier in row])
    held = [(group, [row[at] is not None for row in rows]) for at, group in enumerate(some)]
    assert count == len(tiers) == brute(held, width, most)
    for chunk, tier in enumerate(tiers):
        used = [row for at, row in enumerate(rows[chunk]) if chunk in needed(some[at], count, width)]
        assert tier == max([chain[chunk], *(each for each in used if each is not None)])
