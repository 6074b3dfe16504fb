# SPDX-License-Identifier: Apache-2.0
"""Fragments of many moves move the very bytes that a loop over rows moves, and no others."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.kernels.page_copy import fragments as kernels
from loracache.kernels.page_copy.fragments import Fragments, Located, Rows, fragments_of, host_runs, split_by_pinned
from loracache.kernels.page_copy.moves import Move

NONE = np.zeros(0, np.int64)
FIELDS = ("device", "host", "nbytes")
NOT_PINNED = NONE, np.zeros(0, np.bool_)


class Cache:
    """Layers of a KV cache in one array: `outermost` "layer", "block", or "gaps" (a storage with gaps between rows)."""

    def __init__(self, blocks: int, sizes: list[int], outermost: str) -> None:
        pad = 24 if outermost == "gaps" else 0
        before = list(itertools.accumulate(sizes, initial=0))
        if outermost == "block":
            base, step = before[:-1], [before[-1]] * len(sizes)
        else:
            step = [size + pad for size in sizes]
            base = list(itertools.accumulate((blocks * each for each in step), initial=0))[:-1]
        self.bytes = np.random.default_rng(len(sizes)).integers(0, 255, blocks * sum(step) + 64, np.uint8)
        self.base, self.step, self.sizes = base, step, sizes
        address = self.bytes.ctypes.data
        self.rows = Rows.of([address + each for each in base], step, sizes, blocks)

    def row(self, layer: int, block: int) -> np.ndarray[Any, Any]:
        start = self.base[layer] + block * self.step[layer]
        return self.bytes[start : start + self.sizes[layer]]


def naive(cache: Cache, move: Move) -> None:
    """Scatter a move row by row."""
    payload, base = b"".join(move.payload), 0
    for layer, size in enumerate(cache.sizes):
        for place, block in enumerate(move.blocks, move.first):
            start = base + place * size
            cache.row(layer, block)[:] = np.frombuffer(payload[start : start + size], np.uint8)
        base += move.of * size


def joined(cache: Cache, moves: Located) -> Fragments:
    found = list(fragments_of(cache.rows, cache.rows.bands(), moves))
    return Fragments(*(np.concatenate([NONE, *(getattr(each, name) for each in found)]) for name in FIELDS))


def scatter(fragments: Fragments) -> None:
    for device, host, nbytes in zip(fragments.device, fragments.host, fragments.nbytes, strict=True):
        ctypes.memmove(int(device), int(host), int(nbytes))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, list[int], str, list[tuple[list[int], int, int, list[int]]]]:
    """(blocks, bytes of rows, what is outermost, moves as (blocks, first, of, cuts of the payload))."""
    sizes = [8 * each for each in draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))]
    blocks = draw(st.integers(1, 12))
    left: list[int] = list(draw(st.permutations(range(blocks))))
    left = left if draw(st.booleans()) else sorted(left)
    moves = []
    while draw(st.booleans()) and left:
        count = draw(st.integers(0, min(4, len(left))))
        taken, left = left[:count], left[count:]
        of = draw(st.integers(max(1, count), 5))
        cuts = draw(st.lists(st.integers(0, of * sum(sizes) // 8), max_size=4))
        moves.append((taken, draw(st.integers(0, of - count)), of, sorted(8 * cut for cut in cuts)))
    return blocks, sizes, draw(st.sampled_from(["layer", "block", "gaps"])), moves


def payload_of(arena: np.ndarray[Any, Any], start: int, nbytes: int, cuts: list[int]) -> list[memoryview]:
    """Parts of the arena in an order that turns every two around, as extents may lie."""
    edges = [0, *cuts, nbytes]
    lengths = [high - low for low, high in itertools.pairwise(edges)]
    parts = [arena.data[start + low : start + high] for low, high in itertools.pairwise(edges)]
    if len(parts) > 1 and lengths[0] == lengths[1]:
        parts[0], parts[1] = parts[1], parts[0]
    return parts


@given(shapes(), st.lists(st.integers(0, 300), max_size=6), st.sampled_from([1, 6, 1 << 14]))
def test_fragments_move_what_a_loop_over_rows_moves(shape: Any, cut_at: list[int], together: int) -> None:
    with mock.patch.object(kernels, "_TOGETHER", together):
        moves_what_a_loop_moves(shape, cut_at)


def moves_what_a_loop_moves(shape: Any, cut_at: list[int]) -> None:
    blocks, sizes, outermost, described = shape
    found, expected = Cache(blocks, sizes, outermost), Cache(blocks, sizes, outermost)
    arena = np.random.default_rng(1).integers(0, 255, 4096, np.uint8)
    moves, at = [], 0
    for taken, first, of, cuts in described:
        moves.append(Move(taken, payload_of(arena, at, of * sum(sizes), cuts), first, of))
        at += of * sum(sizes)
    address = arena.ctypes.data
    edges = np.array(sorted({address, *(address + 8 * each for each in cut_at), address + 4096}), np.int64)
    pinned = np.arange(len(edges)) % 3 != 2
    pinned[-1] = False
    for part in split_by_pinned(moves, edges, pinned):
        fragments = joined(found, part)
        assert (fragments.nbytes > 0).all()
        scatter(fragments)
    near, far = split_by_pinned(moves, edges, pinned)
    straight = joined(found, near)
    places = np.searchsorted(edges, straight.host, side="right") - 1
    assert pinned[places].all()
    assert (straight.host + straight.nbytes <= edges[places + 1]).all()
    for move in moves:
        naive(expected, move)
    assert (found.bytes == expected.bytes).all()
    assert len(near) + len(far) == len(moves)


@given(shapes(), st.integers(1, 9), st.integers(1, 4))
def test_parts_and_smaller_fragments_are_the_same_bytes(shape: Any, words: int, most: int) -> None:
    blocks, sizes, outermost, described = shape
    found, expected = Cache(blocks, sizes, outermost), Cache(blocks, sizes, outermost)
    arena = np.random.default_rng(1).integers(0, 255, 4096, np.uint8)
    moves = [Move(taken, [arena.data], first, of) for taken, first, of, _ in described]
    whole = joined(found, split_by_pinned(moves, *NOT_PINNED)[1])
    small = whole.at_most(8 * words)
    assert not len(small) or small.nbytes.max() <= 8 * words
    for part in small.parts(24 * words, most):
        piece = small[part]
        assert len(piece) <= most
        assert piece.nbytes.sum() <= 24 * words
        scatter(piece)
    for move in moves:
        naive(expected, move)
    assert (found.bytes == expected.bytes).all()


def located(moves: list[Move]) -> Located:
    return split_by_pinned(moves, *NOT_PINNED)[1]


def one(cache: Cache, *moves: Move) -> Fragments:
    return joined(cache, located(list(moves)))


@pytest.mark.parametrize("together", [1, 20, 1 << 14])
@pytest.mark.parametrize("cut", [False, True])
def test_of_many_moves_of_one_form_all_are_made_however_few_at_a_time(
    cut: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Payloads may be longer than what is in them, and each have another length."""
    monkeypatch.setattr(kernels, "_TOGETHER", together)
    found, expected = (Cache(16, [16, 8, 24], "layer") for _ in range(2))
    arena = np.random.default_rng(2).integers(0, 255, 8192, np.uint8)
    moves, at = [], 0
    for number in range(7):
        nbytes = 4 * 48 + 16 * number
        parts = payload_of(arena, at, nbytes, [64 + 8 * number] if cut else [])
        moves.append(Move([2 * number + 1, 2 * number], parts, 1, 4))
        at += nbytes
    scatter(one(found, *moves))
    for move in moves:
        naive(expected, move)
    assert (found.bytes == expected.bytes).all()


def test_a_block_of_a_block_outermost_cache_is_one_fragment() -> None:
    cache = Cache(8, [64] * 32, "block")
    found = one(cache, *(Move([block], [memoryview(bytearray(64 * 32))], 0, 1) for block in (5, 2, 7)))
    assert found.nbytes.tolist() == [64 * 32] * 3


def test_blocks_that_follow_each_other_are_one_fragment_a_layer() -> None:
    cache = Cache(8, [64] * 3, "layer")
    found = one(cache, Move([2, 3, 4, 6], [memoryview(bytearray(64 * 12))], 0, 4))
    assert sorted(found.nbytes.tolist()) == [64, 64, 64, 192, 192, 192]


def test_moves_are_never_one_fragment() -> None:
    """Their payloads may lie in different registrations, even where they lie side by side."""
    cache, payload = Cache(8, [64], "layer"), memoryview(bytearray(256))
    found = one(cache, Move([2, 3], [payload[:128]], 0, 2), Move([4, 5], [payload[128:]], 0, 2))
    assert found.nbytes.tolist() == [128, 128]


def test_runs_of_the_host_end_at_edges() -> None:
    host, nbytes = np.array([0, 10, 20, 50]), np.array([10, 10, 10, 5])
    assert [each.tolist() for each in host_runs(host, nbytes)] == [[0, 50], [30, 5]]
    assert [each.tolist() for each in host_runs(host, nbytes, np.array([0, 15, 50, 55]))] == [[0, 15, 50], [15, 15, 5]]
    assert [each.tolist() for each in host_runs(host, nbytes, np.array([3, 7, 25, 52]))] == [
        [0, 3, 7, 25, 50, 52],
        [3, 4, 18, 5, 2, 3],
    ]


def test_runs_of_the_host_begin_where_they_are_told_to() -> None:
    host, nbytes = np.array([0, 10, 20, 50]), np.array([10, 10, 10, 5])
    assert [each.tolist() for each in host_runs(host, nbytes, None, [0, 2, 3])] == [[0, 20, 50], [20, 10, 5]]


@pytest.mark.parametrize(
    ("move", "said"),
    [
        (Move([8], [memoryview(bytearray(192))], 0, 1), "blocks 8 to 8 of 8"),
        (Move([-1], [memoryview(bytearray(192))], 0, 1), "blocks -1 to -1 of 8"),
        (Move([1], [memoryview(bytearray(184))], 0, 1), "outside its payload"),
        (Move([1], [memoryview(bytearray(384))], 2, 2), "outside its payload"),
        (Move([1], [memoryview(bytearray(384))], -1, 2), "outside its payload"),
    ],
)
def test_what_reaches_outside_is_refused(move: Move, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        one(Cache(8, [64] * 3, "layer"), move)


def test_nothing_is_answered_where_one_of_many_moves_reaches_outside() -> None:
    """They are made a few at a time, and the first are submitted before the last are made."""
    cache, payload = Cache(8, [64], "layer"), memoryview(bytearray(64))
    moves = [Move([0], [payload], 0, 1) for _ in range(40_000)]
    assert [len(each) for each in fragments_of(cache.rows, cache.rows.bands(), located(moves))] == [16384, 16384, 7232]
    with pytest.raises(ValueError, match="blocks 0 to 8 of 8"):
        fragments_of(cache.rows, cache.rows.bands(), located([*moves, Move([8], [payload], 0, 1)]))
    wider = [Move([0, 1], [memoryview(bytearray(127))], 0, 2)]
    with pytest.raises(ValueError, match="a move of 2 blocks reaches outside its payload"):
        fragments_of(cache.rows, cache.rows.bands(), located(moves + wider))


def test_memory_that_may_only_be_read_has_an_address_too() -> None:
    payload = bytes(range(64))
    assert (
        bytes(ctypes.string_at(int(one(Cache(8, [64], "layer"), Move([1], [memoryview(payload)], 0, 1)).host[0]), 64))
        == payload
    )
