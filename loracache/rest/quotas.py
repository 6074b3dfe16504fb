# SPDX-License-Identifier: Apache-2.0
"""Routes of quotas: listed, given, ended."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.exceptions import HTTPException

from loracache.config import parse_size
from loracache.keys import salt_digest
from loracache.rest import models
from loracache.rest.link import DaemonLink
from loracache.rest.objects import name_of
from loracache.rest.problems import problems
from loracache.rest.roles import needs
from loracache.rest.tokens import Principal
from loracache.wire import control_messages as messages

__all__ = ["GivenQuota", "Quota", "QuotaPage", "add_routes"]

Reader = Annotated[Principal, needs("read", tenants=True)]
Admin = Annotated[Principal, needs("admin")]
Kind = Literal["tenant", "adapter", "model"]


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_size, json_schema_input_type=int | str), Field(ge=0, lt=2**63)]


class GivenQuota(models.Strict):
    """A quota for one tenant, adapter or model in one tier; it takes the place of an earlier one."""

    kind: Kind
    name: str = Field(
        "",
        max_length=300,
        description='An adapter by name or digest, a model by name or identity, a tenant by its salt\'s digest; "*": '
        "all of the kind that have none of their own.",
    )
    salt: str | None = Field(
        None, min_length=1, max_length=1000, description="A tenant's cache_salt, in the place of `name`."
    )
    tier: models.LocalTier = "cpu"
    soft: Size = Field(0, description="Its share in bytes, or like 4GiB: nobody else's store pushes it below.")
    hard: Size | None = Field(None, description="Its limit: a store beyond it is refused; left out: none.")

    @model_validator(mode="after")
    def _one(self) -> GivenQuota:
        if (self.salt is None) == (not self.name) or (self.salt is not None and self.kind != "tenant"):
            raise ValueError("give name, or the salt of a tenant")
        return self


class Quota(BaseModel):
    """A quota and what is used of it."""

    kind: Kind
    name: str = Field(description='A digest, a model\'s name or identity, or "*".')
    names: list[str] = Field(description="What adapter and model are called.")
    tier: models.LocalTier
    soft: int
    hard: int | None
    bytes: int = Field(description="Used, in bytes of the tier's room.")
    refused: int = Field(description="Objects that its limit kept out, since the daemon started.")
    evicted: int = Field(description="Objects of it that left for others.")


class QuotaPage(BaseModel):
    """All quotas."""

    quotas: list[Quota]


def add_routes(app: FastAPI, link: DaemonLink) -> None:
    """Put the routes into the application."""

    @app.get("/v1/quotas", tags=["quotas"])
    async def quotas(who: Reader) -> QuotaPage:
        """All quotas, and what is used of them; a tenant's token sees its own."""
        found = await link.call(messages.QuotaList(name_of(who), who.tenant))
        return QuotaPage(quotas=[Quota(**item) for item in found])

    @app.put("/v1/quotas", tags=["quotas"], responses=problems(404, 409, 413, 422))
    async def set_quota(body: GivenQuota, who: Admin) -> Quota:
        """Give a quota; it outlives a restart."""
        name = body.name if body.salt is None else salt_digest(body.salt)
        hard = -1 if body.hard is None else body.hard
        request = messages.QuotaSet(name_of(who), "", body.kind, name, body.tier, body.soft, hard)
        (found,) = await link.call(request)
        return Quota(**found)

    @app.delete("/v1/quotas", tags=["quotas"], responses=problems(404, 409, 422))
    async def remove_quota(
        who: Admin,
        kind: Annotated[Kind, Query()],
        name: Annotated[str, Query(min_length=1, max_length=300, description="As it is listed.")],
        tier: Annotated[models.LocalTier, Query()] = "cpu",
    ) -> dict[str, Any]:
        """End a quota; a default, where there is one, counts from then on."""
        (there,) = await link.call(messages.QuotaRemove(name_of(who), "", kind, name, tier))
        if not there:
            raise HTTPException(404, f"{kind} {name!a} has no quota in {tier}")
        return {}
