# SPDX-License-Identifier: Apache-2.0
"""What the connector does to the process that vLLM loads it into."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm.common.logs import log_as_vllm_does
from loracache.connectors.vllm.common.messages import StepPlan
from loracache.connectors.vllm.common.reports import ReportInbox
from loracache.connectors.vllm.connector import LoRACacheConnector


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """Ours, which nobody has configured, and vLLM's; both as they were at the end. No fixture: when a test begins,
    pytest gives handlers to loggers that do not propagate.
    """
    ours, theirs = logging.getLogger("loracache"), logging.getLogger("vllm")
    kept = [(logger, logger.level, logger.handlers, logger.propagate) for logger in (ours, theirs)]
    ours.handlers, theirs.handlers = [], []
    ours.propagate = False  # there are pytest's above it
    ours.setLevel(logging.NOTSET)
    try:
        yield ours, theirs
    finally:
        for logger, level, handlers, propagate in kept:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def test_what_it_logs_is_shown_as_vllm_shows_its_own() -> None:
    with loggers() as (_, theirs):
        handlers = [Kept(), Kept()]
        theirs.handlers = list(handlers)
        theirs.setLevel(logging.INFO)
        for _ in range(2):  # the scheduler's side and the worker's may be in one process
            log_as_vllm_does()
        below = logging.getLogger("loracache.connectors.vllm.scheduler.side")
        below.info("shown")
        below.debug("not shown")
        assert [handler.messages for handler in handlers] == [["shown"], ["shown"]]
        theirs.info("theirs")
        assert handlers[0].messages == ["shown", "theirs"]


def test_a_logger_that_somebody_configured_is_left_alone() -> None:
    with loggers() as (ours, theirs):
        mine, other = Kept(), Kept()
        theirs.handlers = [other]
        theirs.setLevel(logging.DEBUG)
        ours.addHandler(mine)
        ours.setLevel(logging.ERROR)
        log_as_vllm_does()
        assert ours.handlers == [mine]
        assert ours.level == logging.ERROR


def test_a_root_logger_that_somebody_configured_is_enough() -> None:
    with loggers() as (ours, theirs):
        other = Kept()
        theirs.handlers = [other]
        theirs.setLevel(logging.DEBUG)
        ours.propagate = True
        assert logging.getLogger().handlers
        log_as_vllm_does()
        assert ours.handlers == []
        assert ours.level == logging.NOTSET


class Worker:
    """Stands where the worker's side is; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def start_loads(self, plan: StepPlan) -> None:
        self.asked.append(("loads", plan))

    def take_stores(self, plan: StepPlan) -> None:
        self.asked.append(("take stores", plan))

    def start_stores(self) -> None:
        self.asked.append("start stores")

    def take_finished(self, ended: set[str]) -> tuple[set[str], set[str]]:
        self.asked.append(("finished", ended))
        return {"stored"}, set()


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(["save", "finished"], id="without drafts"),
        pytest.param(["finished", "drafter", "save"], id="with drafts (0.33, and vLLM's first model runner before)"),
        pytest.param(["finished"], id="a step that computes nothing (up to 0.30)"),
    ],
)
def test_stores_start_at_the_end_of_a_step_whatever_comes_last_in_it(step: list[str]) -> None:
    """And before their requests are asked for they are taken on: the plan may be the last one of a request."""
    connector = object.__new__(LoRACacheConnector)
    worker, plan = Worker(), StepPlan(step=1, await_stores={"a"})
    connector._worker = worker  # type: ignore[assignment]
    connector.bind_connector_metadata(plan)
    connector.start_load_kv(None)
    for each in step:
        if each == "save":
            connector.wait_for_save()
        elif each == "finished":
            assert connector.get_finished({"b"}) == ({"stored"}, None)
        worker.asked.append(each)
    connector.clear_connector_metadata()
    told = [("loads", plan), *step, "start stores"]
    at = told.index("finished")
    assert worker.asked == [*told[:at], ("take stores", plan), ("finished", {"b"}), *told[at:]]


def bare_connector(**sides: Any) -> Any:
    connector = LoRACacheConnector.__new__(LoRACacheConnector)
    connector._scheduler, connector._worker = sides.get("scheduler"), sides.get("worker")
    connector._inbox = ReportInbox()
    return connector


def test_sleep_reaches_the_worker() -> None:
    """By the names that vLLM 0.33 calls."""
    seen: list[str] = []
    worker = SimpleNamespace(leave_blocks=lambda: seen.append("leave"), return_to_blocks=lambda: seen.append("return"))
    connector = bare_connector(worker=worker)
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    assert seen == ["leave", "return"]
    assert LoRACacheConnector.supports_sleep_mode(None)


def test_resets_and_waiting_blocks_reach_the_scheduler() -> None:
    seen: list[Any] = []
    scheduler = SimpleNamespace(
        storing=SimpleNamespace(frees_soon=True, done=lambda request_ids: seen.append(sorted(request_ids))),
        free_blocks=seen.append,
        check_weights=lambda: seen.append("check"),
        prefix_cache_reset=lambda: seen.append("reset"),
        step_done=lambda: None,
        finished_loading=lambda loaded, invalid, failed: None,
    )
    connector = bare_connector(scheduler=scheduler)
    assert connector.has_pending_block_frees()
    connector.before_prefix_cache_reset("manager")
    connector.before_prefix_cache_reset(None)  # beside another connector
    connector.after_prefix_cache_reset()
    assert connector.reset_cache() is True
    connector.update_connector_output(
        SimpleNamespace(
            finished_sending={"b", "a"}, finished_recving=None, invalid_block_ids=None, kv_connector_worker_meta=None
        )
    )
    assert seen == ["manager", "reset", "check", ["a", "b"]]
