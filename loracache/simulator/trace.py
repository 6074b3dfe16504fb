# SPDX-License-Identifier: Apache-2.0
"""Traces of requests: what each one asks for, block by block, and with which adapter. formats.py tells them apart."""

from __future__ import annotations

import bisect
import gzip
import itertools
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loracache.errors import ConfigError
from loracache.simulator.formats import Line, requests_of
from loracache.simulator.request import BLOCK_TOKENS, Kept, Request

__all__ = ["BLOCK_TOKENS", "Kept", "Request", "own_adapters", "read_trace", "system_prompts", "with_adapters"]

_COMMON = 0.1  # a first block that more of all requests begin with is a system prompt, and no session's
_MOST_LINE = 64 << 20  # bytes
_GZIP = b"\x1f\x8b"


def read_trace(path: Path) -> list[Request]:
    """The requests in the order of their times, of a file that may be gzipped. Raises ConfigError naming the line that
    is not of the format."""
    try:
        found = list(requests_of(_lines(path), str(path)))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"trace {path} is a damaged gzip file, or cut short: {error}") from None
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"trace {path} is no text; give Mooncake's JSONL or Azure's CSV") from None
    if not found:
        raise ConfigError(f"trace {path} has no requests")
    if not any(request.tokens for request in found):
        raise ConfigError(f"trace {path} asks for no tokens")
    found.sort(key=lambda request: request.time)
    begin = found[0].time
    return [replace(request, time=request.time - begin) for request in found]


def _lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as raw:
        zipped = raw.read(2) == _GZIP
    with gzip.open(path, "rb") if zipped else path.open("rb") as file:
        number = 0
        while line := file.readline(_MOST_LINE + 1):
            number += 1
            if len(line) > _MOST_LINE:
                raise ConfigError(f"trace {path}, line {number}: it is longer than {_MOST_LINE} bytes")
            yield number, line.decode()


def own_adapters(requests: Sequence[Request]) -> list[int]:
    """Bytes of each adapter that the trace itself names; none where it names none."""
    sizes = {request.adapter: request.adapter_bytes for request in requests if request.adapter >= 0}
    sizes |= {kept.adapter: kept.nbytes for request in requests for kept in request.kept if not kept.blocks}
    return [sizes.get(number, 0) for number in range(max(sizes, default=-1) + 1)]


def system_prompts(requests: Sequence[Request]) -> set[int]:
    """First blocks that many of the requests begin with: they say nothing of whose session a request is."""
    firsts = Counter(request.blocks[0] for request in requests if request.blocks)
    return {block for block, count in firsts.items() if count > _COMMON * len(requests)}


def with_adapters(requests: Sequence[Request], adapters: int, zipf: float, seed: int = 0) -> list[Request]:
    """The same requests with adapters 0 to `adapters` - 1, the n-th as often as n ** -zipf. A session keeps its own: a
    request belongs to that of its longest known prefix, a system prompt that many share left aside."""
    if not adapters:
        return list(requests)
    chance = random.Random(seed)
    weights = list(itertools.accumulate((number + 1) ** -zipf for number in range(adapters)))
    common = system_prompts(requests)
    adapter_of: dict[int, int] = {}
    assigned = []
    for request in requests:
        own = [block for block in request.blocks if block not in common]
        known = next((adapter_of[block] for block in reversed(own) if block in adapter_of), None)
        if known is None:
            known = bisect.bisect_left(weights, chance.random() * weights[-1])
        for block in own:
            adapter_of.setdefault(block, known)
        assigned.append(replace(request, adapter=known))
    return assigned
