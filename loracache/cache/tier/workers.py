# SPDX-License-Identifier: Apache-2.0
"""Threads for calls that block: a tier's, and the reading of adapter files."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Workers"]

_T = TypeVar("_T")


class Workers:
    """Threads that take work from one queue, in its order.

    They are daemon threads: a call that hangs in a dead disk or server must not keep the process from ending, which it
    does in the standard library's pools.
    """

    def __init__(self, count: int, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ending = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Calls that no thread has taken up yet."""
        return self._queue.qsize()

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done, which raises nothing."""
        self._queue.put(work)

    async def result(self, work: Callable[[], _T]) -> _T:
        """Have `work` done, and wait on the event loop for what it returns or raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def tell(call: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(lambda: None if future.done() else call())

        def run() -> None:
            try:
                result = work()
            except StopIteration as error:  # which no future takes
                failed: Exception = RuntimeError(repr(error))
                tell(lambda: future.set_exception(failed))
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                failed = error
                tell(lambda: future.set_exception(failed))
            else:
                tell(lambda: future.set_result(result))

        self._queue.put(run)
        return await future

    def end(self) -> None:
        """Take no more work up; what is queued is dropped."""
        self._ending = True
        for _ in self._threads:
            self._queue.put(None)

    def ended(self, deadline: float) -> bool:
        """Wait until all threads have ended, but not beyond `deadline` (monotonic seconds)."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if work is None or self._ending:
                return
            work()
            del work  # and with it the buffers it holds
