# SPDX-License-Identifier: Apache-2.0
"""The blocks that a batch's running requests hold in an engine: shared prefixes once, and each request's own.

This is the bound that admits: tokens of KV, not a number of requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loracache.batch.prompts import Prompts
from loracache.batch.tree import NOTHING, Tree

__all__ = ["Blocks", "Holding"]


class Blocks:
    """What the requests of a batch take, in blocks: one item a node of the tree, then one a prompt for what only it
    has, the end of its prompt and its answer."""

    def __init__(self, prompts: Prompts, tree: Tree) -> None:
        count, nodes = len(prompts), len(tree.depth)
        leaf = np.full(count, NOTHING, np.int64)
        leaf[tree.order] = tree.leaf
        shared = np.empty(count, np.int64)
        shared[tree.order] = tree.held_by_others
        whole = -(-(prompts.tokens + prompts.decode) // prompts.block_tokens)
        self.size: list[int] = [*tree.edge.tolist(), *(whole - shared).tolist()]
        """Blocks of each item."""
        above = np.where(tree.depth > 0, tree.parent, NOTHING)  # roots and adapters hold none
        self._above: list[int] = [*above.tolist(), *leaf.tolist()]
        self._nodes = nodes
        self.largest = int(whole.max(initial=0))
        """Blocks of the request that has most."""

    def path(self, prompt: int) -> list[int]:
        """A request's items, its last blocks first."""
        item = self._nodes + prompt
        found = [item]
        while (item := self._above[item]) != NOTHING:
            found.append(item)
        return found


class Holding:
    """Which items running requests hold. Paths are those of `Blocks.path`. room: blocks that may be held at once."""

    def __init__(self, size: Sequence[int], room: int) -> None:
        self._size = size
        self._users: dict[int, int] = {}
        self._room = room
        self.in_use = 0
        """Blocks."""

    def fits(self, path: Sequence[int]) -> bool:
        """Whether one more request may run. One that is larger than all the room does while no other runs."""
        if not self._users:
            return True
        return self.in_use + sum(self._size[item] for item in path if item not in self._users) <= self._room

    def take(self, path: Sequence[int]) -> None:
        """A request begins."""
        for item in path:
            users = self._users.get(item, 0)
            if not users:
                self.in_use += self._size[item]
            self._users[item] = users + 1

    def release(self, path: Sequence[int]) -> list[int]:
        """A request has ended; answers the items that nobody holds any more."""
        left = []
        for item in path:
            self._users[item] -= 1
            if not self._users[item]:
                del self._users[item]
                self.in_use -= self._size[item]
                left.append(item)
        return left
