# SPDX-License-Identifier: Apache-2.0
"""A lookup of many keys, asked in parts one after the other, as far as they are held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from loracache.client import requests
from loracache.tiers import Tier, labels

__all__ = ["Found", "PartedLookup"]

_PART_KEYS = 8192  # of a part with keys beside a chain
_WHERE = {int(tier): tier.label for tier in Tier} | {requests.NOWHERE: ""}


class Found(NamedTuple):
    """The tiers of the leading keys of a chain, and of each key beside it, "" where it is nowhere."""

    tiers: tuple[str, ...]
    beside: tuple[str, ...]


class PartedLookup:
    """Of `keys`, `shards` to a chunk, and of those beside them, `width` to a chunk. number: of the request that was
    sent last."""

    def __init__(
        self, lease: bytes, keys: Sequence[bytes], shards: int, ttl: float, beside: Sequence[bytes], width: int
    ) -> None:
        self._lease = lease
        self._shards = shards
        self._ttl = ttl
        self._parts = _parts(keys, shards, beside, width)
        self._asked = self._beside = 0  # keys of the part that was asked last
        self._over = False
        self.found = Found((), ())
        self.number = 0

    def next(self) -> requests.Lookup | None:
        """What to ask next; None where all is known."""
        part = None if self._over else next(self._parts, None)
        if part is None:
            return None
        keys, beside = part
        self._asked, self._beside = len(keys), len(beside)
        joined = requests.join_keys(keys), max(1, self._shards), self._ttl, requests.join_keys(beside)
        return requests.Lookup(self._lease, *joined)

    def take(self, payload: list[Any] | None) -> None:
        """Take an answer; None: the question failed. Raises LookupError, TypeError or ValueError for what is none: all
        of the part is missed then, and what comes behind."""
        self._over = True
        if payload is None:
            return
        tiers = labels(payload[0])
        beside = tuple([_WHERE[tier] for tier in (payload[1] if self._beside else b"")])
        if len(tiers) > self._asked or len(beside) != self._beside:
            raise ValueError(f"{len(tiers)} and {len(beside)} answers to {self._asked} and {self._beside} keys")
        self.found = Found(self.found.tiers + tiers, self.found.beside + beside)
        self._over = len(tiers) < self._asked


def _parts(
    keys: Sequence[bytes], shards: int, beside: Sequence[bytes], width: int
) -> Iterator[tuple[Sequence[bytes], Sequence[bytes]]]:
    """Whole chunks: their keys, and those beside them."""
    if not beside:
        yield from ((part, ()) for part in requests.lookup_parts(keys, shards))
        return
    chunks = max(1, _PART_KEYS // (shards + width))
    for at in range(0, len(beside) // width, chunks):
        yield keys[at * shards : (at + chunks) * shards], beside[at * width : (at + chunks) * width]
