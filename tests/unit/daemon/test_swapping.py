# SPDX-License-Identifier: Apache-2.0
"""A daemon's swapper over a real disk: what a restart left comes back by itself, announced chains are there in time,
and engines are told which adapters are asked for."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace, Selection
from loracache.wire import protocol

NAMESPACE = Namespace("model", "float32", "layout", 16)
SIZE = 250_000
COUNT = 40


def store(client: CacheClient) -> list[bytes]:
    """One chain, written to disk."""
    root = client.register(NAMESPACE)
    keys = [os.urandom(32) for _ in range(COUNT)]
    with client.reserve(root, keys, [SIZE] * COUNT) as reservation:
        for at in range(COUNT):
            reservation.write(at, bytes([at]) * SIZE)
    assert set(reservation.causes) == {""}
    client.flush(30)
    return keys


def tell(client: CacheClient, request: protocol.Request) -> list[Any]:
    answer: list[Any] = client._call(request)
    return answer


def peft(folder: Path, seed: int) -> str:
    """A PEFT folder of one layer."""
    rng = np.random.default_rng(seed)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": (2, 64), f"{name}.lora_B.weight": (64, 2)}
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {each: rng.standard_normal(shape).astype(np.float32) for each, shape in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return str(folder)


def status(client: CacheClient) -> dict[str, Any]:
    said: dict[str, Any] = client.status()
    return said


def in_cpu(client: CacheClient) -> int:
    return int(status(client)["tiers"]["cpu"]["objects"])


@pytest.mark.parametrize("swapper", ["0", "4MiB"])
def test_after_a_restart_memory_is_filled_at_the_pace_that_is_set_and_off_it_is_not(
    daemon: Any, tmp_path: Path, eventually: Any, swapper: str
) -> None:
    file = tmp_path / "loracache.yaml"
    file.write_text(f"swapper: {swapper}\n")
    options = {"config": file, "memory": "16MiB", "page_size": "4KiB", "disk_path": tmp_path / "disk"}
    first = daemon(**options)
    store(first.client())
    first.stop()
    client = daemon(**options).client()
    began = time.monotonic()
    eventually(lambda: status(client)["tiers"]["disk"]["scanned"], "the disk is read")
    if swapper == "0":
        time.sleep(1.0)
        assert in_cpu(client) == 0
        return
    eventually(lambda: in_cpu(client) == COUNT, "all of it is in memory")
    assert time.monotonic() - began > COUNT * SIZE / (4 << 20) - 0.3, "it was faster than it may be"
    said = status(client)
    assert said["counters"]["prefetch.objects"] == COUNT
    assert said["counters"]["prefetch.bytes"] == COUNT * SIZE
    assert said["counters"]["load.disk.bytes"] == COUNT * SIZE
    assert said["swapper"]["on"]
    assert said["swapper"]["unused_objects"] == COUNT
    assert said["loop"]["lag_longest_s"] < 1.0


def test_an_announced_chain_is_in_memory_when_it_is_due_and_held_for_its_time(
    daemon: Any, tmp_path: Path, eventually: Any
) -> None:
    client = daemon(memory="16MiB", page_size="4KiB", disk_path=tmp_path / "disk").client()
    keys = store(client)
    client.evict(keys, tiers=["cpu"])
    assert set(client.lookup(keys).tiers) == {"disk"}
    tell(client, protocol.Prefetch(os.urandom(16), protocol.join_keys(keys), 2.0, 2.5))
    time.sleep(0.5)
    assert in_cpu(client) == 0
    assert status(client)["swapper"]["returns"] == 1
    eventually(lambda: in_cpu(client) == COUNT, "it is raised")
    assert client.evict(keys, tiers=["cpu"]).skipped == COUNT
    said = status(client)["swapper"]
    assert (said["held_leases"], said["held_objects"]) == (1, COUNT)
    eventually(lambda: client.evict(keys, tiers=["cpu"]).skipped == 0, "its time is over")


def test_what_is_announced_and_is_nowhere_leaves_no_lease_behind(daemon: Any, tmp_path: Path, eventually: Any) -> None:
    client = daemon(memory="16MiB", page_size="4KiB", disk_path=tmp_path / "disk").client()
    for _ in range(20):
        tell(client, protocol.Prefetch(os.urandom(16), os.urandom(32), 3600.0, 0.1))
    eventually(lambda: status(client)["counters"].get("return.announced") == 20, "all are heard of")
    eventually(lambda: not status(client)["swapper"]["returns"], "all were looked for")
    assert status(client)["leases"] == status(client)["swapper"]["held_leases"] == 0


def test_a_prompt_is_admitted_with_its_adapter_and_both_are_held(daemon: Any, tmp_path: Path) -> None:
    client = daemon(memory="16MiB", page_size="4KiB", disk_path=tmp_path / "disk").client()
    digest = client.add_adapter(peft(tmp_path / "a", 0), "a")
    space = Namespace("model", "float32", "layout", 4, adapter=digest)
    root = client.register(space, ["mine"])
    keys = space.object_keys(range(8))
    with client.reserve(root, keys, [SIZE] * 2) as reservation:
        for at in range(2):
            reservation.write(at, bytes(SIZE))
    client.flush(30)
    client.clear(tiers=["cpu"])
    assert in_cpu(client) == 0
    prompt = Selection(model="mine", tokens=range(8), adapter="a")
    assert client.admit(prompt, ttl=2.0).counts[0] == 3
    assert in_cpu(client) == 3
    assert client.clear(tiers=["cpu"]).counts[0] == 0
    again = client.admit(prompt, ttl=2.0)
    assert (again.objects, again.causes) == (0, {"already": 3})
    assert client.admit(Selection(model="mine", tokens=range(8), adapter="a"), tier="disk").causes == {"already": 2}


def test_engines_are_told_of_the_adapters_in_memory_that_are_asked_for_most(daemon: Any, tmp_path: Path) -> None:
    client = daemon(memory="16MiB", page_size="4KiB").client()
    a, b = (bytes.fromhex(client.add_adapter(peft(tmp_path / name, seed), name)) for seed, name in enumerate("ab"))
    nowhere = os.urandom(32)
    assert tell(client, protocol.Report({})) == []
    assert tell(client, protocol.Report({}, 4, 2, b + nowhere + a + b)) == [b + a]
    said = status(client)["swapper"]
    assert (said["batch"], said["waiting"]) == (4.0, 2)
    assert tell(client, protocol.Report({}, 0, 0, a + a + a)) == [a + b]


def test_an_adapter_that_requests_wait_for_comes_from_redis(
    daemon: Any, redis_server: Any, tmp_path: Path, eventually: Any
) -> None:
    """Another machine has put it there; this one has heard of it from its engine alone."""
    url = redis_server().url
    file = tmp_path / "loracache.yaml"
    file.write_text("swapper: 100MiB\n")
    other = daemon(memory="16MiB", page_size="4KiB", redis=url).client()
    client = daemon(config=file, memory="16MiB", page_size="4KiB", redis=url).client()
    keys = [bytes.fromhex(other.add_adapter(peft(tmp_path / name, seed))) for seed, name in enumerate("ab")]
    other.flush()
    tell(client, protocol.Report({}, 1, 2, keys[1], wanted=keys[0]))
    assert status(client)["swapper"]["wanted"] == 1
    eventually(lambda: in_cpu(client) == 2, "who waits for one, and who asked for the other, has it in memory")
    assert status(client)["counters"]["load.redis.objects"] == 2
