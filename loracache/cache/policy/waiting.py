# SPDX-License-Identifier: Apache-2.0
"""Lookups that wait to be looked at by shadows, so that no lookup waits for those: the last ones, bounded in chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

__all__ = ["Waiting"]

_LOOKUPS = 256
_CHUNKS = 32_768  # about 3 MB

T = TypeVar("T")


class Waiting(Generic[T]):
    """From the oldest to the newest, each with something beside its keys. longest: chunks of one of them; the rest is
    left aside. chunks: of all."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._lookups: deque[tuple[Sequence[bytes], T]] = deque()
        self.chunks = 0

    def __len__(self) -> int:
        return len(self._lookups)

    def __iter__(self) -> Iterator[tuple[Sequence[bytes], T]]:
        return iter(self._lookups)

    def add(self, keys: Sequence[bytes], beside: T) -> None:
        """One more; the oldest are given up where there are too many."""
        if len(keys) > self._longest:
            keys = keys[: self._longest]
        self._lookups.append((keys, beside))
        self.chunks += len(keys)
        while self.chunks > _CHUNKS or len(self._lookups) > _LOOKUPS:
            self.take()

    def take(self) -> tuple[Sequence[bytes], T]:
        """The oldest, which waits no more."""
        oldest = self._lookups.popleft()
        self.chunks -= len(oldest[0])
        return oldest

    def clear(self) -> None:
        """None waits any more."""
        self._lookups.clear()
        self.chunks = 0
