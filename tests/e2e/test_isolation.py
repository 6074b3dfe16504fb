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

HELD = 512


@pytest.fixture(scope="module")
def serving(module_daemon: Any, engine_factory: Any) -> SimpleNamespace:
    daemon = module_daemon(memory="256MiB")
    return SimpleNamespace(engine=engine_factory({"server": daemon.url}), daemon=daemon)


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
