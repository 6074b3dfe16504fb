# SPDX-License-Identifier: Apache-2.0
"""Draws runs: hit rate and time to the first token over memory, or by policy where there is one memory.

By matplotlib, the extra `plot`, which is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracache.errors import ConfigError

__all__ = ["Drawn", "plot"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Drawn:
    """One run: memory in bytes, shares, seconds."""

    label: str
    memory: int
    hit_rate: float
    ttft_mean: float


def plot(path: Path, runs: Sequence[Drawn], belady: Mapping[int, float], title: str) -> None:
    """Draw into `path`. belady: the bound by memory. Raises ConfigError where the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.set_ylabel("hit rate (tokens)")
    right.set_ylabel("mean time to first token, s")
    memories = sorted({run.memory for run in runs})
    if len(memories) > 1:
        _lines(left, right, runs, belady)
    else:
        _bars(left, right, runs, belady)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, axis="y", alpha=0.3)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}") from None


def _lines(left: Any, right: Any, runs: Sequence[Drawn], belady: Mapping[int, float]) -> None:
    for label in dict.fromkeys(run.label for run in runs):
        line = sorted((run for run in runs if run.label == label), key=lambda run: run.memory)
        sizes = [run.memory / _GIB for run in line]
        left.plot(sizes, [run.hit_rate for run in line], marker="o", label=label)
        right.plot(sizes, [run.ttft_mean for run in line], marker="o", label=label)
    if belady:
        left.plot([size / _GIB for size in belady], list(belady.values()), linestyle="--", color="gray", label="belady")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("memory, GiB")
    left.legend()


def _bars(left: Any, right: Any, runs: Sequence[Drawn], belady: Mapping[int, float]) -> None:
    labels = [run.label for run in runs]
    left.bar(labels, [run.hit_rate for run in runs])
    right.bar(labels, [run.ttft_mean for run in runs])
    for bound in belady.values():
        left.axhline(bound, linestyle="--", color="gray", label="belady")
        left.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=30)
