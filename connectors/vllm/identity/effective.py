# SPDX-License-Identifier: Apache-2.0
"""An engine's effective configuration, as far as it changes KV: plain values, equal in every process that computes the
same.

Every field of vLLM's configuration classes counts whose value is not the class's default, but for those in
`NOT_COUNTED`: a field that nobody here has heard of counts. Defaults stand for nothing, so that a release that brings
new fields still shares with the one before.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import PurePath
from types import FunctionType
from typing import Any, get_args, get_type_hints

from loracache.connectors.vllm.identity.not_counted import ENVIRONMENT_NOT_COUNTED, NOT_COUNTED
from loracache.errors import UsageError

__all__ = [
    "canonical",
    "config_classes",
    "counted_environment",
    "counted_fields",
    "default_of",
    "hf_values",
    "options_table",
]

# Whether such a part is there at all changes nothing: its fields say what does.
_PRESENCE_FREE = {"lora_config"}
# Keys of a Hugging Face configuration that do not change KV.
_HF_IGNORED = {
    "_name_or_path", "_commit_hash", "transformers_version", "architectures_name", "use_cache", "torch_dtype", "dtype",
    "tie_word_embeddings",
}  # fmt: skip
_DEEPEST = 12


def counted_fields(config: object) -> dict[str, Any]:
    """Canonical values of a configuration object's counted fields that are not the class's default, nested ones too.
    Raises UsageError where a value cannot be told from others.
    """
    skipped = _not_counted(type(config).__name__)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name in skipped or not hasattr(config, field.name):
            continue
        value, default = getattr(config, field.name), default_of(field)
        if _is_config(value):
            inner = counted_fields(value)
            if inner or (default is None and field.name not in _PRESENCE_FREE):
                found[field.name] = inner
        elif _differs(type(config).__name__, field.name, value, default):
            found[field.name] = canonical(value, f"{type(config).__name__}.{field.name}")
    return found


def counted_environment() -> dict[str, str]:
    """vLLM's environment variables that are set here and change what is computed: those that vLLM itself compiles anew
    for, less what is known not to change KV."""
    from vllm import envs

    factors: dict[str, object] = getattr(envs, "compile_factors", dict)()
    return {
        name: str(canonical(value, name))
        for name, value in sorted(factors.items())
        if name in os.environ and name.startswith("VLLM_") and not ENVIRONMENT_NOT_COUNTED.fullmatch(name)
    }


def hf_values(config: Any) -> dict[str, Any]:
    """A Hugging Face configuration after all overrides, without names, paths and versions."""
    return canonical(_without_names(config.to_dict()), "hf_config")  # type: ignore[no-any-return]


def canonical(value: object, where: str, depth: int = 0) -> Any:
    """`value` in terms of JSON. Raises UsageError, which names `where`, for what has no value that all processes
    agree on (a lambda, an object of an unknown class)."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, PurePath) or f"{type(value).__module__}.{type(value).__name__}" in (
        "torch.dtype",
        "torch.device",
    ):
        return str(value)
    if isinstance(value, type | FunctionType):
        if "<" in value.__qualname__:
            raise UsageError(f"{where} is {value.__qualname__}, which has no name that tells it from others")
        return f"{value.__module__}.{value.__qualname__}"
    if depth > _DEEPEST:
        raise UsageError(f"{where} is nested too deep to be told from others")
    if isinstance(value, Mapping):
        return {str(canonical(key, where, depth + 1)): canonical(each, where, depth + 1) for key, each in value.items()}
    if isinstance(value, Set):
        return sorted((canonical(each, where, depth + 1) for each in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [canonical(each, where, depth + 1) for each in value]
    return _object(value, where, depth)


def config_classes(counted: bool = False) -> dict[str, tuple[str, ...]]:
    """Names of all configuration classes reachable from VllmConfig, with their fields; of those only that fields which
    count lead to where `counted` is set."""
    from vllm.config import VllmConfig

    found: dict[str, tuple[str, ...]] = {}
    waiting: list[type] = [VllmConfig]
    while waiting:
        each = waiting.pop(0)
        if each.__name__ in found:
            continue
        fields = found[each.__name__] = tuple(field.name for field in dataclasses.fields(each))
        hints, skipped = get_type_hints(each), _not_counted(each.__name__) if counted else frozenset()
        waiting += [leaf for name in fields if name not in skipped for leaf in _leaves(hints[name])]
    return found


def options_table() -> str:
    """The table of docs/vllm.md: which fields of the installed vLLM's configuration count."""
    lines = ["| class | in the identity where not the default | not in it |", "|---|---|---|"]
    reached = config_classes(counted=True)
    for name, fields in config_classes().items():
        skipped = _not_counted(name)
        if name not in reached:
            lines.append(f"| {name} | none | {', '.join(fields)} |")
            continue
        counted = ", ".join(field for field in fields if field not in skipped)
        left_out = [
            f"{', '.join(known)}: {reason}"
            for reason, names in NOT_COUNTED.get(name, {}).items()
            if (known := [field for field in fields if field in names.split()])
        ]
        lines.append(f"| {name} | {counted or 'none'} | {'; '.join(left_out)} |")
    return "\n".join(lines) + "\n"


def _leaves(hint: Any) -> Iterator[type]:
    """Configuration classes in a type hint."""
    inner = get_args(hint)
    if (
        not inner
        and isinstance(hint, type)
        and hint.__module__.startswith("vllm.config")
        and dataclasses.is_dataclass(hint)
    ):
        yield hint
    for each in inner:
        yield from _leaves(each)


@cache
def _not_counted(class_name: str) -> frozenset[str]:
    return frozenset(name for names in NOT_COUNTED.get(class_name, {}).values() for name in names.split())


def _is_config(value: object) -> bool:
    return dataclasses.is_dataclass(value) and type(value).__module__.startswith("vllm.config")


def _differs(owner: str, name: str, value: object, default: object) -> bool:
    if owner == "ParallelConfig" and name == "worker_cls" and str(value).startswith("vllm."):
        return False  # the platform's own
    if owner == "LoadConfig" and name == "safetensors_load_strategy" and value in ("lazy", "eager", "prefetch"):
        return False  # how files are read; "torchao" makes other tensors of them
    return bool(canonical(value, f"{owner}.{name}") != canonical(default, f"{owner}.{name}"))


def default_of(field: Any) -> object:
    """A field's default; vLLM's classes are pydantic's, whose defaults may hide one level down."""
    default, factory = field.default, field.default_factory
    if default is dataclasses.MISSING and factory is dataclasses.MISSING:
        return None
    if default is dataclasses.MISSING:
        return factory()
    if type(default).__name__ == "FieldInfo":
        return default.get_default(call_default_factory=True) if not default.is_required() else None
    return default


def _without_names(values: dict[str, Any]) -> dict[str, Any]:
    """Configurations of parts (they have a model_type) are cleaned too; other dictionaries are left as they are."""
    return {
        key: _without_names(value) if isinstance(value, dict) and "model_type" in value else value
        for key, value in values.items()
        if key not in _HF_IGNORED
    }


def _object(value: object, where: str, depth: int) -> Any:
    if dataclasses.is_dataclass(value):
        return {each.name: canonical(getattr(value, each.name), where, depth + 1) for each in dataclasses.fields(value)}
    if callable(getattr(value, "compute_hash", None)):  # vLLM's own protocol for such objects
        return str(value.compute_hash())  # type: ignore[attr-defined]
    raise UsageError(f"{where} holds a {type(value).__name__}, which cannot be told from others of its kind")
