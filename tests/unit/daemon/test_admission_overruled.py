# SPDX-License-Identifier: Apache-2.0
"""What somebody asks for is written whatever admission says: by command line, REST and client, on a real daemon."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Flushed, Namespace
from tests.unit.rest.conftest import up

SIZE = 3000
Chain = Callable[[int], list[bytes]]
Tiers = Callable[[list[bytes]], set[str]]


@pytest.fixture(scope="module")
def server(module_redis: Any) -> Any:
    return module_redis()


@pytest.fixture(scope="module")
def running(module_daemon: Any, server: Any, eventually: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "loracache.yaml").write_text("admission: second_touch\n")
    made = module_daemon(
        config=folder / "loracache.yaml",
        memory="4MiB",
        page_size="4KiB",
        disk_path=folder / "disk",
        disk="64MiB",
        redis=server.url,
        http="127.0.0.1:0",
    )
    eventually(lambda: up(made), "REST answers")
    return made


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


@pytest.fixture
def operator(running: Any) -> Iterator[httpx.Client]:
    token = Path(f"{running.socket}.token").read_text().strip()
    with httpx.Client(base_url=running.http, headers={"authorization": f"Bearer {token}"}) as made:
        yield made


@pytest.fixture
def chain(client: CacheClient, tiers: Tiers) -> Chain:
    """chain(count): keys of a new chain, which nobody asks for a second time; nothing of it is written down."""

    def store(count: int) -> list[bytes]:
        root = client.register(Namespace("model", "float32", "layout", 16))
        keys = [os.urandom(32) for _ in range(count)]
        with client.reserve(root, keys, [SIZE] * count) as reservation:
            for position in range(count):
                reservation.write(position, bytes(SIZE))
        assert reservation.causes == [""] * count
        client.flush()
        assert tiers(keys) == {"cpu"}
        return keys

    return store


@pytest.fixture
def tiers(client: CacheClient, server: Any) -> Tiers:
    """tiers(keys): where the whole chain is."""

    def where(keys: list[bytes]) -> set[str]:
        held = {tier: {bytes.fromhex(each["key"]) for each in client.objects(tier=tier)} for tier in ("cpu", "disk")}
        names = server.redis.keys()
        held["redis"] = {key for key in keys if any(key.hex().encode() in name for name in names)}
        return {tier for tier, there in held.items() if there.issuperset(keys)}

    return where


def test_a_flush_of_everything_answers_for_what_was_admitted(client: CacheClient, chain: Chain, tiers: Tiers) -> None:
    keys = chain(3)
    assert client.flush() == Flushed({"disk": 0, "redis": 0}, {"disk": 0, "redis": 0})
    assert client.get(keys[-1]) is not None  # the second touch, and with the last its parents
    flushed = client.flush()
    assert (flushed.complete, flushed.durable["disk"]) == (True, 3)
    assert tiers(keys) == {"cpu", "disk", "redis"}


def test_a_flush_that_names_a_chain_writes_it(client: CacheClient, chain: Chain, tiers: Tiers) -> None:
    keys, others = chain(3), chain(2)
    assert client.flush(10, keys) == Flushed({"disk": 3, "redis": 3}, {"disk": 0, "redis": 0})
    assert tiers(keys) == {"cpu", "disk", "redis"}
    assert tiers(others) == {"cpu"}
    assert client.flush(10, keys).durable == {"disk": 3, "redis": 3}  # once more is no less


def test_so_it_does_over_rest(operator: httpx.Client, client: CacheClient, chain: Chain, tiers: Tiers) -> None:
    keys = chain(3)
    answer = operator.post("/v1/flush", json={"selector": {"keys": [key.hex() for key in keys]}})
    assert answer.json() == {"durable": {"disk": 3, "redis": 3}, "given_up": {"disk": 0, "redis": 0}}
    assert tiers(keys) == {"cpu", "disk", "redis"}
    missing = operator.post("/v1/flush", json={"selector": {"keys": ["ab" * 32]}})
    assert missing.json()["given_up"] == {"disk": 1, "redis": 1}
    assert operator.post("/v1/flush", json={"selector": {}}).status_code == 422


def test_so_it_does_on_the_command_line(
    running: Any, loracache: Any, client: CacheClient, chain: Chain, tiers: Tiers
) -> None:
    keys = chain(2)
    done = loracache("flush", *(word for key in keys for word in ("--key", key.hex())), socket=running.socket)
    assert (done.code, done.out.splitlines()) == (
        0,
        [f"{tier}: 2 objects durable, 0 given up of what was selected" for tier in ("disk", "redis")],
    )
    assert tiers(keys) == {"cpu", "disk", "redis"}
    assert loracache("flush", "--key", "ab" * 32, socket=running.socket).code == 4


@pytest.mark.parametrize("tier", ["disk", "redis"])
def test_an_admit_writes_to_the_tier_that_it_names(tier: str, client: CacheClient, chain: Chain, tiers: Tiers) -> None:
    keys = chain(3)
    assert client.admit(keys, tier=tier).objects == 3
    assert tiers(keys) == {"cpu", tier}


def test_an_admit_over_rest_and_on_the_command_line(
    running: Any, operator: httpx.Client, loracache: Any, client: CacheClient, chain: Chain, tiers: Tiers
) -> None:
    keys, others = chain(2), chain(2)
    body = {"selector": {"keys": [key.hex() for key in keys]}, "tier": "disk"}
    assert operator.post("/v1/admit", params={"wait": 10}, json=body).json()["objects"] == 2
    words = [word for key in others for word in ("--key", key.hex())]
    assert loracache("admit", *words, "--tier", "disk", socket=running.socket).code == 0
    assert tiers(keys) == tiers(others) == {"cpu", "disk"}


def test_a_pin_on_disk_writes_there(client: CacheClient, chain: Chain, tiers: Tiers) -> None:
    keys = chain(3)
    assert client.pin(keys[2:], tier="disk") == 1
    assert tiers(keys) == {"cpu", "disk"}  # with its parents
    assert client.pin(keys, tier="cpu") == 3  # which keeps in memory, and writes nothing
    client.unpin(keys, tier="cpu")
    client.unpin(keys[2:], tier="disk")


def test_what_has_a_name_is_written_at_once(client: CacheClient, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    shapes = {"A": (4, 64), "B": (64, 4)}
    tensors = {
        f"base_model.model.q_proj.lora_{part}.weight": np.ones(shape, np.float32) for part, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    client.add_adapter(str(tmp_path), "named")
    client.flush()
    (adapter,) = client.adapters()
    assert set(adapter.tiers) == {"cpu", "disk"}
