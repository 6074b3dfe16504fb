# SPDX-License-Identifier: Apache-2.0
"""`make demo`: watch a real vLLM find the KV it computed before, in memory and, after a restart, on disk.

A random Llama of 190 M parameters and two LoRA adapters are made (once); vLLM serves them with the LoRACache
connector and nothing else: the connector starts a daemon of its own. One prompt of 4,000 tokens is sent for the base
model, adapter A and adapter B:

    cold          nothing is cached: vLLM computes the prompt
    same engine   vLLM's own prefix cache is emptied first, so LoRACache answers, from memory (tier cpu)
    restarted     engine and daemon have ended, memory is gone: LoRACache answers from its files (tier disk)

The model runs in float32: in bfloat16 two cold runs of vLLM itself may differ, because the rounding of a sum depends on
how many tokens are computed together and a near tie then falls either way. "Tokens equal" would then speak of that and
not of the cache. `--dtype bfloat16` halves bytes and, about, times.

Then 24 adapters of mixed ranks share a pool that cannot hold them all (demo_lora.py).

Nothing in the table is assumed: the tier is read from the daemon's counters before and after each request; the cached
tokens and the time to the first token (TTFT) come from vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_model
from demo_lora import ADAPTERS, SLOTS, compare, lora_table
from engine_process import Adapter, Answer, EngineError, EngineProcess
from lora_adapters import adapters_folder
from rich.console import Console
from rich.table import Table

from loracache import CacheClient

PROMPT_TOKENS, WARM_UP_TOKENS, NEW_TOKENS = 4000, 500, 8
STEPS = 9
SETTLE_S = 0.2  # an engine reports what it counted shortly after
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request: vLLM's answer, the tiers that the daemon's counters name for it, and what its engine counted as
    failures meanwhile."""

    answer: Answer
    tiers: str
    failures: str


class Steps:
    """Numbered progress lines with their times; a spinner in between where somebody watches."""

    def __init__(self, count: int = STEPS) -> None:
        self._count = count
        self._number = 0

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that `text` is being done, then how long it took."""
        self._number += 1
        label = f"[{self._number}/{self._count}] {text}"
        started = time.monotonic()
        if console.is_terminal:
            with console.status(label.replace("[", r"\[", 1)):
                yield
        else:
            console.print(label, "...", markup=False)
            yield
        console.print(f"{label}  {time.monotonic() - started:.1f} s", markup=False)


def model_folder(work: Path) -> Path:
    """The model and two adapters, made where they are not there yet."""
    folder = work / "190m"
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        spec = make_model.PRESETS["190m"]
        make_model.make_model(folder / "model", spec)
        for number in range(2):
            make_model.make_adapter(folder / "adapters" / f"adapter-{number}", spec, seed=number + 1)
        done.touch()
    return folder


def engine_arguments(model: Path, disk: Path, dtype: str) -> dict[str, Any]:
    """What a user would give `vllm serve`; only `kv_transfer_config` is about LoRACache."""
    return {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": PROMPT_TOKENS + 200,
        "max_num_seqs": 4,
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 8,
        "seed": 0,
        "gpu_memory_utilization": 0.3,  # on a CPU: of the machine's memory, what vLLM insists on finding free
        "kv_transfer_config": {
            "kv_connector": "LoRACacheConnector",
            "kv_connector_module_path": "loracache.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"memory": "2GiB", "disk_path": str(disk), "disk": "8GiB"},
        },
    }


def prompt(name: str, length: int) -> list[int]:
    """Token ids that look like nothing else: the same ones whenever `name` is."""
    source = random.Random(name)
    return [source.randrange(300, 1000) for _ in range(length)]


def ask(engine: EngineProcess, tokens: list[int], adapter: Adapter | None) -> Seen:
    """One request, and which tiers the daemon says it hit meanwhile."""
    before = counters(engine)
    answer = engine.ask(tokens, adapter, max_tokens=NEW_TOKENS)
    grown = [name for name, count in counters(engine).items() if count > before.get(name, 0)]
    tiers = [name.removeprefix("hit.") for name in grown if name.startswith("hit.")] if answer.cached else []
    return Seen(answer, "+".join(tiers) or "none", ", ".join(name for name in grown if "hit." not in name))


def counters(engine: EngineProcess) -> dict[str, int]:
    """What the daemon has counted so far: objects found by lookups, by tier, and failures by cause."""
    time.sleep(SETTLE_S)
    with CacheClient(engine.server, name="demo") as client:
        found = client.status()["counters"]
    assert isinstance(found, dict)
    return {name: count for name, count in found.items() if name.startswith(("hit.", "failure.", "client."))}


def warm_up(engine: EngineProcess, who: dict[str, Adapter | None], name: str) -> None:
    """The first request of an adapter loads its weights, which takes seconds and is not what the demo shows."""
    for adapter in who.values():
        engine.ask(prompt(name, WARM_UP_TOKENS), adapter, max_tokens=NEW_TOKENS)


def settle(engine: EngineProcess) -> None:
    """Wait until what was computed is stored and written to disk, then empty vLLM's own prefix cache."""
    engine.reset_prefix_cache()  # waits for the stores
    with CacheClient(engine.server, name="demo") as client:
        client.flush(60)


def wait_for_daemon(server: str, seconds: float = 60) -> None:
    """The private daemon flushes and ends with its last client; its log goes last, after the disk's lock."""
    deadline = time.monotonic() + seconds
    while Path(server.removeprefix("unix://") + ".log").exists():
        if time.monotonic() > deadline:
            raise EngineError(f"the private daemon at {server} has not ended in {seconds:.0f} s")
        time.sleep(0.05)


def run(work: Path, disk: Path, dtype: str, verbose: bool) -> dict[str, list[Seen]]:
    """All requests: for base, A and B what was seen cold, from memory and from disk."""
    steps = Steps()
    tokens = prompt("the demo's prompt", PROMPT_TOKENS)
    with steps.step(f"Model of 190 M parameters and two adapters in {work}"):
        folder = model_folder(work)
    paths = [str(folder / "adapters" / f"adapter-{number}") for number in range(2)]
    who = {"base model": None, "adapter A": Adapter("A", 1, paths[0]), "adapter B": Adapter("B", 2, paths[1])}
    arguments = engine_arguments(folder / "model", disk, dtype)
    log = work / "engine.log"
    seen: dict[str, list[Seen]] = {name: [] for name in who}

    def ask_all(engine: EngineProcess) -> None:
        for name, adapter in who.items():
            seen[name].append(ask(engine, tokens, adapter))

    with steps.step("vLLM starts, and with it a private LoRACache daemon"):
        engine = EngineProcess(arguments, log=log, verbose=verbose)
    with engine:
        with steps.step("Adapters are loaded, the engine warms up on other prompts"):
            warm_up(engine, who, "first engine")
        with steps.step(f"Cold: {PROMPT_TOKENS:,} tokens as base model, adapter A, adapter B"):
            ask_all(engine)
        with steps.step("Same engine: vLLM's own prefix cache is emptied, the same requests again"):
            settle(engine)
            ask_all(engine)
        with steps.step("Engine and daemon end: what was in memory is gone, what was on disk stays"):
            engine.close()
            wait_for_daemon(engine.server)
    with steps.step("vLLM starts again"):
        engine = EngineProcess(arguments, log=log, verbose=verbose)
    with engine:
        with steps.step("Adapters are loaded, the engine warms up on other prompts"):
            warm_up(engine, who, "second engine")
        with steps.step("Restarted: the same requests once more"):
            ask_all(engine)
    wait_for_daemon(engine.server)
    return seen


def show_adapters(work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Many adapters through dense slots, and through as much memory in pages."""
    steps = Steps(3)
    console.print()
    with steps.step(f"{ADAPTERS} LoRA adapters of ranks 8, 16, 32 and 64"):
        adapters_folder(ADAPTERS)
    with steps.step(f"Stock vLLM with {SLOTS} dense slots serves them (its CPU kernel is slow)"):
        stock = compare(work, "stock")
    with steps.step("vLLM with lora_pool serves them from as much memory"):
        pool = compare(work, "pool")
    return stock, pool


def report(seen: dict[str, list[Seen]], dtype: str) -> bool:
    """Print the table and what it says; True where every token agrees and every hit was one."""
    table = Table(title=f"One prompt of {PROMPT_TOKENS:,} tokens, time to the first token (TTFT), {dtype}")
    for column in ("", "cold", "same engine", "tier", "restarted", "tier", "cached", "tokens equal"):
        table.add_column(column, justify="left" if column in ("", "tier") else "right", no_wrap=True)
    good = True
    for name, (cold, warm, disk) in seen.items():
        equal = cold.answer.tokens == warm.answer.tokens == disk.answer.tokens
        cached = sorted({warm.answer.cached, disk.answer.cached})
        good = good and equal and min(cached) > 0 and cold.answer.cached == 0
        table.add_row(
            name,
            f"{cold.answer.ttft:.2f} s",
            _hit(cold, warm),
            warm.tiers,
            _hit(cold, disk),
            disk.tiers,
            " / ".join(f"{count:,}" for count in cached),
            "yes" if equal else "NO",
        )
    console.print()
    console.print(table)
    return good


def _hit(cold: Seen, hit: Seen) -> str:
    return f"{hit.answer.ttft:.3f} s ({cold.answer.ttft / hit.answer.ttft:.0f}x)"


def closing_words(seen: dict[str, list[Seen]], good: bool) -> str:
    """What was seen, in two sentences."""
    where = "Read on in README.md and docs/."
    if not good:
        causes = sorted({one.failures for rows in seen.values() for one in rows if one.failures})
        counted = f" The daemon counted: {'; '.join(causes)}." if causes else ""
        return f"Something is not as it should be: a request missed the cache or its tokens differ.{counted} {where}"
    warm, disk = (sorted({rows[place].tiers for rows in seen.values()}) for place in (1, 2))
    return (
        f"vLLM computed the prompt once for each of base model, adapter A and adapter B, then found that KV again in "
        f"tier {'/'.join(warm)} and, after a restart, in tier {'/'.join(disk)}, never another's, with the same tokens "
        f"as without a cache. {where}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows LoRACache at work in a real vLLM.")
    default = Path(tempfile.gettempdir()) / f"loracache-demo-{os.getuid()}"
    parser.add_argument("--work", type=Path, default=default, help="folder of the model and the disk tier")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--verbose", action="store_true", help="show vLLM's log")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    disk = Path(tempfile.mkdtemp(prefix="disk-", dir=work))  # empty: what an earlier demo left would not be cold
    try:
        seen = run(work, disk, options.dtype, options.verbose)
    except EngineError as error:
        sys.exit(f"demo: {error}")
    finally:
        shutil.rmtree(disk, ignore_errors=True)
    good = report(seen, options.dtype)
    console.print(closing_words(seen, good))
    try:
        console.print(lora_table(*show_adapters(work)))
    except EngineError as error:
        sys.exit(f"demo: {error}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
