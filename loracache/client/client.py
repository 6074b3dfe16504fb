# SPDX-License-Identifier: Apache-2.0
"""CacheClient: what connectors, the command line and users hold to talk to a daemon.

One client belongs to one thread. `Connection` underneath never blocks unless asked to `wait`: requests are sent at
once, answers are collected by `poll`, so that an engine's loop can ask early and look later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from loracache.client.connection import Connection, Reply
from loracache.client.control import ControlCalls
from loracache.errors import LeaseLost, ProtocolError, Unavailable, UsageError
from loracache.keys import KEY_BYTES, Namespace, checksum
from loracache.results import Cause
from loracache.tiers import labels
from loracache.wire import protocol
from loracache.wire.fields import MAX_WAIT_S

__all__ = ["Adapter", "CacheClient", "Flushed", "Lookup", "Reading", "Reservation", "Slot"]

_LEASE_TTL_S = 30.0
_PAGE = 500
_ANSWER_S = 10.0  # on top of what the daemon is told to wait


@dataclass(frozen=True, slots=True)
class Lookup:
    """How far a chain is held."""

    tiers: tuple[str, ...]
    """For each leading key that is there the fastest tier that has it: "cpu", "disk" or "redis"."""

    @property
    def hits(self) -> int:
        """How many leading keys are held."""
        return len(self.tiers)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of the cache."""

    name: str
    digest: str
    """Of its content, in hex."""
    added: float
    """Unix seconds."""
    config: str
    """The adapter_config.json it was added with."""
    size: int
    """Bytes, 0 where no tier of this daemon but Redis has it."""
    tiers: tuple[str, ...]
    """Where it is; "gpu": in some engine's memory."""
    engines: int
    """How many engines hold it in their own memory."""
    kv: dict[str, tuple[int, int]]
    """What depends on it, by tier as (objects, bytes)."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Adapter:
        """From the daemon's answer. Raises ProtocolError where it is none."""
        try:
            kv = {str(tier): (int(held[0]), int(held[1])) for tier, held in fields["kv"].items()}
            return cls(**(fields | {"tiers": tuple(fields["tiers"]), "kv": kv}))
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise ProtocolError(f"the daemon's answer is malformed: {error}") from None


@dataclass(frozen=True, slots=True)
class Slot:
    """One object in the arena."""

    key: bytes
    """32 bytes."""
    size: int
    """Bytes of payload."""
    checksum: int
    """xxh3_64 of the payload; 0 where it is to be written."""
    buffers: tuple[memoryview, ...]
    """The payload as views of the mapped memory, in order; together `size` bytes."""

    def tobytes(self) -> bytes:
        """A copy of the payload. Raises LeaseLost where it does not match its checksum."""
        data = b"".join(self.buffers)
        if checksum([data]) != self.checksum:
            raise LeaseLost(f"object {self.key.hex()}: the bytes do not match their checksum")
        return data


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a flush found, by lower tier: "disk", "redis". What was written since the client's last flush counts, or, at
    its first, since anybody's; of all clients of the daemon, for they share its queues.
    """

    durable: dict[str, int]
    """Objects that were written there and are there."""
    given_up: dict[str, int]
    """Objects that are not: the device was full or failed, the queue was longer than memory, or they had to make room
    for later ones. The counters `write.TIER.dropped.CAUSE` and `evict.disk.CAUSE` of `status` say why."""

    @property
    def complete(self) -> bool:
        """Whether nothing was given up."""
        return not any(self.given_up.values())

    @classmethod
    def of(cls, payload: Sequence[Any]) -> Flushed:
        """From the daemon's answer. Raises ProtocolError where it is none."""
        try:
            counts = {str(tier): (int(counts[0]), int(counts[1])) for tier, counts in payload[0].items()}
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise ProtocolError(f"the daemon's answer is malformed: {error}") from None
        return cls({tier: each[0] for tier, each in counts.items()}, {tier: each[1] for tier, each in counts.items()})


@dataclass(slots=True)
class Reading:
    """Objects held for reading."""

    slots: list[Slot | None]
    """One a key, in their order; None where it could not be read."""
    causes: list[Cause]
    """Why not, one a key; NONE where it can be read."""
    bad: list[bytes] = field(default_factory=list)
    """Keys that the reader adds because their bytes do not match their checksum; they are not served again."""


@dataclass(slots=True)
class Reservation:
    """Space reserved for new objects: write each slot's buffers, then leave the context to commit."""

    slots: list[Slot | None]
    """One a key, in their order; None where it has no space."""
    causes: list[Cause]
    """Why not, one a key (EXISTS: nothing needs to be written); after the commit, why it was not committed."""

    def write(self, position: int, data: bytes | memoryview) -> None:
        """Copy the payload of one object into its slot."""
        slot = self.slots[position]
        if slot is None:
            raise UsageError(f"object {position} has no space reserved: {self.causes[position]}")
        view = memoryview(data).cast("B")
        if len(view) != slot.size:
            raise UsageError(f"object {position} was reserved with {slot.size} bytes, not {len(view)}")
        at = 0
        for buffer in slot.buffers:
            buffer[:] = view[at : at + len(buffer)]
            at += len(buffer)


class CacheClient(ControlCalls):
    """A connection to a LoRACache daemon.

    >>> with CacheClient("unix:///run/loracache.sock") as cache:
    ...     cache.lookup(keys).hits

    Every method raises Unavailable where the daemon does not answer within `timeout` seconds (reconnecting is a
    matter of calling again), Rejected where it refuses, and ProtocolError where it answers nonsense.

    durable: what this client stores is meant to last. Its `reserve` waits for room, `timeout` seconds at most, rather
    than have writes given up that are queued for the lower tiers, and its own are given up for nobody.
    """

    def __init__(self, server: str, *, timeout: float = 10.0, name: str = "client", durable: bool = False) -> None:
        self.connection = Connection(server, name=name)
        self._timeout = timeout
        self._wait = min(timeout, MAX_WAIT_S) if durable else 0.0
        self._committed_to = b""  # the daemon's run that took the first commit since the last flush
        self.connection.connect()

    def __enter__(self) -> CacheClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; its leases end."""
        self.connection.close()

    def register(self, namespace: Namespace, names: Sequence[str] = ()) -> bytes:
        """Make a namespace known to the daemon before objects are stored in it, and what its model is called; answers
        its digest (32 bytes)."""
        self._call(protocol.Register(namespace.descriptor(), list(names)))
        return namespace.digest()

    def lookup(self, keys: Sequence[bytes], *, group: int = 1) -> Lookup:
        """The longest leading run of `keys` that any tier holds. `group` keys make one chunk and count together."""
        (tiers,) = self._call(protocol.Lookup(b"", protocol.join_keys(keys), group, 0.0))
        return Lookup(labels(tiers))

    @contextlib.contextmanager
    def reserve(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        *,
        parents: Sequence[bytes] | None = None,
        ttl: float = _LEASE_TTL_S,
    ) -> Iterator[Reservation]:
        """Reserve space, write into it, and commit on leaving the context (abort where it is left by an exception).

        parents: each object's parent key, b"" for the first of a chain; left out, the keys are one chain from its
        start. On leaving, `causes` says of each object whether it was committed ("") or why not.
        """
        parents = [b"", *keys[:-1]] if parents is None else parents
        if not len(keys) == len(sizes) == len(parents):
            raise UsageError(f"{len(keys)} keys, {len(sizes)} sizes and {len(parents)} parents: give one of each")
        lease = os.urandom(protocol.LEASE_BYTES)
        blob = protocol.join_keys([parent or protocol.NO_PARENT for parent in parents])
        try:
            request = protocol.Reserve(lease, namespace, protocol.join_keys(keys), blob, list(sizes), ttl, self._wait)
            answer = self._call(request, self._timeout + (self._wait and _ANSWER_S))
            causes = [Cause.NONE if isinstance(item, list) else _cause(item) for item in answer]
        except (Unavailable, ProtocolError):  # which do not say that nothing was reserved
            self.connection.abort(lease)
            raise
        slots = [
            self._slot(key, size, 0, item) if isinstance(item, list) else None
            for key, size, item in zip(keys, sizes, answer, strict=True)
        ]
        reservation = Reservation(slots, causes)
        if not any(slots):
            yield reservation
            return
        written = [slot for slot in slots if slot is not None]
        try:
            yield reservation
            sums = [checksum(slot.buffers) for slot in written]
            commit = protocol.Commit(lease, protocol.join_keys([slot.key for slot in written]), sums)
            done = dict(zip([slot.key for slot in written], map(_cause, self._call(commit)), strict=True))
        except BaseException:
            self.connection.abort(lease)
            raise
        self._committed_to = self._committed_to or self.connection.instance
        reservation.causes = [
            done[slot.key] if slot is not None else cause for slot, cause in zip(slots, causes, strict=True)
        ]

    @contextlib.contextmanager
    def acquire(
        self, keys: Sequence[bytes], *, ttl: float = _LEASE_TTL_S, timeout: float | None = None
    ) -> Iterator[Reading]:
        """Hold objects for reading, raised into the arena from whichever tier has them; released on leaving.

        Raises LeaseLost on leaving where the lease ended before (it took longer than `ttl`, or the daemon was
        restarted): what was read may then be another object's bytes.
        """
        lease = os.urandom(protocol.LEASE_BYTES)
        self._connect()
        number = self.connection.send(protocol.Acquire(lease, protocol.join_keys(keys), ttl))
        reading = Reading([None] * len(keys), [Cause.TIMEOUT] * len(keys))
        limit = self._timeout if timeout is None else timeout
        instance = self.connection.instance
        try:
            while True:
                reply = self.connection.wait(number, limit)
                for position, *rest in reply.payload:
                    if len(rest) == 1:
                        reading.causes[position] = _cause(rest[0])
                        continue
                    size, expected, extents = rest
                    reading.slots[position] = self._slot(keys[position], size, expected, extents)
                    reading.causes[position] = Cause.NONE
                if reply.last:
                    break
            yield reading
        except BaseException:
            self.connection.forget(number)
            self.connection.send(protocol.Release(lease, protocol.join_keys(reading.bad)), answer=False)
            raise
        held = self._call(protocol.Release(lease, protocol.join_keys(reading.bad)))
        if not held[0] or self.connection.instance != instance:
            raise LeaseLost(f"the lease ended while {len(keys)} objects were read; do not use them")

    def get(self, key: bytes) -> bytes | None:
        """A copy of one object's payload, or None where no tier holds it. Raises LeaseLost where its bytes do not match
        their checksum; they are not served again."""
        with self.acquire([key]) as reading:
            slot = reading.slots[0]
            if slot is None:
                return None
            try:
                return slot.tobytes()
            except LeaseLost:
                reading.bad.append(key)
                raise

    def add_adapter(self, path: str, name: str = "", *, timeout: float = 600.0) -> str:
        """Take the PEFT folder at `path` (on the daemon's machine) into the cache and point `name` at it; answers its
        hex digest. Raises Rejected naming file, tensor and reason."""
        (digest,) = self._call(protocol.AdapterAdd(path, name, ""), timeout)
        return str(digest)

    def find_adapter(self, name: str) -> str | None:
        """The hex digest that a name points to now, or None."""
        found = self._call(protocol.AdapterFind(name))
        return str(found[0]) if found else None

    def show_adapter(self, name: str) -> Adapter | None:
        """What there is to say of an adapter, by name or hex digest, or None where nobody knows it."""
        found = self._call(protocol.AdapterShow(name))
        return Adapter.of(found[0]) if found else None

    def adapters(self) -> Iterator[Adapter]:
        """All adapters that have a name, in the order of names."""
        after = ""
        while page := self._call(protocol.AdapterList(after, _PAGE)):
            found = [Adapter.of(item) for item in page]
            yield from found
            after = found[-1].name

    def remove_adapter(self, name: str) -> tuple[int, int, int] | None:
        """Forget a name; what no name points to any more leaves all tiers with its KV. Answers as `evict`, or None
        where nobody knows the name."""
        found = self._call(protocol.AdapterRemove(name, ""))
        return (found[0], found[1], found[2]) if found else None

    def flush(self, timeout: float | None = None) -> Flushed:
        """Wait until all that is committed by now is written to disk and Redis or given up, and all that is evicted
        from them by now is deleted; answers how many objects are durable there, and how many were given up. Raises
        Unavailable, too, where the daemon was started anew since this client committed: what the one before it had not
        written is lost.
        """
        flushed = Flushed.of(self._call(protocol.Flush(), timeout))
        committed_to, self._committed_to = self._committed_to, b""
        if committed_to not in (b"", self.connection.instance):
            raise Unavailable("the daemon was started anew since objects were committed; store what is not there again")
        return flushed

    def status(self) -> dict[str, object]:
        """Tiers, bytes, objects, leases and all counters."""
        (status,) = self._call(protocol.Status())
        return dict(status)

    def _call(self, request: protocol.Request, timeout: float | None = None) -> list:  # type: ignore[type-arg]
        self._connect()
        reply: Reply = self.connection.call(request, self._timeout if timeout is None else timeout)
        return reply.payload

    def _connect(self) -> None:
        if not self.connection.connected:
            self.connection.connect()

    def _slot(self, key: bytes, size: int, expected: int, extents: list[int]) -> Slot:
        if len(key) != KEY_BYTES:
            raise UsageError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        return Slot(key, size, expected, tuple(self.connection.buffers(extents, size)))


def _cause(value: Any) -> Cause:
    try:
        return Cause(value)
    except ValueError:
        raise ProtocolError(f"the daemon's answer is malformed: {value!r:.60} is an unknown cause") from None
