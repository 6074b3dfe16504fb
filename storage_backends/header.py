"""The header that stands before an object on disk and beside it in Redis, and what it proves about the payload.

It names the object (all of its ObjectInfo), carries a CRC of itself, and, where an `integrity_key` is configured, a
BLAKE2b MAC keyed with it over the header's fields and the payload. Without a key the MAC is zero when written and
ignored when read: then whoever can write to the tier is trusted. Pure functions, no state.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from loracache.errors import ConfigError
from loracache.storage_backends.base import KEY_BYTES, Kind, ObjectInfo, Transfer, padded
from loracache.storage_backends.vectors import length

MAGIC = b"LoRACach"
VERSION = 1
MAC_BYTES = 32
NO_MAC = bytes(MAC_BYTES)

# magic, version, kind, has a parent, segment bytes, size, checksum, key, parent, namespace
_FIELDS = struct.Struct("<8sHBBIQQ32s32s32s")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + MAC_BYTES + _CRC.size


class HeaderError(ValueError):
    """These bytes are no header: the message says what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Header:
    """An unpacked header. `segment_bytes`: how a payload kept in pieces is cut; 0 where it is kept whole."""

    info: ObjectInfo
    segment_bytes: int
    mac: bytes


def check_integrity_key(integrity_key: bytes | None) -> None:
    """Raises ConfigError for a key that BLAKE2b cannot take or that is too short to protect anything."""
    if integrity_key is not None and not 16 <= len(integrity_key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ConfigError(
            f"integrity_key has {len(integrity_key)} bytes; give 16 to {hashlib.blake2b.MAX_KEY_SIZE} random bytes"
        )


def pack(
    info: ObjectInfo, payload: Sequence[memoryview], integrity_key: bytes | None, *, segment_bytes: int = 0
) -> bytes:
    """HEADER_BYTES bytes. `payload` is exactly the object's `info.size` bytes."""
    fields = _pack_fields(info, segment_bytes)
    body = fields + (_mac(fields, payload, integrity_key) if integrity_key is not None else NO_MAC)
    return body + _CRC.pack(zlib.crc32(body))


def unpack(raw: bytes | memoryview) -> Header:
    """Reads a header from the first HEADER_BYTES of `raw`. Raises HeaderError."""
    if len(raw) < HEADER_BYTES:
        raise HeaderError(f"header has {len(raw)} bytes of {HEADER_BYTES}")
    body = bytes(raw[: HEADER_BYTES - _CRC.size])
    magic, version, kind, has_parent, segment_bytes, size, checksum, key, parent, namespace = _FIELDS.unpack_from(body)
    if magic != MAGIC:
        raise HeaderError("header does not begin with the magic bytes")
    if version != VERSION:
        raise HeaderError(f"header is of version {version}, this is version {VERSION}")
    if _CRC.unpack_from(raw, HEADER_BYTES - _CRC.size)[0] != zlib.crc32(body):
        raise HeaderError("header CRC does not match")
    try:
        info = ObjectInfo(key, parent if has_parent else b"", Kind(kind), namespace, size, checksum)
    except ValueError as error:
        raise HeaderError(f"header names an unknown kind {kind}") from error
    return Header(info, segment_bytes, body[_FIELDS.size :])


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


def payload_fault(header: Header, payload: Sequence[memoryview], integrity_key: bytes | None) -> str:
    """In words what is wrong with a payload that was read under `header`; empty where nothing is."""
    found = payload_checksum(payload)
    if found != header.info.checksum:
        return f"payload has checksum {found:016x}, its header says {header.info.checksum:016x}"
    if integrity_key is None:
        return ""
    fields = _pack_fields(header.info, header.segment_bytes)
    if not hmac.compare_digest(header.mac, _mac(fields, payload, integrity_key)):
        return "MAC does not match the integrity_key"
    return ""


def transfer_fault(transfer: Transfer) -> str:
    """In words why a transfer cannot be carried out as it is; empty where it can."""
    info = transfer.info
    if len(info.key) != KEY_BYTES or len(info.namespace) != KEY_BYTES or len(info.parent) not in (0, KEY_BYTES):
        return f"key, parent, namespace have {len(info.key)}, {len(info.parent)}, {len(info.namespace)} bytes, not 32"
    if info.size < 0 or length(transfer.buffers) != padded(info.size):
        return f"buffers have {length(transfer.buffers)} bytes, {info.size} of payload need {padded(info.size)}"
    return ""


def _pack_fields(info: ObjectInfo, segment_bytes: int) -> bytes:
    return _FIELDS.pack(
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
    )


def _mac(fields: bytes, payload: Sequence[memoryview], integrity_key: bytes) -> bytes:
    digest = hashlib.blake2b(fields, key=integrity_key, digest_size=MAC_BYTES)
    for view in payload:
        digest.update(view)
    return digest.digest()
