# SPDX-License-Identifier: Apache-2.0
"""Gates that copies of blocks pass: shut for one store when its blocks are needed, and for all copies while the KV
cache's memory is gone (vLLM's sleep unmaps it).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from loracache.errors import Unavailable
from loracache.kernels.page_copy import Copy, PageCopier

__all__ = ["Gate", "GatedCopier"]


class Gate:
    """Lets one copy pass at a time, and none once it is shut. Shut and opened from any thread."""

    def __init__(self) -> None:
        self._copying = threading.Lock()
        self._open = True

    def shut(self) -> None:
        """Return when no byte of a block is touched any more: after the copy of one chunk at most."""
        self._open = False  # before waiting: the lock is not fair, and the next copy could begin first
        with self._copying:
            pass

    def reopen(self) -> None:
        """Copies may pass again."""
        self._open = True

    def run(self, copy: Callable[[], None]) -> bool:
        """Run `copy`, for which `shut` waits. False where the gate is shut, or was meanwhile."""
        with self._copying:
            if self._open:
                copy()
            return self._open


class GatedCopier(PageCopier):
    """A PageCopier behind a gate. Copies raise Unavailable where it is shut."""

    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.gate = Gate()

    def _run(self, *arguments: Any, **options: Any) -> Copy:
        run, copies = super()._run, []

        def copy() -> None:
            copies.append(run(*arguments, **options))
            copies[0].wait()

        if not self.gate.run(copy):
            raise Unavailable("the engine's KV cache is asleep")
        return copies[0]
