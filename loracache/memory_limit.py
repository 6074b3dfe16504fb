# SPDX-License-Identifier: Apache-2.0
"""How much memory an arena may take on this machine: what is available, within the limits of the control groups.

A container sees its own group as the root of `/sys/fs/cgroup`, a unit of systemd finds its own in `/proc/self/cgroup`,
and every group above it limits too. Both versions of control groups are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["BESIDE_THE_ARENA", "available_memory"]

BESIDE_THE_ARENA = 192 << 20
"""Bytes that a limit has to leave for the daemon itself and its REST process, measured 130 MiB with an empty index.
Without them the kernel would kill the daemon as soon as its arena is full."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that an arena can take without swapping and without exceeding a control group's limit. `root` is where
    `proc` and `sys` are found.
    """
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *(limit - BESIDE_THE_ARENA for limit in _limits(root))]))


def _limits(root: Path) -> Iterator[int]:
    """The limit of every group that this process is in, where there is one."""
    for file in _limit_files(root):
        with contextlib.suppress(OSError, ValueError):  # no such group seen from here; "max"
            yield int(file.read_text())


def _limit_files(root: Path) -> Iterator[Path]:
    mount = root / "sys/fs/cgroup"
    yield mount / "memory.max"
    yield mount / "memory/memory.limit_in_bytes"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        yield from (folder / each.relative_to("/") / name for each in (group, *group.parents))
