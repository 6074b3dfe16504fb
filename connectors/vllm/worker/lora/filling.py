# SPDX-License-Identifier: Apache-2.0
"""Copies an adapter's payload onto pages: rank rows to rank rows, this worker's part of each, cast where the engine
computes in another dtype.

Threading: one adapter at a time, on any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from loracache.adapters.payload import ModuleWeights, Packed, StoredTensor
from loracache.connectors.vllm.worker.lora.pool import PagedAdapter, PagePool
from loracache.errors import UsageError
from loracache.kernels.tables import RANK, round_up

__all__ = ["DTYPES", "fill_pages"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16: words are copied


def fill_pages(
    pool: PagePool, adapter: PagedAdapter, packed: Packed, parts: Mapping[str, ModuleWeights], layers: Sequence[Any]
) -> None:
    """Copy all matrices. parts: the adapter's modules by the model's names. layers: vLLM's LoRA layers, one for each of
    the pool's modules; they know which columns are this worker's. Raises UsageError where a matrix has not the shape
    that its place is for; nothing beside the adapter's pages is ever touched.
    """
    row = 0
    for module, layer in zip(pool.shape.modules, layers, strict=True):
        found = [parts.get(part) for part in module.parts]
        if any(found):
            a = [_rows(packed, each.a) if each is not None else None for each in found]
            b = [_rows(packed, each.b) if each is not None else None for each in found]
            # Embeddings and heads have no shards: vLLM gathers before it adds, and every worker has them whole.
            if isinstance(layer, BaseLinearLayerWithLoRA) and layer.tp_size > 1:
                a, b = _shard(layer, a, b)
            for number, (rows_a, rows_b, out) in enumerate(zip(a, b, module.widths, strict=True), row):
                if rows_a is not None and rows_b is not None:
                    _write(pool, adapter, (number, 0), module.width, rows_a)
                    _write(pool, adapter, (number, 1), out, rows_b)
        row += len(module.parts)


def _rows(packed: Packed, tensor: StoredTensor) -> torch.Tensor:
    """(rank, in) or (rank, out), a view of the payload where it lies in one piece."""
    pieces = packed.rows(tensor)
    data = pieces[0] if len(pieces) == 1 else bytearray(b"".join(pieces))
    shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(shape)


def _shard(layer: Any, a: list[Any], b: list[Any]) -> tuple[list[Any], list[Any]]:
    """This worker's columns. vLLM's layers take B as (out, rank)."""
    turned = [each.t() if each is not None else None for each in b]
    if len(a) == 1:
        a, turned = [layer.slice_lora_a(a[0])], [layer.slice_lora_b(turned[0])]
    else:
        a, turned = layer.slice_lora_a(a), layer.slice_lora_b(turned)
    return a, [each.t() if each is not None else None for each in turned]


def _write(pool: PagePool, adapter: PagedAdapter, place: tuple[int, int], width: int, rows: torch.Tensor) -> None:
    """place: slice and matrix. width: of a row on this worker."""
    rank, row = int(adapter.places[place[0], RANK]), round_up(width, pool.shape.chunk)
    if rows.shape != (rank, width):
        raise UsageError(f"a matrix of shape {tuple(rows.shape)} has no place that is for {(rank, width)}")
    pieces = pool.matrix(adapter, *place)
    source = rows.to(pool.pages.dtype)
    if source.dtype != rows.dtype and not torch.isfinite(source).all():
        raise UsageError(f"the adapter has numbers that are too large for {source.dtype}, in which the engine has LoRA")
    if len(pieces) == 1:
        _copy(pieces[0].view(rank, row)[:, :width], source)
        return
    padded = source.new_empty((rank, row))
    padded[:, :width] = source
    flat, at = padded.view(-1), 0
    for piece in pieces:
        _copy(piece, flat[at : at + len(piece)])
        at += len(piece)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    (_copy_in_host_memory if target.device.type == "cpu" else _copy_to_device)(target, source)


def _copy_to_device(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _copy_in_host_memory(target: torch.Tensor, source: torch.Tensor) -> None:
    words = _WORDS[target.element_size()]  # by numpy, which starts no threads beside those that compute
    np.copyto(target.view(words).numpy(), source.view(words).numpy())
