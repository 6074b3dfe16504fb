# SPDX-License-Identifier: Apache-2.0
"""Objects in Redis that live for a time: what is loaded lives on, whole, and without another round trip."""

from __future__ import annotations

import time
from typing import Any

import pytest

from loracache.storage_backends.base import Outcome, Standing
from loracache.storage_backends.redis.commands import RETIRED_S
from loracache.storage_backends.redis.resp import Wire

TTL_S = 1000
SIZES = (10, 300_000)  # in one value, and in two segments


def lives(client: Any) -> dict[bytes, int]:
    """Seconds that each key has to live, on all servers."""
    return {key: server.ttl(key) for server in client.nodes for key in server.keys("ttl:*")}


@pytest.fixture
def stored(any_redis: Any, objects: Any, redis_tier: Any) -> Any:
    tier = redis_tier(any_redis.url, ttl_s=TTL_S, prefix="ttl")
    assert tier.check() == Standing()
    found = [objects.new(size) for size in SIZES]
    objects.store(tier, found)
    return tier, found


def test_every_key_lives_for_its_time_and_segments_longer_than_their_header(any_redis: Any, stored: Any) -> None:
    left = lives(any_redis)
    assert len(left) == 4
    for key, seconds in left.items():
        longest = TTL_S + (RETIRED_S if b"}:" in key else 0)
        assert longest - 60 < seconds <= longest


def test_a_load_renews_all_of_an_object_and_a_lookup_nothing(any_redis: Any, stored: Any, objects: Any) -> None:
    tier, found = stored
    for server in any_redis.nodes:
        for key in server.keys("ttl:*"):
            server.expire(key, 200 if b"}:" in key else 100)
    tier.contains([each.info.key for each in found])
    assert max(lives(any_redis).values()) <= 200
    assert all(objects.holds(tier, each) for each in found)
    assert min(lives(any_redis).values()) > TTL_S - 60


def test_renewing_takes_no_round_trip(
    any_redis: Any, stored: Any, objects: Any, redis_tier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends: list[int] = []
    send = Wire.send
    monkeypatch.setattr(Wire, "send", lambda wire, parts: (sends.append(1), send(wire, parts)))
    counts = []
    for tier in (stored[0], redis_tier(any_redis.url, prefix="ttl")):
        sends.clear()
        assert all(result.outcome is Outcome.OK for result in tier.load([objects.empty(each) for each in stored[1]]))
        counts.append(len(sends))
    assert counts[0] == counts[1]


def test_what_nobody_loads_is_gone_and_leaves_nothing(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    tier = redis_tier(server.url, ttl_s=3)
    kept, gone = (objects.new(300_000) for _ in range(2))
    objects.store(tier, [kept, gone])
    deadline = time.monotonic() + 4.5
    while time.monotonic() < deadline:
        objects.load(tier, kept)
        time.sleep(0.1)
    assert (objects.found(tier, kept), objects.found(tier, gone)) == (Outcome.OK, Outcome.MISS)
    assert all(server.redis.ttl(key) > 0 for key in server.redis.keys("*"))
    assert tier.delete([gone.info.key])[0].outcome is Outcome.MISS


def test_without_a_time_to_live_nothing_expires(redis_server: Any, objects: Any, redis_tier: Any) -> None:
    server = redis_server()
    tier = redis_tier(server.url)
    stored = [objects.new(size) for size in SIZES]
    objects.store(tier, stored)
    assert all(objects.holds(tier, each) for each in stored)
    assert {server.redis.ttl(key) for key in server.redis.keys("*")} == {-1}
