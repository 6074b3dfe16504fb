# SPDX-License-Identifier: Apache-2.0
"""A worker thread's connection to the daemon, made again when it is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from loracache.client import requests
from loracache.client.link import Link
from loracache.connectors.vllm.link.pinned import CudaHost, prepare_mapping

__all__ = ["WorkerLink"]

_log = logging.getLogger(__name__)
_CALL_TIMEOUT_S = 5.0


class WorkerLink(Link):
    """A link whose arena is made fast to copy from and to. ensure: starts the daemon where it is a private one. Made on
    a thread whose current device is the worker's."""

    def __init__(self, server: str, name: str, ensure: Callable[[], None], device_type: str) -> None:
        super().__init__(server, name=name, log=_log, prepare=ensure)
        self._host = CudaHost() if device_type == "cuda" else None
        self._registered: set[bytes] = set()

    def register(self, digest: bytes, descriptor: str, names: Sequence[str]) -> None:
        """Make a namespace known on this daemon once, and what its model is called."""
        if digest not in self._registered:
            self.connection.call(requests.Register(descriptor, list(names)), _CALL_TIMEOUT_S)
            self._registered.add(digest)

    def _made(self) -> None:
        self._registered.clear()
        arena = self.connection.map
        if arena is not None:
            prepare_mapping(arena, self._host)
