# SPDX-License-Identifier: Apache-2.0
"""Which prompts of a batch an engine tokenizes, and what a plan makes of the others."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loracache.batch.lines import BatchFile, Line
from loracache.batch.servers import chat_question
from loracache.batch.tokenizing import _SAMPLED, Tokenizing, much_alike
from loracache.keys import TokenArray
from tests.unit.batch.openai_fake import request, write

BLOCK = 16
LONG = "x" * 200
OWN = 3 * _SAMPLED
"""Lines that begin like no other, before those of a test."""


def chat(number: int, text: str, **more: Any) -> dict[str, Any]:
    body = {"model": "base", "messages": [{"role": "user", "content": text}]}
    return {"custom_id": f"id-{number}", "url": "/v1/chat/completions", "body": body | more}


def own(number: int) -> dict[str, Any]:
    return chat(-1 - number, f"{number:04} begins like no other" + " here" * (number % 32))


def true_length(text: str) -> int:
    """In tokens, of a template's own and one for three bytes."""
    return 20 + len(text) // 3


def tokenized(folder: Path, lines: list[dict[str, Any]], without: tuple[int, ...] = ()) -> tuple[set[int], Any]:
    """(the lines of `lines` that the engine tokenizes, behind OWN others; the tokens of each)"""
    asked: set[int] = set()

    async def tokens_of(line: Line) -> TokenArray:
        asked.add(line.number - OWN)
        await asyncio.sleep(0.001 if line.number % 2 else 0)
        return np.arange(true_length(line.body["messages"][0]["content"]), dtype=np.int32)

    async def all_tokens(file: BatchFile) -> list[TokenArray]:
        tokenizing = Tokenizing(file, lambda number: number - OWN not in without, BLOCK, tokens_of)
        wanted = [line for line in file.lines() if isinstance(line, Line) and line.number - OWN not in without]
        return await asyncio.gather(*[tokenizing.tokens(line) for line in wanted])

    source = write(folder / "in.jsonl", [own(number) for number in range(OWN)] + lines)
    file = BatchFile(str(source))
    try:
        tokens = asyncio.run(all_tokens(file))
    finally:
        file.close()
    return {number for number in asked if number > 0}, tokens


def test_prompts_that_begin_alike_are_tokenized_and_others_are_not(tmp_path: Path) -> None:
    lines = [chat(0, LONG + " a"), chat(1, "another"), chat(2, LONG + " b"), chat(3, "b" + LONG)]
    assert tokenized(tmp_path, lines)[0] == {1, 3}


@pytest.mark.parametrize("apart", [{"model": "other"}, {"cache_salt": "tenant"}])
def test_adapters_and_tenants_share_nothing(tmp_path: Path, apart: dict[str, str]) -> None:
    assert tokenized(tmp_path, [chat(0, LONG), chat(1, LONG, **apart)])[0] == set()


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"chat_template_kwargs": {"persona": "p"}},
        {"documents": [{"text": LONG}]},
        {"reasoning_effort": "low"},
    ],
)
def test_what_a_template_may_put_before_the_text_is_always_tokenized(tmp_path: Path, more: dict[str, Any]) -> None:
    assert tokenized(tmp_path, [chat(0, "a", **more), chat(1, "b", **more), chat(2, "c")])[0] == {1, 2}


def test_lines_that_are_answered_are_nobodys_beginning(tmp_path: Path) -> None:
    assert tokenized(tmp_path, [chat(0, LONG), chat(1, LONG)], without=(1,))[0] == set()


def test_lengths_are_estimated_by_those_that_are_tokenized(tmp_path: Path) -> None:
    texts = [f"{number:04} " + "word " * (number % 40) for number in range(200)]
    asked, tokens = tokenized(tmp_path, [chat(number, text) for number, text in enumerate(texts)])
    assert asked == set()
    for text, found in zip(texts, tokens[OWN:], strict=True):
        assert abs(len(found) - true_length(text)) <= 3


def test_an_engine_that_refuses_ends_all_of_them(tmp_path: Path) -> None:
    async def tokens_of(line: Line) -> TokenArray:
        raise ConnectionError("gone")

    async def main_task(file: BatchFile) -> None:
        tokenizing = Tokenizing(file, lambda number: True, BLOCK, tokens_of)
        await asyncio.gather(*[tokenizing.tokens(line) for line in file.lines() if isinstance(line, Line)])

    file = BatchFile(str(write(tmp_path / "in.jsonl", [own(number) for number in range(OWN)])))
    with pytest.raises(ConnectionError):
        asyncio.run(main_task(file))
    file.close()


def test_tokenize_is_asked_for_all_that_a_template_is_given() -> None:
    """vLLM adds `documents` and `reasoning_effort` of a request to what its chat template gets; its /tokenize does
    not."""
    messages = [{"role": "user", "content": "a"}]
    body = {"messages": messages, "temperature": 0, "chat_template_kwargs": {"a": 1}}
    assert chat_question(body) == {"messages": messages, "chat_template_kwargs": {"a": 1}}
    found = chat_question(body | {"documents": [{"text": "t"}], "reasoning_effort": "none"})
    assert found["chat_template_kwargs"] == {
        "a": 1,
        "documents": [{"text": "t"}],
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
    told = body | {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
    assert chat_question(told)["chat_template_kwargs"] == {"reasoning_effort": "low", "enable_thinking": False}
    assert chat_question(body | {"documents": [{}], "chat_template_kwargs": "odd"})["chat_template_kwargs"] == "odd"


@pytest.mark.parametrize(
    ("lines", "alike"),
    [
        ([], False),
        ([chat(0, LONG)], False),
        ([chat(0, LONG), chat(1, LONG)], True),
        ([chat(0, LONG), chat(1, LONG, model="other")], False),
        ([chat(number, f"{number // 2:04} {'own' * 9} " * 99) for number in range(2)], True),
        (
            [chat(2 * OWN + number, f"{number:04} " * 99) for number in range(200)] + [chat(0, LONG), chat(1, LONG)],
            False,
        ),
        ([request(0, prompt=[1, 2, 3] * 40)], True),  # nobody has looked
        ([chat(0, LONG, tools=[{}])], True),
        (["no JSON"], False),
    ],
)
def test_whether_enough_of_a_batch_may_share(tmp_path: Path, lines: list[Any], alike: bool) -> None:
    source = write(tmp_path / "in.jsonl", [own(number) for number in range(OWN)] + lines)
    with contextlib.closing(BatchFile(str(source))) as file:
        assert much_alike(file, lambda number: True, BLOCK) == alike
        assert not much_alike(file, lambda number: number <= OWN, BLOCK)
