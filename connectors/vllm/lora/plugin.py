"""What vLLM loads in every process (entry point vllm.general_plugins): puts paged LoRA where an engine asks for it.

It is given no configuration, and it patches every vLLM of the environment: so each patch looks at the engine it is
called for, and does what vLLM did before unless that engine's connector is ours and sets lora_pool. A release that we
do not know is left alone, and a patch that does not fit leaves vLLM as it was: an engine that sets lora_pool is then
refused (`problem`), every other one runs. Light to import.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from loracache.connectors.vllm.connectors_of import connectors_of
from loracache.connectors.vllm.lora.reload import forget_orders, tell_of_reloads
from loracache.connectors.vllm.releases import unknown_release, vllm_version
from loracache.errors import ConfigError

__all__ = ["problem", "register"]

_log = logging.getLogger(__name__)
_registered = False
_problems: list[str] = []


def register() -> None:
    """Patch vLLM, once, and each module only when vLLM itself imports it: importing them here would load the front end
    into every worker, before that has bound its threads to its cores. Never raises.
    """
    global _registered
    if _registered:
        return
    _registered = True
    unknown = unknown_release()
    if unknown:
        _problems.append(unknown)
        if multiprocessing.parent_process() is None:  # an engine has many processes, and one of them says it
            _log.warning("%s: its plugin stays out of the way, and lora_pool cannot be set", unknown)
        return
    patches = {
        "vllm.v1.worker.lora_model_runner_mixin": _patch_worker,
        "vllm.v1.core.sched.scheduler": _patch_scheduler,
        "vllm.v1.engine.core": tell_of_reloads,
        "vllm.entrypoints.openai.models.serving": _patch_front_end,
    }
    for name in [name for name in patches if name in sys.modules]:
        _apply(patches.pop(name), sys.modules[name])
    sys.meta_path.insert(0, _Patcher(patches))


def problem() -> str:
    """Why lora_pool cannot be served by the vLLM of this process, or ""."""
    if not _registered:
        return (
            "vLLM did not load the plugin 'loracache'; install loracache into vLLM's environment, and name it in "
            "VLLM_PLUGINS where that is set"
        )
    return "; ".join(_problems)


def _apply(patch: Callable[[Any], None], module: Any) -> None:
    """Patch a module, or leave it as it is."""
    try:
        patch(module)
    except Exception as error:  # noqa: BLE001 - vLLM is importing: whatever is wrong with us, it must start
        _failed(f"{module.__name__} is not what we know", error)


def _failed(what: str, error: Exception) -> None:
    _problems.append(f"with vLLM {vllm_version()}, {what} ({error!r})")
    _log.warning("%s: vLLM's own LoRA is left as it is", _problems[-1])


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
                _apply(patch, module)

            try:
                loader.exec_module = exec_module  # type: ignore[method-assign]
            except AttributeError as error:
                _failed(f"{fullname} is imported in a way of its own", error)
        return spec


def _wants_pool(vllm_config: Any) -> bool:
    """Whether the engine of this configuration has our connector and sets lora_pool. Raises ConfigError where it sets
    it wrongly; a configuration that is not as we know it is somebody else's."""
    try:
        from loracache.connectors.vllm.options import pool_bytes

        return bool(pool_bytes(vllm_config))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - the engine may not be ours at all
        _failed("the engine's configuration is not what we know", error)
        return False


def _does_not_fit(error: Exception) -> ConfigError:
    return ConfigError(
        f"kv_connector_extra_config: lora_pool is set, but does not fit vLLM {vllm_version()} ({error!r}); leave "
        f"lora_pool out"
    )


def _patch_worker(mixin: Any) -> None:
    stock = mixin.LRUCacheWorkerLoRAManager

    def make(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _wants_pool(vllm_config):
            return stock(vllm_config, *args, **kwargs)
        try:
            from loracache.connectors.vllm.lora.manager import PagedWorkerLoRAManager
        except (ImportError, AttributeError) as error:
            raise _does_not_fit(error) from error
        return PagedWorkerLoRAManager(vllm_config, *args, **kwargs)

    mixin.LRUCacheWorkerLoRAManager = make


def _patch_scheduler(module: Any) -> None:
    """Give our connector the one way to end a request that can never run: among those that vLLM ends with an error."""
    stock = module.Scheduler.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        takers = [each for each in connectors_of(self) if hasattr(each, "fail_requests_through")]
        if takers and isinstance(getattr(self, "grammar_compile_error_reqs", None), set | dict):
            for taker in takers:
                taker.fail_requests_through(_failer(self))
        elif takers and _wants_pool(getattr(self, "vllm_config", None)):
            raise _does_not_fit(AttributeError("Scheduler.grammar_compile_error_reqs"))

    module.Scheduler.__init__ = init


def _failer(scheduler: Any) -> Callable[[str], None]:
    """Ends requests with an error, by id: vLLM has a set of their ids up to 0.32, a dict of their errors from 0.33 on,
    and there a new one for each step.
    """

    def fail(request_id: str) -> None:
        failed = scheduler.grammar_compile_error_reqs
        if isinstance(failed, set):
            failed.add(request_id)
        else:
            failed[request_id] = _request_error()

    return fail


def _request_error() -> Any:
    try:
        from vllm.outputs import RequestError
    except ImportError:  # then vLLM has words of its own
        return None
    why = "the LoRA adapter of this request cannot be served; the engine's log says why"
    return RequestError(code="lora_adapter_error", message=why)


def _patch_front_end(module: Any) -> None:
    """Names of adapters that only the cache knows."""
    stock = module.OpenAIServingModels.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        config = getattr(getattr(self, "engine_client", None), "vllm_config", None)
        try:
            from loracache.connectors.vllm.options import is_ours

            if is_ours(config):
                forget_orders(self)
        except (ImportError, AttributeError, TypeError) as error:
            _failed("how adapters are loaded in place is not what we know", error)
        if not _wants_pool(config):
            return
        try:
            from loracache.connectors.vllm.lora.resolver import resolve_names_through_the_cache

            resolve_names_through_the_cache(self)
        except (ImportError, AttributeError) as error:
            raise _does_not_fit(error) from error

    module.OpenAIServingModels.__init__ = init
