# SPDX-License-Identifier: Apache-2.0
"""A daemon keeps what it and others have in Redis within `redis_max_bytes`, and says how much that is."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import Any

from loracache import CacheClient, Namespace, chunk_keys

CHUNK, SIZE, LIMIT = 4, 100_000, 2 << 20


def test_what_is_written_beyond_the_budget_pushes_the_oldest_out(
    daemon: Any, redis_server: Any, short_tmp: Path, eventually: Any
) -> None:
    server = redis_server()
    settings = short_tmp / "settings.yaml"
    settings.write_text(f"redis_max_bytes: {LIMIT}\n")
    running = daemon(memory="16MiB", redis=server.url, config=settings, http="127.0.0.1:0")
    other = daemon(memory="16MiB", redis=server.url)  # without a budget

    def taken() -> int:
        return sum(server.redis.memory_usage(key) or 0 for key in server.redis.keys("loracache:{*"))

    for number, each in enumerate((other, running)):
        with CacheClient(each.url) as client:
            root = client.register(Namespace("ab" * 32, "bfloat16", "bytes", CHUNK), ["model"])
            for turn in range(30):
                start = 1000 * number + 10 * turn
                keys = chunk_keys(root, range(start, start + CHUNK), CHUNK)
                with client.reserve(root, keys, [SIZE]) as reservation:
                    reservation.write(0, os.urandom(SIZE))
            client.flush()
    eventually(lambda: 0 < taken() <= LIMIT, "the budget is kept", 60)
    eventually(lambda: 0 < running.status()["tiers"]["redis"]["used_bytes"] <= LIMIT, "it is said", 60)
    status = running.status()
    assert status["tiers"]["redis"]["limit_bytes"] == LIMIT
    assert status["counters"]["evict.redis.budget"] >= 30
    assert status["counters"]["evicted_bytes.redis.budget"] >= 30 * SIZE
    assert "limit_bytes" not in other.status()["tiers"]["redis"]

    def metrics() -> str:
        with urllib.request.urlopen(f"{running.http}/metrics") as answer:
            return str(answer.read().decode())

    text = eventually(metrics, "REST answers", 30)
    assert 'loracache_tier_limit_bytes{tier="redis"} 2.097152e+06' in text
    assert 'loracache_evictions_total{cause="budget",tier="redis"}' in text
