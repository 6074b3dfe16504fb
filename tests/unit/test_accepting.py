# SPDX-License-Identifier: Apache-2.0
"""A listening socket on the event loop that nobody accepts from for a while."""

from __future__ import annotations

import asyncio
import socket

from loracache.accepting import Acceptor


def looks(steps: str) -> list[int]:
    """How often the loop saw the connection that waits, in each step of 0.1 s: s(tart), p(ause of 0.15 s), e(nd)."""
    found = [0]

    def accept() -> None:
        found[-1] += 1

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: accept())
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
            acceptor = Acceptor(listener, accept)
            for step in steps:
                match step:
                    case "s":
                        acceptor.start()
                    case "p":
                        acceptor.pause(0.15)
                    case "e":
                        acceptor.stop()
                found.append(0)
                await asyncio.sleep(0.1)

    asyncio.run(run())
    return found[1:]


def test_a_connection_is_not_looked_at_in_a_pause_and_is_again_behind_it() -> None:
    before, pause, behind, after = looks("sp..")
    assert before
    assert not pause
    assert behind
    assert after


def test_who_ends_in_a_pause_accepts_nobody_behind_it() -> None:
    assert looks("spe..")[1:] == [0, 0, 0, 0]
