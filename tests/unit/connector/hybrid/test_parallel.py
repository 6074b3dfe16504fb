# SPDX-License-Identifier: Apache-2.0
"""Whatever a model's layers read of a prefix, over several workers: what each of them computes upon is what was
computed for exactly these tokens, by its own layers and KV heads. Every step of these engines looks (exact_model.py).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.connector.hybrid.test_exact import ACTIONS, act, settle

_numbers = itertools.count()
STAGES = {
    "full": [[0], [1]],
    "full, window": [[0, 1], [2, 3]],
    "full, two windows": [[0], [1, 2]],  # the first has no window, the second no full attention
    "window of one token": [[1], [0]],
    "full, state": [[0, 1], [2, 3]],
    "full, window, state": [[0], [1], [2]],
    "blocks of two sizes": [[0], [1, 2]],
    "window": [[0], [1]],
}
LAYER = "model.layers.{}.attn"
RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads are dealt out": ("full, window", {"ranks": 2}),
    "latents are the same everywhere": ("mla", {"ranks": 2}),
    "states are dealt out": ("full, state", {"ranks": 2}),
    "fewer heads than ranks": ("full, window", {"ranks": 4, "heads": (2, {})}),
    "windows have more heads": ("full, window", {"ranks": 4, "heads": (2, {LAYER.format(at): 4 for at in range(3)})}),
    "a layer has more heads": ("full", {"ranks": 4, "heads": (1, {LAYER.format(1): 4})}),
    "a layer has fewer heads": ("full", {"ranks": 2, "heads": (2, {LAYER.format(1): 1})}),
    "ranks and stages": ("full, two windows", {"ranks": 2, "stages": [[0], [1, 2]]}),
}
ENGINES = [pytest.param(kind, {"stages": stages}, id=f"{kind} in stages") for kind, stages in STAGES.items()] + [
    pytest.param(kind, workers, id=name) for name, (kind, workers) in RANKS.items()
]


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB")


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    source = random.Random(f"parallel {next(_numbers)}")
    text = [source.randrange(32000) for _ in range(1000)]
    return lambda length: text[:length]


@pytest.mark.parametrize(("kind", "workers"), ENGINES)
def test_every_worker_loads_what_its_own_layers_computed(
    kind: str, workers: dict[str, Any], make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(kind, serving.url, **workers)
    assert engine.answer(prompt(250), answer=20) == 0
    settle(engine, serving)
    assert engine.answer(prompt(250)) == 224
    settle(engine, serving)
    reader = make_engine(kind, serving.url, **workers, step_tokens=37)
    # The first engine's steps left no state behind token 160.
    assert reader.answer([*prompt(163), 1, 2, 3]) == (128 if "state" in kind else 160)
    assert serving.status()["leases"] == 0


@pytest.mark.parametrize(
    ("name", "shards"),
    {"heads are dealt out": 2, "latents are the same everywhere": 1, "fewer heads than ranks": 2}.items(),
)
def test_ranks_that_hold_the_same_keep_it_once(name: str, shards: int, make_engine: Any, serving: Any) -> None:
    kind, workers = RANKS[name]
    engine = make_engine(kind, serving.url, **workers)
    assert {len(each) for each in engine.shards} == {shards}


@pytest.mark.parametrize(("kind", "workers"), ENGINES)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(actions=ACTIONS, step_tokens=st.sampled_from((33, 64, 131)), blocks=st.sampled_from((100, 300)))
@example(actions=[("ask", 0, 9, 1), ("ask", 0, 9, 1), ("steps", 1), ("reset",)], step_tokens=33, blocks=100)
def test_whatever_happens_no_worker_computes_upon_anything_wrong(
    kind: str,
    workers: dict[str, Any],
    make_engine: Any,
    serving: Any,
    actions: list[Any],
    step_tokens: int,
    blocks: int,
) -> None:
    # Fewer blocks hold no prompt of 260 tokens: stages have two steps under way, whose windows all stay.
    engine = make_engine(kind, serving.url, **workers, blocks=blocks, step_tokens=step_tokens)
    try:
        act(engine, serving, actions)
    finally:
        engine.close()
