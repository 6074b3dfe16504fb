# SPDX-License-Identifier: Apache-2.0
"""Brings into memory what will be asked for, and makes room before it is asked for; in small steps, bounded in bytes.

FASTLIBRA's swapper (Zhang et al., arXiv:2505.03756): every 100 ms, victims leave a full pool, and a pool that is less
than 70 % full takes in the roots that are worth most; before those come the adapters that requests wait for, and those
that are asked for most, from Redis too. Here it never evicts for what it brings on its own account,
which goes behind what somebody waits for; a chain that was announced (returns.py) is brought like one that is asked
for. It is of no policy: who leaves is the policy's choice.

Threading: the cache's thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loracache.backoff import Backoff
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.swap.candidates import Candidates, is_root
from loracache.cache.swap.pace import Pace
from loracache.results import Cause
from loracache.tiers import Tier

__all__ = ["STEP_S", "Memory", "SwapSettings", "Swapper"]

STEP_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LOOKS = 256  # at prefetched objects in a step, for those that were used
_AT_ONCE = 128  # objects begun in a step: a fraction of a millisecond each
_AGAIN_S = 10.0  # what Redis did not have is sought again


@dataclass(frozen=True, slots=True)
class SwapSettings:
    """on: whether anything is done unasked. mark: the share of memory up to which absent roots are brought; free: the
    share that is kept free for what comes next. bandwidth: bytes a second; in_flight: bytes."""

    on: bool = False
    mark: float = 0.7
    free: float = 0.01
    bandwidth: int = 200_000_000
    in_flight: int = 16 << 20


class Memory(Protocol):
    """What is swapped into. Sizes in bytes."""

    @property
    def size(self) -> int:
        """Of all."""

    @property
    def free_bytes(self) -> int:
        """Of them, taken by nobody."""

    def rounded(self, nbytes: int) -> int:
        """What an object of that size takes."""


class Swapper:
    """load(node, done) raises an object into free room and says how that went; evict(nbytes, over) has the policy's
    victims go until so many bytes are free, as far as that goes, and says when it is over; quiet() says whether nobody
    waits for what these would hold up. wanted(): keys of adapters that requests wait for, and then of those asked for
    most; seek(key, fits, done) raises one that only Redis may have, if there is room: done(cause, bytes). clock():
    seconds."""

    def __init__(
        self,
        index: Index,
        memory: Memory,
        counters: Counters,
        settings: SwapSettings,
        *,
        load: Callable[[Node, Callable[[Cause], None]], None],
        evict: Callable[[int, Callable[[], None]], None],
        quiet: Callable[[], bool],
        wanted: Callable[[], Sequence[bytes]] = tuple,
        seek: Callable[[bytes, Callable[[int], bool], Callable[[Cause, int], None]], None] | None = None,
        speeds: Speeds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.pace = Pace(settings.bandwidth, settings.in_flight, clock)
        self.candidates = Candidates(speeds)
        self._memory = memory
        self._index = index
        self._counters = counters
        self._load = load
        self._evict = evict
        self._quiet = quiet
        self._wanted = wanted
        self._seek = seek
        self._seeking = False
        self._sought: OrderedDict[bytes, float] = OrderedDict()  # when, for a while
        self._clock = clock
        self.loading = 0  # objects
        self._evicting = False
        self._pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._paused_until = float("-inf")
        self._unused: OrderedDict[Node, int] = OrderedDict()  # brought, not used yet -> its tick when it came
        self._bringing = False
        told = index.on_change

        def changed(node: Node, tier: Tier, entered: bool, cause: str) -> None:
            told(node, tier, entered, cause)
            if self.settings.on:
                self.candidates.changed(node, tier, entered)
            if not entered and tier is Tier.CPU and self._unused:
                self._left(node)

        index.on_change = changed

    def step(self) -> None:
        """What is due, every STEP_S seconds."""
        self._look_for_used()
        if self.settings.on:
            self._free_ahead()
            self._bring()

    @property
    def paused(self) -> bool:
        """Whether it waits because a load failed."""
        return self._clock() < self._paused_until

    def brought(self, node: Node) -> None:
        """An object has been raised ahead of its use."""
        self._pauses.reset()
        self._counters.add("prefetch.objects")
        self._counters.add("prefetch.bytes", node.size)
        self._unused[node] = node.tick

    def failed(self, cause: Cause) -> None:
        """A load that it began did not end well: count it, and leave the tier alone for longer each time."""
        self._counters.add("prefetch.failed")
        if cause not in (Cause.MEMORY_FULL, Cause.ABSENT):
            self._paused_until = self._clock() + self._pauses.next()

    def describe(self) -> dict[str, object]:
        """For `loracache status`."""
        return {
            "on": self.settings.on,
            "bandwidth": self.settings.bandwidth,
            "paused": self.paused,
            "candidates": len(self.candidates),
            "in_flight_bytes": self.pace.in_flight,
            "unused_objects": len(self._unused),
        }

    # -- inside ----------

    def _left(self, node: Node) -> None:
        """It left memory."""
        if (came := self._unused.pop(node, None)) is not None:
            self._counters.add("prefetch.wasted" if node.tick == came else "prefetch.used")

    def _free_ahead(self) -> None:
        """So that a store finds room without a choice."""
        wanted = int(self._memory.size * self.settings.free)
        if self._memory.free_bytes < wanted and not self._evicting:
            self._evicting = True
            self._evict(wanted, self._evicted)

    def _evicted(self) -> None:
        self._evicting = False

    def _bring_wanted(self) -> bool:
        """Raise the adapters asked for, from the disk, or one that Redis may have; whether all are under way."""
        now = self._clock()
        while self._sought and next(iter(self._sought.values())) <= now - _AGAIN_S:
            self._sought.popitem(last=False)
        for key in self._wanted():
            node = self._index.get(key)
            takes = self._memory.rounded(node.size) if node is not None and node.present else 0
            if self.paused or not self.pace.allows(takes):
                return False
            if node is not None and node.present:
                if is_root(node) and self._fits(node.size):
                    self.candidates.discard(node)
                    self._begin(node, takes)
            elif self._seek is not None and key not in self._sought and not self._seeking:
                self._sought[key] = now
                self._begin_seeking(key, self._seek)
        return True

    def _begin_seeking(
        self, key: bytes, seek: Callable[[bytes, Callable[[int], bool], Callable[[Cause, int], None]], None]
    ) -> None:
        self._seeking = True

        def done(cause: Cause, nbytes: int) -> None:
            self._seeking = False
            node = self._index.get(key)
            if cause is Cause.NONE and node is not None:
                self.pace.begin(nbytes)  # how large it is was not known before
                self.pace.end(nbytes)
                self.brought(node)
            elif cause not in (Cause.ABSENT, Cause.MEMORY_FULL):
                self.failed(cause)

        seek(key, self._fits, done)

    def _fits(self, nbytes: int) -> bool:
        """Whether there is room for so many bytes below the mark."""
        used = self._memory.size - self._memory.free_bytes
        return used + self._memory.rounded(nbytes) <= self._memory.size * self.settings.mark

    def _bring(self) -> None:
        """Begin what may begin."""
        if self._bringing or not self._quiet():
            return
        self._bringing = True  # a load may end while it begins
        for _ in range(_AT_ONCE if self._bring_wanted() else 0):
            node = self.candidates.best()
            if node is None or self.paused:
                break
            takes = self._memory.rounded(node.size)
            if not self._fits(node.size) or not self.pace.allows(takes):
                break
            self.candidates.discard(node)
            self._begin(node, takes)
        self._bringing = False

    def _begin(self, node: Node, takes: int) -> None:
        self.pace.begin(takes)
        self.loading += 1

        def done(cause: Cause) -> None:
            self.pace.end(takes)
            self.loading -= 1
            if cause is Cause.NONE:
                self.brought(node)
                self._bring()
            else:
                self.failed(cause)

        self._load(node, done)

    def _look_for_used(self) -> None:
        for _ in range(min(_LOOKS, len(self._unused))):
            node, came = self._unused.popitem(last=False)
            if node.tick == came:
                self._unused[node] = came
            else:
                self._counters.add("prefetch.used")
