"""What vLLM loads in every process (entry point vllm.general_plugins): puts paged LoRA where an engine asks for it.

It is given no configuration, and it patches every vLLM of the environment: so each patch looks at the engine it is
called for, and does what vLLM did before unless that engine's connector is ours and sets lora_pool. Light to import.
"""

from __future__ import annotations

from typing import Any

__all__ = ["register"]

_registered = False


def register() -> None:
    """Patch vLLM, once."""
    global _registered
    if _registered:
        return
    _registered = True
    _patch_worker()
    _patch_scheduler()
    _patch_front_end()


def _patch_worker() -> None:
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    stock = mixin.LRUCacheWorkerLoRAManager

    def make(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from loracache.connectors.vllm.options import pool_bytes

        if not pool_bytes(vllm_config):
            return stock(vllm_config, *args, **kwargs)
        from loracache.connectors.vllm.lora.manager import PagedWorkerLoRAManager

        return PagedWorkerLoRAManager(vllm_config, *args, **kwargs)

    mixin.LRUCacheWorkerLoRAManager = make


def _patch_scheduler() -> None:
    """Give our connector the one way to end a request that can never run: the set of those vLLM ends with an error."""
    from vllm.v1.core.sched.scheduler import Scheduler

    stock = Scheduler.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        failed = getattr(self, "grammar_compile_error_reqs", None)
        for connector in [self.connector, *getattr(self.connector, "_connectors", ())]:
            if failed is not None and hasattr(connector, "fail_requests_through"):
                connector.fail_requests_through(failed.add)

    Scheduler.__init__ = init


def _patch_front_end() -> None:
    """Names of adapters that only the cache knows."""
    try:
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    except ImportError:  # a front end without HTTP
        return
    stock = OpenAIServingModels.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from loracache.connectors.vllm.options import pool_bytes

        stock(self, *args, **kwargs)
        if pool_bytes(getattr(self.engine_client, "vllm_config", None)):
            from loracache.connectors.vllm.lora.resolver import resolve_names_through_the_cache

            resolve_names_through_the_cache(self)

    OpenAIServingModels.__init__ = init
