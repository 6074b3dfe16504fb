# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of the connector: looks up, plans loads and stores, keeps leases.

It runs inside EngineCore's loop: questions are sent when a request arrives, answers are collected when the scheduler
asks. One that was just sent is waited for a moment, where answers come that fast; then its request is parked while
others run, for as long as that pays; then it is done without (patience.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.groups import KVGroup
from loracache.connectors.vllm.common.messages import Facts, Prefix, StepPlan, WorkerNews
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.common.stats import Tally
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.scheduler.adapters import ServedAdapters
from loracache.connectors.vllm.scheduler.blocks import BlockKeys
from loracache.connectors.vllm.scheduler.chunks import Chunks, loaded_into
from loracache.connectors.vllm.scheduler.demand import Demand
from loracache.connectors.vllm.scheduler.load_or_compute import LoadChoice
from loracache.connectors.vllm.scheduler.lookups import LEASE_TTL_S, Lookups
from loracache.connectors.vllm.scheduler.lora.admission import AdapterAdmission
from loracache.connectors.vllm.scheduler.namespace import EngineNamespace
from loracache.connectors.vllm.scheduler.patience import Patience, even_position
from loracache.connectors.vllm.scheduler.requests import RequestState, Stage, is_cacheable, uses_draft_kv, wants_reading
from loracache.connectors.vllm.scheduler.resets import KnownWeights
from loracache.connectors.vllm.scheduler.storing import Storing
from loracache.connectors.vllm.scheduler.tier_events import TierEvents
from loracache.connectors.vllm.scheduler.wish_reader import WishReader
from loracache.connectors.vllm.scheduler.within_step import WithinStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

__all__ = ["SchedulerSide"]

_log = logging.getLogger(__name__)
_STORE_AGAIN_S = 1.0
_PREFETCH_CHUNKS = 4096
_PREFETCH_SHARE = 4  # of the arena is raised at most before the workers ask for it: they need room for the rest


class SchedulerSide:
    """Plans for one engine. Off until the workers' facts are known, and for good where they name a problem."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        options: Options,
        identity: Callable[[], str | None],
        link: SchedulerLink,
        groups: Sequence[KVGroup] = (),
    ) -> None:
        self._config = vllm_config
        self._options = options
        self._link = link
        self._groups = groups
        self._off = False
        self._drops_last_block = uses_draft_kv(vllm_config)
        self._may_load = bool(vllm_config.kv_transfer_config.is_kv_consumer)
        self._facts: list[Facts] = []
        self._chunks: Chunks | None = None
        self._requests: dict[str, RequestState] = {}
        ask = (lambda path: None) if options.lora_pool else link.ask_adapter
        self._adapters = ServedAdapters(ask, link.answer_adapter, link.abandon)
        self._blocks = BlockKeys(bool(getattr(vllm_config.lora_config, "enable_tower_connector_lora", False)))
        self._namespace = EngineNamespace(vllm_config, identity, self._adapters)
        self.admission = AdapterAdmission(link, options.load_timeout, self._adapters.correct, bool(options.lora_pool))
        self._weights = KnownWeights()
        self._patience = Patience(options.lookup_wait, options.lookup_wait_most, even_position(vllm_config))
        self._choice = LoadChoice(self._patience.steps, options.recompute_if_faster)
        self.tally = Tally()
        published = getattr(vllm_config, "kv_events_config", None)
        self.events = TierEvents(link, bool(published is not None and published.enable_kv_cache_events))
        deciding = self._patience, self._choice
        self._lookups = Lookups(link, self._namespace, self._adapters, *deciding, self.tally, self.events)
        stores = bool(vllm_config.kv_transfer_config.is_kv_producer)
        self.storing = Storing(link, self._namespace, self._adapters, self.events, enabled=stores)
        self._demand = Demand(link)
        self._wishes = WishReader(link)
        self.within_step = WithinStep(self._choice.loads, self.tally)
        self._ahead: list[RequestState] = []  # asks for its chunks to be raised before its turn comes
        self._plan = StepPlan(step=0)
        self._step = 0

    @property
    def on(self) -> bool:
        """Whether the workers' facts are known and allow caching."""
        return self._chunks is not None

    # -- what workers tell ----------

    def set_facts(self, facts: list[Facts]) -> None:
        """Take what the workers know of their KV; turns the cache on, or says once why it stays off."""
        self.admission.set_pools([fact.pool for fact in facts if fact.pool is not None])
        if self._off:
            return
        for fact in facts:
            if fact.problem:
                self._off = True
                _log.warning("LoRACache is off for this model: %s", fact.problem)
                return
            self._facts.append(fact)
        self.storing.kept.workers = len(self._facts)
        chunks = Chunks.of(
            self._facts, self._groups, self._options.chunk_tokens, drops_last_block=self._drops_last_block
        )
        if chunks is None:
            self._off = True
            layouts = sorted({group.layout for fact in self._facts for group in fact.groups})
            _log.warning("LoRACache is off for this model: its workers lay out KV differently: %s", layouts)
            return
        self._chunks = self._lookups.chunks = self.storing.chunks = chunks
        self._namespace.layout = chunks.layout
        self._namespace.chunk_tokens = chunks.tokens
        self._namespace.groups = chunks.groups
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
        self.storing.kept.over(news.stored)
        self.within_step.take_news(news.came)
        for request_id, seconds in news.loaded.items():
            self._choice.loads.took(request_id, seconds)
        for request_id in news.unstored & self._requests.keys():
            self.storing.kept.release(self._requests[request_id])
            self._requests[request_id].offer_again(time.monotonic() + _STORE_AGAIN_S)

    def finished_loading(self, request_ids: set[str], invalid_blocks: set[int], failed: Iterable[str] = ()) -> None:
        """A step is over. Loads are done, some of their blocks perhaps not, or nothing of those that `failed`."""
        self._end_step()
        for request_id in request_ids:
            self._choice.loads.over(request_id)
            state = self._requests.get(request_id)
            if state is not None and state.stage is Stage.LOADING:
                state.stage = Stage.LOADED
                self._lookups.drop_lease(state)
        for request_id in failed:
            if request_id in self._requests:
                self._requests[request_id].offer_again(0.0)
        if invalid_blocks:
            for state in self._requests.values():
                if not all(map(invalid_blocks.isdisjoint, state.blocks)):
                    state.offer_again(0.0)

    def _end_step(self) -> None:
        """Of a step that loaded, the result is there: nothing that it computed is kept where it is not right."""
        result = self.within_step.end_step(self._requests, self._chunks, len(self._facts))
        if result is None:
            return
        for request_id in result.loads:
            self._choice.loads.over(request_id)
        for state in [self._requests[request_id] for request_id in result.loads if request_id in self._requests]:
            self._lookups.drop_lease(state)
        self.storing.drop(self._plan, result.spoilt)  # of those that it ended, or that were aborted meanwhile

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
            wishes=self._wishes.read(request),
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
        self._lookups.mark_junction(state)
        tokens = self._chunks.loadable(state, num_computed)
        if tokens <= 0:
            self._lookups.drop_lease(state)
            return 0, False
        within = self.within_step.tokens(state, self._chunks, tokens, self._link.arena_bytes)
        return (within, False) if within else (tokens, True)

    def planned_load(self, request: Request, blocks: Any, tokens: int) -> None:
        """vLLM has made room for `tokens` loaded tokens in `blocks` (its KVCacheBlocks): plan their load."""
        state = self._requests.get(request.request_id)
        if self._chunks is None or state is None or not tokens or not state.hits:
            return
        state.blocks = [list(table) for table in blocks.get_block_ids()]
        tables = loaded_into(blocks) if self._chunks.beside else state.blocks
        load, state.load_tiers = self._chunks.load(state, tables, tokens)
        if state.within_step:
            load = self.within_step.planned(state, self._chunks, load)
        else:
            state.stage = Stage.LOADING
        if not (state.cacheable and load.chunks):  # the weights have changed since it was promised, or the blocks
            self._plan.void.add(request.request_id)
        self._plan.loads.append(load)
        self._choice.loads.began(request.request_id, state.load_tiers, self._chunks.nbytes // len(self._chunks.parts))
        self.tally.add("loads")
        self._prefetch(state, self._chunks.hit_keys(state, "disk", "redis"))

    def load_tiers(self, request_id: str) -> tuple[str, ...]:
        """The tier of each chunk of a request's planned load."""
        state = self._requests.get(request_id)
        return state.load_tiers if state is not None else ()

    def finished(self, request: Request, tables: Sequence[Sequence[int]]) -> bool:
        """A request is over: plan its last stores. True where its blocks must stay until they are done."""
        self.admission.end(request.request_id)
        state = self._requests.pop(request.request_id, None)
        if not self._requests:
            self.admission.tell_resident()
            self._link.flush(now=True)
        if state is None:
            return False
        self._lookups.forget(state)
        if state.stage is Stage.LOADING:
            return False
        return self.storing.finish(state, request, tables, self._plan)

    def build_plan(self, output: SchedulerOutput) -> StepPlan:
        """This step's plan for the workers."""
        self._step += 1
        self._patience.step_planned(time.monotonic(), output.num_scheduled_tokens, self._requests)
        self._end_step()  # it has ended long ago, but where the workers said nothing
        plan = self._plan
        plan.step = self._step
        self.admission.prefetch(self._link.hot_adapters()[: self._options.lora_prefetch])
        plan.adapters = self.admission.take_orders()
        plan.weights = dict(self._weights.versions)
        plan.freed = self.storing.held.take_freed()
        preempted = getattr(output, "preempted_req_ids", None)
        if preempted is None:  # releases that do not list them: whoever is marked so and has blocks by our books
            preempted = [request_id for request_id, state in self._requests.items() if state.lost_blocks]
        plan.preempted = set(preempted)
        for request_id in plan.preempted:  # first: a reset preempts and schedules again in one step
            state = self._requests.get(request_id)
            if state is not None:
                if state.stage is not Stage.LOADING:
                    self._lookups.forget(state)
                self.storing.kept.release(state)
                state.preempted()
                if not state.blocks:
                    state.content = self._blocks.key(state.request)
        for new in output.scheduled_new_reqs:
            self._scheduled(new.req_id, new.block_ids or (), replace=True)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            self._scheduled(request_id, blocks or (), replace=request_id in cached.resumed_req_ids)
        self._ahead = [state for state in self._ahead if not self._raised(state)]
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = self._requests.get(request_id)
            if state is not None and state.cacheable and time.monotonic() >= state.store_after:
                # What earlier steps computed; this step's own tokens are stored by the next.
                self.storing.plan(state, state.request.num_computed_tokens, plan)
                self.storing.keep(state, scheduled, output)
        self.storing.plan_kept(plan, output.num_scheduled_tokens)
        self.within_step.begin_step(plan, output.num_scheduled_tokens, self._requests)
        self._plan = StepPlan(step=0)
        prefill = self._patience.steps.rate(self._chunks.nbytes / self._chunks.tokens) if self._chunks else 0
        waiting = (state for state in self._requests.values() if state.stage is Stage.WAITING)
        self._demand.step(len(output.num_scheduled_tokens), self._requests.keys(), prefill, waiting)
        self._link.flush()
        return plan

    def check_weights(self) -> None:
        """They may have been changed in place: let the workers look before anything more is loaded or stored."""
        self._plan.check_weights = True

    def free_blocks(self, manager: Any) -> None:
        """vLLM needs all blocks free (resets.py)."""
        self.storing.free_blocks(manager, self._requests.values())

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
        self.storing.drop(self._plan)
        for request_id, state in self._requests.items():
            if state.is_fresh:
                self._lookups.forget(state)
                state.begin_anew()
                continue
            state.cacheable = False
            self.storing.kept.release(state)
            if state.stage in (Stage.LOADING, Stage.LOADED):
                self._plan.void.add(request_id)

    def _scheduled(self, request_id: str, tables: Sequence[Sequence[int]], *, replace: bool) -> None:
        state = self._requests.get(request_id)
        if self._chunks is None or state is None:
            return
        if replace or not state.blocks:
            state.blocks = [list(table) for table in tables]
        else:
            for known, new in zip(state.blocks, tables, strict=False):
                known += new
        if state.first_step is None:
            state.first_step = self._step
            if state.passed_over:
                self.tally.add("chunks_not_loaded", state.passed_over)
                self._link.count("load.passed_over", state.passed_over)
                state.passed_over = 0
            held = tuple((state.blocks or [[]])[0][: state.local_tokens // self._chunks.block_tokens])
            if held and state.request.lora_request is not None:
                self._plan.prefixes.append(Prefix(state.request.lora_request.lora_int_id, state.content, held))
        if state.stage is Stage.LOADED:
            self._plan.first_runs.add(request_id)
        if state.stage is not Stage.LOADING:
            state.stage = Stage.RUNNING

    def _raised(self, state: RequestState) -> bool:
        """Whether nothing more is to be done to raise a waiting request's chunks ahead of its turn."""
        if self._requests.get(state.request.request_id) is not state or state.stage is not Stage.WAITING:
            return True
        if not self._lookups.advance(state):
            return not (state.cacheable and state.reads)
        state.weighed = True  # all of it will be in memory
        assert self._chunks is not None
        self._prefetch(state, self._chunks.hit_keys(state, "disk", "redis"))
        return True

    def _prefetch(self, state: RequestState, slow: list[bytes]) -> None:
        """Have objects raised that will be loaded: as many as leave room for the loads themselves."""
        assert self._chunks is not None
        most = min(self._link.arena_bytes // _PREFETCH_SHARE // self._chunks.nbytes, _PREFETCH_CHUNKS)
        few = slow[: max(1, most) * self._chunks.width]
        if few:
            self._link.prefetch(state.lease, few, LEASE_TTL_S)
            state.leased = True
