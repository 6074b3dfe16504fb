# SPDX-License-Identifier: Apache-2.0
"""What the daemon says a name stands for, asked from an event loop that must not wait for it.

A name is asked once at a time, however many requests want to know, on a thread of its own: the loop's other work has
its threads to itself. A daemon that does not answer in time is not asked again for anybody until a knock, repeated at
growing intervals, finds it answering: until then everybody is told at once that nobody can say.

Threading: `digest` runs on one event loop; `_Asker` on the one thread of the executor, but for `answers`, a flag that
both set.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from loracache.backoff import Backoff
from loracache.client import requests
from loracache.client.connection import Connection
from loracache.client.link import Outage, Retry
from loracache.errors import LoRACacheError, Unavailable

__all__ = ["ANSWER_S", "KNOCK_S", "NameQuestions"]

_log = logging.getLogger(__name__)

ANSWER_S = 1.0
"""For how long a request waits for an answer."""
KNOCK_S = 2.0
"""Longest time between two knocks."""
_FIRST_KNOCK_S = 0.25


class NameQuestions:
    """Questions to the daemon at `server`."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._asker = _Asker(server)
        self._thread = ThreadPoolExecutor(1, "loracache-names")
        self._questions: dict[str, asyncio.Future[str | None]] = {}
        self._knocking: asyncio.Task[None] | None = None
        self._outage = Outage(
            _log,
            "names of adapters are taken for what they stood for until it is back",
            "the daemon says again what names stand for",
        )

    async def digest(self, name: str) -> str | None:
        """The digest (hex) that a name points to now, None for no name of the cache. Raises Unavailable where nobody
        can say, and LoRACacheError as the daemon refuses."""
        if self._knocking is not None:
            raise Unavailable(f"no daemon answers at {self._server}")
        question = self._questions.get(name)
        if question is None:
            loop = asyncio.get_running_loop()
            question = self._questions[name] = loop.run_in_executor(self._thread, self._asker.ask, name)
            question.add_done_callback(lambda done: self._answered(name, done))
        await asyncio.wait([question], timeout=ANSWER_S)  # it goes on for others where this request is gone
        if not question.done():
            self._lost(Unavailable(f"no answer from {self._server} in {ANSWER_S:g} s"))
            raise Unavailable(f"no daemon answers at {self._server}")
        return question.result()

    def close(self) -> None:
        """End the thread and the connection; waits for the question under way."""
        if self._knocking is not None:
            self._knocking.cancel()
        self._thread.submit(self._asker.close)
        self._thread.shutdown()

    def _answered(self, name: str, question: asyncio.Future[str | None]) -> None:
        del self._questions[name]
        error = question.exception() if not question.cancelled() else None
        if isinstance(error, Unavailable):
            self._lost(error)

    def _lost(self, error: Unavailable) -> None:
        self._asker.answers = False
        if self._knocking is None:
            self._outage.goes_on(error)
            self._knocking = asyncio.get_running_loop().create_task(self._knock())

    async def _knock(self) -> None:
        retry, loop = Retry(Backoff(_FIRST_KNOCK_S, KNOCK_S)), asyncio.get_running_loop()
        while True:
            await asyncio.sleep(retry.tried())
            if await loop.run_in_executor(self._thread, self._asker.knock):
                break
        self._outage.over()
        self._knocking = None


class _Asker:
    """One connection, used on one thread."""

    def __init__(self, server: str) -> None:
        self.answers = True
        self._server = server
        self._connection = Connection(server, name="vllm-names")

    def ask(self, name: str) -> str | None:
        """See `NameQuestions.digest`. At once where an earlier question found nobody."""
        if not self.answers:
            raise Unavailable(f"no daemon answers at {self._server}")
        deadline = time.monotonic() + ANSWER_S
        try:
            return self._ask(name, deadline)
        except Unavailable:
            if time.monotonic() >= deadline:
                self.answers = False
                raise
        try:  # a daemon that was started anew is noticed only by asking
            return self._ask(name, deadline)
        except Unavailable:
            self.answers = False
            raise

    def knock(self) -> bool:
        """Whether the daemon answers, any answer."""
        try:
            self._ask("", time.monotonic() + ANSWER_S)
        except Unavailable:
            return False
        except LoRACacheError:
            pass
        self.answers = True
        return True

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _ask(self, name: str, deadline: float) -> str | None:
        connection = self._connection
        try:
            if not connection.connected:
                connection.begin()
                if not connection.greeted(deadline - time.monotonic()):
                    raise Unavailable(f"{self._server} does not greet")
            found = connection.call(requests.AdapterFind(name), max(0.0, deadline - time.monotonic())).payload
        except Unavailable:
            connection.close()
            self._connection = Connection(self._server, name="vllm-names")  # and the arena that it had mapped is let go
            raise
        return str(found[0]) if found else None
