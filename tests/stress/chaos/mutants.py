# SPDX-License-Identifier: Apache-2.0
"""Mutated socket messages: valid ones of every operation, changed in their values, their shape or their bytes.

A process of its own sends them as fast as the daemon takes them. It decodes each by the daemon's own code first, and so
it knows where the daemon hangs up: what would be sent behind that is sent on a new connection, and every frame counted
was looked at. A status call beside it must go on being answered; at the end nothing may be held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
from contents import adapter_folder
from house import Daemon, eventually
from pulse import HANG_S

from loracache import CacheClient, Namespace
from loracache.errors import LoRACacheError, ProtocolError
from loracache.wire.frames import HEADER, Frames
from loracache.wire.requests import OPERATIONS, decode_request

__all__ = ["KEYS", "NUMBERS", "TEXTS", "anything", "fuzz_frames"]

_TURN_S = 10.0  # of one process; what it had reserved comes back when it is gone
_A_CONNECTION = 60
_CALL_S = 10.0
KEYS = [bytes([number]) * 32 for number in range(12)]
_LEASES = [bytes([number]) * 16 for number in range(5)]
TEXTS = [
    "", "cpu", "disk", "redis", "gpu", "x", "*", "model", "\0", "a\0b", "/", "/dev/zero", "/proc/self/mem", "..", "\n",
    "é" * 150, "x" * 65536, "{}", '{"model": 1}', "ab" * 32, "AB" * 32, "-1", "1e400", "\U0001f300", "[" * 300,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 255, 4096, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**6]
_FLOATS = [0.0, 1.5, -1.0, 1e308, math.nan, math.inf, -math.inf, 3600.0, 3600.1, 600.0]
_DESCRIPTOR = '{"model": "m", "kv_dtype": "float32", "layout": "l", "chunk_tokens": 16, "adapter": "", "salt": ""}'


def _some_keys(numbers: random.Random) -> bytes:
    return b"".join(numbers.choices(KEYS, k=numbers.choice((0, 1, 2, 3, 8, 300))))


def _selector(numbers: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {
        "keys": _some_keys(numbers), "model": numbers.choice(TEXTS)[:300], "tokens": bytes(4 * numbers.randrange(64)),
        "adapter": numbers.choice(TEXTS)[:300], "salt": numbers.choice(("", "ab" * 32)),
    }  # fmt: skip
    return {name: made[name] for name in numbers.sample([*made], numbers.randrange(4))}


def _made(folder: str, namespace: bytes) -> dict[str, Callable[[random.Random], Any]]:
    """A value that is mostly valid, by the name of the field."""
    return {
        "after": lambda n: n.choice(TEXTS)[:300], "by": lambda n: n.choice(TEXTS)[:300],
        "checksums": lambda n: n.choices(NUMBERS[:2], k=n.randrange(4)), "count": lambda n: n.choice((1, 10, 10_000)),
        "counts": lambda n: {n.choice(("a", "b.c", "x_1")): n.choice(NUMBERS[:4])},
        "descriptor": lambda n: n.choice((_DESCRIPTOR, _DESCRIPTOR, *TEXTS)), "group": lambda n: n.choice((1, 2, 4096)),
        "keep": lambda n: n.random() < 0.5, "keys": _some_keys, "lease": lambda n: n.choice((b"", *_LEASES)),
        "name": lambda n: n.choice(TEXTS), "names": lambda n: n.choices(TEXTS, k=n.randrange(3)),
        "namespace": lambda n: n.choice((namespace, namespace, bytes(32))), "parents": _some_keys,
        "path": lambda n: n.choice((folder, folder, *TEXTS)), "scope": lambda n: n.choice(("", "", "ab" * 32)),
        "selector": _selector, "since": lambda n: n.choice((0, 1, 2**63 - 1)),
        "sizes": lambda n: n.choices((0, 1, 100, 5000, 10**6, 2**64 - 1), k=n.randrange(4)),
        "source": lambda n: n.choice(TEXTS[:6]), "tier": lambda n: n.choice(TEXTS[:6]),
        "tiers": lambda n: n.choices(TEXTS[1:6], k=n.randrange(4)), "ttl": lambda n: n.choice((0, 0.01, 1.5, 3600.0)),
        "wait": lambda n: n.choice((0, 0.0, 0.01, 1.0, 600)),
    }  # fmt: skip


def anything(numbers: random.Random, depth: int = 0) -> Any:
    match numbers.randrange(9 if depth < 3 else 6):
        case 0:
            return numbers.choice((None, True, False))
        case 1:
            return numbers.choice(NUMBERS)
        case 2:
            return numbers.choice(_FLOATS)
        case 3:
            return numbers.choice(TEXTS)
        case 4 | 5:
            return numbers.randbytes(numbers.choice((0, 1, 16, 31, 32, 33, 64, 5000)))
        case 6:
            return [anything(numbers, depth + 1) for _ in range(numbers.randrange(4))]
        case 7:
            return {str(number): anything(numbers, depth + 1) for number in range(numbers.randrange(4))}
        case _:
            nested: Any = []
            for _ in range(numbers.choice((3, 100, 400))):
                nested = [nested]
            return nested


class Mutants:
    """Makes one after the other. adapter: a PEFT folder; namespace: the digest of a registered one."""

    def __init__(self, seed: str, adapter: str, namespace: bytes) -> None:
        self._numbers = random.Random(seed)
        self._values = _made(adapter, namespace)
        self._before = b""
        self.kinds: Counter[str] = Counter()

    def next(self) -> bytes:
        """A frame, or what was one."""
        numbers = self._numbers
        operation = numbers.choice([*OPERATIONS])
        names = [field.name for field in dataclasses.fields(OPERATIONS[operation])]
        made: list[Any] = [self._values.get(name, anything)(numbers) for name in names]
        if operation == "reserve":  # what mostly agrees
            count = numbers.randrange(1, 5)
            keys = numbers.sample(KEYS, count)
            made = [*made[:2], b"".join(keys), bytes(32 * count), [numbers.choice((1, 100, 5000))] * count, *made[5:]]
        message: Any = [numbers.choice((0, 1, 7, 2**63)), operation, *made]
        kind = numbers.choice(("values", "values", "values", "field", "shape", "bytes", "length", "splice"))
        self.kinds[kind] += 1
        if kind == "field" and names:
            message[2 + numbers.randrange(len(names))] = anything(numbers)
        elif kind == "shape":
            message = self._reshaped(message)
        body: bytes = msgpack.packb(message)
        frame = HEADER.pack(len(body)) + body
        if kind in ("bytes", "length", "splice"):
            frame = self._broken(kind, bytearray(frame))
        self._before = frame
        return frame

    def _reshaped(self, message: list[Any]) -> Any:
        numbers = self._numbers
        match numbers.randrange(7):
            case 0:
                return message[: numbers.randrange(len(message) + 1)]
            case 1:
                return [*message, anything(numbers)]
            case 2:
                return numbers.sample(message, len(message))
            case 3:
                return [message]
            case 4:
                return [anything(numbers), *message[1:]]
            case 5:
                return [message[0], anything(numbers), *message[2:]]
            case _:
                return anything(numbers)

    def _broken(self, kind: str, frame: bytearray) -> bytes:
        numbers = self._numbers
        if kind == "length":
            length = numbers.choice(
                (0, 1, len(frame) - 5, len(frame), len(frame) + 200, 8 << 20, (8 << 20) + 1, 2**32 - 1)
            )
            return HEADER.pack(length) + frame[HEADER.size :]
        if kind == "splice":
            at = numbers.randrange(len(frame))
            begin, end = frame[HEADER.size : at], self._before[at:][:100_000]
            body = numbers.choice((begin, frame[HEADER.size :] * 2, begin + end))
            return HEADER.pack(len(body)) + bytes(body)
        for _ in range(numbers.choice((1, 1, 2, 8))):
            frame[numbers.randrange(HEADER.size, len(frame))] ^= 1 << numbers.randrange(8)
        return bytes(frame)


def _send_for(seconds: float, seed: str, path: str, adapter: str, namespace: bytes, answer: Any) -> None:
    """The process: send for so long, and answer how many frames the daemon looked at, by kind."""
    mutants = Mutants(seed, adapter, namespace)
    until = time.monotonic() + seconds
    connections = 0
    while time.monotonic() < until:
        try:
            _one_connection(mutants, path)
        except OSError:
            continue  # it hung up, as it should
        finally:
            connections += 1
    answer.send((sum(mutants.kinds.values()), dict(mutants.kinds), connections))


def _one_connection(mutants: Mutants, path: str) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(_CALL_S + HANG_S)
    with sock:
        sock.connect(path)
        _, descriptors, _, _ = socket.recv_fds(sock, 4096, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        ours = Frames()
        for _ in range(_A_CONNECTION):
            frame = mutants.next()
            sock.sendall(frame)
            try:
                for message in ours.feed(frame):
                    decode_request(message)
            except ProtocolError:
                while sock.recv(1 << 20):  # until it hangs up: it has seen this one
                    pass
                return
            _drain(sock)


def _drain(sock: socket.socket) -> None:
    """Answers are not looked at; unread they would have the daemon hang up."""
    waits = sock.gettimeout()
    sock.setblocking(False)  # with a time-out set, MSG_DONTWAIT waits all the same
    with contextlib.suppress(BlockingIOError):
        while sock.recv(1 << 20):
            pass
    sock.settimeout(waits)


def fuzz_frames(folder: Path, seed: str, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """(figures, what must never be) of so many seconds."""
    adapter = str(adapter_folder(folder / "adapter", 1))
    daemon = Daemon(
        folder / "daemon.log", folder / "s", memory="8MiB", page_size="4KiB", disk_path=folder / "disk", disk="64MiB"
    )
    found: list[str] = []
    total, kinds, connections, longest, turns = 0, Counter[str](), 0, 0.0, 0
    try:
        daemon.ready()
        with CacheClient(f"unix://{daemon.socket}") as client:
            namespace = client.register(Namespace("m", "float32", "l", 16))
        context = multiprocessing.get_context("forkserver")
        until = time.monotonic() + seconds
        while time.monotonic() < until and daemon.process.poll() is None:
            turns += 1
            ours, theirs = context.Pipe()
            turn = min(_TURN_S, max(1.0, until - time.monotonic()))
            arguments = (turn, f"{seed}.{turns}", str(daemon.socket), adapter, namespace, theirs)
            worker = context.Process(target=_send_for, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            while worker.is_alive() and not ours.poll(0.2):
                longest = max(longest, _probe(daemon, found))
            try:
                count, by_kind, opened = ours.recv()
            except EOFError:
                found.append(f"the process that sends frames ended with {worker.exitcode} in turn {turns}")
                break
            worker.join(30)
            total, kinds, connections = total + count, kinds + Counter(by_kind), connections + opened
        found += _at_rest(daemon)
    finally:
        daemon.kill()
    found += daemon.tracebacks()
    figures = {
        "frames": total, "by kind": dict(kinds), "connections": connections,
        "longest status call beside, in seconds": round(longest, 3),
    }  # fmt: skip
    return figures, found


def _probe(daemon: Daemon, found: list[str]) -> float:
    began = time.monotonic()
    try:
        with CacheClient(f"unix://{daemon.socket}", timeout=_CALL_S) as client:
            client.status()
    except LoRACacheError as error:
        found.append(f"a status call beside the frames failed: {error}")
    took = time.monotonic() - began
    if took > HANG_S:
        found.append(f"HANG: a status call beside the frames took {took:.1f} s")
    return took


def _at_rest(daemon: Daemon) -> list[str]:
    """What is still held when everybody is gone."""
    if daemon.process.poll() is not None:
        return [f"the daemon ended by itself with {daemon.process.returncode}: {daemon.log.read_text()[-2000:]}"]
    names = ("leases", "leased_objects", "quarantined_bytes", "operations")

    def held() -> dict[str, Any]:
        status = daemon.status()
        ahead = status.get("swapper", {})  # what a frame announced is held for it, for as long as it said
        own = {"leases": ahead.get("held_leases", 0), "leased_objects": ahead.get("held_objects", 0)}
        return {name: left for name in names if (left := status.get(name, -1) - own.get(name, 0))}

    eventually(lambda: not held(), 20.0)
    found = [f"LEAK after the frames: {left}"] if (left := held()) else []
    if daemon.open_descriptors() > daemon.descriptors + 12:
        found.append(f"LEAK after the frames: {daemon.open_descriptors()} descriptors, {daemon.descriptors} before")
    code = daemon.end(20.0)
    return found if code == 0 else [*found, f"the daemon ended with {code} after the frames"]
