# SPDX-License-Identifier: Apache-2.0
"""Prefetch in a replay: the daemon's own swapper and announcements, over a simulated daemon's tiers.

timer: what only the disk has is raised while memory has room. hints:P: of the requests that go on with an earlier one,
P percent are announced when that is served, with the time until then. A load takes no time; the pace bounds what is
loaded by then. Nothing is held: what was raised may leave before it is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Node
from loracache.cache.swap.returns import Returns
from loracache.cache.swap.swapper import STEP_S, Swapper, SwapSettings
from loracache.errors import ConfigError
from loracache.results import Cause
from loracache.simulator.request import Request
from loracache.simulator.store import Store
from loracache.tiers import Tier

__all__ = ["Prefetch", "checked", "parse_prefetch"]

_BANDWIDTH = 1_000_000_000  # half of what the model's disk reads


def parse_prefetch(text: str) -> tuple[bool, int]:
    """(timer, percent of returns announced) of "none", "timer", "hints:50" or "timer+hints:50". Raises ConfigError."""
    timer, hints = False, 0
    for part in text.split("+"):
        kind, _, share = part.strip().partition(":")
        if kind == "timer" and not share:
            timer = True
        elif kind == "hints" and share.isascii() and share.isdigit() and 0 < int(share) <= 100:
            hints = int(share)
        elif text != "none":
            raise ConfigError(f"--prefetch {text!r} is none; give none, timer, hints:P (percent) or timer+hints:P")
    return timer, hints


def checked(text: str) -> str:
    """The same text, without blanks around it, where `parse_prefetch` takes it. Raises ConfigError."""
    parse_prefetch(text.strip())
    return text.strip()


class Prefetch:
    """Of one replay. settings: other than the daemon's."""

    def __init__(
        self,
        store: Store,
        requests: Sequence[Request],
        timer: bool,
        hints: int,
        settings: SwapSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.counters = Counters()
        self._store = store
        self._now = 0.0
        settings = settings or SwapSettings(on=timer, bandwidth=_BANDWIDTH)
        self._swapper = Swapper(
            store.index,
            store,
            self.counters,
            settings,
            load=self._load,
            evict=self._evict,
            quiet=lambda: True,
            clock=lambda: self._now,
        )
        self._returns = Returns(store.index, self.counters, self._swapper, self._acquire, lambda: self._now)
        chance = random.Random(seed)
        returning = _returning(requests) if hints else ()
        self._next_of = {before: number for before, number in returning if chance.random() * 100 < hints}
        self._requests = requests

    def until(self, time: float) -> None:
        """What happens before a request comes at that time: a step after each other as long as they bring something."""
        while self._now < time:
            before = self.counters["prefetch.objects"]
            self._returns.step()
            self._swapper.step()
            went_on = self.counters["prefetch.objects"] > before or not self._swapper.pace.allows(0)
            if went_on or self._returns.active:
                self._now += STEP_S
            else:
                self._now = max(self._now + STEP_S, self._returns.next_at())
        self._now = time

    def served(self, number: int) -> None:
        """A request was: when it goes on may be known."""
        later = self._next_of.get(number)
        if later is not None:
            request = self._requests[number]
            seconds = self._requests[later].time - request.time
            keys = self._store.keys_of(request)
            self._returns.announce(number.to_bytes(16, "big"), keys, seconds, 0.0)

    def told(self) -> dict[str, int]:
        """What came of it, by the fields of a run."""
        objects, nbytes = self.counters["prefetch.objects"], self.counters["prefetch.bytes"]
        outcomes = {f"prefetch_{each}": self.counters[f"prefetch.{each}"] for each in ("used", "wasted")}
        return {"prefetched": objects, "prefetched_bytes": nbytes} | outcomes

    def _load(self, node: Node, done: Callable[[Cause], None]) -> None:
        done(Cause.NONE if self._store.raise_(node, evict=False) else Cause.MEMORY_FULL)

    def _acquire(self, name: bytes, key: bytes, ttl: float, done: Callable[[Cause], None]) -> None:
        node = self._store.index.get(key)
        if node is None or not node.present:
            done(Cause.ABSENT)
        elif node.held_in(Tier.CPU):
            self._store.index.touch(node)
            done(Cause.NONE)
        else:
            done(Cause.NONE if self._store.raise_(node, evict=True) else Cause.MEMORY_FULL)

    def _evict(self, nbytes: int, over: Callable[[], None]) -> None:
        self._store.free_ahead(nbytes)
        over()


def _returning(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """(a request, the first that goes on with it), by their numbers: with the last of its blocks, or the one before,
    which need not be whole."""
    ends: dict[int, int] = {}  # such a block -> the request
    found: list[tuple[int, int]] = []
    for number, request in enumerate(requests):
        before = {ends[block] for block in request.blocks if block in ends}
        found += [(each, number) for each in sorted(before)]
        for block in request.blocks:
            ends.pop(block, None)
        for block in request.blocks[-2:]:
            ends[block] = number
    return found
