# SPDX-License-Identifier: Apache-2.0
"""A purge of the Redis tier: what it sees, what it takes for garbage, and what it says where it could not see all."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loracache.storage_backends.base import Purge, Purpose, Transfer
from loracache.storage_backends.redis import descriptors, purge
from loracache.storage_backends.redis.backend import RedisBackend

MINE, OTHER = b"m" * 32, b"o" * 32
PURPOSE = Purpose({MINE}, {OTHER})


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge, "GRACE_S", 0.3)


def of(transfer: Transfer, namespace: bytes) -> Transfer:
    return replace(transfer, info=replace(transfer.info, namespace=namespace))


def purged(tier: RedisBackend, purpose: Purpose = PURPOSE, go_on: Callable[[], bool] = lambda: True) -> Purge:
    did = Purge()
    tier.purge(purpose, did, go_on)
    return did


def test_thousands_of_objects_on_every_kind_of_server(any_redis: Any, objects: Any, redis_tier: Any) -> None:
    tier = redis_tier(any_redis.url)
    mine = [of(objects.new(100), MINE) for _ in range(1500)]  # several slices
    others = [of(objects.new(100), OTHER) for _ in range(700)]
    objects.store(tier, [*mine, *others])
    did = purged(tier)
    assert (did.objects, did.nbytes, did.undescribed, did.error) == (1500, 150_000, 0, "")
    assert (
        sum(result.outcome.value == "ok" for result in tier.contains([each.info.key for each in mine + others])) == 700
    )
    assert purged(tier).objects == 0


def test_segments_that_no_header_names_go_and_those_whose_header_comes_stay(
    redis_server: Any, objects: Any, redis_tier: Any
) -> None:
    server = redis_server()
    tier = redis_tier(server.url)
    lost, late = of(objects.new(600_000), MINE), of(objects.new(600_000), OTHER)
    objects.store(tier, [lost, late])
    headers = {each.info.key: f"loracache:{{{each.info.key.hex()}}}" for each in (lost, late)}
    server.redis.delete(headers[lost.info.key])
    raw = server.redis.getdel(headers[late.info.key])
    looked: list[int] = []

    def go_on() -> bool:
        looked.append(1)
        if len(looked) == 2:  # a store that was under way ends
            server.redis.set(headers[late.info.key], raw)
        return True

    did = purged(tier, go_on=go_on)
    assert (did.objects, did.loose, did.error) == (0, 1, "")
    assert objects.holds(tier, late)
    assert not [name for name in server.redis.keys("*") if lost.info.key.hex().encode() in name]


def test_a_damaged_header_is_nobodys_and_goes_and_one_of_another_version_is_counted(
    redis_server: Any, objects: Any, redis_tier: Any
) -> None:
    server = redis_server()
    tier = redis_tier(server.url)
    damaged, newer = of(objects.new(300_000), OTHER), of(objects.new(300_000), MINE)
    objects.store(tier, [damaged, newer])
    server.redis.setrange(f"loracache:{{{damaged.info.key.hex()}}}", 30, b"\xff\xff")
    server.redis.setrange(f"loracache:{{{newer.info.key.hex()}}}", 8, b"\x63")
    did = purged(tier)
    assert (did.objects, did.undescribed) == (1, 1)
    names = b" ".join(server.redis.keys("*"))
    assert [each.info.key.hex().encode() in names for each in (damaged, newer)] == [False, True]


def test_what_redis_is_told_of_namespaces_is_told_again_when_it_lost_it(
    any_redis: Any, objects: Any, redis_tier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bytes] = []

    def describe(namespace: bytes) -> dict[bytes, bytes]:
        told.append(namespace)
        return {namespace: b"what it is", b"its name": b""}

    tier = redis_tier(any_redis.url, describe=describe)
    stored = [of(objects.new(100), MINE) for _ in range(2)]
    for each in stored:
        objects.store(tier, [each])
    assert told == [MINE]
    assert tier.descriptors() == {MINE: b"what it is", b"its name": b""}
    any_redis.redis.delete("loracache:namespaces")
    monkeypatch.setattr(descriptors, "_AGAIN_S", 0.0)
    objects.store(tier, stored)
    assert tier.descriptors() == {MINE: b"what it is", b"its name": b""}
    tier.forget([MINE, b"its name"])
    assert tier.descriptors() == {}


def test_where_not_all_keys_can_be_seen_it_is_said(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    tier = redis_tier(server.url)
    objects.store(tier, [of(objects.new(100), MINE)])
    server.redis.execute_command("ACL", "SETUSER", "default", "-scan")
    assert "NOPERM" in purged(tier).error
    server.redis.execute_command("ACL", "SETUSER", "default", "+scan", "-unlink")
    did = purged(tier)
    assert (did.objects, "NOPERM" in did.error) == (0, True)
    server.kill()
    assert str(server.socket) in purged(tier).error


def test_a_node_of_a_cluster_that_does_not_answer_is_said_and_the_others_are_purged(
    redis_cluster: Any, objects: Any, redis_tier: Any
) -> None:
    tier = redis_tier(redis_cluster.url, prefix="purged", timeout_s=1.0)
    stored = [of(objects.new(100), MINE) for _ in range(60)]
    objects.store(tier, stored)
    silent = redis_cluster.nodes[1]
    silent.process.send_signal(signal.SIGSTOP)
    try:
        did = purged(tier)
    finally:
        silent.process.send_signal(signal.SIGCONT)
    assert 0 < did.objects < 60
    assert "no answer" in did.error
