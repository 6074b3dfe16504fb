# SPDX-License-Identifier: Apache-2.0
"""Why loads are part of a step only where vLLM schedules synchronously, and why what they bring is kept out of its
prefix cache at first (docs/vllm.md): what its scheduler does with one that turns out wrong. Where one of these fails, a
release has changed that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from loracache.connectors.vllm import LoRACacheConnector

BLOCK = 16
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 32,
    "max_position_embeddings": 4096, "torch_dtype": "float32",
}  # fmt: skip


class LoadsInStep:
    """A connector that has `tokens` for the next request, and loads them in the step that computes it."""

    supports_divergent_local_hybrid_hits = False

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        found, self.tokens = self.tokens, 0
        return found, False

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return False, None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.fixture
def make_scheduler(tmp_path: Path) -> Callable[[type[Scheduler]], Any]:
    def make(kind: type[Scheduler]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        config = EngineArgs(
            model=str(tmp_path),
            dtype="float32",
            max_model_len=512,
            skip_tokenizer_init=True,
            async_scheduling=kind is AsyncScheduler,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = 32
        spec = specs.FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
        groups = [specs.KVCacheGroupSpec(["layer"], spec)]
        cache = specs.KVCacheConfig(num_blocks=32, kv_cache_tensors=[], kv_cache_groups=groups)
        scheduler = kind(config, cache, StructuredOutputManager(config), BLOCK)
        scheduler.connector = LoadsInStep(3 * BLOCK)
        return scheduler

    return make


@pytest.fixture
def request_of(make_request: Any) -> Callable[[str], Any]:
    """A request of four blocks of the same tokens."""
    init_none_hash(sha256)
    return lambda name: make_request(name, 4 * BLOCK, block_hasher=get_request_block_hasher(BLOCK, sha256))


def result(token: int, invalid: Iterable[int] = ()) -> ModelRunnerOutput:
    return ModelRunnerOutput(
        ["a"], {"a": 0}, [[token]], kv_connector_output=KVConnectorOutput(invalid_block_ids=set(invalid))
    )


def tokens_of(outputs: Any) -> list[int]:
    return [token for each in outputs.values() for output in each.outputs for token in output.new_token_ids]


def test_vllm_gives_out_a_token_that_was_computed_from_what_a_step_loaded_wrong(
    make_scheduler: Any, request_of: Any
) -> None:
    """The next step is planned, and computes on, before the first has said that its load failed."""
    scheduler = make_scheduler(AsyncScheduler)
    scheduler.add_request(request_of("a"))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first.num_scheduled_tokens == {"a": BLOCK}
    assert second.num_scheduled_tokens == {"a": 1}
    (blocks,) = first.scheduled_new_reqs[0].block_ids
    assert tokens_of(scheduler.update_from_output(first, result(7, {blocks[1]}))) == []
    assert scheduler.requests["a"].num_computed_tokens == BLOCK
    assert tokens_of(scheduler.update_from_output(second, result(8))) == [8]


def test_vllm_serves_what_a_step_loaded_wrong_to_the_next_request(make_scheduler: Any, request_of: Any) -> None:
    """Where the first ends before it has computed that anew."""
    scheduler = make_scheduler(Scheduler)
    scheduler.add_request(request_of("a"))
    step = scheduler.schedule()
    (blocks,) = step.scheduled_new_reqs[0].block_ids
    scheduler.update_from_output(step, result(7, {blocks[1]}))
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    scheduler.add_request(request_of("b"))
    (new,) = scheduler.schedule().scheduled_new_reqs
    assert new.num_computed_tokens == 3 * BLOCK
    assert blocks[1] in new.block_ids[0]


def test_graphs_may_hold_whole_steps_unless_layers_wait() -> None:
    """Else nothing of ours runs between layers."""
    assert LoRACacheConnector.requires_piecewise_for_cudagraph({}) is False
    assert LoRACacheConnector.requires_piecewise_for_cudagraph({"layer_by_layer": False}) is False
    assert LoRACacheConnector.requires_piecewise_for_cudagraph({"layer_by_layer": True}) is True
