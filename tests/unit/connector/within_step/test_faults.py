# SPDX-License-Identifier: Apache-2.0
"""What a load within a step may meet: it fails, is counted and computed anew, in a short time. Or it is none."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from loracache.connectors.vllm.worker import by_layer
from tests.unit.connector.within_step.step_engine import broken, counted, keys_of, settle, stored


def test_an_adapter_that_changes_meanwhile_fails_the_load(make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    rank = engine.ranks[0]
    start = rank.connector.start_load_kv

    def changed(*arguments: Any, **options: Any) -> None:
        rank.side._loader._may_load = lambda load: False
        start(*arguments, **options)

    rank.connector.start_load_kv = changed
    assert engine.answer(prompt(200), answer=3) == 192
    assert engine.stats["load_failures.adapter_changed"] == 1


def test_changed_weights_fail_the_load(make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    weights = engine.ranks[0].side.weights
    believes = weights.believes
    weights.believes = lambda versions: False
    request = engine.ask(prompt(200), 3)
    while request.request_id not in engine.external:
        engine.step()
    weights.believes = believes
    engine.run()
    assert engine.stats["loads_by_layer"] == 1
    assert engine.stats["load_bytes"] == 0


def test_copies_to_memory_that_sleeps_fail_the_load(make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    for copier in engine.ranks[0].side._copiers:
        copier.gate.shut()
    assert engine.answer(prompt(200), answer=3) == 192
    assert engine.stats["load_failures.unavailable"] == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_daemon_that_goes_while_a_layer_waits_costs_a_short_wait_and_a_recompute(
    make_engine: Any, daemon: Any, prompt: Any, how: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_layer, "_PATIENCE_S", 60.0)
    serving = daemon(memory="16MiB")
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    start = engine.ranks[0].connector.start_load_kv

    began: list[float] = []

    def goes(*arguments: Any, **options: Any) -> None:
        if engine.side.within_step._open is not None:
            serving.send(how)
            began.append(time.monotonic())
        start(*arguments, **options)

    engine.ranks[0].connector.start_load_kv = goes
    request = engine.ask(prompt(200), 3)
    while not began:
        engine.step()
    assert time.monotonic() - began[0] < 20
    assert engine.stats["loads_by_layer"] == 1
    engine.ranks[0].connector.start_load_kv = start
    serving.send(signal.SIGCONT) if how == signal.SIGSTOP else None
    engine.run()
    assert request.num_output_tokens == 3
    assert engine.stats["load_failures.deadline"] + engine.stats["load_failures.unavailable"] == 1


def test_a_lease_that_was_lost_fails_the_load(
    make_engine: Any, serving: Any, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loracache.connectors.vllm.worker import loader

    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    monkeypatch.setattr(loader, "_LEASE_MARGIN_S", -0.45)  # a lease of 0.05 s
    copier = engine.ranks[0].side._copiers[1]
    scatter = copier.scatter

    def slow(*arguments: Any) -> Any:
        time.sleep(0.7)
        return scatter(*arguments)

    monkeypatch.setattr(copier, "scatter", slow)
    assert engine.answer(prompt(200), answer=3) == 192
    assert engine.stats["load_failures.lease_lost"] == 1
    assert engine.model.wrong == 0, "the bytes were right, but nobody could know"


def test_a_layer_that_does_not_wait_fails_the_load(
    make_engine: Any, serving: Any, prompt: Any, eventually: Any
) -> None:
    """As where a graph is replayed that holds several layers: what it computed upon was not there yet."""
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    connector = engine.ranks[0].connector
    wait = connector.wait_for_layer_load
    connector.wait_for_layer_load = lambda name: None if "2" in name else wait(name)
    assert engine.answer(prompt(200), answer=3) == 192
    assert engine.stats["load_failures.deadline"] == 0
    settle(engine, serving)
    eventually(lambda: counted(serving, "deadline"), "the daemon counts it")


def test_after_a_load_that_failed_loads_go_ahead_of_the_step_for_a_while(
    make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    engine.side.within_step._pauses.first = engine.side.within_step._pauses.longest = 60.0
    broken(serving, keys_of(engine, serving, prompt(200))[2])
    stored(engine, serving, prompt(200))
    assert engine.answer(prompt(200)) == 192
    assert engine.stats["loads_by_layer"] == 1
    assert engine.stats["loads"] == 2


def test_what_is_on_disk_is_loaded_ahead_of_the_step(make_engine: Any, daemon: Any, prompt: Any, tmp_path: Any) -> None:
    serving = daemon(memory="16MiB", disk_path=tmp_path / "disk", disk="64MiB")
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    with serving.client() as client:
        client.clear(tiers=("cpu",))
    assert engine.answer(prompt(200)) == 192
    assert engine.stats["loads_by_layer"] == 0
    assert engine.stats["loads"] == 1
