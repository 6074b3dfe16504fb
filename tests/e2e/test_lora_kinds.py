# SPDX-License-Identifier: Apache-2.0
"""A pool in engines of other kinds: computing in bfloat16, and sharded over two workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS = (8, 64, 1, 24, 12, 48, 16, 32)
OPTIONS = {"max_loras": 8, "max_lora_rank": 64}


@pytest.fixture(scope="module")
def mixed(tiny: Path, model_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of mixed ranks."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, rank in enumerate(RANKS):
        model_maker.make_adapter(folder / str(number), model_maker.PRESETS["tiny"], rank=rank, seed=40 + number)
    return [folder / str(number) for number in range(len(RANKS))]


Asked = list[tuple[list[int], Path | None, list[int]]]


@pytest.fixture
def ask_all(mixed: list[Path], prompts: Callable[[int], list[int]], load: Any) -> Callable[[Any], Asked]:
    """ask_all(engine): (prompt, adapter's folder, answer) of three requests for each adapter and the base, in mixed
    batches."""

    def ask(engine: Any) -> Asked:
        work = [*range(len(mixed)), None] * 3
        asked = [(prompts(20 + place), number) for place, number in enumerate(work)]
        calls = [
            engine.start(
                tokens,
                max_tokens=12,
                lora=load.Adapter(f"mixed-{number}", 1 + number, str(mixed[number])) if number is not None else None,
            )
            for tokens, number in asked
        ]
        answers = [engine.result(call) for call in calls]
        assert not [answer.error for answer in answers if answer.error]
        return [
            (tokens, mixed[number] if number is not None else None, answer.tokens)
            for (tokens, number), answer in zip(asked, answers, strict=True)
        ]

    return ask


def test_in_bfloat16_tokens_agree_wherever_logits_differ_by_more_than_rounding(
    daemon: Any, engine_factory: Any, ask_all: Any, tiny: Path, load: Any
) -> None:
    engine = engine_factory({"server": daemon(memory="64MiB").url, "lora_pool": "1MiB"}, dtype="bfloat16", **OPTIONS)
    model, exact = load.MergedModel(tiny / "model", torch.bfloat16), 0
    for tokens, folder, answer in ask_all(engine):
        rounding = model.rounding(folder, tokens, answer)
        assert not model.disagreements(folder, tokens, answer, rounding)
        exact += not model.disagreements(folder, tokens, answer, 0.0)
        if folder is not None:
            assert model.disagreements(None, tokens, answer, rounding), "the base's answer would have done too"
    engine.close()


def test_workers_of_a_sharded_model_have_a_pool_each(
    daemon: Any, engine_factory: Any, ask_all: Any, tiny: Path, load: Any, host_path: str
) -> None:
    serving = daemon(memory="64MiB")
    engine = engine_factory(
        {"server": serving.url, "lora_pool": "600KiB"},
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": host_path},
        tensor_parallel_size=2,
        worker_extension_cls="pool_extension.PoolExtension",
        **OPTIONS,
    )
    model = load.MergedModel(tiny / "model")
    for tokens, folder, answer in ask_all(engine):
        assert not model.disagreements(folder, tokens, answer)
    state = engine.rpc("pool_state")
    assert not state["problems"]
    assert 0 < len(state["resident"]) < len(RANKS)
    engine.close()
    assert serving.status()["leases"] == 0
