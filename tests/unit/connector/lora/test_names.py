# SPDX-License-Identifier: Apache-2.0
"""Names of modules: as adapters give them, as the model has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.models.utils import WeightsMapper

from loracache.connectors.vllm.lora.names import model_name, model_names, name_mapper

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


class Multimodal:
    """A model that mounts its language model, as vLLM's have it."""

    supports_multimodal = True

    def __init__(self, prefix: str, mapper: Any = None) -> None:
        self.hf_to_vllm_mapper = mapper
        self._prefix = prefix

    def get_mm_mapping(self) -> Any:
        return SimpleNamespace(language_model=[self._prefix], tower_model=["visual."], connector=[])


QUERY, UP = "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"
TOWER = "visual.blocks.0.attn.qkv"


@pytest.mark.parametrize("prefix", ["language_model", "llm.", "model.text"])
@pytest.mark.parametrize("bare", [False, True])
def test_adapters_of_the_language_model_alone_find_it_inside_a_multimodal_model(prefix: str, bare: bool) -> None:
    """Whether its prefix holds a whole causal model or a bare decoder, and under the model's own names as before."""
    mount = prefix.rstrip(".") + "."
    inner = mount if bare else f"{mount}model."
    modules = [inner + QUERY, inner + UP, mount + "lm_head", TOWER]
    mapper = name_mapper(Multimodal(prefix), modules)
    assert model_name(f"model.{QUERY}", mapper) == inner + QUERY
    assert model_name("lm_head", mapper) == mount + "lm_head"
    for own in modules:
        assert model_name(own, mapper) == own
    if bare:
        assert model_name(UP, mapper) == inner + UP
    assert model_name("model.layers.7.mlp.up_proj", mapper) == "model.layers.7.mlp.up_proj"  # unknown: refused by name


def test_what_a_multimodal_model_renames_is_renamed_first() -> None:
    inner = f"language_model.model.{QUERY}"
    mapper = name_mapper(
        Multimodal("language_model.", WeightsMapper(orig_to_new_prefix={"decoder.": "model."})), [inner]
    )
    assert model_name(f"decoder.{QUERY}", mapper) == inner


class Skipping:
    """A model that does not run what begins so, as vLLM's have it."""

    lora_skip_prefixes = ("mtp.",)


@pytest.mark.parametrize("multimodal", [False, True])
def test_what_a_model_skips_is_left_out_of_its_adapters(multimodal: bool) -> None:
    model = type("Both", (Skipping, *([Multimodal] if multimodal else [])), {})(*["llm."] * multimodal)
    mapper = name_mapper(model, [QUERY])
    modules = {QUERY: 1, f"mtp.{QUERY}": 2, f"model.mtp.{QUERY}": 3, f"model.mtpx.{QUERY}": 4, "xmtp.up_proj": 5}
    assert model_names(modules, mapper) == {QUERY: 1, f"model.mtpx.{QUERY}": 4, "xmtp.up_proj": 5}
    assert model_names(modules, None) == modules
