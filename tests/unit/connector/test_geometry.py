"""Chunk sizes, and which models' KV is refused. Real specs of vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1 import kv_cache_interface as specs

from loracache.connectors.vllm.geometry import chunk_blocks, uncacheable
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
    with pytest.raises(ConfigError, match=f"chunk_tokens={chunk_tokens} is no multiple of the engine's block size 16"):
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


def test_so_are_context_parallel_and_encoder_decoder_models(make_config: Any) -> None:
    parallel = SimpleNamespace(decode_context_parallel_size=2)
    assert "decode_context_parallel_size is 2" in reason(make_config, FULL, parallel_config=parallel)
    parallel = SimpleNamespace(prefill_context_parallel_size=2)
    assert "prefill_context_parallel_size is 2" in reason(make_config, FULL, parallel_config=parallel)
    assert "encoder-decoder" in reason(make_config, FULL, model_config__is_encoder_decoder=True)
