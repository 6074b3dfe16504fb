# SPDX-License-Identifier: Apache-2.0
"""Adapters of a running daemon: taken in whole or not at all, in which tiers they are, and who may push them out."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from loracache.adapters.payload import Packed, adapter_digest, export
from loracache.errors import Rejected
from loracache.wire import protocol

M = "base_model.model.model.layers.0.q_proj"
KV_SIZE = 6000


def tensors_of(seed: int, rank: int = 4, width: int = 64) -> dict[str, Any]:
    numbers = np.random.default_rng(seed)
    return {
        f"{M}.lora_A.weight": numbers.standard_normal((rank, width), dtype=np.float32),
        f"{M}.lora_B.weight": numbers.standard_normal((width, rank), dtype=np.float32),
    }


def peft(folder: Path, seed: int = 0, *, tensors: Any = None, width: int = 64, **settings: Any) -> str:
    """A PEFT folder; its weights take about 32 * width bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors_of(seed, width=width) if tensors is None else tensors, folder / "adapter_model.safetensors")
    return str(folder)


def cpu(client: CacheClient) -> tuple[int, int]:
    """Bytes in use in the arena, and leases."""
    status: Any = client.status()
    return status["tiers"]["cpu"]["used_bytes"], status["leases"]


def store_kv(client: CacheClient, adapter: str, count: int) -> list[bytes]:
    """A chain of KV computed under the adapter."""
    root = client.register(Namespace("model", "float32", "layout", 16, adapter=adapter))
    keys = [os.urandom(32) for _ in range(count)]
    with client.reserve(root, keys, [KV_SIZE] * count) as reservation:
        for position in range(count):
            reservation.write(position, bytes(KV_SIZE))
    assert reservation.causes == [""] * count
    return keys


@pytest.fixture(scope="module")
def running(module_daemon: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return module_daemon(memory="32MiB", page_size="4KiB", disk_path=tmp_path_factory.mktemp("disk"), disk="64MiB")


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


def at_once(url: str, *works: Callable[[CacheClient], object]) -> list[Any]:
    """What each answers, run at the same time with clients of their own."""
    start = threading.Barrier(len(works))
    answers: list[Any] = [None] * len(works)

    def run(position: int) -> None:
        with CacheClient(url) as client:
            start.wait(30)
            try:
                answers[position] = works[position](client)
            except BaseException as error:  # noqa: BLE001 - it is raised below
                answers[position] = error

    threads = [threading.Thread(target=run, args=(position,)) for position in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


# -- taken in ----------------------------------------------------------------------------------------------------------


def test_an_added_adapter_is_in_memory_under_its_digest_and_on_disk_once_flushed(
    client: CacheClient, tmp_path: Path
) -> None:
    path = peft(tmp_path / "one", 1)
    began = time.time()
    digest = client.add_adapter(path, "one")
    key = bytes.fromhex(digest)
    assert client.connection.call(protocol.AdapterDigest(path), 10).payload[0] == digest
    assert client.lookup([key]).tiers == ("cpu",)
    client.flush()
    assert client.evict([key], tiers=["cpu"]).objects == 1
    assert client.lookup([key]).tiers == ("disk",)
    with client.acquire([key]) as reading:
        slot = reading.slots[0]
        assert slot is not None
        packed = Packed([memoryview(slot.tobytes())])
    for tensor in packed.tensors:
        assert packed.original(tensor) == tensors_of(1)[tensor.name].tobytes()
    shown = client.show_adapter("one")
    assert shown is not None
    assert (shown.name, shown.digest, shown.size, shown.engines, shown.kv) == ("one", digest, slot.size, 0, {})
    assert shown.tiers == ("cpu", "disk")
    assert shown.config == Path(path, "adapter_config.json").read_text()
    assert began - 1 <= shown.added <= time.time() + 1
    assert client.find_adapter("one") == digest
    by_digest = client.show_adapter(digest)
    assert by_digest is not None
    assert (by_digest.name, by_digest.digest, by_digest.size) == ("", digest, slot.size)


def test_adding_the_same_content_again_stores_nothing_new_whatever_its_folder_and_name(
    client: CacheClient, tmp_path: Path
) -> None:
    digest = client.add_adapter(peft(tmp_path / "one", 2), "again")
    before = cpu(client)
    assert client.add_adapter(str(tmp_path / "one"), "again") == digest
    assert client.add_adapter(peft(tmp_path / "copy", 2, lora_dropout=0.5), "again/copy") == digest
    assert client.add_adapter(str(tmp_path / "one")) == digest  # without a name
    assert cpu(client) == before
    assert client.find_adapter("again") == client.find_adapter("again/copy") == digest


def test_a_folder_added_by_many_clients_at_once_is_stored_once(
    running: Any, client: CacheClient, tmp_path: Path
) -> None:
    path = peft(tmp_path / "many", 3, width=60_000)
    before: Any = client.status()
    digests = at_once(running.url, *[lambda client, n=n: client.add_adapter(path, f"many-{n}") for n in range(6)])
    after: Any = client.status()
    assert len(set(digests)) == 1
    assert after["counters"]["store.objects"] - before["counters"].get("store.objects", 0) == 1
    assert after["tiers"]["cpu"]["objects"] - before["tiers"]["cpu"]["objects"] == 1
    assert after["leases"] == 0
    assert {client.find_adapter(f"many-{n}") for n in range(6)} == set(digests)


A, B = f"{M}.lora_A.weight", f"{M}.lora_B.weight"


def bad(folder: Path) -> dict[str, tuple[str, str]]:
    """Folders that cannot be served: path, and what must be said of it."""
    good = tensors_of(0)
    nan, infinite = (good[A].copy() for _ in range(2))
    nan[3, 63], infinite[0, 0] = np.nan, -np.inf
    weights, config = r"adapter_model\.safetensors", r"adapter_config\.json"
    cut = Path(peft(folder / "cut"), "adapter_model.safetensors")
    cut.write_bytes(cut.read_bytes()[:-1])
    Path(peft(folder / "lost"), "adapter_model.safetensors").rename(folder / "lost" / "adapter_model.bin")
    return {
        "nan": (peft(folder / "nan", tensors=good | {A: nan}), f"{weights}.*{re.escape(A)}.*NaN"),
        "infinite": (peft(folder / "inf", tensors=good | {A: infinite}), f"{weights}.*{re.escape(A)}.*infinity"),
        "rank": (peft(folder / "rank", r=5), rf"{weights}.*{re.escape(A)}.*shape \(4, 64\).*\(5, in\)"),
        "no b": (peft(folder / "b", tensors={A: good[A]}), f"{weights}: module .*q_proj.* has no lora_B"),
        "int": (peft(folder / "int", tensors=good | {A: good[A].astype(np.int8)}), f"{weights}.*{re.escape(A)}.*I8"),
        "other": (peft(folder / "other", tensors=good | {"x": nan}), f"{weights}: tensor 'x'.* not a LoRA weight"),
        "dora": (peft(folder / "dora", use_dora=True), f"{config}: use_dora=True is not supported"),
        "cut": (str(folder / "cut"), f"{weights} is not a safetensors file"),
        "pickle": (str(folder / "lost"), rf"{weights}' cannot be read.*\.bin is a pickle"),
        "nowhere": (str(folder / "nowhere"), f"nowhere/{config}' cannot be read: No such file"),
        "relative": ("", f"{config}' cannot be read: No such file"),
    }


def test_what_cannot_be_served_is_refused_by_file_tensor_and_reason_and_leaves_nothing_behind(
    daemon: Any, tmp_path: Path
) -> None:
    client = daemon(memory="4MiB", disk_path=tmp_path / "disk").client()
    for path, said in bad(tmp_path).values():
        with pytest.raises(Rejected, match=said):
            client.add_adapter(path, "bad")
        assert client.find_adapter("bad") is None
        assert cpu(client) == (0, 0)
    good = peft(tmp_path / "good")
    for name in ("", "a b", "..", "a" * 201, "1" * 64):
        if name:
            with pytest.raises(Rejected, match="cannot be an adapter's name"):
                client.add_adapter(good, name)
    assert list(client.adapters()) == []
    client.flush()
    status: Any = client.status()
    assert status["tiers"]["cpu"]["objects"] == status["tiers"]["disk"]["objects"] == 0
    assert status["quarantined_bytes"] == 0
    client.add_adapter(good, "bad")
    assert client.find_adapter("bad") is not None


def test_what_finds_no_room_is_refused_with_its_size_and_what_to_do(daemon: Any, tmp_path: Path) -> None:
    client = daemon(memory="1MiB", page_size="4KiB").client()
    with pytest.raises(Rejected, match=r"huge is not taken into the cache \(too_large\): it has 1\d{6} bytes; make"):
        client.add_adapter(peft(tmp_path / "huge", width=40_000), "huge")
    assert cpu(client) == (0, 0)
    digests = [client.add_adapter(peft(tmp_path / str(n), n, width=9_000), f"named-{n}") for n in range(3)]
    used = cpu(client)
    with pytest.raises(Rejected, match=r"3 is not taken into the cache \(full\).* or remove adapters or pins"):
        client.add_adapter(peft(tmp_path / "3", 3, width=9_000), "named-3")
    assert client.find_adapter("named-3") is None
    assert cpu(client) == used
    assert [client.lookup([bytes.fromhex(digest)]).hits for digest in digests] == [1, 1, 1]
    assert client.remove_adapter("named-1") == (1, pytest.approx(288_000, rel=0.01), 0)
    client.add_adapter(str(tmp_path / "3"), "named-3")


def test_a_folder_that_changes_while_it_is_read_is_taken_in_as_its_digest_says_or_not_at_all(
    running: Any, tmp_path: Path
) -> None:
    path = peft(tmp_path / "one", 4, width=100_000)
    done = threading.Event()

    def change() -> None:
        with Path(path, "adapter_model.safetensors").open("r+b") as file:
            turn = 0
            while not done.wait(0.003 * (turn % 5)):
                turn += 1
                file.seek(-4, os.SEEK_END)
                file.write(np.float32(turn).tobytes())
                file.flush()

    thread = threading.Thread(target=change)
    thread.start()
    taken = set()
    try:
        with CacheClient(running.url) as client:
            before = client.status()["leases"]
            for _ in range(60):
                with contextlib.suppress(Rejected):
                    taken.add(client.add_adapter(path))
                    (digest,) = taken
                    payload = client.get(bytes.fromhex(digest))
                    assert payload is not None
                    export(Packed([memoryview(payload)]), tmp_path / digest)
                    client.evict([bytes.fromhex(taken.pop())])
                    assert adapter_digest(str(tmp_path / digest)) == digest
            assert client.status()["leases"] == before
    finally:
        done.set()
        thread.join(30)


def test_folders_that_take_long_delay_nobody_else(daemon: Any, tmp_path: Path) -> None:
    running = daemon(memory="128MiB")
    client, adding = running.client(), running.client()
    small = client.add_adapter(peft(tmp_path / "small"), "small")
    layer, sizes = "base_model.model.model.layers.{}.q_proj.lora_{}.weight", {"A": (4, 260_000), "B": (260_000, 4)}
    shapes = {layer.format(n, part): sizes[part] for n in range(6) for part in sizes}
    tensors = [{name: np.full(shape, each, np.float32) for name, shape in shapes.items()} for each in range(2)]
    paths = [peft(tmp_path / f"large-{each}", tensors=tensors[each]) for each in range(2)]
    numbers = [adding.connection.send(protocol.AdapterAdd(path, Path(path).name, "")) for path in paths]
    waits: list[float] = []
    digests: list[str] = []
    while len(digests) < 2:
        began = time.monotonic()
        assert client.lookup([bytes.fromhex(small)]).hits == 1
        assert client.find_adapter("small") == small
        assert client.show_adapter("small") is not None
        waits.append(time.monotonic() - began)
        adding.connection.poll()
        reply = adding.connection.take(numbers[len(digests)])
        digests += reply.payload if reply is not None else []
    assert len(waits) > 20
    assert sum(wait for wait in waits if wait > 0.2) < sum(waits) / 2  # but for stalls of the machine
    assert [client.find_adapter(f"large-{number}") for number in range(2)] == digests


# -- where it is -------------------------------------------------------------------------------------------------------


def test_adapters_in_engines_memory_are_of_tier_gpu_until_the_engines_say_otherwise_or_are_gone(
    running: Any, client: CacheClient, client_process: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    digest = client.add_adapter(peft(tmp_path / "one", 51), "resident")
    other = client.add_adapter(peft(tmp_path / "other", 52), "elsewhere")
    keys = bytes.fromhex(digest), bytes.fromhex(other)

    def engines(name: str = "resident") -> int:
        shown = client.show_adapter(name)
        assert shown is not None
        assert ("gpu" in shown.tiers) == (shown.engines > 0)
        return shown.engines

    def hold(engine: CacheClient, *held: bytes) -> None:
        assert engine.connection.call(protocol.Resident(b"".join(held)), 10).payload == []

    one, two = CacheClient(running.url), CacheClient(running.url)
    hold(one, keys[0])
    hold(two, *keys, keys[0])
    hold(two, *keys)  # said again: not counted twice
    assert (engines(), engines("elsewhere")) == (2, 1)
    hold(two, keys[1], bytes(32))
    assert (engines(), engines("elsewhere")) == (1, 1)
    hold_one = f"protocol.Resident({keys[0]!r}), 10); say('here'); sys.stdin.readline()"
    killed = client_process(running.url, f"from loracache.wire import protocol; client.connection.call({hold_one}")
    assert killed.line() == "here"
    assert engines() == 2
    killed.send(signal.SIGKILL)
    eventually(lambda: engines() == 1, "the killed engine is not counted")
    one.close()
    two.close()
    eventually(lambda: engines() == engines("elsewhere") == 0, "the closed ones are not counted")


# -- kept --------------------------------------------------------------------------------------------------------------


def flood(client: CacheClient, nbytes: int) -> None:
    """Other objects of together `nbytes`, all written to disk where there is one."""
    root = client.register(Namespace("model", "float32", "layout", 16))
    for _ in range(nbytes // 1_000_000):
        keys = [os.urandom(32) for _ in range(20)]
        with client.reserve(root, keys, [50_000] * 20, parents=[b""] * 20) as reservation:
            pass
        assert reservation.causes == [""] * 20
        client.flush()


def tiers_of(client: CacheClient, digest: str) -> tuple[str, ...]:
    return client.lookup([bytes.fromhex(digest)]).tiers


@pytest.mark.parametrize(
    ("disk", "kept_in"), [(None, "cpu"), ("4MiB", "disk"), ("200KB", "cpu")], ids=["no disk", "disk", "disk too small"]
)
def test_what_has_a_name_is_not_pushed_out_by_others_and_what_has_none_is(
    daemon: Any, tmp_path: Path, disk: str | None, kept_in: str
) -> None:
    options = {"config": tmp_path / "lru"} | ({"disk_path": tmp_path / "disk", "disk": disk} if disk else {})
    (tmp_path / "lru").write_text("policy: lru\n")  # others keep adapters from what comes once
    running = daemon(memory="2MiB", page_size="4KiB", **options)
    client = running.client()
    named = client.add_adapter(peft(tmp_path / "named", 1, width=9_000), "named")
    assert client.add_adapter(str(tmp_path / "named"), "passing") == named
    client.remove_adapter("passing")
    unnamed = client.add_adapter(peft(tmp_path / "unnamed", 2, width=9_000))
    client.flush()
    flood(client, 8_000_000)
    assert tiers_of(client, named) == (kept_in,)
    assert tiers_of(client, unnamed) == ()
    assert client.get(bytes.fromhex(named)) is not None
    if kept_in == "disk":
        assert running.stop() == 0
        client = daemon(memory="2MiB", page_size="4KiB", **options).client()
        flood(client, 8_000_000)
        assert tiers_of(client, named) == ("disk",)
    client.remove_adapter("named")
    assert tiers_of(client, named) == ()


def test_a_name_that_moves_on_leaves_its_old_content_to_be_pushed_out(daemon: Any, tmp_path: Path) -> None:
    (config := tmp_path / "lru").write_text("policy: lru\n")
    client = daemon(config=config, memory="2MiB", page_size="4KiB", disk_path=tmp_path / "disk", disk="4MiB").client()
    old, new = (peft(tmp_path / str(n), n, width=9_000) for n in range(2))
    first, other = client.add_adapter(old, "moving"), client.add_adapter(peft(tmp_path / "2", 2), "other")
    client.flush()
    for digest in (first, other):
        assert client.evict([bytes.fromhex(digest)], tiers=["disk"]).skipped == 1
    second = client.add_adapter(new, "moving")
    client.add_adapter(str(tmp_path / "2"), "other")  # the same again
    client.flush()
    assert tiers_of(client, first) != ()
    flood(client, 8_000_000)
    assert (tiers_of(client, first), tiers_of(client, second), tiers_of(client, other)) == ((), ("disk",), ("disk",))
    client.add_adapter(old, "moving")
    client.flush()
    assert client.evict([bytes.fromhex(second)], tiers=["cpu", "disk"]).bytes == pytest.approx(288_000, rel=0.01)


def test_a_clear_leaves_what_has_a_name_where_it_is_kept(daemon: Any, tmp_path: Path) -> None:
    for options, kept_in in (({"disk_path": tmp_path / "disk"}, "disk"), ({}, "cpu")):
        client = daemon(memory="4MiB", **options).client()
        named = client.add_adapter(peft(tmp_path / "named", 1), "named")
        unnamed = client.add_adapter(peft(tmp_path / "unnamed", 2))
        keys = store_kv(client, named, 3)
        client.flush()
        removed, _, skipped = client.clear().counts
        assert (removed, skipped) == ((9, 1) if options else (4, 1))
        assert tiers_of(client, named) == (kept_in,)
        assert tiers_of(client, unnamed) == ()
        assert client.lookup(keys).hits == 0
        assert client.get(bytes.fromhex(named)) is not None
