# SPDX-License-Identifier: Apache-2.0
"""What is done for requests that are over, once their last chunks are stored: their KV is pinned for a time, moved
down, or announced to be asked for again. Threading: the scheduler's loop.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Iterable, Sequence

from loracache.connectors.vllm.common.wishes import Wishes
from loracache.connectors.vllm.link.scheduler import SchedulerLink

__all__ = ["Afterwards"]

_log = logging.getLogger(__name__)
_RETURN_HOLD_S = 30.0  # what comes back later than it said finds its KV still
_PIN_SHARE = 4  # of the arena is what requests of an engine may have pinned at a time: whoever can send one can pin


class Afterwards:
    """Wishes of one engine's requests that wait for their stores."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link
        self._waiting: dict[str, tuple[Sequence[bytes], int, Wishes]] = {}
        self._pins: list[tuple[float, int]] = []  # a heap of (end, bytes)
        self._pinned = 0
        self._daemon = b""  # the run of the daemon that has them pinned

    def finished(self, request_id: str, keys: Sequence[bytes], nbytes: int, wishes: Wishes, *, storing: bool) -> None:
        """A request is over. keys: of all its objects, which are of `nbytes` bytes. storing: not all are stored yet."""
        if not keys:
            return
        if storing:
            self._waiting[request_id] = (keys, nbytes, wishes)
        else:
            self._carry_out(keys, nbytes, wishes)

    def stored(self, request_ids: Iterable[str]) -> None:
        """Nothing of these requests is on its way any more."""
        for request_id in request_ids:
            waiting = self._waiting.pop(request_id, None)
            if waiting is not None:
                self._carry_out(*waiting)

    def _carry_out(self, keys: Sequence[bytes], nbytes: int, wishes: Wishes) -> None:
        if wishes.keep or wishes.priority:
            self._link.keep(keys, wishes.keep, wishes.priority)
        if wishes.pin and self._room(nbytes, wishes.pin):
            self._link.pin(keys, wishes.pin)
        elif wishes.demote:
            self._link.demote(keys, wishes.demote)
        if wishes.returns_in:
            self._link.announce(keys, wishes.returns_in, _RETURN_HOLD_S)

    def _room(self, nbytes: int, seconds: float) -> bool:
        now = time.monotonic()
        if self._daemon != self._link.instance:
            self._daemon, self._pins, self._pinned = self._link.instance, [], 0
        while self._pins and self._pins[0][0] <= now:
            self._pinned -= heapq.heappop(self._pins)[1]
        if self._pinned + nbytes > self._link.arena_bytes // _PIN_SHARE:
            self._link.count("wish.no_room", 1)
            _log.warning(
                "%d bytes are not pinned for a request: with the %d bytes pinned for others they are more than a "
                "quarter of the daemon's memory; ask for fewer or shorter pins, or give it more",
                nbytes,
                self._pinned,
            )
            return False
        self._pinned += nbytes
        heapq.heappush(self._pins, (now + seconds, nbytes))
        return True
