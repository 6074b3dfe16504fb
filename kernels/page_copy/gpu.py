# SPDX-License-Identifier: Apache-2.0
"""Copies on a device: moves in, fragments to the lane of their direction, and a Copy that knows their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from loracache.kernels.page_copy.choice import Choice
from loracache.kernels.page_copy.device import Device, Direction
from loracache.kernels.page_copy.fragments import Integers, Rows, fragments_of, split_by_pinned
from loracache.kernels.page_copy.lane import Lane
from loracache.kernels.page_copy.moves import Copy, CopyError, Move

__all__ = ["GpuCopier", "PinnedPieces"]


class PinnedPieces(Protocol):
    """Says which host memory is pinned."""

    def steps(self) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """(edges, pinned), both of one length, the last of pinned False: bytes from edges[i] up to edges[i + 1] are
        pinned where pinned[i], and no copy may reach across an edge. What is pinned stays so while its views live."""
        ...


class _Submitted:
    """What was submitted; holds its buffers. error: the device refused some of it."""

    def __init__(self, device: Device, moves: Sequence[Move]) -> None:
        self._device = device
        self._moves: Sequence[Move] = moves
        self.end: Any = None
        self.error: CopyError | None = None

    def done(self) -> bool:
        try:
            return self.end is None or self._device.happened(self.end)
        except CopyError as error:
            self.error = self.error or error
            return True

    def wait(self) -> None:
        try:
            if self.end is not None:
                self._device.synchronize(self.end)
        except CopyError as error:
            self.error = self.error or error
        self._moves = ()
        if self.error is not None:
            raise CopyError(str(self.error)) from self.error

    def hold(self, stream: Any) -> None:
        if self.end is not None:
            self._device.wait(stream, self.end)


class GpuCopier:
    """Copies between the rows of layers and host buffers. pieces: what of those is pinned; None: nothing."""

    def __init__(self, device: Device, rows: Rows, pieces: PinnedPieces | None, choice: Choice) -> None:
        self._device = device
        self._rows, self._bands = rows, rows.bands()
        self._pieces = pieces
        self._choice = choice
        self._lanes: dict[Direction, Lane] = {}

    def submit(self, moves: Sequence[Move], direction: Direction, after: Any) -> Copy:
        """Submit moves. Raises ValueError, before anything is submitted, where one reaches outside its payload or the
        KV cache. What the device refuses is the Copy's error: what was submitted before it has to end first.
        """
        edges, pinned = self._pieces.steps() if self._pieces else (np.zeros(0, np.int64), np.zeros(0, np.bool_))
        straight, staged = split_by_pinned(moves, edges, pinned)
        near, far = (fragments_of(self._rows, self._bands, each) for each in (straight, staged))
        copy = _Submitted(self._device, moves)
        try:
            lane = self._lanes.get(direction)
            if lane is None:
                lane = self._lanes[direction] = Lane(self._device, direction, self._choice)
        except CopyError as error:
            copy.error = error
            return copy
        try:
            for fragments in near:
                lane.submit(fragments, edges, after)
            for fragments in far:
                lane.submit_unpinned(fragments, after)
        except CopyError as error:
            copy.error = error
        try:
            copy.end = lane.end(self._device.event())
        except CopyError as error:
            copy.error = copy.error or error
        return copy
