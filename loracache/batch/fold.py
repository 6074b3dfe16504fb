# SPDX-License-Identifier: Apache-2.0
"""The tree folded to one level: each prompt in at most one group that shares a prefix, so that most tokens are saved.

BatchLLM's dynamic programme (Zheng et al., arXiv 2412.03594), made exact. There a node decides once,
against its parent, whether it becomes a prefix of its own; but which ancestor is its rival is only known when those
have decided. Here a node's subtree is a function of the depth of the deepest group above it: what can be saved there is
convex in that depth, piecewise linear and kept as its bends. A prompt that stays with a group of depth x saves x
blocks; a group costs its prefix once; so a node becomes a group while x is below the depth where both are worth the
same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from loracache.batch.prompts import Ints
from loracache.batch.tree import NOTHING, Tree

__all__ = ["Fold", "fold"]


@dataclass(frozen=True, slots=True)
class Fold:
    """group: of each prompt of the tree's order, the node whose prefix it shares, or NOTHING. saved: blocks that are
    not computed, if nothing but those prefixes is shared."""

    group: Ints
    saved: int


@dataclass(slots=True)
class _Saved:
    """Blocks saved in a subtree where the deepest group above it holds x blocks: convex, never falling.

    value and slope: at x = 0. bends: (x, how much steeper it gets there), in the order of x.
    """

    value: float = 0.0
    slope: int = 0
    bends: list[tuple[float, int]] = field(default_factory=list)

    def add(self, other: _Saved) -> None:
        """The subtrees of two children, side by side."""
        self.value += other.value
        self.slope += other.slope
        if other.bends:
            self.bends += other.bends
            self.bends.sort()

    def at(self, x: float) -> float:
        """Its value there."""
        return self.value + self.slope * x + sum(steeper * (x - bend) for bend, steeper in self.bends if bend < x)

    def raise_to(self, least: float) -> float:
        """At least `least` everywhere from here on; answers up to which x that is more than it was."""
        if least <= self.value:
            return 0.0
        x, value, slope, passed = 0.0, self.value, self.slope, 0
        while passed < len(self.bends) and value + slope * (self.bends[passed][0] - x) < least:
            bend, steeper = self.bends[passed]
            x, value, slope, passed = bend, value + slope * (bend - x), slope + steeper, passed + 1
        reached = x + (least - value) / slope if slope else float("inf")
        self.bends = [(reached, slope), *self.bends[passed:]]
        self.value, self.slope = least, 0
        return reached

    def cut(self, most: float) -> None:
        """Nothing above `most` is asked for any more."""
        while self.bends and self.bends[-1][0] >= most:
            self.bends.pop()


def fold(tree: Tree) -> Fold:
    """Groups that save most, with one level of shared prefixes. Time: n log n, but for bends that pile up on a path."""
    nodes = len(tree.depth)
    if not nodes:
        return Fold(np.full(len(tree.order), NOTHING), 0)
    prompts = np.bincount(tree.leaf[tree.leaf != NOTHING], minlength=nodes).tolist()
    depth, parent, upward = tree.depth.tolist(), tree.parent.tolist(), tree.upward.tolist()
    below: dict[int, _Saved] = {}
    until = np.zeros(nodes)  # a node is a group while the deepest group above it holds less
    total = 0.0
    for node in upward:
        saved = below.pop(node, None) or _Saved()
        saved.slope += prompts[node]
        above = parent[node]
        if depth[node] > 0:
            until[node] = saved.raise_to(saved.at(depth[node]) - depth[node])
        if above == NOTHING:
            total += saved.value
            continue
        saved.cut(max(depth[above], 0))
        if above in below:
            below[above].add(saved)
        else:
            below[above] = saved
    held, group = [0] * nodes, [NOTHING] * nodes
    for node in reversed(upward):
        above = parent[node]
        if above != NOTHING:
            held[node], group[node] = held[above], group[above]
        if held[node] < until[node]:
            held[node], group[node] = depth[node], node
    of_node = np.asarray(group, np.int64)
    return Fold(np.where(tree.leaf == NOTHING, NOTHING, of_node[tree.leaf]), round(total))
