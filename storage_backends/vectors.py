# SPDX-License-Identifier: Apache-2.0
"""Lists of memoryviews: what preadv, pwritev, sendmsg and recv_into take. Nothing is copied here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from loracache.storage_backends.base import ALIGNMENT

__all__ = ["IOV_MAX", "advance", "head", "length", "move", "pieces"]

IOV_MAX = os.sysconf("SC_IOV_MAX") if "SC_IOV_MAX" in os.sysconf_names else 1024


def length(views: Iterable[memoryview]) -> int:
    """Bytes in all of `views`."""
    return sum(view.nbytes for view in views)


def head(views: Sequence[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes of `views`, as views."""
    return next(pieces(views, size, size), [])


def pieces(views: Sequence[memoryview], size: int, piece: int) -> Iterator[list[memoryview]]:
    """The first `size` bytes of `views`, cut into runs of `piece` bytes (the last may be shorter)."""
    run: list[memoryview] = []
    room = min(piece, size)
    for view in views:
        start = 0
        while size and start < view.nbytes:
            taken = view[start : start + room]
            run.append(taken)
            start += taken.nbytes
            size -= taken.nbytes
            room -= taken.nbytes
            if not room:
                yield run
                run, room = [], min(piece, size)
    if run:
        yield run


def advance(views: list[memoryview], first: int, moved: int) -> int:
    """Steps over `moved` bytes from views[first] on, cutting a half-moved view; returns the new first."""
    while first < len(views) and moved >= views[first].nbytes:
        moved -= views[first].nbytes
        first += 1
    if moved:
        views[first] = views[first][moved:]
    return first


def move(operation: Callable[[int, list[memoryview], int], int], fd: int, views: list[memoryview]) -> int:
    """Reads or writes all of `views` from the file's start on; returns the bytes moved, fewer where the file ends."""
    moved = first = 0
    while first < len(views):
        step = operation(fd, views[first : first + IOV_MAX], moved)
        moved += step
        if step == 0 or step % ALIGNMENT:  # the end of a file, or of the device: direct I/O cannot go on from there
            break
        first = advance(views, first, step)
    return moved
