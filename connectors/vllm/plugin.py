# SPDX-License-Identifier: Apache-2.0
"""What vLLM loads in every process (entry point vllm.general_plugins): puts paged LoRA where an engine asks for it.

It is given no configuration, and it patches every vLLM of the environment: so each patch looks at the engine it is
called for, and does what vLLM did before unless that engine's connector is ours and sets lora_pool. A release that we
do not know is left alone, and a patch that does not fit leaves vLLM as it was: an engine that sets lora_pool is then
refused (`patches.problem`), every other one runs. Light to import.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

from loracache.connectors.vllm.common import patches
from loracache.connectors.vllm.common.connectors_of import connectors_of
from loracache.connectors.vllm.common.logs import log_as_vllm_does
from loracache.connectors.vllm.common.releases import unknown_release, vllm_version
from loracache.connectors.vllm.frontend.refusals import answer_refusals, check_what_is_added, raise_refusals
from loracache.connectors.vllm.frontend.reload import forget_orders, tell_of_reloads
from loracache.connectors.vllm.lora.refusals import Refusal
from loracache.errors import ConfigError

__all__ = ["register"]

_log = logging.getLogger(__name__)


def register() -> None:
    """Patch vLLM, once, and each module only when vLLM itself imports it: importing them here would load the front end
    into every worker, before that has bound its threads to its cores. Never raises.
    """
    if not patches.begin():
        return
    log_as_vllm_does()
    unknown = unknown_release()
    if unknown:
        patches.problems.append(unknown)
        if multiprocessing.parent_process() is None:  # an engine has many processes, and one of them says it
            _log.warning("%s: its plugin stays out of the way, and lora_pool cannot be set", unknown)
        return
    wanted = {
        "vllm.distributed.kv_transfer.kv_connector.factory": _name_connector,
        "vllm.v1.worker.lora_model_runner_mixin": _patch_worker,
        "vllm.v1.core.sched.scheduler": _patch_scheduler,
        "vllm.v1.engine.core": tell_of_reloads,
        "vllm.v1.engine.async_llm": lambda module: check_what_is_added(module, _wants_pool),
        "vllm.v1.engine.output_processor": raise_refusals,
        "vllm.v1.engine.input_processor": _patch_input,
        "vllm.entrypoints.openai.models.serving": _patch_front_end,
    }
    patches.install(wanted)


def _name_connector(factory: Any) -> None:
    """Inside a MultiConnector vLLM finds the class of what was counted by its name, among those it knows."""
    name = "LoRACacheConnector"
    if name not in factory.KVConnectorFactory._registry:
        factory.KVConnectorFactory.register_connector(name, "loracache.connectors.vllm.connector", name)


def _wants_pool(vllm_config: Any) -> bool:
    """Whether the engine of this configuration has our connector and sets lora_pool. Raises ConfigError where it sets
    it wrongly; a configuration that is not as we know it is somebody else's."""
    try:
        from loracache.connectors.vllm.common.options import pool_bytes

        return bool(pool_bytes(vllm_config))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - the engine may not be ours at all
        patches.failed("the engine's configuration is not what we know", error)
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
            from loracache.connectors.vllm.worker.lora.manager import PagedWorkerLoRAManager
        except (ImportError, AttributeError) as error:
            raise _does_not_fit(error) from error
        return PagedWorkerLoRAManager(vllm_config, *args, **kwargs)

    mixin.LRUCacheWorkerLoRAManager = make


def _patch_scheduler(module: Any) -> None:
    """Give our connector the one way to end a request that can never run: among those that vLLM ends with an error."""
    stock = module.Scheduler.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        connector = getattr(self, "connector", None)
        for ours in (each for each in connectors_of(self) if getattr(each, "layer_by_layer", False)):
            from loracache.connectors.vllm.common.synchronous import check_alone

            check_alone(connector, ours)
        takers = [each for each in connectors_of(self) if hasattr(each, "fail_requests_through")]
        if takers and isinstance(getattr(self, "grammar_compile_error_reqs", None), set | dict):
            for taker in takers:
                taker.fail_requests_through(_failer(self))
        elif takers and _wants_pool(getattr(self, "vllm_config", None)):
            raise _does_not_fit(AttributeError("Scheduler.grammar_compile_error_reqs"))

    module.Scheduler.__init__ = init


def _failer(scheduler: Any) -> Callable[[str, Refusal], None]:
    """Ends requests with an error, by id: vLLM has a set of their ids up to 0.32, a dict of their errors from 0.33 on,
    and there a new one for each step. For the set the reason travels as why the request stopped.
    """
    reasons: dict[str, Refusal] = {}

    def fail(request_id: str, refusal: Refusal) -> None:
        failed = scheduler.grammar_compile_error_reqs
        if isinstance(failed, set):
            failed.add(request_id)
            reasons[request_id] = refusal
        else:
            failed[request_id] = _request_error(refusal)

    if isinstance(scheduler.grammar_compile_error_reqs, set):
        stock = scheduler.update_from_output

        def update_from_output(*args: Any, **kwargs: Any) -> Any:
            answer = stock(*args, **kwargs)
            ended = [output for each in answer.values() for output in each.outputs] if reasons else []
            for output in ended:
                if output.request_id in reasons and output.finish_reason is not None:
                    output.stop_reason = str(reasons[output.request_id])
            reasons.clear()  # this step has ended all that were to be
            return answer

        scheduler.update_from_output = update_from_output
    return fail


def _request_error(refusal: Refusal) -> Any:
    try:
        from vllm.outputs import RequestError
    except ImportError:  # then vLLM has words of its own
        return None
    code = "validation_error" if refusal.forever else "lora_adapter_error"
    return RequestError(code=code, message=str(refusal), retryable=not refusal.forever)


def _patch_input(module: Any) -> None:
    from loracache.connectors.vllm.frontend.wishes import refuse_wrong_wishes

    refuse_wrong_wishes(module)


def _patch_front_end(module: Any) -> None:
    """Names of adapters that only the cache knows."""
    stock = module.OpenAIServingModels.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        config = getattr(getattr(self, "engine_client", None), "vllm_config", None)
        try:
            from loracache.connectors.vllm.common.options import is_ours

            if is_ours(config):
                forget_orders(self)
        except (ImportError, AttributeError, TypeError) as error:
            patches.failed("how adapters are loaded in place is not what we know", error)
        if not _wants_pool(config):
            return
        try:
            from loracache.connectors.vllm.frontend.resolver import resolve_names_through_the_cache

            resolve_names_through_the_cache(self)
            answer_refusals(self)
        except (ImportError, AttributeError) as error:
            raise _does_not_fit(error) from error

    module.OpenAIServingModels.__init__ = init
