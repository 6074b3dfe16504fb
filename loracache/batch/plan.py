# SPDX-License-Identifier: Apache-2.0
"""The plan of a batch: its groups, the order in which requests are sent, and what that saves.

The order is one walk down the tree: whatever two requests share, it is still held or the last thing freed when the next
of them begins, so that a cache that holds the longest request and what runs beside it loses nothing. What is free in
such a walk is which child of a node comes first: the one that decodes most for each token of prefill, as BatchLLM has
its groups, so that prefill of those behind it fills the steps in which it decodes. Adapters are the tree's first level.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from loracache.batch.fold import fold
from loracache.batch.holding import Blocks
from loracache.batch.prompts import Ints, Prompts
from loracache.batch.replay import computed_at_least, replay
from loracache.batch.tree import NOTHING, Tree, build_tree

__all__ = ["Figures", "Plan", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """order: numbers of requests as they are to be sent. group: of each request, in the order they came, the node whose
    prefix it shares with others, or NOTHING."""

    prompts: Prompts
    tree: Tree
    order: Ints
    group: Ints
    saved: int
    """Prompt tokens that are not computed if each group shares its one prefix, and nothing else is shared."""

    def shared(self) -> Ints:
        """Leading tokens of each request that another has, too, in whole blocks."""
        found = np.empty(len(self.prompts), np.int64)
        found[self.tree.order] = self.tree.held_by_others * self.prompts.block_tokens
        return found

    def prefix(self, group: int) -> int:
        """Tokens of a group's prefix."""
        return int(self.tree.depth[group]) * self.prompts.block_tokens

    def figures(self, kv_tokens: int, running: int) -> Figures:
        """What the plan saves on an engine with so much KV that runs so many requests at once. Raises UsageError where
        one request does not fit."""
        prompts, tree = self.prompts, self.tree
        blocks = Blocks(prompts, tree)
        first_come, depth_first, planned = (
            replay(prompts, blocks, order, kv_tokens, running).computed
            for order in (range(len(prompts)), tree.order.tolist(), self.order.tolist())
        )
        tokens, least = int(prompts.tokens.sum()), computed_at_least(prompts, tree)
        return Figures(
            requests=len(prompts),
            tokens=tokens,
            decode=int(prompts.decode.sum()),
            shared=tokens - least,
            groups=len(np.unique(self.group[self.group != NOTHING])),
            saved_by_groups=self.saved,
            kv_tokens=kv_tokens,
            running=running,
            first_come=first_come,
            depth_first=depth_first,
            planned=planned,
            bound=least,
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """Prompt tokens of a batch; computed are those of `first_come` and below."""

    requests: int
    tokens: int
    decode: int
    """Tokens that the answers are expected to have."""
    shared: int
    """Of the prompts' tokens, those that another request computes."""
    groups: int
    saved_by_groups: int
    """Tokens that one level of shared prefixes saves."""
    kv_tokens: int
    running: int
    first_come: int
    """Computed in the file's order, with an LRU cache."""
    depth_first: int
    """Computed in the order of a walk down the tree."""
    planned: int
    """Computed in the plan's order."""
    bound: int
    """Computed with a cache without end."""

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def make_plan(prompts: Prompts) -> Plan:
    """The plan of a batch."""
    tree = build_tree(prompts)
    folded = fold(tree)
    group = np.full(len(prompts), NOTHING, np.int64)
    group[tree.order] = folded.group
    return Plan(prompts, tree, _by_ratio(prompts, tree), group, folded.saved * prompts.block_tokens)


def _by_ratio(prompts: Prompts, tree: Tree) -> Ints:
    """A walk down the tree that takes the children of each node by decode tokens a prefill token, greatest first."""
    count, nodes, block = len(prompts), len(tree.depth), prompts.block_tokens
    tokens, decode = prompts.tokens[tree.order], prompts.decode[tree.order]
    tokens_to, decode_to, shared_to = (np.concatenate([[0], np.cumsum(each)]) for each in (tokens, decode, tree.shared))
    first, last = tree.first, tree.last
    # Computed below a node, with its own edge: each prompt's tokens but for what it shares with the one before it.
    below = tokens_to[last] - tokens_to[first] - block * (shared_to[last] - shared_to[first + 1])
    below -= block * (np.maximum(tree.depth, 0) - tree.edge)
    own = tokens - block * tree.held_by_others
    prefill = np.concatenate([below, own])
    ratio = np.concatenate([decode_to[last] - decode_to[first], decode]) / np.maximum(prefill, 1)
    ratio[prefill == 0] = np.inf  # it ends where its node does, and computes the last block as the first of all
    parent = np.concatenate([tree.parent, tree.leaf])
    size = np.concatenate([last - first, np.ones(count, np.int64)])
    siblings = np.lexsort((np.concatenate([first, tree.order]), -ratio, parent))
    begin = np.cumsum(size[siblings]) - size[siblings]
    eldest = np.ones(len(siblings), np.bool_)
    eldest[1:] = parent[siblings][1:] != parent[siblings][:-1]
    offset = np.empty(len(siblings), np.int64)
    offset[siblings] = begin - np.maximum.accumulate(np.where(eldest, begin, 0))
    place, above = offset[:nodes].tolist(), tree.parent.tolist()
    for node in reversed(tree.upward.tolist()):
        if above[node] != NOTHING:
            place[node] += place[above[node]]
    places = offset[nodes:]
    if nodes:
        places = places + np.where(tree.leaf == NOTHING, 0, np.asarray(place, np.int64)[tree.leaf])
    order = np.empty(count, np.int64)
    order[places] = tree.order
    return order
