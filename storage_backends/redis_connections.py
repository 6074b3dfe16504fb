"""Connections to one Redis: made and authenticated by redis-py, then used as bare sockets (resp.py).

Each call borrows a connection of its own. Any error on it closes it, for what comes next on it could belong to another
request; without one it is kept for the next call. Threading: any number of threads.
"""

from __future__ import annotations

import re
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from loracache.errors import ConfigError
from loracache.storage_backends.resp import ProtocolFault, Wire

__all__ = ["Connections", "without_secrets"]

_FIX = "give redis://[user:password@]host:port/db, rediss://... or unix://[user:password@]/path?db=0"


class _Connection(Protocol):
    """What is used of redis-py's connections."""

    _sock: socket.socket | None

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...


class Connections:
    """The connections to the Redis at `url`. Raises ConfigError for a URL that cannot work; connects at first use.

    place: the URL as far as it may be shown.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.place = without_secrets(url)
        self._timeout_s = timeout_s
        self._make = _factory(url, self.place, timeout_s)
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()

    def talk(self, work: Callable[[Wire], object], nbytes: int) -> str:
        """Gives `work` a connection for moving about `nbytes`; in words how that was lost, nothing where it was not."""
        connection = None
        kept = False
        try:
            connection = self._borrow()
            wire = Wire(_socket_of(connection), self._timeout_s, nbytes)
            work(wire)
            if not wire.finished():
                raise ProtocolFault("the server sent more than it was asked")
            kept = True
        except (BlockingIOError, TimeoutError, redis.TimeoutError):
            return f"no answer within {self._timeout_s} s"
        except (OSError, ProtocolFault, redis.RedisError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if connection is not None:
                self._give_back(connection, kept)
        return ""

    def close(self) -> None:
        """Closes every idle connection."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def _borrow(self) -> _Connection:
        while True:
            with self._lock:
                if not self._idle:
                    break
                connection = self._idle.pop()
            poll = select.poll()
            poll.register(_socket_of(connection), select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.disconnect()  # closed by the server while idle, or speaking out of turn
        connection = self._make()
        connection.connect()
        return connection

    def _give_back(self, connection: _Connection, kept: bool) -> None:
        if kept:
            with self._lock:
                self._idle.append(connection)
        else:
            connection.disconnect()


def _socket_of(connection: _Connection) -> socket.socket:
    if connection._sock is None:
        raise ConnectionResetError("the connection is closed")
    return connection._sock


def without_secrets(url: str) -> str:
    """A URL as far as it may be shown: no user, no password, no query."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if separator else "(no URL)"


def _factory(url: str, place: str, timeout_s: float) -> Callable[[], _Connection]:
    parse: Callable[[str], dict[str, Any]] = parse_url
    try:
        settings = parse(url)
        kind: Any = settings.pop("connection_class", redis.Connection)
        settings |= {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,  # in RESP3 a server may push what nobody asked for between two replies
        }
        kind(**settings)
        settings.get("host", "").encode("idna")
        path = urlsplit(url).path
        usable = len(path) > 1 if kind is redis.UnixDomainSocketConnection else bool(re.fullmatch(r"(/\d*)?", path))
    except (ValueError, TypeError, redis.RedisError):
        usable = False
    if not usable:  # outside of the handler: the cause may quote the password
        raise ConfigError(f"redis {place} will not do; {_FIX}")

    def make() -> _Connection:
        connection: _Connection = kind(**settings)
        return connection

    return make
