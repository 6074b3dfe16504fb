# SPDX-License-Identifier: Apache-2.0
"""Threads whose work a coroutine waits for: what it returns or raises arrives on the loop, whatever it is."""

from __future__ import annotations

import asyncio
import threading

import pytest

from loracache.cache.tier.workers import Workers


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError("as ordered"), ValueError), (StopIteration("as ordered"), RuntimeError)]
)
def test_what_work_raises_is_raised_where_it_is_waited_for(error: Exception, raised: type[Exception]) -> None:
    def fail() -> None:
        raise error

    async def play() -> int:
        with pytest.raises(raised, match="as ordered"):
            await asyncio.wait_for(workers.result(fail), 30)
        return await asyncio.wait_for(workers.result(threading.get_ident), 30)

    workers = Workers(1, "test")
    try:
        assert asyncio.run(play()) != threading.get_ident()
    finally:
        workers.end()


def test_work_that_nobody_waits_for_any_more_disturbs_nobody() -> None:
    """The loop has ended before the thread has; the thread goes on with what is next."""
    go_on, done = threading.Event(), threading.Event()

    async def play() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(workers.result(lambda: go_on.wait(30)), 0.01)

    workers = Workers(1, "test")
    try:
        asyncio.run(play())
        go_on.set()
        workers.submit(done.set)
        assert done.wait(30)
    finally:
        workers.end()
