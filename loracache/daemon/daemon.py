# SPDX-License-Identifier: Apache-2.0
"""Builds the cache from a configuration and runs it behind its socket until it is told to end.

Threading: everything here runs on the event loop, but for the pre-faulting of the arena, the scan of the disk tier and
the reading of adapter files, which have threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loracache import __version__
from loracache.accepting import Acceptor
from loracache.config import Config, shown_config
from loracache.control.adapters import Adapters
from loracache.control.audit import Audit
from loracache.control.lookup import Finder
from loracache.control.quotas import describe_quotas
from loracache.control.service import Control
from loracache.control.status import cache_status
from loracache.daemon.lag import LoopLag
from loracache.daemon.listening import listen, most_clients, unlink, unlink_unless_locked
from loracache.daemon.parts import books, quotas, recorder, rest_process, tiers
from loracache.daemon.processes import Peer
from loracache.daemon.scanning import Scan
from loracache.daemon.session import Served, Session
from loracache.daemon.swapping import Swapping
from loracache.tiers import Tier
from loracache.tracing import start_traces, stop_traces
from loracache.wire import protocol
from loracache.wire.frames import frame
from loracache.wire.protocol import ERROR

__all__ = ["READY", "Daemon"]

READY = b"ready\n"

_log = logging.getLogger(__name__)
_TICK_S = 0.25
_ACCEPT_PAUSE_S = 1.0
_SAY_AGAIN_S = 10.0
_FEW_HUGE = (
    "; the rest works with small ones. Free memory is too scattered, or the kernel is older than 6.1 or denies them "
    "(/sys/kernel/mm/transparent_hugepage/shmem_enabled); --hugepages reserved has them set aside"
)
_END_S = 3.0  # to end in after the draining, whatever hangs: most of it is waiting, _LEFT_S are for the last steps
_LEFT_S, _SURE_S = 1.5, 0.3
_UNUSED_S, _UNUSED_WITH_REDIS_S = 3600.0, 7 * 24 * 3600.0  # a namespace without objects is kept so long
_LINGER_S = 1.0  # an engine's processes connect one after another, some to see whether anybody answers
_PRIVATE_PATIENCE_S = 120.0  # a private daemon nobody ever connected to


class Daemon:
    """One running cache. `run` serves until SIGTERM, SIGINT or, where private, until the last client is gone.

    give_up(status): ends the process where something hangs at its end; None where the process is not the daemon's own.
    """

    def __init__(self, config: Config, give_up: Callable[[int], object] | None = None) -> None:
        """Takes the socket and the tiers. Raises ConfigError naming what is in the way."""
        self.config = config
        self._give_up = give_up
        self._started = time.monotonic()
        self._lag = LoopLag()
        self._sessions: set[Session] = set()
        self._stack = contextlib.ExitStack()
        try:
            self._listener = listen(config.socket, self._stack, private=config.private)
            self._acceptor = Acceptor(self._listener, self._accept)
            self.cache = tiers(config, self._describe, self._post)
            self._rest = rest_process(config, self._stack)
            self._namespaces, self._names = books(config)
            if config.traces is not None:
                start_traces(config.traces, "loracache", __version__)
                self._stack.callback(stop_traces)
            audit = Audit(config.audit_log)
            self._stack.callback(audit.close)
            recording = recorder(config, self.cache.counters, self._post, self._stack)
            for writer in self.cache.writers:  # what is out of reach is used once it is there
                writer.io.stand(writer.io.backend.check())
        except BaseException:
            self._stack.close()
            raise
        self._namespaces.reading = self.cache.disk is not None and self.cache.disk.io.standing.reads
        self._adapters = Adapters(self.cache, self._namespaces, self._names, self._post)
        finder = Finder(self.cache, config.redis_lookup_ms / 1000)
        settings = partial(shown_config, config)
        self._control = Control(self.cache, self._namespaces, self._adapters, finder, audit, settings)
        self._served = Served(
            self.cache,
            self._namespaces,
            self._adapters,
            finder,
            self._control,
            self._status,
            self._session_ended,
            self._rest_pid,
            Swapping(self.cache, config),
            quotas(config, self.cache, self._namespaces, self._adapters, audit, self._stack),
            recording,
        )
        self._owners = itertools.count(1)
        self._most_clients = most_clients()
        self._say_again = self._end_by = 0.0
        self._instance = os.urandom(16)
        self._step = "the writing of what is queued"  # that the end waits for
        self._stopping = threading.Event()
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []

    async def run(self) -> None:
        """Serve until told to end, then drain and close."""
        loop = self._loop = asyncio.get_running_loop()
        gc.freeze()  # what was imported stays: no collection need look at it
        gc.disable()  # walking an index of 200,000 objects takes 0.2 s: `_tick` collects what is young
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ended.set)
        self._acceptor.start()
        background = [loop.create_task(work) for work in (self._tick(), self._lag.watch(), self._served.swapping.run())]
        self._start("populate", self._populate)
        if self.cache.disk is not None:
            self._start("disk-scan", Scan(self.cache, self._namespaces, self._names, self._post, self._stopping).run)
        if self.config.private:
            loop.call_later(_PRIVATE_PATIENCE_S, self._end_if_alone)
        if self._rest is not None:
            self._rest.start()
            _log.info("REST on port %d", self._rest.port)
        _log.info("listening on %s", self.config.socket)
        if self.config.private:  # for the engine that waits for it, whatever is logged
            os.write(sys.stdout.fileno(), READY)
        await self._ended.wait()
        self._end_by = time.monotonic() + self.config.drain + _END_S
        if self._give_up is not None:
            threading.Thread(target=self._last_resort, args=(self._give_up,), name="last-resort", daemon=True).start()
        self._acceptor.stop()  # whoever comes from now on is told at once, and a private daemon's successor waits
        for task in background:
            task.cancel()
        await self._drain()
        self._close()

    def _describe(self, namespace: bytes) -> dict[bytes, bytes]:
        """What Redis is told of a namespace, once the books are read."""
        return self._namespaces.record(namespace)

    # -- what sessions need ----------

    def _status(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "socket": str(self.config.socket),
            "connections": len(self._sessions),
            "namespaces": len(self._namespaces),
            "operations": self._control.operations.running,
            "loop": self._lag.describe(),
            "swapper": self._served.swapping.describe(),
        } | cache_status(self.cache)
        said["quotas"] = describe_quotas(self.cache)
        said["adapters"][Tier.GPU.label] = len(+self._adapters.engines)
        return said

    def _rest_pid(self) -> int | None:
        return self._rest.pid if self._rest is not None else None

    def _session_ended(self, session: Session) -> None:
        """A connection is gone: its leases end; what it was writing stays out of use until its process is gone."""
        self._sessions.discard(session)
        if self.cache.leases.disconnect(session.owner) and self._loop is not None:
            session.peer.when_gone(self._loop, lambda: self.cache.leases.writer_gone(session.owner))
        else:
            session.peer.close()
        if self.config.private and self._loop is not None:
            self._loop.call_later(_LINGER_S, self._end_if_alone)

    # -- inside ----------

    def _post(self, call: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(
                RuntimeError
            ):  # the loop is closed: the result of a dropped transfer is not missed
                self._loop.call_soon_threadsafe(call)

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            self._say(f"a connection was not accepted; trying again in {_ACCEPT_PAUSE_S:g} s: {error}")
            self._acceptor.pause(_ACCEPT_PAUSE_S)
            return
        if len(self._sessions) >= self._most_clients:
            self._refuse(sock)
            return
        greeting = protocol.Greeting(
            protocol.VERSION, self._instance, self.cache.arena.size, self.config.page_size
        ).encode()
        try:
            # On the raw socket: the event loop's transports cannot pass a descriptor.
            socket.send_fds(sock, [greeting], [self.cache.arena.fd])
            peer = Peer(sock)
        except OSError as error:
            _log.warning("a connection ended before it was greeted: %s", error)
            sock.close()
            return
        sock.setblocking(False)
        session = Session(self._served, next(self._owners), peer)
        self._sessions.add(session)
        assert self._loop is not None
        task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: session, sock))
        task.add_done_callback(lambda done: self._adopted(session, sock, done))

    def _refuse(self, sock: socket.socket) -> None:
        why = (
            f"{len(self._sessions)} clients are connected, as many as its descriptors allow; raise its limit "
            "(ulimit -n, LimitNOFILE), or run fewer clients"
        )
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.send(frame([0, ERROR, why]))
        sock.close()
        self._say(f"a client was refused: {why}")

    def _say(self, what: str) -> None:
        """Log what may happen very often, at most every few seconds."""
        if time.monotonic() >= self._say_again:
            self._say_again = time.monotonic() + _SAY_AGAIN_S
            _log.warning("%s", what)

    def _adopted(self, session: Session, sock: socket.socket, done: asyncio.Task[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            sock.close()
            self._session_ended(session)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.cache.tick()
            if self._rest is not None:
                self._rest.tick()
            if self.cache.disk is None or self.cache.disk.loaded:
                self._collect_namespaces()
            gc.collect(1)

    def _end_if_alone(self) -> None:
        if any(session.name and session.peer.pid != self._rest_pid() for session in self._sessions):
            return
        if any(session.age < _LINGER_S for session in self._sessions) and self._loop is not None:
            self._loop.call_later(_LINGER_S, self._end_if_alone)
        else:  # who did not say who it is by now, is not a client
            self._ended.set()

    def _populate(self) -> None:
        started = time.monotonic()
        arena = self.cache.arena
        arena.populate(self._stopping.is_set)
        _log.info("arena of %d MiB ready after %.1f s", arena.size >> 20, time.monotonic() - started)
        if arena.hugepages is None or self._stopping.is_set():
            return
        _log.log(
            logging.INFO if arena.huge_bytes == arena.size else logging.WARNING,
            "hugepages=%s: %d of %d MiB lie in huge pages%s",
            arena.hugepages,
            arena.huge_bytes >> 20,
            arena.size >> 20,
            "" if arena.huge_bytes == arena.size else _FEW_HUGE,
        )

    def _collect_namespaces(self) -> None:
        """Forget some that hold nothing. What Redis holds nobody knows, so with one they are kept for long."""
        spaces, registered = self.cache.index.spaces, self._served.registered
        unused_s = _UNUSED_S if self.cache.redis is None else _UNUSED_WITH_REDIS_S
        gone = self._namespaces.collect(
            lambda digest: digest in spaces or digest in registered, unused_s, time.monotonic()
        )
        self.cache.index.adapters.difference_update(map(bytes.fromhex, gone))

    async def _drain(self) -> None:
        for session in list(self._sessions):
            session.close()
        self._control.stop()
        if self._rest is not None:
            self._rest.end()
        flushed = asyncio.Event()
        self.cache.pump()
        self.cache.when_flushed(flushed.set)
        try:
            await asyncio.wait_for(flushed.wait(), self.config.drain)
        except TimeoutError:
            for writer in self.cache.writers:
                if dropped := writer.drop_all():
                    _log.warning(
                        "%s: %d queued writes dropped after %g s of draining",
                        writer.io.tier.label,
                        dropped,
                        self.config.drain,
                    )

    def _last_resort(self, give_up: Callable[[int], object]) -> None:
        """End the process, whatever hangs."""
        time.sleep(max(0.0, self._end_by - _SURE_S - time.monotonic()))
        _log.error("%s hangs and is given up; ended", self._step)
        unlink(self.config.socket)
        give_up(1)

    def _close(self) -> None:
        self._stopping.set()
        for writer in self.cache.writers:
            writer.io.end()
        waited_until = self._end_by - _LEFT_S
        for thread in self._threads:
            self._step = f"the thread {thread.name}"
            thread.join(max(0.0, waited_until - time.monotonic()))
        self._step = "the names of adapters"
        self._adapters.close()
        for writer in self.cache.writers:
            self._step = f"tier {writer.io.tier.label}"
            writer.io.close(max(0.0, waited_until - time.monotonic()))
        self._step = "the end of what stands beside the cache"
        self._control.close()
        if self.config.private:  # unless an engine is starting the next one, which waits for the socket's lock
            if self._rest is not None:  # first, for it makes its token anew
                self._rest.close()
            ours = (".start", ".log", ".settings", ".token")
            start, *others = (Path(f"{self.config.socket}{suffix}") for suffix in ours)
            unlink_unless_locked(start, others)
        self._stack.close()
        _log.info("ended")
