# SPDX-License-Identifier: Apache-2.0
"""Metrics: what Prometheus scrapes keeps its conventions, and the Grafana dashboard draws what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loracache import CacheClient

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana.json"


def samples(anybody: httpx.Client) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(anybody.get("/metrics").text)
        for sample in family.samples
    }


def test_bytes_seconds_and_evictions_are_told_by_tier(
    anybody: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]], adapter: Callable[[str], Any]
) -> None:
    before = samples(anybody)
    keys = [bytes.fromhex(key) for key in chain(3)]
    adapter("counted")
    client.flush()
    client.evict(keys, tiers=["cpu"])
    assert client.get(keys[0]) == bytes(1000)
    after = samples(anybody)

    def more(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("loracache_transferred_bytes_total", "cpu", "write") > 3000  # and the adapter
    assert more("loracache_transferred_bytes_total", "disk", "write") >= 3000
    assert more("loracache_transferred_bytes_total", "disk", "read") == 1000
    assert more("loracache_evictions_total", "asked", "cpu") == 3
    assert more("loracache_adapters", "cpu") == more("loracache_adapters", "disk") == 1
    for operation in ("load", "store"):
        assert more("loracache_busy_seconds_total", "disk", operation) > 0
    for outcome in ("raised", "used", "wasted", "failed"):
        assert after["loracache_prefetched_objects_total", outcome] == 0
    assert after["loracache_prefetched_bytes_total",] == after["loracache_engine_batch",] == 0
    assert after["loracache_tier_waiting", "disk", "write"] == after["loracache_operations_running",] == 0


def test_names_and_units_are_those_of_prometheus(anybody: httpx.Client) -> None:
    for family in text_string_to_metric_families(anybody.get("/metrics").text):
        assert family.name.startswith("loracache")
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|us|kb|mb|gb)(_|$)", family.name), "base units: seconds, bytes"
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)


def test_the_grafana_dashboard_draws_metrics_that_there_are(anybody: httpx.Client) -> None:
    dashboard = json.loads(GRAFANA.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    drawn = {name for expression in expressions for name in re.findall(r"loracache_[a-z_]+", expression)}
    described = set(re.findall(r"^# TYPE (\S+)", anybody.get("/metrics").text, re.MULTILINE))
    assert len(expressions) > 15
    assert drawn <= described | {f"{name}_total" for name in described}
    labels = {
        label for each in expressions for group in re.findall(r"by \(([^)]*)\)", each) for label in group.split(", ")
    }
    assert labels == {"tier", "cause", "direction", "operation", "kind"}
