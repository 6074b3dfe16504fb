# SPDX-License-Identifier: Apache-2.0
"""Which model an engine computes with: its effective configuration and a digest of its weights' content.

Two engines with the same identity compute the same KV for the same tokens, but for rounding. Nothing here depends on
paths or names. The weights are read in the background; until that is done the identity is not known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.identity.effective import canonical, counted_environment, counted_fields, hf_values
from loracache.connectors.vllm.identity.weight_files import DigestCache, Weights, content_digest, find_weights
from loracache.errors import UsageError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

__all__ = ["ModelIdentity"]

_log = logging.getLogger(__name__)
# Rope types whose angles depend on max_model_len; models whose attention scale does.
_LENGTH_ROPES = {"longrope"}
_LENGTH_MODELS = {"llama4", "llama4_text"}
# Drafts of the prompt's own tokens: they have no KV.
_NO_DRAFT_MODEL = {"ngram", "ngram_gpu", "suffix"}


class ModelIdentity:
    """An engine's identity, found in the background. What cannot be told from others gets one of its own, shared with
    nobody, not even with the next run of this engine; the log says why.

    The configuration is taken at once: engines change theirs while they run. states: some layers keep states, and how
    they are computed counts too.
    """

    def __init__(self, vllm_config: VllmConfig, model_id: str = "", *, states: bool = False) -> None:
        self._value: str | None = None
        self._stop = threading.Event()
        self._name = vllm_config.model_config.model
        try:
            self._parts: dict[str, Any] = _configuration(vllm_config)
            if states:
                self._parts["states"] = _states(vllm_config)
            self._weights: dict[str, Weights] = _weights(vllm_config, model_id)
        except (OSError, UsageError) as error:
            self._value = self._private(error)
            return
        self._thread = threading.Thread(target=self._find, name="loracache-identity", daemon=True)
        self._thread.start()

    def value(self) -> str | None:
        """64 hexadecimal digits, or None while it is not known."""
        return self._value

    def wait(self) -> str:
        """The same, once it is known."""
        if self._value is None:
            self._thread.join()
        assert self._value is not None
        return self._value

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()

    def _find(self) -> None:
        leave_pinned_core()
        try:
            cache = DigestCache()
            for part, weights in self._weights.items():
                self._parts[part] = content_digest(weights, cache, self._stop)
            text = json.dumps(self._parts, sort_keys=True)
            self._value = hashlib.sha256(b"loracache/model 2\0" + text.encode()).hexdigest()
        except (OSError, UsageError) as error:
            self._value = self._private(error)
        except Exception as error:  # noqa: BLE001  the top of a thread
            _log.exception("the model's identity could not be found")
            self._value = self._private(error)

    def _private(self, reason: object) -> str:
        if not self._stop.is_set():
            _log.warning(
                "%s cannot be told from other models, so this run shares its KV with nobody: %s. Where it is the "
                "weights, set model_id to name them",
                self._name,
                reason,
            )
        return hashlib.sha256(b"loracache/model of this run\0" + os.urandom(32)).hexdigest()


def _configuration(vllm_config: VllmConfig) -> dict[str, Any]:
    model = vllm_config.model_config
    parts: dict[str, Any] = {
        "config": counted_fields(vllm_config),
        "environment": counted_environment(),
        "model": _model(model),
    }
    lora = vllm_config.lora_config
    if lora is not None and lora.lora_dtype != model.dtype:
        parts["lora_dtype"] = canonical(lora.lora_dtype, "lora_dtype")
    draft = _draft(vllm_config)
    if draft is None:
        parts["config"].pop("speculative_config", None)
    else:
        parts["draft"] = _model(draft)
    return parts


def _states(vllm_config: VllmConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: canonical(getattr(vllm_config.cache_config, name, None), name)
        for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype")
    }
    mamba = getattr(vllm_config, "mamba_config", None)
    return found | ({"mamba_config": counted_fields(mamba)} if mamba is not None else {})


def _weights(vllm_config: VllmConfig, model_id: str) -> dict[str, Weights]:
    found = {"weights": find_weights(vllm_config.model_config, vllm_config.load_config, model_id)}
    draft = _draft(vllm_config)
    if draft is not None:
        load = getattr(vllm_config.speculative_config, "draft_load_config", None) or vllm_config.load_config
        found["draft_weights"] = find_weights(draft, load)
    return found


def _model(model: ModelConfig) -> dict[str, Any]:
    """What a ModelConfig says beyond its fields: the Hugging Face configuration after overrides, and the length where
    vLLM chooses the rope's factors or an attention scale by it."""
    values = {"hf_config": hf_values(model.hf_config)}
    text = model.hf_text_config
    if text is not model.hf_config:
        values["hf_text_config"] = hf_values(text)
    ropes = _rope_types(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
    if ropes & _LENGTH_ROPES or text.model_type in _LENGTH_MODELS:
        values["max_model_len"] = model.max_model_len
    return values


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """All types in rope parameters, which may be nested by kind of layer."""
    found = {str(parameters[key]) for key in ("rope_type", "type") if key in parameters}
    for value in parameters.values():
        if isinstance(value, dict):
            found |= _rope_types(value)
    return found


def _draft(vllm_config: VllmConfig) -> ModelConfig | None:
    speculative: Any = vllm_config.speculative_config
    if speculative is None or speculative.method in _NO_DRAFT_MODEL:
        return None
    draft: ModelConfig | None = speculative.draft_model_config
    return draft
