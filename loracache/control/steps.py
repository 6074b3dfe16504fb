# SPDX-License-Identifier: Apache-2.0
"""Coroutines of the control path: what takes several steps is written from top to bottom, and clients are answered
between the steps.

A coroutine waits for a tier with `await answer(...)` and lets others in with `await turn()`; all of them run on the
daemon's loop, so that between two waits nothing else happens. None is cancelled but at the daemon's end: a thread may
still read or write the pages that it holds. What shall end early is told so, and looks between its steps.
"""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from loracache.cache.state.slices import TURN_S

if TYPE_CHECKING:
    from loracache.cache.tier.io import TierIO

__all__ = ["all_written", "answer", "done", "start", "turn"]

_T = TypeVar("_T")
_under_way: set[asyncio.Task[None]] = set()  # a loop keeps no task alive by itself


def start(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which raises nothing: up to its first wait at once, so that requests which need not wait are served
    in the order they came, and from there on as a task. Before that there is no current task, as asyncio.timeout and
    asyncio.wait_for need one; asyncio.wait does not.
    """
    try:
        step = work.send(None)
    except StopIteration:
        return
    task = asyncio.get_running_loop().create_task(_rest(work, step))
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)


async def turn() -> None:
    """Let the loop do everything else that is ready."""
    await asyncio.sleep(0)


async def done(work: Generator[None, None, _T]) -> _T:
    """What `work` returns, which is done in slices; others are let in after each millisecond of it."""
    while True:
        deadline = time.perf_counter() + TURN_S
        while time.perf_counter() < deadline:
            try:
                next(work)
            except StopIteration as end:
                result: _T = end.value
                return result
        await turn()


def answer(ask: Callable[[Callable[[_T], None]], object]) -> asyncio.Future[_T]:
    """What `ask` hands to the callable that it is given, now or later; it is called on the loop."""
    future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

    def answered(value: _T) -> None:
        if not future.done():
            future.set_result(value)

    ask(answered)
    return future


def all_written(redis: TierIO) -> asyncio.Future[None]:
    """Done once all writes and deletions asked for by now are."""
    written: asyncio.Future[None] = answer(lambda done: redis.when_written(lambda: done(None)))
    return written


async def _rest(work: Coroutine[Any, Any, None], step: Any) -> None:
    await _go_on(work, step)


@types.coroutine
def _go_on(work: Coroutine[Any, Any, None], step: Any) -> Generator[Any, Any, None]:
    """`work` from its first wait on, which `step` is: a future, or None where it waits for a turn, which it now has."""
    try:
        if step is None:
            step = work.send(None)
        while True:
            try:
                sent = yield step
            except BaseException as error:  # noqa: BLE001 - the daemon's end: it is raised in `work`
                step = work.throw(error)
            else:
                step = work.send(sent)
    except StopIteration:
        return
