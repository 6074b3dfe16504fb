# SPDX-License-Identifier: Apache-2.0
"""Whose weights: KV is keyed by the content that an engine serves under an adapter's id, whoever learns of it first."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from vllm.lora import worker_manager
from vllm.lora.request import LoRARequest

from loracache.connectors.vllm.common.messages import Prefix
from loracache.connectors.vllm.scheduler.adapters import ServedAdapters
from loracache.connectors.vllm.worker.adapters import LoadedAdapters

X, Y = "a" * 64, "b" * 64


class Daemon:
    """Answers digests by path, when told to."""

    def __init__(self) -> None:
        self.digests: dict[str, str | None] = {}
        self.answers = self.connected = True
        self.asked: list[str] = []

    def ask(self, path: str) -> int | None:
        if not self.connected:
            return None
        self.asked.append(path)
        return len(self.asked)

    def answer(self, number: int) -> tuple[bool, str | None]:
        return (True, self.digests[self.asked[number - 1]]) if self.answers else (False, None)


@pytest.fixture
def source() -> Daemon:
    return Daemon()


@pytest.fixture
def served(source: Daemon) -> ServedAdapters:
    return ServedAdapters(source.ask, source.answer, lambda number: None)


def request(path: Path | str, number: int = 1, name: str = "one") -> LoRARequest:
    return LoRARequest(name, number, str(path))


def test_an_id_is_bound_to_what_it_was_first_seen_with(source: Daemon, served: ServedAdapters, tmp_path: Path) -> None:
    source.digests[str(tmp_path)] = X
    assert served.digest(request(tmp_path)) == (True, X)
    source.digests[str(tmp_path)] = Y
    assert served.digest(request(tmp_path)) == (True, X)
    assert served.digest(request(tmp_path.parent)) == (True, X)  # vLLM serves the first path's weights, too
    assert source.asked == [str(tmp_path)]
    assert served.serves(1, X)
    assert not served.serves(1, Y)
    assert not served.serves(2, X)


def test_a_late_answer_is_asked_for_once(source: Daemon, served: ServedAdapters, tmp_path: Path) -> None:
    source.digests[str(tmp_path)] = X
    source.answers = False
    assert [served.digest(request(tmp_path)) for _ in range(5)] == [(False, None)] * 5
    source.answers = True
    assert served.digest(request(tmp_path)) == (True, X)
    assert len(source.asked) == 1


def test_a_question_that_failed_is_asked_again(source: Daemon, served: ServedAdapters, tmp_path: Path) -> None:
    source.digests[str(tmp_path)] = None
    assert served.digest(request(tmp_path)) == (False, None)
    source.connected = False
    assert served.digest(request(tmp_path)) == (False, None)
    source.connected = True
    source.digests[str(tmp_path)] = X
    assert served.digest(request(tmp_path)) == (True, X)


def test_what_has_no_folder_has_no_digest(source: Daemon, served: ServedAdapters) -> None:
    assert [served.digest(request("hub/name")) for _ in range(2)] == [(True, None)] * 2
    assert not source.asked
    assert not served.serves(1, X)


def test_the_workers_word_wins(source: Daemon, served: ServedAdapters, tmp_path: Path) -> None:
    source.digests[str(tmp_path)] = X
    served.digest(request(tmp_path))
    served.correct(1, Y)
    assert served.digest(request(tmp_path)) == (True, Y)
    served.correct(1, "")
    assert served.digest(request(tmp_path)) == (True, None)


def test_a_worker_that_answers_before_the_daemon_is_believed(
    source: Daemon, served: ServedAdapters, tmp_path: Path
) -> None:
    source.digests[str(tmp_path)] = X
    source.answers = False
    served.digest(request(tmp_path))
    served.correct(1, Y)
    source.answers = True
    assert served.digest(request(tmp_path)) == (True, Y)


@pytest.mark.parametrize("daemon_is_late", [False, True])
def test_another_id_of_the_same_name_is_asked_for_anew(
    source: Daemon, served: ServedAdapters, tmp_path: Path, daemon_is_late: bool
) -> None:
    source.digests[str(tmp_path)] = X
    served.digest(request(tmp_path, 1))
    source.digests[str(tmp_path)] = Y
    if daemon_is_late:
        source.answers = False
        served.digest(request(tmp_path, 2))
        served.correct(2, Y)
    assert served.digest(request(tmp_path, 2)) == (True, Y)
    assert served.digest(request(tmp_path, 1)) == (True, X)


def test_load_inplace_asks_anew(source: Daemon, served: ServedAdapters, tmp_path: Path) -> None:
    source.digests[str(tmp_path)] = X
    served.digest(request(tmp_path))
    source.digests[str(tmp_path)] = Y
    served.renew(request(tmp_path))
    assert not served.serves(1, X)
    assert served.digest(request(tmp_path)) == (True, Y)


# -- the worker ----------


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's hooked loader; `during` runs while it reads the files."""
    state = SimpleNamespace(during=lambda: None, changed=[])
    cls = worker_manager.LRUCacheWorkerLoRAManager
    monkeypatch.setattr(cls, "_load_adapter", lambda manager, lora_request: state.during() or "model")
    state.adapters = LoadedAdapters(state.changed.append)
    state.adapters.install()
    state.load = lambda wanted: cls._load_adapter(object(), wanted)
    return state


def write(folder: Path, value: float) -> Path:
    """A PEFT folder, its times long ago so that its digest is remembered."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    save_file({"lora_A": np.full((2, 2), value, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_what_was_loaded_is_known_and_news_once(loader: Any, tmp_path: Path) -> None:
    assert loader.adapters.digest(1) is None
    assert loader.load(request(write(tmp_path / "x", 1), 1)) == "model"
    loaded = loader.adapters.digest(1)
    assert len(loaded) == 64
    assert loader.adapters.take_news() == ({1: loaded}, {1: 1})
    assert loader.adapters.take_news() == ({}, {})
    assert loader.changed == [1]
    loader.load(request(tmp_path / "x", 1))  # evicted and loaded again: the same
    assert loader.changed == [1]
    assert loader.adapters.take_news() == ({1: loaded}, {1: 1})


def test_files_that_change_while_they_are_loaded_are_unknown_content(loader: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", 1)
    loader.during = lambda: write(folder, 2)
    loader.load(request(folder))
    assert loader.adapters.digest(1) == ""
    assert loader.adapters.take_news() == ({1: ""}, {1: 1})


@pytest.mark.parametrize("path", ["hub/name", "empty folder"])
def test_what_cannot_be_hashed_is_unknown_and_loads_all_the_same(loader: Any, tmp_path: Path, path: str) -> None:
    if path == "empty folder":
        path = str(tmp_path)
    assert loader.load(request(path)) == "model"
    assert loader.adapters.digest(1) == ""


def test_a_failed_load_confirms_nothing(loader: Any, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no such rank")

    loader.during = fail
    with pytest.raises(ValueError, match="no such rank"):
        loader.load(request(write(tmp_path / "x", 1)))
    assert loader.adapters.digest(1) is None


def test_only_requests_that_began_after_a_change_were_computed_with_it(loader: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", 1)
    loader.load(request(folder))
    first = loader.adapters.digest(1)
    assert loader.adapters.computed_with(1, first, 1)
    assert not loader.adapters.computed_with(2, first, 1)
    loader.adapters.step = 7
    os.unlink(folder / "adapter_model.safetensors")
    loader.load(request(write(folder, 2)))
    second = loader.adapters.digest(1)
    assert second != first
    assert [loader.adapters.computed_with(1, second, step) for step in (1, 7, 8)] == [False, False, True]
    assert not loader.adapters.computed_with(1, first, 8)
    assert loader.changed == [1, 1]


def test_contents_of_an_id_are_numbered_and_blocks_of_another_number_are_stale(loader: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", 1)
    prefixes = [Prefix(1, number, (10 * number, 10 * number + 1)) for number in range(4)]
    assert loader.adapters.stale_blocks(prefixes[:2]) == set()  # nothing is loaded: it will be the first
    loader.load(request(folder))
    loader.load(request(folder))
    assert loader.adapters.take_news()[1] == {1: 1}
    assert loader.adapters.stale_blocks(prefixes) == {20, 21, 30, 31}
    loader.load(request(write(folder, 2)))
    assert loader.adapters.take_news()[1] == {1: 2}
    assert loader.adapters.stale_blocks(prefixes) == {0, 1, 10, 11, 30, 31}
    loader.load(request(write(folder, 1)))  # what it was before is another number: requests ran in between
    assert loader.adapters.take_news()[1] == {1: 3}
    loader.load(request(write(tmp_path / "y", 1), 2))
    assert loader.adapters.take_news()[1] == {2: 1}


def test_what_began_upon_stale_blocks_was_not_computed_with_the_new_content(loader: Any, tmp_path: Path) -> None:
    """Loaded in place between steps 6 and 7; in step 7 a request begins that was hashed before anybody knew."""
    folder = write(tmp_path / "x", 1)
    loader.load(request(folder))
    loader.adapters.step = 6
    loader.load(request(write(folder, 2)))
    second = loader.adapters.digest(1)
    loader.adapters.step = 7
    assert loader.adapters.stale_blocks([Prefix(2, 1, (5,))]) == set()
    assert loader.adapters.computed_with(1, second, 7)
    assert loader.adapters.stale_blocks([Prefix(1, 1, (8, 9))]) == {8, 9}
    assert [loader.adapters.computed_with(1, second, step) for step in (7, 8)] == [False, True]


def test_each_load_of_unknown_content_is_another_content(loader: Any) -> None:
    for number in (1, 2, 3):
        loader.load(request("hub/name"))
        assert loader.adapters.take_news() == ({1: ""}, {1: number})
