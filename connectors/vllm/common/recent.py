# SPDX-License-Identifier: Apache-2.0
"""What an engine remembers: of what was used last, and no more. One thread at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from typing import TypeVar

__all__ = ["MOST_ADAPTERS", "Recent"]

MOST_ADAPTERS = 4096
"""Ids, names, contents or folders that are remembered, beside those that are in use."""

K = TypeVar("K")
V = TypeVar("V")


class Recent(OrderedDict[K, V]):
    """A dict in the order of use: what is set or `used` is the newest."""

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)

    def used(self, key: K) -> V | None:
        """What it stands for, None where it is not remembered."""
        if key in self:
            self.move_to_end(key)
        return self.get(key)

    def drop_oldest(self, kept: Container[K] = (), most: int = MOST_ADAPTERS) -> dict[K, V]:
        """Forget what is too much, but for `kept`; answers that."""
        too_many = len(self) - most
        dropped: dict[K, V] = {}
        if too_many > 0:
            for key in self:
                if len(dropped) == too_many:
                    break
                if key not in kept:
                    dropped[key] = self[key]
            for key in dropped:
                del self[key]
        return dropped
