# SPDX-License-Identifier: Apache-2.0
"""A disk folder and a Redis that a real daemon filled, and `loracache check` on them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from loracache import CacheClient, Namespace, Selection, chunk_keys
from loracache.audit import live, running
from loracache.audit import redis as redis_check
from loracache.cli.app import app

CHUNK, SIZE, CHAIN = 4, 70_000, 4  # more than what Redis keeps in one value


class Kept:
    """What a daemon left behind. chains: keys of chains of CHAIN objects: plain, compressed, of the adapter."""

    def __init__(self, path: Path, url: str, chains: list[list[bytes]], adapter: str) -> None:
        self.path = path
        self.url = url
        self.chains = chains
        self.adapter = adapter

    def file(self, key: bytes) -> Path:
        return self.path / "objects" / key.hex()[:2] / key.hex()

    def objects(self) -> list[Path]:
        return sorted((self.path / "objects").glob("*/*"))


def _peft(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    shapes = {"A": (2, 16), "B": (16, 2)}
    save_file(
        {name.format(part): np.ones(shape, np.float32) for part, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def fill(daemon: Any, path: Path, peft: Path, redis: str = "") -> Kept:
    options = {"redis": redis} if redis else {}
    running = daemon(disk_path=path, **options)
    chains = []
    with CacheClient(running.url) as client:
        adapter = client.add_adapter(str(_peft(peft)), "team/one")
        for number, of in enumerate(("", "", adapter)):
            root = client.register(Namespace("ab" * 32, "bfloat16", "bytes", CHUNK, adapter=of), ["model"])
            keys = chunk_keys(root, range(1000 * number, 1000 * number + CHUNK * CHAIN), CHUNK)
            first = bytes.fromhex(of) if of else b""
            with client.reserve(root, keys, [SIZE] * CHAIN, parents=[first, *keys[:-1]]) as reservation:
                for position in range(CHAIN):
                    reservation.write(position, os.urandom(SIZE // 2) + bytes(SIZE - SIZE // 2))
            assert reservation.causes == [""] * CHAIN
            chains.append(keys)
        client.flush()
        for tier in ("disk", *(["redis"] if redis else [])):
            assert client.compress(Selection(keys=chains[1]), tier=tier).counts[0] == CHAIN
        client.flush()
    assert running.stop() == 0
    return Kept(path, redis, chains, adapter)


@pytest.fixture(scope="module")
def template(module_daemon: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("template")
    return fill(module_daemon, folder / "disk", folder / "peft")


@pytest.fixture
def kept(template: Kept, tmp_path: Path) -> Kept:
    """A folder of its own for this test to damage."""
    shutil.copytree(template.path, tmp_path / "disk")
    return Kept(tmp_path / "disk", "", template.chains, template.adapter)


@pytest.fixture(autouse=True)
def _no_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LORACACHE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """check(kept, "--fix") runs the command; answers its exit code and what it printed, as JSON."""
    monkeypatch.setattr(redis_check, "GRACE_S", 0.2)
    for module in (live, running):
        monkeypatch.setattr(module, "GRACE_S", 0.05)

    def run(kept: Kept, *more: str, disk: bool = True) -> tuple[int, dict[str, Any]]:
        arguments = ["check", "--json", *more]
        arguments += ["--disk-path", str(kept.path)] if disk else []
        arguments += ["--redis", kept.url] if kept.url else []
        done = CliRunner().invoke(app, arguments, prog_name="loracache")
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        return done.exit_code, json.loads(done.stdout) if done.stdout else {"error": done.stderr}

    return run


@pytest.fixture
def faults() -> Callable[[dict[str, Any]], dict[tuple[str, str], int]]:
    """faults(what check printed): counts by place and kind."""
    return lambda said: {(each["place"], each["fault"]): each["count"] for each in said["findings"]}


@pytest.fixture(scope="module")
def stock(
    module_daemon: Callable[..., Any], module_redis: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Kept, Any, dict[bytes, bytes]]:
    """A folder and a Redis that one daemon filled; the server, and a dump of each of its keys."""
    server, folder = module_redis(), tmp_path_factory.mktemp("stock")
    kept = fill(module_daemon, folder / "disk", folder / "peft", server.url)
    names = [name for name in server.redis.scan_iter() if server.redis.pttl(name) == -1]
    return kept, server.redis, {name: server.redis.dump(name) for name in names}


@pytest.fixture
def server(stock: tuple[Kept, Any, dict[bytes, bytes]]) -> Any:
    """The Redis, as it was filled."""
    _, client, dumps = stock
    client.flushall()
    for name, dump in dumps.items():
        client.restore(name, 0, dump)
    return client


@pytest.fixture
def filled(stock: tuple[Kept, Any, dict[bytes, bytes]], server: Any, tmp_path: Path) -> Kept:
    """The folder, this test's own, and the Redis."""
    shutil.copytree(stock[0].path, tmp_path / "disk")
    return Kept(tmp_path / "disk", stock[0].url, stock[0].chains, stock[0].adapter)
