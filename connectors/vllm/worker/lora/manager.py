# SPDX-License-Identifier: Apache-2.0
"""vLLM's LoRA managers on a pool of pages: `max_loras` bounds the adapters of one batch, and nothing else.

The dense slots are made for zero adapters, so that they take no memory; in their place the layers hold their part of
the slot tables. What is resident is the pool's matter, and what is copied in and evicted the scheduler's: an adapter
of a batch is resident before the batch is scheduled. Threading: the worker's main thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

from loracache.adapters.payload import Packing
from loracache.adapters.peft import CONFIG, PeftFolder
from loracache.connectors.vllm.common.options import pool_bytes
from loracache.connectors.vllm.lora.layout import ModuleShape, PoolShape, choose_chunk, choose_page
from loracache.connectors.vllm.lora.names import model_names, name_mapper
from loracache.connectors.vllm.lora.paths import digest_in
from loracache.connectors.vllm.lora.pickled import plain_folder
from loracache.connectors.vllm.lora.refusals import Refusal
from loracache.connectors.vllm.worker.lora.pool import PagePool, SlotTables
from loracache.connectors.vllm.worker.lora.punica import PagedModule, PagedPunicaWrapper, page_embedding
from loracache.errors import ConfigError, UsageError

__all__ = ["PagedLoRAModelManager", "PagedWorkerLoRAManager", "pools"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Layers of vLLM whose slices are one module of adapters each. Others look into their weights in ways of their own.
_LAYERS = frozenset(
    f"{kind}WithLoRA"
    for kind in (
        "VocabParallelEmbedding", "LogitsProcessor", "ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear",
        "MergedColumnParallelLinear", "QKVParallelLinear", "MergedQKVParallelLinear",
        "MergedColumnParallelLinearVariableSlice",
    )
)  # fmt: skip

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))  # that the kernels multiply

pools: dict[str, PagedLoRAModelManager] = {}
"""The manager of each engine's worker in this process, by engine id: where the connector finds it."""


class PagedLoRAModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """The model's LoRA layers over one PagePool. `ids` says which content (digest) serves an adapter id; `added` is
    told of what vLLM was given to serve, by the worker that `fetches_ahead`.
    """

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self._making_layers = False
        self._pool_bytes = pool_bytes(vllm_config)
        self._dtype = vllm_config.model_config.dtype
        self._logits_dtype = getattr(vllm_config.model_config, "head_dtype", self._dtype)
        self.ids: dict[int, str] = {}
        self.dummies: set[int] = set()
        self.lost = False  # what was resident is not any more
        self.pinned_news: dict[int, bool] = {}
        self.fetches_ahead = vllm_config.parallel_config.rank == 0
        self.added: Callable[[str], None] = lambda path: None
        self._slot_of: dict[int, str] = {}  # slot -> digest in it
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        pools[vllm_config.kv_transfer_config.engine_id] = self

    @property
    def lora_slots(self) -> int:
        """None while the layers are made, so that their dense tensors are empty."""
        return 0 if self._making_layers else int(self.lora_config.max_loras)

    def by_model_name(self, modules: Mapping[str, T]) -> dict[str, T]:
        """An adapter's modules by the model's names."""
        return model_names(modules, self.names)

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        import vllm.lora.model_manager as module

        original: Callable[..., Any] = module.get_punica_wrapper
        module.get_punica_wrapper = PagedPunicaWrapper
        try:
            super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        finally:
            module.get_punica_wrapper = original

    def _create_lora_modules(self) -> None:
        if self._is_moe:
            raise ConfigError("lora_pool does not serve adapters of mixture-of-experts models; leave lora_pool out")
        if self.lora_config.fully_sharded_loras:
            raise ConfigError("lora_pool does not serve fully_sharded_loras; leave one of the two out")
        self._making_layers = True
        try:
            super()._create_lora_modules()
        finally:
            self._making_layers = False
        paged = [(name, layer, self._parts(name, layer)) for name, layer in self.modules.items()]
        self.layers = [layer for _, layer, _ in paged]
        self._make_pool(tuple(_shape(*each) for each in paged))

    def _make_pool(self, modules: tuple[ModuleShape, ...]) -> None:
        dtype = self.lora_config.lora_dtype
        if dtype not in _DTYPES:
            kinds = ", ".join(sorted(str(each).removeprefix("torch.") for each in _DTYPES))
            raise ConfigError(f"lora_pool does not compute adapters in {dtype}; set lora_dtype to one of {kinds}")
        size = torch.empty(0, dtype=dtype).element_size()
        widths = {width for module in modules for width in (module.width, *module.widths)}
        chunk = choose_chunk(widths)
        page = choose_page(chunk, sum(len(m.parts) * m.width + sum(m.widths) for m in modules), size)
        pages = self._pool_bytes // (page * size)
        shape = PoolShape(modules, pages, page, chunk, size, int(self.lora_config.max_lora_rank), elsewhere(self.model))
        if pages < 1:
            raise ConfigError(f"lora_pool={self._pool_bytes} bytes hold no page of {page * size}; make it larger")
        self.pool = PagePool(shape, dtype, self.device)
        self.names = name_mapper(self.model, shape.parts(), shape.elsewhere)
        self.tables = SlotTables(self.lora_slots, shape, self.device)
        row = 0
        for module, layer in zip(modules, self.layers, strict=True):
            rows = slice(row, row + len(module.parts))
            paged = PagedModule(self.pool, self.tables, rows, module)
            layer.lora_a_stacked = layer.lora_b_stacked = paged
            if isinstance(layer, VocabParallelEmbeddingWithLoRA):
                page_embedding(layer, paged)
            row = rows.stop
        _log.info("LoRA pool: %d pages of %d KiB, chunks of %d", pages, page * size >> 10, chunk)
        if self.device.type == "cuda":
            self.warm()

    def warm(self) -> None:
        """Have the kernels compiled for all modules, so that no request waits for that."""
        start, known = time.monotonic(), set()
        for name, layer in self.modules.items():
            paged, inputs, outputs = layer.lora_a_stacked, self._dtype, self._dtype
            if isinstance(layer, VocabParallelEmbeddingWithLoRA):
                inputs = torch.int32  # vLLM's token ids
            elif isinstance(layer, LogitsProcessorWithLoRA):
                outputs = self._logits_dtype
            call = paged.width, tuple(paged.widths), inputs, outputs
            if call not in known:
                known.add(call)
                self._get_punica_wrapper(name).warm(paged, inputs, outputs)
        _log.info("LoRA kernels are ready for %d kinds of modules after %.1f s", len(known), time.monotonic() - start)

    def _parts(self, name: str, layer: Any) -> tuple[str, ...]:
        """The adapters' modules behind a layer's slices. Raises ConfigError where a layer cannot be paged: with its
        dense tensors empty it could not even run without an adapter."""
        parts = tuple(self.packed_modules.get(name, [name]))
        if type(layer).__name__ not in _LAYERS or len(parts) != getattr(layer, "n_slices", 1):
            raise ConfigError(
                f"lora_pool does not serve layers like this model's {name!r} ({type(layer).__name__}, of {len(parts)} "
                f"modules); leave lora_pool out"
            )
        return parts

    # -- slots ----------

    def use(self, ids: Iterable[int]) -> None:
        """Give every adapter of the batch a slot that holds the content it serves now."""
        ids = set(ids)
        for adapter in ids:
            self.activate_adapter(adapter)
        for slot, adapter in enumerate(self.lora_index_to_id):
            if adapter in ids and adapter not in self.dummies and self._slot_of.get(slot) != self.ids.get(adapter):
                self._fill(slot, adapter)

    def activate_adapter(self, lora_id: int) -> bool:
        """Give an adapter a slot; the least recently used one of another batch's adapters."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        self.lora_index_to_id[slot] = lora_id
        self._active_adapters[lora_id] = None
        self._fill(slot, lora_id)
        return True

    def _fill(self, slot: int, lora_id: int) -> None:
        digest = self.ids.get(lora_id, "")
        resident = self.pool.get(digest)
        if resident is not None:
            self.tables.fill(slot, resident)
        elif lora_id in self.dummies:
            self.tables.clear(slot)
        else:
            raise RuntimeError(f"adapter {lora_id} ({digest[:12]}) of the batch is on no pages")
        self._slot_of[slot] = digest

    def evict(self, digest: str) -> None:
        """Free an adapter's pages; its slots are filled anew when they are used again."""
        self.pool.evict(digest)
        for slot in [slot for slot, held in self._slot_of.items() if held == digest]:
            del self._slot_of[slot]

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None) -> Any:
        """Warm-up runs the kernels with adapters of rank 0, which take no pages."""
        from vllm.lora.lora_model import LoRAModel

        return LoRAModel(lora_id, rank, {})

    def _add_adapter(self, lora: Any) -> None:
        self._registered_adapters[lora.id] = lora

    def remove_all_adapters(self) -> None:
        """Weights were replaced, and with them the memory of the pool perhaps: all adapters are copied in anew."""
        super().remove_all_adapters()
        self.dummies.clear()
        self._slot_of.clear()
        for digest in self.pool.digests():
            self.pool.evict(digest)
            self.lost = True


def _shape(name: str, layer: Any, parts: tuple[str, ...]) -> ModuleShape:
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return ModuleShape(name, parts, a.shape[1], (b.shape[2],))
    if isinstance(layer, LogitsProcessorWithLoRA):
        return ModuleShape(name, parts, a.shape[-1], (b.shape[-2],))
    widths = tuple(each.shape[-2] for each in b)
    inputs, outputs = whole_sizes(layer) if layer.tp_size > 1 else (0, ())
    return ModuleShape(name, parts, a[0].shape[-1], widths, inputs, outputs)


def whole_sizes(layer: Any) -> tuple[int, tuple[int, ...]]:
    """Elements of a row of A, and of a row of B by slice, of a linear layer in the whole model, as its adapters have
    them: before tensor parallelism cuts rows, and without the copies of KV heads that it makes."""
    base = layer.base_layer
    if isinstance(base, QKVParallelLinear):
        queries, keys = base.total_num_heads * base.head_size, base.total_num_kv_heads * base.head_size
        return base.input_size, (queries, keys, keys) if layer.n_slices == 3 else (queries + 2 * keys,)
    return base.input_size, tuple(base.output_sizes) if layer.n_slices > 1 else (base.output_size,)


def elsewhere(model: Any) -> tuple[str, ...]:
    """Modules that are on other stages of a pipeline."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, PPMissingLayer))


class PagedWorkerLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """What the model runner holds. Adapters are loaded by the scheduler's orders (activation.py), never in a step."""

    _manager_cls = PagedLoRAModelManager

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """The adapters of the next step. Two contents under one name are one in `requests`: the mapping tells all."""
        manager = self._adapter_manager
        if mapping is None:
            manager.use(request.lora_int_id for request in requests)
            return
        manager.use({*mapping.index_mapping, *mapping.prompt_mapping} - {0})
        manager.set_adapter_mapping(mapping)

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        """An adapter for warming up."""
        self._adapter_manager.dummies.add(lora_request.lora_int_id)
        return bool(super().add_dummy_lora(lora_request, rank))

    def add_adapter(self, lora_request: Any) -> bool:
        """Say at once what cannot be served, and have it fetched; the copy starts with the first request, and stops
        nobody. Raises ValueError naming file, tensor and reason."""
        path, manager = lora_request.lora_path, self._adapter_manager
        if digest_in(path) is not None:
            manager.added(path)
            return True
        if not os.path.isdir(path):  # a hub's name: vLLM downloads it here, too
            path = get_adapter_absolute_path(path)
        if not os.path.isfile(os.path.join(path, CONFIG)):
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path)
        try:
            path = plain_folder(path)
            self._check(path)
        except UsageError as error:
            raise UsageError(str(Refusal(str(error), forever=True))) from None
        manager.added(path)
        return True

    def _check(self, path: str) -> None:
        """Whether the engine can serve a folder, as far as its headers say. Raises UsageError."""
        manager = self._adapter_manager
        with PeftFolder(path) as folder:
            sizes = manager.by_model_name(Packing(folder).sizes())
        shape = manager.pool.shape
        try:
            surplus = shape.surplus(sizes)
            pages = shape.cost(shape.fit(sizes).elements)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        if pages > shape.pages:
            raise UsageError(f"{path} needs {pages} pages, lora_pool has {shape.pages}; make lora_pool larger")
        if surplus and manager.fetches_ahead:
            first, count = surplus[0], len(surplus)
            _log.warning("%s: %d modules, %s the first, are of layers beyond this model's", path, count, first)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Keep an adapter on its pages. Raises ValueError where it is on none."""
        if self._adapter_manager.pool.get(self._adapter_manager.ids.get(adapter_id, "")) is None:
            raise ValueError(f"adapter {adapter_id} is on no pages; a request with it brings it there")
        self._adapter_manager.pinned_news[adapter_id] = True
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        """Unpin an adapter: its pages go to whoever needs them."""
        self._adapter_manager.pinned_news[adapter_id] = False
        return adapter_id in self._adapter_manager.ids

    def remove_all_adapters(self) -> None:
        """See PagedLoRAModelManager."""
        self._adapter_manager.remove_all_adapters()

    def list_adapters(self) -> set[int]:
        """Adapter ids that serve a content."""
        return {*self._adapter_manager.ids, *self._adapter_manager.dummies}
