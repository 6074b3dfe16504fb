# SPDX-License-Identifier: Apache-2.0
"""The copier: what connectors use, whichever device an engine's KV cache is on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loracache.kernels.page_copy.choice import Choice
from loracache.kernels.page_copy.cpu import CpuCopier
from loracache.kernels.page_copy.device import Device, Direction
from loracache.kernels.page_copy.fragments import Rows
from loracache.kernels.page_copy.gpu import GpuCopier, PinnedPieces
from loracache.kernels.page_copy.measuring import choice_of
from loracache.kernels.page_copy.moves import ARRIVED, Copy, Move

__all__ = ["PageCopier"]

_WORD = 8


class PageCopier:
    """Gathers blocks into host buffers, and scatters them from there.

    layers: int64 tensors (blocks, words) on one device, strided views of the engine's memory. pieces: which host memory
    is pinned; None: none. bounce_below: bytes of fragments on average below which they go through slots and a kernel,
    0: never; None: as is best for the device, by measurement. device: one to use instead of the layers' own. Raises
    CopyError where the layers are on a GPU that cannot be served.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        *,
        pieces: PinnedPieces | None = None,
        bounce_below: int | None = None,
        device: Device | None = None,
    ) -> None:
        self._layers = list(layers)
        self._type = str(layers[0].device.type)
        self._gpu: GpuCopier | None = None
        if device is None and self._type == "cuda":
            from loracache.kernels.page_copy.cuda import cuda_device

            device = cuda_device(layers[0].device.index)
        if device is not None:
            self._type = "cuda"
            self._gpu = GpuCopier(device, _rows(layers), pieces, _choice(device, bounce_below))
        else:
            self._cpu = CpuCopier(layers)

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda"."""
        return self._type

    def gather(self, moves: Sequence[Move], after: Any = None) -> Copy:
        """Copy blocks into their payloads, once the device's event `after` has happened. Raises ValueError for moves
        that reach outside their payload or the KV cache.

        On a CPU all has arrived when it returns. On a GPU it returns when all is submitted, which waits for memory of
        which there is little: where a payload is not pinned, for all of its bytes.
        """
        return self._run(moves, into_host=True, after=after)

    def scatter(self, moves: Sequence[Move], after: Any = None) -> Copy:
        """Copy blocks out of their payloads; else as `gather`."""
        return self._run(moves, into_host=False, after=after)

    def _run(self, moves: Sequence[Move], *, into_host: bool, after: Any) -> Copy:
        if self._gpu is not None:
            return self._gpu.submit(moves, Direction.STORE if into_host else Direction.LOAD, after)
        for move in moves:
            self._cpu.copy(move, into_host=into_host)
        return ARRIVED


def _choice(device: Device, bounce_below: int | None) -> Choice:
    if not device.has_kernels:
        return Choice(0, 0)
    return choice_of(device) if bounce_below is None else Choice(bounce_below, bounce_below)


def _rows(layers: Sequence[torch.Tensor]) -> Rows:
    return Rows.of(
        [layer.data_ptr() for layer in layers],
        [layer.stride(0) * _WORD for layer in layers],
        [layer.shape[1] * _WORD for layer in layers],
        min(layer.shape[0] for layer in layers),
    )
