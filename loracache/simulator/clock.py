# SPDX-License-Identifier: Apache-2.0
"""The model of time: what loads and prefill take, and how long a request waits for an engine.

Time to first token = waiting for one of the engines + loading what was found + computing the rest. An engine serves one
prompt at a time, in the order of arrival; decoding and batches are left aside, which is the same for every policy.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from loracache.cache.policy.worth import Speeds

__all__ = ["Engines", "Hardware"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """prefill in tokens a second of one engine; cpu in bytes a second; below: what is slower, as the policies that
    weigh costs suppose it. The defaults are a model of 8B parameters on one GPU, and PCIe."""

    prefill: float = 8_000.0
    cpu: float = 20e9
    below: Speeds = field(default_factory=Speeds)


@dataclass(slots=True)
class Engines:
    """When each of `count` engines is free again."""

    count: int
    waits: list[float] = field(default_factory=list)
    _free_at: list[float] = field(default_factory=list)

    def serve(self, arrival: float, seconds: float) -> float:
        """The time to first token of a request that keeps an engine busy for `seconds`."""
        if len(self._free_at) < self.count:
            start = arrival
            heapq.heappush(self._free_at, start + seconds)
        else:
            start = max(arrival, self._free_at[0])
            heapq.heapreplace(self._free_at, start + seconds)
        ttft = start + seconds - arrival
        self.waits.append(ttft)
        return ttft

    def serve_all(self, arrivals: Iterable[float], seconds: Iterable[float]) -> Engines:
        """A whole trace: when each request arrives, and what it keeps an engine busy for."""
        for arrival, each in zip(arrivals, seconds, strict=True):
            self.serve(arrival, each)
        return self

    def percentile(self, share: float) -> float:
        """Of all times to first token so far."""
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def mean(self) -> float:
        """Of all times to first token so far."""
        return sum(self.waits) / len(self.waits) if self.waits else 0.0
