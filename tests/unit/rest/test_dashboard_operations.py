# SPDX-License-Identifier: Apache-2.0
"""The dashboard while something goes on for long, or fails: operations, and what failed lately."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache import Namespace

pytestmark = pytest.mark.timeout(120)


def failures_are_those_of(page: Any, operator: httpx.Client) -> bool:
    said = operator.get("/v1/stats").json()["recent_failures"]
    shown = page.script(
        "return [...document.querySelectorAll('#failures tbody tr')].map((row) => [...row.cells].map((cell) => "
        "[cell.textContent, cell.title]))"
    )
    told = [[each["tier"], each["cause"].replace("_", " "), str(each["count"])] for each in reversed(said)]
    times = [line[0][1] for line in shown]  # ISO 8601, to the millisecond
    newest_first = times == sorted(times, reverse=True) and len(set(times)) > 1
    return newest_first and [[text for text, _ in line[1:]] for line in shown] == told


class SlowRedis:
    """Between a daemon and its Redis: while `slow` is set, answers take longer, yet not as long as the daemon waits."""

    def __init__(self, target: Path) -> None:
        self.slow = threading.Event()
        slow = self.slow

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.socket(socket.AF_UNIX) as redis:
                    redis.connect(str(target))
                    answers = threading.Thread(target=self.pump, args=(redis, self.request, slow.is_set), daemon=True)
                    answers.start()
                    self.pump(self.request, redis, lambda: False)

            def pump(self, source: socket.socket, sink: socket.socket, waits: Callable[[], bool]) -> None:
                with contextlib.suppress(OSError):
                    while data := source.recv(1 << 20):
                        time.sleep(0.7 if waits() else 0)
                        sink.sendall(data)

        socketserver.ThreadingTCPServer.daemon_threads = True
        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"redis://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def slow_redis(redis_server: Any) -> Iterator[SlowRedis]:
    made = SlowRedis(redis_server().socket)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_long_operation_is_followed_and_cancelled(
    page_of: Any, daemon: Any, slow_redis: SlowRedis, rest_is_up: Any, eventually: Any
) -> None:
    running = daemon(http="127.0.0.1:0", memory="16MiB", page_size="4KiB", redis=slow_redis.url)
    eventually(lambda: rest_is_up(running))
    page = page_of(running.http)
    token = Path(f"{running.socket}.token").read_text().strip()
    client = running.client()
    root = client.register(Namespace("slow", "float16", "layout", 16), ["slow"])
    keys = [hashlib.sha256(bytes([number // 256, number % 256])).digest() for number in range(2000)]
    with client.reserve(root, keys, [1000] * 2000) as reservation:
        assert reservation.causes == [""] * 2000
    client.flush()
    client.evict(keys, tiers=["redis"])
    page.open(token)
    slow_redis.slow.set()
    with httpx.Client(base_url=running.http, headers={"authorization": f"Bearer {token}"}) as operator:
        body = {"selector": {"model": "slow"}, "source": "cpu", "tier": "redis", "keep": True}
        started = operator.post("/v1/move", json=body).json()
        item = f'#operations li[data-operation="{started["id"]}"]'
        page.says(f"{item} .badge", "running")
        page.click(f"{item} button")
        page.says(f"{item} .badge", "cancelled")
        done = operator.get(f"/v1/operations/{started['id']}").json()
        assert done["state"] == "cancelled"
        assert done["objects"] < 2000


def test_failures_are_listed_the_newest_first(
    page_of: Any, daemon: Any, redis_server: Any, rest_is_up: Any, eventually: Any
) -> None:
    server = redis_server()
    running = daemon(http="127.0.0.1:0", memory="16MiB", redis=server.url)
    eventually(lambda: rest_is_up(running))
    page = page_of(running.http)
    page.open()
    client = running.client()

    def failures(count: int) -> bool:
        client.lookup([bytes(32)])
        said: Any = client.status()["recent_failures"]
        return len(said) >= count

    server.kill()
    eventually(lambda: failures(1), "Redis is gone", 30)
    server.start()
    eventually(lambda: not client.status()["tiers"]["redis"]["reason"], "Redis is in use again", 30)
    server.kill()
    eventually(lambda: failures(2), "Redis is gone once more", 30)
    with httpx.Client(base_url=running.http) as anybody:
        page.wait(lambda: failures_are_those_of(page, anybody), "the failures, the newest first")
