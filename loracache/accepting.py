# SPDX-License-Identifier: Apache-2.0
"""A listening socket on the event loop: the daemon's, and that of the REST process.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

__all__ = ["Acceptor"]


class Acceptor:
    """Calls `accept` while a connection waits at `listener`, which is its own from `start` on."""

    def __init__(self, listener: socket.socket, accept: Callable[[], None]) -> None:
        self._listener = listener
        self._accept = accept
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From now on."""
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def pause(self, seconds: float) -> None:
        """Not for so long: without descriptors the listener stays readable, and the loop would do nothing but fail."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._again = loop.call_later(seconds, self.start)

    def stop(self) -> None:
        """Never again; whoever comes is refused at once."""
        asyncio.get_running_loop().remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()
        self._listener.close()
