"""The arena: tier L1, one sealed memfd of pages that clients map, and the allocator of its extents.

An extent is (offset, length) in bytes, both multiples of the page size. An object takes whole pages, in one extent
where a free run is long enough and in several where none is. Sealed against shrinking and growing: a client that
truncated an unsealed memfd would kill everybody who maps it with SIGBUS.

Threading: allocate and free belong to one thread (the cache's); `populate` runs on a thread of its own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterable

from loracache.errors import ConfigError
from loracache.mapping import fill_page_tables

__all__ = ["Arena", "Extent", "FreePages"]

Extent = tuple[int, int]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


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


class Arena:
    """A sealed memfd of `size` bytes in pages of `page_size`, mapped here and by every client."""

    def __init__(self, size: int, page_size: int) -> None:
        """Raises ConfigError where the machine has less memory available than `size`."""
        available = _available_memory()
        if size > available:
            raise ConfigError(
                f"memory={size} bytes ({size / 2**30:.1f} GiB) is more than the {available / 2**30:.1f} GiB this "
                f"machine has available; give --memory less"
            )
        self.page_size = page_size
        self.size = size // page_size * page_size
        self.fd = os.memfd_create("loracache-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            self.map = mmap.mmap(self.fd, self.size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(self.fd)
            raise
        self.view = memoryview(self.map)
        self.populated = 0
        self._pages = FreePages(self.size // page_size)

    @property
    def free_bytes(self) -> int:
        """Bytes of free pages."""
        return self._pages.free * self.page_size

    def rounded(self, size: int) -> int:
        """Bytes of the whole pages that an object of `size` bytes takes."""
        return -(-size // self.page_size) * self.page_size

    def allocate(self, size: int) -> tuple[Extent, ...] | None:
        """Extents for `size` bytes, or None where too few pages are free."""
        runs = self._pages.allocate(-(-size // self.page_size))
        if runs is None:
            return None
        return tuple((start * self.page_size, pages * self.page_size) for start, pages in runs)

    def free(self, extents: Iterable[Extent]) -> None:
        """Give extents back to the pool."""
        for offset, length in extents:
            self._pages.release(offset // self.page_size, length // self.page_size)

    def buffers(self, extents: Iterable[Extent], size: int) -> list[memoryview]:
        """Writable views of the first `size` bytes of `extents`."""
        views = []
        for offset, length in extents:
            take = min(length, size)
            if take:
                views.append(self.view[offset : offset + take])
            size -= take
        return views

    def populate(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Touch every page, so that no store pays for the first touch. Ends early where `stop()` turns true."""
        self.populated = fill_page_tables(self.map, stop)

    def audit(self, held: Iterable[Extent]) -> list[str]:
        """Compare free runs with the extents that are `held`; answers what is wrong, in words."""
        problems = []
        page = self.page_size
        taken = [(offset // page, length // page) for offset, length in held]
        end = 0
        for start, pages in sorted([*taken, *self._pages.runs()]):
            if start != end:
                problems.append(
                    f"pages {min(start, end)}..{max(start, end)} are {'held twice' if start < end else 'lost'}"
                )
            end = max(end, start + pages)
        if end != self.size // page:
            problems.append(f"pages {end}..{self.size // page} are lost")
        return problems


def _available_memory() -> int:
    """Bytes that can be taken without swapping, within the control group's limit where there is one."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit))
