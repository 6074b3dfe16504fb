# SPDX-License-Identifier: Apache-2.0
"""Engines without a model, for models that no CPU runs: `make_engine(kind, url)`.

vLLM's own KV cache groups, allocation, managers and scheduler, both sides of the connector, and a real daemon. In the
model's place stands one that writes, as the KV of a token, a hash of all tokens before it, and that reads what its kind
of layer reads: a step fails where one byte of that is not what was computed for exactly these tokens (ExactModel).
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.keys import object_key
from tests.unit.connector.hybrid.exact_model import BLOCK, ExactModel, kinds


class FakeEngine:
    """One engine, step by step. Its blocks are few, so that requests preempt each other."""

    def __init__(self, vllm_config: Any, specs: dict[str, Any], patched: pytest.MonkeyPatch) -> None:
        import torch
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.core import kv_cache_utils as utils
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.worker.gpu import kv_connector as runner
        from vllm.v1.worker.utils import allocate_kv_cache

        from loracache.connectors.vllm import LoRACacheConnector

        cache = vllm_config.cache_config
        groups = utils.get_kv_cache_groups(vllm_config, dict(specs))
        config = utils.get_kv_cache_config_from_groups(vllm_config, groups, 1 << 40)
        cache.num_gpu_blocks = config.num_blocks
        block, unit = utils.resolve_kv_cache_block_sizes(config, vllm_config)
        config.hash_block_size = unit
        config.cache_hit_alignment_tokens = utils.resolve_cache_hit_alignment_tokens(config, vllm_config, block, unit)
        scheduling = utils.generate_scheduler_kv_cache_config([config])
        scheduling.hash_block_size = unit
        from vllm.utils.hashing import get_hash_fn_by_name

        hash_function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        utils.init_none_hash(hash_function)
        self._hasher = utils.get_request_block_hasher(unit, hash_function)
        grammars: Any = SimpleNamespace(accept_tokens=lambda request, tokens: True)
        self.scheduler = Scheduler(vllm_config, scheduling, grammars, block, unit)
        self.worker = LoRACacheConnector(vllm_config, KVConnectorRole.WORKER, config)
        stands_in = SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Linear(2, 2)))
        side: Any = self.worker._worker
        side.weights.bind(stands_in)  # else every reset is taken for new weights
        patched.setattr(runner, "get_kv_transfer_group", lambda: self.worker)
        tensors = allocate_kv_cache(config, "cpu", cache.get_resolved_kv_cache_layout())
        self._runner = runner.ActiveKVConnector(vllm_config, tensors)
        self.model = ExactModel(config, tensors)
        self.groups = config.kv_cache_groups
        self.external: dict[str, int] = {}
        facts: Any = side.facts
        self.shards = [group.shard for group in facts.groups]
        self._states: dict[tuple[int, ...], Any] = {}
        self._names = 0
        self._identity = self.scheduler.connector._identity

    # -- requests ----------

    def ask(self, tokens: Sequence[int], answer: int = 1) -> Any:
        """A request, not computed yet."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._names += 1
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        params.update_from_generation_config({}, None)
        request = Request(f"r{self._names}", list(tokens), params, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        return request

    def object_keys(self, tokens: Sequence[int], group: int) -> list[bytes]:
        """Of one of the connector's groups, of the chunks of a prompt that was asked."""
        return [object_key(key, self.shards[group]) for key in self._states[tuple(tokens)].chunk_keys]

    def abort(self, request: Any) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """One of the engine's steps."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        for state in self.connector._requests.values():
            self._states[tuple(state.request.prompt_token_ids)] = state
        self.model.take(output)
        scheduled = output.num_scheduled_tokens
        if not scheduled:
            result = self._runner.no_forward(output)
            self.scheduler.update_from_output(output, result)
            time.sleep(0.001)
            return
        starts = {
            request_id: self.scheduler.requests[request_id].num_computed_tokens - count
            for request_id, count in scheduled.items()
        }
        self._runner.pre_forward(output)
        sampled: list[list[int]] = []
        for request_id, count in scheduled.items():
            request = self.scheduler.requests[request_id]
            self.external.setdefault(request_id, starts[request_id])
            end = starts[request_id] + count
            following = self.model.compute(request, starts[request_id], end)
            sampled.append([following] if end == request.num_tokens else [])
        self._runner.finish_forward()
        result = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={request_id: index for index, request_id in enumerate(scheduled)},
            sampled_token_ids=sampled,
            kv_connector_output=self._runner.post_forward(output.finished_req_ids),
        )
        self.scheduler.update_from_output(output, result)

    def run(self, seconds: float = 20) -> None:
        """Steps until all requests are over, and their stores."""
        deadline = time.monotonic() + seconds
        while self.scheduler.has_requests():
            assert time.monotonic() < deadline, f"still there: {self.scheduler.requests}"
            self.step()

    def answer(self, tokens: Sequence[int], answer: int = 1) -> int:
        """Run one request; answers how many tokens it had when it began to compute."""
        request = self.ask(tokens, answer)
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

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        self.scheduler.connector.shutdown()
        self.worker.shutdown()


@pytest.fixture(scope="session")
def kind_names() -> list[str]:
    return list(kinds())


@pytest.fixture(scope="session")
def plain_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's configuration of an engine; nothing of its model is computed with. The environment is afterwards
    as it was: vLLM sets variables that a daemon of a later test would inherit."""
    folder = tmp_path_factory.mktemp("plain")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    before = dict(os.environ)
    try:
        return _engine_config(folder)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _engine_config(folder: Path) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
        disable_hybrid_kv_cache_manager=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="LoRACacheConnector",
            kv_connector_module_path="loracache.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
    ).create_engine_config()


@pytest.fixture
def make_engine(plain_config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeEngine]]:
    """make_engine("full, window", url, blocks=400, step_tokens=64) starts one that is ready. More arguments are options
    of the connector."""
    from vllm.distributed import parallel_state

    alone = SimpleNamespace(rank_in_group=0, world_size=1)
    for name in ("get_tp_group", "get_pp_group"):
        monkeypatch.setattr(parallel_state, name, lambda: alone)
    made: list[FakeEngine] = []

    def make(
        kind: str, url: str, *, blocks: int = 400, step_tokens: int = 64, caching: bool = True, **extra: Any
    ) -> FakeEngine:
        specs = kinds()[kind]
        config = copy.deepcopy(plain_config)
        own = {"server": url, "model_id": kind, "chunk_tokens": 2 * BLOCK, "lookup_wait": 1.0, "recompute_if_faster": 0}
        config.kv_transfer_config.kv_connector_extra_config = own | extra
        config.scheduler_config.max_num_batched_tokens = step_tokens
        cache = config.cache_config
        cache.block_size = max(spec.block_size for spec in specs.values())
        cache.num_gpu_blocks_override = blocks
        cache.enable_prefix_caching = caching
        cache.kv_cache_layout = "LBHNC"
        cache.mamba_cache_mode = "align"
        made.append(FakeEngine(config, specs, monkeypatch))
        return made[-1].ready()

    yield make
    for engine in made:
        engine.close()
