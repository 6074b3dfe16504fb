# SPDX-License-Identifier: Apache-2.0
"""Replays a trace against one configuration and says what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loracache.simulator.clock import Engines, Rates
from loracache.simulator.request import Request
from loracache.simulator.store import Found, Sizes, Store, Way
from loracache.tiers import Tier

__all__ = ["Run", "engines_for", "replay"]

_LOAD = 0.8  # of the engines, where nothing is found
_SAMPLES = 100  # of the share of invalid KV


@dataclass(frozen=True, slots=True)
class Run:
    """What one replay measured. Rates are shares of all tokens asked; times in seconds; bytes moved per tier;
    invalid_kv: the mean share of KV whose adapter was in no tier; busy_mean: what a request keeps an engine busy for;
    choice_us: microseconds of CPU by evicted object;
    seconds: of CPU that the replay took."""

    policy: str
    admission: str
    hit_rate: float
    hit_rate_cpu: float
    hit_rate_disk: float
    invalid_kv: float
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    busy_mean: float
    bytes_stored: int
    bytes_disk_written: int
    bytes_disk_read: int
    adapters_loaded: int
    evicted: int
    choice_us: float
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def engines_for(requests: Sequence[Request], rates: Rates) -> int:
    """As many as serve the trace at a load of 0.8 where nothing is found."""
    busy = sum(request.tokens for request in requests) / rates.prefill
    return max(1, round(busy / _LOAD / max(requests[-1].time, 1.0)))


def replay(requests: Sequence[Request], sizes: Sizes, way: Way, *, rates: Rates | None = None, engines: int = 0) -> Run:
    """Serve all `requests`; engines: 0 for `engines_for`."""
    began = time.process_time()
    rates = rates or Rates()
    queue = Engines(engines or engines_for(requests, rates))
    store = Store(sizes, way)
    asked = cpu = disk = read = 0
    invalid: list[float] = []
    busy = 0.0
    every = max(1, len(requests) // _SAMPLES)
    for number, request in enumerate(requests):
        found = store.serve(request)
        asked += request.tokens
        cpu += found.cpu
        disk += found.disk
        read += found.disk_bytes
        seconds = _seconds(request, found, rates)
        busy += seconds
        queue.serve(request.time, seconds)
        if not number % every:
            invalid.append(store.invalid_share())
    evicted = store.counts["evicted"]
    return Run(
        policy=way.label,
        admission=way.admission,
        hit_rate=(cpu + disk) / asked,
        hit_rate_cpu=cpu / asked,
        hit_rate_disk=disk / asked,
        invalid_kv=sum(invalid) / len(invalid),
        ttft_mean=queue.mean,
        ttft_p50=queue.percentile(0.5),
        ttft_p90=queue.percentile(0.9),
        ttft_p99=queue.percentile(0.99),
        busy_mean=busy / len(requests),
        bytes_stored=store.counts["stored"],
        bytes_disk_written=store.counts["disk_written"],
        bytes_disk_read=read,
        adapters_loaded=store.counts["adapters_loaded"],
        evicted=evicted,
        choice_us=store.choosing / evicted * 1e6 if evicted else 0.0,
        seconds=time.process_time() - began,
    )


def _seconds(request: Request, found: Found, rates: Rates) -> float:
    """What a request keeps an engine busy for."""
    computed = max(0, request.tokens - found.cpu - found.disk) / rates.prefill
    loaded = found.cpu_bytes / rates.cpu
    if found.disk_bytes:
        loaded += rates.below.from_disk(found.disk_bytes)
    if found.adapter is Tier.DISK:
        loaded += rates.below.from_disk(found.adapter_bytes)
    elif found.adapter is None:
        loaded += rates.below.from_origin(found.adapter_bytes)
    return computed + loaded
