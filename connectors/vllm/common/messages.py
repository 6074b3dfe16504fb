# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side and the workers' side tell each other, once a step, through vLLM."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from loracache.connectors.vllm.lora.layout import PoolShape
from loracache.keys import Namespace

__all__ = [
    "NOT_LOADED",
    "AdapterBinding",
    "AdapterOrders",
    "ChunkBlocks",
    "Facts",
    "GroupFacts",
    "Load",
    "PoolFacts",
    "Prefix",
    "StepPlan",
    "Store",
    "WorkerNews",
]


_Name = TypeVar("_Name")
_Number = TypeVar("_Number", int, float)

NOT_LOADED = -1
"""In a table of blocks: the engine has this one, or needs none there."""


@dataclass(frozen=True, slots=True)
class AdapterBinding:
    """Which content the scheduler believes an adapter id to stand for. digest: hex."""

    lora_int_id: int
    digest: str


@dataclass(frozen=True, slots=True)
class ChunkBlocks:
    """One object of a chunk and the engine's blocks for it. group: which of the model's groups it is of (groups.py).
    blocks: those of the group's first member, then of the next. first: the token of the chunk that they begin with:
    that of the object, unless the engine holds some before it itself. Of a member with smaller blocks than another's
    the first may be NOT_LOADED."""

    key: bytes
    blocks: tuple[int, ...]
    first: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Chunks to copy into a request's blocks, first to last. chunk_tokens: tokens of a whole chunk. within_step: the
    request is computed in this very step; each layer waits for its own bytes."""

    request_id: str
    chunks: tuple[ChunkBlocks, ...]
    adapter: AdapterBinding | None
    chunk_tokens: int
    within_step: bool = False

    @property
    def blocks(self) -> list[int]:
        """All blocks that are loaded into."""
        return self.blocks_of(range(len(self.chunks)))

    def blocks_of(self, chunks: Iterable[int]) -> list[int]:
        """Those of the chunks at these places."""
        return [block for at in chunks for block in self.chunks[at].blocks if block != NOT_LOADED]


@dataclass(frozen=True, slots=True)
class Store:
    """Computed chunks to keep, a run of one chain: of every chunk the object of full attention first, which stands
    above its others. parent: the chunk before, b"" for none. first_step: the step in which the request was first
    computed: an adapter changed since then made these blocks worthless. number: the scheduler is told when it is over;
    0: it is not.
    """

    request_id: str
    namespace: Namespace
    parent: bytes
    chunks: tuple[ChunkBlocks, ...]
    adapter: AdapterBinding | None
    first_step: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Prefix:
    """Blocks that a request has from the engine's own prefix cache, and which of the contents that its adapter's id has
    served they were computed with (0: no worker has told of any)."""

    lora_int_id: int
    content: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class AdapterOrders:
    """What the workers do with their pools, in this order. evict: digests whose pages are free from now on. load:
    (order's number, digest, folder or "") to copy in. forget: adapter ids that no request has. bind: which content
    serves an adapter id from now on.
    """

    evict: list[str] = field(default_factory=list)
    load: list[tuple[int, str, str]] = field(default_factory=list)
    forget: list[int] = field(default_factory=list)
    bind: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers do in one step.

    await_stores: requests whose blocks are freed when their stores are done. preempted: requests whose blocks may be
    overwritten in this step. first_runs: loaded requests that compute for the first time in this step. void: requests
    whose load is of weights that the engine no longer has. freed: finished requests whose blocks may be overwritten
    once their stores are over. weights: each worker's version by rank, as far as the scheduler knows (0 where it is not
    named). check_weights: look whether they are the same still. prefixes: of the requests with an adapter that start
    now.
    """

    step: int
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    await_stores: set[str] = field(default_factory=set)
    preempted: set[str] = field(default_factory=set)
    first_runs: set[str] = field(default_factory=set)
    void: set[str] = field(default_factory=set)
    freed: set[str] = field(default_factory=set)
    weights: dict[int, int] = field(default_factory=dict)
    check_weights: bool = False
    adapters: AdapterOrders = field(default_factory=AdapterOrders)
    prefixes: list[Prefix] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """A worker's pool of LoRA pages, and how its model renames the modules of adapters (vLLM's WeightsMapper)."""

    shape: PoolShape
    mapper: Any


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """A worker's part of a group: which shard it is, how its bytes lie, and bytes of one block of each member over the
    shard's layers."""

    shard: str
    layout: str
    block_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Facts(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker knows and the scheduler needs: how its KV lies in memory, and which shard of it is its own, for
    each of the model's groups. problem: why this KV cannot be cached, or "". pool: of LoRA pages, where there is one.
    """

    groups: tuple[GroupFacts, ...]
    problem: str = ""
    pool: PoolFacts | None = None


@dataclass(slots=True)
class WorkerNews(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What workers tell the scheduler after a step: adapters as really loaded (hex digest, "" for unknown), failures by
    cause, requests whose chunks did not all reach the cache and may at another try, and facts until the scheduler has
    them. activated: orders done -> by how many workers; not_activated: orders that failed -> (cause, and words where
    nothing will help); pools_lost: nothing is on any page any more; pinned: adapter ids that may not be evicted, or may
    again; weights: rank -> (version, the last step computed with those before), where they changed; contents: how many
    contents an adapter id has served; loaded: seconds that loads took which came, by request; stored: numbers of stores
    that are over -> for how many workers; came: steps of which all loads within them came whole -> on how many workers.
    """

    adapters: dict[int, str] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    unstored: set[str] = field(default_factory=set)
    facts: list[Facts] = field(default_factory=list)
    activated: dict[int, int] = field(default_factory=dict)
    not_activated: dict[int, tuple[str, str]] = field(default_factory=dict)
    pools_lost: bool = False
    pinned: dict[int, bool] = field(default_factory=dict)
    weights: dict[int, tuple[int, int]] = field(default_factory=dict)
    contents: dict[int, int] = field(default_factory=dict)
    loaded: dict[str, float] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    came: dict[int, int] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerNews:
        """Workers of one engine read the same adapter files; where they saw different content, nobody is believed."""
        assert isinstance(other, WorkerNews)
        adapters = dict(self.adapters)
        for adapter, digest in other.adapters.items():
            adapters[adapter] = digest if adapters.get(adapter, digest) == digest else ""
        return WorkerNews(
            adapters,
            _merged(self.failures, other.failures, operator.add),
            self.unstored | other.unstored,
            self.facts + other.facts,
            _merged(self.activated, other.activated, operator.add),
            self.not_activated | other.not_activated,
            self.pools_lost or other.pools_lost,
            self.pinned | other.pinned,
            self.weights | other.weights,
            _merged(self.contents, other.contents, max),
            _merged(self.loaded, other.loaded, max),
            _merged(self.stored, other.stored, operator.add),
            _merged(self.came, other.came, operator.add),
        )


def _merged(
    mine: Mapping[_Name, _Number], others: Mapping[_Name, _Number], of_both: Callable[[_Number, _Number], _Number]
) -> dict[_Name, _Number]:
    """What either has, and `of_both` of what both have."""
    found = dict(mine)
    for name, number in others.items():
        found[name] = of_both(found[name], number) if name in found else number
    return found
