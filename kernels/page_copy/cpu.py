# SPDX-License-Identifier: Apache-2.0
"""Copies where the KV cache lies in host memory: by memcpy, in place, before the call returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from loracache.kernels.page_copy.moves import Move

__all__ = ["CpuCopier"]

_WORD = 8


class CpuCopier:
    """Copies between the rows of layers and host buffers. layers: int64 tensors (blocks, words)."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._layers = [layer.numpy() for layer in layers]

    def copy(self, move: Move, *, into_host: bool) -> None:
        """Copy the blocks of a move."""
        for (layer, block), piece in self._rows(move):
            row, start = self._layers[layer][block], 0
            for part in piece:
                host = np.frombuffer(part, dtype=np.int64)
                device = row[start : start + len(host)]
                np.copyto(*((host, device) if into_host else (device, host)))
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
