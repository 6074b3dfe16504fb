# SPDX-License-Identifier: Apache-2.0
"""A part of a trace that says about as much as the whole: chains by a hash of their beginning.

As SHARDS does for single blocks (Waldspurger et al., FAST'15): of all chains with one root all requests are taken or
none, so that reuse stays what it was, and sizes shrink by as much as the working set did. What a tenth of all requests
have in common, system prompts, is nobody's root and keeps its size.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loracache.simulator.request import Kept, Request

__all__ = ["Sample", "sampled", "working_set"]

_COMMON = 0.1
_FEWEST = 200  # requests: of fewer nothing can be said


@dataclass(frozen=True, slots=True)
class Sample:
    """requests: those that were taken. share: of the bytes that requests do not have in common; common: bytes of those
    that they have."""

    requests: Sequence[Request]
    share: float = 1.0
    common: int = 0

    def scaled(self, nbytes: int) -> int:
        """As much room for the sample as so many bytes are for the whole."""
        common = min(self.common, nbytes)
        return common + int((nbytes - common) * self.share)


def working_set(requests: Sequence[Request], token_bytes: int, adapter_bytes: Sequence[int]) -> int:
    """Bytes of everything that is asked for, each once."""
    used = {request.adapter for request in requests if request.adapter >= 0}
    return sum(_sizes(requests, token_bytes).values()) + sum(adapter_bytes[number] for number in used)


def sampled(requests: Sequence[Request], most_blocks: float, token_bytes: int) -> Sample:
    """So many of the requests that they ask for `most_blocks` blocks, about; all of them where they ask for fewer."""
    asked = sum(len(request.blocks) for request in requests)
    share = most_blocks / max(1, asked)
    if share >= 1 or len(requests) <= _FEWEST:
        return Sample(requests)
    share = max(share, _FEWEST / len(requests))
    counts = Counter(name for request in requests for name in _names(request))
    common = {name for name, count in counts.items() if count > _COMMON * len(requests)}
    roots: dict[tuple[int, int], int] = {}
    taken: list[Request] = []
    kept: list[Kept] = []
    for request in requests:
        kept += [each for each in request.kept if _taken(_root_of(each, roots), share)]
        own = [name for name in _names(request) if name not in common] or _names(request)
        root = next((roots[name] for name in own[:1] if name in roots), own[0][1] if own else 0)
        for name in own:
            roots.setdefault(name, root)
        if _taken(root, share):
            taken.append(replace(request, kept=tuple(kept)))
            kept = []
    sizes, left = _sizes(requests, token_bytes), _sizes(taken, token_bytes)
    of_all, of_taken = (sum(size for name, size in each.items() if name not in common) for each in (sizes, left))
    return Sample(taken, of_taken / max(1, of_all), sum(left[name] for name in common if name in left))


def _names(request: Request) -> list[tuple[int, int]]:
    return [(request.adapter, block) for block in request.blocks]


def _sizes(requests: Sequence[Request], token_bytes: int) -> dict[tuple[int, int], int]:
    return {
        (request.adapter, block): request.bytes_of(position, token_bytes)
        for request in requests
        for position, block in enumerate(request.blocks)
    }


def _root_of(kept: Kept, roots: dict[tuple[int, int], int]) -> int:
    """Of what was stored; it becomes that of its blocks."""
    names = [(kept.adapter, block) for block in kept.blocks]
    first = ([(kept.adapter, kept.below)] if kept.below is not None else []) + names
    root = next((roots[name] for name in first if name in roots), names[0][1] if names else kept.adapter)
    for name in names:
        roots.setdefault(name, root)
    return root


def _taken(root: int, share: float) -> bool:
    return zlib.crc32(root.to_bytes(9, "big")) < share * (1 << 32)
