"""Maps a daemon's arena into this process, once for all its connections.

Pages are private to nobody, page tables are private to each mapping: reading 124 MB through a fresh mapping costs
30,000 minor faults. So connections share one mapping, and whoever moves bytes fills its page tables ahead of need.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable

__all__ = ["fill_page_tables", "map_arena"]

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_STEP = 64 << 20

_mappings: weakref.WeakValueDictionary[bytes, mmap.mmap] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def map_arena(fd: int, size: int, instance: bytes) -> mmap.mmap:
    """The mapping of the arena behind `fd`, shared with other connections to the same run of the same daemon."""
    with _lock:
        known = _mappings.get(instance)
        if known is None:
            known = _mappings[instance] = mmap.mmap(fd, size)
        return known


def fill_page_tables(arena: mmap.mmap, stop: Callable[[], bool] = lambda: False) -> int:
    """Touch every page for writing, so that no copy pays for it later; answers the bytes done.

    Takes seconds for a large arena and runs without the interpreter's lock: call it on a thread of its own. Ends
    early where `stop()` turns true; a kernel that cannot do it leaves pages to be touched when used.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    anchor = ctypes.c_char.from_buffer(arena)
    base, size = ctypes.addressof(anchor), len(arena)
    for offset in range(0, size, _STEP):
        step = min(_STEP, size - offset)
        if stop() or libc.madvise(base + offset, step, _MADV_POPULATE_WRITE) != 0:
            return offset
    return size
