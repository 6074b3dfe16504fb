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
from loracache.connectors.vllm.common.groups import KVGroup, Member, groups_of
from loracache.connectors.vllm.common.messages import Facts, GroupFacts
from loracache.connectors.vllm.scheduler.chunks import Chunks
from loracache.errors import ConfigError
from loracache.groups import Need

MIB = 1 << 20
ATTENTION: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
FULL = specs.FullAttentionSpec(**ATTENTION)
WINDOW = specs.SlidingWindowSpec(**ATTENTION, sliding_window=128)
STATES = specs.MambaSpec(block_size=32, shapes=((2, 2),), dtypes=(torch.float32,), mamba_cache_mode="align")
GROUPS = (KVGroup(Need.ALL, 0, (Member(0, 16, ("layer",)),)),)


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


def test_layers_that_need_less_than_all_of_a_prefix_are_cached(make_config: Any) -> None:
    local = specs.ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=64)
    for groups in ([WINDOW], [FULL, WINDOW], [FULL, WINDOW, WINDOW], [local, FULL], [FULL, STATES], [STATES]):
        assert reason(make_config, *groups) == ""
    assert "no KV cache" in reason(make_config)


def test_they_are_refused_where_they_could_not_be_exact(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    none = specs.MambaSpec(block_size=16, shapes=((2, 2),), dtypes=(torch.float32,))
    assert "prefix caching is off" in reason(make_config, FULL, none)
    drafted = SimpleNamespace(use_eagle=lambda: False)
    assert "speculative decoding with states" in reason(make_config, FULL, STATES, speculative_config=drafted)
    assert reason(make_config, FULL, WINDOW, speculative_config=drafted) == ""
    assert reason(make_config, FULL, speculative_config=drafted) == ""
    replayed = specs.SlidingWindowMLASpec(**ATTENTION, sliding_window=128, bounded_replay=True)
    assert "recomputes the last window" in reason(make_config, FULL, replayed)
    both = specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": WINDOW})
    assert "different parts of a prefix" in reason(make_config, both)
    monkeypatch.setattr("loracache.connectors.vllm.common.geometry.has_block_references", lambda: False)
    assert "from vLLM 0.32 on" in reason(make_config, FULL, WINDOW)
    assert reason(make_config, FULL) == ""


def test_groups_of_one_kind_are_kept_together_full_attention_first() -> None:
    def config(*found: Any) -> Any:
        groups = [specs.KVCacheGroupSpec([f"layer{at}"], spec) for at, spec in enumerate(found)]
        return specs.KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)

    wider = specs.SlidingWindowSpec(**ATTENTION, sliding_window=256)
    groups = groups_of(config(WINDOW, FULL, STATES, WINDOW, wider, FULL))
    assert [(group.need, group.tokens, [each.index for each in group.members]) for group in groups] == [
        (Need.ALL, 0, [1, 5]),
        (Need.WINDOW, 127, [0, 3]),
        (Need.WINDOW, 255, [4]),
        (Need.STATE, 0, [2]),
    ]
    assert len({group.name for group in groups}) == 4
    assert groups[0].name != groups_of(config(FULL, FULL, WINDOW))[0].name  # other layers
    assert groups_of(config(FULL))[0].name == ""
    assert groups_of(config(WINDOW))[0].name.startswith("window127-")


@pytest.mark.parametrize(
    ("need", "tokens", "chunk", "tail"),
    [
        (Need.ALL, 0, 64, 64),
        (Need.WINDOW, 127, 64, 64),
        (Need.WINDOW, 127, 512, 128),  # of a larger chunk, what is before its last window nobody needs
        (Need.WINDOW, 7, 64, 16),
        (Need.SPAN, 64, 256, 256),
        (Need.STATE, 0, 64, 16),
    ],
)
def test_an_object_holds_what_some_prefix_needs(need: Need, tokens: int, chunk: int, tail: int) -> None:
    assert KVGroup(need, tokens, (Member(0, 16, ("a",)), Member(1, 16, ("b",)))).tail(chunk) == tail


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
    facts = [
        Facts((GroupFacts("stage0", "cuda/A@blocks", (2 * MIB,)),)),
        Facts((GroupFacts("stage1", "cuda/A@blocks", (MIB // 2,)),)),
    ]
    several = Chunks.of(facts, GROUPS, 0, drops_last_block=False)
    alone = Chunks.of(facts[:1], GROUPS, 0, drops_last_block=False)
    assert several is not None
    assert alone is not None
    assert (several.tokens, several.layout) == (32, "cuda/A@blocks#stage0|stage1")
    assert (alone.tokens, alone.layout) == (16, "cuda/A#stage0")
    single = Chunks.of(
        [facts[0], Facts((GroupFacts("stage1", "cuda/A", (MIB // 2,)),))], GROUPS, 0, drops_last_block=False
    )
    assert single is not None
    assert single.layout == "cuda/A@blocks#stage0|cuda/A#stage1"
