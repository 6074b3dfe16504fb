# SPDX-License-Identifier: Apache-2.0
"""One client's connection: decodes requests, calls the cache, encodes answers.

What the index can answer is answered in the same call that received it, in the order of the requests, unless that takes
longer than a turn (turns.py); what waits for a tier answers later, and the requests behind it do not wait. Threading:
the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from loracache.cache.state.slices import advance
from loracache.control.steps import answer, start, turn
from loracache.daemon.data_requests import DataRequests
from loracache.daemon.durable import durable_since
from loracache.daemon.inbox import PAUSE, Inbox
from loracache.daemon.turns import Turns
from loracache.errors import LoRACacheError, ProtocolError, Rejected, Unknown, UsageError
from loracache.keys import KEY_BYTES
from loracache.wire import control_messages as messages
from loracache.wire import protocol
from loracache.wire.frames import frame
from loracache.wire.protocol import ERROR, OK, UNKNOWN, split_keys
from loracache.wire.requests import AnyRequest, decode_request

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters
    from loracache.control.lookup import Finder
    from loracache.control.quotas import QuotaKeeper
    from loracache.control.service import Control
    from loracache.daemon.processes import Peer
    from loracache.daemon.recorder import Recorder
    from loracache.daemon.swapping import Swapping
    from loracache.namespaces import Namespaces

__all__ = ["Served", "Session"]

_log = logging.getLogger(__name__)
_MAX_UNSENT = 64 << 20
_REPORTED = "client."
_REST = "http"  # what its REST process is called where it does not say whom it asks for
_Asked = TypeVar("_Asked", bound=protocol.Request)
_MOST_UNSERVED = 1 << 20  # bytes of a connection's messages; it is read no further then
_MOST_PENDING = 4096
_MOST_RESIDENT = 10_000
_ENDING = (protocol.Release, protocol.Abort, protocol.Commit, protocol.Renew)  # what makes others wait for less
_UNREGISTERED = 1000  # namespaces between two looks at the sockets
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
    swapping: Swapping
    quotas: QuotaKeeper
    recorder: Recorder | None = None
    turns: Turns = field(default_factory=Turns)
    registered: Counter[bytes] = field(default_factory=Counter)
    """Digests of namespaces, by how many connections have registered them."""
    waiting: Counter[int] = field(default_factory=Counter)
    """Bytes of messages that are not served yet, by client."""


class Session(asyncio.Protocol):
    """Serves one connection. `owner` is its number: what its leases are kept under."""

    def __init__(self, served: Served, owner: int, peer: Peer) -> None:
        self.owner = owner
        self.peer = peer
        self.name = ""
        self._since = time.monotonic()
        self._served = served
        self._cache = served.cache
        self.client = peer.pid or -owner  # of another pid namespace nobody knows which connections are one process's
        self._inbox = Inbox(self.client, served.waiting, self._broken)
        self._data = DataRequests(
            owner,
            served.cache,
            served.namespaces,
            served.finder,
            served.swapping,
            self._answer,
            self._later,
            served.recorder,
        )
        self._transport: asyncio.Transport | None = None
        self._registered: set[bytes] = set()  # digests of namespaces
        self._resident: set[bytes] = set()  # adapters that this engine holds in its own memory
        self._flushed = served.cache.flushes.interval  # which began with the last flush
        self._work: Iterator[None] | None = None  # on what has come, until all of it is served
        self._paused = False  # nothing more is read meanwhile
        self._ending = False  # nothing more comes
        self._closing = False
        self._pending = 0  # requests that are answered later

    # -- asyncio.Protocol ----------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The greeting was sent before; requests may come."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection's leases."""
        self._transport = None
        self._data.close()
        self._inbox.close()
        self._work = None
        self._served.adapters.engines.subtract(self._resident)
        self._served.swapping.demand.gone(self.owner)
        start(self._unregister())
        self._served.ended(self)

    async def _unregister(self) -> None:
        for count, digest in enumerate(self._registered, start=1):
            self._served.registered[digest] -= 1
            if not self._served.registered[digest]:
                del self._served.registered[digest]
            if not count % _UNREGISTERED:
                await turn()

    def data_received(self, data: bytes) -> None:
        """Serve every request that is complete: at once, unless others wait for a turn or it takes long."""
        try:
            self._inbox.add(data)
        except ProtocolError as error:
            self._broken(error)
            return
        if self._work is None:
            self._work = self._requests()
            self._served.turns.ready(self)
        if self._busy and not self._paused and len(self._inbox) > _MOST_UNSERVED:
            self._paused = True
            cast(asyncio.Transport, self._transport).pause_reading()

    @property
    def _busy(self) -> bool:
        return self._work is not None

    def eof_received(self) -> bool:
        """Nothing more comes: close once what came is served."""
        self._ending = self._busy
        return self._ending

    def work(self, deadline: float) -> bool:
        """Serve what has come until `deadline`; whether there is more of it."""
        if self._work is None:
            return False
        if advance(self._work, deadline) and self._transport is not None:
            return True
        self._work = None
        if self._transport is not None and not self._closing:
            self._inbox.rest()
            if self._ending:
                self.close()
            elif self._paused:
                self._paused = False
                self._transport.resume_reading()
        return False

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
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    # -- requests ----------

    def _requests(self) -> Iterator[None]:
        """Serve, one after another; a yield after each, and after each slice of a long one."""
        try:
            for message in self._inbox.messages():
                if message is not PAUSE:
                    number, request = decode_request(message)
                    try:
                        yield from self._dispatch(number, request)
                    except ProtocolError:
                        raise
                    except LoRACacheError as error:
                        self._refuse(number, error)
                yield
        except ProtocolError as error:
            self._broken(error)
        except Exception:  # noqa: BLE001 - top of the work for a connection: others have theirs to be done
            self._cache.counters.add("failure.control")
            _log.exception("connection %d (%s): a request failed", self.owner, self.name)
            if self._transport is not None:
                self._transport.abort()

    def _broken(self, error: ProtocolError) -> None:
        self._cache.counters.add("failure.protocol")
        _log.warning("connection %d (%s, pid %d): %s", self.owner, self.name, self.peer.pid, error)
        self._answer(0, ERROR, str(error))
        self.close()

    def _dispatch(self, number: int, request: AnyRequest) -> Iterable[None]:
        """Serve it, or begin to; answers what is still to be done of it here, in slices."""
        if self._pending >= _MOST_PENDING and not isinstance(request, _ENDING):
            raise UsageError(
                f"{self._pending} requests of this connection are not answered yet, the limit; wait for some"
            )
        match request:  # what engines send most stands first; mypy sees that what is left is all the control's
            case (
                protocol.Lookup()
                | protocol.Acquire()
                | protocol.Reserve()
                | protocol.Commit()
                | protocol.Release()
                | protocol.Prefetch()
                | protocol.Keep()
            ):
                return self._data.serve(number, request)
            case protocol.Renew():
                self._on_renew(number, request)
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
            case protocol.AdapterAdd() | protocol.AdapterPrioritize() | protocol.AdapterRemove():
                who, change = self._asker(request)
                work = self._served.adapters.change(request)
                self._later(number, self._served.control.audited(change, who, work))
            case protocol.AdapterFind():
                self._on_adapter_find(number, request)
            case protocol.AdapterShow():
                self._on_adapter_show(number, request)
            case protocol.AdapterList():
                self._on_adapter_list(number, request)
            case messages.QuotaSet() | messages.QuotaRemove() | messages.QuotaList():
                who, quota = self._asker(request)
                self._later(number, self._served.quotas.serve(quota, who))
            case _:
                who, asked = self._asker(request)
                self._later(number, self._served.control.serve(asked, who))
        return ()

    def _later(self, number: int, work: Awaitable[list[Any]]) -> None:
        self._pending += 1
        start(self._reply(number, work))

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
        finally:
            self._pending -= 1

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
        digest = namespace.digest()
        if digest not in self._registered:
            self._registered.add(digest)
            self._served.registered[digest] += 1
            self._cache.quotas.learned(digest)
        if namespace.adapter:
            self._cache.index.adapters.add(namespace.adapter_key())
        if digest in self._served.namespaces.unkept:
            self._later(number, self._kept(digest))
        else:
            self._answer(number, OK, [digest])

    async def _kept(self, digest: bytes) -> list[Any]:
        """Answers when the descriptor is as durable as what will be stored under it; a disk that hangs or is full keeps
        nobody waiting: a flush says what that costs."""
        await asyncio.wait([asyncio.ensure_future(self._served.adapters.keep_namespaces())], timeout=_KEEP_S)
        return [digest]

    def _on_adapter_digest(self, number: int, request: protocol.AdapterDigest) -> None:
        self._later(number, self._served.adapters.digest(request.path))

    def _on_adapter_find(self, number: int, request: protocol.AdapterFind) -> None:
        self._later(number, self._served.adapters.find(request.name))

    def _on_adapter_show(self, number: int, request: protocol.AdapterShow) -> None:
        self._later(number, self._served.adapters.show(request.name))

    def _on_adapter_list(self, number: int, request: protocol.AdapterList) -> None:
        self._later(number, self._served.adapters.page(request.name, request.count))

    def _on_resident(self, number: int, request: protocol.Resident) -> None:
        if len(request.keys) > _MOST_RESIDENT * KEY_BYTES:
            raise UsageError(f"{len(request.keys) // KEY_BYTES} adapters are more than an engine's {_MOST_RESIDENT}")
        engines = self._served.adapters.engines
        engines.subtract(self._resident)
        self._resident = set(split_keys(request.keys))
        engines.update(self._resident)
        self._answer(number, OK, [])

    def _on_renew(self, number: int, request: protocol.Renew) -> None:
        self._answer(number, OK, [self._cache.leases.renew(self.owner, request.lease, request.ttl)])

    def _on_abort(self, number: int, request: protocol.Abort) -> None:
        self._data.forget(request.lease)
        self._answer(number, OK, [self._cache.leases.release(self.owner, request.lease)])

    def _on_flush(self, number: int, request: protocol.Flush) -> None:
        self._later(number, self._flush())

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
        self._answer(number, OK, self._served.swapping.take_report(self.owner, request))
