# SPDX-License-Identifier: Apache-2.0
"""Hints of who comes back: which requests bring one, and what memory keeps for them.

A hint is one true bit with a request: its session will ask again. What its chain has in memory is held then as a lease
holds what somebody is about to read, until the session does ask again, for a time, and within a part of memory. What
there is no room for is treated as if nobody had said anything: who is held stays, for of those whose return nobody
knows the time of, a chain that waited is as near to it as one that begins to.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from loracache.cache.state.index import Index, Node
from loracache.simulator.trace import Request, system_prompts
from loracache.tiers import Tier

__all__ = ["Held", "with_hints"]


def with_hints(requests: Sequence[Request], share: float, seed: int = 0) -> list[Request]:
    """The same requests, each with its session's number; of the sessions that have more than one request, that share
    says with each but the last that it comes back."""
    common = system_prompts(requests)
    sessions = [
        next((block for block in request.blocks if block not in common), -number)
        for number, request in enumerate(requests, start=1)
    ]
    last = {session: number for number, session in enumerate(sessions)}
    chance = random.Random(seed)
    hinting = {session for session, count in Counter(sessions).items() if count > 1 and chance.random() < share}
    return [
        replace(request, session=session, returns=session in hinting and last[session] > number)
        for number, (request, session) in enumerate(zip(requests, sessions, strict=True))
    ]


class Held:
    """What memory keeps for sessions that come back: at most `limit` bytes, each chain for at most `ttl` seconds."""

    def __init__(self, index: Index, limit: int, ttl: float) -> None:
        self._index = index
        self._limit = limit
        self._ttl = ttl
        self._chains: dict[int, tuple[float, list[Node]]] = {}  # by session, the oldest first -> until when
        self._holds: Counter[Node] = Counter()
        self._used = 0

    def returned(self, session: int, now: float) -> None:
        """A session asks again: what was held for it is not any more, nor what was held for too long."""
        self._let_go(session)
        for other in [other for other, (until, _) in self._chains.items() if until <= now]:
            self._let_go(other)

    def keep(self, session: int, last: Node, now: float) -> None:
        """Hold a chain, given by its last node, for a session, as far as there is room."""
        chain = []
        above: Node | None = last
        while above is not None:
            chain.append(above)
            above = above.parent
        takes = sum(node.size for node in chain if not self._holds[node])
        if self._used + takes > self._limit or not all(node.held_in(Tier.CPU) for node in chain):
            return
        self._used += takes
        for node in chain:
            self._holds[node] += 1
            self._index.hold(node)
        self._chains[session] = now + self._ttl, chain

    def _let_go(self, session: int) -> None:
        _, chain = self._chains.pop(session, (0.0, []))
        for node in chain:
            self._holds[node] -= 1
            if not self._holds[node]:
                del self._holds[node]
                self._used -= node.size
            self._index.unhold(node)
