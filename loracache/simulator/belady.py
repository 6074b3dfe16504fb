# SPDX-License-Identifier: Apache-2.0
"""The bound: what a cache finds that knows the future (Belady, 1966), over the same tree.

Of all that it holds, and what is new, it gives up what is asked for again last. A chunk is never asked for without its
parents, so that a parent is always wanted at least as soon as its children: what goes is a leaf, and the tree holds by
itself. With objects of one size nothing finds more; with adapters, which are of others, it is close to that.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from loracache.simulator.trace import Request

__all__ = ["belady_hit_rate"]

_NEVER = 1 << 62


def belady_hit_rate(requests: Sequence[Request], nbytes: int, token_bytes: int, adapter_bytes: Sequence[int]) -> float:
    """Leading tokens found by tokens asked, with room for `nbytes` of KV and adapters in all tiers together."""
    following = _next_uses(requests)
    held: dict[tuple[int, int], int] = {}  # -> when it is asked for next
    sizes: dict[tuple[int, int], int] = {}
    order: list[tuple[int, tuple[int, int]]] = []  # a heap: last wanted first
    used = found = asked = 0
    for number, request in enumerate(requests):
        adapter = request.adapter
        names = [(adapter, block) for block in request.blocks]
        asked += request.tokens
        leading = True
        if adapter >= 0:
            names.insert(0, (adapter, -1))
        for position, (name, upcoming) in enumerate(zip(names, following[number], strict=True)):
            block = position - (adapter >= 0)
            leading = leading and (block < 0 or name in held)
            if leading and block >= 0:
                found += request.tokens_of(block)
            if name not in held:
                sizes[name] = adapter_bytes[adapter] if block < 0 else request.tokens_of(block) * token_bytes
                used += sizes[name]
            held[name] = upcoming
            heapq.heappush(order, (-upcoming, name))
        while used > nbytes:
            upcoming, name = heapq.heappop(order)
            if held.get(name) == -upcoming:
                del held[name]
                used -= sizes[name]
    return found / asked if asked else 0.0


def _next_uses(requests: Sequence[Request]) -> list[list[int]]:
    """For each object of each request, its adapter first, the number of the next request that asks for it. The later in
    the chain, the later it counts, so that of a chain its end goes first."""
    upcoming: dict[tuple[int, int], int] = {}
    found: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        request = requests[number]
        adapter = request.adapter
        names = [(adapter, block) for block in request.blocks]
        if adapter >= 0:
            names.insert(0, (adapter, -1))
        found.append([upcoming.get(name, _NEVER) for name in names])
        for position, name in enumerate(names):
            upcoming[name] = (number << 20) + position
    found.reverse()
    return found
