# SPDX-License-Identifier: Apache-2.0
"""The header that stands before an object on disk and beside it in Redis, and what it proves about the payload.

It names the object (all of its ObjectInfo), says how its bytes are kept, carries a CRC of itself, and, where an
`integrity_key` is configured, a BLAKE2b MAC keyed with it over the header's fields and the bytes as they are kept, so
that nothing is decompressed before it is proven. Without a key the MAC is zero when written and ignored when read: then
whoever can write to the tier is trusted. Version 1, which knew no compression, is still read. Pure functions, no state.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import xxhash

from loracache.errors import ConfigError
from loracache.storage_backends import codec
from loracache.storage_backends.base import KEY_BYTES, Kind, ObjectInfo, Transfer, padded
from loracache.storage_backends.codec import CodecError, Encoded
from loracache.storage_backends.vectors import length

__all__ = [
    "HEADER_BYTES",
    "MAC_BYTES",
    "NO_MAC",
    "Header",
    "HeaderError",
    "OtherVersion",
    "as_stored",
    "check_integrity_key",
    "header_fault",
    "is_of_damaged_version",
    "is_unproven",
    "pack",
    "payload_checksum",
    "payload_fault",
    "restore",
    "transfer_fault",
    "unpack",
]

MAGIC = b"LoRACach"
VERSION = 2
MAC_BYTES = 32
NO_MAC = bytes(MAC_BYTES)

_MAGIC_VERSION = struct.Struct("<8sH")
# magic, version, kind, has a parent, segment bytes, size, checksum, key, parent, namespace; from version 2 on: stored,
# checksum of the stored bytes, planes
_FIELDS = struct.Struct("<8sHBBIQQ32s32s32sQQB7x")
_FIELDS_1 = struct.Struct("<8sHBBIQQ32s32s32s")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + MAC_BYTES + _CRC.size


class HeaderError(ValueError):
    """These bytes are not a header: the message says what is wrong with them."""


class OtherVersion(HeaderError):
    """It may be a header all the same, of a version that is not known here."""


@dataclass(frozen=True, slots=True)
class Header:
    """An unpacked header.

    segment_bytes: how an object in pieces is cut; 0 where it is whole. planes, stored_checksum: as in Encoded.
    fields: the packed fields as they were read, which the MAC covers.
    """

    info: ObjectInfo
    segment_bytes: int = 0
    planes: int = 0
    stored_checksum: int = 0
    mac: bytes = NO_MAC
    fields: bytes = b""


def check_integrity_key(integrity_key: bytes | None) -> None:
    """Raises ConfigError for a key that BLAKE2b cannot take or that is too short to protect anything."""
    if integrity_key is not None and not 16 <= len(integrity_key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ConfigError(
            f"integrity_key has {len(integrity_key)} bytes; give 16 to {hashlib.blake2b.MAX_KEY_SIZE} random bytes"
        )


def pack(info: ObjectInfo, encoded: Encoded, integrity_key: bytes | None, *, segment_bytes: int = 0) -> bytes:
    """HEADER_BYTES bytes for an object whose bytes are `kept`, whatever `info.stored` says."""
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        info.kind,
        bool(info.parent),
        segment_bytes,
        info.size,
        info.checksum,
        info.key,
        info.parent,
        info.namespace,
        encoded.stored,
        encoded.checksum,
        encoded.planes,
    )
    body = fields + (_mac(fields, encoded.views, integrity_key) if integrity_key is not None else NO_MAC)
    return body + _CRC.pack(zlib.crc32(body))


def unpack(raw: bytes | memoryview) -> Header:
    """Reads a header from the beginning of `raw`. Raises HeaderError."""
    if len(raw) < _MAGIC_VERSION.size:
        raise HeaderError(f"header has {len(raw)} bytes of {HEADER_BYTES}")
    magic, version = _MAGIC_VERSION.unpack_from(raw)
    if magic != MAGIC:
        raise HeaderError("header does not begin with the magic bytes")
    if version not in (1, VERSION):
        raise OtherVersion(f"header is of version {version}, this is version {VERSION}")
    layout = _FIELDS if version == VERSION else _FIELDS_1
    end = layout.size + MAC_BYTES
    if len(raw) < end + _CRC.size:
        raise HeaderError(f"header has {len(raw)} bytes of {end + _CRC.size}")
    body = bytes(raw[:end])
    if _CRC.unpack_from(raw, end)[0] != zlib.crc32(body):
        raise HeaderError("header CRC does not match")
    fields = layout.unpack_from(body)
    _, _, kind, has_parent, segment_bytes, size, checksum, key, parent, namespace, *rest = fields
    stored, stored_checksum, planes = rest or (0, 0, 0)
    if planes not in (0, *codec.PLANES) or bool(planes) != bool(stored) or stored >= max(size, 1):
        raise HeaderError(f"header says that {stored} of {size} bytes are stored, in {planes} planes")
    try:
        info = ObjectInfo(key, parent if has_parent else b"", Kind(kind), namespace, size, checksum, stored)
    except ValueError as error:
        raise HeaderError(f"header names an unknown kind {kind}") from error
    return Header(info, segment_bytes, planes, stored_checksum, body[layout.size :], body[: layout.size])


def is_of_damaged_version(raw: bytes | memoryview) -> bool:
    """Whether what is of OtherVersion is one of ours in all else: its CRC tells that its version was another."""
    for version, layout in ((1, _FIELDS_1), (VERSION, _FIELDS)):
        end = layout.size + MAC_BYTES
        if len(raw) >= end + _CRC.size:
            body = _MAGIC_VERSION.pack(MAGIC, version) + bytes(raw[_MAGIC_VERSION.size : end])
            if _CRC.unpack_from(raw, end)[0] == zlib.crc32(body):
                return True
    return False


def payload_checksum(payload: Sequence[memoryview]) -> int:
    """xxh3_64 of the bytes of all views in their order."""
    if len(payload) == 1:
        return xxhash.xxh3_64_intdigest(payload[0])
    digest = xxhash.xxh3_64()
    for view in payload:
        digest.update(view)
    return digest.intdigest()


def header_fault(header: Header, expected: ObjectInfo) -> str:
    """In words what the header and the caller's expectation disagree on; empty where they agree."""
    held = header.info
    if held.key != expected.key:
        return f"holds the object {held.key.hex()}"
    if held.size != expected.size:
        return f"holds {held.size} bytes, expected {expected.size}"
    if held.checksum != expected.checksum:
        return f"holds checksum {held.checksum:016x}, expected {expected.checksum:016x}"
    return ""


def payload_fault(header: Header, payload: Sequence[memoryview]) -> str:
    """In words what is wrong with a payload that was read under `header`; empty where nothing is."""
    found = payload_checksum(payload)
    if found != header.info.checksum:
        return f"payload has checksum {found:016x}, its header says {header.info.checksum:016x}"
    return ""


def restore(
    header: Header, compressed: memoryview | None, payload: Sequence[memoryview], integrity_key: bytes | None
) -> str:
    """Fills `payload` from what was read under `header`; in words what is wrong with it, empty where nothing is.

    compressed: the `stored` bytes of an object that is kept compressed; None where `payload` itself was read.
    """
    stored = payload if compressed is None else [compressed]
    if integrity_key is not None and not hmac.compare_digest(header.mac, _mac(header.fields, stored, integrity_key)):
        return "MAC does not match the integrity_key"
    if compressed is not None:
        if payload_checksum(stored) != header.stored_checksum:
            return f"what is stored has not the checksum {header.stored_checksum:016x} of its header"
        try:
            codec.decode(compressed, header.planes, payload)
        except CodecError as error:
            return str(error)
    return payload_fault(header, payload)


def is_unproven(
    header: Header, compressed: memoryview | None, payload: Sequence[memoryview], integrity_key: bytes | None
) -> bool:
    """Whether the bytes are those that the header was made for, and its MAC alone is not of this key."""
    stored = payload if compressed is None else [compressed]
    whole = payload_checksum(stored) == (header.info.checksum if compressed is None else header.stored_checksum)
    return integrity_key is not None and whole and header.mac != _mac(header.fields, stored, integrity_key)


def transfer_fault(transfer: Transfer) -> str:
    """In words why a transfer cannot be carried out as it is; empty where it can."""
    info = transfer.info
    if len(info.key) != KEY_BYTES or len(info.namespace) != KEY_BYTES or len(info.parent) not in (0, KEY_BYTES):
        return f"key, parent, namespace have {len(info.key)}, {len(info.parent)}, {len(info.namespace)} bytes, not 32"
    if info.size < 0 or length(transfer.buffers) != padded(info.size):
        return f"buffers have {length(transfer.buffers)} bytes, {info.size} of payload need {padded(info.size)}"
    if transfer.planes not in (0, *codec.PLANES):
        return f"planes is {transfer.planes}; give 0 or one of {codec.PLANES}"
    return ""


def as_stored(info: ObjectInfo, stored: int) -> ObjectInfo:
    """`info` of an object that takes `stored` bytes."""
    return info if info.stored == stored else replace(info, stored=stored)


def _mac(fields: bytes, stored: Sequence[memoryview], integrity_key: bytes) -> bytes:
    digest = hashlib.blake2b(fields, key=integrity_key, digest_size=MAC_BYTES)
    for view in stored:
        digest.update(view)
    return digest.digest()
