# SPDX-License-Identifier: Apache-2.0
"""What the connector did is in vLLM's own metrics, summed over workers and sides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from loracache.connectors.vllm.common.stats import ConnectorStats, PromMetrics, Tally
from loracache.connectors.vllm.connector import LoRACacheConnector


def test_counts_are_taken_once_and_nothing_where_nothing_was_done() -> None:
    tally = Tally()
    assert tally.take() is None
    tally.add("loads")
    tally.add("load_seconds", 0.25)
    tally.add("load_seconds", 0.5)
    tally.add_causes("load_failures", {"absent": 2, "checksum": 1})
    stats = tally.take()
    assert stats is not None
    assert not stats.is_empty()
    assert stats.data == {
        "loads": 1, "load_seconds": 0.75, "load_failures.absent": 2, "load_failures.checksum": 1,
    }  # fmt: skip
    assert tally.take() is None


def test_workers_and_sides_are_summed() -> None:
    one, two = ConnectorStats(data={"load_bytes": 5, "loads": 1}), ConnectorStats(data={"load_bytes": 7, "lookups": 2})
    both = one.aggregate(two)
    assert both.reduce() == {"load_bytes": 12, "loads": 1, "lookups": 2}
    both.reset()
    assert both.is_empty()


def test_they_are_rebuilt_in_another_process() -> None:
    rebuilt = LoRACacheConnector.build_kv_connector_stats({"loads": 3})
    assert isinstance(rebuilt, ConnectorStats)
    assert rebuilt.data == {"loads": 3}
    nothing = LoRACacheConnector.build_kv_connector_stats()
    assert isinstance(nothing, ConnectorStats)
    assert nothing.is_empty()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Any:
    """PromMetrics of two engines, in a registry of their own."""

    def make(kind: Any) -> Any:
        return lambda **options: kind(registry=registry, **options)

    types = {Counter: make(Counter), Gauge: make(Gauge), Histogram: make(Histogram)}
    return LoRACacheConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None), types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]}
    )


def test_metrics_have_vllms_labels_and_the_cause(metrics: PromMetrics, registry: CollectorRegistry) -> None:
    for engine in (0, 1, 1):
        metrics.observe({"load_bytes": 10, "load_seconds": 0.5, "load_failures.checksum": 2, "new": 1}, engine)
    sample = registry.get_sample_value
    assert sample("vllm:loracache_load_bytes_total", {"model_name": "m", "engine": "0"}) == 10
    assert sample("vllm:loracache_load_bytes_total", {"model_name": "m", "engine": "1"}) == 20
    assert sample("vllm:loracache_load_seconds_total", {"model_name": "m", "engine": "1"}) == 1.0
    labels = {"model_name": "m", "engine": "1", "cause": "checksum"}
    assert sample("vllm:loracache_load_failures_total", labels) == 4
    assert sample("vllm:loracache_lookups_total", {"model_name": "m", "engine": "0"}) == 0
