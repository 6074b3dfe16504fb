# SPDX-License-Identifier: Apache-2.0
"""Stores let go of a step's blocks before anything of the step is written.

vLLM's first model runner calls `handle_preemptions` first of all. Its second one (v1/worker/gpu) takes on the step
before that: it zeroes new blocks, copies blocks and moves states on, into blocks that a store may be reading for the
request that had them. So ours are called before it does; the call that follows is the same step's and does nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["hook_runner_class"]

_MODULE = "vllm.v1.worker.gpu.model_runner"
_MARK = "_loracache_lets_go_first"


def hook_runner_class(cls: Any = None) -> None:
    """Have our connectors let go first. cls: the runner's class; else vLLM's second one, where this process has it."""
    cls = cls or getattr(sys.modules.get(_MODULE), "GPUModelRunner", None)
    original = getattr(cls, "update_requests", None)
    if original is None or _MARK in vars(cls):
        return

    @functools.wraps(original)
    def update_requests(runner: Any, scheduler_output: Any) -> Any:
        connector = getattr(getattr(runner, "kv_connector", None), "kv_connector", None)
        for one, plan in _parts(connector, getattr(scheduler_output, "kv_connector_metadata", None)):
            if getattr(one, "lets_go_first", False):
                one.handle_preemptions(plan)
        return original(runner, scheduler_output)

    setattr(cls, "update_requests", update_requests)  # noqa: B010
    setattr(cls, _MARK, True)


def _parts(connector: Any, metadata: Any) -> Iterator[tuple[Any, Any]]:
    """A connector and its plan; those inside it where it is a MultiConnector."""
    inner = getattr(connector, "_connectors", None)
    if inner is None:
        yield connector, metadata
    else:
        yield from zip(inner, getattr(metadata, "metadata", ()), strict=False)
