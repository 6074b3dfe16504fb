"""Who may do what over HTTP: a bearer token for whatever changes the cache, and no web page at all.

A page in a browser on the same machine can send requests to a loopback port. It is kept out three times over: its
requests carry an Origin, a name that was re-pointed at 127.0.0.1 shows in Host, and it does not know the token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from loracache.server.rest.problems import problem

__all__ = ["Access", "make_token", "token_path"]

_SAFE = {"GET", "HEAD", "OPTIONS"}
_READS = {"/v1/lookup"}  # POST for its body's sake


def token_path(socket: str | os.PathLike[str]) -> Path:
    """Where a daemon's token stands: beside its socket."""
    return Path(f"{os.fspath(socket)}.token")


def make_token(path: Path) -> str:
    """The token in `path` (mode 0600), written there first where it is missing. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        token = path.read_text().strip()
        if token:
            return token
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return token


class Access:
    """ASGI middleware. hosts: the Host headers that are answered. token: what changes need; only its digest is kept."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str, most_body: int) -> None:
        self._app = app
        self._hosts = hosts
        self._digest = _digest(token)
        self._most_body = most_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what may not pass; hand the rest on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if host not in self._hosts:
            return problem(403, f"this server does not answer for host {host[:100]!r}; use {min(self._hosts)}")
        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"http://{host}":
            return problem(403, f"requests from {origin[:100]!r} are not answered")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return problem(400, f"content-length {length[:40]!r} is no number")
        if int(length) > self._most_body or (scope["method"] not in _SAFE and "transfer-encoding" in headers):
            return problem(413, f"a body has a content-length of at most {self._most_body} bytes")
        if scope["method"] in _SAFE or scope["path"] in _READS:
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(_digest(token.strip()), self._digest):
            return None
        return problem(
            401, "changes need `Authorization: Bearer TOKEN`; the token stands in the file beside the daemon's socket, "
            "PATH.token", headers={"www-authenticate": "Bearer"},
        )  # fmt: skip


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
