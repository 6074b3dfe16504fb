# SPDX-License-Identifier: Apache-2.0
"""The arena: tier L1, one sealed memfd of pages that clients map, and the extents in it.

An extent is (offset, length) in bytes, both multiples of the page size. An object takes whole pages, in one extent
where a free run is long enough and in several where none is. Sealed against shrinking and growing: a client that
truncated an unsealed memfd would kill everybody who maps it with SIGBUS.

Threading: allocate and free belong to one thread (the cache's); `populate` runs on a thread of its own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
from collections.abc import Callable, Iterable

from loracache.errors import ConfigError
from loracache.free_pages import FreePages
from loracache.mapping import fill_page_tables
from loracache.memory_limit import BESIDE_THE_ARENA, available_memory

__all__ = ["Arena", "Extent"]

Extent = tuple[int, int]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """A sealed memfd of `size` bytes in pages of `page_size`, mapped here and by every client."""

    def __init__(self, size: int, page_size: int) -> None:
        """Raises ConfigError where the machine, or a limit, has less memory available than `size`."""
        available = available_memory()
        if size > available:
            raise ConfigError(
                f"memory={size} bytes ({size / 2**30:.1f} GiB) is more than the {available / 2**30:.1f} GiB this "
                f"machine, or its control group, has available for it now; give --memory less, or the group more"
            )
        self.page_size = page_size
        self.size = size // page_size * page_size
        self.fd = os.memfd_create("loracache-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            self.map = mmap.mmap(self.fd, self.size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(self.fd)
            raise ConfigError(
                f"memory={size} bytes ({size / 2**30:.1f} GiB) cannot be had: {error.strerror}{_limits_text(size)}; "
                "give --memory less, or this process more"
            ) from None
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
        self.populated = fill_page_tables(lambda: None if stop() else self.map)

    def audit(self, held: Iterable[Extent]) -> list[str]:
        """Compare free runs with the extents that are `held`; answers what is wrong, in words."""
        return self._pages.audit((offset // self.page_size, length // self.page_size) for offset, length in held)


def _limits_text(size: int) -> str:
    """Those limits of this process that an arena of `size` bytes does not fit into, in words."""
    limits = (("-v", resource.RLIMIT_AS), ("-f", resource.RLIMIT_FSIZE))
    found = [(option, resource.getrlimit(limit)[0]) for option, limit in limits]
    low = [
        f"ulimit {option} is {soft / 2**30:.1f} GiB" for option, soft in found if 0 <= soft < size + BESIDE_THE_ARENA
    ]
    return f" ({', '.join(low)})" if low else ""
