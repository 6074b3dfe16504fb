# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of many moves lie, as arrays: one fragment is a run of bytes that lies together on both sides.

The payload of a move holds rows (layers, `of`, bytes of a row). Its fragments come in that order, which is the order
of the host's memory, so that what stages them can copy the host's side in large runs. All in numpy: 128k tokens of 80
layers are 655,360 fragments, and a loop over them would take longer than the copy.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from loracache.kernels.page_copy.moves import Move, bounds

__all__ = [
    "Fragments",
    "Integers",
    "Located",
    "Rows",
    "fragments_of",
    "host_runs",
    "parts_of",
    "rows_of",
    "split_by_pinned",
]

Integers = npt.NDArray[np.int64]
_addressof, _in_place = ctypes.addressof, ctypes.c_char.from_buffer
_TOGETHER = 1 << 14  # fragments: their arrays stay in a core's cache, and need no new memory for the next ones
_WORTH = 16  # merging costs more than it saves where fewer than one in so many goes


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
class Located:
    """Moves and where their payloads lie in host memory. counts: parts of each payload. start, nbytes: addresses and
    lengths of all parts, one payload's behind another's. Arrays, for a list of tuples would cost more than the rest.
    """

    moves: Sequence[Move]
    counts: Integers
    start: Integers
    nbytes: Integers

    def __len__(self) -> int:
        return len(self.moves)

    def of(self, chosen: npt.NDArray[np.bool_]) -> Located:
        """Those moves alone. chosen: (moves,)."""
        if chosen.all():
            return self
        parts = np.repeat(chosen, self.counts)
        return Located([*compress(self.moves, chosen)], self.counts[chosen], self.start[parts], self.nbytes[parts])

    def part(self, begin: int, end: int) -> Located:
        """The moves from one on, and before another."""
        low, high = int(self.counts[:begin].sum()), int(self.counts[:end].sum())
        return Located(self.moves[begin:end], self.counts[begin:end], self.start[low:high], self.nbytes[low:high])


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
        end = max(start + 1, int(ends.searchsorted(taken + nbytes, "right")))
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
    lasts = np.append(np.flatnonzero(breaks), len(host) - 1)
    first = host[np.append(0, lasts[:-1] + 1)]
    length = ends[lasts] - first
    return (first, length) if edges is None else _cut_at(first, length, edges)[:2]


def _cut_at(first: Integers, length: Integers, edges: Integers) -> tuple[Integers, Integers, Integers]:
    """(first addresses, lengths) of runs of bytes cut at `edges`, and the number of the run that each is of."""
    low = np.searchsorted(edges, first, side="right")
    inside = np.searchsorted(edges, first + length, side="left") - low
    owner = np.repeat(np.arange(len(first)), inside + 1)
    if len(owner) == len(first):
        return first, length, owner
    last = np.cumsum(inside + 1) - 1  # of each run's pieces
    piece = np.arange(len(owner)) - (last - inside)[owner]
    begin = np.where(piece, edges[low[owner] + piece - 1], first[owner])
    end = (first + length)[owner]
    end[:-1] = np.where(owner[1:] == owner[:-1], begin[1:], end[:-1])
    return begin, end - begin, owner


def split_by_pinned(moves: Sequence[Move], edges: Integers, pinned: npt.NDArray[np.bool_]) -> tuple[Located, Located]:
    """(moves whose payload is pinned, the others), their payloads cut where a copy may not reach across: bytes from
    edges[i] up to edges[i + 1] are pinned together where pinned[i].
    """
    whole, unpinned = _located(moves), np.ones(len(moves), np.bool_)
    if not len(edges):
        return whole.of(~unpinned), whole
    start, nbytes, part = _cut_at(whole.start, whole.nbytes, edges)
    place = np.searchsorted(edges, start, side="right") - 1
    owner = np.repeat(np.arange(len(moves)), whole.counts)[part]
    unpinned[:] = False
    unpinned[owner[(place < 0) | ~pinned[place]]] = True
    cut = Located(moves, np.bincount(owner, minlength=len(moves)), start, nbytes)
    return cut.of(~unpinned), cut.of(unpinned)


def fragments_of(rows: Rows, bands: Rows, located: Located) -> Iterator[Fragments]:
    """The fragments of moves, those of moves of one form together, and about `_TOGETHER` at a time: the first are on
    their way while the others are made. bands: those of `rows`. Raises ValueError, before it answers any, where a move
    reaches outside its payload or the KV cache: what is copied by address has no other guard.
    """
    if all(move.rows is None for move in located.moves):
        return chain.from_iterable(_fragments_of(rows, bands, located))
    found = []
    for (start, end), own in _alike(located, [bounds(move.rows, len(rows.base)) for move in located.moves]):
        if start < end:
            part = rows.part(start, end)
            found += _fragments_of(part, part.bands(), own)
    return chain.from_iterable(found)


def _fragments_of(rows: Rows, bands: Rows, located: Located) -> list[Iterator[Fragments]]:
    """Of moves about all of these rows."""
    together = (located.counts == 1).tolist()
    forms = [(len(move.blocks), move.first, move.of, one) for move, one in zip(located.moves, together, strict=True)]
    return [
        _group(bands if form[2] == 1 else rows, rows.block_bytes, form, own)
        for form, own in _alike(located, forms)
        if form[0]
    ]


_Form = TypeVar("_Form", bound=tuple[int, ...])


def _alike(located: Located, forms: Sequence[_Form]) -> Iterable[tuple[_Form, Located]]:
    """The moves of each form. forms: one a move."""
    if len(set(forms)) == 1:  # most often
        return [(forms[0], located)]
    numbers: dict[_Form, list[int]] = defaultdict(list)
    for number, form in enumerate(forms):
        numbers[form].append(number)
    return [(form, located.of(np.isin(np.arange(len(forms)), own))) for form, own in numbers.items()]


def _group(rows: Rows, block_bytes: int, form: tuple[int, int, int, bool], located: Located) -> Iterator[Fragments]:
    """Of moves of one form (blocks, `first`, `of`, whether each payload lies together). There are few passes over the
    arrays, each along rows and blocks at once: numpy is slow along an axis of one or two."""
    count, first, of, together = form
    moves = len(located)
    blocks = np.fromiter(chain.from_iterable([move.blocks for move in located.moves]), np.int64).reshape(moves, count)
    sizes = located.nbytes if together else _sums(located.nbytes, located.counts)
    if blocks.min() < 0 or blocks.max() >= rows.blocks:
        raise ValueError(f"blocks {blocks.min()} to {blocks.max()} of {rows.blocks}")
    if first < 0 or first + count > of or sizes.min() < of * block_bytes:
        raise ValueError(f"a move of {count} blocks reaches outside its payload")
    base, step, nbytes = (np.repeat(each, count) for each in (rows.base, rows.step, rows.nbytes))
    places = np.tile(np.arange(first, first + count, dtype=np.int64), len(rows.base))
    within = np.repeat(of * rows.before, count) + places * nbytes
    most = min(moves, max(1, _TOGETHER // len(within)))  # moves at a time
    nbytes, dense = np.tile(nbytes, most), rows.step == rows.nbytes

    def some(begin: int, end: int) -> Fragments:
        device: Integers = np.repeat(blocks[begin:end], len(rows.base), axis=0).reshape(end - begin, -1)
        device *= step
        device += base
        own = nbytes[: device.size]
        if not together:
            return _over_extents(device.reshape(-1), within, own, located.part(begin, end), sizes[begin:end])
        found = Fragments(device.reshape(-1), (located.start[begin:end, None] + within).reshape(-1), own)
        return _merged(found, np.diff(blocks[begin:end]) == 1, dense)

    return (some(begin, min(begin + most, moves)) for begin in range(0, moves, most))


def _merged(fragments: Fragments, follows: npt.NDArray[np.bool_], dense: npt.NDArray[np.bool_]) -> Fragments:
    """Neighbours on both sides as one; never across moves, whose extents may lie in different registrations. follows:
    (moves, blocks less one), which of a move's blocks lie behind the one before. dense: (rows,), where blocks that
    follow each other lie side by side.
    """
    if np.count_nonzero(follows) * np.count_nonzero(dense) * _WORTH <= len(fragments):
        return fragments
    begins = np.ones((len(follows), len(dense), follows.shape[1] + 1), np.bool_)
    np.logical_not(follows[:, None, :] & dense[:, None], out=begins[:, :, 1:])
    starts = np.flatnonzero(begins.reshape(-1))
    return Fragments(fragments.device[starts], fragments.host[starts], np.add.reduceat(fragments.nbytes, starts))


def _over_extents(device: Integers, within: Integers, nbytes: Integers, located: Located, sizes: Integers) -> Fragments:
    """Fragments cut where payloads are. within: where each begins in its payload. sizes: of the payloads."""
    ends = np.cumsum(located.nbytes)  # in all payloads, one behind another
    starts = ends - located.nbytes
    begin = ((np.cumsum(sizes) - sizes)[:, None] + within).reshape(-1)
    first = np.searchsorted(starts, begin, side="right") - 1
    count = np.searchsorted(starts, begin + nbytes, side="left") - first  # extents that each lies in
    owner = np.repeat(np.arange(len(begin)), count)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner]
    low = np.maximum(begin[owner], starts[part])
    high = np.minimum((begin + nbytes)[owner], ends[part])
    return Fragments(device[owner] + low - begin[owner], located.start[part] + low - starts[part], high - low)


def _sums(values: Integers, counts: Integers) -> Integers:
    """Of runs of so many values each."""
    ends, last = np.concatenate(([0], np.cumsum(values))), np.cumsum(counts)
    found: Integers = ends[last] - ends[last - counts]
    return found


def _located(moves: Sequence[Move]) -> Located:
    payloads: list[Sequence[memoryview]] = [move.payload for move in moves]
    try:
        start = list(map(_addressof, map(_in_place, chain.from_iterable(payloads))))
    except (TypeError, ValueError):  # of memory that may only be read, or none
        payloads = [[part for part in payload if part.nbytes] for payload in payloads]
        start = [_address(part) for part in chain.from_iterable(payloads)]
    nbytes = [part.nbytes for part in chain.from_iterable(payloads)]
    counts = list(map(len, payloads))
    return Located(moves, np.array(counts, np.int64), np.array(start, np.int64), np.array(nbytes, np.int64))


def _address(part: memoryview) -> int:
    try:
        return _addressof(_in_place(part))
    except TypeError:  # of memory that may only be read
        return int(np.frombuffer(part, np.uint8).__array_interface__["data"][0])
