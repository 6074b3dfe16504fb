# SPDX-License-Identifier: Apache-2.0
"""What one connection has sent and nobody has served yet: frames as they come, within bounds of size and time.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Generator

from loracache.errors import ProtocolError
from loracache.wire.frames import LARGE, Frames, unpack, unpack_in_slices

__all__ = ["PAUSE", "Inbox"]

_WHOLE_S = 30.0  # a frame that has begun is complete by then
_MOST_BYTES = 32 << 20  # that one client, with all its connections, may have waiting
PAUSE = object()  # stands between two slices of a long message


class Inbox:
    """Cuts and decodes. waiting: the bytes that each client has in all its inboxes. late(error): a frame that has begun
    does not end."""

    def __init__(self, client: int, waiting: Counter[int], late: Callable[[ProtocolError], None]) -> None:
        self._client = client
        self._waiting = waiting
        self._late = late
        self._frames = Frames()
        self._counted = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, data: bytes) -> None:
        """Take bytes as they came. Raises ProtocolError where the client has too many waiting."""
        self._frames.add(data)
        self._count()
        if self._counted and self._waiting[self._client] > _MOST_BYTES:
            raise ProtocolError(
                f"{self._waiting[self._client]} bytes of messages wait on this client's connections; the limit is "
                f"{_MOST_BYTES}: send them one after another"
            )

    def messages(self) -> Generator[object, None, None]:
        """Those that are complete, decoded, and PAUSE between the slices of a long one. Raises ProtocolError."""
        while (body := self._frames.take()) is not None:
            self._in_time()
            if len(body) <= LARGE:
                yield unpack(body)
                continue
            self._count()
            decoding = unpack_in_slices(body)
            while True:
                try:
                    next(decoding)
                except StopIteration as end:
                    yield end.value
                    break
                yield PAUSE

    def rest(self) -> None:
        """All that was complete is served: what is left has its time to become so."""
        self._count()
        if len(self._frames) and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WHOLE_S, self._too_late)

    def close(self) -> None:
        """Forget it all."""
        self._in_time()
        self._frames = Frames()
        self._count()

    def _count(self) -> None:
        now = len(self._frames)
        if now > LARGE or self._counted:
            self._waiting[self._client] += now - self._counted
            self._counted = now
            if not self._waiting[self._client]:
                del self._waiting[self._client]

    def _in_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        self._late(
            ProtocolError(f"{len(self._frames)} bytes of a frame came, and the rest of it not within {_WHOLE_S:g} s")
        )
