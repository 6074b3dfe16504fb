# SPDX-License-Identifier: Apache-2.0
"""Length-prefixed MessagePack: a little-endian uint32 length and that many bytes. Pure encoding; used by both sides."""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from loracache.errors import ProtocolError

__all__ = ["HEADER", "MAX_FRAME", "Frames", "frame"]

HEADER = struct.Struct("<I")
MAX_FRAME = 8 << 20


def frame(message: object) -> bytes:
    """One message as a frame. Raises ProtocolError where it is larger than MAX_FRAME."""
    body: bytes = msgpack.packb(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(
            f"a message of {len(body)} bytes is over the limit of {MAX_FRAME}; send fewer keys at a time"
        )
    return HEADER.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into decoded messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Any]:
        """Take bytes as they came; answer the messages complete by now. Raises ProtocolError."""
        self._buffer += data
        messages = []
        at = 0
        while len(self._buffer) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, at)
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame announces {length} bytes; the limit is {MAX_FRAME}")
            end = at + HEADER.size + length
            if len(self._buffer) < end:
                break
            with memoryview(self._buffer) as view:
                body = bytes(view[at + HEADER.size : end])
            messages.append(_unpack(body))
            at = end
        del self._buffer[:at]
        return messages

    def __len__(self) -> int:
        return len(self._buffer)


def _unpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"a frame of {len(body)} bytes is not MessagePack: {error}") from None
