# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: what is in one, whether it can be served, and what scales its weights.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Nothing here runs anything found in them: no
pickle is read, and patterns that could keep a regular expression busy for ever are refused. Blocking file reads.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from loracache.adapters.patterns import MOST_PATTERNS, compiled
from loracache.errors import UsageError

__all__ = [
    "CONFIG", "CONVERT", "DTYPE_BYTES", "PICKLES", "WEIGHTS", "PeftFolder", "Settings", "TensorInfo", "is_finite",
    "module_of", "unusable_settings",
]  # fmt: skip

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MAX_RANK = 512
CONVERT = ", where torch is: python -m loracache.connectors.vllm.lora.pickled FOLDER NEW_FOLDER"

# The bits of an exponent: a number with all of them set is infinite or none at all.
_EXPONENT = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_READ = 8 << 20
_MAX_CONFIG, _MAX_HEADER, _MAX_NAME = 1 << 20, 32 << 20, 512
_MAX_PATTERN_STEPS, _MAX_STEPS = 1 << 20, 1 << 30  # of matching patterns: at the worst some seconds together
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_UNUSED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # copies of the base model's
# What changes the effect of the same tensors, and what PEFT takes where it is left out.
_DEFAULTS: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    "bias": "none", "modules_to_save": None,
}  # fmt: skip
# Settings that make of the tensors something else than x @ A.T @ B.T added to the base model's output.
_UNSUPPORTED = (
    "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_bdlora",
    "use_qalora", "target_parameters", "trainable_token_indices", "megatron_config",
)  # fmt: skip
# Initialisations that leave the base model as it is; the others (PiSSA, OLoRA, ...) change its weights when loaded.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What scales an adapter's weights. rank_pattern, alpha_pattern: module name pattern -> value, the first wins."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict[str, Any]) -> Settings:
        """Of a PEFT configuration that `unusable_settings` found nothing in."""
        values = canonical(config)
        return cls(
            values["r"],
            values["lora_alpha"],
            bool(values["use_rslora"]),
            dict(values["rank_pattern"]),
            dict(values["alpha_pattern"]),
        )

    def rank_of(self, module: str) -> int:
        """The rank PEFT gives `module` (its name without "base_model.model.")."""
        return int(_matching(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str, rank: int) -> float:
        """What the module's x @ A.T @ B.T is multiplied with: alpha / rank, or alpha / sqrt(rank) for rsLoRA
        (Kalajdzievski, 2023)."""
        alpha = float(_matching(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file. dtype: safetensors' name. offset, nbytes: where its bytes are in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class PeftFolder:
    """An adapter's two files, opened for reading. Raises UsageError naming the file, the tensor and the reason."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._weights = self.path / WEIGHTS
        self.config_text = self._read_config()
        try:
            self.config: dict[str, Any] = json.loads(self.config_text)
            self.canonical = canonical(self.config)
        except (ValueError, AttributeError, RecursionError) as error:
            raise UsageError(f"{self.path / CONFIG} is not a PEFT configuration: {error}") from None
        self._fd = _open(self._weights, self._what_is_there_instead)
        try:
            self.tensors = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> PeftFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
        """The tensor's bytes, in pieces of a few MiB."""
        offset, left = tensor.offset, tensor.nbytes
        while left:
            try:
                data = os.pread(self._fd, min(left, _READ), offset)
            except OSError as error:
                raise UsageError(f"{self._weights} cannot be read in {tensor.name!r}: {error.strerror}") from None
            if not data:
                raise UsageError(f"{self._weights} is truncated in {tensor.name!r}")
            yield data
            offset, left = offset + len(data), left - len(data)

    def data(self, tensor: TensorInfo) -> bytes:
        """All of its bytes. Raises UsageError where there is an infinity or a NaN among its numbers."""
        data = b"".join(self.chunks(tensor))
        if not is_finite(data, tensor.dtype):
            raise UsageError(f"{self._weights}: tensor {tensor.name!r} has an infinity or a NaN in it")
        return data

    def check_numbers(self) -> None:
        """What only reading all of it can say. Raises as `data`."""
        for tensor in self.tensors:
            self.data(tensor)

    def check(self) -> Settings:
        """What can be said without reading the tensors: settings, names, pairs and shapes. Raises UsageError."""
        problem = unusable_settings(self.config)
        if problem:
            raise UsageError(f"{self.path / CONFIG}: {problem}")
        settings = Settings.of(self.config)
        pairs: dict[str, dict[str, TensorInfo]] = {}
        for tensor in self.tensors:
            if tensor.dtype not in DTYPE_BYTES:
                kinds = ", ".join(DTYPE_BYTES)
                raise UsageError(f"{self._weights}: tensor {tensor.name!r} is {tensor.dtype}; give one of {kinds}")
            if not tensor.name.endswith(_UNUSED):
                module, part = self._part(tensor)
                if pairs.setdefault(module, {}).setdefault(part, tensor) is not tensor:
                    raise UsageError(f"{self._weights}: tensor {tensor.name!r}: {module!r} has its lora_{part} twice")
        if not pairs:
            raise UsageError(f"{self._weights} holds no LoRA tensors")
        longest = max(map(len, pairs))
        patterns = (*settings.rank_pattern, *settings.alpha_pattern)
        if len(pairs) * sum(compiled(pattern).steps(longest) for pattern in patterns) > _MAX_STEPS:
            raise UsageError(f"{self.path / CONFIG}: its patterns are too much for {len(pairs)} modules")
        for module in pairs:
            if patterns and not module.isascii():
                raise UsageError(f"{self._weights}: module {module!r}: patterns are for names in ASCII")
        for module, parts in pairs.items():
            self._check_pair(module, parts, settings.rank_of(module))
        return settings

    def _part(self, tensor: TensorInfo) -> tuple[str, str]:
        module, part = module_of(tensor.name)
        if not part:
            reason = "DoRA is not supported" if "magnitude" in tensor.name else "it is not a LoRA weight"
            if self.config.get("modules_to_save"):
                reason += ", but a whole module's (modules_to_save), which is not supported"
            raise UsageError(f"{self._weights}: tensor {tensor.name!r}: {reason}")
        return module, part

    def _check_pair(self, module: str, parts: dict[str, TensorInfo], rank: int) -> None:
        a, b = parts.get("A"), parts.get("B")
        if a is None or b is None or a.name.endswith(".weight") != b.name.endswith(".weight"):
            missing = "A" if a is None else "B"
            raise UsageError(f"{self._weights}: module {module!r} has no lora_{missing}")
        for tensor, axis in ((a, 0), (b, 1)):
            if len(tensor.shape) != 2 or tensor.shape[axis] != rank or not all(tensor.shape):
                wanted = f"({rank}, in)" if axis == 0 else f"(out, {rank})"
                raise UsageError(
                    f"{self._weights}: tensor {tensor.name!r} has shape {tensor.shape}; {CONFIG} says {wanted}"
                )

    def _read_config(self) -> str:
        path = self.path / CONFIG
        fd = _open(path, lambda: "")
        try:
            data = os.read(fd, _MAX_CONFIG + 1)
            if len(data) > _MAX_CONFIG:
                raise UsageError(f"{path} has more than {_MAX_CONFIG} bytes")
            return data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not a PEFT configuration: {error}") from None
        finally:
            os.close(fd)

    def _read_header(self) -> list[TensorInfo]:
        """The tensors, sorted by name."""
        try:
            length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"its header of {length} bytes is over the limit of {_MAX_HEADER}")
            # Checks offsets, sizes and overlaps: of the file that is open, whatever has its name by now.
            with safe_open(f"/proc/self/fd/{self._fd}", framework="numpy"):
                pass
            header = json.loads(os.pread(self._fd, length, 8))
            header.pop("__metadata__", None)
            found = []
            for name, entry in sorted(header.items()):
                if len(name) > _MAX_NAME:
                    raise ValueError(f"the name {name[:40]!r}... has more than {_MAX_NAME} characters")
                first, end = entry["data_offsets"]
                found.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), 8 + length + first, end - first))
        except (OSError, ValueError, SafetensorError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{self._weights} is not a safetensors file: {error}") from None
        return found

    def _what_is_there_instead(self) -> str:
        for name in PICKLES:
            if (self.path / name).exists():
                return f"; {name} is a pickle, which can run anything when it is read: save it as safetensors{CONVERT}"
        return ""


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that change the effect of the same tensors, with PEFT's defaults for what is left out. In the order
    of names; patterns stay in the file's order, which decides between them."""
    return {key: default if config.get(key) is None else config[key] for key, default in sorted(_DEFAULTS.items())}


def unusable_settings(config: dict[str, Any]) -> str:
    """Why an adapter with this configuration is refused, or ""."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        return f"peft_type is {kind!r}; only LORA is served"
    for key in _UNSUPPORTED:
        if config.get(key):
            return f"{key}={config[key]!r} is not supported"
    if config.get("bias") not in (None, "none"):
        return f"bias={config['bias']!r} is not supported; train it with bias='none'"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        return f"init_lora_weights={init!r} changes the base model's weights; convert it to a plain LoRA"
    values = canonical(config)
    for key, value in [("r", values["r"]), *_patterns(values, "rank_pattern")]:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            return f"{key}={value!r} must be an integer from 1 to {MAX_RANK}"
    for key, value in [("lora_alpha", values["lora_alpha"]), *_patterns(values, "alpha_pattern")]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            return f"{key}={value!r} must be a finite number"
    if not isinstance(values["use_rslora"], bool):
        return f"use_rslora={values['use_rslora']!r} must be true or false"
    return _unusable_patterns(values)


def module_of(tensor_name: str) -> tuple[str, str]:
    """("model.layers.0.self_attn.q_proj", "A" or "B") of a LoRA tensor's name; ("", "") of any other."""
    match = _TENSOR.fullmatch(tensor_name)
    return (match[1], "A" if "_A" in match[2] else "B") if match else ("", "")


def is_finite(data: bytes | npt.NDArray[np.uint8], dtype: str) -> bool:
    """Whether there is no infinity and no NaN among these numbers."""
    if dtype not in _EXPONENT:
        return True
    mask = _EXPONENT[dtype]
    bits = np.frombuffer(data, dtype=f"<u{DTYPE_BYTES[dtype]}")
    return not bool(((bits & mask) == mask).any())


def _patterns(values: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    patterns = values[key]
    return [(f"{key}[{name!r}]", value) for name, value in patterns.items()] if isinstance(patterns, dict) else []


def _unusable_patterns(values: dict[str, Any]) -> str:
    """Patterns are regular expressions out of a file that anybody wrote: some would keep Python busy for ever."""
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values[key], dict):
            return f"{key}={values[key]!r} must map module names to numbers"
        if len(values[key]) > MOST_PATTERNS:
            return f"{key} has {len(values[key])} patterns; {MOST_PATTERNS} are the limit"
        for pattern in values[key]:
            try:
                if compiled(pattern).steps(_MAX_NAME) > _MAX_PATTERN_STEPS:
                    return f"{key}: {pattern!r} is too much of a pattern; repeat less"
            except ValueError as error:
                return f"{key}: {pattern!r} {error}"
    return ""


def _matching(patterns: dict[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if compiled(pattern).matches(module):
            return value
    return default


def _open(path: Path, hint: Any) -> int:
    """A descriptor of a regular file: opening a pipe or a device could wait for ever."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: no path at all, with a zero byte in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{str(path)!a} cannot be read: {reason}{hint()}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is not a regular file")
    return fd
