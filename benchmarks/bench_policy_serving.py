# SPDX-License-Identifier: Apache-2.0
"""Chats with 20 adapters on vLLM, in memory for a third of adapters and KV: `adaptive` beside `lru`, and beside vLLM
without a cache, which splits its memory between slots for adapters (20 %, what FASTLIBRA compares with) and blocks.

A 53 M model, bfloat16; adapters of ranks 8, 16, 32 and 64, asked for by Zipf's law, one for each session. Half of the
sessions end after their first prompt of 384 to 1,024 tokens, the others have three to six turns, each behind the one
before and its answer. All have as much memory: vLLM alone slots of rank 64 and blocks; the others blocks and pages for
any two requests at once, so that none waits for another's, and the rest as a daemon's arena, where adapters take what
they have and share the room with KV. The files that vLLM alone reads adapters from are in the system's page cache,
which nobody counts here.
Slots with our CPU kernel: vLLM's own takes a second a request, which says nothing about memory. The three engines are
up all the time and take turns, each round with new sessions for all of them, the first one another every round.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_serving import BLOCK, MODEL
from common import MIB, Daemon, Row, daemon, ratio_row, row, work_folder
from lora_engine import LoRAEngine
from make_model import linear_shapes, make_adapter, make_model

from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import own_adapters, read_trace

ADAPTERS, RANKS = 20, (8, 16, 32, 64)
SESSIONS, TURNS = 52, (1, 1, 1, 3, 4, 6)
FIRST, TURN, LONGEST, OUTPUT = (384, 1024), (64, 192), 1528, 8  # tokens
CLIENTS = 2
ROUNDS = 3
SHARE = 3  # of adapters and KV together the memory holds one part in so many
SPLIT = 0.2  # of it vLLM alone has for adapters
ALONE, LRU, ADAPTIVE = "vLLM alone", "lru", "adaptive"
RANK_BYTES = 2 * MODEL.layers * sum(sum(shape) for shape in linear_shapes(MODEL).values())
SLOT_BYTES = max(RANKS) * RANK_BYTES
BLOCK_BYTES = BLOCK * 2 * 2 * MODEL.layers * MODEL.kv_heads * MODEL.head_dim
RUNNING = CLIENTS * -(-(LONGEST + OUTPUT) // BLOCK)  # blocks
POOL_BYTES = CLIENTS * SLOT_BYTES * 17 // 16  # and what the last page of each leaves

Asked = list[Any]  # [adapter, tokens, tokens of the answer, at], as lora_engine.py takes it


class Load(NamedTuple):
    """What a round took: seconds to the first token of each request, and the share of prompt tokens not computed."""

    times: list[float]
    cached: float


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    sessions, rounds = (12, 1) if quick else (SESSIONS, ROUNDS)
    memory = _working_set(chats(0, sessions)) // SHARE
    found: dict[str, list[Load]] = {}
    with work_folder() as folder:
        with contextlib.ExitStack() as stack:
            engines, recorded = _engines(folder, _model_and_adapters(), memory, stack)
            for engine in engines.values():
                engine.run([[adapter, 8, 1, 0.0] for adapter in range(ADAPTERS)], 1)  # what first requests pay for
            names = list(engines)
            for number in range(rounds):
                load = chats(number, sessions)
                first = number % len(names)
                for name in (*names[first:], *names[:first]):
                    taken = _serve(engines[name], load)
                    found.setdefault(name, []).append(taken)
                    mean, last = _figure(taken, "mean"), _figure(taken, "p99")
                    told = f"TTFT {mean:.3f} s, p99 {last:.3f} s, {taken.cached:.3f} of the tokens found"
                    print(f"round {number + 1}, {name}: {told}", flush=True)  # takes long
        return [*_rows(found), *_replayed(recorded, sum(len(load.times) for load in found[LRU]))]


def chats(number: int, sessions: int) -> list[Asked]:
    """A round's requests in their order: sessions begin one after another, and come back after a while."""
    rng = random.Random(f"chats {number}")
    weights = [1 / (place + 1) for place in range(ADAPTERS)]
    turns: list[tuple[float, Asked]] = []
    for _ in range(sessions):
        (adapter,) = rng.choices(range(ADAPTERS), weights)
        tokens = _tokens(rng, rng.randint(*FIRST))
        at = rng.uniform(0, sessions)
        for turn in range(rng.choice(TURNS)):
            if turn:
                at += rng.uniform(0.05, 0.5) * sessions
                tokens = tokens + _tokens(rng, OUTPUT + rng.randint(*TURN))
            if len(tokens) <= LONGEST:
                turns.append((at, [adapter, tokens, OUTPUT, 0.0]))
    return [asked for _, asked in sorted(turns, key=lambda turn: turn[0])]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(300, 1000) for _ in range(count)]


def _rank(adapter: int) -> int:
    return RANKS[adapter % len(RANKS)]


def _working_set(load: list[Asked]) -> int:
    """Bytes of all adapters and of the KV of all whole blocks, each once."""
    chunks = {
        (adapter, tuple(tokens[: at + BLOCK]))
        for adapter, tokens, *_ in load
        for at in range(0, len(tokens) // BLOCK * BLOCK, BLOCK)
    }
    return sum(map(_rank, range(ADAPTERS))) * RANK_BYTES + len(chunks) * BLOCK_BYTES


def _serve(engine: LoRAEngine, load: list[Asked]) -> Load:
    times = engine.run(load, CLIENTS)["times"]
    return Load(
        [first for first, *_ in times], sum(cached for *_, cached in times) / sum(len(each[1]) for each in load)
    )


# -- what is shown ----------


def _rows(found: dict[str, list[Load]]) -> Iterator[Row]:
    for what in ("mean TTFT", "p99 TTFT"):
        taken = {name: [_figure(load, what) for load in loads] for name, loads in found.items()}
        for other in (LRU, ALONE):
            yield ratio_row(f"{what}, {ADAPTIVE} / {other}", taken[ADAPTIVE], taken[other])
        for name, values in taken.items():
            yield row(f"  {what}, {name}", "s", values)
    for name, loads in found.items():
        yield row(f"  tokens found, {name}", "", [load.cached for load in loads], note="of those asked")


def _figure(load: Load, what: str) -> float:
    return float(np.mean(load.times) if what.startswith("mean") else np.percentile(load.times, 99))


def _replayed(recorded: dict[str, tuple[Path, int]], sent: int) -> Iterator[Row]:
    """What the simulator says of each daemon's recorded requests, beside what that daemon found."""
    for name, (trace, memory) in recorded.items():
        requests = read_trace(trace)
        there = sum(request.tokens_of(0) * (request.held or 0) for request in requests)
        simulated = replay(requests, Sizes(memory, 0, 1, own_adapters(requests)), Way.parse(name)).hit_rate
        ratio = simulated * sum(request.tokens for request in requests) / max(1, there)
        yield row(f"  requests recorded / sent, {name}", "x", [len(requests) / sent])
        yield row(f"  found in the replay of its recording / by the daemon, {name}", "x", [ratio])


# -- engines ----------


def _model_and_adapters() -> Path:
    """model/ and a0, a1, ..., made where they are not there yet."""
    folder = Path(tempfile.gettempdir()) / f"loracache-chats-{os.getuid()}"
    if not (folder / "model" / "tokenizer.json").exists():
        make_model(folder / "model", MODEL)
    for number in range(ADAPTERS):
        if not (folder / f"a{number}" / "adapter_config.json").exists():
            make_adapter(folder / f"a{number}", MODEL, rank=_rank(number), seed=1000 + number, strength=0.2)
    return folder


def _engines(
    work: Path, folder: Path, memory: int, stack: contextlib.ExitStack
) -> tuple[dict[str, LoRAEngine], dict[str, tuple[Path, int]]]:
    """All of them by name, started, and each daemon's trace and arena; `stack` ends them."""
    slots = max(1, round(SPLIT * memory / SLOT_BYTES))
    blocks = (memory - slots * SLOT_BYTES) // BLOCK_BYTES
    arena = memory - RUNNING * BLOCK_BYTES - POOL_BYTES
    if arena < SLOT_BYTES or blocks < RUNNING:
        raise RuntimeError(f"{memory} bytes are too few; make the workload larger")
    print(f"{memory / MIB:.0f} MiB: {slots} slots and {blocks} blocks, or {RUNNING} blocks and {arena / MIB:.0f} MiB")
    engines = {ALONE: _engine(work, folder, ALONE, {"max_loras": slots, "max_cpu_loras": slots}, blocks, stack)}
    recorded = {}
    for policy in (LRU, ADAPTIVE):
        settings, trace = work / f"{policy}.yaml", work / f"{policy}.jsonl"
        settings.write_text(f"policy: {policy}\n")
        cache: Daemon = stack.enter_context(daemon(work, memory=arena, config=settings, record=trace))
        transfer = {
            "kv_connector": "LoRACacheConnector", "kv_connector_module_path": "loracache.connectors.vllm",
            "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"server": cache.url, "lora_pool": str(POOL_BYTES)},
        }  # fmt: skip
        more = {"max_loras": CLIENTS, "max_cpu_loras": ADAPTERS, "kv_transfer_config": transfer}
        engines[policy] = _engine(work, folder, policy, more, RUNNING, stack)
        recorded[policy] = trace, arena
    return engines, recorded


def _engine(
    work: Path, folder: Path, name: str, more: dict[str, Any], blocks: int, stack: contextlib.ExitStack
) -> LoRAEngine:
    arguments = {
        "model": str(folder / "model"), "dtype": "bfloat16", "max_model_len": LONGEST + OUTPUT, "block_size": BLOCK,
        "max_num_seqs": CLIENTS, "num_gpu_blocks_override": blocks, "enable_lora": True, "max_lora_rank": max(RANKS),
        "seed": 0, "gpu_memory_utilization": 0.3, "worker_extension_cls": "lora_probe.LoRAProbe",
    }  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    kind = "dense" if name == ALONE else "pool"
    environment = {"BENCH_LORA": kind, "PYTHONPATH": path}
    return stack.enter_context(LoRAEngine(arguments | more, folder, work / f"{name}.log", environment))
