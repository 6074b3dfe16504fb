# SPDX-License-Identifier: Apache-2.0
"""CacheClient: what connectors, the command line and users hold to talk to a daemon.

One client belongs to one thread. `Connection` underneath never blocks unless asked to `wait`: requests are sent at
once, answers are collected by `poll`, so that an engine's loop can ask early and look later.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from loracache.backoff import Backoff
from loracache.client.answers import Adapter, Flushed, Lookup, Reading, Reservation, Slot
from loracache.client.connection import Connection, Reply
from loracache.client.control import ControlCalls, Selection
from loracache.client.requests import lookup_parts_beside
from loracache.errors import LeaseLost, ProtocolError, Unavailable, UsageError
from loracache.keys import KEY_BYTES, Namespace, checksum
from loracache.results import Cause
from loracache.tiers import labels, places
from loracache.wire import protocol
from loracache.wire.fields import MAX_WAIT_S

__all__ = ["CacheClient"]

_LEASE_TTL_S = 30.0
_PAGE = 500
_ANSWER_S = 10.0  # on top of what the daemon is told to wait
_GET_KEYS = 64
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1


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

    def lookup(self, keys: Sequence[bytes], *, group: int = 1, beside: Sequence[bytes] = ()) -> Lookup:
        """The longest leading run of `keys` that any tier holds. `group` keys make one chunk and count together. Many
        keys are asked for in parts, as far as they are held.

        beside: objects of the model's other groups (`Namespace.parts`), chunk by chunk, as many for each. Of each is
        answered where it is, as far as the run goes, and how far the chain can be continued then says `Lookup.chunks`.
        They count as used when they are acquired.
        """
        held: tuple[str, ...] = ()
        where: list[str] = []
        for part, others in lookup_parts_beside(keys, group, beside):
            request = protocol.Lookup(b"", protocol.join_keys(part), group, 0.0, protocol.join_keys(others))
            tiers, *told = self._call(request)
            held += labels(tiers)
            if others:
                where += _places(told, len(others))
            if len(tiers) < len(part):
                break
        return Lookup(held, (*where, *[""] * (len(beside) - len(where))))

    @contextlib.contextmanager
    def reserve(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        *,
        parents: Sequence[bytes] | None = None,
        beside: Sequence[bytes] = (),
        ttl: float = _LEASE_TTL_S,
    ) -> Iterator[Reservation]:
        """Reserve space, write into it, and commit on leaving the context (abort where it is left by an exception).

        parents: each object's parent key, b"" for the first of a chain; left out, the keys are one chain from its
        start. beside: those of them that are of the model's other groups, each with its chunk's object of the chain for
        a parent. On leaving, `causes` says of each object whether it was committed ("") or why not.
        """
        parents = [b"", *keys[:-1]] if parents is None else parents
        if not len(keys) == len(sizes) == len(parents):
            raise UsageError(f"{len(keys)} keys, {len(sizes)} sizes and {len(parents)} parents: give one of each")
        lease = os.urandom(protocol.LEASE_BYTES)
        blob = protocol.join_keys([parent or protocol.NO_PARENT for parent in parents])
        try:
            others = protocol.join_keys(beside)
            about = lease, namespace, protocol.join_keys(keys), blob, list(sizes), ttl, self._wait, others
            request = protocol.Reserve(*about)
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
        """A copy of one object's payload, or None where it cannot be had. Raises LeaseLost where its bytes do not match
        their checksum; they are not served again."""
        return next(self.get_many([key]))

    def get_many(self, keys: Sequence[bytes]) -> Iterator[bytes | None]:
        """Copies of objects' payloads, one a key, in their order, as `get`. Together they may be larger than the arena:
        as many are held at a time as it has room for. Where it has none, it is waited for, `timeout` seconds at most.
        """
        done, most = 0, _GET_KEYS
        deadline, pauses = time.monotonic() + self._timeout, Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        while done < len(keys):
            payloads, full = self._get_part(keys[done : done + most])
            yield from payloads
            done += len(payloads)
            if not full:
                continue
            most = max(1, most // 2)
            if payloads:
                deadline = time.monotonic() + self._timeout
                pauses.reset()
            elif time.monotonic() < deadline:
                time.sleep(pauses.next())
            else:
                yield None
                done += 1

    def _get_part(self, keys: Sequence[bytes]) -> tuple[list[bytes | None], bool]:
        """(copies of the first of `keys`, whether the arena had no room for the next)."""
        payloads: list[bytes | None] = []
        with self.acquire(keys) as reading:
            for slot, cause in zip(reading.slots, reading.causes, strict=True):
                if cause is Cause.MEMORY_FULL:
                    return payloads, True
                try:
                    payloads.append(slot.tobytes() if slot is not None else None)
                except LeaseLost:
                    assert slot is not None
                    reading.bad.append(slot.key)
                    raise
        return payloads, False

    def add_adapter(self, path: str, name: str = "", *, priority: str = "", timeout: float = 600.0) -> str:
        """Take the PEFT folder at `path` (on the daemon's machine) into the cache and point `name` at it; answers its
        hex digest. priority: as of `prioritize_adapter`. Raises Rejected naming file, tensor and reason."""
        if priority and not path:
            raise UsageError("path='' names no folder; prioritize_adapter() gives a name a priority")
        (digest,) = self._call(protocol.AdapterAdd(path, name, "", priority), timeout)
        return str(digest)

    def prioritize_adapter(self, name: str, priority: str) -> bool:
        """Give a name a priority: "low", "normal" or "high". It is that of the adapter's weights and KV, as far as no
        request gave another, and is kept with the name. False where nobody knows the name."""
        if priority not in protocol.PRIORITIES:
            raise UsageError(f"priority={priority!r:.30}: give one of {', '.join(protocol.PRIORITIES)}")
        return bool(self._call(protocol.AdapterPrioritize(name, "", priority)))

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
        """Forget a name; what no name points to any more leaves all tiers with its KV, but for what only Redis holds
        (`evict` takes that). Answers as `evict`, or None where nobody knows the name."""
        found = self._call(protocol.AdapterRemove(name, ""))
        return (found[0], found[1], found[2]) if found else None

    def flush(self, timeout: float | None = None, selection: Selection | Sequence[bytes] | None = None) -> Flushed:
        """Wait until all that is committed by now is written to disk and Redis or given up, as far as admission wants
        it there, and all that is evicted from them by now is deleted; answers how many objects are durable there, and
        how many were given up. With a selection, have just those objects written, whatever admission says, and answer
        for them. Raises Unavailable, too, where the daemon was started anew since this client committed: what the one
        before it had not written is lost.
        """
        if selection is not None:
            return Flushed.of([self._write_down(selection, self._timeout if timeout is None else timeout)])
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


def _places(told: list[Any], asked: int) -> list[str]:
    """Where each of so many objects is, "" for nowhere, from what is told of those beside a chain."""
    try:
        found = [place for each in told for place in places(each, protocol.NOWHERE)]
    except (TypeError, IndexError) as error:
        raise ProtocolError(f"the daemon's answer is malformed: {error!r}") from None
    if len(found) != asked:
        raise ProtocolError(f"the daemon's answer is malformed: it tells of {len(found)} objects, not of {asked}")
    return found


def _cause(value: Any) -> Cause:
    try:
        return Cause(value)
    except ValueError:
        raise ProtocolError(f"the daemon's answer is malformed: {value!r:.60} is an unknown cause") from None
