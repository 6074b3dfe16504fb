# SPDX-License-Identifier: Apache-2.0
"""Engines that a pool cannot serve say so and do not start; engines without a pool are stock."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest


def test_an_engine_without_a_pool_is_stock(engine_factory: Any, daemon: Any, host_path: str, prompts: Any) -> None:
    """With the plugin installed, with our connector, without `lora_pool`."""
    running = daemon(memory="64MiB")
    engine = engine_factory(
        {"server": running.url}, {"PYTHONPATH": host_path}, worker_extension_cls="pool_extension.PoolExtension"
    )
    assert engine.rpc("lora_manager") == "LRUCacheWorkerLoRAManager"
    assert engine.ask(prompts(20)).reason == "length"
    engine.close()


def test_fully_sharded_adapters_are_refused_at_the_start(engine_factory: Any) -> None:
    with pytest.raises(AssertionError, match="engine ended"):
        engine_factory({"lora_pool": "1MiB", "memory": "64MiB"}, fully_sharded_loras=True)
    assert "lora_pool does not serve fully_sharded_loras; leave one of the two out" in engine_factory.last().log()


def test_a_mixture_of_experts_is_refused_at_the_start(engine_factory: Any, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "experts")
    path = tmp_path / "experts" / "config.json"
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    config = json.loads(path.read_text()) | experts
    path.write_text(json.dumps(config | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}))
    with pytest.raises(AssertionError, match="engine ended"):
        engine_factory({"lora_pool": "1MiB", "memory": "64MiB"}, model=str(tmp_path / "experts"), load_format="dummy")
    assert "lora_pool does not serve adapters of mixture-of-experts models" in engine_factory.last().log()
