# SPDX-License-Identifier: Apache-2.0
"""What the daemon is told of this engine's requests, once a second with the counts: how many run and wait, the adapters
of those that have arrived since, and of those that wait, and how fast it computes KV. Threading: the scheduler's loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from loracache.connectors.vllm.link.scheduler import SchedulerLink

if TYPE_CHECKING:
    from loracache.connectors.vllm.scheduler.requests import RequestState

__all__ = ["Demand"]

_MOST_ARRIVALS = 4096  # told at once; the rest of a second is like them
_MOST_WANTED = 32  # adapters


class Demand:
    """Of one engine."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link
        self._arrived: list[RequestState] = []  # with an adapter, and not told of

    def arrived(self, state: RequestState) -> None:
        """A request that the daemon is to be told of."""
        if state.request.lora_request is not None and len(self._arrived) < _MOST_ARRIVALS:
            self._arrived.append(state)

    def step(
        self, running: int, requests: Collection[str], prefill: int = 0, waiting: Iterable[RequestState] = ()
    ) -> None:
        """A step is planned: of `requests`, by their ids, so many run in it, and these wait. prefill: bytes of KV that
        the engine computes a second; 0: it is not known."""
        if not self._link.reports_now():
            return
        known = [state for state in self._arrived if state.adapter is not None]
        adapters = [bytes.fromhex(state.adapter.digest) for state in known if state.adapter is not None]
        # What an adapter is becomes known as its request is looked up; of those that are over it never will be.
        self._arrived = [each for each in self._arrived if each.adapter is None and each.request.request_id in requests]
        wanted = Counter(state.adapter.digest for state in waiting if state.adapter is not None)
        most = [bytes.fromhex(digest) for digest, _ in wanted.most_common(_MOST_WANTED)]
        self._link.report(running, max(0, len(requests) - running), adapters, prefill, most)
