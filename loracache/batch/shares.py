# SPDX-License-Identifier: Apache-2.0
"""Which engine sends what: the plan's order dealt out in runs, and dealt anew when an engine is done early or is gone.

A request stands by its place in the plan's order, a walk down the tree. A share is always a part of that walk in its
order, so that what shares a prefix stays together, however often it changes hands. Pure; one thread.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np

from loracache.batch.plan import Plan
from loracache.batch.prompts import Ints
from loracache.batch.tree import NOTHING

__all__ = ["Shares"]

_NEAR = 0.5  # of an engine's share: so far from the even place a batch may be cut; who is done early takes over


class Shares:
    """The requests of a plan. here: of each engine, whether it is there at the beginning; one at least is."""

    def __init__(self, plan: Plan, here: Sequence[bool]) -> None:
        self._order = plan.order
        self._shared = np.zeros(len(plan.order), np.int64) if len(here) == 1 else _shared_along(plan)
        self._work = _work(plan, self._shared)
        self._here = list(here)
        self._waiting: list[deque[int]] = [deque() for _ in here]  # places, in order
        self._begun: list[dict[int, tuple[int, int]]] = [{} for _ in here]  # request -> its place, its work
        self._last: list[int | None] = [None for _ in here]  # the place that each engine began last
        self.taken = [0 for _ in here]
        """Requests that each engine has taken over from others."""
        self.unanswered = len(plan.order)
        cuts = _cuts(self._shared, self._work, sum(here))
        for engine, (begin, end) in zip(np.flatnonzero(here).tolist(), itertools.pairwise(cuts), strict=True):
            self._waiting[engine].extend(range(begin, end))

    def first(self, engine: int) -> int | None:
        """The request that an engine is to send next, of its own share, or of what it takes over now from another's;
        None where nothing is worth that, for now."""
        if not self._waiting[engine] and not self._take_over(engine):
            return None
        return int(self._order[self._waiting[engine][0]])

    def begin(self, engine: int) -> None:
        """Its first request is sent."""
        place = self._waiting[engine].popleft()
        (shared,) = self._shared_with(self._last[engine], np.asarray([place]))
        work = int(self._work[place] + self._shared[place] - shared)
        self._begun[engine][int(self._order[place])] = place, work
        self._last[engine] = place

    def answered(self, engine: int, request: int) -> None:
        """A request that the engine had begun has its answer."""
        del self._begun[engine][request]
        self.unanswered -= 1

    def leave(self, engine: int) -> bool:
        """The engine is gone: what it had begun waits again, and all that waits is for those that are there. False
        where none is."""
        back = [place for place, _ in self._begun[engine].values()]
        self._waiting[engine] = deque(sorted([*back, *self._waiting[engine]]))
        self._begun[engine].clear()
        self._last[engine] = None  # its KV is lost
        self._here[engine] = False
        return any(self._here)

    def is_here(self, engine: int) -> bool:
        """Whether it has not left."""
        return self._here[engine]

    def come_back(self, engine: int) -> None:
        """The engine is there again; it goes on with what is left of its share."""
        self._here[engine] = True

    def _take_over(self, engine: int) -> bool:
        """Move the end of another's share to one that has nothing left. Whether there was one for which that is worth
        it: the engine whose work is most is asked first."""
        others = [each for each in range(len(self._here)) if each != engine and self._waiting[each]]
        for other in sorted(others, key=lambda each: (self._here[each], -self._left(each))):
            kept = self._kept(engine, other)
            if kept is not None:
                waiting = self._waiting[other]
                self._waiting[engine].extend(waiting.pop() for _ in range(len(waiting) - kept))
                self._waiting[engine].reverse()
                self.taken[engine] += len(self._waiting[engine])
                return True
        return False

    def _kept(self, engine: int, other: int) -> int | None:
        """How many of its requests `other` keeps where `engine` takes the rest; None for all. So that both are done
        early, and what has to be computed twice counts against it."""
        places = np.asarray(self._waiting[other])
        left, torn = self._before(other, places)
        torn = np.maximum(torn - self._shared_with(self._last[engine], places), 0)
        whole, begun = int(left[-1]), [self._begun_work(each) for each in (engine, other)]
        hands = 1 if self._here[other] else sum(self._here) - 1  # of those that do what is kept
        if not hands:
            return 0
        until = np.concatenate([[0], left[:-1]])
        done = np.maximum((begun[1] + until) / hands, begun[0] + whole - until + torn) + torn
        kept = int(np.argmin(done))
        if done[kept] < (begun[1] + whole) / hands:
            return kept
        return None if self._here[other] else 0

    def _before(self, engine: int, places: Ints) -> tuple[Ints, Ints]:
        """(work up to each place of a share, with it; tokens that it shares with what the engine has before it)."""
        # What is between two places of a walk, that they share at most: its least is what they share.
        before = self._shared_with(self._last[engine], places)
        if len(places) > 1:
            before[1:] = np.minimum.reduceat(self._shared[: places[-1] + 1], places[:-1] + 1)
        return np.cumsum(self._work[places] + self._shared[places] - before), before

    def _shared_with(self, last: int | None, places: Ints) -> Ints:
        """Tokens that the request at `last` shares with each of `places`, which ascend."""
        found = np.zeros(len(places), np.int64)
        if last is None:
            return found
        behind = places > last
        if behind.any():
            least = np.minimum.accumulate(self._shared[last + 1 : places[-1] + 1])
            found[behind] = least[places[behind] - last - 1]
        if not behind.all():
            least = np.minimum.accumulate(self._shared[places[0] + 1 : last + 1][::-1])[::-1]
            found[~behind] = least[places[~behind] - places[0]]
        return found

    def _left(self, engine: int) -> int:
        """Work of an engine that is not answered, about."""
        return self._begun_work(engine) + int(self._work[np.asarray(self._waiting[engine], np.int64)].sum())

    def _begun_work(self, engine: int) -> int:
        return sum(work for _, work in self._begun[engine].values())


def _cuts(shared: Ints, work: Ints, parts: int) -> list[int]:
    """Where each of so many parts of about the same work begins, and the last one ends: where least is shared, between
    subtrees, so that no prefix is computed twice, unless one subtree is more than a part."""
    count = len(work)
    before = np.concatenate([[0], np.cumsum(work)])
    torn, cuts = np.append(shared, 0), [0]  # what a part that begins there computes again
    for more in range(parts - 1, 0, -1):
        places = np.arange(cuts[-1], count + 1)
        part = before[places] - before[cuts[-1]] + torn[cuts[-1]]
        behind = (before[-1] - before[places] + torn[places]) / more
        off, even = np.abs(part - behind) * more / (more + 1), (before[-1] - before[cuts[-1]]) / (more + 1)
        near = np.flatnonzero(off <= max(_NEAR * even, off.min()))
        cuts.append(int(places[near[np.lexsort((off[near], torn[places[near]]))[0]]]))
    return [*cuts, count]


def _work(plan: Plan, shared: Ints) -> Ints:
    """Tokens to compute and to decode for each place of the order, behind the one before it."""
    work: Ints = plan.prompts.tokens[plan.order] - shared + plan.prompts.decode[plan.order]
    return work


def _shared_along(plan: Plan) -> Ints:
    """Tokens, of whole blocks, that each place of the order shares with the one before it."""
    tree = plan.tree
    places = np.empty(len(plan.order), np.int64)
    places[tree.order] = np.arange(len(plan.order))
    places = places[plan.order]  # in `tree.order`
    shared = np.zeros(len(places), np.int64)
    nodes, depth, parent = tree.leaf[places].tolist(), np.maximum(tree.depth, 0).tolist(), tree.parent.tolist()
    first, last = tree.first.tolist(), tree.last.tolist()
    for number, (place, node) in enumerate(zip(places[1:].tolist(), nodes[:-1], strict=True), 1):
        while node != NOTHING and not first[node] <= place < last[node]:
            node = parent[node]
        shared[number] = depth[node] if node != NOTHING else 0
    return shared * plan.prompts.block_tokens
