# SPDX-License-Identifier: Apache-2.0
"""Makes a mapped arena fast to copy from and to: fills its page tables and, with a GPU, registers it as pinned memory.

Both take long and run in the background, piece by piece and without keeping the mapping: a daemon may end meanwhile.
Until they are done copies are right, but slower. A registration ends when nobody holds the mapping any more, which is
after the loss of the daemon and the last copy, and just before the memory is unmapped.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref

import torch

from loracache.mapping import ArenaMap, address, fill_page_tables

__all__ = ["prepare_mapping"]

_log = logging.getLogger(__name__)
_PIECE = 1 << 30
_prepared: weakref.WeakSet[ArenaMap] = weakref.WeakSet()
_lock = threading.Lock()


def prepare_mapping(arena: ArenaMap, device_type: str) -> None:
    """Prepare a mapping once, on a thread of its own."""
    with _lock:
        if arena in _prepared:
            return
        _prepared.add(arena)
    target = (weakref.ref(arena), device_type)
    threading.Thread(target=_prepare, args=target, name="loracache-pin", daemon=True).start()


def _prepare(arena: weakref.ref[ArenaMap], device_type: str) -> None:
    fill_page_tables(arena)
    if device_type != "cuda":
        return
    runtime = torch.cuda.cudart()
    offset = 0
    while (mapped := arena()) is not None:
        if offset >= len(mapped):
            _log.info("the arena is pinned")
            return
        start = address(mapped) + offset
        error = int(runtime.cudaHostRegister(start, min(_PIECE, len(mapped) - offset), 0))
        if error:
            _log.warning("the arena stays unpinned from byte %d on: CUDA error %d", offset, error)
            return
        mapped.at_end(functools.partial(runtime.cudaHostUnregister, start))
        offset += _PIECE
        del mapped
