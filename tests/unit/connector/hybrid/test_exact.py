# SPDX-License-Identifier: Apache-2.0
"""Whatever a model's layers read of a prefix: what is computed upon is what was computed for exactly these tokens.

Every step of these engines looks at every byte that it reads (conftest.py), so a test need not say it. What they say is
how far hits reach, and what becomes of failures.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.connector.hybrid.exact_engine import damage

CHUNK = 32
KINDS = (
    "full", "mla", "window", "full, window", "full, two windows", "window of one token", "full, span",
    "spans across chunks", "full, state", "full, states within a step", "mla, state", "full, window, state",
    "blocks of two sizes", "layers of two dtypes", "heads of two numbers", "fp8: full, window", "fp8: mla",
    "scales in the cache: full, window", "scales in the cache: full, state", "fp8 but for windows",
    "scales but for windows", "two dtypes and numbers of heads, windows",
)  # fmt: skip
# Where spans end within chunks, some of a chunk is gone before it is whole.
REACHING = [kind for kind in KINDS if kind != "spans across chunks"]
BESIDE = [kind for kind in KINDS if ", " in kind or kind in ("blocks of two sizes", "fp8 but for windows")]
STATES = [kind for kind in KINDS if "state" in kind]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="256MiB")


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    """prompt(length): the beginning of a text that no other test has."""
    source = random.Random(f"prompt {next(_numbers)}")
    text = [source.randrange(32000) for _ in range(1000)]
    return lambda length: text[:length]


def expected_hit(kind: str, length: int) -> int:
    """The last whole chunk; of one group of full attention the last token of a whole hit is computed again, others go
    back one chunk."""
    if kind in ("full", "mla", "fp8: mla", "layers of two dtypes", "heads of two numbers"):
        return min(length - 1, length // CHUNK * CHUNK)
    return (length - 1) // CHUNK * CHUNK


def settle(engine: Any, serving: Any) -> None:
    engine.run()
    engine.forget()
    with serving.client() as client:
        client.flush()


def test_every_kind_is_here(kind_names: list[str]) -> None:
    assert list(KINDS) == kind_names


@pytest.mark.parametrize("kind", REACHING)
def test_a_hit_reaches_the_last_boundary_before_the_last_token(
    kind: str, make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(kind, serving.url, step_tokens=64)
    for length in (1, 31, 32, 33, 63, 64, 65, 97, 160, 163):
        tokens = prompt(length)[::-1]  # none begins as another does
        assert engine.answer(tokens) == 0
        settle(engine, serving)
        assert engine.answer(tokens) == expected_hit(kind, length), length
        engine.forget()
    assert engine.answer(prompt(160)[::-1] + [7] * 50) >= 128  # a longer one goes on behind it


@pytest.mark.parametrize("kind", REACHING)
@pytest.mark.parametrize("step_tokens", [37, 200])
def test_prefill_in_odd_pieces_stores_and_loads_the_same(
    kind: str, step_tokens: int, make_engine: Any, serving: Any, prompt: Any
) -> None:
    writer = make_engine(kind, serving.url, step_tokens=step_tokens)
    assert writer.answer(prompt(301), answer=40) == 0
    settle(writer, serving)
    reader = make_engine(kind, serving.url, step_tokens=51)
    assert reader.answer(prompt(301)) == 288


@pytest.mark.parametrize("kind", REACHING)
def test_the_next_turn_hits_what_was_decoded(kind: str, make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(kind, serving.url)
    first = engine.ask(prompt(90), 100)
    settle(engine, serving)
    hit = engine.answer([*first.all_token_ids, 1, 2, 3])
    assert hit == 160, engine.failures  # of 189 that were computed


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_take_each_others_blocks(kind: str, make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(kind, serving.url, blocks=44)
    for _ in range(2):
        requests = [engine.ask([number, *prompt(150 + 7 * number)], 60) for number in range(5)]
        settle(engine, serving)
        assert all(request.num_output_tokens == 60 for request in requests)
    assert serving.status()["leases"] == 0


@pytest.mark.parametrize("kind", [kind for kind in STATES if "window" not in kind])  # with windows vLLM has none
def test_a_hit_of_vllms_own_that_ends_within_a_block_goes_before_a_shorter_one_of_ours(
    kind: str, make_engine: Any, serving: Any, prompt: Any
) -> None:
    """And after a longer one, which is loaded over what vLLM's own would have gone on with."""
    engine = make_engine(kind, serving.url, match_unit=8)
    assert engine.answer(prompt(110)) == 0
    assert engine.answer(prompt(110)) == 104
    engine.forget()
    reach = 64 if "within a step" in kind else 96  # the one state out of the last step is that of token 104
    assert engine.answer(prompt(110)) == reach
    other = make_engine(kind, serving.url)
    assert other.answer(prompt(200)) == 96
    settle(other, serving)
    assert engine.answer(prompt(120)) == 104
    assert engine.answer(prompt(200)) == 192


@pytest.mark.parametrize("kind", BESIDE)
def test_a_group_that_lost_an_object_shortens_the_hit(kind: str, make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(kind, serving.url)
    tokens = prompt(250)
    engine.answer(tokens)
    settle(engine, serving)
    for group in range(1, len(engine.shards)):
        with serving.client() as client:
            key = engine.object_keys(tokens, group)[6]
            assert client.evict([key]).counts[0] == 1, "the group's last object is not there"
        assert engine.answer(tokens) == 192
        settle(engine, serving)
        assert engine.answer(tokens) == 224  # computed anew, and stored
        engine.forget()


@pytest.mark.parametrize("kind", BESIDE)
def test_a_broken_object_of_any_group_is_computed_anew(kind: str, make_engine: Any, serving: Any, prompt: Any) -> None:
    engine = make_engine(kind, serving.url)
    tokens = prompt(250)
    engine.answer(tokens)
    settle(engine, serving)
    for group in range(len(engine.shards)):
        before = serving.status()["failures"].get("cpu.corrupt", 0)
        with serving.client() as client, client.acquire([engine.object_keys(tokens, group)[6]]) as reading:
            assert reading.slots[0] is not None
            reading.slots[0].buffers[0][9] ^= 1
        assert engine.answer(tokens) == 0  # vLLM recomputes all of a request whose load failed
        assert serving.status()["failures"]["cpu.corrupt"] > before
        settle(engine, serving)
        assert engine.answer(tokens) == 224
        engine.forget()


@pytest.mark.parametrize("kind", BESIDE)
def test_a_daemon_that_dies_under_a_load_costs_a_recompute(
    kind: str, make_engine: Any, daemon: Any, prompt: Any
) -> None:
    serving = daemon(memory="16MiB")
    engine = make_engine(kind, serving.url)
    engine.answer(prompt(200))
    settle(engine, serving)
    request = engine.ask(prompt(200))
    deadline = time.monotonic() + 10
    while request.status.name == "WAITING" and time.monotonic() < deadline:
        engine.step()
    serving.process.kill()
    engine.run()
    assert request.num_output_tokens == 1


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, 260), st.integers(1, 40)),
        st.tuples(st.just("ask"), st.integers(0, 2), st.sampled_from((64, 96, 97, 127, 160)), st.just(1)),
        st.tuples(st.just("steps"), st.integers(1, 6)),
        st.tuples(st.just("abort"), st.integers(0, 3)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("reset")),
        st.tuples(st.just("evict"), st.integers(0, 1 << 16)),
        st.tuples(st.just("break"), st.integers(0, 1 << 16)),
    ),
    min_size=4,
    max_size=16,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    actions=ACTIONS,
    step_tokens=st.sampled_from((33, 64, 131)),
    blocks=st.sampled_from((64, 300)),
    caching=st.booleans(),
    ahead=st.booleans(),
    chunk_tokens=st.sampled_from((32, 64, 96)),
    match_unit=st.sampled_from((0, 8, 16)),
)
def test_whatever_happens_nothing_wrong_is_computed_upon(
    kind: str, make_engine: Any, serving: Any, actions: list[Any], caching: bool, blocks: int, ahead: bool, **how: Any
) -> None:
    if kind in STATES:
        caching = True  # without, vLLM keeps states elsewhere: such a model is not cached
    else:
        del how["match_unit"]
    # A step that is planned before the last one is over has blocks of both: with fewer, vLLM preempts a request for
    # itself, without end.
    engine = make_engine(kind, serving.url, caching=caching, ahead=ahead, blocks=2 * blocks if ahead else blocks, **how)
    try:
        act(engine, serving, actions)
    finally:
        engine.close()


def act(engine: Any, serving: Any, actions: list[Any]) -> None:
    source = random.Random(f"actions {next(_numbers)}")
    texts = [[source.randrange(32000) for _ in range(260)] for _ in range(3)]
    texts[2][:80] = texts[0][:80]
    asked: list[Any] = []
    for what, *details in actions:
        match what:
            case "ask":
                text, length, answer = details
                asked.append(engine.ask(texts[text][:length], answer))
            case "steps":
                for _ in range(details[0]):
                    engine.step()
            case "abort":
                if len(asked) > details[0]:
                    engine.abort(asked[-1 - details[0]])
            case "forget":
                settle(engine, serving)
            case "reset":
                engine.reset()
            case "evict" | "break":
                with serving.client() as client:
                    damage(client, what, random.Random(details[0]))
    settle(engine, serving)
    for text in texts:
        engine.answer(text)
    assert serving.status()["leases"] == 0


@pytest.mark.parametrize("kind", BESIDE)
def test_what_comes_from_disk_is_exact_and_let_go_of(
    kind: str, make_engine: Any, daemon: Any, prompt: Any, tmp_path: Path, eventually: Any
) -> None:
    serving = daemon(memory="16MiB", disk_path=tmp_path / "disk", disk="64MiB")
    engine = make_engine(kind, serving.url)
    tokens = prompt(250)
    engine.answer(tokens)
    for group in range(len(engine.shards)):
        settle(engine, serving)
        with serving.client() as client:
            client.clear(tiers=("cpu",))
            assert not list(client.objects(tier="cpu")), "something is held"
        assert engine.answer(tokens) == 224
        eventually(lambda: serving.status()["leases"] == 0, "nothing is held any more", 5)
        settle(engine, serving)
        with serving.client() as client:
            client.clear(tiers=("cpu",))
        key = engine.object_keys(tokens, group)[6].hex()
        path = tmp_path / "disk" / "objects" / key[:2] / key
        data = bytearray(path.read_bytes())
        data[4096 + 100] ^= 1
        path.write_bytes(data)
        assert engine.answer(tokens) == 0
        assert serving.status()["failures"]["disk.corrupt"] > group
