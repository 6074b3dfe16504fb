# SPDX-License-Identifier: Apache-2.0
"""What operators asked the daemon to do and may take long: how far it is, what came of it, and who asked.

An operation is a coroutine; between two of its steps the daemon serves everybody else, and a cancelled one ends. Ended
ones are remembered for an hour, the last thousand of them. Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loracache.errors import LoRACacheError, Unknown
from loracache.results import Cause, OperationState

__all__ = ["Operation", "Operations", "JobTurns"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_REMEMBERED = 1000
_REMEMBERED_S = 3600.0


@dataclass(slots=True)
class Operation:
    """objects, nbytes: done by now. total: objects named, None where not known yet. saved: bytes that compression took
    off. causes: why objects were skipped, by count. scope: the tenant's salt digest, "" for the operator's own.
    """

    id: str
    verb: str
    by: str
    scope: str
    started: float
    state: OperationState = OperationState.RUNNING
    ended: float = 0.0
    total: int | None = None
    objects: int = 0
    nbytes: int = 0
    saved: int = 0
    causes: Counter[Cause] = field(default_factory=Counter)
    error: str = ""
    waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether there is more to come."""
        return self.state is OperationState.RUNNING

    def while_running(self, items: Iterable[_T]) -> Iterator[_T]:
        """The items, as long as there is more to come; none is made after that."""
        if self.running:
            for item in items:
                yield item
                if not self.running:
                    return

    async def over(self, seconds: float) -> None:
        """Wait for its end, but no longer than that."""
        if seconds and not self.ended:
            end = asyncio.get_running_loop().create_future()
            self.waiting.append(end)
            await asyncio.wait({end}, timeout=seconds)

    def skip(self, cause: Cause, count: int = 1) -> None:
        """Count objects that were left as they are."""
        if count:
            self.causes[cause] += count

    def describe(self) -> dict[str, Any]:
        """As users see it."""
        end = self.ended or time.time()
        return {
            "id": self.id, "verb": self.verb, "state": self.state.value, "started": self.started,
            "seconds": round(max(0.0, end - self.started), 3), "total": self.total, "objects": self.objects,
            "bytes": self.nbytes, "saved": self.saved, "skipped": sum(self.causes.values()),
            "causes": dict(self.causes), "error": self.error,
        }  # fmt: skip


class Operations:
    """All operations by id. ended(operation) is called with each that ended, for the audit log."""

    def __init__(self, ended: Callable[[Operation], None]) -> None:
        self._known: OrderedDict[str, Operation] = OrderedDict()
        self._over: deque[Operation] = deque()  # those of them that have ended, the first first
        self._on_ended = ended

    @property
    def running(self) -> int:
        """How many are under way."""
        return sum(operation.running for operation in self._known.values())

    def begin(self, verb: str, by: str, scope: str) -> Operation:
        """A new one."""
        operation = Operation(os.urandom(8).hex(), verb, by, scope, time.time())
        self._known[operation.id] = operation
        self._forget()
        return operation

    async def run(self, operation: Operation, work: Coroutine[Any, Any, None]) -> None:
        """Do its work. Where that raises, it has failed."""
        try:
            await work
        except LoRACacheError as error:
            _log.warning("operation %s (%s) failed: %s", operation.id, operation.verb, error)
            self.end(operation, str(error))
        except Exception as error:  # noqa: BLE001 - top of a coroutine: an operation must end, not hang
            _log.exception("operation %s (%s) failed", operation.id, operation.verb)
            self.end(operation, repr(error))
        else:
            self.end(operation)

    def end(self, operation: Operation, error: str = "") -> None:
        """It is over: done, failed where there is an error, or cancelled before."""
        if operation.ended:
            return
        operation.ended = time.time()
        self._over.append(operation)
        operation.error = error
        if operation.running:
            operation.state = OperationState.FAILED if error else OperationState.DONE
        waiting, operation.waiting = operation.waiting, []
        self._on_ended(operation)
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def get(self, id_: str, scope: str) -> Operation:
        """The one with that id, seen from a tenant. Raises Unknown."""
        self._forget()
        operation = self._known.get(id_)
        if operation is None or (scope and operation.scope != scope):
            raise Unknown(f"there is no operation {id_[:40]!a}; those that ended are remembered for an hour")
        return operation

    def latest(self, scope: str, count: int) -> list[Operation]:
        """The last begun, the latest first."""
        self._forget()
        seen = [operation for operation in reversed(self._known.values()) if not scope or operation.scope == scope]
        return seen[:count]

    def cancel(self, id_: str, scope: str) -> Operation:
        """Have it end before its next step; what is done stays done."""
        operation = self.get(id_, scope)
        if operation.running:
            operation.state = OperationState.CANCELLED
        return operation

    def stop(self) -> None:
        """Have all end before their next steps."""
        for operation in self._known.values():
            if operation.running:
                operation.state = OperationState.CANCELLED

    def end_all(self, error: str) -> None:
        """No step comes any more."""
        for operation in list(self._known.values()):
            self.end(operation, error)

    def _forget(self) -> None:
        since = time.time() - _REMEMBERED_S
        while self._over and (len(self._over) > _REMEMBERED or self._over[0].ended < since):
            del self._known[self._over.popleft().id]


class JobTurns:
    """Lets `most` operations work at once; the others wait, the first come first."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: OrderedDict[str, asyncio.Future[bool]] = OrderedDict()

    async def run(self, operation: Operation, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do `work` when it is the operation's turn, unless it leaves before."""
        if await self.take(operation):
            try:
                await work()
            finally:
                self.give_back()

    async def take(self, operation: Operation) -> bool:
        """Wait for the operation's turn, which ends with `give_back`. False where it left before."""
        if self._free:
            self._free -= 1
            return True
        waiting: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[operation.id] = waiting
        return await waiting

    def leave(self, operation: Operation) -> bool:
        """Whether the operation was waiting still; it no longer is."""
        waiting = self._waiting.pop(operation.id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(False)
        return waiting is not None

    def give_back(self) -> None:
        """An operation is over: the next."""
        if self._waiting:
            _, waiting = self._waiting.popitem(last=False)
            if not waiting.done():
                waiting.set_result(True)
        else:
            self._free += 1
