# SPDX-License-Identifier: Apache-2.0
"""Runs a batch: plans what is not answered yet, has engines answer it, and records each answer as it comes. One event
loop; `driver` is what keeps one engine busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loracache.backoff import Backoff
from loracache.batch.bodies import answers
from loracache.batch.driver import PASSING, Crew, Driver, Limits, Room
from loracache.batch.engine import Engine, ask_all, ask_one
from loracache.batch.http import Answer
from loracache.batch.job import Job, Lengths, make_job
from loracache.batch.journal import Journal
from loracache.batch.lines import BatchFile, Line, LineFault
from loracache.batch.pins import Pins
from loracache.batch.report import EngineReport, Report
from loracache.batch.shares import Shares
from loracache.batch.tokenizing import Tokenizing
from loracache.errors import ConfigError, Unavailable, UsageError
from loracache.keys import TokenArray

__all__ = ["OTHER_BLOCK", "Limits", "Room", "Runner", "room_of"]

_PAUSES_S = (0.5, 5.0)  # while prompts are tokenized and no engine is there
_MOST_SAID = 2000  # characters of a server's page that an error shows
OTHER_BLOCK, _OTHER_KV = 16, 1 << 18  # tokens, of engines that do not say


async def room_of(engines: Sequence[Engine], kv_tokens: int | None, block_tokens: int | None) -> Room:
    """What the engines say of their KV where it is not given: the smallest of them counts. Raises as Engine does;
    Unavailable only where none of them answers."""
    facts = await ask_all(engines, Engine.facts)
    rooms = [each.kv_tokens for each in facts if each.kv_tokens]
    blocks = [each.block_tokens for each in facts if each.block_tokens]
    return Room(
        kv_tokens or min(rooms, default=_OTHER_KV),
        block_tokens or max(blocks, default=OTHER_BLOCK),
    )


@dataclass(slots=True)
class Runner:
    """One run of a batch. on_change: called after each change of the report. pins_of: what keeps a plan's prefixes in a
    cache while they are wanted. prioritized: the engines schedule by priority, and each request's is its place in the
    plan: sent side by side, requests may arrive in another order, and a prompt after a longer one that begins with it
    has its last block computed again."""

    file: BatchFile
    journal: Journal
    engines: Sequence[Engine]
    room: Room
    limits: Limits
    on_change: Callable[[Report], None] = lambda report: None
    pins_of: Callable[[Job], Pins] | None = None
    prioritized: bool = False
    report: Report = field(default_factory=Report)

    async def run(self) -> Report:
        """All that is not answered yet. Raises Unavailable where every engine is gone for longer than the patience:
        what was answered by then is in the journal."""
        began = time.monotonic()
        try:
            job = await self._planned()
            self.report.planned_seconds = time.monotonic() - began
            await self._drive(job)
            with contextlib.suppress(UsageError):  # a request that fits no engine was refused
                self.report.plan = job.figures(self.room.kv_tokens, self.limits.running).as_dict()
        except ExceptionGroup as failed:
            error = failed.exceptions[0]
            raise Unavailable(f"{error}; {self.journal.kept}") if isinstance(error, Unavailable) else error from None
        finally:
            self.report.seconds = time.monotonic() - began
        return self.report

    async def _drive(self, job: Job) -> None:
        pins = self.pins_of(job) if self.pins_of is not None else None
        shares = Shares(job.plan, [engine.there for engine in self.engines])
        crew = Crew(job, shares, self.room, self.limits)
        places = job.plan.order.argsort() if self.prioritized else None

        async def send(driver: Driver, request: int) -> None:
            line = self.file.line(job.lines[request])
            self._check_unchanged()
            assert isinstance(line, Line)
            body = line.body if pins is None else pins.body(request, line)
            if places is not None:
                body = body | {"priority": int(places[request])}
            answer = await driver.ask(line, body)
            self.report.retries += crew.tries[line.number] - 1
            self._take(line, answer, driver.report)
            shares.answered(driver.number, request)
            if pins is not None:
                await pins.answered(request, line)
                self.report.pinned, self.report.pin_failures = pins.objects, pins.failures

        self.report.engines = [EngineReport(engine.server.url) for engine in self.engines]
        sampled = asyncio.create_task(self._sample(crew))
        try:
            async with asyncio.TaskGroup() as group:
                for number, (engine, told) in enumerate(zip(self.engines, self.report.engines, strict=True)):
                    group.create_task(Driver(number, engine.server, crew, send, told).run())
        finally:
            sampled.cancel()
            await asyncio.wait([sampled])
            for told, taken in zip(self.report.engines, shares.taken, strict=True):
                told.taken_over = taken

    async def _sample(self, crew: Crew) -> None:
        """Until it is cancelled, at the end of the run, of which it takes the last sample."""
        began, report, going = time.monotonic(), self.report, True
        while going:
            try:
                await asyncio.sleep(report.samples.interval if report.samples.seconds else 0)
            except asyncio.CancelledError:
                going = False
            report.samples.add(
                time.monotonic() - began, report.answered, report.prompt_tokens, report.cached_tokens, crew.running
            )

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
            Tokenizing(self.file, self._wanted, self.room.block_tokens, self._tokens).tokens,
            self.room.block_tokens,
            lengths,
            self._wanted,
            self._fault,
        )
        self._check_unchanged()
        return job

    def _check_unchanged(self) -> None:
        """Raises ConfigError where the input is not what it was: nothing that was read of it counts."""
        if self.file.changed:
            raise ConfigError(
                f"{self.file.name} was changed while its batch runs; make it again what it was: {self.journal.kept}"
            )

    def _wanted(self, number: int) -> bool:
        return number not in self.journal

    async def _tokens(self, line: Line) -> TokenArray:
        """A prompt's. Raises Unavailable where no engine is there for longer than the patience."""
        deadline, pauses = time.monotonic() + self.limits.patience, Backoff(*_PAUSES_S)
        while True:
            try:
                return await ask_one(self.engines, lambda engine: engine.tokens(line))
            except Unavailable:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(pauses.next())

    def _fault(self, fault: LineFault) -> None:
        """A line that is no request gets its line in the output, once."""
        if fault.number in self.journal:
            return
        self._check_unchanged()
        error = {"code": "invalid_line", "message": fault.message, "param": fault.field or None, "line": fault.number}
        self._record(fault.number, _output(fault.custom_id, None, error), failed=True)

    def _take(self, line: Line, answer: Answer, engine: EngineReport) -> None:
        if answer.status == 200 and isinstance(answer.body, dict):
            response = {"status_code": 200, "request_id": uuid.uuid4().hex, "body": answer.body}
            decode = self.report.count(answer.body, engine) // answers(line)
            self._record(line.number, _output(line.custom_id, response, None), decode=decode)
            return
        response = {"status_code": answer.status, "request_id": uuid.uuid4().hex, "body": answer.body}
        error = _error(answer)
        passing = not answer.status or answer.status in PASSING
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


def _error(answer: Answer) -> dict[str, Any]:
    """What is said of an answer that is none: the server's own error, or one in its place."""
    body = answer.body
    if answer.status == 200:
        return {"code": "no_answer", "message": f"the server answered 200 and no JSON object: {str(body)[:200]!r}"}
    if not answer.status:
        return {"code": "unavailable", "message": str(body)}
    told = body
    if isinstance(body, dict):
        told = body.get("error") or {name: value for name, value in body.items() if name != "error"}
    known, said = {}, told
    if isinstance(told, dict):
        known = told
        said = told.get("message") or told.get("detail") or {name: told[name] for name in told if name != "message"}
    text = (said if isinstance(said, str) else json.dumps(said, ensure_ascii=False) if said else "").strip()
    text = text or f"the server answered {answer.status} and said nothing"
    return {"code": "refused", **known, "message": text if text == known.get("message") else text[:_MOST_SAID]}


def _output(custom_id: str | None, response: dict[str, Any] | None, error: Any) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
