# SPDX-License-Identifier: Apache-2.0
"""Replays a trace against one configuration and says what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loracache.simulator.clock import Engines, Hardware
from loracache.simulator.request import Request
from loracache.simulator.store import Found, Sizes, Store, Way
from loracache.simulator.swapping import Prefetch, parse_prefetch
from loracache.tiers import Tier

__all__ = ["LOAD", "Replay", "Run", "engines_for", "replay"]

LOAD = 0.8  # of the engines, where nothing is found
_SAMPLES = 100  # of the share of invalid KV


@dataclass(frozen=True, slots=True)
class Run:
    """What one replay measured. Rates are shares of all tokens asked; times in seconds; bytes moved per tier;
    invalid_kv: the mean share of KV whose adapter was in no tier; invalid_kv_cpu: of KV in memory, whose adapter was
    not there; busy_mean: what a request keeps an engine busy for; choice_us: microseconds of CPU by evicted object;
    seconds: of CPU that the replay took; prefetched: objects raised ahead, of which some were used by the end and some
    left memory unused."""

    policy: str
    admission: str
    hit_rate: float
    hit_rate_cpu: float
    hit_rate_disk: float
    invalid_kv: float
    invalid_kv_cpu: float
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
    prefetch: str = "none"
    prefetched: int = 0
    prefetched_bytes: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def engines_for(requests: Sequence[Request], hardware: Hardware, load: float = LOAD) -> int:
    """As many as serve the trace at about that load where nothing is found."""
    return max(1, round(_busy(requests, hardware) / load / max(requests[-1].time, 1.0)))


class Replay:
    """What one configuration makes of a trace: the tiers know no clock, so one replay holds for every load of the
    engines. prefetch: see swapping.py. restart: seconds after which memory is empty again once, 0: never. seconds: what
    each request keeps an engine busy for."""

    def __init__(
        self,
        requests: Sequence[Request],
        sizes: Sizes,
        way: Way,
        hardware: Hardware | None = None,
        *,
        prefetch: str = "none",
        restart: float = 0.0,
    ) -> None:
        began = time.process_time()
        self._requests = requests
        self._way = way
        self._hardware = hardware or Hardware()
        self._store = store = Store(sizes, way, self._hardware.below)
        self.seconds: list[float] = []
        self._cpu = self._disk = self._read = 0
        self._invalid: list[tuple[float, float]] = []
        self._prefetch = prefetch
        self._ahead = Prefetch(store, requests, *parse_prefetch(prefetch))
        every = max(1, len(requests) // _SAMPLES)
        for number, request in enumerate(requests):
            if 0 < restart <= request.time:
                store.restart()
                restart = 0.0
            self._ahead.until(request.time)
            found = store.serve(request)
            self._ahead.served(number)
            self._cpu += found.cpu
            self._disk += found.disk
            self._read += found.disk_bytes
            self.seconds.append(_seconds(request, found, self._hardware))
            if not number % every:
                self._invalid.append((store.invalid_share(), store.invalid_share(Tier.CPU)))
        self._took = time.process_time() - began

    def queue(self, engines: int = 0, load: float | None = None) -> Engines:
        """The engines after all requests. engines: 0 for `engines_for`. load: arrivals come that much closer together,
        or further apart, that the work would keep so much of the engines busy if nothing was found; None: as they
        are in the trace."""
        count = engines or engines_for(self._requests, self._hardware, load or LOAD)
        pace = 1.0
        if load is not None:
            pace = _busy(self._requests, self._hardware) / (count * load * max(self._requests[-1].time, 1.0))
        return Engines(count).serve_all((request.time * pace for request in self._requests), self.seconds)

    def run(self, engines: int = 0, load: float | None = None) -> Run:
        """All figures, at one load."""
        queue = self.queue(engines, load)
        counts, asked = self._store.counts, sum(request.tokens for request in self._requests)
        evicted = counts["evicted"]
        return Run(
            policy=self._way.label,
            admission=self._way.admission,
            hit_rate=(self._cpu + self._disk) / asked,
            hit_rate_cpu=self._cpu / asked,
            hit_rate_disk=self._disk / asked,
            invalid_kv=sum(all_tiers for all_tiers, _ in self._invalid) / len(self._invalid),
            invalid_kv_cpu=sum(cpu for _, cpu in self._invalid) / len(self._invalid),
            ttft_mean=queue.mean,
            ttft_p50=queue.percentile(0.5),
            ttft_p90=queue.percentile(0.9),
            ttft_p99=queue.percentile(0.99),
            busy_mean=sum(self.seconds) / len(self._requests),
            bytes_stored=counts["stored"],
            bytes_disk_written=counts["disk_written"],
            bytes_disk_read=self._read,
            adapters_loaded=counts["adapters_loaded"],
            evicted=evicted,
            choice_us=self._store.choosing / evicted * 1e6 if evicted else 0.0,
            seconds=self._took,
            prefetch=self._prefetch,
            **self._ahead.told(),
        )


def replay(
    requests: Sequence[Request],
    sizes: Sizes,
    way: Way,
    *,
    hardware: Hardware | None = None,
    engines: int = 0,
    prefetch: str = "none",
    restart: float = 0.0,
) -> Run:
    """Serve all `requests` as they come in the trace; engines: 0 for `engines_for`."""
    return Replay(requests, sizes, way, hardware, prefetch=prefetch, restart=restart).run(engines)


def _busy(requests: Sequence[Request], hardware: Hardware) -> float:
    return sum(request.tokens for request in requests) / hardware.prefill


def _seconds(request: Request, found: Found, hardware: Hardware) -> float:
    """What a request keeps an engine busy for."""
    computed = max(0, request.tokens - found.cpu - found.disk) / hardware.prefill
    loaded = found.cpu_bytes / hardware.cpu
    if found.disk_bytes:
        loaded += hardware.below.from_disk(found.disk_bytes)
    if found.adapter is Tier.DISK:
        loaded += hardware.below.from_disk(found.adapter_bytes)
    elif found.adapter is None:
        loaded += hardware.below.from_origin(found.adapter_bytes)
    return computed + loaded
