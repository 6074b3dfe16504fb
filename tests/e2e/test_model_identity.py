# SPDX-License-Identifier: Apache-2.0
"""Engines whose models differ in what a name or a sample would not tell: none is answered from another's KV. The oracle
is the engine itself, under a salt never used before."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
ROWS = range(300, 490, 7)  # of the tokens that prompts are made of; not the last ones, which a sample of bytes meets


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The model, and a copy with surgery on some rows of its embedding."""
    copy = Path(shutil.copytree(tiny / "model", tmp_path_factory.mktemp("surgery") / "model"))
    tensors = load_file(copy / "model.safetensors")
    for row in ROWS:
        tensors["model.embed_tokens.weight"][row] *= -1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return SimpleNamespace(plain=tiny / "model", surgery=copy)


@pytest.fixture(scope="module")
def daemon(module_daemon: Any) -> Any:
    return module_daemon(memory="256MiB")


@pytest.fixture(scope="module")
def start(daemon: Any, engine_factory: Any) -> Iterator[Callable[..., Any]]:
    """Starts engines."""
    running: list[Any] = []

    def make(model: Path, model_id: str = "", **arguments: Any) -> Any:
        extra = {"server": daemon.url} | ({"model_id": model_id} if model_id else {})
        engine = engine_factory(extra, model=str(model), enable_lora=False, **arguments)
        running.append(engine)
        return engine

    yield make
    for engine in running:
        engine.close()


def compute(engine: Any, daemon: Any, tokens: list[int]) -> None:
    engine.ask(tokens)
    engine.settle(daemon)
    assert engine.ask(tokens).cached == 384


def is_right(engine: Any, daemon: Any, tokens: list[int], others: Any) -> None:
    """The engine hits nothing of the others', answers as it does without a cache, and hits its own."""
    first = engine.ask(tokens)
    oracle = engine.ask(tokens, salt="oracle")
    assert first.cached == oracle.cached == 0
    assert first.tokens == oracle.tokens != others
    compute(engine, daemon, tokens)


def test_surgery_on_rows_of_a_weight_is_another_model(
    start: Callable[..., Any], daemon: Any, models: Any, prompts: Callable[[int], list[int]]
) -> None:
    tokens = prompts(500)
    plain = start(models.plain)
    compute(plain, daemon, tokens)
    is_right(start(models.surgery), daemon, tokens, plain.ask(tokens).tokens)


def test_a_model_id_names_weights_and_hides_no_configuration(
    start: Callable[..., Any], daemon: Any, models: Any, prompts: Callable[[int], list[int]]
) -> None:
    tokens = prompts(500)
    plain = start(models.plain, "mine")
    compute(plain, daemon, tokens)
    is_right(start(models.plain, "mine", hf_overrides=ROPE), daemon, tokens, plain.ask(tokens).tokens)
