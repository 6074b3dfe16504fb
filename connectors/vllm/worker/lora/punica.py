# SPDX-License-Identifier: Apache-2.0
"""What vLLM's LoRA layers call: the paged kernels in the place of its own.

A layer hands over what it holds as its stacked weights, here its PagedModule. The rows of a batch are planned once a
step, for all layers: one plan for the tokens, one for the rows that are sampled. Their buffers keep their addresses.

A batch without adapters launches nothing, by a flag on the CPU that the operators read: vLLM captures graphs for such
batches beside those with adapters, and in them there is then nothing of ours. No step waits for the device: what a plan
uploads goes through pinned memory, which torch's allocator keeps until the copy has happened.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import envs
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from loracache.connectors.vllm.lora.layout import ModuleShape
from loracache.connectors.vllm.worker.lora.pool import PagePool, SlotTables
from loracache.kernels.sgmv import lora_embedding, lora_linear
from loracache.kernels.sgmv_launch import INVARIANT_TOKENS, warm_sizes
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
    """Which rows belong to which slot, in buffers that stay where they are. sized_for: see kernels/sgmv.py."""

    def __init__(self, most_rows: int, slots: int, device: torch.device | str, sized_for: int = 0) -> None:
        most_tiles = -(-most_rows // NARROW_TILE) + slots
        self._buffer = torch.full((4 * most_tiles + most_rows,), -1, dtype=torch.int32, device=device)
        self._all_tiles = self._buffer[: 4 * most_tiles].view(-1, 4)
        self.tiles, self.order = self._all_tiles, self._buffer[4 * most_tiles :]
        self.idle = torch.ones(1, dtype=torch.bool)
        self.sized_for = sized_for
        self._on_cpu = self.order.device.type == "cpu"
        self._blank = True

    def plan(self, slots: list[int]) -> None:
        """slots: of every row, -1 where it has no adapter."""
        most = None if self._on_cpu else tile_rows(self.sized_for or len(slots))
        order, tiles = plan_tiles(np.array(slots, dtype=np.int64), most)
        self.idle.fill_(not len(order))
        if self._on_cpu:
            self.order[: len(order)].copy_(torch.from_numpy(order))
            self.tiles = self._all_tiles[: len(tiles)]  # no graph holds on to it, and walking its unused end costs
            self.tiles.copy_(torch.from_numpy(tiles))
        elif len(order):
            self._upload(order, tiles)
        elif not self._blank:  # whatever graph is replayed now, nobody gets the adapters of the batch before
            self._all_tiles.fill_(-1)
            self._blank = True

    def _upload(self, order: npt.NDArray[np.int32], tiles: npt.NDArray[np.int32]) -> None:
        """One copy: all tiles, those that are not used too, and behind them the rows."""
        end = self._all_tiles.numel()
        staged = torch.full((end + len(order),), -1, dtype=torch.int32)
        staged[: tiles.size].copy_(torch.from_numpy(tiles.reshape(-1)))
        staged[end:].copy_(torch.from_numpy(order))
        self._buffer[: len(staged)].copy_(staged.pin_memory(), non_blocking=True)
        self._blank = False


class PagedPunicaWrapper(PunicaWrapperBase):  # type: ignore[misc]
    """The operators of vLLM's LoRA layers over pages."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        slots = kwargs["lora_config"].max_loras
        sized_for = INVARIANT_TOKENS if getattr(envs, "VLLM_BATCH_INVARIANT", False) else 0
        self._most_tokens = max_num_batched_tokens
        self._tokens = _Rows(max_num_batched_tokens, slots, device, sized_for)
        self._sampled = _Rows(max_num_batched_tokens, slots, device, sized_for)
        self._overlaps = not getattr(envs, "VLLM_LORA_DISABLE_PDL", False)

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
        self._embed(y, x, lora_b_stacked, self._tokens, self._tokens.idle)

    def _apply(self, y: torch.Tensor, x: torch.Tensor, module: PagedModule, rows: _Rows) -> None:
        self._multiply(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), module, rows, rows.idle)

    def _multiply(
        self, y: torch.Tensor, x: torch.Tensor, module: PagedModule, rows: _Rows, idle: torch.Tensor | None
    ) -> None:
        tables = rows.order, rows.tiles, module.pages, module.page_ids, module.places, module.scales
        shape = module.widths, module.chunk, module.most_rank
        lora_linear(y, x, *tables, *shape, idle, rows.sized_for, self._overlaps)

    def _embed(
        self, y: torch.Tensor, ids: torch.Tensor, module: PagedModule, rows: _Rows, idle: torch.Tensor | None
    ) -> None:
        tables = rows.order, rows.tiles, module.pages, module.page_ids, module.places, module.scales
        shape = module.width, module.chunk, module.most_rank
        lora_embedding(y, ids, *tables, *shape, idle, rows.sized_for, self._overlaps)

    def warm(self, module: PagedModule, inputs: torch.dtype, outputs: torch.dtype) -> None:
        """Compile all that batches of any size will ask of a module, by launching it on tiles that are not used. No
        batch may have been planned. inputs: an integer for an embedding, which takes token ids."""
        for tokens in warm_sizes(self._most_tokens, self._tokens.sized_for):
            x = module.pages.new_zeros((tokens, module.width) if inputs.is_floating_point else (tokens,), dtype=inputs)
            y = module.pages.new_zeros((tokens, sum(module.widths)), dtype=outputs)
            (self._multiply if inputs.is_floating_point else self._embed)(y, x, module, self._tokens, None)

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
