# SPDX-License-Identifier: Apache-2.0
"""A tenant, a model or everything leaves Redis whole, whoever stored it and whatever this daemon knows; or it is said
what is left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace, Selection, chunk_keys
from loracache.keys import salt_digest
from loracache.results import OperationState

CHUNK, SIZE, CHAIN = 4, 1500, 5


class Shared:
    """A Redis that several daemons share."""

    def __init__(self, server: Any, daemon: Callable[..., Any]) -> None:
        self.server = server
        self._daemon = daemon

    def daemon(self, **options: Any) -> Any:
        """One without a disk that knows nothing of the others."""
        return self._daemon(**{"memory": "2MiB", "page_size": "4KiB", "redis": self.server.url} | options)

    def store(
        self, running: Any, *, salt: str = "", adapter: str = "", model: str = "ab", seed: int = 0
    ) -> list[bytes]:
        """Keys of a chain that a client of that daemon stored, written to Redis."""
        namespace = Namespace(model * 32, "bfloat16", "bytes", CHUNK, adapter, salt_digest(salt) if salt else "")
        with CacheClient(running.url) as client:
            root = client.register(namespace, [f"{model}-model"])
            keys = chunk_keys(root, range(seed, seed + CHUNK * CHAIN), CHUNK)
            first = bytes.fromhex(adapter) if adapter else b""
            with client.reserve(root, keys, [SIZE] * CHAIN, parents=[first, *keys[:-1]]) as reservation:
                for position in range(CHAIN):
                    reservation.write(position, os.urandom(SIZE))
            assert reservation.causes == [""] * CHAIN
            client.flush()
        return keys

    def held(self, *chains: Sequence[bytes]) -> list[int]:
        """Of how many objects of each chain Redis has anything."""
        names = b" ".join(self.server.redis.keys("*"))
        return [sum(key.hex().encode() in names for key in chain) for chain in chains]


def peft(folder: Path, rank: int) -> str:
    """A PEFT folder."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    shapes = {"A": (rank, 16), "B": (16, rank)}
    tensors = {name.format(part): np.ones(shape, np.float32) for part, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def shared(redis_server: Callable[[], Any], daemon: Callable[..., Any]) -> Shared:
    return Shared(redis_server(), daemon)


@pytest.fixture
def cli(loracache: Callable[..., Any]) -> Callable[..., tuple[int, Any]]:
    """cli(daemon, "evict", ...) -> exit code and what it printed."""

    def run(running: Any, *words: str) -> tuple[int, Any]:
        done = loracache(*words, "--json", socket=running.socket)
        return done.code, done.json if done.out else done.err

    return run


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (("--salt", "one"), [CHAIN, 0, CHAIN, CHAIN]),
        (("--model", "ab-model"), [0, 0, CHAIN, 0]),
        (("--model", "cdcdcdcd"), [CHAIN, CHAIN, 0, CHAIN]),
        (("--model", "ab-model", "--salt", "one"), [CHAIN, 0, CHAIN, CHAIN]),
        (("--model", "ab-model", "--adapter", ""), [0, 0, CHAIN, CHAIN]),
    ],
)
def test_what_another_daemon_stored_leaves_by_tenant_and_by_model(
    shared: Shared, cli: Any, words: Sequence[str], gone: list[int]
) -> None:
    writer, purger = shared.daemon(), shared.daemon()
    chains = [
        shared.store(writer),
        shared.store(writer, salt="one", seed=100),
        shared.store(writer, model="cd", seed=200),
        shared.store(writer, adapter="ef" * 32, seed=300),
    ]
    code, said = cli(purger, "evict", *words, "--tier", "redis", "--yes")
    assert (code, said["state"], said["error"], said["causes"]) == (0, "done", "", {})
    assert said["objects"] == gone.count(0) * CHAIN
    assert said["bytes"] == gone.count(0) * CHAIN * SIZE
    assert shared.held(*chains) == gone
    told = [name for name in shared.server.redis.hkeys("loracache:namespaces") if len(name) == 32]
    assert len(told) == 4 - gone.count(0)  # nobody needs the others any more


def test_the_kv_of_an_adapter_leaves_redis_with_it(shared: Shared) -> None:
    writer, purger = shared.daemon(), shared.daemon()
    mine = shared.store(writer, adapter="ef" * 32)
    other = shared.store(writer, seed=100)
    with CacheClient(purger.url) as client:
        report = client.evict(Selection(adapter="ef" * 32, model="*"), tiers=["redis"])
    assert (report.state, report.objects) == (OperationState.DONE, CHAIN)
    assert shared.held(mine, other) == [0, CHAIN]


def test_a_model_that_nobody_knows_is_refused(shared: Shared, cli: Any) -> None:
    shared.store(shared.daemon())
    code, said = cli(shared.daemon(), "evict", "--model", "nobody", "--yes")
    assert code == 3
    assert "no engine has registered a model" in said


def test_what_an_older_daemon_stored_leaves_where_its_namespace_is_known(shared: Shared, cli: Any) -> None:
    """It told nobody of its namespaces; this daemon serves the same model."""
    running = shared.daemon()
    mine, other = shared.store(running, salt="one"), shared.store(running, seed=100)
    shared.server.redis.delete("loracache:namespaces")
    code, said = cli(running, "evict", "--salt", "one", "--yes")
    assert (code, said["causes"]) == (0, {})
    assert shared.held(mine, other) == [0, CHAIN]


def test_objects_of_which_nobody_knows_whose_they_are_are_left_and_counted(shared: Shared, cli: Any) -> None:
    writer, purger = shared.daemon(), shared.daemon()
    unknown = shared.store(writer, salt="one")
    shared.server.redis.delete("loracache:namespaces")
    known = shared.store(purger, salt="two", seed=100)
    code, said = cli(purger, "evict", "--salt", "two", "--yes", "--tier", "redis")
    assert (code, said["state"], said["causes"]) == (4, "done", {"undescribed": CHAIN})
    assert (said["objects"], said["skipped"]) == (CHAIN, CHAIN)
    assert shared.held(unknown, known) == [CHAIN, 0]
    code, said = cli(purger, "clear", "--tier", "redis", "--yes")
    assert (code, said["objects"]) == (0, CHAIN)
    assert shared.held(unknown) == [0]


def test_clear_takes_what_no_daemon_knows_of_and_parts_of_objects(shared: Shared, cli: Any) -> None:
    writer, purger = shared.daemon(), shared.daemon()
    keys = shared.store(writer)
    shared.server.redis.set(f"loracache:{{{'0' * 64}}}:7", b"nobody's")
    shared.server.redis.set("loracache-2:{else}", b"another's")
    shared.server.redis.set(f"loracache:{{{keys[0].hex()}}}", b"no header")
    code, said = cli(purger, "clear", "--tier", "redis", "--yes")
    assert (code, said["objects"], said["causes"]) == (0, CHAIN, {})
    assert sorted(shared.server.redis.keys("*")) == [b"loracache-2:{else}", b"loracache:namespaces"]


def test_a_redis_that_is_away_fails_the_purge_and_says_so(shared: Shared, cli: Any, eventually: Any) -> None:
    running = shared.daemon(http="127.0.0.1:0")
    keys = shared.store(running, salt="one")
    shared.server.kill()
    code, said = cli(running, "evict", "--salt", "one", "--yes")
    assert code == 1
    assert (said["state"], said["causes"]) == ("failed", {"redis_unavailable": CHAIN})
    assert "nothing that only Redis holds was removed" in said["error"] or "left there is not known" in said["error"]
    code, said = cli(running, "evict", "--key", keys[0].hex(), "--tier", "redis")
    assert (code, said["causes"]) == (4, {"redis_unavailable": 1})
    token = running.socket.parent / f"{running.socket.name}.token"
    eventually(token.exists, "REST has made its token", 30)
    headers = {"Authorization": f"Bearer {token.read_text().strip()}"}
    eventually(lambda: httpx.get(f"{running.http}/healthz").is_success, "REST answers", 30)
    answer = httpx.post(f"{running.http}/v1/clear", json={"tiers": ["redis"]}, headers=headers)
    assert answer.json()["state"] == "failed"
    assert str(shared.server.socket) in answer.json()["error"] or "left alone" in answer.json()["error"]


def test_a_user_who_may_not_look_at_all_keys_is_told_that_something_may_be_left(shared: Shared, cli: Any) -> None:
    shared.server.redis.execute_command("ACL", "SETUSER", "default", "-scan")
    running = shared.daemon()
    keys = shared.store(running, salt="one")
    code, said = cli(running, "evict", "--salt", "one", "--yes")
    assert (code, said["state"]) == (1, "failed")
    assert "SCAN" in said["error"]
    assert shared.held(keys) == [0]  # what it knows of is gone all the same


def test_what_has_a_name_anywhere_stays_when_redis_is_cleared(shared: Shared, tmp_path: Path) -> None:
    one, two = (shared.daemon(memory="4MiB").client() for _ in range(2))
    digests = [one.add_adapter(peft(tmp_path / name, rank), name) for rank, name in enumerate(("a", "b", "c"), start=1)]
    one.flush()
    one.remove_adapter("c")
    assert two.clear(tiers=["redis"]).causes == {"held": 2}
    assert one.clear(tiers=["redis"]).causes == {"held": 2}
    one.clear(tiers=["cpu"])
    assert [two.get(bytes.fromhex(digest)) is not None for digest in digests] == [True, True, False]


def test_an_adapter_has_left_redis_when_its_removal_is_answered(shared: Shared, tmp_path: Path) -> None:
    running = shared.daemon()
    digest = running.client().add_adapter(peft(tmp_path / "a", 3), "a")
    keys = shared.store(running, adapter=digest)
    assert shared.held(keys) == [CHAIN]
    shared.server.redis.client_pause(300, all=False)  # writes alone: deletions wait
    running.client().remove_adapter("a")
    assert shared.held(keys, [bytes.fromhex(digest)]) == [0, 0]


def test_a_cancelled_purge_ends(shared: Shared) -> None:
    running = shared.daemon()
    shared.store(running)
    shared.server.redis.set(f"loracache:{{{'0' * 64}}}:7", b"nobody's")  # waited for, whether its header comes
    with CacheClient(running.url) as client:
        begun = client.evict(Selection(model="ab-model"), tiers=["redis"], wait=0)
        assert client.cancel(begun.id).state is OperationState.CANCELLED
        ended = client.operation(begun.id, wait=4)
        assert client.operation(begun.id).seconds == ended.seconds
    assert shared.server.redis.exists(f"loracache:{{{'0' * 64}}}:7")
