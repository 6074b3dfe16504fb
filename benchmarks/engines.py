# SPDX-License-Identifier: Apache-2.0
"""vLLM engines for the benchmarks: the demo's model, 4,000-token prompts that nobody asked before."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from common import model_folder
from engine_process import Answer, EngineError, EngineProcess

from loracache import CacheClient

__all__ = ["CACHED", "PROMPT_TOKENS", "expect", "fresh_prompt", "settle", "start_engine"]

PROMPT_TOKENS = 4000
CACHED = 3968  # 31 chunks, and vLLM blocks, of 128 tokens
_prompts = random.Random()


def fresh_prompt(length: int = PROMPT_TOKENS) -> list[int]:
    """Random token ids."""
    return [_prompts.randrange(300, 1000) for _ in range(length)]


def start_engine(
    folder: Path, name: str, server: str | None, *, connector: str = "LoRACacheConnector", **options: object
) -> EngineProcess:
    """An engine in bfloat16, warmed up, with the cache at `server`; a stock engine where that is None. options: more of
    the connector's."""
    arguments: dict[str, Any] = {
        "model": str(model_folder() / "model"),
        "dtype": "bfloat16",
        "max_model_len": PROMPT_TOKENS + 200,
        "max_num_seqs": 4,
        "seed": 0,
        "gpu_memory_utilization": 0.3,
    }
    environment = {"BENCH_SPANS": str(folder)}
    if server is not None:
        module = "loracache.connectors.vllm"
        if connector == "TracedConnector":
            module = "traced_connector"
            here = str(Path(__file__).parent)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        arguments["kv_transfer_config"] = {
            "kv_connector": connector,
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"server": server} | options,
        }
    engine = EngineProcess(arguments, log=folder / f"{name}.log", more=environment)
    engine.ask(fresh_prompt(), max_tokens=1)
    return engine


def settle(engine: EngineProcess, client: CacheClient | None) -> None:
    """Wait for the stores of what was computed, and empty vLLM's own prefix cache."""
    engine.reset_prefix_cache()  # waits for the stores
    if client is not None:
        client.flush(60)


def expect(answer: Answer, cached: int, what: str) -> float:
    """The answer's TTFT in seconds. Raises where it is not the kind of answer that is measured."""
    if answer.cached != cached:
        raise EngineError(f"{what}: {answer.cached} tokens were cached, {cached} expected")
    return answer.ttft
