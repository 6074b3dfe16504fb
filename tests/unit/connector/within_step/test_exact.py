# SPDX-License-Identifier: Apache-2.0
"""Loads within the step that computes upon them: nothing wrong is given out, stored, or found by anybody, whatever
becomes of such a load. Every token that these engines give out is compared (step_engine.py), so a test need not say it.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.connector.hybrid.exact_engine import damage
from tests.unit.connector.within_step.step_engine import broken, counted, held, keys_of, settle, stored

_numbers = itertools.count()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("length", "reach"), [(200, 192), (192, 176), (193, 192), (33, 32), (34, 32)])
def test_a_hit_is_loaded_within_the_step_up_to_the_last_block_before_the_last_token(
    make_engine: Any, serving: Any, prompt: Any, ranks: int, length: int, reach: int
) -> None:
    engine = make_engine(serving.url, ranks=ranks)
    stored(engine, serving, prompt(length))
    request = engine.ask(prompt(length), 3)
    engine.await_lookups()
    engine.step()
    assert engine.external[request.request_id] == reach, "it computes in the very step"
    engine.run()
    assert engine.stats["loads_by_layer"] == engine.stats["loads"] == 1
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
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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
                    damage(client, what, random.Random(details[0]))
    settle(engine, serving)
    for text in texts:
        engine.answer(text, answer=2)
    settle(engine, serving)
    assert serving.status()["leases"] == 0
