# SPDX-License-Identifier: Apache-2.0
"""Candidates of a tier in the order of their ranks, and one pass over them from the front.

A rank is unique in its line. Most candidates come with the highest rank of all: those stand in `_recent`, where that
costs next to nothing; the others, and those that were looked at, in `_line`. So no call ever has to put right what many
uses before it left behind. `_recent` is in parts, for a dict that outgrows its places moves all that is in it at once.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict
from itertools import chain
from typing import Any, Generic, TypeVar

from sortedcontainers import SortedDict

from loracache.cache.state.index import Node

__all__ = ["Front", "Line", "R", "repack"]

_PART = 8192  # candidates: a dict of so many grows in less than a millisecond

R = TypeVar("R", int, tuple[float, int])


def repack(table: dict[Any, Any]) -> None:
    """Have a dict, of whatever kind, take no more than what is in it does: one keeps its places for what it had."""
    kept = dict(table)
    table.clear()
    table.update(kept)


class Line(Generic[R]):
    """Nodes by rank, the first to go in front."""

    def __init__(self) -> None:
        self._recent: list[OrderedDict[R, Node]] = []  # none of them is empty
        self._begins: list[R] = []  # no rank in a part of `_recent` is below
        self._latest: R | None = None  # none in all of it is above
        self._line: SortedDict[R, Node] = SortedDict()

    def __len__(self) -> int:
        return len(self._line) + sum(map(len, self._recent))

    def all(self) -> dict[R, Node]:
        """All of them by rank, for audits."""
        return dict(chain(self._line.items(), *(part.items() for part in self._recent)))

    def shrink(self) -> None:
        """Few are left of very many."""
        repack(self._line)

    def put(self, rank: R, node: Node) -> None:
        """`node` stands in line from now on."""
        if self._latest is None or rank > self._latest:
            if not self._recent or len(self._recent[-1]) >= _PART:
                self._recent.append(OrderedDict())
                self._begins.append(rank)
            self._recent[-1][rank] = node
            self._latest = rank
        else:
            self._line[rank] = node

    def take(self, rank: R) -> None:
        """Who stood there does so no more."""
        number = bisect_right(self._begins, rank) - 1
        if number < 0 or self._recent[number].pop(rank, None) is None:
            del self._line[rank]
        elif not self._recent[number]:
            self._end(number)

    def first(self) -> R | None:
        """The lowest rank."""
        recent = next(iter(self._recent[0])) if self._recent else None
        line = self._line.peekitem(0)[0] if self._line else None
        return recent if line is None or (recent is not None and recent < line) else line

    def after(self, last: R | None) -> tuple[R, Node] | None:
        """The next behind a rank, or the first."""
        if not self._line and not self._recent:
            return None
        upcoming = next(self._line.irange(last, inclusive=(False, True)), None)
        if self._recent and (upcoming is None or upcoming > next(iter(self._recent[0]))):
            upcoming, node = self._recent[0].popitem(last=False)
            if not self._recent[0]:
                self._end(0)
            self._line[upcoming] = node
        return None if upcoming is None else (upcoming, self._line[upcoming])

    def _end(self, number: int) -> None:
        """A part of `_recent` is empty."""
        del self._recent[number]
        del self._begins[number]


class Front(Generic[R]):
    """One pass over a line, with those in their places that the pass itself uncovers: parents of what it chose."""

    def __init__(self, line: Line[R]) -> None:
        self._line: Line[R] = line
        self._last: R | None = None  # nobody up to here is looked at again
        self._upcoming: tuple[R, Node] | None = None
        self._uncovered: list[tuple[R, Node]] = []  # a heap

    def push(self, rank: R, node: Node) -> None:
        """`node`, which does not stand in line, is looked at where it would."""
        heapq.heappush(self._uncovered, (rank, node))

    def first(self) -> R | None:
        """The rank of the next."""
        upcoming, uncovered = self._upcoming, self._uncovered
        if upcoming is None:
            upcoming = self._upcoming = self._line.after(self._last)
        if uncovered and (upcoming is None or uncovered[0][0] < upcoming[0]):
            return uncovered[0][0]
        return upcoming[0] if upcoming is not None else None

    def pop(self) -> tuple[R, Node]:
        """The next, by rank; `first` has said that there is one."""
        if self._upcoming is None or (self._uncovered and self._uncovered[0][0] < self._upcoming[0]):
            return heapq.heappop(self._uncovered)
        upcoming, self._upcoming = self._upcoming, None
        self._last = upcoming[0]
        return upcoming
