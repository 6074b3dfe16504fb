# SPDX-License-Identifier: Apache-2.0
"""One HTTP connection: uvicorn's, with ends to what it leaves without one.

uvicorn waits for ever for a request's head, keeps whatever length of it comes, and reads a body on that was answered
already. Here a head has to come whole in `HEAD_S` and `HEAD_BYTES`, and the rest of an answered body in `REST_S`.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from loracache.rest.limits import ABORT

__all__ = ["LimitedConnection"]

_CLOSE_S = 5.0
_HEALTH = (b"/healthz", b"/readyz", b"/metrics")


class LimitedConnection(HttpToolsProtocol):
    """For uvicorn's `http`."""

    HEAD_S = 10.0
    HEAD_BYTES = 64 << 10
    REST_S = 5.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._in_body = False  # between a head's end and its body's
        self.only_health = False  # the others are answered 503: there are too many connections
        self.ended: Callable[[], None] = lambda: None
        self._unused = 0  # bytes since the last that were body or ended a head: head, trailer, framing

    @property
    def busy(self) -> bool:
        """Whether a request is on its way: its head is whole, its answer not. The rest of its body may come still."""
        return not self._idle()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's."""
        super().connection_made(transport)
        self._within(self.HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._in_time()
        self.ended()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._unused += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unused > self.HEAD_BYTES:
            self.send_400_response(f"What is not a body has at most {self.HEAD_BYTES} bytes.")
        elif not self._in_body and self._timer is None and self._idle():
            self._within(self.HEAD_S)  # uvicorn's own timer between requests ends with the first byte

    # -- the parser's callbacks ----------

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        """A head has ended."""
        self._in_time()
        self._in_body = True
        self._unused = 0
        if self.only_health:
            self.limit_concurrency = None if self.url.partition(b"?")[0] in _HEALTH else 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A body, or a head that has none, has ended."""
        self._in_time()
        self._in_body = False
        self._unused = 0
        super().on_message_complete()

    # -- uvicorn's ----------

    def on_response_complete(self) -> None:
        """An answer is out, perhaps before its request was in. Closing at once could take the answer along."""
        if self._in_body and self._idle():
            self._within(self.REST_S)
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came."""
        self._end()

    # -- inside ----------

    def _idle(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _within(self, seconds: float) -> None:
        self._in_time()
        self._timer = self.loop.call_later(seconds, self._end)

    def _in_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        """Close, and not wait long for a client that does not take what is left."""
        self.transport.close()
        self.loop.call_later(_CLOSE_S, self.transport.abort)
