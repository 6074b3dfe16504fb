# SPDX-License-Identifier: Apache-2.0
"""What every client of an OpenAI server has to know: which addresses and keys are right, what vLLM's /tokenize is asked
and what it answers.

Needs nothing but the standard library: the command line, which asks engines too, has to start fast.
"""

from __future__ import annotations

import urllib.parse
from typing import Any

from loracache.errors import ConfigError, ProtocolError

__all__ = ["TEMPLATED", "base_url", "chat_question", "checked_key", "token_ids"]

_CHAT = (
    "messages", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "add_special_tokens", "media_io_kwargs", "mm_processor_kwargs",
)  # fmt: skip
_OF_TEMPLATES = ("documents", "reasoning_effort")  # which /tokenize takes among chat_template_kwargs alone
TEMPLATED = ("tools", "chat_template", "chat_template_kwargs", *_OF_TEMPLATES)
"""What a chat template is given besides the messages."""


def base_url(url: str, option: str, *, sockets: bool = False) -> str:
    """`url`, http://HOST:PORT or https://HOST:PORT, with or without /v1 behind, as what stands before /v1. sockets:
    unix:///PATH, too. Raises ConfigError that names `option`, where it came from."""
    if "@" in url:  # and nobody gets to see it
        raise ConfigError(f"{option} has a user or a password in it; set VLLM_API_KEY or give --engine-key-file")
    base = url.rstrip("/").removesuffix("/v1")
    try:
        parts = urllib.parse.urlsplit(base)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        right = right or (sockets and parts.scheme == "unix" and bool(parts.path))
    except ValueError:
        right = False
    if not right or not url.isascii() or not url.isprintable() or set(url) & set(" ?#"):
        raise ConfigError(f"{option} {url[:200]!r} is not an address of a server; write it like http://127.0.0.1:8000")
    return base


def checked_key(key: str) -> str:
    """An API key that can be sent. Raises ConfigError."""
    if not key.isascii() or not key.isprintable():
        raise ConfigError("the engine's API key is not one line of ASCII; see VLLM_API_KEY and --engine-key-file")
    return key


def chat_question(body: dict[str, Any]) -> dict[str, Any]:
    """What /tokenize takes of a chat request's body."""
    asked = {name: body[name] for name in _CHAT if name in body}
    given = body.get("chat_template_kwargs") or {}
    more = {name: body[name] for name in _OF_TEMPLATES if body.get(name) is not None}
    if more and isinstance(given, dict):
        if "reasoning_effort" in more:
            more["enable_thinking"] = given.get("enable_thinking", more["reasoning_effort"] != "none")
        asked["chat_template_kwargs"] = given | more
    return asked


def token_ids(answer: object, url: str) -> list[int]:
    """Of an answer of /tokenize. Raises ProtocolError."""
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not all(map(_is_token, tokens)):
        wrong = next(each for each in tokens if not _is_token(each)) if isinstance(tokens, list) else tokens
        raise ProtocolError(f"{url}/tokenize answered no list of token ids: {wrong!r:.40}; is it a vLLM server?")
    return tokens


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31
