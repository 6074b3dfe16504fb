# SPDX-License-Identifier: Apache-2.0
"""Who calls: every request passes here first. No web page does, and who sends a token is known by name afterwards.

A page in a browser on the same machine can send requests to a loopback port. It is kept out: its requests say where
they come from (Origin, Sec-Fetch-Site), a name that was re-pointed at this machine shows in Host, and it does not know
a token. What a caller may do is for the routes to say (roles.py). No body is touched here.

Threading: the event loop.
"""

from __future__ import annotations

import dataclasses
import math

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from loracache.rest.limits import Rates, address_of
from loracache.rest.problems import problem
from loracache.rest.tokens import ANONYMOUS, Principal, TokenStore

__all__ = ["Access"]

_STRANGER = Principal(ANONYMOUS, "none")
_NEIGHBOUR = Principal(ANONYMOUS, "read")
_SINGLE = (b"host", b"origin", b"authorization")


class Access:
    """ASGI middleware; leaves a Principal in `request.state.principal`. hosts: the Host headers that are answered.
    open_reading: whether one without a token may read, as on loopback.
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str], tokens: TokenStore, rates: Rates, *, open_reading: bool
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._tokens = tokens
        self._rates = rates
        self._anybody = _NEIGHBOUR if open_reading else _STRANGER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what may not pass; hand the rest on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"nothing here speaks {scope['type']}")
        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers: dict[bytes, str] = {}
        for name, value in scope["headers"]:
            if name in _SINGLE and name in headers:
                return problem(400, f"the header {name.decode()} is there twice")
            headers[name] = value.decode("latin-1")
        host = headers.get(b"host", "").lower()
        if host not in self._hosts:
            return problem(
                403,
                f"this server does not answer for host {host[:100]!a}; use {min(self._hosts)}, or add the name to "
                "http_hosts",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.lower() != f"{scope['scheme']}://{host}":
            return problem(403, f"requests from {origin[:100]!a} are not answered")
        if headers.get(b"sec-fetch-site") in ("cross-site", "same-site") and not _followed_link(scope, headers):
            return problem(403, "requests from other sites are not answered")
        address = scope["client"][0] if scope.get("client") else ""
        principal = dataclasses.replace(self._principal(headers.get(b"authorization")), address=address)
        scope.setdefault("state", {})["principal"] = principal
        key = principal.name if principal.name != ANONYMOUS else f"@{address_of(scope)}"
        if wait := self._rates.wait(key):
            detail = f"more requests than http_rate allows; come again in {wait:.2g} s"
            return problem(429, detail, headers={"retry-after": str(math.ceil(wait))})
        return None

    def _principal(self, authorization: str | None) -> Principal:
        if authorization is None:
            return self._anybody
        # Whoever sends a token means to be somebody: a wrong one is told so, even where none is needed.
        kind, _, token = authorization.partition(" ")
        return (self._tokens.find(token.strip()) if kind.lower() == "bearer" else None) or _STRANGER


def _followed_link(scope: Scope, headers: dict[bytes, str]) -> bool:
    """Whether somebody followed a link to here, which shows them the page and tells the other site nothing."""
    return scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == "navigate"
