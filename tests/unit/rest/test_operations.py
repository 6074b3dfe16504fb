# SPDX-License-Identifier: Apache-2.0
"""Operations, pages and events over HTTP, on a real daemon."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from loracache import CacheClient

OPERATION = "/v1/operations"


def keys_of(*keys: str) -> dict[str, Any]:
    return {"selector": {"keys": list(keys)}}


@pytest.fixture(autouse=True)
def _room(client: CacheClient) -> None:
    """What earlier tests stored is in nobody's way."""
    client.clear()


def test_a_move_goes_on_behind_its_answer_and_says_what_came_of_it(
    operator: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]]
) -> None:
    keys = chain(40)
    client.flush()
    client.evict([bytes.fromhex(key) for key in keys], tiers=["cpu"])
    answer = operator.post("/v1/admit", json=keys_of(*keys))
    assert answer.status_code == 202
    assert answer.headers["location"] == f"{OPERATION}/{answer.json()['id']}"
    done = operator.get(answer.headers["location"], params={"wait": 10}).json()
    assert (done["state"], done["verb"], done["total"], done["objects"], done["bytes"]) == (
        "done",
        "admit",
        40,
        40,
        40_000,
    )
    assert set(operator.post("/v1/lookup", json=keys_of(*keys)).json()["tiers"]) == {"cpu"}
    again = operator.post("/v1/admit", params={"wait": 10}, json=keys_of(*keys))
    assert (again.status_code, again.json()["causes"]) == (200, {"already": 40})


def test_operations_are_listed_the_latest_first(operator: httpx.Client, chain: Callable[[int], list[str]]) -> None:
    keys = chain(1)
    ids = [operator.post(f"/v1/{verb}", json=keys_of(*keys)).json()["id"] for verb in ("pin", "unpin", "evict")]
    listed = operator.get(OPERATION, params={"limit": 3}).json()["operations"]
    assert [(item["id"], item["verb"]) for item in listed] == list(
        zip(ids[::-1], ("evict", "unpin", "pin"), strict=True)
    )


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(("name", "status"), [("ab" * 8, 404), ("x", 422), ("..%2Fstats", 404), ("ab" * 40, 422)])
def test_operations_that_are_none(operator: httpx.Client, method: str, name: str, status: int) -> None:
    assert operator.request(method, f"{OPERATION}/{name}").status_code == status


def test_ways_that_do_not_exist_are_refused(operator: httpx.Client, chain: Callable[[int], list[str]]) -> None:
    keys = chain(1)
    refused = {
        ("move", "cpu", "redis"): 409, ("move", "redis", "cpu"): 409, ("move", "cpu", "cpu"): 422,
        ("move", "gpu", "cpu"): 422, ("move", "cpu", "tape"): 422,
    }  # fmt: skip
    for (verb, source, tier), status in refused.items():
        answer = operator.post(f"/v1/{verb}", json=keys_of(*keys) | {"source": source, "tier": tier})
        assert answer.status_code == status, (source, tier, answer.text)
    assert operator.post("/v1/admit", json=keys_of(*keys) | {"tier": "redis"}).status_code == 409
    held = operator.post("/v1/admit", json=keys_of(*keys) | {"tier": "disk", "ttl": 5})
    assert (held.status_code, "ttl=5 is for tier 'cpu'" in held.json()["detail"]) == (409, True)
    assert operator.post("/v1/compress", json=keys_of(*keys) | {"tier": "cpu"}).status_code == 422
    assert operator.post("/v1/pin", json=keys_of(*keys) | {"tier": "redis"}).status_code == 422


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "soon"])
def test_waiting_is_bounded(operator: httpx.Client, wait: str) -> None:
    answer = operator.post("/v1/evict", params={"wait": wait}, json=keys_of("ab" * 32))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "query.wait"


def test_pages_of_objects_hold_each_once(operator: httpx.Client, chain: Callable[[int], list[str]]) -> None:
    keys = [key for _ in range(3) for key in chain(30)]
    seen, after = [], ""
    while True:
        page = operator.get("/v1/objects", params={"after": after, "limit": 7}).json()
        assert len(page["objects"]) <= 7
        seen += [item["key"] for item in page["objects"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert sorted(seen) == sorted(keys)
    assert operator.get("/v1/objects", params={"after": "x"}).status_code == 409
    assert operator.get("/v1/objects", params={"tier": "gpu"}).status_code == 422


def test_an_object_is_described(operator: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]]) -> None:
    first, second = chain(2)
    client.flush()
    operator.post("/v1/pin", json=keys_of(second) | {"tier": "disk"})
    client.lookup([bytes.fromhex(first)])
    found = {item["key"]: item for item in operator.get("/v1/objects").json()["objects"]}
    assert found[second] | {"namespace": "", "checksum": ""} == {
        "key": second, "kind": "kv", "namespace": "", "parent": first, "size": 1000, "checksum": "", "stored": 1000,
        "tiers": ["cpu", "disk"], "pinned": ["disk"], "leases": 0, "hits": 0, "children": 0,
    }  # fmt: skip
    assert (found[first]["children"], found[first]["hits"], found[first]["parent"]) == (1, 1, "")


# -- events ----------


class Feed:
    """The event stream, read by a thread."""

    def __init__(self, http: httpx.Client, **options: Any) -> None:
        self.events: list[tuple[str, Any]] = []
        self.ids: list[int] = []
        self.heard = threading.Event()
        self._http = http
        self._options = options
        self._answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self.heard.wait(10)

    def _run(self) -> None:
        kind = ""
        try:
            with self._http.stream("GET", "/v1/events", **self._options) as self._answer:
                for line in self._answer.iter_lines():
                    self.heard.set()
                    name, _, value = line.partition(": ")
                    if name == "id":
                        self.ids.append(int(value))
                    elif name == "event":
                        kind = value
                    elif name == "data":
                        self.events.append((kind, json.loads(value)))
        except httpx.HTTPError:
            pass

    def kinds(self, key: str) -> list[tuple[str, str, str]]:
        return [(kind, event["tier"], event["cause"]) for kind, event in list(self.events) if event["key"] == key]


@pytest.fixture
def feed(running: Any) -> Iterator[Callable[..., Feed]]:
    clients: list[httpx.Client] = []

    def open_feed(**options: Any) -> Feed:
        clients.append(httpx.Client(base_url=running.http, timeout=30))
        return Feed(clients[-1], **options)

    yield open_feed
    for each in clients:
        each.close()


def test_what_happens_is_told_in_its_order(
    operator: httpx.Client,
    client: CacheClient,
    chain: Callable[[int], list[str]],
    feed: Callable[..., Feed],
    eventually: Any,
) -> None:
    watching = feed()
    (key,) = chain(1)
    client.flush()
    operator.post("/v1/pin", json=keys_of(key))
    operator.post("/v1/unpin", json=keys_of(key))
    operator.post("/v1/move", params={"wait": 10}, json=keys_of(key) | {"source": "cpu", "tier": "disk"})
    client.get(bytes.fromhex(key))
    operator.post("/v1/evict", json=keys_of(key))
    wanted = [
        ("admitted", "cpu", "stored"), ("admitted", "disk", "written"), ("pinned", "cpu", "asked"),
        ("unpinned", "cpu", "asked"), ("evicted", "cpu", "moved"), ("moved", "disk", "from_cpu"),
        ("admitted", "cpu", "from_disk"), ("evicted", "cpu", "asked"), ("evicted", "disk", "asked"),
    ]  # fmt: skip
    eventually(lambda: watching.kinds(key)[-1:] == wanted[-1:], "the last is told")
    assert watching.kinds(key) == wanted
    assert watching.ids == sorted(watching.ids)


def test_one_who_comes_back_goes_on_where_it_was(
    chain: Callable[[int], list[str]], feed: Callable[..., Feed], eventually: Any
) -> None:
    watching = feed()
    (first,) = chain(1)
    eventually(lambda: watching.kinds(first), "the first is told")
    last = watching.ids[0]
    missed = chain(5)
    back = feed(headers={"last-event-id": str(last)})
    eventually(lambda: all(back.kinds(key) for key in missed), "what was missed is told")
    assert not [kind for kind in back.kinds(first) if kind == ("admitted", "cpu", "stored")]


def test_failures_are_told(
    running: Any, client: CacheClient, chain: Callable[[int], list[str]], feed: Callable[..., Feed], eventually: Any
) -> None:
    watching = feed()
    (key,) = chain(1)
    client.flush()
    client.evict([bytes.fromhex(key)], tiers=["cpu"])
    file = running.disk / "objects" / key[:2] / key
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    content[5000] ^= 1
    file.write_bytes(bytes(content))
    assert client.get(bytes.fromhex(key)) is None
    eventually(lambda: [each for each in watching.events if each[0] == "failed"], "the failure is told")
    _, event = next(each for each in watching.events if each[0] == "failed")
    assert (event["tier"], event["cause"], event["count"]) == ("disk", "corrupt", 1)
    recent: Any = client.status()["recent_failures"]
    assert (recent[-1]["tier"], recent[-1]["cause"]) == ("disk", "corrupt")


@pytest.mark.parametrize("value", ["-1", "x", str(2**63)])
def test_numbers_that_are_none_are_refused(anybody: httpx.Client, value: str) -> None:
    assert anybody.get("/v1/events", params={"since": value}).status_code == 422


def test_settings_are_shown_without_secrets(daemon: Any, rest_is_up: Any, eventually: Any, short_tmp: Any) -> None:
    secret = os.urandom(16).hex()
    config = short_tmp / "config.yaml"
    config.write_text(f"integrity_key: {secret}\n")
    made = daemon(http="127.0.0.1:0", config=config)
    eventually(lambda: rest_is_up(made), "REST answers")
    token = (short_tmp / f"{made.socket.name}.token").read_text().strip()
    answer = httpx.get(f"{made.http}/v1/config", headers={"authorization": f"Bearer {token}"})
    assert answer.json()["integrity_key"] == "(set)"
    assert answer.json()["memory"] == 16 << 20
    assert secret not in answer.text + made.log()
    assert httpx.get(f"{made.http}/v1/config").status_code == 401
