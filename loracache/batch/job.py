# SPDX-License-Identifier: Apache-2.0
"""From a batch file to its plan: which lines are requests, what their prompts are, how long their answers may be."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loracache.batch.bodies import adapter_of, answer_limit, answers, salt_of, text_tokens
from loracache.batch.holding import Blocks
from loracache.batch.lines import BatchFile, Line, LineFault
from loracache.batch.plan import Figures, Plan, make_plan
from loracache.batch.prompts import PromptHasher
from loracache.errors import UsageError
from loracache.keys import TokenArray

__all__ = ["ANSWER_TOKENS", "Job", "Lengths", "by_text", "make_job"]

ANSWER_TOKENS = 256  # of an answer whose request does not say and nobody has seen one of
_AT_ONCE = 64  # prompts that are being tokenized
_ENOUGH = 20  # answers from which a mean says something


@dataclass(slots=True)
class Lengths:
    """How long the answers of the job have been so far, in tokens."""

    tokens: int = 0
    count: int = 0

    def add(self, tokens: int) -> None:
        """An answer's."""
        self.tokens += tokens
        self.count += 1

    def expected(self, limit: int | None) -> int:
        """Tokens that an answer of at most `limit` will have."""
        mean = self.tokens // self.count if self.count >= _ENOUGH else None
        if limit is None:
            return ANSWER_TOKENS if mean is None else mean
        return limit if mean is None else min(limit, mean)


@dataclass(frozen=True, slots=True)
class Job:
    """lines: of each request of the plan, its line. blocks: what requests hold if their answers are as long as they may
    be."""

    plan: Plan
    lines: Sequence[int]
    blocks: Blocks

    def figures(self, kv_tokens: int, running: int) -> Figures:
        """See Plan. Raises UsageError that names the line of a request that does not fit."""
        prompts = self.plan.prompts
        tokens = prompts.tokens + prompts.decode
        most = int(tokens.argmax()) if len(tokens) else 0
        if len(tokens) and -(-tokens[most] // prompts.block_tokens) > kv_tokens // prompts.block_tokens:
            raise UsageError(
                f"line {self.lines[most]}: its prompt and answer, {tokens[most]:,} tokens, do not fit a KV cache of "
                f"{kv_tokens:,} tokens; take it out, or give --kv-tokens of an engine that has room"
            )
        return self.plan.figures(kv_tokens, running)


async def make_job(
    file: BatchFile,
    tokens_of: Callable[[Line], Awaitable[TokenArray]],
    block_tokens: int,
    lengths: Lengths,
    wanted: Callable[[int], bool],
    on_fault: Callable[[LineFault], None],
) -> Job:
    """The plan of those lines of `file` that are `wanted`, by number. tokens_of: a prompt's, or `by_text`. Raises what
    it raises."""
    hasher = PromptHasher(block_tokens)
    numbers: list[int] = []
    most: list[int] = []
    waiting: deque[tuple[Line, asyncio.Future[TokenArray]]] = deque()

    async def take() -> None:
        line, task = waiting.popleft()
        limit, count = answer_limit(line), answers(line)
        tokens = await task
        hasher.add(tokens, adapter=adapter_of(line), salt=salt_of(line), decode=count * lengths.expected(limit))
        end = len(tokens) % block_tokens  # of the prompt: each answer stands in blocks of its own behind a copy of it
        longest = end + (lengths.expected(None) if limit is None else limit)
        most.append(count * -(-longest // block_tokens) * block_tokens - end)
        numbers.append(line.number)

    try:
        for line in file.lines():
            if isinstance(line, LineFault):
                on_fault(line)
            elif wanted(line.number):
                waiting.append((line, asyncio.ensure_future(tokens_of(line))))
            while len(waiting) >= _AT_ONCE:
                await take()
        while waiting:
            await take()
    finally:
        for _, task in waiting:
            task.cancel()
    plan = make_plan(hasher.prompts())
    longest = replace(plan.prompts, decode=np.asarray(most, np.int64))
    return Job(plan, numbers, Blocks(longest, plan.tree))


async def by_text(line: Line) -> TokenArray:
    """Four bytes of text for each token."""
    return text_tokens(line)
