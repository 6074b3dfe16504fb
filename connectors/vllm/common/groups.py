# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache groups, joined by what their layers need of a prefix. Pure functions of vLLM's configuration.

vLLM cuts layers of one kind into several groups of equally many, so that all groups can share one pool of blocks. What
they need of a prefix is the same, so they are kept together: one object a chunk for all layers of full attention, one
for all with the same window, one for all that keep a state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loracache.groups import Need

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["KVGroup", "Member", "block_unit", "each_spec", "groups_of", "need_of"]


@dataclass(frozen=True, slots=True)
class Member:
    """One of vLLM's KV cache groups. index: its place among them, and in every table of blocks. block_tokens: tokens
    of one of its blocks. layers: their names."""

    index: int
    block_tokens: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KVGroup:
    """vLLM's groups whose layers need the same of a prefix, in their order. tokens: of the window or the span, else 0.
    name: for the names of shards and layouts; "" where all layers need all of a prefix and are one group of vLLM's.
    """

    need: Need
    tokens: int
    members: tuple[Member, ...]
    name: str = ""

    def tail(self, chunk_tokens: int) -> int:
        """Tokens at the end of a chunk that an object of the group holds: of the others no prefix that ends with this
        chunk, or behind it, needs any."""
        if self.need is Need.STATE:
            return max(member.block_tokens for member in self.members)
        if self.need is Need.WINDOW:
            block = math.lcm(*(member.block_tokens for member in self.members))
            return min(chunk_tokens, -(-self.tokens // block) * block)
        return chunk_tokens

    def counts(self, tokens: int) -> list[int]:
        """Blocks of each member that so many tokens are."""
        return [tokens // member.block_tokens for member in self.members]


def groups_of(config: KVCacheConfig) -> tuple[KVGroup, ...]:
    """The groups of a model, those that need all of a prefix first. `uncacheable` says whether they can be cached."""
    kinds: dict[tuple[Need, int], list[Member]] = {}
    specs: dict[tuple[Need, int], list[Any]] = {}
    for index, group in enumerate(config.kv_cache_groups):
        spec = group.kv_cache_spec
        kind = need_of(each_spec(spec)[0])
        kinds.setdefault(kind, []).append(Member(index, spec.block_size, tuple(group.layer_names)))
        specs.setdefault(kind, []).append(spec)
    order = sorted(kinds, key=lambda kind: (list(Need).index(kind[0]), kind[1]))
    if len(config.kv_cache_groups) == 1 and order[0][0] is Need.ALL:
        return (KVGroup(*order[0], tuple(kinds[order[0]])),)
    return tuple(
        KVGroup(*kind, tuple(kinds[kind]), f"{kind[0]}{kind[1] or ''}-{_digest(kinds[kind], specs[kind])}")
        for kind in order
    )


def block_unit(groups: Iterable[KVGroup]) -> int:
    """The tokens that every chunk is a multiple of: whole blocks of each member."""
    return math.lcm(*(member.block_tokens for group in groups for member in group.members))


def need_of(spec: Any) -> tuple[Need, int]:
    """What a layer of this spec needs of a prefix, and the tokens of its window or span."""
    name = type(spec).__name__
    if name.startswith("SlidingWindow"):
        return Need.WINDOW, spec.sliding_window - 1 + getattr(spec, "extra_retained_tokens", 0)
    if name == "ChunkedLocalAttentionSpec":
        return Need.SPAN, spec.attention_chunk_size
    if name == "MambaSpec":
        return Need.STATE, 0
    return Need.ALL, 0


def each_spec(spec: Any) -> Sequence[Any]:
    """The specs of single layers in one of a group."""
    inner = getattr(spec, "kv_cache_specs", None)
    return list(inner.values()) if inner else [spec]


def _digest(members: Sequence[Member], specs: Sequence[Any]) -> str:
    """8 hexadecimal digits: of which layers they are and what a block of them is. How its bytes lie stands in the
    namespace."""
    told = [
        [member.block_tokens, member.layers, *((type(each).__name__, each.page_size_bytes) for each in each_spec(spec))]
        for member, spec in zip(members, specs, strict=True)
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8]
