# SPDX-License-Identifier: Apache-2.0
"""Engines without a model, for models that no CPU runs: `make_engine(kind, url)`.

vLLM's own KV cache groups, allocation, managers and scheduler, both sides of the connector, and a real daemon. In the
model's place stands one that writes, as the KV of a token, a hash of all tokens before it, and that reads what its kind
of layer reads: a step fails where one byte of that is not what was computed for exactly these tokens (ExactModel).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.connector.hybrid.exact_engine import FakeEngine
from tests.unit.connector.hybrid.exact_model import BLOCK, kinds


@pytest.fixture(scope="session")
def kind_names() -> list[str]:
    return list(kinds())


@pytest.fixture(scope="session")
def plain_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's configuration of an engine; nothing of its model is computed with. The environment is afterwards
    as it was: vLLM sets variables that a daemon of a later test would inherit."""
    folder = tmp_path_factory.mktemp("plain")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    before = dict(os.environ)
    try:
        return _engine_config(folder)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _engine_config(folder: Path) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
        disable_hybrid_kv_cache_manager=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="LoRACacheConnector",
            kv_connector_module_path="loracache.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
    ).create_engine_config()


@pytest.fixture
def make_engine(plain_config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeEngine]]:
    """make_engine("full, window", url, blocks=400, step_tokens=64) starts one that is ready.

    ranks: of tensor parallelism. heads: KV heads of all ranks together, of the model and of layers that have another
    number. stages: the numbers of the layers of each stage of a pipeline. drafts: a method of speculative decoding.
    sees: prompts have images. match_unit: tokens between places where hits of vLLM's own prefix cache end, of models
    with states; 0: a block. shares, ahead: as FakeEngine has them. More arguments are options of the connector.
    """
    made: list[FakeEngine] = []

    def make(
        kind: str,
        url: str,
        *,
        blocks: int = 400,
        step_tokens: int = 64,
        caching: bool = True,
        ranks: int = 1,
        heads: tuple[int, Mapping[str, int]] | None = None,
        stages: Sequence[Sequence[int]] = (),
        shares: Mapping[str, str] | None = None,
        drafts: str = "",
        kv_dtype: str = "auto",
        sees: bool = False,
        match_unit: int = 0,
        ahead: bool = False,
        **extra: Any,
    ) -> FakeEngine:
        specs = kinds()[kind]
        config = copy.deepcopy(plain_config)
        own = {"server": url, "model_id": kind, "chunk_tokens": 2 * BLOCK, "lookup_wait": 1.0, "recompute_if_faster": 0}
        config.kv_transfer_config.kv_connector_extra_config = own | extra
        config.scheduler_config.max_num_batched_tokens = step_tokens
        cache = config.cache_config
        cache.block_size = max(spec.block_size for spec in specs.values())
        cache.num_gpu_blocks_override = blocks
        cache.enable_prefix_caching = caching
        cache.cache_dtype = kv_dtype
        cache.kv_cache_layout = "LBHNC"
        cache.mamba_cache_mode = "align"
        cache.prefix_match_unit = match_unit or None
        parts = [[list(specs)[layer] for layer in stage] for stage in stages] or [list(specs)]
        config.parallel_config.tensor_parallel_size = ranks
        config.parallel_config.pipeline_parallel_size = len(parts)
        all_heads = _deal_heads(config.model_config, specs, ranks, heads)
        if drafts:
            config.speculative_config = _drafts(config, drafts)
        layers = [{name: specs[name] for name in part} for part in parts]
        made.append(FakeEngine(config, layers, monkeypatch, shares, all_heads, ahead=ahead))
        if sees:
            made[-1].see()
        return made[-1].ready()

    yield make
    for engine in made:
        engine.close()


def _deal_heads(
    model: Any, specs: dict[str, Any], ranks: int, heads: tuple[int, Mapping[str, int]] | None
) -> dict[str, int]:
    """Tell the model's configuration and the specs of one rank how many KV heads there are; answers those of layers
    that have other than two a rank."""
    total, others = heads or (2 * ranks, {})
    model.model_arch_config.total_num_kv_heads = total
    model.hf_text_config.num_key_value_heads = total
    model.hf_text_config.other_key_value_heads = list(others.values())
    all_heads = {name: others.get(name, total) for name in specs} if heads else {}
    for name, count in all_heads.items():
        specs[name] = dataclasses.replace(specs[name], num_kv_heads=max(1, count // ranks))
    return all_heads | {name: 1 for name, spec in specs.items() if "MLA" in type(spec).__name__}


def _drafts(config: Any, method: str) -> Any:
    """Three drafts a step. Where a model of drafts would have to be there, its method alone is."""
    from vllm.config import SpeculativeConfig

    found = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=3,
        prompt_lookup_max=3,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )
    object.__setattr__(found, "method", method)
    return found
