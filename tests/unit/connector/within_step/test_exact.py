# SPDX-License-Identifier: Apache-2.0
"""Loads within the step that computes upon them: nothing wrong is given out, stored, or found by anybody, whatever
becomes of such a load. Every token that these engines give out is compared (step_engine.py), so a test need not say it.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHUNK, BLOCK = 32, 16
_numbers = itertools.count()


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB")


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    """prompt(length): the beginning of a text that no other test has."""
    source = random.Random(f"within a step {next(_numbers)}")
    text = [source.randrange(32000) for _ in range(1000)]
    return lambda length: text[:length]


def settle(engine: Any, serving: Any) -> None:
    engine.run()
    engine.forget()
    with serving.client() as client:
        client.flush()


def stored(engine: Any, serving: Any, tokens: list[int]) -> None:
    """Have a prompt's chunks in the daemon's memory, and nowhere else."""
    engine.answer(tokens)
    settle(engine, serving)


def keys_of(engine: Any, serving: Any, tokens: list[int], rank: int = 0) -> list[bytes]:
    """The objects of a prompt's chunks."""
    request = engine.ask(tokens)
    found: list[bytes] = engine.keys(request, rank)
    engine.abort(request)
    return found


def counted(serving: Any, cause: str) -> int:
    return int(serving.status()["counters"].get(f"client.load.{cause}", 0))


def broken(serving: Any, key: bytes) -> None:
    with serving.client() as client, client.acquire([key]) as reading:
        assert reading.slots[0] is not None
        reading.slots[0].buffers[0][9] ^= 1


def held(serving: Any, keys: list[bytes]) -> list[bool]:
    with serving.client() as client:
        there = {bytes.fromhex(each["key"]) for each in client.objects(tier="cpu")}
    return [key in there for key in keys]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("length", "reach"), [(200, 192), (192, 176), (193, 192), (33, 32), (34, 32)])
def test_a_hit_is_loaded_within_the_step_up_to_the_last_block_before_the_last_token(
    make_engine: Any, serving: Any, prompt: Any, ranks: int, length: int, reach: int
) -> None:
    engine = make_engine(serving.url, ranks=ranks)
    stored(engine, serving, prompt(length))
    before = engine.steps
    assert engine.answer(prompt(length), answer=3) == reach
    assert engine.stats["loads_by_layer"] == engine.stats["loads"] == 1
    assert engine.steps - before <= 5, "it computes in the step after it was asked"
    assert engine.model.wrong == 0
    assert serving.status()["leases"] == 0


def test_vllm_finds_what_was_loaded_in_the_next_step_and_not_before(
    make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    first, beside = engine.ask(prompt(200), 60), engine.ask(prompt(200), 60)
    engine.await_lookups()
    engine.step()
    manager = engine.scheduler.kv_cache_manager
    tables = [manager.get_block_ids(each.request_id)[0] for each in (first, beside)]
    assert set(tables[0]).isdisjoint(tables[1]), "both load for themselves"
    engine.step()
    later = engine.ask(prompt(200), 20)
    engine.await_lookups()
    engine.step()
    assert engine.stats["loads_by_layer"] == 2
    assert manager.get_block_ids(later.request_id)[0][:12] == tables[0][:12]
    engine.run()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step_tokens", [40, 256])
def test_a_wrong_chunk_is_computed_anew_and_nothing_upon_it_is_kept(
    make_engine: Any, serving: Any, prompt: Any, ranks: int, step_tokens: int, eventually: Any
) -> None:
    """Also where one rank's bytes are wrong and the other's are right."""
    engine = make_engine(serving.url, ranks=ranks, step_tokens=step_tokens)
    stored(engine, serving, prompt(200))
    broken(serving, keys_of(engine, serving, prompt(200), rank=ranks - 1)[3])
    before = counted(serving, "checksum")
    assert engine.answer(prompt(300), answer=40) == 192
    assert engine.model.wrong == 1
    assert engine.stats["load_failures.checksum"] == 1
    settle(engine, serving)
    eventually(lambda: counted(serving, "checksum") == before + 1, "the daemon counts it")
    assert engine.answer(prompt(400), answer=2) == 288  # what was computed anew is there, on all ranks
    assert engine.answer(prompt(400), answer=2) > 288  # and in vLLM's own prefix cache
    assert engine.model.wrong == 1
    assert serving.status()["leases"] == 0


@pytest.mark.parametrize("how", ["stop", "abort"])
def test_nobody_finds_what_a_request_leaves_that_ends_in_the_step_that_failed(
    make_engine: Any, serving: Any, prompt: Any, how: str
) -> None:
    """Aborted before its result is heard, or right behind it; or at its first token, which is not given out."""
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    broken(serving, keys_of(engine, serving, prompt(200))[2])
    request = engine.ask(prompt(330))
    engine.await_lookups()
    if how == "abort":
        engine.during = lambda answers: engine.abort(request)
        engine.step()
        engine.during = lambda answers: None
        assert request.is_finished()
    engine.run()
    assert engine.model.wrong == 1
    key = keys_of(engine, serving, prompt(330))[9]
    assert held(serving, [key]) == [how == "stop"], "what was computed upon it was stored"
    assert engine.answer(prompt(331), answer=2) >= 64
    assert engine.answer(prompt(331), answer=2) >= 64
    assert engine.model.wrong == 1


def test_what_a_failed_step_computed_for_others_is_not_kept(make_engine: Any, serving: Any, prompt: Any) -> None:
    """Of one that ends in it, of one that goes on, and of one whose load was right."""
    engine = make_engine(serving.url, step_tokens=1000)
    stored(engine, serving, prompt(200))
    stored(engine, serving, prompt(250)[::-1])
    bad = keys_of(engine, serving, prompt(200))[2]
    ends, goes_on = prompt(96)[5:], [7, *prompt(120)]
    loads = [*prompt(250)[::-1], *range(100)]
    new = [keys_of(engine, serving, ends), keys_of(engine, serving, goes_on), keys_of(engine, serving, loads)[7:]]
    broken(serving, bad)
    for tokens, answer in ((ends, 1), (goes_on, 60), (loads, 60), (prompt(200), 60)):
        engine.ask(tokens, answer)
    engine.await_lookups()
    engine.step()
    assert engine.stats["loads_by_layer"] == 2, "all of them are computed in one step"
    settle(engine, serving)
    assert engine.stats["load_failures.checksum"] == 1
    assert not any(any(held(serving, keys)) for keys in new)
    for tokens in (ends, goes_on, loads):
        stored(engine, serving, tokens)
    assert all(all(held(serving, keys)) for keys in new)


def test_a_step_whose_result_does_not_come_has_failed(make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(serving.url, ranks=2)
    stored(engine, serving, prompt(200))
    new = keys_of(engine, serving, prompt(290))[6:]

    def lose(answers: list[Any]) -> None:
        answers[1].kv_connector_output.kv_connector_worker_meta = None

    request = engine.ask(prompt(290), 40)
    engine.await_lookups()
    engine.during = lose
    engine.step()
    engine.during = lambda answers: None
    engine.run()
    assert not any(held(serving, new)), "it was stored though one rank said nothing"
    assert request.num_output_tokens == 40
    assert engine.answer(prompt(290)) == 192, "vLLM's prefix cache has it"


def test_a_preempted_request_is_computed_anew_and_then_stored(make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(serving.url)
    stored(engine, serving, prompt(200))
    broken(serving, keys_of(engine, serving, prompt(200))[2])
    other = engine.ask([9, *prompt(70)], 50)
    engine.ask(prompt(200), 50)
    engine.await_lookups()
    engine.step()
    assert engine.model.wrong == 1
    new = engine.keys(other)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    settle(engine, serving)
    assert all(held(serving, new))


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
    make_engine: Any, daemon: Any, prompt: Any, how: int
) -> None:
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
    assert time.monotonic() - began[0] < 2.5
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


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, 260), st.integers(1, 40)),
        st.tuples(st.just("ask"), st.integers(0, 2), st.sampled_from((64, 96, 97, 127, 160)), st.just(1)),
        st.tuples(st.just("steps"), st.integers(1, 6)),
        st.tuples(st.just("abort"), st.integers(0, 3)),
        st.tuples(st.just("abort within"), st.integers(0, 3)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("reset")),
        st.tuples(st.just("lose")),
        st.tuples(st.just("evict"), st.integers(0, 1 << 16)),
        st.tuples(st.just("break"), st.integers(0, 1 << 16)),
        st.tuples(st.just("break"), st.integers(0, 1 << 16)),
    ),
    min_size=4,
    max_size=20,
)


@pytest.mark.parametrize("kind", ["full", "mla"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    actions=ACTIONS,
    ranks=st.sampled_from((1, 2)),
    step_tokens=st.sampled_from((33, 64, 300)),
    blocks=st.sampled_from((64, 300)),
    caching=st.booleans(),
)
def test_whatever_happens_nothing_wrong_is_given_out(
    kind: str,
    make_engine: Any,
    serving: Any,
    actions: list[Any],
    ranks: int,
    step_tokens: int,
    blocks: int,
    caching: bool,
) -> None:
    engine = make_engine(serving.url, kind=kind, ranks=ranks, blocks=blocks, step_tokens=step_tokens, caching=caching)
    try:
        _act(engine, serving, actions)
    finally:
        engine.close()


def _act(engine: Any, serving: Any, actions: list[Any]) -> None:
    source = random.Random(f"actions {next(_numbers)}")
    texts = [[source.randrange(32000) for _ in range(260)] for _ in range(3)]
    texts[2][:80] = texts[0][:80]
    asked: list[Any] = []
    for text in texts[:2]:
        stored(engine, serving, text)
    for what, *details in actions:
        match what:
            case "ask":
                text, length, answer = details
                asked.append(engine.ask(texts[text][:length], answer))
            case "steps":
                for _ in range(details[0]):
                    engine.step()
            case "abort" | "abort within" if len(asked) > details[0]:
                one = asked[-1 - details[0]]
                if what == "abort within":
                    engine.during = lambda answers, one=one: engine.abort(one)
                    engine.step()
                    engine.during = lambda answers: None
                else:
                    engine.abort(one)
            case "lose":
                engine.during = lambda answers: setattr(
                    answers[-1].kv_connector_output, "kv_connector_worker_meta", None
                )
                engine.step()
                engine.during = lambda answers: None
            case "forget":
                settle(engine, serving)
            case "reset":
                engine.scheduler.reset_prefix_cache(reset_running_requests=False)
            case "evict" | "break":
                with serving.client() as client:
                    _damage(client, what, random.Random(details[0]))
    settle(engine, serving)
    for text in texts:
        engine.answer(text, answer=2)
    settle(engine, serving)
    assert serving.status()["leases"] == 0


def _damage(client: Any, what: str, source: random.Random) -> None:
    keys = sorted(bytes.fromhex(each["key"]) for each in client.objects(tier="cpu"))
    chosen = [key for key in keys if source.random() < 0.2]
    if what == "evict":
        client.evict(chosen)
        return
    with client.acquire(chosen[:3]) as reading:
        for slot in reading.slots:
            if slot is not None:
                slot.buffers[0][1] ^= 1
