# SPDX-License-Identifier: Apache-2.0
"""Which connectors an engine's scheduler has, for patches of vLLM that look for ours. Light: the plugin imports it."""

from __future__ import annotations

from typing import Any

__all__ = ["connectors_of"]


def connectors_of(scheduler: Any) -> list[Any]:
    """Its connector and, where that is a MultiConnector, those inside it."""
    connector = getattr(scheduler, "connector", None)
    return [connector, *getattr(connector, "_connectors", ())]
