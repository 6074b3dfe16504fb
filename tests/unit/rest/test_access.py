# SPDX-License-Identifier: Apache-2.0
"""Nobody without the token changes anything, and no web page reaches the port at all."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from loracache import CacheClient

CHANGES = [
    f"/v1/{verb}" for verb in ["evict", "pin", "unpin", "clear", "admit", "move", "compress", "decompress", "flush"]
]


def test_every_route_that_changes_something_is_known_here(anybody: httpx.Client) -> None:
    paths = anybody.get("/openapi.json").json()["paths"]
    posts = {path for path, methods in paths.items() for method in methods if method not in ("get", "delete")}
    assert posts == {*CHANGES, "/v1/lookup", "/v1/adapters/{name}", "/v1/quotas"}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer x{}"])
@pytest.mark.parametrize("path", [*CHANGES, "DELETE"])
def test_changes_need_the_token(
    running: Any, anybody: httpx.Client, client: CacheClient, chain: Callable[[int], list[str]], path: str, header: str
) -> None:
    keys = chain(1)
    token = Path(f"{running.socket}.token").read_text().strip()
    headers = {"authorization": header.format(token)} if header else {}
    if path == "DELETE":
        answer = anybody.delete("/v1/adapters/nobody", headers=headers)
    else:
        answer = anybody.post(path, json={"selector": {"keys": keys}}, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert token not in answer.text
    assert client.lookup([bytes.fromhex(keys[0])]).hits == 1
    assert client.unpin([bytes.fromhex(keys[0])]) == 0


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1", "localhost:1", "", "127.0.0.1:{}.evil"]
)
def test_names_that_were_pointed_at_this_machine_are_not_answered(
    running: Any, operator: httpx.Client, host: str
) -> None:
    port = str(urlsplit(running.http).port)
    for path in ("/v1/stats", "/healthz", "/metrics", "/nowhere"):
        assert operator.get(path, headers={"host": host.format(port)}).status_code == 403


@pytest.mark.parametrize("name", ["host", "origin", "authorization"])
def test_a_header_that_decides_is_there_once(running: Any, operator: httpx.Client, name: str) -> None:
    place = urlsplit(running.http).netloc
    right = {"host": place, "origin": running.http, "authorization": operator.headers["authorization"]}
    for twice in ([right[name], "evil"], ["evil", right[name]]):
        connection = http.client.HTTPConnection(place, timeout=10)
        connection.putrequest("GET", "/v1/stats", skip_host=True)
        for key, value in right.items():
            for one in twice if key == name else [value]:
                connection.putheader(key, one)
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, f"the header {name} is there twice" in answer.read().decode()) == (400, True)
        connection.close()


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_site_embeds_is_not_answered_but_a_link_may_be_followed(operator: httpx.Client, site: str) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    assert operator.get("/v1/stats", headers=headers).status_code == 403
    followed = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
    answer = operator.get("/docs", headers=followed)
    assert (answer.status_code, answer.headers["x-frame-options"]) == (200, "DENY")
    assert operator.post("/v1/clear", json={}, headers=followed).status_code == 403
    assert operator.get("/v1/stats", headers={"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:{}", "http://127.0.0.1", "file://"]
)
def test_web_pages_are_not_answered(running: Any, operator: httpx.Client, origin: str) -> None:
    headers = {"origin": origin.format(urlsplit(running.http).port)}
    assert operator.get("/v1/stats", headers=headers).status_code == 403
    assert operator.post("/v1/clear", json={}, headers=headers).status_code == 403
    answer = operator.options("/v1/clear", headers=headers | {"access-control-request-method": "POST"})
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_its_own_pages_are(running: Any, operator: httpx.Client) -> None:
    assert operator.get("/v1/stats", headers={"origin": running.http}).status_code == 200


def test_large_bodies_are_refused_unread(running: Any, operator: httpx.Client) -> None:
    assert operator.post("/v1/evict", content=b" " * (9 << 20)).status_code == 413
    parts = urlsplit(running.http)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as raw:
        raw.sendall(f"POST /v1/lookup HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-length: 99999999999\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
