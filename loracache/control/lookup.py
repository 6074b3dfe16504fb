# SPDX-License-Identifier: Apache-2.0
"""Finds how far a chain is held, in Redis too, in bounded time. Threading: the event loop."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from loracache.control.steps import answer, done
from loracache.results import Cause
from loracache.storage_backends.base import Outcome, Result
from loracache.tiers import Tier
from loracache.wire.protocol import NOWHERE

if TYPE_CHECKING:
    from loracache.cache.tier.io import TierIO
    from loracache.cache.tier.questions import Question
    from loracache.cache.tiered import TieredCache

__all__ = ["Finder", "Hits"]

Asked = tuple["Question", "asyncio.Future[list[Result]]"]
_SLICE = 1024  # keys beside a chain that are looked at between two looks at the socket


class Hits(NamedTuple):  # one is made for every lookup, and a frozen dataclass takes twice as long
    """The fastest tier of each leading key that is held, and why the one behind them is not, or, where all are, why
    not all beside them are (NONE: ask Redis). beside: of each of those a byte, a Tier value or NOWHERE."""

    tiers: list[Tier]
    cause: Cause
    beside: bytes = b""


class Finder:
    """Asks the index, and Redis for what that does not know; redis_s: for how many seconds at most."""

    def __init__(self, cache: TieredCache, redis_s: float) -> None:
        self._cache = cache
        self._redis_s = redis_s

    async def find(self, keys: Sequence[bytes], beside: Sequence[bytes] = ()) -> Hits:
        """How far `keys` are held, and where each of those beside them is."""
        hits = self.look(keys, beside)
        return hits if hits.cause else await self.ask_redis(keys, hits, beside)

    def look(self, keys: Sequence[bytes], beside: Sequence[bytes] = ()) -> Hits:
        """What the index knows of `keys`, and of those beside: all there is to know, where the cause says so."""
        tiers = self._cache.lookup(keys) if keys or not beside else []
        return self.judge(tiers, len(keys), self.where(beside) if beside else b"")

    def where(self, keys: Sequence[bytes]) -> bytes:
        """A byte for each of `keys`: the fastest tier that the index knows to have it, or NOWHERE."""
        return bytes([NOWHERE if tier is None else tier for tier in self._cache.where(keys)])

    def judge(self, tiers: list[Tier], asked: int, beside: bytes = b"") -> Hits:
        """What it means that of so many keys the index knows the first ones, in these tiers, and those beside."""
        redis = self._cache.redis
        if redis is None or (len(tiers) == asked and NOWHERE not in beside):
            return Hits(tiers, Cause.ABSENT, beside)
        return Hits(tiers, Cause.REDIS_SLOW if redis.io.asked_too_long(self._redis_s) else Cause.NONE, beside)

    async def ask_redis(self, keys: Sequence[bytes], hits: Hits, beside: Sequence[bytes] = ()) -> Hits:
        """`hits`, and what Redis has behind them and beside them, both asked for at the same time; beside what is known
        not to be held, no more is asked for."""
        redis = self._cache.redis
        assert redis is not None
        unknown = keys[len(hits.tiers) :]
        places, lacking = await done(_lacking(beside, hits.beside))
        led = _ask(redis.io, unknown, leading=True) if unknown else None
        others = _ask(redis.io, lacking, leading=False) if lacking else None
        if led is not None and others is not None:
            led[1].add_done_callback(partial(_cut, others[0], places, len(beside) / len(keys), len(hits.tiers), led[0]))
        await asyncio.wait({each[1] for each in (led, others) if each is not None}, timeout=self._redis_s)
        tiers, where, cause = hits.tiers, hits.beside, Cause.ABSENT
        if others is not None:
            results, slow = _end(others)
            where, failed = await done(_filled(where, places, results))
            cause = slow or failed
        if led is not None:
            results, slow = _end(led)
            count = led[0].held  # of a long chain maybe its beginning
            tiers = [*tiers, *[Tier.REDIS] * count]
            if count < len(unknown):
                cause = slow or _failure(results[count])
        return Hits(tiers, cause, where)


def _ask(io: TierIO, keys: Sequence[bytes], *, leading: bool) -> Asked:
    question: Question

    def ask(told: Callable[[list[Result]], None]) -> None:
        nonlocal question
        question = io.contains(keys, told, leading=leading)

    over: asyncio.Future[list[Result]] = answer(ask)
    return question, over


def _cut(others: Question, places: list[int], width: float, held: int, led: Question, _: object) -> None:
    """Have no more asked for than stands beside a chain's leading run. width: of them by key of the chain."""
    others.cut(bisect_left(places, ceil((held + led.held) * width)))


def _end(asked: Asked) -> tuple[list[Result], Cause]:
    """(what Redis has said by now, why it is not all). Nobody waits for the rest."""
    question, over = asked
    if over.done():
        return question.results, Cause.NONE
    question.cancel()
    return question.results, Cause.REDIS_SLOW


def _failure(result: Result) -> Cause:
    """Why Redis did not answer OK."""
    return Cause.ABSENT if result.outcome is Outcome.MISS else Cause(f"redis_{result.outcome.value}")


def _lacking(keys: Sequence[bytes], where: bytes) -> Generator[None, None, tuple[list[int], list[bytes]]]:
    """Places and keys of those that are nowhere; yields between two slices."""
    places: list[int] = []
    for at in range(0, len(where), _SLICE):
        if at:
            yield
        places += [at + place for place, tier in enumerate(where[at : at + _SLICE]) if tier == NOWHERE]
    return places, [keys[place] for place in places]


def _filled(
    where: bytes, places: Sequence[int], results: Sequence[Result]
) -> Generator[None, None, tuple[bytes, Cause]]:
    """(`where` with what Redis has of those places, why it does not have all); of very many maybe the first results.
    Yields between two slices."""
    filled, cause = bytearray(where), Cause.ABSENT
    for at in range(0, len(results), _SLICE):
        if at:
            yield
        for place, result in zip(places[at : at + _SLICE], results[at : at + _SLICE], strict=False):
            if result.outcome is Outcome.OK:
                filled[place] = Tier.REDIS
            elif cause is Cause.ABSENT:
                cause = _failure(result)
    return bytes(filled), cause
