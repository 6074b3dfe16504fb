# SPDX-License-Identifier: Apache-2.0
"""Knows the process behind a connection, and tells when it is gone.

A client's mapping of the arena outlives its socket: after the connection ended, only the end of the process (seen on
a pidfd) proves that nothing writes to reserved extents any more; a short grace follows, because a DMA outlives the
process. Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable

__all__ = ["Peer"]

_SO_PEERPIDFD = 77  # Linux 6.5
_AFTER_EXIT_S = 1.0
_UNKNOWN_PROCESS_S = 60.0  # peers of another pid namespace: nothing to watch, so wait long


class Peer:
    """The process at the other end of a connected unix socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._pidfd = -1
        with contextlib.suppress(OSError):
            self._pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        if self._pidfd < 0 and self.pid > 0:
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(self.pid)

    def when_gone(self, loop: asyncio.AbstractEventLoop, done: Callable[[], None]) -> None:
        """Call `done` once the process has ended and the grace is over. Takes the pidfd over; call it once."""
        if self._pidfd < 0:
            loop.call_later(_UNKNOWN_PROCESS_S, done)
            return
        pidfd, self._pidfd = self._pidfd, -1

        def exited() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            loop.call_later(_AFTER_EXIT_S, done)

        loop.add_reader(pidfd, exited)

    def close(self) -> None:
        """Stop caring."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
