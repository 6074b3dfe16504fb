# SPDX-License-Identifier: Apache-2.0
"""Time to the first token of 4,000 tokens, 190 M model, bfloat16: cold, hit in L1, hit in vLLM's own prefix cache.

One engine, no adapter. Every round takes a fresh prompt cold, then empties vLLM's cache and asks twice: the first is
answered from L1, the second by vLLM itself; that pair three times.
"""

from __future__ import annotations

from common import Row, daemon, ratio_row, row, work_folder
from engines import CACHED, expect, fresh_prompt, settle, start_engine

PAIRS = 3
COLD, LOCAL = 1 / 25, 1.5


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    cold: list[float] = []
    hits: list[float] = []
    local: list[float] = []
    with (
        work_folder() as folder,
        daemon(folder, memory="2GiB") as running,
        running.client() as client,
        start_engine(folder, "engine", running.url) as engine,
    ):
        for number in range(-1, 2 if quick else 9):
            tokens = fresh_prompt()
            first = expect(engine.ask(tokens, max_tokens=1), 0, "cold")
            pairs = []
            for _ in range(PAIRS):
                settle(engine, client)
                before = _loaded(client)
                hit = expect(engine.ask(tokens, max_tokens=1), CACHED, "hit in L1")
                between = _loaded(client)
                own = expect(engine.ask(tokens, max_tokens=1), CACHED, "hit in vLLM's own cache")
                if between != before + CACHED // 128 or _loaded(client) < between:
                    raise RuntimeError(f"lookups found {between - before} chunks in L1, not {CACHED // 128}")
                pairs.append((hit, own))
            if number >= 0:  # the first round warms up
                cold.append(first)
                hits += [hit for hit, _ in pairs]
                local += [own for _, own in pairs]
    per_round = [first for first in cold for _ in range(PAIRS)]
    return [
        ratio_row("TTFT hit in L1 / cold", hits, per_round, at_most=COLD),
        ratio_row("TTFT hit in L1 / hit in vLLM's own cache", hits, local, at_most=LOCAL),
        row("  cold", "s", cold),
        row("  hit in L1", "s", hits),
        row("  hit in vLLM's own cache", "s", local),
    ]


def _loaded(client: object) -> int:
    """Chunks that lookups found in L1 so far."""
    hits = client.status()["hits"]  # type: ignore[attr-defined]
    return int(hits.get("cpu", 0))
