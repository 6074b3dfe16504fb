# SPDX-License-Identifier: Apache-2.0
"""Keeps one engine busy with its share of a batch: as many requests at once as its KV has room for, each tried again
where a restart may mend what went wrong. An engine that is gone is waited for, and loses its share to the others when
it stays away.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from loracache.backoff import Backoff
from loracache.batch.holding import Holding
from loracache.batch.http import Answer, Server
from loracache.batch.job import Job
from loracache.batch.lines import Line
from loracache.batch.report import EngineReport
from loracache.batch.shares import Shares
from loracache.errors import ProtocolError, Unavailable

__all__ = ["PASSING", "Crew", "Driver", "Limits", "Room"]

PASSING = (408, 429, 500, 502, 503, 504)  # what another try, or a restart, may mend
_TRIES = 5
_PAUSES_S = (0.5, 30.0)
_HEALTH_S, _LOOK_S = 5.0, 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """running: requests at once on each engine. patience: seconds for which an engine that is gone is waited for."""

    running: int = 256
    patience: float = 300.0


@dataclass(frozen=True, slots=True)
class Room:
    """KV of each engine, in tokens, and of its blocks."""

    kv_tokens: int
    block_tokens: int


class Crew:
    """What the drivers of a batch have in common. Made on the event loop that they run on."""

    def __init__(self, job: Job, shares: Shares, room: Room, limits: Limits) -> None:
        self.job, self.shares, self.room, self.limits = job, shares, room, limits
        self.tries: Counter[int] = Counter()
        """Of each line, on any engine."""
        self.running = 0
        """Requests under way."""
        self._loop = asyncio.get_running_loop()
        self.news: asyncio.Future[None] = self._loop.create_future()
        """Done when work was given back, or all is answered; then there is another."""

    def tell(self) -> None:
        """Wake those that have nothing to do."""
        self.news.set_result(None)
        self.news = self._loop.create_future()


@dataclass(slots=True)
class Driver:
    """Of the engine behind `server`, the `number`th. send: has a request answered by this driver, records that, and
    tells the shares."""

    number: int
    server: Server
    crew: Crew
    send: Callable[[Driver, int], Awaitable[None]]
    report: EngineReport
    _tasks: dict[asyncio.Task[None], list[int]] = field(default_factory=dict)

    async def run(self) -> None:
        """Until the whole batch is answered, by whichever engine. Raises Unavailable where this is the last that was
        left, and it is gone for longer than the patience."""
        shares = self.crew.shares
        if not shares.is_here(self.number):
            await self._come_back()
        while shares.unanswered:
            try:
                await self._work()
            except Unavailable:
                self.report.lost += 1
                if not shares.leave(self.number):
                    raise
                self.crew.tell()
                await self._come_back()

    async def ask(self, line: Line, body: dict[str, Any]) -> Answer:
        """The answer to one line, when it was answered, refused, or has been tried often enough; status 0 for none.
        Raises Unavailable where the engine is gone for longer than the patience."""
        pauses, tries = Backoff(*_PAUSES_S), self.crew.tries
        while True:
            tries[line.number] += 1
            try:
                answer = await self.server.post(line.path, body)
            except (Unavailable, ProtocolError) as error:
                answer = Answer(0, str(error))
            if answer.status not in (0, *PASSING) or tries[line.number] >= _TRIES:
                return answer
            if not answer.status or answer.status >= 500:  # a proxy answers for an engine that is gone
                await self._wait()
            await asyncio.sleep(pauses.next())

    async def _work(self) -> None:
        """Send requests: each as soon as there is room for its prompt and answer behind those ahead."""
        shares, blocks, room = self.crew.shares, self.crew.job.blocks, self.crew.room
        holding = Holding(blocks.size, room.kv_tokens // room.block_tokens)
        tasks = self._tasks
        try:
            while shares.unanswered:
                request = shares.first(self.number)
                if request is None:
                    await self._some_end(holding, self.crew.news)
                    continue
                path = blocks.path(request)
                if tasks and (len(tasks) >= self.crew.limits.running or not holding.fits(path)):
                    await self._some_end(holding)
                    continue
                holding.take(path)
                shares.begin(self.number)
                tasks[asyncio.create_task(self._have_answered(request))] = path
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            tasks.clear()

    async def _have_answered(self, request: int) -> None:
        self.crew.running += 1
        try:
            await self.send(self, request)
        finally:
            self.crew.running -= 1
        if not self.crew.shares.unanswered:
            self.crew.tell()

    async def _some_end(self, holding: Holding, *news: asyncio.Future[None]) -> None:
        """Wait until a request at least is answered, or there is news. Raises what ended it otherwise."""
        done, _ = await asyncio.wait([*self._tasks, *news], return_when=asyncio.FIRST_COMPLETED)
        for task in [each for each in self._tasks if each in done]:
            holding.release(self._tasks.pop(task))
            task.result()

    async def _wait(self) -> None:
        """Until the engine is there again. Raises Unavailable after the patience."""
        deadline = time.monotonic() + self.crew.limits.patience
        pauses = Backoff(*_PAUSES_S)
        while (told := await self._fault()) is not None:
            if time.monotonic() >= deadline:
                waited = f"waited {self.crew.limits.patience:g} s"
                raise Unavailable(f"{told}; {waited}")
            await asyncio.sleep(min(pauses.next(), _LOOK_S))

    async def _come_back(self) -> None:
        """Until the engine is there again and goes on, or nothing is left to do."""
        shares, pauses = self.crew.shares, Backoff(*_PAUSES_S)
        while shares.unanswered:
            if await self._fault() is None:
                shares.come_back(self.number)
                return
            await asyncio.wait([self.crew.news], timeout=min(pauses.next(), _LOOK_S))

    async def _fault(self) -> str | None:
        """What the engine's health says against sending it anything."""
        try:
            status = (await self.server.get("/health", _HEALTH_S)).status
        except (Unavailable, ProtocolError) as error:
            return str(error)
        return f"{self.server.url} answers {status}" if status >= 500 else None
