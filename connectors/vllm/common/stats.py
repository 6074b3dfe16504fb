# SPDX-License-Identifier: Apache-2.0
"""What the connector did, for vLLM's own log and /metrics: counts, summed over the workers and the scheduler's side.

vLLM carries the data from the workers to the scheduler after each step, and from there to the process that serves
/metrics: plain numbers by name. `name.cause` is a count by cause. Threading: a Tally may be written from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter as PromCounter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["ConnectorStats", "PromMetrics", "Tally"]

_COUNTERS = {
    "lookups": "Requests that the cache was asked about.",
    "lookups_late": "Times that a request was computed because its answer was late, or no daemon there.",
    "loop_wait_seconds": "Seconds for which the engine's loop waited for answers.",
    "parked_seconds": "Seconds for which requests were parked for answers that came.",
    "loads": "Loads that were begun.",
    "loads_by_layer": "Those of them within the step that computes upon them, layer by layer.",
    "load_bytes": "Bytes of KV copied into the engine's blocks.",
    "load_seconds": "Seconds that loads took, of each worker.",
    "chunks_not_loaded": "Chunks that were found and computed all the same, because that is faster than loading them.",
    "store_bytes": "Bytes of KV stored.",
}
_BY_CAUSE = {
    "load_failures": "Why KV was not loaded; docs/control-api.md lists the causes.",
    "store_failures": "Why KV was not stored.",
}


@dataclass
class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """Numbers by name since the last step."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Begin anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """The sum of both."""
        for name, number in other.data.items():
            self.data[name] = self.data.get(name, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log shows of an interval."""
        return {name: round(number, 3) for name, number in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether nothing was done."""
        return not self.data


class Tally:
    """Counts up to the next step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, number: float = 1) -> None:
        """Count. name: one of the counters above, or `name.cause`."""
        with self._lock:
            self._counts[name] += number  # type: ignore[assignment]

    def add_causes(self, name: str, causes: Mapping[str, int]) -> None:
        """Count failures by cause."""
        for cause, number in causes.items():
            self.add(f"{name}.{cause}", number)

    def take(self) -> ConnectorStats | None:
        """What was counted since the last call, or None."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return ConnectorStats(data=dict(counts)) if counts else None


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters `vllm:loracache_*_total` with vLLM's labels, and `cause` where there is one."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[PromCounter]
        self._labels = per_engine_labelvalues
        self._plain = {
            name: create_metric_per_engine(
                make(name=f"vllm:loracache_{name}", documentation=text, labelnames=labelnames), per_engine_labelvalues
            )
            for name, text in _COUNTERS.items()
        }
        self._by_cause = {
            name: make(name=f"vllm:loracache_{name}", documentation=text, labelnames=[*labelnames, "cause"])
            for name, text in _BY_CAUSE.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what one engine did."""
        for name, number in transfer_stats_data.items():
            what, _, cause = name.partition(".")
            if what in self._by_cause:
                self._by_cause[what].labels(*self._labels[engine_idx], cause).inc(number)
            elif what in self._plain:
                self._plain[what][engine_idx].inc(number)
