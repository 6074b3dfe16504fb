# SPDX-License-Identifier: Apache-2.0
"""Reads what `loracache serve --record FILE` wrote (daemon/recorder.py has the format).

Adapters are those that engines loaded from the daemon: of others, which an engine read by itself, KV is told apart and
nothing else. Where one file holds several lives of a daemon they follow one another; what the memory held at the end of
one grows old in the next.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loracache.errors import ConfigError
from loracache.simulator.request import Kept, Request

__all__ = ["MARK", "read_recorded"]

MARK = "loracache_trace"
_VERSION = 1
_HASH = 16  # hexadecimal digits
_TIERS = ("cpu", "disk", "redis")
_MOST_TOKENS, _MOST_BYTES = 1 << 40, 1 << 50


@dataclass(slots=True)
class _Asked:
    """A request, of all its parts."""

    time: float
    chunks: list[int]
    group: int
    held: int
    space: _Space | None
    stored: list[_Stored]  # between the request before it and this one


@dataclass(frozen=True, slots=True)
class _Stored:
    chunks: tuple[int, ...]
    below: int | None
    nbytes: int
    space: _Space | None
    adapter: str = ""  # loaded, where nothing is stored


@dataclass(slots=True, eq=False)
class _Space:
    adapter: str
    tenant: str
    chunk_tokens: int
    sizes: Counter[int] = field(default_factory=Counter)


class _Reader:
    """Takes lines in their order."""

    def __init__(self) -> None:
        self.asked: list[_Asked] = []
        self.adapters: dict[str, int] = {}  # -> bytes
        self.space_of: dict[int, _Space] = {}  # by chunk
        self._spaces: dict[int, _Space] = {}
        self._by_number: dict[int, _Asked] = {}
        self._stored: list[_Stored] = []
        self._before = self._last = 0.0  # when the life began that is read, and the last line's time

    def take(self, line: dict[str, Any]) -> None:
        """One line. Raises KeyError, TypeError or ValueError where it is none."""
        if MARK in line:
            if line[MARK] != _VERSION:
                raise ValueError(f"version {line[MARK]!r}; this release reads {_VERSION}")
            self._spaces, self._by_number, self._before = {}, {}, self._last
        elif "time" not in line:
            tokens = _whole(line["chunk_tokens"], _MOST_TOKENS)
            self._spaces[_whole(line["space"])] = _Space(str(line["adapter"]), str(line["tenant"]), max(1, tokens))
        else:
            self._last = max(self._last, self._before + _seconds(line["time"]))
            if "request" in line:
                self._ask(line)
            elif "store" in line:
                self._store(line)
            else:
                adapter = str(line["adapter"])
                self.adapters[adapter] = nbytes = _whole(line["bytes"], _MOST_BYTES)
                self._stored.append(_Stored((), None, nbytes, None, adapter))

    def _ask(self, line: dict[str, Any]) -> None:
        chunks, group = _hashes(line["chunks"]), max(1, _whole(line["group"]))
        found = dict(line["found"])
        held = sum(_whole(found.get(tier, 0)) for tier in _TIERS)
        space = None if (named := line.get("space")) is None else self._spaces[named]
        for chunk in chunks if space is not None else ():
            self.space_of[chunk] = space  # type: ignore[assignment]
        number = _whole(line["request"])
        asked = self._by_number.get(number)
        if asked is None:
            self._by_number[number] = asked = _Asked(self._last, chunks, group, held, space, self._stored)
            self.asked.append(asked)
            self._stored = []
        else:
            asked.chunks += chunks
            asked.held += held

    def _store(self, line: dict[str, Any]) -> None:
        chunks, below, space = _hashes(line["store"]), _hashes(line["below"]), self._spaces[line["space"]]
        nbytes = _whole(line["bytes"], _MOST_BYTES)
        for chunk in chunks:
            self.space_of[chunk] = space
        space.sizes[nbytes] += len(chunks)
        self._stored.append(_Stored(tuple(chunks), below[0] if below else None, nbytes, space))


def read_recorded(lines: Iterable[tuple[int, str]], name: str) -> list[Request]:
    """The requests of a recorded trace; lines: with their numbers. Raises ConfigError naming the line that is none. A
    line that a daemon had no time to write whole is left out: nothing follows it but the next daemon's first."""
    reader = _Reader()
    broken: ConfigError | None = None
    for number, text in lines:
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise TypeError("it is no object")
            if broken is not None and MARK not in line:
                raise broken
            broken = None
            reader.take(line)
        except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            told = f"trace {name}, line {number}: nothing that a daemon records ({type(error).__name__}: {error})"
            broken = ConfigError(told[:500])
    if broken is not None and text.endswith("\n"):
        raise broken
    return _requests(reader)


def _requests(reader: _Reader) -> list[Request]:
    numbers = {adapter: number for number, adapter in enumerate(reader.adapters)}
    tenants: defaultdict[str, int] = defaultdict(lambda: len(tenants))
    usual = Counter(space.chunk_tokens for space in reader.space_of.values()).most_common(1)
    found = []
    for asked in reader.asked:
        space = asked.space or next(filter(None, map(reader.space_of.get, asked.chunks)), None)
        adapter = space.adapter if space is not None else ""
        tokens = space.chunk_tokens if space is not None else usual[0][0] if usual else 1
        tokens = max(1, tokens // asked.group)
        request = Request(
            time=asked.time,
            tokens=tokens * len(asked.chunks),
            blocks=tuple(asked.chunks),
            adapter=numbers.get(adapter, -1),
            block_tokens=tokens,
            tenant=tenants[space.tenant] if space is not None and space.tenant else -1,
            block_bytes=space.sizes.most_common(1)[0][0] if space is not None and space.sizes else 0,
            adapter_bytes=reader.adapters.get(adapter, 0),
            held=min(asked.held, len(asked.chunks)),
            kept=tuple(_kept(each, numbers) for each in asked.stored),
        )
        found.append(request)
    return found


def _kept(stored: _Stored, numbers: dict[str, int]) -> Kept:
    adapter = stored.space.adapter if stored.space is not None else stored.adapter
    return Kept(stored.chunks, stored.below, numbers.get(adapter, -1), stored.nbytes)


def _hashes(text: Any) -> list[int]:
    if not isinstance(text, str) or len(text) % _HASH:
        raise ValueError(f"{str(text)[:40]!r} is no row of hashes of {_HASH} digits")
    return [int(text[at : at + _HASH], 16) for at in range(0, len(text), _HASH)]


def _whole(value: Any, most: int = 1 << 53) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]} is no whole number from 0 to {most}")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e12:
        raise ValueError(f"{str(value)[:40]} is no time in seconds")
    return float(value)
