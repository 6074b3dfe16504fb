# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM we know, and what is done about the others. Light: imports nothing of vLLM but its version.

The plugin stays out of an engine it does not know; the connector, which reads how KV lies from the tensors it is given,
warns and goes on; `lora_pool` stands in the place of vLLM's own LoRA code and is refused.
"""

from __future__ import annotations

import importlib.util
import re

__all__ = [
    "NEWEST",
    "OLDEST",
    "binds_kv_cache_manager",
    "has_block_references",
    "has_kv_layouts",
    "unknown_release",
    "vllm_version",
]

OLDEST = (0, 26)
NEWEST = (0, 33)


def vllm_version() -> str:
    """What vLLM says it is; "unknown" where it cannot say."""
    try:
        from vllm.version import __version__
    except ImportError:
        return "unknown"
    return str(__version__)


def has_kv_layouts() -> bool:
    """Whether a connector may name one of the KV cache's layouts (0.29 on)."""
    return importlib.util.find_spec("vllm.v1.kv_cache_layout") is not None


def has_block_references() -> bool:
    """Whether a connector is given vLLM's pool of blocks and a step's tables of them, and can report a load of several
    groups as failed (0.32 on)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched import output

    hooks = "bind_gpu_block_pool", "get_transfer_results"
    return all(hasattr(KVConnectorBase_V1, name) for name in hooks) and hasattr(output, "KVConnectorBlockState")


def binds_kv_cache_manager() -> bool:
    """Whether a connector is given vLLM's KVCacheManager (0.32 on)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    return hasattr(KVConnectorBase_V1, "bind_kv_cache_manager")


def unknown_release() -> str:
    """Why this vLLM is none that we know, or ""."""
    version = vllm_version()
    match = re.match(r"(\d+)\.(\d+)", version)
    release = (int(match[1]), int(match[2])) if match else None
    if release is not None and OLDEST <= release <= NEWEST:
        return ""
    return f"vLLM {version} is none of the releases that loracache knows ({_name(OLDEST)} to {_name(NEWEST)})"


def _name(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
