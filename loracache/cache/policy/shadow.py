# SPDX-License-Identifier: Apache-2.0
"""Shadows of a tier: what each way of choosing victims would find, on a sample of the objects, as names alone.

A sample is all objects whose key, a hash, begins with a small number, and a shadow has room for as many as the sample
has in the tier: it finds about the same share (Waldspurger et al., "SHARDS", FAST 2015). It begins as the tier is. A
chunk is never asked for without its parents; so in each shadow a chain is used from its end to its beginning, and its
end goes first as in the tree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from math import inf, sqrt

from loracache.cache.policy.names import Names
from loracache.cache.policy.waiting import Waiting
from loracache.cache.state.index import Node
from loracache.storage_backends.base import KEY_BYTES, Kind

__all__ = ["ALL", "LINES", "WAYS", "Shadow", "Shadows", "Way", "limit_of"]

Way = tuple[float, ...]
"""How much longer, in as many uses as the tier has objects, those stay that came again once, twice, oftener."""

LINES = 4
ALL = 65_536
"""The rate of a sample that is the whole."""
_ALWAYS = 1000.0
WAYS: tuple[Way, ...] = (
    (0.0, 0.0, 0.0, 0.0),  # LRU
    (0.0, 1.0, 2.0, 3.0),  # RECENT
    (0.0, _ALWAYS, _ALWAYS + 4, _ALWAYS + 8),  # OFTEN
    (0.0, _ALWAYS, _ALWAYS, _ALWAYS),  # TWICE: in force at first, for a chain that never comes again does no harm there
)

_SAMPLE = 8_192  # objects, at most; and half of it in large tiers
_KEPT = 0.97  # of what was found before, by as many names asked as the sample has
_SURE = 2.5  # standard errors that another way must have found more
_SLICE = 512  # objects of the tier that shadows begin with, between two looks at the socket
_LONGEST = 2048  # chunks of a lookup that are looked at


class Shadow:
    """One way. Names stand in lines by how often they came; what was used last stands last."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._lines: list[OrderedDict[bytes, int]] = [OrderedDict() for _ in way]  # -> when it was used last
        self._line_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._line_of)

    def ask(self, names: Collection[tuple[bytes, int]], now: int, room: int, stay: float) -> int:
        """A chain is asked for, its end first, each name with the line that it belongs to from now on. room: for so
        many names. stay: uses that a 1 of the way stands for. Answers how many were found; the others come in, as far
        as there is room for them."""
        lines, line_of = self._lines, self._line_of
        absent = []
        for each in names:
            name, line = each
            before = line_of.get(name)
            if before is None:
                absent.append(each)
                continue
            own = lines[line]
            if before != line:
                del lines[before][name]
                line_of[name] = line
                own[name] = now
            else:
                own[name] = now
                own.move_to_end(name)
        found = len(names) - len(absent)
        if len(line_of) + len(absent) > room:
            self._shrink(max(0, room - len(absent)), stay)
            absent = absent[max(0, len(absent) + len(line_of) - room) :]
        for name, line in absent:
            lines[line][name] = now
            line_of[name] = line
        return found

    def put(self, name: bytes, line: int, now: int) -> None:
        """A name comes in, last in its line."""
        self._lines[line][name] = now
        self._line_of[name] = line

    def _shrink(self, room: int, stay: float) -> None:
        """Drop what there is no room for."""
        lines, line_of = self._lines, self._line_of
        longer = [each * stay for each in self._way]
        fronts = [next(iter(line.values())) + more if line else inf for line, more in zip(lines, longer, strict=True)]
        while (excess := len(line_of) - room) > 0:
            first = fronts.index(min(fronts))
            before, behind = min(fronts[:first], default=inf), min(fronts[first + 1 :], default=inf)
            line, more = lines[first], longer[first]
            for _ in range(min(excess, len(line))):  # as long as no other line's first is lower
                name, used = line.popitem(last=False)
                if not (used + more < before and used + more <= behind):
                    line[name] = used
                    line.move_to_end(name, last=False)
                    break
                del line_of[name]
            fronts[first] = next(iter(line.values())) + more if line else inf


class Shadows:
    """One shadow for each of `ways`, and which of these did best: the one that is in force until another has found
    more by `_SURE` standard errors of the difference, lookup by lookup."""

    def __init__(self, ways: Sequence[Way] = WAYS) -> None:
        self._ways = ways
        self._shadows: list[Shadow] = []
        self._beginning = False
        self._asked: Waiting[int] = Waiting(_LONGEST)  # and the tier's last use when they were
        self._sample: dict[bytes, Node] = {}  # of the tier: those whose keys are below
        self._rate = ALL  # of so many objects that many are in the sample
        self._limit = limit_of(self._rate)
        self._times = Names()
        self._best = len(ways) - 1
        # How many more each found than each other, and the squares of that, lookup by lookup.
        self._more = [[0.0] * len(ways) for _ in ways]
        self._squares = [[0.0] * len(ways) for _ in ways]

    @property
    def best(self) -> Way:
        """The way that is in force."""
        return self._ways[self._best]

    def entered(self, node: Node) -> None:
        """The tier has an object more."""
        if node.kind is not Kind.KV or node.key >= self._limit:
            return
        self._sample[node.key] = node
        if len(self._sample) > _SAMPLE and self._rate > 1:
            self._rate //= 2
            self._limit = limit_of(self._rate)
            self._sample = {key: node for key, node in self._sample.items() if key < self._limit}
            self._shadows = []

    def left(self, node: Node) -> None:
        """It has one less."""
        self._sample.pop(node.key, None)

    def ask(self, keys: Sequence[bytes], now: int) -> None:
        """A chain is looked up, when the tier's last use was `now`. It is looked at later, in `work`."""
        if len(self._ways) > 1:
            if not self._shadows:  # they begin with the last: in a tier that never is full no keys are kept
                self._asked.clear()
            self._asked.add(keys, now)

    def forget(self) -> None:
        """The tier is not what it was, nor is what the shadows hold: they begin anew. What did best stays in force."""
        self._shadows = []
        self._asked.clear()

    def work(self, line_of: Callable[[Node], int], objects: int) -> Iterator[None]:
        """Look at what was asked; yields between two chains. The tier is full, and has so many objects."""
        if self._beginning or len(self._ways) < 2:
            return
        if not self._shadows:
            yield from self._begin(line_of)
        while self._asked and self._shadows:
            keys, now = self._asked.take()
            self._use(keys, now, objects)
            yield

    def _begin(self, line_of: Callable[[Node], int]) -> Iterator[None]:
        """The tier is what all shadows hold, with what was asked before it was full. Yields between two slices."""
        self._beginning = True
        shadows, limit = [Shadow(way) for way in self._ways], self._limit
        try:
            for count, node in enumerate(sorted(self._sample.values(), key=lambda node: node.tick), start=1):
                line = line_of(node)
                self._times.add(hash(node.key), 0, line)
                for shadow in shadows:
                    shadow.put(node.key, line, node.tick)
                if not count % _SLICE:
                    yield
        finally:
            self._beginning = False
        while len(self._asked) > 1:
            self._asked.take()
        if limit == self._limit:  # else the sample is another now
            self._shadows = shadows

    def _use(self, keys: Sequence[bytes], now: int, objects: int) -> None:
        room, limit = len(self._sample), self._limit
        again, most = self._times.again, LINES - 1
        sampled = dict.fromkeys(key for key in reversed(keys) if key < limit)  # one that is named twice is asked once
        names = [(key, again(hash(key), most)) for key in sampled]
        if not room or not names:
            return
        found = [shadow.ask(names, now, room, objects) for shadow in self._shadows]
        kept = _KEPT ** (len(names) / room)
        for more, squares, own in zip(self._more, self._squares, found, strict=True):
            for other, its in enumerate(found):
                more[other] = kept * more[other] + own - its
                squares[other] = kept * squares[other] + (own - its) ** 2
        most_found = max(range(len(found)), key=lambda way: self._more[way][self._best])
        if self._more[most_found][self._best] > _SURE * sqrt(self._squares[most_found][self._best]):
            self._best = most_found


def limit_of(rate: int) -> bytes:
    """The key below which those of a sample are, that has so many of ALL objects."""
    return rate.to_bytes(2, "big") if rate < ALL else b"\xff" * (KEY_BYTES + 1)
