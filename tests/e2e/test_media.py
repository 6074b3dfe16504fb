# SPDX-License-Identifier: Apache-2.0
"""Media in prompts: equal placeholders stand for different audio, and vLLM's names for audio are not content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

BEFORE, AFTER = 200, 300  # tokens around the audio: a chunk before it, and two after


@pytest.fixture(scope="module")
def model(audio_model: Any, model_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("audio")
    audio_model.make_audio_model(folder, model_maker)
    return SimpleNamespace(folder=folder, placeholder=[audio_model.BOS, audio_model.AUDIO, audio_model.EOS])


@pytest.fixture(scope="module")
def hearing(module_daemon: Any, engine_factory: Any, model: Any) -> Iterator[Callable[..., Any]]:
    """hearing(**arguments) starts an engine of the model on one daemon, after the end of the one before."""
    daemon = module_daemon(memory="64MiB")
    started: list[Any] = []

    def start(**arguments: Any) -> Any:
        for before in started:
            before.close()
        engine = engine_factory({"server": daemon.url}, model=str(model.folder), enable_lora=False, **arguments)
        started.append(engine)
        engine.daemon = daemon
        return engine

    yield start
    for engine in started:
        engine.close()


def ask(engine: Any, tokens: list[int], audio: int, **options: Any) -> Any:
    answer = engine.ask(tokens, audio=audio, **options)
    engine.settle(engine.daemon)
    return answer


@pytest.fixture(scope="module")
def heard(hearing: Callable[..., Any], model: Any, prompts: Callable[[int], list[int]]) -> SimpleNamespace:
    """An engine that calls audio by a counter, for it has neither a processor cache nor a prefix cache of vLLM's. Its
    first two requests were audio 1 and 2 in one prompt (`hits` are theirs), the next ones the same again (`again`).
    cold: the answers to audio 1, 2 and 3 without a cache.
    """
    tokens = prompts(BEFORE) + model.placeholder + prompts(AFTER)
    engine = hearing(mm_processor_cache_gb=0)
    hits = [ask(engine, tokens, audio).cached for audio in (1, 2)]
    again = {audio: ask(engine, tokens, audio) for audio in (1, 2)}
    cold = {audio: ask(engine, tokens, audio, salt=f"only {audio}").tokens for audio in (1, 2, 3)}
    assert cold[1] != cold[2] != cold[3]
    # vLLM keeps what it heard under a name: called alike, the second audio is heard as the first.
    for audio in (1, 3):
        ask(engine, tokens, audio, uuid="same")
    return SimpleNamespace(engine=engine, tokens=tokens, hits=hits, again=again, cold=cold)


def test_audio_is_known_by_its_content_where_vllm_calls_it_by_a_counter(heard: Any) -> None:
    assert heard.hits == [0, 128]  # what is before the audio
    for audio, again in heard.again.items():
        assert (again.cached, again.tokens) == (512, heard.cold[audio])
    assert ask(heard.engine, heard.tokens, 3).tokens == heard.cold[3]  # what was called "same" is stored for neither


def test_a_counter_that_starts_again_takes_no_audio_for_another(hearing: Callable[..., Any], heard: Any) -> None:
    restarted = hearing(mm_processor_cache_gb=0)
    for audio in (2, 1):  # counted as the other one was before
        again = ask(restarted, heard.tokens, audio)
        assert (again.cached, again.tokens) == (512, heard.cold[audio])


def test_audio_is_known_by_its_content_whatever_its_caller_calls_it(hearing: Callable[..., Any], heard: Any) -> None:
    hashing = hearing(enable_prefix_caching=True)
    for audio, uuid in ((2, "same"), (1, ""), (2, "")):  # "same" was another audio in the engine before
        shared = ask(hashing, heard.tokens, audio, uuid=uuid)
        assert shared.tokens == heard.cold[audio]
        assert shared.cached == 512  # a content has one name on all engines
    assert ask(hashing, heard.tokens, 3, uuid="named").tokens == heard.cold[3]
    assert ask(hashing, heard.tokens, 3, uuid="otherwise").cached == 512
