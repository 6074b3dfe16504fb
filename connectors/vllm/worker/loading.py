# SPDX-License-Identifier: Apache-2.0
"""What a load under way is made of. Values of the loader's thread; no other touches them, but for what lands."""

from __future__ import annotations

import time
from bisect import bisect_right
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from loracache.backoff import Backoff
from loracache.connectors.vllm.common.messages import Load
from loracache.connectors.vllm.worker.by_layer import LayerCopies

__all__ = ["LONGEST_PAUSE_S", "Chunk", "Flight", "Loading", "Part"]

_CONFIRM_S = 1.0  # for the daemon's word that a lease held until now

_FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.05


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk that is in the arena. position: in its load. expected: its checksum."""

    position: int
    expected: int
    payload: list[memoryview]


@dataclass(frozen=True, slots=True)
class Flight:
    """Chunks that were submitted together. landing: their checksums, once their bytes are in their blocks."""

    chunks: list[Chunk]
    landing: Future[list[int]]


@dataclass(slots=True)
class Part:
    """Chunks of a load that are held in the arena together. acquire, release: requests that the daemon has not
    answered. dropped: it is let go of as soon as its flights have ended. arrived: chunks that are to be
    copied. copied: those whose bytes are in their blocks. bad: keys of those that are wrong.
    """

    lease: bytes
    nbytes: int
    positions: list[int]
    acquire: int = 0
    release: int = 0
    dropped: bool = False
    flights: list[Flight] = field(default_factory=list)
    arrived: list[Chunk] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    bad: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class Loading:
    """A load under way. before: bytes of the objects before each, and of all. todo: positions of chunks to be asked
    for, in order. missing: those that did not arrive, or whose part is held still. gap: one of them never will, so that
    those behind it are of no use. deadline: for the next byte. most: chunks of a part. again: when to ask for room once
    more, after the last of `pauses`. cause: why it ends early. timeout: seconds without a byte after which it does.
    layers: a step waits for it, layer by layer.
    """

    load: Load
    after: Any  # a CUDA event: nothing writes to the blocks any more once it has happened
    layers: LayerCopies | None
    timeout: float
    before: list[int]
    todo: list[int]
    missing: set[int]
    most: int
    deadline: float = 0.0
    parts: list[Part] = field(default_factory=list)
    causes: dict[str, int] = field(default_factory=dict)
    gap: bool = False
    again: float = 0.0
    pauses: Backoff = field(default_factory=lambda: Backoff(_FIRST_PAUSE_S, LONGEST_PAUSE_S))
    no_room_since: float | None = None
    cause: str = ""

    @property
    def holding(self) -> list[Part]:
        """Parts whose pages are held, as far as we have said."""
        return [part for part in self.parts if not part.release]

    @property
    def waits(self) -> bool:
        """Whether it is the daemon's turn."""
        return any(part.acquire or part.release for part in self.parts)

    def size(self, position: int) -> int:
        """Bytes of the object of a chunk."""
        return self.before[position + 1] - self.before[position]

    def fitting(self, room: int) -> list[int]:
        """The next chunks to be asked for: one at least, and so many that they take no more than `room` bytes; all of a
        load whose layers are waited for: they are in memory."""
        if self.layers is not None:
            return self.todo[:]
        end = self.before[self.todo[0]] + room
        count = bisect_right(self.todo, end, key=lambda position: self.before[position + 1])
        return self.todo[: min(self.most, max(1, count))]

    def renew(self) -> None:
        """Bytes come: the next may take as long again, or, where it ends early, what is left of it."""
        self.deadline = time.monotonic() + (_CONFIRM_S if self.cause else self.timeout)

    def came(self, part: Part, chunk: Chunk) -> None:
        """A chunk is in its blocks."""
        part.copied.append(chunk.position)
        self.renew()
        self.pauses.reset()
        self.no_room_since = None

    def count(self, cause: str, amount: int = 1) -> None:
        """Count failures."""
        if amount:
            self.causes[cause] = self.causes.get(cause, 0) + amount

    def lost(self, cause: str, amount: int = 1) -> None:
        """So many chunks will never come."""
        self.count(cause, amount)
        self.gap = True
