# SPDX-License-Identifier: Apache-2.0
"""The Redis tier on a real cluster of three nodes: slots that move, nodes that die, never another object's bytes."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache.errors import ConfigError, Unavailable
from loracache.storage_backends.base import Outcome, Transfer
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.names import RedisNames
from loracache.storage_backends.redis.slots import slot_of

OK, MISS, UNAVAILABLE = Outcome.OK, Outcome.MISS, Outcome.UNAVAILABLE


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


def slot(transfer: Transfer) -> int:
    return slot_of(transfer.info.key.hex().encode())


@pytest.fixture
def cluster(redis_cluster: Any, eventually: Callable[..., Any]) -> Iterator[Any]:
    """The module's cluster with nothing in it."""
    for node in redis_cluster.nodes:
        node.redis.flushall()
    yield redis_cluster
    eventually(redis_cluster.whole, "the cluster is whole again")


@pytest.fixture
def tier(cluster: Any, redis_tier: Callable[..., RedisBackend]) -> RedisBackend:
    backend = redis_tier(cluster.url)
    backend.check()
    return backend


def of_node(cluster: Any, items: list[Transfer], number: int) -> list[bool]:
    """For each object whether the node has its slot."""
    return [cluster.owner(slot(item)) == number for item in items]


@pytest.mark.parametrize("way", ["url", "tls_url"])
def test_a_batch_is_spread_over_the_nodes_and_answered_in_its_order(
    cluster: Any, objects: Any, redis_tier: Callable[..., RedisBackend], way: str
) -> None:
    backend = redis_tier(getattr(cluster, way))
    backend.check()
    stored = [objects.new(1 + 50_000 * number, pieces=2) for number in range(12)]
    objects.store(backend, stored)
    assert all(node.redis.dbsize() for node in cluster.nodes)
    never = [objects.new(10) for _ in range(12)]
    mixed = [item for pair in zip(stored, never, strict=True) for item in pair]
    results = backend.contains([item.info.key for item in mixed])
    assert [result.info for result in results] == [info for item in stored for info in (item.info, None)]
    targets = [objects.empty(item) for item in mixed]
    assert outcomes(backend.load(targets)) == [OK, MISS] * 12
    assert [objects.payload(target) for target in targets[::2]] == [objects.payload(item) for item in stored]
    assert outcomes(backend.delete([item.info.key for item in mixed])) == [OK, MISS] * 12
    assert not any(node.redis.dbsize() for node in cluster.nodes)


def test_one_node_that_is_named_is_enough_to_find_the_others(
    cluster: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    backend = redis_tier(f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.nodes[1].port}")
    objects.store(backend, [objects.new(10) for _ in range(20)])


def test_many_headers_come_through_whole(tier: RedisBackend, objects: Any) -> None:
    stored = [objects.new(1) for _ in range(1500)]
    objects.store(tier, stored)
    assert [result.info for result in tier.contains([item.info.key for item in stored])] == [i.info for i in stored]


def test_a_key_of_another_type_is_a_miss_as_elsewhere(cluster: Any, tier: RedisBackend, objects: Any) -> None:
    item = objects.new(10)
    cluster.nodes[cluster.owner(slot(item))].redis.rpush(f"loracache:{{{item.info.key.hex()}}}", "mine")
    assert objects.found(tier, item) is objects.load(tier, item) is MISS
    objects.store(tier, [item])
    assert objects.holds(tier, item)


def test_a_damaged_object_is_corrupt_and_deleted_where_it_lies(cluster: Any, tier: RedisBackend, objects: Any) -> None:
    stored = [objects.new(600_000) for _ in range(6)]
    objects.store(tier, stored)
    node = cluster.nodes[cluster.owner(slot(stored[2]))].redis
    node.setrange(f"loracache:{{{stored[2].info.key.hex()}}}:1", 1000, b"xyz")
    targets = [objects.empty(item) for item in stored]
    assert outcomes(tier.load(targets)) == [OK, OK, Outcome.CORRUPT, OK, OK, OK]
    assert not [key for key in node.keys("*") if stored[2].info.key.hex().encode() in key]


# -- slots that move ---------------------------------------------------------------------------------------------------


def test_a_slot_that_moved_between_two_calls_is_not_noticed(cluster: Any, tier: RedisBackend, objects: Any) -> None:
    stored = [objects.keep(objects.new(600_000, compressible=True), planes) for planes in (2, 0, 2, 0, 2, 0)]
    objects.store(tier, stored)
    for call in ("contains", "load", "store", "delete"):
        for item in stored[:2]:
            cluster.move(slot(item), (cluster.owner(slot(item)) + 1) % 3)
        asked = [item.info.key for item in stored] if call in ("contains", "delete") else stored
        assert outcomes(getattr(tier, call)(asked)) == [OK] * 6, call
        if call != "delete":
            assert all(objects.holds(tier, item) for item in stored)
    assert not any(node.redis.dbsize() for node in cluster.nodes)


def test_what_has_left_a_slot_on_its_way_is_unavailable_and_nothing_else_is(
    cluster: Any, tier: RedisBackend, objects: Any
) -> None:
    stored = [objects.new(600_000) for _ in range(4)]
    objects.store(tier, stored)
    moving = slot(stored[0])
    source, to = cluster.owner(moving), (cluster.owner(moving) + 1) % 3
    cluster.begin_move(moving, to)
    try:
        assert all(objects.holds(tier, item) for item in stored)
        gone = f"loracache:{{{stored[0].info.key.hex()}}}:1"
        cluster.nodes[source].redis.migrate("127.0.0.1", cluster.nodes[to].tls_port, gone, 0, 5000)
        targets = [objects.empty(item) for item in stored]
        results = tier.load(targets)
        assert outcomes(results) == [UNAVAILABLE, OK, OK, OK]
        assert results[0].partial
        assert results[0].detail.startswith("ASK ")
        for results in (tier.store(stored), tier.delete([item.info.key for item in stored])):
            assert outcomes(results) == [UNAVAILABLE, OK, OK, OK]
    finally:
        cluster.end_move(moving)
    objects.store(tier, stored)
    assert all(objects.holds(tier, item) for item in stored)


def test_slots_that_move_under_readers_and_writers_give_nobody_wrong_bytes(
    cluster: Any, tier: RedisBackend, objects: Any
) -> None:
    stored = [objects.new(300_000 + number, compressible=True, pieces=2) for number in range(12)]
    objects.store(tier, stored)
    wrong: list[str] = []
    moved = threading.Event()

    def work(number: int) -> None:
        turn = 0
        while not moved.is_set() or turn < 3:
            turn += 1
            if number == 0:
                found = outcomes(tier.store([objects.keep(item, turn % 2) for item in stored]))
            else:
                targets = [objects.empty(item, pieces=3) for item in stored]
                found = outcomes(tier.load(targets))
                for outcome, target, item in zip(found, targets, stored, strict=True):
                    if outcome is OK and objects.payload(target) != objects.payload(item):
                        wrong.append("loaded other bytes than were stored")
            if not set(found) <= {OK, MISS, UNAVAILABLE}:  # a store cut short by the move takes its object along
                wrong.append(f"thread {number}: {found}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for item in stored[:8]:
            cluster.move(slot(item), (cluster.owner(slot(item)) + 1) % 3)
    finally:
        moved.set()
        for thread in threads:
            thread.join(30)
    assert not wrong
    objects.store(tier, stored)
    assert all(objects.holds(tier, item) for item in stored)


# -- nodes that die ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_node_that_is_lost_fails_its_own_objects_and_comes_back(
    cluster: Any, objects: Any, redis_tier: Callable[..., RedisBackend], eventually: Callable[..., Any], how: str
) -> None:
    tier = redis_tier(cluster.url, timeout_s=1.0)
    stored = [objects.new(100_000) for _ in range(12)]
    objects.store(tier, stored)
    lost = of_node(cluster, stored, 1)
    expected = [UNAVAILABLE if each else OK for each in lost]
    assert set(expected) == {OK, UNAVAILABLE}
    node = cluster.nodes[1]
    node.kill() if how == "killed" else node.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(3):
            for results in (
                tier.contains([item.info.key for item in stored]),
                tier.store(stored),
                tier.load([objects.empty(item) for item in stored]),
            ):
                assert outcomes(results) == expected
                assert all(result.partial for result in results if result.outcome is UNAVAILABLE)
    finally:
        node.start() if how == "killed" else node.process.send_signal(signal.SIGCONT)
    eventually(node.answers, "the node answers")
    eventually(cluster.whole, "the cluster is whole again")
    eventually(lambda: outcomes(tier.store(stored)) == [OK] * 12, "all nodes are used again")
    assert all(objects.holds(tier, item) for item in stored)


def test_a_cluster_that_is_lost_is_unavailable_as_a_whole(
    cluster: Any, objects: Any, redis_tier: Callable[..., RedisBackend], eventually: Callable[..., Any]
) -> None:
    tier = redis_tier(cluster.url, timeout_s=1.0)
    stored = [objects.new(100_000) for _ in range(12)]
    objects.store(tier, stored)
    fresh = redis_tier(cluster.url, timeout_s=1.0)
    for node in cluster.nodes:
        node.process.send_signal(signal.SIGSTOP)
    try:
        for backend in (tier, fresh):
            results = backend.contains([item.info.key for item in stored])
            assert outcomes(results) == [UNAVAILABLE] * 12
            assert not any(result.partial for result in results)
            assert all(result.detail for result in results)
        standing = redis_tier(cluster.url, timeout_s=1.0).check()
        assert re.search(r"redis\+cluster://127.*start that Redis", standing.reason)
        assert not standing.reads
    finally:
        for node in cluster.nodes:
            node.process.send_signal(signal.SIGCONT)
    for backend in (tier, fresh):
        eventually(lambda backend=backend: outcomes(backend.store(stored)) == [OK] * 12, "it is used again")


# -- what the start says -----------------------------------------------------------------------------------------------


def test_a_node_of_a_cluster_is_no_server_of_its_own(cluster: Any, redis_tier: Callable[..., RedisBackend]) -> None:
    for node in cluster.nodes:
        with pytest.raises(ConfigError, match=r"one node of a cluster: write redis\+cluster://"):
            redis_tier(node.url).check()


def test_a_server_of_its_own_is_no_cluster(
    net_redis: Callable[..., Any], redis_tier: Callable[..., RedisBackend]
) -> None:
    with pytest.raises(ConfigError, match="cluster support disabled"):
        redis_tier(f"redis+cluster://127.0.0.1:{net_redis().port}").check()


@pytest.mark.parametrize("missing", ["cluster|slots", "unlink", "get"])
def test_a_user_of_a_cluster_needs_its_rights_on_every_node(
    cluster: Any, redis_tier: Callable[..., RedisBackend], objects: Any, missing: str
) -> None:
    more = ["getrange", "exists", "scan", "hdel"]
    rights = ["get", "mget", "set", "unlink", "expire", "hget", "hgetall", "hset", "hsetnx", "cluster|slots", *more]
    url = cluster.url.replace("://", "://cache:s3cr3t@")
    for number, node in enumerate(cluster.nodes):
        commands = [f"+{right}" for right in rights if right != missing or (number == 0 and missing != "cluster|slots")]
        node.redis.execute_command("ACL SETUSER", "cache", "reset", "on", ">s3cr3t", "~loracache:*", *commands)
    standing = redis_tier(url).check()
    assert re.search(f"no permissions.*'{missing.replace('|', '.')}'", standing.reason)
    assert standing.reads == (missing == "unlink")
    assert "s3cr3t" not in standing.reason
    for node in cluster.nodes:
        node.redis.execute_command("ACL SETUSER", "cache", f"+{missing}")
    backend = redis_tier(url)
    backend.check()
    objects.store(backend, [objects.new(10) for _ in range(6)])


# -- names of adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["url", "tls_url"])
def test_names_lie_on_the_node_that_has_their_slot(cluster: Any, names_at: Callable[..., RedisNames], way: str) -> None:
    one, other = names_at(getattr(cluster, way)), names_at(getattr(cluster, way))
    one.put("a", b"record")
    moving = slot_of(b"loracache:adapters")
    for _ in range(3):
        assert (other.get("a"), other.all()) == (b"record", [b"record"])
        cluster.move(moving, (cluster.owner(moving) + 1) % 3)
        one.put("a", b"record", only_new=True)
    assert sum(node.redis.dbsize() for node in cluster.nodes) == 1


def test_names_on_a_node_that_is_lost_are_unavailable_and_come_back(
    cluster: Any, names_at: Callable[..., RedisNames], eventually: Callable[..., Any]
) -> None:
    names = names_at(cluster.url, timeout_s=1.0)
    names.put("a", b"record")
    node = cluster.nodes[cluster.owner(slot_of(b"loracache:adapters"))]
    node.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"redis redis\+cluster://127"):
                names.get("a")
    finally:
        node.process.send_signal(signal.SIGCONT)

    def found() -> bool:
        try:
            return names.get("a") == b"record"
        except Unavailable:
            return False

    eventually(found, "the names are found again")
