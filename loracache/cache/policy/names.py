# SPDX-License-Identifier: Apache-2.0
"""Names of objects that were there before, as many as are worth their memory: 6 to 18 bytes each.

A name is the hash of a key. All lie in one table of buckets, none as an object of Python's: names outlive what they
name, and one small object among all those that were freed beside it keeps a whole MiB from being given back. A bucket
holds its names from the oldest to the newest, and is searched as a string of bytes is. Of a name 40 bits are kept, so
that one in a hundred thousand may be taken for another: who asks only guesses what is worth keeping, and nobody reads
bytes by it. Python salts the hashes of bytes anew in each process: no client can choose keys that fall into one bucket.
"""

from __future__ import annotations

from struct import Struct

__all__ = ["Names"]

_LEAST = 1 << 17
_BY_OBJECT = 8  # names by object that there is
_MARK = 5  # bytes of a name
_MARKS = (1 << 8 * _MARK) - 1
_BUCKET = 64  # names
_CROWDED = 40  # names by bucket, on average: next to none has too many


class Names:
    """With each name a number is remembered. A full table forgets the oldest of the bucket that a new one falls into,
    so it remembers between `by_object` names for each object that there is and half as many, but half of `least` in any
    case. wide: for numbers up to 2^32 - 2; else up to 254.

    The table doubles bucket by bucket (Litwin, "Linear hashing", VLDB 1980): no single name waits for a million others.
    """

    def __init__(self, least: int = _LEAST, by_object: int = _BY_OBJECT, *, wide: bool = False) -> None:
        self._least = least
        self._by_object = by_object
        number = Struct("<I" if wide else "<B")  # 1 more than the number; 0: here is no name
        self._read, self._pack = number.unpack_from, number.pack
        self._slot = _MARK + number.size
        self._width = _BUCKET * self._slot
        self._table = bytearray(self._width)
        self._mask = 0  # buckets when it began to double, less 1
        self._split = 0  # of these so many have been split since
        self._doubling = False
        self._crowded = _CROWDED  # names, from which on it doubles
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: int) -> bool:
        return self.get(name) >= 0

    def get(self, name: int) -> int:
        """The number of a name, -1 where it is not remembered."""
        _, at, _ = self._find(name)
        return self._read(self._table, at + _MARK)[0] - 1 if at >= 0 else -1

    def add(self, name: int, objects: int, number: int = 0) -> None:
        """Remember a name, as the newest. objects: how many of them there are in the tier. number: 0 or more."""
        mark, at, start = self._find(name)
        self._put(mark, at, start, objects, number)

    def again(self, name: int, most: int) -> int:
        """Remember a name once more, as the newest: its number is 1 more than it was, `most` at most, 0 at first. The
        number."""
        mark, at, start = self._find(name)
        number = min(self._read(self._table, at + _MARK)[0], most) if at >= 0 else 0
        self._put(mark, at, start, 0, number)
        return number

    def take(self, name: int) -> int:
        """The number of a name that is forgotten now, -1 where it was not remembered."""
        table, slot = self._table, self._slot
        _, at, start = self._find(name)
        if at < 0:
            return -1
        number: int = self._read(table, at + _MARK)[0] - 1
        if number >= 0 and (at - start) % slot == 0:
            table[start : at + slot] = bytes(slot) + table[start:at]
            self._count -= 1
        return number

    def _find(self, name: int) -> tuple[bytes, int, int]:
        """What is kept of it, where that is in the table (below 0: nowhere), and where its bucket begins."""
        bucket = name & self._mask
        if bucket < self._split:
            bucket = name & (2 * self._mask + 1)
        start = bucket * self._width
        mark = (name & _MARKS).to_bytes(_MARK, "little")
        return mark, self._table.find(mark, start, start + self._width), start

    def _put(self, mark: bytes, at: int, start: int, objects: int, number: int) -> None:
        """What `_find` said of a name: it is the newest of its bucket from now on."""
        table, slot, end = self._table, self._slot, start + self._width
        if at < 0 or (at - start) % slot:
            at = start  # the oldest goes
            self._count += not self._read(table, at + _MARK)[0]
        table[at : end - slot] = table[at + slot : end]
        table[end - slot : end] = mark + self._pack(number + 1)
        if self._doubling:
            self._split_next()
        elif self._count > self._crowded and 2 * len(table) <= slot * max(self._least, self._by_object * objects):
            self._doubling = True

    def _split_next(self) -> None:
        table, slot = self._table, self._slot
        start, bit = self._split * self._width, self._mask + 1
        stay, go = bytearray(), bytearray()
        for at in range(start, start + self._width, slot):
            each = table[at : at + slot]
            if any(each[_MARK:]):
                (go if int.from_bytes(each[:_MARK], "little") & bit else stay).extend(each)
        table[start : start + self._width] = stay.rjust(self._width, b"\0")
        table += go.rjust(self._width, b"\0")
        self._split += 1
        if self._split > self._mask:
            self._mask, self._split, self._doubling = 2 * self._mask + 1, 0, False
            self._crowded *= 2
