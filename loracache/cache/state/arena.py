# SPDX-License-Identifier: Apache-2.0
"""The arena: tier L1, one sealed memfd of pages that clients map, and the extents in it.

An extent is (offset, length) in bytes, both multiples of the page size. An object takes whole pages, in one extent
where a free run is long enough and in several where none is. Sealed against shrinking and growing: a client that
truncated an unsealed memfd would kill everybody who maps it with SIGBUS.

With huge pages of 2 MiB page tables, and what a GPU's driver keeps of pinned memory, are 512 times smaller, in the
daemon and in everybody who maps the arena.

Threading: allocate and free belong to one thread (the cache's); `populate` runs on a thread of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
from collections.abc import Callable, Iterable

from loracache.cache.state.huge_pages import HugePages, huge_bytes, reserved_pages
from loracache.errors import ConfigError
from loracache.free_pages import FreePages
from loracache.mapping import HUGE_PAGE, address, aligned, fill_page_tables
from loracache.memory_limit import BESIDE_THE_ARENA, available_memory

__all__ = ["Arena", "Extent"]

Extent = tuple[int, int]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """A sealed memfd of `size` bytes in pages of `page_size`, mapped here and by every client.

    hugepages: whether they are asked for, and which; huge_bytes: what lies in them, known after `populate`.
    """

    def __init__(self, size: int, page_size: int, hugepages: HugePages | None = None) -> None:
        """Raises ConfigError where the machine, or a limit, has less memory available than `size`."""
        huge = HUGE_PAGE
        if hugepages == "reserved":
            huge, _ = reserved_pages()
            if not huge:
                raise ConfigError("hugepages=reserved, but this kernel has no such pages; leave hugepages out")
        elif size > (available := available_memory()):
            raise ConfigError(
                f"memory={size} bytes ({size / 2**30:.1f} GiB) is more than the {available / 2**30:.1f} GiB this "
                f"machine, or its control group, has available for it now; give --memory less, or the group more"
            )
        whole = max(page_size, huge) if hugepages is not None else page_size
        self.page_size = page_size
        self.size = size // whole * whole
        self.hugepages = hugepages
        self.populated = self.huge_bytes = 0
        if not self.size:
            raise ConfigError(f"memory={size} bytes is less than a huge page of {huge} (hugepages={hugepages})")
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if hugepages == "reserved" else 0)
        self.fd = os.memfd_create("loracache-arena", flags)
        try:
            self._map()
        except OSError as error:
            os.close(self.fd)
            raise ConfigError(self._shortage(error.strerror or "")) from None
        self.view = memoryview(self.map)
        self._pages = FreePages(self.size // page_size)

    def _map(self) -> None:
        os.ftruncate(self.fd, self.size)
        self.map = aligned(lambda: mmap.mmap(self.fd, self.size))
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        if self.hugepages == "transparent":
            with contextlib.suppress(OSError):  # a kernel without them: `populate` says what it got
                self.map.madvise(mmap.MADV_HUGEPAGE)
        elif self.hugepages == "reserved" and fill_page_tables(lambda: self.map) < self.size:
            # The first touch of a page that a limit or a memory policy withholds would be the end of the daemon.
            raise OSError(0, "a control group's limit or the memory policy leaves fewer")

    def _shortage(self, reason: str) -> str:
        memory = f"memory={self.size} bytes ({self.size / 2**30:.1f} GiB)"
        if self.hugepages == "reserved":
            page, free = reserved_pages()
            return (
                f"{memory} with hugepages=reserved takes {self.size // page} pages of {page >> 10} KiB, of which "
                f"{free} are free ({reason}); reserve them (sysctl vm.nr_hugepages), give --memory less, or "
                "--hugepages transparent"
            )
        return f"{memory} cannot be had: {reason}{_limits_text(self.size)}; give --memory less, or this process more"

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
        """Touch every page, so that no store pays for the first touch, and join them to huge ones where they are asked
        for. Ends early where `stop()` turns true."""
        join = self.hugepages == "transparent"
        self.populated = fill_page_tables(lambda: None if stop() else self.map, join=join)
        if self.hugepages is not None:
            self.huge_bytes = huge_bytes(address(self.map))

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
