# SPDX-License-Identifier: Apache-2.0
"""What is copied, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["ARRIVED", "Copy", "CopyError", "Move", "bounds"]


class CopyError(Exception):
    """The device refused or failed a copy: none of its bytes can be relied on. Copies beside it are not touched."""


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks of the KV cache and where they lie in host memory.

    payload: buffers that hold, one behind another, rows of shape (layers, `of`, bytes of the layer's row); every buffer
    begins and ends at a multiple of 8 bytes of it. blocks: numbers of blocks of the KV cache; they are the payload's
    blocks `first`, `first` + 1, ... rows: the copier's layers that it is about; None: all of them.
    """

    blocks: Sequence[int]
    payload: Sequence[memoryview]
    first: int
    of: int
    rows: slice | None = None


def bounds(rows: slice | None, layers: int) -> tuple[int, int]:
    """The first of `layers` layers that a move is about, and the end. Raises ValueError where it has not got these."""
    if rows is None:
        return 0, layers
    if rows.step not in (None, 1) or not 0 <= rows.start <= rows.stop <= layers:
        raise ValueError(f"layers {rows.start} to {rows.stop} of {layers}")
    return rows.start, rows.stop


class Copy(Protocol):
    """Moves that were submitted together. The payloads' buffers stay alive until it has ended."""

    def done(self) -> bool:
        """Whether it has ended, well or not. Never waits."""

    def wait(self) -> None:
        """Return once all bytes have arrived. Raises CopyError where they have not and never will."""

    def hold(self, stream: Any) -> None:
        """What is submitted to `stream`, one of the device's, from now on begins once the copy has ended, well or not.
        Never waits itself. Raises CopyError where the device refuses that."""


class _Arrived:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def hold(self, stream: Any) -> None:
        pass


ARRIVED: Copy = _Arrived()
