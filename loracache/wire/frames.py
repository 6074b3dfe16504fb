# SPDX-License-Identifier: Apache-2.0
"""Length-prefixed MessagePack: a little-endian uint32 length and that many bytes. Pure encoding; used by both sides."""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any

import msgpack

from loracache.errors import ProtocolError

__all__ = ["HEADER", "LARGE", "MAX_FRAME", "Frames", "frame", "unpack", "unpack_in_slices"]

HEADER = struct.Struct("<I")
MAX_FRAME = 8 << 20
LARGE = 64 << 10
"""Bytes of a message beyond which it is decoded in slices."""
_SLICE = 4096
_MOST_FIELDS, _MOST_ITEMS, _MOST_PAIRS = 16, 1 << 18, 64
_WRONG = (ValueError, TypeError, IndexError, msgpack.UnpackException, RecursionError)


def frame(message: object) -> bytes:
    """One message as a frame. Raises ProtocolError where it is larger than MAX_FRAME."""
    body: bytes = msgpack.packb(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(
            f"a message of {len(body)} bytes is over the limit of {MAX_FRAME}; send fewer keys at a time"
        )
    return HEADER.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # what is before was taken

    def add(self, data: bytes | memoryview) -> None:
        """Take bytes as they came."""
        self._buffer += data

    def take(self) -> bytes | None:
        """The next complete message, not decoded; None where there is none yet. Raises ProtocolError."""
        at = self._at + HEADER.size
        if len(self._buffer) >= at:
            (length,) = HEADER.unpack_from(self._buffer, self._at)
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame announces {length} bytes; the limit is {MAX_FRAME}")
            if len(self._buffer) >= at + length:
                with memoryview(self._buffer) as view:
                    body = bytes(view[at : at + length])
                self._at = at + length
                return body
        del self._buffer[: self._at]
        self._at = 0
        return None

    def feed(self, data: bytes | memoryview) -> list[Any]:
        """Take bytes as they came; answer the messages complete by now, decoded. Raises ProtocolError."""
        self.add(data)
        return [unpack(body) for body in iter(self.take, None)]

    def __len__(self) -> int:
        return len(self._buffer) - self._at


def unpack(body: bytes) -> Any:
    """Decode a message. Raises ProtocolError."""
    try:
        return msgpack.unpackb(body, strict_map_key=True)
    except _WRONG as error:
        raise _not_ours(body, error) from None


def unpack_in_slices(body: bytes) -> Generator[None, None, Any]:
    """Decode a large message and return it; yields between two slices. It is a list whose items are values, or lists or
    maps of values: what is deeper takes a time and memory that its bytes do not tell. Raises ProtocolError.
    """
    try:
        unpacker = msgpack.Unpacker(strict_map_key=True, max_buffer_size=len(body), max_array_len=0, max_map_len=0)
        unpacker.feed(body)
        message: list[Any] = []
        for _ in range(_bounded(unpacker.read_array_header(), _MOST_FIELDS)):
            kind = body[unpacker.tell()]
            if kind >> 4 == 0x9 or kind in (0xDC, 0xDD):
                items: list[Any] = []
                message.append(items)
                left = _bounded(unpacker.read_array_header(), _MOST_ITEMS)
                while left:
                    items += [unpacker.unpack() for _ in range(min(left, _SLICE))]
                    left = max(0, left - _SLICE)
                    yield
            elif kind >> 4 == 0x8 or kind in (0xDE, 0xDF):
                pairs = range(_bounded(unpacker.read_map_header(), _MOST_PAIRS))
                message.append({unpacker.unpack(): unpacker.unpack() for _ in pairs})
            else:
                message.append(unpacker.unpack())
        if unpacker.tell() != len(body):
            raise ValueError("something stands behind it")
    except _WRONG as error:
        raise _not_ours(body, error) from None
    return message


def _bounded(count: int, most: int) -> int:
    if count > most:
        raise ValueError(f"{count} items; the limit is {most}")
    return count


def _not_ours(body: bytes, error: Exception) -> ProtocolError:
    return ProtocolError(f"a frame of {len(body)} bytes is not MessagePack, or not of ours: {error}")
