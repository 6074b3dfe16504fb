"""Draws a daemon's status as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_status", "size_text"]


def size_text(nbytes: int) -> str:
    """Bytes for people: "1.5 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def print_status(status: dict[str, Any]) -> None:
    """The answer of `CacheClient.status` on standard output."""
    console = Console()
    console.print(
        f"LoRACache {status['version']}  pid {status['pid']}  up {status['uptime_s']:.0f} s  "
        f"{status['connections']} connections  {status['leases']} leases  {status['socket']}"
    )
    table = Table("tier", "objects", "bytes", "used of limit", "hits", "to write", "state")
    for name, tier in status["tiers"].items():
        used = f"{size_text(tier['used_bytes'])} of {size_text(tier['limit_bytes'])}" if "limit_bytes" in tier else "-"
        table.add_row(
            name,
            str(tier.get("objects", "-")),
            size_text(tier["bytes"]) if "bytes" in tier else "-",
            used,
            str(status["hits"].get(name, 0)),
            str(tier.get("queued_writes", "-")),
            "ok" if tier.get("available", True) else "left alone after a failure",
        )
    console.print(table)
    for title in ("misses", "failures"):
        causes = ", ".join(f"{cause} {count}" for cause, count in status[title].items()) or "none"
        console.print(f"{title}: {causes}")
