# SPDX-License-Identifier: Apache-2.0
"""What the connector costs a request that hits nothing: cold TTFT of 4,000 tokens with it and without.

Two engines stay up, one works at a time, each pair asks both for the same fresh prompt and every other pair in the
reverse order. That is fair only while the idle engine really is idle: its processor time is measured and shown. The
engine with the connector runs `TracedConnector`, which adds a clock around each of the connector's methods.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from common import Row, bootstrap_ratio, daemon, row, work_folder
from engine_process import EngineProcess
from engines import expect, fresh_prompt, settle, start_engine
from traced_connector import Spans

PAIRS, QUICK_PAIRS = 15, 2
RATIO, SPANS_MS = 1.02, 50.0
IDLE_S = 2.0  # a vLLM worker polls at full speed for a second after its last step


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    with (
        work_folder() as folder,
        daemon(folder, memory="512MiB") as running,
        running.client() as client,
        start_engine(folder, "with", running.url, connector="TracedConnector") as on,
        start_engine(folder, "without", None) as off,
    ):
        times: dict[str, list[float]] = {"on": [], "off": []}
        idle: list[float] = []
        spans: list[dict[str, float]] = []
        reader = Spans(folder)
        for number in range(-1, QUICK_PAIRS if quick else PAIRS):
            tokens = fresh_prompt()
            pair: dict[str, float] = {}
            for name in ("on", "off") if number % 2 else ("off", "on"):
                engine, other = (on, off) if name == "on" else (off, on)
                before = reader.totals()
                pair[name], busy = _ask(engine, other, tokens)
                settle(engine, client if name == "on" else None)
                if number >= 0:
                    idle.append(busy)
                    if name == "on":
                        spans.append({method: spent - before[method] for method, spent in reader.totals().items()})
            if number >= 0:  # the first pair warms up
                for name, spent in pair.items():
                    times[name].append(spent)
    return _rows(times, spans, idle)


def _ask(engine: EngineProcess, other: EngineProcess, tokens: list[int]) -> tuple[float, float]:
    """(cold TTFT, share of one core that the other engine used meanwhile)."""
    time.sleep(IDLE_S)
    before = _processor_seconds(other.pid)
    ttft = expect(engine.ask(tokens, max_tokens=1), 0, "cold")
    return ttft, 100 * (_processor_seconds(other.pid) - before) / ttft


def _rows(times: dict[str, list[float]], spans: list[dict[str, float]], idle: list[float]) -> list[Row]:
    ratio, low, high = bootstrap_ratio(times["on"], times["off"])
    totals = [1e3 * sum(one.values()) for one in spans]
    longest = sorted(spans[0], key=lambda method: -sum(one[method] for one in spans))[:4]
    note = "spread: 95 % confidence interval, from resampled pairs"
    return [
        Row(
            "cold TTFT with the connector / without",
            "x",
            ratio,
            (low, high),
            len(times["on"]),
            f"interval reaches {RATIO:g} or less",
            low <= RATIO,
            note,
        ),
        row("  cold TTFT with", "s", times["on"]),
        row("  cold TTFT without", "s", times["off"]),
        row("connector's own spans, a request", "ms", totals, at_most=SPANS_MS),
        *(row(f"  {method}", "ms", [1e3 * one[method] for one in spans]) for method in longest),
        row("  the idle engine meanwhile", "% of a core", idle),
    ]


def _processor_seconds(session: int) -> float:
    """Processor time of all processes in a session."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
