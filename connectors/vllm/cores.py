"""Keeps our threads and the private daemon off the one core that vLLM pins a CPU worker's main thread to.

A CPU worker binds each of its compute threads to a core, its main thread too, and whatever that thread starts
inherits the binding: a daemon started so would share a core with a thread that never sleeps, and starve. The engine's
own process, the worker's parent, has the cores that the user gave it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["leave_pinned_core", "on_all_cores"]


def leave_pinned_core() -> None:
    """Let the calling thread run on every core of the engine."""
    with contextlib.suppress(OSError):  # a parent of another user, or gone: stay where we are
        os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))


@contextlib.contextmanager
def on_all_cores() -> Iterator[None]:
    """Within, the calling thread, and so a process it starts, may run on every core of the engine."""
    before = os.sched_getaffinity(0)
    leave_pinned_core()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
