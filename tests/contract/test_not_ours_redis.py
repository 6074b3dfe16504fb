# SPDX-License-Identifier: Apache-2.0
"""A Redis that another release, or somebody with another integrity_key, stores in too: nothing of theirs is deleted."""

from __future__ import annotations

import itertools
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from loracache.storage_backends import header
from loracache.storage_backends.base import Outcome, Purge, Purpose, Transfer
from loracache.storage_backends.redis.backend import RedisBackend

KEY, OTHER = b"0123456789abcdef", b"fedcba9876543210"
SMALL, LARGE = 3000, 600_000  # in one value, and in three segments
OK, MISS, CORRUPT = Outcome.OK, Outcome.MISS, Outcome.CORRUPT
UNPROVEN, FULL = Outcome.UNPROVEN, Outcome.FULL
Make = Callable[..., RedisBackend]


@pytest.fixture
def server(redis_server: Callable[[], Any]) -> Any:
    return redis_server()


def name(transfer: Transfer, segment: int | None = None) -> str:
    return f"loracache:{{{transfer.info.key.hex()}}}" + ("" if segment is None else f":{segment}")


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


def content(server: Any) -> dict[bytes, bytes]:
    objects = (each for each in server.redis.scan_iter() if each.startswith(b"loracache:{"))
    return {each: server.redis.get(each) for each in objects}


def newer(server: Any, stored: Transfer) -> None:
    """As a release would write it whose header is of version 3, and has one more field."""
    raw = server.redis.get(name(stored))
    mac = header.HEADER_BYTES - header.MAC_BYTES - 4
    changed = bytearray(raw[:mac] + b"anything" + raw[mac : mac + header.MAC_BYTES])
    struct.pack_into("<H", changed, 8, 3)
    whole = bytes(changed) + struct.pack("<I", zlib.crc32(changed)) + raw[header.HEADER_BYTES :]
    server.redis.set(name(stored), whole)


def ask(tier: RedisBackend, objects: Any, made: list[Transfer]) -> tuple[list[Outcome], list[Outcome]]:
    """What a question, and then a load, answer."""
    asked = outcomes(tier.contains([each.info.key for each in made]))
    return asked, outcomes(tier.load([objects.empty(each) for each in made]))


@pytest.mark.parametrize("ttl_s", [0, 600])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_a_newer_release_wrote_is_left_alone(
    server: Any, objects: Any, redis_tier: Make, size: int, ttl_s: int
) -> None:
    tier, made = redis_tier(server.url, ttl_s=ttl_s), [objects.new(size) for _ in range(3)]
    objects.store(tier, made)
    newer(server, made[1])
    before = content(server)
    assert ask(tier, objects, made) == ([OK, UNPROVEN, OK], [OK, UNPROVEN, OK])
    assert content(server) == before


@pytest.mark.parametrize("field", [8, 9])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_version_that_is_damage_is_corrupt(
    server: Any, objects: Any, redis_tier: Make, field: int, size: int
) -> None:
    tier, made = redis_tier(server.url), objects.new(size)
    objects.store(tier, [made])
    raw = bytearray(server.redis.get(name(made)))
    raw[field] ^= 1
    server.redis.set(name(made), bytes(raw))
    assert ask(tier, objects, [made]) == ([MISS], [CORRUPT])
    assert content(server) == {}


@pytest.mark.parametrize(("before", "now"), [(None, KEY), (KEY, OTHER)])
@pytest.mark.parametrize("planes", [0, 2])
def test_an_integrity_key_that_is_turned_on_or_changed_deletes_nothing(
    server: Any, objects: Any, redis_tier: Make, before: bytes | None, now: bytes, planes: int
) -> None:
    first, second = (redis_tier(server.url, integrity_key=each) for each in (before, now))
    made = [objects.keep(objects.new(size, compressible=True), planes) for size in (SMALL, LARGE, 1 << 20)]
    objects.store(first, made)
    held = content(server)
    asked, loaded = ask(second, objects, made)
    assert loaded == [UNPROVEN] * 3
    assert asked == [UNPROVEN if before is None else OK] * 3  # another key's MAC shows with the bytes alone
    assert content(server) == held
    assert all(objects.holds(first, each) for each in made)  # and turned back, all is there


def test_damage_under_our_key_and_under_another_is_damage(server: Any, objects: Any, redis_tier: Make) -> None:
    ours, theirs = redis_tier(server.url, integrity_key=KEY), redis_tier(server.url, integrity_key=OTHER)
    for tier, (size, segment) in itertools.product((ours, theirs), ((SMALL, None), (LARGE, 1))):
        made = objects.new(size)
        objects.store(tier, [made])
        raw = bytearray(server.redis.get(name(made, segment)))
        raw[-7] ^= 1
        server.redis.set(name(made, segment), bytes(raw))
        assert objects.load(ours, made) is CORRUPT
        assert content(server) == {}


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_store_takes_the_place_of_what_was_left_alone(server: Any, objects: Any, redis_tier: Make, size: int) -> None:
    ours, theirs = redis_tier(server.url, integrity_key=KEY), redis_tier(server.url, integrity_key=OTHER)
    of_key, of_release = objects.new(size), objects.new(size)
    objects.store(theirs, [of_key, of_release])
    newer(server, of_release)
    assert outcomes(ours.load([objects.empty(of_key), objects.empty(of_release)])) == [UNPROVEN] * 2
    objects.store(ours, [of_key, of_release])
    assert all(objects.holds(ours, each) for each in (of_key, of_release))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_store_that_is_refused_leaves_what_was_left_alone(
    server: Any, objects: Any, redis_tier: Make, size: int
) -> None:
    ours, theirs = redis_tier(server.url, integrity_key=KEY), redis_tier(server.url, integrity_key=OTHER)
    of_key, of_release = objects.new(size), objects.new(size)
    objects.store(theirs, [of_key, of_release])
    newer(server, of_release)
    before = content(server)
    server.redis.config_set("maxmemory-policy", "noeviction")
    server.redis.config_set("maxmemory", "1mb")
    assert outcomes(ours.store([of_key, of_release])) == [FULL] * 2
    assert content(server) == before


def test_what_was_left_alone_goes_when_it_is_asked_for(server: Any, objects: Any, redis_tier: Make) -> None:
    tier, made = redis_tier(server.url), [objects.new(SMALL) for _ in range(3)]
    objects.store(tier, made)
    for each in made:
        newer(server, each)
    assert outcomes(tier.delete([made[0].info.key])) == [OK]
    did = Purge()
    tier.purge(Purpose({bytes(32)}), did, lambda: True)
    assert (did.objects, did.undescribed, len(content(server))) == (0, 2, 2)  # whose it is, is not known here
    tier.purge(Purpose(), did, lambda: True)
    assert content(server) == {}


def test_what_was_left_alone_goes_beyond_the_budget_like_any_other(server: Any, objects: Any, redis_tier: Make) -> None:
    tier, made = redis_tier(server.url, max_bytes=40_000), [objects.new(SMALL) for _ in range(40)]
    objects.store(tier, made)
    for each in made:
        newer(server, each)
    deadline = time.monotonic() + 20
    while tier.due and time.monotonic() < deadline:
        assert tier.tend(lambda: True).error == ""
    left = sum(server.redis.memory_usage(each) for each in content(server))
    assert 0 < left <= 40_000
