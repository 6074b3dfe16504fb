# SPDX-License-Identifier: Apache-2.0
"""`load_inplace` is one order, carried out once, when it is given.

vLLM's front end keeps the order itself beside the adapter's name, and gives it to the engine with every request: stock
vLLM reads the adapter from its folder in every step then, and takes whatever is there by that time. In front of our
connector it forgets the order once it is carried out. The scheduler is told of it where it passes through EngineCore:
its own bindings of the adapter's id end there, before any later request is scheduled.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from loracache.connectors.vllm.common.connectors_of import connectors_of

__all__ = ["forget_orders", "tell_of_reloads"]


def forget_orders(models: Any) -> None:
    """Have an OpenAIServingModels remember adapters without the order that loaded them."""
    stock = models.load_lora_adapter

    async def load(request: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await stock(request, *args, **kwargs)
        known = models.lora_requests.get(request.lora_name)
        if known is not None and known.load_inplace:
            models.lora_requests[request.lora_name] = msgspec.structs.replace(known, load_inplace=False)
        return answer

    models.load_lora_adapter = load


def tell_of_reloads(module: Any) -> None:
    """Patch vLLM's EngineCore: our connector learns of an adapter that was loaded in place."""
    stock = module.EngineCore.add_lora

    @functools.wraps(stock)  # vLLM reads from its signature what to make of a message's arguments
    def add_lora(self: Any, lora_request: Any) -> Any:
        added = stock(self, lora_request)
        for each in connectors_of(getattr(self, "scheduler", None)) if lora_request.load_inplace else ():
            if hasattr(each, "adapter_reloaded"):
                each.adapter_reloaded(lora_request)
        return added

    module.EngineCore.add_lora = add_lora
