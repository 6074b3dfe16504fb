# SPDX-License-Identifier: Apache-2.0
"""The reading of what an earlier run left beside and in the disk tier, while the socket answers already.

Threading: a thread of its own, which has every change made on the event loop.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from functools import partial

from loracache.adapters.names import AdapterNames
from loracache.cache.tiered import TieredCache
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import ObjectInfo

__all__ = ["Scan"]

_log = logging.getLogger(__name__)
_LOOK_S = 0.25
_SCAN_SLICE = 200  # objects entered between two looks at the socket: a few milliseconds


class Scan:
    """Reads. post(call) has `call` made on the event loop; stopping: the daemon ends."""

    def __init__(
        self,
        cache: TieredCache,
        namespaces: Namespaces,
        names: AdapterNames,
        post: Callable[[Callable[[], None]], None],
        stopping: threading.Event,
    ) -> None:
        assert cache.disk is not None
        self._cache = cache
        self._disk = cache.disk
        self._namespaces = namespaces
        self._names = names
        self._post = post
        self._stopping = stopping

    def run(self) -> None:
        """Feed what stands beside and in the disk tier to the loop, a slice at a time, so that the socket answers
        meanwhile: the namespaces first, for a chain's parent may be an adapter that only they tell of."""
        disk = self._disk

        def adopt(infos: list[ObjectInfo], left: list[ObjectInfo]) -> None:
            left.extend(disk.adopt(infos))

        if not disk.io.standing.reads:
            self._post(disk.writer.start)  # what is asked of it is refused, and nobody waits
            while not disk.io.standing.reads:
                if self._stopping.wait(_LOOK_S):
                    return
            self._namespaces.reading = True
            self._post(self._read_names)
        try:
            for found in self._namespaces.files():
                if not self._feed(partial(self._namespaces.learn, found)):
                    return
        except OSError as error:
            _log.error("the namespaces beside the disk tier cannot be read: %s", error)
        if not self._feed(self._namespaces_read):
            return
        waiting: list[ObjectInfo] = []
        try:
            objects = disk.io.backend.scan()
            while infos := list(itertools.islice(objects, _SCAN_SLICE)):
                if not self._feed(partial(adopt, infos, waiting)):
                    return
        except OSError as error:
            _log.error("the disk tier cannot be read and starts empty: %s", error)
        while waiting:  # a child may have come before its parent
            left: list[ObjectInfo] = []
            for at in range(0, len(waiting), _SCAN_SLICE):
                if not self._feed(partial(adopt, waiting[at : at + _SCAN_SLICE], left)):
                    return
            if len(left) == len(waiting):
                break
            waiting = left
        self._post(lambda: self._scanned(waiting))

    def _feed(self, call: Callable[[], None]) -> bool:
        """Have `call` called on the loop, and wait for that; False where the daemon ends."""
        done = threading.Event()

        def do() -> None:
            try:
                call()
            finally:
                done.set()

        if self._stopping.is_set():
            return False
        self._post(do)
        while not done.wait(0.1):
            if self._stopping.is_set():  # the loop is gone that would have set it
                return False
        return True

    def _read_names(self) -> None:
        """Of a disk that was out of reach at the start."""
        try:
            self._names.read()
        except OSError as error:
            _log.error("the names beside the disk tier cannot be read: %s", error)

    def _namespaces_read(self) -> None:
        self._namespaces.reading = False
        self._cache.index.adapters.update(map(bytes.fromhex, self._namespaces.adapters()))

    def _scanned(self, orphans: list[ObjectInfo]) -> None:
        self._disk.adopted_all(orphans, self._disk.io.backend.left_alone())
        _log.info("disk tier: %d objects found, %d orphans dropped", self._cache.index.objects[2], len(orphans))
