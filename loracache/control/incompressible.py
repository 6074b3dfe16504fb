# SPDX-License-Identifier: Apache-2.0
"""Which objects compression makes no smaller, so that it is not tried again. An object never changes, so that holds."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Incompressible"]

_MOST = 1 << 18  # objects: some 35 MB
_PREFIX = 8  # bytes of a key: two that share it are not met with


class Incompressible:
    """The latest of them, in memory: after a restart each is tried once more. Threading: the event loop."""

    def __init__(self) -> None:
        self._known: dict[bytes, None] = {}

    def __contains__(self, key: bytes) -> bool:
        return key[:_PREFIX] in self._known

    def __len__(self) -> int:
        return len(self._known)

    def update(self, keys: Iterable[bytes]) -> None:
        """Remember these, and forget the oldest beyond the limit."""
        for key in keys:
            self._known[key[:_PREFIX]] = None
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]
