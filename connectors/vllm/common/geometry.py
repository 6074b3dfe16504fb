# SPDX-License-Identifier: Apache-2.0
"""Shards, chunk sizes, and which models' KV can be cached at all. Pure functions of vLLM's configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.groups import KVGroup, each_spec, groups_of, need_of
from loracache.connectors.vllm.common.releases import has_block_references
from loracache.errors import ConfigError
from loracache.groups import Need

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["IN_BLOCKS", "chunk_blocks", "joint_layout", "payload_layout", "shard_name", "uncacheable"]

IN_BLOCKS = "blocks"
"""What the layout of a worker ends with, behind "@" or ".", where a payload holds block after block, each with all its
layers, and not layer after layer."""

_CHUNK_BYTES = 1 << 20


def chunk_blocks(block_bytes: int, block_size: int, chunk_tokens: int) -> int:
    """Engine blocks of a chunk: the fewest that make an object of at least 1 MiB, or those of `chunk_tokens`.

    Raises ConfigError where chunk_tokens is not a multiple of the block size.
    """
    if chunk_tokens % block_size:
        raise ConfigError(
            f"kv_connector_extra_config: chunk_tokens={chunk_tokens} is not a multiple of the engine's block size "
            f"{block_size}"
        )
    return chunk_tokens // block_size or max(1, -(-_CHUNK_BYTES // block_bytes))


def shard_name(config: VllmConfig, layers: Sequence[str], group: KVGroup, *, replicated: bool = False) -> str:
    """This worker's part of a group: its layers, and its range of KV heads or, of states, its rank. Ranks that hold the
    same share a name: those with replicated heads, or where all of the group's layers are `replicated` (MLA, some
    states)."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    total = config.model_config.get_total_num_kv_heads()
    ranks, rank = config.parallel_config.tensor_parallel_size, get_tp_group().rank_in_group
    first = rank * total // ranks
    if group.need is Need.STATE:
        part = "all" if replicated else f"tp{rank}of{ranks}"
    elif replicated:
        part = f"headsallof{total}"
    elif total >= ranks:
        part = f"heads{first}-{(rank + 1) * total // ranks}of{total}"
    elif _kv_heads(config) == {total}:
        part = f"heads{first}-{first + 1}of{total}"
    else:
        part = f"tp{rank}of{ranks}"  # of a layer with more heads each rank may have its own
    stage = f"pp{get_pp_group().rank_in_group}of{config.parallel_config.pipeline_parallel_size}"
    return f"{stage}/{len(layers)}layers/{part}{group.name and f'/{group.name}'}"


_KV_HEADS = re.compile(r"kv_n?_?heads|n_head_kv|key_value_heads|attention_groups|query_group|heads_in_group")


def _kv_heads(config: VllmConfig) -> set[int]:
    """The numbers of KV heads that layers of a model, or of its drafts, may have: whatever its configuration calls
    them (vLLM knows one number, MiMo V2 and Step 3.5 have two, others a list)."""
    found = {config.model_config.get_total_num_kv_heads()}
    drafts = getattr(getattr(config, "speculative_config", None), "draft_model_config", None)
    if drafts is not None:
        found.add(drafts.get_total_num_kv_heads())
    text = getattr(config.model_config, "hf_text_config", None)
    waiting: list[tuple[str, Any]] = [("", text.to_dict() if text is not None else {})]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += ((name if _KV_HEADS.search(name) else str(key), inner) for key, inner in value.items())
        elif isinstance(value, list | tuple):
            waiting += ((name, inner) for inner in value)
        elif type(value) is int and _KV_HEADS.search(name):
            found.add(value)
    return found


def joint_layout(layouts: Mapping[str, str]) -> str:
    """One text for the layouts of all shards, or "" where workers order bytes differently. Stages of a pipeline may
    have layers of the same kinds in another sequence (layout.py).
    """
    different = set(layouts.values())
    if len(different) == 1:
        return f"{different.pop()}#{'|'.join(sorted(layouts))}"
    if len({layout.partition("@")[0] for layout in different}) != 1:
        return ""
    return "|".join(f"{layout}#{shard}" for shard, layout in sorted(layouts.items()))


def payload_layout(layout: str, per_chunk: int) -> str:
    """The layout of a worker's payloads of `per_chunk` blocks: of one block they are the same bytes both ways."""
    both = per_chunk == 1 and layout.endswith((f"@{IN_BLOCKS}", f".{IN_BLOCKS}"))
    return layout[: -len(IN_BLOCKS) - 1] if both else layout


def uncacheable(config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Why this model's KV cannot be cached exactly, or ""."""
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        return "it has no KV cache"
    for group in groups:
        for spec in each_spec(group.kv_cache_spec):
            if why := _unknown_spec(spec):
                return why
        if len({need_of(each) for each in each_spec(group.kv_cache_spec)}) > 1:
            return "layers of one of vLLM's KV cache groups need different parts of a prefix"
        if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
            return f"vLLM moves the KV of {group.layer_names[0]} itself"
    needs = [group.need for group in groups_of(kv_cache_config)]
    needs_all = len(groups) == 1 and needs == [Need.ALL]
    problem = _cannot_continue(config) or ("" if needs_all else _cannot_mix(config, len(groups), needs))
    if problem:
        return problem
    parallel = config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}; context parallel KV is not cached"
    return ""


_KNOWN_SPECS = {
    "FullAttentionSpec",
    "MLAAttentionSpec",
    "SlidingWindowSpec",
    "SlidingWindowMLASpec",
    "ChunkedLocalAttentionSpec",
    "MambaSpec",
}


def _unknown_spec(spec: Any) -> str:
    """Why layers of a spec cannot be cached, or "". Others add state of their own: sinks, hidden states, rings."""
    name = type(spec).__name__
    if name not in _KNOWN_SPECS:
        return f"its KV is of kind {name}; known are {', '.join(sorted(_KNOWN_SPECS))}"
    if getattr(spec, "non_causal", False):
        return "its attention is not causal: KV of a prefix depends on what follows"
    if getattr(spec, "bounded_replay", False):
        return "vLLM recomputes the last window of its prefixes"
    if name == "MambaSpec" and getattr(spec, "mamba_cache_mode", "none") != "align":
        return "no state is left at a block's end while prefix caching is off; turn it on (--enable-prefix-caching)"
    if getattr(spec, "num_speculative_blocks", 0):
        return "its states are kept for speculative decoding, where the last one is not confirmed"
    return ""


def _cannot_mix(config: VllmConfig, groups: int, needs: Sequence[Need]) -> str:
    """Why a model whose layers do not all need all of a prefix cannot be cached, or ""."""
    if not has_block_references():
        return f"it has {groups} KV cache groups, or windows: from vLLM 0.32 on a connector can keep their blocks"
    for name in ("use_replayssm", "use_kda_recoverssm"):
        if getattr(getattr(config, "cache_config", None), name, False):
            return f"{name} is set: what is kept of a state lags behind the tokens"
    if getattr(config, "speculative_config", None) is not None and Need.STATE in needs:
        return "speculative decoding with states: the one in which a step ends may be behind drafts that were wrong"
    return ""


def _cannot_continue(config: VllmConfig) -> str:
    """Why KV of a prefix must not be built upon, or "". Asks what vLLM asks before it turns its own prefix cache off
    by itself; where its answer is not kept, what it leaves behind: both ways to continue a context switched off, which
    no user needs to do.
    """
    model, cache = config.model_config, getattr(config, "cache_config", None)
    if not getattr(model, "is_prefix_caching_supported", True):
        return "vLLM supports no prefix caching for it"
    if getattr(cache, "calculate_kv_scales", False):
        return "calculate_kv_scales is set: the scales of its KV depend on the engine's first batch"
    if getattr(cache, "enable_prefix_caching", True):
        return ""
    if not getattr(config.scheduler_config, "enable_chunked_prefill", True):
        return (
            "prefix caching and chunked prefill are both off, as vLLM has them where attention cannot continue a "
            "context (MLA on a CPU without AMX); turn one on if you turned them off"
        )
    from vllm import envs

    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return "prefix caching is off and VLLM_BATCH_INVARIANT set; some attention is invariant without a prefix only"
    return ""
