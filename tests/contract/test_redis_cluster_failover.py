# SPDX-License-Identifier: Apache-2.0
"""A node of a real cluster dies for good, and its replica takes its slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache.errors import Unavailable
from loracache.storage_backends.base import Outcome
from loracache.storage_backends.redis import cluster as redis_cluster_module
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.names import RedisNames
from loracache.storage_backends.redis.slots import slot_of

OK, UNAVAILABLE = Outcome.OK, Outcome.UNAVAILABLE


@pytest.fixture
def replica_of(redis_cluster: Any, eventually: Callable[..., Any]) -> Iterator[Callable[[int], Any]]:
    """replica_of(number) starts a node that has all that this node of the cluster has."""
    started = []

    def start(number: int) -> Any:
        node = redis_cluster.new_node()
        started.append(node)
        eventually(node.answers, "the replica answers")
        node.redis.execute_command("CLUSTER MEET", "127.0.0.1", redis_cluster.nodes[number].tls_port)
        own, master = node.redis.execute_command("CLUSTER MYID").decode(), redis_cluster.id(number)
        eventually(lambda: master in str(node.redis.cluster("NODES")), "they have met")
        node.redis.execute_command("CLUSTER REPLICATE", redis_cluster.id(number))
        eventually(lambda: node.redis.info("replication").get("master_link_status") == "up", "it has all")
        for each in redis_cluster.nodes:  # else they would not vote for it
            eventually(lambda each=each: own in str(each.redis.cluster("NODES")), "all know it")
        return node

    yield start
    for node in started:
        node.kill()


def test_the_replica_of_a_dead_node_is_found(
    monkeypatch: pytest.MonkeyPatch,
    redis_cluster: Any,
    replica_of: Callable[[int], Any],
    objects: Any,
    redis_tier: Callable[..., RedisBackend],
    eventually: Callable[..., Any],
) -> None:
    number = redis_cluster.owner(slot_of(b"loracache:adapters"))
    replica = replica_of(number)
    for pause in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S"):
        monkeypatch.setattr(redis_cluster_module, pause, 120.0)  # the dead node itself is not asked again
    tier, names = redis_tier(redis_cluster.url), RedisNames(redis_cluster.url, timeout_s=10)
    stored = [objects.new(100_000) for _ in range(12)]
    objects.store(tier, stored)
    names.put("a", b"record")
    redis_cluster.nodes[number].redis.set("{loracache:adapters}", "mark")
    assert redis_cluster.nodes[number].redis.wait(1, 10_000) == 1
    redis_cluster.nodes[number].kill()

    def found() -> bool:
        seen = [result.outcome for result in tier.contains([item.info.key for item in stored])]
        assert set(seen) <= {OK, UNAVAILABLE}
        return seen == [OK] * 12

    eventually(found, "the replica has the slots", 30)
    assert all(objects.holds(tier, item) for item in stored)
    objects.store(tier, stored)
    assert replica.redis.dbsize() > 0

    def named() -> bool:
        try:
            return names.get("a") == b"record"
        except Unavailable:
            return False

    eventually(named, "the names are found")
    names.close()
