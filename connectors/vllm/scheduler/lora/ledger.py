# SPDX-License-Identifier: Apache-2.0
"""Who may have pages of the workers' pools: the scheduler's books. Pure; no clock and no I/O of its own.

An adapter has pages from the moment it is given them until it is evicted; requests hold it from admission to their
end, and what is held or pinned is not evicted. Who of the others leaves first, how often and how lately requests came
for it says (s3_fifo.py): a scan of tenants that come once throws no other out.

Fair order: a request that does not fit becomes the head, and pages that come free go to it before anybody behind it
gets new ones. Requests for adapters that have pages already pass it for `PASSING_S` at most; then nobody passes, so
that the adapters that are held run out of holders, and the head gets its pages.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from loracache.s3_fifo import S3FIFO

__all__ = ["PASSING_S", "Answer", "PageLedger"]

PASSING_S = 0.5


class Answer(enum.Enum):
    """What `ask` answers."""

    HELD = "held"  # it has pages, and this request holds it
    GIVEN = "given"  # it has pages from now on, after the evictions named
    WAIT = "wait"  # later
    NEVER = "never"  # it is larger than a whole pool


@dataclass(slots=True)
class _Entry:
    cost: tuple[int, ...]
    holders: set[str] = field(default_factory=set)
    pinned: bool = False


class PageLedger:
    """Pages of all workers' pools at once: budgets[i] pages are worker i's."""

    def __init__(self, budgets: Sequence[int]) -> None:
        self._free = list(budgets)
        self._budgets = tuple(budgets)
        self._entries: dict[str, _Entry] = {}
        self._held: dict[str, set[str]] = {}
        self._order: S3FIFO[str] = S3FIFO()
        self._head: tuple[str, float] | None = None

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def adapters(self) -> list[str]:
        """All that have pages."""
        return list(self._entries)

    def held(self, digest: str) -> bool:
        """Whether a request holds it."""
        entry = self._entries.get(digest)
        return entry is not None and bool(entry.holders)

    def holds(self, request: str, digest: str) -> bool:
        """Whether this request holds it."""
        return digest in self._held.get(request, ())

    def ask(self, request: str, digest: str, cost: Sequence[int], now: float) -> tuple[Answer, list[str]]:
        """Have `request` hold an adapter of `cost` pages a worker; answers the adapters to evict for it too. `now` in
        seconds of any steady clock. Ask in the order of the requests' turns.
        """
        if self.holds(request, digest):
            return Answer.HELD, []
        if any(pages > budget for pages, budget in zip(cost, self._budgets, strict=True)):
            return Answer.NEVER, []
        behind = self._head is not None and self._head[0] != request
        entry = self._entries.get(digest)
        if entry is not None:
            if behind and self._head is not None and now - self._head[1] >= PASSING_S:
                return Answer.WAIT, []
            self._hold(request, digest)
            return Answer.HELD, []
        victims = None if behind else self._make_room(cost)
        if victims is None:
            if self._head is None:
                self._head = (request, now)
            return Answer.WAIT, []
        self._enter(digest, cost)
        self._take(request, digest)
        return Answer.GIVEN, victims

    def spare(self, cost: Sequence[int]) -> bool:
        """Whether so many pages are free, and nobody waits for some."""
        return self._head is None and all(pages <= free for pages, free in zip(cost, self._free, strict=True))

    def give(self, digest: str, cost: Sequence[int]) -> None:
        """Give an adapter that has none, and that nobody has asked for, pages that are spare."""
        assert digest not in self._entries, f"{digest} has pages"
        self._enter(digest, cost)

    def _enter(self, digest: str, cost: Sequence[int]) -> None:
        self._entries[digest] = _Entry(tuple(cost))
        self._free = [free - pages for free, pages in zip(self._free, cost, strict=True)]
        self._order.add(digest, max(cost, default=0))

    def also_hold(self, request: str, digest: str) -> None:
        """A request that runs is served by this adapter, which has pages, from now on too."""
        if digest in self._entries:
            self._hold(request, digest)

    def end(self, request: str) -> None:
        """A request is over."""
        for digest in self._held.pop(request, ()):
            entry = self._entries.get(digest)
            if entry is not None:
                entry.holders.discard(request)
        if self._head is not None and self._head[0] == request:
            self._head = None

    def let_go_but(self, request: str, digest: str) -> None:
        """A request that does not run wants this adapter alone: what it held before is of no use to it."""
        for other in self._held.get(request, set()) - {digest}:
            self._entries[other].holders.discard(request)
            self._held[request].discard(other)

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep an adapter that has pages, or let it go like any other."""
        if digest in self._entries:
            self._entries[digest].pinned = pinned

    def drop(self, digest: str) -> set[str]:
        """The adapter has no pages any more; answers who held it."""
        entry = self._entries.pop(digest, None)
        if entry is None:
            return set()
        self._order.remove(digest)
        self._free = [free + pages for free, pages in zip(self._free, entry.cost, strict=True)]
        for request in entry.holders:
            self._held[request].discard(digest)
        return entry.holders

    def _hold(self, request: str, digest: str) -> None:
        self._order.use(digest)
        self._take(request, digest)

    def _take(self, request: str, digest: str) -> None:
        self._entries[digest].holders.add(request)
        self._held.setdefault(request, set()).add(digest)
        if self._head is not None and self._head[0] == request:
            self._head = None

    def _make_room(self, cost: Sequence[int]) -> list[str] | None:
        """Take the pages of adapters until so many are free; answers whose, or None, and nothing is taken, where that
        does not help."""
        idle = {name for name, entry in self._entries.items() if not entry.holders and not entry.pinned}
        most = list(self._free)
        for name in idle:
            most = [free + pages for free, pages in zip(most, self._entries[name].cost, strict=True)]
        if any(pages > free for pages, free in zip(cost, most, strict=True)):
            return None
        victims: list[str] = []
        while any(pages > free for pages, free in zip(cost, self._free, strict=True)):
            victim = self._order.evict(idle.__contains__)
            assert victim is not None
            self.drop(victim)
            victims.append(victim)
        return victims
