# SPDX-License-Identifier: Apache-2.0
"""How an engine's KV cache lies in memory, read from the tensors it registers, never from its version.

Registered tensors are logical (blocks, KV heads, tokens of a block, content) views with any strides. What is needed:
all bytes of one block of one layer lie together, so that a block moves as one run of bytes; the order inside goes
into the namespace, and engines of another order never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loracache.errors import UsageError

__all__ = ["KVLayout", "read_layout"]

_WORD = 8


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The KV cache of one worker as rows of words.

    rows: for each layer an int64 tensor (blocks, words of a block), a strided view of the engine's memory. order: the
    physical order of a block's dimensions and the dtype, for the namespace; where layers differ, every kind and
    a digest of which layer is which ("N16.H.C128:bfloat16+N16.H.C128:uint8@3f1c..."). block_bytes: bytes of a block
    over all layers.
    """

    rows: tuple[torch.Tensor, ...]
    order: str
    block_bytes: int


def read_layout(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> KVLayout:
    """The layout of registered tensors, sorted by layer name as registered. Raises UsageError where blocks do not lie
    together.

    A tensor may have a multiple of `num_blocks` rows (the attention kernel's blocks are smaller than the cache
    manager's): then that many rows make a block.
    """
    rows = []
    orders = []
    for name, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
            raise UsageError(f"the KV cache of {name} is not a single tensor of blocks")
        if num_blocks <= 0 or not tensor.numel() or tensor.shape[0] % num_blocks:
            raise UsageError(f"the KV cache of {name} has {tensor.shape[0]} rows for {num_blocks} blocks")
        rows.append(_rows(name, tensor, tensor.shape[0] // num_blocks))
        orders.append(_order(tensor))
    if not rows:
        raise UsageError("the engine registered no KV cache")
    block_bytes = sum(layer.shape[1] * _WORD for layer in rows)
    return KVLayout(tuple(rows), _joined(orders), block_bytes)


def _joined(orders: list[str]) -> str:
    kinds = sorted(set(orders))
    if len(kinds) == 1:
        return kinds[0]
    return f"{'+'.join(kinds)}@{hashlib.sha256(' '.join(orders).encode()).hexdigest()[:16]}"


def _rows(name: str, tensor: torch.Tensor, per_block: int) -> torch.Tensor:
    """(blocks, words): one row a block. Shares the tensor's memory."""
    inner = sorted(
        (stride, size) for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size > 1
    )
    dense = 1
    for stride, size in inner:
        if stride != dense:
            raise UsageError(
                f"a block of {name} does not lie in one piece (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
            )
        dense *= size
    if per_block > 1 and tensor.stride(0) != dense:
        raise UsageError(f"{per_block} kernel blocks make a block of {name}, but they do not lie together")
    item = tensor.element_size()
    nbytes, step = dense * per_block * item, tensor.stride(0) * per_block * item
    offset = tensor.storage_offset() * item
    if nbytes % _WORD or step % _WORD or offset % _WORD:
        raise UsageError(f"a block of {name} has {nbytes} bytes at a step of {step}, not a multiple of {_WORD}")
    view = torch.empty(0, dtype=torch.int64, device=tensor.device)
    return view.set_(
        tensor.untyped_storage(), offset // _WORD, (tensor.shape[0] // per_block, nbytes // _WORD), (step // _WORD, 1)
    )


def _order(tensor: torch.Tensor) -> str:
    """The block's dimensions from the slowest to the fastest, with all sizes but the number of KV heads (dimension 1: a
    shard's own) where there are four, and its dtype:
    "N128.H.C128:bfloat16"."""
    names = "BHNC" if tensor.dim() == 4 else "BNC" if tensor.dim() == 3 else "BXYZUVW"
    dims = sorted(range(1, tensor.dim()), key=lambda dim: -tensor.stride(dim))
    order = ".".join(names[dim] if names[dim] == "H" else f"{names[dim]}{tensor.shape[dim]}" for dim in dims)
    return f"{order}:{str(tensor.dtype).removeprefix('torch.')}"
