"""vLLM's manager on a pool: which layers it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import vllm.lora.layers as layers

from loracache.connectors.vllm.lora.manager import PagedLoRAModelManager
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
