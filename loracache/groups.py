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
from math import inf
from typing import TypeVar

from loracache.errors import UsageError

__all__ = ["Group", "Need", "columns", "continued", "furthest"]

T = TypeVar("T")


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
    """Layers that need the same of a prefix. tokens: of the window, or the span; 0 for the others. A window counts the
    tokens before the one that is computed: one less than the model's. shards: names of the parts that one chunk of the
    group is kept in, each an object. Raises UsageError.
    """

    need: Need
    tokens: int
    shards: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.need, Need):
            raise UsageError(f"a group needs one of {', '.join(Need)}, not {self.need!r}")
        least, most = {Need.WINDOW: (0, inf), Need.SPAN: (1, inf)}.get(self.need, (0, 0))
        if type(self.tokens) is not int or not least <= self.tokens <= most:
            raise UsageError(f"a group that needs {self.need} cannot have {self.tokens!r} tokens")
        named = type(self.shards) is tuple and all(isinstance(name, str) for name in self.shards)
        if not named or not self.shards or not all(self.shards):
            raise UsageError(f"a group has a tuple of shards with names, not {self.shards!r}")

    def first(self, chunks: int, chunk_tokens: int) -> int:
        """The first of the chunks that a prefix of `chunks` chunks needs; `chunks` where it needs none."""
        end = chunks * chunk_tokens
        match self.need:
            case Need.ALL:
                return 0
            case Need.STATE:
                return max(0, chunks - 1)
            case Need.WINDOW:
                return max(0, end - self.tokens) // chunk_tokens
            case Need.SPAN:
                return end // self.tokens * self.tokens // chunk_tokens


def furthest(held: Sequence[tuple[Group, Sequence[bool]]], chunk_tokens: int, most: int) -> int:
    """The greatest number of chunks, at most `most`, behind which a chain can be continued. held: which chunks of each
    group are held, in the chain's order; those behind are not. Takes time in proportion to `most`.
    """
    runs = []  # for every chunk, how many up to it are held without a gap
    for group, chunks in held:
        run, lengths = 0, [0]
        for each in chunks[: max(0, most)]:
            run = run + 1 if each else 0
            lengths.append(run)
        lengths += [0] * (most + 1 - len(lengths))
        runs.append((group, lengths))
    for end in range(most, 0, -1):
        for group, lengths in runs:
            if lengths[end] < end - group.first(end, chunk_tokens):
                break
        else:
            return end
    return 0


def columns(groups: Sequence[Group], beside: Sequence[T], most: int | None = None) -> list[list[Sequence[T]]]:
    """What stands beside a chain, by group and then by chunk (the first `most` of them), from what is told chunk by
    chunk, and within one in the order of the groups and their shards."""
    width, found, begin = sum(len(group.shards) for group in groups), [], 0
    rows = len(beside) // width if width else 0
    for group in groups:
        end = begin + len(group.shards)
        starts = range(0, (rows if most is None else min(most, rows)) * width, width)
        found.append([beside[at + begin : at + end] for at in starts])
        begin = end
    return found


def continued(
    groups: Sequence[Group], chunk_tokens: int, lead: int, chain: Sequence[int], beside: Sequence[int | None]
) -> tuple[int, list[int]]:
    """(how many chunks are behind which a chain can be continued, of each of them that something is needed of the
    slowest tier that has it).

    groups: those beside full attention. lead: objects of a chunk that the chain itself is made of; 0 where no layer of
    the model reads all of a prefix. chain: the tiers of its leading ones that are held, the faster the smaller. beside:
    the tiers of those of `groups`, or None, as `columns` has them; what is told of no longer is not held.
    """
    if not groups and lead == 1:
        return len(chain), list(chain)
    width = sum(len(group.shards) for group in groups)
    rows = len(beside) // width if width else 0
    most = len(chain) // lead if lead else rows
    needed = [list(chain[at * lead : (at + 1) * lead]) for at in range(most)]
    parts_of = list(zip(groups, columns(groups, beside, most), strict=True))
    held = [(group, [None not in part for part in parts]) for group, parts in parts_of]
    count = furthest(held, chunk_tokens, most)
    for group, parts in parts_of:
        for at in range(group.first(count, chunk_tokens), count):
            needed[at] += [tier for tier in parts[at] if tier is not None]
    return count, [max(tiers) for tiers in needed[:count] if tiers]
