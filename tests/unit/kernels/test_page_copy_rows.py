# SPDX-License-Identifier: Apache-2.0
"""Moves that are about some of a copier's layers, as those of one of several groups that share an engine's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from loracache.kernels.page_copy import Move, PageCopier, lane
from loracache.kernels.page_copy.fragments import Rows, fragments_of, split_by_pinned
from loracache.kernels.page_copy.recording import RecordingDevice

BLOCKS, REGIONS, PAGE = 24, 3, 16  # pages of so many words, one of every block in each region
WIDTHS = ([16, 16, 16], [16, 16], [10, 10, 10], [6])  # words of the rows of each member; its pages are filled up
NONE = np.zeros(0, np.int64), np.zeros(0, np.bool_)


class Mixed:
    """An engine's memory: every member's rows are in the same pages, of blocks of its own."""

    def __init__(self, outermost: str, seed: int) -> None:
        shape = (REGIONS, BLOCKS, PAGE) if outermost == "layer" else (BLOCKS, REGIONS, PAGE)
        self.whole = torch.randint(-(1 << 62), 1 << 62, shape, generator=torch.Generator().manual_seed(seed))
        regions = self.whole.unbind(0 if outermost == "layer" else 1)
        self.members = [
            [region[:, :width] for region, width in zip(regions, widths, strict=False)] for widths in WIDTHS
        ]
        self.rows = [row for rows in self.members for row in rows]
        ends = np.cumsum([len(rows) for rows in self.members]).tolist()
        self.slices = [slice(end - len(rows), end) for end, rows in zip(ends, self.members, strict=True)]

    def content(self, member: int, blocks: list[int]) -> bytes:
        return b"".join(row[block].numpy().tobytes() for row in self.members[member] for block in blocks)


# (member, its blocks in the payload, those of them that are copied)
PAYLOADS: list[tuple[int, list[int], range]] = [
    (0, [5], range(1)),
    (2, [0, 1, 2, 9], range(1, 3)),
    (1, [7, 8], range(2)),
    (2, [20], range(1)),
    (3, [11], range(1)),
    (1, [12, 13, 14, 17, 16], range(5)),
    (0, [23, 22], range(1, 2)),
    (3, [4, 3, 21], range(3)),
]


def moves_of(mixed: Mixed, arena: np.ndarray[Any, Any]) -> Iterator[tuple[Move, slice]]:
    """The moves of PAYLOADS, their payloads one behind another and cut in two, and where they lie."""
    at = 0
    for member, blocks, part in PAYLOADS:
        size = sum(WIDTHS[member]) * 8 * len(blocks)
        cut = at + size // 3 // 8 * 8
        payload = [arena.data[at:cut], arena.data[cut : at + size]] if member % 2 else [arena.data[at : at + size]]
        taken = [blocks[place] for place in part]
        yield Move(taken, payload, part.start, len(blocks), mixed.slices[member]), slice(at, at + size)
        at += size


class Pinned:
    def __init__(self, arena: np.ndarray[Any, Any]) -> None:
        address = arena.ctypes.data
        self.edges = np.array([*range(address, address + len(arena), 1000 // 16 * 16), address + len(arena)], np.int64)

    def steps(self) -> tuple[Any, Any]:
        return self.edges, np.arange(len(self.edges)) < len(self.edges) - 1


def copier_of(mixed: Mixed, arena: np.ndarray[Any, Any], way: str, seed: int) -> PageCopier:
    if way == "cpu":
        return PageCopier(mixed.rows)
    pieces = None if way.startswith("unpinned") else Pinned(arena)
    memory = [(mixed.whole.data_ptr(), mixed.whole.nbytes)]
    device = RecordingDevice(seed, steps=pieces.steps if pieces else None, device_memory=memory)
    below = 1 << 40 if way.endswith("bouncing") else 0
    return PageCopier(mixed.rows, pieces=pieces, device=device, bounce_below=below)


@pytest.mark.parametrize("way", ["cpu", "straight", "bouncing", "unpinned", "unpinned, bouncing"])
@pytest.mark.parametrize("outermost", ["layer", "block"])
@pytest.mark.parametrize("seed", range(3))
def test_each_member_has_its_own_rows_in_its_own_payloads(
    way: str, outermost: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "SLOT_BYTES", 9 * PAGE * 8)
    monkeypatch.setattr(lane, "_STAGE_BYTES", 7 * PAGE * 8)
    source, target = Mixed(outermost, seed), Mixed(outermost, seed + 100)
    arena, before = np.full(1 << 16, 0xEE, np.uint8), target.whole.clone()
    moves = list(moves_of(source, arena))
    reading, writing = copier_of(source, arena, way, seed), copier_of(target, arena, way, seed)
    reading.gather([move for move, _ in moves]).wait()
    for (member, blocks, part), (move, where) in zip(PAYLOADS, moves, strict=True):
        expected = bytearray(b"\xee" * (where.stop - where.start))
        wide, begin = np.array(WIDTHS[member]) * 8, 0
        for row, nbytes in zip(source.members[member], wide.tolist(), strict=True):
            for place in part:
                low = begin + place * nbytes
                expected[low : low + nbytes] = row[blocks[place]].numpy().tobytes()
            begin += nbytes * len(blocks)
        assert arena[where].tobytes() == expected, (member, move.blocks)
    writing.scatter([move for move, _ in moves]).wait()
    for member, blocks, part in PAYLOADS:
        taken = [blocks[place] for place in part]
        assert target.content(member, taken) == source.content(member, taken)
        for row, old in zip(target.members[member], Mixed(outermost, seed + 100).members[member], strict=True):
            row[taken] = old[taken]
    assert torch.equal(target.whole, before)  # nothing else was written


def test_rows_that_lie_side_by_side_are_one_run_within_a_member_only() -> None:
    """Two members of one row each, whose rows of a block happen to lie one behind the other."""
    whole = np.arange(8 * 4, dtype=np.int64).reshape(8, 4)
    base = whole.ctypes.data
    rows = Rows.of([base, base + 8, base + 16], [32] * 3, [8, 8, 8], 8)
    payload = [memoryview(bytearray(16))]
    for part, runs in ((slice(0, 2), [(0, 16)]), (slice(1, 2), [(8, 8)]), (slice(2, 3), [(16, 8)]), (slice(1, 1), [])):
        _, moves = split_by_pinned([Move([3], payload, 0, 1, part)], *NONE)
        found = [
            (int(device) - base - 3 * 32, int(nbytes))
            for group in fragments_of(rows, rows.bands(), moves)
            for device, nbytes in zip(group.device, group.nbytes, strict=True)
        ]
        assert found == runs


@pytest.mark.parametrize("way", ["cpu", "straight"])
@pytest.mark.parametrize("rows", [slice(8, 10), slice(-1, 2), slice(3, 2), slice(0, 4, 2)])
def test_rows_that_the_copier_has_not_got_are_refused(way: str, rows: slice) -> None:
    mixed, arena = Mixed("layer", 1), np.zeros(1 << 16, np.uint8)
    with pytest.raises(ValueError, match="of 9"):
        copier_of(mixed, arena, way, 0).gather([Move([1], [arena.data], 0, 1, rows)])


def test_a_payload_is_as_large_as_the_rows_it_is_of() -> None:
    mixed, arena = Mixed("layer", 1), np.zeros(1 << 16, np.uint8)
    copier, size = copier_of(mixed, arena, "straight", 0), sum(WIDTHS[2]) * 8
    copier.gather([Move([1], [arena.data[:size]], 0, 1, mixed.slices[2])]).wait()
    with pytest.raises(ValueError, match="outside its payload"):
        copier.gather([Move([1], [arena.data[: size - 8]], 0, 1, mixed.slices[2])])
