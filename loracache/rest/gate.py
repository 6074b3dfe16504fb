# SPDX-License-Identifier: Apache-2.0
"""Who gets a connection: so many in all, so many of one address, and always one for whoever asks how the daemon is.

uvicorn takes whatever comes until the process has no descriptors left, and a TLS hello may take it a minute. Here the
oldest connection that has no request going makes room for the next one, those first whose client has not said a word:
opening them costs nothing. A hello has `HELLO_S`, and where all have a request going, a few more are taken that only
the routes of health answer.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import Counter, OrderedDict

import uvicorn

from loracache.accepting import Acceptor
from loracache.rest.connections import LimitedConnection
from loracache.rest.limits import network_of

__all__ = ["GatedServer"]

_log = logging.getLogger(__name__)
_AT_ONCE = 64  # accepted between two looks at the other sockets
_PAUSE_S = 0.2  # where there are no descriptors
_SAY_AGAIN_S = 10.0
_BYTES_RECEIVED = 128  # where that stands in Linux's struct tcp_info


class _Visit:
    """A connection: where it comes from, and its protocol once the TLS hello is over."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock = sock
        self.address = address
        self.task: asyncio.Task[object] | None = None
        self.protocol: LimitedConnection | None = None
        self._spoke = False

    def is_silent(self) -> bool:
        """Whether its client has not said a byte, be it of the hello."""
        if not self._spoke:
            try:
                info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8)
            except OSError:  # closed
                return True
            self._spoke = any(info[_BYTES_RECEIVED:])
        return not self._spoke

    @property
    def busy(self) -> bool:
        """Whether a request of it is on its way."""
        return self.protocol is not None and self.protocol.busy

    def end(self) -> None:
        if self.protocol is not None and self.protocol.transport is not None:
            self.protocol.transport.abort()
        elif self.task is not None:
            self.task.cancel()


class GatedServer(uvicorn.Server):
    """uvicorn's server behind a listener of ours."""

    MOST, MOST_OF_ADDRESS, RESERVE = 512, 256, 16
    HELLO_S = 5.0

    def __init__(self, config: uvicorn.Config, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._listener = listener
        self._acceptor = Acceptor(listener, self._accept)
        self._tls = tls
        self._visits: OrderedDict[_Visit, None] = OrderedDict()  # the oldest first
        self._of_address: Counter[str] = Counter()
        self._said = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's."""
        await super().startup(sockets=[])
        self._listener.setblocking(False)
        self._acceptor.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's."""
        self._acceptor.stop()
        for visit in list(self._visits):
            if not visit.busy:
                visit.end()
        await super().shutdown(sockets=[])

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._say(f"a connection was not accepted: {error.strerror}")
                self._make_room(None)
                self._acceptor.pause(_PAUSE_S)
                return
            self._take(sock, network_of(peer[0]))

    def _take(self, sock: socket.socket, address: str) -> None:
        if self._of_address[address] >= self.MOST_OF_ADDRESS:
            self._say(f"{address} has {self.MOST_OF_ADDRESS} connections, the limit; its oldest idle one is ended")
            room = self._make_room(address)
        else:
            room = len(self._visits) < self.MOST or self._make_room(None)
        if not room and len(self._visits) >= self.MOST + self.RESERVE:
            sock.close()
            return
        sock.setblocking(False)
        visit = _Visit(sock, address)
        self._visits[visit] = None
        self._of_address[address] += 1
        loop = asyncio.get_running_loop()
        hello = self.HELLO_S if self._tls is not None else None
        connecting = loop.connect_accepted_socket(
            lambda: self._protocol(visit, only_health=not room), sock, ssl=self._tls, ssl_handshake_timeout=hello
        )
        visit.task = loop.create_task(connecting)
        visit.task.add_done_callback(lambda done: self._connected(visit, done))

    def _protocol(self, visit: _Visit, *, only_health: bool) -> LimitedConnection:
        protocol = LimitedConnection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        protocol.only_health = only_health
        protocol.ended = lambda: self._gone(visit)
        visit.protocol = protocol
        return protocol

    def _connected(self, visit: _Visit, done: asyncio.Task[object]) -> None:
        if done.cancelled() or done.exception() is not None:  # no hello in time, or none at all
            visit.sock.close()
            self._gone(visit)

    def _gone(self, visit: _Visit) -> None:
        if visit in self._visits:
            del self._visits[visit]
            self._of_address[visit.address] -= 1
            if not self._of_address[visit.address]:
                del self._of_address[visit.address]

    def _make_room(self, address: str | None) -> bool:
        """End the oldest connection (of an address) that has no request going, silent ones first; False where there is
        none."""
        longer = len(self._visits) - self.MOST_OF_ADDRESS // 4  # the newest are silent because they are new
        chosen = None
        for number, visit in enumerate(self._visits):
            if visit.busy or address not in (None, visit.address):
                continue
            chosen = chosen or visit
            if number < longer and visit.is_silent():
                chosen = visit
                break
        if chosen is None:
            return False
        self._gone(chosen)
        chosen.end()
        return True

    def _say(self, what: str) -> None:
        if time.monotonic() >= self._said:
            self._said = time.monotonic() + _SAY_AGAIN_S
            _log.warning("%s", what)
