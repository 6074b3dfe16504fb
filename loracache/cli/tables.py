# SPDX-License-Identifier: Apache-2.0
"""Draws answers for people: tables by rich on a terminal, plain aligned text where the output goes elsewhere."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from loracache.client.answers import Adapter
from loracache.tiers import tier_state

__all__ = [
    "causes_text", "on_terminal", "print_adapter", "print_adapters", "print_quotas", "print_status", "print_table",
    "print_values", "shown", "size_text", "time_text",
]  # fmt: skip

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHORT = 12  # digits of a digest on a terminal
_BATCH = 1000  # rows that are held, to align them


def size_text(nbytes: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def time_text(seconds: float) -> str:
    """Unix seconds for people, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def causes_text(causes: dict[str, int]) -> str:
    """Counts by cause: "absent 2, held 1", or "none"."""
    return ", ".join(f"{cause} {count}" for cause, count in causes.items()) or "none"


def on_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def shown(value: object) -> str:
    """A value in one line without control characters, which could make a terminal do something; digests are cut
    short on a terminal, and whole elsewhere."""
    text = "".join(each if each.isprintable() else "?" for each in str(value))
    return _DIGEST.sub(lambda found: found[0][:_SHORT], text) if on_terminal() else text


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows on standard output as they come, a thousand at a time. Columns whose name starts with ">" are numbers."""
    names = [name.removeprefix(">") for name in columns]
    right = [name.startswith(">") for name in columns]
    cells = ([shown(cell) for cell in row] for row in rows)
    widths = [len(name) for name in names]
    batch = list(itertools.islice(cells, _BATCH))
    if on_terminal():
        _draw(names, right, batch)
        while batch := list(itertools.islice(cells, _BATCH)):
            _draw(names, right, batch)
        return
    batch.insert(0, names)
    while batch:
        widths = [max(width, *(len(row[at]) for row in batch)) for at, width in enumerate(widths)]
        for row in batch:
            padded = (
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(row, widths, right, strict=True)
            )
            sys.stdout.write("  ".join(padded).rstrip() + "\n")
        batch = list(itertools.islice(cells, _BATCH))


def print_values(values: Iterable[tuple[str, object]]) -> None:
    """Names and values, one a line."""
    lines = [(name, shown(value)) for name, value in values]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        sys.stdout.write(f"{name:<{width}}  {value}".rstrip() + "\n")


def print_status(status: dict[str, Any]) -> None:
    """The answer of `CacheClient.status` on standard output."""
    sys.stdout.write(
        f"LoRACache {status['version']}  pid {status['pid']}  up {status['uptime_s']:.0f} s  "
        f"{status['connections']} connections  {status['leases']} leases  {status['socket']}\n"
    )
    rows = []
    for name, tier in status["tiers"].items():
        used = f"{size_text(tier['used_bytes'])} of {size_text(tier['limit_bytes'])}" if "limit_bytes" in tier else "-"
        size = size_text(tier["bytes"]) if "bytes" in tier else "-"
        state = tier_state(tier)
        queued = tier.get("queued_writes", "-")
        rows.append((name, tier.get("objects", "-"), size, used, status["hits"].get(name, 0), queued, state))
    print_table(["tier", ">objects", ">bytes", ">used of limit", ">hits", ">to write", "state"], rows)
    for name, tier in status["tiers"].items():
        if "huge_bytes" in tier:
            sys.stdout.write(f"{name}: {size_text(tier['huge_bytes'])} in huge pages\n")
        if tier.get("reason"):
            sys.stdout.write(f"{name}: {tier['reason']}\n")
    speeds = (_speed_text(name, speed) for name, speed in status["speeds"].items())
    sys.stdout.write(f"speeds: {', '.join(speeds)}\n")
    for title in ("misses", "failures"):
        sys.stdout.write(f"{title}: {causes_text(status[title])}\n")
    for title, by_tier in (("evicted from", status["evicted"]), ("not admitted to", status["not_admitted"])):
        for tier, reasons in by_tier.items():
            sys.stdout.write(f"{title} {tier}: {causes_text(reasons)}\n")


def _speed_text(name: str, speed: dict[str, Any]) -> str:
    """ "disk 1.9 GiB/s after 0.4 ms", with "(assumed)" where it was not measured."""
    latency = f" after {1e3 * speed['latency_seconds']:.1f} ms" if speed["latency_seconds"] else ""
    return f"{name} {size_text(speed['bytes_per_second'])}/s{latency}{'' if speed['measured'] else ' (assumed)'}"


def print_adapters(adapters: Iterable[Adapter]) -> None:
    """`loracache adapters list` on standard output."""
    rows = (
        (each.name, each.digest, size_text(each.size), ", ".join(each.tiers) or "none", objects, size_text(nbytes))
        for each in adapters
        for objects, nbytes in [max(each.kv.values(), default=(0, 0))]  # of the tier that has most of it
    )
    print_table(["name", "digest", ">size", "tiers", ">KV objects", ">KV bytes"], rows)


def print_adapter(adapter: Adapter) -> None:
    """`loracache adapters show` on standard output."""
    added = time_text(adapter.added) if adapter.added else "-"
    sys.stdout.write(f"name     {adapter.name or '-'}\ndigest   {adapter.digest}\nadded    {added}\n")
    sys.stdout.write(f"size     {size_text(adapter.size)}\ntiers    {', '.join(adapter.tiers) or 'none'}\n")
    sys.stdout.write(f"engines  {adapter.engines}\npriority {adapter.priority}\n")
    for tier, (objects, nbytes) in adapter.kv.items():
        sys.stdout.write(f"KV       {objects} objects, {size_text(nbytes)} in {tier}\n")
    if adapter.config:
        sys.stdout.write(f"{adapter.config}\n")


def print_quotas(quotas: Iterable[dict[str, Any]]) -> None:
    """`loracache quota list` on standard output."""
    rows = (
        (
            each["kind"],
            ", ".join(each["names"]) or each["name"],
            each["tier"],
            size_text(each["soft"]),
            size_text(each["hard"]) if each["hard"] is not None else "-",
            size_text(each["bytes"]) if each["name"] != "*" else "-",
            each["refused"],
            each["evicted"],
        )
        for each in quotas
    )
    print_table(["of", "name", "tier", ">share", ">limit", ">used", ">refused", ">evicted"], rows)


def _draw(names: Sequence[str], right: Sequence[bool], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name, number in zip(names, right, strict=True):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
