# SPDX-License-Identifier: Apache-2.0
"""The tiers by the names they have in every API, file and metric."""

from __future__ import annotations

import enum
from typing import Any

from loracache.errors import UsageError

__all__ = ["Tier", "labels", "places", "tier_state"]


class Tier(enum.IntEnum):
    """Where an object's bytes can be, the fastest first."""

    GPU = 0
    CPU = 1
    DISK = 2
    REDIS = 3

    def __init__(self, number: int) -> None:
        self.label = ("gpu", "cpu", "disk", "redis")[number]  # the name users see; no property, for events need it much

    @classmethod
    def named(cls, label: str) -> Tier:
        """The tier called `label`. Raises UsageError naming it and the tiers there are."""
        try:
            return cls[label.upper()]
        except KeyError:
            raise UsageError(f"unknown tier {label[:40]!r}; give one of {', '.join(t.label for t in cls)}") from None


_LABELS = tuple(tier.label for tier in Tier)


def labels(tiers: bytes) -> tuple[str, ...]:
    """The names of tiers, one byte each. Raises IndexError where one is none."""
    return tuple([_LABELS[tier] for tier in tiers])  # a list first: half the time of a generator


def places(where: bytes, nowhere: int) -> tuple[str, ...]:
    """The names of the tiers that have objects, one byte each, "" for the byte `nowhere`. Raises IndexError where one
    is neither."""
    return tuple(["" if tier == nowhere else _LABELS[tier] for tier in where])


def tier_state(tier: dict[str, Any]) -> str:
    """How much a tier is in use, in two words, from its part of a daemon's status."""
    if not tier.get("available", True):
        return "not in use"
    if not tier.get("writable", True):
        return "read only"
    return "in part" if tier.get("reason") else "ok"
