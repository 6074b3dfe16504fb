# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of many moves lie, as arrays: one fragment is a run of bytes that lies together on both sides.

The payload of a move holds rows (layers, `of`, bytes of a row). Its fragments come in that order, which is the order
of the host's memory, so that what stages them can copy the host's side in large runs. All in numpy: 128k tokens of 80
layers are 655,360 fragments, and a loop over them would take longer than the copy.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import torch

from loracache.kernels.page_copy.moves import Move, bounds

__all__ = [
    "Extents",
    "Fragments",
    "Integers",
    "Rows",
    "fragments_of",
    "host_runs",
    "parts_of",
    "rows_of",
    "split_by_pinned",
]

Integers = npt.NDArray[np.int64]
_addressof, _in_place = ctypes.addressof, ctypes.c_char.from_buffer
_WORTH = 16  # merging costs more than it saves where fewer than one in so many goes
Extents = list[tuple[int, int]]  # (address, bytes) of a payload's parts


@dataclass(frozen=True, slots=True)
class Rows:
    """The layers' rows on the device: the address of block 0, the step to the next block, bytes of a row, and the bytes
    of the rows before it in a payload of one block. int64 (layers,) each. blocks: how many each layer has.
    """

    base: Integers
    step: Integers
    nbytes: Integers
    before: Integers
    blocks: int

    @classmethod
    def of(cls, base: Sequence[int], step: Sequence[int], nbytes: Sequence[int], blocks: int) -> Rows:
        """See the class."""
        sizes = np.array(nbytes, np.int64)
        return cls(np.array(base, np.int64), np.array(step, np.int64), sizes, np.cumsum(sizes) - sizes, blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return int(self.nbytes.sum())

    def part(self, start: int, end: int) -> Rows:
        """Of these layers alone."""
        nbytes = self.nbytes[start:end]
        return Rows(self.base[start:end], self.step[start:end], nbytes, np.cumsum(nbytes) - nbytes, self.blocks)

    def bands(self) -> Rows:
        """Layers whose rows of a block lie side by side, in order, taken as one: all of them in a block-outermost
        layout. What a payload of one block is made of."""
        follows = (self.base[1:] == self.base[:-1] + self.nbytes[:-1]) & (self.step[1:] == self.step[:-1])
        starts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
        nbytes = np.add.reduceat(self.nbytes, starts)
        return Rows(self.base[starts], self.step[starts], nbytes, self.before[starts], self.blocks)


@dataclass(frozen=True, slots=True)
class Fragments:
    """Runs of bytes that lie together on both sides: addresses and lengths, int64 (fragments,) each."""

    device: Integers
    host: Integers
    nbytes: Integers

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def mean(self) -> float:
        """Bytes of one on average."""
        return int(self.nbytes.sum()) / len(self) if len(self) else 0.0

    def __getitem__(self, part: slice) -> Fragments:
        return Fragments(self.device[part], self.host[part], self.nbytes[part])

    def at(self, host: Integers) -> Fragments:
        """The same bytes with another host side."""
        return Fragments(self.device, host, self.nbytes)

    def at_most(self, nbytes: int) -> Fragments:
        """The same bytes in fragments of at most `nbytes`."""
        if not len(self) or int(self.nbytes.max()) <= nbytes:
            return self
        parts = -(-self.nbytes // nbytes)
        owner = np.repeat(np.arange(len(self)), parts)
        offset = (np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)) * nbytes
        left = self.nbytes[owner] - offset
        return Fragments(self.device[owner] + offset, self.host[owner] + offset, np.minimum(left, nbytes))

    def parts(self, nbytes: int, most: int | None = None) -> Iterator[slice]:
        """Runs of fragments of together at most `nbytes`, and at most `most` of them; a larger one goes alone."""
        return parts_of(np.cumsum(self.nbytes), nbytes, most)


def parts_of(ends: Integers, nbytes: int, most: int | None = None) -> Iterator[slice]:
    """Runs of items, whose sizes add up to `ends`, of together at most `nbytes`, and at most `most` of them; a larger
    one goes alone."""
    start = 0
    while start < len(ends):
        taken = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, taken + nbytes, side="right")))
        end = min(end, start + most) if most else end
        yield slice(start, end)
        start = end


def rows_of(layers: Sequence[torch.Tensor]) -> Rows:
    """The rows of int64 tensors (blocks, words), strided views."""
    return Rows.of(
        [layer.data_ptr() for layer in layers],
        [layer.stride(0) * layer.element_size() for layer in layers],
        [layer.shape[1] * layer.element_size() for layer in layers],
        min(layer.shape[0] for layer in layers),
    )


def host_runs(
    host: Integers, nbytes: Integers, edges: Integers | None = None, begins: Sequence[int] = ()
) -> tuple[Integers, Integers]:
    """(first addresses, lengths) of the runs that fragments make in the host's memory, in the order they stand in; none
    reaches across one of `edges`, and one begins with each fragment whose number is among `begins`."""
    ends = host + nbytes
    breaks = host[1:] != ends[:-1]
    breaks[[number - 1 for number in begins if number]] = True
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    first, length = host[starts], np.add.reduceat(nbytes, starts)
    if edges is None or not len(edges):
        return first, length
    low = np.searchsorted(edges, first, side="right")
    inside = np.searchsorted(edges, first + length, side="left") - low
    if not inside.any():
        return first, length
    last = np.cumsum(inside + 1) - 1  # of each run's pieces
    owner = np.repeat(np.arange(len(first)), inside + 1)
    piece = np.arange(len(owner)) - (last - inside)[owner]
    begin = np.where(piece, edges[low[owner] + piece - 1], first[owner])
    end = (first + length)[owner]
    end[:-1] = np.where(owner[1:] == owner[:-1], begin[1:], end[:-1])
    return begin, end - begin


def split_by_pinned(
    moves: Sequence[Move], edges: Integers, pinned: npt.NDArray[np.bool_]
) -> tuple[list[tuple[Move, Extents]], list[tuple[Move, Extents]]]:
    """(moves whose payload is pinned, the others), with their extents cut where a copy may not reach across: bytes from
    edges[i] up to edges[i + 1] are pinned together where pinned[i].
    """
    located, flat = _located(moves)
    if not len(edges):
        return [], located
    place = np.searchsorted(edges, flat[:, 0], side="right") - 1
    fine = (place >= 0) & pinned[place] & (flat.sum(axis=1) <= edges[np.minimum(place + 1, len(edges) - 1)])
    if fine.all():
        return located, []
    unpinned = set()
    owner = np.repeat(np.arange(len(located)), [len(parts) for _, parts in located])
    for number in np.unique(owner[~fine]).tolist():
        move, parts = located[number]
        parts = [piece for part in parts for piece in _cut_at(part, edges)]
        located[number] = move, parts
        places = np.searchsorted(edges, [address for address, _ in parts], side="right") - 1
        if not ((places >= 0) & pinned[places]).all():
            unpinned.add(number)
    good = [item for number, item in enumerate(located) if number not in unpinned]
    return good, [located[number] for number in sorted(unpinned)]


def fragments_of(rows: Rows, bands: Rows, moves: Sequence[tuple[Move, Extents]]) -> list[Fragments]:
    """The fragments of moves with their extents, those of moves of one form together. bands: those of `rows`. Raises
    ValueError where a move reaches outside its payload or the KV cache: what is copied by address has no other guard.
    """
    if all(move.rows is None for move, _ in moves):
        return _fragments_of(rows, bands, moves)
    about: dict[tuple[int, int], list[tuple[Move, Extents]]] = defaultdict(list)
    for item in moves:
        about[bounds(item[0].rows, len(rows.base))].append(item)
    found = []
    for (start, end), own in about.items():
        if start < end:
            part = rows.part(start, end)
            found += _fragments_of(part, part.bands(), own)
    return found


def _fragments_of(rows: Rows, bands: Rows, moves: Sequence[tuple[Move, Extents]]) -> list[Fragments]:
    """Of moves about all of these rows."""
    groups: dict[tuple[int, int, int, bool], list[tuple[Move, Extents]]] = defaultdict(list)
    for item in moves:
        move, extents = item
        groups[len(move.blocks), move.first, move.of, len(extents) == 1].append(item)
    return [
        _group(bands if of == 1 else rows, rows.block_bytes, (count, first, of), together, group)
        for (count, first, of, together), group in groups.items()
        if count
    ]


def _group(
    rows: Rows, block_bytes: int, form: tuple[int, int, int], together: bool, moves: Sequence[tuple[Move, Extents]]
) -> Fragments:
    """Of moves of one form (blocks, `first`, `of`). together: each payload is one extent. The arrays are megabytes, so
    there are few passes over them, each along rows and blocks at once: numpy is slow along an axis of one or two."""
    count, first, of = form
    blocks = np.fromiter(chain.from_iterable(move.blocks for move, _ in moves), np.int64).reshape(-1, count)
    if together:
        start, sizes = np.fromiter(chain.from_iterable(extents[0] for _, extents in moves), np.int64).reshape(-1, 2).T
    else:
        sizes = np.array([sum(nbytes for _, nbytes in extents) for _, extents in moves], np.int64)
    if blocks.min() < 0 or blocks.max() >= rows.blocks:
        raise ValueError(f"blocks {blocks.min()} to {blocks.max()} of {rows.blocks}")
    if first < 0 or first + count > of or sizes.min() < of * block_bytes:
        raise ValueError(f"a move of {count} blocks reaches outside its payload")
    device: Integers = np.repeat(blocks, len(rows.base), axis=0).reshape(len(moves), -1)
    device *= np.repeat(rows.step, count)
    device += np.repeat(rows.base, count)
    nbytes = np.repeat(rows.nbytes, count)
    within = (
        np.repeat(of * rows.before, count)
        + np.tile(np.arange(first, first + count, dtype=np.int64), len(rows.base)) * nbytes
    )
    nbytes = np.tile(nbytes, len(moves))
    if not together:
        return _over_extents(device.reshape(-1), within, nbytes, [extents for _, extents in moves], sizes)
    found = Fragments(device.reshape(-1), (start[:, None] + within).reshape(-1), nbytes)
    follows, dense = np.diff(blocks) == 1, rows.step == rows.nbytes
    if np.count_nonzero(follows) * np.count_nonzero(dense) * _WORTH <= len(found):
        return found
    return _merged(found, follows[:, None, :] & dense[:, None])


def _merged(fragments: Fragments, neighbours: npt.NDArray[np.bool_]) -> Fragments:
    """Neighbours on both sides as one; never across moves, whose extents may lie in different registrations.
    neighbours: (moves, rows, blocks less one), which of a row's blocks follow each other.
    """
    begins = np.ones((*neighbours.shape[:2], neighbours.shape[2] + 1), np.bool_)
    np.logical_not(neighbours, out=begins[:, :, 1:])
    starts = np.flatnonzero(begins.reshape(-1))
    return Fragments(fragments.device[starts], fragments.host[starts], np.add.reduceat(fragments.nbytes, starts))


def _over_extents(
    device: Integers, within: Integers, nbytes: Integers, extents: Sequence[Extents], sizes: Integers
) -> Fragments:
    """Fragments cut where payloads are, whose parts are `extents`. within: where each begins in its payload."""
    flat = np.array([each for parts in extents for each in parts], np.int64).reshape(-1, 2)
    ends = np.cumsum(flat[:, 1])  # in all payloads, one behind another
    starts = ends - flat[:, 1]
    begin = ((np.cumsum(sizes) - sizes)[:, None] + within).reshape(-1)
    first = np.searchsorted(starts, begin, side="right") - 1
    count = np.searchsorted(starts, begin + nbytes, side="left") - first  # extents that each lies in
    owner = np.repeat(np.arange(len(begin)), count)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner]
    low = np.maximum(begin[owner], starts[part])
    high = np.minimum((begin + nbytes)[owner], ends[part])
    return Fragments(device[owner] + low - begin[owner], flat[part, 0] + low - starts[part], high - low)


def _cut_at(extent: tuple[int, int], edges: Integers) -> Extents:
    start, nbytes = extent
    inner = edges[np.searchsorted(edges, start, side="right") : np.searchsorted(edges, start + nbytes)].tolist()
    return [(low, high - low) for low, high in pairwise([start, *inner, start + nbytes])]


def _located(moves: Sequence[Move]) -> tuple[list[tuple[Move, Extents]], Integers]:
    """(moves with the extents of their payloads, all extents). Most have one, and there are thousands of them."""
    payloads = [move.payload for move in moves]
    parts = list(chain.from_iterable(payloads))
    if len(parts) == len(moves) and max(map(len, payloads), default=0) == 1:
        with contextlib.suppress(TypeError, ValueError):  # of memory that may only be read, or none
            addresses, sizes = list(map(_addressof, map(_in_place, parts))), [part.nbytes for part in parts]
            located = [(move, [extent]) for move, extent in zip(moves, zip(addresses, sizes, strict=True), strict=True)]
            return located, np.array([addresses, sizes], np.int64).T
    extents = [[(_address(part), part.nbytes) for part in payload if part.nbytes] for payload in payloads]
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(extents)), np.int64).reshape(-1, 2)
    return list(zip(moves, extents, strict=True)), flat


def _address(part: memoryview) -> int:
    try:
        return _addressof(_in_place(part))
    except TypeError:  # of memory that may only be read
        return int(np.frombuffer(part, np.uint8).__array_interface__["data"][0])
