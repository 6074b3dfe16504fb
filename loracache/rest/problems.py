# SPDX-License-Identifier: Apache-2.0
"""Errors as problem documents (RFC 9457): what is wrong, in which field, with which value, and the fix."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from loracache.errors import LoRACacheError, ProtocolError, Unavailable, Unknown

__all__ = ["Problem", "install", "problem", "problems"]

_log = logging.getLogger(__name__)
_MEDIA_TYPE = "application/problem+json"


class WrongField(BaseModel):
    """One field of a request that is wrong."""

    field: str = Field(description="Where it stands: body.keys.3, path.name, query.limit, header.authorization.")
    value: str = Field(description="What stood there, cut short; nothing of secrets.")
    message: str = Field(description="What is wrong with it.")


class Problem(BaseModel):
    """RFC 9457."""

    type: str = Field("about:blank", description="Always about:blank: the status says what kind it is.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong here, and what to do.")
    errors: list[WrongField] = Field([], description="The fields that are wrong.")


_WHEN = {
    400: "No HTTP, or no JSON", 401: "No token, or one that is not known", 403: "Not from here, or not with this token",
    404: "There is no such thing", 408: "The body did not arrive in time", 413: "The body is too large",
    409: "The daemon refuses", 422: "A field is wrong", 429: "Too many requests", 503: "No daemon answers",
    415: "Not the type of body that is taken here", 504: "Not done in time", 507: "No room for it",
}  # fmt: skip


_CONTENT = {_MEDIA_TYPE: {"schema": Problem.model_json_schema()}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the problems it may answer with."""
    return {status: {"description": _WHEN[status], "content": _CONTENT} for status in statuses}


def problem(
    status: int, detail: str, errors: list[WrongField] | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A problem document."""
    title = HTTPStatus(status).phrase
    body = Problem(type="about:blank", title=title, status=status, detail=detail, errors=errors or [])
    return JSONResponse(body.model_dump(), status, headers, _MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Have every error of the application answered as a problem document."""

    @app.exception_handler(RequestValidationError)
    async def _wrong_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        found = [
            WrongField(
                field=".".join(map(str, item["loc"])),
                value=reprlib.repr(item.get("input"))[:200],
                message=str(item["msg"]).removeprefix("Value error, "),
            )
            for item in error.errors()[:20]
        ]
        first = found[0]
        return problem(422, f"{first.field}: {first.message}, not {first.value}", found)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(LoRACacheError)
    async def _ours(request: Request, error: LoRACacheError) -> JSONResponse:
        gone = isinstance(error, Unavailable | ProtocolError)
        status = 503 if gone else 404 if isinstance(error, Unknown) else 409
        return problem(status, str(error), headers={"retry-after": "1"} if gone else None)

    @app.exception_handler(Exception)
    async def _ours_too(request: Request, error: Exception) -> JSONResponse:
        _log.exception("%s %s failed", request.method, request.url.path)
        return problem(500, "an error of this server; its log says which")
