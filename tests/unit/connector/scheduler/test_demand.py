# SPDX-License-Identifier: Apache-2.0
"""What the daemon is told of an engine's requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from loracache.connectors.vllm.scheduler.demand import Demand

DIGEST = "ab" * 32


class Link:
    def __init__(self) -> None:
        self.due = True
        self.told: list[tuple[int, int, list[bytes]]] = []
        self.wanted: list[bytes] = []

    def reports_now(self) -> bool:
        return self.due

    def report(self, running: int, waiting: int, adapters: list[bytes], prefill: int, wanted: list[bytes]) -> None:
        self.told.append((running, waiting, adapters))
        self.wanted = wanted


def state(name: str, adapted: bool = True, digest: str = "") -> Any:
    binding = SimpleNamespace(digest=digest) if digest else None
    request = SimpleNamespace(request_id=name, lora_request=object() if adapted else None)
    return SimpleNamespace(request=request, adapter=binding)


def test_an_arrival_is_told_once_when_its_adapter_is_known() -> None:
    link: Any = Link()
    demand = Demand(link)
    early, late = state("a"), state("b", digest=DIGEST)
    for each in (early, late, state("c", adapted=False)):
        demand.arrived(each)
    demand.step(1, {"a", "b", "c"})
    early.adapter = SimpleNamespace(digest=DIGEST)
    demand.step(3, {"a", "b", "c"})
    demand.step(0, {"a"})
    assert link.told == [(1, 2, [bytes.fromhex(DIGEST)]), (3, 0, [bytes.fromhex(DIGEST)]), (0, 1, [])]


def test_what_ended_unknown_is_forgotten_and_nothing_is_told_before_its_time() -> None:
    link: Any = Link()
    demand = Demand(link)
    demand.arrived(state("a"))
    link.due = False
    demand.step(1, {"a"})
    assert not link.told
    link.due = True
    demand.step(1, {"b"})
    assert not demand._arrived


def test_the_adapters_that_most_of_those_who_wait_want_are_told_first() -> None:
    link: Any = Link()
    demand = Demand(link)
    digests = [f"{number:064x}" for number in range(40)]
    waiting = [state(f"r{number}", digest=digest) for number, digest in enumerate([*digests, DIGEST, DIGEST])]
    demand.step(2, {"a"}, 0, [*waiting, state("unknown"), state("plain", adapted=False)])
    assert link.wanted[0] == bytes.fromhex(DIGEST)
    assert link.wanted[1:] == [bytes.fromhex(digest) for digest in digests[:31]]


def test_a_scheduler_tells_the_adapters_of_those_that_wait(driver: Any, make_request: Any) -> None:
    one, two = make_request("a", 64), make_request("b", 64, seed=3)
    driver.arrive(one)
    driver.arrive(two)
    for name in ("a", "b"):
        driver.side._requests[name].adapter = SimpleNamespace(digest=f"{ord(name):064x}", lora_int_id=1)
    driver.step({one: [0, 1, 2, 3]})
    assert driver.link.wanted == [bytes.fromhex(f"{ord('b'):064x}")]


def test_a_scheduler_tells_what_each_step_runs(driver: Any, make_request: Any) -> None:
    one, two = make_request("a", 64), make_request("b", 64, seed=3)
    driver.arrive(one)
    driver.arrive(two)
    driver.step({one: [0, 1, 2, 3]})
    assert driver.link.reported[-1] == (1, 1, [])


def test_a_scheduler_tells_how_fast_its_engine_computes_kv(driver: Any, make_request: Any) -> None:
    driver.step()
    assert driver.link.prefill == 0
    driver.side._patience.steps.seen, driver.side._patience.steps.token_s = True, 0.0001
    driver.step()
    assert driver.link.prefill == 10_000 * 4096 // 16  # tokens a second, bytes of a block by its tokens


def test_with_the_last_request_the_counts_are_told_for_no_step_may_follow(driver: Any, make_request: Any) -> None:
    one, two = make_request("a", 64), make_request("b", 64, seed=3)
    driver.arrive(one)
    driver.arrive(two)
    driver.side.finished(one, [[]])
    assert driver.link.flushed == 0
    driver.side.finished(two, [[]])
    assert driver.link.flushed == 1
