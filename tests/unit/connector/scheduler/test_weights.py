# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side when weights change in place, and when vLLM resets its prefix cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from loracache.connectors.vllm.common.messages import WorkerNews
from loracache.connectors.vllm.scheduler.resets import HeldBlocks, hook_scheduler_class

BLOCK, CHUNK = 16, 32


def change(driver: Any, version: int = 2, *, last_step: int | None = None) -> None:
    """The worker tells of other weights; `last_step` was the last to be computed with those before."""
    driver.side.take_news(WorkerNews(weights={0: (version, driver.side._step if last_step is None else last_step)}))


def computed(driver: Any, request: Any, local: int = 0) -> Any:
    """The plan of the step after the one that computed the whole prompt."""
    driver.arrive(request, local)
    blocks = list(range(request.num_tokens // BLOCK))
    driver.step({request: blocks})
    request.num_computed_tokens = request.num_tokens
    return driver.step(more={request: []})


def test_plans_say_which_weights_they_are_made_for(driver: Any, make_request: Any) -> None:
    assert driver.step().weights == {}
    change(driver, 2)
    assert driver.step().weights == {0: 2}
    change(driver, 4)
    assert driver.step().weights == {0: 4}


@pytest.mark.parametrize("reset", ["check_weights", "prefix_cache_reset"])  # of the connector's cache, of vLLM's own
def test_a_reset_of_caches_keeps_the_cache_and_lets_the_workers_look(
    driver: Any, make_request: Any, reset: str
) -> None:
    before = driver.keys(make_request("k", 2 * CHUNK))
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    driver.arrive(request)
    driver.load(request, [0, 1, 2, 3], 2 * CHUNK)
    getattr(driver.side, reset)()
    plan = driver.step()
    assert (plan.check_weights, plan.void, len(plan.loads)) == (True, set(), 1)
    assert not driver.step().check_weights  # said once
    assert driver.keys(make_request("k", 2 * CHUNK)) == before


@pytest.mark.usefixtures("finished")
def test_stores_planned_and_not_sent_when_the_news_comes_are_dropped(driver: Any) -> None:
    change(driver)
    plan = driver.step()
    assert (plan.stores, plan.await_stores) == ([], {"a"})


def test_a_request_of_which_nothing_was_computed_belongs_to_the_new_weights(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)  # a miss
    asked = len(driver.link.lookups)
    change(driver)
    assert driver.side.matched_tokens(request, 0) == (0, False)
    assert len(driver.link.lookups) == asked + 1
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 2 * CHUNK
    (store,) = driver.step(more={request: []}).stores
    assert [chunk.key for chunk in store.chunks] == driver.keys(make_request("b", 2 * CHUNK))
    assert store.namespace.model.startswith("m" * 64 + "#")


def test_a_load_promised_before_and_begun_after_a_change_is_void(driver: Any, make_request: Any) -> None:
    """vLLM 0.33 lets a load begin some steps after it asked for it."""
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request) == (2 * CHUNK, True)
    change(driver)
    driver.load(request, [0, 1, 2, 3], 2 * CHUNK)
    plan = driver.step()
    assert ([load.request_id for load in plan.loads], plan.void) == (["a"], {"a"})


def test_a_load_promised_before_and_begun_after_a_reset_is_as_good_as_ever(driver: Any, make_request: Any) -> None:
    request = make_request("a", 2 * CHUNK)
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request) == (2 * CHUNK, True)
    driver.side.prefix_cache_reset()
    driver.side.check_weights()
    driver.load(request, [0, 1, 2, 3], 2 * CHUNK)
    plan = driver.step()
    assert ([load.request_id for load in plan.loads], plan.void) == (["a"], set())


def test_a_prefix_of_vllms_own_cache_is_not_built_upon_until_it_was_reset(driver: Any, make_request: Any) -> None:
    assert computed(driver, make_request("a", 2 * CHUNK), local=CHUNK).stores
    change(driver)
    assert not computed(driver, make_request("b", 2 * CHUNK), local=CHUNK).stores
    assert computed(driver, make_request("c", 2 * CHUNK)).stores  # it computed all of it
    driver.side.prefix_cache_reset()
    assert computed(driver, make_request("d", 2 * CHUNK), local=CHUNK).stores


def test_a_reset_between_a_change_and_its_news_counts(driver: Any, make_request: Any) -> None:
    driver.step()
    driver.side.prefix_cache_reset()
    driver.step()
    change(driver, last_step=1)
    assert computed(driver, make_request("a", 2 * CHUNK), local=CHUNK).stores


def test_a_reset_before_the_last_step_with_old_weights_does_not(driver: Any, make_request: Any) -> None:
    driver.step()
    driver.side.prefix_cache_reset()
    driver.step()
    driver.step()
    change(driver, last_step=2)
    assert not computed(driver, make_request("a", 2 * CHUNK), local=CHUNK).stores


# -- blocks that wait for stores ---------------------------------------------------------------------------------------


class Manager:
    """Stands where vLLM's KVCacheManager is: every block must be free for a reset."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def free(self, request: Any) -> None:
        self.used.discard(request.request_id)

    def reset_prefix_cache(self) -> bool:
        return not self.used


class Connector:
    """The part of LoRACacheConnector that is hooked."""

    def __init__(self, held: HeldBlocks) -> None:
        self.held = held
        self.resets = 0

    def before_prefix_cache_reset(self, manager: Any) -> None:
        if manager is not None:
            self.held.free(manager)

    def after_prefix_cache_reset(self) -> None:
        self.resets += 1


@pytest.fixture
def finished(driver: Any, make_request: Any) -> Any:
    """A request that is over, its last stores planned."""
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 2 * CHUNK
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is True
    return request


def reset(connector: Any, manager: Any) -> bool:
    """vLLM's own reset, by a scheduler with this connector."""
    hook_scheduler_class()
    hook_scheduler_class()  # once a process
    scheduler = SimpleNamespace(
        connector=connector, kv_cache_manager=manager, running=[], aux_output_connector=None, log_stats=False
    )
    return bool(Scheduler.reset_prefix_cache(scheduler))


def test_blocks_come_free_with_their_stores(driver: Any, finished: Any) -> None:
    assert driver.side.storing.held.pending
    assert driver.step().freed == set()
    driver.side.storing.held.stored({"a", "unknown"})
    assert not driver.side.storing.held.pending


def test_a_reset_frees_blocks_that_wait_for_stores(driver: Any, finished: Any) -> None:
    manager, connector = Manager(), Connector(driver.side.storing.held)
    manager.used.add("a")
    assert reset(connector, manager) is True
    assert connector.resets == 1
    assert not driver.side.storing.held.pending
    plan = driver.step()
    assert (plan.freed, plan.await_stores, len(plan.stores)) == ({"a"}, {"a"}, 1)
    assert driver.step().freed == set()


def test_a_reset_that_fails_is_none(driver: Any, finished: Any) -> None:
    manager, connector = Manager(), Connector(driver.side.storing.held)
    manager.used |= {"a", "running"}
    assert reset(connector, manager) is False
    assert connector.resets == 0


def test_beside_another_connector_blocks_stay_but_resets_are_heard(driver: Any, finished: Any) -> None:
    manager, connector = Manager(), Connector(driver.side.storing.held)
    manager.used.add("a")
    multi = SimpleNamespace(_connectors=[SimpleNamespace(), connector])
    assert reset(multi, manager) is False
    assert manager.used == {"a"}
    manager.used.clear()
    assert reset(multi, manager) is True
    assert connector.resets == 1
