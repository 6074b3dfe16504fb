# SPDX-License-Identifier: Apache-2.0
"""Operations of a Rig: what a Mover does when the tiers' threads are stepped by hand, and a disk that compresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from loracache.control.jobs import Operation, Operations
from loracache.control.transfer import Mover
from loracache.storage_backends.base import Outcome, Result, Transfer
from loracache.tiers import Tier

PART = 4  # keys of one step, so that a few objects are many steps


class Operated:
    """A Rig and its operations. Objects are named as the rig names them."""

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        self.cache = rig.cache
        self.ended: list[Operation] = []
        self.operations = Operations(self.ended.append)
        self.losses: list[str] = []
        self.asked: set[bytes] = set()  # what somebody evicted from some tier
        self.damaged: set[bytes] = set()  # what a tier gave up without asking pins or children
        told = self.cache.index.on_change

        def changed(node: Any, tier: Tier, entered: bool, cause: str) -> None:
            told(node, tier, entered, cause)
            if cause in ("corrupt", "miss", "replaced"):
                self.damaged.add(node.key)
            elsewhere = node.present or (rig.redis is not None and node.key in rig.redis.held())
            if not entered and cause in ("moved", "passed") and not elsewhere and node.key not in self.asked:
                self.losses.append(f"{cause} out of {tier.label}: {node.key.hex()}")

        self.cache.index.on_change = changed

    def keys(self, names: Sequence[object]) -> list[bytes]:
        return [self.rig.info(name).key for name in names]

    def begin(self, names: Sequence[object], target: Tier, **options: Any) -> Operation:
        """A move that is under way; nothing of it has happened but its first step."""
        operation = self.operations.begin("move", "test", "")
        keys = self.keys(names)
        parts = (keys[at : at + PART] for at in range(0, len(keys), PART))
        mover = Mover(self.cache, operation, iter(parts), target, **options)
        self.rig.start(self.operations.run(operation, mover.run()))
        return operation

    def move(self, names: Sequence[object], target: Tier, **options: Any) -> Operation:
        """A move from its beginning to its end."""
        operation = self.begin(names, target, **options)
        self.rig.settle()
        self.check(operation)
        return operation

    def check(self, *operations: Operation) -> None:
        """They have ended, hold nothing, and lost nothing."""
        for operation in operations:
            assert operation.ended, operation
            assert self.ended.count(operation) == 1
        assert len(self.cache.leases) == 0
        assert all(not node.leases for node in self.cache.index)
        assert not self.cache.passing
        assert not self.cache.leaving
        assert self.cache.audit() == []
        assert self.losses == []

    def one_by_one(self) -> bool:
        """The next job of any thread or of the cache's; False where there is none."""
        if self.rig.posted:
            self.rig.posted.popleft()()
            return True
        return any(thread.run_one() for thread in self.rig.threads())

    def held(self, tier: Tier) -> set[object]:
        """Names of the objects there, as far as they were stored as ints and strings below."""
        if tier is Tier.REDIS:
            return set(self.rig.redis.held())
        return {node.key for node in self.cache.index if node.held_in(tier)}

    def named(self, *names: object) -> set[bytes]:
        return set(self.keys(names))


@pytest.fixture
def operated(make_rig: Callable[..., Any]) -> Callable[..., Operated]:
    """operated(pages=16, disk=bytes or None, redis=False) gives a Rig with operations."""
    return lambda **options: Operated(make_rig(**options))


@pytest.fixture
def settled(make_rig: Callable[..., Any]) -> Iterator[Callable[..., Operated]]:
    """As `operated`; at the end nothing is under way, and the disk's books agree with its content."""
    made: list[Operated] = []

    def make(**options: Any) -> Operated:
        made.append(Operated(make_rig(**options)))
        return made[-1]

    yield make
    for each in made:
        each.rig.settle()
        each.check()
        if each.rig.disk is not None:
            assert each.cache.disk.used == sum(info.size for info in each.rig.disk.held().values())
            assert each.rig.disk.most_bytes <= each.cache.disk.limit


class Compressing:
    """Makes a rig's disk or Redis answer how many bytes an object takes there: a quarter where it has planes, unless it
    is noise. The bytes themselves stay as they are."""

    def __init__(self, backend: Any) -> None:
        self.asked: list[tuple[bytes, int]] = []
        self.kept: dict[bytes, int] = {}  # key -> bytes it takes
        self.noise: set[bytes] = set()
        self._backend = backend
        self._store = backend.store
        backend.store = self.store

    def store(self, transfers: Sequence[Transfer]) -> list[Result]:
        results = []
        for transfer, result in zip(transfers, self._store(transfers), strict=True):
            info = transfer.info
            self.asked.append((info.key, transfer.planes))
            stored = info.size // 4 if transfer.planes and info.key not in self.noise else 0
            if result.outcome is Outcome.OK:
                self.kept[info.key] = stored or info.size
            results.append(Result(result.outcome, stored=stored))
        return results

    def used(self) -> int:
        return sum(self.kept[key] for key in self._backend.held())


@pytest.fixture
def compressing() -> Callable[[Any], Compressing]:
    return Compressing
