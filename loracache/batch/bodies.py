# SPDX-License-Identifier: Apache-2.0
"""What a request's body says that a plan wants to know: whose KV it may share, how long its answer may be, its text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from loracache.batch.lines import Line
from loracache.batch.servers import TEMPLATED, chat_question
from loracache.keys import TokenArray

__all__ = [
    "adapter_of",
    "answer_limit",
    "answers",
    "begins_with_its_text",
    "given_tokens",
    "question",
    "salt_of",
    "text_tokens",
]

_TEXT_BYTES = 4  # of text that stand for a token where nobody tokenizes
_MOST_ANSWERS, _MOST_TOKENS = 1 << 16, 1 << 24  # more is the server's to refuse; a plan's sums fit 64 bits


def adapter_of(line: Line) -> str:
    """The served name it asks for: the base model's, or an adapter's."""
    return str(line.body.get("model") or "")


def salt_of(line: Line) -> str:
    """The tenant's cache_salt, "" for none."""
    return str(line.body.get("cache_salt") or "")


def answers(line: Line) -> int:
    """How many answers it asks for: `n` to each of its prompts."""
    count, prompt = line.body.get("n", 1), line.body.get("prompt")
    several = isinstance(prompt, list) and all(isinstance(each, str | list) for each in prompt)
    prompts = max(len(prompt), 1) if isinstance(prompt, list) and several else 1
    return min((count if type(count) is int and count > 0 else 1) * prompts, _MOST_ANSWERS)


def answer_limit(line: Line) -> int | None:
    """Most tokens of one answer; None where it does not say."""
    if line.path == "/v1/embeddings":
        return 0
    for name in ("max_completion_tokens", "max_tokens"):
        limit = line.body.get(name)
        if type(limit) is int and limit >= 0:
            return min(limit, _MOST_TOKENS)
    return None if line.path == "/v1/chat/completions" else 16  # a completion's default, OpenAI's and vLLM's


def given_tokens(line: Line) -> list[int] | None:
    """The prompt's token ids, where the body has them; None where it has text."""
    prompt = line.body.get("prompt" if line.path == "/v1/completions" else "input")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        return prompt
    return None


def question(line: Line) -> dict[str, Any] | None:
    """What to ask a server's /tokenize; None where it has no one prompt of text. An image is tokenized as its
    placeholder, and what follows it counts as shared, though it may not be."""
    body = line.body
    model = {"model": body["model"]} if body.get("model") else {}
    if line.path == "/v1/chat/completions":
        return model | chat_question(body) if body.get("messages") else None
    prompt = body.get("prompt" if line.path == "/v1/completions" else "input")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    special = {"add_special_tokens": body.get("add_special_tokens", True)}
    return model | special | {"prompt": prompt} if isinstance(prompt, str) and prompt else None


def begins_with_its_text(line: Line) -> bool:
    """Whether a prompt begins with the text of its messages, or of its prompt, behind what all have in common. What
    else a chat template is given may stand before that, or behind."""
    return not set(line.body) & set(TEMPLATED)


def text_tokens(line: Line) -> TokenArray:
    """The prompt's text as if every four bytes of it were a token: equal beginnings stay equal."""
    body = line.body
    ordered = {name: body[name] for name in ("tools", "messages", "prompt", "input") if name in body}
    text = json.dumps(ordered, ensure_ascii=False).encode(errors="surrogatepass")
    whole = len(text) // _TEXT_BYTES * _TEXT_BYTES
    return np.frombuffer(text[:whole], "<i4")
