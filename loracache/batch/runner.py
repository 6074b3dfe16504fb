# SPDX-License-Identifier: Apache-2.0
"""Sends a batch's requests to its engines in the plan's order, as many at once as their KV has room for, and records
each answer as it comes.

One event loop. An engine that is gone is waited for; a request is tried again where a restart may mend what went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loracache.backoff import Backoff
from loracache.batch.bodies import answers
from loracache.batch.engine import Engine
from loracache.batch.holding import Holding
from loracache.batch.http import Answer, Server
from loracache.batch.job import Job, Lengths, make_job
from loracache.batch.journal import Journal
from loracache.batch.lines import BatchFile, Line, LineFault
from loracache.batch.pins import Pins
from loracache.batch.report import Report
from loracache.errors import ProtocolError, Unavailable, UsageError

__all__ = ["Limits", "Room", "Runner", "room_of"]

_PASSING = (408, 429, 500, 502, 503, 504)  # what another try, or a restart, may mend
_TRIES = 5
_PAUSES_S = (0.5, 30.0)
_HEALTH_S = 5.0
_OTHER_KV, _OTHER_BLOCK = 1 << 18, 16  # tokens, of engines that do not say


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


async def room_of(engines: Sequence[Engine], kv_tokens: int | None, block_tokens: int | None) -> Room:
    """What the engines say of their KV where it is not given: the smallest of them counts. Raises as Engine does."""
    facts = [await engine.facts() for engine in engines]
    rooms = [each.kv_tokens for each in facts if each.kv_tokens]
    blocks = [each.block_tokens for each in facts if each.block_tokens]
    return Room(
        kv_tokens or min(rooms, default=_OTHER_KV),
        block_tokens or max(blocks, default=_OTHER_BLOCK),
    )


@dataclass(slots=True)
class Runner:
    """One run of a batch. on_change: called after each change of the report. pins_of: what keeps a plan's prefixes in a
    cache while they are wanted."""

    file: BatchFile
    journal: Journal
    engines: Sequence[Engine]
    room: Room
    limits: Limits
    on_change: Callable[[Report], None] = lambda report: None
    pins_of: Callable[[Job], Pins] | None = None
    report: Report = field(default_factory=Report)

    async def run(self) -> Report:
        """All that is not answered yet. Raises Unavailable where an engine is gone for longer than the patience: what
        was answered by then is in the journal."""
        began = time.monotonic()
        try:
            job = await self._planned()
            pins = self.pins_of(job) if self.pins_of is not None else None
            self.report.planned_seconds = time.monotonic() - began
            parts = job.plan.parts(len(self.engines))
            async with asyncio.TaskGroup() as group:
                for engine, part in zip(self.engines, parts, strict=True):
                    group.create_task(self._drive(engine.server, job, pins, part.tolist()))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            self.report.seconds = time.monotonic() - began
        return self.report

    async def _planned(self) -> Job:
        lengths = Lengths()
        for earlier in self.journal.recorded():
            self.report.errors += earlier.failed
            self.report.resumed += not earlier.failed
            if earlier.decode:
                lengths.add(earlier.decode)
        self.report.requests = self.file.requests
        self.on_change(self.report)
        job = await make_job(
            self.file,
            self.engines[0].tokens,
            self.room.block_tokens,
            lengths,
            lambda number: number not in self.journal,
            self._fault,
        )
        with contextlib.suppress(UsageError):  # a request that fits no engine is refused when it is sent
            self.report.plan = job.plan.figures(self.room.kv_tokens, self.limits.running).as_dict()
        return job

    def _fault(self, fault: LineFault) -> None:
        """A line that is no request gets its line in the output, once."""
        if fault.number in self.journal:
            return
        error = {"code": "invalid_line", "message": fault.message, "param": fault.field or None, "line": fault.number}
        self._record(fault.number, _output(fault.custom_id, None, error), failed=True)

    async def _drive(self, server: Server, job: Job, pins: Pins | None, order: list[int]) -> None:
        """Send requests to one engine: each as soon as there is room for its prompt and answer behind those ahead."""
        holding = Holding(job.blocks.size, self.room.kv_tokens // self.room.block_tokens)
        tasks: dict[asyncio.Task[None], list[int]] = {}
        try:
            for request in order:
                path = job.blocks.path(request)
                while tasks and (len(tasks) >= self.limits.running or not holding.fits(path)):
                    await _some_end(tasks, holding)
                holding.take(path)
                tasks[asyncio.create_task(self._send(server, job, pins, request))] = path
            while tasks:
                await _some_end(tasks, holding)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, server: Server, job: Job, pins: Pins | None, request: int) -> None:
        """Send one request, and tell the cache of it."""
        line = self.file.line(job.lines[request])
        assert isinstance(line, Line)
        await self._answer(server, line, line.body if pins is None else pins.body(request, line))
        if pins is not None:
            await pins.answered(request, line)
            self.report.pinned, self.report.pin_failures = pins.objects, pins.failures

    async def _answer(self, server: Server, line: Line, body: dict[str, Any]) -> None:
        """Send one line until it is answered, refused, or has been tried often enough."""
        pauses = Backoff(*_PAUSES_S)
        for tried in range(1, _TRIES + 1):
            try:
                answer = await server.post(line.path, body)
            except (Unavailable, ProtocolError) as error:
                answer = Answer(0, str(error))
                await self._wait_for(server)
            if answer.status not in (0, *_PASSING) or tried == _TRIES:
                self._take(line, answer)
                return
            self.report.retries += 1
            await asyncio.sleep(pauses.next())

    async def _wait_for(self, server: Server) -> None:
        """Until the engine is there again. Raises Unavailable after the patience."""
        deadline = time.monotonic() + self.limits.patience
        pauses = Backoff(*_PAUSES_S)
        while True:
            try:
                status = (await server.get("/health", _HEALTH_S)).status
                if status < 500:
                    return
                told = f"{server.url} answers {status}"
            except (Unavailable, ProtocolError) as error:
                told = str(error)
            if time.monotonic() >= deadline:
                waited = f"waited {self.limits.patience:g} s"
                raise Unavailable(f"{told}; {waited}; what is answered is kept, and the same command goes on")
            await asyncio.sleep(min(pauses.next(), 5.0))

    def _take(self, line: Line, answer: Answer) -> None:
        if answer.status == 200:
            response = {"status_code": 200, "request_id": uuid.uuid4().hex, "body": answer.body}
            decode = self.report.count(answer.body) // answers(line)
            self._record(line.number, _output(line.custom_id, response, None), decode=decode)
            return
        body = answer.body
        told = body.get("error", body) if isinstance(body, dict) else {"message": str(body)}
        response = {"status_code": answer.status, "request_id": uuid.uuid4().hex, "body": body}
        error = told if answer.status else {"code": "unavailable", **told}
        passing = not answer.status or answer.status in _PASSING
        output = _output(line.custom_id, response if answer.status else None, error)
        self._record(line.number, output, failed=True, passing=passing)

    def _record(
        self, number: int, output: dict[str, Any], *, failed: bool = False, passing: bool = False, decode: int = 0
    ) -> None:
        self.journal.add(number, output, failed=failed, passing=passing, decode=decode)
        if failed:
            self.report.errors += 1
        else:
            self.report.answered += 1
        self.on_change(self.report)


async def _some_end(tasks: dict[asyncio.Task[None], list[int]], holding: Holding) -> None:
    """Wait until a request at least is answered. Raises what ended it otherwise."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        holding.release(tasks.pop(task))
        task.result()


def _output(custom_id: str | None, response: dict[str, Any] | None, error: Any) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
