# SPDX-License-Identifier: Apache-2.0
"""What policies assume of engines and tiers gives way to what is measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.cache.policy import POLICIES
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.arena import Arena
from loracache.cache.tiered import TieredCache
from loracache.cli.tables import print_status
from loracache.storage_backends.memory import MemoryBackend
from loracache.tiers import Tier
from loracache.wire import protocol

SIZE = 100_000


def speeds(client: CacheClient) -> dict[str, Any]:
    status: Any = client.status()
    return dict(status["speeds"])


def test_engines_say_how_fast_they_compute(daemon: Any, eventually: Any) -> None:
    running = daemon(memory="16MiB")
    with running.client() as one, running.client() as two:
        assert speeds(one)["prefill"] == {"bytes_per_second": 1048576000, "latency_seconds": 0.0, "measured": False}
        one.connection.call(protocol.Report({}, 1, 0), 10.0)  # one that does not know it, or of an older release
        one.connection.call(protocol.Report({}, 1, 0, b"", 100_000_000), 10.0)
        two.connection.call(protocol.Report({}, 1, 0, b"", 300_000_000), 10.0)
        eventually(lambda: speeds(one)["prefill"]["bytes_per_second"] == 200_000_000, "the mean", 10)
        assert speeds(one)["prefill"]["measured"]
    with running.client() as client:
        eventually(lambda: client.status()["connections"] == 1, "the engines are gone", 10)
        assert speeds(client)["prefill"]["bytes_per_second"] in (200_000_000, 100_000_000, 300_000_000)


def test_the_disk_is_measured_as_it_is_read(
    daemon: Any, tmp_path: Path, eventually: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = daemon(memory="16MiB", disk_path=tmp_path / "disk").client()
    assert speeds(client)["disk"] == {"bytes_per_second": 2_000_000_000, "latency_seconds": 0.001, "measured": False}
    root = client.register(Namespace("model", "float32", "layout", 16))
    keys = [os.urandom(32) for _ in range(24)]
    with client.reserve(root, keys, [SIZE] * len(keys)) as reservation:
        for at in range(len(keys)):
            reservation.write(at, os.urandom(SIZE))
    client.flush(30)
    client.clear(tiers=["cpu"])
    for some in (keys[:2], keys[2:10], keys[10:]):
        with client.acquire(some) as reading:
            assert all(slot is not None for slot in reading.slots)
    assert speeds(client)["disk"]["measured"]
    assert 1e6 < speeds(client)["disk"]["bytes_per_second"] < 1e11
    print_status(client.status())
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("speeds: "))
    assert shown.startswith("speeds: prefill 1000.0 MiB/s (assumed), disk ")
    assert shown.count("assumed") == 1


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_all_policies_of_a_cache_go_by_one(policy: str) -> None:
    cache = TieredCache(
        Arena(1 << 20, 4096), lambda call: call(), disk=MemoryBackend(), disk_limit=1 << 20, policy=policy
    )
    assert cache.quotas.speeds is not Speeds()
    assert [cache._policies[tier].speeds for tier in (Tier.CPU, Tier.DISK)] == [cache.quotas.speeds] * 2
    cache.quotas.engage()
    cache.quotas.speeds.learn(prefill=5.0, disk=0.0)
    assert {id(cache._policies[tier].speeds) for tier in (Tier.CPU, Tier.DISK)} == {id(cache.quotas.speeds)}
    assert (cache.quotas.speeds.prefill, cache.quotas.speeds.disk) == (5.0, 2e9)
    assert cache.quotas.speeds.measured == {"prefill"}
