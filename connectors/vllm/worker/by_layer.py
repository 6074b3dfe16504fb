# SPDX-License-Identifier: Apache-2.0
"""Loads within the step that computes upon them: which layers are copied together, and how the step waits for them.

The loader's thread copies a slice of layers after another, each for all chunks, and says so; the worker's main thread,
between two layers, waits until the slice it needs was handed over: on a CPU its bytes are there then, on a GPU the
stream that computes waits for them. Whether they were right is known at the end of the step, which waits for that.

Threading: a LayerCopies is written by the loader's thread and waited for by the main thread; StepLoads is the main
thread's.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from loracache.connectors.vllm.common.messages import Load
from loracache.connectors.vllm.worker.layout import last_rows
from loracache.connectors.vllm.worker.objects import cut
from loracache.kernels.page_copy import Copy, CopyError, Move

__all__ = ["LayerCopies", "StepLoads", "layers_of"]

_log = logging.getLogger(__name__)
_SLICE_BYTES = 1 << 20  # a submission costs some tens of microseconds
_PATIENCE_S = 3.0  # the loader gives up sooner
_LOOK_S = 1.0  # between two looks whether the loader lives


class LayerCopies:
    """One load's copies. slices: of the copier's rows, in their order. widths: bytes of a block of each row."""

    def __init__(self, slices: Sequence[slice], widths: Sequence[int]) -> None:
        self.slices = slices
        self.widths = widths
        self._stops = [each.stop for each in slices]
        self._copies: list[Copy] = []
        self._over = False
        self._news = threading.Condition()
        self._held = 0  # copies that the step has waited for

    def submitted(self, copy: Copy) -> None:
        """The next slice is on its way, or there."""
        with self._news:
            self._copies.append(copy)
            self._news.notify_all()

    def end(self) -> None:
        """The load is over and reported: no byte is written any more."""
        with self._news:
            self._over = True
            self._news.notify_all()

    def until(self, row: int) -> list[Copy] | None:
        """Wait for the slice that a row is in; answers the copies up to it that were not answered before. None where it
        does not come: the load has ended early, or nothing has come for so long that the step goes on without."""
        wanted = bisect_right(self._stops, row) + 1
        if wanted <= self._held:
            return []
        with self._news:
            while len(self._copies) < wanted:
                count = len(self._copies)
                if not self._news.wait_for(lambda: self._over or len(self._copies) > count, _PATIENCE_S):  # noqa: B023
                    return None
                if self._over and len(self._copies) < wanted:
                    return None
            fresh = self._copies[self._held :]
        self._held += len(fresh)
        return fresh

    def until_over(self, seconds: float) -> bool:
        """Wait for its end; False where that has not come in so many seconds."""
        with self._news:
            return self._news.wait_for(lambda: self._over, seconds)


class StepLoads:
    """The loads of the step under way. rows: the copier's. kv_caches: as the engine registered them."""

    def __init__(self, rows: Sequence[torch.Tensor], kv_caches: Mapping[str, Any]) -> None:
        self._widths = [row.shape[1] * row.element_size() for row in rows]
        self._last_rows = last_rows(kv_caches, rows)
        self._on_gpu = rows[0].device.type == "cuda"
        self._under_way: list[tuple[Load, LayerCopies]] = []
        self._waited: set[str] = set()  # layers that waited in this step
        self._step = 0
        self._came: dict[int, int] = {}  # steps: 1 where all came whole
        self._missed: set[str] = set()  # requests whose bytes some layer did not wait for

    def begin(self, load: Load, step: int) -> LayerCopies:
        """What a load's copies are handed over through, in a step."""
        self._step = step
        copies = LayerCopies(_slices(self._widths, max(1, len(load.blocks))), self._widths)
        self._under_way.append((load, copies))
        return copies

    def wait_for_layer(self, name: str) -> None:
        """Before a layer's attention. Nothing but a look where the step loads nothing."""
        if not self._under_way:
            return
        row = self._last_rows.get(name, len(self._widths) - 1)
        self._waited.add(name)
        for load, copies in self._under_way:
            try:
                handed_over = copies.until(row)
                for copy in handed_over or ():
                    copy.hold(torch.cuda.current_stream().cuda_stream if self._on_gpu else None)
            except CopyError as error:
                _log.warning("the step does not wait for the load of %s: %s", load.request_id, error)
                handed_over = None
            if handed_over is None:
                self._missed.add(load.request_id)

    def end(self, alive: Callable[[], bool]) -> list[tuple[Load, bool]]:
        """At the end of the step: wait until all are over. Answers them, and whether every layer has waited for its
        bytes: what did not is computed from whatever lay there. alive: whether the loader is, which ends them."""
        under_way, self._under_way = self._under_way, []
        all_waited = self._last_rows.keys() <= self._waited
        ended = []
        for load, copies in under_way:
            while not (over := copies.until_over(_LOOK_S)) and alive():
                pass
            ended.append((load, over and all_waited and load.request_id not in self._missed))
        self._waited.clear()
        self._missed.clear()
        return ended

    def ended(self, *, whole: bool) -> None:
        """How one of those that have ended came."""
        self._came[self._step] = min(self._came.get(self._step, 1), int(whole))

    def take_news(self) -> dict[int, int]:
        """What the scheduler does not know yet: steps, 1 where all of their loads came whole, else 0."""
        came, self._came = self._came, {}
        return came


def layers_of(move: Move, widths: Sequence[int], rows: slice) -> Move:
    """The part of a move of all rows that is about some of them."""
    before, nbytes = sum(widths[: rows.start]), sum(widths[rows])
    return Move(move.blocks, cut(move.payload, move.of * before, move.of * nbytes), move.first, move.of, rows)


def _slices(widths: Sequence[int], blocks: int) -> list[slice]:
    """The fewest rows that are so many bytes, again and again."""
    slices, start = [], 0
    ends = list(accumulate(widths, initial=0))
    for stop in range(1, len(widths) + 1):
        if (ends[stop] - ends[start]) * blocks >= _SLICE_BYTES or stop == len(widths):
            slices.append(slice(start, stop))
            start = stop
    return slices
