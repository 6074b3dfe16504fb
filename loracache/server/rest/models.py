"""What goes over HTTP: requests as they are checked, answers as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from loracache.protocol import MAX_TTL_S

__all__ = ["Adapter", "Adapters", "Changed", "Clear", "Evict", "Found", "Lookup", "Pin", "Pinned", "Selector", "Unpin"]

HexKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LocalTier = Literal["cpu", "disk"]
Tier = Literal["cpu", "disk", "redis"]
ALL_TIERS: tuple[Tier, ...] = ("cpu", "disk", "redis")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Selector(_Strict):
    """Which objects: exactly one of the fields."""

    keys: list[HexKey] | None = Field(
        None, min_length=1, max_length=10_000, description="Object keys, for a lookup in the order of their chain."
    )
    adapter: str | None = Field(None, min_length=1, max_length=200, description="An adapter, by name or hex digest.")

    @model_validator(mode="after")
    def _one(self) -> Selector:
        if (self.keys is None) == (self.adapter is None):
            raise ValueError("give exactly one of keys and adapter")
        return self


class _Selecting(_Strict):
    selector: Selector


class Lookup(_Selecting):
    """What is where."""


class Evict(_Selecting):
    """Remove objects and what depends on them."""

    tiers: list[Tier] = Field(list(ALL_TIERS), min_length=1, max_length=3, description="From where.")


class Pin(_Selecting):
    """Keep objects in a tier, and what they depend on with them."""

    tier: LocalTier = "cpu"
    ttl: float | None = Field(None, gt=0, le=MAX_TTL_S, description="Seconds; left out, until unpinned.")


class Unpin(_Selecting):
    """End pins."""

    tier: LocalTier = "cpu"


class Clear(_Strict):
    """Remove everything that is not leased, pinned or named."""

    tiers: list[Tier] = Field(list(ALL_TIERS), min_length=1, max_length=3, description="From where.")


class Found(BaseModel):
    """An answer to a lookup."""

    hits: int = Field(description="Leading keys that some tier holds.")
    tiers: list[str] = Field(description="The highest tier of each of them.")


class Changed(BaseModel):
    """What was removed."""

    objects: int
    bytes: int
    skipped: int = Field(description="Left because leased, pinned, named, or needed by what is.")


class Pinned(BaseModel):
    """How many objects were there to be pinned or unpinned."""

    objects: int


class Adapter(BaseModel):
    """An adapter of the cache."""

    name: str
    digest: str
    added: float = Field(description="Unix seconds.")
    config: str = Field(description="The adapter_config.json it was added with.")
    size: int = Field(description="Bytes; 0 where no tier of this daemon but Redis has it.")
    tiers: list[str]
    engines: int = Field(description="Engines that hold it in their own memory.")
    kv: dict[str, tuple[int, int]] = Field(description="What depends on it: objects and bytes, by tier.")


class Adapters(BaseModel):
    """A page of adapters, by name."""

    adapters: list[Adapter]
    next: str | None = Field(description="`after` of the next page; none at the end.")
