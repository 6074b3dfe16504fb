# SPDX-License-Identifier: Apache-2.0
"""Grids and block sizes of the LoRA kernels on a GPU, from shapes alone: no Triton, so that all of it runs anywhere.

A kernel is compiled once for each set of sizes in it. Those that differ from batch to batch (splits, columns of a
split, blocks of a program) are therefore arguments at run time, and what is compiled in depends on the batch by one
bit: narrow or wide tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from loracache.kernels.tables import NARROW_TILE, NARROW_UNTIL, round_up, tile_rows

__all__ = ["INVARIANT_TOKENS", "LEAST", "Launch", "launch_of", "warm_sizes"]

LEAST = 16  # the smallest side of a block in tl.dot; addresses and rows are multiples of it, and thus 16-byte aligned
INVARIANT_TOKENS = 256
"""What `sized_for` is where a row's result must not depend on its batch: 5 to 16 splits for layers of a usual model,
which is enough for one token and little enough scratch for thousands."""
_PROGRAMS = 264  # what fills an H100: two programs on each of its 132 multiprocessors
_MOST_SPLITS = 16
_MOST_EXPANDS = 4096  # programs of an expand; from here on, each takes several blocks of columns
_MOST_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Launch:
    """Grids and block sizes of one call; see launch_of. tiles, splits, split_columns, blocks and runs follow the batch;
    the others are compiled in."""

    tiles: int
    block_m: int
    shrink_r: int  # ranks of a program of the shrink
    shrink_k: int
    hidden_row: int  # most_rank in whole blocks of the shrink
    split_columns: int
    splits: int
    together: int  # splits whose sums a program of the expand loads at once
    expand_r: int
    block_n: int
    even: bool  # no width ends inside a block
    blocks: int  # of columns, of a program of the expand
    runs: int
    stages: int


@functools.lru_cache(maxsize=4096)
def launch_of(
    tokens: int,
    slots: int,
    most_tiles: int,
    width: int,
    widths: tuple[int, ...],
    chunk: int,
    most_rank: int,
    itemsize: int,
    sized_for: int = 0,
) -> Launch:
    """Sizes for an H100; chosen on paper for hidden sizes around 4096, ranks of 8 to 256 and 1 to 4096 tokens.

    Narrow tiles (decode) wait for weights: few ranks a program, long blocks of columns, and splits until the fewest
    tiles that such a batch can have fill the device. Wide tiles (prefill) wait for x and y, which a program should read
    once: 64 ranks, no splits where the tiles suffice. Expand takes several blocks of columns a program when programs
    abound, so that those without a tile cost little and the others read h once. float32 is multiplied without tensor
    cores: small blocks.

    sized_for: the tokens of the batch whose tiles and splits this one is to have, whatever its own number; what a row
    becomes depends on nothing else of its batch. 0: its own.
    """
    like = sized_for or tokens
    narrow, half = tile_rows(like) == NARROW_TILE, itemsize == 2
    divisor = chunk & -chunk  # the power of two in a chunk: blocks of it, or of less, never straddle a page
    if divisor < LEAST:
        raise ValueError(f"chunks of {chunk} elements: on a GPU a chunk is a multiple of {LEAST}")
    tiles = min(most_tiles, _ceil(tokens, NARROW_TILE) + min(slots, tokens))
    ranks = max(LEAST, 1 << (most_rank - 1).bit_length())
    shrink_r = min(ranks, 32 if narrow else 64)
    shrink_k = min(divisor, (256 if narrow else 128) // itemsize)
    hidden_row = round_up(most_rank, shrink_r)
    fewest = _ceil(like, tile_rows(like)) * len(widths) * (hidden_row // shrink_r)
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // fewest))
    split_columns = round_up(_ceil(width, splits), shrink_k)
    block_n = min(divisor, 128 if narrow and half else 64)
    programs = tiles * sum(_ceil(each, block_n) for each in widths)
    blocks = 1 << max(1, min(_MOST_BLOCKS, programs // _MOST_EXPANDS)).bit_length() - 1
    return Launch(
        tiles=tiles, block_m=tile_rows(like), shrink_r=shrink_r, shrink_k=shrink_k, hidden_row=hidden_row,
        split_columns=split_columns, splits=_ceil(width, split_columns), together=5 if narrow else 3,
        expand_r=min(ranks, 64 if half else 16), block_n=block_n, even=all(each % block_n == 0 for each in widths),
        blocks=blocks, runs=sum(_ceil(_ceil(each, block_n), blocks) for each in widths), stages=4 if half else 2,
    )  # fmt: skip


def warm_sizes(most_tokens: int, sized_for: int = 0) -> tuple[int, ...]:
    """Tokens of batches that between them ask for every kernel that batches of 1 to `most_tokens` rows can ask for."""
    wide = NARROW_UNTIL + 1
    return (1,) if sized_for or most_tokens < wide else (1, wide)


def _ceil(length: int, step: int) -> int:
    return -(-length // step)
