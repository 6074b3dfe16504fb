# SPDX-License-Identifier: Apache-2.0
"""Names of objects that were there before, as many as are worth their memory: about 60 bytes each."""

from __future__ import annotations

__all__ = ["Names"]

_LEAST = 1 << 16
_BY_OBJECT = 8  # names by object that there is


class Names:
    """Two generations: when the younger has half of all that may be, the older is forgotten and it takes its place."""

    def __init__(self) -> None:
        self._young: set[int] = set()
        self._old: set[int] = set()

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __contains__(self, name: int) -> bool:
        return name in self._young or name in self._old

    def add(self, name: int, objects: int) -> None:
        """Remember a name. objects: how many of them there are in the tier."""
        self._young.add(name)
        if len(self._young) > max(_LEAST, _BY_OBJECT * objects) // 2:
            self._young, self._old = set(), self._young
