# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights whose layers do not all read all of a prompt, by the architectures that people serve.

Each is what transformers makes of a small configuration of the real architecture, so vLLM takes the code, the KV cache
groups and the schedule that it takes for the real one. Windows and spans are 64 tokens. As in examples/make_model.py
what a model answers depends on every token that it can see; states forget slowly, so that a wrong one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

WINDOW = 64
VOCABULARY = 512
IMAGE = VOCABULARY - 1
IMAGE_TOKENS = 16
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GAINS = {"q_proj": 1.8, "k_proj": 1.8, "v_proj": 3.0, "qkv_proj": 2.0, "lm_head": 3.0, "linear_1": 3.0, "linear_2": 3.0}
TIED_EMBEDDING = 0.1  # of unit size, a tied model repeats its last token for ever
FORGETS = (0.002, 0.2)  # of a state per token and unit of time step, first head to last


@dataclass(frozen=True, slots=True)
class Model:
    """An architecture. config: makes its configuration. kinds: of its groups (loracache.groups.Need), in the
    connector's order. block: tokens of the largest block of a group. blocks: of an engine in which ten requests of 300
    tokens, with answers of `answer`, have no room. engine: more of vLLM's arguments. image: whether it sees. flags: of
    CPUs that run it.
    """

    name: str
    config: Callable[[], Any]
    kinds: tuple[str, ...]
    block: int
    blocks: int
    engine: dict[str, Any] = field(default_factory=dict)
    answer: int = 40
    image: bool = False
    flags: frozenset[str] = frozenset()
    image_token = IMAGE
    image_tokens = IMAGE_TOKENS


def _layers(*kinds: str) -> dict[str, Any]:
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}


SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"


def _gemma3() -> Any:
    layers = _layers(SLIDING, SLIDING, SLIDING, FULL)
    return transformers.Gemma3TextConfig(
        **SIZES, **HEADS, **layers, head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=32
    )


def _gpt_oss() -> Any:
    layers = _layers(SLIDING, FULL, SLIDING, FULL)
    sizes = SIZES | {"intermediate_size": 64}
    return transformers.GptOssConfig(
        **sizes, **HEADS, **layers, head_dim=32, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    )


def _mistral() -> Any:
    return transformers.MistralConfig(**SIZES, **HEADS, num_hidden_layers=2, head_dim=32, sliding_window=WINDOW)


def _llama4() -> Any:
    layers = _layers(CHUNKED, CHUNKED, CHUNKED, FULL)
    return transformers.Llama4TextConfig(
        **SIZES,
        **HEADS,
        **layers,
        head_dim=32,
        intermediate_size_mlp=128,
        attention_chunk_size=WINDOW,
        moe_layers=[],
        interleave_moe_layer_step=0,
        attn_temperature_tuning=False,
    )


def _qwen3_next() -> Any:
    layers = _layers("linear_attention", "linear_attention", "linear_attention", FULL)
    return transformers.Qwen3NextConfig(
        **SIZES,
        **HEADS,
        **layers,
        head_dim=128,
        linear_key_head_dim=64,  # vLLM's kernel for CPUs knows 64 and 128
        linear_value_head_dim=64,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[0, 1, 2],  # vLLM wants one with experts
    )


def _granite_hybrid() -> Any:
    return transformers.GraniteMoeHybridConfig(
        **SIZES,
        **(HEADS | {"num_attention_heads": 2}),
        **_layers("mamba", "mamba", "mamba", "attention"),
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=32,
        num_local_experts=0,
        shared_intermediate_size=128,
        attention_multiplier=32**-0.5,
    )


def _lfm2() -> Any:
    heads = HEADS | {"num_attention_heads": 2}
    sizes = {"conv_dim": 64, "block_dim": 64, "block_ff_dim": 128}  # as vLLM reads them
    return transformers.Lfm2Config(
        **SIZES, **heads, **_layers("conv", "conv", FULL), block_auto_adjust_ff_dim=False, **sizes
    )


def _deepseek() -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return transformers.DeepseekV2Config(
        **SIZES,
        **heads,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=4,
    )


def _gemma3n() -> Any:
    return transformers.Gemma3nTextConfig(
        **SIZES,
        **HEADS,
        **_layers(SLIDING, SLIDING, FULL, SLIDING, FULL),
        head_dim=32,
        sliding_window=WINDOW,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
    )


def _gemma4() -> Any:
    """Layers of full attention have heads of another size, so that its groups have blocks of other sizes."""
    return transformers.Gemma4TextConfig(
        **SIZES,
        **HEADS,
        **_layers(SLIDING, SLIDING, SLIDING, FULL),
        head_dim=32,
        global_head_dim=64,
        sliding_window=WINDOW,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
    )


def _llava() -> Any:
    """Images before a text model with windows."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, **vision},
        text_config=_windowed_text(),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
    )


def _windowed_text() -> dict[str, Any]:
    heads = HEADS | {"head_dim": 32, "num_hidden_layers": 2, "sliding_window": WINDOW}
    return {"model_type": "mistral", **SIZES, **heads}


AMX = frozenset(("amx_bf16", "amx_tile"))


def _half(step: int) -> dict[str, Any]:
    """For what vLLM computes on CPUs in bfloat16 alone. Steps are alike, cold and warm, where each is a chunk."""
    return {"dtype": "bfloat16", "max_num_batched_tokens": step}


MODELS = {
    model.name: model
    for model in (
        Model("gemma3", _gemma3, ("all", "window"), 32, 160),
        Model("gpt_oss", _gpt_oss, ("all", "window"), 32, 110),
        Model("mistral", _mistral, ("window",), 32, 160),
        Model("llama4", _llama4, ("all", "span"), 32, 160),
        Model("qwen3_next", _qwen3_next, ("all", "state"), 64, 100, _half(64), flags=AMX),
        # In longer steps vLLM 0.32 takes states out of their middle, and on a CPU ends with an IndexError there. In
        # short ones prompts come in one by one: answers have to be long for ten to be there at once.
        Model("granite_hybrid", _granite_hybrid, ("all", "state"), 32, 110, {"max_num_batched_tokens": 32}, answer=120),
        # Without any cache, too, vLLM 0.32 on a CPU answers otherwise when a prompt is cut otherwise, or has company.
        Model("lfm2", _lfm2, ("all", "state"), 32, 160, {"max_num_batched_tokens": 32}),
        Model("gemma3n", _gemma3n, ("all", "window"), 32, 160),
        Model("gemma4", _gemma4, ("all", "window"), 64, 160),
        # vLLM's own class for it imports torchvision, which its CPU build comes without.
        Model("llava", _llava, ("window",), 32, 160, {"model_impl": "transformers"}, image=True),
        Model("deepseek_v2", _deepseek, ("all",), 32, 100, _half(32), flags=AMX),
    )
}


def make_hybrid_model(folder: Path, name: str, model_maker: Any) -> Model:
    """Write the model, with a tokenizer (and a processor of images)."""
    model = MODELS[name]
    config = model.config()
    torch.manual_seed(0)
    kind = transformers.AutoModelForImageTextToText if model.image else transformers.AutoModelForCausalLM
    network = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        _fill(network.named_parameters(), tied=bool(config.get_text_config().tie_word_embeddings))
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    _tokenizer(folder, model_maker, image=model.image)
    return model


def _fill(parameters: Iterable[tuple[str, torch.nn.Parameter]], *, tied: bool) -> None:
    for name, weight in parameters:
        last = name.rsplit(".", 2)[-2]
        if name.endswith("A_log"):
            slow, fast = (torch.tensor(rate).log() for rate in FORGETS)
            weight.copy_(torch.linspace(slow, fast, len(weight)))
        elif last in ("q_norm", "k_norm"):
            weight += 0.8  # a norm before the product takes the gain of its matrix away
        elif "position_embedding" in name or weight.ndim < 2:
            continue
        elif name.endswith("_bias"):
            weight.normal_(std=0.1)
        elif "embed_tokens" in name:
            weight.normal_(std=TIED_EMBEDDING / weight.shape[1] ** 0.5 if tied else 1.0)
        else:
            inputs = weight.shape[-1] if "experts" in name else weight[0].numel()
            weight.normal_(std=GAINS.get(last, 1.0) / inputs**0.5)


def _tokenizer(folder: Path, model_maker: Any, *, image: bool) -> None:
    model_maker.make_tokenizer(folder, replace(model_maker.PRESETS["tiny"], vocab=VOCABULARY - image))
    if not image:
        return
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    size = {"height": 56, "width": 56}
    transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
