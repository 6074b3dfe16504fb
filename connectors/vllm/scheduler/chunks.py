# SPDX-License-Identifier: Apache-2.0
"""How an engine's KV is cut into chunks and shards, once its workers have said how it lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loracache.connectors.vllm.common.geometry import chunk_blocks, joint_layout, payload_layout
from loracache.connectors.vllm.common.messages import ChunkBlocks, Facts, Load, Store
from loracache.connectors.vllm.scheduler.requests import RequestState
from loracache.keys import object_key

__all__ = ["Chunks"]

_SLOWEST_LAST = ("cpu", "disk", "redis")


@dataclass(frozen=True, slots=True)
class Chunks:
    """block_size: tokens of one of the engine's blocks. per_chunk: blocks of a chunk. shards: the workers', sorted.
    layout: theirs together. nbytes: of a chunk over all shards. drops_last_block: the last computed block is not
    confirmed (drafts write to it).
    """

    block_size: int
    per_chunk: int
    shards: tuple[str, ...]
    layout: str
    nbytes: int
    drops_last_block: bool

    @classmethod
    def of(cls, facts: Iterable[Facts], block_size: int, chunk_tokens: int, *, drops_last_block: bool) -> Chunks | None:
        """From what the workers say, one for each shard; None where they lay KV out differently."""
        by_shard = {fact.shard: fact for fact in facts}
        smallest = min(fact.block_bytes for fact in by_shard.values())
        per_chunk = chunk_blocks(smallest, block_size, chunk_tokens)
        layout = joint_layout({shard: payload_layout(fact.layout, per_chunk) for shard, fact in by_shard.items()})
        if not layout:
            return None
        nbytes = per_chunk * sum(fact.block_bytes for fact in by_shard.values())
        return cls(block_size, per_chunk, tuple(sorted(by_shard)), layout, nbytes, drops_last_block)

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        return self.per_chunk * self.block_size

    def object_keys(self, chunk_keys: Sequence[bytes]) -> list[bytes]:
        """Of every shard of these chunks."""
        return [object_key(key, shard) for key in chunk_keys for shard in self.shards]

    def slowest_of_shards(self, tiers: Sequence[str]) -> tuple[str, ...]:
        """One tier a chunk. tiers: one a shard, chunk after chunk."""
        count = len(self.shards)
        return tuple(max(tiers[at : at + count], key=_SLOWEST_LAST.index) for at in range(0, len(tiers), count))

    def loadable(self, state: RequestState, num_computed: int) -> int:
        """How many tokens beyond `num_computed` the hits of a request are good for; may be below 1."""
        tokens = len(state.hits) * self.tokens
        if self.drops_last_block:
            tokens -= self.block_size
        return min(tokens, int(state.request.num_tokens)) - num_computed

    def load(self, state: RequestState, block_ids: Sequence[int], tokens: int) -> tuple[Load, tuple[str, ...]]:
        """The load of `tokens` tokens behind the request's local ones into its blocks, and each chunk's tier."""
        first, end = state.local_tokens // self.block_size, (state.local_tokens + tokens) // self.block_size
        numbers = range(first // self.per_chunk, -(-end // self.per_chunk))
        chunks = []
        for number in numbers:
            whole = number * self.per_chunk
            start, stop = max(first, whole), min(end, whole + self.per_chunk)
            chunks.append(ChunkBlocks(state.chunk_keys[number], tuple(block_ids[start:stop]), start - whole))
        load = Load(state.request.request_id, tuple(chunks), state.adapter, self.per_chunk)
        return load, state.hits[numbers.start : numbers.stop]

    def store(self, state: RequestState, computed_tokens: int) -> Store | None:
        """The store of what is computed and confirmed: whole chunks beyond those that are held or offered already."""
        confirmed = min(computed_tokens, state.request.num_tokens, len(state.blocks) * self.block_size)
        if self.drops_last_block:
            confirmed -= self.block_size
        first = max(state.stored, len(state.hits))
        end = min(confirmed // self.tokens, len(state.chunk_keys))
        if end <= first or state.namespace is None or state.first_step is None:
            return None
        chunks = tuple(
            ChunkBlocks(key, tuple(state.blocks[number * self.per_chunk : (number + 1) * self.per_chunk]))
            for number, key in enumerate(state.chunk_keys[first:end], first)
        )
        parent = state.chunk_keys[first - 1] if first else b""
        return Store(state.request.request_id, state.namespace, parent, chunks, state.adapter, state.first_step)
