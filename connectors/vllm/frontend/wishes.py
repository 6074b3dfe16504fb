# SPDX-License-Identifier: Apache-2.0
"""Requests whose `kv_transfer_params` ask us for what cannot be meant are refused where vLLM checks a request's other
parameters: the OpenAI server answers 400 with the reason, its Python API raises it, and no engine hears of them.

Names that are not ours are left alone: they are another connector's. One that looks like a slip of ours is refused only
where there is no other connector. Threading: whoever adds a request.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from loracache.connectors.vllm.common.options import is_alone, is_ours
from loracache.connectors.vllm.common.wishes import slips, wrong_wishes
from loracache.connectors.vllm.frontend.refusals import callers_mistake

__all__ = ["refuse_wrong_wishes"]


def refuse_wrong_wishes(module: Any) -> None:
    """Patch vLLM's InputProcessor, through which every request comes on its way to an engine."""
    stock = module.InputProcessor.process_inputs

    @functools.wraps(stock)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        problems = _problems(self.vllm_config, getattr(params, "extra_args", None))
        if problems:
            raise callers_mistake("; ".join(problems))
        return stock(self, request_id, prompt, params, *args, **kwargs)

    module.InputProcessor.process_inputs = process_inputs


def _problems(vllm_config: Any, extra_args: Any) -> list[str]:
    asked = extra_args.get("kv_transfer_params") if isinstance(extra_args, Mapping) else None
    try:
        if not asked or not is_ours(vllm_config):
            return []
    except (AttributeError, TypeError):  # a configuration that is not as we know it is somebody else's
        return []
    return wrong_wishes(asked) + (slips(asked) if is_alone(vllm_config) else [])
