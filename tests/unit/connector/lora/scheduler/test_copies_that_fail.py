# SPDX-License-Identifier: Apache-2.0
"""An adapter that cannot be copied in ends its requests after their patience, and costs little until then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache.adapters.payload import ModuleSize
from loracache.connectors.vllm.lora.paths import path_of
from loracache.connectors.vllm.scheduler.lora import folders

pytestmark = pytest.mark.usefixtures("fast_retry")


def fail_all(engine: Any, cause: str, seen: set[int]) -> None:
    """The workers could not carry out what they were ordered since the last call."""
    for number, _, _ in engine.orders:
        if number not in seen:
            seen.add(number)
            engine.report(not_activated={number: (cause, "")})


@pytest.mark.parametrize("cause", ["bug", "checksum", "unavailable", "pool_full", "lease_lost", "changed", "evicted"])
@pytest.mark.parametrize("by", ["folder", "digest"])
def test_a_request_whose_copy_fails_each_time_ends_with_an_error(
    url: str, client: Any, make_engine: Any, make_adapter: Any, cause: str, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(f"always {cause} {by}")
    engine = make_engine(url, patience=0.5)
    engine.answers = False
    client.add_adapter(adapter.path)
    engine.arrive("a", LoRARequest("mine", 1, adapter.path if by == "folder" else path_of(adapter.digest)))
    started, seen = time.monotonic(), set[int]()
    while time.monotonic() < started + 10 and not engine.failed:
        engine.step()
        fail_all(engine, cause, seen)
        time.sleep(0.002)
    assert engine.failed[:1] == ["a"]
    assert time.monotonic() - started >= 0.5
    assert len(seen) < 20
    engine.step()
    said = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert [each.getMessage() for each in said] == [
        f"adapter mine cannot be served: it could not be copied in ({cause})"
    ]


def test_tries_come_further_and_further_apart(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter = make_adapter("further apart")
    engine = make_engine(url, patience=20.0)
    engine.answers = False
    client.add_adapter(adapter.path)
    engine.arrive("a", LoRARequest("a", 1, path_of(adapter.digest)))
    seen, pauses = set[int](), []
    for count in range(1, 5):
        eventually(lambda: engine.step() or len(engine.orders) == count)  # noqa: B023
        fail_all(engine, "bug", seen)
        [found] = engine.admission._adapters.values()
        pauses.append(found.next_try - time.monotonic())
    assert pauses[-1] > 2 * pauses[0]


def test_a_copy_that_works_in_the_end_admits_its_request(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter = make_adapter("in the end")
    engine = make_engine(url)
    engine.knows(adapter)
    engine.answers = False
    client.add_adapter(adapter.path)
    engine.arrive("a", LoRARequest("a", 1, path_of(adapter.digest)))
    seen = set[int]()
    for count in (1, 2, 3):
        eventually(lambda: engine.step() or len(engine.orders) >= count)  # noqa: B023
        fail_all(engine, "checksum", seen)
    engine.answers = True
    eventually(lambda: engine.runs("a"))
    assert not engine.failed


def test_a_request_that_waits_for_pages_of_running_ones_is_never_given_up(
    url: str, client: Any, make_engine: Any, make_adapter: Any, make_shape: Callable[..., Any], eventually: Any
) -> None:
    first, second = make_adapter("first"), make_adapter("second")
    shape = make_shape()
    engine = make_engine(url, make_shape(shape.cost(shape.place(first.ranks).elements)), patience=0.2)
    for each in (first, second):
        client.add_adapter(each.path)
    engine.arrive("a", LoRARequest("a", 1, first.path))
    eventually(lambda: engine.runs("a"))
    engine.arrive("b", LoRARequest("b", 2, second.path))
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert not engine.runs("b")
        time.sleep(0.01)
    assert not engine.failed
    engine.end("a")
    eventually(lambda: engine.runs("b"))


def test_a_folder_that_leaves_the_cache_again_and_again_ends_its_request(
    url: str, make_engine: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    """The daemon takes it in each time, and has not got it when it is asked for."""
    engine = make_engine(url, patience=0.1)
    answer = engine.link.answer
    monkeypatch.setattr(engine.link, "ask_acquire", lambda *arguments: -1)
    monkeypatch.setattr(
        engine.link, "answer", lambda number: (True, [[0, "unknown"]]) if number == -1 else answer(number)
    )
    engine.arrive("a", LoRARequest("a", 1, make_adapter("leaves").path))
    eventually(lambda: engine.step() or engine.failed == ["a"])


def test_a_folder_that_is_never_read_ends_its_request(
    tmp_path: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any, make_adapter: Any
) -> None:
    """A file system that hangs."""
    monkeypatch.setattr(folders, "_READING_S", 0.2)
    monkeypatch.setattr(folders, "_read_folder", lambda path, folder: None)
    engine = make_engine(f"unix://{tmp_path}/nobody.sock", patience=0.1)
    engine.arrive("a", LoRARequest("a", 1, make_adapter("a").path))
    eventually(lambda: engine.step() or engine.failed == ["a"])


def test_an_adapter_of_another_width_is_refused_at_once(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    part = "model.layers.0.mlp.down_proj"
    adapter = make_adapter("wider", {part: 4}, sizes={part: (80, 24)})
    client.add_adapter(adapter.path)
    engine = make_engine(url, patience=20.0)
    for name, path in (("by folder", adapter.path), ("by digest", path_of(adapter.digest))):
        engine.arrive(name, LoRARequest(name, len(name), path))
        eventually(lambda: engine.step() or name in engine.failed)  # noqa: B023
    assert not engine.orders
    assert f"'{part}' of the adapter has lora_A (4, 80) and lora_B (24, 4), this model needs (4, 40)" in caplog.text


def test_a_pipeline_s_stages_admit_one_adapter(
    url: str, client: Any, make_engine: Any, make_adapter: Any, make_shape: Callable[..., Any], eventually: Any
) -> None:
    """Each has half of the layers, and pages for those."""
    from dataclasses import replace

    whole = make_shape(400)
    stages = [
        replace(
            whole,
            modules=tuple(each for each in whole.modules if each.name.startswith(f"model.layers.{own}.")),
            elsewhere=(f"model.layers.{1 - own}",),
        )
        for own in range(2)
    ]
    adapter = make_adapter("of both stages")
    client.add_adapter(adapter.path)
    engine = make_engine(url, *stages)
    engine.arrive("a", LoRARequest("a", 1, adapter.path))
    eventually(lambda: engine.runs("a"))
    [costs] = {found.costs for found in engine.admission._adapters.values()}
    sizes = {part: ModuleSize(a.shape[0], a.shape[1], b.shape[0]) for part, (a, b) in adapter.matrices.items()}
    assert costs == tuple(stage.cost(stage.fit(sizes).elements) for stage in stages)
    assert sum(costs) <= whole.cost(whole.fit(sizes).elements) + 1


def test_patience_with_copies_begins_with_the_first_that_fails(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    """Waiting for the daemon, and for pages that others run on, is not counted."""
    runs, waits, shape = make_adapter("has the pages", 4), make_adapter("waits for them", 4), make_shape()
    engine = make_engine(url, make_shape(shape.cost(shape.place(runs.ranks).elements)), patience=1.0)
    engine.knows(runs, waits)
    engine.arrive("runs", LoRARequest("runs", 1, runs.path))
    eventually(lambda: engine.runs("runs"))
    engine.arrive("waits", LoRARequest("waits", 2, waits.path))
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        engine.step()
        time.sleep(0.01)
    engine.answers = False
    engine.end("runs")
    eventually(lambda: engine.step() or len(engine.orders) == 2)
    engine.report(not_activated={2: ("lease_lost", "")})
    engine.answers = True
    eventually(lambda: engine.runs("waits") or engine.failed)
    assert not engine.failed
