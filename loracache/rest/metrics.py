# SPDX-License-Identifier: Apache-2.0
"""The daemon's status in Prometheus' text format. deploy/grafana.json draws these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

__all__ = ["render"]

_TIER_GAUGES = {
    "objects": "Objects held.",
    "bytes": "Payload bytes held.",
    "used_bytes": "Bytes taken, rounding included.",
    "limit_bytes": "Most bytes the tier may take.",
    "queued_writes": "Objects that still have to be written.",
    "left_alone_objects": "Objects of another release or integrity_key, kept and not served.",
    "left_alone_bytes": "What those take.",
    "available": "Whether the tier is used now.",
    "writable": "Whether the tier takes anything now.",
}
_GAUGES = {
    "connections": ("connections", "Clients connected."),
    "leases": ("leases", "Leases held."),
    "leased_objects": ("leased_objects", "Objects held by leases."),
    "quarantined_bytes": ("quarantined_bytes", "Bytes kept out of use after broken writes."),
    "namespaces": ("namespaces", "Namespaces registered."),
    "operations": ("operations_running", "Operators' operations under way."),
    "uptime_s": ("uptime_seconds", "Since the daemon started."),
}
_COUNTERS = {
    "hits": ("hits", "tier", "Objects found by lookups."),
    "misses": ("misses", "cause", "Objects not found by lookups."),
    "failures": ("failures", "cause", "Failures on the data path, each of them somebody's miss."),
    "counters": ("events", "name", "Everything that is counted, by its name in `loracache status`."),
}
_MOVED = "Payload bytes read from a tier into memory, or written to it; cpu: stored by engines, and adapters taken in."


class _Status(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily("loracache", "What runs.", value={"version": self._status["version"]})
        yield from self._gauges()
        for field, (name, label, about) in _COUNTERS.items():
            counter = CounterMetricFamily(f"loracache_{name}", about, labels=[label])
            for key, count in self._status[field].items():
                counter.add_metric([key], count)
            yield counter
        yield from self._moved()
        yield self._evictions()
        yield from self._swapper()
        yield self._not_admitted()
        yield from self._quotas()
        yield from self._lag()

    def _gauges(self) -> Iterable[Metric]:
        tiers = self._status["tiers"]
        for field, about in _TIER_GAUGES.items():
            family = GaugeMetricFamily(f"loracache_tier_{field}", about, labels=["tier"])
            for tier, values in tiers.items():
                if field in values:
                    family.add_metric([tier], float(values[field]))
            yield family
        for field, (name, about) in _GAUGES.items():
            yield GaugeMetricFamily(f"loracache_{name}", about, value=float(self._status[field]))
        waiting = GaugeMetricFamily(
            "loracache_tier_waiting", "Calls that wait for one of the tier's threads.", labels=["tier", "kind"]
        )
        for tier, values in tiers.items():
            for kind, count in values.get("waiting", {}).items():
                waiting.add_metric([tier, kind], count)
        yield waiting
        adapters = GaugeMetricFamily(
            "loracache_adapters", "Adapters held; gpu: in engines' memory, each counted once.", labels=["tier"]
        )
        for tier, count in self._status["adapters"].items():
            adapters.add_metric([tier], count)
        yield adapters

    def _moved(self) -> Iterable[Metric]:
        """Bytes and seconds by tier and direction."""
        counters: Mapping[str, int] = self._status["counters"]
        moved = CounterMetricFamily("loracache_transferred_bytes", _MOVED, labels=["tier", "direction"])
        seconds = CounterMetricFamily(
            "loracache_busy_seconds", "Seconds that a tier's threads spent in its calls.", labels=["tier", "operation"]
        )
        moved.add_metric(["cpu", "write"], counters.get("store.bytes", 0))
        for tier in ("disk", "redis"):
            moved.add_metric([tier, "read"], counters.get(f"load.{tier}.bytes", 0))
            moved.add_metric([tier, "write"], counters.get(f"write.{tier}.bytes", 0))
            for operation in ("load", "store", "delete", "lookup"):
                if (spent := counters.get(f"busy_us.{tier}.{operation}")) is not None:
                    seconds.add_metric([tier, operation], spent / 1e6)
        return moved, seconds

    def _evictions(self) -> Metric:
        about = "Objects that left a tier; cause policy: to make room, as the policy chose."
        return self._reasons("evictions", "cause", about, "evicted")

    def _not_admitted(self) -> Metric:
        about = "Objects of memory that were not written to a lower tier, and why."
        return self._reasons("not_admitted", "reason", about, "not_admitted")

    def _reasons(self, name: str, label: str, about: str, field: str) -> Metric:
        family = CounterMetricFamily(f"loracache_{name}", about, labels=["tier", label])
        for tier, reasons in self._status[field].items():
            for reason, count in reasons.items():
                family.add_metric([tier, reason], count)
        return family

    def _quotas(self) -> Iterable[Metric]:
        """Of those that have a quota of their own."""
        named = ["kind", "name", "tier"]
        used, soft, hard = (
            GaugeMetricFamily(f"loracache_quota_{what}", about, labels=named)
            for what, about in (
                ("used_bytes", "Bytes of a tier that a tenant, an adapter or a model with a quota takes."),
                ("soft_bytes", "Its share: nobody else's store pushes it below."),
                ("hard_bytes", "Its limit, where it has one."),
            )
        )
        refused, evicted = (
            CounterMetricFamily(f"loracache_quota_{what}", about, labels=named)
            for what, about in (
                ("refused", "Objects that a limit kept out."),
                ("evicted", "Objects of an owner with a quota that left for others."),
            )
        )
        for each in self._status["quotas"]:
            labels = [each["kind"], each["name"], each["tier"]]
            soft.add_metric(labels, each["soft"])
            if each["hard"] is not None:
                hard.add_metric(labels, each["hard"])
            if each["name"] != "*":  # whose sum says nothing of anybody
                used.add_metric(labels, each["bytes"])
                refused.add_metric(labels, each["refused"])
                evicted.add_metric(labels, each["evicted"])
        return used, soft, hard, refused, evicted

    def _swapper(self) -> Iterable[Metric]:
        """What is raised ahead of need, and what engines say of their requests."""
        counters: Mapping[str, int] = self._status["counters"]
        about = "Objects raised ahead of need; used, or wasted: gone unused; failed: they did not come."
        objects = CounterMetricFamily("loracache_prefetched_objects", about, labels=["outcome"])
        for outcome, name in (("raised", "objects"), ("used", "used"), ("wasted", "wasted"), ("failed", "failed")):
            objects.add_metric([outcome], counters.get(f"prefetch.{name}", 0))
        yield objects
        about, nbytes = "Payload bytes raised ahead of need.", counters.get("prefetch.bytes", 0)
        yield CounterMetricFamily("loracache_prefetched_bytes", about, value=nbytes)
        swapper = self._status["swapper"]
        about = "Requests that ran at once in all engines, a mean of 5 s."
        yield GaugeMetricFamily("loracache_engine_batch", about, value=swapper["batch"])
        about = "Requests that wait in all engines."
        yield GaugeMetricFamily("loracache_engine_waiting", about, value=swapper["waiting"])

    def _lag(self) -> Iterable[Metric]:
        """How late the daemon's event loop was."""
        loop = self._status["loop"]
        about = "How long after its time the daemon's event loop came to what was due."
        histogram = HistogramMetricFamily("loracache_loop_lag_seconds", about)
        histogram.add_metric([], [(bound, count) for bound, count in loop["lag_counts"]], loop["lag_sum_s"])
        longest = GaugeMetricFamily(
            "loracache_loop_lag_max_seconds", "The longest such delay of the last minute.", value=loop["lag_max_s"]
        )
        return histogram, longest


def render(status: Mapping[str, Any]) -> bytes:
    """Metrics of a daemon's status."""
    registry = CollectorRegistry()
    registry.register(_Status(status))
    return generate_latest(registry)
