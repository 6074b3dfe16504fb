# SPDX-License-Identifier: Apache-2.0
"""The second part of `make demo`: 24 LoRA adapters of ranks 8 to 64 through a pool of pages that cannot hold them all,
beside stock vLLM with dense slots in as much memory.

Stock vLLM makes `max_loras` slots of `max_lora_rank`, and an adapter takes a whole one whatever its rank. With
`lora_pool` the same memory is cut into pages that adapters of any rank share. Both serve the same requests, popular
adapters more often than others.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from lora_adapters import SLOT_BYTES, adapters_folder, zipf
from lora_engine import LoRAEngine
from rich.table import Table

from loracache import CacheClient

__all__ = ["ADAPTERS", "SLOTS", "compare", "lora_table"]

ADAPTERS, SLOTS, REQUESTS, CLIENTS = 24, 4, 16, 8


def compare(work: Path, kind: str) -> dict[str, Any]:
    """Serve the demo's requests with a "stock" engine or with a "pool"."""
    folder = adapters_folder(ADAPTERS)
    arguments: dict[str, Any] = {
        "model": str(folder / "model"), "dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": CLIENTS, "seed": 0,
        "enable_lora": True, "max_loras": SLOTS, "max_lora_rank": 64, "max_cpu_loras": ADAPTERS,
        "enable_prefix_caching": False, "gpu_memory_utilization": 0.3,
    }  # fmt: skip
    if kind == "pool":
        arguments["max_loras"] = CLIENTS  # bounds the adapters of one batch, and costs nothing
        arguments["kv_transfer_config"] = {
            "kv_connector": "LoRACacheConnector",
            "kv_connector_module_path": "loracache.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"memory": "1GiB", "lora_pool": str(SLOTS * SLOT_BYTES)},
        }
    with LoRAEngine(arguments, folder, work / f"lora-{kind}.log") as engine:
        engine.run([[adapter, 8, 1, 0.0] for adapter in range(ADAPTERS)], CLIENTS)  # every adapter is in host memory
        before = _counted(engine)
        answer = engine.run(zipf(random.Random(7), REQUESTS, 32, 8, ADAPTERS), CLIENTS)
        after = _counted(engine)
    grown = {name: count - before.get(name, 0) for name, count in after.items()}
    return {
        "first": float(np.median([times[0] for times in answer["times"]])),
        "worst": max(times[0] for times in answer["times"]),
        "rate": REQUESTS / answer["seconds"],
        "hits": grown.get("client.adapter.hit", 0),
        "swaps": grown.get("client.adapter.load", 0),
    }


def lora_table(stock: dict[str, Any], pool: dict[str, Any]) -> Table:
    """Both side by side."""
    size = SLOTS * SLOT_BYTES >> 20
    table = Table(title=f"{ADAPTERS} adapters of ranks 8 to 64, {REQUESTS} requests, {size} MiB for adapters, bfloat16")
    for column in ("", "TTFT, median", "TTFT, longest", "requests/s", "on pages", "swapped in"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, seen, counts in (("stock vLLM", stock, ("-", "-")), ("lora_pool", pool, None)):
        table.add_row(
            name,
            f"{seen['first']:.2f} s",
            f"{seen['worst']:.2f} s",
            f"{seen['rate']:.2f}",
            *(counts or (f"{pool['hits']}", f"{pool['swaps']}")),
        )
    return table


def _counted(engine: LoRAEngine) -> dict[str, int]:
    if not engine.server:
        return {}
    with CacheClient(engine.server, name="demo") as client:
        found = client.status()["counters"]
    assert isinstance(found, dict)
    return found
