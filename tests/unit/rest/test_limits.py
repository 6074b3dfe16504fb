# SPDX-License-Identifier: Apache-2.0
"""No client holds a connection, memory or the daemon for longer than it may: sizes, rates and times."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from loracache.config import Config
from loracache.rest.access import Access
from loracache.rest.connections import LimitedConnection
from loracache.rest.limits import Limits, Rates, address_of
from loracache.rest.problems import install
from loracache.rest.roles import guard, needs
from loracache.rest.settings import rest_settings
from loracache.rest.tokens import TokenStore, add_token, tokens_path

# -- rates ----------


def test_a_caller_gets_a_seconds_worth_at_once_and_then_its_rate() -> None:
    now = [0.0]
    rates = Rates(4, lambda: now[0])
    assert [rates.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.25]
    assert rates.wait("b") == 0
    now[0] += 0.25
    assert [rates.wait("a"), rates.wait("a")] == [0, 0.25]
    now[0] += 1000
    assert [rates.wait("a") for _ in range(5)] == [0, 0, 0, 0, 0.25]


def test_a_large_body_counts_as_many_requests_and_never_as_more_than_there_can_be() -> None:
    now = [100.0]
    rates = Rates(10, lambda: now[0])
    assert [rates.wait("a", 4 * 16384), rates.wait("a", 4 * 16384), rates.wait("a")] == [0, 0, pytest.approx(0.1)]
    assert [rates.wait("b", 1 << 60), rates.wait("b")] == [0, pytest.approx(0.1)]


def test_callers_on_loopback_have_a_rate_too_and_a_setting_goes_before_it() -> None:
    def rate(**settings: Any) -> float:
        return rest_settings(Config(socket=Path("/s"), http="127.0.0.1:1", **settings), 1, 3, 4).rate

    assert (rate(), rate(http_rate=0), rate(http_rate=7)) == (5000, 0, 7)


def test_a_rate_below_one_lets_one_through() -> None:
    now = [0.0]
    rates = Rates(0.1, lambda: now[0])
    assert [rates.wait("a"), rates.wait("a")] == [0, 10]
    now[0] += 10.001
    assert rates.wait("a") == 0


def test_no_rate_is_no_limit_and_callers_without_end_take_bounded_memory() -> None:
    assert {Rates(0).wait("a") for _ in range(1000)} == {0.0}
    rates = Rates(1)
    for number in range(30_000):
        rates.wait(str(number))
    assert len(rates._buckets) == 10_000
    assert rates.wait("29999") > 0
    assert rates.wait("0") == 0


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("10.0.0.1", 5), "10.0.0.1"), (("::ffff:10.0.0.1", 5), "10.0.0.1"), (None, ""),
        (("2001:db8::1", 5), "2001:db8::/64"), (("2001:db8::ffff:1:2:3", 5), "2001:db8::/64"),
        (("fe80::1%eth0", 5), "fe80::/64"),
    ],
)  # fmt: skip
def test_an_ipv6_client_is_its_network(client: Any, address: str) -> None:
    assert address_of({"client": client}) == address


def test_more_than_the_rate_is_told_when_to_come_again(daemon: Any, eventually: Any, short_tmp: Path) -> None:
    config = short_tmp / "loracache.yaml"
    config.write_text("http_rate: 0.05\n")
    path = short_tmp / "lc.sock"
    token = add_token(tokens_path(path), "slow", "read")
    running = daemon(socket=path, config=config, http="127.0.0.1:0")

    def first() -> httpx.Response | None:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{running.http}/v1/stats", timeout=60)  # an answer given up counts all the same
        return None

    assert eventually(first).status_code == 200
    answer = httpx.get(f"{running.http}/v1/stats")
    assert (answer.status_code, answer.json()["status"]) == (429, 429)
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert "http_rate" in answer.json()["detail"]
    # Tokens that are none do not make anybody another caller; one that is does, once.
    for wrong in ("a", "b"):
        assert httpx.get(f"{running.http}/v1/stats", headers={"authorization": f"Bearer {wrong}"}).status_code == 429
    headers = {"authorization": f"Bearer {token}", "x-forwarded-for": "10.0.0.9"}
    assert httpx.get(f"{running.http}/v1/stats", headers=headers).status_code == 200
    assert httpx.get(f"{running.http}/v1/stats", headers=headers).status_code == 429
    assert httpx.get(f"{running.http}/v1/stats", headers={"x-forwarded-for": "10.0.0.9"}).status_code == 429


# -- sizes, at a real daemon ----------


def raw(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20)


def said(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            found += part
    return found


def test_a_body_of_a_length_that_nobody_said_is_counted_as_it_comes(operator: httpx.Client) -> None:
    answer = operator.post("/v1/evict", content=iter([b"{}"]), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    answer = operator.post("/v1/evict", content=(b" " * (1 << 20) for _ in range(9)))
    assert (answer.status_code, answer.json()["detail"]) == (413, f"a body has at most {8 << 20} bytes here")
    right = b" " * ((8 << 20) - 2) + b"{}"
    headers = {"content-type": "application/json"}
    assert operator.post("/v1/evict", content=right, headers=headers).status_code == 422
    assert operator.post("/v1/evict", content=right + b" ", headers=headers).status_code == 413


def test_who_may_not_call_is_not_read_from(running: Any) -> None:
    head = f"POST /v1/evict HTTP/1.1\r\nhost: {urlsplit(running.http).netloc}\r\ntransfer-encoding: chunked\r\n\r\n"
    with raw(running.http) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")  # no byte of the body was sent


@pytest.mark.parametrize("part", [b"x-long: " + b"x" * (1 << 20), b"x: y\r\n" * 200_000, b"x" * (1 << 20)])
def test_a_head_without_end_is_cut(running: Any, part: bytes) -> None:
    with raw(running.http) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /healthz HTTP/1.1\r\n" + part)
        assert b"200 OK" not in said(connection)
    assert httpx.get(f"{running.http}/healthz").status_code == 200


def test_a_trailer_without_end_is_cut(running: Any, operator: httpx.Client) -> None:
    head = (
        f"POST /v1/evict HTTP/1.1\r\nhost: {urlsplit(running.http).netloc}\r\nauthorization: "
        f"{operator.headers['authorization']}\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n"
    )
    with raw(running.http) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head.encode() + b"x: " + b"y" * (1 << 20))
        assert b"What is not a body has at most 65536 bytes" in said(connection)


# -- times, with limits that a test can wait for ----------

LIMITS = Limits(seconds=0.5, body=1000, upload=100_000, pace=10_000)


class Hasty(LimitedConnection):
    HEAD_S = REST_S = 0.5


def application(log: list[str]) -> FastAPI:
    app = FastAPI()
    install(app)

    @app.get("/quick", dependencies=[needs("none")])
    async def quick() -> str:
        return "done"

    @app.get("/stuck", dependencies=[needs("none")])
    async def stuck() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            log.append("cancelled")

    @app.post("/body", dependencies=[needs("none")])
    async def body(request: Request) -> int:
        return len(await request.body())

    @app.put("/upload", dependencies=[needs("none", upload=True)])
    async def upload(request: Request) -> int:
        total = 0
        async for part in request.stream():
            total += len(part)
            log.append(f"{total}")
        return total

    def endless(parts: AsyncIterator[bytes]) -> StreamingResponse:
        return StreamingResponse(parts)

    async def ticks() -> AsyncIterator[bytes]:
        for _ in range(20):
            await asyncio.sleep(0.1)
            yield b"tick\n"

    async def flood() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)

    app.get("/events", dependencies=[needs("none", endless=True)])(lambda: endless(ticks()))
    app.get("/flood", dependencies=[needs("none", endless=True)])(lambda: endless(flood()))
    app.get("/slow-answer", dependencies=[needs("none")])(lambda: endless(ticks()))
    guard(app, LIMITS)
    return app


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def server(tmp_path: Path, log: list[str], eventually: Any, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """URL of a server with LIMITS."""
    caplog.set_level(logging.ERROR)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        access = Access(
            application(log), frozenset({place}), TokenStore(tmp_path / "lc.sock"), Rates(0), open_reading=True
        )
        config = uvicorn.Config(
            access, http=Hasty, ws="none", log_config=None, timeout_keep_alive=1, timeout_graceful_shutdown=2
        )
        made = uvicorn.Server(config)
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]})
        thread.start()
        eventually(lambda: made.started)
        yield f"http://{place}"
        made.should_exit = True
        thread.join(20)
        assert not [record.getMessage() for record in caplog.records if "ASGI" in record.getMessage()]


def test_what_takes_too_long_is_ended_and_said_to_be(server: str, log: list[str], eventually: Any) -> None:
    with httpx.Client(base_url=server) as client:
        answer = client.get("/stuck")
        assert (answer.status_code, answer.json()["status"], answer.headers["retry-after"]) == (504, 504, "1")
        eventually(lambda: log == ["cancelled"])
        assert client.get("/quick").json() == "done"


@pytest.mark.parametrize(
    "sent", [b"", b"GET", b"\r\n\r\n", b"GET /quick HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nx:"]
)
def test_a_head_that_does_not_come_ends_its_connection(server: str, sent: bytes) -> None:
    with raw(server) as connection:
        connection.sendall(sent)
        assert b"200 OK" not in said(connection)


def trickle(connection: socket.socket, part: bytes, stop: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while not stop.wait(0.05):
            connection.sendall(part)


@pytest.mark.parametrize(
    ("head", "part", "status"),
    [
        (b"GET /quick HTTP/1.1\r\n", b"x: y\r\n", b""),
        (b"GET /quick HTTP/1.1\r\nhost: PLACE\r\n\r\n", b"\r\n", b"200"),  # a client that never asks again
        (b"POST /body HTTP/1.1\r\nhost: PLACE\r\ncontent-length: 1000\r\n\r\n", b"x", b"408"),
        (b"POST /body HTTP/1.1\r\nhost: PLACE\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n", b"408"),
        (b"POST /nowhere HTTP/1.1\r\nhost: PLACE\r\ncontent-length: 1000\r\n\r\n", b"x", b"404"),
        (b"POST /body HTTP/1.1\r\nhost: PLACE\r\ncontent-length: 9999\r\n\r\n", b"x", b"413"),
        (b"PUT /upload HTTP/1.1\r\nhost: PLACE\r\ncontent-length: 9999\r\n\r\n", b"x", b"408"),
    ],
    ids=["head", "blank lines", "body", "chunks", "unread", "refused", "upload"],
)
def test_a_byte_now_and_then_holds_no_connection(server: str, head: bytes, part: bytes, status: bytes) -> None:
    stop = threading.Event()
    with raw(server) as connection:
        connection.sendall(head.replace(b"PLACE", urlsplit(server).netloc.encode()))
        thread = threading.Thread(target=trickle, args=(connection, part, stop))
        thread.start()
        try:
            assert said(connection).startswith(b"HTTP/1.1 " + status if status else b"")
        finally:
            stop.set()
            thread.join()


def test_an_upload_that_comes_steadily_may_take_longer_and_has_a_limit_of_its_own(server: str) -> None:
    def steady() -> Iterator[bytes]:
        for _ in range(10):
            time.sleep(0.1)
            yield bytes(5000)

    with httpx.Client(base_url=server, timeout=20) as client:
        started = time.monotonic()
        assert client.put("/upload", content=steady()).json() == 50_000
        assert time.monotonic() - started > 2 * LIMITS.seconds
        assert client.put("/upload", content=(bytes(10_000) for _ in range(11))).status_code == 413
        assert client.put("/upload", content=bytes(100_001)).status_code == 413
        assert client.put("/upload", content=bytes(100_000)).json() == 100_000
        assert client.post("/body", content=bytes(1001)).status_code == 413
        assert client.post("/body", content=bytes(1000)).json() == 1000


def test_uploads_are_handed_on_as_they_come(server: str, log: list[str], eventually: Any) -> None:
    with raw(server) as connection:
        head = f"PUT /upload HTTP/1.1\r\nhost: {urlsplit(server).netloc}\r\ncontent-length: 2000\r\n\r\n"
        connection.sendall(head.encode() + bytes(1000))
        eventually(lambda: log == ["1000"])
        connection.sendall(bytes(1000))
        assert b"2000" in connection.recv(1000)


def test_an_answer_that_began_and_is_late_is_cut_off(server: str) -> None:
    with httpx.Client(base_url=server) as client, pytest.raises(httpx.RemoteProtocolError):
        client.get("/slow-answer")


def test_a_stream_without_end_goes_on_for_who_takes_it_and_ends_for_who_does_not(
    server: str,
) -> None:
    assert httpx.get(f"{server}/events", timeout=20).text == "tick\n" * 20
    with raw(server) as connection:
        connection.sendall(f"GET /flood HTTP/1.1\r\nhost: {urlsplit(server).netloc}\r\n\r\n".encode())
        time.sleep(4 * LIMITS.seconds)
        taken = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                taken += len(part)
                assert taken < 64 << 20, "it is still sent"


def test_a_refusal_is_heard_while_the_body_is_still_sent(server: str) -> None:
    """Closing at once would take the answer along."""
    with httpx.Client(base_url=server) as client:
        for _ in range(20):
            assert client.post("/body", content=bytes(3 << 20)).status_code == 413
            assert client.get("/quick").status_code == 200


def test_pipelined_requests_are_all_answered(server: str) -> None:
    place = urlsplit(server).netloc
    last = f"GET /quick HTTP/1.1\r\nhost: {place}\r\nconnection: close\r\n\r\n"
    asked = f"POST /body HTTP/1.1\r\nhost: {place}\r\ncontent-length: 3\r\n\r\nabc" * 20
    with raw(server) as connection:
        connection.sendall((asked + last).encode())
        answers = said(connection)
    assert answers.count(b"HTTP/1.1 200") == 21


def test_silent_clients_do_not_keep_others_out(server: str) -> None:
    """Connections that never ask are ended, however many."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(raw(server)) for _ in range(100)]
        assert httpx.get(f"{server}/quick").status_code == 200
        assert {said(connection) for connection in silent} == {b""}
