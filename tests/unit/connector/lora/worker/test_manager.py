# SPDX-License-Identifier: Apache-2.0
"""vLLM's manager on a pool: which layers it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.lora.layers as layers
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

from loracache.adapters.peft import WEIGHTS
from loracache.connectors.vllm.worker.lora.manager import (
    PagedLoRAModelManager,
    PagedWorkerLoRAManager,
    elsewhere,
    whole_sizes,
)
from loracache.connectors.vllm.worker.lora.pool import PagePool
from loracache.errors import ConfigError


@pytest.fixture
def manager() -> Any:
    made: Any = object.__new__(PagedLoRAModelManager)
    made.packed_modules = {"a.qkv_proj": ["a.q_proj", "a.k_proj", "a.v_proj"]}
    return made


def layer(kind: str, slices: int) -> Any:
    return type(kind, (SimpleNamespace,), {})(n_slices=slices, lora_a_stacked=())


def test_slices_are_adapters_modules(manager: Any) -> None:
    assert manager._parts("a.o_proj", layer("RowParallelLinearWithLoRA", 1)) == ("a.o_proj",)
    packed = layer("MergedQKVParallelLinearWithLoRA", 3)
    assert manager._parts("a.qkv_proj", packed) == ("a.q_proj", "a.k_proj", "a.v_proj")


@pytest.mark.parametrize(
    ("name", "kind", "slices"),
    [
        ("score", "ClassificationHeadWithLoRA", 1),
        ("score", "TokenClassificationHeadWithLoRA", 1),
        ("a.experts", "FusedMoEWithLoRA", 3),
        ("a.qkv_proj", "Step5FusedQKVIndexerWithLoRA", 3),
        ("a.wq", "Step5SparseIndexerWWithLoRA", 1),
        ("a.gate_up_proj", "MergedColumnParallelLinearWithLoRA", 2),  # one module of adapters for two slices
        ("a.new", "OfTheNextReleaseWithLoRA", 1),
    ],
)
def test_layers_that_cannot_be_paged_are_refused_by_name(manager: Any, name: str, kind: str, slices: int) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' \({kind}, .*leave lora_pool out"):
        manager._parts(name, layer(kind, slices))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_a_dtype_that_no_kernel_multiplies_is_refused_at_the_start(manager: Any, dtype: torch.dtype) -> None:
    manager.lora_config = SimpleNamespace(lora_dtype=dtype, max_lora_rank=16)
    with pytest.raises(ConfigError, match=rf"in {dtype}; set lora_dtype to one of bfloat16, float16, float32"):
        manager._make_pool(())


@pytest.fixture
def worker(manager: Any, make_shape: Callable[..., Any]) -> Any:
    """What vLLM adds adapters by, over the small model's pool."""
    manager.pool = PagePool(make_shape(), torch.float32, torch.device("cpu"))
    manager.names, manager.fetches_ahead, manager.added = None, True, lambda path: None
    made: Any = object.__new__(PagedWorkerLoRAManager)
    made._adapter_manager = manager
    return made


def request(path: str) -> Any:
    return SimpleNamespace(lora_path=path, lora_name="a", lora_int_id=1)


def test_an_adapter_of_fp8_weights_is_refused_when_it_is_added(worker: Any, make_adapter: Callable[..., Any]) -> None:
    """It is no format of PEFT's: who made it dropped bits, and the scales that would bring them back are not there."""
    adapter = make_adapter("plain")
    assert worker.add_adapter(request(adapter.path))
    path = Path(adapter.path) / WEIGHTS
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"tensor '.*lora_A\.weight' is F8_E4M3; give one of .*F16"):
        worker.add_adapter(request(adapter.path))


def test_an_adapter_of_experts_is_refused_when_it_is_added(worker: Any, make_adapter: Callable[..., Any]) -> None:
    expert = "model.layers.0.mlp.experts.3.gate_proj"
    attention = "model.layers.0.self_attn.q_proj"
    sizes = {expert: (24, 40), attention: (24, 32)}
    assert worker.add_adapter(request(make_adapter("attention", {attention: 4}, sizes=sizes).path))
    with pytest.raises(ValueError, match=rf"module '{expert}' of the adapter is none that this model can adapt"):
        worker.add_adapter(request(make_adapter("experts", {expert: 4, attention: 4}, sizes=sizes).path))


def test_the_layers_we_take_are_called_so_by_this_vllm(manager: Any) -> None:
    names = {name for name in vars(layers) if name.endswith("WithLoRA")}
    for name in names:
        sharded = name.endswith("WithShardedLoRA")
        dense = sharded or name.startswith(("Base", "FusedMoE", "Step5")) or "Classification" in name
        if not dense:
            assert manager._parts("a.o_proj", layer(name, 1)) == ("a.o_proj",)


def linear(kind: Any = SimpleNamespace, **fields: Any) -> Any:
    made = kind.__new__(kind)
    if kind is not SimpleNamespace:
        torch.nn.Module.__init__(made)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_sizes_in_the_whole_model_are_those_before_workers_cut_and_copied() -> None:
    """Four workers; two KV heads, each on two of them."""
    qkv = linear(
        QKVParallelLinear,
        input_size=64,
        total_num_heads=8,
        total_num_kv_heads=2,
        head_size=16,
        output_sizes=[128, 64, 64],
        output_size=256,
    )
    assert whole_sizes(SimpleNamespace(base_layer=qkv, n_slices=3)) == (64, (128, 32, 32))
    assert whole_sizes(SimpleNamespace(base_layer=qkv, n_slices=1)) == (64, (192,))
    gate_up = linear(input_size=64, output_sizes=[96, 96], output_size=192)
    assert whole_sizes(SimpleNamespace(base_layer=gate_up, n_slices=2)) == (64, (96, 96))
    down = linear(input_size=96, output_size=64)
    assert whole_sizes(SimpleNamespace(base_layer=down, n_slices=1)) == (96, (64,))


def test_modules_of_other_pipeline_stages_are_known_as_such() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([PPMissingLayer(), torch.nn.Linear(2, 2)])
    model.lm_head = PPMissingLayer()
    assert elsewhere(model) == ("layers.0", "lm_head")
