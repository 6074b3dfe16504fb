# SPDX-License-Identifier: Apache-2.0
"""Pauses between tries, each twice as long as the one before. Pure; one thread at a time.

Who waits, and for what, is the caller's: this only says for how long.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Backoff"]


@dataclass(slots=True)
class Backoff:
    """Pauses from `first` to `longest` seconds."""

    first: float
    longest: float
    _last: float = 0.0

    def next(self) -> float:
        """The next pause, in seconds."""
        self._last = min(max(2 * self._last, self.first), self.longest)
        return self._last

    def reset(self) -> None:
        """A try succeeded: the next pause is the first again."""
        self._last = 0.0
