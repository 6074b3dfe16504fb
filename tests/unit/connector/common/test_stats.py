# SPDX-License-Identifier: Apache-2.0
"""What the connector did is in vLLM's own metrics, summed over workers and sides."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, StepPlan, Store
from loracache.connectors.vllm.common.stats import _BY_CAUSE, _COUNTERS, ConnectorStats, PromMetrics, Tally
from loracache.connectors.vllm.connector import LoRACacheConnector
from loracache.keys import Namespace


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
        "loads": 1,
        "load_seconds": 0.75,
        "load_failures.absent": 2,
        "load_failures.checksum": 1,
    }
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


def test_every_metric_is_in_the_docs() -> None:
    text = (Path(__file__).parents[4] / "docs" / "vllm.md").read_text()
    assert not [name for name in [*_COUNTERS, *_BY_CAUSE] if f"_{name}_total" not in text]


# -- where they come from ----------


def test_a_worker_counts_bytes_seconds_and_failures(daemon: Any, make_side: Any, eventually: Any) -> None:
    side = make_side(daemon().url)  # with blocks of 2048 bytes
    here, gone = os.urandom(32), os.urandom(32)
    space = Namespace("m" * 64, "float32", "cpu/H.N.C", 16)
    stores = [Store("a", space, b"", (ChunkBlocks(here, (0,)),), None, 1)]
    orphan = [Store("b", space, gone, (ChunkBlocks(os.urandom(32), (1,)),), None, 1)]
    for step, each in enumerate((stores, orphan), 1):
        whole = StepPlan(step=step, stores=each, await_stores={each[0].request_id})
        side.handle_preemptions(whole)
        side.take_stores(whole)
        side.start_stores()
        eventually(lambda: side.take_finished()[0], "it is stored")
    counts = side.tally.take().data
    assert counts == {"store_bytes": 2048, "store_failures.no_parent": 1}
    loads = [Load("c", (ChunkBlocks(here, (2,)), ChunkBlocks(gone, (3,))), None, 16)]
    side.start_loads(StepPlan(step=3, loads=loads))
    eventually(lambda: side.take_finished()[1], "it is loaded")
    counts = side.tally.take().data
    assert counts.pop("load_seconds") > 0
    assert counts == {"load_bytes": 2048, "load_failures.absent": 1}
    assert side.tally.take() is None


def test_the_scheduler_counts_lookups_loads_and_waits(driver: Any, make_request: Any) -> None:
    request = make_request("a", 4 * 32)
    driver.hold(request, ["cpu"] * 2)
    driver.side.tally.take()
    driver.link.answers = False
    driver.arrive(request)
    driver.link.answers = True
    assert driver.side.matched_tokens(request, 0) == (64, True)
    driver.load(request, list(range(8)), 64)
    late = make_request("b", 4 * 32, seed=2)
    driver.link.connected = False
    driver.arrive(late)
    counts = driver.side.tally.take().data
    assert counts.pop("parked_seconds") > 0
    assert counts.pop("loop_wait_seconds") > 0
    assert counts == {"lookups": 1, "loads": 1, "lookups_late": 1}
