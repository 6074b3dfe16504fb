# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 to one OpenAI server, over TCP, TLS or a unix socket: connections that are kept, one request on each.

Runs on the caller's event loop. The standard library alone: what a batch needs is a POST and its whole answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import urllib.parse
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from loracache.errors import ConfigError, ProtocolError, Unavailable

__all__ = ["Answer", "Server"]

_MOST_HEAD, _MOST_BODY = 64 << 10, 1 << 30  # bytes
_CONNECT_S = 10.0
_Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered. body: its JSON; its text where it is none."""

    status: int
    body: Any


class Server:
    """The server at `url`: http://HOST:PORT, https://HOST:PORT or unix:///PATH, each with or without /v1 behind. Raises
    ConfigError for another. key: sent as a bearer token. timeout: seconds for an answer."""

    def __init__(self, url: str, key: str = "", timeout: float = 3600.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        try:
            parts = urllib.parse.urlsplit(self.url)
            port = parts.port
        except ValueError:
            parts, port = urllib.parse.SplitResult("", "", "", "", ""), None
        self._path = parts.path if parts.scheme == "unix" else ""
        self._host = parts.hostname or ""
        right = bool(self._path) if parts.scheme == "unix" else parts.scheme in ("http", "https") and bool(self._host)
        if not right or "@" in url or not url.isascii() or not url.isprintable() or set(url) & set(" ?#"):
            raise ConfigError(f"--url {url[:200]!r} is no server's address; write it like http://127.0.0.1:8000/v1")
        if not key.isascii() or not key.isprintable():
            raise ConfigError("the server's API key is not one line of ASCII; see VLLM_API_KEY")
        self._prefix = "" if parts.scheme == "unix" else parts.path
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        name = "localhost" if self._path else parts.netloc
        self._head = f"Host: {name}\r\nAccept: application/json\r\n" + (
            f"Authorization: Bearer {key}\r\n" if key else ""
        )
        self._idle: list[_Wire] = []

    async def close(self) -> None:
        """End all connections."""
        while self._idle:
            _, writer = self._idle.pop()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await asyncio.sleep(0)  # in which the loop closes the sockets of those that broke

    async def get(self, path: str, timeout: float | None = None) -> Answer:
        """GET it. Raises as `post`."""
        return await self._ask(f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode(), timeout)

    async def post(self, path: str, body: Any, timeout: float | None = None) -> Answer:
        """POST a JSON body. Raises Unavailable where no answer comes, ProtocolError where it is not HTTP."""
        data = json.dumps(body, separators=(",", ":")).encode()
        about = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}{about}".encode()
        return await self._ask(head + data, timeout)

    async def _ask(self, request: bytes, timeout: float | None) -> Answer:
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                while self._idle:
                    with contextlib.suppress(_Stale):
                        return await self._exchange(self._idle.pop(), request, kept=True)
                return await self._exchange(await self._connected(), request, kept=False)
        except TimeoutError:
            raise Unavailable(f"{self.url} did not answer within {seconds:g} s") from None
        except asyncio.IncompleteReadError:
            raise Unavailable(f"{self.url} closed the connection before its answer ended") from None
        except OSError as error:
            raise Unavailable(f"no server answers at {self.url} ({error.strerror or error})") from None
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise ProtocolError(f"{self.url} did not answer in HTTP: {error}") from None

    async def _connected(self) -> _Wire:
        async with asyncio.timeout(_CONNECT_S):
            if self._path:
                return await asyncio.open_unix_connection(self._path, limit=_MOST_HEAD)
            return await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_MOST_HEAD)

    async def _exchange(self, wire: _Wire, request: bytes, *, kept: bool) -> Answer:
        """Raises _Stale where a kept connection turns out to be closed before anything came."""
        reader, writer = wire
        done = False
        try:
            try:
                writer.write(request)
                await writer.drain()
                first = await reader.readexactly(1)
            except (asyncio.IncompleteReadError, OSError):
                if kept:
                    raise _Stale from None
                raise
            status, headers = _parsed(first + await reader.readuntil(b"\r\n\r\n"))
            body = b"".join([part async for part in _body(reader, headers)])
            done = headers.get("connection", "").lower() != "close" and _ends_itself(headers)
        finally:
            if done:
                self._idle.append(wire)
            else:
                writer.close()
        try:
            return Answer(status, json.loads(body))
        except (ValueError, RecursionError):
            return Answer(status, body.decode(errors="replace"))


class _Stale(Exception):
    """The server closed a connection that was kept: another one is taken."""


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    """(status, headers). Raises ValueError."""
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, *_ = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"it began with {first[:40]!r}")
    pairs = (line.split(":", 1) for line in lines if line)
    return int(status), {name.strip().lower(): value.strip() for name, value in pairs}


def _ends_itself(headers: dict[str, str]) -> bool:
    return "content-length" in headers or headers.get("transfer-encoding", "").lower() == "chunked"


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Parts of an answer's body. Raises ValueError where it is malformed or too large."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        total = 0
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            total += size
            if not 0 < total <= _MOST_BODY:
                raise ValueError(f"an answer of more than {_MOST_BODY >> 20} MiB")
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return
    if "content-length" not in headers:
        yield await reader.read(_MOST_BODY)
        return
    length = int(headers["content-length"])
    if not 0 <= length <= _MOST_BODY:
        raise ValueError(f"an answer of {length} bytes")
    yield await reader.readexactly(length)
