# SPDX-License-Identifier: Apache-2.0
"""The workers' side of the connector: carries out the scheduler's plans, reports what came of them.

Threading: vLLM calls everything here on the worker's main thread; `_loaded` and `_stored` are called by the transfer
threads and only touch what `_lock` guards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch

from loracache.client.client import CacheClient
from loracache.connectors.vllm.common.geometry import chunk_blocks
from loracache.connectors.vllm.common.groups import block_unit
from loracache.connectors.vllm.common.messages import Facts, Load, Prefix, StepPlan, Store, WorkerNews
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.common.private import ensure_private_daemon, private_server
from loracache.connectors.vllm.common.stats import Tally
from loracache.connectors.vllm.worker.adapters import LoadedAdapters
from loracache.connectors.vllm.worker.by_layer import StepLoads
from loracache.connectors.vllm.worker.gate import GatedCopier
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.lora.orders import PoolNews, PoolWorker, paged_worker
from loracache.connectors.vllm.worker.objects import GroupObjects, bytes_but, read_groups
from loracache.connectors.vllm.worker.storer import StoreJob, Storer, served_names
from loracache.connectors.vllm.worker.weights import WeightsWatch
from loracache.errors import UsageError
from loracache.kernels.page_copy import CopyError
from loracache.results import Cause

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["WorkerSide"]

_log = logging.getLogger(__name__)
_MAY_BE_STORED_LATER = {Cause.UNAVAILABLE, Cause.LEASE_LOST, Cause.NO_PARENT}
_STORES_PATIENCE_S = 2.0  # for the stores of blocks that the next step may overwrite


class WorkerSide:
    """One worker's transfers. Idle until `register_kv_caches` has found a layout it can move."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, options: Options, problem: str) -> None:
        self._config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._options = options
        self._problem = problem
        self._facts: Facts | None = None
        self._facts_sent = False
        self._objects: Sequence[GroupObjects] = ()
        self._is_mixed = False  # its layers differ in what they need of a prefix
        self._loader: Loader | None = None
        self.step_loads: StepLoads | None = None  # where there may be any
        self._storer: Storer | None = None
        self._cuda = False
        self._adapters = LoadedAdapters(self._adapter_changed)
        self._pool: PoolWorker | None = None
        self._copiers: list[GatedCopier] = []
        rank = getattr(vllm_config.parallel_config, "rank", 0)
        self.weights = WeightsWatch(rank, self._weights_changed, self.leave_blocks, self.return_to_blocks)
        if not problem:
            self.weights.install(vllm_config)
        if vllm_config.lora_config is not None and not options.lora_pool:
            self._adapters.install()
        self.tally = Tally()
        self._load_began: dict[str, float] = {}
        self._load_took: dict[str, float] = {}  # of those that came, and that the scheduler has not heard of
        self._lock = threading.Lock()
        self._job_done = threading.Condition(self._lock)
        self._done_loads: dict[str, list[int]] = {}
        self._failures: Counter[str] = Counter()
        self._storing: dict[str, set[StoreJob]] = {}
        self._to_start: list[StoreJob] = []
        self._awaited: set[str] = set()
        self._not_yet_run: dict[str, Load] = {}  # planned, under way or done, but not computed upon
        self._collected: set[str] = set()  # those of them that vLLM was told are done
        self._ended: set[str] = set()  # those that ended first
        self._void: set[str] = set()  # those of them that must not be computed upon
        self._load_errors: set[int] = set()
        self._lost: set[str] = set()  # requests whose load is done and did not come whole
        self._failed: set[str] = set()  # those of them that are reported as such
        self._prefixes: list[Prefix] = []
        self._unstored: set[str] = set()
        self._over: dict[int, int] = {}  # numbers of stores that are over

    @property
    def facts(self) -> Facts | None:
        """What the scheduler needs to know of this worker."""
        return self._facts

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Learn the layout, connect to the daemon and start the transfer threads."""
        server = self._options.server or private_server(
            self._config.kv_transfer_config.engine_id, self._options.disk_path
        )

        def ensure() -> None:
            if not self._options.server:
                ensure_private_daemon(server, self._options)

        problem = self._problem
        if self._options.lora_pool:
            ensure()
            self._pool = paged_worker(self._config, server, ensure, self._adapters.confirm, self._options.load_timeout)
        pool = self._pool.facts if self._pool is not None else None
        if not problem:
            try:
                registered = read_groups(self._config, self._kv_cache_config, kv_caches)
                self._copiers = [GatedCopier(registered.rows, self._options.bounce_bytes) for _ in range(2)]
            except (UsageError, CopyError) as error:
                problem = str(error)
        if problem:
            self._facts = Facts((), problem, pool)
            return
        if self._options.layer_by_layer:
            self.step_loads = StepLoads(registered.rows, kv_caches)
        self._facts = Facts(registered.facts, pool=pool)
        self._objects = registered.objects
        self._is_mixed = any(each.group.name for each in registered.objects)
        unit = block_unit(each.group for each in registered.objects)
        chunk_blocks(1, unit, self._options.chunk_tokens)  # raises early; the plans say it
        self._cuda = registered.rows[0].device.type == "cuda"
        ensure()
        if self._options.server:  # a private one would end with this client
            with CacheClient(server, name="vllm-start"):
                pass  # an engine whose configuration names no living daemon should not start
        self._storer = Storer(
            server, ensure, self._copiers[0], self._objects, self._may_store, self._stored, served_names(self._config)
        )
        self._loader = Loader(
            server, ensure, self._copiers[1], self._objects, self._options.load_timeout, self._may_load, self._loaded
        )

    def handle_preemptions(self, plan: StepPlan) -> None:
        """Before anything of this step is computed: let go of blocks that may be overwritten in it."""
        self.weights.begin_step(plan.step, check=plan.check_weights)
        self._adapters.step = plan.step
        self._prefixes += plan.prefixes
        if self._pool is not None:
            self._adapters.forget(plan.adapters.forget)
            self._pool.carry_out(plan.adapters)
        for request_id in plan.preempted:
            with self._lock:
                jobs = list(self._storing.get(request_id, ()))
            for job in jobs:
                job.gate.shut()
        if plan.freed:
            self._start(self._take(plan, [store for store in plan.stores if store.request_id in plan.freed]))
            self._end_stores(plan.freed)

    def start_loads(self, plan: StepPlan) -> None:
        """Start this step's loads."""
        if self._loader is None:
            return
        self._not_yet_run.update((load.request_id, load) for load in plan.loads)
        with self._lock:
            self._void.difference_update(load.request_id for load in plan.loads)
            self._load_began.update((load.request_id, time.monotonic()) for load in plan.loads)
        void = plan.void & self._not_yet_run.keys()
        if not self.weights.believes(plan.weights):
            void |= {load.request_id for load in plan.loads}
        self._fail_loads(void, "weights_changed")
        after = torch.cuda.current_stream().record_event() if self._cuda and plan.loads else None
        for load in plan.loads:
            layers = (
                self.step_loads.begin(load, plan.step) if load.within_step and self.step_loads is not None else None
            )
            self._loader.submit(load, after, layers)

    def take_stores(self, plan: StepPlan) -> None:
        """Take this step's stores on: from now on their requests have stores under way."""
        for request_id in plan.first_runs:
            self._forget_load(request_id)
        self._awaited |= plan.await_stores
        self._to_start += self._take(plan, [store for store in plan.stores if store.request_id not in plan.freed])

    def start_stores(self) -> None:
        """Start what was taken on: its blocks were computed by earlier steps, and this one is submitted with its
        drafts."""
        jobs, self._to_start = self._to_start, []
        self._start(jobs)

    def take_finished(self, ended: Set[str] = frozenset()) -> tuple[set[str], set[str]]:
        """(requests whose stores are done and were awaited, requests whose load is done), each once. ended: requests
        that are over since the last call; one that ended before it ran has nothing left to be warned about.
        """
        self._end_step_loads()
        with self._lock:
            stored = {request_id for request_id in self._awaited if request_id not in self._storing}
            self._awaited -= stored
            loads, self._done_loads = self._done_loads, {}
            lost, self._lost = self._lost, set()
        for request_id, failed in loads.items():
            self._load_errors.update(failed)
            self._collected.add(request_id)
        if self._is_mixed:
            self._failed |= lost
        self._ended |= ended & self._not_yet_run.keys()
        for request_id in self._ended & self._collected:
            self._ended.discard(request_id)
            self._forget_load(request_id)
        return stored, set(loads)

    def _end_step_loads(self) -> None:
        """Those within the step that ends are over when it does. vLLM is told of blocks alone."""
        if self._loader is None or self.step_loads is None:
            return
        for load, waited in self.step_loads.end(self._loader.alive):
            with self._lock:
                failed = self._done_loads.pop(load.request_id, load.blocks)
                self._lost.discard(load.request_id)
                if not (waited or failed):
                    failed = load.blocks
                    self._failures[f"load.{Cause.DEADLINE}"] += 1
            self.step_loads.ended(whole=not failed)
            self._load_errors.update(failed)
            self._forget_load(load.request_id)

    def take_failed_loads(self) -> set[str]:
        """Requests of the loads just reported of which nothing may be used, in a model whose layers differ in what they
        need of a prefix: vLLM cannot tell there whose a block is, nor how far a request could go on without it.
        """
        failed, self._failed = self._failed, set()
        return failed

    def take_load_errors(self) -> set[int]:
        """Blocks that hold no valid KV although a load was planned for them, or although the engine's own prefix cache
        has them: of an adapter whose content was replaced, perhaps in this very step.

        None in a model whose layers differ in what they need of a prefix, where vLLM takes none: what was reported as
        loaded, or is in its prefix cache, is used there as it is, and counted. It is KV of what was served under that
        name when it was computed; vLLM by itself goes on with that, too, and nothing of it is stored.
        """
        errors, self._load_errors = self._load_errors, set()
        stale = self._adapters.stale_blocks(self._prefixes)
        if stale:
            with self._lock:
                self._failures["prefix.adapter_changed"] += 1
        self._prefixes = []
        return set() if self._is_mixed else errors | stale

    def take_news(self) -> WorkerNews | None:
        """What the scheduler does not know yet."""
        with self._lock:
            failures, self._failures = self._failures, Counter()
            unstored, self._unstored = self._unstored, set()
            loaded, self._load_took = self._load_took, {}
            stored, self._over = self._over, {}
        facts = [self._facts] if self._facts is not None and not self._facts_sent else []
        self._facts_sent = True
        adapters, contents = self._adapters.take_news()
        came = self.step_loads.take_news() if self.step_loads is not None else {}
        weights = self.weights.take_news()
        pool = self._pool.take_news() if self._pool is not None else None
        if not (failures or facts or adapters or pool or weights or loaded or stored or came):
            return None
        pool = pool or PoolNews()
        of_pool = pool.activated, pool.not_activated, pool.lost, pool.pinned
        failed = dict(failures)
        return WorkerNews(adapters, failed, unstored, facts, *of_pool, weights, contents, loaded, stored, came)

    def leave_blocks(self) -> None:
        """The KV cache's memory is about to go: finish stores, fail loads, and touch no block any more."""
        with self._lock:
            storing = set(self._storing)
        self._end_stores(storing)
        for copier in self._copiers:
            copier.gate.shut()
        self._fail_loads(set(self._not_yet_run), "asleep")

    def return_to_blocks(self) -> None:
        """It is back, at the same addresses."""
        for copier in self._copiers:
            copier.gate.reopen()

    def close(self) -> None:
        """End the threads; what is queued for storing is finished first."""
        for job in self._to_start:
            self._stored(job, {Cause.SHUTDOWN: job.left})
        self._to_start = []
        for each in (self._storer, self._loader, self._pool):
            if each is not None:
                each.close()

    def _take(self, plan: StepPlan, stores: list[Store]) -> list[StoreJob]:
        """Jobs for these stores; their requests have stores under way from now on."""
        if not stores:
            return []
        if self._storer is None or not self.weights.believes(plan.weights):
            with self._lock:
                self._over.update((store.number, 1) for store in stores if store.number)
                if self._storer is not None:
                    self._failures["store.weights_changed"] += sum(len(store.chunks) for store in stores)
            return []
        jobs = [StoreJob(store) for store in stores]
        with self._lock:
            for job in jobs:
                self._storing.setdefault(job.store.request_id, set()).add(job)
        return jobs

    def _start(self, jobs: list[StoreJob]) -> None:
        after = torch.cuda.current_stream().record_event() if self._cuda and jobs else None
        for job in jobs:
            assert self._storer is not None
            job.after = after
            self._storer.submit(job)

    def _end_stores(self, request_ids: Set[str]) -> None:
        """Their blocks will be written to: let their stores end, or cancel them."""
        deadline = time.monotonic() + _STORES_PATIENCE_S
        with self._job_done:
            self._job_done.wait_for(lambda: request_ids.isdisjoint(self._storing), deadline - time.monotonic())
            late = [job for request_id in request_ids for job in self._storing.get(request_id, ())]
        for job in late:
            job.gate.shut()

    def _weights_changed(self) -> None:
        """What is loaded, or was and is not computed upon, is of the weights before."""
        self._fail_loads(set(self._not_yet_run), "weights_changed")

    def _forget_load(self, request_id: str) -> None:
        self._not_yet_run.pop(request_id, None)
        self._collected.discard(request_id)
        with self._lock:
            self._void.discard(request_id)

    def _fail_loads(self, request_ids: Set[str], cause: str) -> None:
        """KV that these requests load, or have loaded and not computed upon, is wrong: where a load is done this is
        reported in this very step, where it is under way with its end.
        """
        with self._lock:
            request_ids = request_ids - self._void  # what failed before was, or will be, reported for that
        for request_id in request_ids:
            blocks = self._not_yet_run[request_id].blocks
            with self._lock:
                self._void.add(request_id)
                if request_id in self._done_loads:
                    self._done_loads[request_id] = blocks
                    self._lost.add(request_id)
                self._failures[f"load.{cause}"] += 1
            if request_id in self._collected:
                self._load_errors.update(blocks)

    def _adapter_changed(self, adapter: int) -> None:
        """Other content is served under `adapter` from now on: KV that is loaded for the old one is wrong."""
        digest = self._adapters.digest(adapter)
        stale = {
            request_id
            for request_id, load in self._not_yet_run.items()
            if load.adapter is not None and load.adapter.lora_int_id == adapter and load.adapter.digest != digest
        }
        self._fail_loads(stale, Cause.ADAPTER_CHANGED)

    def _may_load(self, load: Load) -> bool:
        binding = load.adapter
        return binding is None or self._adapters.digest(binding.lora_int_id) in (None, binding.digest)

    def _may_store(self, store: Store) -> bool:
        binding = store.adapter
        return binding is None or self._adapters.computed_with(binding.lora_int_id, binding.digest, store.first_step)

    # -- called by the transfer threads ----------

    def _loaded(self, load: Load, failed: list[int], causes: dict[str, int]) -> None:
        with self._lock:
            void = load.request_id in self._void or not self._may_load(load)  # maybe since the loader looked
            self._done_loads[load.request_id] = failed = load.blocks if void else failed
            if void or failed:
                self._lost.add(load.request_id)
            took = time.monotonic() - self._load_began.pop(load.request_id, time.monotonic())
            if causes.keys() <= {Cause.DEADLINE}:  # one that was given up took that long at least
                self._load_took[load.request_id] = took
            self._failures.update({f"load.{cause}": count for cause, count in causes.items()})
        self.tally.add("load_bytes", bytes_but(load, failed, self._objects))
        self.tally.add("load_seconds", took)
        self.tally.add_causes("load_failures", causes)

    def _stored(self, job: StoreJob, causes: dict[str, int]) -> None:
        self.tally.add("store_bytes", job.nbytes)
        self.tally.add_causes("store_failures", causes)
        with self._lock:
            jobs = self._storing[job.store.request_id]
            jobs.discard(job)
            if not jobs:
                del self._storing[job.store.request_id]
                self._job_done.notify_all()
            self._failures.update({f"store.{cause}": count for cause, count in causes.items()})
            if job.store.number:
                self._over[job.store.number] = 1
            if not _MAY_BE_STORED_LATER.isdisjoint(causes):
                self._unstored.add(job.store.request_id)
