# SPDX-License-Identifier: Apache-2.0
"""Names of adapters at running daemons: many of them, re-pointed and removed at once, kept, shared through Redis."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace
from loracache.errors import Rejected
from loracache.wire import protocol

KV_SIZE = 6000


def peft(folder: Path, seed: int = 0, *, width: int = 64, **settings: Any) -> str:
    """A PEFT folder; its weights take about 32 * width bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    numbers = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.q_proj.lora_{part}.weight": numbers.standard_normal(shape, dtype=np.float32)
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def call_all(client: CacheClient, requests: list[protocol.Request]) -> list[Any]:
    """Answers to requests that are all sent before the first is answered."""
    numbers = [client.connection.send(request) for request in requests]
    return [client.connection.wait(number, 50).payload for number in numbers]


def store_kv(client: CacheClient, adapter: str, count: int) -> list[bytes]:
    """A chain of KV computed under the adapter."""
    root = client.register(Namespace("model", "float32", "layout", 16, adapter=adapter))
    keys = [os.urandom(32) for _ in range(count)]
    with client.reserve(root, keys, [KV_SIZE] * count) as reservation:
        for position in range(count):
            reservation.write(position, bytes(KV_SIZE))
    assert reservation.causes == [""] * count
    return keys


def files_of(disk_path: Path) -> set[str]:
    return {path.name for path in (disk_path / "objects").glob("*/*")}


def hits(client: CacheClient, *digests: str) -> list[int]:
    return [client.lookup([bytes.fromhex(digest)]).hits for digest in digests]


@pytest.fixture(scope="module")
def disk_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def running(module_daemon: Any, disk_path: Path) -> Any:
    return module_daemon(memory="32MiB", page_size="4KiB", disk_path=disk_path, disk="64MiB")


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


# -- many, and large ones ----------------------------------------------------------------------------------------------


def test_more_names_than_a_page_are_all_listed_in_their_order_and_found(daemon: Any, tmp_path: Path) -> None:
    client = daemon(memory="4MiB", disk_path=tmp_path / "disk").client()
    one, other = peft(tmp_path / "one", 1), peft(tmp_path / "other", 2)
    names = [f"tenant-{number % 7}/adapter-{number}" for number in range(1200)]
    digests = {client.add_adapter(path, "a"): path for path in (one, other)}
    answers = call_all(client, [protocol.AdapterAdd((one, other)[n % 2], name, "") for n, name in enumerate(names)])
    wanted = {name: digest for name, (digest,) in zip(names, answers, strict=True)} | {"a": answers[1][0]}
    assert set(wanted.values()) == set(digests)
    listed = list(client.adapters())
    assert [adapter.name for adapter in listed] == sorted(wanted)
    assert {adapter.name: adapter.digest for adapter in listed} == wanted
    assert {adapter.tiers[0] for adapter in listed} == {"cpu"}
    found = call_all(client, [protocol.AdapterFind(name) for name in names])
    assert dict(zip(names, (digest for (digest,) in found), strict=True)) == {n: wanted[n] for n in names}
    shown = client.show_adapter(names[777])
    assert shown is not None
    assert (shown.name, shown.digest) == (names[777], wanted[names[777]])
    status: Any = client.status()
    assert status["tiers"]["cpu"]["objects"] == 2


@pytest.mark.parametrize("count", [1, 3, 10_000])
def test_pages_of_any_size_follow_each_other_without_gaps(client: CacheClient, tmp_path: Path, count: int) -> None:
    path = peft(tmp_path / "one", 1)
    for name in "cabd":
        client.add_adapter(path, f"page-{count}-{name}")
    seen: list[str] = []
    while page := call_all(client, [protocol.AdapterList(seen[-1] if seen else "", count)])[0]:
        assert len(page) <= count
        seen += [adapter["name"] for adapter in page]
        client.remove_adapter(seen[-1])  # the next page begins behind it all the same
    assert seen == sorted(set(seen))
    assert {f"page-{count}-{name}" for name in "abcd"} <= set(seen)


def test_names_with_configurations_too_large_for_one_message_are_all_listed(daemon: Any, tmp_path: Path) -> None:
    client = daemon(memory="4MiB").client(timeout=5)
    for number in range(12):
        client.add_adapter(peft(tmp_path / str(number), 1, notes="ü" * 150_000), f"large-{number}")
    listed = {adapter.name: len(adapter.config) for adapter in client.adapters()}
    assert len(listed) == 12
    assert min(listed.values()) > 900_000


def test_what_nobody_knows_is_none_and_what_is_no_adapter_is_not_shown(client: CacheClient, tmp_path: Path) -> None:
    (kv, *_) = store_kv(client, "", 2)
    for name in ("nobody", "", "1" * 64, "a" * 63, "zz" * 32, "\n", "x" * 60_000, "ä", kv.hex()):
        assert client.find_adapter(name) is None
        assert client.show_adapter(name) is None, name[:80]
        assert client.remove_adapter(name) is None
    assert client.lookup([kv]).hits == 1


# -- re-pointed --------------------------------------------------------------------------------------------------------


def test_a_name_points_to_the_old_or_the_new_content_and_to_the_new_once_that_is_answered(
    running: Any, client: CacheClient, tmp_path: Path
) -> None:
    paths = [peft(tmp_path / str(n), 10 + n) for n in range(2)]
    digests = [client.add_adapter(path, "moving") for path in paths]
    done = threading.Event()
    seen: list[set[str | None]] = []

    def look() -> None:
        with CacheClient(running.url) as other:
            found: set[str | None] = set()
            seen.append(found)
            while not done.is_set():
                found.add(other.find_adapter("moving"))
                shown = other.show_adapter("moving")
                found.add(shown.digest if shown is not None else None)
                found.update(adapter.digest for adapter in other.adapters() if adapter.name == "moving")

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(150):
            assert client.add_adapter(paths[turn % 2], "moving") == digests[turn % 2]
            assert client.find_adapter("moving") == digests[turn % 2]
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert seen == [set(digests)] * 3


def test_names_and_what_they_point_to_survive_a_restart_even_of_a_killed_daemon(
    daemon: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    disk = tmp_path / "disk"
    first = daemon(memory="4MiB", disk_path=disk)
    client = first.client()
    digests = [client.add_adapter(peft(tmp_path / str(n), n), name) for n, name in enumerate(("a", "b", "gone", "a"))]
    client.flush()
    client.remove_adapter("gone")
    before = {adapter.name: (adapter.digest, adapter.config, adapter.added) for adapter in client.adapters()}
    assert {name: fields[0] for name, fields in before.items()} == {"a": digests[3], "b": digests[1]}
    first.stop(signal.SIGKILL)
    second = daemon(memory="4MiB", disk_path=disk)
    again = second.client()
    assert {adapter.name: (adapter.digest, adapter.config, adapter.added) for adapter in again.adapters()} == before
    assert again.find_adapter("gone") is None
    eventually(lambda: second.status()["tiers"]["disk"]["scanned"], "the disk is scanned")
    for digest in (digests[1], digests[3]):
        assert again.get(bytes.fromhex(digest)) is not None


def test_a_name_given_again_brings_to_disk_what_it_had_no_room_for(
    daemon: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    """Until then it stays in memory."""
    running = daemon(memory="8MiB", page_size="4KiB", disk_path=tmp_path / "disk", disk="1MiB")
    client = running.client()
    eventually(lambda: running.status()["tiers"]["disk"]["scanned"], "the disk is scanned")
    paths = [peft(tmp_path / str(number), number, width=20_000) for number in range(2)]  # 640 kB each
    for number, path in enumerate(paths):
        client.add_adapter(path, f"name-{number}")
        client.flush()
    for number in range(40):
        client.add_adapter(peft(tmp_path / "others", 100 + number, width=20_000))
    assert [client.show_adapter(f"name-{number}").tiers[-1] for number in range(2)] == ["disk", "cpu"]
    client.remove_adapter("name-0")
    client.add_adapter(paths[1], "name-1")
    client.flush()
    assert client.show_adapter("name-1").tiers == ("cpu", "disk")


# -- removed -----------------------------------------------------------------------------------------------------------


def test_removing_the_last_name_takes_the_content_and_its_kv_out_of_all_tiers(
    client: CacheClient, disk_path: Path, tmp_path: Path
) -> None:
    digest = client.add_adapter(peft(tmp_path / "one", 21), "first")
    assert client.add_adapter(str(tmp_path / "one"), "second") == digest
    other = client.add_adapter(peft(tmp_path / "other", 22), "other")
    keys, others = store_kv(client, digest, 3), store_kv(client, other, 2)
    client.flush()
    ours = {digest, *(key.hex() for key in keys)}
    assert ours <= files_of(disk_path)
    assert client.remove_adapter("first") == (0, 0, 0)
    assert client.find_adapter("first") is None
    assert hits(client, digest) == [1]
    assert client.lookup(keys).hits == 3
    shown = client.show_adapter("second")
    assert shown is not None
    size = shown.size
    assert shown.kv == {"cpu": (3, 3 * KV_SIZE), "disk": (3, 3 * KV_SIZE)}
    assert client.remove_adapter("second") == (8, 2 * (3 * KV_SIZE + size), 0)
    assert client.show_adapter("second") is client.show_adapter(digest) is None
    assert hits(client, digest) == [0]
    assert client.lookup(keys).hits == 0
    client.flush()
    assert not ours & files_of(disk_path)
    assert client.lookup(others).hits == 2
    assert hits(client, other) == [1]


def test_a_removed_adapter_stays_whole_for_those_who_read_it(running: Any, client: CacheClient, tmp_path: Path) -> None:
    digest = client.add_adapter(peft(tmp_path / "one", 23, width=20_000), "read")
    key = bytes.fromhex(digest)
    client.flush()
    with CacheClient(running.url) as reader, reader.acquire([key]) as reading:
        slot = reading.slots[0]
        assert slot is not None
        before = slot.tobytes()
        removed = client.remove_adapter("read")
        assert removed is not None
        assert (removed[0], removed[2]) == (1, 1)  # from disk; in memory it is skipped
        assert client.find_adapter("read") is None
        for number in range(60):
            client.add_adapter(peft(tmp_path / str(number % 2), 100 + number, width=20_000))
        assert slot.tobytes() == before


def test_kv_of_an_adapter_is_counted_by_tier_and_under_every_namespace_of_it(
    client: CacheClient, tmp_path: Path
) -> None:
    digest = client.add_adapter(peft(tmp_path / "one", 31), "counted")
    keys = store_kv(client, digest, 4)
    root = client.register(Namespace("another model", "float32", "layout", 16, adapter=digest))
    with client.reserve(root, [os.urandom(32)], [100]) as reservation:
        reservation.write(0, bytes(100))
    store_kv(client, "", 2)
    client.flush()
    client.evict(keys[2:], tiers=["cpu"])
    for name in ("counted", digest):
        shown = client.show_adapter(name)
        assert shown is not None
        assert shown.kv == {"cpu": (3, 2 * KV_SIZE + 100), "disk": (5, 4 * KV_SIZE + 100)}
    (listed,) = [adapter for adapter in client.adapters() if adapter.name == "counted"]
    assert listed.kv == shown.kv  # type: ignore[union-attr]
    client.evict(keys[:1], tiers=["cpu", "disk"])
    shown = client.show_adapter("counted")
    assert shown is not None
    assert shown.kv == {"cpu": (1, 100), "disk": (1, 100)}


def test_what_is_named_again_while_it_is_removed_is_there_when_that_is_answered(running: Any, tmp_path: Path) -> None:
    path = peft(tmp_path / "one", 41, width=1000)
    done = threading.Event()

    def come_and_go() -> None:
        with CacheClient(running.url) as other:
            while not done.is_set():
                other.add_adapter(path, "passing")
                other.remove_adapter("passing")

    threads = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in threads:
        thread.start()
    lost = 0
    try:
        with CacheClient(running.url) as client:
            for _ in range(150):
                digest = client.add_adapter(path, "staying")
                lost += client.get(bytes.fromhex(digest)) is None
                client.remove_adapter("staying")
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert not lost


# -- shared through Redis ----------------------------------------------------------------------------------------------


Pair = tuple[CacheClient, CacheClient]


@pytest.fixture
def redis(redis_server: Any) -> Any:
    return redis_server()


@pytest.fixture
def pair(daemon: Any, redis: Any) -> Pair:
    """Clients of two daemons that share a Redis and nothing else."""
    one, two = (daemon(memory="4MiB", redis=redis.url).client() for _ in range(2))
    return one, two


def test_a_name_given_at_one_daemon_is_found_at_another_with_its_content(pair: Pair, tmp_path: Path) -> None:
    one, two = pair
    digest = one.add_adapter(peft(tmp_path / "one", 1), "shared")
    one.flush()
    assert two.find_adapter("shared") == digest
    (listed,) = two.adapters()
    shown = two.show_adapter("shared")
    assert shown is not None
    assert (listed.name, listed.digest, listed.tiers, listed.size) == ("shared", digest, (), 0)
    assert (shown.tiers, shown.size, shown.config) == (("redis",), 0, listed.config)
    key = bytes.fromhex(digest)
    assert two.get(key) == one.get(key) is not None
    shown = two.show_adapter("shared")
    assert shown is not None
    assert shown.tiers == ("cpu", "redis")
    moved = two.add_adapter(peft(tmp_path / "two", 2), "shared")
    assert one.find_adapter("shared") == moved
    assert one.remove_adapter("shared") is not None
    assert two.find_adapter("shared") is None
    assert list(two.adapters()) == []


def test_content_that_another_daemon_named_stays_in_redis_when_its_name_here_goes(pair: Pair, tmp_path: Path) -> None:
    one, two = pair
    path = peft(tmp_path / "one", 1)
    digest = one.add_adapter(path, "here")
    one.flush()
    assert two.add_adapter(path, "there") == digest
    two.flush()
    assert one.remove_adapter("here") == (0, 0, 0)
    one.flush()
    for client in pair:
        client.clear(tiers=["cpu"])
        assert client.get(bytes.fromhex(digest)) is not None
    assert two.remove_adapter("there") is not None
    two.flush()
    one.clear(tiers=["cpu"])
    assert [client.get(bytes.fromhex(digest)) for client in pair] == [None, None]


def test_names_known_here_are_answered_while_redis_is_stopped_and_none_is_changed(
    pair: Pair, redis: Any, tmp_path: Path
) -> None:
    one, two = pair
    path = peft(tmp_path / "one", 1)
    digest = one.add_adapter(path, "a")
    assert two.find_adapter("a") == digest
    redis.send(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert {two.find_adapter("a") for _ in range(50)} == {digest}
        assert time.monotonic() - began < 20  # 50 if each waited
        with pytest.raises(Rejected, match=r"redis unix://.*no answer within"):
            two.add_adapter(peft(tmp_path / "two", 2), "a")
        with pytest.raises(Rejected, match=r"redis unix://.*no answer within"):
            two.remove_adapter("a")
        assert two.lookup([]).hits == 0
    finally:
        redis.send(signal.SIGCONT)
    assert one.find_adapter("a") == digest
    shown = two.show_adapter("a")
    assert shown is not None
    assert shown.digest == digest
