# SPDX-License-Identifier: Apache-2.0
"""An engine whose model is ExactModel: vLLM's own KV cache groups, allocation, managers and scheduler, and both sides
of the connector. Its workers may be ranks of tensor parallelism and stages of a pipeline, with a part of the model
each; drafts of speculative decoding may come, of which some are right.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.keys import object_key
from tests.unit.connector.hybrid.exact_model import ExactModel, Run


@dataclass
class Step:
    """One that was planned: what of each request it computes, and what of it the workers answered."""

    output: Any
    runs: list[Run]
    results: list[Any] = field(default_factory=list)


class FakeWorker:
    """One worker: a rank of its stage. Like vLLM's second model runner it takes on a step, and writes to blocks for
    that, before it calls the connector. shares: layers that share the KV of another."""

    def __init__(
        self,
        vllm_config: Any,
        config: Any,
        place: Any,
        shares: Mapping[str, str],
        patched: pytest.MonkeyPatch,
    ) -> None:
        import torch
        from vllm.distributed import parallel_state
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.worker.gpu import kv_connector as runner
        from vllm.v1.worker.utils import add_kv_sharing_layers_to_kv_cache_groups, allocate_kv_cache

        from loracache.connectors.vllm import LoRACacheConnector
        from loracache.connectors.vllm.worker.runner_hook import hook_runner_class

        hook_runner_class(type(self))
        vllm_config = copy.deepcopy(vllm_config)
        vllm_config.parallel_config.rank = place.number
        patched.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(rank_in_group=place.rank))
        patched.setattr(parallel_state, "get_pp_group", lambda: SimpleNamespace(rank_in_group=place.stage))
        self.connector = LoRACacheConnector(vllm_config, KVConnectorRole.WORKER, config)
        side: Any = self.connector._worker
        self.side = side
        stands_in = SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Linear(2, 2)))
        side.weights.bind(stands_in)  # else every reset is taken for new weights
        patched.setattr(runner, "get_kv_transfer_group", lambda: self.connector)
        tensors = allocate_kv_cache(config, "cpu", vllm_config.cache_config.get_resolved_kv_cache_layout())
        self.model = ExactModel(config, tensors, place.rank, place.ranks, place.heads)
        if shares:  # as a model runner does it, on groups of its own, once the connector has seen those without
            add_kv_sharing_layers_to_kv_cache_groups(shares, copy.deepcopy(config).kv_cache_groups)
            tensors |= {name: tensors[owner] for name, owner in shares.items()}
        self.kv_connector = runner.ActiveKVConnector(vllm_config, tensors)

    def update_requests(self, output: Any) -> None:
        """Take on a step."""
        self.model.take(output)

    def take(self, step: Step) -> Any:
        """What a worker does in a step."""
        from vllm.v1.outputs import ModelRunnerOutput

        self.update_requests(step.output)
        if not step.runs:
            return copy.copy(self.kv_connector.no_forward(step.output))  # vLLM's own may be one for all workers
        self.kv_connector.pre_forward(step.output)
        sampled = [self.model.compute(run) for run in step.runs]
        self.kv_connector.finish_forward()
        names = [run.request.request_id for run in step.runs]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=self.kv_connector.post_forward(step.output.finished_req_ids),
        )


def _configs(vllm_config: Any, stages: Sequence[dict[str, Any]]) -> tuple[list[Any], int, int]:
    """The KVCacheConfig of each stage's workers, tokens of a block of the scheduler's and of a hash."""
    from vllm.v1.core import kv_cache_utils as utils

    groups = utils.get_kv_cache_groups(vllm_config, {name: spec for own in stages for name, spec in own.items()})
    configs = [
        utils.get_kv_cache_config_from_groups(
            vllm_config, utils._project_kv_cache_groups_to_worker(groups, own), 1 << 40
        )
        for own in stages
    ]
    vllm_config.cache_config.num_gpu_blocks = configs[0].num_blocks
    block, unit = utils.resolve_kv_cache_block_sizes(configs[0], vllm_config)
    for config in configs:
        config.hash_block_size = unit
        config.cache_hit_alignment_tokens = utils.resolve_cache_hit_alignment_tokens(config, vllm_config, block, unit)
    return configs, block, unit


class FakeEngine:
    """One engine, step by step. Its blocks are few, so that requests preempt each other. stages: the layers of each
    stage of a pipeline, each of which computes a step when the one before it is at the next. heads: of all ranks.
    ahead: a step is planned before the tokens of the one before it are known, on one stage."""

    def __init__(
        self,
        vllm_config: Any,
        stages: Sequence[dict[str, Any]],
        patched: pytest.MonkeyPatch,
        shares: Mapping[str, str] | None = None,
        heads: Mapping[str, int] | None = None,
        *,
        ahead: bool = False,
    ) -> None:
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_utils as utils
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        ranks = vllm_config.parallel_config.tensor_parallel_size
        configs, block, unit = _configs(vllm_config, stages)
        scheduling = utils.generate_scheduler_kv_cache_config(configs)
        scheduling.hash_block_size = unit
        hash_function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
        utils.init_none_hash(hash_function)
        self._hasher = utils.get_request_block_hasher(unit, hash_function)
        grammars: Any = SimpleNamespace(
            accept_tokens=lambda request, tokens: True, validate_tokens=lambda request, tokens: tokens
        )
        self.scheduler = (AsyncScheduler if ahead else Scheduler)(vllm_config, scheduling, grammars, block, unit)
        self.stages = [
            [
                FakeWorker(
                    vllm_config,
                    config,
                    SimpleNamespace(
                        number=stage * ranks + rank, stage=stage, rank=rank, ranks=ranks, heads=heads or {}
                    ),
                    {name: owner for name, owner in (shares or {}).items() if owner in stages[stage]},
                    patched,
                )
                for rank in range(ranks)
            ]
            for stage, config in enumerate(configs)
        ]
        self.workers = [worker for stage in self.stages for worker in stage]
        self._aggregator = KVOutputAggregator(len(self.workers))
        self._flying: deque[Step] = deque()
        self._ahead = ahead
        self._drafts = random.Random("drafts") if vllm_config.speculative_config is not None else None
        self._draft_tokens = vllm_config.num_speculative_tokens
        self.accepted = 0
        self.failures: Counter[str] = Counter()  # as the workers tell them
        self.groups = configs[0].kv_cache_groups
        self.external: dict[str, int] = {}
        self._states: dict[tuple[int, ...], Any] = {}
        self._names = 0
        self._identity = self.scheduler.connector._identity

    # -- requests ----------

    def ask(self, tokens: Sequence[int], answer: int = 1, media: Sequence[Any] = ()) -> Any:
        """A request, not computed yet."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._names += 1
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        params.update_from_generation_config({}, None)
        request = Request(
            f"r{self._names}", list(tokens), params, None, block_hasher=self._hasher, mm_features=list(media) or None
        )
        self.scheduler.add_request(request)
        state = self.connector._requests.get(request.request_id)
        if state is not None and state.media is not None:
            state.media.result(10)  # on a busy machine it would be computed without
        return request

    @property
    def shards(self) -> list[list[str]]:
        """The shards of each of the connector's groups."""
        return [list(part.shards) for part in self.connector._chunks.parts]

    def chunk_keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Of a prompt that was asked."""
        return list(self._states[tuple(tokens)].chunk_keys)

    def object_keys(self, tokens: Sequence[int], group: int) -> list[bytes]:
        """Of its chunks, of the first shard of one of the connector's groups."""
        return [object_key(key, self.shards[group][0]) for key in self.chunk_keys(tokens)]

    def see(self) -> None:
        """Have room for what an encoder makes of images, as the engine of a model that sees."""
        from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

        self.scheduler.max_num_encoder_input_tokens = 1024
        self.scheduler.encoder_cache_manager = EncoderCacheManager(1024)

    def abort(self, request: Any) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """One of the engine's steps: the first stage computes it, those behind it are at earlier ones."""
        output = self.scheduler.schedule()
        for state in self.connector._requests.values():
            self._states[tuple(state.request.prompt_token_ids)] = state
        self._flying.append(Step(output, [self._run(output, each) for each in output.num_scheduled_tokens]))
        for stage, workers in enumerate(self.stages[: len(self._flying)]):
            at = self._flying[-1 - stage]
            at.results += [worker.take(at) for worker in workers]
        if len(self._flying) == len(self.stages) + self._ahead or (self._ahead and not output.num_scheduled_tokens):
            self._end(self._flying.popleft())
        if not output.num_scheduled_tokens:
            time.sleep(0.001)

    def _run(self, output: Any, request_id: str) -> Run:
        request = self.scheduler.requests[request_id]
        drafts = output.scheduled_spec_decode_tokens.get(request_id, ())
        end = request.num_computed_tokens
        start = end - output.num_scheduled_tokens[request_id]
        self.external.setdefault(request_id, start)
        samples = not request.is_prefill_chunk if self._ahead else end - len(drafts) == request.num_tokens
        return Run(request, start, end, tuple(drafts), samples)

    def _end(self, step: Step) -> None:
        result = self._aggregator.aggregate(step.results, len(step.results) - 1)
        told = result.kv_connector_output.kv_connector_worker_meta
        for news in told.news.values() if told is not None else ():
            self.failures.update(news.failures)
        self.scheduler.update_from_output(step.output, result)
        if self._drafts is not None:
            self._propose(step.runs, result.sampled_token_ids, self._drafts)

    def _propose(self, runs: Sequence[Run], sampled: Sequence[Sequence[int]], drafts: random.Random) -> None:
        """Drafts for the next step: some right ones, and then wrong ones."""
        from vllm.v1.outputs import DraftTokenIds

        proposed = []
        for run, tokens in zip(runs, sampled, strict=True):
            self.accepted += max(0, len(tokens) - 1)
            right = self.workers[0].model.continued(run.request, drafts.randrange(self._draft_tokens + 1))
            proposed.append(
                (right + [drafts.randrange(30000, 32000) for _ in range(self._draft_tokens)])[: self._draft_tokens]
            )
        self.scheduler.update_draft_token_ids(DraftTokenIds([run.request.request_id for run in runs], proposed))

    def run(self, seconds: float = 20) -> None:
        """Steps until all requests are over, and their stores."""
        deadline = time.monotonic() + seconds
        while self.scheduler.has_requests() or any(step.runs for step in self._flying):
            assert time.monotonic() < deadline, f"still there: {self.scheduler.requests}"
            self.step()

    def answer(self, tokens: Sequence[int], answer: int = 1, media: Sequence[Any] = ()) -> int:
        """Run one request; answers how many tokens it had when it began to compute."""
        request = self.ask(tokens, answer, media)
        self.run()
        assert request.num_output_tokens == answer
        return self.external[request.request_id]

    def ready(self) -> FakeEngine:
        """Once the scheduler's side knows its model and its workers."""
        deadline = time.monotonic() + 10
        while not (self._identity is None or self._identity.value()) or not self.connector.on:
            assert time.monotonic() < deadline, "the connector is off"
            self.step()
        return self

    @property
    def connector(self) -> Any:
        """The scheduler's side of the connector."""
        return self.scheduler.connector._scheduler

    def reset(self) -> None:
        """Empty vLLM's own prefix cache, and preempt all that runs where vLLM can do so: neither beside a load, nor
        where it holds back the blocks of a step that is under way."""
        scheduler = self.scheduler
        loading = any("REMOTE" in each.status.name for each in scheduler.requests.values())
        held_back = scheduler.defer_block_free and scheduler.processed_step_seq < scheduler.sched_step_seq
        scheduler.reset_prefix_cache(reset_running_requests=not (loading or held_back))

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        self.scheduler.connector.shutdown()
        for worker in self.workers:
            worker.connector.shutdown()


def damage(client: Any, what: str, source: random.Random) -> None:
    """Evict some of the objects in memory, or break them."""
    keys = sorted(bytes.fromhex(each["key"]) for each in client.objects(tier="cpu"))
    chosen = [key for key in keys if source.random() < 0.2]
    if what == "evict":
        client.evict(chosen)
        return
    with client.acquire(chosen[:3]) as reading:
        for slot in reading.slots:
            if slot is not None:
                slot.buffers[0][1] ^= 1
