# SPDX-License-Identifier: Apache-2.0
"""An offline batch on a stock vLLM with its prefix cache (190 M model): what `loracache batch run` does beside all
requests sent at once in the file's order, as `vllm run-batch` does. Two batches: 24 groups of 8 whose prefixes are four
times the KV cache, shuffled; and prompts that share nothing. Both ways take turns on one server, whose prefix cache is
emptied before each. Computed tokens are vLLM's own count.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from socket import create_server
from typing import Any

from common import Row, model_folder, ratio_row, row, work_folder
from engine_process import environment

from loracache.batch.engine import Engine
from loracache.batch.http import Server
from loracache.batch.journal import Journal
from loracache.batch.lines import BatchFile
from loracache.batch.plan import make_plan
from loracache.batch.prompts import PromptHasher
from loracache.batch.replay import computed_at_least
from loracache.batch.runner import Limits, Runner, room_of
from loracache.errors import Unavailable

GROUPS, MEMBERS, PREFIX, TAIL, ANSWER = 24, 8, 768, 32, 8
ALONE, ALONE_TOKENS = 64, 400
BLOCK, BLOCKS, SEQUENCES = 32, 128, 16
START_S = 600.0


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    rounds = 1 if quick else 3
    with work_folder() as folder, _engine(folder) as url:
        rows = []
        for name, bodies, least in (("prefixes", _shared, 1.3), ("nothing shared", _alone, 0.99)):
            times: dict[str, list[float]] = {"file": [], "planned": []}
            computed: dict[str, list[float]] = {"file": [], "planned": []}
            for number in range(rounds):
                batch = bodies(number)
                for way in ("file", "planned") if number % 2 else ("planned", "file"):
                    spent, tokens = asyncio.run(_measured(url, way, batch, folder / f"{name}-{number}"))
                    times[way].append(spent)
                    computed[way].append(tokens / _bound(batch))
            what = f"{name}: throughput, planned / file's order"
            rows.append(ratio_row(what, times["file"], times["planned"], at_least=least))
            rows.append(row("  planned: the whole batch", "s", times["planned"]))
            rows.append(row("  in the file's order", "s", times["file"]))
            rows.append(row("  planned: prompt tokens computed / bound", "x", computed["planned"], at_most=1.02))
            rows.append(row("  in the file's order", "x", computed["file"]))
        return rows


def _bound(batch: list[dict[str, Any]]) -> int:
    """Prompt tokens that a cache without end leaves to compute."""
    hasher = PromptHasher(BLOCK)
    for body in batch:
        hasher.add(body["prompt"])
    plan = make_plan(hasher.prompts())
    return computed_at_least(plan.prompts, plan.tree)


def _shared(seed: int) -> list[dict[str, Any]]:
    chance = random.Random(f"shared {seed}")
    batch = []
    for _ in range(GROUPS):
        prefix = _text(chance, PREFIX)
        batch += [_body(prefix + _text(chance, TAIL)) for _ in range(MEMBERS)]
    chance.shuffle(batch)
    return batch


def _alone(seed: int) -> list[dict[str, Any]]:
    chance = random.Random(f"alone {seed}")
    return [_body(_text(chance, ALONE_TOKENS)) for _ in range(ALONE)]


def _text(chance: random.Random, tokens: int) -> list[int]:
    return [chance.randrange(300, 1000) for _ in range(tokens)]


def _body(prompt: list[int]) -> dict[str, Any]:
    return {"model": "base", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}


async def _measured(url: str, way: str, batch: list[dict[str, Any]], path: Path) -> tuple[float, float]:
    """(seconds, prompt tokens computed) of a batch sent one way."""
    server = Server(url)
    await server.post("/reset_prefix_cache", {})
    before = await _computed(server)
    source, output = path.with_suffix(".jsonl"), path.with_suffix(".out")
    lines = [{"custom_id": str(n), "url": "/v1/completions", "body": body} for n, body in enumerate(batch)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with contextlib.closing(BatchFile(str(source))) as file:
        journal = Journal(output, file.digest)
        engine = Engine(server)
        runner = Runner(file, journal, [engine], await room_of([engine], None, None), Limits(SEQUENCES))
        began = time.perf_counter()
        if way == "planned":
            report = await runner.run()
            assert not report.errors
        else:
            answers = await asyncio.gather(*(server.post("/v1/completions", body) for body in batch))
            assert all(answer.status == 200 for answer in answers)
        spent = time.perf_counter() - began
        journal.finish("input")
        output.unlink()
    computed = await _computed(server) - before
    await server.close()
    return spent, computed


async def _computed(server: Server) -> float:
    """Prompt tokens that vLLM has computed since it began."""
    text = str((await server.get("/metrics")).body)

    def counted(name: str) -> float:
        return sum(
            float(each) for each in re.findall(rf"^vllm:{name}_total\{{[^}}]*\}} ([\d.e+]+)$", text, re.MULTILINE)
        )

    return counted("prompt_tokens") - counted("prefix_cache_hits")


@contextlib.contextmanager
def _engine(folder: Path) -> Iterator[str]:
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder() / "model"),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
        "--max-model-len", "2048", "--max-num-seqs", str(SEQUENCES), "--block-size", str(BLOCK),
        "--num-gpu-blocks-override", str(BLOCKS),
    ]  # fmt: skip
    log = folder / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment({"VLLM_SERVER_DEV_MODE": "1"}),
            start_new_session=True,
        )
    try:
        asyncio.run(_healthy(f"http://127.0.0.1:{port}", process, log))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


async def _healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        server = Server(url)
        try:
            if (await server.get("/health", 5.0)).status == 200:
                return
        except Unavailable:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the engine does not answer: {log.read_text()[-3000:]}") from None
        finally:
            await server.close()
        await asyncio.sleep(0.5)
