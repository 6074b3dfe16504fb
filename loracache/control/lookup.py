"""Finds how far a chain is held, in Redis too, in bounded time. Threading: the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result
from loracache.tiers import Tier

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache

__all__ = ["Finder"]

Found = Callable[["list[Tier]", Cause], None]
"""Takes the fastest tier of each leading key that is held, and why the one behind them is not."""


class Finder:
    """Asks the index, and Redis for what that does not know; redis_s: for how many seconds at most."""

    def __init__(self, cache: TieredCache, redis_s: float) -> None:
        self._cache = cache
        self._redis_s = redis_s

    def find(self, keys: Sequence[bytes], found: Found) -> None:
        """Call `found` once: in this call where Redis need not be asked."""
        tiers = self._cache.lookup(keys)
        redis = self._cache.redis
        if redis is None or len(tiers) == len(keys):
            found(tiers, Cause.ABSENT)
        elif redis.io.asked_too_long(self._redis_s):
            found(tiers, Cause.REDIS_SLOW)
        else:
            self._ask_redis(keys, tiers, found)

    def _ask_redis(self, keys: Sequence[bytes], tiers: list[Tier], found: Found) -> None:
        redis = self._cache.redis
        assert redis is not None
        open_still = True

        def finish(more: list[Tier], cause: Cause) -> None:
            nonlocal open_still
            if open_still:
                open_still = False
                timer.cancel()
                found(tiers + more, cause)

        def answered(results: list[Result]) -> None:
            more = []
            cause = Cause.ABSENT
            for result in results:
                if result.outcome is not Outcome.OK:
                    cause = Cause.ABSENT if result.outcome is Outcome.MISS else Cause(f"redis_{result.outcome.value}")
                    break
                more.append(Tier.REDIS)
            finish(more, cause)

        timer = asyncio.get_running_loop().call_later(self._redis_s, finish, [], Cause.REDIS_SLOW)
        redis.io.contains(keys[len(tiers) :], answered)
