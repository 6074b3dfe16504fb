# SPDX-License-Identifier: Apache-2.0
"""Whose requests are served next: clients in turn, a millisecond each, and the connections of one client in turn.

A client is a process: one that opens many connections, or sends very much at once, gets no more than its turns. What
comes while nobody waits is served at once. Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from typing import Protocol

from loracache.cache.state.slices import TURN_S

__all__ = ["Turns", "Worker"]

_AT_ONCE_S = 0.003  # so much of one round of the loop may go to requests as they come
_LITTLE_S = 0.0005  # less than that is not worth to see when the round ends
_ROUND_S = 0.003  # what waits gets so much before the sockets are looked at again


class Worker(Protocol):
    """A connection that may have requests to serve."""

    client: int
    """Who is at its other end."""

    def work(self, deadline: float) -> bool:
        """Serve until `deadline` (perf_counter seconds); whether there is more to do."""


class Turns:
    """Gives turns to those who have work."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, deque[Worker]] = OrderedDict()  # by client, the next first
        self._spent = 0.0
        self._counting = False
        self._scheduled = False

    def ready(self, worker: Worker) -> None:
        """`worker`, which is not waiting for a turn, has work: it is done now, or begun, or it waits."""
        if worker.client not in self._waiting and self._spent < _AT_ONCE_S:
            now = time.perf_counter()
            more = worker.work(now + TURN_S)
            self._spent += time.perf_counter() - now
            if self._spent > _LITTLE_S and not self._counting:
                self._counting = True
                asyncio.get_running_loop().call_soon(self._count_anew)
            if not more:
                return
        self._waiting.setdefault(worker.client, deque()).append(worker)
        self._come_back()

    def _count_anew(self) -> None:
        self._counting = False
        self._spent = 0.0

    def _come_back(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        self._scheduled = False
        ends = time.perf_counter() + _ROUND_S
        while self._waiting:
            client, workers = self._waiting.popitem(last=False)
            worker = workers.popleft()
            now = time.perf_counter()
            if worker.work(now + TURN_S):
                workers.append(worker)
            if workers:
                self._waiting[client] = workers
            if now >= ends:
                break
        self._come_back()
