# SPDX-License-Identifier: Apache-2.0
"""An acquire of very many keys is looked for as fast as it is answered, and ends with its lease."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.control.lookup import Finder
from loracache.daemon import data_requests
from loracache.daemon.data_requests import DataRequests
from loracache.namespaces import Namespaces
from loracache.results import Cause
from loracache.wire import protocol

LEASE = b"0123456789abcdef"
COUNT = 3 * data_requests._UNANSWERED
KEYS = [number.to_bytes(32, "big") for number in range(COUNT)]


class Engine:
    """A connection of an engine to a cache whose threads are stepped by hand."""

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        self.answers: dict[int, Any] = {}  # of keys, by position
        self.ends = 0
        self.asked = 0
        acquire = rig.cache.acquire

        def counted(owner: int, lease: bytes, keys: list[bytes], *more: Any) -> None:
            self.asked += len(keys)
            acquire(owner, lease, keys, *more)

        rig.cache.acquire = counted
        nothing: Any = None
        finder = Finder(rig.cache, 0.02)
        self.data = DataRequests(
            1, rig.cache, Namespaces(None), finder, nothing, self._answer, lambda number, work: rig.start(work)
        )

    def _answer(self, number: int, status: int, payload: Any) -> None:
        assert number == 7
        self.ends += status == protocol.OK
        for position, cause, *_ in payload:
            assert position not in self.answers
            self.answers[position] = cause

    def serve(self, request: Any) -> None:
        self.rig.loop.within(lambda: list(self.data.serve(7, request)))


@pytest.fixture
def engine(make_rig: Callable[..., Any]) -> Engine:
    return Engine(make_rig(redis=True))


def test_no_more_is_waited_for_at_a_time_than_is_answered(engine: Engine) -> None:
    engine.serve(protocol.Acquire(LEASE, b"".join(KEYS), 30.0))
    while engine.rig.posted or any(thread.run_one() for thread in engine.rig.threads()):
        engine.rig.answer()
        assert engine.asked - len(engine.answers) <= data_requests._UNANSWERED + data_requests._ACQUIRED
    assert engine.answers == dict.fromkeys(range(COUNT), Cause.ABSENT)
    assert (engine.asked, engine.ends) == (COUNT, 1)


@pytest.mark.parametrize("how", ["released", "gone"])
def test_it_ends_with_its_lease_which_is_not_opened_again(engine: Engine, how: str) -> None:
    engine.serve(protocol.Acquire(LEASE, b"".join(KEYS), 30.0))
    engine.rig.answer()
    asked = engine.asked
    engine.rig.cache.leases.release(1, LEASE)
    if how == "gone":
        engine.data.close()
    engine.rig.settle()
    assert engine.asked == asked < COUNT
    assert set(engine.answers) == set(range(COUNT))
    assert engine.answers[COUNT - 1] is Cause.LEASE_LOST
    assert len(engine.rig.cache.leases) == 0


def test_a_prefetch_of_as_many_is_answered_at_once(engine: Engine) -> None:
    engine.serve(protocol.Prefetch(LEASE, b"".join(KEYS), 30.0))
    assert engine.ends == 1
    engine.rig.settle()
    assert engine.asked == COUNT
