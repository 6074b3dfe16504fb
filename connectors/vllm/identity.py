"""Which model an engine computes with: its effective configuration and a digest of its weights' content.

Two engines with the same identity compute the same KV for the same tokens. Nothing here depends on paths or names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

__all__ = ["model_identity", "weights_digest"]

_log = logging.getLogger(__name__)
_SAMPLE = 4096
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Keys of a model's configuration that do not change what it computes.
_IGNORED = {"_name_or_path", "transformers_version", "architectures_name", "use_cache", "torch_dtype", "dtype"}


def model_identity(vllm_config: VllmConfig, model_id: str = "") -> str:
    """64 hexadecimal digits. `model_id`, where the user gives one, stands for configuration and weights alike; the
    engine's dtype and quantisation always count.
    """
    model = vllm_config.model_config
    parts: dict[str, Any] = {"dtype": str(model.dtype), "quantization": model.quantization}
    if model_id:
        parts["model_id"] = model_id
    else:
        parts["config"] = _config(model)
        parts["weights"] = weights_digest(model, vllm_config.load_config.load_format)
    speculative: Any = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft is not model:
        parts["draft"] = [
            speculative.method,
            _config(draft),
            weights_digest(draft, vllm_config.load_config.load_format),
        ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(b"loracache/model\0" + text.encode()).hexdigest()


def weights_digest(model: ModelConfig, load_format: object) -> str:
    """What tells these weights from others of the same shape.

    Dummy weights are random by their seed; a hub snapshot is its commit; files are their headers, sizes and, for every
    tensor of a safetensors file (elsewhere: every 64 MiB), bytes from its beginning, middle and end. Weights that none
    of this tells apart share with nobody, not even with the next run of this engine.
    """
    if str(getattr(load_format, "value", load_format)) == "dummy":
        return f"dummy:{model.seed}"
    path = Path(model.model)
    if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name):
        return f"hub:{path.name}"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _WEIGHTS.fullmatch(file.name))
    else:
        files = [path] if path.is_file() else []
        commit = _hub_commit(model)
        if not files and commit is not None:
            return f"hub:{commit}"
    if not files:
        _log.warning("the weights of %s cannot be told from others; set model_id to share their KV", model.model)
        return f"unknown:{os.urandom(16).hex()}"
    state = hashlib.sha256()
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            state.update(size.to_bytes(8, "little"))
            for offset, length in _samples(handle.fileno(), file.suffix, size):
                state.update(os.pread(handle.fileno(), length, offset))
    return f"files:{state.hexdigest()}"


def _config(model: ModelConfig) -> dict[str, Any]:
    config = model.hf_config.to_dict()
    return {key: value for key, value in config.items() if key not in _IGNORED}


def _hub_commit(model: ModelConfig) -> str | None:
    commit = getattr(model.hf_config, "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def _samples(fd: int, suffix: str, size: int) -> Iterator[tuple[int, int]]:
    if suffix == ".safetensors":
        start = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
        header = json.loads(os.pread(fd, start - 8, 8))
        yield 0, start
        ranges = [entry["data_offsets"] for name, entry in sorted(header.items()) if name != "__metadata__"]
        spans = [(start + first, end - first) for first, end in ranges]
    else:
        step = 64 << 20
        spans = [(offset, min(step, size - offset)) for offset in range(0, size, step)]
    for offset, length in spans:
        for at in (offset, offset + length // 2, offset + max(0, length - _SAMPLE)):
            yield at, min(_SAMPLE, offset + length - at)
