# SPDX-License-Identifier: Apache-2.0
"""Chunk sizes, and which models' KV is refused. Real specs of vLLM."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1 import kv_cache_interface as specs

from loracache.connectors.vllm.common.geometry import chunk_blocks, joint_layout, payload_layout, uncacheable
from loracache.connectors.vllm.common.messages import Facts
from loracache.connectors.vllm.scheduler.chunks import Chunks
from loracache.errors import ConfigError

MIB = 1 << 20
ATTENTION: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
FULL = specs.FullAttentionSpec(**ATTENTION)


@pytest.mark.parametrize(
    ("block_bytes", "chunk_tokens", "expected"),
    [(MIB, 0, 1), (2 * MIB, 0, 1), (MIB - 1, 0, 2), (MIB // 3, 0, 4), (1, 0, MIB), (MIB, 48, 3), (1, 16, 1)],
)
def test_a_chunk_is_the_fewest_blocks_of_a_mebibyte(block_bytes: int, chunk_tokens: int, expected: int) -> None:
    assert chunk_blocks(block_bytes, 16, chunk_tokens) == expected


@pytest.mark.parametrize("chunk_tokens", [1, 15, 24])
def test_a_chunk_is_whole_blocks(chunk_tokens: int) -> None:
    wrong = f"chunk_tokens={chunk_tokens} is not a multiple of the engine's block size 16"
    with pytest.raises(ConfigError, match=wrong):
        chunk_blocks(MIB, 16, chunk_tokens)


def reason(make_config: Any, *groups: specs.KVCacheSpec, **config: Any) -> str:
    kv_cache = specs.KVCacheConfig(
        num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[specs.KVCacheGroupSpec(["layer"], spec) for spec in groups]
    )
    return uncacheable(make_config(**config), kv_cache)


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        specs.FullAttentionSpec(**ATTENTION, sliding_window=128),  # the hybrid manager is off: all blocks are kept
        specs.MLAAttentionSpec(**ATTENTION),
        specs.UniformTypeKVCacheSpecs(
            block_size=16, kv_cache_specs={"a": FULL, "b": specs.FullAttentionSpec(**{**ATTENTION, "head_size": 128})}
        ),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_full_attention_is_cached(make_config: Any, spec: Any) -> None:
    assert reason(make_config, spec) == ""


REFUSED = [
    specs.SlidingWindowSpec(**ATTENTION, sliding_window=128),
    specs.ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=64),
    specs.MambaSpec(block_size=16, shapes=((2, 2),), dtypes=(torch.float32,)),
    specs.RSWASpec(**ATTENTION, rswa_window=64),
    specs.SinkFullAttentionSpec(**ATTENTION, sink_len=4),
    specs.HiddenStateCacheSpec(**ATTENTION),
    specs.CrossAttentionSpec(**ATTENTION),
]


@pytest.mark.parametrize("spec", REFUSED, ids=lambda spec: type(spec).__name__)
def test_other_state_is_refused_by_its_name(make_config: Any, spec: Any) -> None:
    assert type(spec).__name__ in reason(make_config, spec)
    mixed = specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": spec})
    assert type(spec).__name__ in reason(make_config, mixed)


def test_several_groups_are_refused(make_config: Any) -> None:
    assert "2 KV cache groups (FullAttentionSpec, SlidingWindowSpec)" in reason(make_config, FULL, REFUSED[0])
    assert "0 KV cache groups (none)" in reason(make_config)


def test_so_are_context_parallel_models(make_config: Any) -> None:
    parallel = SimpleNamespace(decode_context_parallel_size=2)
    assert "decode_context_parallel_size is 2" in reason(make_config, FULL, parallel_config=parallel)
    parallel = SimpleNamespace(prefill_context_parallel_size=2)
    assert "prefill_context_parallel_size is 2" in reason(make_config, FULL, parallel_config=parallel)


def test_workers_with_layers_of_the_same_kinds_join_and_no_others() -> None:
    uniform = {"a": "cpu/A", "b": "cpu/A"}
    assert joint_layout(uniform) == "cpu/A#a|b"
    stages = {"a": "cpu/A+B@12", "b": "cpu/A+B@34"}
    swapped = {"a": "cpu/A+B@34", "b": "cpu/A+B@12"}
    assert joint_layout(stages) != joint_layout(swapped) != ""
    assert joint_layout({"a": "cpu/A", "b": "cpu/B"}) == joint_layout({"a": "cpu/A+B@12", "b": "cpu/A"}) == ""


OFF = {"cache_config__enable_prefix_caching": False}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ""),
        (OFF, ""),  # the user's wish
        (OFF | {"scheduler_config": SimpleNamespace(enable_chunked_prefill=False)}, "both off"),
        ({"scheduler_config": SimpleNamespace(enable_chunked_prefill=False)}, ""),
        ({"model_config__is_prefix_caching_supported": False}, "supports no prefix caching"),
        ({"cache_config__calculate_kv_scales": True}, "calculate_kv_scales"),
    ],
)
def test_what_vllm_continues_from_no_context_is_refused(
    make_config: Any, config: dict[str, Any], expected: str
) -> None:
    given = {"scheduler_config": SimpleNamespace(enable_chunked_prefill=True)} | config
    found = reason(make_config, FULL, **given)
    assert expected in found
    assert bool(found) == bool(expected)


def test_batch_invariance_without_prefix_caching_is_refused(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some attention kernels switch the prefix cache off for it (vLLM's attention.py)."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    scheduler = SimpleNamespace(enable_chunked_prefill=True)
    assert "VLLM_BATCH_INVARIANT" in reason(make_config, FULL, scheduler_config=scheduler, **OFF)
    assert reason(make_config, FULL, scheduler_config=scheduler) == ""


def test_attention_that_is_not_causal_is_refused(make_config: Any) -> None:
    assert "not causal" in reason(make_config, specs.FullAttentionSpec(**ATTENTION, non_causal=True))


MLA = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": None, "n_routed_experts": 2,
    "max_position_embeddings": 1024, "first_k_dense_replace": 1, "moe_layer_freq": 1, "torch_dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize("amx", [False, True])
def test_mla_is_refused_where_vllm_turns_its_prefix_cache_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    """The configuration as vLLM's CPU platform leaves it, with AMX and without."""
    (tmp_path / "config.json").write_text(json.dumps(MLA))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    config = EngineArgs(
        model=str(tmp_path), dtype="float32", max_model_len=512, skip_tokenizer_init=True
    ).create_engine_config()
    assert config.model_config.use_mla
    spec = specs.MLAAttentionSpec(**ATTENTION)
    groups = [specs.KVCacheGroupSpec(["layer"], spec)]
    found = uncacheable(config, specs.KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups))
    assert found == "" if amx and platform.machine() == "x86_64" else "MLA on a CPU without AMX" in found


@pytest.mark.parametrize(
    ("layout", "per_chunk", "payloads"),
    [
        ("cuda/N16.H.C128:bfloat16@blocks", 1, "cuda/N16.H.C128:bfloat16"),
        ("cuda/N16.H.C128:bfloat16@blocks", 2, "cuda/N16.H.C128:bfloat16@blocks"),
        ("cuda/A+B@0123.blocks", 1, "cuda/A+B@0123"),
        ("cuda/A+B@0123.blocks", 4, "cuda/A+B@0123.blocks"),
        ("cuda/A@4567", 1, "cuda/A@4567"),  # heads before layers: never the same bytes
        ("cuda/A", 1, "cuda/A"),
    ],
)
def test_a_payload_of_one_block_is_the_same_whether_layers_lie_side_by_side_or_not(
    layout: str, per_chunk: int, payloads: str
) -> None:
    assert payload_layout(layout, per_chunk) == payloads


def test_what_a_chunk_really_has_decides_and_stages_of_one_layer_agree_with_the_others() -> None:
    """A stage whose blocks are large would have chunks of one block alone; beside a small one it has several."""
    facts = [Facts("stage0", "cuda/A@blocks", 2 * MIB), Facts("stage1", "cuda/A@blocks", MIB // 2)]
    several = Chunks.of(facts, 16, 0, drops_last_block=False)
    alone = Chunks.of(facts[:1], 16, 0, drops_last_block=False)
    assert several is not None
    assert alone is not None
    assert (several.per_chunk, several.layout) == (2, "cuda/A@blocks#stage0|stage1")
    assert (alone.per_chunk, alone.layout) == (1, "cuda/A#stage0")
    single = Chunks.of([facts[0], Facts("stage1", "cuda/A", MIB // 2)], 16, 0, drops_last_block=False)
    assert single is not None
    assert single.layout == "cuda/A@blocks#stage0|cuda/A#stage1"
