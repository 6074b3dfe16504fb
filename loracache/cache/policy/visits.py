# SPDX-License-Identifier: Apache-2.0
"""Visits that fade: how often objects were used lately, without looking at anything but the object that is asked about.

    F(now) = (F(last look) * exp(-(ticks since the last use before it) / scale)) + uses since the last look

A node's `hits` count its lookups and its `tick` is the last of them; both are looked at when somebody asks, so that of
several uses since the last look only the last one's time is known.
"""

from __future__ import annotations

from math import exp

from loracache.cache.policy.line import repack
from loracache.cache.state.index import Node

__all__ = ["Visits", "needed"]


class Visits:
    """Of objects by key. Who forgets none of them remembers, of what comes again, what it was worth before."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[float, int, int]] = {}  # -> F, the tick it is of, hits counted in it

    def __len__(self) -> int:
        return len(self._known)

    def of(self, node: Node, scale: float) -> float:
        """F of `node` at its last use: 1 at least. scale: in ticks; 0: nothing fades."""
        known = self._known.get(node.key)
        if known is None:
            found = node.hits + 1.0
        else:
            before, tick, hits = known
            came = node.hits - hits if node.hits >= hits else node.hits + 1  # it has been away: its hits began anew
            if tick == node.tick and not came:
                return before
            found = before * (exp((tick - node.tick) / scale) if scale else 1.0) + came
        found = max(1.0, found)
        self._known[node.key] = (found, node.tick, node.hits)
        return found

    def forget(self, node: Node) -> None:
        """It has left for good."""
        self._known.pop(node.key, None)

    def shrink(self) -> None:
        """Few are left of very many."""
        repack(self._known)

    def all(self, now: int, scale: float) -> list[float]:
        """F of each, now; those that have faded are forgotten."""
        found = {key: f * (exp((tick - now) / scale) if scale else 1.0) for key, (f, tick, _) in self._known.items()}
        for key, each in found.items():
            if each < _FADED:
                del self._known[key]
        return [each for each in found.values() if each >= _FADED]


_FADED = 0.01  # of one use


def needed(visits: list[float], batch: float) -> float:
    """How many of the objects that are used with these frequencies a batch of requests needs: FASTLIBRA's Low_lora,
    sum_i [1 - (1 - prob_i)^batch]."""
    every = sum(visits)
    return sum(1 - (1 - each / every) ** batch for each in visits) if every else 0.0
