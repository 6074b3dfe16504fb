# SPDX-License-Identifier: Apache-2.0
"""What left last, in the order in which it left, and what each took: a ring of numbers. Whoever adds one remembers its
place, beside its name (names.py)."""

from __future__ import annotations

from array import array

__all__ = ["PLACES", "Ghosts"]

PLACES = 1 << 28
"""A place is below; then they begin anew."""

_FIRST_RING = 64


class Ghosts:
    """The last ones, as long as what they took is within a limit; `nbytes` is what they took. Among those are places of
    such as came again. most: of all places at once, a power of two."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sizes = array("q", bytes(8 * _FIRST_RING))  # 0: nobody is here
        self._oldest = self._next = 0  # counted on; in the ring, modulo its length
        self._count = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, nbytes: int, limit: float) -> int:
        """One has left, and took so many bytes, 1 or more: its place. Of the others those that left first are forgotten
        until all took no more than `limit`."""
        if self._next - self._oldest == len(self._sizes):
            self._make_place()
        place = self._next
        self._sizes[place & (len(self._sizes) - 1)] = nbytes
        self._next += 1
        self._count += 1
        self.nbytes += nbytes
        while self._count > 1 and self.nbytes > limit:
            self._empty(self._oldest)
            self._oldest += 1
        return place & (PLACES - 1)

    def take(self, place: int) -> int:
        """The bytes of one that came again, and is a ghost no more; 0 where it was none."""
        back = (self._next - place) & (PLACES - 1)
        return self._empty(self._next - back) if 0 < back <= self._next - self._oldest else 0

    def _empty(self, place: int) -> int:
        at = place & (len(self._sizes) - 1)
        nbytes = self._sizes[at]
        if nbytes:
            self._sizes[at] = 0
            self._count -= 1
            self.nbytes -= nbytes
        return nbytes

    def _make_place(self) -> None:
        """The ring is full. It grows where most of it is ghosts."""
        if 2 * self._count > len(self._sizes) < self._most:
            self._sizes += self._sizes  # so that each is at its place still
        else:
            self._empty(self._oldest)
            self._oldest += 1
