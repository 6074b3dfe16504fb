# SPDX-License-Identifier: Apache-2.0
"""REST over a real daemon: what a route says and does is what a client of the socket sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loracache import CacheClient


def keys_of(*keys: str) -> dict[str, Any]:
    return {"selector": {"keys": list(keys)}}


def counts(answer: httpx.Response) -> tuple[int, int, int]:
    told = answer.json()
    assert (answer.status_code, told["state"], told["error"]) == (200, "done", "")
    return told["objects"], told["bytes"], told["skipped"]


def held(client: CacheClient, keys: list[str], tier: str) -> int:
    return sum(client.lookup([bytes.fromhex(key)]).tiers == (tier,) for key in keys)


def test_health_readiness_and_statistics(anybody: httpx.Client, client: CacheClient) -> None:
    assert anybody.get("/healthz").json() == anybody.get("/readyz").json() == {"status": "ok"}
    said, known = anybody.get("/v1/stats").json(), client.status()
    assert said.pop("uptime_s") <= float(str(known.pop("uptime_s")))
    assert said.pop("loop").keys() == dict(known.pop("loop")).keys()  # type: ignore[call-overload]
    assert said == known


def test_metrics_are_the_statistics(
    anybody: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]]
) -> None:
    keys = chain(3)
    client.lookup([bytes.fromhex(key) for key in keys])
    answer = anybody.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    status: Any = client.status()
    assert samples["loracache_tier_objects", "cpu"] == status["tiers"]["cpu"]["objects"] >= 3
    assert samples["loracache_tier_limit_bytes", "disk"] == 64 << 20
    assert samples["loracache_hits_total", "cpu"] == status["hits"]["cpu"]
    assert samples["loracache_events_total", "store.objects"] == status["counters"]["store.objects"]
    assert samples["loracache_leases",] == 0


def test_lookup_says_how_far_a_chain_is_held_and_where(
    anybody: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]]
) -> None:
    keys = chain(4)
    client.flush()
    client.evict([bytes.fromhex(key) for key in keys[2:]], tiers=["cpu"])
    answer = anybody.post("/v1/lookup", json=keys_of(*keys, "ab" * 32))
    found = answer.json()
    assert (found["hits"], found["asked"], found["tiers"]) == (4, 5, ["cpu", "cpu", "disk", "disk"])
    assert anybody.post("/v1/lookup", json=keys_of("ab" * 32, *keys)).json()["hits"] == 0


def test_what_is_pinned_is_skipped_and_what_is_evicted_is_gone(
    operator: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]]
) -> None:
    keys = chain(4)
    client.flush()  # what is being written is skipped too
    assert operator.post("/v1/pin", json=keys_of(keys[1]) | {"ttl": 60.0}).json()["objects"] == 1
    answer = operator.post("/v1/evict", json=keys_of(*keys) | {"tiers": ["cpu"]})
    assert counts(answer) == (2, 2000, 2)
    assert held(client, keys, "cpu") == 2
    assert operator.post("/v1/unpin", json=keys_of(keys[1])).json()["objects"] == 1
    operator.post("/v1/evict", json=keys_of(*keys))
    assert client.lookup([bytes.fromhex(keys[0])]).hits == 0
    assert counts(operator.post("/v1/evict", json=keys_of(*keys))) == (0, 0, 0)


def test_a_tier_is_cleared(operator: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]]) -> None:
    keys = chain(3)
    client.flush()
    assert operator.post("/v1/clear", json={"tiers": ["cpu"]}).json()["objects"] >= 3
    assert held(client, keys, "disk") == 3
    assert operator.post("/v1/clear", json={}).status_code == 200
    assert held(client, keys, "disk") == 0


def test_adapters_are_listed_by_pages_shown_and_removed(
    operator: httpx.Client, client: CacheClient, adapter: Callable[[str], Any]
) -> None:
    made = [adapter(name) for name in ("team/a", "team/b:1", "z@2")]
    first = operator.get("/v1/adapters", params={"limit": 2}).json()
    rest = operator.get("/v1/adapters", params={"limit": 2, "after": first["next"]}).json()
    end = operator.get("/v1/adapters", params={"after": rest["next"]}).json()
    assert [one["name"] for one in first["adapters"] + rest["adapters"]] == [one.name for one in made]
    assert end == {"adapters": [], "next": None}
    for name in (made[0].name, made[0].digest):
        shown = operator.get(f"/v1/adapters/{name}").json()
        assert (shown["digest"], shown["tiers"][0]) == (made[0].digest, "cpu")
    for selector in ({"adapter": "team/a"}, {"adapter": made[0].digest}, {"keys": [made[0].digest]}):
        assert operator.post("/v1/lookup", json={"selector": selector}).json()["hits"] == 1
    assert operator.delete("/v1/adapters/team/a").json()["objects"] >= 1
    assert operator.get("/v1/adapters/team/a").status_code == 404
    assert operator.delete("/v1/adapters/team/a").status_code == 404
    assert client.find_adapter("team/b:1") == made[1].digest


def test_the_openapi_document_names_every_route_and_what_goes_wrong(anybody: httpx.Client) -> None:
    document = anybody.get("/openapi.json").json()
    assert {"/v1/lookup", "/v1/evict", "/v1/adapters/{name}", "/metrics", "/readyz"} <= set(document["paths"])
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert route["description"], path
            assert {"401", "403", "429", "503", "504"} <= set(route["responses"]), (path, method)
            for status, answer in route["responses"].items():
                fine = status in ("200", "202") or list(answer["content"]) == ["application/problem+json"]
                assert fine, (path, status)


WRONG: list[tuple[str, str, Any, str]] = [
    ("POST", "/v1/lookup", {}, "body.selector"),
    ("POST", "/v1/lookup", [], "body"),
    ("POST", "/v1/lookup", keys_of(), "body.selector.keys"),
    ("POST", "/v1/lookup", keys_of("ab" * 31), "body.selector.keys.0"),
    ("POST", "/v1/lookup", keys_of("ab" * 32, "AB" * 32), "body.selector.keys.1"),
    ("POST", "/v1/lookup", {"selector": {"keys": "ab" * 32}}, "body.selector.keys"),
    ("POST", "/v1/lookup", {"selector": {"keys": ["ab" * 32], "adapter": "a"}}, "body.selector"),
    ("POST", "/v1/lookup", {"selector": {"adapter": ""}}, "body.selector"),
    ("POST", "/v1/lookup", {"selector": {"adapter": 7}}, "body.selector.adapter"),
    ("POST", "/v1/lookup", {"selector": {"adapter": "\ud800"}}, "body.selector.adapter"),
    ("POST", "/v1/evict", keys_of("ab" * 32) | {"tiers": ["gpu"]}, "body.tiers.0"),
    ("POST", "/v1/evict", keys_of("ab" * 32) | {"tiers": []}, "body.tiers"),
    ("POST", "/v1/evict", keys_of("ab" * 32) | {"force": True}, "body.force"),
    ("POST", "/v1/pin", keys_of("ab" * 32) | {"tier": "redis"}, "body.tier"),
    ("POST", "/v1/pin", keys_of("ab" * 32) | {"ttl": -1.0}, "body.ttl"),
    ("POST", "/v1/pin", keys_of("ab" * 32) | {"ttl": 1e300}, "body.ttl"),
    ("POST", "/v1/admit", keys_of("ab" * 32) | {"ttl": 0}, "body.ttl"),
    ("POST", "/v1/admit", keys_of("ab" * 32) | {"ttl": 3601}, "body.ttl"),
    ("POST", "/v1/pin", keys_of("ab" * 32) | {"ttl": "soon"}, "body.ttl"),
    ("POST", "/v1/clear", {"tiers": "cpu"}, "body.tiers"),
    ("GET", "/v1/adapters?limit=0", None, "query.limit"),
    ("GET", "/v1/adapters?limit=100000000000000000000", None, "query.limit"),
    ("GET", "/v1/adapters?limit=x", None, "query.limit"),
]


@pytest.mark.parametrize(("method", "path", "body", "field"), WRONG)
def test_wrong_fields_are_named_and_nothing_changes(
    operator: httpx.Client, client: CacheClient, method: str, path: str, body: Any, field: str
) -> None:
    before = client.status()["tiers"]
    answer = operator.request(method, path, content=json.dumps(body), headers={"content-type": "application/json"})
    problem = answer.json()
    assert (answer.status_code, problem["status"]) == (422, 422)
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["errors"][0]["field"] == field
    assert field in problem["detail"]
    assert client.status()["tiers"] == before


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"nan", b'{"selector": ' + b"[" * 5000])
def test_what_is_no_json_is_refused(operator: httpx.Client, body: bytes) -> None:
    answer = operator.post("/v1/evict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["title"]


def test_there_is_nothing_at_other_paths_and_with_other_methods(operator: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/v1", 404), ("GET", "/v1/adapters/nobody", 404), ("GET", "/v1/evict", 405),
        ("PUT", "/v1/clear", 405), ("POST", "/metrics", 405), ("DELETE", "/v1/adapters/..%2F..%2Fetc", 404),
    ):  # fmt: skip
        answer = operator.request(method, path)
        assert (answer.status_code, answer.json()["status"]) == (status, status), path


@pytest.mark.parametrize("selector", [{"adapter": "nobody"}, {"adapter": "12" * 32}])
def test_adapters_that_nobody_knows_are_not_found(operator: httpx.Client, selector: dict[str, str]) -> None:
    for path in ("/v1/lookup", "/v1/evict", "/v1/pin", "/v1/unpin"):
        assert operator.post(path, json={"selector": selector}).status_code == 404
