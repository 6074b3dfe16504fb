# SPDX-License-Identifier: Apache-2.0
"""JSON over HTTP to one OpenAI server, by TCP, TLS or a unix socket. Runs on the caller's event loop."""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass
from typing import Any

import httpx

from loracache.batch.servers import base_url, checked_key
from loracache.errors import ProtocolError, Unavailable

__all__ = ["Answer", "Server"]

_CONNECT_S = 10.0
_HUNG_UP = "server disconnected", "peer closed"  # how the client's library begins to say so


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered. body: its JSON; its text where it is none."""

    status: int
    body: Any


class Server:
    """The server at `url`: http://HOST:PORT, https://HOST:PORT or unix:///PATH, each with or without /v1 behind. Raises
    ConfigError for another. key: sent as a bearer token. timeout: seconds for an answer."""

    def __init__(self, url: str, key: str = "", timeout: float = 3600.0) -> None:
        self.url = base_url(url, "--url", sockets=True)
        self._timeout = timeout
        key = checked_key(key)
        parts = urllib.parse.urlsplit(self.url)
        local = parts.scheme == "unix"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)  # the caller bounds its requests
        self._client = httpx.AsyncClient(
            base_url="http://localhost" if local else self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=limits,
            transport=httpx.AsyncHTTPTransport(uds=parts.path, limits=limits) if local else None,
        )

    async def close(self) -> None:
        """End all connections."""
        await self._client.aclose()

    async def get(self, path: str, timeout: float | None = None) -> Answer:
        """GET it. Raises as `post`."""
        return await self._ask("GET", path, None, timeout)

    async def post(self, path: str, body: Any, timeout: float | None = None) -> Answer:
        """POST a JSON body. Raises Unavailable where no answer comes, ProtocolError where it is not HTTP."""
        return await self._ask("POST", path, json.dumps(body, separators=(",", ":")).encode(), timeout)

    async def _ask(self, method: str, path: str, content: bytes | None, timeout: float | None) -> Answer:
        seconds = self._timeout if timeout is None else timeout
        headers = {"Content-Type": "application/json"} if content is not None else {}
        limit = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_S), pool=None)
        try:
            answer = await self._client.request(method, path, content=content, headers=headers, timeout=limit)
        except httpx.TimeoutException:
            raise Unavailable(f"{self.url} did not answer within {seconds:g} s") from None
        except httpx.RemoteProtocolError as error:
            if str(error).lower().startswith(_HUNG_UP):
                raise Unavailable(f"{self.url} closed the connection before its answer ended") from None
            raise ProtocolError(f"{self.url} did not answer in HTTP: {error}") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"no server answers at {self.url} ({error})") from None
        try:
            return Answer(answer.status_code, answer.json())
        except (ValueError, RecursionError):
            return Answer(answer.status_code, answer.text)
