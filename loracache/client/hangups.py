# SPDX-License-Identifier: Apache-2.0
"""Tells a connection at once that its daemon is gone, also one that nobody uses.

A client that waits for work would keep the arena of a dead daemon mapped, and so in memory, until its next request; the
next daemon may find no room beside it. Threading: one thread a process, started with the first connection; `watch` and
`forget` may be called from any.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["forget", "watch"]

_log = logging.getLogger(__name__)
_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class _Watch:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._watched: dict[int, weakref.WeakMethod[Callable[[], Any]]] = {}
        self._thread: threading.Thread | None = None

    def add(self, descriptor: int, hung_up: Callable[[], Any]) -> None:
        with self._lock:
            self._watched[descriptor] = weakref.WeakMethod(hung_up)
            # Once: a socket closed behind our back, which a forked child still has, could never be unregistered.
            self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="loracache-hangups", daemon=True)
                self._thread.start()

    def remove(self, descriptor: int) -> None:
        with self._lock:
            if self._watched.pop(descriptor, None) is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(descriptor)

    def close(self) -> None:
        self._epoll.close()

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                try:
                    dropped = self._fire(descriptor)
                    del dropped  # outside of the lock: unmapping takes its time
                except Exception:  # noqa: BLE001 - top of the thread: the other connections are still to be watched
                    _log.exception("a lost connection's arena was not let go of")

    def _fire(self, descriptor: int) -> Any:
        """What the call let go of. The event may be of a socket that had the descriptor before: look again, while
        nobody can close it."""
        with self._lock:
            found = self._watched.get(descriptor)
            now = select.poll()
            now.register(descriptor, _GONE)
            if found is None or not any(events & _GONE for _, events in now.poll(0)):
                return None
            del self._watched[descriptor]
            self._epoll.unregister(descriptor)
            hung_up = found()
            return hung_up() if hung_up is not None else None


_watch = _Watch()


def watch(descriptor: int, hung_up: Callable[[], Any]) -> None:
    """Call the method `hung_up`, on another thread, once the other end of the socket is closed. What it answers is let
    go of there. Its object is not kept alive."""
    _watch.add(descriptor, hung_up)


def forget(descriptor: int) -> None:
    """The socket is about to be closed. `hung_up` is not called any more once this has returned."""
    _watch.remove(descriptor)


def _start_anew() -> None:
    """A forked child has no thread, and shares the parent's epoll."""
    global _watch
    _watch.close()
    _watch = _Watch()


os.register_at_fork(after_in_child=_start_anew)
