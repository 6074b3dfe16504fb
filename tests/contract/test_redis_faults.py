# SPDX-License-Identifier: Apache-2.0
"""What the Redis tier does when Redis evicts, refuses, or holds what we did not write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.storage_backends.base import Outcome, Transfer
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.resp import Wire

OK, MISS, CORRUPT, FULL = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FULL


@pytest.fixture
def server(redis_server: Callable[[], Any]) -> Any:
    return redis_server()


@pytest.fixture
def tier(server: Any, redis_tier: Callable[..., RedisBackend]) -> RedisBackend:
    return redis_tier(server.url)


def name(transfer: Transfer, segment: int | None = None) -> str:
    return f"loracache:{{{transfer.info.key.hex()}}}" + ("" if segment is None else f":{segment}")


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


def gone(server: Any, transfer: Transfer) -> bool:
    return not [key for key in server.redis.keys("*") if transfer.info.key.hex().encode() in key]


def flipped(raw: bytes, offset: int) -> bytes:
    return raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]


def test_objects_lie_in_segments_under_a_small_header_in_one_slot(
    tier: RedisBackend, server: Any, objects: Any
) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    sizes = {key.decode(): server.redis.strlen(key) for key in server.redis.keys("*")}
    header_bytes = sizes.pop(name(stored))
    assert header_bytes <= 256
    assert sizes == {name(stored, 0): 262_144, name(stored, 1): 262_144, name(stored, 2): 75_712}
    tier.delete([stored.info.key])
    assert server.redis.dbsize() == 0


@pytest.mark.parametrize("planes", [0, 2])
def test_a_small_object_is_one_key_and_costs_little_more_than_its_bytes(
    tier: RedisBackend, server: Any, objects: Any, planes: int
) -> None:
    small, limit, above = (objects.new(size, compressible=True) for size in (256, 64 << 10, (64 << 10) + 1))
    objects.store(tier, [objects.keep(each, planes) for each in (small, limit, above)])
    names = [key.decode() for key in server.redis.keys("*")]
    assert len(names) == 4  # the last has a header and a segment
    assert server.redis.memory_usage(name(small)) - 256 < 400
    assert all(objects.holds(tier, each) for each in (small, limit, above))
    assert outcomes(tier.delete([small.info.key, limit.info.key, above.info.key])) == [OK] * 3
    assert server.redis.dbsize() == 0


def test_a_small_object_in_segments_is_read_and_replaced_by_one_key(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    """As earlier releases kept all."""
    before, tier = redis_tier(server.url, segment_bytes=2000), redis_tier(server.url)
    stored = objects.new(5000)
    objects.store(before, [stored])
    assert server.redis.dbsize() == 4
    assert objects.found(tier, stored) is OK
    assert objects.holds(tier, stored)
    objects.store(tier, [stored])
    assert objects.holds(tier, stored)
    assert {server.redis.ttl(key) > 0 for key in server.redis.keys("*:[0-9]")} == {
        True
    }  # whoever reads them still, may
    assert objects.holds(before, stored)


@pytest.mark.parametrize("how", ["bit in payload", "bit in header", "short", "long", "header alone"])
def test_a_damaged_small_object_is_corrupt_and_deleted_and_its_neighbours_are_fine(
    tier: RedisBackend, server: Any, objects: Any, how: str
) -> None:
    before, stored, after = (objects.new(3000) for _ in range(3))
    objects.store(tier, [before, stored, after])
    raw = server.redis.get(name(stored))
    damaged = {
        "bit in payload": flipped(raw, len(raw) - 5), "bit in header": flipped(raw, 30), "short": raw[:-1],
        "long": raw + b"x", "header alone": raw[:-3000],
    }  # fmt: skip
    server.redis.set(name(stored), damaged[how])
    targets = [objects.empty(item) for item in (before, stored, after)]
    assert outcomes(tier.load(targets)) == [OK, CORRUPT, OK]
    assert objects.payload(targets[2]) == objects.payload(after)
    assert gone(server, stored)


def test_another_segment_size_reads_and_deletes_what_is_there(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    writer, reader = redis_tier(server.url, segment_bytes=10_000), redis_tier(server.url)
    stored = objects.new(600_000, pieces=4)
    objects.store(writer, [stored])
    assert objects.holds(reader, stored)
    reader.delete([stored.info.key])
    assert server.redis.dbsize() == 0


def test_prefixes_keep_caches_apart(server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]) -> None:
    one, two = redis_tier(server.url, prefix="one"), redis_tier(server.url, prefix="two")
    stored = objects.new(10)
    objects.store(one, [stored])
    assert objects.found(two, stored) is MISS


def damage(server: Any, stored: Transfer, how: str) -> None:
    first, middle, last = name(stored), name(stored, 1), name(stored, 2)
    changed: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
        "bit in payload": (middle, lambda raw: flipped(raw, 1000)),
        "short segment": (middle, lambda raw: raw[:-1]),
        "long segment": (last, lambda raw: raw + b"x"),
        "huge segment": (last, lambda raw: raw + bytes(5 << 20)),
        "empty segment": (middle, lambda raw: b""),
        "bit in header": (first, lambda raw: flipped(raw, 30)),
        "short header": (first, lambda raw: raw[:-1]),
        "huge header": (first, lambda raw: bytes(3 << 20)),
        "empty header": (first, lambda raw: b""),
    }
    key, change = changed[how]
    server.redis.set(key, change(server.redis.get(key)))


@pytest.mark.parametrize(
    "how",
    [
        "bit in payload",
        "short segment",
        "long segment",
        "huge segment",
        "empty segment",
        "bit in header",
        "short header",
        "huge header",
        "empty header",
    ],
)
def test_a_damaged_value_is_corrupt_and_deleted_and_its_neighbours_are_fine(
    tier: RedisBackend, server: Any, objects: Any, how: str
) -> None:
    before, stored, after = (objects.new(600_000) for _ in range(3))
    objects.store(tier, [before, stored, after])
    damage(server, stored, how)
    found = outcomes(tier.contains([item.info.key for item in (before, stored, after)]))
    assert found == [OK, MISS if "header" in how else OK, OK]
    targets = [objects.empty(item) for item in (before, stored, after)]
    assert outcomes(tier.load(targets)) == [OK, CORRUPT, OK]
    assert objects.payload(targets[2]) == objects.payload(after)
    assert gone(server, stored)
    objects.store(tier, [stored])
    assert objects.holds(tier, stored)


def test_headers_under_each_others_keys_are_corrupt(tier: RedisBackend, server: Any, objects: Any) -> None:
    one, two = objects.new(9000), objects.new(9000)
    objects.store(tier, [one, two])
    server.redis.copy(name(one), name(two), replace=True)
    assert outcomes(tier.contains([one.info.key, two.info.key])) == [OK, MISS]
    assert objects.load(tier, two) is CORRUPT
    assert gone(server, two)


def test_a_value_of_another_type_is_no_object(tier: RedisBackend, server: Any, objects: Any) -> None:
    one, two = objects.new(600_000), objects.new(9000)
    objects.store(tier, [one, two])
    for key in (name(one, 1), name(two)):
        server.redis.delete(key)
        server.redis.rpush(key, "x")
    assert outcomes(tier.load([objects.empty(one), objects.empty(two)])) == [CORRUPT, MISS]
    assert gone(server, one)
    objects.store(tier, [two])
    assert objects.holds(tier, two)


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_an_evicted_segment_is_a_miss_and_the_rest_goes(
    tier: RedisBackend, server: Any, objects: Any, segment: int
) -> None:
    stored, after = objects.new(600_000), objects.new(600_000)
    objects.store(tier, [stored, after])
    server.redis.delete(name(stored, segment))
    assert outcomes(tier.load([objects.empty(stored), objects.empty(after)])) == [MISS, OK]
    assert gone(server, stored)


def test_an_evicted_header_is_a_miss(tier: RedisBackend, server: Any, objects: Any) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    server.redis.delete(name(stored))
    assert objects.found(tier, stored) is MISS
    assert objects.load(tier, stored) is MISS


def test_segments_without_a_header_are_not_found(tier: RedisBackend, server: Any, objects: Any) -> None:
    """What a writer leaves that dies before its last write."""
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    raw = server.redis.getdel(name(stored))
    assert objects.load(tier, stored) is MISS
    server.redis.set(name(stored), raw)
    assert objects.holds(tier, stored)


def test_contains_is_one_round_trip_and_reads_headers_alone(
    tier: RedisBackend, server: Any, objects: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = [objects.new(60_000) for _ in range(50)]
    objects.store(tier, stored)
    sends: list[int] = []
    send = Wire.send
    monkeypatch.setattr(Wire, "send", lambda wire, parts: (sends.append(1), send(wire, parts)))
    before = server.redis.info("stats")["total_net_output_bytes"]
    assert outcomes(tier.contains([item.info.key for item in stored])) == [OK] * 50
    assert sends == [1]
    assert server.redis.info("stats")["total_net_output_bytes"] - before < 50 * 500


def test_many_headers_come_through_whole(tier: RedisBackend, objects: Any) -> None:
    stored = [objects.new(1) for _ in range(1500)]  # several times what is received at once
    objects.store(tier, stored)
    results = tier.contains([item.info.key for item in stored])
    assert [result.info for result in results] == [item.info for item in stored]


def test_out_of_memory_is_full_and_leaves_nothing_behind(tier: RedisBackend, server: Any, objects: Any) -> None:
    small, large, last = objects.new(300_000), objects.new(8 << 20), objects.new(1000)
    server.redis.config_set("maxmemory-policy", "noeviction")
    server.redis.config_set("maxmemory", server.redis.info("memory")["used_memory"] + (5 << 20))
    results = tier.store([small, large, last])
    assert outcomes(results)[:2] == [OK, FULL]
    assert "OOM" in results[1].detail
    assert gone(server, large)
    assert objects.holds(tier, small)
    objects.store(tier, [last])  # there is room again
    server.redis.config_set("maxmemory", "1mb")
    assert outcomes(tier.store([last])) == [FULL]


@pytest.mark.parametrize("planter", [None, b"other key of 32 bytes or so......"])
def test_an_object_planted_without_the_integrity_key_is_refused_and_left_alone(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend], planter: bytes | None
) -> None:
    donor = redis_tier(server.url, integrity_key=planter)
    backend = redis_tier(server.url, integrity_key=b"k" * 32)
    planted, own = objects.new(600_000), objects.new(600_000)
    objects.store(donor, [planted])
    objects.store(backend, [own])
    before = server.redis.dump(name(planted))
    assert outcomes(backend.load([objects.empty(planted), objects.empty(own)])) == [Outcome.UNPROVEN, OK]
    assert server.redis.dump(name(planted)) == before
