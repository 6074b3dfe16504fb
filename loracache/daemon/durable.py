# SPDX-License-Identifier: Apache-2.0
"""For writers who want to keep: reserving that waits for room rather than have queued writes given up, and what a flush
says. Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from loracache.cache.state.leases import Writing
from loracache.control.steps import answer, done
from loracache.results import Cause
from loracache.storage_backends.base import ObjectInfo
from loracache.tiers import Tier
from loracache.wire.protocol import Reserve

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache

__all__ = ["durable_since", "reserve_in_time"]


async def reserve_in_time(
    cache: TieredCache, owner: int, request: Reserve, infos: Sequence[ObjectInfo], wanted: Callable[[], bool]
) -> list[Writing | Cause]:
    """One answer per object, as TieredCache.reserve gives them; what finds no room is tried again as the queues of
    writes get shorter, for `request.wait` seconds. wanted(): whether somebody still waits for the answer.
    """
    deadline = time.monotonic() + request.wait
    answers: list[Writing | Cause] = []
    while wanted():
        reserving = cache.reserve(owner, request.lease, infos[len(answers) :], request.ttl, promised=True)
        answers += await done(_while(wanted, reserving))
        left = deadline - time.monotonic()
        if not answers or answers[-1] is not Cause.FULL:
            break
        answers.pop()
        if left <= 0 or not any(writer.depth for writer in cache.writers):
            break  # where nothing is being written, what is in the way is held, perhaps by this very writer
        shorter: list[asyncio.Future[None]] = [answer(writer.when_shorter) for writer in cache.writers]
        await asyncio.wait(shorter, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        cache.leases.renew(owner, request.lease, request.ttl)  # of what has its room already
    refused = len(infos) - len(answers)
    cache.counters.add(f"store.refused.{Cause.FULL}", refused)
    return answers + [Cause.FULL] * refused


def _while(
    wanted: Callable[[], bool], reserving: Generator[None, None, list[Writing | Cause]]
) -> Generator[None, None, list[Writing | Cause]]:
    """A reservation that ends where nobody waits for it: nothing is put under a lease that nobody would end."""
    while wanted():
        try:
            next(reserving)
        except StopIteration as end:
            answers: list[Writing | Cause] = end.value
            return answers
        yield
    reserving.close()
    return []


def durable_since(interval: int, cache: TieredCache, unkept: Sequence[bytes]) -> dict[str, list[int]]:
    """What a flush answers. unkept: namespaces without a descriptor on disk, whose objects a restart may not find."""
    told = cache.flushes.since(interval)
    if Tier.DISK.label in told:
        spaces = cache.index.spaces
        durable, given_up = told[Tier.DISK.label]
        lost = min(durable, sum(spaces[each].objects[Tier.DISK] for each in unkept if each in spaces))
        told[Tier.DISK.label] = [durable - lost, given_up + lost]
    return told
