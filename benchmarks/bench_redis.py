# SPDX-License-Identifier: Apache-2.0
"""The Redis tier against SET and GET on a raw socket, on a real redis-server over a unix socket.

Twice: RedisBackend called directly, on one thread; and end to end through a daemon, where objects are committed and
flushed, evicted from L1 and acquired again (one thread stores, two load). The raw calls are the fastest we know:
sendmsg from and recvmsg_into the caller's buffers, two commands in flight, one connection. What the tier does beyond:
a header value an object, and a checksum over every byte both ways. And resp.py, our part of the protocol, against
redis-py, whose connections it uses: a value of 2 MiB a call, one call after the other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import redis
from common import (
    MIB,
    Daemon,
    Row,
    acquire_objects,
    aligned_buffer,
    commit_objects,
    daemon,
    interleaved,
    rates,
    ratio_row,
    row,
    seconds,
    work_folder,
)

from loracache.keys import checksum
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Result, Transfer
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.resp import Wire, command, opening

NBYTES = 64 * MIB
WINDOW = 2
TARGET = 0.8


class RawRedis:
    """SET and GET of many values, `WINDOW` commands in flight."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))

    def set(self, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> None:
        """One SET a buffer."""
        commands: list[list[bytes | memoryview]] = [
            [b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(buffer)), buffer, b"\r\n"]
            for key, buffer in zip(keys, buffers, strict=True)
        ]
        answer = memoryview(bytearray(5))

        def receive(number: int) -> None:
            self._receive([answer])
            assert bytes(answer) == b"+OK\r\n"

        self._windowed(commands, receive)

    def get(self, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> None:
        """One GET a buffer, into it."""
        commands: list[list[bytes | memoryview]] = [
            [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key)] for key in keys
        ]
        opening, end = memoryview(bytearray(len(b"$%d\r\n" % len(buffers[0])))), memoryview(bytearray(2))

        def receive(number: int) -> None:
            self._receive([opening, buffers[number], end])
            assert bytes(end) == b"\r\n"

        self._windowed(commands, receive)

    def flush(self) -> None:
        """Remove everything from the server."""
        self._socket.sendall(b"*1\r\n$8\r\nFLUSHALL\r\n")
        self._receive([memoryview(bytearray(5))])

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _windowed(self, commands: Sequence[list[bytes | memoryview]], receive: Callable[[int], None]) -> None:
        for number in range(len(commands) + WINDOW):
            if number >= WINDOW:
                receive(number - WINDOW)
            if number < len(commands):
                self._send(commands[number])

    def _send(self, parts: list[bytes | memoryview]) -> None:
        self._move([memoryview(part) for part in parts], self._socket.sendmsg)

    def _receive(self, views: list[memoryview]) -> None:
        self._move(list(views), lambda left: self._socket.recvmsg_into(left, 0, socket.MSG_WAITALL)[0])

    @staticmethod
    def _move(views: list[memoryview], call: Callable[[list[memoryview]], int]) -> None:
        while views:
            moved = call(views)
            assert moved > 0
            while views and moved >= len(views[0]):
                moved -= len(views.pop(0))
            if moved:
                views[0] = views[0][moved:]


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[Path]:
    """The socket of a redis-server that keeps nothing on disk."""
    if shutil.which("redis-server") is None:
        raise RuntimeError("redis-server is not installed: apt-get install redis-server")
    path = folder / "redis.sock"
    arguments = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(["redis-server", *arguments], cwd=folder, stdout=subprocess.DEVNULL)
    try:
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        yield path
    finally:
        process.terminate()
        process.wait()


def run(quick: bool) -> list[Row]:
    """Objects of 1 MiB (the smallest chunk) and of 4 MiB (a chunk of the 190 M model)."""
    rounds = 5 if quick else 30
    rows = []
    with (
        work_folder() as folder,
        redis_server(folder) as path,
        daemon(folder, memory="512MiB", redis=f"unix://{path}") as running,
    ):
        for size in (MIB, 4 * MIB):
            rows += _backend(path, size, rounds)
            rows += _end_to_end(path, size, rounds, running)
        rows += _library(path, 2 * MIB, rounds)
    return rows


class _Values:
    """What both sides move: NBYTES in buffers of `size`, under names of their own, and a raw connection."""

    def __init__(self, path: Path, size: int) -> None:
        whole = aligned_buffer(NBYTES)
        self.buffers = [whole[start : start + size] for start in range(0, NBYTES, size)]
        self._names = [b"raw:%d" % number for number in range(len(self.buffers))]
        self._raw = RawRedis(path)
        self._raw.flush()

    def set(self) -> float:
        """Seconds of setting all. On what is there already: the server then reuses memory, as one in service does."""
        return seconds(lambda: self._raw.set(self._names, self.buffers))

    def get(self) -> float:
        """Seconds of getting all."""
        return seconds(lambda: self._raw.get(self._names, self.buffers))

    def close(self) -> None:
        """Close the connection."""
        self._raw.close()


def _backend(path: Path, size: int, rounds: int) -> list[Row]:
    values = _Values(path, size)
    backend = RedisBackend(f"unix://{path}")
    transfers = [
        Transfer(ObjectInfo(os.urandom(32), b"", Kind.KV, bytes(32), size, checksum([buffer])), [buffer])
        for buffer in values.buffers
    ]
    writes = interleaved(
        rounds, {"raw": values.set, "tier": lambda: seconds(lambda: _all_ok(backend.store(transfers)))}
    )
    reads = interleaved(rounds, {"raw": values.get, "tier": lambda: seconds(lambda: _all_ok(backend.load(transfers)))})
    values.close()
    backend.close()
    label = f"{size // MIB} MiB"
    return [
        ratio_row(f"RedisBackend.store / raw SET, {label}", writes["raw"], writes["tier"], at_least=TARGET),
        row("  RedisBackend.store", "GB/s", rates(NBYTES, writes["tier"])),
        row("  raw SET", "GB/s", rates(NBYTES, writes["raw"])),
        ratio_row(f"RedisBackend.load / raw GET, {label}", reads["raw"], reads["tier"], at_least=TARGET),
        row("  RedisBackend.load", "GB/s", rates(NBYTES, reads["tier"])),
        row("  raw GET", "GB/s", rates(NBYTES, reads["raw"])),
    ]


def _library(path: Path, size: int, rounds: int) -> list[Row]:
    values = _Values(path, size)
    names = [f"py:{number}" for number in range(len(values.buffers))]
    library = redis.Redis(unix_socket_path=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        wire = Wire(connection, 10.0, 4 * rounds * NBYTES)

        def set_ours(name: str, buffer: memoryview) -> bool:
            wire.send([opening(3, b"SET", name.encode()), b"$%d\r\n" % len(buffer), buffer, b"\r\n"])
            return wire.reply() == b"OK"

        def get_ours(name: str, buffer: memoryview) -> bool:
            wire.send([command(b"GET", name.encode())])
            return wire.reply_into([buffer]) == len(buffer)

        calls: dict[str, Callable[[str, memoryview], object]] = {
            "SET": set_ours,
            "redis-py SET": library.set,
            "GET": get_ours,
            "redis-py GET": lambda name, buffer: len(library.get(name) or b"") == len(buffer),
        }

        def timed(call: Callable[[str, memoryview], object]) -> Callable[[], float]:
            return lambda: seconds(lambda: _all_true(map(call, names, values.buffers)))

        times = interleaved(rounds, {name: timed(call) for name, call in calls.items()})
    library.close()
    values.close()
    label, rows = f"{size // MIB} MiB", []
    for verb in ("SET", "GET"):
        theirs = f"redis-py {verb}"
        rows += [
            ratio_row(f"resp.py {verb} / {theirs}, {label}", times[theirs], times[verb]),
            row(f"  resp.py {verb}", "GB/s", rates(NBYTES, times[verb])),
            row(f"  {theirs}", "GB/s", rates(NBYTES, times[theirs])),
        ]
    return rows


def _end_to_end(path: Path, size: int, rounds: int, running: Daemon) -> list[Row]:
    values = _Values(path, size)
    keys = [os.urandom(32) for _ in values.buffers]
    with running.client() as client:

        def write_behind() -> float:
            client.evict(keys, tiers=["cpu"])
            commit = commit_objects(client, keys, values.buffers[0])
            return seconds(lambda: (commit(), client.flush()))

        def acquire() -> float:
            client.evict(keys, tiers=["cpu"])
            return seconds(lambda: acquire_objects(client, keys))

        writes = interleaved(rounds, {"raw": values.set, "tier": write_behind})
        reads = interleaved(rounds, {"raw": values.get, "tier": acquire})
    values.close()
    label = f"{size // MIB} MiB"
    return [
        ratio_row(f"daemon, commit to flushed / raw SET, {label}", writes["raw"], writes["tier"], at_least=TARGET),
        row("  daemon, commit to flushed", "GB/s", rates(NBYTES, writes["tier"])),
        ratio_row(f"daemon, acquire from Redis / raw GET, {label}", reads["raw"], reads["tier"], at_least=TARGET),
        row("  daemon, acquire from Redis", "GB/s", rates(NBYTES, reads["tier"])),
    ]


def _all_ok(results: Sequence[Result]) -> None:
    bad = [result for result in results if result.outcome is not Outcome.OK]
    if bad:
        raise RuntimeError(f"{len(bad)} transfers failed, the first: {bad[0]}")


def _all_true(answers: Iterable[object]) -> None:
    if not all(answers):
        raise RuntimeError("Redis does not hold what it was given")
