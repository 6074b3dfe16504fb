# SPDX-License-Identifier: Apache-2.0
"""Layers that share another's KV, images and videos, and KV of several dtypes, where a model has windows. Every step of
these engines looks at every byte that it reads (exact_model.py); the hash of a token is there of the images before it,
too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.connector.hybrid.test_exact import settle

_numbers = itertools.count()
KINDS = ["full, window", "window", "full, span", "full, window, state"]
LAYER = "model.layers.{}.attn"


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB")


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    source = random.Random(f"seen {next(_numbers)}")
    text = [source.randrange(32000) for _ in range(1000)]
    return lambda length: text[:length]


def image(value: int, at: int, *, identifier: str = "") -> Any:
    """One of eight tokens, of which `value` is the content."""
    return item("image", [value], at, identifier or f"image-{value}")


def item(modality: str, frames: list[int], at: int, identifier: str) -> Any:
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    pixels = MultiModalFieldElem(data=torch.tensor(frames), field=MultiModalBatchedField())
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem({"pixels": pixels}),
        modality=modality,
        identifier=identifier,
        mm_position=PlaceholderRange(offset=at, length=8),
    )


def with_image(tokens: list[int], at: int) -> list[int]:
    return [*tokens[:at], *[31999] * 8, *tokens[at + 8 :]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_what_it_shows_and_where_in_every_group(
    kind: str, make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(kind, serving.url, sees=True)
    tokens = with_image(prompt(250), 70)
    assert engine.answer(tokens, media=[image(1, 70)]) == 0
    settle(engine, serving)
    assert engine.answer(tokens, media=[image(1, 70, identifier="another-name")]) == 224
    engine.forget()
    before = 64  # the image is in the chunk from there
    for others in ([image(2, 70)], [image(1, 69)], [], [image(1, 70), image(2, 100)]):
        # The first steps left no state behind token 96.
        reach = 96 if len(others) == 2 and "state" not in kind else before
        assert engine.answer(tokens, media=others) == reach, others
        settle(engine, serving)
    assert engine.answer(tokens, media=[image(1, 70)]) == 224


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_its_frames_in_their_order_and_where_they_are(
    kind: str, make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(kind, serving.url, sees=True)
    tokens = with_image(prompt(250), 70)

    def video(frames: list[int], at: int, identifier: str) -> list[Any]:
        return [item("video", frames, at, identifier)]

    assert engine.answer(tokens, media=video([5, 6, 7], 70, "first")) == 0
    settle(engine, serving)
    assert engine.answer(tokens, media=video([5, 6, 7], 70, "a name of its caller's")) == 224
    engine.forget()
    others = video([7, 6, 5], 70, "back"), video([5, 6], 70, "short"), video([5, 6, 7], 69, "first")
    for media in (*others, [item("image", [5, 6, 7], 70, "still")]):
        assert engine.answer(tokens, media=media) == 64, media  # what is before it
        settle(engine, serving)
    assert engine.answer(tokens, media=video([5, 6, 7], 70, "first")) == 224


@pytest.mark.parametrize("kind", KINDS[:2])
def test_an_image_that_the_window_has_left_still_tells_prompts_apart(
    kind: str, make_engine: Any, serving: Any, prompt: Any
) -> None:
    engine = make_engine(kind, serving.url, sees=True, step_tokens=37)
    tokens = with_image(prompt(300), 10)
    for value in (1, 2):
        assert engine.answer(tokens, media=[image(value, 10)]) == 0
        settle(engine, serving)
    for value in (1, 2):
        assert engine.answer(tokens, media=[image(value, 10)]) == 288
        engine.forget()


@pytest.mark.parametrize("kind", ["full, window", "window", "two dtypes and numbers of heads, windows"])
def test_layers_that_share_anothers_kv_change_nothing(kind: str, make_engine: Any, serving: Any, prompt: Any) -> None:
    """Gemma 3n: they are registered under names of their own, with the tensors of those that own them."""
    shares = {LAYER.format(9): LAYER.format(1), LAYER.format(10): LAYER.format(0), LAYER.format(11): LAYER.format(1)}
    plain = make_engine(kind, serving.url)
    sharing = make_engine(kind, serving.url, shares=shares)
    assert sharing.shards == plain.shards
    used = []
    for engine, tokens in ((plain, prompt(250)[::-1]), (sharing, prompt(250))):
        before = serving.status()["tiers"]["cpu"]["used_bytes"]
        assert engine.answer(tokens) == 0
        settle(engine, serving)
        used.append(serving.status()["tiers"]["cpu"]["used_bytes"] - before)
    assert used[0] == used[1]
    assert sharing.answer(prompt(250)) == 224
    assert plain.answer(prompt(250)) == 224


def test_kv_of_another_dtype_is_nobody_elses(make_engine: Any, serving: Any, prompt: Any) -> None:
    """fp8 of two kinds has the same bytes a token, which mean other numbers."""
    kind = "fp8: full, window"
    for kv_dtype in ("fp8_e4m3", "fp8_e5m2"):
        engine = make_engine(kind, serving.url, kv_dtype=kv_dtype)
        assert engine.answer(prompt(250)) == 0
        settle(engine, serving)
    same = make_engine(kind, serving.url, kv_dtype="fp8")
    assert same.answer(prompt(250)) == 224
