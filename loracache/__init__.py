# SPDX-License-Identifier: Apache-2.0
"""LoRACache: one external cache for everything an LLM server reads again.

What users hold is here: the client, how objects are named, what calls answer, every error. Each name is loaded on
first use, so that `import loracache` alone stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loracache.client.answers import Adapter, Flushed, Lookup, Reading, Reservation, Slot
    from loracache.client.client import CacheClient
    from loracache.client.control import Located, OperationReport, Selection
    from loracache.errors import (
        ConfigError,
        LeaseLost,
        LoRACacheError,
        ProtocolError,
        Rejected,
        Unavailable,
        Unknown,
        UsageError,
    )
    from loracache.groups import Group, Need
    from loracache.keys import KEY_BYTES, LORA_NAMESPACE, Media, Namespace, chunk_keys, object_key, salt_digest
    from loracache.results import Cause, OperationState
    from loracache.tiers import Tier

__version__ = "0.1.0"

__all__ = [
    "KEY_BYTES", "LORA_NAMESPACE", "Adapter", "CacheClient", "Cause", "ConfigError", "Flushed", "Group", "LeaseLost",
    "LoRACacheError", "Located", "Lookup", "Media", "Namespace", "Need", "OperationReport", "OperationState",
    "ProtocolError", "Reading", "Rejected", "Reservation", "Selection", "Slot", "Tier", "Unavailable", "Unknown",
    "UsageError", "__version__", "chunk_keys", "object_key", "salt_digest",
]  # fmt: skip

_HOMES = (
    "errors",
    "tiers",
    "results",
    "groups",
    "keys",
    "client.control",
    "client.answers",
    "client.client",
)  # the cheapest first


def __getattr__(name: str) -> object:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"loracache.{home}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module 'loracache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
