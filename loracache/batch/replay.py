# SPDX-License-Identifier: Apache-2.0
"""What an engine's prefix cache makes of an order: vLLM's blocks, held while a request runs, then LRU.

Exact in blocks, and cheap in nodes of the tree: all blocks of a node are used together, so one item of the LRU list
stands for them, and loses its last blocks first. vLLM gives a request's blocks back last one first; so a prefix always
outlives what stands behind it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loracache.batch.holding import Blocks, Holding
from loracache.batch.prompts import Prompts
from loracache.batch.tree import Tree
from loracache.errors import UsageError

__all__ = ["Replay", "computed_at_least", "replay"]


@dataclass(frozen=True, slots=True)
class Replay:
    """computed: prompt tokens that are computed. most_held: tokens of KV that running requests held at most."""

    computed: int
    most_held: int


def replay(prompts: Prompts, blocks: Blocks, order: Iterable[int], kv_tokens: int, running: int) -> Replay:
    """Requests sent in `order` to an engine with room for `kv_tokens`, which runs `running` of them at once at most.

    A request begins when there is room for its prompt and its answer, none before those ahead of it; it runs for as
    many steps as its answer has tokens. Raises UsageError where one request does not fit.
    """
    block = prompts.block_tokens
    if blocks.largest > kv_tokens // block:
        raise UsageError(f"a request of {blocks.largest * block} tokens does not fit a KV cache of {kv_tokens} tokens")
    cache = _Cache(blocks.size, kv_tokens // block)
    tokens, decode, reusable = prompts.tokens.tolist(), prompts.decode.tolist(), prompts.reusable.tolist()
    ends: list[tuple[int, int]] = []  # (step, prompt)
    step = computed = most = 0
    for prompt in order:
        path = blocks.path(prompt)
        while ends and (ends[0][0] <= step or len(ends) >= running or not cache.fits(path)):
            end, ended = heapq.heappop(ends)
            step = max(step, end)
            cache.free(blocks.path(ended))
        computed += tokens[prompt] - block * min(cache.begin(path), reusable[prompt])
        most = max(most, cache.in_use)
        heapq.heappush(ends, (step + 1 + decode[prompt], prompt))
    return Replay(computed, most * block)


class _Cache(Holding):
    """Blocks of items: resident ones that running requests hold, and free ones, the least recently freed first."""

    def __init__(self, size: Sequence[int], room: int) -> None:
        super().__init__(size, room)
        self._resident = [0] * len(size)
        self._free: OrderedDict[int, None] = OrderedDict()
        self._filled = 0

    def begin(self, path: Sequence[int]) -> int:
        """Make a request's items resident and hold them; answers its leading blocks that were resident already."""
        self.take(path)
        size, resident = self._size, self._resident
        hits = missing = 0
        for item in reversed(path):
            self._free.pop(item, None)
            hits += 0 if missing else resident[item]
            missing += size[item] - resident[item]
        self._evict(self._filled + missing - self._room)
        self._filled += missing
        for item in path:
            resident[item] = size[item]
        return hits

    def free(self, path: Sequence[int]) -> None:
        """The request is done: what nobody else holds may go, its last blocks first."""
        for item in self.release(path):
            if self._size[item]:
                self._free[item] = None

    def _evict(self, count: int) -> None:
        while count > 0:
            item = next(iter(self._free))
            gone = min(count, self._resident[item])
            self._resident[item] -= gone
            self._filled -= gone
            count -= gone
            if not self._resident[item]:
                del self._free[item]


def computed_at_least(prompts: Prompts, tree: Tree) -> int:
    """Prompt tokens that a cache without end leaves to compute: no order and no cache needs fewer."""
    spared = np.minimum(tree.shared, prompts.reusable[tree.order])
    return int(prompts.tokens.sum() - prompts.block_tokens * spared.sum())
