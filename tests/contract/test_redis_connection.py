# SPDX-License-Identifier: Apache-2.0
"""What the Redis tier does when the server stalls, dies, talks nonsense, wants a password, or is not there."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache.errors import ConfigError
from loracache.storage_backends.base import Outcome
from loracache.storage_backends.redis.backend import RedisBackend

OK, MISS, FULL, UNAVAILABLE = Outcome.OK, Outcome.MISS, Outcome.FULL, Outcome.UNAVAILABLE
SECRET = "s3cr3t@word"
QUOTED = "s3cr3t%40word"


@pytest.fixture
def server(redis_server: Callable[[], Any]) -> Any:
    return redis_server()


@pytest.fixture
def tier(server: Any, redis_tier: Callable[..., RedisBackend]) -> RedisBackend:
    return redis_tier(server.url)


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("call", ["contains", "load", "store", "delete"])
def test_a_stopped_server_is_unavailable_in_bounded_time(
    server: Any,
    objects: Any,
    redis_tier: Callable[..., RedisBackend],
    eventually: Callable[..., Any],
    quickest: Callable[..., float],
    call: str,
    connected: bool,
) -> None:
    stored = objects.new(3 << 20)
    items = [stored.info.key if call in ("contains", "delete") else stored] * 3

    def took() -> float:
        tier = redis_tier(server.url, timeout_s=0.6)
        if connected:
            objects.store(tier, [stored])
        server.send(signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert outcomes(getattr(tier, call)(items)) == [UNAVAILABLE] * 3
            seconds = time.monotonic() - began
        finally:
            server.send(signal.SIGCONT)
        tier.delete([stored.info.key])
        eventually(lambda: outcomes(tier.store([stored])) == [OK], "the server answers in time again")
        assert objects.holds(tier, stored)
        return seconds

    assert 0.5 < quickest(took, 1.15) < 1.15  # neither once for each item nor once for each kind of wait


def test_a_killed_server_is_unavailable_and_a_new_one_is_used(tier: RedisBackend, server: Any, objects: Any) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    server.kill()
    for _ in range(2):
        assert objects.found(tier, stored) is UNAVAILABLE
        assert objects.load(tier, stored) is UNAVAILABLE
        assert outcomes(tier.store([stored])) == [UNAVAILABLE]
        assert outcomes(tier.delete([stored.info.key])) == [UNAVAILABLE]
    server.start()
    assert objects.found(tier, stored) is MISS
    objects.store(tier, [stored])
    assert objects.holds(tier, stored)


def test_a_server_restarted_between_two_calls_is_not_noticed(tier: RedisBackend, server: Any, objects: Any) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    server.kill()
    server.start()
    objects.store(tier, [stored])
    assert objects.holds(tier, stored)


class Impostor:
    """A server that says what it was told to, one script for each connection, after the handshake."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self.scripts: list[list[bytes]] = []
        self.connections = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            script = self.scripts[min(self.connections, len(self.scripts) - 1)]
            self.connections += 1
            with peer:
                self._play(peer, iter(script))

    def _play(self, peer: socket.socket, script: Iterator[bytes]) -> None:
        peer.settimeout(10)
        while request := peer.recv(1 << 20):
            try:
                peer.sendall(b"+OK\r\n" if b"SETINFO" in request else next(script))
            except (StopIteration, OSError):
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def impostor(short_tmp: Path) -> Iterator[Impostor]:
    server = Impostor(short_tmp / "impostor.sock")
    yield server
    server.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"$0\r\n\r\n$0\r\n\r\n",  # more than was asked
        b"*1\r\n$-1\r\n",  # for another question
        b"*2\r\n$-1\r\n$-1\r\n",
        b":1\r\n",
        b"$5\r\nabcdefg\r\n",
        b"*x\r\n",
        b"?\r\n",
        b"#" * 10_000,
        b"+OK\r\n",
        b"$100\r\nabc",
        b"$5\r\nabcdexx",
        b"$x\r\n",
    ],
)
def test_a_connection_that_lost_its_place_is_never_used_again(
    impostor: Impostor, redis_tier: Callable[..., RedisBackend], reply: bytes
) -> None:
    impostor.scripts = [[reply] if reply else [], [b"$0\r\n\r\n"] * 2]
    tier = redis_tier(impostor.url, timeout_s=1.0)
    assert outcomes(tier.contains([bytes(32)])) == [UNAVAILABLE]
    assert outcomes(tier.contains([bytes(32)])) == [MISS]
    assert outcomes(tier.contains([bytes(32)])) == [MISS]
    assert impostor.connections == 2


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("MOVED 3999 127.0.0.1:6381", UNAVAILABLE),
        ("LOADING Redis is loading the dataset in memory", UNAVAILABLE),
        ("READONLY You can't write against a read only replica.", UNAVAILABLE),
        ("OOM command not allowed when used memory > 'maxmemory'.", FULL),
        ("ERR something else", Outcome.FAILED),
    ],
)
def test_an_error_reply_fails_its_item_and_keeps_the_connection(
    impostor: Impostor, redis_tier: Callable[..., RedisBackend], reply: str, outcome: Outcome
) -> None:
    impostor.scripts = [[f"-{reply}\r\n".encode(), b"$0\r\n\r\n"]]
    tier = redis_tier(impostor.url)
    (result,) = tier.contains([bytes(32)])
    assert (result.outcome, result.detail) == (outcome, reply)
    assert outcomes(tier.contains([bytes(32)])) == [MISS]
    assert impostor.connections == 1


def test_a_server_that_dies_in_the_middle_fails_only_what_it_did_not_answer(
    tier: RedisBackend, server: Any, objects: Any
) -> None:
    stored = [objects.new(2 << 20) for _ in range(12)]
    objects.store(tier, stored)
    results: list[Any] = []
    targets = [objects.empty(item) for item in stored] * 8
    killer = threading.Timer(0.02, server.process.kill)
    killer.start()
    results = tier.load(targets)
    killer.join()
    assert set(outcomes(results)) <= {OK, UNAVAILABLE}
    whole = outcomes(results).count(OK)
    assert outcomes(results) == [OK] * whole + [UNAVAILABLE] * (len(targets) - whole)
    assert whole == 0 or objects.payload(targets[whole - 1]) == objects.payload(stored[(whole - 1) % 12])


def test_check_passes_where_a_server_answers(tier: RedisBackend) -> None:
    tier.check()


def test_check_names_a_server_that_does_not_answer(short_tmp: Path, redis_tier: Callable[..., RedisBackend]) -> None:
    backend = redis_tier(f"unix://user:{QUOTED}@{short_tmp}/none.sock")
    standing = backend.check()
    assert re.search(r"redis .*none\.sock.*start that Redis, or correct redis", standing.reason)
    assert (standing.reads, standing.writes) == (False, False)
    assert "s3cr3t" not in standing.reason


@pytest.mark.parametrize("login", [f":{QUOTED}@", f"somebody:{QUOTED}@", ""])
def test_check_refuses_a_wrong_password_without_repeating_it(
    server: Any, redis_tier: Callable[..., RedisBackend], login: str
) -> None:
    server.redis.config_set("requirepass", "right")
    backend = redis_tier(f"unix://{login}{server.socket}")
    with pytest.raises(ConfigError, match="redis") as caught:
        backend.check()
    assert "s3cr3t" not in str(caught.value)
    assert "somebody" not in str(caught.value)


def test_the_right_password_of_an_acl_user_opens(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    server.redis.acl_setuser("cache", enabled=True, passwords=f"+{SECRET}", keys="loracache:*", commands=["+@all"])
    backend = redis_tier(f"unix://cache:{QUOTED}@{server.socket}?db=3")
    backend.check()
    stored = objects.new(300_000)
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)
    assert server.redis.dbsize() == 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        f"http://user:{QUOTED}@host",
        f"redis://:{QUOTED}@host:port",
        "redis://:s3cr3t/word@host",
        "redis://:s3cr3t@host/zero",
        "redis://host/0?unknown=s3cr3t",
        "redis://host?socket_timeout=s3cr3t",
        f"redis://{'h' * 70}:6379?password=s3cr3t",
        "unix://",
    ],
)
def test_a_url_that_cannot_work_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis .* will not do; give redis://") as caught:
        RedisBackend(url)
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("setting", "value"), [("prefix", "a b"), ("prefix", "{x}"), ("prefix", ""), ("timeout_s", 0), ("segment_bytes", 0)]
)
def test_a_setting_that_cannot_work_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"redis_{setting}"):
        RedisBackend("redis://localhost", **{setting: value})


def test_closing_a_backend_closes_its_connections(server: Any, objects: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    backend = RedisBackend(server.url)
    objects.store(backend, [objects.new(10)])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    backend.close()
    assert len(os.listdir("/proc/self/fd")) == before
