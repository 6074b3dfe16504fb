# SPDX-License-Identifier: Apache-2.0
"""How an engine's KV is cut into chunks, groups and shards, once its workers have said how it lies.

Where layers differ in what they need of a prefix (groups.py), a chunk is several objects: one of the layers that need
all of it, in the chain, and others beside it. What is planned then lists a chunk's object of the chain first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loracache.connectors.vllm.common.geometry import chunk_blocks, joint_layout, payload_layout
from loracache.connectors.vllm.common.groups import KVGroup, block_unit
from loracache.connectors.vllm.common.messages import NOT_LOADED, ChunkBlocks, Facts, Load, Store
from loracache.connectors.vllm.scheduler.requests import RequestState
from loracache.groups import Group, Need, columns, furthest
from loracache.keys import object_key

__all__ = ["Chunks", "Part", "loaded_into"]

_SLOWEST_LAST = ("cpu", "disk", "redis")


@dataclass(frozen=True, slots=True)
class Part:
    """A group's part of every chunk. shards: the workers', sorted. nbytes: of its objects of one chunk. as_group: what
    is known of it outside the engine."""

    group: KVGroup
    shards: tuple[str, ...]
    nbytes: int
    as_group: Group = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "as_group", Group(self.group.need, self.group.tokens, self.shards))


@dataclass(frozen=True, slots=True)
class Chunks:
    """tokens: of a chunk. chain: the part that needs all of a prefix; None where no layer does. beside: the others.
    layout: all workers' together. drops_last_block: the last computed block is not confirmed (drafts write to it); of
    a hit the last block is left, or where groups differ the last chunk, so that all end at a boundary.
    """

    tokens: int
    chain: Part | None
    beside: tuple[Part, ...]
    layout: str
    drops_last_block: bool

    @classmethod
    def of(
        cls, facts: Iterable[Facts], groups: Sequence[KVGroup], chunk_tokens: int, *, drops_last_block: bool
    ) -> Chunks | None:
        """From what the workers say; None where they lay KV out differently."""
        facts = list(facts)
        shards = [  # a stage of a pipeline may have no layer of a group
            {fact.groups[place].shard: fact.groups[place] for fact in facts if fact.groups[place].shard}
            for place in range(len(groups))
        ]
        unit = block_unit(groups)
        if any(group.need is Need.STATE for group in groups) and not chunk_tokens:
            tokens = unit  # a state stands at the end of its block; a larger chunk would leave some out
        else:
            blocks = [group.counts(group.tail(unit)) for group in groups]
            smallest = min(
                sum(_nbytes(each.block_bytes, count) for each, count in zip(fact.groups, blocks, strict=True))
                for fact in facts
            )
            tokens = unit * chunk_blocks(smallest, unit, chunk_tokens)
        parts, layouts = [], []
        for group, by_shard in zip(groups, shards, strict=True):
            counts = group.counts(group.tail(tokens))
            laid_out = {shard: payload_layout(fact.layout, max(counts)) for shard, fact in by_shard.items()}
            layouts.append(joint_layout(laid_out))
            nbytes = sum(_nbytes(fact.block_bytes, counts) for fact in by_shard.values())
            parts.append(Part(group, tuple(sorted(by_shard)), nbytes))
        if not all(layouts):
            return None
        chain = parts[0] if groups[0].need is Need.ALL else None
        layout = layouts[0]
        if groups[0].name:
            texts = (f"{group.name}={text.partition('#')[0]}" for group, text in zip(groups, layouts, strict=True))
            layout = ";".join(texts) + (f"#{'|'.join(chain.shards)}" if chain is not None else "")
        return cls(tokens, chain, tuple(parts[chain is not None :]), layout, drops_last_block)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Those that do not need all of a prefix."""
        return tuple(part.as_group for part in self.beside)

    @property
    def nbytes(self) -> int:
        """Of a chunk over all groups and shards."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of all groups, in the order of the plans."""
        return (self.chain, *self.beside) if self.chain is not None else self.beside

    @property
    def width(self) -> int:
        """Objects of a chunk."""
        return sum(len(part.shards) for part in self.parts)

    @property
    def block_tokens(self) -> int:
        """Of a block of the first group."""
        return self.parts[0].group.members[0].block_tokens

    def chain_keys(self, chunk_keys: Sequence[bytes]) -> list[bytes]:
        """Of the objects of these chunks in the chain, a chunk's shards side by side."""
        return _keys(chunk_keys, self.chain.shards) if self.chain is not None else []

    def beside_keys(self, chunk_keys: Sequence[bytes]) -> list[bytes]:
        """Of those beside it, a chunk's side by side."""
        return _keys(chunk_keys, [shard for part in self.beside for shard in part.shards]) if self.beside else []

    def object_keys(self, chunk_keys: Sequence[bytes]) -> list[bytes]:
        """Of all objects of these chunks, parents first."""
        return _keys(chunk_keys, [shard for part in self.parts for shard in part.shards])

    def hit_keys(self, state: RequestState, *tiers: str) -> list[bytes]:
        """Of the objects that a request's hit needs and that are in one of `tiers`."""
        keys: list[bytes] = []
        hits = len(state.hits)
        if self.chain is not None:
            found = [key for key, tier in zip(state.chunk_keys, state.hits, strict=False) if tier in tiers]
            keys += _keys(found, self.chain.shards)
        for part, column in self._columns(state):
            needed = range(part.as_group.first(hits, self.tokens), hits)
            keys += _keys([state.chunk_keys[number] for number in needed if column[number] in tiers], part.shards)
        return keys

    def found(self, state: RequestState, tiers: Sequence[str], beside: Sequence[str]) -> None:
        """Take what a request's lookup found: the tiers of the leading objects in the chain, and of each beside it, ""
        where it is nowhere."""
        width = sum(len(part.shards) for part in self.beside)
        chunks = len(beside) // width if width else 0
        parts_of = columns([part.as_group for part in self.beside], beside)
        if self.chain is None:
            leading: tuple[str, ...] = ("cpu",) * chunks
        else:
            count = len(self.chain.shards)
            leading = tuple(_slowest(tiers[row : row + count]) for row in range(0, len(tiers), count))
        state.beside = tuple(tuple("" if "" in row else _slowest(row) for row in parts) for parts in parts_of)
        state.answer(leading)
        state.chain = len(leading) if self.chain is not None else 0
        reach = self.resumable(state, len(leading))
        if self.beside and self.drops_last_block and not self._goes_on(state, reach):
            reach = self.resumable(state, reach - 1)
        state.hits = leading[:reach]

    def was_found(self, state: RequestState, place: int, number: int) -> bool:
        """Whether a lookup found the object of a chunk and of the group at `place`, which is beside the chain."""
        column = state.beside[place - len(self.parts)] if state.beside else ()
        return number < len(column) and bool(column[number])

    def resumable(self, state: RequestState, most: int) -> int:
        """Behind how many of the first `most` chunks of a request the engine can go on, with what was found."""
        if not self.beside:
            return most
        # The last token is computed in any case, and no state, nor what left a window, comes back for it.
        most = min(most, (int(state.request.num_tokens) - 1) // self.tokens)
        held = [(part.as_group, [bool(tier) for tier in column]) for part, column in self._columns(state)]
        return furthest(held, self.tokens, most)

    def junction(self, state: RequestState) -> int:
        """The token behind which a request's prompt leaves what is held of the chain, where states lack for a hit so
        far: others with the same beginning would go on from there. 0: nowhere."""
        chunks = min(state.chain, (int(state.request.num_prompt_tokens) - 1) // self.tokens)
        lacking = chunks > len(state.hits) and any(part.group.need is Need.STATE for part in self.beside)
        return chunks * self.tokens if lacking else 0

    def loadable(self, state: RequestState, num_computed: int) -> int:
        """How many tokens beyond `num_computed` the hits of a request are good for; may be below 1."""
        tokens = len(state.hits) * self.tokens
        if self.drops_last_block and not self.beside:
            tokens -= self.block_tokens
        return min(tokens, int(state.request.num_tokens)) - num_computed

    def load(self, state: RequestState, tables: Sequence[Sequence[int]], tokens: int) -> tuple[Load, tuple[str, ...]]:
        """The load of `tokens` tokens behind the request's local ones into its blocks, and the tier of each object.
        What is local is so for every group: vLLM's own hits end where all of them have one. tables: blocks of each of
        vLLM's groups, NOT_LOADED where none is loaded into. A load of nothing where there are not the blocks that it
        needs: it cannot come.
        """
        first, end = state.local_tokens, state.local_tokens + tokens
        last = -(-end // self.tokens)
        if not self.beside and len(self.parts[0].group.members) == 1:
            return self._plain_load(state, tables, range(first // self.tokens, last), first, end)
        chunks: list[ChunkBlocks] = []
        tiers: list[str] = []
        parts = list(enumerate(self.parts))
        for number in range(first // self.tokens, last):
            whole = number * self.tokens
            for place, part in parts:
                is_chain = part is self.chain
                if is_chain:
                    begin = max(first, whole)
                elif number < part.as_group.first(last, self.tokens):
                    continue
                else:
                    begin = whole + self.tokens - part.group.tail(self.tokens)
                blocks = _blocks(part.group, tables, begin, min(end, whole + self.tokens), may_skip=not is_chain)
                if blocks is None:
                    return Load(state.request.request_id, (), state.adapter, self.tokens), ()
                offset, ids = blocks
                if ids:
                    chunks.append(ChunkBlocks(state.chunk_keys[number], ids, begin + offset - whole, place))
                    tiers.append(state.hits[number] if is_chain else state.beside[place - len(parts)][number])
        return Load(state.request.request_id, tuple(chunks), state.adapter, self.tokens), tuple(tiers)

    def _plain_load(
        self, state: RequestState, tables: Sequence[Sequence[int]], numbers: range, first: int, end: int
    ) -> tuple[Load, tuple[str, ...]]:
        """The same for most models, of one object a chunk and one table: within the engine's loop, for many chunks."""
        (member,) = self.parts[0].group.members
        size, table, tokens, keys = member.block_tokens, tables[member.index], self.tokens, state.chunk_keys
        chunks = []
        for number in numbers:
            whole = number * tokens
            begin, stop = max(first, whole), min(end, whole + tokens)
            chunks.append(ChunkBlocks(keys[number], tuple(table[begin // size : -(-stop // size)]), begin - whole))
        load = Load(state.request.request_id, tuple(chunks), state.adapter, tokens)
        return load, tuple(state.hits[numbers.start : numbers.stop])

    def store(
        self,
        state: RequestState,
        computed_tokens: int,
        kept: Mapping[int, Mapping[int, tuple[int, ...]]],
        number: int = 0,
    ) -> Store | None:
        """The store of what is computed and confirmed, which counts as offered: whole chunks beyond those that are held
        or offered already. kept: by chunk and group, the blocks of what is beside the chain. number: the store's."""
        confirmed = min(computed_tokens, int(state.request.num_tokens))
        if self.chain is not None:
            members = self.chain.group.members
            confirmed = min(confirmed, *(len(state.blocks[each.index]) * each.block_tokens for each in members))
        if self.drops_last_block:
            confirmed -= self.block_tokens
        first = max(state.stored, len(state.hits))
        end = min(min(confirmed, state.wishes.stored_tokens) // self.tokens, len(state.chunk_keys))
        if end <= first or state.namespace is None or state.first_step is None:
            return None
        chunks = []
        for chunk, key in enumerate(state.chunk_keys[first:end], first):
            whole = chunk * self.tokens
            if self.chain is not None:
                blocks = _blocks(self.chain.group, state.blocks, whole, whole + self.tokens)
                chunks.append(ChunkBlocks(key, blocks[1] if blocks is not None else ()))
            for place, ids in sorted(kept.get(chunk, {}).items()):
                tail = self.parts[place].group.tail(self.tokens)
                chunks.append(ChunkBlocks(key, ids, self.tokens - tail, place))
        state.offered(end - first)
        if not chunks:
            return None
        parent = state.chunk_keys[first - 1] if first else b""
        return Store(
            state.request.request_id, state.namespace, parent, tuple(chunks), state.adapter, state.first_step, number
        )

    def _goes_on(self, state: RequestState, chunks: int) -> bool:
        """Whether what was found goes on behind so many chunks: else the token that follows is not known to be that
        with which drafts wrote the KV of the last one's end."""
        if self.chain is not None:
            return chunks < state.chain
        return any(chunks < len(column) and column[chunks] for column in state.beside)

    def _columns(self, state: RequestState) -> list[tuple[Part, tuple[str, ...]]]:
        return list(zip(self.beside, state.beside, strict=False))


def loaded_into(blocks: Any) -> list[list[int]]:
    """Tables of the blocks that a load writes to: those that are neither vLLM's "no block" nor of its prefix cache."""
    return [
        [NOT_LOADED if block.is_null or block.block_hash is not None else block.block_id for block in table]
        for table in blocks.blocks
    ]


def _blocks(
    group: KVGroup, tables: Sequence[Sequence[int]], begin: int, end: int, *, may_skip: bool = False
) -> tuple[int, tuple[int, ...]] | None:
    """(tokens that are left out at the beginning, the blocks of all members) from token `begin` to `end`; None where
    there is one too few. may_skip: the engine may have the first ones, or need none there. What is left out is whole
    blocks of each member; what a member with smaller blocks needs none of beyond that is NOT_LOADED."""
    if len(group.members) == 1 and not may_skip:  # of most models, for each chunk in the engine's loop
        (member,) = group.members
        found = tuple(tables[member.index][begin // member.block_tokens : -(-end // member.block_tokens)])
        return None if NOT_LOADED in found else (0, found)
    runs = []
    for member in group.members:
        size, table = member.block_tokens, tables[member.index]
        runs.append(list(table[begin // size : -(-end // size)]))
    skipped = 0
    if may_skip:
        leading = [next((at for at, block in enumerate(run) if block != NOT_LOADED), len(run)) for run in runs]
        left_out = [count * member.block_tokens for count, member in zip(leading, group.members, strict=True)]
        unit = block_unit([group])
        skipped = min(left_out) // unit * unit
        if max(left_out) >= skipped + unit:
            return None
        for member, run, count in zip(group.members, runs, leading, strict=True):
            if NOT_LOADED in run[count:]:
                return None
            del run[: skipped // member.block_tokens]
    flat = tuple(block for run in runs for block in run)
    return None if NOT_LOADED in flat and not may_skip else (skipped, flat)


def _keys(chunk_keys: Sequence[bytes], shards: Sequence[str]) -> list[bytes]:
    return [object_key(key, shard) for key in chunk_keys for shard in shards]


def _slowest(tiers: Sequence[str]) -> str:
    return max(tiers, key=_SLOWEST_LAST.index)


def _nbytes(block_bytes: Sequence[int], counts: Sequence[int]) -> int:
    return sum(size * count for size, count in zip(block_bytes, counts, strict=True))
