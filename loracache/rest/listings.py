# SPDX-License-Identifier: Apache-2.0
"""Routes that list: objects, the dependency tree, and events as they happen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import StreamingResponse

from loracache.client.control import Selection
from loracache.errors import LoRACacheError
from loracache.rest import models
from loracache.rest.link import DaemonLink
from loracache.rest.problems import problems
from loracache.rest.roles import needs
from loracache.rest.tokens import Principal
from loracache.wire import control_messages as messages

__all__ = ["add_routes"]

_EVENTS = 500
_EVENTS_WAIT_S = 15.0
_ANSWER_S = 10.0

Reader = Annotated[Principal, needs("read", tenants=True)]
Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str, Query(max_length=300, description="`next` of the page before.")]


def add_routes(app: FastAPI, link: DaemonLink) -> None:
    """Put the routes into the application."""

    @app.get("/v1/objects", tags=["objects"], responses=problems(404, 409, 422))
    async def objects(
        who: Reader,
        model: Annotated[str, Query(max_length=200, description='A served name or an identity; "*": any.')] = "",
        adapter: Annotated[str | None, Query(max_length=200, description="A name or hex digest.")] = None,
        salt: Annotated[str, Query(max_length=1000, description="A tenant's cache_salt.")] = "",
        key: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description="Just this object.")] = None,
        tier: Annotated[models.LocalTier | None, Query(description="Those in this tier.")] = None,
        after: After = "",
        limit: Limit = 100,
    ) -> models.ObjectPage:
        """Objects that cpu or disk hold, namespace by namespace in the order of keys; with a model or adapter, of
        those."""
        keys = [bytes.fromhex(key)] if key else None
        selected = Selection(keys=keys, model=model, adapter=adapter, salt=salt or None)
        request = messages.ObjectList("", who.tenant, selected.encode(), tier or "", after, limit)
        end, *found = await link.call(request)
        return models.ObjectPage(objects=[models.Object(**item) for item in found], next=end or None)

    @app.get("/v1/tree", tags=["objects"], responses=problems(404, 409, 422))
    async def tree(
        who: Reader,
        under: Annotated[str, Query(max_length=100, description="The id of a node; left out, the top.")] = "",
        after: After = "",
        limit: Limit = 100,
    ) -> models.TreePage:
        """What stands below a node of the dependency tree: the base models and the adapters, then what is
        interchangeable of a model, its chains, their chunks."""
        end, *found = await link.call(messages.Tree("", who.tenant, under, after, limit))
        return models.TreePage(nodes=[models.TreeNode(**item) for item in found], next=end or None)

    _add_events(app, link)


def _add_events(app: FastAPI, link: DaemonLink) -> None:
    stream: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "Server-sent events without an end",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }

    @app.get(
        "/v1/events",
        tags=["objects"],
        response_class=StreamingResponse,
        responses=stream | problems(422),
        dependencies=[needs("read", endless=True)],
    )
    async def events(
        request: Request,
        since: Annotated[int, Query(ge=0, lt=2**63, description="Those behind this number; 0: from now on.")] = 0,
        last_event_id: Annotated[str, Header(description="Of one who comes back.", max_length=20)] = "",
    ) -> StreamingResponse:
        """What happens to objects: admitted, evicted, moved, pinned, unpinned, failed. One who is too slow is told by
        an event `lost` how many are missing."""
        if last_event_id.isascii() and last_event_id.isdigit() and int(last_event_id) < 2**63:
            since = int(last_event_id)
        return StreamingResponse(
            _stream(link, since), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )


async def _stream(link: DaemonLink, since: int) -> AsyncIterator[str]:
    wait = 0.0  # at first, so that what happens after the first line is told
    while True:
        try:
            since, lost, *found = await link.call(messages.EventList("", "", since, _EVENTS, wait), wait + _ANSWER_S)
        except LoRACacheError as error:
            yield f"event: end\ndata: {str(error).splitlines()[0]}\n\n"
            return
        if not wait:
            yield ": what happens from now on\n\n"
            wait = _EVENTS_WAIT_S
        if lost:
            yield f"event: lost\ndata: {lost}\n\n"
        events = [models.Event(**item) for item in found]
        told = [f"id: {event.id}\nevent: {event.event}\ndata: {event.model_dump_json()}\n\n" for event in events]
        yield "".join(told) or ": nothing new\n\n"
