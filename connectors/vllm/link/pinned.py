# SPDX-License-Identifier: Apache-2.0
"""Makes a mapped arena fast to copy from and to: fills its page tables and, with a GPU, registers it as pinned memory.

Both take long and run in the background, piece by piece and without keeping the mapping: a daemon may end meanwhile.
Until they are done copies are right, but slower. The driver's locks are the whole machine's: pieces are small, there
is a pause behind each, and processes that map the same arena take turns.

No single copy may reach from one registration into the next, or out of one: CUDA refuses it. `pieces` says where
they meet. A piece becomes pinned once and stays so while anybody holds a view of the arena: registrations end when
nobody holds the mapping any more, which is after the loss of the daemon and the last copy, and before the memory is
unmapped.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import resource
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loracache.mapping import ArenaMap, address, fill_page_tables

__all__ = ["CudaHost", "HostRuntime", "PinnedPieces", "pieces", "prepare_mapping"]

_log = logging.getLogger(__name__)
_PIECE = 128 << 20  # about 13 ms under the driver's locks
_LONGEST_PAUSE_S = 0.1
_TURN_S = 0.05  # between two looks at whether it is our turn
_OUT_OF_MEMORY, _NOT_PERMITTED, _NOT_SUPPORTED = 2, 800, 801  # of cudaError_t
_Steps = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]
_prepared: weakref.WeakSet[ArenaMap] = weakref.WeakSet()
_told: set[int] = set()
_lock = threading.Lock()


class HostRuntime(Protocol):
    """What pinning needs of a GPU's runtime. Called from any thread; answers its error code, 0 for none."""

    def register(self, start: int, nbytes: int) -> int:
        """Pin the bytes from the address `start` on for copies to and from the GPU."""
        ...

    def unregister(self, start: int) -> int:
        """End the registration that began at `start`."""
        ...


class CudaHost:
    """The CUDA runtime, with the device current that was so where this was made: a fresh thread is on device 0, and
    would register for another rank's."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()

    def register(self, start: int, nbytes: int) -> int:
        """See HostRuntime."""
        with torch.cuda.device(self._device):
            return int(torch.cuda.cudart().cudaHostRegister(start, nbytes, 0))

    def unregister(self, start: int) -> int:
        """See HostRuntime."""
        with torch.cuda.device(self._device):
            return int(torch.cuda.cudart().cudaHostUnregister(start))


class PinnedPieces:
    """Where the pieces of the mapped arenas lie, and which are pinned. For all threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the collector may end a mapping on a thread that holds it
        self._arenas: dict[int, _Steps] = {}  # by first address
        self._steps: _Steps = (np.zeros(0, np.int64), np.zeros(0, np.bool_))

    def steps(self) -> _Steps:
        """(edges, pinned): the bytes from edges[i] up to edges[i + 1] are pinned where pinned[i]. Before the first edge
        and from the last one on nothing is. No copy may have bytes on both sides of an edge. Never changed in place.
        """
        return self._steps

    def is_pinned(self, start: int, nbytes: int) -> bool:
        """Whether one copy may take these bytes as pinned memory."""
        edges, pinned = self._steps
        place = int(np.searchsorted(edges, start, side="right")) - 1
        return place >= 0 and bool(pinned[place]) and start + nbytes <= int(edges[place + 1])

    def add(self, base: int, nbytes: int) -> None:
        """There is an arena, none of it pinned yet."""
        edges = np.array([*range(base, base + nbytes, _PIECE), base + nbytes], np.int64)
        with self._lock:
            self._arenas[base] = (edges, np.zeros(len(edges), np.bool_))
            self._join()

    def pin(self, base: int, start: int) -> None:
        """The piece of it that begins at `start` is pinned now."""
        with self._lock:
            edges, pinned = self._arenas[base]
            pinned[np.searchsorted(edges, start)] = True
            self._join()

    def remove(self, base: int) -> list[int]:
        """There is no such arena any more; answers where its pinned pieces began."""
        with self._lock:
            edges, pinned = self._arenas.pop(base)
            self._join()
        return [int(start) for start in edges[pinned]]

    def _join(self) -> None:
        known = [steps for _, steps in sorted(self._arenas.items(), key=lambda item: item[0])]
        edges, pinned = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        self._steps = (
            np.concatenate([edges, *(each for each, _ in known)]),
            np.concatenate([pinned, *(each for _, each in known)]),
        )


pieces = PinnedPieces()
"""Those of all arenas that this process maps."""


def prepare_mapping(arena: ArenaMap, host: HostRuntime | None) -> None:
    """Prepare a mapping once, on a thread of its own. host: the runtime to pin it with; without a GPU None."""
    with _lock:
        if arena in _prepared:
            return
        _prepared.add(arena)
    if host is not None:
        pieces.add(address(arena), len(arena))
        arena.at_end(functools.partial(_unpin, host, address(arena), os.getpid()))
    target = (weakref.ref(arena), host)
    threading.Thread(target=_prepare, args=target, name="loracache-pin", daemon=True).start()


def _prepare(arena: weakref.ref[ArenaMap], host: HostRuntime | None) -> None:
    fill_page_tables(arena)
    if host is None or (mapped := arena()) is None:
        return
    instance = mapped.instance
    del mapped
    with _turn(instance, lambda: arena() is not None):
        try:
            _pin(arena, host)
        except RuntimeError as error:  # torch finds no device, or it is lost
            _log.warning("the arena stays unpinned: %s", str(error))  # whose frames hold it


def _pin(arena: weakref.ref[ArenaMap], host: HostRuntime) -> None:
    offset = 0
    while (mapped := arena()) is not None:
        size = len(mapped)
        if offset >= size:
            _log.info("the arena is pinned")
            return
        start, nbytes = address(mapped) + offset, min(_PIECE, size - offset)
        began = time.monotonic()
        error = host.register(start, nbytes)
        if error:
            _tell(error, offset, size)
            return
        pieces.pin(address(mapped), start)
        offset += nbytes
        del mapped
        time.sleep(min(time.monotonic() - began, _LONGEST_PAUSE_S))  # for whoever else needs the driver


def _unpin(host: HostRuntime, base: int, process: int) -> None:
    """Nobody holds the arena at `base`: no copy from or to it is under way, and none will be."""
    if os.getpid() != process:  # a forked child's registrations are its parent's
        return
    errors = {host.unregister(start) for start in pieces.remove(base)} - {0}
    if errors:
        _log.warning("memory of a lost arena stays pinned: CUDA error %s", sorted(errors))


@contextlib.contextmanager
def _turn(instance: bytes, wanted: Callable[[], bool]) -> Iterator[None]:
    """Wait for this process's turn at that daemon's arena, as long as it is `wanted`. The turn is an abstract socket's
    name: it leaves nothing behind, whichever way its holder ends.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as turn:
        while wanted():
            try:
                turn.bind(f"\0loracache-pin-{instance.hex()}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    time.sleep(_TURN_S)
                    continue
            break
        yield


def _tell(error: int, offset: int, size: int) -> None:
    """Say once in a process why no more of the arena is pinned, and what to do."""
    with _lock:
        if error in _told:
            return
        _told.add(error)
    _log.warning(
        "of the arena's %.1f GiB only the first %.1f are pinned (CUDA error %d: %s); copies of the rest are right, but "
        "slower%s",
        size / 2**30,
        offset / 2**30,
        error,
        _reason(error),
        _fix(error, size),
    )


def _reason(error: int) -> str:
    reasons = {
        _OUT_OF_MEMORY: "no more memory can be locked",
        _NOT_PERMITTED: "it is not permitted here",
        _NOT_SUPPORTED: "it is not supported here, as on WSL or a virtual GPU",
    }
    return reasons.get(error, "see cudaError_t")


def _fix(error: int, size: int) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if error == _NOT_SUPPORTED:
        return ""
    if 0 <= soft < size:
        return f"; ulimit -l is {soft >> 10} KiB: raise it for the engine (docker run --ulimit memlock=-1)"
    return "; give the daemon a smaller memory, or the machine more" if error == _OUT_OF_MEMORY else ""
