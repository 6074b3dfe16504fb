# SPDX-License-Identifier: Apache-2.0
"""What a flush answers: how many objects each lower tier keeps, and how many it gave up, since an earlier flush.

Time is cut into intervals, each from one flush to the next. Who flushes is told the sum from the interval on in which
it flushed last, so that nobody's flush hides from others what was given up. Threading: the cache's thread.
"""

from __future__ import annotations

from loracache.tiers import Tier

__all__ = ["Flushes"]

_MOST_INTERVALS = 256  # of older ones the sum is kept: who flushes as rarely is told of more, and never of less


class Flushes:
    """The books of the tiers that were opened. `interval` is the number of the one that goes on now, from 1 on."""

    def __init__(self) -> None:
        self.interval = 1
        self._tiers: list[Tier] = []
        self._counts: dict[int, dict[Tier, list[int]]] = {}  # interval -> [durable, given up], the oldest first

    def open(self, tier: Tier) -> None:
        """There is such a tier. Before anything is counted."""
        self._tiers.append(tier)

    def wrote(self, tier: Tier) -> int:
        """The tier keeps one more object; answers the interval, for `left`."""
        self._of(self.interval)[tier][0] += 1
        return self.interval

    def gave_up(self, tier: Tier) -> None:
        """An object that was to be written to the tier is not there."""
        self._of(self.interval)[tier][1] += 1

    def left(self, tier: Tier, interval: int, *, asked: bool) -> None:
        """An object that was written in an interval has left the tier again, because somebody asked for that or not."""
        counts = self._of(max(interval, next(iter(self._counts), interval)))[tier]
        counts[0] -= 1
        counts[1] += not asked

    def end(self) -> int:
        """A flush ends an interval; answers the number of the next."""
        if self.interval in self._counts:
            self.interval += 1
        return self.interval

    def since(self, interval: int) -> dict[str, list[int]]:
        """[durable, given up] by the tier's label, from the beginning of an interval until now."""
        told = {tier.label: [0, 0] for tier in self._tiers}
        for number, counts in self._counts.items():
            if number >= interval:
                for tier, (durable, given_up) in counts.items():
                    told[tier.label][0] += durable
                    told[tier.label][1] += given_up
        return told

    def _of(self, interval: int) -> dict[Tier, list[int]]:
        counts = self._counts.get(interval)
        if counts is None:
            counts = self._counts[interval] = {tier: [0, 0] for tier in self._tiers}
            if len(self._counts) > _MOST_INTERVALS:
                self._merge_oldest()
        return counts

    def _merge_oldest(self) -> None:
        first, second = list(self._counts)[:2]
        for tier, (durable, given_up) in self._counts.pop(first).items():
            self._counts[second][tier][0] += durable
            self._counts[second][tier][1] += given_up
