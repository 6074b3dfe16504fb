# SPDX-License-Identifier: Apache-2.0
"""The messages of the unix socket, in frames (frames.py).

The daemon speaks first: a Greeting, with the arena's file descriptor beside it (SCM_RIGHTS). Then the client sends
requests `[number, operation, field, ...]` and the daemon answers `[number, status, ...]`: OK ends the answer, PART
announces more to come, ERROR carries a message, and so does UNKNOWN: what the request names is not there. Number 0 asks
for no answer. Many keys travel as one byte string, 32 bytes each.

Here are the operations of the data path; what operators ask for is in control_messages.py. Pure encoding and checking;
used by both sides.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import chain
from typing import Any, ClassVar

from loracache.errors import ProtocolError, UsageError
from loracache.keys import KEY_BYTES
from loracache.wire.fields import CHECKS, LEASE_BYTES, MAX_TTL_S, PRIORITIES, Priority, is_int
from loracache.wire.frames import frame

__all__ = [
    "ERROR", "LEASE_BYTES", "MAX_TTL_S", "NOWHERE", "NO_PARENT", "OK", "PART", "PRIORITIES", "SOCKET_PATH_BYTES",
    "UNKNOWN", "VERSION", "Abort", "Acquire", "AdapterAdd", "AdapterDigest", "AdapterFind", "AdapterList",
    "AdapterPrioritize", "AdapterRemove", "AdapterShow", "Commit", "Flush", "Greeting", "Hello", "Keep", "Lookup",
    "Prefetch", "Priority", "Register", "Release", "Renew", "Report", "Request", "Reserve", "Resident", "Status",
    "fault", "field_names", "join_keys", "shown", "split_keys",
]  # fmt: skip

VERSION = 1
NO_PARENT = bytes(KEY_BYTES)
_RUN = struct.Struct(f"{KEY_BYTES}s" * 32)  # 32 keys at once: a third of the time of slices
NOWHERE = 255  # in the place of a Tier value
SOCKET_PATH_BYTES = 107  # what the kernel takes
OK, PART, ERROR, UNKNOWN = 0, 1, 2, 3


def split_keys(blob: bytes) -> list[bytes]:
    """The 32-byte keys in `blob`."""
    runs = len(blob) - len(blob) % _RUN.size
    keys = list(chain.from_iterable(_RUN.iter_unpack(memoryview(blob)[:runs])))
    return keys + [blob[at : at + KEY_BYTES] for at in range(runs, len(blob), KEY_BYTES)]


def join_keys(keys: Sequence[bytes]) -> bytes:
    """One byte string of 32-byte keys. Raises UsageError where one has another length."""
    blob = b"".join(keys)
    if len(blob) != KEY_BYTES * len(keys) or not {KEY_BYTES}.issuperset(map(len, keys)):
        raise UsageError(f"a key has {KEY_BYTES} bytes")
    return blob


@dataclass(frozen=True, slots=True)
class Greeting:
    """The daemon's first frame, sent with the arena's descriptor."""

    version: int
    instance: bytes
    """16 random bytes of this daemon's run."""
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
        if not isinstance(instance, bytes) or not all(is_int(size) and size > 0 for size in sizes):
            raise ProtocolError("the server did not greet as a LoRACache daemon does")
        return cls(*message)


class Request:
    """Base of all requests. A field's name decides how it is checked (fields.py)."""

    operation: ClassVar[str]
    __slots__ = ()

    def encode(self, number: int) -> bytes:
        """As a frame. Fields at the end that have their default value are left out: an older daemon has none."""
        names, defaults = _fields(type(self))
        values = [getattr(self, name) for name in names]
        while values and values[-1] == defaults[len(values) - 1]:
            values.pop()
        return frame([number, self.operation, *values])


@dataclass(frozen=True, slots=True)
class Hello(Request):
    """Who is speaking: for status and logs."""

    operation: ClassVar[str] = "hello"
    name: str


@dataclass(frozen=True, slots=True)
class Register(Request):
    """Make a namespace known, and what its model is called. -> [digest]"""

    operation: ClassVar[str] = "register"
    descriptor: str
    names: list[str]


@dataclass(frozen=True, slots=True)
class AdapterDigest(Request):
    """Content digest of a PEFT folder on the daemon's machine. -> [hex digest, identity: list of ints]"""

    operation: ClassVar[str] = "adapter_digest"
    path: str


@dataclass(frozen=True, slots=True)
class AdapterAdd(Request):
    """Take the PEFT folder at `path` on the daemon's machine into the cache, and point `name` at it. -> [hex digest]"""

    operation: ClassVar[str] = "adapter_add"
    path: str
    name: str
    """An empty one points nowhere."""
    by: str
    """Who asked, for the audit log. Believed of the daemon's own REST process; of others noted as what they say."""
    priority: str = ""
    """low, normal or high; "": as it is."""


@dataclass(frozen=True, slots=True)
class AdapterFind(Request):
    """What a name points to now. -> [hex digest], or [] where nobody knows the name"""

    operation: ClassVar[str] = "adapter_find"
    name: str


@dataclass(frozen=True, slots=True)
class AdapterShow(Request):
    """An adapter by name or hex digest. -> [a map], or [] where nobody knows it"""

    operation: ClassVar[str] = "adapter_show"
    name: str


@dataclass(frozen=True, slots=True)
class AdapterList(Request):
    """The next adapters by name, none at the end. -> [a map as of AdapterShow, ...]"""

    operation: ClassVar[str] = "adapter_list"
    name: str
    """Behind which they begin."""
    count: int
    """At most so many."""


@dataclass(frozen=True, slots=True)
class AdapterRemove(Request):
    """Forget a name; what no name points to any more leaves all tiers with its KV. -> [objects, bytes, skipped], or []
    where nobody knows the name"""

    operation: ClassVar[str] = "adapter_remove"
    name: str
    by: str
    """As of AdapterAdd."""


@dataclass(frozen=True, slots=True)
class AdapterPrioritize(Request):
    """Give a name another priority. -> [hex digest], or [] where nobody knows the name"""

    operation: ClassVar[str] = "adapter_prioritize"
    name: str
    by: str
    """As of AdapterAdd."""
    priority: str
    """As of AdapterAdd."""


@dataclass(frozen=True, slots=True)
class Resident(Request):
    """The adapters that this client, an engine, holds in its own memory (tier gpu) from now on. -> []"""

    operation: ClassVar[str] = "resident"
    keys: bytes


@dataclass(frozen=True, slots=True)
class Lookup(Request):
    """Leading run of `keys` held anywhere, and where each of `beside` is. -> [tiers: one byte a hit, a Tier value], and
    where there are keys beside, behind it one byte for each of these, a Tier value or NOWHERE."""

    operation: ClassVar[str] = "lookup"
    lease: bytes
    """Holds what is in the arena; b"": none."""
    keys: bytes
    group: int
    """So many keys make one chunk (its shards): the run ends with a whole chunk."""
    ttl: float
    beside: bytes = b""
    """Objects of the model's other groups (groups.py), chunk by chunk as `keys`, as many for each, or without keys.
    Behind the run nothing may be said of them. What is found is neither held nor counted as used: who asks decides
    which of them it needs, and says so by acquiring them."""


@dataclass(frozen=True, slots=True)
class Prefetch(Request):
    """Raise keys into the arena and hold them under `lease`. -> []"""

    operation: ClassVar[str] = "prefetch"
    lease: bytes
    keys: bytes
    ttl: float
    delay: float = 0.0
    """Seconds in which they will be asked for, in order: by then they are raised, their adapter before them, and held
    by the daemon itself; `lease` then names them. 0: they are raised now."""


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
    """End a lease. -> [held until now]"""

    operation: ClassVar[str] = "release"
    lease: bytes
    keys: bytes
    """Those whose bytes disagreed with their checksum."""


@dataclass(frozen=True, slots=True)
class Reserve(Request):
    """Space for new objects. -> [extents or cause, ...]"""

    operation: ClassVar[str] = "reserve"
    lease: bytes
    namespace: bytes
    keys: bytes
    parents: bytes
    """A key each, NO_PARENT for a chain's first."""
    sizes: list[int]
    ttl: float
    wait: float = 0.0
    """Seconds that it may take for room, where the writer waits rather than have a queued write given up; 0: at once,
    and the oldest queued writes make room."""
    beside: bytes = b""
    """Those of `keys` that are of the model's other groups: each hangs under its chunk's object of full attention, or
    under nothing where no layer has full attention. A parent may stand before its child in the same request."""


@dataclass(frozen=True, slots=True)
class Keep(Request):
    """Keep objects for a time since their last use, as far as their tenant may, and give them a priority. -> []"""

    operation: ClassVar[str] = "keep"
    keys: bytes
    ttl: float
    """Seconds; 0: not at all."""
    priority: str = ""
    """low, normal or high; "": as it is."""


@dataclass(frozen=True, slots=True)
class Commit(Request):
    """Make written objects visible and end their lease. -> [cause, "" for none, ...]"""

    operation: ClassVar[str] = "commit"
    lease: bytes
    keys: bytes
    checksums: list[int]
    """xxh3_64 each."""


@dataclass(frozen=True, slots=True)
class Abort(Request):
    """End a write lease without making anything visible. -> [held until now]"""

    operation: ClassVar[str] = "abort"
    lease: bytes


@dataclass(frozen=True, slots=True)
class Flush(Request):
    """Wait until what is committed by now is written to the lower tiers or given up, and what is evicted deleted there.
    -> [a map: a lower tier's label -> [objects durable there, objects given up]]: of what was written since this
    connection's last flush, or, at its first, since anybody's
    """

    operation: ClassVar[str] = "flush"


@dataclass(frozen=True, slots=True)
class Status(Request):
    """Everything an operator asks first. -> [a map]"""

    operation: ClassVar[str] = "status"


@dataclass(frozen=True, slots=True)
class Report(Request):
    """What a client saw and the daemon did not: failures by cause, and what an engine's requests are about. -> [keys of
    the adapters in memory that requests to any engine ask for most, in that order], none where nothing is asked of
    adapters
    """

    operation: ClassVar[str] = "report"
    counts: dict[str, int]
    running: int = -1
    """Requests that it runs now; -1: nothing is said of them."""
    waiting: int = 0
    """Requests that wait."""
    adapters: bytes = b""
    """The adapter of each request that has arrived since the last report, of those that have one."""
    prefill: int = 0
    """Bytes of KV that it computes a second; 0: it does not know."""
    wanted: bytes = b""
    """The adapters of requests that wait, each once, those of whom most wait first."""


def field_names(cls: type[Request]) -> tuple[str, ...]:
    """Of a kind of request."""
    return _fields(cls)[0]


def _fields(cls: type[Request]) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """Names, and default values (MISSING where there is none). Kept: dataclasses take as long to say them as all else
    takes."""
    known = _FIELDS.get(cls)
    if known is None:
        told = fields(cls)  # type: ignore[arg-type]
        known = _FIELDS[cls] = tuple(field.name for field in told), tuple(field.default for field in told)
    return known


_FIELDS: dict[type[Request], tuple[tuple[str, ...], tuple[object, ...]]] = {}


def fault(request: Request) -> str:
    """What is wrong with a request's fields, or ""."""
    for name in field_names(type(request)):
        value = getattr(request, name)
        if problem := CHECKS[name](value):
            return f"{request.operation}: {name} {problem}, not {shown(value)}"
    return ""


def shown(value: object) -> str:
    """A received value for a message: cut short, and not deeper than a few levels, for its text may never end."""
    return reprlib.repr(value[:60] if isinstance(value, str | bytes) else value)[:80]
