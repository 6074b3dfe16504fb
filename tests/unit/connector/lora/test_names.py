"""Names of modules: as adapters give them, as the model has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.models.utils import WeightsMapper

from loracache.connectors.vllm.lora.names import model_name, name_mapper

RENAMES = {"orig_to_new_prefix": {"model.": "language_model.model."}}
WITHOUT_STACKING = WeightsMapper(**RENAMES)


class Mapper:
    """A model's whole mapper: what it maps, it stacks too."""

    def __init__(self, method: str) -> None:
        setattr(self, method, lambda: WITHOUT_STACKING)

    def _map_name(self, name: str) -> str:
        return name.replace("q_proj", "qkv_proj")


@pytest.mark.parametrize("method", ["get_rename_mapper", "get_unstacked_mapper"])
def test_modules_that_the_model_renames_and_stacks_are_renamed_only(method: str) -> None:
    """Whatever this vLLM calls it."""
    mapper = name_mapper(SimpleNamespace(hf_to_vllm_mapper=Mapper(method)))
    assert model_name("model.layers.0.self_attn.q_proj", mapper) == "language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("model", [SimpleNamespace(), SimpleNamespace(hf_to_vllm_mapper=None)])
def test_a_model_without_a_mapper_has_the_adapters_names(model: Any) -> None:
    assert model_name("model.layers.0.mlp.up_proj", name_mapper(model)) == "model.layers.0.mlp.up_proj"
