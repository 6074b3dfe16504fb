# SPDX-License-Identifier: Apache-2.0
"""A tenant's token reaches its own salt only: everything else is as if it were not there, by key, model or page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from loracache import CacheClient, Namespace
from loracache.keys import salt_digest
from loracache.rest.tokens import add_token, tokens_path

TOKENS = list(range(64))
CHUNKS = 4


@pytest.fixture
def salts() -> tuple[str, str]:
    return f"one-{os.urandom(4).hex()}", f"other-{os.urandom(4).hex()}"


@pytest.fixture
def tenants(running: Any, client: CacheClient, salts: tuple[str, str], eventually: Any) -> Iterator[SimpleNamespace]:
    """Two tenants' chains of the same prompt; `own` is the first's client over HTTP, `keys` each one's."""
    keys = []
    for salt in salts:
        namespace = Namespace("ef" * 32, "float32", "layout", 16, salt=salt_digest(salt))
        root = client.register(namespace, ["shared/model"])
        keys.append(namespace.object_keys(TOKENS))
        with client.reserve(root, keys[-1], [1000] * CHUNKS) as reservation:
            for position in range(CHUNKS):
                reservation.write(position, os.urandom(1000))
    client.flush()
    name = f"tenant-{os.urandom(4).hex()}"
    token = add_token(tokens_path(running.socket), name, "operate", salt_digest(salts[0]))
    with httpx.Client(base_url=running.http, headers={"authorization": f"Bearer {token}"}) as own:
        eventually(lambda: own.get("/v1/objects").status_code == 200, "the token is known")
        yield SimpleNamespace(own=own, keys=[[key.hex() for key in chain] for chain in keys], name=name)


def lookup(http: httpx.Client, selector: dict[str, Any]) -> Any:
    answer = http.post("/v1/lookup", json={"selector": selector})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return {name: found[name] for name in ("hits", "tiers", "tokens", "held")}


def test_a_prompt_is_looked_up_under_ones_own_salt(tenants: SimpleNamespace, salts: tuple[str, str]) -> None:
    prompt = {"model": "shared/model", "tokens": TOKENS}
    assert lookup(tenants.own, prompt)["tokens"] == 64
    assert lookup(tenants.own, prompt | {"salt": salts[0]})["tokens"] == 64
    assert lookup(tenants.own, prompt | {"salt": salts[1]})["tokens"] == 0
    held = lookup(tenants.own, {"model": "*"})["held"]
    assert held["cpu"] == {"objects": CHUNKS, "bytes": 1000 * CHUNKS}


def test_anothers_keys_are_as_if_nobody_had_them(tenants: SimpleNamespace) -> None:
    mine, others = tenants.keys
    nobodys = [os.urandom(32).hex() for _ in range(CHUNKS)]
    assert lookup(tenants.own, {"keys": others}) == lookup(tenants.own, {"keys": nobodys})
    assert lookup(tenants.own, {"keys": [*mine[:2], *others[2:]]})["hits"] == 2
    for verb, more in (("evict", {}), ("pin", {}), ("unpin", {}), ("admit", {"tier": "disk"}), ("compress", {}),
                       ("move", {"source": "disk", "tier": "cpu"})):  # fmt: skip
        said = []
        for keys in (others, nobodys):
            answer = tenants.own.post(f"/v1/{verb}", params={"wait": 10}, json={"selector": {"keys": keys}, **more})
            assert answer.status_code == 200, answer.text
            told = answer.json()
            said.append((told["objects"], told["bytes"], told["skipped"], told["causes"]))
        assert said[0] == said[1]
        assert said[0][0] == 0


def test_what_one_evicts_is_ones_own(tenants: SimpleNamespace, operator: httpx.Client, salts: tuple[str, str]) -> None:
    answer = tenants.own.post("/v1/evict", json={"selector": {"model": "*"}, "tiers": ["cpu", "disk"]})
    assert answer.json()["objects"] == 2 * CHUNKS
    assert lookup(operator, {"salt": salts[0]})["held"]["cpu"]["objects"] == 0
    assert lookup(operator, {"salt": salts[1]})["held"]["cpu"]["objects"] == CHUNKS
    assert lookup(operator, {"keys": tenants.keys[1]})["hits"] == CHUNKS


def test_pages_and_the_tree_show_ones_own(tenants: SimpleNamespace) -> None:
    mine, others = tenants.keys
    listed = tenants.own.get("/v1/objects").json()["objects"]
    assert {item["key"] for item in listed} == set(mine)
    nodes = tenants.own.get("/v1/tree").json()["nodes"]
    assert [node["kind"] for node in nodes if node["objects"].get("cpu")] == ["base"]
    (base,) = [node for node in nodes if node["kind"] == "base"]
    assert base["objects"]["cpu"] == CHUNKS
    (space,) = tenants.own.get("/v1/tree", params={"under": base["id"]}).json()["nodes"]
    (root,) = tenants.own.get("/v1/tree", params={"under": space["id"]}).json()["nodes"]
    assert root["key"] == mine[0]
    unknown = tenants.own.get("/v1/tree", params={"under": others[0]})
    nobody = tenants.own.get("/v1/tree", params={"under": os.urandom(32).hex()})
    assert unknown.status_code == nobody.status_code == 404


def test_adapters_by_name_tell_nothing(tenants: SimpleNamespace, adapter: Any) -> None:
    adapter("secret/project")
    said = [lookup(tenants.own, {"adapter": name}) for name in ("secret/project", "no/such", "ab" * 32)]
    assert said[0] == said[1] == said[2]
    assert tenants.own.get("/v1/adapters").status_code == 403


def test_operations_are_ones_own(tenants: SimpleNamespace, operator: httpx.Client) -> None:
    theirs = operator.post("/v1/pin", json={"selector": {"keys": tenants.keys[0]}}).json()["id"]
    mine = tenants.own.post("/v1/unpin", json={"selector": {"keys": tenants.keys[0]}}).json()["id"]
    listed = [item["id"] for item in tenants.own.get("/v1/operations").json()["operations"]]
    assert listed == [mine]
    assert tenants.own.get(f"/v1/operations/{mine}").status_code == 200
    for method in ("GET", "DELETE"):
        assert tenants.own.request(method, f"/v1/operations/{theirs}").status_code == 404


def test_what_is_everybodys_business_is_not_a_tenants(tenants: SimpleNamespace) -> None:
    for path in ("/v1/stats", "/metrics", "/v1/config", "/v1/events", "/v1/adapters"):
        assert tenants.own.get(path).status_code == 403, path
    assert tenants.own.post("/v1/clear", json={}).status_code == 403
    assert tenants.own.get("/healthz").status_code == 200
