# SPDX-License-Identifier: Apache-2.0
"""Traces of requests: what each one asks for, block by block, and with which adapter.

Formats, told apart by their first line: Mooncake's (one JSON object a line: timestamp in ms, input_length,
output_length, hash_ids; equal ids mean equal prefixes) and Azure's (CSV: TIMESTAMP,ContextTokens,GeneratedTokens;
lengths and arrivals only, so that no two requests share anything).
"""

from __future__ import annotations

import bisect
import csv
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from loracache.errors import ConfigError

__all__ = ["BLOCK_TOKENS", "Request", "read_trace", "with_adapters"]

BLOCK_TOKENS = 512  # of one hash id, in both formats
_COMMON = 0.1  # a first block that more of all requests begin with is a system prompt, and no session's


@dataclass(frozen=True, slots=True)
class Request:
    """time: seconds since the first one. blocks: an id for each block of the prompt. adapter: its number, -1: none."""

    time: float
    tokens: int
    blocks: tuple[int, ...]
    adapter: int = -1
    block_tokens: int = BLOCK_TOKENS

    def tokens_of(self, position: int) -> int:
        """Tokens of one block; the last one may have fewer than the others."""
        return max(1, min(self.block_tokens, self.tokens - position * self.block_tokens))


def read_trace(path: Path) -> list[Request]:
    """The requests in the order of their times. Raises ConfigError naming the line that is not of the format."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
            lines = itertools.chain([first], file)
            found = list(_azure(lines) if first.startswith("TIMESTAMP") else _mooncake(lines, path))
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"trace {path} is no text; give Mooncake's JSONL or Azure's CSV") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"trace {path} is neither Mooncake's JSONL nor Azure's CSV: {error}") from None
    if not found:
        raise ConfigError(f"trace {path} has no requests")
    found.sort(key=lambda request: request.time)
    begin = found[0].time
    return [replace(request, time=request.time - begin) for request in found]


def with_adapters(requests: Sequence[Request], adapters: int, zipf: float, seed: int = 0) -> list[Request]:
    """The same requests with adapters 0 to `adapters` - 1, the n-th as often as n ** -zipf. A session keeps its own: a
    request belongs to that of its longest known prefix, a system prompt that many share left aside."""
    if not adapters:
        return list(requests)
    chance = random.Random(seed)
    weights = list(itertools.accumulate((number + 1) ** -zipf for number in range(adapters)))
    firsts = Counter(request.blocks[0] for request in requests if request.blocks)
    common = {block for block, count in firsts.items() if count > _COMMON * len(requests)}
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


def _mooncake(lines: Iterable[str], path: Path) -> Iterator[Request]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            blocks = tuple(int(block) for block in item["hash_ids"])
            yield Request(float(item["timestamp"]) / 1000, int(item["input_length"]), blocks)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"trace {path}, line {number}: no request of Mooncake's ({type(error).__name__}: {error}); it has "
                "timestamp, input_length and hash_ids"
            ) from None


def _azure(lines: Iterable[str]) -> Iterator[Request]:
    fresh = itertools.count()
    for row in csv.DictReader(lines):
        tokens = int(row["ContextTokens"])
        blocks = tuple(itertools.islice(fresh, -(-tokens // BLOCK_TOKENS)))
        time = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])  # of seven decimals Python knows six
        yield Request(time.timestamp(), tokens, blocks)
