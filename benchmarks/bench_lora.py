# SPDX-License-Identifier: Apache-2.0
"""200 LoRA adapters of ranks 8, 16, 32 and 64 on the 190 M model, bfloat16, asked for by Zipf's law: a pool of pages
beside stock vLLM's dense slots in as much memory (8 slots of rank 64), all adapters in host memory on both sides.

Stock: its own kernel. Dense: its slots with our kernel, so that only the pages differ. Engines run one after another,
in rounds. Swap-bound: prompts of 16 tokens, one token out. Beside cold: requests for resident adapters, alone and while
others, which are in host memory but on no pages, are asked for.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, daemon, ratio_row, row, work_folder
from lora_activation import activation_rows, make_pool
from lora_adapters import ADAPTERS, SLOT_BYTES, adapters_folder, zipf
from lora_engine import LoRAEngine

from loracache.adapters.payload import Packing
from loracache.adapters.peft import PeftFolder

SLOTS = 8
CLIENTS = 16
BASE = {
    "dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": CLIENTS, "enable_lora": True, "max_lora_rank": 64,
    "max_cpu_loras": ADAPTERS, "seed": 0, "enable_prefix_caching": False, "gpu_memory_utilization": 0.3,
    "worker_extension_cls": "lora_probe.LoRAProbe",
}  # fmt: skip


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    folder = adapters_folder()
    with work_folder() as work:
        rows = _memory(folder) + activation_rows(work, folder, 20 if quick else 100)
        with daemon(work, memory="5GiB") as cache:
            rows += _throughput(work, folder, cache.url, 1 if quick else 3)
            rows += _beside_cold(work, folder, cache.url, 100 if quick else 500)
    return rows


# -- memory ----------


def _memory(folder: Path) -> list[Row]:
    """64 adapters on pages, against the bytes of their tensors and against a dense slot for each."""
    pool, own = make_pool(64 * SLOT_BYTES), 0
    for number in range(64):
        with PeftFolder(folder / f"a{number}") as peft:
            packing = Packing(peft)
            own += sum(tensor.nbytes for tensor in peft.tensors)
            placement = pool.shape.fit(packing.sizes())
        if pool.reserve(placement, np.zeros(pool.shape.slices, np.float32)) is None:
            raise RuntimeError("the pool is too small")
    used = (pool.shape.pages - pool.free_pages) * pool.shape.page * pool.shape.element_bytes
    return [
        row("pages of 64 adapters of ranks 8 to 64 / their own bytes", "x", [used / own], at_most=1.05),
        row("  64 dense slots of rank 64 / pages", "x", [64 * SLOT_BYTES / used]),
    ]


# -- throughput, and what swaps cost ----------


def _throughput(work: Path, folder: Path, server: str, rounds: int) -> list[Row]:
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        for kind in ("pool", "dense", "stock") if number % 2 else ("stock", "dense", "pool"):
            with _engine(work, folder, kind, server) as engine:
                few = kind == "stock"  # its kernel takes a second a request
                engine.run([[adapter, 8, 1, 0.0] for adapter in range(ADAPTERS)], CLIENTS)  # into host memory
                long = engine.run(zipf(random.Random(-number), 32 if few else 128, 64, 16), CLIENTS)
                swap = engine.run(zipf(random.Random(-number), 24 if few else 256, 16, 1), CLIENTS)
            for what, answer in (("long", long), ("swap", swap)):
                found.setdefault(f"{kind} {what} requests/s", []).append(len(answer["times"]) / answer["seconds"])
                found.setdefault(f"{kind} {what} TTFT", []).append(float(np.median([t[0] for t in answer["times"]])))
            if kind == "dense":
                swapped, computed = sum(swap["swaps"]), sum(swap["steps"]) - sum(swap["swaps"])
                found.setdefault("bound", []).append((computed + swapped) / computed)
    rate = {key: value for key, value in found.items() if key.endswith("requests/s")}
    gain = [a / b for a, b in zip(rate["pool swap requests/s"], rate["dense swap requests/s"], strict=True)]
    return [
        ratio_row("throughput, pool / stock", rate["pool long requests/s"], rate["stock long requests/s"], at_least=3),
        ratio_row("median TTFT, pool / stock", found["pool long TTFT"], found["stock long TTFT"], at_most=0.4),
        ratio_row("swap-bound throughput, pool / dense, of the bound", gain, found["bound"], at_least=0.9),
        ratio_row("throughput, pool / dense", rate["pool long requests/s"], rate["dense long requests/s"], at_least=1),
        row("  bound: (compute + swap) / compute of dense", "x", found["bound"]),
        *(row(f"  {key.removesuffix(' requests/s')}", "requests/s", value) for key, value in sorted(rate.items())),
    ]


# -- a cold adapter delays its own request only ----------


def _beside_cold(work: Path, folder: Path, server: str, count: int) -> list[Row]:
    """Requests at a steady rate for 8 adapters that fit; in every other block, cold ones come beside them."""
    resident, cold = list(range(0, 32, 4)), [n for n in range(1, ADAPTERS) if n % 4]
    rng = random.Random(5)
    alone: list[float] = []
    beside: list[float] = []
    steps: dict[str, list[float]] = {"alone": [], "beside": []}
    with _engine(work, folder, "pool", server) as engine:
        engine.run([[adapter, 64, 8, 0.0] for adapter in [*resident, *cold]], CLIENTS)
        engine.run([[adapter, 64, 8, 0.0] for adapter in resident * 2], CLIENTS)
        blocks = 10
        for block in range(2 * blocks):
            requests = [[rng.choice(resident), 64, 8, number * 0.5] for number in range(count // blocks)]
            late = range(len(requests) // 5 if block % 2 else 0)
            extra: list[list[Any]] = [[cold.pop(), 64, 1, number * 2.5 + 0.2] for number in late]
            answer = engine.run(requests + extra, 0)
            (beside if block % 2 else alone).extend(times[0] for times in answer["times"][: len(requests)])
            steps["beside" if block % 2 else "alone"] += answer["steps"]
            cold = [*(request[0] for request in extra), *cold]
    p95 = [float(np.percentile(times, 95)) for times in (alone, beside)]
    longest = [max(steps[kind]) for kind in ("alone", "beside")]
    return [
        row("p95 TTFT of resident adapters, beside cold ones / alone", "x", [p95[1] / p95[0]], at_most=1.2),
        row("longest engine step beside cold ones", "s", [longest[1]], at_most=round(1.2 * longest[0] + 0.005, 4)),
        row("  TTFT alone", "s", alone),
        row("  TTFT beside cold ones", "s", beside),
    ]


# -- engines ----------


@contextlib.contextmanager
def _engine(work: Path, folder: Path, kind: str, server: str) -> Iterator[LoRAEngine]:
    """An engine that ends with the block."""
    arguments = BASE | {"model": str(folder / "model"), "max_loras": SLOTS}
    if kind == "pool":
        arguments["max_loras"] = CLIENTS
        arguments["kv_transfer_config"] = {
            "kv_connector": "LoRACacheConnector", "kv_connector_module_path": "loracache.connectors.vllm",
            "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"server": server, "lora_pool": str(SLOTS * SLOT_BYTES)},
        }  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with LoRAEngine(arguments, folder, work / f"{kind}.log", {"BENCH_LORA": kind, "PYTHONPATH": path}) as engine:
        yield engine
