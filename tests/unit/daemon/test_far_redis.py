# SPDX-License-Identifier: Apache-2.0
"""Lookups of many engines in a Redis that is far away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace, chunk_keys

ENGINES, ROUNDS, CHUNK, SIZE = 16, 4, 4, 1000
DELAY_MS, PATIENCE_MS = 20, 400  # one after the other would take 16 times 40 ms


PROXY = Path(__file__).parents[3] / "benchmarks" / "far_redis.py"


@pytest.fixture
def far(redis_server: Any, short_tmp: Path, eventually: Any) -> Iterator[tuple[str, str]]:
    """URLs of one Redis: at hand, and far away."""
    server = redis_server()
    here = short_tmp / "far.sock"
    proxy = subprocess.Popen([sys.executable, str(PROXY), str(here), str(server.socket), str(DELAY_MS)])
    try:
        eventually(here.exists, "the proxy listens", 30)
        yield server.url, f"unix://{here}"
    finally:
        proxy.kill()
        proxy.wait(30)


def test_no_lookup_is_given_up_because_others_ask_too(daemon: Any, far: tuple[str, str], short_tmp: Path) -> None:
    patient = short_tmp / "patient.yaml"
    patient.write_text(f"redis_lookup_ms: {PATIENCE_MS}\n")
    writer = daemon(memory="4MiB", redis=far[0]).client()
    root = writer.register(Namespace("ab" * 32, "bfloat16", "bytes", CHUNK), ["model"])
    chains = [chunk_keys(root, range(1000 * number, 1000 * number + 4 * CHUNK), CHUNK) for number in range(ENGINES)]
    for keys in chains:
        with writer.reserve(root, keys, [SIZE] * 4) as reservation:
            for position in range(4):
                reservation.write(position, os.urandom(SIZE))
    writer.flush()
    reader = daemon(memory="4MiB", redis=far[1], config=patient)
    together = threading.Barrier(ENGINES)
    hits: list[int] = []

    def engine(number: int) -> None:
        with CacheClient(reader.url) as client:
            for turn in range(ROUNDS):
                together.wait(60)
                keys = chains[(number + turn) % ENGINES]
                hits.append(client.lookup([*keys, os.urandom(32)]).hits)

    threads = [threading.Thread(target=engine, args=(number,)) for number in range(ENGINES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    status = reader.status()
    assert status["misses"] == {"absent": ENGINES * ROUNDS}
    assert hits == [4] * ENGINES * ROUNDS
