# SPDX-License-Identifier: Apache-2.0
"""The daemon's swapper: fitted to its cache, and what engines tell of their requests.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from loracache.cache.state.leases import Grip
from loracache.cache.swap.demand import Demand
from loracache.cache.swap.returns import Returns
from loracache.cache.swap.swapper import STEP_S, Swapper, SwapSettings
from loracache.cache.tiered import OPERATOR, Acquired, TieredCache
from loracache.config import Config
from loracache.keys import KEY_BYTES
from loracache.results import Cause
from loracache.tiers import Tier
from loracache.wire.protocol import Report, join_keys, split_keys

__all__ = ["Swapping"]

_HOT = 32  # adapters that an engine is told of
_MOST_ARRIVALS = 4096 * KEY_BYTES  # of one report
_MOST_WANTED = 32 * KEY_BYTES
_ASKED_S = 1.0  # between two looks at all rates of arrivals


class Swapping:
    """Of one daemon. clock(): seconds."""

    def __init__(self, cache: TieredCache, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._cache = cache
        self.demand = Demand(clock)
        self._clock = clock
        self._hottest: list[bytes] = []
        self._hottest_at = float("-inf")
        self.swapper = Swapper(
            cache.index,
            cache.arena,
            cache.counters,
            SwapSettings(on=True, bandwidth=config.swapper) if config.swapper else SwapSettings(),
            load=cache.ahead.load,
            evict=cache.ahead.evict,
            quiet=self._quiet,
            wanted=self._asked_for,
            seek=cache.ahead.seek if cache.redis is not None else None,
            speeds=cache.quotas.speeds,
            clock=clock,
        )
        self.returns = Returns(cache.index, cache.counters, self.swapper, self._raise, clock)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(STEP_S)
            self.step()

    def step(self) -> None:
        """What is due now."""
        self._cache.expect(self.demand.batch())
        self._measure()
        self.returns.step()
        self.swapper.step()

    def announce(self, name: bytes, keys: Sequence[bytes], seconds: float, hold: float) -> None:
        """See Returns.announce."""
        self.returns.announce(name, keys, seconds, hold)

    def take_report(self, engine: int, report: Report) -> list[Any]:
        """What an engine says of its requests; answers the keys of adapters that it may want on its own pages."""
        if report.running < 0:
            return []
        if report.prefill:
            self.demand.computes(engine, report.prefill)
        arrived, wanted = split_keys(report.adapters[:_MOST_ARRIVALS]), split_keys(report.wanted[:_MOST_WANTED])
        self.demand.report(engine, report.running, report.waiting, arrived, wanted)
        in_memory = (node for node in map(self._cache.index.get, self.demand.hottest(_HOT)) if node is not None)
        return [join_keys([node.key for node in in_memory if node.held_in(Tier.CPU)])]

    def describe(self) -> dict[str, Any]:
        """For `loracache status`."""
        leases, objects = self._cache.leases.held_by(OPERATOR)
        return self.swapper.describe() | {
            "held_leases": leases,
            "held_objects": objects,
            "returns": len(self.returns),
            "batch": round(self.demand.batch(), 2),
            "waiting": self.demand.waiting,
            "wanted": len(self.demand.wanted),
        }

    def _asked_for(self) -> list[bytes]:
        """Adapters that requests wait for, and then those asked for most."""
        now = self._clock()
        if now - self._hottest_at >= _ASKED_S:
            self._hottest, self._hottest_at = self.demand.hottest(_HOT), now
        return [*self.demand.wanted, *self._hottest]

    def _measure(self) -> None:
        """Let policies go by what engines and the disk really do."""
        speeds, disk = self._cache.quotas.speeds, self._cache.disk
        speeds.learn(prefill=self.demand.prefill)
        if disk is not None and disk.io.load_times.known:
            speeds.learn(disk=disk.io.load_times.bandwidth, disk_latency=disk.io.load_times.latency)

    def _quiet(self) -> bool:
        """Whether the tiers below have nothing to do for anybody: no load that was asked for, no queued write."""
        cache = self._cache
        if not cache.writers or (cache.disk is not None and not cache.disk.io.available):
            return False
        return cache.loading <= self.swapper.loading and not any(writer.depth for writer in cache.writers)

    def _raise(self, name: bytes, key: bytes, ttl: float, done: Callable[[Cause], None]) -> None:
        """One object, from wherever it is, held loosely under `name`."""
        cache = self._cache
        node = cache.index.get(key)
        over = cache.ahead.keeping_parent(node, done) if node is not None else done

        def ready(acquired: Sequence[Acquired]) -> None:
            if acquired[0].cause:
                cache.leases.release_empty(OPERATOR, name)
            over(acquired[0].cause)

        cache.acquire(OPERATOR, name, [key], ttl, ready, Grip.LOOSE)
