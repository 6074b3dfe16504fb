# SPDX-License-Identifier: Apache-2.0
"""Many clients on a small daemon, some killed at any moment: every byte that is read is right, and nothing is lost."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace, chunk_keys

NAMESPACE = Namespace("model", "float32", "layout", 16)
CHAINS, LENGTH, PAGE = 40, 6, 4096
SECONDS, CLIENTS = 10.0, 4

# Keys, sizes and payloads follow from the chain's number: every process knows what every other stores.
COMMON = """
import random
from loracache.errors import LeaseLost
def chain(number):
    return chunk_keys(root, [number] * (16 * 6), 16)
def size_of(key):
    return 1 + int.from_bytes(key[:4], "big") % 60_000
def payload(key):
    return random.Random(key).randbytes(size_of(key))
"""

WORKER = (
    COMMON
    + """
def store(keys):
    with client.reserve(root, keys, [size_of(key) for key in keys], ttl=5) as reservation:
        for at, key in enumerate(keys):
            if reservation.slots[at] is not None:
                reservation.write(at, payload(key))
    return [cause or "stored" for cause in reservation.causes]

def read(keys):
    hits = client.lookup(keys).hits
    try:
        with client.acquire(keys[:hits + 1], ttl=5) as reading:
            found = [slot and b"".join(slot.buffers) for slot in reading.slots]
    except LeaseLost:
        return ["lease_lost"]
    for key, data in zip(keys, found):
        if data is not None and data != payload(key):
            say("WRONG", key.hex())
            sys.exit(3)
    return ["read" if data is not None else "missed" for data in found]

chance = random.Random(int(sys.argv[2]))
end = time.monotonic() + float(sys.argv[3])
done = {}
say("working")
while time.monotonic() < end:
    keys = chain(chance.randrange(40))[: chance.randint(1, 6)]
    what = chance.random()
    if what < 0.45:
        outcomes = store(keys)
    elif what < 0.9:
        outcomes = read(keys)
    elif what < 0.95:
        where = chance.choice([["cpu"], ["cpu", "disk", "redis"]])
        outcomes = ["evicted"] * client.evict(keys[-1:], tiers=where).objects
    elif what < 0.99:
        outcomes = ["pinned"] * client.pin(keys[:1], tier=chance.choice(["cpu", "disk"]), ttl=0.2)
    else:
        client.flush(30)
        outcomes = ["flushed"]
    for outcome in outcomes:
        done[outcome] = done.get(outcome, 0) + 1
say(*[f"{name}={count}" for name, count in done.items()])
"""
)


@pytest.mark.timeout(120)
def test_clients_that_store_read_evict_and_die_at_random_see_right_bytes_and_leave_nothing(
    daemon: Any, redis_server: Any, client_process: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    redis = redis_server()
    running = daemon(memory="4MiB", page_size="4KiB", disk_path=tmp_path / "disk", disk="3MiB", redis=redis.url)
    chance = random.Random(11)
    end = time.monotonic() + SECONDS
    number = 0

    def start() -> Any:
        nonlocal number
        number += 1
        return client_process(running.url, WORKER, str(number), str(max(0.0, end - time.monotonic())))

    workers = [start() for _ in range(CLIENTS)]
    for worker in workers:
        assert worker.line() == "working"
    while time.monotonic() < end - 1:
        time.sleep(chance.uniform(0.1, 0.9))
        victim = workers.pop(chance.randrange(len(workers)))
        victim.send(signal.SIGKILL)
        victim.kill()
        workers.append(start())
        if number == CLIENTS + 4:
            redis.send(signal.SIGSTOP)
            time.sleep(0.5)
            redis.send(signal.SIGCONT)
    done: Counter[str] = Counter()
    for worker in workers:
        while line := worker.line():
            assert "WRONG" not in line
            pairs = (word.partition("=") for word in line.split())
            done.update({name: int(count) for name, _, count in pairs if count})
        assert worker.process.wait(30) == 0
    print(number, "clients", done)  # noqa: T201 - shown where the test failed
    assert done["stored"] > 50
    assert done["read"] > 50
    assert number > CLIENTS + 4
    settled(running, eventually)


def settled(running: Any, eventually: Callable[..., Any]) -> None:
    """Nobody is left: no lease, no page out of use, and the arena holds its objects' pages and no other."""
    client: CacheClient = running.client()
    eventually(lambda: client.status()["connections"] == 1, "all others are gone")
    eventually(lambda: client.status()["quarantined_bytes"] == 0, "killed writers' pages are back")
    client.flush(30)
    status = running.status()
    assert status["leases"] == status["leased_objects"] == 0
    # Evicted between question and load, or asked while Redis was stopped; nothing corrupt, nothing failed.
    assert status["failures"].keys() <= {"disk.miss", "redis.miss", "redis.unavailable"}
    root = client.register(NAMESPACE)
    pages = objects = 0
    for number in range(CHAINS):
        for key in chunk_keys(root, [number] * (16 * LENGTH), 16):
            if client.lookup([key]).tiers == ("cpu",):
                objects += 1
                pages += -(-(1 + int.from_bytes(key[:4], "big") % 60_000) // PAGE)
    status = running.status()
    assert status["tiers"]["cpu"]["objects"] == objects
    assert status["tiers"]["cpu"]["used_bytes"] == pages * PAGE
    assert status["tiers"]["disk"]["used_bytes"] <= 3 << 20
    eventually(lambda: client.clear(tiers=["cpu"]).skipped == 0, "the last pin has ended")
    assert running.status()["tiers"]["cpu"]["used_bytes"] == 0
    assert running.stop() == 0
    assert "Traceback" not in running.log()
