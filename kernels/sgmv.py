# SPDX-License-Identifier: Apache-2.0
"""Segmented LoRA multiplication over paged weights: y[rows of an adapter] += scale * (x @ A.T) @ B, for every adapter
of a batch at once (SGMV: Chen et al., "Punica: Multi-Tenant LoRA Serving", MLSys 2024).

Weights live in a pool of equal pages. An adapter has a linear address space of its own, in elements: address a is
`pages[page_ids[slot, a // page_elements], a % page_elements]`, so its pages may lie anywhere in any pool that has a
base address and a page stride. In that space a matrix is rank rows, one behind another: A as (rank, in), B as
(rank, out), both in rows of a length rounded up to `chunk` elements. A chunk never straddles two pages.

What every operator takes:
    order    int32 (tokens,)            rows of x in the order of their slots; rows without an adapter are not in it
    tiles    int32 (tiles, 4)           slot, first place in `order`, rows, first row where these rows are consecutive
                                        (else -1); slot -1: unused, and so are all behind it
    pages    (pages, page_elements)     the pool; float32, float16 or bfloat16; any stride between pages
    page_ids int32 (slots, most pages)  the pages of the adapter in a slot, in the order of its addresses
    places   int64 (slots, slices, 5)   rank, address of A, address of B, and where in the pool A and B lie when their
                                        pages follow each other (in elements from the first page, else -1)
    scales   float32 (slots, slices)
    idle     bool (1,), on the CPU      whether no row of the batch has an adapter: then nothing is launched. A tensor,
                                        which a compiler does not take for a constant. None: look at the tiles
    sized_for                           tokens of the batch whose way of summing this one is to follow, so that a row's
                                        result does not depend on the others; 0: its own. On a CPU: a row at a time
    overlaps                            whether a kernel may start before the one before it has ended
A slice is a part of the output with matrices of its own (q, k and v of a fused projection). All of these are buffers
that keep their addresses while their content changes, so that a CUDA graph that captured a call stays valid.

`lora_linear` changes y in place; `lora_embedding` does the same for an embedding, whose A is looked up, not
multiplied. On a GPU they are Triton kernels (sgmv_triton.py), on a CPU torch, one segment after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from loracache.kernels.tables import A_ADDRESS, A_FLAT, RANK, round_up

__all__ = ["lora_embedding", "lora_linear"]


class _SlotWeights:
    """The matrices of one slot as tensors: views of the pool where their pages follow each other, else copies."""

    def __init__(
        self, pages: torch.Tensor, page_ids: torch.Tensor, places: list[list[int]], chunk: int, dtype: torch.dtype
    ) -> None:
        self.places = places
        self._pages = pages
        self._page_ids = page_ids
        self._chunk = chunk
        self._dtype = dtype

    def a(self, number: int, width: int, slices: int = 1) -> torch.Tensor:
        """A of slice `number`, shape (rank, width); with those of the slices after it where they lie together."""
        rank = sum(place[RANK] for place in self.places[number : number + slices])
        return self._matrix(rank, self.places[number][A_ADDRESS], self.places[number][A_FLAT], width)

    def b(self, number: int, width: int) -> torch.Tensor:
        """B of slice `number`, shape (rank, width)."""
        rank, _, address, _, flat = self.places[number]
        return self._matrix(rank, address, flat, width)

    def stacks(self, width: int, slices: int) -> list[tuple[int, list[int], torch.Tensor]]:
        """(first slice, ranks, A) of groups of slices whose A lie one behind another in the pool: one matrix."""
        row, found, number = round_up(width, self._chunk), [], 0
        while number < slices:
            end = number + 1
            while end < slices and self._follows(end, row):
                end += 1
            found.append(
                (number, [place[RANK] for place in self.places[number:end]], self.a(number, width, end - number))
            )
            number = end
        return found

    def _follows(self, number: int, row: int) -> bool:
        before, place = self.places[number - 1], self.places[number]
        return before[A_FLAT] >= 0 and place[A_FLAT] == before[A_FLAT] + before[RANK] * row

    def _matrix(self, rank: int, address: int, flat: int, width: int) -> torch.Tensor:
        row = round_up(width, self._chunk)
        if flat >= 0:
            found = self._pages.as_strided((rank, width), (row, 1), self._pages.storage_offset() + flat)
        else:
            size = self._pages.shape[1]
            first, end = address // size, -(-(address + rank * row) // size)
            gathered = self._pages.index_select(0, self._page_ids[first:end]).view(-1)
            found = gathered.as_strided((rank, width), (row, 1), address - first * size)
        return found.to(self._dtype)


def _segments(
    order: torch.Tensor, tiles: torch.Tensor, idle: torch.Tensor | None, sized_for: int
) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """(slot, its rows) of every used tile, consecutive rows as a slice, which makes a view and no copy; or of every row
    of it, in copies: how a product is summed depends on the address as well.
    """
    if idle is not None and idle.item():
        return
    for slot, first, count, begin in tiles.tolist():
        if slot < 0:
            return
        if sized_for:
            yield from ((slot, row) for row in order[first : first + count].long().split(1))
            continue
        yield slot, slice(begin, begin + count) if begin >= 0 else order[first : first + count].long()


def _one_by_one(x: torch.Tensor, weights: torch.Tensor, rows: int, places: list[list[int]]) -> bool:
    """Whether few rows are multiplied faster one after another: oneDNN's products of reduced precision take 20 us to
    begin, torch's own product of a matrix and a vector 3. The bound was measured on an AMD EPYC with AVX-512.
    """
    rank = max(place[RANK] for place in places)
    return x.dtype is weights.dtype and x.dtype is not torch.float32 and rows * (9 + rank) <= 64 + rank


def _multiply_rows(
    outputs: torch.Tensor, inputs: torch.Tensor, weights: _SlotWeights, scales: list[float], widths: Sequence[int]
) -> None:
    """outputs += scale * (inputs @ A.T) @ B, a row at a time."""
    stacks = weights.stacks(inputs.shape[1], len(widths))
    expands = [weights.b(number, width).t() for number, width in enumerate(widths)]
    torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags does, in a hundredth of its time
    try:
        for output, row in zip(outputs, inputs, strict=True):
            left = 0
            for first, ranks, a in stacks:
                hidden = torch.mv(a, row).split(ranks)
                for number, narrow in enumerate(hidden, first):
                    if ranks[number - first]:
                        part = output[left : left + widths[number]]
                        part.addmv_(expands[number], narrow, alpha=scales[number])
                    left += widths[number]
    finally:
        torch._C._set_mkldnn_enabled(True)


def _multiply(
    outputs: torch.Tensor, inputs: torch.Tensor, weights: _SlotWeights, scales: list[float], widths: Sequence[int]
) -> None:
    """outputs += scale * (inputs @ A.T) @ B, all rows at once."""
    left = 0
    for first, ranks, a in weights.stacks(inputs.shape[1], len(widths)):
        hidden = torch.mm(inputs, a.t()).split(ranks, dim=1)
        for number, narrow in enumerate(hidden, first):
            part = outputs[:, left : left + widths[number]]
            left += widths[number]
            if ranks[number - first]:
                _expand(part, narrow, weights.b(number, widths[number]), scales[number])


def _expand(outputs: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    if b.dtype is outputs.dtype:
        outputs.addmm_(hidden, b, alpha=scale)
    else:
        outputs += torch.mm(hidden * scale, b)


def _lora_linear_cpu(
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
    for slot, rows in _segments(order, tiles, idle, sized_for):
        inputs, outputs, place = x[rows], y[rows], places[slot].tolist()
        dtype = x.dtype if x.dtype is pages.dtype else torch.float32
        weights = _SlotWeights(pages, page_ids[slot], place, chunk, dtype)
        multiply = _multiply_rows if _one_by_one(x, pages, len(inputs), place) else _multiply
        multiply(outputs, inputs.to(dtype), weights, scales[slot].tolist(), widths)
        if not isinstance(rows, slice):
            y.index_copy_(0, rows, outputs)


def _lora_embedding_cpu(
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
    for slot, rows in _segments(order, tiles, idle, sized_for):
        place = places[slot].tolist()
        if not place[0][RANK]:
            continue
        weights = _SlotWeights(pages, page_ids[slot], place, chunk, pages.dtype)
        hidden = weights.a(0, vocabulary).index_select(1, ids[rows]).t().to(torch.float32)
        outputs = y[rows]
        outputs += torch.mm(hidden * scales[slot, 0], weights.b(0, y.shape[1]).to(torch.float32))
        if not isinstance(rows, slice):
            y.index_copy_(0, rows, outputs)


def _lora_linear_cuda(
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
    from loracache.kernels.sgmv_triton import lora_linear

    tables = order, tiles, pages, page_ids, places, scales
    lora_linear(y, x, *tables, widths, chunk, most_rank, idle, sized_for, overlaps)


def _lora_embedding_cuda(
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
    from loracache.kernels.sgmv_triton import lora_embedding

    tables = order, tiles, pages, page_ids, places, scales
    lora_embedding(y, ids, *tables, vocabulary, chunk, most_rank, idle, sized_for, overlaps)


def _no_values(*_: object, **__: object) -> None:
    """What a compiler needs to know of an operator that returns nothing."""


_library = torch.library.Library("loracache", "DEF")
_TABLES = "Tensor order, Tensor tiles, Tensor pages, Tensor page_ids, Tensor places, Tensor scales"
_HOW = "int chunk, int most_rank, Tensor? idle=None, int sized_for=0, bool overlaps=True"
_library.define(f"lora_linear(Tensor(a!) y, Tensor x, {_TABLES}, int[] widths, {_HOW}) -> ()")
_library.define(f"lora_embedding(Tensor(a!) y, Tensor ids, {_TABLES}, int vocabulary, {_HOW}) -> ()")
for _name, _cpu, _cuda in (
    ("lora_linear", _lora_linear_cpu, _lora_linear_cuda),
    ("lora_embedding", _lora_embedding_cpu, _lora_embedding_cuda),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"loracache::{_name}", _no_values, lib=_library)

lora_linear = torch.ops.loracache.lora_linear
lora_embedding = torch.ops.loracache.lora_embedding
