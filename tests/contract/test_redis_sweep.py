# SPDX-License-Identifier: Apache-2.0
"""What the Redis tier does in the background: a budget by last use, segments without a header, one daemon at a time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from loracache.storage_backends.base import Outcome, Standing, Tended, Transfer
from loracache.storage_backends.redis import sweep

SIZE = 20_000
EACH = 20_600  # of Redis's memory, roughly


def always() -> bool:
    return True


def header(prefix: str, transfer: Transfer) -> str:
    return f"{prefix}:{{{transfer.info.key.hex()}}}"


def age(nodes: list[Any], names: list[str], **how: int) -> None:
    """Have keys look as if they had been used so long ago, or so often."""
    for node in nodes:
        for name in names:
            found = node.dump(name) if node.exists(name) else None
            if found is not None:
                node.restore(name, 0, found, replace=True, **how)


@pytest.fixture(autouse=True)
def _in_one_slot_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_SHARE", 1.0)  # without pauses


def kept(tier: Any, stored: list[Transfer]) -> list[bool]:
    return [result.outcome is Outcome.OK for result in tier.contains([each.info.key for each in stored])]


class Nodes:
    """Commands that a cluster's nodes take for their own keys only."""

    def __init__(self, content: Any) -> None:
        self._client = content.redis

    def exists(self, name: str) -> bool:
        return bool(self._client.exists(name))

    def dump(self, name: str) -> bytes:
        return bytes(self._client.dump(name))

    def restore(self, *arguments: Any, **how: Any) -> None:
        self._client.restore(*arguments, **how)


@pytest.mark.parametrize("size", [SIZE, 100_000])
def test_what_was_not_used_for_longest_goes_until_the_rest_fits(
    any_redis: Any, objects: Any, redis_tier: Any, size: int
) -> None:
    stored = [objects.new(size) for _ in range(40)]
    objects.store(redis_tier(any_redis.url, prefix="budget"), stored)

    def taken() -> int:
        return sum(node.memory_usage(key) for node in any_redis.nodes for key in node.keys("budget:{*"))

    whole = taken()
    limit = whole // 2
    tier = redis_tier(any_redis.url, prefix="budget", max_bytes=limit)
    assert tier.check() == Standing()
    assert tier.due
    age([Nodes(any_redis)], [header("budget", each) for each in stored[:25]], idletime=1000)
    assert objects.load(tier, stored[3]) is Outcome.OK  # in use again
    did = tier.tend(always)
    left = kept(tier, stored)
    assert left[25:] == [True] * 15
    assert left[3]
    assert (did.objects, did.orphans, did.error) == (40 - left.count(True), 0, "")
    assert limit - whole // 10 < taken() <= did.used <= limit
    assert all(objects.holds(tier, each) for each, there in zip(stored, left, strict=True) if there)


def test_under_an_lfu_policy_what_is_used_least_goes(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    server.redis.config_set("maxmemory-policy", "allkeys-lfu")
    tier = redis_tier(server.url, max_bytes=12 * EACH)
    assert tier.check() == Standing()
    stored = [objects.new(SIZE) for _ in range(20)]
    objects.store(tier, stored)
    age([server.redis], [header("loracache", each) for each in stored[5:]], frequency=100)
    age([server.redis], [header("loracache", each) for each in stored[:5]], frequency=1)
    did = tier.tend(always)
    assert 8 <= did.objects <= 10
    assert kept(tier, stored)[:5] == [False] * 5


def test_what_was_used_since_the_last_look_stays(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    tier = redis_tier(server.url, max_bytes=12 * EACH)
    stored = [objects.new(SIZE) for _ in range(10)]
    objects.store(tier, stored)
    age([server.redis], [header("loracache", each) for each in stored], idletime=1000)
    assert tier.tend(always).objects == 0
    assert not tier.due
    assert objects.load(tier, stored[4]) is Outcome.OK
    more = [objects.new(SIZE) for _ in range(6)]
    objects.store(tier, more)
    assert tier.due
    assert tier.tend(always).objects >= 3
    assert kept(tier, more) == [True] * 6
    assert kept(tier, stored)[4]


def test_without_a_budget_nothing_is_evicted(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    tier = redis_tier(server.url)
    stored = [objects.new(SIZE) for _ in range(10)]
    objects.store(tier, stored)
    assert not tier.due
    assert tier.tend(always) == Tended()
    assert kept(tier, stored) == [True] * 10


def test_segments_without_a_header_go_after_a_second_look_and_those_of_a_store_stay(
    any_redis: Any, objects: Any, redis_tier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "ORPHANED_S", 0.3)
    tier = redis_tier(any_redis.url)
    evicted, coming, whole = (objects.new(600_000) for _ in range(3))
    objects.store(tier, [evicted, coming, whole])
    any_redis.redis.delete(header("loracache", evicted))
    raw = any_redis.redis.getdel(header("loracache", coming))
    assert tier.tend(always).orphans == 0
    any_redis.redis.set(header("loracache", coming), raw)
    time.sleep(0.4)
    assert tier.tend(always).orphans == 3
    assert not [key for key in any_redis.all_keys() if evicted.info.key.hex().encode() in key]
    assert objects.holds(tier, coming)
    assert objects.holds(tier, whole)


def test_one_daemon_sweeps_at_a_time(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    tier = redis_tier(server.url, max_bytes=2 * EACH)
    objects.store(tier, [objects.new(SIZE) for _ in range(10)])
    server.redis.set("loracache:sweep", "another")
    assert tier.tend(always) == Tended()
    assert not tier.due  # it is tried again in a while
    server.redis.delete("loracache:sweep")
    assert tier.tend(always).objects >= 8
    assert not server.redis.exists("loracache:sweep")


def test_a_pass_that_is_interrupted_or_refused_evicts_nothing(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    tier = redis_tier(server.url, max_bytes=2 * EACH)
    stored = [objects.new(SIZE) for _ in range(10)]
    objects.store(tier, stored)
    assert "interrupted" in tier.tend(lambda: False).error
    server.redis.execute_command("ACL", "SETUSER", "default", "-scan")
    assert "NOPERM" in tier.tend(always).error
    assert kept(tier, stored) == [True] * 10
    server.kill()
    assert tier.tend(always).error


def test_a_budget_needs_rights_that_are_named(redis_server: Any, redis_tier: Any) -> None:
    server = redis_server()
    server.redis.execute_command("ACL", "SETUSER", "default", "-memory", "-object")
    standing = redis_tier(server.url, max_bytes=1 << 20).check()
    assert "give its user ~loracache:* +memory|usage +object|idletime +object|freq (ACL SETUSER)" in standing.reason
    assert (standing.reads, standing.writes) == (True, True)
    assert redis_tier(server.url).check() == Standing()
