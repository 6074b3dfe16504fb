# SPDX-License-Identifier: Apache-2.0
"""What `loracache status` shows: a map of plain values, the same over the socket, as JSON and as a table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loracache.keys import LORA_NAMESPACE
from loracache.tiers import Tier

if TYPE_CHECKING:
    from loracache.cache.tier.io import TierIO
    from loracache.cache.tiered import TieredCache

__all__ = ["cache_status"]

_RECENT = 50
_DROPPED = ".dropped."
_HERE = (Tier.CPU, Tier.DISK)


def cache_status(cache: TieredCache) -> dict[str, Any]:
    """Tiers, leases and counters. Bytes are payload bytes unless the name says otherwise."""
    index, arena, counters = cache.index, cache.arena, cache.counters
    adapters = index.spaces.get(LORA_NAMESPACE)
    tiers: dict[str, Any] = {
        "cpu": {
            "objects": index.objects[Tier.CPU],
            "bytes": index.bytes[Tier.CPU],
            "limit_bytes": arena.size,
            "used_bytes": arena.size - arena.free_bytes,
            "populated_bytes": arena.populated,
        }
    }
    if arena.hugepages is not None:
        tiers["cpu"]["huge_bytes"] = arena.huge_bytes
    if cache.disk is not None:
        tiers["disk"] = {
            "objects": index.objects[Tier.DISK],
            "bytes": index.bytes[Tier.DISK],
            "limit_bytes": cache.disk.limit,
            "used_bytes": cache.disk.used,
            "queued_writes": cache.disk.writer.depth,
            "left_alone_objects": len(cache.disk.left_alone),
            "left_alone_bytes": cache.disk.left_alone_bytes,
            "direct_io": bool(getattr(cache.disk.io.backend, "direct", False)),
            "scanned": cache.disk.loaded,
        } | _use(cache.disk.io)
    if cache.redis is not None:
        io = cache.redis.io
        limit = {"used_bytes": io.used or 0, "limit_bytes": io.backend.limit} if io.backend.limit else {}
        tiers["redis"] = {"queued_writes": cache.redis.depth} | limit | _use(io)
    return {
        "tiers": tiers,
        "adapters": {tier.label: adapters.objects[tier] if adapters is not None else 0 for tier in _HERE},
        "speeds": _speeds(cache),
        "leases": len(cache.leases),
        "leased_objects": cache.leases.held_objects,
        "quarantined_bytes": cache.leases.quarantined,
        "hits": counters.starting("hit."),
        "misses": counters.starting("miss."),
        "failures": counters.starting("failure."),
        "evicted": _by_tier(counters.starting("evict.")),
        "not_admitted": _by_tier(counters.starting("not_admitted."), _dropped(counters.starting("write."))),
        "counters": counters.all(),
        "recent_failures": [
            {"time": event.time, "tier": event.tier, "cause": event.cause, "count": event.count}
            for event in list(cache.events.failures)[-_RECENT:]
        ],
    }


def _speeds(cache: TieredCache) -> dict[str, dict[str, Any]]:
    """What computing KV and loading it from the lower tiers takes: measured, or assumed by the policies still."""
    speeds = cache.quotas.speeds
    told: dict[str, dict[str, Any]] = {"prefill": _speed(speeds.prefill, 0.0, "prefill" in speeds.measured)}
    for writer in cache.writers:
        times, disk = writer.io.load_times, writer.io.tier is Tier.DISK
        if times.known or disk:
            bandwidth = times.bandwidth or (speeds.disk if disk else 0.0)
            told[writer.io.tier.label] = _speed(
                bandwidth, times.latency if times.known else speeds.disk_latency, times.known
            )
    return told


def _speed(bandwidth: float, latency: float, measured: bool) -> dict[str, Any]:
    return {"bytes_per_second": int(bandwidth), "latency_seconds": round(latency, 6), "measured": measured}


def _by_tier(*totals: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counts by tier and then by reason, of counts by "<tier>.<reason>"."""
    found: dict[str, dict[str, int]] = {}
    for name, count in itertools.chain(*(each.items() for each in totals)):
        tier, _, reason = name.partition(".")
        reasons = found.setdefault(tier, {})
        reasons[reason] = reasons.get(reason, 0) + count
    return found


def _dropped(writes: Mapping[str, int]) -> dict[str, int]:
    """Writes that were queued and did not happen: by "<tier>.<reason>"."""
    return {name.replace(_DROPPED, ".", 1): count for name, count in writes.items() if _DROPPED in name}


def _use(io: TierIO) -> dict[str, Any]:
    """Whether a tier is read and written now, and if not, why."""
    return {"available": io.available, "writable": io.writable, "reason": io.reason, "waiting": io.waiting}
