# SPDX-License-Identifier: Apache-2.0
"""Models whose layers do not all read all of a prompt, 4,000 tokens: cold, hit in L1, hit in vLLM's own cache.

Two shapes with random weights in bfloat16: windows (Gemma 3: five layers of 512 tokens to one of full attention) and
states (Granite 4 hybrid: Mamba 2, one layer of attention in ten). One engine each; rounds as in bench_ttft.py. Beside
the times, what a token of a prompt takes in the cache, and what of it is of the layers of full attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Row, daemon, ratio_row, row, work_folder
from engine_process import EngineError, EngineProcess
from engines import PROMPT_TOKENS, fresh_prompt, settle
from make_model import PRESETS, make_tokenizer

from loracache import CacheClient

PAIRS = 3
COLD, LOCAL = 1 / 8, 1.5
SIZES: dict[str, Any] = {"hidden_size": 1024, "vocab_size": 1024, "max_position_embeddings": 8192}


def _windows() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **SIZES,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=512,
    )


def _states() -> Any:
    from transformers import GraniteMoeHybridConfig

    layers = ["mamba"] * 5 + ["attention"] + ["mamba"] * 4
    return GraniteMoeHybridConfig(
        **SIZES,
        num_hidden_layers=len(layers),
        layer_types=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        mamba_n_heads=32,
        mamba_d_state=64,
        num_local_experts=0,
        shared_intermediate_size=2816,
        attention_multiplier=64**-0.5,
    )


SHAPES: dict[str, Callable[[], Any]] = {"windows": _windows, "states": _states}
BLOCK = 288  # tokens whose KV in the one layer of attention is as large as a state
# vLLM 0.32 for CPU ends where a step takes a state out of its middle, so that no step is longer than a block.
MORE = {"windows": {}, "states": {"block_size": BLOCK, "max_num_batched_tokens": BLOCK}}


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    rows = []
    for name in SHAPES:
        with (
            work_folder() as folder,
            daemon(folder, memory="3GiB") as running,
            running.client() as client,
            _engine(folder, name, running.url) as engine,
        ):
            rows += _measure(name, engine, client, 2 if quick else 7)
    return rows


def _measure(name: str, engine: EngineProcess, client: CacheClient, rounds: int) -> list[Row]:
    cold: list[float] = []
    hits: list[float] = []
    local: list[float] = []
    reached = 0
    for number in range(-1, rounds):
        tokens = fresh_prompt()
        first = engine.ask(tokens, max_tokens=1)
        _check(first.cached == 0, f"cold: {first.cached} tokens were cached")
        pairs = []
        for _ in range(PAIRS):
            settle(engine, client)
            hit = engine.ask(tokens, max_tokens=1)
            own = engine.ask(tokens, max_tokens=1)
            _check(hit.cached > PROMPT_TOKENS * 0.8, f"hit in L1: {hit.cached} tokens")
            _check(own.cached >= hit.cached, f"hit in vLLM's own cache: {own.cached} tokens, {hit.cached} in L1")
            reached = hit.cached
            pairs.append((hit.ttft, own.ttft))
        if number >= 0:  # the first round warms up
            cold.append(first.ttft)
            hits += [hit for hit, _ in pairs]
            local += [own for _, own in pairs]
    per_round = [first for first in cold for _ in range(PAIRS)]
    stored = sum(each["size"] for each in client.objects(tier="cpu")) / (rounds + 1) / reached
    full = _full_bytes(SHAPES[name]())
    return [
        ratio_row(f"{name}: TTFT hit in L1 / cold", hits, per_round, at_most=COLD),
        ratio_row(f"{name}: TTFT hit in L1 / hit in vLLM's own cache", hits, local, at_most=LOCAL),
        row("  cold", "s", cold),
        row("  hit in L1", "s", hits, note=f"{reached} of {PROMPT_TOKENS} tokens"),
        row("  hit in vLLM's own cache", "s", local),
        row("  stored for a token", "bytes", [stored], note=f"its layers of full attention alone: {full} bytes"),
    ]


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EngineError(otherwise)


def _full_bytes(config: Any) -> int:
    """Of a token's KV in the layers of full attention, in bfloat16."""
    layers = sum(kind in ("attention", "full_attention") for kind in config.layer_types)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(layers * config.num_key_value_heads * head * 2 * 2)


def _engine(folder: Path, name: str, server: str) -> EngineProcess:
    model = folder / "model"
    config = SHAPES[name]()
    config.architectures = [{"windows": "Gemma3ForCausalLM", "states": "GraniteMoeHybridForCausalLM"}[name]]
    config.save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({}))
    make_tokenizer(model, PRESETS["190m"])
    arguments = {
        "model": str(model),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": PROMPT_TOKENS + 200,
        "max_num_seqs": 4,
        "seed": 0,
        "enable_prefix_caching": True,
        "disable_hybrid_kv_cache_manager": False,
        "gpu_memory_utilization": 0.3,
        **MORE[name],
        "kv_transfer_config": {
            "kv_connector": "LoRACacheConnector",
            "kv_connector_module_path": "loracache.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"server": server},
        },
    }
    engine = EngineProcess(arguments, log=folder / "engine.log")
    engine.ask(fresh_prompt(), max_tokens=1)
    return engine
