# SPDX-License-Identifier: Apache-2.0
"""JSON over HTTP to one OpenAI server, by TCP, TLS or a unix socket. Runs on the caller's event loop."""

from __future__ import annotations

import asyncio
import io
import json
import urllib.parse
from dataclasses import dataclass
from typing import Any

import aiohttp

from loracache.batch import strict_json
from loracache.batch.servers import base_url, checked_key
from loracache.errors import ProtocolError, Unavailable

__all__ = ["Answer", "Server"]

_CONNECT_S = 10.0
_SENT_WHOLE = 1 << 20  # bytes of a body; a longer one goes by way of a thread
_SPARE_NESTING = 100  # levels that Python's JSON reads and writes for what an answer is put into, and its callers
_KEPT_S = 4.0  # a connection that nobody uses: less than the 5 s after which vLLM's server closes it


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
        parts = urllib.parse.urlsplit(self.url)
        self._path = parts.path if parts.scheme == "unix" else ""
        self._base = "http://localhost" if self._path else self.url
        key = checked_key(key)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, timeout: float | None = None) -> Answer:
        """GET it. Raises as `post`."""
        return await self._ask("GET", path, None, timeout)

    async def post(self, path: str, body: Any, timeout: float | None = None) -> Answer:
        """POST a JSON body. Raises Unavailable where no answer comes, ProtocolError where it is not HTTP."""
        return await self._ask("POST", path, json.dumps(body, separators=(",", ":")).encode(), timeout)

    async def _ask(self, method: str, path: str, content: bytes | None, timeout: float | None) -> Answer:
        seconds = self._timeout if timeout is None else timeout
        session = self._session = self._session or self._connected()
        for _ in range(2):  # in which a kept connection's end is noticed, and it is not taken
            await asyncio.sleep(0)
        try:
            async with session.request(
                method,
                self._base + path,
                data=io.BytesIO(content) if content and len(content) > _SENT_WHOLE else content,
                headers={} if content is None else {"Content-Type": "application/json"},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, _CONNECT_S)),
            ) as answer:
                status, body = answer.status, await answer.read()
        except TimeoutError:
            raise Unavailable(f"{self.url} did not answer within {seconds:g} s") from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError):
            raise Unavailable(f"{self.url} closed the connection before its answer ended") from None
        except aiohttp.ClientResponseError as error:
            raise ProtocolError(f"{self.url} did not answer in HTTP: {' '.join(error.message.split())[:200]}") from None
        except (aiohttp.ClientError, OSError) as error:
            told = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise Unavailable(f"no server answers at {self.url} ({told})") from None
        return Answer(status, _read(body))

    def _connected(self) -> aiohttp.ClientSession:
        """A pool of connections, of the running event loop. The caller bounds how many."""
        connector: aiohttp.BaseConnector
        if self._path:
            connector = aiohttp.UnixConnector(self._path, limit=0, keepalive_timeout=_KEPT_S)
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S)
        proxied = not self._path  # by the address that the environment names
        return aiohttp.ClientSession(connector=connector, headers=self._headers, trust_env=proxied)


def _read(body: bytes) -> Any:
    """Its JSON; its text where it is none, or nests too deeply to be written as a part of something else."""
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        found = strict_json.parse("[" * _SPARE_NESTING + text + "]" * _SPARE_NESTING)
        for _ in range(_SPARE_NESTING):
            (found,) = found
    except (ValueError, RecursionError):
        return body.decode(errors="replace")
    return found
