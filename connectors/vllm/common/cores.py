# SPDX-License-Identifier: Apache-2.0
"""Keeps our threads and the private daemon off the one core that vLLM pins a CPU worker's main thread to.

A CPU worker binds each of its compute threads to a core, its main thread too, and whatever that thread starts inherits
the binding: a daemon started so would share a core with a thread that never sleeps, and starve. The engine's front end,
two generations up, has the cores that the user gave it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["leave_pinned_core", "on_all_cores"]


def leave_pinned_core() -> None:
    """Let the calling thread run on every core of the engine."""
    cores = os.sched_getaffinity(0)
    with contextlib.suppress(OSError, ValueError):  # an ancestor of another user, or gone: without its cores
        parent = os.getppid()
        cores |= os.sched_getaffinity(parent)
        cores |= os.sched_getaffinity(_parent_of(parent))
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)


def _parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def on_all_cores() -> Iterator[None]:
    """Within, the calling thread, and so a process it starts, may run on every core of the engine."""
    before = os.sched_getaffinity(0)
    leave_pinned_core()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
