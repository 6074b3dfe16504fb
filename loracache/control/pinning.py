# SPDX-License-Identifier: Apache-2.0
"""Pins and unpins what was selected, a part at a time. What shall stay on disk and is in memory alone is written there
first, whatever admission says. Threading: coroutines on the event loop, which serves others between two parts.
"""

from __future__ import annotations

from collections.abc import Iterator

from loracache.cache.tiered import TieredCache
from loracache.control.jobs import Operation
from loracache.control.steps import turn
from loracache.control.transfer import flushed
from loracache.results import Cause
from loracache.tiers import Tier

__all__ = ["pin", "unpin"]

Parts = Iterator[list[bytes]]


async def pin(cache: TieredCache, operation: Operation, parts: Parts, tier: Tier, ttl: float | None) -> None:
    """Keep objects in `tier` for `ttl` seconds, or until unpinned."""
    for keys in operation.while_running(parts):
        if tier is Tier.DISK:
            await _write(cache, keys)
        _count(operation, keys, cache.pins.pin(keys, tier, ttl))
        await turn()


async def unpin(cache: TieredCache, operation: Operation, parts: Parts, tier: Tier) -> None:
    """End pins."""
    for keys in operation.while_running(parts):
        _count(operation, keys, cache.pins.unpin(keys, tier))
        await turn()


def _count(operation: Operation, keys: list[bytes], changed: int) -> None:
    operation.objects += changed
    operation.skip(Cause.ABSENT, len(keys) - changed)


async def _write(cache: TieredCache, keys: list[bytes]) -> None:
    """What the arena has of `keys` and the disk lacks, as far as the disk takes it."""
    nodes = [node for node in map(cache.index.get, keys) if node is not None and node.held_in(Tier.CPU)]
    missing = [node for node in nodes if not node.held_in(Tier.DISK)]
    if cache.disk is not None and missing:
        for node in missing:
            cache.disk.queue_write(node)
        await flushed(cache.disk.writer)
