# SPDX-License-Identifier: Apache-2.0
"""Routes of adapters: listed, shown, uploaded, removed."""

from __future__ import annotations

import asyncio
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from starlette.exceptions import HTTPException

from loracache.adapters.names import check_name
from loracache.adapters.peft import PeftFolder
from loracache.errors import Rejected, UsageError
from loracache.rest import models
from loracache.rest.link import DaemonLink
from loracache.rest.objects import name_of
from loracache.rest.problems import problems
from loracache.rest.roles import needs
from loracache.rest.tokens import Principal
from loracache.rest.upload import BadUpload, discard, receive
from loracache.wire import protocol

__all__ = ["add_routes"]

_CHANGE_S = 60.0
_TAKE_IN_S = 60.0
_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["files"],
                "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        }
    },
}

Name = Annotated[str, Path(min_length=1, max_length=200, description="A name, or a hex digest.")]
Admin = Annotated[Principal, needs("admin")]
Uploader = Annotated[Principal, needs("admin", upload=True)]


def add_routes(app: FastAPI, link: DaemonLink, uploads: FilePath) -> None:
    """Put the routes into the application. uploads: the folder where uploaded files stand until they are taken in."""

    @app.get("/v1/adapters", dependencies=[needs("read")], tags=["adapters"], responses=problems(422))
    async def adapters(
        after: Annotated[str, Query(max_length=200, description="The name before the page's first.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> models.AdapterPage:
        """Adapters that have a name, in the order of names."""
        page = await link.call(protocol.AdapterList(after, limit))
        more = page[-1]["name"] if page else None
        return models.AdapterPage(adapters=[models.Adapter.of(item) for item in page], next=more)

    @app.get("/v1/adapters/{name:path}", dependencies=[needs("read")], tags=["adapters"], responses=problems(404, 422))
    async def adapter(name: Name) -> models.Adapter:
        """One adapter, by name or digest."""
        return models.Adapter.of(await _adapter(link, name))

    @app.put(
        "/v1/adapters/{name:path}",
        tags=["adapters"],
        responses=problems(404, 409, 413, 415, 422, 507),
        openapi_extra={"requestBody": _UPLOAD},
    )
    async def upload(
        name: Name, request: Request, who: Uploader, priority: models.Priority | None = None
    ) -> models.Adapter:
        """Take an uploaded PEFT folder into the cache, and point the name at it, with the priority that it has if none
        is given. Fields' names do not matter, files' names do: adapter_config.json and adapter_model.safetensors;
        others are ignored."""
        try:
            check_name(name)
            folder = await receive(request.stream(), request.headers.get("content-type", ""), uploads)
        except UsageError as error:
            raise HTTPException(422, f"path.name: {error}") from None
        except BadUpload as error:
            typed = request.headers.get("content-type", "").startswith("multipart/form-data")
            raise HTTPException(422 if typed else 415, f"body: {error}") from None
        except OSError as error:
            raise HTTPException(507, f"the upload cannot be written: {error.strerror}") from None
        try:
            await asyncio.to_thread(_check, folder)
            await link.call(protocol.AdapterAdd(str(folder), name, name_of(who), priority or ""), _TAKE_IN_S)
        except (UsageError, Rejected) as error:  # its text names a folder that nobody knows
            status = 422 if isinstance(error, UsageError) else 409
            raise HTTPException(status, str(error).replace(str(folder), "the upload")) from None
        finally:
            await discard(folder)
        return models.Adapter.of(await _adapter(link, name))

    _add_changes(app, link)


def _add_changes(app: FastAPI, link: DaemonLink) -> None:
    """Routes that change a name."""

    @app.post("/v1/adapters/{name:path}", tags=["adapters"], responses=problems(404, 409, 422))
    async def prioritize(name: Name, body: models.Prioritize, who: Admin) -> models.Adapter:
        """Give a name a priority: that of the adapter's weights and of its KV, as far as no request gave another."""
        if not await link.call(protocol.AdapterPrioritize(name, name_of(who), body.priority), _CHANGE_S):
            raise HTTPException(404, f"no adapter has the name {name!a}")
        return models.Adapter.of(await _adapter(link, name))

    @app.delete("/v1/adapters/{name:path}", tags=["adapters"], responses=problems(404, 409, 422))
    async def remove(name: Name, who: Admin) -> models.Changed:
        """Forget a name; what no other name points to leaves all tiers with its KV."""
        found = await link.call(protocol.AdapterRemove(name, name_of(who)), _CHANGE_S)
        if not found:
            raise HTTPException(404, f"no adapter has the name {name!a}")
        return models.Changed(objects=found[0], bytes=found[1], skipped=found[2])


def _check(folder: FilePath) -> None:
    """What the daemon would refuse too, and could not tell from a refusal for want of room. Raises UsageError."""
    with PeftFolder(folder) as peft:
        peft.check()
        peft.check_numbers()


async def _adapter(link: DaemonLink, name: str) -> dict[str, Any]:
    found = await link.call(protocol.AdapterShow(name))
    if not found:
        raise HTTPException(404, f"no adapter has the name or digest {name!a}")
    return dict(found[0])
