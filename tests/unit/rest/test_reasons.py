# SPDX-License-Identifier: Apache-2.0
"""Why something was evicted or not written down: the same by status, statistics, metrics, commands, dashboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loracache import CacheClient
from loracache.results import Departure, Refusal

SIZE = 50_000


@pytest.fixture(scope="module")
def running(module_daemon: Any, eventually: Any, rest_is_up: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "loracache.yaml").write_text("admission: second_touch\npolicy: adaptive\n")
    made = module_daemon(
        config=folder / "loracache.yaml",
        memory="2MiB",
        page_size="4KiB",
        disk_path=folder / "disk",
        disk="64MiB",
        http="127.0.0.1:0",
    )
    eventually(lambda: rest_is_up(made), "REST answers")
    return made


@pytest.fixture
def evicted(client: CacheClient, kv: Callable[..., list[str]]) -> dict[str, dict[str, int]]:
    """Evicted by tier and reason, after more was stored than memory holds, one asked for twice, and evicted."""
    for _ in range(60):
        kv(1, size=SIZE)
    (twice,) = kv(1, size=SIZE)
    assert client.get(bytes.fromhex(twice)) == bytes(SIZE)
    client.flush()
    client.evict([bytes.fromhex(twice)], tiers=["cpu"])
    found: Any = client.status()["evicted"]
    return dict(found)


def test_status_says_why(client: CacheClient, evicted: dict[str, dict[str, int]]) -> None:
    assert evicted["cpu"][Departure.POLICY_ONCE] > 10
    assert evicted["cpu"][Departure.ASKED] == 1
    status: Any = client.status()
    assert status["not_admitted"]["disk"][Refusal.FIRST_TOUCH] == 61


@pytest.mark.usefixtures("evicted")
def test_statistics_metrics_command_line_and_dashboard_say_the_same(
    running: Any, client: CacheClient, anybody: httpx.Client, loracache: Any, page: Any
) -> None:
    status: Any = client.status()
    fields = ("evicted", "not_admitted")
    stats = anybody.get("/v1/stats").json()
    assert {field: stats[field] for field in fields} == {field: status[field] for field in fields}
    told = {
        (sample.name, sample.labels["tier"], sample.labels.get("cause") or sample.labels["reason"]): sample.value
        for family in text_string_to_metric_families(anybody.get("/metrics").text)
        for sample in family.samples
        if sample.name in ("loracache_evictions_total", "loracache_not_admitted_total")
    }
    for name, field in (("loracache_evictions_total", "evicted"), ("loracache_not_admitted_total", "not_admitted")):
        for tier, reasons in status[field].items():
            assert {reason: told[name, tier, reason] for reason in reasons} == reasons
    lines = loracache("status", socket=running.socket).out.splitlines()
    first_touches = status["not_admitted"]["disk"]["first_touch"]
    assert f"not admitted to disk: first_touch {first_touches}" in lines
    assert any(line.startswith("evicted from cpu: ") and "policy.came_once" in line for line in lines)
    page.open()
    page.says("#unwritten tbody", f"disk: first touch{first_touches}")
    page.says("#evictions tbody", f"cpu: policy: came once{status['evicted']['cpu']['policy.came_once']}")
    page.says("#evictions tbody", f"cpu: asked{status['evicted']['cpu']['asked']}")
