# SPDX-License-Identifier: Apache-2.0
"""What workers report is heard once, however often and in whatever order vLLM hands it over."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from loracache.connectors.vllm.common.messages import WorkerNews
from loracache.connectors.vllm.common.reports import ReportInbox, ReportOutbox, Reports
from loracache.connectors.vllm.connector import LoRACacheConnector
from loracache.connectors.vllm.scheduler.resets import HeldBlocks


def test_reports_that_come_again_are_heard_once() -> None:
    one, other, inbox = ReportOutbox(), ReportOutbox(), ReportInbox()
    first = [one.report(WorkerNews(activated={1: 1}, failures={"x": 1})), other.report(WorkerNews(activated={1: 1}))]
    assert all(first)
    news = inbox.news(copy.deepcopy(first[0]))
    assert news is not None
    assert (news.activated, news.failures) == ({1: 1}, {"x": 1})
    assert inbox.news(first[0]) is None
    second = one.report(WorkerNews(activated={2: 1}))
    both = second.aggregate(first[0]).aggregate(first[1]).aggregate(first[1])  # type: ignore[union-attr]
    news = inbox.news(both)
    assert news is not None
    assert (news.activated, news.failures) == ({1: 1, 2: 1}, {})
    assert inbox.news(both) is None


def test_a_workers_successor_is_heard_from_its_first_report_on() -> None:
    inbox = ReportInbox()
    for _ in range(3):
        assert inbox.news(ReportOutbox().report(WorkerNews(activated={1: 1}))) is not None


def test_no_news_is_no_report() -> None:
    assert ReportOutbox().report(None) is None
    assert ReportInbox().news(None) is None
    assert ReportInbox().news(object()) is None


def test_memory_of_what_was_heard_is_bounded() -> None:
    outbox, inbox = ReportOutbox(), ReportInbox()
    for _ in range(3000):
        assert inbox.news(outbox.report(WorkerNews(activated={1: 1}))) is not None
    assert all(len(heard) < 1000 for heard in inbox._heard.values())


def outputs(*reports: Reports | None) -> list[Any]:
    """What the workers of one step answer."""
    made = [KVConnectorOutput(kv_connector_worker_meta=each) for each in reports]
    return [ModelRunnerOutput.with_kv_conn_output_only(each) for each in made]


def test_the_scheduler_hears_what_a_step_with_a_failed_worker_left_behind_once() -> None:
    """As vLLM 0.33 replays it: the living worker's output of the failed step joins the next one's."""
    connector: Any = object.__new__(LoRACacheConnector)
    heard: list[WorkerNews] = []
    connector._inbox = ReportInbox()
    done = {"step_done": lambda: None, "storing": SimpleNamespace(done=HeldBlocks().stored)}
    ended: Any = lambda *_: None  # noqa: E731
    connector._scheduler = SimpleNamespace(take_news=heard.append, finished_loading=ended, **done)
    workers = [ReportOutbox(), ReportOutbox()]
    aggregator = KVOutputAggregator(expected_finished_count=2)
    kept = outputs(workers[0].report(WorkerNews(activated={1: 1}, failures={"load.lost": 2})))
    defer = getattr(aggregator, "ft_defer_kv_connector_outputs", None)
    again = [kept[0].kv_connector_output]
    if defer is not None:
        defer(again)
    step = outputs(*(each.report(WorkerNews(activated={1: 1}, failures={"load.lost": 1})) for each in workers[1:]))
    for replayed in ([], again):
        more = [ModelRunnerOutput.with_kv_conn_output_only(each) for each in ([] if defer else again) + replayed]
        output = aggregator.aggregate([*more, *step])
        connector.update_connector_output(output.kv_connector_output)
    assert len(heard) == 1
    assert (heard[0].activated, heard[0].failures) == ({1: 2}, {"load.lost": 3})


@pytest.mark.parametrize("twice", [False, True])
def test_what_is_heard_is_taken_as_before(twice: bool) -> None:
    contradiction = [ReportOutbox().report(WorkerNews({1: digest})) for digest in ("a" * 64, "b" * 64)]
    both = contradiction[0].aggregate(contradiction[1])  # type: ignore[union-attr]
    if twice:
        both = both.aggregate(contradiction[0])
    news = ReportInbox().news(both)
    assert news is not None
    assert news.adapters == {1: ""}
