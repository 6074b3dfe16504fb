"""Daemons with a REST port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace


def up(running: Any) -> bool:
    try:
        return httpx.get(f"{running.http}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def rest_is_up() -> Callable[[Any], bool]:
    return up


@pytest.fixture(scope="module")
def running(module_daemon: Any, eventually: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    disk = tmp_path_factory.mktemp("disk")
    made = module_daemon(http="127.0.0.1:0", memory="16MiB", page_size="4KiB", disk_path=disk, disk="64MiB")
    made.disk = disk
    eventually(lambda: up(made), "REST answers")
    return made


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    """At the socket."""
    with CacheClient(running.url) as made:
        yield made


@pytest.fixture
def anybody(running: Any) -> Iterator[httpx.Client]:
    """Over HTTP, without a token."""
    with httpx.Client(base_url=running.http) as made:
        yield made


@pytest.fixture
def operator(running: Any) -> Iterator[httpx.Client]:
    """Over HTTP, with the daemon's token."""
    token = Path(f"{running.socket}.token").read_text().strip()
    with httpx.Client(base_url=running.http, headers={"authorization": f"Bearer {token}"}) as made:
        yield made


@pytest.fixture
def chain(client: CacheClient) -> Callable[[int], list[str]]:
    """chain(count): hex keys of a new chain of objects of 1,000 bytes."""

    def store(count: int) -> list[str]:
        root, keys = (
            client.register(Namespace("model", "float32", "layout", 16)),
            [os.urandom(32) for _ in range(count)],
        )
        with client.reserve(root, keys, [1000] * count) as reservation:
            for position in range(count):
                reservation.write(position, bytes(1000))
        assert reservation.causes == [""] * count
        return [key.hex() for key in keys]

    return store


@pytest.fixture
def adapter(client: CacheClient, tmp_path: Path) -> Callable[[str], SimpleNamespace]:
    """adapter(name): one with content of its own is in the cache."""

    def add(name: str) -> SimpleNamespace:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
        tensors = {
            f"base_model.model.q_proj.lora_{part}.weight": np.random.default_rng().standard_normal(shape, np.float32)
            for part, shape in (("A", (4, 64)), ("B", (64, 4)))
        }
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return SimpleNamespace(name=name, digest=client.add_adapter(str(tmp_path), name))

    return add


@pytest.fixture(scope="session")
def loracache() -> Callable[..., tuple[int, str, str]]:
    """loracache(*arguments, socket=None, stdin=None) runs a command: exit code, standard output, standard error."""

    def run(*arguments: str, socket: Path | None = None, stdin: str | None = None) -> tuple[int, str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORACACHE_")}
        named = {"LORACACHE_SOCKET": str(socket)} if socket else {}
        done = subprocess.run(
            [sys.executable, "-m", "loracache", *arguments], input=stdin or "", capture_output=True, text=True,
            env=kept | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"} | named, timeout=50, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run
