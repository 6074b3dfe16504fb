# SPDX-License-Identifier: Apache-2.0
"""One connection to a daemon: frames over a unix socket and the mapped arena.

Never blocks but in `connect`, `greeted`, `wait` and `call`, and there for a bounded time: a request that the socket
does not take at once waits in a buffer, and a daemon that stopped reading is given up as unavailable. One thread a
connection; only the end of the mapping, where the daemon hangs up, comes from another (hangups.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loracache.client import hangups
from loracache.errors import ConfigError, ProtocolError, Rejected, Unavailable, Unknown
from loracache.mapping import ArenaMap, map_arena
from loracache.wire import protocol
from loracache.wire.frames import Frames

__all__ = ["Connection", "Reply", "server_uid", "socket_path"]

_CONNECT_TIMEOUT_S = 2.0
_MAX_UNSENT = 16 << 20
_RECEIVE = 1 << 20
_UID = "?uid="
_ERRORS: dict[int, type[Rejected]] = {protocol.ERROR: Rejected, protocol.UNKNOWN: Unknown}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer frame. `last` is False where more of the same answer follows."""

    payload: list[Any]
    last: bool


def socket_path(server: str) -> str:
    """The path in "unix:///path" (or a plain path), without a "?uid=NUMBER" behind it. Raises ConfigError."""
    path = server.removeprefix("unix://").partition(_UID)[0]
    if "://" in path or not path.startswith("/"):
        raise ConfigError(f"server={server!r} is not a unix socket address; give unix:///absolute/path.sock")
    if len(os.fsencode(path)) > protocol.SOCKET_PATH_BYTES:
        raise ConfigError(
            f"server={server!r}: a unix socket's path has at most {protocol.SOCKET_PATH_BYTES} bytes, this has "
            f"{len(os.fsencode(path))}; give a shorter one"
        )
    return path


def server_uid(server: str) -> int | None:
    """The user that an address says its server has: NUMBER of "unix:///path?uid=NUMBER". Raises ConfigError."""
    _, said, uid = server.partition(_UID)
    if said and not (uid.isascii() and uid.isdigit()):
        raise ConfigError(f"server={server!r}: {uid!r} is not a user's number; give ?uid=NUMBER, or nothing")
    return int(uid) if said else None


class Connection:
    """Frames to and from one daemon. See the module's docstring for what blocks."""

    def __init__(self, server: str, *, name: str) -> None:
        self._path = socket_path(server)
        self._uid = server_uid(server)
        self._name = name
        self._socket: socket.socket | None = None
        self._frames = Frames()
        self._unsent = bytearray()
        self._number = 0
        self._replies: dict[int, deque[Reply | Rejected]] = {}
        self.map: ArenaMap | None = None  # none without a connection
        self.instance = b""
        self._farewell = ""
        self._joining: socket.socket | None = None  # connected, not greeted yet
        self._join_until = 0.0
        self._broken: list[bytes] = []  # write leases to give up on the next connection

    @property
    def joining(self) -> bool:
        """Whether a connection was begun that is not there yet."""
        return self._joining is not None

    @property
    def connected(self) -> bool:
        """Whether the daemon is there, as far as known."""
        return self._socket is not None and self.map is not None

    @property
    def unsent(self) -> bool:
        """Whether the socket has not taken all yet that was sent; `poll` goes on with it."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """The socket, for a selector. Raises Unavailable where there is none."""
        return self._open().fileno()

    def connect(self) -> None:
        """Connect and map the arena. Raises Unavailable, naming the path and what to do."""
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        while True:
            try:
                self.begin()
                break
            except Unavailable as error:
                if not isinstance(error.__context__, BlockingIOError) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)  # others wait to be accepted
        while not self.greeted(deadline - time.monotonic()):
            pass

    def begin(self) -> None:
        """Start to connect; `greeted` says when that is done. Does not wait. Raises Unavailable."""
        self.close()
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise Unavailable(f"no socket can be opened for the daemon at {self._path}: {error.strerror}") from None
        try:
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            raise self._nobody(error.strerror) from None
        if problem := self._stranger(sock):
            sock.close()
            raise Unavailable(problem)
        self._joining = sock
        self._join_until = time.monotonic() + _CONNECT_TIMEOUT_S

    def greeted(self, wait: float = 0.0) -> bool:
        """Whether the connection begun before is there, waiting up to `wait` seconds for the daemon's greeting. Raises
        Unavailable where it did not come in time, ProtocolError where it is none.
        """
        sock = self._joining
        if sock is None:
            return self.connected
        ready = select.poll()
        ready.register(sock, select.POLLIN)
        if not ready.poll(max(0.0, wait) * 1000):
            if time.monotonic() < self._join_until:
                return False
            self.close()
            raise self._nobody("it is there, but silent")
        self._joining = None
        try:
            fd, greeting = _receive_greeting(sock)
        except OSError as error:
            sock.close()
            raise self._nobody(error.strerror) from None
        except ProtocolError:
            sock.close()
            raise
        except _Refused as refusal:
            sock.close()
            raise Unavailable(f"the daemon at {self._path} takes no more clients: {refusal}") from None
        try:
            if self.map is None or greeting.instance != self.instance:
                self.map = map_arena(fd, greeting.arena_size, greeting.instance)
        except OSError as error:
            sock.close()
            raise Unavailable(
                f"the arena of {greeting.arena_size} bytes of the daemon at {self._path} cannot be mapped: "
                f"{error.strerror}"
            ) from None
        finally:
            os.close(fd)
        self.instance = greeting.instance
        self._socket = sock
        hangups.watch(sock.fileno(), self._hung_up)
        self._frames = Frames()
        self._replies.clear()
        self._unsent.clear()
        self._farewell = ""
        self.send(protocol.Hello(self._name), answer=False)
        broken, self._broken = self._broken, []
        for lease in broken:
            self.abort(lease)
        return True

    def abort(self, lease: bytes) -> None:
        """Give a write lease up: nothing writes to its extents any more. Where the connection is gone, the daemon
        learns it with the next one, and keeps the extents out of use until then.
        """
        if self.connected:
            self.send(protocol.Abort(lease), answer=False)
        else:
            self._broken.append(lease)

    def close(self) -> None:
        """Close the socket and let go of the mapping; it stays while others use it, or a view of it."""
        for sock in (self._socket, self._joining):
            if sock is not None:
                hangups.forget(sock.fileno())
                sock.close()
        self._socket = self._joining = self.map = None

    def _hung_up(self) -> ArenaMap | None:
        """The daemon is gone, and the arena is nobody's: do not keep its memory until somebody asks again. Called on a
        thread of its own."""
        arena, self.map = self.map, None
        return arena

    def send(self, request: protocol.Request, *, answer: bool = True) -> int:
        """Send a request; answers its number, for `take` and `wait`. Where the connection is gone and no answer is
        wanted, nothing happens; else raises Unavailable.
        """
        if not answer:
            if self.connected:
                self._write(request.encode(0))
            return 0
        self._open()
        self._number += 1
        self._replies[self._number] = deque()
        self._write(request.encode(self._number))
        if self._socket is None:
            raise self._ended()
        return self._number

    def poll(self) -> None:
        """Collect what has arrived, without waiting. Closes the connection where the daemon is gone."""
        self._flush()
        while self._socket is not None:
            try:
                data = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            try:
                self._deliver(self._frames.feed(data))
            except ProtocolError:
                self.close()
                raise

    def take(self, number: int) -> Reply | None:
        """The next answer to a request, or None where none has arrived. Raises Rejected, or Unavailable where the
        connection ended without an answer."""
        queue = self._replies.get(number)
        if queue:
            reply = queue.popleft()
            if isinstance(reply, Rejected) or reply.last:
                del self._replies[number]
            if isinstance(reply, Rejected):
                raise reply
            return reply
        if self._socket is None or queue is None:  # one that hung up may have said something that is still to be read
            self._replies.pop(number, None)
            raise self._ended()
        return None

    def forget(self, number: int) -> None:
        """Ignore whatever answers `number` from now on."""
        self._replies.pop(number, None)

    def wait(self, number: int, timeout: float) -> Reply:
        """The next answer to a request, waiting up to `timeout` seconds. Raises Unavailable when they have passed: the
        connection is closed then, because the daemon may be stuck."""
        deadline = time.monotonic() + timeout
        while True:
            self.poll()
            reply = self.take(number)
            if reply is not None:
                return reply
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise Unavailable(f"the daemon at {self._path} did not answer within {timeout:g} s")
            ready = select.poll()
            ready.register(self._open(), select.POLLIN | (select.POLLOUT if self._unsent else 0))
            ready.poll(left * 1000)

    def call(self, request: protocol.Request, timeout: float) -> Reply:
        """Send and wait for the (first) answer."""
        return self.wait(self.send(request), timeout)

    def buffers(self, extents: Sequence[int], size: int) -> list[memoryview]:
        """Views of the first `size` bytes of extents given as [offset, length, offset, length, ...]."""
        arena = self.map
        if arena is None:
            raise Unavailable(f"the daemon at {self._path} is gone, and its arena with it")
        view = memoryview(arena)
        views = []
        for offset, length in zip(extents[::2], extents[1::2], strict=True):
            views.append(view[offset : offset + min(length, size)])
            size -= len(views[-1])
        if size or not all(views):
            raise ProtocolError("the daemon's extents do not cover the object")
        return views

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise Unavailable(f"not connected to the daemon at {self._path}")
        return self._socket

    def _stranger(self, sock: socket.socket) -> str:
        """In words why the server is not believed: bytes are mapped from it, and given to it. "" where it is: one of
        this user or root, of the user whose folder the socket lies in, or of the one that the address names.
        """
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if self._uid is not None:
            return "" if uid == self._uid else f"the server at {self._path} has uid {uid}, not {self._uid} as named"
        with contextlib.suppress(OSError):
            if uid in (0, os.geteuid()) or uid == os.stat(os.path.dirname(self._path)).st_uid:
                return ""
        return (
            f"the server at {self._path} has uid {uid}, which is not this user's, root's, nor the folder owner's; "
            f"if it is the right one, give the address as unix://{self._path}?uid={uid}"
        )

    def _nobody(self, reason: str | None) -> Unavailable:
        return Unavailable(
            f"no LoRACache daemon answers at {self._path} ({reason}); "
            f"start one with: loracache serve --socket {self._path}"
        )

    def _ended(self) -> Unavailable:
        return Unavailable(f"the daemon at {self._path} closed the connection{self._farewell}")

    def _write(self, data: bytes) -> None:
        self._unsent += data
        self._flush()
        if len(self._unsent) > _MAX_UNSENT:
            self.close()

    def _flush(self) -> None:
        while self._unsent and self._socket is not None:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                self._hear_out()
                return
            del self._unsent[:sent]

    def _hear_out(self) -> None:
        """The daemon closed its end: read what it said before, which may be why, and close ours."""
        with contextlib.suppress(OSError, ProtocolError):
            while self._socket is not None and (data := self._socket.recv(_RECEIVE)):
                self._deliver(self._frames.feed(data))
        self.close()

    def _deliver(self, messages: list[Any]) -> None:
        for message in messages:
            try:
                number, status, payload = message
                number = int(number)
            except (TypeError, ValueError):
                raise ProtocolError("the daemon's answer is malformed") from None
            if number == 0 and status == protocol.ERROR:
                self._farewell = f" ({payload})"
            queue = self._replies.get(number)
            if queue is None:
                continue
            kind = _ERRORS.get(status)
            queue.append(kind(str(payload)) if kind is not None else Reply(payload, status == protocol.OK))


class _Refused(Exception):
    """The daemon said why it takes nobody, in place of a greeting."""


def _receive_greeting(sock: socket.socket) -> tuple[int, protocol.Greeting]:
    data, fds, _, _ = socket.recv_fds(sock, 4096, 1)
    try:
        if data and not fds:
            with contextlib.suppress(ProtocolError):  # it is no daemon at all
                for message in Frames().feed(data):
                    if isinstance(message, list) and message[:2] == [0, protocol.ERROR] and len(message) == 3:
                        raise _Refused(str(message[2])[:500])
        if not data or not fds:
            raise ProtocolError("the server closed the connection or sent no arena; is it a LoRACache daemon?")
        frames = Frames()
        messages = frames.feed(data)
        if not messages:
            raise ProtocolError("the server's greeting is incomplete")
        return fds[0], protocol.Greeting.decode(messages[0])
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
