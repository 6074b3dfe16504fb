# SPDX-License-Identifier: Apache-2.0
"""Which of a chain's objects a prefix needs, where not all layers of a model read all of it. Pure functions.

Layers of full attention read every token before, so a prefix needs every chunk of theirs: its leading run. Others read
less, and are kept in objects of their own beside it. A prefix can be continued from where all groups have what it
needs, and from nowhere else: one object too few, and the answer is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loracache.errors import UsageError

__all__ = ["Group", "Need", "furthest"]


class Need(StrEnum):
    """What of a prefix a layer reads to go on behind it."""

    ALL = "all"
    """Every token: full attention."""
    WINDOW = "window"
    """The last tokens: sliding window attention."""
    SPAN = "span"
    """The tokens since the last multiple of the span: chunked local attention."""
    STATE = "state"
    """What stands at its end: state space models, linear attention, short convolutions."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that need the same of a prefix. tokens: of the window or the span; 0 for the others. shards: names of the
    parts that one chunk of the group is kept in, each an object. Raises UsageError.
    """

    need: Need
    tokens: int
    shards: tuple[str, ...]

    def __post_init__(self) -> None:
        sized = self.need in (Need.WINDOW, Need.SPAN)
        if type(self.tokens) is not int or (self.tokens < 0 if self.need is Need.WINDOW else sized != (self.tokens > 0)):
            raise UsageError(f"a group that needs {self.need} cannot have {self.tokens!r} tokens")
        if not self.shards or not all(isinstance(name, str) and name for name in self.shards):
            raise UsageError(f"a group has shards with names, not {self.shards!r}")

    def first(self, chunks: int, chunk_tokens: int) -> int:
        """The first of the chunks that a prefix of `chunks` chunks needs; `chunks` where it needs none."""
        end = chunks * chunk_tokens
        match self.need:
            case Need.ALL:
                return 0
            case Need.STATE:
                return max(0, chunks - 1)
            case Need.WINDOW:
                return min(chunks, max(0, end - self.tokens) // chunk_tokens) if self.tokens else chunks
            case Need.SPAN:
                return end // self.tokens * self.tokens // chunk_tokens


def furthest(held: Sequence[tuple[Group, Sequence[bool]]], chunk_tokens: int, most: int) -> int:
    """The greatest number of chunks, at most `most`, behind which a chain can be continued. held: which chunks of each
    group are held, in the chain's order; those behind are not.
    """
    runs = []  # for every chunk, how many up to it are held without a gap
    for group, chunks in held:
        run, lengths = 0, [0]
        for each in chunks[:most]:
            run = run + 1 if each else 0
            lengths.append(run)
        lengths += [0] * (most + 1 - len(lengths))
        runs.append((group, lengths))
    for end in range(most, 0, -1):
        if all(lengths[end] >= end - group.first(end, chunk_tokens) for group, lengths in runs):
            return end
    return 0
