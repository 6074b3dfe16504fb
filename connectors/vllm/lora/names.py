# SPDX-License-Identifier: Apache-2.0
"""The model's own name of a module, from the name that adapters (PEFT) give it; both sides of the connector use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.lora.utils import parse_fine_tuned_lora_name

from loracache.connectors.vllm.lora.layout import is_within

__all__ = ["model_name", "name_mapper"]


@dataclass(frozen=True, slots=True)
class _TextNames:
    """The names of a multimodal model. Adapters that were trained on its language model alone do not say where it is
    mounted. mapper: how the model renames modules, or None. prefix: of the language model. modules: that adapters may
    adapt on this stage of a pipeline. elsewhere: those on others.
    """

    mapper: Any
    prefix: str
    modules: frozenset[str]
    elsewhere: tuple[str, ...]

    def mounted(self, name: str) -> str:
        """`name`, or where the language model's module of that name is."""
        if not self._is_known(name):
            for text_name in (name, name.removeprefix("model.")):
                if self._is_known(self.prefix + text_name):
                    return self.prefix + text_name
        return name

    def _is_known(self, name: str) -> bool:
        return name in self.modules or is_within(name, self.elsewhere)


def name_mapper(model: Any, modules: Iterable[str] = (), elsewhere: Iterable[str] = ()) -> Any:
    """How the model renames the modules of checkpoints, without what it stacks; None where it does not. modules: the
    model's names of those that adapters can have weights for. elsewhere: of those on other stages of a pipeline."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for without_stacking in ("get_rename_mapper", "get_unstacked_mapper"):  # vLLM 0.29, 0.26
        if hasattr(mapper, without_stacking):
            mapper = getattr(mapper, without_stacking)()
            break
    if getattr(model, "supports_multimodal", False) and hasattr(model, "get_mm_mapping"):
        (prefix,) = model.get_mm_mapping().language_model
        return _TextNames(mapper, prefix.rstrip(".") + ".", frozenset(modules), tuple(elsewhere))
    return mapper


def model_name(module: str, mapper: Any) -> str:
    """The model's name of a module as adapters call it. mapper: of `name_mapper`."""
    text = mapper if isinstance(mapper, _TextNames) else None
    renames = text.mapper if text is not None else mapper
    name = str(parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", renames)[0])
    return text.mounted(name) if text is not None else name
