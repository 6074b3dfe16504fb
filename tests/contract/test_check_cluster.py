# SPDX-License-Identifier: Apache-2.0
"""`loracache check` on a real cluster: every node is looked at, each for its own keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache.audit import check as audit
from loracache.audit import redis as redis_check
from loracache.audit.faults import Fault
from loracache.config import Config
from loracache.storage_backends.redis.backend import RedisBackend


def test_faults_of_every_node_are_seen_and_mended(
    redis_cluster: Any, objects: Any, redis_tier: Callable[..., RedisBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_check, "GRACE_S", 0.1)
    for node in redis_cluster.nodes:
        node.redis.flushall()
    backend = redis_tier(redis_cluster.url, describe=lambda namespace: {namespace: b"what it is"})
    backend.check()
    stored = [objects.new(300_000) for _ in range(24)]  # two segments each
    objects.store(backend, stored)
    config = Config(socket=Path("/none"), redis=redis_cluster.url)
    assert audit.check(config, fix=False).findings == []
    broken = 0
    for node in redis_cluster.nodes:
        first, *_ = node.redis.keys("*:1")
        assert node.redis.unlink(first) == 1
        broken += 1
    report = audit.check(config, fix=True)
    assert [(each.fault, each.count, each.fixed) for each in report.findings] == [(Fault.INCOMPLETE, broken, broken)]
    report = audit.check(config, fix=False)
    assert (report.findings, report.checked) == ([], {"redis": 24 - broken})
    assert sum(objects.holds(backend, each) for each in stored) == 24 - broken
