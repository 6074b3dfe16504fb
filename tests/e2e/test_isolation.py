# SPDX-License-Identifier: Apache-2.0
"""Nobody gets another's KV: adapters, tenants, dtypes, models; and who shares, shares."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import own_adapters, read_trace

HELD = 512
MEMORY = 256 << 20


@pytest.fixture(scope="module")
def serving(module_daemon: Any, engine_factory: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An engine on a daemon that records what it is asked."""
    trace = tmp_path_factory.mktemp("recorded") / "trace.jsonl"
    daemon = module_daemon(memory=MEMORY, record=trace)
    return SimpleNamespace(engine=engine_factory({"server": daemon.url}), daemon=daemon, trace=trace)


def copy_adapter(adapter: Any, folder: Path) -> str:
    shutil.copytree(adapter.path, folder)
    return str(folder)


def test_base_and_adapters_never_share_a_prompt(
    serving: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any]
) -> None:
    """The case in which LMCache 0.5.6 answers B with A's KV: B after A, the same prompt."""
    tokens = prompts(600)
    who = [None, adapters["a"], adapters["b"]]
    cold = [serving.engine.ask(tokens, lora=lora) for lora in who]
    assert [answer.cached for answer in cold] == [0, 0, 0]
    assert len({tuple(answer.tokens) for answer in cold}) == 3
    serving.engine.settle(serving.daemon)
    warm = [serving.engine.ask(tokens, lora=lora) for lora in reversed(who)]
    assert [answer.cached for answer in warm] == [HELD] * 3
    assert [answer.tokens for answer in reversed(warm)] == [answer.tokens for answer in cold]


def test_the_same_content_under_another_name_and_path_shares(
    serving: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], tmp_path: Path
) -> None:
    tokens = prompts(600)
    cold = serving.engine.ask(tokens, lora=adapters["a"])
    serving.engine.settle(serving.daemon)
    twin = replace(adapters["a"], name="twin", id=41, path=copy_adapter(adapters["a"], tmp_path / "elsewhere"))
    warm = serving.engine.ask(tokens, lora=twin)
    assert warm.cached == HELD
    assert warm.tokens == cold.tokens


def test_a_name_that_is_re_pointed_does_not_bring_the_old_kv(
    serving: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any]
) -> None:
    tokens = prompts(600)
    first = replace(adapters["a"], name="moving", id=51)
    second = replace(adapters["b"], name="moving", id=52)
    old = serving.engine.ask(tokens, lora=first)
    serving.engine.settle(serving.daemon)
    new = serving.engine.ask(tokens, lora=second)
    assert new.cached == 0
    assert new.tokens == serving.engine.ask(tokens, lora=adapters["b"]).tokens
    assert new.tokens != old.tokens


def test_tenants_do_not_share(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    tokens = prompts(600)
    serving.engine.ask(tokens, salt="one")
    serving.engine.settle(serving.daemon)
    assert serving.engine.ask(tokens, salt="two").cached == 0
    assert serving.engine.ask(tokens).cached == 0
    serving.engine.settle(serving.daemon)
    assert serving.engine.ask(tokens, salt="one").cached == HELD


def test_engines_of_other_hash_seeds_share(
    serving: Any, prompts: Callable[[int], list[int]], engine_factory: Any
) -> None:
    """Another dtype and another model never do."""
    tokens = prompts(600)
    cold = serving.engine.ask(tokens)
    serving.engine.settle(serving.daemon)
    url = serving.daemon.url

    other_seed = engine_factory(
        {"server": url}, {"PYTHONHASHSEED": "4242"}, enable_prefix_caching=True, enforce_eager=True
    )
    shared = other_seed.ask(tokens)
    assert shared.cached == HELD
    assert shared.tokens == cold.tokens

    other_seed.close()

    other_dtype = engine_factory({"server": url}, dtype="bfloat16")
    assert other_dtype.ask(tokens).cached == 0
    other_dtype.close()


def test_two_models_of_one_shape_do_not_share(
    serving: Any, prompts: Callable[[int], list[int]], engine_factory: Any, model_maker: Any, tmp_path: Path
) -> None:
    tokens = prompts(600)
    cold = serving.engine.ask(tokens)
    serving.engine.settle(serving.daemon)
    model_maker.main([str(tmp_path), "--preset", "tiny", "--seed", "99"])
    other = engine_factory({"server": serving.daemon.url}, model=str(tmp_path / "model"))
    answer = other.ask(tokens)
    assert answer.cached == 0
    assert answer.tokens != cold.tokens
    other.close()


def test_a_replay_of_the_recording_finds_what_the_engines_found(
    serving: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], eventually: Any
) -> None:
    """The last test here: of all that the engines of this module asked, and of turns of its own, in each of which a
    session goes on with its answer."""
    first = len(recorded(serving.trace))
    cached = asked = 0
    for lora, salt in ((None, "replayed"), (adapters["a"], "replayed"), (adapters["b"], "")):
        tokens = prompts(300)
        for _ in range(3):
            answer = serving.engine.ask(tokens, lora=lora, max_tokens=40, **({"salt": salt} if salt else {}))
            cached, asked = cached + answer.cached, asked + 1
            serving.engine.settle(serving.daemon)
            tokens = tokens + answer.tokens + prompts(200)
    assert cached > 0
    eventually(lambda: len(recorded(serving.trace)) >= first + asked, "the last of them is written")
    lines = recorded(serving.trace)
    assert there(lines[first:]) == cached
    sizes = Sizes(MEMORY, 0, 1, own_adapters(lines))
    for policy in ("lru", "adaptive"):  # memory had room for all of it
        run = replay(lines, sizes, Way.parse(policy))
        assert run.hit_rate * sum(request.tokens for request in lines) == pytest.approx(there(lines))


def recorded(trace: Path) -> list[Any]:
    """The requests of a trace that is being written."""
    return read_trace(trace) if '"request"' in trace.read_text() else []


def there(requests: list[Any]) -> int:
    """Tokens that a daemon found, as it recorded."""
    return sum(request.tokens_of(0) * (request.held or 0) for request in requests)
