"""The messages of the unix socket: length-prefixed MessagePack frames.

A frame is a little-endian uint32 length and that many bytes of MessagePack. The daemon speaks first: a Greeting, with
the arena's file descriptor beside it (SCM_RIGHTS). Then the client sends requests `[number, operation, field, ...]`
and the daemon answers `[number, status, ...]`: OK ends the answer, PART announces more to come, ERROR carries a
message. Number 0 asks for no answer. Many keys travel as one byte string, 32 bytes each.

Pure encoding and checking; used by both sides.
"""

from __future__ import annotations

import re
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar

import msgpack

from loracache.errors import ProtocolError, UsageError
from loracache.keys import KEY_BYTES

__all__ = [
    "ERROR", "HEADER", "LEASE_BYTES", "MAX_FRAME", "MAX_TTL_S", "NO_PARENT", "OK", "OPERATIONS", "PART",
    "SOCKET_PATH_BYTES", "VERSION", "Abort", "Acquire", "AdapterDigest", "Clear", "Commit", "Evict", "Flush", "Frames",
    "Greeting", "Hello", "Lookup", "Pin", "Prefetch", "Register", "Release", "Renew", "Report", "Request", "Reserve",
    "Status", "Unpin", "decode_request", "frame", "join_keys", "split_keys",
]  # fmt: skip

VERSION = 1
HEADER = struct.Struct("<I")
MAX_FRAME = 8 << 20
LEASE_BYTES = 16
NO_PARENT = bytes(KEY_BYTES)
MAX_TTL_S = 3600.0
SOCKET_PATH_BYTES = 107  # what the kernel takes
OK, PART, ERROR = 0, 1, 2

_MAX_TEXT = 64 << 10
_COUNTER = re.compile(r"[a-z0-9_.]{1,64}")


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


def split_keys(blob: bytes) -> list[bytes]:
    """The 32-byte keys in `blob`."""
    return [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]


def join_keys(keys: Sequence[bytes]) -> bytes:
    """One byte string of 32-byte keys. Raises UsageError where one has another length."""
    blob = b"".join(keys)
    if len(blob) != KEY_BYTES * len(keys) or any(len(key) != KEY_BYTES for key in keys):
        raise UsageError(f"a key has {KEY_BYTES} bytes")
    return blob


@dataclass(frozen=True, slots=True)
class Greeting:
    """The daemon's first frame, sent with the arena's descriptor. instance: 16 random bytes of this daemon's run."""

    version: int
    instance: bytes
    arena_size: int
    page_size: int

    def encode(self) -> bytes:
        """As a frame."""
        return frame(list(astuple(self)))

    @classmethod
    def decode(cls, message: Any) -> Greeting:
        """Raises ProtocolError where it is not a greeting of this version."""
        if not isinstance(message, list) or len(message) != len(fields(cls)) or not isinstance(message[0], int):
            raise ProtocolError("the server did not greet as a LoRACache daemon does")
        if message[0] != VERSION:
            raise ProtocolError(f"the daemon speaks protocol {message[0]}, this client {VERSION}; run the same release")
        _, instance, *sizes = message
        if not isinstance(instance, bytes) or not all(_is_int(size) and size > 0 for size in sizes):
            raise ProtocolError("the server did not greet as a LoRACache daemon does")
        return cls(*message)


class Request:
    """Base of all requests. A field's name decides how it is checked (`_CHECKS`)."""

    operation: ClassVar[str]
    __slots__ = ()

    def encode(self, number: int) -> bytes:
        """As a frame."""
        return frame([number, self.operation, *(getattr(self, field.name) for field in fields(self))])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Hello(Request):
    """Who is speaking: for status and logs."""

    operation: ClassVar[str] = "hello"
    name: str


@dataclass(frozen=True, slots=True)
class Register(Request):
    """Make a namespace known. -> [digest]"""

    operation: ClassVar[str] = "register"
    descriptor: str


@dataclass(frozen=True, slots=True)
class AdapterDigest(Request):
    """Content digest of a PEFT folder on the daemon's machine. -> [hex digest, identity: list of ints]"""

    operation: ClassVar[str] = "adapter_digest"
    path: str


@dataclass(frozen=True, slots=True)
class Lookup(Request):
    """Leading run of `keys` held anywhere; holds what is in the arena under `lease` where one is given (b"": none).

    -> [tiers: one byte a hit, a Tier value]. `group` keys make one chunk (its shards): the run ends with a whole chunk.
    """

    operation: ClassVar[str] = "lookup"
    lease: bytes
    keys: bytes
    group: int
    ttl: float


@dataclass(frozen=True, slots=True)
class Prefetch(Request):
    """Raise keys into the arena and hold them under `lease`. -> []"""

    operation: ClassVar[str] = "prefetch"
    lease: bytes
    keys: bytes
    ttl: float


@dataclass(frozen=True, slots=True)
class Acquire(Request):
    """Raise keys into the arena and hold them under `lease` for reading.

    -> PART/OK: [[position, size, checksum, [offset, length, ...]] or [position, cause], ...], each position once.
    """

    operation: ClassVar[str] = "acquire"
    lease: bytes
    keys: bytes
    ttl: float


@dataclass(frozen=True, slots=True)
class Renew(Request):
    """Prolong a lease. -> [held still]"""

    operation: ClassVar[str] = "renew"
    lease: bytes
    ttl: float


@dataclass(frozen=True, slots=True)
class Release(Request):
    """End a lease; `keys` are those whose bytes disagreed with their checksum. -> [held until now]"""

    operation: ClassVar[str] = "release"
    lease: bytes
    keys: bytes


@dataclass(frozen=True, slots=True)
class Reserve(Request):
    """Space for new objects. parents: a key each, NO_PARENT for a chain's first. -> [extents or cause, ...]"""

    operation: ClassVar[str] = "reserve"
    lease: bytes
    namespace: bytes
    keys: bytes
    parents: bytes
    sizes: list[int]
    ttl: float


@dataclass(frozen=True, slots=True)
class Commit(Request):
    """Make written objects visible and end their lease. checksums: xxh3_64 each. -> ["" or cause, ...]"""

    operation: ClassVar[str] = "commit"
    lease: bytes
    keys: bytes
    checksums: list[int]


@dataclass(frozen=True, slots=True)
class Abort(Request):
    """End a write lease without making anything visible. -> [held until now]"""

    operation: ClassVar[str] = "abort"
    lease: bytes


@dataclass(frozen=True, slots=True)
class Pin(Request):
    """Keep objects in a tier. ttl: seconds, 0 for ever. -> [pinned]"""

    operation: ClassVar[str] = "pin"
    keys: bytes
    tier: str
    ttl: float


@dataclass(frozen=True, slots=True)
class Unpin(Request):
    """End pins. -> [unpinned]"""

    operation: ClassVar[str] = "unpin"
    keys: bytes
    tier: str


@dataclass(frozen=True, slots=True)
class Evict(Request):
    """Remove objects and their descendants from tiers. -> [objects, bytes, skipped]"""

    operation: ClassVar[str] = "evict"
    keys: bytes
    tiers: list[str]


@dataclass(frozen=True, slots=True)
class Clear(Request):
    """Remove everything from tiers, but for what is leased or pinned. -> [objects, bytes, skipped]"""

    operation: ClassVar[str] = "clear"
    tiers: list[str]


@dataclass(frozen=True, slots=True)
class Flush(Request):
    """Wait until what is committed by now is written to the lower tiers, and what is evicted deleted there. -> []"""

    operation: ClassVar[str] = "flush"


@dataclass(frozen=True, slots=True)
class Status(Request):
    """Everything an operator asks first. -> [a map]"""

    operation: ClassVar[str] = "status"


@dataclass(frozen=True, slots=True)
class Report(Request):
    """Failures that a client saw and the daemon did not, by cause. -> []"""

    operation: ClassVar[str] = "report"
    counts: dict[str, int]


OPERATIONS: dict[str, type[Request]] = {cls.operation: cls for cls in Request.__subclasses__()}


def decode_request(message: Any) -> tuple[int, Request]:
    """(number, request) of a received message. Raises ProtocolError naming the field and the value."""
    if not isinstance(message, list) or len(message) < 2 or not _is_int(message[0]):
        raise ProtocolError("a request is a list: number, operation, fields")
    number, operation, *values = message
    cls = OPERATIONS.get(operation) if isinstance(operation, str) else None
    if cls is None:
        raise ProtocolError(f"unknown operation {_shown(operation)}; known: {', '.join(OPERATIONS)}")
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if len(values) != len(names):
        raise ProtocolError(f"{operation} takes {len(names)} fields ({', '.join(names)}), not {len(values)}")
    for name, value in zip(names, values, strict=True):
        problem = _CHECKS[name](value)
        if problem:
            raise ProtocolError(f"{operation}: {name} {problem}, not {_shown(value)}")
    return number, cls(*values)


def _shown(value: object) -> str:
    """A received value for a message: cut short, and not deeper than a few levels, for its text may never end."""
    return reprlib.repr(value[:60] if isinstance(value, str | bytes) else value)[:80]


def _is_int(value: object) -> bool:
    return type(value) is int


def _text(value: object) -> str:
    return "" if isinstance(value, str) and len(value) <= _MAX_TEXT else f"must be a string of at most {_MAX_TEXT}"


def _keys(value: object) -> str:
    fits = isinstance(value, bytes) and len(value) % KEY_BYTES == 0
    return "" if fits else f"must be bytes, {KEY_BYTES} a key"


def _lease(value: object) -> str:
    fits = isinstance(value, bytes) and len(value) in (0, LEASE_BYTES)
    return "" if fits else f"must be {LEASE_BYTES} bytes"


def _ttl(value: object) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_TTL_S
    return "" if fits else f"must be seconds from 0 to {MAX_TTL_S:.0f}"


def _group(value: object) -> str:
    return "" if _is_int(value) and 1 <= value <= 4096 else "must be an integer from 1 to 4096"  # type: ignore[operator]


def _unsigned(value: object) -> str:
    fits = isinstance(value, list) and all(_is_int(item) and 0 <= item < 2**64 for item in value)
    return "" if fits else "must be a list of unsigned integers of 64 bits"


def _texts(value: object) -> str:
    return (
        "" if isinstance(value, list) and all(isinstance(item, str) for item in value) else "must be a list of strings"
    )


def _counts(value: object) -> str:
    fits = isinstance(value, dict) and len(value) <= 64 and all(_is_count(*item) for item in value.items())
    return "" if fits else "must map at most 64 names of a-z, 0-9, _ and . to counts"


def _is_count(name: object, count: object) -> bool:
    return isinstance(name, str) and bool(_COUNTER.fullmatch(name)) and _is_int(count) and 0 <= count < 2**32  # type: ignore[operator]


_CHECKS = {
    "checksums": _unsigned,
    "counts": _counts,
    "descriptor": _text,
    "group": _group,
    "keys": _keys,
    "lease": _lease,
    "name": _text,
    "namespace": lambda value: "" if isinstance(value, bytes) and len(value) == KEY_BYTES else "must be 32 bytes",
    "parents": _keys,
    "path": _text,
    "sizes": _unsigned,
    "tier": _text,
    "tiers": _texts,
    "ttl": _ttl,
}
