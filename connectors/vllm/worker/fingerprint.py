# SPDX-License-Identifier: Apache-2.0
"""Tells whether a model's weights are still the ones they were, from a sample of them.

Every parameter and buffer gives up to 1024 of its elements, evenly spread. A step of an optimizer or a merged adapter
changes far more than one element in ten thousand, and so some of those; an edit of single rows may go unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["weights_fingerprint"]

_SAMPLES = 1024


def weights_fingerprint(models: Iterable[nn.Module]) -> bytes:
    """A digest (32 bytes) of sampled parameters and buffers, their names, dtypes and shapes. Waits for a GPU once.

    What lies on no device, or in a layout whose elements cannot be taken one by one, counts by name and shape only.
    """
    digest = hashlib.sha256()
    samples: dict[torch.device, list[torch.Tensor]] = {}
    with torch.no_grad():
        for model in models:
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                if tensor.numel() and tensor.layout is torch.strided and tensor.device.type != "meta":
                    samples.setdefault(tensor.device, []).append(_sample(tensor))
        for parts in samples.values():
            digest.update(torch.cat(parts).cpu().numpy())
    return digest.digest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to about 1024 elements of a tensor in any strides, as bytes (uint8, one dimension)."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        order = sorted(range(flat.dim()), key=flat.stride, reverse=True)
        flat = flat.permute(order)
        for dim in range(flat.dim()):  # of what is not dense memory, a few rows: no copy of the whole
            if not flat.is_contiguous() and flat.shape[dim] > _SAMPLES:
                flat = flat.narrow(dim, 0, _SAMPLES)
    flat = flat.reshape(-1)
    # Odd: a step that divides a matrix's width would see one column of it.
    step = max(1, flat.numel() // _SAMPLES) | 1
    return flat[::step].contiguous().view(torch.uint8)
