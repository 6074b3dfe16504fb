# SPDX-License-Identifier: Apache-2.0
"""`loracache check` on a Redis, alone and against the disk folder beside it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient
from loracache.storage_backends import header
from loracache.storage_backends.codec import Encoded
from loracache.storage_backends.redis.commands import RETIRED_S


def head(key: bytes) -> str:
    return f"loracache:{{{key.hex()}}}"


def test_each_fault_of_a_redis_is_seen_mended_and_gone(
    filled: Any, server: Any, check: Any, faults: Any, daemon: Any
) -> None:
    assert check(filled) == (0, {"checked": {"redis": 13, "disk": 13}, "left": 0, "findings": []})
    plain, compressed, _ = filled.chains
    (segment,) = [name for name in server.keys(f"{head(compressed[3])}:*") if server.pttl(name) == -1]
    server.delete(head(plain[1]))  # leaves its segment
    server.delete(f"{head(plain[3])}:0")
    server.setrange(segment, 100, b"\0\0\0\0")
    server.delete(head(compressed[2]))
    server.rpush(head(compressed[2]), b"no header")
    server.delete(f"{head(plain[2])}:0")
    server.rpush(f"{head(plain[2])}:0", b"no segment")
    server.setrange(head(compressed[1]), 20, b"\xff\xff\xff")
    expected = {("redis", "damaged"): 4, ("redis", "incomplete"): 1, ("redis", "orphan"): 1}
    before = sorted(server.keys())
    for _ in range(2):
        code, said = check(filled)
        assert (code, faults(said), said["left"]) == (1, expected, 6)
        assert sorted(server.keys()) == before
    code, said = check(filled, "--fix")
    assert (code, faults(said), said["left"]) == (0, expected, 0)
    assert 0 < server.ttl(f"{head(plain[1])}:0") <= RETIRED_S
    assert check(filled) == (0, {"checked": {"redis": 7, "disk": 13}, "left": 0, "findings": []})
    assert check(filled, disk=False)[0] == 0

    running = daemon(redis=filled.url)
    with CacheClient(running.url) as client:
        present = [[client.get(key) is not None for key in keys] for keys in filled.chains]
        assert present == [[True, False, False, False], [True, False, False, False], [True] * 4]
        assert client.find_adapter("team/one") == filled.adapter


def test_what_is_written_meanwhile_is_no_fault(
    filled: Any, server: Any, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store writes segments first: what looks like an orphan may be an object on its way."""
    key = filled.chains[0][3]
    raw = server.get(head(key))
    server.delete(head(key))

    def sleep(_: float) -> None:
        assert server.set(head(key), raw)

    monkeypatch.setattr(time, "sleep", sleep)
    assert check(filled, "--fix")[0] == 0
    assert server.ttl(f"{head(key)}:0") == -1


def test_what_may_be_good_is_left_in_a_redis(filled: Any, server: Any, check: Any, faults: Any) -> None:
    plain = filled.chains[0]
    raw: bytes = server.get(head(plain[0]))
    server.set(head(plain[0]), raw[:8] + b"\x09" + raw[9:])
    server.set("loracache:{somebody}", b"else's")
    server.set("loracache:b:{else}", b"another prefix")
    server.hset("loracache:adapters", "team/two", b"no record")
    before = {name: server.dump(name) for name in server.scan_iter()}
    code, said = check(filled, "--fix")
    assert code == 1
    assert faults(said) == {("redis", "other_version"): 1, ("redis", "foreign"): 1, ("redis", "damaged"): 1}
    assert {name: server.dump(name) for name in server.scan_iter()} == before


def test_disk_and_redis_that_disagree_are_left_and_told(filled: Any, server: Any, check: Any, faults: Any) -> None:
    one, other = filled.chains[0][:2]
    payload = server.get(f"{head(other)}:0")
    found = header.unpack(server.get(head(one)))
    info = header.unpack(server.get(head(other))).info
    made = header.pack(
        replace(info, key=one, parent=found.info.parent),
        Encoded([memoryview(payload)]),
        None,
        segment_bytes=found.segment_bytes,
    )
    server.set(head(one), made)
    server.set(f"{head(one)}:0", payload)
    code, said = check(filled, "--fix")
    assert (code, faults(said)) == (1, {("disk and redis", "contradiction"): 1})
    assert server.get(head(one)) == made
    assert filled.file(one).exists()


def test_a_name_whose_content_the_redis_has_is_no_fault(filled: Any, check: Any, faults: Any) -> None:
    filled.file(bytes.fromhex(filled.adapter)).unlink()
    code, said = check(filled, "--fix")
    assert (code, faults(said)) == (0, {("disk", "manifest"): 1})
    filled.url = ""
    code, said = check(filled)
    assert (code, faults(said)) == (1, {("names", "name_alone"): 1})


def test_a_redis_that_is_gone_is_told(filled: Any, check: Any, tmp_path: Path) -> None:
    filled.url = f"unix://{tmp_path}/gone.sock"
    code, said = check(filled)
    assert code == 1
    assert f"redis {filled.url}" in said["error"]


def test_the_rights_that_the_documents_name_suffice(
    filled: Any, server: Any, check: Any, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    daemons = text.partition("~loracache:* ")[2].partition("\n")[0].split()
    more = text.partition("Beyond a daemon's rights the Redis user needs `")[2].partition("`")[0].split()
    assert len(more) == 1
    server.delete(f"{head(filled.chains[0][3])}:0", head(filled.chains[0][2]))
    monkeypatch.setenv("LORACACHE_REDIS", f"unix://cache:secret@{filled.url.removeprefix('unix://')}")
    filled.url = ""
    for rights, expected in ((daemons, "NOPERM"), ([*daemons, *more], "")):
        server.execute_command("ACL", "SETUSER", "cache", "reset", "on", ">secret", "~loracache:*", *rights)
        code, said = check(filled, "--fix")
        if expected:
            assert code == 1
            assert "permission" in said["error"]
        else:
            assert (code, faults(said)) == (0, {("redis", "incomplete"): 1, ("redis", "orphan"): 1})


def test_objects_of_which_the_redis_does_not_say_whose_they_are_are_told(
    filled: Any, server: Any, check: Any, faults: Any
) -> None:
    server.delete("loracache:namespaces")
    code, said = check(filled, "--fix")
    assert (code, faults(said)) == (1, {("redis", "undescribed"): 12})  # the adapter has none


def test_a_wrong_integrity_key_removes_nothing_from_a_redis(
    filled: Any, server: Any, check: Any, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORACACHE_INTEGRITY_KEY", "0123456789abcdef")
    before = {name: server.dump(name) for name in server.scan_iter()}
    code, said = check(filled, "--fix", disk=False)
    assert (code, faults(said)) == (1, {("redis", "unproven"): 14})  # a name's record among them
    assert {name: server.dump(name) for name in server.scan_iter()} == before


def test_what_is_damaged_goes_beside_what_is_left_alone(filled: Any, server: Any, check: Any, faults: Any) -> None:
    newer, damaged = filled.chains[0][0], filled.chains[0][3]
    raw: bytes = server.get(head(newer))
    server.set(head(newer), raw[:8] + b"\x09" + raw[9:])
    server.setrange(f"{head(damaged)}:0", 100, b"\xff\0\xff")
    code, said = check(filled, "--fix", disk=False)
    assert (code, faults(said), said["left"]) == (1, {("redis", "damaged"): 1, ("redis", "other_version"): 1}, 1)
    assert server.exists(head(newer), f"{head(newer)}:0") == 2
    assert not server.exists(head(damaged))
