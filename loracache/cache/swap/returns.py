# SPDX-License-Identifier: Apache-2.0
"""Chains that somebody announced: they are in memory, with their adapter, when they are asked for again.

Until then they may leave memory like any other. About as long before the time as raising them takes they are raised,
an object at a time, parents first, and held loosely for a while: an announcement is no reason to keep from others what
they read now. Threading: the cache's thread.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.swap.candidates import parent_is_there
from loracache.cache.swap.swapper import Swapper
from loracache.results import Cause
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Returns"]

_MOST_KEYS = 1 << 20  # waited for in all: 100 MB
_AT_ONCE = 4  # chains raised side by side
_IN_A_STEP = 512  # objects that are here already are held in one go: a few milliseconds
_EARLY_S = 1.0  # before the time, beside what the raising takes


@dataclass(slots=True)
class _Return:
    """name: what was announced it under, which holds it. due: when it is asked for (clock seconds). left: its keys from
    where it is on. waits: for an object on its way; going: it is looked after now."""

    name: bytes
    due: float
    hold: float
    keys: list[bytes]
    left: Iterator[bytes] | None = None
    waits: bool = False
    going: bool = False


class Returns:
    """acquire(name, key, ttl, done): raise one object from wherever it is and hold it under `name`; done(cause) is
    called at once or later. swapper: whose pace this keeps to, and whose pauses."""

    def __init__(
        self,
        index: Index,
        counters: Counters,
        swapper: Swapper,
        acquire: Callable[[bytes, bytes, float, Callable[[Cause], None]], None],
        clock: Callable[[], float],
    ) -> None:
        self._index = index
        self._counters = counters
        self._swapper = swapper
        self._acquire = acquire
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, _Return]] = []  # a heap by when to begin
        self._named: dict[bytes, _Return] = {}
        self._active: list[_Return] = []
        self._keys = 0

    def __len__(self) -> int:
        return len(self._named)

    @property
    def active(self) -> bool:
        """Whether some are being raised."""
        return bool(self._active)

    def next_at(self) -> float:
        """When the next is begun with (clock seconds), infinite where none waits."""
        return self._waiting[0][0] if self._waiting else float("inf")

    def announce(self, name: bytes, keys: Sequence[bytes], seconds: float, hold: float) -> bool:
        """The chain of `keys` is asked for again in about so many seconds; then it is held for `hold` seconds. A
        second announcement under a name goes on with its chain. False where too much is announced already."""
        if self._keys + len(keys) > _MOST_KEYS:
            self._counters.add("return.refused")
            return False
        self._keys += len(keys)
        found = self._named.get(name)
        if found is not None:
            found.keys += keys
            return True
        found = self._named[name] = _Return(name, self._clock() + seconds, hold, list(keys))
        self._counters.add("return.announced")
        heapq.heappush(self._waiting, (self._begin_at(found), next(self._numbers), found))
        return True

    def step(self) -> None:
        """What is due."""
        now = self._clock()
        while self._waiting and self._waiting[0][0] <= now and len(self._active) < _AT_ONCE:
            found = heapq.heappop(self._waiting)[2]
            found.left = self._chain(found)
            self._active.append(found)
        for found in list(self._active):
            self._go_on(found)

    # -- inside ----------

    def _begin_at(self, found: _Return) -> float:
        nodes = (self._index.get(key) for key in found.keys)
        nbytes = sum(node.size for node in nodes if node is not None)
        return found.due - _EARLY_S - nbytes / self._swapper.settings.bandwidth

    def _chain(self, found: _Return) -> Iterator[bytes]:
        """Its keys, and before them that of its adapter where a tier has it. More may be announced meanwhile."""
        first = self._index.get(found.keys[0]) if found.keys else None
        above = first.parent if first is not None else None
        if above is not None and above.kind is Kind.LORA and above.present:
            yield above.key
        at = 0
        while at < len(found.keys):
            yield found.keys[at]
            at += 1

    def _go_on(self, found: _Return) -> None:
        """Raise its objects one after another, until one has to be waited for."""
        pace = self._swapper.pace
        assert found.left is not None
        found.going = True
        for _ in range(_IN_A_STEP):
            if found.waits or self._swapper.paused or not pace.allows(0):
                break
            key = next(found.left, None)
            node = self._index.get(key) if key is not None else None
            if key is None or (node is not None and not parent_is_there(node)):
                self._end(found)
                break
            takes = node.size if node is not None and not node.held_in(Tier.CPU) else 0
            known = node is not None
            pace.begin(takes)
            found.waits = True
            self._acquire(found.name, key, found.hold, partial(self._arrived, found, key, takes, known))
        found.going = False

    def _arrived(self, found: _Return, key: bytes, takes: int, known: bool, cause: Cause) -> None:
        pace = self._swapper.pace
        pace.end(takes)
        found.waits = False
        node = self._index.get(key)
        if cause or node is None:
            self._swapper.failed(cause)
            self._end(found)
            return
        if not known:  # Redis had it: how large it is nobody knew
            takes = node.size
            pace.begin(takes)
            pace.end(takes)
            self._adapter_too(found, node.parent)
        if takes:
            self._swapper.brought(node)
        if not found.going:
            self._go_on(found)

    def _adapter_too(self, found: _Return, above: Node | None) -> None:
        """Of a chain that only Redis had nobody knew the adapter: have that raised too, where anybody has it."""
        if above is None or above.kind is not Kind.LORA or above.held_in(Tier.CPU):
            return
        key = above.key

        def arrived(cause: Cause) -> None:
            node = self._index.get(key)
            if not cause and node is not None:
                self._swapper.brought(node)

        self._acquire(found.name, key, found.hold, arrived)

    def _end(self, found: _Return) -> None:
        self._active.remove(found)
        del self._named[found.name]
        self._keys -= len(found.keys)
        found.left = iter(())
        found.waits = True
