# SPDX-License-Identifier: Apache-2.0
"""Redis under a daemon: shared, gone, stopped, damaged. It delays nobody; what is wrong with it is a counted miss."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace

NAMESPACE = Namespace("model", "float32", "layout", 16)
SIZE = 100_000
# Below the 2 s for which a call to Redis itself waits, far above what a loaded machine adds to 10 ms.
PROMPT_S = 1.8


def store(client: CacheClient, count: int, size: int = SIZE) -> dict[bytes, bytes]:
    """A chain."""
    root = client.register(NAMESPACE)
    payloads = {os.urandom(32): os.urandom(size) for _ in range(count)}
    with client.reserve(root, list(payloads), [size] * count) as reservation:
        for position, payload in enumerate(payloads.values()):
            reservation.write(position, payload)
    assert reservation.causes == [""] * count
    return payloads


def promptly(call: Callable[[], Any]) -> Any:
    started = time.monotonic()
    found = call()
    assert time.monotonic() - started < PROMPT_S
    return found


@pytest.fixture
def redis(redis_server: Any) -> Any:
    return redis_server()


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    """Settings of a daemon whose lookups wait for Redis longer than a loaded machine makes it take."""
    file = tmp_path / "patient.yaml"
    file.write_text("redis_lookup_ms: 1000\n")
    return file


def test_what_cpu_and_disk_lost_is_found_in_redis_and_written_to_disk_again(
    daemon: Any, redis: Any, patient: Path, tmp_path: Path
) -> None:
    running = daemon(redis=redis.url, config=patient, disk_path=tmp_path / "disk")
    client = running.client()
    payloads = store(client, 8)
    keys = list(payloads)
    client.flush()
    client.clear(tiers=["cpu", "disk"])
    assert client.lookup([*keys, bytes(32)]).tiers == ("redis",) * 8
    assert {key: client.get(key) for key in keys} == payloads
    client.flush()
    assert client.lookup(keys).tiers == ("cpu",) * 8
    client.clear(tiers=["cpu"])
    assert client.lookup(keys).tiers == ("disk",) * 8
    counters = running.status()["counters"]
    assert counters["load.redis.objects"] == 8
    assert counters["hit.redis"] == 8


def test_two_daemons_share_what_redis_holds(daemon: Any, redis: Any, patient: Path) -> None:
    one, two = (daemon(redis=redis.url, config=patient).client() for _ in range(2))
    payloads = store(one, 5)
    one.flush()
    assert two.lookup(list(payloads)).tiers == ("redis",) * 5
    assert {key: two.get(key) for key in payloads} == payloads
    one.evict(list(payloads))
    one.flush()
    two.clear(tiers=["cpu"])
    assert two.lookup(list(payloads)).hits == 0


def test_evicting_from_all_tiers_leaves_nothing_in_redis(daemon: Any, redis: Any) -> None:
    client = daemon(redis=redis.url).client()
    payloads = store(client, 5, size=20 << 10)
    client.flush()
    assert redis.redis.dbsize() > 1
    client.evict(list(payloads)[:1])
    client.flush()
    assert redis.redis.keys("*") == [b"loracache:namespaces"]  # whose they were


def test_a_stopped_redis_delays_no_lookup_and_no_other_client(
    daemon: Any, redis: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    running = daemon(redis=redis.url, disk_path=tmp_path / "disk")
    client, other = running.client(), running.client()
    payloads = store(client, 5)
    keys = list(payloads)
    client.flush()
    client.clear(tiers=["cpu", "disk"])
    mine = list(store(other, 5))
    redis.send(signal.SIGSTOP)
    assert promptly(lambda: client.lookup(keys)).hits == 0
    for _ in range(20):
        assert promptly(lambda: client.lookup(keys)).hits == 0  # without waiting its 10 ms for each
        assert promptly(lambda: other.lookup(mine)).hits == 5
    more = promptly(lambda: store(other, 5))
    assert promptly(lambda: other.get(mine[0])) is not None
    assert client.get(keys[0]) is None  # waits for Redis, and no longer than Redis may take
    other.flush()
    status = running.status()
    assert status["misses"]["redis_slow"] > 0
    assert status["failures"]["redis.unavailable"] > 0
    assert not status["tiers"]["redis"]["available"]
    assert status["counters"]["write.redis.dropped.unavailable"] >= 5
    redis.send(signal.SIGCONT)
    eventually(lambda: client.lookup(keys).tiers == ("redis",) * 5, "Redis is asked again", seconds=30)
    assert {key: client.get(key) for key in keys} == payloads
    assert {key: other.get(key) for key in more} == more


def test_a_redis_that_is_killed_and_started_again_is_used_again(
    daemon: Any, redis: Any, eventually: Callable[..., Any]
) -> None:
    running = daemon(redis=redis.url)
    client = running.client()
    payloads = store(client, 3)
    client.flush()
    redis.kill()
    client.clear(tiers=["cpu"])
    for key in payloads:
        assert promptly(lambda key=key: client.get(key)) is None  # type: ignore[misc]
    kept = store(client, 3)
    client.flush()
    assert {key: client.get(key) for key in kept} == kept
    assert running.status()["failures"]["redis.unavailable"] >= 1
    redis.start()

    def written() -> bool:
        more = store(client, 1)
        client.flush()
        client.clear(tiers=["cpu"])
        return {key: client.get(key) for key in more} == more

    eventually(written, "Redis is used again", seconds=30)


def test_a_daemon_starts_again_beside_a_redis_that_lost_everything(daemon: Any, redis: Any, patient: Path) -> None:
    first = daemon(redis=redis.url)
    payloads = store(first.client(), 3)
    assert first.stop() == 0
    assert redis.redis.dbsize() > 0  # drained
    redis.redis.flushall()
    client = daemon(redis=redis.url, config=patient).client()
    assert client.lookup(list(payloads)).hits == 0


@pytest.mark.parametrize(
    "damage", ["segment flipped", "segment gone", "segment short", "header flipped", "header type", "swapped"]
)
def test_a_damaged_value_is_a_counted_miss_and_its_neighbours_are_served(daemon: Any, redis: Any, damage: str) -> None:
    running = daemon(redis=redis.url)
    client = running.client()
    payloads = store(client, 3)
    keys = list(payloads)
    client.flush()
    client.clear(tiers=["cpu"])
    header = next(name for name in redis.redis.keys("*") if keys[1].hex().encode() in name and name.endswith(b"}"))
    segment = next(name for name in redis.redis.keys("*") if keys[1].hex().encode() in name and name != header)
    value = bytearray(redis.redis.get(segment))
    if damage == "segment flipped":
        value[len(value) // 2] ^= 1
        redis.redis.set(segment, bytes(value))
    elif damage == "segment gone":
        redis.redis.delete(segment)
    elif damage == "segment short":
        redis.redis.set(segment, bytes(value[:-1]))
    elif damage == "header flipped":
        raw = bytearray(redis.redis.get(header))
        raw[60] ^= 1
        redis.redis.set(header, bytes(raw))
    elif damage == "header type":
        redis.redis.delete(header)
        redis.redis.lpush(header, "x")
    else:
        theirs = segment.replace(keys[1].hex().encode(), keys[2].hex().encode())
        redis.redis.set(segment, redis.redis.get(theirs))
    assert client.get(keys[1]) is None
    assert client.get(keys[0]) == payloads[keys[0]]
    assert client.get(keys[2]) == payloads[keys[2]]
    status = running.status()
    if damage.startswith("segment") or damage == "swapped":
        assert sum(status["failures"].values()) == 1
    assert sum(count for name, count in status["counters"].items() if name.startswith("acquire.failed.")) == 1


# -- shutdown ----------------------------------------------------------------------------------------------------------


def test_a_shutdown_drains_what_is_queued(daemon: Any, redis: Any, patient: Path, tmp_path: Path) -> None:
    running = daemon(memory="32MiB", redis=redis.url, disk_path=tmp_path / "disk")
    payloads = store(running.client(), 250)
    assert running.stop() == 0
    assert "dropped after" not in running.log()
    again = daemon(memory="32MiB", redis=redis.url, config=patient)
    client = again.client()
    assert client.lookup(list(payloads)).tiers == ("redis",) * 250
    assert len(list((tmp_path / "disk" / "objects").glob("*/*"))) == 250


def test_a_shutdown_without_time_says_what_it_drops_and_waits_for_no_redis(daemon: Any, redis: Any) -> None:
    running = daemon(memory="32MiB", redis=redis.url, drain=0)
    client = running.client()
    store(client, 1)
    client.flush()
    redis.send(signal.SIGSTOP)
    store(client, 200)
    assert running.stop(seconds=10) == 0
    assert "redis: 200 queued writes dropped after 0 s of draining" in running.log()
    redis.send(signal.SIGCONT)


def test_a_shutdown_with_nothing_queued_says_nothing_of_dropping(daemon: Any, tmp_path: Path) -> None:
    running = daemon(disk_path=tmp_path / "disk", drain=0)
    client = running.client()
    store(client, 3)
    client.flush()
    assert running.stop() == 0
    assert "dropped after" not in running.log()
