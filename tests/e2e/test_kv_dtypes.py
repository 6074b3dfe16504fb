# SPDX-License-Identifier: Apache-2.0
"""KV in fp8 and drafts from the prompt, on a real vLLM whose model has windows beside full attention. A CPU computes
with fp8 KV where it has AVX-512."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

ENGINE = {
    "enable_lora": False,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_batched_tokens": 163,
    "num_gpu_blocks_override": 800,  # a quarter may wait for stores, on a busy machine for long
    "disable_hybrid_kv_cache_manager": False,
}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
ENGINES = [
    pytest.param(
        {"kv_cache_dtype": "fp8_e4m3"},
        id="fp8",
        marks=pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="fp8 KV needs AVX-512"),
    ),
    pytest.param({"speculative_config": DRAFTS}, id="ngram"),
]


@pytest.mark.parametrize("more", ENGINES)
def test_the_same_tokens_come_from_cpu_and_disk(
    more: dict[str, Any],
    hybrid_models: Any,
    model_maker: Any,
    daemon: Any,
    engine_factory: Any,
    prompts: Callable[[int], list[int]],
    tmp_path: Any,
) -> None:
    model = hybrid_models.make_hybrid_model(tmp_path / "model", "gemma3", model_maker)
    serving = daemon(memory="64MiB", disk_path=tmp_path / "disk", disk="1GiB")
    engine = engine_factory(
        {"server": serving.url, "chunk_tokens": model.block},
        model=str(tmp_path / "model"),
        **ENGINE | model.engine | more,
    )
    for length in (255, 256, 257, 600):
        tokens = prompts(length // 2) * 2 + prompts(length % 2)  # what was is a good draft of what comes
        cold = engine.ask(tokens, max_tokens=40)
        for tiers in ((), ("cpu",)):
            engine.settle(serving)
            if tiers:
                with serving.client() as client:
                    client.clear(tiers=tiers)
            warm = engine.ask(tokens, max_tokens=40)
            assert warm.cached == (length - 1) // model.block * model.block, (length, tiers)
            assert warm.tokens == cold.tokens, (length, tiers)
        turn = [*tokens, *cold.tokens, *prompts(5)]
        first = engine.ask(turn)
        assert first.cached >= length // model.block * model.block
        engine.settle(serving)
        with serving.client() as client:
            client.clear(tiers=("cpu", "disk"))
        assert engine.ask(turn).tokens == first.tokens
    assert "LoRACache is off" not in engine.log()
    engine.close()
    assert serving.status()["leases"] == 0
