"""Makes a mapped arena fast to copy from and to: fills its page tables and, with a GPU, registers it as pinned memory.

Both take long and run in the background; until they are done copies are right, but slower. A registration ends when
nobody holds the mapping any more, which is after a daemon's restart and the last copy through the old mapping.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref

import torch

from loracache.mapping import fill_page_tables

__all__ = ["prepare_mapping"]

_log = logging.getLogger(__name__)
_PIECE = 1 << 30
_prepared: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_lock = threading.Lock()


def prepare_mapping(arena: mmap.mmap, device_type: str) -> None:
    """Prepare a mapping once, on a thread of its own."""
    with _lock:
        if arena in _prepared:
            return
        _prepared.add(arena)
    threading.Thread(target=_prepare, args=(arena, device_type), name="loracache-pin", daemon=True).start()


def _prepare(arena: mmap.mmap, device_type: str) -> None:
    fill_page_tables(arena)
    if device_type != "cuda":
        return
    runtime = torch.cuda.cudart()
    base = ctypes.addressof(ctypes.c_char.from_buffer(arena))
    for offset in range(0, len(arena), _PIECE):
        error = int(runtime.cudaHostRegister(base + offset, min(_PIECE, len(arena) - offset), 0))
        if error:
            _log.warning("the arena stays unpinned from byte %d on: CUDA error %d", offset, error)
            return
        weakref.finalize(arena, runtime.cudaHostUnregister, base + offset).atexit = False
    _log.info("the arena is pinned")
