# SPDX-License-Identifier: Apache-2.0
"""The vLLM connector: KV of stock vLLM, found again in LoRACache. docs/vllm.md says what it promises.

vLLM loads connector.py, which hands every call to one of the two sides, and plugin.py, in every process. Then one room
a process: scheduler/ (EngineCore), worker/, frontend/ (the API server); each with its part of paged LoRA.

May import: connectors.vllm.common, connectors.vllm.frontend, connectors.vllm.identity, connectors.vllm.link,
    connectors.vllm.lora, connectors.vllm.scheduler, connectors.vllm.worker, connectors.vllm.worker.lora, errors,
    groups
Threads: vLLM's own; each room says which it adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracache.connectors.vllm.connector import LoRACacheConnector

__all__ = ["LoRACacheConnector"]


def __getattr__(name: str) -> Any:
    """Imports the connector when vLLM asks for it: the plugin is loaded in every process, and most need no more."""
    if name != "LoRACacheConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loracache.connectors.vllm.connector import LoRACacheConnector

    return LoRACacheConnector
