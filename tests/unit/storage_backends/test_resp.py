# SPDX-License-Identifier: Apache-2.0
"""Replies come through whole and in their order, however the connection cuts them."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.storage_backends.redis.resp import ErrorReply, ProtocolFault, Wire

SIZE = 300_000  # more than a socket holds


def value(size: int) -> bytes:
    payload = random.Random(size).randbytes(size)
    return b"$%d\r\n%b\r\n" % (size, payload)


WHOLE, OTHER, SHORT = value(SIZE), value(SIZE + 7), value(5)
NIL, ERROR, STATUS = b"$-1\r\n", b"-OOM no room\r\n", b"+OK\r\n"


@contextlib.contextmanager
def talk(replies: bytes, cuts: Sequence[int] = (), pause: float = 0.0) -> Iterator[Wire]:
    """A wire whose peer sends `replies` cut at `cuts`, and then ends."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        edges = sorted({0, len(replies), *(cut for cut in cuts if cut < len(replies))})
        with theirs:
            for start, end in itertools.pairwise(edges):
                theirs.sendall(replies[start:end])
                time.sleep(pause)

    sender = threading.Thread(target=send)
    sender.start()
    with ours:
        yield Wire(ours, 10.0, SIZE)
        sender.join()


def receive(wire: Wire, reply: bytes, views: int) -> None:
    """Takes one reply into `views` buffers of SIZE bytes together, and checks it."""
    buffer = bytearray(SIZE)
    edges = [SIZE * number // views for number in range(views + 1)]
    got = wire.reply_into([memoryview(buffer)[start:end] for start, end in itertools.pairwise(edges)])
    if reply is WHOLE:
        assert got == SIZE
        assert WHOLE.endswith(b"%b\r\n" % bytes(buffer))
    elif reply is ERROR:
        assert got == ErrorReply("OOM no room")
    else:
        assert got == {OTHER: SIZE + 7, SHORT: 5, NIL: None}[reply]


@given(
    replies=st.lists(st.sampled_from([WHOLE, OTHER, SHORT, NIL, ERROR]), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 4 * SIZE), max_size=6),
    views=st.integers(1, 5),
)
def test_values_land_where_they_should_and_what_follows_is_read_right(
    replies: list[bytes], cuts: list[int], views: int
) -> None:
    with talk(b"".join(replies) + STATUS, cuts) as wire:
        for reply in replies:
            receive(wire, reply, views)
        assert wire.reply() == b"OK"
        assert wire.finished()


@pytest.mark.parametrize("reply", [WHOLE, OTHER, NIL, ERROR], ids=["whole", "other", "nil", "error"])
def test_a_line_that_comes_byte_by_byte_is_read_right(reply: bytes) -> None:
    with talk(reply + STATUS, range(1, 12), pause=0.003) as wire:
        receive(wire, reply, 1)
        assert wire.reply() == b"OK"


@pytest.mark.parametrize("left", [0, 3, len(b"$300000\r\n"), 1000, len(WHOLE) - 1])
def test_a_peer_that_ends_in_the_middle_is_told_from_a_value(left: int) -> None:
    with talk(WHOLE[:left]) as wire, pytest.raises(ConnectionResetError):
        receive(wire, WHOLE, 2)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"+O"])
def test_a_value_longer_than_it_said_ends_the_talk(end: bytes) -> None:
    with talk(WHOLE[:-2] + end) as wire, pytest.raises(ProtocolFault, match="does not end where its length says"):
        receive(wire, WHOLE, 1)


def test_a_silent_peer_is_given_up_in_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(WHOLE[:1000])
        started = time.monotonic()
        with pytest.raises((TimeoutError, BlockingIOError)):
            receive(Wire(ours, 0.2, 0), WHOLE, 1)
        assert time.monotonic() - started < 20
