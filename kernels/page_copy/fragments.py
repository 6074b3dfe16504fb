# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of many moves lie, as arrays: one fragment is a run of bytes that lies together on both sides.

The payload of a move holds rows (layers, `of`, bytes of a row). Its fragments come in that order, which is the order
of the host's memory, so that what stages them can copy the host's side in large runs. All in numpy: 128k tokens of 80
layers are 655,360 fragments, and a loop over them would take longer than the copy.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import torch

from loracache.kernels.page_copy.moves import Move, bounds

__all__ = ["Extents", "Fragments", "Integers", "Rows", "fragments_of", "host_runs", "rows_of", "split_by_pinned"]

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
        ends, start = np.cumsum(self.nbytes), 0
        while start < len(self):
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


def host_runs(host: Integers, nbytes: Integers, edges: Integers | None = None) -> tuple[Integers, Integers]:
    """(first addresses, lengths) of the runs that fragments make in the host's memory, in the order they stand in; none
    reaches across one of `edges`."""
    starts = np.concatenate(([0], np.flatnonzero(host[1:] != host[:-1] + nbytes[:-1]) + 1))
    first, length = host[starts], np.add.reduceat(nbytes, starts)
    if edges is None or not len(edges):
        return first, length
    inside = np.searchsorted(edges, first + length, side="left") > np.searchsorted(edges, first, side="right")
    if not inside.any():
        return first, length
    cut = [piece for run in zip(first.tolist(), length.tolist(), strict=True) for piece in _cut_at(run, edges)]
    pieces = np.array(cut, np.int64)
    return np.ascontiguousarray(pieces[:, 0]), np.ascontiguousarray(pieces[:, 1])


def split_by_pinned(
    moves: Sequence[Move], edges: Integers, pinned: npt.NDArray[np.bool_]
) -> tuple[list[tuple[Move, Extents]], list[tuple[Move, Extents]]]:
    """(moves whose payload is pinned, the others), with their extents cut where a copy may not reach across: bytes from
    edges[i] up to edges[i + 1] are pinned together where pinned[i].
    """
    extents = [[(_address(part), part.nbytes) for part in move.payload if part.nbytes] for move in moves]
    located = list(zip(moves, extents, strict=True))
    if not len(edges):
        return [], located
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(extents)), np.int64).reshape(-1, 2)
    place = np.searchsorted(edges, flat[:, 0], side="right") - 1
    fine = (place >= 0) & pinned[place] & (flat.sum(axis=1) <= edges[np.minimum(place + 1, len(edges) - 1)])
    if fine.all():
        return located, []
    good: list[tuple[Move, Extents]] = []
    others: list[tuple[Move, Extents]] = []
    at, all_fine = 0, fine.tolist()
    for move, parts in located:
        start, at = at, at + len(parts)
        if not all(all_fine[start:at]):
            parts = [piece for part in parts for piece in _cut_at(part, edges)]
            places = np.searchsorted(edges, [address for address, _ in parts], side="right") - 1
            if not ((places >= 0) & pinned[places]).all():
                others.append((move, parts))
                continue
        good.append((move, parts))
    return good, others


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
    groups: dict[tuple[int, bool, bool], list[tuple[Move, Extents]]] = defaultdict(list)
    for item in moves:
        move, extents = item
        groups[len(move.blocks), move.of == 1, len(extents) == 1].append(item)
    return [
        _group(bands if single else rows, rows.block_bytes, count, together, group)
        for (count, single, together), group in groups.items()
        if count
    ]


def _group(
    rows: Rows, block_bytes: int, count: int, together: bool, moves: Sequence[tuple[Move, Extents]]
) -> Fragments:
    """Of moves of `count` blocks each; together: each payload is one extent."""
    blocks = np.fromiter(chain.from_iterable(move.blocks for move, _ in moves), np.int64).reshape(-1, count)
    first = np.fromiter((move.first for move, _ in moves), np.int64, len(moves))
    of = np.fromiter((move.of for move, _ in moves), np.int64, len(moves))
    if together:
        start, sizes = np.fromiter(chain.from_iterable(extents[0] for _, extents in moves), np.int64).reshape(-1, 2).T
    else:
        sizes = np.array([sum(nbytes for _, nbytes in extents) for _, extents in moves], np.int64)
    if blocks.min() < 0 or blocks.max() >= rows.blocks:
        raise ValueError(f"blocks {blocks.min()} to {blocks.max()} of {rows.blocks}")
    if first.min() < 0 or (first + count > of).any() or (sizes < of * block_bytes).any():
        raise ValueError(f"a move of {count} blocks reaches outside its payload")
    device: Integers = blocks[:, None, :] * rows.step[:, None]
    device += rows.base[:, None]  # in place, here and below: these arrays are megabytes
    offset: Integers = (first[:, None] + np.arange(count))[:, None, :] * rows.nbytes[:, None]
    offset += of[:, None, None] * rows.before[:, None]
    nbytes = np.broadcast_to(rows.nbytes[:, None], device.shape).flatten()
    if not together:
        return _over_extents(device, offset, nbytes, [extents for _, extents in moves], sizes)
    offset += start[:, None, None]
    found = Fragments(device.reshape(-1), offset.reshape(-1), nbytes)
    neighbours = (np.diff(blocks) == 1)[:, None, :] & (rows.step == rows.nbytes)[:, None]
    return _merged(found, neighbours) if neighbours.sum() * _WORTH > len(found) else found


def _merged(fragments: Fragments, neighbours: npt.NDArray[np.bool_]) -> Fragments:
    """Neighbours on both sides as one; never across moves, whose extents may lie in different registrations.
    neighbours: (moves, rows, blocks less one), which of a row's blocks follow each other.
    """
    begins = np.ones((*neighbours.shape[:2], neighbours.shape[2] + 1), np.bool_)
    np.logical_not(neighbours, out=begins[:, :, 1:])
    starts = np.flatnonzero(begins.reshape(-1))
    return Fragments(fragments.device[starts], fragments.host[starts], np.add.reduceat(fragments.nbytes, starts))


def _over_extents(
    device: Integers, offset: Integers, nbytes: Integers, extents: Sequence[Extents], sizes: Integers
) -> Fragments:
    """Fragments cut where payloads are: `offset` counts from each payload's begin, `extents` are its parts."""
    flat = np.array([each for parts in extents for each in parts], np.int64).reshape(-1, 2)
    ends = np.cumsum(flat[:, 1])  # in all payloads, one behind another
    starts = ends - flat[:, 1]
    begin = (offset + (np.cumsum(sizes) - sizes)[:, None, None]).reshape(-1)
    first = np.searchsorted(starts, begin, side="right") - 1
    count = np.searchsorted(starts, begin + nbytes, side="left") - first  # extents that each lies in
    owner = np.repeat(np.arange(len(begin)), count)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner]
    low = np.maximum(begin[owner], starts[part])
    high = np.minimum((begin + nbytes)[owner], ends[part])
    return Fragments(device.reshape(-1)[owner] + low - begin[owner], flat[part, 0] + low - starts[part], high - low)


def _cut_at(extent: tuple[int, int], edges: Integers) -> Extents:
    start, nbytes = extent
    inner = edges[np.searchsorted(edges, start, side="right") : np.searchsorted(edges, start + nbytes)].tolist()
    return [(low, high - low) for low, high in pairwise([start, *inner, start + nbytes])]


def _address(part: memoryview) -> int:
    try:
        return _addressof(_in_place(part))
    except TypeError:  # of memory that may only be read
        return int(np.frombuffer(part, np.uint8).__array_interface__["data"][0])
