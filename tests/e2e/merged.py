# SPDX-License-Identifier: Apache-2.0
"""The oracle for adapters: the same model in Hugging Face's implementation with the adapter merged into its weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class MergedModel:
    """One base model in float32; an adapter at a time is merged into it. dtype: what the engine that is looked at has
    its weights in.
    """

    def __init__(self, model: Path, dtype: torch.dtype = torch.float32) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._dtype = dtype
        self._base = {
            name: value.detach().to(dtype).to(torch.float32, copy=True)
            for name, value in self._model.named_parameters()
        }

    def disagreements(self, adapter: Path | None, prompt: list[int], tokens: list[int], rounding: float) -> list[str]:
        """Where `tokens` are not the greedy answer: another token's logit is higher by more than `rounding`."""
        self._merge(adapter)
        logits = _logits(self._model, prompt, tokens)
        found = []
        for place, (row, token) in enumerate(zip(logits, tokens, strict=True)):
            lead = float(row.max() - row[token])
            if lead > rounding:
                found.append(f"token {place}: {token} is behind {int(row.argmax())} by {lead:.4f}")
        return found

    def rounding(self, adapter: Path | None, prompt: list[int], tokens: list[int]) -> float:
        """How far two logits may change places because all is computed in `dtype`: twice the largest error of one that
        Hugging Face's implementation makes then.
        """
        self._merge(adapter)
        exact = _logits(self._model, prompt, tokens)
        rounded = _logits(copy.deepcopy(self._model).to(self._dtype), prompt, tokens)
        return 2 * float((rounded.float() - exact).abs().max())

    def _merge(self, adapter: Path | None) -> None:
        parameters = dict(self._model.named_parameters())
        for name, value in self._base.items():
            parameters[name].data.copy_(value)
        if adapter is None:
            return
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name, a in tensors.items():
            if ".lora_A." in name or name.endswith("lora_embedding_A"):
                b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
                module = (
                    name.removeprefix("base_model.model.")
                    .replace(".lora_A.weight", "")
                    .replace(".lora_embedding_A", "")
                )
                a, b = a.to(self._dtype), b.to(self._dtype)
                delta = b.double() @ a.double() * scaling(config, module, a.shape[0])
                weight = parameters[f"{module}.weight"].data
                weight += (delta.T if "embedding" in name else delta).float()


def _logits(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Of the places that `tokens` stand at, one row each."""
    with torch.no_grad():
        return model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]


def scaling(config: dict[str, object], module: str, rank: int) -> float:
    """As PEFT has it, for patterns that are plain names."""
    alpha = float(config["lora_alpha"])  # type: ignore[arg-type]
    for name, value in dict(config.get("alpha_pattern") or {}).items():  # type: ignore[call-overload]
        if module == name or module.endswith(f".{name}"):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
