# SPDX-License-Identifier: Apache-2.0
"""REST beside the data path: lookups over HTTP, what they cost an engine's lookups, and pages of a large cache."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import (
    Daemon,
    Row,
    aligned_buffer,
    commit_objects,
    daemon,
    interleaved,
    namespace,
    ratio_row,
    row,
    seconds,
    work_folder,
)

from loracache import CacheClient, Namespace
from loracache.keys import salt_digest
from loracache.rest.tokens import add_token, tokens_path

CHUNKS, CLIENTS = 500, 8
OBJECTS = 200_000
HERE = Path(__file__).resolve().parent


def run(quick: bool) -> list[Row]:
    """Lookups first, then pages."""
    with work_folder() as folder:
        return _lookups(folder, quick) + _tells(folder, quick) + _pages(folder, 20_000 if quick else OBJECTS)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _serving(folder: Path, **settings: object) -> Iterator[tuple[Daemon, CacheClient, httpx.Client]]:
    port = _free_port()
    with (
        daemon(folder, http=f"127.0.0.1:{port}", **settings) as running,
        running.client() as client,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        deadline = time.monotonic() + 30
        while True:
            try:
                http.get("/readyz").raise_for_status()
                break
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield running, client, http


# -- lookups ----------


def _lookups(folder: Path, quick: bool) -> list[Row]:
    keys = [os.urandom(32) for _ in range(CHUNKS)]
    rounds, calls = (3, 300) if quick else (10, 1500)
    with _serving(folder, memory="64MiB", page_size=4096) as (running, client, http):
        commit_objects(client, keys, aligned_buffer(4096))()
        body = json.dumps({"selector": {"keys": [keys[0].hex()]}}).encode()
        port = int(http.base_url.port or 0)
        alone: list[float] = []
        beside: list[float] = []
        tails: list[float] = []
        for _ in range(rounds):
            alone.append(float(np.median(_timed(client, keys, calls))))
            with _callers(port, body, 60):
                times = _timed(client, keys, calls)
            beside.append(float(np.median(times)))
            tails.append(float(np.percentile(times, 99)))
        throughput = [_per_second(running, port, body, 2 if quick else 5) for _ in range(3)]
    return [
        row(f"lookup of {CHUNKS} chunks over the socket, alone: median of a round", "ms", alone),
        row(f"the same, {CLIENTS} clients calling REST without pause: median of a round", "ms", beside),
        ratio_row("that against alone, round by round", beside, alone, at_most=1.5),
        row("99th percentile of a round, with those clients", "ms", tails, at_most=2.0),
        row(
            "lookups over HTTP, daemon and REST process on one core, clients on another",
            "1/s",
            throughput,
            at_least=2000,
        ),
    ]


def _timed(client: CacheClient, keys: list[bytes], calls: int) -> list[float]:
    """Milliseconds of lookups as an engine makes them: one, then the next step."""
    times = []
    for _ in range(calls):
        times.append(1e3 * seconds(lambda: client.lookup(keys)))
        time.sleep(0.001)
    return times


@contextlib.contextmanager
def _callers(port: int, body: bytes, most_s: int, core: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(HERE / "rest_clients.py"), "127.0.0.1", str(port), str(CLIENTS), str(most_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        process.stdin.write(body)
        process.stdin.close()
        process.stdout.readline()
        time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait()


def _per_second(running: Daemon, port: int, body: bytes, length_s: int) -> float:
    """Calls answered a second; the server's processes share one core."""
    first, *others = sorted(os.sched_getaffinity(0))
    processes = [running.process.pid, *_children(running.process.pid)]
    for pid in processes:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), {first})
    try:
        with _callers(port, body, length_s, others[0] if others else None) as callers:
            assert callers.stdout is not None
            answered = callers.stdout.readline().split()
    finally:
        for pid in processes:
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), {first, *others})
    return int(answered[0]) / length_s


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# -- what the time of an answer tells ----------


def _tells(folder: Path, quick: bool) -> list[Row]:
    """A tenant asks for objects of another tenant, and for some that nobody has."""
    calls = 300 if quick else 3000
    with _serving(folder, memory="64MiB", page_size=4096) as (running, client, http):
        other = Namespace("ab" * 32, "float32", "benchmark", 16, salt=salt_digest("other"))
        keys = [os.urandom(32) for _ in range(100)]
        with client.reserve(client.register(other), keys, [4096] * 100):
            pass
        token = add_token(tokens_path(running.socket), "tenant", "operate", salt_digest("own"))
        headers = {"authorization": f"Bearer {token}"}
        while http.get("/v1/objects", headers=headers).status_code != 200:
            time.sleep(0.1)
        bodies = [{"selector": {"keys": [key.hex()]}} for key in (keys[50], os.urandom(32))]

        def ask(body: dict[str, Any]) -> float:
            return seconds(lambda: http.post("/v1/lookup", json=body, headers=headers).raise_for_status())

        times = interleaved(calls, {"theirs": lambda: ask(bodies[0]), "nobodys": lambda: ask(bodies[1])}, warm_up=50)
    differences = [1e6 * (a - b) for a, b in zip(times["theirs"], times["nobodys"], strict=True)]
    low, high = _interval(differences)
    return [
        Row(
            "lookup of another tenant's object - of nobody's: median of pairs",
            "us",
            float(np.median(differences)),
            (low, high),
            calls,
            "0 within its 95 % interval",
            low <= 0 <= high,
            "95 % interval of the median",
        )
    ]


def _interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, by resampling (percentile bootstrap)."""
    picked = np.random.default_rng(0).choice(values, size=(2000, len(values)))
    low, high = np.percentile(np.median(picked, axis=1), (2.5, 97.5))
    return float(low), float(high)


# -- pages ----------


def _pages(folder: Path, objects: int) -> list[Row]:
    """First pages against last pages of everything there is, 100 objects each."""
    with _serving(folder, memory=(objects + 1000) * 4096, page_size=4096) as (_, client, http):
        root = client.register(namespace())
        for _ in range(0, objects, 500):  # chains of two chunks
            keys = [os.urandom(32) for _ in range(500)]
            parents = [b"" if number % 2 == 0 else keys[number - 1] for number in range(500)]
            with client.reserve(root, keys, [4096] * 500, parents=parents):
                pass  # whatever bytes
        rows = []
        space = http.get("/v1/tree", params={"under": "base"}).json()["nodes"][0]["id"]
        for path, params in (("/v1/objects", {"limit": 100}), ("/v1/tree", {"limit": 100, "under": space})):
            times = _page_times(http, path, params)
            tenth = max(1, len(times) // 10)
            rows += [
                row(f"{path}, a page of 100 out of {objects:,} objects: first tenth of the pages", "ms", times[:tenth]),
                row(f"{path}: last tenth", "ms", times[-tenth:]),
            ]
    return rows


def _page_times(http: httpx.Client, path: str, params: dict[str, Any]) -> list[float]:
    times = []
    after: str | None = ""
    while after is not None:
        started = time.perf_counter()
        answer = http.get(path, params=params | {"after": after})
        times.append(1e3 * (time.perf_counter() - started))
        after = answer.raise_for_status().json()["next"]
    return times
