# SPDX-License-Identifier: Apache-2.0
"""Many calls at once on one connection: each gets its own answer, or an error in bounded time."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from loracache.errors import ProtocolError, Rejected, Unavailable
from loracache.rest.link import DaemonLink
from loracache.wire import control_messages as messages
from loracache.wire import protocol


def test_each_call_gets_its_own_answer(running: Any, chain: Callable[[int], list[str]]) -> None:
    keys = [bytes.fromhex(key) for key in chain(20)]

    async def ask() -> list[int]:
        link = DaemonLink(running.url)
        calls = [link.call(protocol.Lookup(b"", b"".join(keys[: n % 21]), 1, 0.0)) for n in range(500)]
        answers = await asyncio.gather(*calls)
        link.close()
        return [len(tiers) for (tiers,) in answers]

    assert asyncio.run(ask()) == [n % 21 for n in range(500)]


def test_messages_that_the_socket_does_not_take_at_once_arrive(running: Any) -> None:
    async def ask() -> list[Any]:
        link = DaemonLink(running.url)
        large = [link.call(protocol.Lookup(b"", os.urandom(32 * 100_000), 1, 0.0)) for _ in range(8)]
        answers = await asyncio.gather(*large, link.call(protocol.Status()))
        link.close()
        return answers

    *lookups, (status,) = asyncio.run(ask())
    assert lookups == [[b""]] * 8
    assert status["tiers"]


def test_refusals_and_nonsense_are_errors_of_their_call_alone(running: Any) -> None:
    async def ask() -> tuple[Any, ...]:
        link = DaemonLink(running.url)
        answers = await asyncio.gather(
            link.call(messages.Pin("", "", {"keys": os.urandom(32)}, "gpu", 0.0, 0.0)),
            link.call(protocol.Flush()),
            return_exceptions=True,
        )
        await link.call(protocol.Flush())
        link.close()
        return answers

    refused, flushed = asyncio.run(ask())
    assert isinstance(refused, Rejected)
    assert list(flushed[0]) == ["disk"]


def test_a_lost_connection_fails_its_calls_and_the_next_makes_another(running: Any) -> None:
    async def ask() -> Any:
        link = DaemonLink(running.url)
        with pytest.raises((ProtocolError, Unavailable, Rejected)):
            await asyncio.gather(link.call(protocol.Lookup(b"", b"no key", 1, 0.0)), link.call(protocol.Flush()))
        found = await link.call(protocol.Status())
        link.close()
        return found

    assert asyncio.run(ask())[0]["tiers"]


def test_without_a_daemon_or_with_a_silent_one_calls_end(daemon: Any) -> None:
    running = daemon()

    async def ask() -> None:
        link = DaemonLink(running.url, timeout=1.0)
        await link.call(protocol.Flush())
        running.send(signal.SIGSTOP)
        results = await asyncio.gather(*[link.call(protocol.Flush()) for _ in range(5)], return_exceptions=True)
        assert all(isinstance(result, Unavailable) for result in results)
        running.send(signal.SIGCONT)
        await link.call(protocol.Flush(), 20.0)
        running.stop(signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await link.call(protocol.Flush())
        link.close()

    asyncio.run(ask())
