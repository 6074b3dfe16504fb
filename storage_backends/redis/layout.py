# SPDX-License-Identifier: Apache-2.0
"""Where an object lies in Redis: the names of its keys, and what its header says. Pure functions of the prefix.

A small object's bytes stand in one value behind its header, which then names no size of segments: a Redis key costs
about a hundred bytes and its name. What has segments, of whatever size, is read all the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loracache.storage_backends import header
from loracache.storage_backends.redis.resp import Reply

__all__ = ["LARGEST_WHOLE", "Layout", "NotOurs", "read_header"]

LARGEST_WHOLE = 64 << 10  # payload bytes; part of the format: a load asks for the whole value of such an object at once


class Layout:
    """Names below `prefix`. The braces in them put all of an object into one cluster slot."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self._ours = re.compile(rb"%b:\{([0-9a-f]{64})\}(:(?:[0-9a-f]{16}:)?[0-9]+)?" % re.escape(prefix))

    def header_key(self, key: bytes) -> bytes:
        return b"%b:{%b}" % (self.prefix, key.hex().encode())

    def read_name(self, name: bytes) -> tuple[bytes, bool] | None:
        """The object's key, and whether the name is a segment's; None for what is not ours."""
        match = self._ours.fullmatch(name)
        return (bytes.fromhex(match[1].decode()), match[2] is not None) if match is not None else None

    def segment_keys(self, key: bytes, nbytes: int, segment_bytes: int, checksum: int = 0) -> list[bytes]:
        """Of `nbytes` kept bytes. Compressed ones, which have a checksum of their own, lie apart from the payload."""
        start = self.header_key(key) + (b":%016x:" % checksum if checksum else b":")
        return [b"%b%d" % (start, number) for number in range(-(-nbytes // segment_bytes))]

    def held(self, found: header.Header) -> list[bytes]:
        """The segments that a header names."""
        if not found.segment_bytes:
            return []
        info = found.info
        return self.segment_keys(info.key, info.stored or info.size, found.segment_bytes, found.stored_checksum)


@dataclass(frozen=True, slots=True)
class NotOurs:
    """What another release wrote, or somebody without our integrity_key; in words. It may be good: it is left alone."""

    detail: str


def read_header(key: bytes, raw: Reply, integrity_key: bytes | None = None) -> header.Header | NotOurs | str | None:
    """The header kept under `key`; None where there is none; in words what is wrong with it where it is bad. That its
    MAC is of another integrity_key shows only with the bytes behind it; that it has none, here."""
    if raw is None:
        return None
    value = raw if isinstance(raw, bytes) else b""
    try:
        found = header.unpack(value)
    except header.HeaderError as error:
        others = isinstance(error, header.OtherVersion) and not header.is_of_damaged_version(value)
        return NotOurs(str(error)) if others else str(error)
    if found.info.key != key:
        return f"header names the object {found.info.key.hex()}"
    if not found.segment_bytes and found.info.size > LARGEST_WHOLE:
        return "header names no segment size"
    if integrity_key is not None and found.mac == header.NO_MAC:
        return NotOurs("it has no MAC, and there is an integrity_key")
    return found
