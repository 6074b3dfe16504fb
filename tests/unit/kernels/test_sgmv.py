# SPDX-License-Identifier: Apache-2.0
"""Segmented LoRA multiplication over paged weights, on the CPU, and how a batch is cut into tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from loracache.kernels import sgmv
from loracache.kernels.sgmv_launch import INVARIANT_TOKENS
from loracache.kernels.tables import plan_tiles, tile_rows

LAYOUTS = ("contiguous", "scattered", "strided", "offset")
DTYPES = ("float32", "float16", "bfloat16")
MIXED = [[8, 8, 8], [0, 0, 0], [12, 1, 0], [64, 64, 64], [1, 0, 64]]
NO_SLICE = [[8], [0], [12], [64], [1]]
# Every slot of MIXED, its rows neither together nor in order, and rows of nobody.
SLOTS = np.array([3, 0, -1, 2, 2, 1, 4, 0, -1, 3, 3, 3, 4, 2, 0, 0, -1])


def run(
    batch: Any, order: np.ndarray | None = None, tiles: np.ndarray | None = None, sized_for: int = 0
) -> torch.Tensor:
    """y after lora_linear or lora_embedding, whichever the batch is for."""
    weights, y = batch.weights, batch.y.clone()
    if order is None or tiles is None:
        order, tiles = plan_tiles(batch.slots)
    tables = (torch.from_numpy(order), torch.from_numpy(tiles), *weights.tables())
    if batch.embeds:
        sgmv.lora_embedding(y, batch.x, *tables, weights.inputs, weights.chunk, weights.most_rank, None, sized_for)
    else:
        sgmv.lora_linear(y, batch.x, *tables, weights.widths, weights.chunk, weights.most_rank, None, sized_for)
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_mixed_ranks_is_what_float64_says(
    paged: Callable[..., Any], batch_of: Callable[..., Any], layout: str, dtype: str
) -> None:
    weights = paged(MIXED, inputs=100, widths=[96, 33, 64], layout=layout, dtype=dtype)
    batch = batch_of(weights, SLOTS, dtype=dtype)
    batch.check(run(batch))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_is_what_float64_says(
    paged: Callable[..., Any], batch_of: Callable[..., Any], layout: str, dtype: str
) -> None:
    weights = paged(NO_SLICE, inputs=200, widths=[72], layout=layout, dtype=dtype)
    batch = batch_of(weights, SLOTS, dtype=dtype, embeds=True)
    batch.check(run(batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_may_be_as_high_as_peft_s_adapters_have_them(
    paged: Callable[..., Any], batch_of: Callable[..., Any], dtype: str
) -> None:
    weights = paged([[320, 8], [512, 512], [1, 0]], inputs=100, widths=[96, 33], dtype=dtype)
    batch = batch_of(weights, np.array([0, 1, 2, -1, 1, 0]), dtype=dtype)
    batch.check(run(batch))


@pytest.mark.parametrize(("weights_dtype", "dtype"), list(itertools.permutations(DTYPES, 2)))
def test_inputs_may_have_another_dtype_than_weights(
    paged: Callable[..., Any], batch_of: Callable[..., Any], weights_dtype: str, dtype: str
) -> None:
    weights = paged(MIXED, inputs=100, widths=[96, 33, 64], dtype=weights_dtype)
    batch = batch_of(weights, SLOTS, dtype=dtype)
    batch.check(run(batch))


@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_is_enough(paged: Callable[..., Any], batch_of: Callable[..., Any], layout: str, dtype: str) -> None:
    weights = paged(MIXED, inputs=128, widths=[64, 32, 32], layout=layout, dtype=dtype)
    for slot in range(-1, len(MIXED)):
        batch = batch_of(weights, np.array([slot]), dtype=dtype)
        batch.check(run(batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_tokens_are_what_float64_says(paged: Callable[..., Any], batch_of: Callable[..., Any], dtype: str) -> None:
    weights = paged(MIXED, inputs=256, widths=[128, 64, 64], dtype=dtype, page_elements=1024)
    slots = np.random.default_rng(0).integers(-1, len(MIXED), 1000)
    for order in (slots, np.sort(slots)):  # rows of a slot gathered, and in place
        batch = batch_of(weights, order, dtype=dtype)
        batch.check(run(batch))


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_it_does_not_matter_how_a_batch_is_cut_into_tiles(
    paged: Callable[..., Any], batch_of: Callable[..., Any], rows: int
) -> None:
    batch = batch_of(paged(MIXED, inputs=64, widths=[64, 32, 32]), SLOTS)
    batch.check(run(batch, *plan_tiles(SLOTS, rows)))


def test_tiles_behind_the_last_used_one_and_rows_behind_the_last_ordered_one_are_ignored(
    paged: Callable[..., Any], batch_of: Callable[..., Any]
) -> None:
    batch = batch_of(paged(MIXED, inputs=64, widths=[64, 32, 32]), SLOTS)
    order, tiles = plan_tiles(SLOTS)
    order = np.concatenate([order, np.full(100, 1 << 30, np.int32)])
    tiles = np.concatenate([tiles, np.array([[-1, 0, 5, 0], [-1, 1 << 30, 5, -1]], np.int32)])
    batch.check(run(batch, order, tiles))


@pytest.mark.parametrize("slots", [np.full(4, -1), np.empty(0, np.int64)], ids=["no adapter", "no row"])
def test_a_batch_without_adapters_changes_nothing(
    paged: Callable[..., Any], batch_of: Callable[..., Any], slots: np.ndarray
) -> None:
    batch = batch_of(paged(MIXED, inputs=64, widths=[64, 32, 32]), slots)
    order, tiles = plan_tiles(slots)
    assert not len(order)
    assert tiles.shape == (0, 4)
    assert torch.equal(run(batch, order, tiles), batch.y)


def test_a_batch_that_is_said_to_have_no_adapters_is_not_looked_at(
    paged: Callable[..., Any], batch_of: Callable[..., Any]
) -> None:
    weights = paged(MIXED, inputs=64, widths=[64, 32, 32])
    batch = batch_of(weights, SLOTS)
    tables = (*map(torch.from_numpy, plan_tiles(SLOTS)), *weights.tables())
    for idle in (True, False):
        y = batch.y.clone()
        flag = torch.tensor([idle])
        sgmv.lora_linear(y, batch.x, *tables, weights.widths, weights.chunk, weights.most_rank, flag)
        assert torch.equal(y, batch.y) == idle


@pytest.mark.parametrize("embeds", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_any_batch_where_it_must_be(
    paged: Callable[..., Any], batch_of: Callable[..., Any], dtype: str, embeds: bool
) -> None:
    ranks, widths = (NO_SLICE, [96]) if embeds else (MIXED, [96, 33, 64])
    weights = paged(ranks, inputs=300, widths=widths, dtype=dtype)
    batch = batch_of(weights, np.random.default_rng(0).integers(-1, len(ranks), 70), dtype=dtype, embeds=embeds)
    whole = run(batch, sized_for=INVARIANT_TOKENS)
    batch.check(whole)
    for rows in (slice(0, 1), slice(3, 4), slice(69, 70), slice(1, 30), slice(5, 69)):
        part = batch_of(weights, batch.slots[rows], dtype=dtype, embeds=embeds)
        part.x, part.y = batch.x[rows].clone(), batch.y[rows].clone()
        assert torch.equal(run(part, sized_for=INVARIANT_TOKENS).view(torch.uint8), whole[rows].view(torch.uint8))


def test_another_page_id_gives_another_result(paged: Callable[..., Any], batch_of: Callable[..., Any]) -> None:
    batch = batch_of(paged(MIXED, inputs=64, widths=[64, 32, 32]), SLOTS)
    batch.check(run(batch))
    batch.weights.page_ids[3, 5] = batch.weights.page_ids[3, 4]
    with pytest.raises(AssertionError, match="of the largest value"):
        batch.check(run(batch))


@pytest.mark.parametrize("embeds", [False, True], ids=["linear", "embedding"])
def test_a_compiler_can_trace_the_operators(
    paged: Callable[..., Any], batch_of: Callable[..., Any], embeds: bool
) -> None:
    """They have the schema they declare (y alone changes), and run on tensors without data."""
    weights = paged(NO_SLICE, inputs=64, widths=[96])
    batch = batch_of(weights, SLOTS, embeds=embeds)
    tables = (*map(torch.from_numpy, plan_tiles(SLOTS)), *weights.tables())
    width = weights.inputs if embeds else weights.widths
    arguments = (batch.y.clone(), batch.x, *tables, width, weights.chunk, weights.most_rank)
    operator = sgmv.lora_embedding if embeds else sgmv.lora_linear
    # NaN, with which nothing equals itself, is where nobody may read: the schema test compares bits by value.
    clean = [each.nan_to_num() if isinstance(each, torch.Tensor) else each for each in arguments]
    torch.library.opcheck(operator.default, clean, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in arguments]
        assert operator(*fake) is None


def test_only_y_changes(paged: Callable[..., Any], batch_of: Callable[..., Any]) -> None:
    weights = paged(MIXED, inputs=64, widths=[64, 32, 32])
    batch = batch_of(weights, SLOTS)
    order, tiles = map(torch.from_numpy, plan_tiles(SLOTS))
    inputs = (batch.x, order, tiles, *weights.tables())
    before, y = [each.clone() for each in inputs], batch.y.clone()
    sgmv.lora_linear(y, *inputs, weights.widths, weights.chunk, weights.most_rank)
    assert not torch.equal(y, batch.y)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))


# -- tiles -------------------------------------------------------------------------------------------------------------


@given(slots=st.lists(st.integers(-1, 6), max_size=80), most=st.sampled_from([None, 1, 2, 16, 64]))
def test_tiles_hold_every_row_of_an_adapter_once(slots: Sequence[int], most: int | None) -> None:
    order, tiles = plan_tiles(np.array(slots, np.int64), most)
    assert order.dtype == tiles.dtype == np.int32
    assert sorted(order) == [row for row, slot in enumerate(slots) if slot >= 0]
    places: list[int] = []
    for slot, first, count, row in tiles.tolist():
        rows = order[first : first + count].tolist()
        assert 1 <= count <= (most or len(slots))
        assert {slots[each] for each in rows} == {slot}
        assert rows == sorted(rows)
        together = rows == list(range(rows[0], rows[0] + count))
        assert row == (rows[0] if together else -1)
        places += range(first, first + count)
    assert places == list(range(len(order)))
    used = {slot for slot in slots if slot >= 0}
    assert len(tiles) <= (-(-len(order) // most) + len(used) if most else len(used))


def test_a_padded_batch_never_takes_narrower_tiles_than_the_one_it_was_planned_for() -> None:
    widths = [tile_rows(tokens) for tokens in range(1, 2000)]
    assert widths == sorted(widths)


# -- any shape ---------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """(arguments of PagedWeights, slots of a batch)."""
    slots, slices = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks = st.lists(st.sampled_from([0, 1, 3, 8, 16]), min_size=slices, max_size=slices)
    chunk = draw(st.sampled_from([8, 16, 48]))
    weights = {
        "ranks": draw(st.lists(ranks, min_size=slots, max_size=slots)),
        "inputs": draw(st.integers(1, 100)),
        "widths": draw(st.lists(st.integers(1, 60), min_size=slices, max_size=slices)),
        "chunk": chunk,
        "page_elements": chunk * draw(st.integers(1, 20)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 99)),
    }
    return weights, draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=40))


CANCELS_OUT = {
    "ranks": [[8]],
    "inputs": 4,
    "widths": [1],
    "chunk": 8,
    "page_elements": 8,
    "layout": "scattered",
    "seed": 0,
}


@settings(max_examples=60)
@given(shape=shapes())
@example(shape=(CANCELS_OUT, [0]))
def test_any_shape_is_what_float64_says(
    paged: Callable[..., Any], batch_of: Callable[..., Any], shape: tuple[dict[str, Any], list[int]]
) -> None:
    arguments, slots = shape
    batch = batch_of(paged(**arguments), np.array(slots))
    batch.check(run(batch))
