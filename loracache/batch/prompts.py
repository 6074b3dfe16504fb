# SPDX-License-Identifier: Apache-2.0
"""The prompts of a batch as chains of block hashes: all that a plan has to know of a billion tokens.

A prefix cache shares whole blocks, so a plan needs no finer grain. Tokens are hashed as they come and not kept: 8 bytes
a block remain, 500 a prompt of 1,000 tokens. Two different prefixes share a 64-bit hash once in 10,000 batches of a
million such prompts; the plan is a little worse then, and no answer is.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loracache.errors import UsageError
from loracache.keys import TokenArray, token_array

__all__ = ["Ints", "PromptHasher", "Prompts"]

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_AT_ONCE = 1 << 22  # tokens: so many prompts that numpy's calls cost little, in 80 MiB
_SEED = 0x10CAC4E  # of the multipliers: any will do, no key is ever stored
_ROOT, _CHAIN, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A batch's prompts, in the order they came. Arrays have one item a prompt, but for `hashes` and `starts`."""

    block_tokens: int
    tokens: Ints
    """Of the prompt."""
    decode: Ints
    """Tokens expected in its answer."""
    adapter: Ints
    """A number; prompts of two adapters share nothing."""
    root: Ints
    """A number for each adapter and salt, greater for a greater adapter; prompts of two roots share nothing."""
    hashes: _Words
    """Of each whole block and all before it: one prompt's after another's."""
    starts: Ints
    """Where in `hashes` each prompt's begin; one more for the end."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def blocks(self) -> Ints:
        """Whole blocks of each prompt."""
        return np.diff(self.starts)

    @property
    def reusable(self) -> Ints:
        """Leading blocks of each prompt that a cache can spare it: an engine computes the last token itself."""
        return np.maximum(self.tokens - 1, 0) // self.block_tokens


class PromptHasher:
    """Takes in a batch's prompts. block_tokens: of a block of the engine's KV cache. Raises UsageError."""

    def __init__(self, block_tokens: int = 16) -> None:
        if block_tokens < 1:
            raise UsageError(
                f"block_tokens={block_tokens} must be 1 or more: tokens of a block of the engine's KV cache"
            )
        self._block = block_tokens
        self._weights = np.random.default_rng(_SEED).integers(0, 2**64, block_tokens, np.uint64) | np.uint64(1)
        self._adapters: dict[str, int] = {}
        self._roots: dict[tuple[int, str], int] = {}
        self._tokens, self._decode, self._root = array("q"), array("q"), array("q")
        self._waiting: list[TokenArray] = []
        self._waiting_tokens = self._waiting_from = 0
        self._hashed: list[_Words] = []

    def add(self, tokens: Sequence[int] | TokenArray, *, adapter: str = "", salt: str = "", decode: int = 0) -> int:
        """Take in one prompt; its number. adapter: its name, "" for the base model. salt: the tenant's. decode: tokens
        that its answer is expected to have. An int32 array is cheapest by far."""
        ids = token_array(tokens)
        number = len(self._tokens)
        adapter_number = self._adapters.setdefault(adapter, len(self._adapters))
        self._tokens.append(len(ids))
        self._decode.append(decode)
        self._root.append(self._roots.setdefault((adapter_number, salt), len(self._roots)))
        self._waiting.append(ids[: len(ids) // self._block * self._block])
        self._waiting_tokens += len(ids)
        if self._waiting_tokens >= _AT_ONCE:
            self._hash_waiting()
        return number

    def prompts(self) -> Prompts:
        """All that were taken in; the hasher ends with it."""
        self._hash_waiting()
        hashes = np.concatenate(self._hashed) if self._hashed else np.empty(0, np.uint64)
        self._hashed.clear()
        tokens, came = _ints(self._tokens), _ints(self._root)
        adapters = np.asarray([adapter for adapter, _ in self._roots], np.int64)
        # Roots get numbers anew, so that those of one adapter stand together.
        rank = np.empty(len(adapters), np.int64)
        rank[np.argsort(adapters, kind="stable")] = np.arange(len(adapters))
        starts = np.concatenate([[0], np.cumsum(tokens // self._block)]).astype(np.int64)
        return Prompts(self._block, tokens, _ints(self._decode), adapters[came], rank[came], hashes, starts)

    def _hash_waiting(self) -> None:
        """Chain hashes of what waits: a multilinear hash of each block, and each mixed with all before it."""
        if not self._waiting:
            return
        blocks = np.concatenate(self._waiting).view(np.uint32).reshape(-1, self._block)
        own = blocks.astype(np.uint64) @ self._weights
        counts = np.asarray([len(each) // self._block for each in self._waiting], np.int64)
        roots = np.frombuffer(self._root, np.int64)[self._waiting_from :].astype(np.uint64)
        longest = np.argsort(-counts, kind="stable")  # so that those that still have a block are the first ones
        starts = (np.cumsum(counts) - counts)[longest]
        state = _mixed((roots[longest] + np.uint64(1)) * _ROOT)
        with_more = np.searchsorted(-counts[longest], -np.arange(counts.max()), side="left")
        for number, alive in enumerate(with_more.tolist()):
            at = starts[:alive] + number
            state = _mixed(state[:alive] * _CHAIN + own[at])
            own[at] = state
        self._hashed.append(own)
        self._waiting, self._waiting_tokens, self._waiting_from = [], 0, len(self._tokens)


def _mixed(words: _Words) -> _Words:
    """Every bit of a word moves every other; 0 is kept for "no block"."""
    words ^= words >> _SHIFT
    words *= _MIX
    words ^= words >> _SHIFT
    return np.maximum(words, np.uint64(1))


def _ints(numbers: array[int]) -> Ints:
    return np.frombuffer(numbers, np.int64).copy() if numbers else np.empty(0, np.int64)
