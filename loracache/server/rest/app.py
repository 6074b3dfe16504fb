"""The routes. Each is one call of the daemon, or few; nothing is kept here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Response
from starlette.exceptions import HTTPException

from loracache import __version__, protocol
from loracache.server.rest import models
from loracache.server.rest.limits import Limits
from loracache.server.rest.link import DaemonLink
from loracache.server.rest.metrics import render
from loracache.server.rest.problems import install, problems
from loracache.server.rest.roles import guard, needs
from loracache.tiers import Tier

__all__ = ["make_app"]

_READY_S = 1.0
_CHANGE_S = 60.0
Name = Annotated[str, Path(min_length=1, max_length=200, description="A name, or a hex digest.")]


def make_app(server: str, limits: Limits | None = None) -> FastAPI:
    """The application of the daemon at `server` (unix:// URL). Who calls is for `Access` to say, before it."""
    link = DaemonLink(server)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        link.close()

    app = FastAPI(title="LoRACache", version=__version__, lifespan=lifespan, summary="One cache for everything an LLM "
                  "server reads again: its control API.", responses=problems(401, 403, 429, 503, 504))  # fmt: skip
    install(app)
    _health(app, link)
    _objects(app, link)
    _adapters(app, link)
    guard(app, limits or Limits())
    return app


def _health(app: FastAPI, link: DaemonLink) -> None:
    @app.get("/healthz", dependencies=[needs("none")], tags=["health"])
    async def healthz() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/readyz", dependencies=[needs("none")], tags=["health"])
    async def readyz() -> dict[str, str]:
        """The daemon answers."""
        await link.call(protocol.Status(), _READY_S)
        return {"status": "ok"}

    @app.get("/v1/stats", dependencies=[needs("read")], tags=["health"])
    async def stats() -> dict[str, Any]:
        """Tiers, bytes, objects, leases and all counters, as `loracache status --json`."""
        (status,) = await link.call(protocol.Status())
        return dict(status)

    @app.get("/metrics", dependencies=[needs("read")], tags=["health"], response_class=Response,
             responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    async def metrics() -> Response:
        """For Prometheus."""
        (status,) = await link.call(protocol.Status())
        return Response(render(status), media_type="text/plain; version=0.0.4; charset=utf-8")


def _objects(app: FastAPI, link: DaemonLink) -> None:
    async def keys_of(selector: models.Selector) -> bytes:
        if selector.keys is not None:
            return b"".join(map(bytes.fromhex, selector.keys))
        assert selector.adapter is not None
        return bytes.fromhex((await _adapter(link, selector.adapter))["digest"])

    @app.post("/v1/lookup", dependencies=[needs("read")], tags=["objects"], responses=problems(404, 413, 422))
    async def lookup(body: models.Lookup) -> models.Found:
        """How far a chain is held, and where. Changes nothing, and needs no token."""
        (tiers,) = await link.call(protocol.Lookup(b"", await keys_of(body.selector), 1, 0.0))
        return models.Found(hits=len(tiers), tiers=[Tier(tier).label for tier in tiers])

    @app.post("/v1/evict", dependencies=[needs("operate")], tags=["objects"], responses=problems(404, 409, 413, 422))
    async def evict(body: models.Evict) -> models.Changed:
        """Remove objects, and what depends on them, from tiers."""
        objects, nbytes, skipped = await link.call(
            protocol.Evict(await keys_of(body.selector), [*body.tiers]), _CHANGE_S
        )
        return models.Changed(objects=objects, bytes=nbytes, skipped=skipped)

    @app.post("/v1/pin", dependencies=[needs("operate")], tags=["objects"], responses=problems(404, 409, 413, 422))
    async def pin(body: models.Pin) -> models.Pinned:
        """Keep objects in a tier."""
        (count,) = await link.call(protocol.Pin(await keys_of(body.selector), body.tier, body.ttl or 0.0))
        return models.Pinned(objects=count)

    @app.post("/v1/unpin", dependencies=[needs("operate")], tags=["objects"], responses=problems(404, 409, 413, 422))
    async def unpin(body: models.Unpin) -> models.Pinned:
        """End pins."""
        (count,) = await link.call(protocol.Unpin(await keys_of(body.selector), body.tier))
        return models.Pinned(objects=count)

    @app.post("/v1/clear", dependencies=[needs("admin")], tags=["objects"], responses=problems(409, 413, 422))
    async def clear(body: models.Clear) -> models.Changed:
        """Remove everything from tiers."""
        objects, nbytes, skipped = await link.call(protocol.Clear([*body.tiers]), _CHANGE_S)
        return models.Changed(objects=objects, bytes=nbytes, skipped=skipped)


def _adapters(app: FastAPI, link: DaemonLink) -> None:
    @app.get("/v1/adapters", dependencies=[needs("read")], tags=["adapters"], responses=problems(422))
    async def adapters(
        after: Annotated[str, Query(max_length=200, description="The name before the page's first.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> models.Adapters:
        """Adapters that have a name, in the order of names."""
        page = await link.call(protocol.AdapterList(after, limit))
        more = page[-1]["name"] if page else None
        return models.Adapters(adapters=[models.Adapter(**item) for item in page], next=more)

    @app.get("/v1/adapters/{name:path}", dependencies=[needs("read")], tags=["adapters"], responses=problems(404, 422))
    async def adapter(name: Name) -> models.Adapter:
        """One adapter, by name or digest."""
        return models.Adapter(**await _adapter(link, name))

    @app.delete(
        "/v1/adapters/{name:path}",
        dependencies=[needs("admin")],
        tags=["adapters"],
        responses=problems(404, 409, 422),
    )
    async def remove(name: Name) -> models.Changed:
        """Forget a name; what no other name points to leaves all tiers with its KV."""
        found = await link.call(protocol.AdapterRemove(name), _CHANGE_S)
        if not found:
            raise HTTPException(404, f"no adapter has the name {name!a}")
        return models.Changed(objects=found[0], bytes=found[1], skipped=found[2])


async def _adapter(link: DaemonLink, name: str) -> dict[str, Any]:
    found = await link.call(protocol.AdapterShow(name))
    if not found:
        raise HTTPException(404, f"no adapter has the name or digest {name!a}")
    return dict(found[0])
