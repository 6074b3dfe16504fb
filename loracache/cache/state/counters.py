# SPDX-License-Identifier: Apache-2.0
"""Counters of what happened, by name and cause: the source of `loracache status`.

Names read `<what>.<tier>[.<cause>]`, for example "hit.cpu", "miss.absent", "failure.disk.corrupt". Threading: one
thread.
"""

from __future__ import annotations

from collections import defaultdict

__all__ = ["Counters"]


class Counters:
    """Named totals that only grow."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`."""
        if amount:
            self._totals[name] += amount

    def __len__(self) -> int:
        return len(self._totals)

    def __getitem__(self, name: str) -> int:
        return self._totals.get(name, 0)

    def starting(self, prefix: str) -> dict[str, int]:
        """Totals whose name starts with `prefix`, the prefix cut off."""
        return {name[len(prefix) :]: value for name, value in sorted(self._totals.items()) if name.startswith(prefix)}

    def all(self) -> dict[str, int]:
        """Every total."""
        return dict(sorted(self._totals.items()))
