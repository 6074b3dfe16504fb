# SPDX-License-Identifier: Apache-2.0
"""Copies on a device that is as late and as disorderly as CUDA allows: what arrives is right, and nothing is said to
have arrived before it has."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from loracache.kernels.page_copy import Copy, CopyError, Move, PageCopier, fragments, lane
from loracache.kernels.page_copy.choice import Choice
from loracache.kernels.page_copy.device import Direction, SourceOrder
from loracache.kernels.page_copy.fragments import Fragments
from loracache.kernels.page_copy.recording import RecordingDevice

LAYERS, BLOCKS, WORDS = 3, 64, 8
ROW = WORDS * 8
STRAIGHT, BOUNCING = 0, 1 << 40
ways = pytest.mark.parametrize("way", ["straight", "bouncing", "unpinned", "unpinned, bouncing", "mixed"])
seeds = pytest.mark.parametrize("seed", range(4))


class Pinned:
    """What is pinned of an arena: nothing, all, or every piece but each third."""

    def __init__(self, arena: np.ndarray[Any, Any], way: str) -> None:
        address = arena.ctypes.data
        self.edges = np.array([*range(address, address + len(arena), 5 * ROW - 16), address + len(arena)], np.int64)
        self.pinned = np.full(len(self.edges), not way.startswith("unpinned"))
        self.pinned[-1] = False
        if way == "mixed":
            self.pinned[::3] = False

    def steps(self) -> tuple[Any, Any]:
        return self.edges, self.pinned


class Rig:
    """An engine's blocks on a recording device, and an arena."""

    def __init__(self, way: str = "straight", seed: int = 0, refuses: Any = (), outermost: str = "layer") -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (LAYERS, BLOCKS, WORDS) if outermost == "layer" else (BLOCKS, LAYERS, WORDS)
        self.whole = torch.randint(-(1 << 62), 1 << 62, shape, generator=generator)
        self.layers = [self.whole[each] if outermost == "layer" else self.whole[:, each] for each in range(LAYERS)]
        self.arena = np.random.default_rng(seed).integers(0, 255, BLOCKS * LAYERS * ROW, np.uint8)
        self.pieces = Pinned(self.arena, way)
        self.device = RecordingDevice(
            seed,
            steps=self.pieces.steps,
            device_memory=[(self.whole.data_ptr(), self.whole.nbytes)],
            refuses=refuses,
        )
        below = BOUNCING if way in ("bouncing", "unpinned, bouncing", "mixed") else STRAIGHT
        self.copier = PageCopier(self.layers, pieces=self.pieces, device=self.device, bounce_below=below)

    def moves(self, *blocks: list[int]) -> list[Move]:
        """Of these blocks each, one payload behind another."""
        found, at = [], 0
        for taken in blocks:
            size = len(taken) * LAYERS * ROW
            first = self.arena.data[at : at + size]
            found.append(Move(taken, [first[: size // 2 // 8 * 8], first[size // 2 // 8 * 8 :]], 0, len(taken)))
            at += size
        return found

    def gathered(self, moves: list[Move]) -> list[bytes]:
        return [b"".join(layer[b].numpy().tobytes() for layer in self.layers for b in move.blocks) for move in moves]


def held(moves: list[Move]) -> list[bytes]:
    return [b"".join(move.payload) for move in moves]


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that a few blocks go around in."""
    monkeypatch.setattr(lane, "SLOT_BYTES", 9 * ROW)
    monkeypatch.setattr(lane, "_STAGE_BYTES", 7 * ROW)
    monkeypatch.setattr(lane, "_STORE_BYTES", 8 * ROW)
    monkeypatch.setattr(lane, "_TABLES", 2)
    monkeypatch.setattr(lane, "_TABLE_FRAGMENTS", 20)
    monkeypatch.setattr(fragments, "_TOGETHER", 40)


CHUNKS = [[5, 9, 10, 11], [20, 21, 22, 23], [40, 30, 33, 34], [50, 52, 51, 3], [60, 1], [0, 2, 63]]


@ways
@seeds
def test_what_is_scattered_arrives_and_nothing_else_changes(way: str, seed: int) -> None:
    rig = Rig(way, seed, outermost="layer" if seed % 2 else "block")
    moves, before = rig.moves(*CHUNKS), rig.whole.clone()
    payloads = held(moves)
    copy = rig.copier.scatter(moves)
    while not copy.done():
        pass
    assert rig.gathered(moves) == payloads
    copy.wait()
    taken = set(itertools.chain(*CHUNKS))
    for layer, was in zip(rig.layers, before.unbind(0 if seed % 2 else 1), strict=True):
        others = [block for block in range(BLOCKS) if block not in taken]
        assert torch.equal(layer[others], was[others])
    assert held(moves) == payloads


@ways
@seeds
def test_what_is_gathered_arrives_and_nothing_else_changes(way: str, seed: int) -> None:
    rig = Rig(way, seed, outermost="layer" if seed % 2 else "block")
    moves, before, arena = rig.moves(*CHUNKS), rig.whole.clone(), rig.arena.copy()
    copy = rig.copier.gather(moves)
    copy.wait()
    assert held(moves) == rig.gathered(moves)
    end = sum(len(payload) for payload in held(moves))
    assert (rig.arena[end:] == arena[end:]).all()
    assert torch.equal(rig.whole, before)
    assert copy.done()


@pytest.mark.parametrize("way", ["straight", "bouncing"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("seed", range(12))
def test_of_pinned_memory_nothing_is_waited_for_and_nothing_said_to_have_arrived(
    way: str, direction: Direction, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "_TABLES", 8)
    rig = Rig(way, seed)
    moves, before, arena = rig.moves(*CHUNKS), rig.whole.clone(), rig.arena.copy()
    copy = (rig.copier.scatter if direction is Direction.LOAD else rig.copier.gather)(moves)
    assert torch.equal(rig.whole, before)
    assert (rig.arena == arena).all()
    asked = 0
    while not copy.done():
        asked += 1
    assert asked
    assert rig.gathered(moves) == held(moves)


@ways
@seeds
def test_many_copies_under_way_arrive_each(way: str, seed: int) -> None:
    """Slots and tables go around several times, and copies are asked for out of order."""
    rig = Rig(way, seed)
    groups = [rig.moves(*CHUNKS)[at : at + 2] for at in (0, 2, 4)]
    copies = [rig.copier.scatter(group) for group in groups]
    for at in np.random.default_rng(seed).permutation(3):
        copies[at].wait()
        assert rig.gathered(groups[at]) == held(groups[at])


@ways
@pytest.mark.parametrize("direction", Direction)
def test_a_copy_begins_after_its_event(way: str, direction: Direction) -> None:
    """What the engine computes meanwhile is on its way to the blocks: a store takes it along, a load goes over it."""
    rig = Rig(way)
    engine, event = rig.device.stream(Direction.LOAD), rig.device.event()
    computed = rig.device.allocate_host(rig.whole.nbytes)
    target, source, nbytes = (np.array([each]) for each in (rig.whole.data_ptr(), computed.address, rig.whole.nbytes))
    rig.device.copy(target, source, nbytes, engine, SourceOrder.STREAM)
    rig.device.record(event, engine)
    moves = rig.moves(*CHUNKS)
    payloads = held(moves)
    run = rig.copier.scatter if direction is Direction.LOAD else rig.copier.gather
    run(moves, event).wait()
    rig.device.synchronize(event)
    if direction is Direction.LOAD:
        assert rig.gathered(moves) == payloads
    else:
        assert all(set(payload) == {0x5A} for payload in held(moves))


def outcomes(copies: list[Copy]) -> list[bool]:
    found = []
    for copy in copies:
        try:
            copy.wait()
            found.append(True)
        except CopyError:
            found.append(False)
    return found


@ways
@pytest.mark.parametrize("direction", Direction)
def test_what_the_device_refuses_fails_one_copy_and_no_other(way: str, direction: Direction) -> None:
    failed = 0
    for number in range(200):
        rig = Rig(way, refuses={number})
        groups = [rig.moves(*CHUNKS)[at : at + 2] for at in (0, 2, 4)]
        payloads = [held(group) for group in groups]
        before = rig.whole.clone()
        run = rig.copier.scatter if direction is Direction.LOAD else rig.copier.gather
        copies = [run(group) for group in groups]
        fine = outcomes(copies)
        assert fine.count(False) <= 1
        for group, payload, well in zip(groups, payloads, fine, strict=True):
            if well and direction is Direction.LOAD:
                assert rig.gathered(group) == payload
            elif well:
                assert held(group) == rig.gathered(group)
        others = sorted(set(range(BLOCKS)).difference(itertools.chain(*CHUNKS)))
        assert torch.equal(rig.whole[:, others], before[:, others])
        assert all(copy.done() for copy in copies)
        again = run(groups[0])
        if all(fine):
            break
        again.wait()  # nor any after it
        assert rig.gathered(groups[0]) == held(groups[0])
        failed += 1
    else:
        pytest.fail("there was no end")
    assert failed >= 3


def test_a_failed_copy_has_ended_when_what_went_before_has() -> None:
    """Its buffers may not be given away while a part of it is under way still."""
    rig = Rig("straight", refuses={2})
    moves = rig.moves(*CHUNKS)
    copy = rig.copier.gather(moves)
    assert [what for what, *_ in rig.device.submitted] == ["copy"] * 3
    arena = rig.arena.copy()
    with pytest.raises(CopyError, match="copy 2 was refused"):
        copy.wait()
    assert (rig.arena != arena).any()  # the first two
    arrived = rig.arena.copy()
    while rig.device.advance():
        pass
    assert (rig.arena == arrived).all()


def test_stores_are_submitted_in_small_parts_and_small_rows_bounce_in_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fragments, "_TOGETHER", 1 << 14)
    rig = Rig("straight")
    rig.copier.gather(rig.moves(*CHUNKS)).wait()
    assert max(nbytes for *_, nbytes in rig.device.submitted) <= 8 * ROW
    rig = Rig("bouncing")
    rig.copier.scatter(rig.moves(*([block] for block in range(0, 32, 2)))).wait()
    launches = sum(what == "launch" for what, *_ in rig.device.submitted)
    assert 6 <= launches <= 8  # 48 rows and some cut in two, 9 rows a slot, 20 fragments a table
    filled = [(runs, nbytes) for what, _, runs, nbytes in rig.device.submitted if what == "copy"]
    assert all(runs <= 4 for runs, _ in filled)  # cut where registrations meet


@pytest.mark.parametrize(("words", "offset", "bounces"), [(8, 0, True), (8, 1, False), (7, 0, False)])
def test_what_is_not_a_multiple_of_16_bytes_goes_straight(words: int, offset: int, bounces: bool) -> None:
    storage = torch.zeros(1 + BLOCKS * words, dtype=torch.int64)
    assert storage.data_ptr() % 16 == 0
    layer = storage[offset : offset + BLOCKS * words].view(BLOCKS, words)
    payload = np.arange(BLOCKS * words * 8, dtype=np.uint8)
    device = RecordingDevice()
    copier = PageCopier([layer], pieces=Pinned(payload, "straight"), device=device, bounce_below=BOUNCING)
    blocks = list(range(0, BLOCKS, 2))
    copier.scatter([Move([block], [payload.data[at * words * 8 :]], 0, 1) for at, block in enumerate(blocks)]).wait()
    assert any(what == "launch" for what, *_ in device.submitted) == bounces
    assert layer[blocks].numpy().tobytes() == payload.tobytes()[: len(blocks) * words * 8]


def test_few_fragments_go_straight() -> None:
    rig = Rig("bouncing")
    rig.copier.scatter(rig.moves([1], [7])).wait()  # six rows, two of them cut
    assert [what for what, *_ in rig.device.submitted] == ["copy"]


def test_it_is_the_mean_fragment_that_decides() -> None:
    """A row that is cut where an extent or a registration ends makes two small ones, and all the others no slower."""

    def fragments(*sizes: int) -> Fragments:
        nbytes = np.array(sizes, np.int64)
        return Fragments(np.cumsum(nbytes) - nbytes, np.cumsum(nbytes) - nbytes, nbytes)

    choice = Choice(1024, 0)
    assert not choice.bounces(Direction.LOAD, fragments(*[1024] * 20))
    assert choice.bounces(Direction.LOAD, fragments(*[1008] * 20))
    assert not choice.bounces(Direction.STORE, fragments(*[1008] * 20))
    assert not choice.bounces(Direction.LOAD, fragments(*[1088] * 40, 16, 1024))
    assert choice.bounces(Direction.LOAD, fragments(*[1040, 512] * 20))
    assert not choice.bounces(Direction.LOAD, fragments(*[512] * 15))


def test_moves_outside_the_cache_are_refused_before_anything_is_submitted() -> None:
    rig = Rig()
    with pytest.raises(ValueError, match="of 64"):
        rig.copier.scatter(rig.moves([1], [64]))
    assert not rig.device.submitted
