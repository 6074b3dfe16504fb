# SPDX-License-Identifier: Apache-2.0
"""The connection to a daemon: what it does with answers that are late, wrong, out of order or missing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.client.connection import Connection, socket_path
from loracache.client.control import OperationReport
from loracache.errors import ConfigError, ProtocolError, Rejected, Unavailable
from loracache.results import OperationState
from loracache.wire import protocol
from loracache.wire.frames import Frames, frame

NAMESPACE = Namespace("model", "float32", "layout", 16)
ARENA = 16 * 4096


# -- with servers that are no daemon, or a broken one ------------------------------------------------------------------

Handler = Callable[[socket.socket], None]


def answer(number: int, status: int, payload: object) -> bytes:
    return frame([number, status, payload])


def requests(sock: socket.socket) -> Iterator[list[Any]]:
    frames = Frames()
    while data := sock.recv(1 << 20):
        yield from frames.feed(data)


def greet(sock: socket.socket, version: int = protocol.VERSION) -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, ARENA)
    socket.send_fds(sock, [protocol.Greeting(version, os.urandom(16), ARENA, 4096).encode()], [fd])
    os.close(fd)


@pytest.fixture
def server(short_tmp: Path) -> Iterator[Callable[[Handler], str]]:
    """server(handler) serves each connection with `handler` on a thread; answers the address."""
    ends: list[Callable[[], None]] = []

    def serve(handler: Handler) -> str:
        path = str(short_tmp / f"{len(ends)}.sock")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()

        def run() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock, contextlib.suppress(OSError):  # the client hung up first
                    handler(sock)

        thread = threading.Thread(target=run)
        thread.start()

        def end() -> None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(10)
            assert not thread.is_alive()

        ends.append(end)
        return f"unix://{path}"

    yield serve
    for end in ends:
        end()


def until_closed(sock: socket.socket) -> None:
    sock.settimeout(20)
    while sock.recv(1 << 20):
        pass


@pytest.mark.parametrize(
    "address", ["tcp://host:1", "http://x", "relative.sock", "", "unix://relative", "unix:///" + "x" * 200]
)
def test_an_address_that_is_no_unix_socket_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="server="):
        socket_path(address)


def test_an_address_may_be_a_plain_path() -> None:
    assert socket_path("/run/lc.sock") == socket_path("unix:///run/lc.sock") == "/run/lc.sock"


@pytest.mark.parametrize("kind", ["missing", "file", "stale"])
def test_where_nobody_listens_the_message_says_how_to_start_one(short_tmp: Path, kind: str) -> None:
    path = short_tmp / "lc.sock"
    if kind == "file":
        path.write_text("not a socket")
    elif kind == "stale":
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(path))
        dead.close()
    with pytest.raises(Unavailable, match=rf"no LoRACache daemon answers at {path}.*loracache serve --socket {path}"):
        CacheClient(f"unix://{path}")


@pytest.mark.parametrize(
    ("fails", "error", "what"),
    [
        ("socket.socket", errno.EMFILE, "no socket can be opened"),
        ("map_arena", errno.ENOMEM, "cannot be mapped"),
        ("map_arena", errno.EMFILE, "cannot be mapped"),
    ],
)
def test_a_process_without_room_for_a_connection_is_told_and_may_try_again(
    server: Any, monkeypatch: Any, fails: str, error: int, what: str
) -> None:
    def handler(sock: socket.socket) -> None:
        greet(sock)
        until_closed(sock)

    def refuse(*_: object) -> Any:
        raise OSError(error, os.strerror(error))

    connection = Connection(server(handler), name="test")
    with monkeypatch.context() as patched:
        patched.setattr(f"loracache.client.connection.{fails}", refuse)
        with pytest.raises(Unavailable, match=f"{what}.*: {os.strerror(error)}"):
            connection.connect()
        assert not connection.connected
    connection.connect()
    assert connection.connected
    connection.close()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "is it a LoRACache daemon"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is it a LoRACache daemon"),
        (b"\xff\xff\xff\xff", "is it a LoRACache daemon"),
    ],
)
def test_a_server_that_is_no_daemon_is_told_apart(server: Any, said: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        CacheClient(server(lambda sock: sock.sendall(said)))


def test_a_daemon_of_another_version_is_refused(server: Any) -> None:
    with pytest.raises(ProtocolError, match=f"protocol {protocol.VERSION + 1}"):
        CacheClient(server(lambda sock: greet(sock, protocol.VERSION + 1)))


def test_a_descriptor_that_comes_with_nonsense_is_closed(server: Any, eventually: Callable[..., Any]) -> None:
    def handler(sock: socket.socket) -> None:
        with open("/dev/null") as file:
            socket.send_fds(sock, [frame(["hello"])], [file.fileno()])

    url = server(handler)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ProtocolError):
            CacheClient(url)
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before, "both sides have closed what they opened")


def test_a_daemon_that_never_greets_is_given_up(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracache.client.connection._CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(Unavailable, match="it is there, but silent"):
        CacheClient(server(until_closed))


def test_a_daemon_that_never_answers_is_given_up_and_left(server: Any) -> None:
    def handler(sock: socket.socket) -> None:
        greet(sock)
        until_closed(sock)

    client = CacheClient(server(handler), timeout=0.2)
    with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s"):
        client.lookup([os.urandom(32)])
    assert not client.connection.connected  # its answer, should one come, belongs to nobody


def test_a_daemon_that_stops_reading_is_given_up_without_blocking(server: Any) -> None:
    done = threading.Event()

    def handler(sock: socket.socket) -> None:
        greet(sock)
        done.wait(20)

    connection = Connection(server(handler), name="test")
    connection.connect()
    lookup = protocol.Lookup(b"", bytes(32) * 100_000, 1, 0.0)
    sent = 0

    def flood() -> None:
        nonlocal sent
        while True:
            connection.send(lookup)
            sent += 1

    with pytest.raises(Unavailable):
        flood()
    done.set()
    assert 2 <= sent <= 10  # some megabytes wait for it, not more


def test_a_daemon_that_hangs_up_says_why(server: Any) -> None:
    def handler(sock: socket.socket) -> None:
        greet(sock)
        next(requests(sock))
        sock.sendall(answer(0, protocol.ERROR, "lookup: keys must be bytes"))

    client = CacheClient(server(handler))
    with pytest.raises(Unavailable, match=r"closed the connection \(lookup: keys must be bytes\)"):
        client.lookup([os.urandom(32)])


@pytest.mark.parametrize(
    "reply",
    [
        frame("nonsense"), frame([]), frame([1, 0]), frame([None, 0, []]),
        frame([[], 0, []]), b"\x01\0\0\0\xc1", b"\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_an_answer_that_is_none_closes_the_connection(server: Any, reply: bytes) -> None:
    def handler(sock: socket.socket) -> None:
        greet(sock)
        for _ in requests(sock):
            sock.sendall(reply)

    client = CacheClient(server(handler))
    with pytest.raises(ProtocolError):
        client.lookup([os.urandom(32)])
    assert not client.connection.connected


@pytest.mark.parametrize(
    "extents", [[], [0, 4096], [0, 4096, 8192, 0], [0, 8192, 8192, 4096], [ARENA, 8192], [ARENA - 4096, 8192]]
)
def test_extents_that_do_not_cover_the_object_are_refused(server: Any, extents: list[int]) -> None:
    def handler(sock: socket.socket) -> None:
        greet(sock)
        for number, operation, *_ in requests(sock):
            if operation == "acquire":
                sock.sendall(answer(number, protocol.OK, [[0, 8192, 0, extents]]))

    with CacheClient(server(handler)) as client, pytest.raises(ProtocolError, match="do not cover"):
        client.get([os.urandom(32)][0])


@pytest.mark.parametrize("cause", ["of another release", 7, None])
def test_a_cause_that_nobody_knows_is_a_malformed_answer_and_what_was_reserved_is_given_up(
    server: Any, cause: object, eventually: Callable[..., Any]
) -> None:
    seen: list[str] = []

    def handler(sock: socket.socket) -> None:
        greet(sock)
        for number, operation, *_ in requests(sock):
            seen.append(operation)
            if operation == "acquire":
                sock.sendall(answer(number, protocol.OK, [[0, cause]]))
            elif operation == "reserve":
                sock.sendall(answer(number, protocol.OK, [cause]))

    key = os.urandom(32)
    with CacheClient(server(handler)) as client:
        with pytest.raises(ProtocolError, match="unknown cause"):
            client.get(key)
        with pytest.raises(ProtocolError, match="unknown cause"), client.reserve(bytes(32), [key], [4096]):
            pass
        eventually(lambda: {"release", "abort"} <= set(seen), "both leases are given up")


@pytest.mark.parametrize("state", ["paused", None, []])
def test_an_operation_in_a_state_that_nobody_knows_is_a_malformed_answer(state: object) -> None:
    fields = {field.name: 0 for field in dataclasses.fields(OperationReport)} | {"state": state}
    with pytest.raises(ProtocolError, match="malformed"):
        OperationReport.of(fields)
    assert OperationReport.of(fields | {"state": "done"}).state is OperationState.DONE


def test_answers_are_collected_out_of_order_and_in_parts(server: Any) -> None:
    def handler(sock: socket.socket) -> None:
        greet(sock)
        waiting = []
        for number, operation, *_ in requests(sock):
            if operation == "hello":
                continue
            waiting.append(number)
            if len(waiting) == 3:
                sock.sendall(answer(waiting[2], protocol.OK, ["third"]))
                sock.sendall(answer(waiting[0], protocol.PART, ["a"]) + answer(waiting[1], protocol.ERROR, "no"))
                sock.sendall(answer(99, protocol.OK, ["nobody asked"]) + answer(waiting[0], protocol.OK, ["b"]))

    connection = Connection(server(handler), name="test")
    connection.connect()
    first, second, third = (connection.send(protocol.Status()) for _ in range(3))
    assert connection.take(first) is None
    assert connection.wait(first, 10).payload == ["a"]
    assert connection.wait(first, 10).payload == ["b"]
    with pytest.raises(Rejected, match="no"):
        connection.wait(second, 10)
    assert connection.wait(third, 10).payload == ["third"]
    with pytest.raises(Unavailable):
        connection.take(third)  # answered once
    connection.close()


def test_what_is_forgotten_is_not_kept(server: Any, eventually: Callable[..., Any]) -> None:
    def handler(sock: socket.socket) -> None:
        greet(sock)
        for number, operation, *_ in requests(sock):
            if operation != "hello":
                sock.sendall(answer(number, protocol.OK, []))

    connection = Connection(server(handler), name="test")
    connection.connect()
    numbers = [connection.send(protocol.Status()) for _ in range(10)]
    for number in numbers[:-1]:
        connection.forget(number)
    connection.wait(numbers[-1], 10)
    assert connection._replies == {}
    connection.close()


def test_nothing_is_sent_where_no_answer_is_wanted_and_nobody_is_there(server: Any) -> None:
    connection = Connection(server(greet), name="test")
    assert connection.send(protocol.Status(), answer=False) == 0
    with pytest.raises(Unavailable, match="not connected"):
        connection.send(protocol.Status())
    with pytest.raises(Unavailable, match="not connected"):
        connection.fileno()
    with pytest.raises(Unavailable, match="its arena with it"):
        connection.buffers([0, 4096], 4096)
