"""The model's own name of a module, from the name that adapters (PEFT) give it; both sides of the connector use it."""

from __future__ import annotations

from typing import Any

from vllm.lora.utils import parse_fine_tuned_lora_name

__all__ = ["model_name", "name_mapper"]


def name_mapper(model: Any) -> Any:
    """How the model renames the modules of checkpoints, without what it stacks; None where it does not."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for without_stacking in ("get_rename_mapper", "get_unstacked_mapper"):  # vLLM 0.29, 0.26
        if hasattr(mapper, without_stacking):
            return getattr(mapper, without_stacking)()
    return mapper


def model_name(module: str, mapper: Any) -> str:
    """The model's name of a module as adapters call it."""
    return str(parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0])
