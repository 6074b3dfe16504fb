# SPDX-License-Identifier: Apache-2.0
"""LoRACacheConnector: what vLLM loads. Hands each call to the scheduler's or the worker's side and holds no logic.

vLLM makes one in EngineCore (role SCHEDULER) and one in every worker (role WORKER); see vLLM's
`kv_connector/v1/base.py` for when each method is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from loracache.connectors.vllm.common.geometry import uncacheable
from loracache.connectors.vllm.common.groups import groups_of
from loracache.connectors.vllm.common.logs import log_as_vllm_does
from loracache.connectors.vllm.common.messages import Facts, StepPlan
from loracache.connectors.vllm.common.options import Options, own_options
from loracache.connectors.vllm.common.patches import problem
from loracache.connectors.vllm.common.private import private_server
from loracache.connectors.vllm.common.releases import has_kv_layouts, unknown_release
from loracache.connectors.vllm.common.reports import ReportInbox, ReportOutbox
from loracache.connectors.vllm.common.stats import ConnectorStats, PromMetrics
from loracache.connectors.vllm.common.synchronous import check_synchronous, unknown_prefix_cache
from loracache.connectors.vllm.identity.model import ModelIdentity
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.scheduler.hit_sources import hits_by_source
from loracache.connectors.vllm.scheduler.resets import hook_scheduler_class
from loracache.connectors.vllm.scheduler.side import SchedulerSide
from loracache.connectors.vllm.scheduler.within_step import PrefixCache
from loracache.connectors.vllm.worker.runner_hook import hook_runner_class
from loracache.connectors.vllm.worker.side import WorkerSide
from loracache.errors import ConfigError
from loracache.groups import Need

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from loracache.connectors.vllm.lora.refusals import Refusal

__all__ = ["LoRACacheConnector"]

_log = logging.getLogger(__name__)


class LoRACacheConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Finds KV that was computed before, in LoRACache. Configured by `kv_connector_extra_config` (options.py)."""

    lets_go_first = True  # runner_hook.py

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_as_vllm_does()
        transfer = vllm_config.kv_transfer_config
        options = Options.parse(dict(transfer.kv_connector_extra_config))
        if not options.server and getattr(vllm_config.parallel_config, "nnodes", 1) > 1:
            raise ConfigError(
                f"kv_connector_extra_config: server is not set, but the engine runs on "
                f"{vllm_config.parallel_config.nnodes} nodes; start `loracache serve` on "
                f"each node and give its socket as server"
            )
        _check_release(options, role)
        check_synchronous(vllm_config, options)
        self.layer_by_layer = options.layer_by_layer
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._let_go_for: StepPlan | None = None
        self._outbox, self._inbox = ReportOutbox(), ReportInbox()
        self._identity: ModelIdentity | None = None
        problem = uncacheable(vllm_config, kv_cache_config)
        if role is KVConnectorRole.WORKER:
            self._worker = WorkerSide(vllm_config, kv_cache_config, options, problem)
            return
        if transfer.kv_load_failure_policy != "recompute":
            _log.warning(
                'kv_load_failure_policy is "fail": a chunk that cannot be loaded fails its request; set "recompute"'
            )
        groups = () if problem else groups_of(kv_cache_config)
        server = options.server or private_server(transfer.engine_id, options.disk_path)
        self._link = SchedulerLink(server, max(options.lookup_wait, options.lookup_wait_most))
        self._identity = (
            None
            if problem
            else ModelIdentity(vllm_config, options.model_id, states=any(group.need is Need.STATE for group in groups))
        )
        identity = self._identity.value if self._identity is not None else lambda: None
        self._scheduler = SchedulerSide(vllm_config, options, identity, self._link, groups)
        hook_scheduler_class()
        if problem:
            self._scheduler.set_facts([Facts((), problem)])

    # -- both sides ----------

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """The layout to prefer. Where the attention cannot read it vLLM says so and takes its own."""
        layout = own_options(vllm_config).kv_layout
        if layout and not has_kv_layouts():
            raise ConfigError(f"kv_connector_extra_config: kv_layout={layout!r} needs vLLM 0.29 or later; leave it out")
        return layout or None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Where layers wait for their bytes, no graph may hold several."""
        return extra_config.get("layer_by_layer") is True

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is a miss later, and nothing else."""
        return False

    def shutdown(self) -> None:
        """Finish stores, give leases back."""
        if self._identity is not None:
            self._identity.close()
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()

    # -- worker ----------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See WorkerSide."""
        assert self._worker is not None
        self._worker.register_kv_caches(kv_caches)
        hook_runner_class()

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Nothing is copied to or from blocks whose memory sleep has taken away."""
        return True

    def unregister_kv_caches(self) -> None:
        """Before sleep (vLLM 0.33): the memory of the KV caches goes."""
        assert self._worker is not None
        self._worker.leave_blocks()

    def restore_kv_caches(self) -> None:
        """After wake-up: it is back, at the same addresses."""
        assert self._worker is not None
        self._worker.return_to_blocks()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler needs to know of this worker."""
        assert self._worker is not None
        return self._worker.facts

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Let go of blocks that this step may overwrite, where it is not done (runner_hook.py)."""
        assert self._worker is not None
        if isinstance(kv_connector_metadata, StepPlan) and kv_connector_metadata is not self._let_go_for:
            self._let_go_for = kv_connector_metadata
            self._worker.handle_preemptions(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start this step's loads. Few are waited for in the step itself, by its layers (`layer_by_layer`)."""
        assert self._worker is not None
        plan = self._connector_metadata
        if isinstance(plan, StepPlan):
            self._worker.start_loads(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for the layer's bytes, where this step loads what it computes upon."""
        if self.layer_by_layer:
            assert self._worker is not None
            if self._worker.step_loads is not None:
                self._worker.step_loads.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do: whole chunks are stored after the step that completed them."""

    def wait_for_save(self) -> None:
        """Nothing to wait for, and no place to start stores: up to vLLM 0.30, steps that compute nothing skip it."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """(stores done, loads done), each request once. Takes this step's stores on, so that their requests do not
        count as done, but starts none: a drafter may run after this.
        """
        assert self._worker is not None
        plan = self._connector_metadata
        if isinstance(plan, StepPlan):
            self._worker.take_stores(plan)
        stored, loaded = self._worker.take_finished(finished_req_ids)
        return stored or None, loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """`get_finished`, and the requests whose load failed as a whole (vLLM 0.32 on): in a model whose layers differ
        in what they need of a prefix, no block's failure is reported.
        """
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

        stored, loaded = self.get_finished(finished_req_ids)
        assert self._worker is not None
        return KVConnectorTransferResults(stored or set(), loaded or set(), self._worker.take_failed_loads())

    def clear_connector_metadata(self) -> None:
        """The end of every step, in every release, after `wait_for_save` and `get_finished` in either order: starts
        this step's stores, which run behind the engine while their blocks are held.
        """
        super().clear_connector_metadata()
        if self._worker is not None:
            self._worker.start_stores()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was done since the last step; asked of both sides. None where our plugin did not tell vLLM of our name:
        in a MultiConnector that would end the engine."""
        side = self._worker or self._scheduler
        known = type(self).__name__ in KVConnectorFactory._registry
        return side.tally.take() if side is not None and known else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """From what was carried to another process."""
        return ConnectorStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Our counters in vLLM's /metrics."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of the loads just reported that hold no valid KV."""
        assert self._worker is not None
        return self._worker.take_load_errors()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler's side should know."""
        assert self._worker is not None
        return self._outbox.report(self._worker.take_news())

    # -- scheduler ----------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """The workers' facts, by rank."""
        self._take_facts(metadata.values())

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """The workers' facts, by pipeline and tensor rank."""
        self._take_facts(metadata.values())

    def fail_requests_through(self, fail: Callable[[str, Refusal], None]) -> None:
        """Take vLLM's way to end a request with an error (plugin.py)."""
        if self._scheduler is not None:
            self._scheduler.admission.fail = fail

    def adapter_reloaded(self, lora_request: LoRARequest) -> None:
        """An adapter was loaded in place, by an order to the engine (lora/reload.py)."""
        if self._scheduler is not None:
            self._scheduler.adapter_reloaded(lora_request)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """vLLM's own books of its blocks."""
        if self._scheduler is not None:
            self._scheduler.storing.kept.pool = gpu_block_pool

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """vLLM's prefix cache, and with it the pool of its blocks."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None and self.layer_by_layer:
            try:
                self._scheduler.within_step.prefix_cache = PrefixCache(kv_cache_manager)
            except AttributeError as error:
                raise unknown_prefix_cache(error) from error

    def on_new_request(self, request: Request) -> None:
        """Send the lookup."""
        assert self._scheduler is not None
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded beyond those the engine has."""
        assert self._scheduler is not None
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load of `num_external_tokens`."""
        assert self._scheduler is not None
        if num_external_tokens:
            self._scheduler.planned_load(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[Any, int]:
        """The tiers that `num_external_tokens` come from."""
        assert self._scheduler is not None
        return hits_by_source(self._scheduler.load_tiers(request.request_id), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """This step's plan."""
        assert self._scheduler is not None
        return self._scheduler.build_plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the workers' results."""
        assert self._scheduler is not None
        self._scheduler.step_done()
        self._scheduler.storing.done(connector_output.finished_sending or ())
        news = self._inbox.news(connector_output.kv_connector_worker_meta)
        if news is not None:
            if news.facts:
                self._take_facts(news.facts)
            self._scheduler.take_news(news)
        loaded, invalid = connector_output.finished_recving or set(), connector_output.invalid_block_ids or set()
        failed = getattr(connector_output, "failed_recving", None) or set()
        self._scheduler.finished_loading(loaded, invalid, failed)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """What has entered and left our tiers, for vLLM's KV events."""
        assert self._scheduler is not None
        return self._scheduler.events.take()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Plan the last stores; True where blocks must wait for them."""
        assert self._scheduler is not None
        return self._scheduler.finished(request, [block_ids]), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same with all KV cache groups."""
        assert self._scheduler is not None
        return self._scheduler.finished(request, block_ids), None

    def has_pending_block_frees(self) -> bool:
        """Whether blocks will be free soon without that: vLLM then waits and preempts nobody."""
        assert self._scheduler is not None
        return self._scheduler.storing.frees_soon

    def reset_cache(self) -> bool | None:
        """Part of a reset, a pause or a sleep, none of which makes KV of these weights wrong: it stays."""
        assert self._scheduler is not None
        self._scheduler.check_weights()
        return True

    def before_prefix_cache_reset(self, manager: Any) -> None:
        """vLLM is about to forget its own KV and needs all blocks free (resets.py)."""
        if self._scheduler is not None and manager is not None:
            self._scheduler.free_blocks(manager)

    def after_prefix_cache_reset(self) -> None:
        """It has (resets.py)."""
        if self._scheduler is not None:
            self._scheduler.prefix_cache_reset()

    def _take_facts(self, facts: Iterable[object]) -> None:
        assert self._scheduler is not None
        known = [fact for fact in facts if isinstance(fact, Facts)]
        if known and not self._scheduler.on:
            self._scheduler.set_facts(known)


def _check_release(options: Options, role: KVConnectorRole) -> None:
    """A release that nobody has tried may cache: how KV lies is read from its tensors. It may not have a pool."""
    why = problem() if options.lora_pool else ""
    if why:
        raise ConfigError(f"kv_connector_extra_config: lora_pool is set, but {why}; leave lora_pool out")
    unknown = unknown_release()
    if unknown and role is KVConnectorRole.SCHEDULER:
        _log.warning("%s; its KV is cached all the same", unknown)
