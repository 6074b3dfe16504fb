# SPDX-License-Identifier: Apache-2.0
"""The part of the Redis protocol (RESP2) that moves bulk bytes: straight from and to buffers, on a connected socket.

A client library parses every reply into bytes of its own, which costs large values most of their speed; it still makes
and authenticates the connections. Any exception from here leaves the stream at an unknown place: the connection must be
closed, never reused. An error *reply* is no exception but a value, after which the connection goes on.

Time: a single wait for the peer lasts at most `stall_s`, and all of a Wire's life `stall_s` plus the bytes it was made
for at SLOWEST bytes a second. Threading: one Wire, one thread.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loracache.storage_backends.vectors import IOV_MAX, advance, length

__all__ = ["ErrorReply", "ProtocolFault", "Reply", "Wire", "command", "opening"]

SLOWEST = 16 << 20  # bytes a second below which a peer counts as not answering
LONGEST = 1 << 20  # what is asked for as a value of its own is a header; nobody else sizes our memory
_AHEAD = 64 << 10  # received ahead of what does not go to the caller's buffers
_UNSENT = 1 << 20  # what a unix socket should take without waiting for its reader: we prepare the next meanwhile


class ProtocolFault(Exception):
    """What the peer sent is not RESP2."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error the server answered; `code` is its first word (OOM, MOVED, ERR, ...)."""

    text: str

    @property
    def code(self) -> str:
        return self.text.partition(" ")[0]


Reply = bytes | int | None | ErrorReply | list["Reply"]


def command(*words: bytes) -> bytes:
    """A command with all its arguments, encoded."""
    return opening(len(words), *words)


def opening(count: int, *words: bytes) -> bytes:
    """A command of `count` arguments as far as its first `words`; the caller sends the others."""
    return b"*%d\r\n" % count + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Wire:
    """One connection for the duration of one call. Raises OSError (TimeoutError too) and ProtocolFault."""

    def __init__(self, sock: socket.socket, stall_s: float, nbytes: int) -> None:
        self._sock = sock
        self._stall_s = stall_s
        self._plain = not isinstance(sock, ssl.SSLSocket)
        if self._plain:
            # A Python timeout makes the socket non-blocking, and large values then move in pieces of its buffer with a
            # poll before each, at two thirds of the speed. TLS sockets retry for ever where the kernel times out.
            limit = struct.pack("ll", int(stall_s), max(1, int(stall_s % 1 * 1e6)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.settimeout(None if self._plain else stall_s)
        if sock.family == socket.AF_UNIX:  # TCP finds out by itself
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
        self._deadline = time.monotonic() + stall_s + nbytes / SLOWEST
        self._raw = bytearray(_AHEAD)
        self._ahead = memoryview(self._raw)
        self._start = self._end = 0
        self.errors: list[ErrorReply] = []  # all that came, whoever they were for

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Sends all `parts`, in their order."""
        views = [memoryview(part) for part in parts]
        first = 0
        while first < len(views):
            few = views[first : first + IOV_MAX] if self._plain else views[first : first + 1]
            began = time.monotonic()
            sent = self._sock.sendmsg(few) if self._plain else self._sock.send(few[0])
            self._check_time(began, sent == length(few))
            first = advance(views, first, sent)

    def reply(self) -> Reply:
        """Receives one reply of any type. A value of more than LONGEST bytes is dropped and comes back empty."""
        mark, rest = self._line(_AHEAD)
        if mark == b"+":
            return rest
        if mark == b"-":
            return self._error(rest)
        if mark == b":":
            return _number(rest)
        if mark == b"$":
            return self._bulk(_number(rest))
        if mark == b"*":
            count = _number(rest)
            return None if count < 0 else [self.reply() for _ in range(count)]
        raise ProtocolFault(f"a reply begins with {mark!r}")

    def value(self) -> bytes | ErrorReply | None:
        """Receives one reply that is a value or an error, as `reply` does."""
        mark, rest = self._line(_AHEAD)
        if mark == b"-":
            return self._error(rest)
        if mark != b"$":
            raise ProtocolFault(f"a value begins with {mark!r}")
        return self._bulk(_number(rest))

    def reply_into(self, views: Sequence[memoryview]) -> Reply:
        """Receives one reply; a bulk value goes into `views` and its length is returned.

        A value of another length than `views` is received and dropped, so that the next reply can be read. Nothing is
        received ahead of the value: its first bytes would have to be copied, and the kernel's copy of the others, to
        an odd address then, takes a third longer.
        """
        wanted = length(views)
        line = b"$%d\r\n" % wanted
        if self._plain and self.finished() and len(views) + 2 <= IOV_MAX and self._expected(line, views):
            return wanted
        mark, rest = self._line(len(line))
        if mark == b"-":
            return self._error(rest)
        size = _number(rest)
        if mark != b"$":
            raise ProtocolFault(f"a bulk reply begins with {mark!r}")
        if size < 0:
            return None
        if size == wanted:
            for view in views:
                self._receive(view)
        else:
            self._skip(size)
        self._end_of_value()
        return size

    def _expected(self, line: bytes, views: Sequence[memoryview]) -> bool:
        """Receives a value of just the length of `views`, its `line` and its end in one call. Where another
        reply comes, or only the beginning of its line is there yet, nothing is received.
        """
        seen, end = bytearray(len(line)), bytearray(2)
        self._receive_some(memoryview(seen), socket.MSG_PEEK)
        if seen != line:
            return False
        parts = [memoryview(seen), *views, memoryview(end)]
        first = 0
        while first < len(parts):
            began = time.monotonic()
            received = self._sock.recvmsg_into(parts[first:], 0, socket.MSG_WAITALL)[0]
            if not received:
                raise ConnectionResetError("the server closed the connection")
            self._check_time(began, received == length(parts[first:]))
            first = advance(parts, first, received)
        self._check_end(end)
        return True

    def finished(self) -> bool:
        """Whether every byte received was consumed; if not, the peer said more than it was asked."""
        return self._start == self._end

    def _error(self, line: bytes) -> ErrorReply:
        error = ErrorReply(line.decode("utf-8", "replace"))
        self.errors.append(error)
        return error

    def _line(self, ahead: int) -> tuple[bytes, bytes]:
        while (stop := self._raw.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > 4096:
                raise ProtocolFault("a reply has a line without an end")
            self._fill(ahead)
        line = bytes(self._ahead[self._start : stop])
        self._start = stop + 2
        return line[:1], line[1:]

    def _fill(self, ahead: int) -> None:
        kept = self._end - self._start
        self._ahead[:kept] = self._ahead[self._start : self._end]
        self._start, self._end = 0, kept
        self._end += self._receive_some(self._ahead[kept : min(kept + ahead, _AHEAD)])

    def _bulk(self, size: int) -> bytes | None:
        if size < 0:
            return None
        if size > LONGEST:
            self._skip(size)
            self._end_of_value()
            return b""
        value = bytearray(size)
        self._receive(memoryview(value))
        self._end_of_value()
        return bytes(value)

    def _receive(self, view: memoryview) -> None:
        early = min(self._end - self._start, view.nbytes)
        view[:early] = self._ahead[self._start : self._start + early]
        self._start += early
        while early < view.nbytes:
            early += self._receive_some(view[early:], socket.MSG_WAITALL if self._plain else 0)

    def _skip(self, size: int) -> None:
        sink = memoryview(bytearray(min(size, _AHEAD)))
        while size:
            part = sink[: min(size, len(sink))]
            self._receive(part)
            size -= part.nbytes

    def _end_of_value(self) -> None:
        end = bytearray(2)
        while self._end - self._start < 2:
            self._fill(2)
        self._receive(memoryview(end))
        self._check_end(end)

    @staticmethod
    def _check_end(end: bytearray) -> None:
        if end != b"\r\n":
            raise ProtocolFault("a value does not end where its length says")

    def _receive_some(self, view: memoryview, flags: int = 0) -> int:
        began = time.monotonic()
        received = self._sock.recv_into(view, 0, flags)
        if not received:
            raise ConnectionResetError("the server closed the connection")
        self._check_time(began, flags != socket.MSG_WAITALL or received == view.nbytes)
        return received

    def _check_time(self, began: float, whole: bool) -> None:
        """A call that the kernel's limit cut short has waited long enough; a signal may cut one short as well."""
        now = time.monotonic()
        if now > self._deadline or (not whole and now - began > 0.9 * self._stall_s):
            raise TimeoutError("the server did not answer in time")


def _number(digits: bytes) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ProtocolFault(f"a reply has {digits[:20]!r} for a number") from None
