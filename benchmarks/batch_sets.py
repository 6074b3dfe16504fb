# SPDX-License-Identifier: Apache-2.0
"""Four batches as offline jobs have them, as token ids, each in the order of its file. Same seed, same batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK",
    "Item",
    "agents",
    "conversations",
    "documents",
    "few_shot",
    "from_trace",
    "hash_ids_of",
    "large",
    "strangers",
    "tokens_of",
]

Item: TypeAlias = tuple[npt.NDArray[np.int32], int]
"""(a prompt's token ids, how many its answer has)"""
BLOCK = 512  # tokens of one hash id of Mooncake's traces
_VOCABULARY = 128_000


def documents(
    count: int = 100, questions: int = 20, tokens: int = 4000, seed: int = 0, *, question: int = 50
) -> list[Item]:
    """Long documents with many questions each, in the order somebody thought of them."""
    random = np.random.default_rng(seed)
    found: list[Item] = []
    for _ in range(count):
        document = _text(random, tokens)
        found += [(np.concatenate([document, _text(random, question)]), 100) for _ in range(questions)]
    return _shuffled(found, random)


def few_shot(
    tasks: int = 60,
    questions: int = 50,
    tokens: int = 1500,
    seed: int = 0,
    *,
    question: tuple[int, int] = (30, 130),
) -> list[Item]:
    """An evaluation: tasks with examples in front of each question, shuffled."""
    random = np.random.default_rng(seed)
    instruction = _text(random, 100)
    found: list[Item] = []
    for _ in range(tasks):
        shots = np.concatenate([instruction, _text(random, tokens)])
        found += [
            (np.concatenate([shots, _text(random, int(random.integers(*question)))]), int(random.integers(1, 20)))
            for _ in range(questions)
        ]
    return _shuffled(found, random)


def agents(
    tasks: int = 40,
    branches: int = 3,
    turns: int = 4,
    seed: int = 0,
    *,
    tools: int = 1200,
    task: int = 600,
    turn: int = 250,
) -> list[Item]:
    """Agents that share their tools' descriptions and try several ways on from each turn: every turn is a request, and
    the file has them as they came, all agents side by side."""
    random = np.random.default_rng(seed)
    described = _text(random, tools)
    level = [np.concatenate([described, _text(random, task)]) for _ in range(tasks)]
    found: list[Item] = []
    for number in range(turns):
        came = [(each, 150) for each in level]
        found += _shuffled(came, random)
        wide = branches if number + 1 < turns else 0
        level = [np.concatenate([each, _text(random, turn)]) for each in level for _ in range(wide)]
    return found


def conversations(
    sessions: int = 400, turns: int = 6, seed: int = 0, *, prompt: int = 700, turn: tuple[int, int] = (50, 600)
) -> list[Item]:
    """Chats whose turns come one after another while others go on, a few of them below one system prompt."""
    random = np.random.default_rng(seed)
    prompts = [_text(random, prompt) for _ in range(8)]
    opened = [prompts[int(random.integers(8))] for _ in range(sessions)]
    found: list[Item] = []
    for _ in range(turns):
        opened = [np.concatenate([each, _text(random, int(random.integers(*turn)))]) for each in opened]
        found += _shuffled([(each, int(random.integers(20, 300))) for each in opened], random)
    return found


def strangers(count: int = 2000, tokens: int = 400, seed: int = 0) -> list[Item]:
    """Prompts that share nothing."""
    random = np.random.default_rng(seed)
    return [(_text(random, tokens), 100) for _ in range(count)]


def from_trace(trace: Path, limit: int | None = None, tokens: int = BLOCK) -> list[Item]:
    """A trace of Mooncake's format: each of its hash ids made into so many tokens, and cut to its input_length, of
    which 512 are one of them."""
    with trace.open() as file:
        lines = [json.loads(line) for line in file][:limit]
    return [
        (tokens_of(line["hash_ids"], -(-line["input_length"] * tokens // BLOCK), tokens), line.get("output_length", 0))
        for line in lines
    ]


def tokens_of(hash_ids: Sequence[int], length: int, tokens: int = BLOCK) -> npt.NDArray[np.int32]:
    """Token ids of a prompt, `tokens` for each id: equal ids, equal tokens."""
    base = np.asarray(hash_ids, np.uint64)[:, None] * np.uint64(tokens) + np.arange(tokens, dtype=np.uint64)
    mixed = (base * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed % np.uint64(_VOCABULARY)).astype(np.int32).reshape(-1)[:length]


def hash_ids_of(sessions: int, turns: int, seed: int = 0) -> Iterator[tuple[list[int], int]]:
    """(hash ids, length) of conversations as Mooncake's traces have them: each turn all of the one before, and more."""
    random = np.random.default_rng(seed)
    following = 0
    opened: list[list[int]] = [[0, 1] for _ in range(sessions)]
    following = 2
    for _ in range(turns):
        for session in random.permutation(sessions).tolist():
            more = int(random.integers(1, 5))
            opened[session] = [*opened[session], *range(following, following + more)]
            following += more
            yield opened[session], len(opened[session]) * BLOCK - int(random.integers(0, BLOCK))


def large(count: int, tokens: int = 1000, seed: int = 0) -> Iterator[tuple[npt.NDArray[np.int32], str, int]]:
    """(prompt, adapter, tokens of its answer) of a batch of any size: for each hundred prompts a template, which shares
    its beginning with nine others and half of which is theirs alone; four adapters; shuffled."""
    random = np.random.default_rng(seed)
    templates = max(1, count // 100)
    pool = _text(random, 1 << 22)
    chosen = random.integers(0, templates, count)
    starts = random.integers(0, len(pool) - tokens, count)
    lengths = random.integers(1, 300, count)
    family, half = tokens // 4, tokens // 2
    for template, start, decode in zip(chosen.tolist(), starts.tolist(), lengths.tolist(), strict=True):
        above = template // 10 * 7919 % (len(pool) - tokens)
        own = template * 104_729 % (len(pool) - tokens)
        prompt = np.concatenate(
            [pool[above : above + family], pool[own : own + half - family], pool[start : start + tokens - half]]
        )
        yield prompt, f"adapter-{template // 10 % 4}", decode


def _text(random: np.random.Generator, tokens: int) -> npt.NDArray[np.int32]:
    return random.integers(0, _VOCABULARY, tokens, np.int32)


def _shuffled(items: list[Item], random: np.random.Generator) -> list[Item]:
    return [items[number] for number in random.permutation(len(items)).tolist()]
