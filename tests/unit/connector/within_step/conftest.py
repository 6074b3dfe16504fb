# SPDX-License-Identifier: Apache-2.0
"""`make_engine(url)` is an engine that loads within the step whatever it can (step_engine.py)."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.connector.hybrid.exact_model import BLOCK, kinds
from tests.unit.connector.within_step.step_engine import StepEngine

CHUNK = 2 * BLOCK
_numbers = itertools.count()


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB")


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    """prompt(length): the beginning of a text that no other test has."""
    source = random.Random(f"within a step {next(_numbers)}")
    text = [source.randrange(32000) for _ in range(1000)]
    return lambda length: text[:length]


@pytest.fixture(scope="session")
def step_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's configuration of an engine that schedules synchronously."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    folder = tmp_path_factory.mktemp("plain")
    model = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model))
    before = dict(os.environ)
    try:
        return EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=8,
            async_scheduling=False,
            disable_hybrid_kv_cache_manager=False,
            disable_log_stats=False,
            kv_transfer_config=KVTransferConfig(
                kv_connector="LoRACacheConnector",
                kv_connector_module_path="loracache.connectors.vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
            ),
        ).create_engine_config()
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def make_engine(step_config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StepEngine]]:
    """make_engine(url, kind="full", layers=4, ranks=1, blocks=400, step_tokens=64, caching=True, **options)."""
    from vllm.distributed import parallel_state

    from loracache.connectors.vllm.common import synchronous
    from loracache.connectors.vllm.scheduler import within_step

    monkeypatch.setattr(synchronous, "problem", lambda: "")  # vLLM has not loaded our plugin here
    monkeypatch.setattr(within_step.WithinStep, "_pays", lambda self, nbytes: True)
    monkeypatch.setattr(within_step, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(within_step, "_LONGEST_PAUSE_S", 0.0)
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: SimpleNamespace(rank_in_group=0, world_size=1))
    made: list[StepEngine] = []

    def make(
        url: str,
        *,
        kind: str = "full",
        layers: int = 4,
        ranks: int = 1,
        blocks: int = 400,
        step_tokens: int = 256,
        caching: bool = True,
        **extra: Any,
    ) -> StepEngine:
        specs = dict(kinds()[kind])
        if kind == "full":
            (spec, *_) = specs.values()
            specs = {f"model.layers.{number}.attn": spec for number in range(layers)}
        config = copy.deepcopy(step_config)
        own = {"server": url, "model_id": f"{kind} {layers} {ranks}", "chunk_tokens": CHUNK, "lookup_wait": 1.0}
        own |= {"recompute_if_faster": 0, "layer_by_layer": True}
        config.kv_transfer_config.kv_connector_extra_config = own | extra
        config.scheduler_config.max_num_batched_tokens = step_tokens
        config.parallel_config.tensor_parallel_size = ranks
        cache = config.cache_config
        cache.block_size = BLOCK
        cache.num_gpu_blocks_override = blocks
        cache.enable_prefix_caching = caching
        cache.kv_cache_layout = "LBHNC"
        made.append(StepEngine(config, specs, ranks, monkeypatch))
        return made[-1].ready()

    yield make
    for engine in made:
        engine.close()
