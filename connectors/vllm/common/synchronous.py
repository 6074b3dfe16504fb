# SPDX-License-Identifier: Apache-2.0
"""What `layer_by_layer` needs of an engine: that every step is over, and its result known, before the next is planned,
and that nobody but us and vLLM keeps what a step has computed.
"""

from __future__ import annotations

from typing import Any

from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.common.patches import problem
from loracache.connectors.vllm.common.releases import binds_kv_cache_manager, vllm_version
from loracache.errors import ConfigError

__all__ = ["check_alone", "check_synchronous", "unknown_prefix_cache"]

_SET = "kv_connector_extra_config: layer_by_layer is set, but"


def check_synchronous(vllm_config: Any, options: Options) -> None:
    """Raises ConfigError, with the fix, where an engine cannot load layer by layer and is told to."""
    if not options.layer_by_layer:
        return
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if not binds_kv_cache_manager():
        why = f"vLLM {vllm_version()} does not show connectors its prefix cache; take 0.32 or later"
    elif problem():
        why = problem()
    elif policy != "recompute":
        why = f'kv_load_failure_policy is "{policy}"; set it to "recompute"'
    elif getattr(vllm_config.scheduler_config, "async_scheduling", False):
        why = (
            "vLLM schedules asynchronously: it plans a step before the last one's result is known; start it with "
            "--no-async-scheduling (async_scheduling=False)"
        )
    elif stages > 1:
        why = (
            f"pipeline_parallel_size is {stages}: vLLM plans a step before the last one's result is known; use tensor "
            "parallelism"
        )
    else:
        return
    raise ConfigError(f"{_SET} {why}, or leave layer_by_layer out")


def unknown_prefix_cache(error: Exception) -> ConfigError:
    """For an engine whose prefix cache is not as we know it."""
    return ConfigError(f"{_SET} vLLM's prefix cache is not as we know it ({error}); leave layer_by_layer out")


def check_alone(connector: Any, ours: Any) -> None:
    """connector: the scheduler's; ours: the one of us that is it, or is inside it. Raises ConfigError where others are
    beside us, and would keep what was computed upon bytes that are not checked yet."""
    if ours is not connector and ours.layer_by_layer:
        raise ConfigError(
            f"{_SET} the connector is inside a {type(connector).__name__}: others may store what a step computes "
            "before its loads are known to be right; use LoRACacheConnector alone, or leave layer_by_layer out"
        )
