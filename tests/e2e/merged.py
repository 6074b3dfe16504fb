"""The oracle for adapters: the same model in Hugging Face's implementation with the adapter merged into its weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class MergedModel:
    """One base model in float32; an adapter at a time is merged into it."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._base = {name: value.detach().clone() for name, value in self._model.named_parameters()}

    def disagreements(self, adapter: Path | None, prompt: list[int], tokens: list[int], rounding: float) -> list[str]:
        """Where `tokens` are not the greedy answer: another token's logit is higher by more than `rounding`."""
        self._merge(adapter)
        with torch.no_grad():
            logits = self._model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        found = []
        for place, (row, token) in enumerate(zip(logits, tokens, strict=True)):
            lead = float(row.max() - row[token])
            if lead > rounding:
                found.append(f"token {place}: {token} is behind {int(row.argmax())} by {lead:.4f}")
        return found

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
                module = name.removeprefix("base_model.model.").replace(".lora_A.weight", "").replace(
                    ".lora_embedding_A", ""
                )  # fmt: skip
                delta = b.double() @ a.double() * scaling(config, module, a.shape[0])
                weight = parameters[f"{module}.weight"].data
                weight += (delta.T if "embedding" in name else delta).float()


def scaling(config: dict[str, object], module: str, rank: int) -> float:
    """As PEFT has it, for patterns that are plain names."""
    alpha = float(config["lora_alpha"])  # type: ignore[arg-type]
    for name, value in dict(config.get("alpha_pattern") or {}).items():  # type: ignore[call-overload]
        if module == name or module.endswith(f".{name}"):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
