# SPDX-License-Identifier: Apache-2.0
"""However many connections there are, whoever asks how the daemon is gets an answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from loracache.rest.connections import LimitedConnection
from loracache.rest.gate import GatedServer


@pytest.fixture
def flooded(daemon: Any, eventually: Any, rest_is_up: Callable[[Any], bool]) -> Iterator[Callable[[int, bytes], str]]:
    """Opens so many connections that send the beginning of a request; answers the URL."""
    running = daemon(memory="4MiB", http="127.0.0.1:0")
    eventually(lambda: rest_is_up(running), "REST answers")
    where = urlsplit(running.http)
    socks: list[socket.socket] = []

    def flood(count: int, head: bytes) -> str:
        for _ in range(count):
            socks.append(socket.create_connection((where.hostname, where.port), timeout=20))
            with contextlib.suppress(OSError):
                socks[-1].sendall(head)
        return str(running.http)

    yield flood
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"], ids=["silent", "half a head"])
def test_connections_that_ask_nothing_do_not_take_health_and_metrics_down(
    flooded: Callable[[int, bytes], str], head: bytes
) -> None:
    url = flooded(600, head)
    for path in ("/healthz", "/readyz", "/metrics"):
        assert httpx.get(f"{url}{path}", timeout=5).status_code == 200


class Small(GatedServer):
    MOST, MOST_OF_ADDRESS, RESERVE = 3, 3, 2
    HELLO_S = 0.2


@pytest.fixture
def small(request: pytest.FixtureRequest) -> Iterator[tuple[tuple[str, int], threading.Event, list[str]]]:
    """The address of a server whose requests wait until the event is set, but for those about health; what it got."""
    go = threading.Event()
    begun: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        while scope["path"] != "/healthz" and not go.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    class Server(Small):
        MOST_OF_ADDRESS = request.param

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=LimitedConnection, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    config.load()
    server = Server(config, listener, None)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    address = listener.getsockname()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    yield address, go, begun
    go.set()
    server.should_exit = True
    thread.join(10)


def ask(address: tuple[str, int], path: str) -> socket.socket:
    sock = socket.create_connection(address, timeout=5)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return sock


def status(sock: socket.socket) -> int:
    with sock:
        return int(sock.recv(4096).split()[1])


@pytest.mark.parametrize("small", [9], indirect=True)
def test_where_every_connection_has_a_request_going_health_has_some_left(small: Any, eventually: Any) -> None:
    address, go, begun = small
    busy = [ask(address, "/work") for _ in range(3)]
    eventually(lambda: len(begun) == 3, "they are taken")
    assert status(ask(address, "/work")) == 503
    assert status(ask(address, "/healthz")) == 200
    go.set()
    assert [status(sock) for sock in busy] == [200, 200, 200]


@pytest.mark.parametrize("small", [2], indirect=True)
def test_the_oldest_idle_connection_of_an_address_makes_room_for_its_next(small: Any) -> None:
    address, _, _ = small
    idle = [socket.create_connection(address, timeout=5) for _ in range(2)]
    assert status(ask(address, "/healthz")) == 200
    assert idle[0].recv(10) == b""  # ended
    idle[1].settimeout(0.2)
    with pytest.raises(TimeoutError):
        idle[1].recv(10)
    for sock in idle:
        sock.close()


def ended(sock: socket.socket) -> bool:
    sock.settimeout(0.3)
    try:
        return sock.recv(4096) == b""
    except TimeoutError:
        return False


@pytest.mark.parametrize("small", [3], indirect=True)
def test_who_has_not_said_a_word_makes_room_before_who_has(small: Any) -> None:
    address, _, _ = small
    begun, silent, other = (socket.create_connection(address, timeout=5) for _ in range(3))
    begun.sendall(b"GET / HTTP/1.1\r\n")
    other.sendall(b"G")
    with begun, silent, other:
        assert status(ask(address, "/healthz")) == 200
        assert [ended(sock) for sock in (begun, silent, other)] == [False, True, False]


@pytest.mark.parametrize("small", [2], indirect=True)
def test_a_request_that_is_answered_holds_no_connection_with_a_body_that_does_not_come(small: Any) -> None:
    """Else 256 of them, and then those that health has left, are anybody's for the asking."""
    address, _, _ = small
    waiting = []
    for _ in range(8):
        waiting.append(ask(address, "/healthz HTTP/1.1\r\nContent-Length: 1000\r\nX: x"))
        assert waiting[-1].recv(4096).startswith(b"HTTP/1.1 200")
    assert status(ask(address, "/healthz")) == 200
    assert [ended(sock) for sock in waiting] == [True] * 7 + [False]
    for sock in waiting:
        sock.close()
