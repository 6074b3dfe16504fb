# SPDX-License-Identifier: Apache-2.0
"""Reasons why adapters are not served, in the answers of the front end: 400 for what can never work, 503 for what may
work later. vLLM's own answer is 500, and up to 0.32 without a word.

A folder's numbers are looked at here, where an adapter is added: it takes as long as reading them, and neither the
engine's step nor other requests wait for it. Threading: the front end's event loop; folders are read on its threads.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from loracache.adapters.peft import PeftFolder
from loracache.connectors.vllm.lora.pickled import plain_folder
from loracache.connectors.vllm.lora.refusals import Refusal
from loracache.errors import UsageError

__all__ = ["answer_refusals", "callers_mistake", "check_what_is_added", "raise_refusals"]


def check_what_is_added(module: Any, wants_pool: Callable[[Any], bool]) -> None:
    """Patch vLLM's AsyncLLM: a folder with an infinity or the like in it is refused when it is added."""
    stock = module.AsyncLLM.add_lora

    async def add_lora(self: Any, lora_request: Any) -> Any:
        if wants_pool(self.vllm_config) and os.path.isdir(lora_request.lora_path):
            await asyncio.to_thread(_check, lora_request.lora_path)
        return await stock(self, lora_request)

    module.AsyncLLM.add_lora = add_lora


def _check(path: str) -> None:
    try:
        with PeftFolder(plain_folder(path)) as folder:
            folder.check()
            folder.check_numbers()
    except UsageError as error:
        raise UsageError(str(Refusal(str(error), forever=True))) from None


def answer_refusals(models: Any) -> None:
    """Have an OpenAIServingModels answer 400 with the reason where an adapter that is loaded can never work."""
    stock = models.load_lora_adapter

    async def load(*args: Any, **kwargs: Any) -> Any:
        answer = await stock(*args, **kwargs)
        error = getattr(answer, "error", None)
        refusal = Refusal.found_in(getattr(error, "message", None))
        if error is not None and refusal is not None:
            error.code, error.type, error.message = HTTPStatus.BAD_REQUEST.value, "BadRequestError", str(refusal)
        return answer

    models.load_lora_adapter = load


def raise_refusals(module: Any) -> None:
    """Patch vLLM's OutputProcessor, up to 0.32: a request that the scheduler ended with a refusal (plugin.py) raises
    it. Where nobody waits on a queue, as for vLLM's LLM, the reason is the output's `stop_reason`.
    """
    stock = module.OutputProcessor.process_outputs

    def process_outputs(self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            refusal = Refusal.found_in(output.stop_reason)
            state = self.request_states.get(output.request_id) if refusal is not None else None
            if refusal is None or state is None or output.finish_reason != module.FinishReason.ERROR:
                continue
            raised = _raised(refusal)
            if state.queue is not None and raised is not None:  # what vLLM puts there next does not replace it
                state.queue.put(raised)
            if state.detokenizer is None:  # of a pooling request: without an output vLLM's loop ends
                import torch

                output.pooling_output = torch.empty(0)
        return stock(self, engine_core_outputs, *args, **kwargs)

    module.OutputProcessor.process_outputs = process_outputs


def callers_mistake(text: str) -> Exception:
    """What vLLM hands on as it is, and answers with 400."""
    from vllm import exceptions

    return getattr(exceptions, "VLLMValidationError", ValueError)(text)


def _raised(refusal: Refusal) -> Any:
    """What vLLM hands on as it is, and answers with 400 or 503; None where this release has none."""
    from vllm import exceptions

    if refusal.forever:
        return callers_mistake(str(refusal))
    try:
        from vllm.v1.engine.async_llm import InputStreamError

        return InputStreamError(exceptions.RetryableRequestError(str(refusal)))
    except (ImportError, AttributeError):
        return None
