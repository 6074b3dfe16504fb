# SPDX-License-Identifier: Apache-2.0
"""What `loracache batch` shows: a plan's figures, a bar while a batch runs, and what came of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from loracache.batch.plan import Figures
    from loracache.batch.report import Report

__all__ = ["print_figures", "print_report", "progress", "report_line"]


def print_figures(figures: Figures) -> None:
    """`loracache batch plan` on standard output."""
    from loracache.cli.tables import print_table

    typer.echo(
        f"{figures.requests:,} requests, {figures.tokens:,} prompt tokens, of which {figures.shared:,} are shared; "
        f"{figures.groups:,} groups; KV cache of {figures.kv_tokens:,} tokens"
    )
    ways = (
        ("in the file's order", figures.first_come),
        ("in a plain walk down the tree", figures.depth_first),
        ("in the plan's order", figures.planned),
        ("at least", figures.bound),
    )
    rows = [
        (name, f"{count:,}", f"{count - figures.bound:,}", f"{count / max(figures.bound, 1):.3f}")
        for name, count in ways
    ]
    print_table(["prompt tokens computed", ">tokens", ">again", ">of the least"], rows)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Report], None]]:
    """A bar on a terminal's standard error; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda report: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("requests, {task.fields[tokens]},"), TimeRemainingColumn(),
        TextColumn("left"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, tokens=_tokens_text(None))
        yield lambda report: bar.update(
            task, total=report.requests or None, completed=report.done, tokens=_tokens_text(report)
        )


def _tokens_text(report: Report | None) -> str:
    if report is None or not report.prompt_tokens:
        return "planning"
    saved = f", {report.cached_tokens:,} of them saved" if report.says_cached else ""
    return f"{report.prompt_tokens:,} prompt tokens{saved}"


def print_report(report: Report) -> None:
    """What came of a batch, on standard output."""
    from loracache.cli.tables import print_table

    computed = report.prompt_tokens - report.cached_tokens
    rows = [
        ("requests answered", report.answered),
        ("  of earlier runs", report.resumed),
        ("errors", report.errors),
        ("retries", report.retries),
        ("prompt tokens", report.prompt_tokens),
        *([("  computed", computed), ("  from the cache", report.cached_tokens)] if report.says_cached else []),
    ]
    if report.plan:
        rows += [
            ("  computed, by the plan", report.plan["planned"]),
            ("  computed, at least", report.plan["bound"]),
            ("  computed, in the file's order", report.plan["first_come"]),
        ]
    rows.append(("tokens of answers", report.completion_tokens))
    texts = [(name, f"{count:,}") for name, count in rows]
    print_table(["batch", ">"], [*texts, ("seconds", f"{report.seconds:.1f}")])
    if len(report.engines) > 1:
        names = ("answered", "prompt_tokens", "cached_tokens", "taken_over", "lost")
        print_table(
            ["engine", ">answered", ">prompt tokens", ">from the cache", ">taken over", ">times lost"],
            [(each.url, *(f"{getattr(each, name):,}" for name in names)) for each in report.engines],
        )


def report_line(report: Report) -> str:
    """The same in one line, for standard error where standard output holds the answers."""
    cached = f", {report.cached_tokens:,} of them from the cache" if report.says_cached else ""
    resumed = f", {report.resumed:,} of earlier runs" if report.resumed else ""
    return (
        f"{report.answered:,} answered, {report.errors:,} errors, {report.retries:,} retries{resumed}; "
        f"{report.prompt_tokens:,} prompt tokens{cached}; {report.completion_tokens:,} tokens of answers; "
        f"{report.seconds:.1f} s"
    )
