# SPDX-License-Identifier: Apache-2.0
"""What vLLM's LoRA layers call: the paged kernels in the place of its own.

A layer hands over what it holds as its stacked weights, here its PagedModule. The rows of a batch are planned once a
step, for all layers: one plan for the tokens, one for the rows that are sampled. Their buffers keep their addresses.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from loracache.connectors.vllm.lora.layout import ModuleShape
from loracache.connectors.vllm.worker.lora.pool import PagePool, SlotTables
from loracache.kernels.sgmv import lora_embedding, lora_linear
from loracache.kernels.tables import NARROW_TILE, plan_tiles, tile_rows

__all__ = ["PagedModule", "PagedPunicaWrapper", "page_embedding"]


class PagedModule:
    """One module's view of the pool and the slot tables."""

    def __init__(self, pool: PagePool, tables: SlotTables, rows: slice, shape: ModuleShape) -> None:
        self.pages = pool.pages
        self.page_ids = tables.page_ids
        self.places = tables.places[:, rows]
        self.scales = tables.scales[:, rows]
        self.widths = list(shape.widths)
        self.width = shape.width
        self.chunk = pool.shape.chunk
        self.most_rank = pool.shape.most_rank


class _Rows:
    """Which rows belong to which slot, in buffers that stay where they are."""

    def __init__(self, most_rows: int, slots: int, device: torch.device | str) -> None:
        self.order = torch.zeros(most_rows, dtype=torch.int32, device=device)
        self.tiles = torch.full((-(-most_rows // NARROW_TILE) + slots, 4), -1, dtype=torch.int32, device=device)
        self._on_cpu = self.order.device.type == "cpu"
        self._all_tiles = self.tiles

    def plan(self, slots: list[int]) -> None:
        order, tiles = plan_tiles(np.array(slots, dtype=np.int64), None if self._on_cpu else tile_rows(len(slots)))
        self.order[: len(order)].copy_(torch.from_numpy(order), non_blocking=True)
        self._all_tiles[: len(tiles)].copy_(torch.from_numpy(tiles), non_blocking=True)
        self._all_tiles[len(tiles) :, 0].fill_(-1)
        if self._on_cpu:  # no graph holds on to the buffer, and walking its unused end costs
            self.tiles = self._all_tiles[: len(tiles)]


class PagedPunicaWrapper(PunicaWrapperBase):  # type: ignore[misc]
    """The operators of vLLM's LoRA layers over pages."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        slots = kwargs["lora_config"].max_loras
        self._tokens = _Rows(max_num_batched_tokens, slots, device)
        self._sampled = _Rows(max_num_batched_tokens, slots, device)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Plan the rows of the next step."""
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None} | {0: -1}
        self._tokens.plan([slot_of[adapter] for adapter in mapping.index_mapping])
        self._sampled.plan([slot_of[adapter] for adapter in mapping.prompt_mapping])

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """y += scale * (x @ A.T) @ B for every slice, row by row with its own adapter. Where vLLM wants y overwritten,
        it hands over zeros."""
        self._apply(y, x, lora_a_stacked, self._tokens)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The same for the rows that are sampled."""
        self._apply(y, x, lora_a_stacked, self._sampled)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: Any, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y += scale * A[:, token].T @ B. x: token ids."""
        module: PagedModule = lora_b_stacked
        rows = self._tokens
        lora_embedding(
            y,
            x,
            rows.order,
            rows.tiles,
            module.pages,
            module.page_ids,
            module.places,
            module.scales,
            module.width,
            module.chunk,
            module.most_rank,
        )

    def _apply(self, y: torch.Tensor, x: torch.Tensor, module: PagedModule, rows: _Rows) -> None:
        lora_linear(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]),
            rows.order,
            rows.tiles,
            module.pages,
            module.page_ids,
            module.places,
            module.scales,
            module.widths,
            module.chunk,
            module.most_rank,
        )

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        """Of fully sharded layers, which lora_pool refuses."""
        raise NotImplementedError

    def add_expand(self, *args: Any, **kwargs: Any) -> None:
        """Of fully sharded layers, which lora_pool refuses."""
        raise NotImplementedError

    def apply_lora_full_linear(self, *args: Any, **kwargs: Any) -> None:
        """Of classification heads, which adapters of a pool do not have."""
        raise NotImplementedError


def page_embedding(layer: Any, module: PagedModule) -> None:
    """Have an embedding layer look A up in pages: vLLM's own forward reads a dense tensor first."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base_layer.forward(x)
        self.punica_wrapper.add_lora_embedding(output.view(-1, output.shape[-1]), x.view(-1), module)
        return output

    layer.forward = MethodType(forward, layer)
