# SPDX-License-Identifier: Apache-2.0
"""The messages of the socket: what is sent is what arrives, and anything else is a ProtocolError that says what is
wrong.
"""

from __future__ import annotations

import contextlib
from dataclasses import MISSING, fields
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loracache.errors import ProtocolError, UsageError
from loracache.wire import control_messages, protocol
from loracache.wire.fields import CHECKS
from loracache.wire.frames import HEADER, MAX_FRAME, Frames, frame
from loracache.wire.protocol import Greeting
from loracache.wire.requests import OPERATIONS, decode_request

keys = st.integers(0, 5).flatmap(lambda count: st.binary(min_size=32 * count, max_size=32 * count))
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
selectors = st.fixed_dictionaries({}, optional={
    "keys": keys, "model": st.text(max_size=20), "tokens": st.just(bytes(8)), "adapter": st.text(max_size=20),
    "salt": digests,
})  # fmt: skip
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "adapters": keys,
    "beside": keys,
    "after": st.text(max_size=100),
    "by": st.text(max_size=100),
    "checksums": st.lists(st.integers(0, 2**64 - 1), max_size=5),
    "count": st.integers(1, 10_000),
    "counts": st.dictionaries(st.text("az09._", min_size=1, max_size=64), st.integers(0, 2**32 - 1), max_size=5),
    "delay": st.floats(0, 3600) | st.integers(0, 3600),
    "descriptor": st.text(max_size=100),
    "group": st.integers(1, 4096),
    "keep": st.booleans(),
    "keys": keys,
    "hard": st.integers(-1, 2**63 - 1),
    "kind": st.sampled_from(["tenant", "adapter", "model"]),
    "lease": st.sampled_from([b"", b"0123456789abcdef"]),
    "name": st.text(max_size=100),
    "names": st.lists(st.text(max_size=20), max_size=4),
    "namespace": st.binary(min_size=32, max_size=32),
    "parents": keys,
    "path": st.text(max_size=100),
    "priority": st.sampled_from(["", "low", "normal", "high"]),
    "prefill": st.integers(0, 2**63 - 1),
    "running": st.integers(-1, 2**31 - 1),
    "scope": st.just("") | digests,
    "selector": selectors,
    "since": st.integers(0, 2**63 - 1),
    "sizes": st.lists(st.integers(0, 2**64 - 1), max_size=5),
    "soft": st.integers(0, 2**63 - 1),
    "source": st.text(max_size=20),
    "tier": st.text(max_size=20),
    "tiers": st.lists(st.text(max_size=20), max_size=4),
    "ttl": st.floats(0, 3600) | st.integers(0, 3600),
    "wait": st.floats(0, 600) | st.integers(0, 600),
    "waiting": st.integers(-1, 2**31 - 1),
    "wanted": keys,
}
EXAMPLES: dict[str, Any] = {
    "checksums": [1, 2**64 - 1], "count": 10, "counts": {"a": 1}, "descriptor": "{}", "group": 1, "keys": bytes(64),
    "lease": bytes(16), "name": "x", "namespace": bytes(32), "parents": bytes(64), "path": "/x", "sizes": [1, 2],
    "tier": "cpu", "tiers": ["cpu"], "ttl": 1.5, "after": "", "by": "x", "keep": True, "names": ["x"], "scope": "",
    "kind": "tenant", "priority": "high", "soft": 1, "hard": -1,
    "selector": {"keys": bytes(32)}, "since": 0, "source": "cpu", "wait": 1.5,
    "adapters": bytes(32), "delay": 1.5, "running": 1, "prefill": 1, "waiting": 1, "wanted": bytes(32),
    "beside": bytes(64),
}  # fmt: skip
NONSENSE: dict[str, list[Any]] = {
    "adapters": [None, "x" * 32, bytes(31), [bytes(32)]],
    "beside": [None, "x" * 32, bytes(31), [bytes(32)]],
    "delay": [None, -1, 3601, float("nan"), float("inf"), True, "1"],
    "prefill": [None, -1, 2**63, 1.0, True, "1"],
    "running": [None, -2, 2**31, 1.0, True, "1"],
    "waiting": [None, -2, 2**31, 1.0, True, "1"],
    "wanted": [None, "x" * 32, bytes(31), [bytes(32)]],
    "checksums": [None, 1, [-1], [2**64], ["1"], [True], [1.0]],
    "count": [None, "1", True, 0, -1, 10_001, 1.0],
    "counts": [
        None,
        [],
        {"a": -1},
        {"a": 2**63},
        {"a": True},
        {1: 1},
        {"a" * 65: 1},
        {"": 1},
        {"A b": 1},
        {str(n): 1 for n in range(65)},
    ],
    "descriptor": [None, b"{}", "x" * (1 << 17)],
    "group": [0, -1, 4097, 1.0, True, "1"],
    "keys": [None, "x" * 32, bytes(31), [bytes(32)]],
    "lease": [None, "x" * 16, bytes(15), bytes(17)],
    "after": [None, b"", "x" * 301],
    "by": [None, b"x", "x" * 301],
    "hard": [None, -2, 2**63, 1.0, True],
    "keep": [None, 1, "true"],
    "kind": [None, "salt", ""],
    "name": [None, b"x", 1],
    "names": [None, "x", [1], ["x"] * 1001],
    "priority": [None, 1, "higher"],
    "scope": [None, "ab", "AB" * 32, b""],
    "selector": [
        None,
        [],
        {"key": b""},
        {"keys": bytes(31)},
        {"tokens": bytes(3)},
        {"salt": "x"},
        {"adapter": 1},
        {1: b""},
        {"model": "x" * 301},
        {"model": None},
    ],
    "since": [None, -1, 2**63, 1.0, True],
    "soft": [None, -1, 2**63, 1.0, True],
    "source": [None, 1],
    "wait": [None, -1, 601, float("nan"), True, "1"],
    "namespace": [None, b"", bytes(33), "x" * 32],
    "parents": [None, bytes(1)],
    "path": [None, b"/x"],
    "sizes": [None, [-1], [2**64], [None]],
    "tier": [None, 1],
    "tiers": [None, "cpu", [b"cpu"], [1]],
    "ttl": [None, -1, 3601, float("nan"), float("inf"), True, "1"],
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def received(data: bytes) -> list[Any]:
    return Frames().feed(data)


def decoded(data: bytes) -> list[Any]:
    return [decode_request(message) for message in received(data)]


def nested(depth: int, inner: bytes = b"\xc0") -> bytes:
    return b"\x91" * depth + inner


@given(st.data(), st.sampled_from(sorted(OPERATIONS)), st.integers(0, 2**63))
def test_every_request_arrives_as_it_was_sent(data: st.DataObject, operation: str, number: int) -> None:
    cls = OPERATIONS[operation]
    request = cls(**{field.name: data.draw(FIELDS[field.name]) for field in fields(cls)})
    (message,) = received(request.encode(number))
    assert decode_request(message) == (number, request)


def test_every_request_that_is_defined_is_listed() -> None:
    """What is not listed is an unknown operation to the daemon; what is and has no branch, mypy refuses."""
    defined = [value for module in (protocol, control_messages) for value in vars(module).values()]
    requests: list[Any] = [value for value in defined if isinstance(value, type) and "operation" in vars(value)]
    assert {request.operation: request for request in requests} == OPERATIONS
    assert all(issubclass(request, protocol.Request) for request in requests)


def test_every_field_there_is_is_tried_here() -> None:
    used = {field.name for cls in OPERATIONS.values() for field in fields(cls)}
    assert used == set(FIELDS) == set(EXAMPLES) == set(NONSENSE) == set(CHECKS)


@pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, field.name) for operation, cls in sorted(OPERATIONS.items()) for field in fields(cls)],
)
def test_a_wrong_field_is_named_with_its_operation(operation: str, name: str) -> None:
    names = [field.name for field in fields(OPERATIONS[operation])]
    decode_request([1, operation, *(EXAMPLES[field] for field in names)])
    for value in NONSENSE[name]:
        values = [value if field == name else EXAMPLES[field] for field in names]
        with pytest.raises(ProtocolError, match=rf"^{operation}: {name} must ") as caught:
            decode_request([1, operation, *values])
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
@pytest.mark.parametrize("more", [-1, 1])
def test_a_missing_or_extra_field_is_told_with_the_fields_there_are(operation: str, more: int) -> None:
    names = [field.name for field in fields(OPERATIONS[operation])]
    needed = [field.name for field in fields(OPERATIONS[operation]) if field.default is MISSING]
    count = len(names) + more if more > 0 else len(needed) + more
    if count >= 0:
        with pytest.raises(ProtocolError, match=rf"{operation} takes {len(names)} fields.*not {count}"):
            decode_request([1, operation, *[0] * count])


def test_a_field_that_came_later_may_be_missing_and_is_not_sent_where_it_says_nothing() -> None:
    """Older clients do not know it, and neither do older daemons."""
    reserve: Any = protocol.Reserve
    values = [EXAMPLES[field.name] for field in fields(reserve) if field.default is MISSING]
    number, request = decode_request([1, "reserve", *values])
    assert (number, request) == (1, reserve(*values, 0.0))
    (sent,) = Frames().feed(request.encode(1))
    assert sent == [1, "reserve", *values]
    (sent,) = Frames().feed(reserve(*values, 2.0).encode(1))
    assert sent == [1, "reserve", *values, 2.0]
    (sent,) = Frames().feed(reserve(*values, 0.0, bytes(32)).encode(1))
    assert sent == [1, "reserve", *values, 0.0, bytes(32)]


@pytest.mark.parametrize("operation", ["", "shutdown", "__class__", "encode", None, 7, [], b"status"])
def test_an_unknown_operation_is_refused(operation: object) -> None:
    with pytest.raises(ProtocolError, match="unknown operation"):
        decode_request([1, operation])


@pytest.mark.parametrize(
    "message", [None, 1, "status", {}, [], [1], ["1", "status"], [None, "status"], [True, "status"]]
)
def test_what_is_no_request_is_refused(message: object) -> None:
    with pytest.raises(ProtocolError, match="a request is a list"):
        decode_request(message)


@given(anything)
def test_decoding_raises_nothing_but_protocol_errors(message: Any) -> None:
    for attempt in (message, [1, message], [1, "lookup", message, message, message, message], [1, "report", message]):
        message_of_error = ""
        try:
            decode_request(attempt)
        except ProtocolError as error:
            message_of_error = str(error)
        assert len(message_of_error) < 600


@pytest.mark.parametrize("depth", [10, 500, 990, 1010, 20_000])
@pytest.mark.parametrize("place", ["message", "operation", "field"])
def test_deeply_nested_messages_are_refused(depth: int, place: str) -> None:
    body = {
        "message": nested(depth),
        "operation": b"\x92\x01" + nested(depth),
        "field": b"\x93\x01\xa5hello" + nested(depth),
    }[place]
    with pytest.raises(ProtocolError):
        decoded(HEADER.pack(len(body)) + body)


def test_a_huge_wrong_value_is_cut_in_the_message() -> None:
    for value in (b"x" * (4 << 20), "y" * (4 << 20), [1] * 100_000, {str(n): n for n in range(10_000)}):
        with pytest.raises(ProtocolError) as caught:
            decode_request([1, "lookup", value, b"", 1, 1.0])
        assert len(str(caught.value)) < 400


@given(st.lists(anything, max_size=5), st.data())
def test_frames_are_found_however_the_stream_is_cut(messages: list[Any], data: st.DataObject) -> None:
    packed = b"".join(map(frame, messages))
    expected = [msgpack.unpackb(msgpack.packb(message)) for message in messages]
    frames = Frames()
    found = []
    while packed:
        cut = data.draw(st.integers(1, len(packed)))
        found += frames.feed(packed[:cut])
        packed = packed[cut:]
    assert repr(found) == repr(expected)  # by their text: nan is not equal to itself
    assert len(frames) == 0


@given(st.lists(st.binary(max_size=40) | anything.map(frame), max_size=6))
def test_any_bytes_give_messages_or_a_protocol_error(pieces: list[bytes]) -> None:
    frames = Frames()
    with contextlib.suppress(ProtocolError):
        for piece in pieces:
            for message in frames.feed(piece):
                decode_request(message)


@given(st.binary(max_size=60))
def test_a_frame_of_any_bytes_is_a_message_or_a_protocol_error(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert len(decoded(HEADER.pack(len(body)) + body)) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        b"\x01\x02",
        b"\xa5ab",
        b"\xdd\xff\xff\xff\xff",
        b"\xa1\xff",
        b"\x81\x01\x02",
        b"\xd4\xff",
    ],
    ids=lambda body: body.hex(),
)
def test_a_frame_that_is_no_messagepack_says_so(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not MessagePack"):
        received(HEADER.pack(len(body)) + body)


def test_an_oversized_frame_is_refused_before_it_is_received() -> None:
    frames = Frames()
    with pytest.raises(ProtocolError, match=rf"{MAX_FRAME + 1} bytes; the limit is {MAX_FRAME}"):
        frames.feed(HEADER.pack(MAX_FRAME + 1))
    assert Frames().feed(HEADER.pack(MAX_FRAME)) == []


def test_a_message_that_would_be_oversized_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="send fewer keys"):
        frame(b"x" * MAX_FRAME)
    largest = frame(b"x" * (MAX_FRAME - 5))
    assert len(received(largest)[0]) == MAX_FRAME - 5


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=100))
@example([bytes([at]) * 32 for at in range(32)])
@example([bytes([at]) * 32 for at in range(97)])
def test_joined_keys_are_split_as_they_were(some: list[bytes]) -> None:
    assert protocol.split_keys(protocol.join_keys(some)) == some


@pytest.mark.parametrize("some", [[b"short"], [bytes(31), bytes(33)], [bytes(64)], [b""]])
def test_a_key_of_another_length_is_the_callers_mistake(some: list[bytes]) -> None:
    with pytest.raises(UsageError, match="32"):
        protocol.join_keys(some)


def test_a_greeting_arrives_as_it_was_sent() -> None:
    greeting = Greeting(protocol.VERSION, bytes(16), 1 << 40, 65536)
    (message,) = received(greeting.encode())
    assert Greeting.decode(message) == greeting


@pytest.mark.parametrize(
    "message",
    [
        None, [], [protocol.VERSION], "HTTP/1.1", ["1", b"", 0, 0], [protocol.VERSION, "x", 4096, 4096],
        [protocol.VERSION, b"x", "4096", 4096], [protocol.VERSION, bytes(16), -1, 4096],
        [protocol.VERSION, bytes(16), 4096, None],
    ],
)  # fmt: skip
def test_a_server_that_greets_otherwise_is_no_daemon(message: object) -> None:
    with pytest.raises(ProtocolError, match="did not greet"):
        Greeting.decode(message)


def test_a_daemon_of_another_version_is_told_apart() -> None:
    with pytest.raises(ProtocolError, match=rf"protocol {protocol.VERSION + 1}, this client {protocol.VERSION}"):
        Greeting.decode([protocol.VERSION + 1, bytes(16), 4096, 4096])
