# SPDX-License-Identifier: Apache-2.0
"""Copies blocks of an engine's KV cache to and from host buffers.

`layers` are int64 tensors (blocks, words) on one device; a payload holds, layer after layer, the rows of its blocks.
On the CPU rows are copied in place by memcpy; on a GPU by asynchronous copies on a stream of their own, which a call
waits for before it returns, so that a caller on a background thread may hash, commit or release at once.

Threading: one copier a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

__all__ = ["PageCopier"]

_WORD = 8


class PageCopier:
    """Gathers blocks into, and scatters them from, lists of host buffers."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._device = layers[0].device
        self._layers = list(layers)
        self._arrays = [layer.numpy() for layer in layers] if self._device.type == "cpu" else []
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda"."""
        return str(self._device.type)

    def gather(
        self, blocks: Sequence[int], payload: Sequence[memoryview], after: torch.cuda.Event | None = None
    ) -> None:
        """Copy `blocks` of every layer into `payload`: shape (layers, blocks, words of a row). On a GPU the copy
        starts once `after` has happened.
        """
        self._run(
            [(block, place) for place, block in enumerate(blocks)], len(blocks), payload, into_host=True, after=after
        )

    def scatter(
        self,
        blocks: Sequence[int],
        payload: Sequence[memoryview],
        *,
        first: int,
        of: int,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Copy blocks out of a payload of `of` blocks into `blocks`, beginning with the payload's block number
        `first`. On a GPU the copy starts once `after` has happened.
        """
        self._run(
            [(block, first + place) for place, block in enumerate(blocks)], of, payload, into_host=False, after=after
        )

    def _run(
        self,
        moves: Sequence[tuple[int, int]],
        of: int,
        payload: Sequence[memoryview],
        *,
        into_host: bool,
        after: torch.cuda.Event | None,
    ) -> None:
        if self._stream is None:
            for (layer, block), piece in self._pieces(moves, of, payload):
                row, start = self._arrays[layer][block], 0
                for part in piece:
                    host = np.frombuffer(part, dtype=np.int64)
                    device = row[start : start + len(host)]
                    np.copyto(*((host, device) if into_host else (device, host)))
                    start += len(host)
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for (layer, block), piece in self._pieces(moves, of, payload):
                row, start = self._layers[layer][block], 0
                for part in piece:
                    host = torch.frombuffer(part, dtype=torch.int64)
                    device = row[start : start + len(host)]
                    target, source = (host, device) if into_host else (device, host)
                    target.copy_(source, non_blocking=True)
                    start += len(host)
        self._stream.synchronize()

    def _pieces(
        self, moves: Sequence[tuple[int, int]], of: int, payload: Sequence[memoryview]
    ) -> Iterator[tuple[tuple[int, int], list[memoryview]]]:
        """((layer, block), the parts of the payload that hold this row), in the payload's order."""
        base = 0
        for layer, rows in enumerate(self._layers):
            nbytes = rows.shape[1] * _WORD
            for block, place in moves:
                yield (layer, block), _cut(payload, base + place * nbytes, nbytes)
            base += of * nbytes


def _cut(payload: Sequence[memoryview], offset: int, nbytes: int) -> list[memoryview]:
    if len(payload) == 1:
        return [payload[0][offset : offset + nbytes]]
    parts = []
    for buffer in payload:
        if offset < len(buffer) and nbytes:
            part = buffer[offset : offset + nbytes]
            parts.append(part)
            nbytes -= len(part)
            offset = 0
        else:
            offset -= min(offset, len(buffer))
    return parts
