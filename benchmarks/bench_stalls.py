# SPDX-License-Identifier: Apache-2.0
"""How long one client waits for another: the longest wait of a probe (a process that asks the cheapest question a
thousand times a second) while another client, or an eviction, gives the daemon as much to do at once as it can.

A machine whose cores are busy makes the probe wait too: the row "beside nothing" says how long.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench_redis import redis_server
from common import MIB, Daemon, Row, aligned_buffer, commit_objects, daemon, free_room, namespace, row, work_folder

from loracache import CacheClient, Selection
from loracache.client.connection import Connection
from loracache.keys import Namespace
from loracache.storage_backends.base import Kind, ObjectInfo, Transfer
from loracache.storage_backends.header import payload_checksum
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.wire import protocol
from loracache.wire.frames import HEADER, MAX_FRAME, frame

PAGE = 4096
MOST_WAIT_MS = 20.0
HELD, SMALL, KEYS, PIPELINED, HALVES, NAMESPACES = 230_000, 16_000, 200_000, 19_000, 60, 50_000
TOKENS, LOOKUPS = 1_000_000, 4
BATCH = 500
ROUNDS = 5


def run(quick: bool) -> list[Row]:
    """See the module's docstring. Quick: a tenth of everything, once."""
    part, rounds = (10, 1) if quick else (1, ROUNDS)
    samples: dict[str, list[Measured]] = {}
    for _ in range(rounds):
        with work_folder() as folder:
            for found in (_messages, _evictions, _unwritten, _namespaces, _held_in_namespaces, _asked_of_redis):
                for measured in found(folder, part):
                    samples.setdefault(measured.what, []).append(measured)
    return [_row(each) for each in samples.values()]


class Measured(NamedTuple):
    """One figure of one round. seconds: how long what was done took; 0 where that says nothing."""

    what: str
    unit: str
    figure: float
    at_most: float | None = None
    seconds: float = 0.0


def _row(rounds: list[Measured]) -> Row:
    first, took = rounds[0], statistics.median(each.seconds for each in rounds)
    figures = [each.figure for each in rounds]
    note = f"{took:.2f} s" if took else ""
    return row(first.what, first.unit, figures, at_most=first.at_most, note=note)


class Probe:
    """The process of stall_probe.py at a daemon's socket."""

    def __init__(self, running: Daemon) -> None:
        script = str(Path(__file__).with_name("stall_probe.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, str(running.socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def beside(self, what: str, work: Callable[[], object]) -> Measured:
        """Its longest wait while `work` ran; and how long that took."""
        started = time.perf_counter()
        waits = self._beside(work)
        took = time.perf_counter() - started
        return Measured(f"longest wait beside {what}", "ms", max(waits), MOST_WAIT_MS, took)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _beside(self, work: Callable[[], object]) -> list[float]:
        self._waits()
        time.sleep(0.05)
        work()
        time.sleep(0.05)
        return self._waits()

    def _waits(self) -> list[float]:
        """Those since it was asked last. One at a time, so that its reader never holds two lines."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        waits: list[float] = json.loads(self._process.stdout.readline())
        return waits


@contextlib.contextmanager
def _probed(folder: Path, **settings: object) -> Iterator[tuple[Daemon, CacheClient, Probe]]:
    with daemon(folder, **settings) as running, running.client() as client, contextlib.ExitStack() as stack:
        probe = Probe(running)
        stack.callback(probe.close)
        yield running, client, probe


# -- messages ----------


def _messages(folder: Path, part: int) -> Iterator[Measured]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _probed(folder, memory="64MiB", page_size=PAGE, http=f"127.0.0.1:{port}") as (running, client, probe):
        yield probe.beside("nothing", lambda: time.sleep(3.0))
        client.register(Namespace("benchmark", "bfloat16", "benchmark", 16))
        body = json.dumps({"selector": {"model": "*", "tokens": list(range(TOKENS // part))}}).encode()
        lookups = f"{LOOKUPS} HTTP lookups of {TOKENS // part:,} token ids"
        yield probe.beside(lookups, lambda: _post(port, body, LOOKUPS))
        asked = [os.urandom(32) for _ in range(KEYS // part)]
        acquire = protocol.Acquire(os.urandom(16), protocol.join_keys(asked), 60.0)
        yield probe.beside(f"an acquire of {len(asked):,} keys", lambda: _refused(client.connection, acquire))
        yield probe.beside(f"{PIPELINED // part:,} pipelined status", lambda: _pipelined(running, part))
        yield probe.beside("a frame of 8 MiB of empty lists", lambda: _malformed(running))
        yield from _halves(running, probe, part)


def _post(port: int, body: bytes, times: int) -> None:
    for _ in range(times):
        _post_once(port, body)


def _post_once(port: int, body: bytes) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/lookup", body, {"content-type": "application/json"})
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                return
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)  # it is not up yet


def _refused(connection: Connection, request: protocol.Request) -> None:
    """Send it and read all of its answer."""
    number = connection.send(request)
    while not connection.wait(number, 120).last:
        pass


def _pipelined(running: Daemon, part: int) -> None:
    connection = Connection(running.url, name="pipelining")
    connection.connect()
    numbers = [connection.send(protocol.Status()) for _ in range(PIPELINED // part)]
    for number in numbers:
        connection.wait(number, 120)
    connection.close()


def _raw(running: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(running.socket))
    sock.recv(4096)
    return sock


def _malformed(running: Daemon) -> None:
    with _raw(running) as sock:
        with contextlib.suppress(OSError):  # it may be refused before it is whole
            sock.sendall(
                HEADER.pack(MAX_FRAME) + b"\xdd" + struct.pack(">I", MAX_FRAME - 5) + b"\x90" * (MAX_FRAME - 5)
            )
        with contextlib.suppress(OSError):
            while sock.recv(4096):
                pass


def _halves(running: Daemon, probe: Probe, part: int) -> Iterator[Measured]:
    before = _resident(running)
    half = frame([1, "report", "x" * (MAX_FRAME - 100)])[:-1]
    socks: list[socket.socket] = []

    def send() -> None:
        for _ in range(HALVES // part):
            socks.append(_raw(running))
            with contextlib.suppress(OSError):
                socks[-1].sendall(half)

    yield probe.beside(f"{HALVES // part} half frames of 8 MiB", send)
    what = f"memory that {HALVES // part} half frames of 8 MiB take"
    yield Measured(what, "MiB", _resident(running) - before)
    for sock in socks:
        sock.close()


# -- evictions ----------


def _evictions(folder: Path, part: int) -> Iterator[Measured]:
    held = HELD // part // BATCH * BATCH
    payload = aligned_buffer(PAGE)[:1024]
    with _probed(folder, memory=held * PAGE, page_size=PAGE) as (running, client, probe):
        empty = _resident(running)
        keys = [os.urandom(32) for _ in range(held)]
        for at in range(0, held, BATCH):
            _store(client, keys[at : at + BATCH], payload)
        full = _resident(running)
        for at in range(0, held, BATCH):
            assert client.lookup(keys[at : at + BATCH]).hits == BATCH
        yield probe.beside(
            f"a store into a full arena of {held:,} leaves that were used",
            lambda: _store(client, [os.urandom(32)], payload),
        )
        lookup = protocol.Lookup(os.urandom(16), protocol.join_keys(keys[BATCH:]), 1, 60.0)
        yield probe.beside(f"a lookup that holds {held - BATCH:,} objects", lambda: _refused(client.connection, lookup))
        release = protocol.Release(lookup.lease, b"")
        yield probe.beside("the release of all those", lambda: _refused(client.connection, release))
        small = SMALL // part
        large = aligned_buffer(small * PAGE)
        yield probe.beside(
            f"a store that takes the place of {small:,} objects", lambda: _store(client, [os.urandom(32)], large)
        )
        yield probe.beside(f"a clear of {held - small:,} objects", client.clear)
        time.sleep(1.0)
        kept = (_resident(running) - empty) / max(1.0, full - empty)
        what = f"memory kept after the clear, of what {held:,} objects took beside the arena"
        yield Measured(what, "%", 100 * kept, at_most=50)


def _unwritten(folder: Path, part: int) -> Iterator[Measured]:
    small = SMALL // part
    free_room(folder, 4 * small * PAGE + 256 * MIB)
    payload, large = aligned_buffer(PAGE)[:1024], aligned_buffer(small // 2 * PAGE)
    settings = {"memory": small * PAGE, "page_size": PAGE, "disk_path": folder / "disk", "disk": "4GiB"}
    with _probed(folder, **settings) as (_, client, probe):
        for _ in range(small // BATCH):
            _store(client, [os.urandom(32) for _ in range(BATCH)], payload, chain=True)
        yield probe.beside(
            f"a store that takes the place of {small // 2:,} objects, most still to be written",
            lambda: _store(client, [os.urandom(32)], large),
        )


def _store(client: CacheClient, keys: list[bytes], payload: memoryview, *, chain: bool = False) -> None:
    if chain or len(keys) == 1:
        commit_objects(client, keys, payload)()
        return
    digest, lease = client.register(namespace()), os.urandom(protocol.LEASE_BYTES)
    blob, parents = protocol.join_keys(keys), protocol.NO_PARENT * len(keys)
    reserve = protocol.Reserve(lease, digest, blob, parents, [len(payload)] * len(keys), 60.0)
    client.connection.call(reserve, 60)
    client.connection.call(protocol.Commit(lease, blob, [0] * len(keys)), 60)  # nobody reads them


def _resident(running: Daemon) -> float:
    """MiB of the daemon's own memory, the arena left out."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


# -- namespaces ----------


def _namespaces(folder: Path, part: int) -> Iterator[Measured]:
    count = NAMESPACES // part
    names = folder / "salts" / "namespaces"
    names.mkdir(parents=True)
    for number in range(count):
        each = Namespace("benchmark", "bfloat16", "benchmark", 16, salt=f"{number:064x}")
        (names / f"{each.digest().hex()}.json").write_text(f"{each.descriptor()}\n[]\n")
    started = time.perf_counter()
    running = Daemon(folder, memory="64MiB", page_size=PAGE, disk_path=names.parent, disk="1GiB")
    try:
        with running.client() as client:
            what = f"start to the first greeting, {count:,} namespaces"
            yield Measured(what, "s", time.perf_counter() - started)
            probe = Probe(running)
            yield probe.beside(f"the reading of {count:,} namespaces", lambda: _all_known(client, count))
            probe.close()
    finally:
        running.stop()


def _held_in_namespaces(folder: Path, part: int) -> Iterator[Measured]:
    """What operators ask of a daemon in which very many tenants have something."""
    count = NAMESPACES // part
    payload = aligned_buffer(PAGE)[:1024]
    with _probed(folder, memory=2 * count * PAGE, page_size=PAGE) as (running, client, probe):
        tenants = Connection(running.url, name="tenants")
        tenants.connect()
        for number in range(count):
            space = Namespace("benchmark", "bfloat16", "benchmark", 16, salt=f"{number:064x}")
            tenants.call(protocol.Register(space.descriptor(), ["name"]), 60)
            key, lease = space.digest(), number.to_bytes(protocol.LEASE_BYTES, "big")
            sizes = [len(payload)]
            tenants.call(protocol.Reserve(lease, space.digest(), key, protocol.NO_PARENT, sizes, 60.0), 60)
            tenants.call(protocol.Commit(lease, key, [0]), 60)
        named = Selection(model="name")
        asked: dict[str, Callable[[], object]] = {
            "the top of the tree of {}": lambda: list(client.tree()),
            "all pages of {} in the tree": lambda: list(client.tree("base")),
            "all pages of objects, by a name that {} have": lambda: list(client.objects(named)),
            "a count of what {} hold": lambda: client.locate(Selection(model="*")),
            "a check of the index of {}": client.check_index,
            "the end of the connection that registered {}": tenants.close,
        }
        for what, ask in asked.items():
            yield probe.beside(what.format(f"{count:,} namespaces"), ask)


# -- Redis ----------


def _asked_of_redis(folder: Path, part: int) -> Iterator[Measured]:
    count = KEYS // part
    with redis_server(folder) as path:
        url = f"unix://{path}"
        keys = [os.urandom(32) for _ in range(count)]
        backend, buffer = RedisBackend(url), aligned_buffer(PAGE)
        checksum = payload_checksum([buffer[:1024]])
        for at in range(0, count, BATCH):
            infos = [ObjectInfo(key, b"", Kind.KV, bytes(32), 1024, checksum) for key in keys[at : at + BATCH]]
            backend.store([Transfer(info, [buffer]) for info in infos])
        backend.close()
        with _probed(folder, memory="64MiB", page_size=PAGE, redis=url) as (_, client, probe):
            has, lacks = protocol.join_keys(keys), os.urandom(32 * count)
            asked: dict[str, protocol.Request] = {
                "a lookup of {} that Redis has": protocol.Lookup(b"", has, 1, 60.0),
                "an acquire of {} that Redis lacks": protocol.Acquire(os.urandom(16), lacks, 60.0),
                "an acquire of {} that Redis has, in a small memory": protocol.Acquire(os.urandom(16), has, 60.0),
            }
            for what, request in asked.items():
                yield probe.beside(
                    what.format(f"{count:,} keys"), functools.partial(_refused, client.connection, request)
                )


def _all_known(client: CacheClient, count: int) -> None:
    deadline = time.monotonic() + 120
    status: Any = client.status()
    while status["namespaces"] < count and time.monotonic() < deadline:
        time.sleep(0.05)
        status = client.status()
