# SPDX-License-Identifier: Apache-2.0
"""The model's own name of a module, from the name that adapters (PEFT) give it; both sides of the connector use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm.lora.utils import parse_fine_tuned_lora_name

from loracache.connectors.vllm.lora.layout import is_within

__all__ = ["model_name", "model_names", "name_mapper"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of a model that needs more than its mapper. mapper: how the model renames modules, or None. skipped:
    beginnings of what it does not run and adapters may have all the same. prefix: of a multimodal model's language
    model, which adapters that were trained on it alone do not name; else "". modules: that adapters may adapt on this
    stage of a pipeline. elsewhere: those on others.
    """

    mapper: Any
    skipped: tuple[str, ...] = ()
    prefix: str = ""
    modules: frozenset[str] = frozenset()
    elsewhere: tuple[str, ...] = ()

    def skips(self, module: str) -> bool:
        """As vLLM does: what begins so, or has a part that does."""
        return any(module.startswith(prefix) or f".{prefix}" in module for prefix in self.skipped)

    def mounted(self, name: str) -> str:
        """`name`, or where the language model's module of that name is."""
        if self.prefix and not self._is_known(name):
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
    skipped = tuple(getattr(model, "lora_skip_prefixes", None) or ())
    if getattr(model, "supports_multimodal", False) and hasattr(model, "get_mm_mapping"):
        (prefix,) = model.get_mm_mapping().language_model
        return _Names(mapper, skipped, prefix.rstrip(".") + ".", frozenset(modules), tuple(elsewhere))
    return _Names(mapper, skipped) if skipped else mapper


def model_name(module: str, mapper: Any) -> str:
    """The model's name of a module as adapters call it. mapper: of `name_mapper`."""
    own = mapper if isinstance(mapper, _Names) else None
    renames = own.mapper if own is not None else mapper
    name = str(parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", renames)[0])
    return own.mounted(name) if own is not None else name


def model_names(modules: Mapping[str, T], mapper: Any) -> dict[str, T]:
    """An adapter's modules by the model's names, without those that the model skips."""
    skips = mapper.skips if isinstance(mapper, _Names) else lambda module: False
    return {model_name(module, mapper): found for module, found in modules.items() if not skips(module)}
