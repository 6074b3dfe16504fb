# SPDX-License-Identifier: Apache-2.0
"""What the LoRA benchmark adds to a worker (vLLM's `worker_extension_cls`): times of steps and of swaps, and, where
BENCH_LORA is "dense", our kernel on vLLM's own dense slots: what pages alone bring is measured against that.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
import vllm.lora.model_manager as model_manager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.v1.worker.gpu_worker import Worker

from loracache.kernels.tables import plan_tiles

steps: list[float] = []
swaps: list[float] = []


def _timed(owner: Any, name: str, times: list[float]) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - started)

    setattr(owner, name, call)


_timed(Worker, "execute_model", steps)
_timed(model_manager.LRUCacheLoRAModelManager, "activate_adapter", swaps)


class LoRAProbe:
    """Methods for `collective_rpc`."""

    def take_times(self) -> dict[str, list[float]]:
        """Seconds of every step and of every activation since the last call."""
        taken = {"steps": list(steps), "swaps": list(swaps)}
        steps.clear()
        swaps.clear()
        return taken


class DenseSegments(PunicaWrapperBase):  # type: ignore[misc]
    """Segment by segment, as kernels/sgmv.py does it on a CPU, on dense slots of the largest rank."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **_: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._tokens: list[tuple[int, slice | torch.Tensor]] = []

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *rest: Any, **named: Any) -> None:
        super().update_metadata(mapping, lora_index_to_id, *rest, **named)  # the embedding looks rows up in it
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None} | {0: -1}
        order, tiles = plan_tiles(np.array([slot_of[adapter] for adapter in mapping.index_mapping], dtype=np.int64))
        self._tokens = [
            (
                int(slot),
                slice(int(row), int(row + count)) if row >= 0 else torch.from_numpy(order[at : at + count]).long(),
            )
            for slot, at, count, row in tiles
        ]

    def add_lora_linear(
        self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **_: Any
    ) -> None:
        for slot, rows in self._tokens:
            inputs, outputs, left = x[rows], y[rows], 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                _multiply(outputs[:, left : left + width], inputs, a[slot, 0], b[slot, 0])
                left += width
            if not isinstance(rows, slice):
                y.index_copy_(0, rows, outputs)

    def add_lora_logits(self, *_: Any, **__: Any) -> None:
        """No adapter here adapts the head."""

    def add_lora_embedding(self, *_: Any, **__: Any) -> None:
        """Nor the embedding."""

    add_shrink = add_expand = apply_lora_full_linear = add_lora_logits


def _multiply(outputs: torch.Tensor, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """outputs += (inputs @ a.T) @ b.T, few rows as in kernels/sgmv.py."""
    if len(inputs) * (9 + len(a)) > 64 + len(a):
        outputs.addmm_(torch.mm(inputs, a.t()), b.t())
        return
    torch._C._set_mkldnn_enabled(False)
    for output, row in zip(outputs, inputs, strict=True):
        output.addmv_(b, torch.mv(a, row))
    torch._C._set_mkldnn_enabled(True)


if os.environ.get("BENCH_LORA") == "dense":
    model_manager.get_punica_wrapper = DenseSegments
