# SPDX-License-Identifier: Apache-2.0
"""What was acknowledged as durable, and what may no longer be expected of it.

Every owner appends to a file of its own, which outlives it: `ack` after a flush said that a chain is on disk, `drop`
before anything is asked for that may take it away. So a process killed between the two never claims too much. What a
fault damaged is tainted for ever, and what was acknowledged before a budget or a `clear` took its toll is void: both
are the supervisor's, which nobody kills.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from contents import Chain

__all__ = ["OWN_ADAPTER", "Expectations", "Ledger", "acknowledged"]

OWN_ADAPTER = -1
"""The number by which an owner's own adapter stands among its chains."""


class Ledger:
    """One owner's file. `chains` are those that it stored and has not dropped, with whether each is acknowledged."""

    def __init__(self, path: Path, owner: int) -> None:
        self._owner = owner
        self.chains: dict[int, float] = _read(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def store(self, serial: int) -> None:
        """It is going to be stored."""
        self.chains[serial] = 0.0
        self._write("store", serial, 0.0)

    def acknowledge(self, serial: int, began: float) -> None:
        """A flush said that all of it is durable. began: when storing it did, by the monotonic clock."""
        self.chains[serial] = began
        self._write("ack", serial, began)

    def drop(self, serial: int, *, forget: bool) -> None:
        """It may go from now on. forget: and is not used any more."""
        self._write("drop" if forget else "doubt", serial, 0.0)
        if forget:
            self.chains.pop(serial, None)
        else:
            self.chains[serial] = 0.0

    def _write(self, what: str, serial: int, when: float) -> None:
        os.write(self._fd, f"{what} {serial} {when!r}\n".encode())


def _read(path: Path) -> dict[int, float]:
    """Number of each chain, and when the storing began that was acknowledged, or 0."""
    chains: dict[int, float] = {}
    if not path.exists():
        return chains
    for line in path.read_text().splitlines():
        what, serial, when = line.split()
        if what == "drop":
            chains.pop(int(serial), None)
        else:
            chains[int(serial)] = float(when)
    return chains


def acknowledged(path: Path, owner: int) -> Iterator[tuple[Chain, float]]:
    """Chains that are acknowledged, and since when."""
    return ((Chain(owner, serial), when) for serial, when in _read(path).items() if when)


@dataclass(slots=True)
class Expectations:
    """What may no longer be expected."""

    adapters: list[bytes]
    """The key of each owner's own. Nothing damages those: they could not be told from what is lost."""
    tainted: set[bytes] = field(default_factory=set)
    """Keys whose files a fault damaged, or may have."""
    to_read: set[bytes] = field(default_factory=set)
    """Those that nobody has read since: what is served for them is right, or nothing."""
    void_before: float = 0.0
    """What began to be stored before is void."""
    loses: bool = False
    """This life's disk has a small budget, or was cleared: what is there may go at any time."""

    def taint(self, keys: Iterable[bytes]) -> None:
        """Call it before the damage."""
        keys = [*keys]
        self.tainted.update(keys)
        self.to_read.update(keys)

    def void(self) -> None:
        """All that is acknowledged by now may be gone."""
        self.void_before = time.monotonic()

    def due(self, files: Iterable[tuple[int, Path]]) -> Iterator[list[bytes]]:
        """The keys of each chain that must be there, up to the first damaged one, which orphans the rest; and of each
        owner's own adapter."""
        for owner, path in files:
            for chain, began in acknowledged(path, owner):
                if began <= self.void_before or self.loses:
                    continue
                keys = chain.keys if chain.serial != OWN_ADAPTER else [self.adapters[owner]]
                sound = next((at for at, key in enumerate(keys) if key in self.tainted), len(keys))
                if sound:
                    yield keys[:sound]
