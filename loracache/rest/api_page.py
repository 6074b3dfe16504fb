# SPDX-License-Identifier: Apache-2.0
"""The page at `/docs`: Swagger UI, shipped with us, upon our OpenAPI document. It loads nothing from elsewhere.

It stands in the dashboard's origin, so the dashboard's policy holds for it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Response
from fastapi import Path as InPath
from starlette.exceptions import HTTPException

from loracache.rest.dashboard import HEADERS, TYPES
from loracache.rest.roles import needs

__all__ = ["add_routes"]

_FOLDER = Path(__file__).with_name("api_page")
_PAGE = "index.html"
_PARTS = {
    "start.js": _FOLDER / "start.js",
    "swagger-ui-bundle.js": _FOLDER / "swagger_ui" / "swagger-ui-bundle.js",
    "swagger-ui.css": _FOLDER / "swagger_ui" / "swagger-ui.css",
}


def add_routes(app: FastAPI) -> None:
    """Put the routes into the application."""

    @app.get("/docs", dependencies=[needs("read")], include_in_schema=False)
    async def page() -> Response:
        """The page, for a browser."""
        return Response(_content(_FOLDER / _PAGE), media_type="text/html; charset=utf-8", headers=HEADERS)

    @app.get("/docs/{name}", dependencies=[needs("read")], include_in_schema=False)
    async def part(name: Annotated[str, InPath(max_length=100)]) -> Response:
        """Its scripts and styles."""
        if name not in _PARTS:
            raise HTTPException(404, f"the API's page has no part {name!a}")
        return Response(_content(_PARTS[name]), media_type=TYPES[Path(name).suffix], headers=HEADERS)


@functools.cache
def _content(path: Path) -> bytes:
    """Read when it is first asked for: few look at the page, and its script is large."""
    return path.read_bytes()
