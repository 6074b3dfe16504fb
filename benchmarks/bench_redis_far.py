# SPDX-License-Identifier: Apache-2.0
"""Lookups of 16 engines at the same time in a Redis a millisecond away, each way: how many are given up.

Each engine is a thread with a connection of its own that looks up 64 chunks, half of which Redis has, again and again,
with a pause in between as an engine's steps leave one. The daemon waits for Redis as long as it does by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench_redis import redis_server
from common import Daemon, Row, aligned_buffer, commit_objects, daemon, row, work_folder

ENGINES, CHUNKS = 16, 64
DELAY_MS = 1.0
PAUSE_S = 0.02


def run(quick: bool) -> list[Row]:
    """Lookups given up of all, and how long one takes."""
    rounds = 20 if quick else 200
    held = [os.urandom(32) for _ in range(CHUNKS // 2)]
    with work_folder() as folder, redis_server(folder) as path:
        with daemon(folder, memory="64MiB", page_size=4096, redis=f"unix://{path}") as near, near.client() as client:
            commit_objects(client, held, aligned_buffer(4096))()
            client.flush()
        here = folder / "far.sock"
        script = Path(__file__).with_name("far_redis.py")
        proxy = subprocess.Popen([sys.executable, str(script), str(here), str(path), str(DELAY_MS)])
        try:
            while not here.exists() and proxy.poll() is None:
                time.sleep(0.01)
            with daemon(folder, memory="64MiB", page_size=4096, redis=f"unix://{here}") as running:
                hits, times = _lookups(running, held, rounds)
        finally:
            proxy.kill()
            proxy.wait()
    given_up = sum(count < len(held) for count in hits)
    return [
        row("lookups given up", "%", [100 * given_up / len(hits)], at_most=0.0, note=f"{given_up} of {len(hits)}"),
        row(f"lookup of {CHUNKS} chunks, half in Redis: median", "ms", times),
    ]


def _lookups(running: Daemon, held: list[bytes], rounds: int) -> tuple[list[int], list[float]]:
    """Hits and milliseconds of each lookup."""
    hits: list[int] = []
    times: list[float] = []

    def engine() -> None:
        with running.client() as client:
            for _ in range(rounds):
                keys = [*held, *(os.urandom(32) for _ in range(CHUNKS - len(held)))]
                began = time.perf_counter()
                hits.append(client.lookup(keys).hits)
                times.append(1e3 * (time.perf_counter() - began))
                time.sleep(PAUSE_S)

    threads = [threading.Thread(target=engine) for _ in range(ENGINES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return hits, times
