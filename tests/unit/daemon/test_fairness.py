# SPDX-License-Identifier: Apache-2.0
"""What one client sends keeps nobody else waiting: long requests go in slices, clients in turn, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.cache.state.slices import whole
from loracache.cache.swap.demand import Demand
from loracache.client.connection import Connection
from loracache.daemon import inbox
from loracache.daemon.inbox import Inbox
from loracache.daemon.session import Served, Session
from loracache.errors import ProtocolError, Rejected
from loracache.wire import protocol
from loracache.wire.frames import HEADER, MAX_FRAME, Frames, frame, unpack_in_slices
from loracache.wire.protocol import OK

NAMESPACE = Namespace("model", "float32", "layout", 16)


class Transport:
    """Keeps what is written to it, and whether it is read."""

    def __init__(self) -> None:
        self.frames = Frames()
        self.answers: list[Any] = []
        self.reads = True
        self.closed = False

    def write(self, data: bytes) -> None:
        self.answers += self.frames.feed(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def close(self) -> None:
        self.closed = True


class House:
    """A cache, and sessions of clients by the number of their process."""

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        nothing: Any = SimpleNamespace(engines=Counter(), demand=Demand(time.monotonic))
        finder: Any = SimpleNamespace(judge=lambda tiers, *asked: SimpleNamespace(tiers=tiers, cause="absent"))
        self.finder = finder
        self.served = Served(
            rig.cache, nothing, nothing, finder, nothing, dict, lambda session: None, lambda: None, nothing, nothing
        )

    def session(self, pid: int) -> tuple[Session, Transport]:
        peer: Any = SimpleNamespace(pid=pid, uid=1)
        session, transport = Session(self.served, len(self.served.waiting) + pid, peer), Transport()
        session.connection_made(transport)  # type: ignore[arg-type]
        return session, transport

    def send(self, session: Session, data: bytes) -> None:
        self.rig.loop.within(lambda: session.data_received(data))

    def turn(self) -> None:
        """One round of the loop."""
        for _ in range(len(self.rig.posted)):
            self.rig.posted.popleft()()


@pytest.fixture
def house(make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> House:
    for name in ("TURN_S", "_ROUND_S"):  # one slice a turn, one turn a round
        monkeypatch.setattr(f"loracache.daemon.turns.{name}", 0.0)
    return House(make_rig())


def lookup(number: int, count: int) -> bytes:
    return protocol.Lookup(b"", os.urandom(32 * count), 1, 1.0).encode(number)


def test_a_small_request_is_answered_beside_a_long_one_of_another_client(house: House) -> None:
    (busy, slow), (other, quick) = house.session(1), house.session(2)
    house.send(busy, lookup(1, 50_000))
    assert slow.answers == []
    house.send(other, protocol.Renew(bytes(16), 1.0).encode(7))
    for _ in range(3):
        house.turn()
    assert quick.answers == [[7, OK, [False]]]
    assert slow.answers == []
    for _ in range(100):
        house.turn()
    assert slow.answers == [[1, OK, [b""]]]


def test_requests_of_one_connection_stay_in_their_order_however_long_they_are(house: House) -> None:
    session, transport = house.session(1)
    house.send(session, lookup(1, 20_000) + lookup(2, 1) + lookup(3, 9000) + protocol.Renew(bytes(16), 1.0).encode(4))
    for _ in range(200):
        house.turn()
    assert [answer[0] for answer in transport.answers] == [1, 2, 3, 4]


def test_a_client_with_many_connections_gets_no_more_turns_than_one_with_one(house: House) -> None:
    many = [house.session(1) for _ in range(20)]
    (single, transport) = house.session(2)
    for session, _ in many:
        house.send(session, b"".join(protocol.Renew(bytes(16), 1.0).encode(n) for n in range(1, 200)))
    house.send(single, b"".join(protocol.Renew(bytes(16), 1.0).encode(n) for n in range(1, 50)))
    while len(transport.answers) < 49:
        house.turn()
    assert sum(len(each.answers) for _, each in many) < 3 * 49 + 20 * 2


def test_a_connection_with_much_to_serve_is_not_read_and_then_is_again(house: House) -> None:
    session, transport = house.session(1)
    house.send(session, lookup(1, 50_000))
    assert transport.reads
    house.send(session, lookup(2, 50_000))
    assert not transport.reads
    for _ in range(200):
        house.turn()
    assert (transport.reads, len(transport.answers)) == (True, 2)


def test_what_was_sent_before_the_end_is_served_before_it(house: House) -> None:
    session, transport = house.session(1)
    house.send(session, lookup(1, 50_000))
    assert session.eof_received()
    for _ in range(100):
        house.turn()
    assert (len(transport.answers), transport.closed) == (1, True)
    assert not house.session(2)[0].eof_received()  # nothing is left: closed at once


def test_a_turn_that_raises_does_not_end_those_of_others(house: House, caplog: pytest.LogCaptureFixture) -> None:
    session, transport = house.session(1)
    transport.abort = transport.close  # type: ignore[attr-defined]
    house.finder.judge = lambda tiers, *asked: 1 / 0
    house.send(session, lookup(1, 1))
    other, answered = house.session(2)
    house.send(other, protocol.Renew(bytes(16), 1.0).encode(1))
    for _ in range(5):
        house.turn()
    assert (transport.closed, answered.answers) == (True, [[1, OK, [False]]])
    assert "ZeroDivisionError" in caplog.text


# -- bounds ----------


def test_unfinished_messages_of_a_client_are_bounded_over_all_its_connections() -> None:
    waiting: Counter[int] = Counter()
    half = HEADER.pack(MAX_FRAME) + bytes(MAX_FRAME - 1)
    boxes = [Inbox(1, waiting, lambda error: None) for _ in range(5)]
    for box in boxes[:3]:
        box.add(half)
    Inbox(2, waiting, lambda error: None).add(half)
    boxes[3].add(half[:-100])
    with pytest.raises(ProtocolError, match="the limit is 33554432"):
        boxes[4].add(half)
    for box in boxes:
        box.close()
    assert waiting == {2: len(half)}


def test_a_frame_that_never_ends_ends_its_connection(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[ProtocolError] = []
    monkeypatch.setattr(inbox, "_WHOLE_S", 0.05)

    async def wait() -> None:
        box = Inbox(1, Counter(), late.append)
        whole = frame([1, "status"])
        box.add(whole + whole[:5])
        assert len(list(box.messages())) == 1
        box.rest()
        await asyncio.sleep(0.03)
        box.add(whole[5:] + whole[:5])
        assert len(list(box.messages())) == 1
        box.rest()
        await asyncio.sleep(0.03)
        assert not late
        await asyncio.sleep(0.05)

    asyncio.run(wait())
    assert "not within 0.05 s" in str(late[0])


@pytest.mark.parametrize("deep", [b"\x90", b"\x80", b"\x91\x01"])
def test_a_large_message_is_no_deeper_than_ours_are(deep: bytes) -> None:
    body = b"\x93\x01\xa6status" + b"\xdd" + struct.pack(">I", 100_000) + deep * 100_000
    began = time.process_time()
    if deep == b"\x91\x01":
        with pytest.raises(ProtocolError, match="not of ours"):
            list(unpack_in_slices(body))
    else:
        assert len(list(unpack_in_slices(body))) > 20  # slices
    assert time.process_time() - began < 10  # of the processor: no more for each than for the one before
    with pytest.raises(ProtocolError, match="8388603 items; the limit is 262144"):
        list(unpack_in_slices(b"\x91\xdd" + struct.pack(">I", MAX_FRAME - 5) + b"\x90" * 1000))


def test_a_large_message_is_decoded_as_a_small_one_is() -> None:
    message = [7, "reserve", bytes(70_000), [1, 2**63], {"keys": b"k", "model": "m"}, None, 1.5, [], {}]
    assert whole(unpack_in_slices(frame(message)[4:])) == message
    with pytest.raises(ProtocolError, match="stands behind"):
        list(unpack_in_slices(frame(message)[4:] + b"\1"))
    with pytest.raises(ProtocolError):
        list(unpack_in_slices(frame(message)[4:-3]))


def test_more_open_questions_than_may_be_are_refused_with_the_number(daemon: Any) -> None:
    client = daemon(memory="4MiB").client()
    wait = ["", "", 0, 1, 600.0]
    numbers = [client.connection.send(Raw("events", wait)) for _ in range(4097)]
    with pytest.raises(Rejected, match="4096 requests of this connection"):
        client.connection.wait(numbers[-1], 30)
    assert client.connection.call(protocol.Renew(bytes(16), 1.0), 30).payload == [False]


class Raw:
    """A request as it is sent."""

    def __init__(self, operation: str, values: list[Any]) -> None:
        self.operation = operation
        self.values = values

    def encode(self, number: int) -> bytes:
        return frame([number, self.operation, *self.values])


# -- the whole daemon ----------


def test_very_large_requests_are_answered_rightly(daemon: Any) -> None:
    running = daemon(memory="64MiB", page_size="4KiB")
    client: CacheClient = running.client()
    digest = client.register(NAMESPACE)
    count, lease = 10_000, os.urandom(16)
    keys = [os.urandom(32) for _ in range(count)]
    blob, parents = protocol.join_keys(keys), protocol.join_keys([protocol.NO_PARENT, *keys[:-1]])
    reserve = protocol.Reserve(lease, digest, blob, parents, [100] * count, 60.0)
    answers = client.connection.call(reserve, 60).payload
    assert all(isinstance(answer, list) for answer in answers)
    assert len({answer[0] for answer in answers}) == len(answers) == count
    assert client.connection.call(protocol.Commit(lease, blob, [0] * count), 60).payload == [""] * count
    look = protocol.Lookup(lease, blob + os.urandom(64), 1, 60.0)
    assert client.connection.call(look, 60).payload == [b"\1" * count]
    status: Any = client.status()
    assert (status["leased_objects"], status["misses"]["absent"], status["hits"]["cpu"]) == (count, 2, count)
    assert client.connection.call(protocol.Release(lease, b""), 60).payload == [True]
    number = client.connection.send(protocol.Acquire(lease, blob[32:] + os.urandom(32), 60.0))
    found: list[Any] = []
    while len(found) < count:
        found += client.connection.wait(number, 60).payload
    assert sorted(item[0] for item in found) == list(range(count))
    assert [item for item in found if len(item) == 2] == [[count - 1, "absent"]]
    assert client.connection.call(protocol.Release(lease, blob[:3200]), 60).payload == [True]
    status = client.status()
    assert (status["leases"], status["tiers"]["cpu"]["objects"]) == (0, count - 100)  # those that were reported bad


def test_a_client_that_ends_in_the_middle_of_a_long_request_leaves_nothing(daemon: Any, eventually: Any) -> None:
    running = daemon(memory="64MiB", page_size="4KiB")
    client = running.client()
    digest = client.register(NAMESPACE)
    connection = Connection(running.url, name="gone")
    connection.connect()
    count = 15_000
    reserve = protocol.Reserve(os.urandom(16), digest, os.urandom(32 * count), bytes(32 * count), [100] * count, 60.0)
    connection.send(reserve)
    connection.close()
    eventually(lambda: client.status()["connections"] == 1, "it is gone")
    status: Any = client.status()
    assert status["leases"] == 0


def test_half_frames_of_one_client_do_not_fill_the_memory(daemon: Any) -> None:
    running = daemon(memory="4MiB")
    client = running.client()
    half = frame([1, "report", "x" * (MAX_FRAME - 100)])[:-1]
    socks = []
    for _ in range(8):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(running.socket))
        sock.recv(4096)
        with contextlib.suppress(OSError):
            sock.sendall(half)
        socks.append(sock)
    status: Any = client.status()
    assert status["connections"] < 6
    assert status["counters"]["failure.protocol"] >= 3
    for sock in socks:
        sock.close()
