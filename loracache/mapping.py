# SPDX-License-Identifier: Apache-2.0
"""Maps a daemon's arena into this process, once for all its connections.

Pages are private to nobody, page tables are private to each mapping: reading 124 MB through a fresh mapping costs
30,000 minor faults. So connections share one mapping, and whoever moves bytes fills its page tables ahead of need. It
ends with its last connection and the last view of it: a dead daemon's arena takes memory for as long as it is mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

__all__ = ["HUGE_PAGE", "ArenaMap", "address", "aligned", "fill_page_tables", "map_arena"]

HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_COLLAPSE = 25  # Linux 6.1
_MAP_FAILED = ctypes.c_size_t(-1).value
_STEP = 64 << 20


Map = TypeVar("Map", bound=mmap.mmap)


class ArenaMap(mmap.mmap):
    """A mapped arena. Views of it keep it. instance: of the daemon's run that it belongs to."""

    def __init__(self, *_: object) -> None:
        self._ends: list[Callable[[], object]] = []
        self.instance = b""

    def at_end(self, call: Callable[[], object]) -> None:
        """Call `call` when nobody holds the mapping any more, just before it is unmapped: a weak reference's callback
        would come after that. At the end of the interpreter nothing is called, nor unmapped under what would have
        been: the kernel takes both with the process."""
        self._ends.append(call)

    def __del__(self) -> None:
        ends, self._ends = self._ends, []
        if ends and sys.is_finalizing():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            return
        for call in ends:
            call()


_mappings: weakref.WeakValueDictionary[bytes, ArenaMap] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def map_arena(fd: int, size: int, instance: bytes) -> ArenaMap:
    """The mapping of the arena behind `fd`, shared with other connections to the same run of the same daemon."""
    with _lock:
        known = _mappings.get(instance)
        if known is None:
            known = _mappings[instance] = aligned(lambda: ArenaMap(fd, size))
            known.instance = instance
        return known


def aligned(make: Callable[[], Map]) -> Map:
    """What `make` maps, beginning at a multiple of HUGE_PAGE where that can be had: elsewhere page tables hold a file's
    huge pages as small ones.

    The kernel maps at the end of the highest gap that is large enough. So one is made whose end is where it should be,
    while what was mapped elsewhere fills the gaps above it.
    """
    mapped, others = make(), []
    size, libc = len(mapped), _libc()
    for _ in range(16):  # a process that has run for long has many gaps
        if size < HUGE_PAGE or address(mapped) % HUGE_PAGE == 0:
            break
        low = libc.mmap(None, size + HUGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if low == _MAP_FAILED:
            break
        end = -(-low // HUGE_PAGE) * HUGE_PAGE + size
        libc.munmap(low, end - low)
        others.append(mapped)
        try:
            mapped = make()
        except OSError:  # a limit: one was to be had
            others.pop()
            break
        finally:
            libc.munmap(end, low + size + HUGE_PAGE - end)
    for other in others:
        other.close()
    return mapped


def fill_page_tables(arena: Callable[[], mmap.mmap | None], *, join: bool = False) -> int:
    """Touch every page for writing, so that no copy pays for it later; answers the bytes done. join: have the kernel
    make huge pages of them, where it finds the room.

    Takes seconds for a large arena and runs without the interpreter's lock: call it on a thread of its own. Asks
    `arena` for the mapping before each piece and ends early where it has none any more, so that it need not keep it;
    a kernel that cannot do it leaves pages to be touched when used.
    """
    libc = _libc()
    offset = 0
    while (mapped := arena()) is not None and offset < len(mapped):
        step = min(_STEP, len(mapped) - offset)
        start = address(mapped) + offset
        if libc.madvise(start, step, _MADV_POPULATE_WRITE) != 0:
            break
        if join:
            libc.madvise(start, step, _MADV_COLLAPSE)
        offset += step
        del mapped
    return offset


def address(arena: mmap.mmap) -> int:
    """Where a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(arena))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mmap.argtypes, libc.mmap.restype = (ctypes.c_void_p, ctypes.c_size_t, *numbers), ctypes.c_size_t
    return libc
