# SPDX-License-Identifier: Apache-2.0
"""Why an adapter is not served stands in the answer: of the load endpoint, and of requests that name it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import RetryableRequestError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason, output_processor
from vllm.v1.engine.async_llm import InputStreamError

from loracache.adapters.peft import WEIGHTS
from loracache.connectors.vllm.frontend.refusals import answer_refusals, check_what_is_added, raise_refusals
from loracache.connectors.vllm.lora.refusals import Refusal

NEVER, NOT_NOW = Refusal("rank 512 of 'q_proj' is over it", forever=True), Refusal("no tier has it", forever=False)


@pytest.mark.parametrize("refusal", [NEVER, NOT_NOW])
@pytest.mark.parametrize("around", ["{}", "Call to add_lora method failed: {}", "Worker failed with error '{}', please check the stack trace above for the root cause"])  # fmt: skip  # noqa: E501
def test_a_refusal_is_found_in_what_vllm_makes_of_it(refusal: Refusal, around: str) -> None:
    assert Refusal.found_in(around.format(refusal)) == refusal


@pytest.mark.parametrize("text", [None, 7, "", "out of memory", "the LoRA adapter"])
def test_nothing_else_is_a_refusal(text: object) -> None:
    assert Refusal.found_in(text) is None


class Models:
    """The part of vLLM's OpenAIServingModels that is patched: its answer to whatever `add_lora` raises."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        if self.error is None:
            return "loaded"
        return create_error_response(str(self.error), "InternalServerError", __import__("http").HTTPStatus(500))


def test_what_can_never_work_is_answered_with_400_and_the_reason() -> None:
    async def load(error: Exception | None) -> Any:
        models = Models(error)
        answer_refusals(models)
        return await models.load_lora_adapter(SimpleNamespace(lora_name="a"), base_model_name="base")

    refused = asyncio.run(load(Exception(f"Call to add_lora method failed: {NEVER}"))).error
    assert (refused.code, refused.type, refused.message) == (400, "BadRequestError", str(NEVER))
    broken = asyncio.run(load(Exception("out of memory"))).error
    assert (broken.code, broken.message) == (500, "out of memory")
    assert asyncio.run(load(None)) == "loaded"


class AsyncLLM:
    """The part of vLLM's that is patched."""

    def __init__(self) -> None:
        self.vllm_config = "pool"
        self.added: list[str] = []

    async def add_lora(self, lora_request: Any) -> bool:
        self.added.append(lora_request.lora_path)
        return True


def added(path: str, wants_pool: Callable[[Any], bool] = lambda config: bool(config == "pool")) -> list[str]:
    module = SimpleNamespace(AsyncLLM=type("AsyncLLM", (AsyncLLM,), {}))
    check_what_is_added(module, wants_pool)
    engine = module.AsyncLLM()
    assert asyncio.run(engine.add_lora(SimpleNamespace(lora_path=path)))
    return list(engine.added)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_adapter_with_an_infinity_is_refused_when_it_is_added(make_adapter: Any, value: float) -> None:
    adapter = make_adapter("spoiled")
    assert added(adapter.path) == [adapter.path]
    weights = load_file(f"{adapter.path}/{WEIGHTS}")
    name = sorted(weights)[3]
    weights[name][1, 2] = value
    save_file(weights, f"{adapter.path}/{WEIGHTS}")
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: tensor '{name}' has an infinity or a NaN") as refused:
        added(adapter.path)
    refusal = Refusal.found_in(str(refused.value))
    assert refusal is not None
    assert refusal.forever
    assert added(adapter.path, lambda config: False) == [adapter.path]  # stock LoRA is vLLM's own matter


@pytest.mark.parametrize("path", ["a/name-on-a-hub", "loracache:" + 64 * "a"])
def test_what_is_no_folder_here_is_not_looked_at(path: str) -> None:
    assert added(path) == [path]


# -- requests ----------------------------------------------------------------------------------------------------------


def processor(pooling: bool, queue: Any) -> Any:
    """vLLM's OutputProcessor with one request, patched."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    module = SimpleNamespace(**vars(output_processor))
    module.OutputProcessor = type("OutputProcessor", (OutputProcessor,), {})
    raise_refusals(module)
    made = module.OutputProcessor(None, log_stats=False)
    detokenizer = (
        None
        if pooling
        else SimpleNamespace(
            update=lambda *_: None, num_output_tokens=lambda: 0, output_token_ids=[], get_next_output_text=lambda *_: ""
        )
    )
    logprobs = SimpleNamespace(
        update_from_output=lambda _: None,
        prompt_logprobs=None,
        prompt_token_id_logprobs=None,
        logprobs=None,
        cumulative_logprob=None,
        pop_prompt_logprobs=lambda: None,
        pop_prompt_token_id_logprobs=lambda: None,
    )
    state = RequestState(
        request_id="a", external_req_id="a", parent_req=None, request_index=0, lora_request=None,
        output_kind=RequestOutputKind.DELTA, prompt="", prompt_token_ids=[1], prompt_embeds=None,
        logprobs_processor=None if pooling else logprobs, detokenizer=detokenizer, max_tokens_param=8, arrival_time=0.0,
        queue=queue, log_stats=False, stream_interval=1,
    )  # fmt: skip
    made.request_states["a"] = state
    made.external_req_ids["a"].append("a")
    return made


def outcome(text: str | None, pooling: bool = False, reason: FinishReason = FinishReason.ERROR) -> Any:
    queue = output_processor.RequestOutputCollector(RequestOutputKind.DELTA, "a")
    made = processor(pooling, queue)
    made.process_outputs([EngineCoreOutput("a", [], finish_reason=reason, stop_reason=text)])
    assert "a" not in made.request_states
    return queue.output


@pytest.mark.parametrize("pooling", [False, True])
def test_a_request_that_can_never_run_raises_the_reason_as_the_callers_mistake(pooling: bool) -> None:
    raised = outcome(str(NEVER), pooling)
    assert isinstance(raised, VLLMValidationError)
    assert str(raised) == str(NEVER)
    assert create_error_response(raised).error.code == 400


def test_a_request_that_may_run_later_is_answered_with_503() -> None:
    raised = outcome(str(NOT_NOW))
    assert isinstance(raised, InputStreamError)  # what AsyncLLM hands on as it is
    assert isinstance(raised.cause, RetryableRequestError)
    assert create_error_response(raised.cause).error.code == 503


def test_other_ends_are_vllms_own() -> None:
    for text, reason in ((None, FinishReason.ERROR), (str(NEVER), FinishReason.STOP)):
        ended = outcome(text, reason=reason)
        assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == (str(reason), text)


def test_where_nobody_waits_on_a_queue_the_output_says_why() -> None:
    made = processor(False, None)
    output = EngineCoreOutput("a", [], finish_reason=FinishReason.ERROR, stop_reason=str(NEVER))
    (ended,) = made.process_outputs([output]).request_outputs
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("error", str(NEVER))


def test_the_tensor_that_ends_a_pooling_request_is_empty() -> None:
    assert torch.equal(output_processor.EMPTY_CPU_TENSOR, torch.empty(0))
