# SPDX-License-Identifier: Apache-2.0
"""Which pages of a pool are free: of the arena's, and of an engine's pool of LoRA pages. Pure; one thread at a time."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FreePages"]


class FreePages:
    """Free runs of pages by size class, so that no call's cost grows with the number of runs.

    Class c holds the runs of 2**c to 2**(c+1) - 1 pages: a run from a class above the request's is long enough
    without looking. Runs are found by their ends, so that freeing merges neighbours in constant time. A class is a
    list, removed from by moving its last run into the gap: the first key of a dict is found only behind all those
    deleted before it.
    """

    def __init__(self, pages: int) -> None:
        self.free = 0
        self._classes: list[list[int]] = [[] for _ in range(pages.bit_length())]
        self._place: dict[int, int] = {}  # first page -> where the run stands in its class
        self._length: dict[int, int] = {}  # first page -> pages of the run
        self._start: dict[int, int] = {}  # page behind the run -> first page
        self._taken = bytearray(pages)
        if pages:
            self._add(0, pages)

    def allocate(self, pages: int) -> list[tuple[int, int]] | None:
        """Runs (first page, pages) that add up to `pages`, or None (and nothing taken) where too few are free."""
        if pages > self.free:
            return None
        start = self._find(pages)
        if start is not None:
            return [self._take(start, pages)]
        runs = []
        while pages:  # no single run is long enough: take the longest ones first, so that few extents result
            start = next(kind[-1] for kind in reversed(self._classes) if kind)
            run = self._take(start, min(pages, self._length[start]))
            runs.append(run)
            pages -= run[1]
        return runs

    def release(self, start: int, pages: int) -> None:
        """Give a run back. Raises AssertionError, and does nothing, where any of it is free already."""
        end = start + pages
        assert self._taken.count(1, start, end) == pages, f"of pages {start}..{end} some are free already"
        self._taken[start:end] = bytes(pages)
        before = self._start.get(start)
        if before is not None:
            length = self._length[before]
            self._remove(before)
            start, pages = before, pages + length
        after = self._length.get(start + pages)
        if after is not None:
            self._remove(start + pages)
            pages += after
        self._add(start, pages)

    def runs(self) -> list[tuple[int, int]]:
        """All free runs in order, for audits."""
        return sorted(self._length.items())

    def audit(self, held: Iterable[tuple[int, int]]) -> list[str]:
        """Compare what is free with the runs that are `held`; answers what is wrong, in words: nothing where every page
        is held exactly once or free.
        """
        problems, end = [], 0
        for start, pages in sorted([*held, *self.runs(), (len(self._taken), 0)]):
            if start != end:
                problems.append(
                    f"pages {min(start, end)}..{max(start, end)} are {'held twice' if start < end else 'lost'}"
                )
            end = max(end, start + pages)
        return problems

    def _find(self, pages: int) -> int | None:
        own = self._classes[pages.bit_length() - 1]
        for start in own[-8:]:  # bounded: a class above fits without looking
            if self._length[start] >= pages:
                return start
        for kind in self._classes[pages.bit_length() :]:
            if kind:
                return kind[-1]
        return None

    def _take(self, start: int, pages: int) -> tuple[int, int]:
        length = self._length[start]
        self._remove(start)
        if length > pages:
            self._add(start + pages, length - pages)
        self._taken[start : start + pages] = b"\1" * pages
        return start, pages

    def _add(self, start: int, pages: int) -> None:
        kind = self._classes[pages.bit_length() - 1]
        self._length[start] = pages
        self._start[start + pages] = start
        self._place[start] = len(kind)
        kind.append(start)
        self.free += pages

    def _remove(self, start: int) -> None:
        pages = self._length.pop(start)
        del self._start[start + pages]
        kind = self._classes[pages.bit_length() - 1]
        place, last = self._place.pop(start), kind.pop()
        if last != start:
            kind[place] = last
            self._place[last] = place
        self.free -= pages
