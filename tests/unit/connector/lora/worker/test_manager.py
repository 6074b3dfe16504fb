# SPDX-License-Identifier: Apache-2.0
"""vLLM's manager on a pool: which layers it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.lora.layers as layers
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

from loracache.connectors.vllm.worker.lora.manager import PagedLoRAModelManager, elsewhere, whole_sizes
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
