# SPDX-License-Identifier: Apache-2.0
"""Names of objects that were there before, as many as are worth their memory: about 100 bytes each."""

from __future__ import annotations

__all__ = ["Names"]

_LEAST = 1 << 17
_BY_OBJECT = 8  # names by object that there is


class Names:
    """Two generations: when the younger has half of all that may be, the older is forgotten and it takes its place.
    With each name a number is remembered."""

    def __init__(self) -> None:
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __contains__(self, name: int) -> bool:
        return name in self._young or name in self._old

    def get(self, name: int) -> int:
        """The number of a name, -1 where it is not remembered."""
        number = self._young.get(name, -1)
        return number if number >= 0 else self._old.get(name, -1)

    def add(self, name: int, objects: int, number: int = 0) -> None:
        """Remember a name. objects: how many of them there are in the tier. number: 0 or more."""
        self._young[name] = number
        if len(self._young) > max(_LEAST, _BY_OBJECT * objects) // 2:
            self._young, self._old = {}, self._young
