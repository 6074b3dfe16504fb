# SPDX-License-Identifier: Apache-2.0
"""Coroutines of the control path: begun at once, continued on the loop, ended by nothing but its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from loracache.control import steps
from loracache.control.steps import answer, start, turn


def run(play: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await play()

    asyncio.run(whole())


def test_what_need_not_wait_is_done_at_once_and_in_order() -> None:
    async def play() -> None:
        done: list[str] = []

        async def work(name: str, turns: int) -> None:
            for _ in range(turns):
                await turn()
            done.append(name)

        start(work("waits", 1))
        start(work("at once", 0))
        assert done == ["at once"]
        await turn()
        assert done == ["at once", "waits"]
        start(work("waits long", 3))
        for _ in range(3):
            assert done[2:] == []
            await turn()
        assert done[2:] == ["waits long"]
        await turn()
        assert not steps._under_way

    run(play)


def test_an_answer_comes_whether_it_was_there_at_once_or_comes_later_and_only_once() -> None:
    async def play() -> None:
        kept: list[Callable[[int], None]] = []
        got: list[int] = []

        async def work() -> None:
            def at_once(done: Callable[[int], None]) -> None:
                done(1)

            got.append(await answer(at_once))
            later: asyncio.Future[int] = answer(kept.append)
            got.append(await later)

        start(work())
        assert got == [1]
        kept[0](2)
        kept[0](3)
        for _ in range(3):
            await turn()
        assert got == [1, 2]

    run(play)


def test_the_end_of_the_loop_reaches_what_waits_and_lets_it_clean_up() -> None:
    ended: list[str] = []

    async def wait(name: str, first: bool) -> None:
        try:
            if not first:
                await turn()
            await asyncio.get_running_loop().create_future()
        finally:
            await turn()
            ended.append(name)

    async def play() -> None:
        start(wait("first wait", first=True))
        start(wait("second wait", first=False))
        await turn()
        await turn()

    run(play)
    assert sorted(ended) == ["first wait", "second wait"]


def test_a_future_that_fails_raises_where_it_is_waited_for() -> None:
    caught: list[str] = []

    async def work(future: asyncio.Future[None]) -> None:
        with pytest.raises(ValueError, match="as ordered") as raised:
            await future
        await turn()
        caught.append(str(raised.value))

    async def play() -> None:
        future = asyncio.get_running_loop().create_future()
        start(work(future))
        future.set_exception(ValueError("as ordered"))
        for _ in range(3):
            await turn()

    run(play)
    assert caught == ["as ordered"]
