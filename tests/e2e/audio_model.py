# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen2-Audio with random weights: it runs on a CPU without torchvision, and hears differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

WORDS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
VOCABULARY = 512
GAINS = {  # as in examples/make_model.py: what the model answers depends on every token, and here on every sound
    "q_proj": 1.8,
    "k_proj": 1.8,
    "v_proj": 3.0,
    "embed_tokens": 11.3,
    "lm_head": 3.0,
    "linear": 3.0,
}
AUDIO, BOS, EOS = range(VOCABULARY - len(WORDS), VOCABULARY)


def make_audio_model(folder: Path, model_maker: Any) -> None:
    """Write model and processor. In a prompt, [BOS, AUDIO, EOS] stand for an audio."""
    folder.mkdir(parents=True, exist_ok=True)
    model_maker.make_tokenizer(folder, replace(model_maker.PRESETS["tiny"], vocab=VOCABULARY - len(WORDS)))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(WORDS)})
    config = Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096, "tie_word_embeddings": False,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64, "num_mel_bins": 128, "max_source_positions": 1500,
        },
        audio_token_index=AUDIO,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position" not in name and weight.ndim >= 2:
                weight.normal_(std=GAINS.get(name.rsplit(".", 2)[-2], 1.0) / weight[0].numel() ** 0.5)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("language_model.model.model.", "language_model.model."): weights[name] for name in weights}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})  # by the names of published checkpoints
    audio, bos, eos = WORDS
    extractor = WhisperFeatureExtractor(feature_size=128)
    Qwen2AudioProcessor(
        extractor, tokenizer, audio_token=audio, audio_bos_token=bos, audio_eos_token=eos
    ).save_pretrained(folder)
