"""Answers how far what an operator selected is held, and in which tiers. Threading: the event loop."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from loracache.control.selection import Chain, Selected
from loracache.tiers import Tier

if TYPE_CHECKING:
    from loracache.cache.tier.io import Post
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters, Answer
    from loracache.control.lookup import Finder
    from loracache.namespaces import Namespaces

__all__ = ["Locator"]

_TIERS = (Tier.CPU, Tier.DISK)


class Locator:
    """Looks for chains, keys, and what whole namespaces hold."""

    def __init__(
        self, cache: TieredCache, namespaces: Namespaces, adapters: Adapters, finder: Finder, post: Post
    ) -> None:
        self._cache = cache
        self._namespaces = namespaces
        self._adapters = adapters
        self._finder = finder
        self._post = post

    def locate(self, selected: Selected, answer: Answer) -> None:
        """Answers [a map]: of tokens the longest chain that any namespace holds; of keys their leading run; of whole
        namespaces what they hold."""
        if selected.chains:
            self._best_chain(list(selected.chains), answer)
        elif selected.named:
            self._keys(selected, answer)
        else:
            answer([_found([], 0) | {"held": self._held(selected)}])

    def _best_chain(self, chains: list[Chain], answer: Answer) -> None:
        best: dict[str, Any] = {}

        def look() -> None:
            chain = chains.pop()
            group = len(chain.namespace.shards) or 1

            def found(tiers: list[Tier], cause: str) -> None:
                nonlocal best
                chunks = [max(tiers[at : at + group]) for at in range(0, len(tiers) // group * group, group)]
                here = _found(chunks, len(chain) // group) | {
                    "tokens": len(chunks) * chain.namespace.chunk_tokens,
                    "namespace": chain.namespace.digest().hex(),
                }
                if not best or here["tokens"] > best["tokens"]:
                    best = here
                if chains:
                    self._post(look)  # not at once: there may be more than a stack is deep, and each takes its time
                else:
                    answer([best])

            self._finder.find(chain.keys(), found)

        look()

    def _keys(self, selected: Selected, answer: Answer) -> None:
        index, namespaces = self._cache.index, self._namespaces
        keys = list(itertools.takewhile(lambda key: selected.shows(index, namespaces, key), selected.keys()))

        def found(tiers: list[Tier], cause: str) -> None:
            told = _found(tiers, selected.total or 0)
            if len(keys) == 1 and self._adapters.engines[keys[0]] and not selected.scope:
                told |= {"tiers": [Tier.GPU.label], "hits": 1, "engines": self._adapters.engines[keys[0]]}
            answer([told])

        self._finder.find(keys, found)

    def _held(self, selected: Selected) -> dict[str, list[int]]:
        index = self._cache.index
        spaces = [index.spaces[digest] for digest in selected.spaces if digest in index.spaces]
        return {
            tier.label: [sum(space.objects[tier] for space in spaces), sum(space.bytes[tier] for space in spaces)]
            for tier in _TIERS
        }


def _found(tiers: list[Tier], asked: int) -> dict[str, Any]:
    return {
        "hits": len(tiers), "asked": asked, "tiers": [tier.label for tier in tiers], "tokens": 0, "namespace": "",
        "engines": 0, "held": {},
    }  # fmt: skip
