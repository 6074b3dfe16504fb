# SPDX-License-Identifier: Apache-2.0
"""The application: health and statistics here; the other routes in objects.py, listings.py, adapters.py,
quotas.py, dashboard.py and api_page.py.

Every route is one call of the daemon, or few; nothing is kept here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

from loracache import __version__
from loracache.rest import adapters, api_page, dashboard, listings, objects, quotas
from loracache.rest.limits import Limits
from loracache.rest.link import DaemonLink
from loracache.rest.metrics import render
from loracache.rest.problems import install, problems
from loracache.rest.roles import guard, needs
from loracache.tiers import tier_state
from loracache.wire import control_messages, protocol

__all__ = ["make_app"]

_READY_S = 1.0


def make_app(server: str, limits: Limits | None = None, uploads: Path | None = None) -> FastAPI:
    """The application of the daemon at `server` (unix:// URL). Who calls is for `Access` to say, before it. uploads:
    where uploaded files stand until they are taken in.
    """
    link = DaemonLink(server)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        link.close()

    app = FastAPI(
        title="LoRACache",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load their scripts from elsewhere
        redoc_url=None,
        summary="One cache for everything an LLM server reads again: its control API.",
        responses=problems(400, 401, 403, 429, 503, 504),
    )
    install(app)
    _health(app, link)
    objects.add_routes(app, link)
    listings.add_routes(app, link)
    adapters.add_routes(app, link, uploads or Path(tempfile.gettempdir()))
    quotas.add_routes(app, link)
    dashboard.add_routes(app)
    api_page.add_routes(app)
    guard(app, limits or Limits())
    return app


def _health(app: FastAPI, link: DaemonLink) -> None:
    @app.get("/healthz", dependencies=[needs("none")], tags=["health"])
    async def healthz() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/readyz", dependencies=[needs("none")], tags=["health"])
    async def readyz() -> dict[str, str]:
        """The daemon answers; of tiers that do less than they should, how much they do. Why says `/v1/stats`."""
        (status,) = await link.call(protocol.Status(), _READY_S)
        return {"status": "ok"} | {
            name: tier_state(tier) for name, tier in status["tiers"].items() if tier_state(tier) != "ok"
        }

    @app.get("/v1/stats", dependencies=[needs("read")], tags=["health"])
    async def stats() -> dict[str, Any]:
        """Tiers, bytes, objects, leases and all counters, as `loracache status --json`."""
        (status,) = await link.call(protocol.Status())
        return dict(status)

    @app.get("/v1/config", dependencies=[needs("admin")], tags=["health"])
    async def config() -> dict[str, Any]:
        """The daemon's settings; of secrets only whether they are set."""
        (settings,) = await link.call(control_messages.ConfigShow())
        return dict(settings)

    @app.get(
        "/metrics",
        dependencies=[needs("read")],
        tags=["health"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """For Prometheus."""
        (status,) = await link.call(protocol.Status())
        return Response(render(status), media_type="text/plain; version=0.0.4; charset=utf-8")
