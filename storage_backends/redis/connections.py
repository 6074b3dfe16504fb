# SPDX-License-Identifier: Apache-2.0
"""Connections to one Redis: made and authenticated by redis-py, then used as bare sockets (resp.py).

Each call borrows a connection of its own. Any error on it closes it, for what comes next on it could belong to another
request; without one it is kept for the next call. Threading: any number of threads.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable

import redis

from loracache.storage_backends.redis.resp import ProtocolFault, Wire
from loracache.storage_backends.redis.sentinel import Sentinels
from loracache.storage_backends.redis.urls import Address, Lost, RedisConnection, Target

__all__ = ["Connections"]

_NO_MASTER = {"READONLY", "MASTERDOWN"}  # what a server answers that was a service's master and is one no more


class Connections:
    """The connections to the one server of `target`, to the master its sentinels name, or to its node at `address`."""

    def __init__(self, target: Target, address: Address | None = None) -> None:
        self._target = target
        self._address = address
        self._sentinels = Sentinels(target) if target.service else None
        self._idle: list[RedisConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    def talk(self, work: Callable[[Wire], object], nbytes: int) -> Lost | None:
        """Gives `work` a connection for moving about `nbytes`; how that was lost, None where it was not."""
        connection = None
        kept = False
        try:
            connection = self._borrow()
            wire = Wire(_socket_of(connection), self._target.timeout_s, nbytes)
            work(wire)
            if not wire.finished():
                raise ProtocolFault("the server sent more than it was asked")
            kept = self._sentinels is None or not any(error.code in _NO_MASTER for error in wire.errors)
        except (OSError, ProtocolFault, redis.RedisError) as error:
            return self._target.said(error)
        finally:
            if connection is not None:
                self._give_back(connection, kept)
        return None

    def close(self) -> None:
        """Closes every idle connection now, and the others when they are given back."""
        self._closed = True
        self._drop_idle()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def _borrow(self) -> RedisConnection:
        while True:
            with self._lock:
                if not self._idle:
                    break
                connection = self._idle.pop()
            if _is_quiet(_socket_of(connection)):
                return connection
            connection.disconnect()  # closed by the server while idle, or speaking out of turn
        connection = self._target.connection(self._sentinels.master() if self._sentinels else self._address)
        try:
            connection.connect()
        except BaseException:
            connection.disconnect()
            raise
        return connection

    def _give_back(self, connection: RedisConnection, kept: bool) -> None:
        if kept:
            with self._lock:
                if not self._closed:
                    self._idle.append(connection)
                    return
        connection.disconnect()
        if not kept:
            self._drop_idle()  # they lead to the same server, and each would have to find out by itself


def _is_quiet(sock: socket.socket) -> bool:
    """Whether nothing has come in that nobody asked for. What TLS has decrypted already is not seen by poll."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _socket_of(connection: RedisConnection) -> socket.socket:
    if connection._sock is None:
        raise ConnectionResetError("the connection is closed")
    return connection._sock
