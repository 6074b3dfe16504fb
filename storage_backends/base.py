# SPDX-License-Identifier: Apache-2.0
"""The interface of a storage backend, and the contract every backend keeps.

A backend holds immutable objects under 32-byte keys and knows nothing of trees, leases or policies: which object enters
or leaves is the cache's decision. Six methods, all batched, all blocking; `check`, for those that may be out of reach;
and for those whose content is found by asking `descriptors`, `forget`, `purge`, and `tend`
where one is `due`.

What the cache guarantees
    - Buffers belong to the caller and stay valid and unmoved for the duration of the call. They are handed over as a
      list of memoryviews (format "B", contiguous) whose addresses and lengths are multiples of 4096 and whose lengths
      add up to `padded(info.size)`; what lies behind the first `info.size` bytes is unspecified.
    - An object's bytes never change under a key: storing a key twice stores the same bytes twice. How they are kept may
      change: `planes` of the last store decides.
    - `close` is the last call, and comes once.

What a backend owes
    - One result per item, in the order of the items; a bad item never fails the others of its batch.
    - No exception for anything the outside world does (I/O errors, a full device, a lost connection, corrupt bytes):
      those are Outcomes. Exceptions mean a bug, or a ConfigError from the constructor.
    - Atomicity: an object is found either whole or not at all, whenever the process dies. Storing it again with other
      `planes` replaces how it is kept in one step: who loads it meanwhile reads the one or the other, whole.
    - Compression is lossless and shows in `stored` alone: `load` fills the buffers with the payload, however it is kept
      and whatever `stored` the caller's info says. A backend may keep objects as they are for all `planes`.
    - `load` answers OK only after it checked the bytes against the key, the size and the checksum it stored; on any
      other outcome the content of the buffers is unspecified. It never answers OK for another object's bytes.
    - Every call ends in bounded time.

Threading
    All methods may be called from several threads at once, also on the same keys; `close` only after all others ended.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

__all__ = [
    "ALIGNMENT",
    "KEY_BYTES",
    "Kind",
    "ObjectInfo",
    "Outcome",
    "Purge",
    "Purpose",
    "Result",
    "Standing",
    "StorageBackend",
    "Tended",
    "Transfer",
    "padded",
]

KEY_BYTES = 32
ALIGNMENT = 4096


def padded(size: int) -> int:
    """`size` in bytes rounded up to the 4096 bytes that direct I/O moves at a time."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Kind(enum.IntEnum):
    """What an object is."""

    KV = 1
    LORA = 2
    BESIDE = 3
    """KV of layers that do not read all of a prefix: beside a chain, never part of one, so nothing hangs under it."""


class Outcome(enum.Enum):
    """How one item of a batch went. The value is the cause that counters and status show."""

    OK = "ok"
    MISS = "miss"  # the key is not there
    CORRUPT = "corrupt"  # it is there, but key, size, checksum or MAC disagree; it is deleted by the backend
    UNPROVEN = "unproven"  # it is there, of another version or whole under another integrity_key; it is left alone
    FULL = "full"  # no room: ENOSPC, quota, Redis OOM
    UNAVAILABLE = "unavailable"  # the device or server cannot be reached, or did not answer in time
    FAILED = "failed"  # any other I/O error


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What travels with an object's bytes into every tier.

    key: 32 bytes. parent: 32 bytes, or b"" for the first chunk of a chain without an adapter. namespace: 32 bytes.
    size: payload bytes. checksum: xxh3_64 of the payload's `size` bytes, an unsigned 64-bit integer.
    stored: bytes that the payload takes as a backend keeps it compressed, 0 where it is kept as it is. Backends answer
    with it; in what they are given it binds them to nothing.
    """

    key: bytes
    parent: bytes
    kind: Kind
    namespace: bytes
    size: int
    checksum: int
    stored: int = 0


@dataclass(frozen=True, slots=True)
class Transfer:
    """One object and the caller's buffers it is read from (store) or written to (load).

    planes: how `store` keeps it: 0 as it is; 1, 2, 4 or 8 compressed, after its elements of so many bytes were split
    into byte planes (codec.py). `load` ignores it.
    """

    info: ObjectInfo
    buffers: Sequence[memoryview]
    planes: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """How one item went. `info` is set by `contains` for OK; `detail` says in words what failed, for logs.

    stored: set by `store` for OK, as in ObjectInfo: 0 also where compression would not have made the object smaller.
    partial: of UNAVAILABLE: other keys can still be reached (one node of a cluster is away), or these be read (a disk
    that takes no writes).
    """

    outcome: Outcome
    info: ObjectInfo | None = None
    detail: str = field(default="", compare=False)
    stored: int = 0
    partial: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a backend can do now. reason: in words why not all of it, and what to do."""

    reads: bool = True
    writes: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Purpose:
    """Whose objects a purge removes. wanted: namespaces; None: everybody's. others: namespaces that are known, and not
    meant. kept: keys of objects that stay, whosever they are."""

    wanted: AbstractSet[bytes] | None = None
    others: AbstractSet[bytes] = frozenset()
    kept: frozenset[bytes] = frozenset()


@dataclass(slots=True)
class Purge:
    """What a purge did so far. objects, nbytes: removed, as they were kept. loose: parts of objects removed that are
    none. kept: keys of objects that were to stay. undescribed: objects left of which nobody knows whose they are.
    present: of the other namespaces, those that have objects. error: why not everything was seen or removed, or "".
    """

    objects: int = 0
    nbytes: int = 0
    loose: int = 0
    kept: set[bytes] = field(default_factory=set)
    undescribed: int = 0
    present: set[bytes] = field(default_factory=set)
    error: str = ""

    def fail(self, error: str) -> None:
        """Note why something may be left; the first reason stands."""
        self.error = self.error or error


@dataclass(slots=True)
class Tended:
    """What `tend` did. objects, nbytes: evicted, beyond the limit. orphans: parts of objects that are none, removed.
    used: bytes that are used of the limit, None where not known. error: why it did less than it should, or ""."""

    objects: int = 0
    nbytes: int = 0
    orphans: int = 0
    used: int | None = None
    error: str = ""


class StorageBackend(ABC):
    """A tier below the arena. See the module's docstring for the contract."""

    name: str  # "disk", "redis", "memory": what counters and status call it
    limit: int = 0  # bytes that a backend keeps within by itself, about; 0: it leaves that to the cache

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        """Which of `keys` are held: OK with its ObjectInfo, MISS, or UNAVAILABLE. One round trip for all."""

    @abstractmethod
    def load(self, transfers: Sequence[Transfer]) -> list[Result]:
        """Read objects into the transfers' buffers. `info.size` and `info.checksum` are what the caller expects."""

    @abstractmethod
    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        """Write objects from the transfers' buffers. OK means: visible, whole, and found again after a restart of the
        process (of the machine, where the backend was made to sync)."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        """Remove objects. OK where it was there, MISS where not; either way it is gone afterwards."""

    @abstractmethod
    def scan(self) -> Iterator[ObjectInfo]:
        """What is held when the cache starts, parents before their children as far as known. A backend whose content
        is found by asking (Redis) yields nothing. Runs on a thread of its own beside the other methods."""

    @abstractmethod
    def close(self) -> None:
        """Finish and release everything. No call follows."""

    def left_alone(self) -> dict[bytes, int]:
        """What `scan` found and did not yield, because it is of another version or without the right MAC: key ->
        bytes of the tier's budget. It is not served, and goes where somebody deletes its key."""
        return {}

    def check(self) -> Standing:
        """Look what the backend can do, and bring back what can be: a cache starts with what it has, and looks again
        while that is not all. Blocks as the others do. Raises ConfigError for what no waiting will mend.
        """
        return Standing()

    def descriptors(self) -> dict[bytes, bytes]:
        """What those who store here say of their namespaces (see Namespaces.record). Raises Unavailable."""
        return {}

    def forget(self, fields: Collection[bytes]) -> None:  # noqa: B027 - most have none
        """Drop some of the descriptors' fields. Raises Unavailable."""

    def purge(self, purpose: Purpose, did: Purge, go_on: Callable[[], bool]) -> None:  # noqa: B027 - as above
        """Remove what is found by asking alone, whoever stored it, noting in `did` what came of it, as long as
        `go_on()`. A backend whose `scan` yields all that it holds has nothing that its cache does not know."""

    @property
    def due(self) -> bool:
        """Whether `tend` has something to do."""
        return False

    def tend(self, go_on: Callable[[], bool]) -> Tended:
        """Do what is due of a backend that keeps its own house, as long as `go_on()`; slowly, on a thread of its own
        beside the other methods."""
        return Tended()

    def footprint(self, size: int) -> int:
        """Bytes of the tier's budget that an object takes: `size` is `info.stored or info.size`."""
        return size
