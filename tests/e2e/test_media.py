"""Media in prompts: equal placeholders stand for different audio, and vLLM's names for audio are no content."""

from __future__ import annotations

import itertools
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
    """hearing(**arguments) starts an engine of the model on one daemon. Without a processor cache and a prefix cache of
    vLLM's it calls audio by a counter."""
    daemon = module_daemon(memory="64MiB")
    started = []

    def start(**arguments: Any) -> Any:
        engine = engine_factory({"server": daemon.url}, model=str(model.folder), enable_lora=False, **arguments)
        started.append(engine)
        engine.daemon = daemon
        return engine

    yield start
    for engine in started:
        engine.close()


def test_audio_is_known_by_its_content_in_every_configuration(
    hearing: Callable[..., Any], model: Any, prompts: Callable[[int], list[int]]
) -> None:
    tokens = prompts(BEFORE) + model.placeholder + prompts(AFTER)
    salts = map(str, itertools.count())

    def ask(engine: Any, audio: int, **options: Any) -> Any:
        answer = engine.ask(tokens, audio=audio, **options)
        engine.settle(engine.daemon)
        return answer

    counting = hearing(mm_processor_cache_gb=0)
    cold = {audio: ask(counting, audio, salt=next(salts)).tokens for audio in (1, 2, 3)}
    assert cold[1] != cold[2] != cold[3]
    assert [ask(counting, audio).cached for audio in (1, 2)] == [0, 128]  # what is before the audio
    for audio in (1, 2, 1):
        again = ask(counting, audio)
        assert again.tokens == cold[audio]
        assert again.cached == 512
    # vLLM keeps what it heard under a name: called alike, the second audio is heard as the first. That is stored for
    # neither, and whoever asks without a name is answered right.
    ask(counting, 1, uuid="same")
    ask(counting, 3, uuid="same")
    assert ask(counting, 3).tokens == cold[3]
    counting.close()

    hashing = hearing(enable_prefix_caching=True)
    for audio in (2, 1):
        shared = ask(hashing, audio)
        assert shared.tokens == cold[audio]
        assert shared.cached == 512  # the other engine's: a content has one name on both
    assert ask(hashing, 3, uuid="named").tokens == cold[3]
    assert ask(hashing, 3, uuid="otherwise").cached == 512
