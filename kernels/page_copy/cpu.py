# SPDX-License-Identifier: Apache-2.0
"""Copies where the KV cache lies in host memory: by memcpy, in place, before the call returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loracache.kernels.page_copy.moves import Move, bounds

__all__ = ["CpuCopier"]

_WORD = 8


class CpuCopier:
    """Copies between the rows of layers and host buffers. layers: int64 tensors (blocks, words)."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._layers = [layer.numpy() for layer in layers]

    def copy(self, move: Move, *, into_host: bool) -> None:
        """Copy the blocks of a move."""
        for row, piece in self._rows(move):
            start = 0
            for part in piece:
                host = np.frombuffer(part, dtype=np.int64)
                device = row[start : start + len(host)]
                np.copyto(*((host, device) if into_host else (device, host)))
                start += len(host)

    def _rows(self, move: Move) -> Iterator[tuple[npt.NDArray[Any], list[memoryview]]]:
        """(a layer's row of a block, the parts of the payload that hold it), in the payload's order."""
        base = 0
        layers = self._layers if move.rows is None else self._layers[slice(*bounds(move.rows, len(self._layers)))]
        for rows in layers:
            nbytes = rows.shape[1] * _WORD
            for place, block in enumerate(move.blocks, move.first):
                yield rows[block], _cut(move.payload, base + place * nbytes, nbytes)
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
