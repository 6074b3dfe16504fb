# SPDX-License-Identifier: Apache-2.0
"""A connection that outlives its daemon: when a lost one is tried again, and what is said of it meanwhile.

One rule for all who go on without the daemon: pauses between tries double from the first to the longest, and who waits
in a try spends at most a fifth of its time so. An outage is said once, and so is its end. Who is asked by somebody that
waits for the answer (CacheClient, the REST process) tries with each call instead, and says what went wrong.

Threading: a link belongs to one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from loracache.backoff import Backoff
from loracache.client.connection import Connection
from loracache.errors import LoRACacheError

__all__ = ["RETRY_S", "Link", "Outage", "Retry"]

RETRY_S = 1.0
_GREETING_S = 0.005  # a daemon that lives greets within a millisecond; one that does not costs this once a try
_WAITING = 0.2  # of the time, at most, for a daemon that does not greet


class Retry:
    """When to try again. pauses: between two tries; `RETRY_S` each where none are given."""

    def __init__(self, pauses: Backoff | None = None) -> None:
        self._pauses = pauses or Backoff(RETRY_S, RETRY_S)
        self._next = 0.0

    def due(self) -> bool:
        """Whether it is time to try."""
        return time.monotonic() >= self._next

    def tried(self, spent: float = 0.0) -> float:
        """A try was begun `spent` seconds ago, all of them waited; answers the seconds from then to the next."""
        pause = max(self._pauses.next(), spent / _WAITING)
        self._next = time.monotonic() - spent + pause
        return pause

    def succeeded(self) -> None:
        """The next outage begins with the first pause."""
        self._pauses.reset()


class Outage:
    """Says once that the daemon is gone and once that it is back, however often it is tried in between. meanwhile: how
    things go on without it. back: what is so again."""

    def __init__(
        self,
        log: logging.Logger,
        meanwhile: str = "requests are computed without the cache until it is back",
        back: str = "connected to the daemon again",
    ) -> None:
        self._log = log
        self._meanwhile = meanwhile
        self._back = back
        self._since: float | None = None

    def goes_on(self, error: Exception) -> None:
        """The daemon could not be reached, or was lost."""
        if self._since is None:
            self._since = time.monotonic()
            self._log.warning("%s; %s", error, self._meanwhile)
        else:
            self._log.debug("%s", error)

    def over(self) -> None:
        """The daemon answers."""
        if self._since is not None:
            self._log.info("%s after %.0f s", self._back, time.monotonic() - self._since)
            self._since = None


class Link:
    """A connection that is made again by asking for it: `begin` costs milliseconds, `ready` waits.

    Subclasses hear of a connection that ended (`_lost`, perhaps more than once) and of one that is new (`_made`).
    prepare: what `ready` does before it connects, such as to start the daemon; it may raise our errors.
    """

    def __init__(
        self, server: str, *, name: str, log: logging.Logger, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self.connection = Connection(server, name=name)
        self.outage = Outage(log)
        self._prepare = prepare
        self._retry = Retry()

    def begin(self) -> bool:
        """Whether there is a connection now. Else one is begun where that is due, and a later call finds it; waits for
        what a living daemon takes to greet, at most."""
        if self.connection.connected:
            return True
        try:
            if self.connection.joining:
                return self._greeted(0.0)
            self._lost()
            if not self._retry.due():
                return False
            self._retry.tried()
            self.connection.begin()
            return self._greeted(_GREETING_S)
        except LoRACacheError as error:
            self._retry.tried()
            self.outage.goes_on(error)
            return False

    def ready(self) -> bool:
        """Whether there is a connection now; waits for it, where a try is due."""
        if self.connection.connected:
            return True
        if not self._retry.due():
            return False
        started = time.monotonic()
        try:
            self._prepare()
            self.connection.connect()
        except LoRACacheError as error:
            self._retry.tried(time.monotonic() - started)
            self.outage.goes_on(error)
            return False
        self._new()
        return True

    def _greeted(self, wait: float) -> bool:
        if not self.connection.greeted(wait):
            return False
        self._new()
        return True

    def _new(self) -> None:
        self._retry.succeeded()
        self.outage.over()
        self._made()

    def _lost(self) -> None:
        """There is no connection, and none is begun."""

    def _made(self) -> None:
        """There is a new connection."""
