# SPDX-License-Identifier: Apache-2.0
"""A lookup of many keys, asked in parts one after the other, as far as they are held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from loracache.client import requests
from loracache.tiers import labels, places

__all__ = ["Found", "PartedLookup"]


class Found(NamedTuple):
    """The tiers of the leading keys of a chain, and of each key beside it, "" where it is nowhere."""

    tiers: tuple[str, ...]
    beside: tuple[str, ...]


class PartedLookup:
    """Of `keys`, `group` to a chunk, and of those beside them, as many for each. number: of the request that was sent
    last."""

    def __init__(self, lease: bytes, keys: Sequence[bytes], group: int, ttl: float, beside: Sequence[bytes]) -> None:
        self._lease = lease
        self._group = group
        self._ttl = ttl
        self._parts = requests.lookup_parts_beside(keys, group, beside)
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
        joined = requests.join_keys(keys), self._group, self._ttl, requests.join_keys(beside)
        return requests.Lookup(self._lease, *joined)

    def take(self, payload: list[Any] | None) -> None:
        """Take an answer; None: the question failed. Raises LookupError, TypeError or ValueError for what is none: all
        of the part is missed then, and what comes behind."""
        self._over = True
        if payload is None:
            return
        tiers = labels(payload[0])
        beside = places(payload[1] if self._beside else b"", requests.NOWHERE)
        if len(tiers) > self._asked or len(beside) != self._beside:
            raise ValueError(f"{len(tiers)} and {len(beside)} answers to {self._asked} and {self._beside} keys")
        self.found = Found(self.found.tiers + tiers, self.found.beside + beside)
        self._over = len(tiers) < self._asked
