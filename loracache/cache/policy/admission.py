# SPDX-License-Identifier: Apache-2.0
"""What is worth a place in the lower tiers: everything, or what was asked for twice.

Asked when an object has come into the arena, and again when it is used there. A chunk is never asked for without its
parents, so those are known where it is; and a chunk that is written takes along those of its parents that the tier
lacks. Adapters are always admitted: nothing computes one again.
"""

from __future__ import annotations

from collections.abc import Callable

from loracache.cache.policy.names import Names
from loracache.cache.state.index import Node
from loracache.results import Refusal
from loracache.storage_backends.base import Kind

__all__ = ["AdmitAll", "SecondTouch"]


class AdmitAll:
    """Everything is admitted as it comes. objects: how many the lower tiers hold."""

    def __init__(self, objects: Callable[[], int]) -> None:
        pass

    def came(self, node: Node) -> Refusal:
        """Why an object that has come into the arena is not to be written down, or NONE."""
        return Refusal.NONE

    def again(self, node: Node) -> bool:
        """Whether one that is used in the arena, and that some lower tier lacks, is to be written down."""
        return False


class SecondTouch:
    """What comes again is admitted, and what is used while it is in the arena."""

    def __init__(self, objects: Callable[[], int]) -> None:
        self._objects = objects
        self._seen = Names()

    def came(self, node: Node) -> Refusal:
        """Why an object that has come into the arena is not to be written down: it was not there before."""
        name = hash(node.key)
        if node.kind is Kind.LORA or name in self._seen:
            return Refusal.NONE
        self._seen.add(name, self._objects())
        return Refusal.FIRST_TOUCH

    def again(self, node: Node) -> bool:
        """Whether one that is used in the arena, and that some lower tier lacks, is to be written down."""
        return True
