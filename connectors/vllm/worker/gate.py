# SPDX-License-Identifier: Apache-2.0
"""Gates that copies of blocks pass: shut for one store when its blocks are needed, and for all copies while the KV
cache's memory is gone (vLLM's sleep unmaps it).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from loracache.connectors.vllm.link.pinned import pieces
from loracache.errors import Unavailable
from loracache.kernels.page_copy import Copy, Move, PageCopier

__all__ = ["Gate", "GatedCopier"]


class Gate:
    """Lets copies pass, and none once it is shut. Shut and opened from any thread.

    Whoever has submitted a copy through it must wait for that copy: until then `shut` waits, too.
    """

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._open = True
        self._inside = 0

    @property
    def is_open(self) -> bool:
        """Whether copies may pass. One whose gate was shut before it had ended may have read what came after."""
        return self._open

    def shut(self) -> None:
        """Return when no byte of a block is touched any more: after the copies under way."""
        with self._state:
            self._open = False
            self._state.wait_for(lambda: not self._inside)

    def reopen(self) -> None:
        """Copies may pass again."""
        self._open = True

    def submit(self, copy: Callable[[], Copy]) -> Copy | None:
        """Submit a copy; None where the gate is shut."""
        with self._state:
            if not self._open:
                return None
            self._inside += 1
        try:
            return _Passed(copy(), self)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        with self._state:
            self._inside -= 1
            self._state.notify_all()


class _Passed:
    """A copy that a gate waits for."""

    def __init__(self, copy: Copy, gate: Gate) -> None:
        self._copy = copy
        self._gate: Gate | None = gate

    def done(self) -> bool:
        return self._copy.done()

    def wait(self) -> None:
        try:
            self._copy.wait()
        finally:
            gate, self._gate = self._gate, None
            if gate is not None:
                gate._leave()

    def hold(self, stream: Any) -> None:
        self._copy.hold(stream)


class GatedCopier(PageCopier):
    """A PageCopier behind a gate, for payloads in arenas. Copies raise Unavailable where it is shut."""

    def __init__(self, layers: Any, bounce_below: int | None = None) -> None:
        super().__init__(layers, pieces=pieces, bounce_below=bounce_below)
        self.gate = Gate()

    def gather(self, moves: Sequence[Move], after: Any = None) -> Copy:
        """See PageCopier."""
        gather = super().gather
        return self._pass(lambda: gather(moves, after))

    def scatter(self, moves: Sequence[Move], after: Any = None) -> Copy:
        """See PageCopier."""
        scatter = super().scatter
        return self._pass(lambda: scatter(moves, after))

    def _pass(self, submit: Callable[[], Copy]) -> Copy:
        copy = self.gate.submit(submit)
        if copy is None:
            raise Unavailable("the engine's KV cache is asleep")
        return copy
