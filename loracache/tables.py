"""Draws what a daemon says of itself and of its adapters as tables for a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from loracache.client import Adapter

__all__ = ["print_adapter", "print_adapters", "print_status", "size_text"]


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


def print_adapters(adapters: Sequence[Adapter]) -> None:
    """`loracache adapters list` on standard output."""
    table = Table("name", "digest", "size", "tiers", "KV objects", "KV bytes")
    for adapter in adapters:
        objects, nbytes = _most_kv(adapter)
        tiers = ", ".join(adapter.tiers) or "none"
        table.add_row(
            adapter.name, adapter.digest[:12], size_text(adapter.size), tiers, str(objects), size_text(nbytes)
        )
    Console().print(table)


def print_adapter(adapter: Adapter) -> None:
    """`loracache adapters show` on standard output."""
    console = Console(highlight=False, markup=False)
    added = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(adapter.added)) if adapter.added else "-"
    console.print(f"name     {adapter.name or '-'}\ndigest   {adapter.digest}\nadded    {added}")
    console.print(f"size     {size_text(adapter.size)}\ntiers    {', '.join(adapter.tiers) or 'none'}")
    console.print(f"engines  {adapter.engines}")
    for tier, (objects, nbytes) in adapter.kv.items():
        console.print(f"KV       {objects} objects, {size_text(nbytes)} in {tier}")
    if adapter.config:
        console.print(adapter.config)


def _most_kv(adapter: Adapter) -> tuple[int, int]:
    """Objects and bytes of dependent KV in the tier that has most of it."""
    return max(adapter.kv.values(), default=(0, 0))
