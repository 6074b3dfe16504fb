# SPDX-License-Identifier: Apache-2.0
"""The bound: what a cache finds that knows the future (Belady, 1966), over the same tree.

Of all that it holds, and what is new, it gives up what is asked for again last. A chunk is never asked for without its
parents, so that a parent is always wanted at least as soon as its children: what goes is a leaf, and the tree holds by
itself. With objects of one size nothing finds more; with adapters, which are of others, it is close to that.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from loracache.simulator.request import Kept, Request

__all__ = ["belady_hit_rate"]

_NEVER = 1 << 62


def belady_hit_rate(requests: Sequence[Request], nbytes: int, token_bytes: int, adapter_bytes: Sequence[int]) -> float:
    """Leading tokens found by tokens asked, with room for `nbytes` of KV and adapters in all tiers together."""
    entries: list[Request | Kept] = []
    for request in requests:
        entries += request.kept
        entries.append(request)
    following = _next_uses(entries)
    held: dict[tuple[int, int], int] = {}  # -> when it is asked for next
    sizes: dict[tuple[int, int], int] = {}
    order: list[tuple[int, tuple[int, int]]] = []  # a heap: last wanted first
    used = found = asked = 0
    for number, entry in enumerate(entries):
        adapter = entry.adapter
        leading = isinstance(entry, Request)
        asked += entry.tokens if isinstance(entry, Request) else 0
        for position, (name, upcoming) in enumerate(zip(_names(entry), following[number], strict=True)):
            block = position - (adapter >= 0)
            leading = leading and (block < 0 or name in held)
            if leading and block >= 0 and isinstance(entry, Request):
                found += entry.tokens_of(block)
            if name not in held:
                own = entry.bytes_of(block, token_bytes) if isinstance(entry, Request) else entry.nbytes
                sizes[name] = adapter_bytes[adapter] if block < 0 else own
                used += sizes[name]
            held[name] = upcoming
            heapq.heappush(order, (-upcoming, name))
        while used > nbytes:
            upcoming, name = heapq.heappop(order)
            if held.get(name) == -upcoming:
                del held[name]
                used -= sizes[name]
    return found / asked if asked else 0.0


def _names(entry: Request | Kept) -> list[tuple[int, int]]:
    """Of the adapter first, then of the blocks."""
    own = [(entry.adapter, -1)] if entry.adapter >= 0 else []
    return own + [(entry.adapter, block) for block in entry.blocks]


def _next_uses(entries: Sequence[Request | Kept]) -> list[list[int]]:
    """For each object of each entry, its adapter first, the number of the next request that asks for it. The later in
    the chain, the later it counts, so that of a chain its end goes first."""
    upcoming: dict[tuple[int, int], int] = {}
    found: list[list[int]] = []
    for number in range(len(entries) - 1, -1, -1):
        entry = entries[number]
        names = _names(entry)
        found.append([upcoming.get(name, _NEVER) for name in names])
        if isinstance(entry, Request):
            for position, name in enumerate(names):
                upcoming[name] = (number << 20) + position
    found.reverse()
    return found
