# SPDX-License-Identifier: Apache-2.0
"""The tables that SGMV kernels read: where a slot's matrices lie, and which rows of a batch make a tile.

numpy only: whoever fills the tables needs no kernel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "A_ADDRESS", "A_FLAT", "B_ADDRESS", "B_FLAT", "NARROW_TILE", "NARROW_UNTIL", "PLACE_FIELDS", "RANK", "plan_tiles",
    "round_up", "tile_rows",
]  # fmt: skip

# Fields of a row of `places` (sgmv.py).
RANK, A_ADDRESS, B_ADDRESS, A_FLAT, B_FLAT = range(5)
PLACE_FIELDS = 5
NARROW_TILE, WIDE_TILE = 16, 64
NARROW_UNTIL = 512  # tokens of a batch; more are cut into wide tiles


def round_up(length: int, chunk: int) -> int:
    """`length` rounded up to whole chunks."""
    return -(-length // chunk) * chunk


def tile_rows(tokens: int) -> int:
    """Rows of a tile on a GPU. Grows with the batch only, so that a padded batch takes tiles planned for fewer rows."""
    return NARROW_TILE if tokens <= NARROW_UNTIL else WIDE_TILE


def plan_tiles(
    slots: npt.NDArray[np.int64], most_rows: int | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(order, tiles) of a batch whose row i belongs to the adapter in slots[i] (-1: none). Tiles have at most
    `most_rows` rows; without it a tile is a whole segment, which is what the CPU wants.
    """
    order = np.argsort(slots, kind="stable").astype(np.int32)
    order = order[np.count_nonzero(slots < 0) :]
    ordered = slots[order]
    borders = np.flatnonzero(np.diff(ordered)) + 1
    tiles = []
    for first, end in zip([0, *borders], [*borders, len(ordered)], strict=True):
        step = most_rows or max(len(slots), 1)
        for at in range(first, end, step):
            count = min(step, end - at)
            together = order[at + count - 1] - order[at] == count - 1
            tiles.append((ordered[at], at, count, order[at] if together else -1))
    return order, np.array(tiles, dtype=np.int32).reshape(-1, 4)
