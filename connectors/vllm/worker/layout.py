# SPDX-License-Identifier: Apache-2.0
"""How an engine's KV cache lies in memory, read from the tensors it registers, never from its version.

Registered tensors are logical (blocks, KV heads, tokens of a block, content) views with any strides. A block moves as
runs of bytes: one for all layers where they lie side by side (block-outermost layouts), else one a layer, or one a head
where a layer's heads lie apart. The order inside goes into the namespace, and engines of another order never meet.

A layer that keeps a state has all of it in one page of a block: registered as (blocks, 1, 1, bytes), or as a list of
views of the page, one of each part of the state. It moves as one run, without what the page is filled up with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loracache.connectors.vllm.common.geometry import IN_BLOCKS
from loracache.errors import UsageError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["KVLayout", "joint_order", "last_rows", "lies_at", "platform_name", "read_layout"]

_WORD = 8
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The KV cache of one worker, or of a group of its layers, as rows of words.

    names: its layers; those that share another's KV are not among them. rows: int64 tensors (blocks, words of a row),
    strided views of the engine's memory; a payload holds row after row, each for all its blocks. order: the physical
    order of a block's dimensions and the dtype, for the namespace; where layers differ, every kind and a digest of
    which layer is which ("N16.H.C128:bfloat16+N16.H.C128:uint8@3f1c..."); where one row spans all layers, "@blocks"
    or, where they do not lie in their order, a digest of it. block_bytes: bytes of a block over all layers.
    """

    names: tuple[str, ...]
    rows: tuple[torch.Tensor, ...]
    order: str
    block_bytes: int


def read_layout(kv_caches: Mapping[str, Any], num_blocks: int, states: Mapping[str, Any] | None = None) -> KVLayout:
    """The layout of registered tensors, sorted by layer name as registered. states: vLLM's MambaSpec of each layer that
    keeps a state. Raises UsageError where blocks cannot be moved as runs of words, naming the layer.

    A tensor may have a multiple of `num_blocks` rows (the attention kernel's blocks are smaller than the cache
    manager's): then that many rows make a block. Layers under whose names the same tensor is registered share their KV.
    """
    rows: list[torch.Tensor] = []
    orders: dict[str, str] = {}
    seen = set()
    for name, registered in kv_caches.items():
        state = (states or {}).get(name)
        tensors = list(registered) if state is not None and isinstance(registered, list | tuple) else [registered]
        for tensor in tensors:
            _check(name, tensor, num_blocks)
        if (where := lies_at(registered)) in seen:
            continue
        seen.add(where)
        if state is not None:
            found = _state_rows(name, tensors, num_blocks)
            rows += found
            orders[name] = _state_order(state, tensors, apart=len(found) > 1)
            continue
        tensor = tensors[0]
        parts = _parts(tensor)
        rows += [_rows(name, part, tensor.shape[0] // num_blocks) for part in parts]
        orders[name] = _order(tensor, apart=len(parts) > 1)
    if not rows:
        raise UsageError("the engine registered no KV cache")
    block_bytes = sum(row.shape[1] * _WORD for row in rows)
    joined, how = _side_by_side(rows)
    order = joint_order(list(orders.values()))
    if how:
        order += f"{'.' if '@' in order else '@'}{how}"
    return KVLayout(tuple(orders), tuple(joined), order, block_bytes)


def lies_at(registered: Any) -> tuple[Any, ...]:
    """Where the first tensor that is registered for a layer lies: the same for layers that share their KV."""
    tensor = registered[0] if isinstance(registered, list | tuple) else registered
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def last_rows(kv_caches: Mapping[str, Any], rows: Sequence[torch.Tensor]) -> dict[str, int]:
    """For each registered layer the last of its rows: all of its KV is there once that is."""
    starts = [row.data_ptr() for row in rows]
    ends = [row.data_ptr() + row.shape[1] * _WORD for row in rows]
    found = {}
    for name, registered in kv_caches.items():
        tensors = registered if isinstance(registered, list | tuple) else [registered]
        begins = [part.data_ptr() for tensor in tensors for part in _parts(tensor)]
        holds = [row for row in range(len(rows)) if any(starts[row] <= begin < ends[row] for begin in begins)]
        found[name] = max(holds, default=len(rows) - 1)
    return found


def _check(name: str, tensor: Any, num_blocks: int) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        raise UsageError(f"the KV cache of {name} is not a single tensor of blocks")
    kind = "ROCm" if tensor.device.type == "cuda" and torch.version.hip else tensor.device.type
    if kind not in _DEVICES:
        raise UsageError(
            f"the KV cache of {name} is on a device of type {kind}; it can be copied on {' and '.join(_DEVICES)}"
        )
    if num_blocks <= 0 or not tensor.numel() or tensor.shape[0] % num_blocks:
        raise UsageError(f"the KV cache of {name} has {tensor.shape[0]} rows for {num_blocks} blocks")


def joint_order(orders: Sequence[str]) -> str:
    """One text for those of several layers: every kind, and where they differ a digest of which is which."""
    kinds = sorted(set(orders))
    if len(kinds) == 1:
        return kinds[0]
    return f"{'+'.join(kinds)}@{hashlib.sha256(' '.join(orders).encode()).hexdigest()[:16]}"


def _side_by_side(rows: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], str]:
    """(the rows to move, how they differ from `rows`): one that spans them all where they tile every block."""
    storage, step = rows[0].untyped_storage().data_ptr(), rows[0].stride(0)
    order = sorted(range(len(rows)), key=lambda place: rows[place].data_ptr())
    begins = at = rows[order[0]].data_ptr()
    for row in (rows[place] for place in order):
        if (row.untyped_storage().data_ptr(), row.stride(0), row.data_ptr()) != (storage, step, at):
            return rows, ""
        at += row.shape[1] * _WORD
    words = (at - begins) // _WORD
    if len(rows) == 1 or words > step:
        return rows, ""
    joined = rows[order[0]].as_strided((rows[0].shape[0], words), (step, 1))
    if order == list(range(len(rows))):
        return [joined], IN_BLOCKS
    return [joined], hashlib.sha256(repr(order).encode()).hexdigest()[:16]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What of a tensor lies in one piece in every block: all of it, or each head where heads lie apart."""
    if tensor.dim() != 4 or tensor.shape[1] == 1:
        return [tensor]
    inner = tensor.shape[2] * tensor.shape[3]
    if tensor.stride(1) <= inner:  # heads interleaved with tokens, or one behind the other
        return [tensor]
    return [tensor[:, head] for head in range(tensor.shape[1])]


def _rows(name: str, tensor: torch.Tensor, per_block: int) -> torch.Tensor:
    """(blocks, words): one row a block. Shares the tensor's memory."""
    dense = _dense(name, tensor)
    if per_block > 1 and tensor.stride(0) != dense:
        raise UsageError(f"{per_block} kernel blocks make a block of {name}, but they do not lie together")
    item = tensor.element_size()
    nbytes, step = dense * per_block * item, tensor.stride(0) * per_block * item
    if nbytes % _WORD:
        raise UsageError(f"a block of {name} has {nbytes} bytes at a step of {step}, not a multiple of {_WORD}")
    return _words(name, tensor, tensor.shape[0] // per_block, nbytes, step)


def _dense(name: str, tensor: torch.Tensor) -> int:
    """Elements of a block, which lie in one piece."""
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
    return dense


def _words(name: str, tensor: torch.Tensor, blocks: int, nbytes: int, step: int) -> torch.Tensor:
    """The first `nbytes` of each block, a multiple of a word, from where the tensor begins."""
    offset = tensor.storage_offset() * tensor.element_size()
    if step % _WORD or offset % _WORD:
        raise UsageError(f"a block of {name} has {nbytes} bytes at a step of {step}, not a multiple of {_WORD}")
    view = torch.empty(0, dtype=torch.int64, device=tensor.device)
    return view.set_(tensor.untyped_storage(), offset // _WORD, (blocks, nbytes // _WORD), (step // _WORD, 1))


def _state_rows(name: str, tensors: Sequence[torch.Tensor], num_blocks: int) -> list[torch.Tensor]:
    """One row a page where the parts of the state lie one behind the other, else one a part. The last word of a row may
    end in what its page is filled up with."""
    ordered = sorted(tensors, key=torch.Tensor.data_ptr)
    sizes = [_dense(name, tensor) * tensor.element_size() for tensor in ordered]
    steps = {tensor.stride(0) * tensor.element_size() for tensor in ordered}
    storages = {tensor.untyped_storage().data_ptr() for tensor in ordered}
    begins = [tensor.data_ptr() for tensor in ordered]
    behind = all(begin + size == end for begin, size, end in zip(begins, sizes, begins[1:], strict=False))
    runs = list(zip(ordered, sizes, strict=True))
    if behind and len(steps) == len(storages) == 1:
        runs = [(ordered[0], sum(sizes))]
    rows = []
    for tensor, size in runs:
        step, nbytes = tensor.stride(0) * tensor.element_size(), -(-size // _WORD) * _WORD
        end = tensor.storage_offset() * tensor.element_size() + (num_blocks - 1) * step + nbytes
        if tensor.shape[0] != num_blocks or nbytes > step or end > tensor.untyped_storage().nbytes():
            raise UsageError(f"a state of {name} has {size} bytes in {tensor.shape[0]} pages of {step}")
        rows.append(_words(name, tensor, num_blocks, nbytes, step))
    return rows


def _state_order(spec: Any, tensors: Sequence[torch.Tensor], *, apart: bool) -> str:
    """Of what kind a state is, and the shapes and dtypes of its parts: "state.MAMBA2.SD.3x96:float32,4x16x16:float32".
    Which of a convolution's dimensions comes first is an engine's choice that shapes alone may not show."""
    from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout

    if len(tensors) == 1:
        parts = [f"{'x'.join(map(str, shape))}:{dtype}" for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)]
    else:
        parts = [
            f"{'x'.join(map(str, each.shape[1:]))}/{'x'.join(map(str, each.stride()[1:]))}:{each.dtype}"
            for each in tensors
        ]
    kind = getattr(spec.mamba_type, "name", spec.mamba_type)
    told = ("/" if apart else ",").join(parts).replace("torch.", "")
    return f"state.{kind}.{get_conv_state_layout()}.{told}"


def _order(tensor: torch.Tensor, *, apart: bool) -> str:
    """The block's dimensions from the slowest to the fastest, with all sizes but the number of KV heads (dimension 1: a
    shard's own) where there are four, and its dtype: "N128.H.C128:bfloat16"; "H/N128.C128:bfloat16" where each head is
    a row of its own."""
    names = "BHNC" if tensor.dim() == 4 else "BNC" if tensor.dim() == 3 else "BXYZUVW"
    dims = sorted(range(1, tensor.dim()), key=lambda dim: -tensor.stride(dim))
    order = ".".join(names[dim] if names[dim] == "H" else f"{names[dim]}{tensor.shape[dim]}" for dim in dims)
    order = order.replace("H.", "H/", 1) if apart else order
    return f"{order}:{str(tensor.dtype).removeprefix('torch.')}"


def platform_name(config: VllmConfig, spec: object | None) -> str:
    """The device type and, on CPUs, the instruction set whose kernels order the bytes inside a block; no instruction
    set where there is no `spec`: of states."""
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    if device != "cpu":
        return device
    import platform

    if spec is None:
        return f"cpu-{platform.machine()}"
    from vllm.v1.attention.backends import cpu_attn

    isa = cpu_attn._get_attn_isa(config.model_config.dtype, spec.block_size, getattr(spec, "head_size", None))  # type: ignore[attr-defined]
    return f"cpu-{platform.machine()}-{isa}"
