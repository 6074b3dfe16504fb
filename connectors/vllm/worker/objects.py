# SPDX-License-Identifier: Apache-2.0
"""A worker's objects: which blocks of which layers a chunk's object of a group is, and where in its payload they lie.

An object holds what its group's members have of a chunk, one behind another, each as rows (layers, blocks, bytes). One
of layers that need a window, or a state, holds no more of the chunk than its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loracache.connectors.vllm.common.geometry import shard_name
from loracache.connectors.vllm.common.groups import KVGroup, Member, each_spec, groups_of
from loracache.connectors.vllm.common.messages import NOT_LOADED, ChunkBlocks, GroupFacts, Load
from loracache.connectors.vllm.worker.layout import KVLayout, joint_order, lies_at, platform_name, read_layout
from loracache.errors import UsageError
from loracache.groups import Need
from loracache.kernels.page_copy import Move
from loracache.keys import object_key

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["GroupObjects", "Registered", "bytes_but", "cut", "read_groups"]


class GroupObjects:
    """A worker's objects of one group. shard: which part of the group they are. block_bytes: of a block of each member,
    0 where this worker has none of its layers. rows: the copier's rows of each member; None: all there are.
    """

    def __init__(
        self, group: KVGroup, shard: str, block_bytes: Sequence[int], rows: Sequence[slice | None] | None = None
    ) -> None:
        self.group = group
        self.shard = shard
        self.block_bytes = tuple(block_bytes)
        self._rows = tuple(rows or [None] * len(self.block_bytes))
        # The fewest tokens that are whole blocks of each member, and what they are in an object.
        self._run = math.lcm(*(member.block_tokens for member in group.members))
        self._counts = group.counts(self._run)
        self._blocks = sum(self._counts)
        self._bytes = sum(count * size for count, size in zip(self._counts, self.block_bytes, strict=True))
        self._tokens = self._begin = self._of = 0  # of a chunk, where the object begins in it, and runs that it is

    def key(self, chunk_key: bytes) -> bytes:
        """Of the object of a chunk."""
        return object_key(chunk_key, self.shard)

    def nbytes(self, blocks: int) -> int:
        """Bytes of an object of so many blocks, all members' together; 0 where this worker has none of the group."""
        return blocks // self._blocks * self._bytes

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """Bytes of the object of a chunk of so many tokens."""
        return self.group.tail(chunk_tokens) // self._run * self._bytes

    def whole(self, chunk: ChunkBlocks, payload: Sequence[memoryview]) -> list[Move]:
        """The moves between an object's payload and all its blocks. Raises ValueError where these are not whole runs of
        every member's."""
        return self._moves(chunk, payload, 0, len(chunk.blocks) // self._blocks)

    def part(self, chunk: ChunkBlocks, payload: Sequence[memoryview], chunk_tokens: int) -> list[Move]:
        """The same with those blocks of it that `chunk` names, in a chunk of so many tokens. Called by one thread."""
        if chunk_tokens != self._tokens:
            tail = self.group.tail(chunk_tokens)
            self._tokens, self._begin, self._of = chunk_tokens, chunk_tokens - tail, tail // self._run
        first, rest = divmod(chunk.first - self._begin, self._run)
        if rest:
            raise ValueError(f"token {chunk.first} of a chunk of {chunk_tokens} begins no block")
        return self._moves(chunk, payload, first, self._of)

    def _moves(self, chunk: ChunkBlocks, payload: Sequence[memoryview], first: int, of: int) -> list[Move]:
        """first, of: in runs."""
        runs, rest = divmod(len(chunk.blocks), self._blocks)
        if rest or not 0 <= first <= first + runs <= of:
            raise ValueError(f"{len(chunk.blocks)} blocks from token {chunk.first} on are no part of an object")
        if len(self._counts) == 1:
            return [Move(chunk.blocks, payload, first, of, self._rows[0])]  # a run is a block
        moves, begin, offset = [], 0, 0
        for count, size, rows in zip(self._counts, self.block_bytes, self._rows, strict=True):
            nbytes = of * count * size
            blocks = chunk.blocks[begin : begin + runs * count]
            left_out = sum(block == NOT_LOADED for block in blocks)  # the first ones
            if size and left_out < len(blocks):
                part = cut(payload, offset, nbytes)
                moves.append(Move(blocks[left_out:], part, first * count + left_out, of * count, rows))
            begin += runs * count
            offset += nbytes
        return moves


def bytes_but(load: Load, failed: Iterable[int], objects: Sequence[GroupObjects]) -> int:
    """Bytes of a load without the chunks that lie in blocks that failed."""
    gone = set(failed)
    came = (chunk for chunk in load.chunks if gone.isdisjoint(chunk.blocks))
    return sum(objects[chunk.group].nbytes(len(chunk.blocks)) for chunk in came)


def cut(payload: Sequence[memoryview], offset: int, nbytes: int) -> list[memoryview]:
    """Some bytes of a payload."""
    parts = []
    for buffer in payload:
        part = buffer[offset : offset + nbytes] if offset < len(buffer) else None
        offset = max(0, offset - len(buffer))
        if part:
            parts.append(part)
            nbytes -= len(part)
    return parts


@dataclass(frozen=True, slots=True)
class Registered:
    """What an engine registered. rows: of all members of all groups, for copiers. objects, facts: of each group."""

    rows: tuple[torch.Tensor, ...]
    objects: tuple[GroupObjects, ...]
    facts: tuple[GroupFacts, ...]


def read_groups(config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, Any]) -> Registered:
    """The groups of the layers that an engine registered. Raises UsageError where some cannot be moved."""
    groups = groups_of(kv_cache_config)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if any(group.name for group in groups):
        _check_names(config, groups, kv_caches)
    rows: list[torch.Tensor] = []
    objects, facts = [], []
    for group in groups:
        own: list[slice | None] = []
        layouts: list[KVLayout | None] = []
        for member in group.members:
            layout = _layout(group, member, specs[member.index], kv_cache_config.num_blocks, kv_caches)
            begin = len(rows)
            rows += layout.rows if layout is not None else ()
            own.append(slice(begin, len(rows)) if group.name else None)
            layouts.append(layout)
        names = [name for layout in layouts if layout is not None for name in layout.names]
        block_bytes = tuple(layout.block_bytes if layout is not None else 0 for layout in layouts)
        shard = shard_name(config, names, group, replicated=_replicated(group, specs)) if names else ""
        objects.append(GroupObjects(group, shard, block_bytes, own))
        facts.append(GroupFacts(shard, _order(config, group, specs, layouts), block_bytes))
    if not rows:
        raise UsageError("the engine registered no KV cache")
    return Registered(tuple(rows), tuple(objects), tuple(facts))


def _layout(
    group: KVGroup, member: Member, spec: Any, num_blocks: int, kv_caches: Mapping[str, Any]
) -> KVLayout | None:
    """None where this worker has none of the layers. Where a group is all there is, so is what is registered."""
    own = {name: each for name, each in kv_caches.items() if name in member.layers} if group.name else kv_caches
    states = {}
    if group.need is Need.STATE:
        by_name = getattr(spec, "kv_cache_specs", {})
        states = {name: by_name.get(name, spec) for name in own}
    return read_layout(own, num_blocks, states) if own or not group.name else None


def _check_names(config: VllmConfig, groups: Sequence[KVGroup], kv_caches: Mapping[str, Any]) -> None:
    """Every layer that is registered is in a group or shares the KV of one that is, and every layer of a group is
    registered, here or at another stage."""
    listed = {name for group in groups for member in group.members for name in member.layers}
    known = {lies_at(each) for name, each in kv_caches.items() if name in listed}
    for name, each in kv_caches.items():
        if name not in listed and lies_at(each) not in known:
            raise UsageError(f"the KV cache of {name} is in no group")
    missing = sorted(listed - kv_caches.keys())
    if missing and config.parallel_config.pipeline_parallel_size == 1:
        raise UsageError(f"the engine registered no KV cache for {missing[0]}")


def _replicated(group: KVGroup, specs: Sequence[Any]) -> bool:
    """Whether all ranks hold the same, whatever the number of heads: MLA, and some states."""
    found = [each for one in group.members for each in each_spec(specs[one.index])]
    if group.need is Need.STATE:
        return all(getattr(each, "tp_replicated", False) for each in found)
    return all("MLA" in type(each).__name__ for each in found)


def _order(config: VllmConfig, group: KVGroup, specs: Sequence[Any], layouts: Sequence[KVLayout | None]) -> str:
    """How the bytes of a group's objects lie, for the namespace: one text where all its members' blocks lie alike."""
    orders = []
    for member, layout in zip(group.members, layouts, strict=True):
        if layout is not None:
            spec = each_spec(specs[member.index])[0] if group.name else specs[member.index]
            platform = platform_name(config, None if group.need is Need.STATE else spec)
            orders.append(f"{platform}/{layout.order}")
    return joint_order(orders) if orders else ""
