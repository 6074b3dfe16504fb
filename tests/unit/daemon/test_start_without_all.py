# SPDX-License-Identifier: Apache-2.0
"""A daemon starts with what it has, says what it lacks, and uses that once it is there."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.keys import checksum
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Standing, Transfer
from loracache.storage_backends.disk.backend import DiskBackend

SIZE = 5000
NAMESPACE = Namespace("model", "float32", "layout", 16)


def store(client: CacheClient, count: int = 10) -> list[bytes]:
    keys = [os.urandom(32) for _ in range(count)]
    with client.reserve(client.register(NAMESPACE), keys, [SIZE] * count) as reservation:
        for number, key in enumerate(keys):
            reservation.write(number, key * (SIZE // 32) + bytes(SIZE % 32))
    return keys


def reads(client: CacheClient, keys: list[bytes]) -> bool:
    return all(client.get(key) == key * (SIZE // 32) + bytes(SIZE % 32) for key in keys)


def tier(client: CacheClient, name: str) -> dict[str, Any]:
    tiers: Any = client.status()["tiers"]
    found: dict[str, Any] = tiers[name]
    return found


def ready(running: Any) -> dict[str, str]:
    """What /readyz says, nothing while it says nothing."""
    try:
        with urllib.request.urlopen(f"{running.http}/readyz") as answer:
            said: dict[str, str] = json.load(answer)
            return said
    except OSError:
        return {}


def test_a_redis_that_is_down_at_the_start_is_said_and_used_once_it_is_up(
    daemon: Any, redis_server: Any, eventually: Any
) -> None:
    redis = redis_server()
    redis.kill()
    running = daemon(redis=redis.url, http="127.0.0.1:0")
    client = running.client()
    assert reads(client, store(client))
    client.flush()
    state = tier(client, "redis")
    assert (state["available"], state["writable"]) == (False, False)
    assert str(redis.socket) in state["reason"]
    assert running.log().count("redis: not in use") == 1
    eventually(lambda: ready(running) == {"status": "ok", "redis": "not in use"}, "REST answers", 30)
    with urllib.request.urlopen(f"{running.http}/metrics") as answer:
        assert b'loracache_tier_available{tier="redis"} 0.0' in answer.read()
    redis.start()
    eventually(lambda: tier(client, "redis")["writable"], "it is used without a restart")
    assert tier(client, "redis")["reason"] == ""
    keys = store(client)
    client.flush()
    assert redis.redis.exists(*(f"loracache:{{{key.hex()}}}" for key in keys)) == len(keys)


@pytest.mark.parametrize("missing", ["set", "get", "hsetnx"])
def test_what_a_users_rights_in_redis_suffice_for_is_used(
    daemon: Any, redis_server: Any, eventually: Any, missing: str
) -> None:
    redis = redis_server()
    filled = daemon(redis=redis.url)
    with CacheClient(filled.url) as client:
        keys = store(client)
        client.flush()
    filled.stop()
    redis.redis.execute_command("ACL SETUSER", "default", f"-{missing}")
    client = daemon(redis=redis.url).client()
    state = tier(client, "redis")
    assert state["available"] == (missing != "get")
    assert state["writable"] == (missing == "hsetnx")
    assert f"+{missing} " in state["reason"]
    assert missing == "get" or reads(client, keys)
    assert (client.lookup(keys).hits == len(keys)) == (missing != "get")
    store(client)
    client.flush()
    redis.redis.execute_command("ACL SETUSER", "default", "+@all")
    eventually(lambda: tier(client, "redis")["writable"] and not tier(client, "redis")["reason"], "rights are given")


def test_a_wrong_password_of_redis_ends_the_start(serve_fails: Any, redis_server: Any) -> None:
    redis = redis_server()
    redis.redis.config_set("requirepass", "right")
    code, said = serve_fails(redis=redis.url)
    assert code == 2
    assert "correct" in said
    redis.redis.execute_command("AUTH", "right")


def fill(folder: Path) -> int:
    """Take all room of a small file system; answers the bytes."""
    taken = 0
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    taken += file.write(bytes(size))
            except OSError:
                continue
    return taken


def test_a_damaged_manifest_on_a_full_disk_is_made_anew_from_the_files(
    daemon: Any, file_system: Callable[[int], Path], eventually: Any
) -> None:
    mount = file_system(16)
    folder = mount / "disk"
    first = daemon(disk_path=folder)
    keys = store(first.client())
    first.stop()
    (folder / "manifest").write_bytes(b"rubbish")
    fill(mount)
    client = daemon(disk_path=folder).client()
    eventually(lambda: client.lookup(keys).hits == len(keys), "all are found")
    assert reads(client, keys)


def remount(mount: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(mount)], check=True)


@pytest.mark.parametrize(
    ("lame", "healed", "said"), [("ro", "rw", "Read-only file system"), ("nr_inodes=2", "nr_inodes=9999", "No space")]
)
def test_a_folder_that_cannot_be_made_is_used_once_it_can(
    daemon: Any, file_system: Callable[[int], Path], eventually: Any, lame: str, healed: str, said: str
) -> None:
    mount = file_system(16)
    remount(mount, lame)
    client = daemon(disk_path=mount / "deep" / "disk").client()
    keys = store(client)
    client.flush()
    state = tier(client, "disk")
    assert not state["writable"]
    assert said in state["reason"]
    assert reads(client, keys)
    remount(mount, healed)
    eventually(lambda: tier(client, "disk")["writable"] and tier(client, "disk")["scanned"], "it is used")
    keys = store(client)
    client.flush()
    assert {key.hex() for key in keys} <= {each.name for each in (mount / "deep/disk/objects").glob("*/*")}
    assert len(list((mount / "deep/disk/namespaces").glob("*.json"))) <= 1


def test_a_disk_that_is_mounted_read_only_serves_what_it_holds_and_takes_nothing(
    daemon: Any, file_system: Callable[[int], Path], eventually: Any, serve_fails: Any
) -> None:
    mount = file_system(16)
    first = daemon(disk_path=mount / "disk")
    with CacheClient(first.url) as client:
        keys = store(client)
    first.stop()
    remount(mount, "ro")
    running = daemon(disk_path=mount / "disk", http="127.0.0.1:0")
    eventually(lambda: ready(running) == {"status": "ok", "disk": "read only"}, "REST answers", 30)
    client = running.client()
    eventually(lambda: client.lookup(keys).hits == len(keys), "all are found")
    assert reads(client, keys)
    more = store(client)
    client.flush()
    state = tier(client, "disk")
    assert (state["available"], state["writable"]) == (True, False)
    assert "Read-only file system" in state["reason"]
    assert running.status()["counters"]["write.disk.dropped.unavailable"] == len(more)
    assert running.log().count("is read, and takes nothing") == 1
    code, said = serve_fails(disk_path=mount / "disk")
    assert code == 2
    assert "in use by the LoRACache daemon" in said
    remount(mount, "rw")
    eventually(lambda: tier(client, "disk")["writable"], "it is written again")
    again = store(client)
    client.flush()
    assert {key.hex() for key in again} <= {each.name for each in (mount / "disk/objects").glob("*/*")}


def test_a_disk_that_turns_read_only_goes_on_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As file systems do after errors."""
    backend = DiskBackend(tmp_path / "disk")
    taken = backend.check()
    assert taken == Standing()
    refuse = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(backend._files, "write", lambda transfer: (_ for _ in ()).throw(refuse))
    memory = memoryview(mmap.mmap(-1, 4096))
    info = ObjectInfo(bytes(32), b"", Kind.KV, bytes(32), 4096, checksum([memory]))
    (result,) = backend.store([Transfer(info, [memory])])
    assert (result.outcome, result.partial) == (Outcome.UNAVAILABLE, True)
    backend.close()


def test_an_audit_log_that_cannot_be_written_ends_no_start_and_is_written_once_it_can(
    daemon: Any, tmp_path: Path, file_system: Callable[[int], Path], eventually: Any
) -> None:
    mount = file_system(4)
    remount(mount, "ro")
    config = tmp_path / "config.yaml"
    config.write_text(f"audit_log: {mount / 'audit'}\n")
    running = daemon(config=config)
    assert "the audit log" in running.log()
    remount(mount, "rw")
    with CacheClient(running.url) as client:
        client.clear()
    eventually(lambda: (mount / "audit").exists() and "clear" in (mount / "audit").read_text(), "the line is there")
