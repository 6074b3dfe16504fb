# SPDX-License-Identifier: Apache-2.0
"""One compact radix tree over a whole batch, of blocks.

Prompts are sorted so that equal prefixes stand together; the blocks that neighbours share give the tree (the intervals
of a longest-common-prefix array, Abouelhoda et al. 2004). Sorting goes block by block and touches, at each, only those
prompts that are still together: its cost is the blocks that are shared, and a sort where groups part.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loracache.batch.prompts import Ints, Prompts

__all__ = ["NOTHING", "Tree", "build_tree"]

_Flags = npt.NDArray[np.bool_]

NOTHING = -1
_OTHER_ROOT, _OTHER_ADAPTER, _END = -1, -2, -3  # depths above 0: what prompts of two salts, two adapters share


@dataclass(frozen=True, slots=True)
class Tree:
    """Prompts in an order in which equal prefixes stand together, and the prefixes that two or more of them share.

    A node's prompts are `order[first:last]`. Above the prefixes stand, where there are several, the roots of one
    adapter (depth -1) and the adapters (depth -2). Arrays `depth` to `last` have one item a node.
    """

    order: Ints
    """Numbers of prompts."""
    shared: Ints
    """Blocks that each prompt of `order` shares with the one before it."""
    leaf: Ints
    """The deepest node that each prompt of `order` is under, or NOTHING."""
    depth: Ints
    """Blocks from the beginning of a prompt to the node's end."""
    parent: Ints
    """NOTHING for the topmost."""
    first: Ints
    last: Ints
    upward: Ints
    """All nodes, children before their parents."""

    @property
    def held_by_others(self) -> Ints:
        """Leading blocks that each prompt of `order` has in common with any other."""
        if not len(self.depth):
            return np.zeros(len(self.order), np.int64)
        return np.where(self.leaf == NOTHING, 0, np.maximum(self.depth, 0)[self.leaf])

    @property
    def edge(self) -> Ints:
        """Blocks of each node that its parent has not."""
        depth = np.maximum(self.depth, 0)
        above = np.where(self.parent == NOTHING, 0, depth[self.parent]) if len(depth) else depth
        edge: Ints = depth - above
        return edge


def build_tree(prompts: Prompts) -> Tree:
    """The tree of a batch: O(n log n) in prompts, linear in the blocks that they share."""
    order, shared = _sorted(prompts)
    roots, adapters = prompts.root[order], prompts.adapter[order]
    depths = shared.copy()
    depths[1:][roots[1:] != roots[:-1]] = _OTHER_ROOT
    depths[1:][adapters[1:] != adapters[:-1]] = _OTHER_ADAPTER
    return _intervals(order, shared, depths)


def _sorted(prompts: Prompts) -> tuple[Ints, Ints]:
    """(order, blocks that each shares with the one before)."""
    count = len(prompts)
    # Of equal blocks the prompt that ends with them goes first: its last token is computed in any case.
    order = np.lexsort((prompts.tokens, prompts.root)).astype(np.int64)
    shared = np.zeros(count, np.int64)
    blocks, starts = prompts.blocks, prompts.starts[:-1]
    roots = prompts.root[order]
    at = np.arange(count)  # positions of prompts that are not alone yet, those of a group together
    same = np.zeros(count, np.bool_)  # whether each is of the same group as the one before it
    same[1:] = roots[1:] == roots[:-1]
    level = 0
    while True:
        keep = same.copy()  # groups of one are done
        keep[:-1] |= same[1:]
        at, same = at[keep], same[keep]
        if not len(at):
            return order, shared
        numbers = order[at]
        left = blocks[numbers] > level
        hashes = np.zeros(len(at), np.uint64)  # 0: the prompt has ended, and stands before those that go on
        hashes[left] = prompts.hashes[starts[numbers[left]] + level]
        parts = same.copy()
        parts[1:] &= hashes[1:] != hashes[:-1]
        if parts.any():
            _sort_groups(order, at, same, parts, hashes)
            parts[1:] = same[1:] & (hashes[1:] != hashes[:-1])
        parts |= same & (hashes == 0)
        shared[at[parts]] = level
        same &= ~parts
        level += 1


def _sort_groups(order: Ints, at: Ints, same: _Flags, parts: _Flags, hashes: npt.NDArray[np.uint64]) -> None:
    """Sort by hash, in place, the prompts of those groups that part here."""
    group = np.cumsum(~same)
    parted = np.zeros(int(group[-1]) + 1, np.bool_)
    parted[group[parts]] = True
    chosen = np.flatnonzero(parted[group])
    by_hash = chosen[np.lexsort((hashes[chosen], group[chosen]))]
    order[at[chosen]] = order[at[by_hash]]
    hashes[chosen] = hashes[by_hash]


def _intervals(order: Ints, shared: Ints, depths: Ints) -> Tree:
    """The tree of what neighbours share, by one walk with a stack of the nodes that are open."""
    depth, parent, first, last, upward = (array("q") for _ in range(5))
    leaf = array("q", [NOTHING]) * len(order)
    stack: list[int] = []
    for position, found in enumerate([*depths[1:].tolist(), _END] if len(order) else [], 1):
        before = stack[-1] if stack else NOTHING
        closed, begin = NOTHING, position - 1
        while stack and depth[stack[-1]] > found:
            node = stack.pop()
            if closed != NOTHING:
                parent[closed] = node
            last[node] = position
            upward.append(node)
            closed, begin = node, first[node]
        if found != _END and (not stack or depth[stack[-1]] < found):
            stack.append(len(depth))
            depth.append(found)
            first.append(begin)
            last.append(0)
            parent.append(NOTHING)
        if closed != NOTHING and stack:
            parent[closed] = stack[-1]
        # A new node that grew out of the last prompt's own tail holds it; else what was open there does.
        leaf[position - 1] = stack[-1] if closed == NOTHING and stack else before
    columns = (leaf, depth, parent, first, last, upward)
    ints = [np.frombuffer(each, np.int64) if each else np.empty(0, np.int64) for each in columns]
    return Tree(order, shared, *ints)
