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

FLOAT32 = 1e-3  # how far float32 moves a logit of most prompts, at most


class MergedModel:
    """One base model, computed in float64; an adapter at a time is merged into it. dtype: what the engine that is
    looked at computes in, and has its weights in.
    """

    def __init__(self, model: Path, dtype: torch.dtype = torch.float32) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        self._dtype = dtype
        self._base = {
            name: value.detach().to(dtype).to(torch.float64, copy=True)
            for name, value in self._model.named_parameters()
        }

    def disagreements(
        self, adapter: Path | None, prompt: list[int], tokens: list[int], rounding: float | None = None
    ) -> list[str]:
        """Where `tokens` are not the greedy answer: another token's logit is higher by more than `rounding`; without
        it, by more than float32 leaves open, which for a prompt that is sensitive to it is measured.
        """
        self._merge(adapter)
        logits = self._exact(prompt, tokens)
        leads = [float(row.max() - row[token]) for row, token in zip(logits, tokens, strict=True)]
        if rounding is None:
            rounding = FLOAT32
            if max(leads) > FLOAT32:
                # Where Hugging Face's errors are large so are vLLM's, and not the same: each may be the larger by half.
                rounding = max(FLOAT32, 2 * self.rounding(adapter, prompt, tokens))
        return [
            f"token {place}: {token} is behind the best by {lead:.4f} (rounding: {rounding:.4f})"
            for place, (token, lead) in enumerate(zip(tokens, leads, strict=True))
            if lead > rounding
        ]

    def rounding(self, adapter: Path | None, prompt: list[int], tokens: list[int]) -> float:
        """How far two logits may change places because all is computed in `dtype`: twice the largest error of one that
        Hugging Face's implementation makes then.
        """
        self._merge(adapter)
        rounded = _logits(copy.deepcopy(self._model).to(self._dtype), prompt, tokens)
        return 2 * float((rounded.double() - self._exact(prompt, tokens)).abs().max())

    def _exact(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        return _logits(self._model, prompt, tokens)

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
                weight += delta.T if "embedding" in name else delta


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
