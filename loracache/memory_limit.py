# SPDX-License-Identifier: Apache-2.0
"""How much memory an arena may take on this machine: what is available, within the limits of the control groups.

A container sees its own group as the root of `/sys/fs/cgroup`, a unit of systemd finds its own in `/proc/self/cgroup`,
and every group above it limits too. systemd's MemoryMax is such a limit. Both versions of control groups are read.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["BESIDE_THE_ARENA", "available_memory", "give_back_memory"]

BESIDE_THE_ARENA = 192 << 20
"""Bytes that a limit has to leave for the daemon itself and its REST process, measured 130 MiB with an empty index.
Without them the kernel would kill the daemon as soon as its arena is full."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that an arena can take without swapping and without exceeding a control group's limit, which others of the
    group may have used in part. `root` is where `proc` and `sys` are found.
    """
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    own = _own(root)
    return max(0, min([available, *(free + min(own, BESIDE_THE_ARENA) - BESIDE_THE_ARENA for free in _free(root))]))


def _own(root: Path) -> int:
    """Bytes that this process has by now: of what it needs beside the arena."""
    try:
        status = (root / "proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 if "RssAnon:" in status else 0


def _free(root: Path) -> Iterator[int]:
    """What every group that this process is in has left of its limit, where there is one."""
    for group, limit, usage, prefix in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # no such group seen from here; "max"
            free = int((group / limit).read_text())
            with contextlib.suppress(OSError, ValueError):
                used = int((group / usage).read_text())
                free -= max(0, used - _reclaimable(group / "memory.stat", prefix))
            yield free


def _reclaimable(stat: Path, prefix: str) -> int:
    """Bytes of the page cache in a group's usage: what goes when something else needs the room."""
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return sum(int(fields.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, names of the files of limit and usage, what statistics of a whole group begin with)"""
    mount = root / "sys/fs/cgroup"
    second, first = ("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    yield (mount, *second)
    yield (mount / "memory", *first)
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path)
        above = [each.relative_to("/") for each in (group, *group.parents)]
        if controllers == "":
            yield from ((mount / each, *second) for each in above)
            yield from ((mount / "unified" / each, *second) for each in above)  # where both versions are mounted
        elif "memory" in controllers.split(","):
            yield from ((mount / "memory" / each, *first) for each in above)


def give_back_memory() -> None:
    """Have the C library return what this process has freed; a millisecond."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
