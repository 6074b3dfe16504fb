# SPDX-License-Identifier: Apache-2.0
"""Segmented LoRA multiplication on a GPU, in Triton. sgmv.py says what the tensors hold.

Two launches, back to back: shrink writes h = x @ A.T of every used tile into float32 scratch (for an embedding: what it
looks up), expand adds scale * h @ B to y. Where a batch has too few tiles to fill the device, the columns of x are cut
into splits that write partial sums of their own. Expand adds them in a fixed order: nothing has to be zeroed before,
nothing is added atomically, and equal inputs give equal bits. From compute capability 9.0 on, expand starts before
shrink has ended (programmatic dependent launch) and waits for it where it first needs h.

Grids follow from shapes alone, so that a CUDA graph of a call stays valid when the tables change. What the tables leave
unused (a tile without a slot, ranks beyond an adapter's own, a slice without LoRA) ends after a load or two. A batch in
which no row has an adapter launches nothing.

What a kernel is compiled for depends on the module and on whether the batch is cut into narrow or wide tiles, and on
nothing else of the batch: sgmv_launch.warm_sizes names batches that between them ask for all kernels there are.

A block of columns is never wider than a chunk, hence lies in one page per rank row. Masks run along rows and ranks, not
along the columns, which are contiguous: loads stay 16 bytes wide. Columns are masked only where a width ends inside a
block, because what follows them in the pool may be anything, NaN included.

Threading: launches on the current stream of the current device, on which all tensors have to lie.
"""
# Kernels are in Triton's language, not Python's: their arguments become pointers and numbers of the GPU.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from loracache.kernels.sgmv_launch import LEAST, Launch, launch_of
from loracache.kernels.tables import A_ADDRESS, B_ADDRESS, PLACE_FIELDS, RANK, round_up

__all__ = ["lora_embedding", "lora_linear"]

_DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_RANK, _A_ADDRESS, _B_ADDRESS = tl.constexpr(RANK), tl.constexpr(A_ADDRESS), tl.constexpr(B_ADDRESS)
_PLACE_FIELDS, _ALIGNED = tl.constexpr(PLACE_FIELDS), tl.constexpr(LEAST)
# Parts of tables, which begin anywhere, and numbers that differ from batch to batch: those that happen to be aligned
# (or one) get no kernel of their own.
_PLAIN = ("places", "scales", "splits", "blocks")


@triton.jit
def _pages_of(page_ids, at, used, PAGE: tl.constexpr):
    """The pages that hold the addresses `at`. page_ids: from the page on that these addresses count from."""
    return tl.load(page_ids + at // PAGE, mask=used, other=0)


@triton.jit(do_not_specialize=_PLAIN)
def _shrink_kernel(
    hidden, x, order, tiles, pages, page_ids, places,
    x_stride, page_stride, ids_stride, places_stride, split_stride, slice_stride, split_columns,
    WIDTH: tl.constexpr, ROW: tl.constexpr, PAGE: tl.constexpr, HIDDEN_ROW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """hidden[split, slice, place in order, rank] = x[:, columns of the split] @ A.T. Grid: tiles; splits times blocks
    of ranks; slices. Ranks from an adapter's own to the end of its last block become zero. split_columns: whole blocks.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles + 4 * tl.program_id(0)
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot < 0:
        return
    split = tl.program_id(1) // (HIDDEN_ROW // BLOCK_R)
    first_rank = tl.program_id(1) % (HIDDEN_ROW // BLOCK_R) * BLOCK_R
    place = places + slot.to(tl.int64) * places_stride + tl.program_id(2) * _PLACE_FIELDS
    rank, address = tl.load(place + _RANK).to(tl.int32), tl.load(place + _A_ADDRESS)
    if first_rank >= rank:
        return
    m, r, k = tl.arange(0, BLOCK_M), first_rank + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    used_m, used_r = m < count, r < rank
    rows = tl.load(order + first + m, mask=used_m, other=0)
    begin = split * split_columns
    end = tl.minimum(split_columns, WIDTH - begin)
    page_ids += slot.to(tl.int64) * ids_stride + address // PAGE
    at = tl.multiple_of((address % PAGE).to(tl.int32), _ALIGNED) + r * ROW + begin
    # Where these columns of a row lie in two pages at most, both are looked up here and no load waits in the loop.
    first_pages, last_pages = _pages_of(page_ids, at, used_r, PAGE), _pages_of(page_ids, at + end - 1, used_r, PAGE)
    inputs = x + rows.to(tl.int64) * x_stride + begin
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, end, BLOCK_K):
        if PAGE >= WIDTH:
            found = tl.where((at + k0) // PAGE == at // PAGE, first_pages, last_pages)
        else:
            found = _pages_of(page_ids, at + k0, used_r, PAGE)
        source_x = inputs[:, None] + (k0 + k)[None, :]
        source_a = pages + (found.to(tl.int64) * page_stride + (at + k0) % PAGE)[None, :] + k[:, None]
        if WIDTH % BLOCK_K == 0:
            left = tl.load(source_x, mask=used_m[:, None], other=0.0)
            right = tl.load(source_a, mask=used_r[None, :], other=0.0)
        else:
            inside = begin + k0 + k < WIDTH
            left = tl.load(source_x, mask=used_m[:, None] & inside[None, :], other=0.0)
            right = tl.load(source_a, mask=used_r[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(left.to(COMPUTE), right.to(COMPUTE), acc, input_precision="ieee")
    hidden += split.to(tl.int64) * split_stride + tl.program_id(2).to(tl.int64) * slice_stride
    target = hidden + (first + m).to(tl.int64)[:, None] * HIDDEN_ROW + r[None, :]
    tl.store(target, acc, mask=used_m[:, None])


@triton.jit(do_not_specialize=_PLAIN)
def _lookup_kernel(
    hidden, ids, order, tiles, pages, page_ids, places, page_stride, ids_stride, places_stride,
    ROW: tl.constexpr, PAGE: tl.constexpr, HIDDEN_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """hidden[place in order, rank] = A[rank, ids]. Grid: tiles; blocks of ranks. Zeros as in the shrink."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles + 4 * tl.program_id(0)
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot < 0:
        return
    first_rank = tl.program_id(1) * BLOCK_R
    place = places + slot.to(tl.int64) * places_stride
    rank, address = tl.load(place + _RANK).to(tl.int32), tl.load(place + _A_ADDRESS)
    if first_rank >= rank:
        return
    m, r = tl.arange(0, BLOCK_M), first_rank + tl.arange(0, BLOCK_R)
    used_m = m < count
    used = used_m[:, None] & (r < rank)[None, :]
    rows = tl.load(order + first + m, mask=used_m, other=0)
    columns = tl.load(ids + rows, mask=used_m, other=0).to(tl.int32)
    page_ids += slot.to(tl.int64) * ids_stride + address // PAGE
    at = (address % PAGE).to(tl.int32) + r[None, :] * ROW + columns[:, None]
    source = pages + _pages_of(page_ids, at, used, PAGE).to(tl.int64) * page_stride + at % PAGE
    found = tl.load(source, mask=used, other=0.0).to(tl.float32)
    target = hidden + (first + m).to(tl.int64)[:, None] * HIDDEN_ROW + r[None, :]
    tl.store(target, found, mask=used_m[:, None])


@triton.jit
def _summed(hidden, m, r, count, rank, splits, split_stride, HIDDEN_ROW: tl.constexpr, TOGETHER: tl.constexpr):
    """h of a tile's rows m for the ranks r, float32: the splits' partial sums, added in their order. TOGETHER: how many
    are loaded at once; those beyond the last split cost no traffic.
    """
    # Whole groups of 16 ranks were written: a mask in such steps leaves the loads wide.
    written = r < (rank + _ALIGNED - 1) // _ALIGNED * _ALIGNED
    mask = (m < count)[:, None] & written[None, :]
    source = hidden + m[:, None] * HIDDEN_ROW + r[None, :]
    total = tl.load(source, mask=mask, other=0.0)
    for begin in range(1, splits, TOGETHER):
        for each in tl.static_range(TOGETHER):
            split = begin + each
            used = (m < tl.where(split < splits, count, 0))[:, None] & written[None, :]
            total += tl.load(source + split.to(tl.int64) * split_stride, mask=used, other=0.0)
    return total


@triton.jit
def _slice_of(run, blocks, WIDTHS: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The slice that run number `run` of `blocks` blocks of columns lies in: its number, where in y it starts, its
    width, the length of its rows in the pool; and the run's first column in it.
    """
    # Sums of products with constants, not loads from a table: Triton sees which powers of two divide them.
    number, left, width, row, begin = 0, 0, WIDTHS[0], tl.cdiv(WIDTHS[0], CHUNK) * CHUNK, run * blocks * BLOCK_N
    end = 0
    for i in tl.static_range(1, SLICES):
        runs = tl.cdiv(tl.cdiv(WIDTHS[i - 1], BLOCK_N), blocks)
        end += runs
        later = (run >= end).to(tl.int32)
        number += later
        left += later * WIDTHS[i - 1]
        width += later * (WIDTHS[i] - WIDTHS[i - 1])
        row += later * (tl.cdiv(WIDTHS[i], CHUNK) - tl.cdiv(WIDTHS[i - 1], CHUNK)) * CHUNK
        begin -= later * runs * blocks * BLOCK_N
    return number, left, width, row, begin


@triton.jit(do_not_specialize=_PLAIN)
def _expand_kernel(
    y, hidden, order, tiles, pages, page_ids, places, scales,
    y_stride, page_stride, ids_stride, places_stride, scales_stride, split_stride, slice_stride, splits, blocks,
    WIDTHS: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr, HIDDEN_ROW: tl.constexpr,
    TOGETHER: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """y[rows, slice] += scale * h @ B for `blocks` blocks of columns. Grid: tiles; such runs, slice after slice."""
    tile = tiles + 4 * tl.program_id(0)
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot < 0:
        return
    number, left, width, row, begin = _slice_of(tl.program_id(1), blocks, WIDTHS, SLICES, CHUNK, BLOCK_N)
    place = places + slot.to(tl.int64) * places_stride + number * _PLACE_FIELDS
    rank, address = tl.load(place + _RANK).to(tl.int32), tl.load(place + _B_ADDRESS)
    scale = tl.load(scales + slot.to(tl.int64) * scales_stride + number)
    if rank == 0:
        return
    m, ranks, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    used_m = m < count
    rows = tl.load(order + first + m, mask=used_m, other=0)
    page_ids += slot.to(tl.int64) * ids_stride + address // PAGE
    within = tl.multiple_of((address % PAGE).to(tl.int32), _ALIGNED)
    outputs = y + rows.to(tl.int64) * y_stride + left
    hidden += number * slice_stride + first.to(tl.int64) * HIDDEN_ROW
    if OVERLAPS:
        # Programs that ended above need not wait: the shrink wrote nothing for their tiles and slices. What was read so
        # far was there before the shrink began, which no kernel before it overlaps.
        tl.extra.cuda.gdc_wait()
    if HIDDEN_ROW <= BLOCK_R:
        h = _summed(hidden, m, ranks, count, rank, splits, split_stride, HIDDEN_ROW, TOGETHER).to(COMPUTE)
    for step in range(0, tl.minimum(blocks * BLOCK_N, width - begin), BLOCK_N):
        n0 = begin + step
        target = outputs[:, None] + (n0 + n)[None, :]
        mask_y = used_m[:, None] if EVEN else used_m[:, None] & (n0 + n < width)[None, :]
        before = tl.load(target, mask=mask_y, other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r0 in range(0, rank if HIDDEN_ROW > BLOCK_R else 1, BLOCK_R):
            r = r0 + ranks
            at = within + r * row + n0
            starts = _pages_of(page_ids, at, r < rank, PAGE).to(tl.int64) * page_stride + at % PAGE
            source = pages + starts[:, None] + n[None, :]
            b = tl.load(source, mask=(r < rank)[:, None], other=0.0)
            if HIDDEN_ROW > BLOCK_R:
                h = _summed(hidden, m, r, count, rank, splits, split_stride, HIDDEN_ROW, TOGETHER).to(COMPUTE)
            acc = tl.dot(h, b.to(COMPUTE), acc, input_precision="ieee")
        tl.store(target, (before.to(tl.float32) + acc * scale).to(y.dtype.element_ty), mask=mask_y)


_INTERPRETED = not isinstance(_shrink_kernel, triton.JITFunction)


def _compute_type(pages: torch.Tensor) -> tl.dtype:
    """The dtype of the operands of tl.dot: the weights'. Triton's interpreter gets bfloat16 wrong in tl.dot."""
    if pages.dtype not in _DOT_TYPES:
        raise TypeError(f"weights are {pages.dtype}: float32, float16 and bfloat16 are supported")
    return tl.float32 if _INTERPRETED and pages.dtype is torch.bfloat16 else _DOT_TYPES[pages.dtype]


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _row_stride(tensor: torch.Tensor) -> int:
    """Elements from row to row; of a single row torch may say anything."""
    return int(tensor.stride(0) if len(tensor) > 1 else tensor.shape[1])


def _check_rows(**tensors: torch.Tensor) -> None:
    """Raises ValueError where the elements of a row do not lie side by side."""
    for name, tensor in tensors.items():
        if tensor.stride(1) != 1:
            raise ValueError(f"{name} has strides {tuple(tensor.stride())}: each of its rows has to be contiguous")


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    widths: Sequence[int],
    chunk: int,
    most_rank: int,
    idle: torch.Tensor | None = None,
    sized_for: int = 0,
    overlaps: bool = True,
) -> None:
    """y[rows, slice] += scale * (x[rows] @ A.T) @ B for every used tile and slice, in place.

    y: (tokens, sum of widths) and x: (tokens, in), float32, float16 or bfloat16. widths: columns of each slice. chunk:
    elements, a multiple of 16. most_rank: no rank in `places` is higher. For the rest see sgmv.py; all that page_ids,
    places and scales say of a slot is contiguous. Operands are rounded to the weights' dtype, sums are float32. Raises
    ValueError and TypeError for what it cannot compute.
    """
    if not (len(x) and len(tiles) and most_rank):
        return
    _check_rows(x=x, y=y, pages=pages)
    widths, compute = tuple(widths), _compute_type(pages)
    size, overlaps = pages.element_size(), overlaps and _can_overlap(x.device)
    launch = launch_of(len(x), len(places), len(tiles), x.shape[1], widths, chunk, most_rank, size, sized_for)
    hidden = x.new_empty((launch.splits, len(widths), len(x), launch.hidden_row), dtype=torch.float32)
    if idle is not None and idle.item():  # behind the scratch: the run that measures an engine's memory has no adapters
        return
    _shrink_kernel[launch.tiles, launch.splits * (launch.hidden_row // launch.shrink_r), len(widths)](
        hidden, x, order, tiles, pages, page_ids, places,
        _row_stride(x), pages.stride(0), page_ids.stride(0), places.stride(0), hidden.stride(0), hidden.stride(1),
        launch.split_columns,
        WIDTH=x.shape[1], ROW=round_up(x.shape[1], chunk), PAGE=pages.shape[1], HIDDEN_ROW=launch.hidden_row,
        BLOCK_M=launch.block_m, BLOCK_R=launch.shrink_r, BLOCK_K=launch.shrink_k, COMPUTE=compute, OVERLAPS=overlaps,
        num_warps=4, num_stages=launch.stages,
    )  # fmt: skip
    _expand(launch, y, hidden, order, tiles, pages, page_ids, places, scales, widths, chunk, compute, overlaps)


def lora_embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    vocabulary: int,
    chunk: int,
    most_rank: int,
    idle: torch.Tensor | None = None,
    sized_for: int = 0,
    overlaps: bool = True,
) -> None:
    """y[rows] += scale * A[:, ids[rows]].T @ B for every used tile, in place.

    ids: int32 or int64 (tokens,), each below `vocabulary`, which is the width of A. There is one slice, as wide as y.
    The rest as for lora_linear.
    """
    if not (len(ids) and len(tiles) and most_rank):
        return
    _check_rows(y=y, pages=pages)
    widths, compute = (y.shape[1],), _compute_type(pages)
    size, overlaps = pages.element_size(), overlaps and _can_overlap(y.device)
    launch = launch_of(len(ids), len(places), len(tiles), 1, widths, chunk, most_rank, size, sized_for)
    hidden = y.new_empty((1, 1, len(ids), launch.hidden_row), dtype=torch.float32)
    if idle is not None and idle.item():
        return
    _lookup_kernel[launch.tiles, launch.hidden_row // launch.shrink_r](
        hidden, ids, order, tiles, pages, page_ids, places, pages.stride(0), page_ids.stride(0), places.stride(0),
        ROW=round_up(vocabulary, chunk), PAGE=pages.shape[1], HIDDEN_ROW=launch.hidden_row, BLOCK_M=launch.block_m,
        BLOCK_R=launch.shrink_r, OVERLAPS=overlaps, num_warps=4,
    )  # fmt: skip
    _expand(launch, y, hidden, order, tiles, pages, page_ids, places, scales, widths, chunk, compute, overlaps)


def _expand(
    launch: Launch, y: torch.Tensor, hidden: torch.Tensor, order: torch.Tensor, tiles: torch.Tensor,
    pages: torch.Tensor, page_ids: torch.Tensor, places: torch.Tensor, scales: torch.Tensor, widths: tuple[int, ...],
    chunk: int, compute: tl.dtype, overlaps: bool,
) -> None:  # fmt: skip
    """The second launch of both. hidden: float32 (splits, slices, tokens, ranks)."""
    _expand_kernel[launch.tiles, launch.runs](
        y, hidden, order, tiles, pages, page_ids, places, scales,
        _row_stride(y), pages.stride(0), page_ids.stride(0), places.stride(0), scales.stride(0), hidden.stride(0),
        hidden.stride(1), launch.splits, launch.blocks,
        WIDTHS=widths, SLICES=len(widths), CHUNK=chunk, PAGE=pages.shape[1], HIDDEN_ROW=launch.hidden_row,
        TOGETHER=launch.together, EVEN=launch.even, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_R=launch.expand_r, COMPUTE=compute, OVERLAPS=overlaps, num_warps=4, num_stages=launch.stages,
        **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
