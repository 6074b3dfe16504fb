"""KV belongs to the weights the engine really serves: the same story told to an engine with the cache and to a stock
one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pair(module_daemon: Any, engine_factory: Any) -> Iterator[SimpleNamespace]:
    """Two engines that hold one adapter at a time, so that a second one pushes the first out. The one with the cache
    has vLLM's own prefix cache too; the stock one must not, because that serves KV of weights that were replaced.
    """
    daemon = module_daemon(memory="256MiB")
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
        assert both(pair, tokens, lora=mine, settle=False)[0].cached >= 384


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
