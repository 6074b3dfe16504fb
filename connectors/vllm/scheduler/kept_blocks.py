# SPDX-License-Identifier: Apache-2.0
"""Blocks that vLLM would free before they are stored: those that leave a window, and states that the next block
replaces.

In the step that completes a chunk its blocks beside the chain are all there; a step later some may be another
request's. So a reference is taken on them in that step, as vLLM's own prefix cache takes them, and given back when
their store is over on all workers. vLLM knows that they are free soon, and waits for them before it preempts. Of the
engine's blocks at most a share is kept at a time; what is beyond is not stored, and a later request computes it.
Threading: the scheduler's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.scheduler.chunks import Chunks, Part
from loracache.groups import Need

if TYPE_CHECKING:
    from loracache.connectors.vllm.scheduler.requests import RequestState

__all__ = ["KeptBlocks"]

Tables = Callable[[], Sequence[Sequence[int]]]
_NO_BLOCK = 0  # vLLM's null block
_SHARE = 4  # of the engine's blocks are kept at a time at most
_WINDOWS_SHARE = 4  # of the daemon's memory is what one prompt's windows may take; of a longer one some are stored


class KeptBlocks:
    """Of one engine. pool: vLLM's BlockPool, once there is one. workers: how many tell that a store is over."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.workers = 1
        self.holders: dict[str, RequestState] = {}  # requests of which something is kept that is in no store
        self._refused = 0
        self._stores: dict[int, tuple[str, list[Any], int]] = {}  # number -> (request, blocks, workers to come)
        self._count = 0
        self._next = 1

    def keep(self, state: RequestState, chunks: Chunks, end: int, tables: Tables, arena_bytes: int) -> None:
        """Keep what is beside the chain in the chunks that this step completes: it computes a request's tokens from
        where it has come up to `end`. tables: its blocks in this step, asked for where they are needed."""
        first = int(state.request.num_computed_tokens) // chunks.tokens
        if self.pool is None or end // chunks.tokens <= first:
            return
        found = tables()
        # The last first: where there is no room for all, it is they behind which one goes on.
        for number in reversed(range(max(first, len(state.hits)), end // chunks.tokens)):
            for place, part in enumerate(chunks.parts):
                if part is chunks.chain or chunks.was_found(state, place, number):
                    continue
                if place in state.kept.get(number, {}):  # drafts completed it before, and were wrong
                    continue
                if _is_stored(part, number, state, chunks, arena_bytes):
                    self._take(state, number, place, _blocks(part, chunks, found, number, end))

    def keep_states(self, state: RequestState, chunks: Chunks, handed: Iterable[tuple[int, int, int]]) -> None:
        """Keep the states that vLLM hands over, as (its group, block, token behind which it stands): those in the
        middle of a step are in no table of blocks."""
        by_boundary: dict[int, dict[int, int]] = {}
        for index, block, boundary in handed if self.pool is not None else ():
            if boundary > state.wishes.stored_tokens:
                continue
            by_boundary.setdefault(boundary, {})[index] = block
        for boundary, found in by_boundary.items():
            number, rest = boundary // chunks.tokens - 1, boundary % chunks.tokens
            for place, part in enumerate(chunks.parts):
                members = part.group.members
                wanted = part.group.need is Need.STATE and not rest and number >= len(state.hits)
                if wanted and place not in state.kept.get(number, {}) and all(each.index in found for each in members):
                    self._take(state, number, place, [found[each.index] for each in members])

    @property
    def pending(self) -> bool:
        """Whether blocks are kept."""
        return self._count > 0

    def block_ids(self, state: RequestState) -> Mapping[int, Mapping[int, tuple[int, ...]]]:
        """The numbers of a request's kept blocks, by chunk and group."""
        return {
            number: {place: tuple(block.block_id for block in blocks) for place, blocks in by_place.items()}
            for number, by_place in state.kept.items()
        }

    @property
    def next_store(self) -> int:
        """The number of the next store."""
        return self._next

    def storing(self, state: RequestState, chunks: range, *, planned: bool) -> None:
        """These chunks have been offered, in store `next_store` where one is `planned`: their blocks are kept until it
        is over."""
        blocks = [block for number in chunks for kept in state.kept.pop(number, {}).values() for block in kept]
        if not state.kept:
            self.holders.pop(state.request.request_id, None)
        if planned:
            self._stores[self._next] = (state.request.request_id, blocks, self.workers)
            self._next += 1
        else:
            self._release(blocks)

    def over(self, stored: Mapping[int, int]) -> None:
        """Stores are over on so many more workers."""
        for number, workers in stored.items():
            request_id, blocks, left = self._stores.pop(number, ("", [], 0))
            if left > workers:
                self._stores[number] = (request_id, blocks, left - workers)
            else:
                self._release(blocks)

    def release(self, state: RequestState) -> None:
        """What of a request is kept and in no store will be in none."""
        for kept in state.kept.values():
            for blocks in kept.values():
                self._release(blocks)
        state.kept.clear()
        self.holders.pop(state.request.request_id, None)

    def release_all(self, states: Iterable[RequestState]) -> set[str]:
        """Give back every block; answers the requests whose stores must be over before one is written."""
        for state in states:
            self.release(state)
        stores, self._stores = self._stores, {}
        for _, blocks, _ in stores.values():
            self._release(blocks)
        return {request_id for request_id, _, _ in stores.values()}

    def take_refused(self) -> int:
        """Objects that are not stored since too many blocks are kept already, since the last call."""
        refused, self._refused = self._refused, 0
        return refused

    # -- inside ----------

    def _take(self, state: RequestState, number: int, place: int, blocks: Sequence[int]) -> None:
        if self._count + len(blocks) > self.pool.num_gpu_blocks // _SHARE:
            self._refused += 1
        elif blocks:
            taken = [self.pool.blocks[block] for block in blocks]
            self.pool.touch(taken)
            self._count += len(taken)
            state.kept.setdefault(number, {})[place] = tuple(taken)
            self.holders[state.request.request_id] = state

    def _release(self, blocks: Sequence[Any]) -> None:
        if blocks:
            self._count -= len(blocks)
            self.pool.free_blocks(reversed(blocks))


def _blocks(part: Part, chunks: Chunks, tables: Sequence[Sequence[int]], number: int, end: int) -> list[int]:
    """Of a part of a chunk; none where the engine has not all of them, or will not have after this step."""
    stop = (number + 1) * chunks.tokens
    if part.group.need is Need.STATE and stop != end:
        return []  # it is written over within the step
    begin = stop - part.group.tail(chunks.tokens)
    blocks: list[int] = []
    for member in part.group.members:
        blocks += tables[member.index][begin // member.block_tokens : stop // member.block_tokens]
    complete = len(blocks) == sum(part.group.counts(stop - begin)) and _NO_BLOCK not in blocks
    return blocks if complete else []


def _is_stored(part: Part, number: int, state: RequestState, chunks: Chunks, arena_bytes: int) -> bool:
    """Whether a chunk's window is stored: all of them while they take little of the daemon's memory; else those behind
    which one goes on, every so many chunks and at the end of the prompt."""
    group = part.as_group
    prompt = int(state.request.num_prompt_tokens)
    count, budget = max(1, prompt // chunks.tokens), arena_bytes // _WINDOWS_SHARE
    if group.need is Need.STATE or count * part.nbytes <= budget:
        return True
    needed = count - group.first(count, chunks.tokens)  # chunks of one window
    every = -(-count * max(1, needed) * part.nbytes // max(1, budget))
    ends = {(prompt - 1) // chunks.tokens, prompt // chunks.tokens, (number // every + 1) * every}
    return any(group.first(end, chunks.tokens) <= number < end for end in ends)
