# SPDX-License-Identifier: Apache-2.0
"""No child is admitted to disk or Redis without its parents, whatever became of those: refused, given up, failed,
evicted.

Random steps of writers, readers and faults, the tiers' threads stepped by hand; whenever all is settled, every chunk
that a backend holds has its parent there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from loracache.cache.policy import ADMISSIONS
from loracache.cache.tier import io as tier_io
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier

PAGE = 4096
names = st.integers(0, 15)


def parent_of(name: int) -> int | None:
    """Four chains of four, two of which branch."""
    return None if name % 4 == 0 else name - 1 if name < 8 else name - name % 4


class Chains(RuleBasedStateMachine):
    def __init__(self, make_rig: Callable[..., Any], clock: list[float], admission: str) -> None:
        super().__init__()
        self.rig = make_rig(pages=7, disk=6 * PAGE, redis=True, admission=admission)
        self.clock = clock

    @rule(name=names)
    def store_a_chain(self, name: int) -> None:
        """A writer stores the chunk after those before it."""
        chain: list[int] = [name]
        while (above := parent_of(chain[0])) is not None:
            chain.insert(0, above)
        for each in chain:
            self.rig.store(each, parent_of(each))

    @rule(name=names)
    def store_one(self, name: int) -> None:
        self.rig.store(name, parent_of(name))

    @rule(name=names)
    def read(self, name: int) -> None:
        self.rig.acquire(name, lease=b"r%d" % name)
        self.rig.release(lease=b"r%d" % name)

    @rule(name=names)
    def evict_from_memory(self, name: int) -> None:
        self.rig.evict(name, tiers=[Tier.CPU])

    @rule(name=names)
    def evict_from_disk(self, name: int) -> None:
        self.rig.evict(name, tiers=[Tier.DISK])

    @rule(number=st.integers(0, 5))
    def step(self, number: int) -> None:
        self.rig.threads()[number].run_one()
        self.rig.answer()

    @rule(tier=st.sampled_from(["disk", "redis"]), outcome=st.sampled_from([Outcome.FAILED, Outcome.FULL]))
    def break_stores(self, tier: str, outcome: Outcome) -> None:
        self.rig.backend(tier).fails["store"] = outcome

    @rule(tier=st.sampled_from(["disk", "redis"]))
    def fail_one_batch(self, tier: str) -> None:
        """Its parents' batch fails, the next does not."""
        backend = self.rig.backend(tier)
        backend.fails["store"] = Outcome.FAILED
        self.rig.step(f"{tier}-write")
        backend.fails.clear()

    @rule(tier=st.sampled_from(["disk", "redis"]))
    def mend(self, tier: str) -> None:
        self.rig.backend(tier).fails.clear()

    @rule()
    def settle(self) -> None:
        self.clock[0] += 1
        self.rig.settle()
        for tier in ("disk", "redis"):
            held = self.rig.backend(tier).held()
            for name in range(16):
                above = parent_of(name)
                if above is not None and self.rig.info(name).key in held:
                    assert self.rig.info(above).key in held, f"{tier} has {name} without {above}"

    def teardown(self) -> None:
        self.settle()


@pytest.mark.timeout(300)  # a failure takes long to shrink
@pytest.mark.parametrize("admission", sorted(ADMISSIONS))
def test_no_chunk_is_in_a_lower_tier_without_its_parents(
    admission: str, make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(tier_io, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run_state_machine_as_test(
        lambda: Chains(make_rig, clock, admission),  # type: ignore[arg-type]
        settings=settings(max_examples=60, stateful_step_count=40),
    )


def test_a_child_is_not_left_in_redis_by_a_parent_that_failed(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(pages=8, redis=True)
    rig.chain(0, 1)
    rig.redis.fails["store"] = Outcome.FAILED
    rig.step("redis-write")  # the batch of the first one; the second waits behind it
    rig.redis.fails.clear()
    rig.settle()
    assert not rig.redis.held()
    assert rig.count("write.redis.dropped.no_parent") == 1
    assert rig.store(2, 1) == ""
    rig.settle()
    assert set(rig.redis.held()) == {rig.info(name).key for name in range(3)}  # with the parents that it lacked
