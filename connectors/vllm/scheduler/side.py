# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of the connector: looks up, plans loads and stores, keeps leases.

It runs inside EngineCore's loop: questions are sent when a request arrives, answers are collected when the scheduler
asks. One that was just sent is waited for a moment, where answers come that fast; then its request is parked while
others run, for as long as that pays; then it is done without (patience.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from loracache.connectors.vllm.common.messages import Facts, Prefix, StepPlan, WorkerNews
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.common.stats import Tally
from loracache.connectors.vllm.common.wishes import Wishes, wishes_of
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.scheduler.adapters import ServedAdapters
from loracache.connectors.vllm.scheduler.afterwards import Afterwards
from loracache.connectors.vllm.scheduler.blocks import BlockKeys
from loracache.connectors.vllm.scheduler.chunks import Chunks
from loracache.connectors.vllm.scheduler.demand import Demand
from loracache.connectors.vllm.scheduler.load_or_compute import LoadChoice
from loracache.connectors.vllm.scheduler.lookups import LEASE_TTL_S, Lookups
from loracache.connectors.vllm.scheduler.lora.admission import AdapterAdmission
from loracache.connectors.vllm.scheduler.namespace import EngineNamespace
from loracache.connectors.vllm.scheduler.patience import Patience, even_position
from loracache.connectors.vllm.scheduler.requests import RequestState, Stage, is_cacheable, uses_draft_kv, wants_reading
from loracache.connectors.vllm.scheduler.resets import HeldBlocks, KnownWeights
from loracache.connectors.vllm.scheduler.tier_events import TierEvents

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

__all__ = ["SchedulerSide"]

_log = logging.getLogger(__name__)
_STORE_AGAIN_S = 1.0
_SAID = 100  # different complaints about requests that the log gets
_PREFETCH_CHUNKS = 4096
_PREFETCH_SHARE = 4  # of the arena is raised at most before the workers ask for it: they need room for the rest


class SchedulerSide:
    """Plans for one engine. Off until the workers' facts are known, and for good where they name a problem."""

    def __init__(
        self, vllm_config: VllmConfig, options: Options, identity: Callable[[], str | None], link: SchedulerLink
    ) -> None:
        self._config = vllm_config
        self._options = options
        self._link = link
        self._off = False
        self._drops_last_block = uses_draft_kv(vllm_config)
        self._may_load = bool(vllm_config.kv_transfer_config.is_kv_consumer)
        self._may_store = bool(vllm_config.kv_transfer_config.is_kv_producer)
        self._facts: dict[str, Facts] = {}
        self._chunks: Chunks | None = None
        self._requests: dict[str, RequestState] = {}
        ask = (lambda path: None) if options.lora_pool else link.ask_adapter
        self._adapters = ServedAdapters(ask, link.answer_adapter, link.abandon)
        self._blocks = BlockKeys(bool(getattr(vllm_config.lora_config, "enable_tower_connector_lora", False)))
        self._namespace = EngineNamespace(vllm_config, identity, self._adapters)
        self.admission = AdapterAdmission(link, options.load_timeout, self._adapters.correct, bool(options.lora_pool))
        self.held = HeldBlocks()
        self._weights = KnownWeights()
        self._patience = Patience(options.lookup_wait, options.lookup_wait_most, even_position(vllm_config))
        self._choice = LoadChoice(self._patience.steps, options.recompute_if_faster)
        self.tally = Tally()
        published = getattr(vllm_config, "kv_events_config", None)
        self.events = TierEvents(link, bool(published is not None and published.enable_kv_cache_events))
        deciding = self._patience, self._choice
        self._lookups = Lookups(link, self._namespace, self._adapters, *deciding, self.tally, self.events)
        self._afterwards = Afterwards(link)
        self._demand = Demand(link)
        self._said: set[str] = set()
        self._ahead: list[RequestState] = []  # asks for its chunks to be raised before its turn comes
        self._plan = StepPlan(step=0)
        self._step = 0

    @property
    def on(self) -> bool:
        """Whether the workers' facts are known and allow caching."""
        return self._chunks is not None

    # -- what workers tell ----------

    def set_facts(self, facts: list[Facts], block_size: int) -> None:
        """Take what the workers know of their KV; turns the cache on, or says once why it stays off."""
        self.admission.set_pools([fact.pool for fact in facts if fact.pool is not None])
        if self._off:
            return
        for fact in facts:
            if fact.problem:
                self._off = True
                _log.warning("LoRACache is off for this model: %s", fact.problem)
                return
            self._facts[fact.shard] = fact
        chunks = Chunks.of(
            self._facts.values(), block_size, self._options.chunk_tokens, drops_last_block=self._drops_last_block
        )
        if chunks is None:
            self._off = True
            layouts = sorted({fact.layout for fact in self._facts.values()})
            _log.warning("LoRACache is off for this model: its workers lay out KV differently: %s", layouts)
            return
        self._chunks = self._lookups.chunks = chunks
        self._namespace.layout = chunks.layout
        self._namespace.chunk_tokens = chunks.tokens
        self._link.begin()

    def step_done(self) -> None:
        """The workers have computed the oldest step that was planned and not done."""
        self._patience.steps.done(time.monotonic())

    def take_news(self, news: WorkerNews) -> None:
        """Learn what adapters the workers really loaded and what they could not store, and pass their failures on to
        the daemon's counters."""
        self.admission.take_news(news)
        if self._weights.take_news(news.weights):
            self._weights_changed()
        for adapter, digest in news.adapters.items():
            self._adapters.correct(adapter, digest)
        changed = self._blocks.learn(news.contents)
        for state in self._requests.values() if changed else ():
            if not state.blocks and state.request.lora_request and state.request.lora_request.lora_int_id in changed:
                state.content = self._blocks.key(state.request)
        for cause, count in news.failures.items():
            self._link.count(cause, count)
        for request_id, seconds in news.loaded.items():
            self._choice.loads.took(request_id, seconds)
        for request_id in news.unstored & self._requests.keys():
            self._requests[request_id].offer_again(time.monotonic() + _STORE_AGAIN_S)

    def finished_loading(self, request_ids: set[str], invalid_blocks: set[int]) -> None:
        """Loads are done, some of their blocks perhaps not."""
        for request_id in request_ids:
            self._choice.loads.over(request_id)
            state = self._requests.get(request_id)
            if state is not None and state.stage is Stage.LOADING:
                state.stage = Stage.LOADED
                self._lookups.drop_lease(state)
        if invalid_blocks:
            for state in self._requests.values():
                if not invalid_blocks.isdisjoint(state.blocks):
                    state.offer_again(0.0)

    # -- requests ----------

    def on_new_request(self, request: Request) -> None:
        """Send the question; nobody waits for its answer."""
        self.admission.on_new_request(request)
        content = self._blocks.key(request)
        if not self.on:
            return
        state = self._requests[request.request_id] = RequestState(
            request,
            cacheable=is_cacheable(request),
            reads=self._may_load and wants_reading(request),
            wishes=self._wishes(request),
        )
        state.content = content
        if not state.cacheable:
            self._namespace.learn_media(request)
        if (
            state.cacheable
            and request.lora_request is not None
            and getattr(request.lora_request, "load_inplace", False)
        ):
            self._adapters.renew(request.lora_request)
        if state.cacheable and not self._namespace.known:
            self._link.count("identity.pending", 1)
        self._demand.arrived(state)
        self._lookups.advance(state)
        if state.wishes.prefetch:
            self._ahead.append(state)

    def adapter_reloaded(self, lora_request: LoRARequest) -> None:
        """An adapter's id may serve another content from now on."""
        self._adapters.renew(lora_request)
        self.admission.renew(lora_request)

    def matched_tokens(self, request: Request, num_computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `num_computed` can be loaded; None to be asked again in a moment."""
        if not self.admission.admit(request):
            return None, False
        if self._chunks is None:
            return 0, False
        state = self._requests.get(request.request_id)
        if state is None:
            self.on_new_request(request)
            state = self._requests[request.request_id]
        state.local_tokens = num_computed
        if num_computed and not self._weights.trust_local_prefix:
            state.cacheable = False
        if not state.cacheable or not state.reads or not self._namespace.known:
            return 0, False
        if not self._lookups.advance(state) and not self._lookups.comes(state):
            return (None if self._lookups.parked(state) else 0), False
        self._lookups.weigh(state)
        tokens = self._chunks.loadable(state, num_computed)
        if tokens <= 0:
            self._lookups.drop_lease(state)
            return 0, False
        return tokens, True

    def planned_load(self, request: Request, block_ids: list[int], tokens: int) -> None:
        """vLLM has made room for `tokens` loaded tokens: plan their load."""
        state = self._requests.get(request.request_id)
        if self._chunks is None or state is None or not tokens or not state.hits:
            return
        load, state.load_tiers = self._chunks.load(state, block_ids, tokens)
        state.stage = Stage.LOADING
        state.blocks = list(block_ids)
        if not state.cacheable:  # since it was promised, the weights have changed
            self._plan.void.add(request.request_id)
        self._plan.loads.append(load)
        self._choice.loads.began(request.request_id, state.load_tiers, self._chunks.nbytes)
        self.tally.add("loads")
        slow = [chunk.key for chunk, tier in zip(load.chunks, state.load_tiers, strict=True) if tier != "cpu"]
        self._prefetch(state, slow)

    def load_tiers(self, request_id: str) -> tuple[str, ...]:
        """The tier of each chunk of a request's planned load."""
        state = self._requests.get(request_id)
        return state.load_tiers if state is not None else ()

    def finished(self, request: Request, block_ids: list[int]) -> bool:
        """A request is over: plan its last stores. True where its blocks must stay until they are done."""
        self.admission.end(request.request_id)
        state = self._requests.pop(request.request_id, None)
        if not self._requests:
            self._link.flush(now=True)
        if state is None:
            return False
        self._lookups.forget(state)
        if state.stage is Stage.LOADING:
            return False
        if state.cacheable:
            state.blocks = list(block_ids)
            self._plan_store(state, request.num_computed_tokens)
        if self._chunks is not None and state.cacheable and state.wishes.afterwards:
            keys, nbytes = self._chunks.object_keys(state.chunk_keys), len(state.chunk_keys) * self._chunks.nbytes
            self._afterwards.finished(request.request_id, keys, nbytes, state.wishes, storing=state.has_stored)
        if not state.has_stored:  # else blocks may be read still, whatever was learnt about the request meanwhile
            return False
        self._plan.await_stores.add(request.request_id)
        self.held.hold(request)
        return True

    def stores_done(self, request_ids: Iterable[str]) -> None:
        """All stores of these requests, which are over, are done."""
        self.held.stored(request_ids)
        self._afterwards.stored(request_ids)

    def build_plan(self, output: SchedulerOutput) -> StepPlan:
        """This step's plan for the workers."""
        self._step += 1
        self._patience.step_planned(time.monotonic(), output.num_scheduled_tokens, self._requests)
        plan = self._plan
        plan.step = self._step
        self.admission.prefetch(self._link.hot_adapters()[: self._options.lora_prefetch])
        plan.adapters = self.admission.take_orders()
        plan.weights = dict(self._weights.versions)
        plan.freed = self.held.take_freed()
        preempted = getattr(output, "preempted_req_ids", None)
        plan.preempted = set(preempted) if preempted is not None else self._preempted()
        for request_id in plan.preempted:  # first: a reset preempts and schedules again in one step
            state = self._requests.get(request_id)
            if state is not None:
                if state.stage is not Stage.LOADING:
                    self._lookups.forget(state)
                state.preempted()
                if not state.blocks:
                    state.content = self._blocks.key(state.request)
        for new in output.scheduled_new_reqs:
            self._scheduled(new.req_id, list(new.block_ids[0]) if new.block_ids else [], replace=True)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            self._scheduled(request_id, list(blocks[0]) if blocks else [], replace=request_id in cached.resumed_req_ids)
        self._ahead = [state for state in self._ahead if not self._raised(state)]
        for request_id in output.num_scheduled_tokens:
            state = self._requests.get(request_id)
            if state is not None and state.cacheable and time.monotonic() >= state.store_after:
                # What earlier steps computed; this step's own tokens are stored by the next.
                self._plan_store(state, state.request.num_computed_tokens)
        self._plan = StepPlan(step=0)
        prefill = self._patience.steps.rate(self._chunks.nbytes / self._chunks.tokens) if self._chunks else 0
        waiting = (state for state in self._requests.values() if state.stage is Stage.WAITING)
        self._demand.step(len(output.num_scheduled_tokens), self._requests.keys(), prefill, waiting)
        self._link.flush()
        return plan

    def check_weights(self) -> None:
        """They may have been changed in place: let the workers look before anything more is loaded or stored."""
        self._plan.check_weights = True

    def prefix_cache_reset(self) -> None:
        """vLLM forgot the KV in its own blocks."""
        self._weights.prefix_cache_reset(self._step)
        self.check_weights()

    def close(self) -> None:
        """Give the leases back."""
        self._link.close()

    # -- inside ----------

    def _weights_changed(self) -> None:
        """From now on this engine's KV is another model's. Nobody else's is cleared."""
        self._namespace.begin_epoch()
        self._plan.stores.clear()
        for request_id, state in self._requests.items():
            if state.is_fresh:
                self._lookups.forget(state)
                state.begin_anew()
                continue
            state.cacheable = False
            if state.stage in (Stage.LOADING, Stage.LOADED):
                self._plan.void.add(request_id)

    def _scheduled(self, request_id: str, blocks: list[int], *, replace: bool) -> None:
        state = self._requests.get(request_id)
        if self._chunks is None or state is None:
            return
        state.blocks = blocks if replace else state.blocks + blocks
        if state.first_step is None:
            state.first_step = self._step
            if state.passed_over:
                self.tally.add("chunks_not_loaded", state.passed_over)
                self._link.count("load.passed_over", state.passed_over)
                state.passed_over = 0
            held = tuple(state.blocks[: state.local_tokens // self._chunks.block_size])
            if held and state.request.lora_request is not None:
                self._plan.prefixes.append(Prefix(state.request.lora_request.lora_int_id, state.content, held))
        if state.stage is Stage.LOADED:
            self._plan.first_runs.add(request_id)
        if state.stage is not Stage.LOADING:
            state.stage = Stage.RUNNING

    def _preempted(self) -> set[str]:
        """Releases that do not list them: whoever is marked so and still has blocks by our books."""
        return {
            request_id
            for request_id, state in self._requests.items()
            if state.blocks and state.stage is not Stage.LOADING and state.request.status.name == "PREEMPTED"
        }

    def _raised(self, state: RequestState) -> bool:
        """Whether nothing more is to be done to raise a waiting request's chunks ahead of its turn."""
        if self._requests.get(state.request.request_id) is not state or state.stage is not Stage.WAITING:
            return True
        if not self._lookups.advance(state):
            return not (state.cacheable and state.reads)
        state.weighed = True  # all of it will be in memory
        self._prefetch(state, [key for key, tier in zip(state.chunk_keys, state.hits, strict=False) if tier != "cpu"])
        return True

    def _prefetch(self, state: RequestState, slow: list[bytes]) -> None:
        """Have chunks raised that will be loaded: as many as leave room for the loads themselves."""
        assert self._chunks is not None
        most = min(self._link.arena_bytes // _PREFETCH_SHARE // self._chunks.nbytes, _PREFETCH_CHUNKS)
        few = slow[: max(1, most)]
        if few:
            self._link.prefetch(state.lease, self._chunks.object_keys(few), LEASE_TTL_S)

    def _wishes(self, request: Request) -> Wishes:
        wishes, problems = wishes_of(request)
        for problem in problems:
            self._link.count("wish.refused", 1)
            if problem not in self._said and len(self._said) < _SAID:
                self._said.add(problem)
                _log.warning("request %s: %s; it is served without that", request.request_id, problem)
        return wishes

    def _plan_store(self, state: RequestState, computed_tokens: int) -> None:
        """Plan to store what is computed and confirmed: whole chunks beyond those that are held or planned already."""
        if self._chunks is None or not self._may_store or not state.wishes.store or not self._namespace.settle(state):
            return
        if state.adapter is not None and not self._adapters.serves(state.adapter.lora_int_id, state.adapter.digest):
            state.cacheable = False
            return
        state.extend_keys(self._chunks.tokens)
        self.events.learn(state, self._chunks)
        store = self._chunks.store(state, computed_tokens)
        if store is not None:
            self._plan.stores.append(store)
            state.offered(len(store.chunks))
