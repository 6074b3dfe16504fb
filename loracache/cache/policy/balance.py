# SPDX-License-Identifier: Apache-2.0
"""How much of a tier adapters may take beside KV: as much as makes the next byte worth the same to both.

The last victims of each kind are remembered. Who asks for one of them says what its kind lacks room for, and what
that cost: the seconds to have it again, by the bytes that would have had to be larger for it to be there. Each such
miss moves room to its kind, until both lose the same for want of a byte (Cidon et al., "Cliffhanger", NSDI 2016, with
seconds in the place of hits). Such a miss moves as many bytes as could be computed in the time that it costs.
"""

from __future__ import annotations

from loracache.cache.policy.ghosts import Ghosts
from loracache.cache.policy.visits import Visits, needed
from loracache.cache.state.index import Node

__all__ = ["Balance"]

_REACH = 1 / 4  # of the tier, in victims of each kind that are remembered
_MOST = 1 << 16  # of each kind
_FARTHEST = 1 / 8  # of the tier, by one miss
_COUNT_AGAIN = 4096  # uses after which the adapters that a batch needs are counted anew


class Balance:
    """`adapters` is the bytes that they may take; None: nothing had to go so far. `batch`: requests that run at once,
    about."""

    def __init__(self, batch: float = 32) -> None:
        self.batch = batch
        self.adapters: float | None = None
        self._ghosts = (Ghosts(_MOST), Ghosts(_MOST))  # of KV, of adapters
        self._visits = Visits()  # of adapters that were here lately
        self._least = 0.0  # bytes of those that a batch needs
        self._count_at = 0

    def left(self, lora: bool, nbytes: int, tier_bytes: int) -> int:
        """A victim has left a tier that holds so many bytes. Its place among those of its kind."""
        return self._ghosts[lora].add(nbytes, _REACH * tier_bytes)

    def back(self, place: int, lora: bool, worth: float, taken: int, tier_bytes: int) -> None:
        """One that had this place has come again. worth: the bytes of KV that could be computed while it is brought
        back. taken: by adapters, now."""
        ghosts = self._ghosts[lora]
        reach = ghosts.nbytes
        if not ghosts.take(place) or self.adapters is None:
            return
        lack = worth * max(self._ghosts[not lora].nbytes, reach) / reach
        step = min(lack, _FARTHEST * tier_bytes)
        self.adapters += step if lora else -step
        self.adapters = min(max(self.adapters, 0.0), taken + _FARTHEST * tier_bytes)

    def used(self, adapter: Node, age: float) -> None:
        """An adapter was asked for. age: ticks in which what it was used before counts e-fold less."""
        self._visits.of(adapter, age)

    def over(self, taken: int, count: int, now: int, age: float, tier_bytes: int) -> bool:
        """Whether `count` adapters of the tier, which take so many bytes of it, take more than their part: never less
        than what a batch needs, as far as that is half of the tier."""
        if self.adapters is None:
            self.adapters = float(taken)
        if now >= self._count_at:
            self._count_at = now + _COUNT_AGAIN
            self._least = needed(self._visits.all(now, age), self.batch) * taken / max(count, 1)
        return taken > max(self.adapters, min(self._least, tier_bytes / 2))
