# SPDX-License-Identifier: Apache-2.0
"""Answers how far what an operator selected is held, and in which tiers. Threading: the event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loracache.control.listing import sum_of
from loracache.control.selection import Chain, Selected
from loracache.control.steps import done, turn
from loracache.groups import continued
from loracache.tiers import Tier, labels
from loracache.wire.protocol import NOWHERE

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters
    from loracache.control.lookup import Finder
    from loracache.keys import Namespace
    from loracache.namespaces import Namespaces

__all__ = ["Locator"]

_TIERS = (Tier.CPU, Tier.DISK)
_PART = 512  # keys looked for between two looks at the socket
_AT_ONCE = 4096  # answers that are put together in one go: a millisecond or two


class Locator:
    """Looks for chains, keys, and what whole namespaces hold."""

    def __init__(self, cache: TieredCache, namespaces: Namespaces, adapters: Adapters, finder: Finder) -> None:
        self._cache = cache
        self._namespaces = namespaces
        self._adapters = adapters
        self._finder = finder

    async def locate(self, selected: Selected) -> list[Any]:
        """[a map]: of tokens the longest chain that any namespace holds; of keys their leading run; of whole namespaces
        what they hold."""
        if selected.chains:
            return [await self._best_chain(selected.chains)]
        if selected.named:
            return [await self._keys(selected)]
        return [_told([], 0) | {"held": await self._held(selected)}]

    async def _best_chain(self, chains: Sequence[Chain]) -> dict[str, Any]:
        best = await self._chain(chains[-1])
        for chain in reversed(chains[:-1]):
            await turn()  # each takes its time
            here = await self._chain(chain)
            if here["tokens"] > best["tokens"]:
                best = here
        return best

    async def _chain(self, chain: Chain) -> dict[str, Any]:
        space = chain.namespace
        tiers: list[Tier] = []
        beside = bytearray()
        parts = space.parts(chain.tokens, max(1, _PART // space.width))
        for keys, others in parts:
            hits = await self._finder.find(keys, others)
            tiers += hits.tiers
            beside += hits.beside
            if len(hits.tiers) < len(keys):
                break
            await turn()
        count, slowest = await _continued(space, tiers, beside)
        return _told([Tier(tier) for tier in slowest], chain.chunks) | {
            "hits": count,
            "tokens": count * space.chunk_tokens,
            "namespace": space.digest().hex(),
        }

    async def leading(self, keys: Iterator[bytes]) -> list[Tier]:
        """The tiers of the leading keys that are held, asked for in parts, and no further than they are."""
        tiers: list[Tier] = []
        while part := list(itertools.islice(keys, _PART)):
            found = (await self._finder.find(part)).tiers
            tiers += found
            if len(found) < len(part):
                break
            await turn()
        return tiers

    async def where(self, keys: Sequence[bytes]) -> bytes:
        """A byte for each of `keys`, a Tier value or NOWHERE, asked for in parts."""
        where = bytearray()
        for at in range(0, len(keys), _PART):
            where += (await self._finder.find((), keys[at : at + _PART])).beside
            await turn()
        return bytes(where)

    async def _keys(self, selected: Selected) -> dict[str, Any]:
        index, namespaces = self._cache.index, self._namespaces
        shown = itertools.takewhile(lambda key: selected.shows(index, namespaces, key), selected.keys())
        told = _told(await self.leading(shown), selected.total or 0)
        engines = self._adapters.engines[selected.named] if selected.total == 1 and not selected.scope else 0
        return told | {"tiers": [Tier.GPU.label], "hits": 1, "engines": engines} if engines else told

    async def _held(self, selected: Selected) -> dict[str, list[int]]:
        total, _ = await done(sum_of(self._cache.index, selected.spaces))
        return {tier.label: [total.objects[tier], total.bytes[tier]] for tier in _TIERS}


async def _continued(space: Namespace, tiers: Sequence[int], beside: Sequence[int]) -> tuple[int, list[int]]:
    """See groups.continued. On a thread where that takes milliseconds."""

    def work() -> tuple[int, list[int]]:
        held = [None if tier == NOWHERE else tier for tier in beside]
        return continued(space.groups, space.chunk_tokens, space.lead, tiers, held)

    return await asyncio.to_thread(work) if len(tiers) + len(beside) > _AT_ONCE else work()


def _told(tiers: list[Tier], asked: int) -> dict[str, Any]:
    return {
        "hits": len(tiers), "asked": asked, "tiers": list(labels(bytes(tiers))), "tokens": 0, "namespace": "",
        "engines": 0, "held": {},
    }  # fmt: skip
