# SPDX-License-Identifier: Apache-2.0
"""What a change costs: the same benchmarks in two checkouts, in turn, and the ratio of their medians.

    python benchmarks/compare.py BEFORE AFTER --only lookup --only disk --rounds 5

BEFORE and AFTER are folders of this project, each with its own `make setup`. Each round runs both, quick, the other
first every time, so that a machine that slows down slows both; a row is the median of the rounds' ratios. Ratios within
their own spread are noise. Rows that are ratios already, or that only one checkout has, are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

Figures = dict[tuple[str, str], float]  # (benchmark, what) -> median, in the row's own unit


def measure(checkout: Path, names: list[str]) -> Figures:
    """One quick run in a checkout."""
    only = [word for name in names for word in ("--only", name)]
    with tempfile.TemporaryDirectory() as results:
        command = [".venv/bin/python", "benchmarks/run.py", "--quick", "--results", results, *only]
        done = subprocess.run(
            command, check=False, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        files = list(Path(results).glob("*.json"))
        if done.returncode or not files:
            sys.exit(f"{checkout}: {' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
        found = json.loads(files[0].read_text())["benchmarks"]
    return {
        (name, f"{row['what']}, {row['unit']}"): row["median"]
        for name, result in found.items()
        for row in result["rows"]
        if row["unit"] != "x" and row["median"]
    }


def ratios(before: Path, after: Path, names: list[str], rounds: int) -> dict[tuple[str, str], list[float]]:
    """after / before of each figure, one a round."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(rounds):
        order = [before, after] if number % 2 == 0 else [after, before]
        figures = {checkout: measure(checkout, names) for checkout in order}
        for key in figures[before].keys() & figures[after].keys():
            found[key].append(figures[after][key] / figures[before][key])
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares two checkouts.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--only", action="append", metavar="NAME", required=True, help="a benchmark of benchmarks/run.py"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shown = Table("", "", "after / before", "lowest", "highest")
    found = ratios(options.before.resolve(), options.after.resolve(), options.only, options.rounds)
    for (name, what), each in sorted(found.items()):
        shown.add_row(name, what, *(f"{value:.3f}" for value in (statistics.median(each), min(each), max(each))))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(shown)


if __name__ == "__main__":
    main()
