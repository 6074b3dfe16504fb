# SPDX-License-Identifier: Apache-2.0
"""Routes of the dashboard: one page at `/` and its parts under `/assets`, read once from the folder beside this file.

They hold no data, so everybody gets them; what the page then asks for needs what those routes need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Response
from fastapi import Path as InPath
from starlette.exceptions import HTTPException

from loracache.rest.problems import problems
from loracache.rest.roles import needs

__all__ = ["HEADERS", "TYPES", "add_routes"]

_FOLDER = Path(__file__).with_name("dashboard")
_PAGE = "index.html"
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_ASSETS = (
    "actions.js", "api.js", "chart.js", "details.js", "dom.js", "feed.js", "format.js", "history.js", "layout.css",
    "main.js", "operations.js", "overview.js", "quotas.js", "search.js", "signin.js", "style.css", "targets.js",
    "tree.js",
)  # fmt: skip
HEADERS = {
    # Adapters are named by users: were one of them ever taken for markup, nothing of it would run or load.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",  # a new version's page never runs an old version's code
}


def add_routes(app: FastAPI) -> None:
    """Put the routes into the application."""
    page = (_FOLDER / _PAGE).read_bytes()
    assets = {name: (_FOLDER / name).read_bytes() for name in _ASSETS}

    @app.get(
        "/",
        dependencies=[needs("none")],
        tags=["dashboard"],
        response_class=Response,
        responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
    )
    async def dashboard() -> Response:
        """The dashboard, for a browser."""
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    @app.get(
        "/assets/{name}",
        dependencies=[needs("none")],
        tags=["dashboard"],
        response_class=Response,
        responses={200: {"content": {"text/javascript": {"schema": {"type": "string"}}}}, **problems(404, 422)},
    )
    async def asset(name: Annotated[str, InPath(max_length=100, description="One of the page's parts.")]) -> Response:
        """Scripts and styles of the dashboard."""
        if name not in assets:
            raise HTTPException(404, f"the dashboard has no part {name!a}")
        return Response(assets[name], media_type=TYPES[Path(name).suffix], headers=HEADERS)
