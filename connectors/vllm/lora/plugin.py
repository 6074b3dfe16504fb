"""What vLLM loads in every process (entry point vllm.general_plugins): puts paged LoRA where an engine asks for it.

It is given no configuration, and it patches every vLLM of the environment: so each patch looks at the engine it is
called for, and does what vLLM did before unless that engine's connector is ours and sets lora_pool. Light to import.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from loracache.connectors.vllm.lora.reload import forget_orders, tell_of_reloads

__all__ = ["register"]

_registered = False


def register() -> None:
    """Patch vLLM, once, and each module only when vLLM itself imports it: importing them here would load the front end
    into every worker, before that has bound its threads to its cores.
    """
    global _registered
    if _registered:
        return
    _registered = True
    patches = {
        "vllm.v1.worker.lora_model_runner_mixin": _patch_worker,
        "vllm.v1.core.sched.scheduler": _patch_scheduler,
        "vllm.v1.engine.core": tell_of_reloads,
        "vllm.entrypoints.openai.models.serving": _patch_front_end,
    }
    for name in [name for name in patches if name in sys.modules]:
        patches.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _Patcher(patches))


class _Patcher(importlib.abc.MetaPathFinder):
    """Runs a patch on a module when it has been imported."""

    def __init__(self, patches: dict[str, Callable[[Any], None]]) -> None:
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the others find, whose loader patches."""
        patch = self._patches.pop(fullname, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(fullname)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                patch(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch_worker(mixin: Any) -> None:
    stock = mixin.LRUCacheWorkerLoRAManager

    def make(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from loracache.connectors.vllm.options import pool_bytes

        if not pool_bytes(vllm_config):
            return stock(vllm_config, *args, **kwargs)
        from loracache.connectors.vllm.lora.manager import PagedWorkerLoRAManager

        return PagedWorkerLoRAManager(vllm_config, *args, **kwargs)

    mixin.LRUCacheWorkerLoRAManager = make


def _patch_scheduler(module: Any) -> None:
    """Give our connector the one way to end a request that can never run: the set of those vLLM ends with an error."""
    stock = module.Scheduler.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        failed = getattr(self, "grammar_compile_error_reqs", None)
        for connector in [self.connector, *getattr(self.connector, "_connectors", ())]:
            if failed is not None and hasattr(connector, "fail_requests_through"):
                connector.fail_requests_through(failed.add)

    module.Scheduler.__init__ = init


def _patch_front_end(module: Any) -> None:
    """Names of adapters that only the cache knows."""
    stock = module.OpenAIServingModels.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from loracache.connectors.vllm.options import is_ours, pool_bytes

        stock(self, *args, **kwargs)
        config = getattr(self.engine_client, "vllm_config", None)
        if is_ours(config):
            forget_orders(self)
        if pool_bytes(config):
            from loracache.connectors.vllm.lora.resolver import resolve_names_through_the_cache

            resolve_names_through_the_cache(self)

    module.OpenAIServingModels.__init__ = init
