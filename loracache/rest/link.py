# SPDX-License-Identifier: Apache-2.0
"""The REST process's connection to the daemon: calls of many HTTP requests on one socket, made again when it is lost.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from loracache.client.connection import Connection
from loracache.errors import LoRACacheError, Unavailable
from loracache.tracing import span
from loracache.wire import protocol

__all__ = ["DaemonLink"]

_GREETING_POLL_S = 0.002


class DaemonLink:
    """`call` sends a request and waits for its answer. timeout: seconds for an answer, where the call names none."""

    def __init__(self, server: str, timeout: float = 10.0) -> None:
        self._connection = Connection(server, name="rest")
        self._timeout = timeout
        self._connecting = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._descriptor = -1
        self._sent = asyncio.Event()  # the socket has taken all there was
        self._sent.set()

    async def call(self, request: protocol.Request, timeout: float | None = None) -> Any:
        """The answer's payload. Raises Unavailable where none comes in time, Rejected where the daemon refuses."""
        limit = self._timeout if timeout is None else timeout
        try:
            with span(f"daemon {request.operation}"):
                async with asyncio.timeout(limit):
                    return await self._answer(request)
        except TimeoutError:
            raise Unavailable(f"the daemon did not answer within {limit:g} s") from None

    def close(self) -> None:
        """The last call."""
        self._unwatch()
        self._connection.close()

    async def _answer(self, request: protocol.Request) -> Any:
        await self._connected()
        while not self._sent.is_set():
            await self._sent.wait()
            await self._connected()
        try:
            number = self._connection.send(request)
        except LoRACacheError:
            self._unwatch()
            raise
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        if self._connection.unsent:
            self._sent.clear()
            asyncio.get_running_loop().add_writer(self._descriptor, self._arrived)
        try:
            return await future
        finally:
            self._waiting.pop(number, None)
            self._connection.forget(number)

    async def _connected(self) -> None:
        async with self._connecting:
            if self._connection.connected:
                return
            self._unwatch()
            self._connection.begin()
            while not self._connection.greeted():
                await asyncio.sleep(_GREETING_POLL_S)
            self._descriptor = self._connection.fileno()
            asyncio.get_running_loop().add_reader(self._descriptor, self._arrived)

    def _unwatch(self) -> None:
        self._sent.set()
        if self._descriptor >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._descriptor)
            loop.remove_writer(self._descriptor)
            self._descriptor = -1

    def _arrived(self) -> None:
        descriptor, lost = self._descriptor, None
        try:
            self._connection.poll()
        except LoRACacheError as error:
            lost = error
        for number, future in list(self._waiting.items()):
            try:
                reply = self._connection.take(number)
            except LoRACacheError as error:
                if not future.done():
                    future.set_exception(lost or error)
                continue
            if reply is not None and not future.done():
                future.set_result(reply.payload)
        if not self._connection.connected:
            self._unwatch()
        elif not self._connection.unsent:
            self._sent.set()
            asyncio.get_running_loop().remove_writer(descriptor)
