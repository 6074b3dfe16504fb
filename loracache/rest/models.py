# SPDX-License-Identifier: Apache-2.0
"""What goes over HTTP: requests as they are checked, answers as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from loracache.client.control import Selection
from loracache.results import NodeKind, OperationState
from loracache.wire.protocol import MAX_TTL_S, Priority

__all__ = [
    "ALL_TIERS", "Adapter", "AdapterPage", "Admit", "Changed", "Clear", "Compress", "Event", "Evict", "Flush",
    "Flushed", "Found", "LocalTier", "Lookup", "Move", "Object", "ObjectPage", "Operation", "OperationPage", "Pin",
    "Prioritize", "Priority", "Selector", "Strict", "TreeNode", "TreePage", "Unpin",
]  # fmt: skip

HexKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LocalTier = Literal["cpu", "disk"]
StoredTier = Literal["disk", "redis"]
Tier = Literal["cpu", "disk", "redis"]
Token = Annotated[int, Field(ge=-(2**31), lt=2**31)]
ALL_TIERS: tuple[Tier, ...] = ("cpu", "disk", "redis")
_MOST_TOKENS = 1 << 20


class Strict(BaseModel):
    """What a request's body keeps to: nothing unknown, nothing of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Selector(Strict):
    """Which objects: `keys`; or an `adapter`; or of a `model` (with an `adapter` of it, where one is given) the KV of
    `tokens` or all of it; or all of a tenant, by its `salt`.
    """

    keys: list[HexKey] | None = Field(
        None, min_length=1, max_length=100_000, description="Object keys, for a lookup in the order of their chain."
    )
    adapter: str | None = Field(
        None, max_length=200, description='An adapter, by name or hex digest; with a model "" means its base model.'
    )
    model: str | None = Field(
        None, min_length=1, max_length=200, description='A served name, an identity or its first 8 digits; "*": any.'
    )
    tokens: list[Token] | None = Field(
        None,
        min_length=1,
        max_length=_MOST_TOKENS,
        description="Token ids of a prompt; of the base model and without a salt, where neither is given.",
    )
    salt: str | None = Field(None, min_length=1, max_length=1000, description="A tenant's cache_salt.")

    @model_validator(mode="after")
    def _one(self) -> Selector:
        others = (self.adapter, self.model, self.tokens, self.salt)
        if self.keys is not None and any(item is not None for item in others):
            raise ValueError("give keys, or the other fields; keys say it all")
        if self.keys is None and all(item is None for item in others):
            raise ValueError("give keys, adapter, model, tokens or salt")
        if self.tokens is not None and self.model is None:
            raise ValueError("give the model that the tokens are of, too")
        if self.adapter == "" and self.model is None and self.salt is None:
            raise ValueError("an empty adapter means a base model: give the model, too")
        return self

    def encode(self) -> dict[str, Any]:
        """As a message's field."""
        selection = Selection(model=self.model or "", tokens=self.tokens, adapter=self.adapter, salt=self.salt)
        fields = selection.encode()
        if self.keys is not None:  # each as often as it is given: a lookup answers for every one
            fields["keys"] = bytes.fromhex("".join(self.keys))
        return fields


class _Selecting(Strict):
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


class Admit(_Selecting):
    """Bring objects to a tier ahead of need, from wherever they are."""

    tier: Tier = "cpu"
    ttl: float | None = Field(
        None, gt=0, le=MAX_TTL_S, description="Seconds for which cpu holds them then, loosely; left out, it does not."
    )


class Move(_Selecting):
    """Bring objects from one tier to another."""

    source: Tier = Field(description="Where they are.")
    tier: Tier = Field(description="Where they shall be.")
    keep: bool = Field(False, description="Copy: leave them at the source too.")

    @model_validator(mode="after")
    def _two(self) -> Move:
        if self.source == self.tier:
            raise ValueError("source and tier are the same; give two")
        return self


class Compress(_Selecting):
    """Rewrite objects of a tier, compressed or plain."""

    tier: StoredTier = "disk"


class Clear(Strict):
    """Remove everything that is not leased, pinned or named."""

    tiers: list[Tier] = Field(list(ALL_TIERS), min_length=1, max_length=3, description="From where.")


class Flush(_Selecting):
    """Have objects written to disk and Redis, whatever admission says."""


class Flushed(BaseModel):
    """What a flush found, by lower tier; since the last flush over HTTP, or, at the first, since anybody's; with a
    selector, of what that selects."""

    durable: dict[str, int] = Field(description="Objects that were written there and are there.")
    given_up: dict[str, int] = Field(description="Objects that are not; the counters write.TIER.dropped.CAUSE say why.")

    @classmethod
    def of(cls, counts: dict[str, list[int]]) -> Flushed:
        """From the daemon's pairs."""
        return cls(
            durable={tier: durable for tier, (durable, _) in counts.items()},
            given_up={tier: given_up for tier, (_, given_up) in counts.items()},
        )


class Held(BaseModel):
    """What there is."""

    objects: int
    bytes: int

    @classmethod
    def by_tier(cls, counts: dict[str, Any]) -> dict[str, Held]:
        """From the daemon's pairs."""
        return {tier: cls(objects=objects, bytes=nbytes) for tier, (objects, nbytes) in counts.items()}


class Found(BaseModel):
    """How far what was selected is held."""

    hits: int = Field(description="Leading keys that some tier holds; of tokens the chunks that a hit reaches over.")
    asked: int = Field(description="Of how many.")
    tiers: list[str] = Field(
        description="The fastest tier of each, of tokens of those of which anything is needed; gpu: an engine's memory."
    )
    tokens: int = Field(description="Leading tokens that need not be computed.")
    namespace: str = Field(description="Where that is, as a hex digest.")
    engines: int = Field(description="Engines that hold the adapter in their own memory.")
    held: dict[str, Held] = Field(description="Of a model or tenant: what there is, by tier.")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Found:
        """From the daemon's answer."""
        return cls(**fields | {"held": Held.by_tier(fields["held"])})


class Operation(BaseModel):
    """What the daemon was asked to do, and how far it is."""

    id: str
    verb: str
    state: OperationState
    started: float = Field(description="Unix seconds.")
    seconds: float = Field(description="How long it took, or takes until now.")
    total: int | None = Field(description="Objects that were named; none where they are counted as they come.")
    objects: int = Field(description="Done.")
    bytes: int = Field(description="Of those.")
    saved: int = Field(description="Bytes that compression took off.")
    skipped: int = Field(description="Left as they are: the sum of `causes`.")
    causes: dict[str, int] = Field(
        description="Why: held (leased, pinned, named or needed), stays, absent, already, not_written, ..."
    )
    error: str = Field(description="What went wrong, where it failed.")


class OperationPage(BaseModel):
    """Operations, the latest first."""

    operations: list[Operation]


class Changed(BaseModel):
    """What was removed with a name."""

    objects: int
    bytes: int
    skipped: int = Field(description="Left because leased, pinned, named, or needed by what is.")


class Prioritize(Strict):
    """The priority of an adapter's name."""

    priority: Priority


class Adapter(BaseModel):
    """An adapter of the cache."""

    name: str
    digest: str
    added: float = Field(description="Unix seconds.")
    config: str = Field(description="The adapter_config.json it was added with.")
    priority: Priority = Field(description="Of the name: who goes first among what is of the same owners.")
    size: int = Field(description="Bytes; 0 where no tier of this daemon but Redis has it.")
    tiers: list[str]
    engines: int = Field(description="Engines that hold it in their own memory.")
    kv: dict[str, Held] = Field(description="What depends on it, by tier.")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Adapter:
        """From the daemon's answer."""
        return cls(**fields | {"kv": Held.by_tier(fields["kv"])})


class AdapterPage(BaseModel):
    """A page of adapters, by name."""

    adapters: list[Adapter]
    next: str | None = Field(description="`after` of the next page; none at the end.")


class Object(BaseModel):
    """An object of the cache."""

    key: str
    kind: Literal["kv", "lora", "beside"]
    namespace: str
    parent: str = Field(description="The object it depends on; empty where there is none.")
    size: int = Field(description="Bytes of payload.")
    checksum: str = Field(description="xxh3_64 of the payload, in hex.")
    stored: int = Field(description="Bytes on disk, fewer where it is compressed.")
    tiers: list[str]
    pinned: list[str] = Field(description="Tiers it is pinned in.")
    leases: int
    hits: int = Field(description="Lookups that found it.")
    children: int


class ObjectPage(BaseModel):
    """A page of objects, namespace by namespace in the order of keys. It may be short, or empty, before the end."""

    objects: list[Object]
    next: str | None = Field(description="`after` of the next page; none at the end.")


class TreeNode(BaseModel):
    """A node of the dependency tree; which fields are there depends on its kind."""

    id: str = Field(description="`under` of the page with its children.")
    kind: NodeKind = Field(
        description="The base models, an adapter, what is interchangeable of one model, a chunk of a prompt."
    )
    children: int = 0
    hits: int = 0
    objects: dict[str, int] = Field({}, description="Objects below it, by tier.")
    bytes: dict[str, int] = Field({}, description="Their bytes, by tier.")
    digest: str = ""
    names: list[str] = Field([], description="Of an adapter, or what engines call the model.")
    engines: int = 0
    size: int = 0
    stored: int = 0
    checksum: str = ""
    tiers: list[str] = []
    pinned: list[str] = []
    leases: int = 0
    model: str = ""
    kv_dtype: str = ""
    chunk_tokens: int = 0
    salt: str = Field("", description="Digest of a tenant's salt.")
    key: str = ""
    parent: str = ""
    namespace: str = ""


class TreePage(BaseModel):
    """What stands below a node."""

    nodes: list[TreeNode]
    next: str | None = Field(description="`after` of the next page; none at the end.")


class Event(BaseModel):
    """What happened; the data of a server-sent event of this name, its id the number to go on behind."""

    id: int
    time: float = Field(description="Unix seconds.")
    event: Literal["admitted", "evicted", "moved", "pinned", "unpinned", "failed"]
    tier: str
    cause: str
    key: str = Field(description="Of the object; empty where a batch failed.")
    namespace: str
    bytes: int
    count: int = Field(description="Of the same: failures of one batch.")
