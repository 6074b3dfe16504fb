# SPDX-License-Identifier: Apache-2.0
"""Routes that find and change objects by a selector, and those of the operations that this starts."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Query, Response

from loracache.client.control import ALL_TIERS
from loracache.rest import models
from loracache.rest.link import DaemonLink
from loracache.rest.problems import problems
from loracache.rest.prompts import locate_tokens
from loracache.rest.roles import needs
from loracache.rest.tokens import Principal
from loracache.results import Cause, OperationState
from loracache.wire import control_messages as messages
from loracache.wire import protocol

__all__ = ["add_routes", "name_of"]

_MOST_WAIT_S = 60.0
_ANSWER_S = 10.0
_SHORT_S = 10.0  # what is mostly done by then is answered with its result

Reader = Annotated[Principal, needs("read", tenants=True)]
Caller = Annotated[Principal, needs("operate", tenants=True)]
Operator = Annotated[Principal, needs("operate")]
Admin = Annotated[Principal, needs("admin")]
Wait = Annotated[
    float,
    Query(ge=0, le=_MOST_WAIT_S, allow_inf_nan=False, description="Seconds to wait for the end before answering 202."),
]
OperationId = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="As an answer said it.")]
_STARTED: dict[int | str, dict[str, Any]] = {
    202: {"model": models.Operation, "description": "It goes on; Location says where to ask"},
    **problems(404, 409, 413, 422),
}


def name_of(who: Principal) -> str:
    """Who asks, for the audit log."""
    return f"{who.name} (http, {who.address})"


def add_routes(app: FastAPI, link: DaemonLink) -> None:
    """Put the routes into the application."""

    @app.post("/v1/lookup", tags=["objects"], responses=problems(404, 409, 413, 422), response_model=models.Found)
    async def lookup(body: models.Lookup, who: Reader) -> Response:
        """How far what is selected is held, and where. Changes nothing."""
        if body.selector.tokens is not None:
            found = await locate_tokens(link, name_of(who), who.tenant, body.selector)
        else:
            (found,) = await link.call(messages.Locate(name_of(who), who.tenant, body.selector.encode()))
        # As bytes: the framework would check it all a second time, and this is called without pause.
        return Response(models.Found.of(found).model_dump_json(), media_type="application/json")

    _add_changes(app, link)
    _add_flush(app, link)
    _add_moves(app, link)
    _add_operations(app, link)


async def _started(link: DaemonLink, request: Any, response: Response) -> models.Operation:
    """Send what starts an operation; 202 where it goes on."""
    (found,) = await link.call(request, request.wait + _ANSWER_S)
    if found["state"] == OperationState.RUNNING:
        response.status_code = 202
        response.headers["location"] = f"/v1/operations/{found['id']}"
    return models.Operation(**found)


def _add_changes(app: FastAPI, link: DaemonLink) -> None:
    @app.post("/v1/evict", tags=["objects"], responses=_STARTED)
    async def evict(body: models.Evict, who: Caller, response: Response, wait: Wait = _SHORT_S) -> models.Operation:
        """Remove objects, and what depends on them, from tiers."""
        selector = body.selector.encode()
        return await _started(link, messages.Evict(name_of(who), who.tenant, selector, [*body.tiers], wait), response)

    @app.post("/v1/pin", tags=["objects"], responses=_STARTED)
    async def pin(body: models.Pin, who: Caller, response: Response, wait: Wait = _SHORT_S) -> models.Operation:
        """Keep objects in a tier."""
        selector = body.selector.encode()
        return await _started(
            link, messages.Pin(name_of(who), who.tenant, selector, body.tier, body.ttl or 0.0, wait), response
        )

    @app.post("/v1/unpin", tags=["objects"], responses=_STARTED)
    async def unpin(body: models.Unpin, who: Caller, response: Response, wait: Wait = _SHORT_S) -> models.Operation:
        """End pins."""
        selector = body.selector.encode()
        return await _started(link, messages.Unpin(name_of(who), who.tenant, selector, body.tier, wait), response)

    @app.post("/v1/clear", tags=["objects"], responses=_STARTED)
    async def clear(body: models.Clear, who: Admin, response: Response, wait: Wait = _SHORT_S) -> models.Operation:
        """Remove everything from tiers."""
        return await _started(link, messages.Clear(name_of(who), who.tenant, [*body.tiers], wait), response)


def _add_flush(app: FastAPI, link: DaemonLink) -> None:
    @app.post("/v1/flush", tags=["objects"], responses=problems(404, 409, 413, 422, 504))
    async def flush(who: Operator, body: models.Flush | None = None, wait: Wait = _MOST_WAIT_S) -> models.Flushed:
        """Wait until what is committed is written to disk and Redis, as far as admission wants it there, and say what
        of it is not there. With a selector: have just that written, whatever admission says."""
        try:
            async with asyncio.timeout(wait):
                if body is None:
                    (counts,) = await link.call(protocol.Flush(), wait + _ANSWER_S)
                else:
                    counts = await _write_down(link, who, body.selector.encode())
        except TimeoutError:
            raise HTTPException(504, f"not all was written within {wait:g} s; ask again") from None
        return models.Flushed.of(counts)


async def _write_down(link: DaemonLink, who: Principal, selector: dict[str, Any]) -> dict[str, list[int]]:
    """[there, not there] by tier below memory, once all was tried."""
    (status,) = await link.call(protocol.Status())
    counts: dict[str, list[int]] = {}
    for tier in [tier for tier in status["tiers"] if tier != ALL_TIERS[0]]:
        request = messages.Admit(name_of(who), who.tenant, selector, tier, _MOST_WAIT_S)
        (found,) = await link.call(request, _MOST_WAIT_S + _ANSWER_S)
        if found["state"] == OperationState.RUNNING:
            raise TimeoutError
        already = found["causes"].get(Cause.ALREADY, 0)
        counts[tier] = [found["objects"] + already, found["skipped"] - already]
    return counts


def _add_moves(app: FastAPI, link: DaemonLink) -> None:
    """What reads and writes objects takes long: it is answered at once, unless somebody wants to wait."""

    @app.post("/v1/admit", tags=["objects"], status_code=202, responses=_moving("There already"))
    async def admit(body: models.Admit, who: Caller, response: Response, wait: Wait = 0.0) -> models.Operation:
        """Bring objects to a tier ahead of need, from wherever they are."""
        selector = body.selector.encode()
        ttl = body.ttl or 0.0
        return await _moved(link, messages.Admit(name_of(who), who.tenant, selector, body.tier, wait, ttl), response)

    @app.post("/v1/move", tags=["objects"], status_code=202, responses=_moving("Moved"))
    async def move(body: models.Move, who: Caller, response: Response, wait: Wait = 0.0) -> models.Operation:
        """Bring objects from one tier to another, or copy them there."""
        selector = body.selector.encode()
        request = messages.Move(name_of(who), who.tenant, selector, body.source, body.tier, body.keep, wait)
        return await _moved(link, request, response)

    @app.post("/v1/compress", tags=["objects"], status_code=202, responses=_moving("Compressed"))
    async def compress(body: models.Compress, who: Caller, response: Response, wait: Wait = 0.0) -> models.Operation:
        """Keep objects of a tier compressed, losslessly; whoever loads them notices nothing."""
        selector = body.selector.encode()
        return await _moved(link, messages.Compress(name_of(who), who.tenant, selector, body.tier, wait), response)

    @app.post("/v1/decompress", tags=["objects"], status_code=202, responses=_moving("As they were"))
    async def decompress(body: models.Compress, who: Caller, response: Response, wait: Wait = 0.0) -> models.Operation:
        """Keep objects of a tier as they are again."""
        selector = body.selector.encode()
        return await _moved(link, messages.Decompress(name_of(who), who.tenant, selector, body.tier, wait), response)


async def _moved(link: DaemonLink, request: Any, response: Response) -> models.Operation:
    response.status_code = 200
    return await _started(link, request, response)


def _moving(done: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": models.Operation, "description": f"{done} within `wait` seconds"}, **_STARTED}


def _add_operations(app: FastAPI, link: DaemonLink) -> None:
    @app.get("/v1/operations", tags=["operations"], responses=problems(422))
    async def operations(who: Reader, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> models.OperationPage:
        """The operations begun last, the latest first. Those that ended are remembered for an hour."""
        found = await link.call(messages.OperationList(name_of(who), who.tenant, limit))
        return models.OperationPage(operations=[models.Operation(**item) for item in found])

    @app.get("/v1/operations/{operation}", tags=["operations"], responses=problems(404, 422))
    async def operation(operation: OperationId, who: Reader, wait: Wait = 0.0) -> models.Operation:
        """How far one is, or what came of it."""
        (found,) = await link.call(messages.OperationShow(name_of(who), who.tenant, operation, wait), wait + _ANSWER_S)
        return models.Operation(**found)

    @app.delete("/v1/operations/{operation}", tags=["operations"], responses=problems(404, 422))
    async def cancel(operation: OperationId, who: Caller) -> models.Operation:
        """Have it end before its next step; what is done stays done."""
        (found,) = await link.call(messages.Cancel(name_of(who), who.tenant, operation))
        return models.Operation(**found)
