# SPDX-License-Identifier: Apache-2.0
"""The swapper beside clients that store and load: it keeps to its bytes a second, and no step of it is a stall."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loracache import CacheClient, Namespace
from loracache.cache.state.counters import Counters
from loracache.cache.swap.swapper import STEP_S, Swapper, SwapSettings
from loracache.results import Cause
from loracache.simulator.request import BLOCK_TOKENS, Request
from loracache.simulator.store import Sizes, Store, Way

NAMESPACE = Namespace("model", "float32", "layout", 16)
SIZE = 100_000
RATE = 2 << 20


def store(client: CacheClient, count: int) -> list[bytes]:
    root = client.register(NAMESPACE)
    keys = [os.urandom(32) for _ in range(count)]
    for key in keys:
        with client.reserve(root, [key], [SIZE], parents=[b""]) as reservation:
            if reservation.slots[0] is not None:
                reservation.write(0, key * (SIZE // 32))
    return keys


def test_the_pace_is_kept_beside_clients_and_whoever_reads_sees_the_right_bytes(daemon: Any, tmp_path: Path) -> None:
    file = tmp_path / "loracache.yaml"
    file.write_text(f"swapper: {RATE}\n")
    options = {"config": file, "memory": "64MiB", "page_size": "4KiB", "disk_path": tmp_path / "disk"}
    first = daemon(**options)
    keys = store(first.client(), 200)
    first.client().flush(60)
    first.stop()
    running = daemon(**options)
    stop = threading.Event()
    wrong: list[bytes] = []

    def read() -> None:
        with CacheClient(running.url) as client:
            for at in range(10**6):
                key = keys[at * 7 % len(keys)]
                data = client.get(key)
                if data is not None and data[:32] != key:
                    wrong.append(key)
                if not at % 50:
                    store(client, 1)
                if stop.wait(0.02):
                    return

    reader = threading.Thread(target=read)
    reader.start()
    began, last = time.monotonic(), 0
    while time.monotonic() < began + 8.0:
        time.sleep(0.5)
        raised = running.status()["counters"].get("prefetch.bytes", 0)
        assert raised <= RATE * (time.monotonic() - began + 1.0), "more than it may"
        last = max(last, raised)
    stop.set()
    reader.join()
    assert not wrong
    assert last > 2 << 20, "it raised next to nothing"
    counters = running.status()["counters"]
    assert counters.get("prefetch.failed", 0) == 0
    assert counters["prefetch.used"] > 0
    with running.client() as client:
        assert client.flush(30).complete


def test_no_step_keeps_the_loop_however_much_there_is(quickest: Callable[..., float]) -> None:
    """15,000 chunks on disk of 300 chains under one adapter, and an empty memory."""
    block = BLOCK_TOKENS * 10
    made = Store(Sizes(200_000 * block, 200_000 * block, 10, [block]), Way.parse("lru"))
    for chain in range(300):
        blocks = tuple(range(chain * 50, chain * 50 + 50))
        made.serve(Request(float(chain), 50 * BLOCK_TOKENS, blocks, 0))
    now = [0.0]
    counters = Counters()
    begun: list[Any] = []

    def load(node: Any, done: Any) -> None:
        begun.append(node)
        done(Cause.NONE if made.raise_(node, evict=False) else Cause.MEMORY_FULL)

    swapper = Swapper(
        made.index,
        made,
        counters,
        SwapSettings(on=True, bandwidth=10**12, in_flight=10**12),
        load=load,
        evict=lambda nbytes, over: over(),
        quiet=lambda: True,
        clock=lambda: now[0],
    )
    made.restart()
    rounds = 0

    def slowest() -> float:
        nonlocal rounds
        slowest, rounds = 0.0, rounds + 1
        for _ in range(20):
            now[0] += STEP_S
            started = time.thread_time()
            swapper.step()
            slowest = max(slowest, time.thread_time() - started)
        assert len(begun) == rounds * 20 * 128
        return slowest

    assert quickest(slowest, 0.02) < 0.02
