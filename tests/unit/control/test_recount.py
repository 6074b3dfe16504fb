# SPDX-License-Identifier: Apache-2.0
"""The index counted anew, a slice at a time, while it changes: the sums are right, and what cannot be is seen."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from loracache.cache.state.index import Index
from loracache.cache.state.slices import whole
from loracache.control import recount
from loracache.control.recount import Recount
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

PAGE = 4096
Make = Callable[..., Any]


def count(rig: Any) -> dict[str, Any]:
    return whole(Recount(rig.cache).run())


def fits(found: dict[str, Any]) -> None:
    assert found["faults"] == 0, found["examples"]
    for objects, nbytes, *counted in found["counts"].values():
        assert counted == [objects, nbytes]
    for used, least, most in found["used"].values():
        assert least <= used <= most, found


@pytest.fixture
def filled(make_rig: Make) -> Any:
    """Two chains, all in memory and on disk, of which one object is on disk alone."""
    rig = make_rig(pages=64, disk=64 * PAGE, redis=True)
    rig.chain(*"abcd")
    rig.chain(*"xyz", size=100)
    rig.settle()
    rig.evict("z")
    return rig


def test_what_fits_is_counted_and_nothing_is_found(filled: Any) -> None:
    found = count(filled)
    fits(found)
    assert found["checked"] == 7
    assert found["counts"] == {
        "cpu": [6, 4 * PAGE + 200, 6, 4 * PAGE + 200],
        "disk": [7, 4 * PAGE + 300, 7, 4 * PAGE + 300],
    }
    assert found["used"]["cpu"] == [6 * PAGE] * 3


def _leak_pages(rig: Any) -> None:
    rig.arena.allocate(PAGE)


def _leak_budget(rig: Any) -> None:
    rig.cache.disk.used += 1


def _count_bytes(rig: Any) -> None:
    rig.cache.index.bytes[Tier.CPU] += 1


def _count_objects(rig: Any) -> None:
    rig.cache.index.objects[Tier.DISK] -= 1


@pytest.mark.parametrize(
    ("damage", "part", "tier"),
    [
        (_leak_pages, "used", "cpu"),
        (_leak_budget, "used", "disk"),
        (_count_bytes, "counts", "cpu"),
        (_count_objects, "counts", "disk"),
    ],
)
def test_books_that_are_wrong_are_seen(filled: Any, damage: Callable[[Any], None], part: str, tier: str) -> None:
    damage(filled)
    found = count(filled)
    assert found["faults"] == 0
    with pytest.raises(AssertionError):
        fits(found)
    other = {"cpu": "disk", "disk": "cpu"}[tier]
    fits(found | {part: {other: found[part][other]}})


STATES: dict[str, Callable[[Any, Any], object]] = {
    "bytes of pages for": lambda rig, node: setattr(node, "size", PAGE + 1),
    "neither held in cpu nor on its way": lambda rig, node: setattr(rig.node("z"), "extents", ((0, PAGE),)),
    "nobody reads and nobody freed": lambda rig, node: setattr(node, "condemned", ((0, PAGE),)),
    "pinned where it is not held": lambda rig, node: setattr(rig.node("z"), "pins", 1 << Tier.CPU),
    "in no tier, and nothing needs it": lambda rig, node: rig.cache.index.ghost(bytes(32), Kind.KV),
    "of which the index keeps no books": lambda rig, node: setattr(node, "present", node.present | 1 << Tier.REDIS),
    "redis, and is not queued": lambda rig, node: setattr(node, "dirty", 1 << Tier.REDIS),
    "waits to be written to disk, where it is": lambda rig, node: setattr(node, "dirty", 1 << Tier.DISK),
    "its parent counts no child there": lambda rig, node: node.parent.children.__setitem__(Tier.DISK, 0),
    "listed in namespace": lambda rig, node: rig.cache.index.spaces[node.namespace].keys.add(bytes(32)),
}


@pytest.mark.parametrize("words", STATES)
def test_an_entry_in_a_state_that_cannot_be_is_seen(filled: Any, words: str) -> None:
    STATES[words](filled, filled.node("b"))
    found = count(filled)
    assert found["faults"] == 1
    assert words in found["examples"][0][1]


def _interleaved(rig: Any, work: Generator[None, None, dict[str, Any]], seed: int) -> dict[str, Any]:
    """Count, and between two slices store, read, evict, rewrite and let the tiers go on."""
    numbers = random.Random(seed)
    names = [f"{chain}-{at}" for chain in range(12) for at in range(5)]

    def change() -> None:
        name = numbers.choice(names)
        chain, at = name.split("-")
        match numbers.randrange(6):
            case 0 | 1:
                rig.store(name, f"{chain}-{int(at) - 1}" if at != "0" else None, numbers.choice([PAGE, 3 * PAGE]))
            case 2:
                rig.acquire(name, lease=b"r")
            case 3:
                rig.release(lease=b"r")
            case 4:
                rig.evict(name, tiers=numbers.sample([Tier.CPU, Tier.DISK], numbers.randint(1, 2)))
            case _:
                thread = numbers.choice(rig.threads())
                thread.run_one()
        if numbers.random() < 0.7:
            rig.answer()

    while True:
        for _ in range(numbers.randint(0, 4)):
            change()
        try:
            next(work)
        except StopIteration as end:
            found: dict[str, Any] = end.value
            return found


@pytest.mark.parametrize("seed", range(40))
def test_the_sums_are_right_however_much_changes_meanwhile(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(recount, "_SLICE", 1)
    rig = make_rig(pages=48, disk=40 * PAGE, redis=bool(seed % 2))
    for chain in range(6):
        rig.chain(*(f"{chain}-{at}" for at in range(4)))
    rig.settle()
    told = rig.cache.index.on_change
    for again in range(3):
        fits(_interleaved(rig, Recount(rig.cache).run(), 1000 * seed + again))
    assert rig.cache.index.on_change == told
    rig.release(lease=b"r")
    rig.settle()
    fits(count(rig))


def test_no_slice_of_200_000_objects_takes_more_than_20_ms(make_rig: Make, quickest: Callable[..., float]) -> None:
    rig = make_rig(pages=16, disk=1 << 40)
    index: Index = rig.cache.index
    for number in range(200_000):
        key = number.to_bytes(32, "big")
        parent = (number - 1).to_bytes(32, "big") if number % 8 else b""
        node = index.insert(ObjectInfo(key, parent, Kind.KV, (number % 997).to_bytes(32, "big"), 100, 0))
        assert node is not None
        index.enter(node, Tier.DISK)
        rig.cache.disk.used += rig.cache.disk.cost(node)
    found: list[dict[str, Any]] = []

    def work() -> Generator[None, None, None]:
        found.append((yield from Recount(rig.cache).run()))

    def longest() -> float:
        longest, started = 0.0, time.thread_time()  # what others take of this machine is not ours
        for _ in work():
            longest = max(longest, time.thread_time() - started)
            started = time.thread_time()
        return max(longest, time.thread_time() - started)

    assert quickest(longest, 0.020) < 0.020
    fits(found[0])
    assert found[0]["checked"] == 200_000
