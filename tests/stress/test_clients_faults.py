# SPDX-License-Identifier: Apache-2.0
"""Clients killed, stopped or not reading: no page is lost, none is reused under a living writer, nobody else waits."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.errors import Unavailable
from loracache.wire import protocol

NAMESPACE = Namespace("model", "float32", "layout", 16)
MIB = 1 << 20


@pytest.fixture
def running(daemon: Any) -> Any:
    return daemon(memory="8MiB", page_size="4KiB")


def store(client: CacheClient, count: int, size: int) -> dict[bytes, bytes]:
    """As much of it as finds room."""
    root = client.register(NAMESPACE)
    payloads = {os.urandom(32): os.urandom(size) for _ in range(count)}
    for key, payload in payloads.items():
        with client.reserve(root, [key], [size]) as reservation:
            if reservation.slots[0]:
                reservation.write(0, payload)
    return payloads


def used(client: CacheClient) -> int:
    status: Any = client.status()
    found: int = status["tiers"]["cpu"]["used_bytes"]
    return found


def quarantined(client: CacheClient) -> int:
    found: Any = client.status()["quarantined_bytes"]
    return int(found)


HALF_WRITTEN = """
with client.reserve(root, [bytes(32)], [1 << 20], ttl=3600) as reservation:
    reservation.slots[0].buffers[0][:1000] = bytes(1000)
    if sys.argv[2] == "hang up":
        client.close()
    say("writing")
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["killed", "hang up"])
def test_pages_of_a_lost_writer_come_back_when_its_process_is_gone_and_not_before(
    running: Any, client_process: Any, eventually: Callable[..., Any], how: str
) -> None:
    client = running.client()
    writer = client_process(running.url, HALF_WRITTEN, how)
    assert writer.line() == "writing"
    if how == "hang up":  # its connection is gone, its mapping is not
        eventually(lambda: quarantined(client) == MIB, "the write lease is broken")
        store(client, 100, 250_000)
        assert quarantined(client) == MIB
    writer.kill()
    eventually(lambda: client.status()["connections"] == 1, "its connection has ended")
    eventually(lambda: quarantined(client) == 0, "the pages are back")
    client.clear()
    assert used(client) == 0
    assert client.get(bytes(32)) is None


READ_AND_DIE = """
with client.acquire([bytes.fromhex(name) for name in sys.argv[2:]], ttl=3600) as reading:
    say(sum(slot is not None for slot in reading.slots))
    time.sleep(600)
"""


def test_a_killed_client_releases_what_it_was_reading(
    running: Any, client_process: Any, eventually: Callable[..., Any]
) -> None:
    client = running.client()
    keys = list(store(client, 5, 100_000))
    reader = client_process(running.url, READ_AND_DIE, *[key.hex() for key in keys])
    assert reader.line() == "5"
    assert client.evict(keys).counts == (0, 0, 5)
    reader.kill()
    eventually(lambda: client.status()["leases"] == 0, "its leases have ended")
    assert client.evict(keys).counts == (5, 500_000, 0)
    assert used(client) == 0


STOPPED = """
held = bytes.fromhex(sys.argv[2])
try:
    with client.reserve(root, [bytes(32)], [1 << 20], ttl=1) as reservation, client.acquire([held], ttl=1) as reading:
        say("holding")
        sys.stdin.readline()
        reservation.write(0, b"\\xee" * (1 << 20))
except Exception as error:
    say(type(error).__name__)
with client.reserve(root, [bytes([1]) * 32], [1 << 20], ttl=1) as reservation:
    say("writing")
    sys.stdin.readline()
    reservation.write(0, b"\\xee" * (1 << 20))
say(*reservation.causes)
"""


def test_a_stopped_client_keeps_nobody_waiting_and_harms_nobody_when_it_wakes(
    running: Any, client_process: Any, eventually: Callable[..., Any]
) -> None:
    client = running.client()
    (held,) = store(client, 1, MIB)
    sleeper = client_process(running.url, STOPPED, held.hex())

    def sleep_over(expected: str) -> dict[bytes, bytes]:
        assert sleeper.line() == expected
        sleeper.send(signal.SIGSTOP)
        eventually(lambda: client.status()["leases"] == 0, "its leases are over")
        assert quarantined(client) == MIB
        client.evict([held])
        others = store(client, 40, 250_000)  # everything there is, but what the sleeper may still write to
        assert quarantined(client) == MIB
        sleeper.send(signal.SIGCONT)
        sleeper.tell()
        return others

    others = sleep_over("holding")
    assert sleeper.line() == "LeaseLost"
    check(client, others)
    eventually(lambda: quarantined(client) == 0, "the reservation is given back")
    others = sleep_over("writing")
    assert sleeper.line() == "lease_lost"
    check(client, others)
    assert quarantined(client) == 0
    assert client.get(bytes([1]) * 32) is None
    client.clear()
    assert used(client) == 0


def check(client: CacheClient, payloads: dict[bytes, bytes]) -> None:
    found = {key: client.get(key) for key in payloads}
    assert sum(data is not None for data in found.values()) >= 20
    assert all(data in (None, payloads[key]) for key, data in found.items())


def scattered(client: CacheClient) -> bytes:
    """An object in 800 extents: every other page of the arena is held."""
    root = client.register(NAMESPACE)
    pages = [os.urandom(32) for _ in range(2048)]
    with client.reserve(root, pages, [4096] * len(pages), parents=[b""] * len(pages)):
        pass
    client.evict(pages[::2])
    key = os.urandom(32)
    with client.reserve(root, [key], [800 * 4096]) as reservation:
        data = os.urandom(800 * 4096)
        reservation.write(0, data)
    assert client.get(key) == data
    with client.acquire([key]) as reading:
        assert reading.slots[0] is not None
        assert len(reading.slots[0].buffers) == 800
    return key


def test_a_client_that_does_not_read_its_answers_is_left_and_delays_nobody(
    running: Any, eventually: Callable[..., Any]
) -> None:
    client = running.client(timeout=5.0)
    keys = [scattered(client)] * 1000  # answers of some megabytes
    greedy = socket.socket(socket.AF_UNIX)
    greedy.connect(str(running.socket))
    greedy.setblocking(False)
    ask = protocol.Acquire(bytes(16), b"".join(keys), 60.0).encode(1)
    pending = b""

    def hung_up() -> bool:
        """Ask and ask, and never read."""
        nonlocal pending
        pending = pending or ask
        try:
            pending = pending[greedy.send(pending) :]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            return True
        assert client.lookup(keys[:1]).hits == 1
        return False

    eventually(hung_up, "the daemon hangs up on who does not read", seconds=40)
    eventually(lambda: client.status()["leases"] == 0, "its lease has ended")
    greedy.close()


def test_clients_that_come_and_go_leave_nothing_open(running: Any, eventually: Callable[..., Any]) -> None:
    client = running.client()
    (key,) = store(client, 1, 1000)
    before = len(os.listdir(f"/proc/{running.process.pid}/fd"))
    for _ in range(150):
        other = CacheClient(running.url)
        other.connection.call(protocol.Acquire(os.urandom(16), key, 60.0), 10.0)
        other.close()
    eventually(lambda: client.status()["connections"] == 1, "all connections have ended")
    assert client.status()["leases"] == 0
    eventually(lambda: len(os.listdir(f"/proc/{running.process.pid}/fd")) <= before, "no descriptor is left open")


def test_a_daemon_out_of_descriptors_waits_and_then_serves_again(running: Any, eventually: Callable[..., Any]) -> None:
    client = running.client()
    (key,) = store(client, 1, 1000)
    opened = len(os.listdir(f"/proc/{running.process.pid}/fd"))
    resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (opened + 5, opened + 5))
    waiting = []
    for _ in range(20):
        waiting.append(socket.socket(socket.AF_UNIX))
        waiting[-1].connect(str(running.socket))
    eventually(lambda: "not accepted" in running.log(), "the daemon has no descriptor left")
    assert client.get(key) is not None  # who is connected is served
    time.sleep(1.5)
    assert running.log().count("not accepted") <= 4
    for sock in waiting:
        sock.close()

    def served() -> bool:
        with contextlib.suppress(Unavailable), CacheClient(running.url) as other:
            return other.get(key) is not None
        return False

    eventually(served, "new clients are served again")
