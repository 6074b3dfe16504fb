# SPDX-License-Identifier: Apache-2.0
"""Stands in for the one module of vLLM that the worker's threads import: to import it takes longer than much of what is
measured, and a machine with a GPU may have none. To be imported before them."""

import sys
from types import ModuleType

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_module = ModuleType(_BASE)
for _name in ("KVConnectorHandshakeMetadata", "KVConnectorMetadata", "KVConnectorWorkerMetadata"):
    setattr(_module, _name, type(_name, (), {}))  # what the messages between a connector's sides derive from
sys.modules[_BASE] = _module
