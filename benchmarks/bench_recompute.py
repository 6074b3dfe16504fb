# SPDX-License-Identifier: Apache-2.0
"""Load or compute: time to the first token of prompts that a Redis behind a slow link has, 190 M model, bfloat16.

1,030 tokens are 8 chunks, 32 MB of KV, which this engine computes at 20 to 30 MB/s. Each engine has a daemon of its
own, and one Redis a millisecond away behind a link of 16 MB/s (computing is faster) or 200 MB/s (loading is). It
computes eight prompts; then its own cache and the daemon's memory are emptied, and it is asked for each again, once.
The first three tell it what loading takes; the others count. Slower links are none for Redis (docs/operations.md).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_redis import redis_server
from common import Row, daemon, ratio_row, row, work_folder
from engines import fresh_prompt, settle, start_engine

TOKENS, CACHED = 1030, 1024
LEARNT = 3
DELAY_MS = 1.0
SLOW, FAST = 16.0, 200.0  # MB/s


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    prompts = LEARNT + (2 if quick else 5)
    cold, always = _asked(SLOW, prompts, recompute_if_faster=0)
    cold_too, chosen = _asked(SLOW, prompts)
    cold_fast, near = _asked(FAST, prompts)
    return [
        ratio_row("a link of 16 MB/s: TTFT, load or compute / cold", chosen, cold_too[LEARNT:], at_most=1.15),
        ratio_row("the same, all that is found is loaded / cold", always, cold[LEARNT:]),
        ratio_row("a link of 200 MB/s: TTFT, load or compute / cold", near, cold_fast[LEARNT:], at_most=0.5),
        row("  16 MB/s: cold", "s", cold + cold_too),
        row("  16 MB/s: all loaded", "s", always),
        row("  16 MB/s: load or compute", "s", chosen),
        row("  200 MB/s: load or compute", "s", near),
    ]


def _asked(rate: float, prompts: int, **options: Any) -> tuple[list[float], list[float]]:
    """TTFT in seconds of each prompt as it was computed first, and of those that were found once loads are known."""
    with work_folder() as folder, redis_server(folder) as path:
        here = folder / "far.sock"
        script = Path(__file__).with_name("far_redis.py")
        proxy = subprocess.Popen([sys.executable, str(script), str(here), str(path), str(DELAY_MS), str(rate)])
        try:
            while not here.exists() and proxy.poll() is None:
                time.sleep(0.01)
            with (
                daemon(folder, memory="1GiB", redis=f"unix://{here}") as running,
                running.client() as client,
                start_engine(folder, "engine", running.url, **options) as engine,
            ):
                asked = [fresh_prompt(TOKENS) for _ in range(prompts)]
                cold = []
                for tokens in asked:
                    cold.append(engine.ask(tokens, max_tokens=1).ttft)
                    settle(engine, client)
                client.clear(tiers=["cpu"])
                found, times = _hits(client), []
                for tokens in asked:
                    answer = engine.ask(tokens, max_tokens=1)
                    times.append(answer.ttft)
                    if (now := _hits(client)) != found + CACHED // 128:
                        raise RuntimeError(f"lookups found {now - found} chunks in Redis, not {CACHED // 128}")
                    found = now
        finally:
            proxy.kill()
            proxy.wait()
    return cold, times[LEARNT:]


def _hits(client: Any) -> int:
    return int(client.status()["hits"].get("redis", 0))
