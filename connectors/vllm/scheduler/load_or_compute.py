# SPDX-License-Identifier: Apache-2.0
"""How much of what was found is loaded, and how much computed: whatever has the request's first token out sooner.

What is loaded leads and what is computed follows, so one number is chosen: n of the chunks that were found, with the
least

    load(n) + factor * compute(n)

load(n) is the sum over the tiers of what their bytes among the first n chunks take, measured on this engine's loads
(transfer_times.py); compute(n) what the engine takes to compute the chunks behind them, measured on its steps
(patience.py). A request that loads leaves the engine to others, one that computes takes it from them: hence the factor.

Only where the tier changes can n be best: in a run of one tier, load grows in a line and compute falls ever faster.
What is not known counts as nothing, so that it is loaded. A tier that is passed over is tried with a part of a request
from time to time, ever more seldom while nothing changes. Pure but for the clock; the scheduler's loop.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from loracache.backoff import Backoff
from loracache.connectors.vllm.scheduler.patience import StepTimes
from loracache.transfer_times import TransferTimes

__all__ = ["LoadChoice", "LoadTimes"]

_LEAST_GAIN_S = 0.01  # for less nothing is computed that could be loaded
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 600.0  # between two tries of a tier
_TRY_SHARE = 0.5  # of what computing all would take, that a try takes at most, if it is more than one chunk
_SURPRISE = 0.5  # of what was expected: the tier is faster than it was
_GUESSES = {"cpu": 5e9, "disk": 1e9, "redis": 0.25e9}  # bytes a second, to tell which tier a load waited for


@dataclass(slots=True)
class _Tier:
    """loads, nbytes: under way. next_try: not before (seconds of the clock)."""

    times: TransferTimes = field(default_factory=TransferTimes)
    loads: int = 0
    nbytes: int = 0
    next_try: float = 0.0
    pauses: Backoff = field(default_factory=lambda: Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S))

    def seconds(self, nbytes: int) -> float:
        """For so many bytes more, beside what is under way: the link is shared by turns, so that none waits for more
        bytes of another than it has itself."""
        return self.times.seconds(nbytes + min(self.nbytes, self.loads * nbytes))


@dataclass(slots=True)
class _Load:
    """parts: bytes by tier. shared: with those of others in the same time. seconds: of its slowest worker."""

    parts: dict[str, int]
    shared: dict[str, int]
    seconds: float = 0.0


class LoadTimes:
    """What this engine's loads take, by tier."""

    def __init__(self) -> None:
        self.tiers = {name: _Tier() for name in _GUESSES}
        self._loads: dict[str, _Load] = {}

    def seconds(self, parts: Mapping[str, int]) -> float:
        """Of a load of so many bytes by tier, if it began now."""
        return sum(self.tiers[name].seconds(nbytes) for name, nbytes in parts.items())

    def began(self, request_id: str, tiers: Sequence[str], chunk_bytes: int) -> None:
        """A request's load has begun, of chunks in these tiers; of none where it cannot come."""
        self.over(request_id)
        if not tiers:
            return
        load = _Load({name: count * chunk_bytes for name, count in Counter(tiers).items()}, {})
        for name, nbytes in load.parts.items():
            tier = self.tiers[name]
            load.shared[name] = nbytes + min(tier.nbytes, tier.loads * nbytes)
            tier.loads, tier.nbytes = tier.loads + 1, tier.nbytes + nbytes
            for other in self._loads.values():
                if name in other.shared:
                    other.shared[name] += min(nbytes, other.parts[name])
        self._loads[request_id] = load

    def took(self, request_id: str, seconds: float) -> None:
        """A worker's part of a load that came took so long."""
        load = self._loads.get(request_id)
        if load is not None:
            load.seconds = max(load.seconds, seconds)

    def over(self, request_id: str) -> None:
        """A load is over, on all workers; nothing is learnt from one that no worker told of."""
        load = self._loads.pop(request_id, None)
        if load is None:
            return
        for name, nbytes in load.parts.items():
            self.tiers[name].loads -= 1
            self.tiers[name].nbytes -= nbytes
        if load.seconds:
            self._learn(load)

    def _learn(self, load: _Load) -> None:
        """The tier that was expected to take longest took its part of the time."""
        expected = {
            name: self.tiers[name].times.seconds(nbytes) or nbytes / _GUESSES[name]
            for name, nbytes in load.shared.items()
        }
        slowest = max(expected, key=expected.__getitem__)
        took = load.seconds * expected[slowest] / sum(expected.values())
        tier = self.tiers[slowest]
        if tier.times.known and took < _SURPRISE * expected[slowest]:
            tier.next_try = 0.0
            tier.pauses.reset()
        else:
            tier.next_try = max(tier.next_try, time.monotonic() + _FIRST_PAUSE_S)
        tier.times.add(load.shared[slowest], took)


class LoadChoice:
    """factor: so many times faster computing has to be; 0: everything that is found is loaded."""

    def __init__(self, steps: StepTimes, factor: float) -> None:
        self._steps = steps
        self._factor = factor
        self.loads = LoadTimes()

    def leading(self, tiers: Sequence[str], first: int, chunk_tokens: int, chunk_bytes: int) -> int:
        """How many chunks of `tiers`, each chunk's tier, are worth loading: from `first`, as the engine holds those
        before, to all of them.
        """
        hits = len(tiers)
        if not self._factor or not self._steps.seen or hits <= first:
            return hits
        sizes = {name: count * chunk_bytes for name, count in Counter(tiers[first:]).items()}
        whole = self.loads.seconds(sizes)
        if whole < _LEAST_GAIN_S:
            return hits
        end, at, best = hits * chunk_tokens, first, first
        least = everything = self._factor * self._steps.seconds(first * chunk_tokens, end)
        parts: Counter[str] = Counter()
        for name, run in groupby(tiers[first:]):
            count = sum(1 for _ in run)
            at += count
            parts[name] += count * chunk_bytes
            cost = self.loads.seconds(parts) + self._factor * self._steps.seconds(at * chunk_tokens, end)
            if cost <= least:
                best, least = at, cost
        if whole - least < _LEAST_GAIN_S:
            return hits
        return best + self._tried(tiers, best, chunk_bytes, everything / self._factor)

    def _tried(self, tiers: Sequence[str], at: int, chunk_bytes: int, all_s: float) -> int:
        """How many chunks behind the first `at` are loaded to see whether their tier is as slow as it was."""
        tier, now = self.loads.tiers[tiers[at]], time.monotonic()
        if now < tier.next_try:
            return 0
        tier.next_try = now + tier.pauses.next()
        run = sum(1 for _ in next(groupby(tiers[at:]))[1])
        seconds = [tier.times.seconds(count * chunk_bytes) for count in range(1, run + 1)]
        return max(1, bisect_right(seconds, _TRY_SHARE * all_s))
