# SPDX-License-Identifier: Apache-2.0
"""A Redis in which somebody with another integrity_key stores: a counted miss with a cause of its own, said once, and
nothing is deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace, chunk_keys

CHUNK, COUNT = 4, 3
CAUSE = "redis_unproven"


def settings(folder: Path, number: int) -> Path:
    path = folder / f"{number}.yaml"
    path.write_text(f"integrity_key: '{number:016}'\nredis_lookup_ms: 1000\n")
    return path


def store(client: CacheClient, size: int) -> list[bytes]:
    root = client.register(Namespace("ab" * 32, "bfloat16", "bytes", CHUNK))
    keys = chunk_keys(root, range(CHUNK * COUNT), CHUNK)
    with client.reserve(root, keys, [size] * COUNT) as reservation:
        for position in range(COUNT):
            reservation.write(position, bytes([position]) * size)
    client.flush()
    return keys


def content(server: Any) -> dict[bytes, bytes]:
    return {name: server.redis.dump(name) for name in server.redis.scan_iter() if name.startswith(b"loracache:{")}


@pytest.mark.parametrize("size", [3000, 70_000])
def test_what_others_stored_in_redis_is_a_miss_of_its_own_cause_and_stays(
    daemon: Callable[..., Any], redis_server: Callable[[], Any], tmp_path: Path, size: int
) -> None:
    server = redis_server()
    theirs = daemon(redis=server.url, config=settings(tmp_path, 1))
    keys = store(theirs.client(), size)
    before = content(server)
    ours = daemon(redis=server.url, config=settings(tmp_path, 2))
    client = ours.client()
    for _ in range(3):
        assert [client.get(key) for key in keys] == [None] * COUNT
    assert content(server) == before
    status: Any = client.status()
    assert status["failures"] == {"redis.unproven": 3 * COUNT}
    assert status["counters"][f"acquire.failed.{CAUSE}"] == 3 * COUNT
    assert status["tiers"]["redis"]["available"]
    assert status["tiers"]["redis"]["reason"] == ""
    assert ours.log().count("are left alone and not served") == 1
    assert ours.log().count("unproven") == 0

    assert store(client, size) == keys  # computed anew, they take the place of the others
    assert content(server).keys() == before.keys()
    assert ours.stop() == 0
    again = daemon(redis=server.url, config=settings(tmp_path, 2))
    assert [again.client().get(key) for key in keys] == [bytes([position]) * size for position in range(COUNT)]


def test_a_lookup_of_what_has_no_mac_says_why_it_is_a_miss(
    daemon: Callable[..., Any], redis_server: Callable[[], Any], tmp_path: Path
) -> None:
    server = redis_server()
    keys = store(daemon(redis=server.url).client(), 3000)
    ours = daemon(redis=server.url, config=settings(tmp_path, 1))
    assert ours.client().lookup(keys).hits == 0
    assert ours.status()["misses"] == {CAUSE: COUNT}
    assert len(content(server)) == COUNT
