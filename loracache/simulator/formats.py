# SPDX-License-Identifier: Apache-2.0
"""The formats of traces, each told by its first line; recorded.py reads those of our own daemon.

- Mooncake (JSONL): timestamp in ms, input_length, hash_ids of 512 tokens each; equal ids mean equal prefixes.
- Bailian (JSONL): chat_id, parent_chat_id, timestamp in s, input_length, output_length, type, turn, hash_ids of 16.
- Azure (CSV): TIMESTAMP,ContextTokens,GeneratedTokens: lengths and arrivals, so that no two requests share anything.
- BurstGPT (CSV): Timestamp in s, Session ID (where it has one), Request tokens, ...: each prompt of a session begins
  with the one before it, where it is longer than that; others share nothing.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from loracache.errors import ConfigError
from loracache.simulator.recorded import MARK, read_recorded
from loracache.simulator.request import BLOCK_TOKENS, Request

__all__ = ["Line", "requests_of"]

Line = tuple[int, str]

_KNOWN = "Mooncake's or Bailian's JSONL, Azure's or BurstGPT's CSV, or what `loracache serve --record` writes"
_SMALL_BLOCK = 16
_MOST_TOKENS = 16 << 20  # of one prompt
_MOST_ID = 1 << 64
_MOST_BLOCKS = 1 << 20  # of one prompt: belady.py numbers them so


def requests_of(lines: Iterable[Line], name: str) -> Iterable[Request]:
    """The requests of the trace `name`, in the order of its lines. Raises ConfigError naming the line that is not of
    the format."""
    lines = iter(lines)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        raise ConfigError(f"trace {name} has no requests; give {_KNOWN}")
    lines = itertools.chain([first], lines)
    number, text = first
    if not text.startswith("{"):
        columns = {column.strip() for column in text.split(",")}
        if "TIMESTAMP" in columns:
            return _rows(lines, name, "Azure's", ("TIMESTAMP", "ContextTokens"), _azure())
        if {"Timestamp", "Request tokens"} & columns:
            return _rows(lines, name, "BurstGPT's", ("Timestamp", "Request tokens"), _burst_gpt())
        raise ConfigError(
            f"trace {name}, line {number}: {text.strip()[:40]!r} begins no format that is known: {_KNOWN}"
        )
    try:
        keys = set(json.loads(text))
    except (ValueError, RecursionError):
        keys = set()  # the reader below says what is wrong with the line
    if MARK in keys:
        return read_recorded(lines, name)
    if "chat_id" in keys:
        return _objects(lines, name, "Bailian's", 1.0, _SMALL_BLOCK)
    return _objects(lines, name, "Mooncake's", 1e-3, BLOCK_TOKENS)


def _objects(lines: Iterable[Line], name: str, whose: str, second: float, block_tokens: int) -> Iterator[Request]:
    """Of a request a line. second: of one unit of its time."""
    for number, line in lines:
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            blocks = tuple(map(_id, item["hash_ids"]))
            tokens = _tokens(item["input_length"])
            if len(blocks) > _MOST_BLOCKS:
                raise ValueError(f"{len(blocks)} hash_ids are more than {_MOST_BLOCKS}")
            yield Request(_time(item["timestamp"]) * second, tokens, blocks, block_tokens=block_tokens)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"trace {name}, line {number}: no request of {whose} ({type(error).__name__}: {str(error)[:200]}); it "
                "has timestamp, input_length and hash_ids"
            ) from None


def _rows(
    lines: Iterable[Line], name: str, whose: str, columns: tuple[str, ...], read: Callable[[Any], Request | None]
) -> Iterator[Request]:
    """Of a request a row; read(row) answers None for one that asks for nothing."""
    number = 1

    def texts() -> Iterator[str]:
        nonlocal number
        for line in lines:
            number = line[0]
            yield line[1]

    try:
        for row in csv.DictReader(texts(), skipinitialspace=True):
            for column in columns:
                if row.get(column) is None:
                    raise KeyError(column)
            request = read(row)
            if request is not None:
                yield request
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"trace {name}, line {number}: no request of {whose} ({type(error).__name__}: {str(error)[:200]}); it has "
            f"{' and '.join(columns)}"
        ) from None


def _azure() -> Callable[[Any], Request | None]:
    fresh = itertools.count()

    def read(row: Any) -> Request | None:
        tokens = _tokens(row["ContextTokens"])
        time = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])  # of seven decimals Python knows six
        blocks = tuple(itertools.islice(fresh, -(-tokens // BLOCK_TOKENS)))
        return Request(time.timestamp(), tokens, blocks) if tokens else None

    return read


def _burst_gpt() -> Callable[[Any], Request | None]:
    fresh = itertools.count()
    sessions: dict[str, tuple[int, tuple[int, ...]]] = {}  # the last prompt's tokens, and its whole blocks

    def read(row: Any) -> Request | None:
        tokens, session = _tokens(row["Request tokens"]), (row.get("Session ID") or "").strip()
        time = _time(float(row["Timestamp"]))
        if not tokens:  # a request that failed
            return None
        before, blocks = sessions.get(session, (0, ())) if session else (0, ())
        if tokens <= before:
            blocks = ()
        blocks += tuple(itertools.islice(fresh, -(-tokens // _SMALL_BLOCK) - len(blocks)))
        if session:
            sessions[session] = tokens, blocks[: tokens // _SMALL_BLOCK]
        return Request(time, tokens, blocks, block_tokens=_SMALL_BLOCK)

    return read


def _tokens(value: Any) -> int:
    tokens = int(value)
    if isinstance(value, bool | float) or not 0 <= tokens <= _MOST_TOKENS:
        raise ValueError(f"{str(value)[:40]} is no number of tokens from 0 to {_MOST_TOKENS}")
    return tokens


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST_ID:
        raise ValueError(f"{str(value)[:40]} is no id from 0 to {_MOST_ID - 1}")
    return value


def _time(value: Any) -> float:
    if isinstance(value, bool | str) or not math.isfinite(time := float(value)) or abs(time) > 1e15:
        raise ValueError(f"{str(value)[:40]} is no time")
    return time
