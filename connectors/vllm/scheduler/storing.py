# SPDX-License-Identifier: Apache-2.0
"""What of a request is stored, and the engine's blocks that wait for it. Threading: the scheduler's loop."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.messages import StepPlan, Store
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.scheduler.adapters import ServedAdapters
from loracache.connectors.vllm.scheduler.afterwards import Afterwards
from loracache.connectors.vllm.scheduler.kept_blocks import KeptBlocks
from loracache.connectors.vllm.scheduler.namespace import EngineNamespace
from loracache.connectors.vllm.scheduler.resets import HeldBlocks
from loracache.connectors.vllm.scheduler.tier_events import TierEvents

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from loracache.connectors.vllm.scheduler.chunks import Chunks
    from loracache.connectors.vllm.scheduler.requests import RequestState

__all__ = ["Storing"]


class Storing:
    """Stores of one engine's requests. enabled: it stores at all. chunks: set once the workers' facts are known."""

    def __init__(
        self,
        link: SchedulerLink,
        namespace: EngineNamespace,
        adapters: ServedAdapters,
        events: TierEvents,
        *,
        enabled: bool,
    ) -> None:
        self._link = link
        self._namespace = namespace
        self._adapters = adapters
        self._events = events
        self._enabled = enabled
        self._afterwards = Afterwards(link)
        self.chunks: Chunks | None = None
        self.held = HeldBlocks()
        self.kept = KeptBlocks()

    @property
    def frees_soon(self) -> bool:
        """Whether blocks that no request needs wait for stores."""
        return self.held.pending or self.kept.pending

    def plan(self, state: RequestState, computed_tokens: int, plan: StepPlan) -> None:
        """Plan to store what is computed and confirmed: whole chunks beyond those that are held or planned already."""
        if self.chunks is None or not self._enabled or not state.wishes.store or not self._namespace.settle(state):
            return
        if state.adapter is not None and not self._adapters.serves(state.adapter.lora_int_id, state.adapter.digest):
            state.cacheable = False
            self.kept.release(state)
            return
        state.extend_keys(self.chunks.tokens)
        self._events.learn(state, self.chunks)
        first, kept = max(state.stored, len(state.hits)), self.kept.block_ids(state)
        computed_tokens = min(computed_tokens, state.sound_tokens)
        store = self.chunks.store(state, computed_tokens, kept, self.kept.next_store if kept else 0)
        if kept:
            self.kept.storing(state, range(first, state.stored), planned=store is not None)
        if store is not None:
            plan.stores.append(store)

    def keep(self, state: RequestState, scheduled: int, output: SchedulerOutput) -> None:
        """Keep what this step computes, of `scheduled` tokens, and vLLM may have freed by the next, when it is
        stored."""
        chunks, blocks = self.chunks, getattr(output, "kv_connector_block_state", None)
        if chunks is None or not chunks.beside or not self._enabled or not state.wishes.store or blocks is None:
            return
        if state.namespace is None:  # nobody knows when it will be
            return
        request_id = state.request.request_id
        end = min(int(state.request.num_computed_tokens) + scheduled, state.wishes.stored_tokens)
        self.kept.keep(state, chunks, end, partial(blocks.resolve_block_ids, request_id), self._link.arena_bytes)
        self.kept.keep_states(state, chunks, blocks.boundary_state_offloads.get(request_id, ()))
        self._link.count("store.engine_full", self.kept.take_refused())

    def plan_kept(self, plan: StepPlan, scheduled: Collection[str]) -> None:
        """Plan the stores of requests that do not run in a step, as they may wait for the very blocks that are kept.
        Where nothing runs, a chunk that drafts completed will not be confirmed before there are blocks: let it go."""
        for request_id, state in list(self.kept.holders.items()):
            if request_id not in scheduled:
                self.plan(state, state.request.num_computed_tokens, plan)
                if not scheduled:
                    self.kept.release(state)

    def finish(self, state: RequestState, request: Request, tables: Sequence[Sequence[int]], plan: StepPlan) -> bool:
        """A request is over: plan its last store. True where its blocks must stay until all are done."""
        if state.cacheable:
            state.blocks = [list(table) for table in tables]
            self.plan(state, request.num_computed_tokens, plan)
        self.kept.release(state)
        if self.chunks is not None and state.cacheable and state.wishes.afterwards:
            keys, nbytes = self.chunks.object_keys(state.chunk_keys), len(state.chunk_keys) * self.chunks.nbytes
            self._afterwards.finished(request.request_id, keys, nbytes, state.wishes, storing=state.has_stored)
        if not state.has_stored:  # else blocks may be read still, whatever was learnt about the request meanwhile
            return False
        plan.await_stores.add(request.request_id)
        self.held.hold(request)
        return True

    def done(self, request_ids: Iterable[str]) -> None:
        """All stores of these requests, which are over, are done."""
        self.held.stored(request_ids)
        self._afterwards.stored(request_ids)

    def drop(self, plan: StepPlan, request_ids: Container[str] | None = None) -> None:
        """What is planned in a step, of these requests or of all, will not be stored."""
        dropped: list[Store] = []
        left: list[Store] = []
        for store in plan.stores:
            (dropped if request_ids is None or store.request_id in request_ids else left).append(store)
        self.kept.over({store.number: self.kept.workers for store in dropped})
        plan.stores = left

    def free_blocks(self, manager: Any, states: Iterable[RequestState]) -> None:
        """vLLM needs all blocks free. The workers end what reads them before one is written."""
        self.held.free(manager)
        self.held.freed |= self.kept.release_all(states)
