# SPDX-License-Identifier: Apache-2.0
"""Answers how far what an operator selected is held, and in which tiers. Threading: the event loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loracache.control.listing import sum_of
from loracache.control.selection import Chain, Selected
from loracache.control.steps import done, turn
from loracache.tiers import Tier, labels

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters
    from loracache.control.lookup import Finder
    from loracache.namespaces import Namespaces

__all__ = ["Locator"]

_TIERS = (Tier.CPU, Tier.DISK)
_PART = 512  # keys looked for between two looks at the socket


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
        tiers, group = await self.leading(chain.keys()), len(chain.namespace.shards) or 1
        chunks = [max(tiers[at : at + group]) for at in range(0, len(tiers) // group * group, group)]
        return _told(chunks, len(chain) // group) | {
            "tokens": len(chunks) * chain.namespace.chunk_tokens,
            "namespace": chain.namespace.digest().hex(),
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

    async def _keys(self, selected: Selected) -> dict[str, Any]:
        index, namespaces = self._cache.index, self._namespaces
        shown = itertools.takewhile(lambda key: selected.shows(index, namespaces, key), selected.keys())
        told = _told(await self.leading(shown), selected.total or 0)
        engines = self._adapters.engines[selected.named] if selected.total == 1 and not selected.scope else 0
        return told | {"tiers": [Tier.GPU.label], "hits": 1, "engines": engines} if engines else told

    async def _held(self, selected: Selected) -> dict[str, list[int]]:
        total, _ = await done(sum_of(self._cache.index, selected.spaces))
        return {tier.label: [total.objects[tier], total.bytes[tier]] for tier in _TIERS}


def _told(tiers: list[Tier], asked: int) -> dict[str, Any]:
    return {
        "hits": len(tiers), "asked": asked, "tiers": list(labels(bytes(tiers))), "tokens": 0, "namespace": "",
        "engines": 0, "held": {},
    }  # fmt: skip
