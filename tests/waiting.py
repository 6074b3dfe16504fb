# SPDX-License-Identifier: Apache-2.0
"""Time in tests, on machines that stall for seconds: wait until something holds, or measure again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["eventually", "quickest"]

_TRIES = 5


def eventually(holds: Callable[[], Any], what: str = "", seconds: float = 15.0) -> Any:
    """What `holds` answers once that is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or holds}"
        time.sleep(0.01)


def quickest(once: Callable[[], float], enough: float) -> float:
    """The least of what a few calls of `once` answer, in seconds; it is not called again once that is below `enough`. A
    machine stalls now and then; what takes long takes long each time."""
    least = float("inf")
    for _ in range(_TRIES):
        least = min(least, once())
        if least < enough:
            break
    return least
