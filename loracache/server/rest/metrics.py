"""The daemon's status in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

__all__ = ["render"]

_TIER_GAUGES = {
    "objects": "Objects held.",
    "bytes": "Payload bytes held.",
    "used_bytes": "Bytes taken, rounding included.",
    "limit_bytes": "Most bytes the tier may take.",
    "queued_writes": "Objects that still have to be written.",
    "available": "Whether the tier is used now.",
}
_GAUGES = {
    "connections": ("connections", "Clients connected."),
    "leases": ("leases", "Leases held."),
    "leased_objects": ("leased_objects", "Objects held by leases."),
    "quarantined_bytes": ("quarantined_bytes", "Bytes kept out of use after broken writes."),
    "namespaces": ("namespaces", "Namespaces registered."),
    "uptime_s": ("uptime_seconds", "Since the daemon started."),
}
_COUNTERS = {
    "hits": ("hits", "tier", "Objects found by lookups."),
    "misses": ("misses", "cause", "Objects not found by lookups."),
    "failures": ("failures", "cause", "Failures on the data path, each of them somebody's miss."),
    "counters": ("events", "name", "Everything that is counted, by its name in `loracache status`."),
}


class _Status(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        for field, about in _TIER_GAUGES.items():
            family = GaugeMetricFamily(f"loracache_tier_{field}", about, labels=["tier"])
            for tier, values in self._status["tiers"].items():
                if field in values:
                    family.add_metric([tier], float(values[field]))
            yield family
        for field, (name, about) in _GAUGES.items():
            yield GaugeMetricFamily(f"loracache_{name}", about, value=float(self._status[field]))
        for field, (name, label, about) in _COUNTERS.items():
            counter = CounterMetricFamily(f"loracache_{name}", about, labels=[label])
            for key, count in self._status[field].items():
                counter.add_metric([key], count)
            yield counter


def render(status: Mapping[str, Any]) -> bytes:
    """Metrics of a daemon's status."""
    registry = CollectorRegistry()
    registry.register(_Status(status))
    return generate_latest(registry)
