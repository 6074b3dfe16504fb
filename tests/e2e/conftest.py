# SPDX-License-Identifier: Apache-2.0
"""Engines for the end-to-end tests. Starting one takes seconds, so tests share them and use prompts of their own."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


engines = _load(HERE / "engines.py")

CHUNK = 128
CONNECTOR = {
    "kv_connector": "LoRACacheConnector",
    "kv_connector_module_path": "loracache.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "enable_prefix_caching": False,
    "seed": 0,
}


@pytest.fixture(scope="session")
def host_path() -> str:
    """PYTHONPATH of an engine that loads pool_extension.py: the one there is, with this folder."""
    return os.pathsep.join([str(HERE), *map(os.path.abspath, filter(None, sys.path))])


@pytest.fixture(scope="session")
def load() -> Any:
    """Adapter (engines.py) and MergedModel (merged.py)."""
    return SimpleNamespace(Adapter=engines.Adapter, MergedModel=_load(HERE / "merged.py").MergedModel)


@pytest.fixture(scope="session")
def audio_model() -> Any:
    """The module audio_model.py."""
    return _load(HERE / "audio_model.py")


@pytest.fixture(scope="session")
def hybrid_models() -> Any:
    """The module hybrid_models.py."""
    return _load(HERE / "hybrid_models.py")


@pytest.fixture(scope="session")
def openai_server() -> Any:
    """The class Server of openai_server.py."""
    return _load(HERE / "openai_server.py").Server


@pytest.fixture(scope="session")
def model_maker() -> Any:
    """examples/make_model.py."""
    return _load(HERE.parents[1] / "examples" / "make_model.py")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_maker: Any) -> Path:
    """Folder of a tiny float32 Llama (model/) and three adapters (adapters/adapter-0..2)."""
    folder = tmp_path_factory.mktemp("tiny")
    model_maker.main([str(folder), "--preset", "tiny", "--adapters", "3"])
    return folder


@pytest.fixture(scope="session")
def engine_factory(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts engines; they end with the tests. `extra` is the connector's configuration, None for a stock engine."""
    running: list[Any] = []
    folder = tmp_path_factory.mktemp("engines")
    servers = [engines.ForkServer(folder / "fork-server.log")]
    numbers = itertools.count()

    def start(
        extra: dict[str, Any] | None,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> Any:
        settings = ENGINE | {"model": str(tiny / "model")} | arguments
        if extra is not None:
            settings["kv_transfer_config"] = CONNECTOR | {
                # What is found is loaded, however slow this machine is just now: a tiny model computes fast.
                "kv_connector_extra_config": {"chunk_tokens": CHUNK, "lookup_wait": 5.0, "recompute_if_faster": 0}
                | extra
            }
        number, server = next(numbers), servers[0]
        if environment and "PYTHONHASHSEED" in environment:  # Python reads it when it starts
            server = engines.ForkServer(folder / f"fork-server-{number}.log", environment)
            servers.append(server)
        engine = engines.Engine(server, folder / f"engine-{number}.log", settings, environment)
        running.append(engine)
        return engine.wait_ready()

    start.last = lambda: running[-1]  # type: ignore[attr-defined]
    yield start
    for engine in running:
        engine.quit()
    for engine in running:
        engine.close()
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def prompts() -> Callable[[int], list[int]]:
    """A prompt of so many tokens that no other test has."""
    source = random.Random("prompts")
    return lambda length: [source.randrange(300, 500) for _ in range(length)]


@pytest.fixture(scope="session")
def adapters(tiny: Path) -> dict[str, Any]:
    """Adapters a, b, c by name."""
    return {
        name: engines.Adapter(name, number + 1, str(tiny / "adapters" / f"adapter-{number}"))
        for number, name in enumerate("abc")
    }
