# SPDX-License-Identifier: Apache-2.0
"""Between the messages and the cache: what a request's fields mean, and how answers and the audit log word what was
done. Pure functions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loracache.cache.eviction import Evicted
from loracache.cache.state.events import Event
from loracache.cache.state.index import Node
from loracache.control.jobs import Operation
from loracache.errors import UsageError
from loracache.namespaces import Namespaces
from loracache.results import Cause
from loracache.storage_backends.base import Kind, Outcome
from loracache.tiers import Tier

__all__ = [
    "audit_summary",
    "compressible_tier",
    "count_deletions",
    "count_evicted",
    "describe_event",
    "own_tier",
    "planes",
    "removable_tiers",
]

_PLANES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_ADAPTER_PLANES = 2  # most are bfloat16; another width compresses less, and is as lossless


def own_tier(name: str, tiers: Collection[Tier], ttl: float = 0.0) -> Tier:
    """The tier of that name. Raises UsageError where this daemon, which has `tiers`, does not have it, or where it
    holds nothing for a while (`ttl` seconds)."""
    tier = Tier.named(name)
    if tier not in tiers:
        why = "belongs to the engines" if tier is Tier.GPU else "is not configured here"
        known = ", ".join(each.label for each in sorted(tiers))
        raise UsageError(f"tier {tier.label!r} {why}; this daemon has {known}")
    if ttl and tier is not Tier.CPU:
        raise UsageError(
            f"ttl={ttl:g} is for tier 'cpu', not {tier.label!r}; leave it out, or pin what shall stay there"
        )
    return tier


def compressible_tier(name: str, tiers: Collection[Tier]) -> Tier:
    """The same, of a tier that may keep its objects compressed."""
    tier = own_tier(name, tiers)
    if tier is Tier.CPU:
        raise UsageError("engines map tier 'cpu' and read its bytes as they are; compress disk or redis")
    return tier


def removable_tiers(names: list[str]) -> list[Tier]:
    """Tiers to take objects out of; one that this daemon does not have holds nothing."""
    tiers = [Tier.named(name) for name in names]
    if Tier.GPU in tiers:
        raise UsageError("tier 'gpu' belongs to the engines; give cpu, disk or redis")
    return tiers


def count_evicted(operation: Operation, did: Evicted) -> None:
    """Add what an eviction did to an operation."""
    operation.objects += did.objects
    operation.nbytes += did.nbytes
    operation.skip(Cause.HELD, did.skipped)


def count_deletions(operation: Operation, outcomes: Mapping[Outcome, int]) -> None:
    """Add how deletions in Redis ended."""
    for outcome, count in outcomes.items():
        if outcome is Outcome.OK:
            operation.objects += count
        elif outcome is not Outcome.MISS:
            operation.skip(Cause(f"{Tier.REDIS.label}_{outcome.value}"), count)


def audit_summary(selector: Mapping[str, Any]) -> dict[str, Any]:
    """What the audit log says of a selector: no token ids."""
    told = {name: selector[name] for name in ("model", "adapter", "salt") if selector.get(name)}
    if selector.get("keys"):
        told |= {"keys": len(selector["keys"]) // 32, "first_key": selector["keys"][:32].hex()}
    if selector.get("tokens"):
        told["tokens"] = len(selector["tokens"]) // 4
    return told


def describe_event(event: Event) -> dict[str, Any]:
    """An event as users see it."""
    return {
        "id": event.number, "time": event.time, "event": event.what, "tier": event.tier, "cause": event.cause,
        "key": event.key.hex(), "namespace": event.namespace.hex(), "bytes": event.nbytes, "count": event.count,
    }  # fmt: skip


def planes(node: Node, namespaces: Namespaces) -> int:
    """Bytes of an element: what byte planes are taken of."""
    if node.kind is Kind.LORA:
        return _ADAPTER_PLANES
    namespace = namespaces.get(node.namespace)
    return _PLANES.get(namespace.kv_dtype if namespace is not None else "", 1)
