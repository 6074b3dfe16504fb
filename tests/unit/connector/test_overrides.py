# SPDX-License-Identifier: Apache-2.0
"""What we put in the place of vLLM's own can be called as vLLM calls it, in the release that is installed."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from loracache.connectors.vllm.connector import LoRACacheConnector
from loracache.connectors.vllm.worker.lora.manager import PagedLoRAModelManager, PagedWorkerLoRAManager
from loracache.connectors.vllm.worker.lora.punica import PagedPunicaWrapper

OURS: list[tuple[Any, Any]] = [
    (LoRACacheConnector, KVConnectorBase_V1),
    (LoRACacheConnector, SupportsHMA),
    (PagedLoRAModelManager, LRUCacheLoRAModelManager),
    (PagedWorkerLoRAManager, LRUCacheWorkerLoRAManager),
    (PagedPunicaWrapper, PunicaWrapperBase),
]
PAIRS = [
    pytest.param(own, base, name, id=f"{own.__name__}.{name}")
    for own, base in OURS
    for name, value in vars(own).items()
    if name != "__init__" and inspect.isfunction(value) and inspect.isfunction(getattr(base, name, None))
]
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def test_something_is_compared() -> None:
    assert len(PAIRS) > 30
    assert not any(own.__abstractmethods__ for own, _ in OURS if inspect.isabstract(own))


@pytest.mark.parametrize(("own", "base", "name"), PAIRS)
def test_what_vllm_passes_is_taken(own: type, base: type, name: str) -> None:
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (own, base))
    kinds = {each.kind for each in ours.values()}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    for place, (parameter, known) in enumerate(theirs.items()):
        if known.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL) or place == 0:
            continue
        assert parameter in ours or takes_any, f"{parameter} is passed by name"
        if known.kind in POSITIONAL and inspect.Parameter.VAR_POSITIONAL not in kinds:
            at = list(ours)[place : place + 1]
            assert at, f"{parameter} is passed by place"
            assert (
                ours[at[0]].kind is not inspect.Parameter.KEYWORD_ONLY or known.default is not inspect.Parameter.empty
            )
    wanted = [each for each in ours.values() if each.default is inspect.Parameter.empty and each.kind in POSITIONAL]
    assert len(wanted) <= len(theirs), f"nobody passes {wanted[-1]}"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("vllm.v1.worker.lora_model_runner_mixin", ["LRUCacheWorkerLoRAManager("]),
        (
            "vllm.v1.core.sched.scheduler",
            ["class Scheduler(", "self.grammar_compile_error_reqs", "self.connector", "def update_from_output("],
        ),
        ("vllm.v1.engine.async_llm", ["class AsyncLLM(", "async def add_lora(self, lora_request", "self.vllm_config"]),
        (
            "vllm.v1.engine.input_processor",
            ["class InputProcessor", "def process_inputs(", "request_id: str,", "params: SamplingParams",
             "self.vllm_config"],
        ),
        (
            "vllm.v1.engine.output_processor",
            ["class OutputProcessor", "def process_outputs(", "self.request_states", "FinishReason", ".queue.put("],
        ),
        (
            "vllm.entrypoints.openai.models.serving",
            ["class OpenAIServingModels", "def resolve_lora(", "self.lora_resolver_lock", "self.lora_requests",
             "self.lora_id_counter", "self.engine_client"],
        ),
        (
            "vllm.lora.model_manager",
            ["get_punica_wrapper(", "self.packed_modules", "self.lora_index_to_id", "self._is_moe"],
        ),
    ],
)  # fmt: skip
def test_what_we_patch_is_there(module: str, names: list[str]) -> None:
    """By reading: importing all of it takes long."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    assert [name for name in names if name not in source] == []
