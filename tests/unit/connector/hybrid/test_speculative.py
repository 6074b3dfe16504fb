# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding where layers have windows or spans: drafts that were wrong leave nothing that is stored, and
blocks that are kept for a chunk which drafts completed are kept once. Every step of these engines looks at every byte
that it reads (exact_model.py), and a reset fails where a block is not given back.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.connector.hybrid.test_exact import ACTIONS, CHUNK, act, settle

_numbers = itertools.count()
KINDS = ["full", "full, window", "full, two windows", "window", "blocks of two sizes"]
CASES = [(kind, method) for kind in KINDS for method in ("ngram", "eagle")] + [
    ("full, span", "ngram")  # with EAGLE vLLM itself refuses spans
]


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB")


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    source = random.Random(f"drafts {next(_numbers)}")
    text = [source.randrange(30000) for _ in range(1000)]
    return lambda length: text[:length]


def expected_hit(kind: str, method: str, chunks: int) -> int:
    """Of a prompt that goes on behind `chunks` chunks which are all that is held. Models of drafts read the token that
    follows: of the last block, or where layers differ of the last chunk, it is not known."""
    dropped = 0 if method == "ngram" else CHUNK // 2 if kind == "full" else CHUNK
    return chunks * CHUNK - dropped


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_what_drafts_wrote_is_stored_where_it_was_right(
    kind: str, method: str, make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(kind, serving.url, drafts=method)
    first = engine.ask(prompt(90), 200)
    settle(engine, serving)
    assert first.num_output_tokens == 200
    assert 50 < engine.accepted < 190, "drafts were all right, or all wrong"
    stored = 9 if method == "ngram" else 8  # of 289 that were computed, the last block of which is not trusted
    assert engine.answer([*first.all_token_ids, 1, 2, 3], 20) == expected_hit(kind, method, stored)
    settle(engine, serving)
    # Nobody knows the weights of a model of drafts that is not there, so engines with one share nothing.
    reader = make_engine(kind, serving.url, drafts=method, step_tokens=37) if method == "ngram" else engine
    assert reader.answer([*first.all_token_ids[:140], 1, 2, 3], 20) == expected_hit(kind, method, 4)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_requests_with_drafts_take_each_others_blocks(
    kind: str, method: str, make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(kind, serving.url, blocks=44, drafts=method)
    for _ in range(2):
        requests = [engine.ask([number, *prompt(150 + 7 * number)], 60) for number in range(5)]
        settle(engine, serving)
        assert all(request.num_output_tokens == 60 for request in requests)
    assert serving.status()["leases"] == 0


@pytest.mark.parametrize(("kind", "method"), CASES)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    actions=ACTIONS,
    step_tokens=st.sampled_from((33, 64, 131)),
    blocks=st.sampled_from((64, 300)),
    caching=st.booleans(),
)
def test_whatever_happens_with_drafts_nothing_wrong_is_computed_upon(
    kind: str,
    method: str,
    make_engine: Any,
    serving: Any,
    actions: list[Any],
    step_tokens: int,
    blocks: int,
    caching: bool,
) -> None:
    options = {"blocks": blocks, "step_tokens": step_tokens, "caching": caching, "drafts": method}
    engine = make_engine(kind, serving.url, **options)
    try:
        act(engine, serving, actions)
    finally:
        engine.close()
