# SPDX-License-Identifier: Apache-2.0
"""The copier: on the CPU rows are copied in place by memcpy, on a GPU by asynchronous copies on a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from loracache.kernels.page_copy.moves import ARRIVED, Copy, CopyError, Move

__all__ = ["PageCopier"]

_WORD = 8


class _Streamed:
    """A Copy of which `event` is the last thing."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        try:
            return bool(self._event.query())
        except RuntimeError:
            return True

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise CopyError(str(error)) from error


class PageCopier:
    """Gathers blocks into host buffers, and scatters them from there.

    layers: int64 tensors (blocks, words) on one device, strided views of the engine's memory. pieces: (address, bytes)
    of host memory that is pinned in one piece each.
    """

    def __init__(self, layers: Sequence[torch.Tensor], *, pieces: Sequence[tuple[int, int]] = ()) -> None:
        self._device = layers[0].device
        self._layers = list(layers)
        self._pieces = pieces
        self._arrays = [layer.numpy() for layer in layers] if self._device.type == "cpu" else []
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda"."""
        return str(self._device.type)

    def gather(self, moves: Sequence[Move], after: torch.cuda.Event | None = None) -> Copy:
        """Copy blocks into their payloads, once `after` has happened. On a GPU it returns at once; on a CPU all has
        arrived when it returns.
        """
        return self._run(moves, into_host=True, after=after)

    def scatter(self, moves: Sequence[Move], after: torch.cuda.Event | None = None) -> Copy:
        """Copy blocks out of their payloads, once `after` has happened. On a GPU it returns at once; on a CPU all has
        arrived when it returns.
        """
        return self._run(moves, into_host=False, after=after)

    def _run(self, moves: Sequence[Move], *, into_host: bool, after: torch.cuda.Event | None) -> Copy:
        if self._stream is None:
            for move in moves:
                self._copy_on_cpu(move, into_host)
            return ARRIVED
        try:
            with torch.cuda.stream(self._stream):
                if after is not None:
                    self._stream.wait_event(after)
                for move in moves:
                    self._submit(move, into_host)
            return _Streamed(self._stream.record_event())
        except RuntimeError as error:
            raise CopyError(str(error)) from error

    def _copy_on_cpu(self, move: Move, into_host: bool) -> None:
        for (layer, block), piece in self._rows(move):
            row, start = self._arrays[layer][block], 0
            for part in piece:
                host = np.frombuffer(part, dtype=np.int64)
                device = row[start : start + len(host)]
                np.copyto(*((host, device) if into_host else (device, host)))
                start += len(host)

    def _submit(self, move: Move, into_host: bool) -> None:
        for (layer, block), piece in self._rows(move):
            row, start = self._layers[layer][block], 0
            for part in piece:
                host = torch.frombuffer(part, dtype=torch.int64)
                device = row[start : start + len(host)]
                target, source = (host, device) if into_host else (device, host)
                target.copy_(source, non_blocking=True)
                start += len(host)

    def _rows(self, move: Move) -> Iterator[tuple[tuple[int, int], list[memoryview]]]:
        """((layer, block), the parts of the payload that hold this row), in the payload's order."""
        base = 0
        for layer, rows in enumerate(self._layers):
            nbytes = rows.shape[1] * _WORD
            for place, block in enumerate(move.blocks, move.first):
                yield (layer, block), _cut(move.payload, base + place * nbytes, nbytes)
            base += move.of * nbytes


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
