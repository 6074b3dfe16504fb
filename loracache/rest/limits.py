# SPDX-License-Identifier: Apache-2.0
"""How much a client may ask for: requests a second, bytes of a body, seconds of a request.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loracache.rest.problems import problem

__all__ = ["ABORT", "Limits", "Rates", "address_of", "limited", "network_of"]

ABORT = "loracache.abort"  # in a scope: ends its connection without a word (connections.py)
_MOST_KEYS = 10_000
_COUNTED_BYTES, _MOST_COUNTED = 16 << 10, 8 << 20  # of a body: what takes about as long as a request


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds: of a request, body and answer included; more than the 60 that a call of the daemon may take.
    body, upload: most bytes of a body, and of one where a file is uploaded. pace: bytes a second that an upload comes
    in with at least, once `seconds` are over.
    """

    seconds: float = 75.0
    body: int = 8 << 20
    upload: int = 4 << 30
    pace: int = 256 << 10


class Rates:
    """A token bucket for each key, of a second's worth of requests (one at least). rate: requests a second; 0: any."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._most = max(1.0, rate)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was

    def wait(self, key: str, nbytes: int = 0) -> float:
        """0, and the request counts, one more for every 16 KiB of its body; or the seconds until it may come again."""
        if not self.rate:
            return 0.0
        now = self._clock()
        left, then = self._buckets.get(key, (self._most, now))
        left = min(self._most, left + (now - then) * self.rate)
        cost = min(1 + min(nbytes, _MOST_COUNTED) // _COUNTED_BYTES, self._most)
        may = left >= cost
        self._buckets[key] = (left - cost if may else left, now)
        self._buckets.move_to_end(key)
        if len(self._buckets) > _MOST_KEYS:
            self._buckets.popitem(last=False)
        return 0.0 if may else (cost - left) / self.rate


def address_of(scope: Scope) -> str:
    """Where a request comes from, as `network_of`."""
    return network_of(str(scope["client"][0]) if scope.get("client") else "")


def network_of(host: str) -> str:
    """An IPv4 address, or the /64 of an IPv6 one, of which a client has as many as it likes."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))


async def limited(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, limits: Limits, *, upload: bool, endless: bool
) -> None:
    """Run `app` within the limits. upload: the body is one. endless: the answer has no end, but each part of it has to
    be taken in time.
    """
    headers = Headers(scope=scope)
    length = headers.get("content-length", "0")
    body = _Body(receive, limits, upload, expected=length != "0" or "transfer-encoding" in headers)
    answer = _Answer(send, limits.seconds if endless else None)
    if not length.isascii() or not length.isdigit() or len(length) > 18 or int(length) > body.most:
        await body.too_large()(scope, receive, send)
        return
    try:
        async with asyncio.timeout(None if endless else limits.seconds) as body.timer:
            await app(scope, body.receive, answer.send)
    except (TimeoutError, ClientDisconnect):  # starlette makes the second of the first, in a stream
        if not (body.timer.expired() or answer.stuck):
            raise
        if answer.started:
            await _abort(scope, receive)
        else:
            await body.late()(scope, receive, send)


async def _abort(scope: Scope, receive: Receive) -> None:
    """End the connection: half an answer cannot become another one."""
    scope[ABORT]()
    while (await receive())["type"] != "http.disconnect":
        pass


class _Body:
    """A request's body on its way in, counted as it comes: its length may be said by nobody."""

    def __init__(self, receive: Receive, limits: Limits, upload: bool, *, expected: bool) -> None:
        self._receive = receive
        self._limits = limits
        self._upload = upload
        self.most = limits.upload if upload else limits.body
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + limits.seconds
        self._received = 0
        self._whole = not expected
        self.timer = asyncio.timeout(None)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or self._whole:
            return message
        self._received += len(message.get("body", b""))
        if self._received > self.most:
            raise HTTPException(413, self._too_large())
        self._whole = not message.get("more_body", False)
        if self._upload and self.timer.when() is not None and not self.timer.expired():
            # What comes steadily may take its time, and what follows the last byte has as much as any request.
            in_time = self._deadline + self._received / self._limits.pace
            self.timer.reschedule(self._loop.time() + self._limits.seconds if self._whole else in_time)
        return message

    def too_large(self) -> ASGIApp:
        return problem(413, self._too_large())

    def late(self) -> ASGIApp:
        if not self._whole:
            return problem(408, f"the body did not arrive within {self._limits.seconds:g} s")
        return problem(
            504,
            f"not done within {self._limits.seconds:g} s; what was asked for may still happen",
            None,
            {"retry-after": "1"},
        )

    def _too_large(self) -> str:
        return f"a body has at most {self.most} bytes here"


class _Answer:
    """An answer on its way out. patience: seconds that one part may wait for its client, where that is limited."""

    def __init__(self, send: Send, patience: float | None) -> None:
        self._send = send
        self._patience = patience
        self.started = False
        self.stuck = False

    async def send(self, message: Message) -> None:
        self.started = True
        if self._patience is None:
            await self._send(message)
            return
        try:
            async with asyncio.timeout(self._patience) as timer:
                await self._send(message)
        except TimeoutError:
            self.stuck = timer.expired()
            raise
