# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process: how it starts or refuses to, what it answers to nonsense, whose leases end with what."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.wire import control_messages as messages
from loracache.wire import protocol
from loracache.wire.frames import HEADER, MAX_FRAME, Frames, frame

NAMESPACE = Namespace("model", "float32", "layout", 16)


@pytest.fixture(scope="module")
def running(module_daemon: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB", disk_path=tmp_path_factory.mktemp("disk"), disk="64MiB")


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


def store(client: CacheClient, count: int, size: int = 5000) -> dict[bytes, bytes]:
    root = client.register(NAMESPACE)
    payloads = {os.urandom(32): os.urandom(size) for _ in range(count)}
    with client.reserve(root, list(payloads), [size] * count) as reservation:
        for position, payload in enumerate(payloads.values()):
            reservation.write(position, payload)
    assert reservation.causes == [""] * count
    return payloads


# -- starting ----------------------------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_socket_is_refused_and_the_first_goes_on(running: Any, daemon: Any) -> None:
    why = f"socket='{running.socket}': another daemon serves it; stop that one or give --socket another path"
    with pytest.raises(AssertionError, match=f"the daemon ended with 2: loracache: {re.escape(why)}"):
        daemon(socket=running.socket)
    assert running.status()["pid"] == running.process.pid


def test_a_second_daemon_on_the_disk_folder_is_refused(running: Any, serve_fails: Any) -> None:
    (disk_path,) = [Path(str(folder)) for folder in running.process.args if "/disk" in str(folder)]
    code, message = serve_fails(disk_path=disk_path)
    assert code == 2
    assert "disk_path" in message
    assert f"in use by the LoRACache daemon at {running.url}; give server='{running.url}' to use that one" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "9000GiB"}, ["memory=", "9000.0 GiB", "give --memory less"]),
        ({"memory": "plenty"}, ["memory='plenty' (command line)", "write it like 4GiB"]),
        ({"redis": "http://host"}, ["http://host", "redis://"]),
        (
            {"redis": "redis://user:hunter2@host"},
            ["redis on the command line", "LORACACHE_REDIS", "redis_password_file"],
        ),
        ({"environment": {"LORACACHE_REDIS": "http://user:hunter2@host"}}, ["http://host", "redis://"]),
        ({"redis": "redis://host", "redis_password_file": "/nowhere/password"}, ["/nowhere/password", "No such file"]),
        ({"redis_password_file": "/nowhere/password"}, ["redis_password_file is set and redis is not"]),
        ({"disk_path": "/dev/null/disk"}, ["disk_path '/dev/null/disk' cannot be used", "may create and write"]),
        ({"disk_path": "/proc/disk"}, ["disk_path '/proc/disk' cannot be used"]),
        (
            {"socket": "/dev/null/lc.sock"},
            ["socket='/dev/null/lc.sock' cannot be made", "give --socket a writable path"],
        ),
        ({"socket": "/nowhere/lc.sock"}, ["/nowhere/lc.sock", "No such file"]),
        ({"socket": "/tmp/" + "x" * 200}, ["107 bytes"]),
        ({"config": "/nowhere/lc.yaml"}, ["/nowhere/lc.yaml cannot be read"]),
        ({"disc": "1GiB"}, ["--disc"]),
        ({"drain": "-1"}, ["drain=-1.0 (command line)"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items())[:40] if isinstance(value, dict) else "",
)
def test_a_daemon_that_cannot_start_says_what_is_wrong_and_what_to_do(
    options: dict[str, Any], said: list[str], serve_fails: Any
) -> None:
    code, message = serve_fails(**options)
    assert code == 2
    assert all(part in message for part in said), message
    assert "Traceback" not in message
    assert "hunter2" not in message


@pytest.mark.parametrize("name", ["objects", "namespaces", "adapters"])
def test_a_file_where_a_folder_of_the_disk_tier_should_be_is_named(name: str, serve_fails: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    code, message = serve_fails(disk_path=tmp_path)
    assert code == 2
    assert "disk_path" in message
    assert "File exists" in message
    assert "Traceback" not in message


def test_unknown_settings_are_refused_wherever_they_stand(serve_fails: Any, tmp_path: Path) -> None:
    file = tmp_path / "lc.yaml"
    file.write_text("memroy: 1GiB\n")
    code, message = serve_fails(config=file)
    assert code == 2
    assert f"unknown key 'memroy' in the file {file}; did you mean 'memory'?" in message
    code, message = serve_fails(environment={"LORACACHE_MEMROY": "1GiB"})
    assert code == 2
    assert "unknown key 'memroy' in the environment; did you mean 'memory'?" in message


def test_a_file_that_is_no_socket_is_not_replaced_by_one(serve_fails: Any, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    code, message = serve_fails(socket=precious)
    assert code == 2
    assert f"socket='{precious}' is not a socket" in message
    assert precious.read_text() == "mine"


def test_a_socket_left_by_a_dead_daemon_is_taken_over(daemon: Any, short_tmp: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(short_tmp / "lc.sock"))
    left.close()
    running = daemon(socket=short_tmp / "lc.sock")
    assert running.client().lookup([]).hits == 0
    assert running.stop() == 0
    assert not running.socket.exists()


def test_nobody_else_may_open_the_socket(running: Any) -> None:
    assert stat.S_IMODE(running.socket.stat().st_mode) == 0o600


def test_the_daemon_loads_no_torch(running: Any, client: CacheClient, tmp_path: Path) -> None:
    connection = client.connection
    with pytest.raises(Exception, match="adapter_config"):  # it has loaded what reads adapters now
        connection.call(protocol.AdapterDigest(str(tmp_path)), 10.0)
    maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "uvloop" in maps
    assert "torch" not in maps


# -- the command line --------------------------------------------------------------------------------------------------


def test_status_shows_tiers_and_counts_as_json_and_as_a_table(
    running: Any, client: CacheClient, loracache: Any
) -> None:
    keys = list(store(client, 3))
    client.lookup([*keys, bytes(32)])
    code, text, _ = loracache("status", "--json", "--socket", running.socket)
    assert code == 0
    shown = json.loads(text)
    assert shown["pid"] == running.process.pid
    assert shown["tiers"]["cpu"]["objects"] >= 3
    assert shown["tiers"]["disk"]["limit_bytes"] == 64 << 20
    assert shown["hits"]["cpu"] >= 3
    assert shown["misses"]["absent"] >= 1
    code, text, _ = loracache("status", socket=running.socket)
    assert code == 0
    assert f"pid {running.process.pid}" in text
    for word in ("cpu", "disk", "misses: absent", "failures:"):
        assert word in text


def test_commands_without_a_daemon_say_so(short_tmp: Path, loracache: Any) -> None:
    code, _, message = loracache("status", "--socket", short_tmp / "lc.sock")
    assert code == 1
    assert f"start one with: loracache serve --socket {short_tmp / 'lc.sock'}" in message
    code, _, message = loracache("flush", LORACACHE_SOCKET="")
    assert code == 2
    assert "give --socket PATH or set LORACACHE_SOCKET" in message


def test_flush_answers_when_the_objects_files_are_there(running: Any, client: CacheClient, loracache: Any) -> None:
    (disk_path,) = [Path(str(folder)) for folder in running.process.args if "/disk" in str(folder)]
    keys = list(store(client, 50))
    client.flush()
    names = {path.name for path in (disk_path / "objects").glob("*/*")}
    assert names >= {key.hex() for key in keys}
    assert loracache("flush", "--socket", running.socket)[0] == 0


# -- nonsense on the socket --------------------------------------------------------------------------------------------


class Raw:
    """A connection that says whatever it likes."""

    def __init__(self, url: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(url.removeprefix("unix://"))
        self.frames = Frames()
        data, fds, _, _ = socket.recv_fds(self.sock, 4096, 4)
        for fd in fds:
            os.close(fd)
        assert len(fds) == 1
        (self.greeting,) = self.frames.feed(data)

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def hear(self) -> list[Any]:
        """Answers until the daemon has hung up."""
        messages = []
        while data := self.sock.recv(1 << 20):
            messages += self.frames.feed(data)
        return messages

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def raw(running: Any) -> Iterator[Callable[[], Raw]]:
    opened: list[Raw] = []

    def connect() -> Raw:
        opened.append(Raw(running.url))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def body(data: bytes) -> bytes:
    return HEADER.pack(len(data)) + data


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "the limit is"),
        (HEADER.pack(MAX_FRAME + 1), f"announces {MAX_FRAME + 1} bytes; the limit is {MAX_FRAME}"),
        (body(b"\xc1"), "not MessagePack"),
        (body(b"\x91" * 5000), "not MessagePack"),
        (body(b"\x93\x01\xa5hello" + b"\x91" * 900 + b"\xc0"), "hello: name must be"),
        (frame({"operation": "status"}), "a request is a list"),
        (frame([1, "shutdown"]), "unknown operation 'shutdown'"),
        (frame([1, "lookup", b"", bytes(33), 1, 1.0]), "lookup: keys must be bytes, 32 a key"),
        (frame([1, "reserve", b"short", bytes(32), b"", b"", [], 1.0]), "reserve: lease must be 16 bytes"),
        (frame([1, "acquire", bytes(16), b"", 1e9]), "acquire: ttl must be seconds from 0 to 3600"),
        (frame([1, "report", {"x": 2**64 - 1}]), "report: counts must"),
        (frame([1, "status", "please"]), "status takes 0 fields"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_nonsense_is_answered_with_what_is_wrong_and_ends_that_connection_only(
    raw: Callable[[], Raw], client: CacheClient, said: bytes, named: str
) -> None:
    connection = raw()
    connection.say(said)
    *_, (number, status, message) = connection.hear()
    assert (number, status) == (0, protocol.ERROR)
    assert named in message
    assert client.lookup([]).hits == 0


def test_requests_before_the_nonsense_are_served(raw: Callable[[], Raw]) -> None:
    connection = raw()
    connection.say(protocol.Hello("x").encode(7))
    assert connection.frames.feed(connection.sock.recv(4096)) == [[7, protocol.OK, []]]
    connection.say(body(b"\xc1"))
    assert connection.hear()[-1][1] == protocol.ERROR


def test_a_frame_that_never_ends_delays_nobody(raw: Callable[[], Raw], client: CacheClient) -> None:
    connection = raw()
    connection.say(HEADER.pack(MAX_FRAME) + bytes(100_000))
    assert client.lookup([]).hits == 0
    connection.sock.shutdown(socket.SHUT_WR)
    assert connection.hear() == []


def test_a_refusal_keeps_the_connection(raw: Callable[[], Raw]) -> None:
    connection = raw()
    for number, request in enumerate(
        [
            protocol.Register("[" * 60_000, []),
            protocol.Register("{}", []),
            protocol.AdapterDigest("/nowhere"),
            protocol.AdapterDigest("a\0b"),
            messages.Pin("", "", {"keys": bytes(32)}, "gpu", 0.0, 0.0),
            messages.Evict("", "", {"keys": bytes(32)}, ["gpu"], 0.0),
            messages.Evict("", "", {}, ["cpu"], 0.0),
            messages.Move("", "", {"keys": bytes(32)}, "cpu", "redis", False, 0.0),
            protocol.Reserve(bytes(16), bytes(32), bytes(32), bytes(32), [1, 2], 1.0),
            protocol.Commit(bytes(16), bytes(32), []),
        ],
        start=1,
    ):
        connection.say(request.encode(number))
        heard: list[Any] = []
        while not heard:
            heard = connection.frames.feed(connection.sock.recv(1 << 16))
        assert heard[0][:2] == [number, protocol.ERROR]
        assert heard[0][2]


def test_counts_that_clients_report_are_shown(client: CacheClient) -> None:
    client.connection.call(protocol.Report({"deadline": 3}), 10.0)
    client.connection.call(protocol.Report({"deadline": 2**32 - 1}), 10.0)
    counters: Any = client.status()["counters"]
    assert counters["client.deadline"] == 2**32 + 2


# -- leases end with their connection ----------------------------------------------------------------------------------


def test_leases_end_with_their_connection(running: Any, client: CacheClient, eventually: Callable[..., Any]) -> None:
    keys = list(store(client, 2))
    client.flush()  # an object that is being written does not leave either
    other = CacheClient(running.url)
    reading = other.acquire(keys)
    reading.__enter__()
    assert client.evict(keys, tiers=["cpu"]).counts == (0, 0, 2)
    other.close()
    eventually(lambda: client.status()["leases"] == 0, "the lease has ended")
    assert client.evict(keys, tiers=["cpu"]).skipped == 0


def test_a_reader_whose_lease_is_over_condemns_nothing(client: CacheClient, eventually: Callable[..., Any]) -> None:
    """What it saw in the pages may have been the next object."""
    (key,) = store(client, 1)
    lease = os.urandom(16)
    client.connection.call(protocol.Acquire(lease, key, 0.01), 10.0)
    eventually(lambda: client.status()["leases"] == 0, "the lease is over")
    assert client.connection.call(protocol.Release(lease, key), 10.0).payload == [False]
    assert client.lookup([key]).tiers == ("cpu",)
    client.connection.call(protocol.Acquire(lease, key, 60.0), 10.0)
    assert client.connection.call(protocol.Release(lease, key), 10.0).payload == [True]
    assert client.lookup([key]).tiers != ("cpu",)


def test_an_arena_full_of_leased_objects_refuses_at_once_and_goes_on(daemon: Any) -> None:
    full = daemon(memory="1MiB", page_size="4KiB")
    client, other = full.client(), full.client()
    keys = list(store(client, 4, size=250_000))
    with client.acquire(keys):
        root = other.register(NAMESPACE)
        with other.reserve(root, [os.urandom(32)], [250_000]) as reservation:
            pass
        assert reservation.causes == ["full"]
        assert other.status()["counters"]["store.refused.full"] == 1
    store(other, 4, size=250_000)


def test_a_private_daemon_ends_with_its_last_client_and_writes_what_it_has(daemon: Any, tmp_path: Path) -> None:
    private = daemon(private=True, disk_path=tmp_path / "disk")
    one, two = private.client(), private.client()
    keys = store(one, 20)
    one.close()
    assert two.lookup(list(keys)).hits == 20
    two.close()
    assert private.process.wait(20) == 0
    assert {path.name for path in (tmp_path / "disk" / "objects").glob("*/*")} == {key.hex() for key in keys}
