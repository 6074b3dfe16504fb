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

__all__ = ["ArenaMap", "address", "fill_page_tables", "map_arena"]

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_STEP = 64 << 20


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
            known = _mappings[instance] = ArenaMap(fd, size)
            known.instance = instance
        return known


def fill_page_tables(arena: Callable[[], mmap.mmap | None]) -> int:
    """Touch every page for writing, so that no copy pays for it later; answers the bytes done.

    Takes seconds for a large arena and runs without the interpreter's lock: call it on a thread of its own. Asks
    `arena` for the mapping before each piece and ends early where it has none any more, so that it need not keep it;
    a kernel that cannot do it leaves pages to be touched when used.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    offset = 0
    while (mapped := arena()) is not None and offset < len(mapped):
        step = min(_STEP, len(mapped) - offset)
        if libc.madvise(address(mapped) + offset, step, _MADV_POPULATE_WRITE) != 0:
            break
        offset += step
        del mapped
    return offset


def address(arena: mmap.mmap) -> int:
    """Where a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(arena))
