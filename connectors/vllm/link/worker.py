"""A worker thread's connection to the daemon, made again when it is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from loracache.client.connection import Connection
from loracache.connectors.vllm.link.outage import Outage
from loracache.connectors.vllm.link.pinned import prepare_mapping
from loracache.errors import LoRACacheError
from loracache.wire import protocol

__all__ = ["WorkerLink"]

_log = logging.getLogger(__name__)
_RETRY_S = 1.0
_CALL_TIMEOUT_S = 5.0
_WAITING = 0.2  # of the time, at most, for a daemon that does not greet


class WorkerLink:
    """A connection that is made again by calling `ready`: at most once a second, and so that whoever calls it again and
    again spends at most a fifth of its time waiting for a daemon that is silent.
    """

    def __init__(self, server: str, name: str, ensure: Callable[[], None], device_type: str) -> None:
        self.connection = Connection(server, name=name)
        self._ensure = ensure
        self._device_type = device_type
        self._next_try = 0.0
        self.outage = Outage(_log)
        self._registered: set[bytes] = set()

    def ready(self) -> bool:
        """Whether there is a connection now."""
        if self.connection.connected:
            return True
        now = time.monotonic()
        if now < self._next_try:
            return False
        try:
            self._ensure()
            self.connection.connect()
        except LoRACacheError as error:
            spent = time.monotonic() - now
            self._next_try = now + max(_RETRY_S, spent / _WAITING)
            self.outage.goes_on(error)
            return False
        self.outage.over()
        self._registered.clear()
        arena = self.connection.map
        if arena is not None:
            prepare_mapping(arena, self._device_type)
        return True

    def register(self, digest: bytes, descriptor: str, names: Sequence[str]) -> None:
        """Make a namespace known on this daemon once, and what its model is called."""
        if digest not in self._registered:
            self.connection.call(protocol.Register(descriptor, list(names)), _CALL_TIMEOUT_S)
            self._registered.add(digest)
