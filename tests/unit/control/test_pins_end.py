# SPDX-License-Identifier: Apache-2.0
"""Pins that end by themselves: each at its time, by the last word, and never those of an object stored anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loracache.tiers import Tier

Make = Callable[..., Any]


def pinned(rig: Any, *names: object) -> list[bool]:
    return [bool(rig.node(name).pins) for name in names]


def test_each_pin_ends_at_its_own_time(make_rig: Make) -> None:
    rig = make_rig()
    for name, ttl in (("a", 30.0), ("b", 10.0), ("c", None), ("d", 20.0)):
        rig.store(name)
        rig.cache.pins.pin([rig.info(name).key], Tier.CPU, ttl)
    seen = []
    for _ in range(4):
        rig.later(9)
        seen.append(pinned(rig, "a", "b", "c", "d"))
    assert seen == [
        [True, True, True, True],
        [True, False, True, True],
        [True, False, True, False],
        [False, False, True, False],
    ]


def test_the_last_word_counts(make_rig: Make) -> None:
    rig = make_rig()
    for name, ttls in (("longer", (5.0, 50.0)), ("shorter", (50.0, 5.0)), ("for ever", (5.0, None))):
        rig.store(name)
        for ttl in ttls:
            rig.cache.pins.pin([rig.info(name).key], Tier.CPU, ttl)
    rig.later(6)
    assert pinned(rig, "longer", "shorter", "for ever") == [True, False, True]
    rig.later(100)
    assert pinned(rig, "longer", "shorter", "for ever") == [False, False, True]


def test_a_pin_ends_with_the_object_and_leaves_its_next_life_alone(make_rig: Make) -> None:
    rig = make_rig()
    rig.store("a")
    rig.cache.pins.pin([rig.info("a").key], Tier.CPU, 5.0)
    rig.cache.report_bad([rig.info("a").key])
    rig.store("a")
    assert pinned(rig, "a") == [False]
    rig.cache.pins.pin([rig.info("a").key], Tier.CPU)
    rig.later(6)
    assert pinned(rig, "a") == [True]
