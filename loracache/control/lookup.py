# SPDX-License-Identifier: Apache-2.0
"""Finds how far a chain is held, in Redis too, in bounded time. Threading: the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from loracache.control.steps import answer
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result
from loracache.tiers import Tier

if TYPE_CHECKING:
    from loracache.cache.tier.questions import Question
    from loracache.cache.tiered import TieredCache

__all__ = ["Finder", "Hits"]


class Hits(NamedTuple):  # one is made for every lookup, and a frozen dataclass takes twice as long
    """The fastest tier of each leading key that is held, and why the one behind them is not (NONE: ask Redis)."""

    tiers: list[Tier]
    cause: Cause


class Finder:
    """Asks the index, and Redis for what that does not know; redis_s: for how many seconds at most."""

    def __init__(self, cache: TieredCache, redis_s: float) -> None:
        self._cache = cache
        self._redis_s = redis_s

    async def find(self, keys: Sequence[bytes]) -> Hits:
        """How far `keys` are held."""
        hits = self.look(keys)
        return hits if hits.cause else await self.ask_redis(keys, hits)

    def look(self, keys: Sequence[bytes]) -> Hits:
        """What the index knows of `keys`: all there is to know, where the cause says so."""
        return self.judge(self._cache.lookup(keys), len(keys))

    def judge(self, tiers: list[Tier], asked: int) -> Hits:
        """What it means that of so many keys the index knows the first ones, in these tiers."""
        redis = self._cache.redis
        if redis is None or len(tiers) == asked:
            return Hits(tiers, Cause.ABSENT)
        return Hits(tiers, Cause.REDIS_SLOW if redis.io.asked_too_long(self._redis_s) else Cause.NONE)

    async def ask_redis(self, keys: Sequence[bytes], hits: Hits) -> Hits:
        """`hits`, and what Redis has behind them."""
        redis = self._cache.redis
        assert redis is not None
        unknown = keys[len(hits.tiers) :]
        question: Question

        def ask(done: Callable[[list[Result]], None]) -> None:
            nonlocal question
            question = redis.io.contains(unknown, done, leading=True)

        asked: asyncio.Future[list[Result]] = answer(ask)
        await asyncio.wait({asked}, timeout=self._redis_s)
        results, count = question.results, question.held  # of a long chain maybe its beginning
        tiers = [*hits.tiers, *[Tier.REDIS] * count]
        if not asked.done():
            question.cancel()
            return Hits(tiers, Cause.REDIS_SLOW)
        if count == len(unknown) or results[count].outcome is Outcome.MISS:
            return Hits(tiers, Cause.ABSENT)
        return Hits(tiers, Cause(f"redis_{results[count].outcome.value}"))
