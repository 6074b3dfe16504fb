# SPDX-License-Identifier: Apache-2.0
"""KV belongs to the weights the engine really serves: the same story told to an engine with the cache and to a stock
one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pair(
    module_daemon: Any, engine_factory: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Two engines that hold one adapter at a time, so that a second one pushes the first out. The one with the cache
    has vLLM's own prefix cache too; the stock one must not, because that serves KV of weights that were replaced.
    """
    daemon = module_daemon(memory="256MiB", disk_path=tmp_path_factory.mktemp("disk"), disk="1GiB")
    tight = {"max_loras": 1, "max_cpu_loras": 1}
    cached = engine_factory({"server": daemon.url}, enable_prefix_caching=True, **tight)
    stock = engine_factory(None, **tight)
    yield SimpleNamespace(cached=cached, stock=stock, daemon=daemon)
    cached.close()
    stock.close()


@pytest.fixture
def folder(adapters: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with adapter a's files."""
    return Path(shutil.copytree(adapters["a"].path, tmp_path / "adapter"))


def overwrite(folder: Path, source: str) -> None:
    """Other content in the same files, in place."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((Path(source) / name).read_bytes())


def both(pair: Any, tokens: list[int], *, settle: bool = True, **options: Any) -> tuple[Any, Any]:
    """Ask both. settle: all is stored, and the engine's own prefix cache forgotten."""
    answers = pair.cached.ask(tokens, **options), pair.stock.ask(tokens, **options)
    if settle:
        pair.cached.settle(pair.daemon)
    assert answers[0].tokens == answers[1].tokens
    return answers


def test_the_same_id_with_another_path_keeps_the_first_weights(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any]
) -> None:
    tokens = prompts(500)
    first = replace(adapters["a"], id=61)
    both(pair, tokens, lora=first)
    cached, _ = both(pair, tokens, lora=replace(adapters["b"], id=61))
    assert cached.cached == 384  # the engine still serves a, and a's KV is what it gets
    both(pair, prompts(500), lora=replace(adapters["b"], id=61))


def test_files_overwritten_in_place_count_once_they_are_loaded(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], folder: Path, eventually: Any
) -> None:
    tokens = prompts(500)
    mine = replace(adapters["a"], name="mine", id=62, path=str(folder))
    old, _ = both(pair, tokens, lora=mine)
    overwrite(folder, adapters["b"].path)
    still, _ = both(pair, tokens, lora=mine)  # the engine holds the old weights
    assert still.tokens == old.tokens
    both(pair, prompts(200), lora=adapters["c"])  # pushes the adapter out
    # Loaded anew, with the files' content of today. The scheduler still expects the old: its load is refused by the
    # worker that sees what is really loaded, and the request computes everything itself.
    new, _ = both(pair, tokens, lora=mine)
    assert new.tokens != old.tokens
    eventually(lambda: pair.daemon.status()["counters"].get("client.load.adapter_changed"), "the refusal is counted")
    both(pair, tokens, lora=mine)  # the first one keyed by the new content
    again, _ = both(pair, tokens, lora=mine)
    assert again.cached == 384
    both(pair, prompts(200), lora=adapters["c"])
    fresh, _ = both(pair, tokens, lora=replace(adapters["b"], id=63))
    assert fresh.cached == 384  # the same content by its own name


def test_load_inplace_rebinds_the_id(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], folder: Path
) -> None:
    tokens = prompts(500)
    mine = replace(adapters["a"], name="inplace", id=64, path=str(folder))
    old, _ = both(pair, tokens, lora=mine)
    overwrite(folder, adapters["b"].path)
    for engine in (pair.cached, pair.stock):
        assert not engine.add_lora(replace(mine, inplace=True))
    new, _ = both(pair, tokens, lora=mine)
    assert new.tokens != old.tokens
    assert new.cached == 0
    both(pair, tokens, lora=mine)
    again, _ = both(pair, tokens, lora=mine)
    assert again.cached == 384
    assert again.tokens == new.tokens


# -- weights replaced in place -----------------------------------------------------------------------------------------

HELD = 512  # of a prompt of 600 tokens


@pytest.fixture(scope="module")
def trained(pair: Any, engine_factory: Any, host_path: str) -> Iterator[Any]:
    """An engine that gets other weights while it runs, with vLLM's own prefix cache."""
    engine = engine_factory(
        {"server": pair.daemon.url},
        {"PYTHONPATH": host_path},
        enable_prefix_caching=True,
        enable_lora=False,
        worker_extension_cls="weights_extension.WeightsExtension",
    )
    yield engine
    engine.close()


def oracle(engine: Any, tokens: list[int]) -> list[int]:
    """The answer to a request that can hit nothing: its salt was never used before."""
    return list(engine.ask(tokens, salt=os.urandom(8).hex()).tokens)


def elsewhere(pair: Any, tokens: list[int]) -> Any:
    """What another engine answers, which has forgotten its own KV."""
    assert pair.cached.reset()
    return pair.cached.ask(tokens)


def test_a_reset_right_after_an_answer_succeeds_and_nothing_is_lost(
    pair: Any, trained: Any, prompts: Callable[[int], list[int]]
) -> None:
    asked = [prompts(600) for _ in range(10)]
    done = []
    for tokens in asked:
        trained.ask(tokens)
        done.append(trained.reset())
    assert done == [True] * 10
    trained.settle(pair.daemon)
    assert [trained.ask(tokens).cached for tokens in asked] == [HELD] * 10


def test_pause_sleep_and_reset_keep_the_cache(pair: Any, trained: Any, prompts: Callable[[int], list[int]]) -> None:
    before = prompts(600)
    cold = trained.ask(before)
    for forget in (trained.pause, trained.sleep, lambda: trained.reset(connector=True)):
        trained.settle(pair.daemon)
        forget()
        again = trained.ask(before)
        assert (again.cached, again.tokens) == (HELD, cold.tokens)
        after = prompts(600)
        cold_after = trained.ask(after)
        trained.settle(pair.daemon)
        theirs = elsewhere(pair, after)  # what is stored from then on is everybody's
        assert (theirs.cached, theirs.tokens) == (HELD, cold_after.tokens)


def test_weights_reloaded_from_elsewhere_meet_no_kv_of_others(
    pair: Any, trained: Any, prompts: Callable[[int], list[int]], model_maker: Any, tmp_path: Path
) -> None:
    """With vLLM's plain `reset_prefix_cache()`, which says nothing to connectors."""
    model_maker.main([str(tmp_path), "--preset", "tiny", "--seed", "99"])
    tokens, fresh = prompts(600), prompts(600)
    old = trained.ask(tokens)
    trained.settle(pair.daemon)
    trained.rpc("reload_weights", weights_path=str(tmp_path / "model"))
    assert trained.reset()
    new = trained.ask(tokens)
    assert new.tokens == oracle(trained, tokens) != old.tokens

    trained.ask(fresh)
    trained.settle(pair.daemon)
    again = trained.ask(fresh)  # the new weights have a cache of their own
    assert (again.cached, again.tokens) == (HELD, oracle(trained, fresh))
    for tiers in ((), ("cpu",)):  # nobody else is served from it, from memory or from disk
        with pair.daemon.client() as client:
            client.flush()
            if tiers:
                client.clear(tiers=tiers)
        theirs = elsewhere(pair, tokens)
        assert (theirs.cached, theirs.tokens) == (HELD, old.tokens)
    theirs = elsewhere(pair, fresh)
    assert (theirs.cached, theirs.tokens) == (0, pair.stock.ask(fresh).tokens)


def test_weights_changed_by_users_code_are_noticed(
    pair: Any, trained: Any, prompts: Callable[[int], list[int]]
) -> None:
    tokens = prompts(600)
    old = trained.ask(tokens)
    trained.settle(pair.daemon)
    trained.rpc("scale_embedding", by=-1.5)
    assert trained.reset(connector=True)
    new = trained.ask(tokens)
    assert new.tokens == oracle(trained, tokens) != old.tokens
    assert trained.rpc("fingerprint_seconds") < 1


def test_kv_of_old_weights_in_vllms_own_prefix_cache_is_not_stored_for_the_new(
    pair: Any, trained: Any, prompts: Callable[[int], list[int]]
) -> None:
    """Nobody reset it: vLLM goes on with it, and its answers are its own affair."""
    tokens = prompts(600)
    trained.ask(tokens)
    trained.settle(pair.daemon)
    trained.ask(tokens)  # vLLM holds it, too
    trained.rpc("scale_embedding", by=0.5)
    trained.ask(prompts(200))  # whose step tells
    assert trained.ask(tokens + prompts(200)).cached >= HELD
    trained.settle(pair.daemon)  # resets
    right = trained.ask(tokens)
    assert (right.cached, right.tokens) == (0, oracle(trained, tokens))
    trained.settle(pair.daemon)
    assert trained.ask(tokens).cached == HELD


# -- with what vLLM's own prefix cache holds ----------


def test_vllms_prefix_cache_serves_nothing_of_weights_that_load_inplace_replaced(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], folder: Path
) -> None:
    tokens = prompts(500)
    mine = replace(adapters["a"], name="replaced", id=70, path=str(folder))
    old, _ = both(pair, tokens, lora=mine, settle=False)
    assert both(pair, tokens, lora=mine, settle=False)[0].cached >= 384  # by vLLM's own hashes
    for source in ("b", "a", "b"):
        overwrite(folder, adapters[source].path)
        for engine in (pair.cached, pair.stock):
            assert not engine.add_lora(replace(mine, inplace=True))
        new, _ = both(pair, tokens, lora=mine, settle=False)
        assert (new.tokens == old.tokens) == (source == "a")
        # The scheduler hears of new weights with a step: the request in that step may still be hashed as the old ones.
        assert any(both(pair, tokens, lora=mine, settle=False)[0].cached >= 384 for _ in range(2))


def test_vllms_prefix_cache_serves_nothing_of_files_that_were_overwritten_and_loaded_again(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], folder: Path
) -> None:
    """The scheduler cannot know it: the worker loads them in the very step that builds on the old prefix."""
    tokens = prompts(500)
    mine = replace(adapters["a"], name="overwritten", id=71, path=str(folder))
    old, _ = both(pair, tokens, lora=mine, settle=False)
    overwrite(folder, adapters["b"].path)
    both(pair, prompts(200), lora=adapters["c"], settle=False)  # pushes the adapter out
    new, _ = both(pair, tokens, lora=mine, settle=False)
    assert new.tokens != old.tokens
    again, _ = both(pair, tokens, lora=mine, settle=False)
    assert again.tokens == new.tokens


def test_vllms_prefix_cache_serves_nothing_of_another_adapter_of_the_same_name_and_folder(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], folder: Path
) -> None:
    """What a front end does that unloads an adapter and loads the changed folder: another id."""
    tokens = prompts(500)
    mine = replace(adapters["a"], name="again", id=72, path=str(folder))
    old, _ = both(pair, tokens, lora=mine, settle=False)
    overwrite(folder, adapters["b"].path)
    new, _ = both(pair, tokens, lora=replace(mine, id=73), settle=False)
    assert new.tokens != old.tokens
    assert both(pair, tokens, lora=replace(mine, id=73), settle=False)[0].cached >= 384


def test_a_request_that_runs_while_its_adapter_is_replaced_leaves_nothing_behind(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], folder: Path
) -> None:
    tokens = prompts(500)
    mine = replace(adapters["a"], name="running", id=74, path=str(folder))
    running = pair.cached.start(tokens, lora=mine, max_tokens=400)
    while not pair.cached.ask(prompts(20), lora=mine).tokens:  # it is under way
        pass
    overwrite(folder, adapters["b"].path)
    for engine in (pair.cached, pair.stock):
        assert not engine.add_lora(replace(mine, inplace=True))
    both(pair, tokens, lora=mine, settle=False)
    assert len(pair.cached.result(running).tokens) == 400
    both(pair, tokens, lora=mine, settle=False)
    pair.cached.settle(pair.daemon)
    both(pair, tokens, lora=mine, settle=False)


def test_an_adapter_that_every_request_loads_in_place_is_answered_by_its_files_of_now(
    pair: Any, prompts: Callable[[int], list[int]], adapters: dict[str, Any], folder: Path
) -> None:
    tokens = prompts(500)
    mine = replace(adapters["a"], name="every", id=75, path=str(folder), inplace=True)
    for source in ("a", "b", "a"):
        overwrite(folder, adapters[source].path)
        for _ in range(2):
            both(pair, tokens, lora=mine, settle=False)
