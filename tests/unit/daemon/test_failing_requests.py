# SPDX-License-Identifier: Apache-2.0
"""A request that raises what nobody expected is logged, counted and answered; its connection serves on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.control.steps import turn
from loracache.daemon.session import Served, Session
from loracache.errors import Unknown, UsageError
from loracache.wire.frames import Frames, frame
from loracache.wire.protocol import ERROR, OK, UNKNOWN


class Transport:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self.frames = Frames()
        self.answers: list[Any] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.answers += self.frames.feed(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True


class Failing:
    """Stands where control and adapters are: raises what it is told to, at once or after a wait."""

    def __init__(self, error: Exception | None, waits: bool) -> None:
        self.error = error
        self.waits = waits

    async def serve(self, *_: Any) -> list[Any]:
        if self.waits:
            await turn()
        if self.error is not None:
            raise self.error
        return [{}]


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "said", "counted"),
    [
        (ZeroDivisionError("a bug"), ERROR, "ZeroDivisionError", 1),
        (UsageError("not so"), ERROR, "not so", 0),
        (Unknown("nobody"), UNKNOWN, "nobody", 0),
    ],
)
def test_whatever_a_request_raises_it_is_answered(
    make_rig: Callable[..., Any], caplog: pytest.LogCaptureFixture, waits: bool, error: Exception, status: int,
    said: str, counted: int,
) -> None:  # fmt: skip
    rig = make_rig()
    control: Any = Failing(error, waits)
    nothing: Any = SimpleNamespace()
    served = Served(
        rig.cache, nothing, nothing, nothing, control, dict, lambda session: None, lambda: None, nothing, nothing
    )
    peer: Any = SimpleNamespace(pid=1, uid=1)
    session, transport = Session(served, 1, peer), Transport()
    session.connection_made(transport)  # type: ignore[arg-type]
    rig.loop.within(lambda: session.data_received(frame([7, "config"])))
    rig.answer()
    ((number, answered, words),) = transport.answers
    assert (number, answered, said in words) == (7, status, True)
    assert rig.count("failure.control") == counted
    assert ("a bug" in caplog.text) == bool(counted)
    control.error = None
    rig.loop.within(lambda: session.data_received(frame([8, "config"])))
    rig.answer()
    assert (transport.answers[1:], transport.closed) == ([[8, OK, [{}]]], False)
