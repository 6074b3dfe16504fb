# SPDX-License-Identifier: Apache-2.0
"""S3-FIFO, leaf first (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

What comes in for the first time waits in a small queue, a tenth of all bytes. What was used there, when its turn to go
comes, moves to the main queue; the rest leaves, and its name is remembered for a while: if it comes again, it goes to
the main queue at once. In the main queue each use since then buys one more turn.

loracache/s3_fifo.py is the same for a few things that hang from nothing, and takes the time to look at all of them;
here only leaves may go, and a choice looks at no more than it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracache.cache.policy.ghosts import Ghosts
from loracache.cache.policy.leaf_first import Ranked
from loracache.cache.policy.line import Front
from loracache.cache.policy.names import Names
from loracache.cache.state.index import Index, Node
from loracache.tiers import Tier

__all__ = ["S3FIFO"]

_SMALL, _MAIN = 0, 1
_SMALL_SHARE = 0.1
_PROMOTED_AT = 1  # uses while it stood in the small queue
_MOST_USES = 3
_LEAST_GHOSTS, _MOST_GHOSTS = 64, 1 << 24
_NAMES_BY_OBJECT = 8  # names by ghost: of these there is one by object, and places of such as came again


@dataclass(slots=True)
class _Standing:
    """turn: when it joined its queue. counted: its hits when its uses were looked at last. nbytes: what it takes."""

    queue: int
    turn: int
    counted: int
    nbytes: int


class S3FIFO(Ranked):
    """Victims of one tier. Remembers four numbers of each node in the tier, and as many names of such that left."""

    ONCE = _SMALL

    def __init__(self, index: Index, tier: Tier, cost: Callable[[Node], int]) -> None:
        super().__init__(index, tier, cost, lines=2)
        self._known: dict[Node, _Standing] = {}
        self._turn = 0
        self._bytes = [0, 0]
        self._ghosts = Ghosts(_MOST_GHOSTS)
        self._places = Names(_LEAST_GHOSTS, _NAMES_BY_OBJECT, wide=True)  # of these

    def line_of(self, node: Node) -> int:
        """The small queue or the main one."""
        known = self._known.get(node) or self._meet(node)
        return known.queue

    def rank(self, node: Node) -> tuple[float, int]:
        """When it joined its queue."""
        known = self._known.get(node) or self._meet(node)
        return known.turn, 0

    def used(self, node: Node, before: int) -> None:
        """Nothing: its hits say so when its turn comes."""

    def pick(self, fronts: Sequence[Front[tuple[float, int]]], going: Sequence[int]) -> Front[tuple[float, int]] | None:
        """The small queue where it has more than its share, else the main one, as far as there is anybody."""
        small = self._bytes[_SMALL] - going[_SMALL]
        large = small > _SMALL_SHARE * (sum(self._bytes) - sum(going))
        for front in fronts if large else reversed(fronts):
            if front.first() is not None:
                return front
        return None

    def spared(self, node: Node) -> bool:
        """Whether it moves to the end of the main queue."""
        known = self._known[node]
        uses = min(node.hits - known.counted, _MOST_USES)
        if uses < (_PROMOTED_AT if known.queue == _SMALL else 1):
            return False
        self._bytes[known.queue] -= known.nbytes
        self._bytes[_MAIN] += known.nbytes
        known.counted = node.hits if known.queue == _SMALL else node.hits - uses + 1
        known.queue, known.turn = _MAIN, self._next_turn()
        self._move(node)
        return True

    def gone(self, node: Node) -> None:
        """It has left the tier."""
        known = self._known.pop(node, None)
        if known is None:
            return
        self._bytes[known.queue] -= known.nbytes
        if known.queue == _SMALL:
            # Room is made for several at a time: what there was before that counts.
            place = self._ghosts.add(1, max(_LEAST_GHOSTS, len(self._known), len(self._ghosts)))
            self._places.add(hash(node.key), len(self._ghosts), place)

    def _meet(self, node: Node) -> _Standing:
        place = self._places.get(hash(node.key))
        queue = _MAIN if place >= 0 and self._ghosts.take(place) else _SMALL
        known = self._known[node] = _Standing(queue, self._next_turn(), node.hits, self._cost(node))
        self._bytes[queue] += known.nbytes
        return known

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn
