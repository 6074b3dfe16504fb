# SPDX-License-Identifier: Apache-2.0
"""One client's connection: decodes requests, calls the cache, encodes answers.

What the index can answer is answered in the same call that received it; what waits for a tier answers later, and the
requests behind it do not wait. Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from loracache.cache.state.leases import Grip, Writing
from loracache.cache.tiered import Acquired
from loracache.control.steps import answer, start
from loracache.daemon.room import durable_since, reserve_in_time
from loracache.errors import LoRACacheError, ProtocolError, Rejected, Unknown, UsageError
from loracache.results import Cause
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier
from loracache.wire import protocol
from loracache.wire.frames import Frames, frame
from loracache.wire.protocol import ERROR, NO_PARENT, OK, PART, UNKNOWN, split_keys
from loracache.wire.requests import AnyRequest, decode_request

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters
    from loracache.control.lookup import Finder, Hits
    from loracache.control.service import Control
    from loracache.daemon.processes import Peer
    from loracache.namespaces import Namespaces

__all__ = ["Served", "Session"]

_log = logging.getLogger(__name__)
_MAX_UNSENT = 64 << 20
_REPORTED = "client."
_REST = "http"  # what its REST process is called where it does not say whom it asks for
_Asked = TypeVar("_Asked", bound=protocol.Request)
_KEEP_S = 2.0
_MOST_COUNTERS = 1000  # names that clients make up do not fill the memory


@dataclass(frozen=True, slots=True)
class Served:
    """What all sessions of a daemon work on. status() is what `loracache status` shows; ended(session) is called when a
    connection is gone; rest_pid() is the daemon's own REST process, the one client that is believed who it asks for.
    """

    cache: TieredCache
    namespaces: Namespaces
    adapters: Adapters
    finder: Finder
    control: Control
    status: Callable[[], dict[str, Any]]
    ended: Callable[[Session], None]
    rest_pid: Callable[[], int | None]


class Session(asyncio.Protocol):
    """Serves one connection. `owner` is its number: what its leases are kept under."""

    def __init__(self, served: Served, owner: int, peer: Peer) -> None:
        self.owner = owner
        self.peer = peer
        self.name = ""
        self._since = time.monotonic()
        self._served = served
        self._cache = served.cache
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._resident: set[bytes] = set()  # adapters that this engine holds in its own memory
        self._asking: set[bytes] = set()  # leases of what waits for a tier, until they are released
        self._flushed = served.cache.flushes.interval  # which began with the last flush

    # -- asyncio.Protocol ----------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The greeting was sent before; requests may come."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection's leases."""
        self._transport = None
        self._served.adapters.engines.subtract(self._resident)
        self._served.ended(self)

    def data_received(self, data: bytes) -> None:
        """Serve every request that is complete."""
        try:
            for message in self._frames.feed(data):
                number, request = decode_request(message)
                self._serve(number, request)
        except ProtocolError as error:
            self._cache.counters.add("failure.protocol")
            _log.warning("connection %d (%s, pid %d): %s", self.owner, self.name, self.peer.pid, error)
            self._answer(0, ERROR, str(error))
            self.close()

    @property
    def age(self) -> float:
        """Seconds since it was accepted."""
        return time.monotonic() - self._since

    def _asker(self, request: _Asked) -> tuple[str, _Asked]:
        """Who asks, for the audit log, and the request, where `by` then is what the client says of itself. The kernel
        knows the process at the other end; our REST process knows whose token it was sent."""
        process = f"pid {self.peer.pid}, uid {self.peer.uid}"
        said: str | None = getattr(request, "by", None)
        if said is None:
            return process, request
        named: Any = dataclasses.replace
        if self.peer.pid == self._served.rest_pid():
            return said or _REST, named(request, by="")
        return process, named(request, by=said or self.name)

    def close(self) -> None:
        """Close after what was answered is sent."""
        if self._transport is not None:
            self._transport.close()

    # -- requests ----------

    def _serve(self, number: int, request: AnyRequest) -> None:
        try:
            self._dispatch(number, request)
        except ProtocolError:
            raise
        except LoRACacheError as error:
            self._refuse(number, error)

    def _dispatch(self, number: int, request: AnyRequest) -> None:
        match request:  # what engines send most stands first; mypy sees that what is left is all the control's
            case protocol.Lookup():
                self._on_lookup(number, request)
            case protocol.Acquire():
                self._on_acquire(number, request)
            case protocol.Reserve():
                self._on_reserve(number, request)
            case protocol.Commit():
                self._on_commit(number, request)
            case protocol.Release():
                self._on_release(number, request)
            case protocol.Renew():
                self._on_renew(number, request)
            case protocol.Prefetch():
                self._on_prefetch(number, request)
            case protocol.Abort():
                self._on_abort(number, request)
            case protocol.Flush():
                self._on_flush(number, request)
            case protocol.Report():
                self._on_report(number, request)
            case protocol.Status():
                self._on_status(number, request)
            case protocol.Hello():
                self._on_hello(number, request)
            case protocol.Register():
                self._on_register(number, request)
            case protocol.Resident():
                self._on_resident(number, request)
            case protocol.AdapterDigest():
                self._on_adapter_digest(number, request)
            case protocol.AdapterAdd():
                self._on_adapter_add(number, request)
            case protocol.AdapterFind():
                self._on_adapter_find(number, request)
            case protocol.AdapterShow():
                self._on_adapter_show(number, request)
            case protocol.AdapterList():
                self._on_adapter_list(number, request)
            case protocol.AdapterRemove():
                self._on_adapter_remove(number, request)
            case _:
                who, asked = self._asker(request)
                start(self._reply(number, self._served.control.serve(asked, who)))

    async def _reply(self, number: int, work: Awaitable[list[Any]]) -> None:
        """Answer `number` with what `work` comes to, or with the words of its error."""
        try:
            self._answer(number, OK, await work)
        except LoRACacheError as error:
            self._refuse(number, error)
        except Exception as error:  # noqa: BLE001 - top of a coroutine: an answer that never comes hangs a client
            self._cache.counters.add("failure.control")
            _log.exception("connection %d (%s): a request failed", self.owner, self.name)
            self._refuse(number, Rejected(repr(error)))

    def _refuse(self, number: int, error: LoRACacheError) -> None:
        self._answer(number, UNKNOWN if isinstance(error, Unknown) else ERROR, str(error))

    def _answer(self, number: int, status: int, payload: object) -> None:
        if number == 0 and status != ERROR:
            return
        if self._transport is None:
            return
        self._transport.write(frame([number, status, payload]))
        if self._transport.get_write_buffer_size() > _MAX_UNSENT:
            _log.warning("connection %d (%s) does not read its answers and is closed", self.owner, self.name)
            self._transport.abort()

    def _on_hello(self, number: int, request: protocol.Hello) -> None:
        self.name = request.name[:64] or "?"
        self._answer(number, OK, [])

    def _on_register(self, number: int, request: protocol.Register) -> None:
        namespace = self._served.namespaces.register(request.descriptor, request.names)
        if namespace.adapter:
            self._cache.index.adapters.add(namespace.adapter_key())
        if namespace.digest() in self._served.namespaces.unkept:
            start(self._reply(number, self._kept(namespace.digest())))
        else:
            self._answer(number, OK, [namespace.digest()])

    async def _kept(self, digest: bytes) -> list[Any]:
        """Answers when the descriptor is as durable as what will be stored under it; a disk that hangs or is full keeps
        nobody waiting: a flush says what that costs."""
        await asyncio.wait([asyncio.ensure_future(self._served.adapters.keep_namespaces())], timeout=_KEEP_S)
        return [digest]

    def _on_adapter_digest(self, number: int, request: protocol.AdapterDigest) -> None:
        start(self._reply(number, self._served.adapters.digest(request.path)))

    def _on_adapter_add(self, number: int, request: protocol.AdapterAdd) -> None:
        work = self._served.adapters.add(request.path, request.name)
        who, request = self._asker(request)
        start(self._reply(number, self._served.control.audited(request, who, work)))

    def _on_adapter_find(self, number: int, request: protocol.AdapterFind) -> None:
        start(self._reply(number, self._served.adapters.find(request.name)))

    def _on_adapter_show(self, number: int, request: protocol.AdapterShow) -> None:
        start(self._reply(number, self._served.adapters.show(request.name)))

    def _on_adapter_list(self, number: int, request: protocol.AdapterList) -> None:
        start(self._reply(number, self._served.adapters.page(request.name, request.count)))

    def _on_adapter_remove(self, number: int, request: protocol.AdapterRemove) -> None:
        work = self._served.adapters.remove(request.name)
        who, request = self._asker(request)
        start(self._reply(number, self._served.control.audited(request, who, work)))

    def _on_resident(self, number: int, request: protocol.Resident) -> None:
        engines = self._served.adapters.engines
        engines.subtract(self._resident)
        self._resident = set(split_keys(request.keys))
        engines.update(self._resident)
        self._answer(number, OK, [])

    def _on_lookup(self, number: int, request: protocol.Lookup) -> None:
        keys = split_keys(request.keys)
        hits = self._served.finder.look(keys)
        if hits.cause:
            self._asking.discard(request.lease)
            self._answer(number, OK, self._hits(request, keys, hits))
        else:
            start(self._reply(number, self._look_in_redis(request, keys, hits)))

    async def _look_in_redis(self, request: protocol.Lookup, keys: list[bytes], hits: Hits) -> list[Any]:
        self._asking.add(request.lease)
        hits = await self._served.finder.ask_redis(keys, hits)
        wanted = request.lease in self._asking
        self._asking.discard(request.lease)
        return self._hits(request, keys, hits, hold=wanted)

    def _hits(self, request: protocol.Lookup, keys: list[bytes], hits: Hits, hold: bool = True) -> list[Any]:
        """Hold and count what was found, in whole groups."""
        counters = self._cache.counters
        count = len(hits.tiers) // request.group * request.group
        tiers = hits.tiers[:count]
        if request.lease and hold and self._transport is not None:
            self._cache.hold(self.owner, request.lease, keys[:count], request.ttl)
        counters.add("lookup")
        for tier in (Tier.CPU, Tier.DISK, Tier.REDIS):
            counters.add(f"hit.{tier.label}", tiers.count(tier))
        counters.add(f"miss.{hits.cause}", len(keys) - count)
        return [bytes(tiers)]

    def _on_prefetch(self, number: int, request: protocol.Prefetch) -> None:
        keys = split_keys(request.keys)
        self._cache.acquire(self.owner, request.lease, keys, request.ttl, lambda acquired: None, Grip.LOOSE)
        self._answer(number, OK, [])

    def _on_acquire(self, number: int, request: protocol.Acquire) -> None:
        keys = split_keys(request.keys)
        left = len(keys)
        if not keys:
            self._answer(number, OK, [])

        def ready(acquired: list[Acquired]) -> None:
            nonlocal left
            left -= len(acquired)
            for item in acquired:
                if item.node is None:
                    self._cache.counters.add(f"acquire.failed.{item.cause}")
            self._answer(number, PART if left else OK, [_acquired(item) for item in acquired])

        self._cache.acquire(self.owner, request.lease, keys, request.ttl, ready)

    def _on_renew(self, number: int, request: protocol.Renew) -> None:
        self._answer(number, OK, [self._cache.leases.renew(self.owner, request.lease, request.ttl)])

    def _on_release(self, number: int, request: protocol.Release) -> None:
        self._asking.discard(request.lease)
        held = self._cache.leases.release(self.owner, request.lease)
        if held:  # else the reader saw what came into the pages after it
            self._cache.report_bad(split_keys(request.keys))
        if not held:
            self._cache.counters.add("lease.lost")
        self._answer(number, OK, [held])

    def _on_reserve(self, number: int, request: protocol.Reserve) -> None:
        keys, parents = split_keys(request.keys), split_keys(request.parents)
        if not len(keys) == len(parents) == len(request.sizes):
            raise UsageError(
                f"{len(keys)} keys, {len(parents)} parents and {len(request.sizes)} sizes: give one of each"
            )
        namespace = self._served.namespaces.get(request.namespace)
        if namespace is None:
            raise UsageError(
                f"namespace {request.namespace.hex()} is not registered; register it on this connection first"
            )
        root = namespace.adapter_key()
        infos = [
            ObjectInfo(key, root if parent == NO_PARENT else parent, Kind.KV, request.namespace, size, 0)
            for key, parent, size in zip(keys, parents, request.sizes, strict=True)
        ]
        if request.wait:
            start(self._reply(number, self._reserve_in_time(request, infos)))
        else:
            self._answer(number, OK, _reserved(self._cache.reserve(self.owner, request.lease, infos, request.ttl)))

    async def _reserve_in_time(self, request: protocol.Reserve, infos: list[ObjectInfo]) -> list[Any]:
        if not self._cache.writers:
            raise UsageError("nothing is durable without a tier below memory; give the daemon a disk or a Redis")
        self._asking.add(request.lease)

        def wanted() -> bool:
            return self._transport is not None and request.lease in self._asking

        answers = await reserve_in_time(self._cache, self.owner, request, infos, wanted)
        self._asking.discard(request.lease)
        return _reserved(answers)

    def _on_commit(self, number: int, request: protocol.Commit) -> None:
        keys = split_keys(request.keys)
        if len(keys) != len(request.checksums):
            raise UsageError(f"{len(keys)} keys and {len(request.checksums)} checksums: give one of each")
        pairs = list(zip(keys, request.checksums, strict=True))
        self._answer(number, OK, self._cache.commit(self.owner, request.lease, pairs))

    def _on_abort(self, number: int, request: protocol.Abort) -> None:
        self._asking.discard(request.lease)
        self._answer(number, OK, [self._cache.leases.release(self.owner, request.lease)])

    def _on_flush(self, number: int, request: protocol.Flush) -> None:
        start(self._reply(number, self._flush()))

    async def _flush(self) -> list[Any]:
        flushed: asyncio.Future[None] = answer(lambda done: self._cache.when_flushed(lambda: done(None)))
        await flushed
        if self._served.namespaces.unkept:
            await self._served.adapters.keep_namespaces()
        told = durable_since(self._flushed, self._cache, self._served.namespaces.unkept)
        self._flushed = self._cache.flushes.end()
        return [told]

    def _on_status(self, number: int, request: protocol.Status) -> None:
        self._answer(number, OK, [self._served.status()])

    def _on_report(self, number: int, request: protocol.Report) -> None:
        counters = self._cache.counters
        for name, count in request.counts.items():
            known = len(counters) < _MOST_COUNTERS or counters[_REPORTED + name]
            counters.add(_REPORTED + (name if known else "other"), count)
        self._answer(number, OK, [])


def _extents(extents: tuple[tuple[int, int], ...]) -> list[int]:
    return [number for extent in extents for number in extent]


def _reserved(answers: list[Writing | Cause]) -> list[Any]:
    return [_extents(item.extents) if isinstance(item, Writing) else item for item in answers]


def _acquired(item: Acquired) -> list[Any]:
    node = item.node
    if node is None:
        return [item.position, item.cause]
    return [item.position, node.size, node.checksum, _extents(node.extents)]
