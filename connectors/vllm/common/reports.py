# SPDX-License-Identifier: Apache-2.0
"""Workers' reports to the scheduler's side, each heard once.

Where a worker fails, vLLM (0.33) keeps what the others reported in that step and hands it over with a later one; a
count that was added up twice would say that an adapter is on pages where it is not.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from loracache.connectors.vllm.common.messages import WorkerNews

__all__ = ["ReportInbox", "ReportOutbox", "Reports"]

_REMEMBERED = 256


@dataclass(slots=True)
class Reports(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """News by (worker, number of its report)."""

    news: dict[tuple[bytes, int], WorkerNews]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reports:
        """All of both."""
        assert isinstance(other, Reports)
        return Reports(self.news | other.news)


class ReportOutbox:
    """One worker's."""

    def __init__(self) -> None:
        self._worker = os.urandom(8)  # its rank would be its successor's too
        self._number = 0

    def report(self, news: WorkerNews | None) -> Reports | None:
        """What vLLM carries over; nothing where there is no news."""
        if news is None:
            return None
        self._number += 1
        return Reports({(self._worker, self._number): news})


class ReportInbox:
    """The scheduler's side's."""

    def __init__(self) -> None:
        self._heard: dict[bytes, deque[int]] = {}

    def news(self, reports: object) -> WorkerNews | None:
        """What of these was not heard before, as one. reports: what vLLM carried over."""
        if not isinstance(reports, Reports):
            return None
        fresh = []
        for (worker, number), news in reports.news.items():
            heard = self._heard.setdefault(worker, deque(maxlen=_REMEMBERED))
            if number not in heard:
                heard.append(number)
                fresh.append(news)
        return functools.reduce(WorkerNews.aggregate, fresh) if fresh else None
