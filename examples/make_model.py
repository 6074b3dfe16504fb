# SPDX-License-Identifier: Apache-2.0
"""Make a random-weight Llama, a tokenizer for it, and PEFT LoRA adapters. No download, the same bytes every time.

    python examples/make_model.py /tmp/tiny --preset tiny --adapters 2
    python examples/make_model.py /tmp/190m --preset 190m --adapters 8 --rank 16

writes OUT/model (what `vllm serve` takes) and OUT/adapters/adapter-0, adapter-1, ... (what its --lora-modules take).

A random model talks nonsense, but for a cache it has to be nonsense that depends on every token of the prompt: with
the usual initialisation the last token alone decides the next one, and wrong KV would go unnoticed. So every weight is
scaled to keep its input's variance, and attention is peaked (`SHARPNESS`), so that no early token is averaged away.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, UNK = 0, 1, 2
SPECIAL = ("<s>", "</s>", "<unk>")
FIRST_MERGE = len(SPECIAL) + 256
SHARPNESS = 1.8  # standard deviation of a query or key entry; its square is that of an attention logit
VALUE_GAIN = 3.0  # makes up for what averaging over a few positions takes away
LOGIT_STD = 3.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of a Llama. `vocab` counts the 3 special tokens and 256 bytes too, so it is at least 259."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    dtype: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab < FIRST_MERGE:
            raise ValueError(f"vocab is {self.vocab}; the special tokens and the bytes alone take {FIRST_MERGE}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}, which is not a multiple of kv_heads {self.kv_heads}")

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype is {self.dtype!r}; it has to be float32, float16 or bfloat16")
        return dtype


PRESETS = {
    # 0.2 M parameters: an engine spends its time on starting, not on computing.
    "tiny": ModelSpec(
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        intermediate=128,
        vocab=512,
        max_positions=4096,
        dtype="float32",
    ),
    # 190.9 M parameters, 32 KiB of KV a token: a long prompt takes seconds to prefill on a CPU, and little to load.
    "190m": ModelSpec(
        hidden=1024,
        layers=16,
        heads=16,
        kv_heads=8,
        head_dim=64,
        intermediate=2816,
        vocab=1024,
        max_positions=16384,
        dtype="bfloat16",
    ),
}


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of one decoder layer, by its module name: the seven that LoRA targets."""
    query, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return {
        "self_attn.q_proj": (query, spec.hidden),
        "self_attn.k_proj": (kv, spec.hidden),
        "self_attn.v_proj": (kv, spec.hidden),
        "self_attn.o_proj": (spec.hidden, query),
        "mlp.gate_proj": (spec.intermediate, spec.hidden),
        "mlp.up_proj": (spec.intermediate, spec.hidden),
        "mlp.down_proj": (spec.hidden, spec.intermediate),
    }


def make_model(folder: Path, spec: ModelSpec) -> int:
    """Write config.json, model.safetensors and the tokenizer into `folder`; returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_weights(spec))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(spec))
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    make_tokenizer(folder, spec)
    return sum(tensor.numel() for tensor in tensors.values())


def _weights(spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(spec.seed)

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        weight = torch.empty(rows, columns).normal_(std=gain / math.sqrt(columns), generator=rng)
        return weight.to(spec.torch_dtype)

    depth = math.sqrt(2 / spec.layers)  # what all layers add to the residual stream is the same at any depth
    gains = {
        "self_attn.q_proj": SHARPNESS,
        "self_attn.k_proj": SHARPNESS,
        "self_attn.v_proj": VALUE_GAIN,
        "self_attn.o_proj": depth,
        "mlp.down_proj": depth,
    }
    norm = torch.ones(spec.hidden, dtype=spec.torch_dtype)
    yield "model.embed_tokens.weight", normal(spec.vocab, spec.hidden, math.sqrt(spec.hidden))
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", norm.clone()
        yield f"{prefix}.post_attention_layernorm.weight", norm.clone()
        for name, (rows, columns) in linear_shapes(spec).items():
            yield f"{prefix}.{name}.weight", normal(rows, columns, gains.get(name, 1.0))
    yield "model.norm.weight", norm.clone()
    head = normal(spec.vocab, spec.hidden, LOGIT_STD)
    head[: len(SPECIAL)] = 0  # logit 0 is far below the best of the others: no answer ends early
    yield "lm_head.weight", head


def _config(spec: ModelSpec) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.max_positions,
        "torch_dtype": spec.dtype,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,  # tied, a random model repeats its last token for ever
    }


def sample_text(words: int, seed: int = 0) -> str:
    """Sentences of made-up words that the tokenizer knows well: about two tokens a word."""
    rng = random.Random(f"text {seed}")
    vocabulary = _vocabulary()
    drawn = rng.choices(vocabulary, weights=[1 / (rank + 5) for rank in range(len(vocabulary))], k=words)
    for index in range(0, words, 12):
        drawn[index] = drawn[index].capitalize()
        drawn[index - 1] += "."
    return " ".join(drawn)


def _vocabulary() -> list[str]:
    rng = random.Random("vocabulary")
    syllables = [a + b + c for a in "bdfgklmnprstv" for b in "aeiou" for c in ("", "l", "n", "r", "s")]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(4000)]


def make_tokenizer(folder: Path, spec: ModelSpec) -> None:
    """Write a byte-level BPE tokenizer of exactly `spec.vocab` tokens; text comes back from its tokens unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(40_000)], trainer)
    # The text runs out of merges before a large vocabulary is full; every id the model can answer needs a text.
    tokenizer.add_tokens([f" filler{n}" for n in range(spec.vocab - tokenizer.get_vocab_size())])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "unk_token": SPECIAL[UNK],
        "model_max_length": spec.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def make_adapter(
    folder: Path,
    spec: ModelSpec,
    *,
    rank: int = 8,
    seed: int = 1,
    strength: float = 0.5,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
) -> None:
    """Write a LoRA adapter in PEFT's format. `strength` is the size of its change, relative to the layer it changes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(spec.layers):
        for name, (rows, columns) in linear_shapes(spec).items():
            if name.rpartition(".")[2] not in targets:
                continue
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            down = torch.empty(rank, columns).normal_(std=1 / math.sqrt(columns), generator=rng)
            up = torch.empty(rows, rank).normal_(std=strength / math.sqrt(rank), generator=rng)
            tensors[f"{prefix}.lora_A.weight"] = down.to(spec.torch_dtype)
            tensors[f"{prefix}.lora_B.weight"] = up.to(spec.torch_dtype)
    if not tensors:
        raise ValueError(f"targets {tuple(targets)} name no layer of a Llama")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", settings)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write model/ and adapters/ into")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="the shape to start from")
    for field in fields(ModelSpec):
        parser.add_argument("--" + field.name.replace("_", "-"), type=str if field.name == "dtype" else int)
    parser.add_argument("--adapters", type=int, default=0, help="how many; adapter-N is made with seed + N + 1")
    parser.add_argument("--rank", type=int, default=8)
    options = vars(parser.parse_args(arguments))
    changes = {field.name: options[field.name] for field in fields(ModelSpec) if options[field.name] is not None}
    spec = replace(PRESETS[options["preset"]], **changes)

    started = time.monotonic()
    out, count, rank = options["out"], options["adapters"], options["rank"]
    parameters = make_model(out / "model", spec)
    for number in range(count):
        make_adapter(out / "adapters" / f"adapter-{number}", spec, rank=rank, seed=spec.seed + number + 1)
    seconds = time.monotonic() - started
    print(f"{out}: {parameters / 1e6:.1f} M parameters, {count} adapters of rank {rank}, {seconds:.1f} s")
    print(asdict(spec))


if __name__ == "__main__":
    main()
