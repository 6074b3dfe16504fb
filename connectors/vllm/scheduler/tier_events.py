# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV events of our tiers, for routers that send a request where its prefix is: which of the blocks that this
engine has seen are held in "cpu", "disk" or "redis".

The daemon tells what enters and leaves its tiers, whoever did it; chunks of prompts that this engine never saw are
nobody's blocks here. Where layers differ in what they need of a prefix, a chunk counts as held where that of full
attention is. What Redis holds is known where a lookup found it. Requests with media or a salt are left out: no router
could tell their blocks from those of plain text. Where the daemon is lost, or tells faster than this engine listens,
everything is taken back, and told anew as it is found. Threading: the scheduler's loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from loracache.connectors.vllm.common.recent import Recent
from loracache.connectors.vllm.link.scheduler import SchedulerLink

if TYPE_CHECKING:
    from loracache.connectors.vllm.scheduler.chunks import Chunks
    from loracache.connectors.vllm.scheduler.requests import RequestState

__all__ = ["TierEvents"]

_MOST_CHUNKS = 65_536  # that an engine keeps in mind; the oldest are taken back


@dataclass(slots=True)
class _Chunk:
    """What an event says of a chunk's blocks. objects: keys, one a shard. shards: which of them each tier has."""

    objects: list[bytes]
    hashes: list[Any]
    parent: Any
    tokens: list[int]
    block_size: int
    lora_id: int | None
    lora_name: str | None
    shards: dict[str, set[int]] = field(default_factory=dict)

    def stored(self, tier: str) -> BlockStored:
        """They are held in a tier."""
        extra = [(self.lora_name,)] * len(self.hashes) if self.lora_name is not None else None
        return BlockStored(
            self.hashes, self.parent, self.tokens, self.block_size, self.lora_id, tier, self.lora_name, extra
        )


class TierEvents:
    """Events of one engine; none where it does not publish any (`wanted`)."""

    def __init__(self, link: SchedulerLink, wanted: bool) -> None:
        self._link = link
        self.wanted = wanted
        self._chunks: Recent[bytes, _Chunk] = Recent()
        self._objects: dict[bytes, tuple[bytes, int]] = {}  # object key -> (chunk key, number of the shard)
        self._shards = 0
        self._events: list[Any] = []

    def learn(self, state: RequestState, chunks: Chunks) -> None:
        """Learn which blocks a request's chunks are, as far as that is new, and where its lookup found them."""
        request = state.request
        if not self.wanted or request.cache_salt or request.mm_features or chunks.chain is None:
            return
        hashes = request.block_hashes
        if len(hashes) != request.num_tokens // chunks.block_tokens:
            return  # they are of other pieces than blocks
        self._shards = len(chunks.chain.shards)
        for number, key in enumerate(state.chunk_keys[state.told :], state.told):
            known = self._chunks.used(key) or self._new(state, chunks, number)
            if number < len(state.hits):
                for shard in range(self._shards):
                    self._enter(known, state.hits[number], shard)
        state.told = len(state.chunk_keys)
        self._forget_oldest(_MOST_CHUNKS)

    def take(self) -> list[Any]:
        """What has changed since the last call."""
        told = self._link.take_events() if self.wanted else None
        if told is not None:
            lost, changes = told
            if lost:
                self._forget_oldest(0)
            self._follow(changes)
        events, self._events = self._events, []
        return events

    def _follow(self, changes: Iterable[tuple[str, str, bytes]]) -> None:
        meanings = {"admitted": self._enter, "evicted": self._leave}
        for what, tier, key in changes:
            chunk, shard = self._objects.get(key, (b"", 0))
            known, change = self._chunks.get(chunk), meanings.get(what)
            if known is not None and change is not None:
                change(known, tier, shard)

    def _new(self, state: RequestState, chunks: Chunks, number: int) -> _Chunk:
        request, key = state.request, state.chunk_keys[number]
        per_chunk = chunks.tokens // chunks.block_tokens
        first, end = number * per_chunk, (number + 1) * per_chunk
        hashes = [maybe_convert_block_hash(each) for each in request.block_hashes[max(0, first - 1) : end]]
        parent = hashes.pop(0) if first else None
        adapter = request.lora_request
        objects = chunks.chain_keys([key])
        self._objects.update((each, (key, shard)) for shard, each in enumerate(objects))
        known = self._chunks[key] = _Chunk(
            objects,
            hashes,
            parent,
            list(request.all_token_ids[number * chunks.tokens : (number + 1) * chunks.tokens]),
            chunks.block_tokens,
            adapter.lora_int_id if adapter is not None else None,
            adapter.lora_name if adapter is not None else None,
        )
        return known

    def _enter(self, known: _Chunk, tier: str, shard: int) -> None:
        shards = known.shards.setdefault(tier, set())
        if shard not in shards:
            shards.add(shard)
            if len(shards) == self._shards:
                self._events.append(known.stored(tier))

    def _leave(self, known: _Chunk, tier: str, shard: int) -> None:
        shards = known.shards.get(tier, set())
        if shard in shards:
            if len(shards) == self._shards:
                self._events.append(BlockRemoved(block_hashes=known.hashes, medium=tier))
            shards.discard(shard)

    def _forget_oldest(self, most: int) -> None:
        """Take back what is told of the oldest chunks, but for `most` of them."""
        for known in self._chunks.drop_oldest(most=most).values():
            for tier, shards in known.shards.items():
                if len(shards) == self._shards:
                    self._events.append(BlockRemoved(block_hashes=known.hashes, medium=tier))
            for each in known.objects:
                del self._objects[each]
