# SPDX-License-Identifier: Apache-2.0
"""Draws how a run went over time: requests answered, prompt tokens computed and from the cache, requests under way.

By matplotlib, the extra `plot`, which is imported when something is drawn.
"""

from __future__ import annotations

from pathlib import Path

from loracache.batch.report import Report
from loracache.errors import ConfigError

__all__ = ["plot"]


def plot(path: Path, report: Report, title: str) -> None:
    """Draw into `path`, .png or .svg. Raises ConfigError where the file cannot be written."""
    from matplotlib.figure import Figure

    samples = report.samples
    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle(title)
    requests, tokens, running = figure.subplots(3, 1, sharex=True)
    requests.plot(samples.seconds, samples.answered)
    requests.set_ylabel("requests answered")
    computed = [all_ - cached for all_, cached in zip(samples.prompt_tokens, samples.cached_tokens, strict=True)]
    name = "computed" if report.says_cached else "computed or from the cache (the engines do not say)"
    parts = [computed, samples.cached_tokens] if report.says_cached else [computed]
    tokens.stackplot(samples.seconds, *parts, labels=[name, "from the cache"][: len(parts)])
    if report.plan:
        tokens.axhline(report.plan["bound"], linestyle="--", color="black", label="computed at least")
        tokens.axhline(report.plan["first_come"], linestyle=":", color="black", label="computed in the file's order")
    tokens.set_ylabel("prompt tokens")
    tokens.legend(loc="upper left")
    running.step(samples.seconds, samples.running, where="post")
    running.set_ylabel("requests under way")
    running.set_xlabel("seconds")
    for axes in (requests, tokens, running):
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, axis="y", alpha=0.3)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}") from None
