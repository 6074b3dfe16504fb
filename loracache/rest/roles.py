# SPDX-License-Identifier: Apache-2.0
"""What a route needs of who calls it. A route says so by a dependency:

    @app.post("/v1/evict", dependencies=[needs("operate", tenants=True)])
    async def pin(body: Pin, who: Annotated[Principal, needs("operate")]) -> ...:

and `guard`, called when all routes are there, checks it before a byte of the body is read. A route that says nothing
needs an admin. The dependency checks too, so that a route which `guard` never saw is not open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.routing import APIRoute
from fastapi.security.base import SecurityBase
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from loracache.rest.limits import Limits, limited
from loracache.rest.problems import problem
from loracache.rest.tokens import ANONYMOUS, RANKS, Principal, Role
from loracache.tracing import span

__all__ = ["Needs", "guard", "needs", "needs_of"]

_WHERE = "`loracache tokens add NAME --role {role}` makes one; the daemon's own stands in the file SOCKET.token"


class Needs(SecurityBase):
    """role: the least that will do; "none": everybody, whatever token they send. tenants: whether a tenant's token
    will do; only for what is restricted to its salt. upload: the body is a file, with a limit of its own. endless: the
    answer is a stream without an end.
    """

    def __init__(self, role: Role, *, tenants: bool = False, upload: bool = False, endless: bool = False) -> None:
        self.role = role
        self.tenants = tenants
        self.upload = upload
        self.endless = endless
        self.model = HTTPBearer(description="loracache tokens add NAME --role ROLE")
        self.scheme_name = "token"

    async def __call__(self, request: Request) -> Principal:
        """The dependency: who calls. Raises HTTPException where that does not suffice."""
        principal: Principal = request.state.principal
        if refused := self.refusal(principal):
            status, detail, headers = refused
            raise HTTPException(status, detail, headers)
        return principal

    def refusal(self, principal: Principal) -> tuple[int, str, dict[str, str]] | None:
        """Status, what to do, headers; None where `principal` may."""
        if self.role == "none":
            return None
        where = _WHERE.format(role=self.role)
        if principal.name == ANONYMOUS:
            if RANKS[principal.role] >= RANKS[self.role]:
                return None
            return (
                401,
                f"this needs `Authorization: Bearer TOKEN` with a known token of role {self.role}; {where}",
                {"www-authenticate": "Bearer"},
            )
        if RANKS[principal.role] < RANKS[self.role]:
            return 403, f"token {principal.name!r} has role {principal.role}; this needs {self.role}: {where}", {}
        if principal.tenant and not self.tenants:
            return 403, f"token {principal.name!r} is a tenant's; this needs one without a tenant: {where}", {}
        return None


def needs(role: Role, *, tenants: bool = False, upload: bool = False, endless: bool = False) -> Any:
    """For a route's `dependencies`, or in the annotation of a parameter that is then the Principal; see `Needs`."""
    return Depends(Needs(role, tenants=tenants, upload=upload, endless=endless))


def needs_of(app: FastAPI, route: BaseRoute, others: Mapping[str, Needs] | None = None) -> Needs:
    """What a route needs: what it says, or an admin. Raises ValueError where it says two things."""
    if isinstance(route, APIRoute):
        said = [found.call for found in route.dependant.dependencies if isinstance(found.call, Needs)]
        if len(said) > 1:
            raise ValueError(f"{route.path} says twice what it needs")
        return said[0] if said else Needs("admin")
    path = getattr(route, "path", "")
    return (others or {}).get(path) or Needs("read" if path == app.openapi_url else "admin")


def guard(app: FastAPI, limits: Limits, others: Mapping[str, Needs] | None = None) -> None:
    """Put a guard before every route there is. others: what mounts and plain routes need, by path; an admin where
    they are not in it. Raises TypeError at a route of a kind that cannot be guarded.
    """
    for route in app.router.routes:
        if not isinstance(route, Route | Mount):
            raise TypeError(f"{route!r} cannot be guarded")
        route.app = _Guard(route.app, needs_of(app, route, others), limits)


class _Guard:
    """Before a route: roles first, then the limits on its body and time."""

    def __init__(self, app: ASGIApp, need: Needs, limits: Limits) -> None:
        self._app = app
        self._need = need
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refused := self._need.refusal(scope["state"]["principal"]):
            status, detail, headers = refused
            await problem(status, detail, headers=headers)(scope, receive, send)
            return
        need = self._need
        with span(f"{scope['method']} {scope['route'].path if 'route' in scope else scope['path']}"):
            await limited(self._app, scope, receive, send, self._limits, upload=need.upload, endless=need.endless)
