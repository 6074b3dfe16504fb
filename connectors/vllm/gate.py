"""Keeps copies away from the KV cache while its memory is gone: vLLM's sleep unmaps it."""

from __future__ import annotations

import threading
from typing import Any

from loracache.errors import Unavailable
from loracache.kernels.page_copy import PageCopier

__all__ = ["GatedCopier"]


class GatedCopier(PageCopier):
    """A PageCopier that can be shut, from any thread. Copies of a shut one raise Unavailable."""

    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self._copying = threading.Lock()
        self._open = True

    def shut(self) -> None:
        """Return when no byte of a block is touched any more: after the copy of one chunk at most."""
        self._open = False  # before waiting: the lock is not fair, and the next copy could begin first
        with self._copying:
            pass

    def reopen(self) -> None:
        """The memory is there again."""
        self._open = True

    def _run(self, *arguments: Any, **options: Any) -> None:
        with self._copying:
            if not self._open:
                raise Unavailable("the engine's KV cache is asleep")
            super()._run(*arguments, **options)
