# SPDX-License-Identifier: Apache-2.0
"""Work that may be long, done in slices, so that nobody who asks for little waits behind it.

Such work is a generator that yields between two slices of well under a millisecond. Whoever drives it decides how many
go in one turn of the event loop. Work that is short never yields, and is over in the call that began it. Threading: the
cache's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

__all__ = ["TURN_S", "Slices", "advance", "parts", "whole"]

TURN_S = 0.001  # what anybody may do before others are looked at
_PART = 256  # objects that are reserved or committed in a slice

_T = TypeVar("_T")


def advance(work: Iterator[None], deadline: float) -> bool:
    """Do slices of `work` until `deadline` (perf_counter seconds), one at least. Whether there is more to do."""
    for _ in work:  # noqa: SIM110 - the generator of any() costs as much again
        if time.perf_counter() >= deadline:
            return True
    return False


def parts(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """A request's items, as many as make a slice at a time."""
    for at in range(0, len(items), _PART):
        yield items[at : at + _PART]


def whole(work: Generator[None, None, _T]) -> _T:
    """Do all of `work`, which is short, or whose caller serves nobody; answers what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: _T = end.value
            return result


class Slices:
    """Does the daemon's own work, a turn at a time. post(call): have `call` called in the loop's next turn."""

    def __init__(self, post: Callable[[Callable[[], None]], object]) -> None:
        self._post = post
        self._going: deque[Iterator[None]] = deque()
        self._posted = False

    def run(self, work: Iterator[None]) -> None:
        """Do the first slice of `work` now, and the others, if there are any, in turn with whatever else is going."""
        for _ in work:
            self._going.append(work)
            self._come_back()
            return

    def _come_back(self) -> None:
        if self._going and not self._posted:
            self._posted = True
            self._post(self._turn)

    def _turn(self) -> None:
        self._posted = False
        work = self._going.popleft()
        try:
            if advance(work, time.perf_counter() + TURN_S):
                self._going.append(work)
        finally:
            self._come_back()
