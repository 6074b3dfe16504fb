# SPDX-License-Identifier: Apache-2.0
"""Which prompts a plan has an engine tokenize: those that may share KV with another. The others' tokens say nothing
but how many they are, which is estimated: a request a prompt is seconds for each thousand, before anything is answered.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import numpy.typing as npt

from loracache.batch.bodies import adapter_of, begins_with_its_text, given_tokens, salt_of, text_tokens
from loracache.batch.lines import BatchFile, Line
from loracache.keys import TokenArray

__all__ = ["Tokenizing", "much_alike"]

_UNKNOWN = -1  # which no hash of Python's is
_LITTLE = 0.01  # of a file: what would be found again is less work than having a cache
_SAMPLED = 32  # prompts that share nothing and are tokenized all the same: how many tokens texts have


class Tokenizing:
    """Of the lines of `file` that are `wanted`, by number. tokens_of: a prompt's tokens, as the engine has them."""

    def __init__(
        self,
        file: BatchFile,
        wanted: Callable[[int], bool],
        block_tokens: int,
        tokens_of: Callable[[Line], Awaitable[TokenArray]],
    ) -> None:
        self._tokens_of = tokens_of
        self._alike = _alike(file, wanted, block_tokens)
        self._to_sample = _SAMPLED
        self._samples: list[tuple[int, int]] = []  # four bytes of text, tokens
        self._base = self._slope = 0.0
        self._sampled = asyncio.Event()

    async def tokens(self, line: Line) -> TokenArray:
        """The prompt's tokens where it may share some; else an array of its own that is about as long. Raises what
        `tokens_of` raises."""
        if self._alike[line.number]:
            return await self._tokens_of(line)
        text = text_tokens(line)
        if self._to_sample:
            self._to_sample -= 1
            found = await self._tokens_of(line)
            self._samples.append((len(text), len(found)))
            if len(self._samples) == _SAMPLED:
                self._base, self._slope = _line_above(self._samples)
                self._sampled.set()
            return found
        await self._sampled.wait()
        return np.resize(text, max(math.ceil(self._base + self._slope * len(text)), 1))


def _line_above(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """Base and slope of the line through `samples`, raised until none is above it: a chat template adds as many tokens
    to a short text as to a long one."""
    x, y = np.array(samples, np.float64).T
    slope = max(float(np.polynomial.Polynomial.fit(x, y, 1).convert().coef[-1]), 0.0) if np.ptp(x) else 0.0
    return float((y - slope * x).max()), slope


def much_alike(file: BatchFile, wanted: Callable[[int], bool], block_tokens: int) -> bool:
    """Whether more than a hundredth of the file is text of lines that are `wanted` and may share a block of KV with an
    earlier one, also where the text does not tell."""
    seen: set[int] = set()
    left = file.size * _LITTLE
    for line, begins in _beginnings(file, wanted, block_tokens):
        if begins == _UNKNOWN or begins in seen:
            left -= text_tokens(line).nbytes
        if left < 0:
            return True
        seen.add(begins)
    return False


def _alike(file: BatchFile, wanted: Callable[[int], bool], block_tokens: int) -> npt.NDArray[np.bool_]:
    """The same of each line, at its number."""
    found = np.zeros(len(file) + 1, np.bool_)
    numbers, beginnings = array("q"), array("q")
    for line, begins in _beginnings(file, wanted, block_tokens):
        found[line.number] = begins == _UNKNOWN
        numbers.append(line.number)
        beginnings.append(begins)
    if numbers:
        _, kind, count = np.unique(np.frombuffer(beginnings, np.int64), return_inverse=True, return_counts=True)
        found[np.frombuffer(numbers, np.int64)[count[kind] > 1]] = True
    return found


def _beginnings(file: BatchFile, wanted: Callable[[int], bool], block_tokens: int) -> Iterator[tuple[Line, int]]:
    """Each line that is `wanted` and has a block or more, with its beginning: a hash of the text that a block of KV
    stands for, or more, with the adapter and the salt; what begins otherwise shares none. _UNKNOWN where the text does
    not tell."""
    for line in file.lines():
        if not isinstance(line, Line) or not wanted(line.number):
            continue
        if given_tokens(line) is not None or not begins_with_its_text(line):
            yield line, _UNKNOWN
            continue
        text = text_tokens(line)[:block_tokens]
        if len(text) == block_tokens:
            yield line, hash((adapter_of(line), salt_of(line), text.tobytes()))
